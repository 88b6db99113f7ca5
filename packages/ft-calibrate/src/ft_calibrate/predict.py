"""Scores of pictures: one pass over the data, features and logits together, labels as logit columns by class name.

Every method of FTC (arXiv 2409.16223) starts from logits (N, K), the feature diagnosis from features (N, D) of the same
pictures: no picture is decoded or run twice for the two. Matching class names by spelling is ours.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from vfm_core.data import ImageDataset, loader
from vfm_core.errors import UserError, closest
from vfm_core.loading import OnError

from ft_calibrate.class_names import match_columns
from ft_calibrate.classifier import Classifier
from ft_calibrate.tables import LogitTable

__all__ = ["columns_of", "evaluating", "labels_of", "predict_table", "stream", "table_of"]

log = logging.getLogger(__name__)

Data = ImageDataset | tuple[Tensor, Tensor | None]
Part = tuple[NDArray[np.int64], NDArray[Any] | None, NDArray[Any]]  # rows of the data set, features, logits


# ---------------------------------------------------------------------- class names
def columns_of(
    dataset_classes: Sequence[str], class_names: Sequence[str] | None, where: str | Path | None = None
) -> NDArray[np.int64]:
    """Logit columns of a data set's classes, matched by name.

    `ft_calibrate.class_names.match_columns` says which spellings agree.

    Parameters
    ----------
    dataset_classes : sequence of str
        C names.
    class_names : sequence of str or None
        The model's K names, or their plain numbers; None takes the data set's order for the model's, with a warning.
    where : str or Path, optional
        For messages.

    Returns
    -------
    ndarray of int64, (C,)

    Raises
    ------
    UserError
        Names without a column, or two names with one.

    Examples
    --------
    >>> columns_of(["alarm clock", "Bed"], ["Bed", "Alarm_Clock", "Chair"])
    array([1, 0])
    """
    if class_names is None:
        log.warning("the model has no class names: its %d logits are taken in the data's order", len(dataset_classes))
        return np.arange(len(dataset_classes), dtype=np.int64)
    found = match_columns(dataset_classes, class_names)
    unknown = [name for name, column in zip(dataset_classes, found, strict=True) if column is None]
    if unknown:
        near = closest(unknown[0], class_names, 1)
        hint = f" (close to {unknown[0]!r}: {near[0]!r})" if near else ""
        given = f"{len(unknown)} of {len(dataset_classes)}, such as {', '.join(unknown[:5])}{hint}"
        remedy = "give the model's class names with --classes, spelled as in the data"
        raise UserError("the model has no logit for classes of the data", where=where, given=given, remedy=remedy)
    columns = np.asarray(found, dtype=np.int64)
    values, counts = np.unique(columns, return_counts=True)
    if (counts > 1).any():
        both = [dataset_classes[int(i)] for i in np.flatnonzero(columns == values[counts.argmax()])]
        raise UserError("two classes of the data have one logit", where=where, given=" and ".join(both))
    return columns


# ---------------------------------------------------------------------- running the model
@contextlib.contextmanager
def evaluating(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Put a model into eval mode, and on a device; on any exit each module is back in its mode and place."""
    training = [module for module in model.modules() if module.training]
    home = next((p.device for p in model.parameters()), None)
    try:
        model.eval()
        if device is not None and home is not None and home != device:
            model.to(device)
        yield
    finally:
        for module in training:
            module.training = True
        if device is not None and home is not None and home != device:
            model.to(home)


@contextlib.contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Lay a model's 4-d tensors out channels last, which GPUs convolve faster; on any exit they are as they were."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        return itertools.chain(model.named_parameters(), model.named_buffers())

    plain = {name for name, tensor in tensors() if tensor.ndim == 4 and tensor.is_contiguous()}
    try:
        model.to(memory_format=torch.channels_last)
        yield
    finally:
        for name, tensor in tensors():
            if name in plain:
                tensor.data = tensor.data.contiguous()


def predict_table(
    classifier: Classifier,
    data: Data,
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: str | torch.device | None = None,
    on_error: OnError | None = None,
    features: bool = True,
    autocast: torch.dtype | None = None,
) -> LogitTable:
    """Score a data set that fits into memory.

    Parameters
    ----------
    classifier : Classifier
        In any mode; runs in eval mode and is put back.
    data : ImageDataset, or (Tensor, Tensor or None)
        Pictures with labels (matched to the model's classes by name), or preprocessed inputs (N, 3, h, w) with labels
        (N,) that are logit columns.
    batch_size, workers : int
        Pictures per forward pass; processes that decode.
    device : optional
        Where to run; by default where the model is.
    on_error : callable, optional
        ``on_error(index, id, error)`` for each unreadable picture, which then has no row. Without it the first raises.
    features : bool
        Whether to keep the head's inputs.
    autocast : torch.dtype, optional
        bfloat16 or float16 for the forward pass; results are float32 all the same.

    Returns
    -------
    LogitTable
        Rows in the order of the data; labels are logit columns, -1 where unknown.

    Raises
    ------
    UserError
        Unreadable pictures (see `on_error`), no preprocessing, classes without a logit, NaN logits, no rows.
    """
    parts = list(stream(classifier, data, None, batch_size, workers, device, on_error, features, autocast))
    if not parts:
        raise UserError("no readable picture", where=getattr(data, "name", "data"), remedy="check the files")
    rows = np.concatenate([p[0] for p in parts])
    order = np.argsort(rows, kind="stable")
    found = np.concatenate([p[1] for p in parts if p[1] is not None])[order] if features else None
    classes, labels = labels_of(classifier, data)
    return table_of(rows[order], np.concatenate([p[2] for p in parts])[order], found, classes, labels, data)


