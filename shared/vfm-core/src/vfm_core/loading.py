"""Streaming batches: decode in worker processes, pass unreadable pictures on as errors, never hold a whole dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vfm_core.dataset import ImageDataset, Sample
from vfm_core.errors import UserError

__all__ = ["Batch", "OnError", "loader"]

OnError = Callable[[int, str, UserError], None]
Batch = tuple[Tensor, Tensor, list[Sample]]


class _Items(torch.utils.data.Dataset):
    """What a worker process does: decode, transform, and turn a bad file into a value instead of an exception."""

    def __init__(self, dataset: ImageDataset, transform: Callable[[Image.Image], Tensor], keep: bool) -> None:
        self.dataset, self.transform, self.keep = dataset, transform, keep

    def __getitem__(self, i: int) -> tuple[int, Tensor | None, Sample | UserError | None]:
        try:
            sample = self.dataset[i]
            return i, self.transform(sample.image), sample if self.keep else None
        except UserError as error:
            return i, None, error


def _collate(items: list[tuple[int, Tensor | None, Any]]) -> tuple[list[Batch], list[tuple[int, UserError]]]:
    errors = [(i, error) for i, x, error in items if x is None]
    by_shape: dict[tuple[int, ...], list[tuple[int, Tensor, Any]]] = {}
    for i, x, sample in items:
        if x is not None:
            by_shape.setdefault(tuple(x.shape), []).append((i, x, sample))
    batches = [
        (torch.tensor([i for i, _, _ in group]), torch.stack([x for _, x, _ in group]), [s for _, _, s in group if s])
        for group in by_shape.values()
    ]
    return batches, errors


def loader(
    dataset: ImageDataset,
    transform: Callable[[Image.Image], Tensor],
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device = "cpu",
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    samples: bool = True,
    on_error: OnError | None = None,
) -> Iterator[Batch]:
    """Stream a dataset in batches; at most a few batches are in memory.

    Parameters
    ----------
    dataset : ImageDataset
        What to read.
    transform : callable
        Picture -> tensor, such as a ``Preprocess``. Pictures of one batch whose tensors differ in shape (aspect ratio
        kept) come in several smaller batches, one per shape.
    batch_size : int
        Pictures per batch; unreadable ones make it smaller.
    workers : int
        Decoding processes; 0 decodes in this one.
    device : str or torch.device
        Where the batch tensors go.
    indices : sequence of int, optional
        Which pictures, in which order; all by default.
    samples : bool
        False spares sending the pictures themselves from the workers; the third item is then empty.
    on_error : callable, optional
        ``on_error(index, id, error)`` for each unreadable picture, which is then left out. Without it the first one
        raises.

    Yields
    ------
    indices : Tensor of int64, (b,)
        Positions in ``dataset``, on the CPU.
    batch : Tensor, (b, ...)
        Transformed pictures on ``device``.
    samples : list of Sample
        Length b, or empty.

    Raises
    ------
    UserError
        An unreadable picture when there is no ``on_error``; a batch size below 1.
    """
    if batch_size < 1 or workers < 0:
        raise UserError("batch size must be positive and workers not negative", given=f"{batch_size}, {workers}")
    device = torch.device(device)
    order = range(len(dataset)) if indices is None else [int(i) for i in indices]
    stream = torch.utils.data.DataLoader(
        _Items(dataset, transform, samples),
        batch_size=batch_size,
        sampler=order,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # DataLoader draws a worker seed; without this, from the global generator
    )
    for batches, errors in stream:
        for i, error in errors:
            if on_error is None:
                raise error
            on_error(i, dataset.ids[i], error)
        for positions, batch, kept in batches:
            yield positions, batch.to(device, non_blocking=True), kept
