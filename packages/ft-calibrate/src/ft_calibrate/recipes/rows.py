"""Training rows in epochs of batches: tensors or pictures, any subset of them, with extra columns such as z_source(x).

Ours: an epoch is a number of steps, not a pass. Without ``steps`` it is one pass without the last, smaller batch (as in
FTC's code); with ``steps`` the passes follow each other, each in a new order. Fewer rows than a batch make one batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from vfm_core.batches import Batches
from vfm_core.data import ImageDataset, Sample, Subset, loader
from vfm_core.errors import UserError
from vfm_core.loading import OnError

__all__ = ["Augment", "ImageRows", "Rows", "TensorRows", "checked_inputs", "epoch_steps", "into_memory", "passes"]

log = logging.getLogger(__name__)

MEMORY_LIMIT = 2**29
"""Pictures that are not augmented are decoded once and kept when they take at most this many bytes as tensors."""

Augment = Callable[[Image.Image, torch.Generator], Image.Image]
Source = Callable[[int, torch.Generator], Batches]


def epoch_steps(n: int, batch_size: int, steps: int | None = None) -> int:
    """Number of batches of an epoch: ``steps``, or those of one pass without a smaller last batch; 1 at least."""
    return steps if steps is not None else max(n // batch_size, 1)


def passes(n: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield orders (b * batch,) of row numbers, one per pass over n rows, until ``steps`` batches are full.

    Every order holds whole batches of ``min(batch_size, n)`` rows, none of them twice.
    """
    size = min(batch_size, n)
    while steps > 0:
        number = min(n // size, steps)
        yield torch.randperm(n, generator=generator)[: number * size]
        steps -= number


def checked_inputs(model: nn.Module, x: Tensor) -> Tensor:
    """Inputs (N, ...) in the floating dtype of the model, after a try on the first row.

    Raises
    ------
    UserError
        NaN or infinite inputs; a row that the model does not take.
    """
    where = "training data"
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if x.is_floating_point():
        finite = torch.isfinite(x).reshape(len(x), -1).all(1)
        if not bool(finite.all()):
            given = f"{int((~finite).sum())} of {len(x)} rows, first row {int((~finite).nonzero()[0])}"
            raise UserError("inputs that are not finite", where=where, given=given, remedy="leave these rows out")
        x = x if parameter is None else x.to(parameter.dtype)
    was = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            model.eval()(x[:1] if parameter is None else x[:1].to(parameter.device))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as e:
        shape = f"rows of shape {tuple(x.shape[1:])} and type {x.dtype} ({str(e).splitlines()[0] if str(e) else e!r})"
        remedy = "give inputs as the model takes them"
        raise UserError("the model does not take these inputs", where=where, given=shape, remedy=remedy) from e
    finally:
        for module in was:
            module.training = True
    return x


@dataclass(frozen=True, eq=False)
class TensorRows:
    """Rows that lie in memory.

    Attributes
    ----------
    x : Tensor, (N, ...)
        What the model takes.
    labels : Tensor of int64, (N,)
        Columns of the head.
    """

    x: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def source(
        self, batch_size: int, steps: int | None = None, *, extra: Tensor | None = None, keep: Tensor | None = None
    ) -> Source:
        """Make the batches of `vfm_core.train.fit`: ``(epoch, generator) -> (x[, extra], labels)``.

        Parameters
        ----------
        batch_size, steps
            See `epoch_steps`.
        extra : Tensor, (N, ...), optional
            A further input per row.
        keep : Tensor of int64, optional
            Only these rows.
        """
        n = len(self) if keep is None else len(keep)
        _some(n)
        number = epoch_steps(n, batch_size, steps)

        def source(epoch: int, generator: torch.Generator) -> Batches:
            orders = list(passes(n, batch_size, number, generator))

            def make() -> Iterator[tuple[Any, ...]]:
                for order in orders:
                    for rows in order.split(min(batch_size, n)):
                        at = rows if keep is None else keep[rows]
                        inputs = [t[at.to(t.device)] for t in (self.x, extra) if t is not None]
                        yield (*inputs, self.labels[at.to(self.labels.device)])

            return Batches(number, make)

        return source

    def chunks(self, batch_size: int) -> Iterator[Tensor]:
        """Yield all rows in order, for one pass without gradients."""
        return iter(self.x.split(batch_size))


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Rows that are decoded when they are needed.

    Attributes
    ----------
    dataset : ImageDataset
        The pictures.
    labels : Tensor of int64, (N,)
        Columns of the head.
    transform : callable
        Picture -> tensor.
    augment : callable or None
        ``augment(picture, generator) -> picture``, before the transform.
    workers : int
        Decoding processes.
    on_error : callable or None
        Told of each unreadable picture, which is left out; without it the first one raises.
    """

    dataset: ImageDataset
    labels: Tensor
    transform: Callable[[Image.Image], Tensor]
    augment: Augment | None = None
    workers: int = 0
    on_error: OnError | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def source(
        self, batch_size: int, steps: int | None = None, *, extra: Tensor | None = None, keep: Tensor | None = None
    ) -> Source:
        """As `TensorRows.source`. Augmentation depends on seed, epoch, pass and picture, not on the workers."""
        n = len(self) if keep is None else len(keep)
        _some(n)
        number = epoch_steps(n, batch_size, steps)

        def source(epoch: int, generator: torch.Generator) -> Batches:
            orders = list(passes(n, batch_size, number, generator))
            seeds = [int(torch.randint(2**62, (), generator=generator)) for _ in orders]

            def make() -> Iterator[tuple[Any, ...]]:
                for order, seed in zip(orders, seeds, strict=True):
                    data = self.dataset if self.augment is None else _Augmented(self.dataset, self.augment, seed)
                    at = order if keep is None else keep[order]
                    stream = loader(
                        data,
                        self.transform,
                        min(batch_size, n),
                        self.workers,
                        indices=at.numpy(),
                        samples=False,
                        on_error=self.on_error,
                    )
                    for positions, x, _ in stream:
                        yield (x, *(() if extra is None else (extra[positions],)), self.labels[positions])

            return Batches(number, make)

        return source

    def chunks(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the rows in order, not augmented."""
        for _, x, _ in loader(
            self.dataset, self.transform, batch_size, self.workers, samples=False, on_error=self.on_error
        ):
            yield x


Rows = TensorRows | ImageRows


@dataclass
class _Skipped:
    rows: list[int] = field(default_factory=list)


def into_memory(rows: ImageRows, batch_size: int = 256) -> Rows:
    """Decode pictures once where that fits (`MEMORY_LIMIT`) and nothing is drawn anew per epoch.

    Otherwise the rows are returned as given. Unreadable pictures are left out, with their labels.
    """
    if rows.augment is not None or len(rows) == 0:
        return rows
    skipped = _Skipped()

    def skip(index: int, name: str, error: UserError) -> None:
        if rows.on_error is None:
            raise error
        skipped.rows.append(index)
        rows.on_error(index, name, error)

    collected: list[Tensor] = []
    positions: list[Tensor] = []
    total = 0
    for at, x, _ in loader(rows.dataset, rows.transform, batch_size, rows.workers, samples=False, on_error=skip):
        total += x.nbytes
        expected = math.ceil(x.nbytes / max(len(x), 1)) * len(rows)
        if total > MEMORY_LIMIT or expected > MEMORY_LIMIT or (collected and x.shape[1:] != collected[0].shape[1:]):
            return rows
        collected.append(x)
        positions.append(at)
    if not collected:
        raise UserError(
            "no readable image to train on", where=rows.dataset.name, given=f"{len(skipped.rows)} unreadable"
        )
    order = torch.cat(positions).argsort()
    return TensorRows(torch.cat(collected)[order], rows.labels[torch.cat(positions)[order]])


class _Augmented(Subset):
    def __init__(self, dataset: ImageDataset, augment: Augment, seed: int) -> None:
        super().__init__(dataset, np.arange(len(dataset)))
        self.augment, self.seed = augment, seed

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        sample.image = self.augment(sample.image, torch.Generator().manual_seed(self.seed ^ int(index)))
        return sample


def _some(n: int) -> None:
    if n == 0:
        raise UserError("no row to train on", remedy="check the data and the seen classes")