def table_of(
    rows: NDArray[np.int64],
    logits: NDArray[Any],
    features: NDArray[Any] | None,
    classes: list[str],
    labels: NDArray[np.int64] | None,
    data: Data,
) -> LogitTable:
    """A table of some rows of the data; `labels` are those of all rows."""
    ids = [data.ids[i] for i in rows] if isinstance(data, ImageDataset) else None
    return LogitTable(logits, classes, None if labels is None else labels[rows], features, ids)


def labels_of(classifier: Classifier, data: Data) -> tuple[list[str], NDArray[np.int64] | None]:
    """The table's class names and the labels of all pictures as logit columns."""
    k, names = classifier.num_classes, classifier.class_names
    numbers = [str(i) for i in range(k)]
    if not isinstance(data, ImageDataset):
        labels = None if data[1] is None else data[1].detach().cpu().numpy().astype(np.int64)
        return names or numbers, labels
    labels = np.asarray(data.labels)
    if not len(data.classes) or not (labels >= 0).any():
        return names or numbers, None
    if names is None and set(data.classes) <= set(numbers):
        names = numbers
    if names is None and len(data.classes) != k:
        given = f"{k} logits, {len(data.classes)} classes in {data.name}"
        remedy = "name the logits with --classes FILE"
        raise UserError("a model without class names", where=classifier.spec or None, given=given, remedy=remedy)
    columns = columns_of(data.classes, names, data.name)
    return names or list(data.classes), np.where(labels < 0, -1, columns[np.maximum(labels, 0)])


def stream(
    classifier: Classifier,
    data: Data,
    indices: Sequence[int] | NDArray[Any] | None,
    batch_size: int,
    workers: int,
    device: str | torch.device | None,
    on_error: OnError | None,
    features: bool,
    autocast: torch.dtype | None,
) -> Iterator[Part]:
    """Stream (rows, features, logits) as float32 arrays; one forward pass per batch, each picture decoded once."""
    place = classifier.device if device is None else torch.device(device)
    on_gpu = place.type == "cuda"
    cast = (
        torch.autocast(place.type, dtype=autocast)
        if autocast not in (None, torch.float32)
        else contextlib.nullcontext()
    )
    layout = channels_last(classifier.model) if on_gpu else contextlib.nullcontext()
    with evaluating(classifier.model, place), layout:
        for positions, x in _batches(classifier, data, indices, batch_size, workers, place, on_error):
            if on_gpu and x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.inference_mode(), cast:
                try:
                    f, z = classifier.features_and_logits(x)
                except torch.cuda.OutOfMemoryError as error:
                    remedy = "lower --batch-size, or use --autocast bfloat16"
                    raise UserError("out of GPU memory", given=f"batches of {len(x)}", remedy=remedy) from error
            logits = _array(z)
            if np.isnan(logits).any() or (logits == np.inf).any():
                row = int(positions[int(np.argmax(np.isnan(logits).any(1) | (logits == np.inf).any(1)))])
                which = data.ids[row] if isinstance(data, ImageDataset) else f"row {row}"
                remedy = "run without --autocast" if autocast is torch.float16 else "check the checkpoint"
                raise UserError("logits are not finite", where=classifier.spec or None, given=which, remedy=remedy)
            yield positions.numpy(), _array(f) if features else None, logits


def _array(values: Tensor) -> NDArray[Any]:
    return values.to(torch.float64 if values.dtype == torch.float64 else torch.float32).cpu().numpy()


def _batches(
    classifier: Classifier,
    data: Data,
    indices: Sequence[int] | NDArray[Any] | None,
    batch_size: int,
    workers: int,
    device: torch.device,
    on_error: OnError | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    if not isinstance(data, ImageDataset):
        chosen = torch.arange(len(data[0])) if indices is None else torch.as_tensor(np.asarray(indices))
        for rows in chosen.split(batch_size):
            yield rows, data[0][rows].to(device, non_blocking=True)
        return
    if classifier.preprocess is None:
        remedy = "set classifier.preprocess, or give preprocessed tensors"
        raise UserError("the model does not say how pictures are preprocessed", given=classifier.spec, remedy=remedy)
    batches = loader(
        data,
        classifier.preprocess,
        batch_size,
        workers,
        device,
        indices=indices,
        samples=False,
        on_error=on_error,
    )
    for positions, x, _ in batches:
        yield positions, x
