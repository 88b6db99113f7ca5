"""What a frozen source model says of the training rows, computed once: features f(x) and logits z_O(x).

Ours: ``lp`` trains on the features, distillation without augmentation looks at the logits; neither changes during the
training. Pictures go through the feature cache of `vfm_core.cache`, so that another run decodes none of them again.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch
from torch import Tensor
from vfm_core.cache import cached_features

from ft_calibrate.classifier import Classifier
from ft_calibrate.recipes.rows import Rows, TensorRows
from ft_calibrate.recipes.student import head_logits

__all__ = ["features_hold", "first_rows", "source_pass"]

log = logging.getLogger(__name__)

_CHECKED = 64


@torch.no_grad()
def source_pass(
    source: Classifier, rows: Rows, batch_size: int, cache_dir: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Features and logits of every row in one pass, without augmentation.

    Parameters
    ----------
    source : Classifier
        Put into eval mode.
    rows : Rows
        Tensors, or pictures.
    batch_size : int
        Rows per forward pass.
    cache_dir : Path, optional
        Of the cache; pictures only.

    Returns
    -------
    features : Tensor, (N, D)
    logits : Tensor, (N, K)
        Both NaN in rows whose picture cannot be read.
    """
    source.model.eval()
    if isinstance(rows, TensorRows):
        parts = [source.features_and_logits(x.to(source.device)) for x in rows.chunks(batch_size)]
        return torch.cat([f for f, _ in parts]), torch.cat([z for _, z in parts])
    both = cached_features(
        source,
        rows.dataset,
        lambda x: torch.cat(source.features_and_logits(x), dim=1),
        "head input and logits",
        transform=rows.transform,
        cache_dir=cache_dir,
        batch_size=batch_size,
        workers=rows.workers,
        dtype=torch.float32,
        device=source.device,
        on_error=rows.on_error,
    )
    width = both.shape[1] - source.num_classes
    return both[:, :width], both[:, width:]


@torch.no_grad()
def features_hold(source: Classifier, features: Tensor, logits: Tensor) -> bool:
    """Whether the head alone turns the features into the logits; if not, lp runs the frozen backbone each time.

    Parameters
    ----------
    source : Classifier
        The source model.
    features, logits : Tensor, (N, D) and (N, K)
        Of `source_pass`.
    """
    good = ~torch.isnan(logits[:, 0])
    f, z = (t[good][:_CHECKED].to(source.device) for t in (features, logits))
    try:
        own = head_logits(source.head, f)
    except RuntimeError:
        own = z[:0]
    holds = own.shape == z.shape and bool(torch.allclose(own, z, rtol=1e-3, atol=1e-4 * float(1 + z.abs().max())))
    if not holds:
        log.warning("the logits are not the head's alone: lp computes the frozen backbone at every step")
    return holds


def first_rows(rows: Rows, number: int) -> Rows:
    """The first rows, for a small measurement."""
    if isinstance(rows, TensorRows):
        return TensorRows(rows.x[:number], rows.labels[:number])
    some = range(min(number, len(rows)))
    return dataclasses.replace(rows, dataset=rows.dataset.subset(some), labels=rows.labels[: len(some)])
