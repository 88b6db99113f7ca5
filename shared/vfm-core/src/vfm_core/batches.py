"""Shuffled training batches from tensors (cached features) or pictures, reproducible from one generator per epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vfm_core.dataset import ImageDataset, Sample, Subset
from vfm_core.errors import UserError
from vfm_core.loading import OnError, loader

__all__ = ["Batches", "image_batches", "tensor_batches"]


class Batches:
    """One epoch: an iterable of batches that knows its length.

    Parameters
    ----------
    number : int
        How many batches there will be.
    make : callable
        Gives the iterator.
    """

    def __init__(self, number: int, make: Callable[[], Iterator[tuple[Any, ...]]]) -> None:
        self.number, self.make = number, make

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self.make()


Source = Callable[[int, torch.Generator], Batches]


def tensor_batches(
    *tensors: Tensor, batch_size: int, shuffle: bool = True, drop_last: bool = False, dtype: torch.dtype = torch.float32
) -> Source:
    """Cut tensors of equal length into batches, in a new order each epoch.

    Parameters
    ----------
    *tensors : Tensor
        Inputs and, last, targets; the first axes agree. Memory-mapped ones are read row by row.
    batch_size : int
        Rows per batch.
    shuffle, drop_last : bool
        New order each epoch; leave out a last batch that is smaller.
    dtype : torch.dtype
        What floating-point tensors become: features are often stored as float16, weights are float32.

    Returns
    -------
    callable
        ``(epoch, generator) -> Batches`` for :func:`vfm_core.train.fit`.

    Raises
    ------
    UserError
        Tensors of different length, or no batch at all.
    """
    lengths = [len(t) for t in tensors]
    if len(set(lengths)) != 1:
        raise UserError("tensors to train on differ in length", given=lengths)
    n = lengths[0]
    number = _number(n, batch_size, drop_last)

    def source(epoch: int, generator: torch.Generator) -> Batches:
        order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)

        def make() -> Iterator[tuple[Any, ...]]:
            for rows in order.split(batch_size)[:number]:
                picked = (t[rows.to(t.device)] for t in tensors)
                yield tuple(t.to(dtype) if t.is_floating_point() else t for t in picked)

        return Batches(number, make)

    return source


def image_batches(
    dataset: ImageDataset,
    transform: Callable[[Image.Image], Tensor],
    batch_size: int,
    *,
    workers: int = 0,
    augment: Callable[[Image.Image, torch.Generator], Image.Image] | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    on_error: OnError | None = None,
) -> Source:
    """Stream pictures and labels in batches, in a new order each epoch.

    Parameters
    ----------
    dataset : ImageDataset
        Every picture needs a label.
    transform : callable
        Picture -> tensor.
    batch_size, workers, on_error
        As for :func:`vfm_core.data.loader`.
    augment : callable, optional
        ``augment(picture, generator) -> picture``, before ``transform``. The generator depends on the epoch and the
        picture alone, so that results are the same with any number of workers and after a resume.
    shuffle, drop_last : bool
        New order each epoch; leave out a last batch that is smaller.

    Returns
    -------
    callable
        ``(epoch, generator) -> Batches`` of ``(pictures (b, ...), labels (b,))`` for :func:`vfm_core.train.fit`.

    Raises
    ------
    UserError
        Pictures without labels, or no batch at all.
    """
    labels = torch.as_tensor(dataset.labels)
    if len(labels) == 0 or int(labels.min()) < 0:
        given = next((name for name, label in zip(dataset.ids, labels.tolist(), strict=True) if label < 0), "no images")
        raise UserError("training needs labelled images", where=dataset.name, given=given)
    n = len(dataset)
    number = _number(n, batch_size, drop_last)

    def source(epoch: int, generator: torch.Generator) -> Batches:
        order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
        order = order[: number * batch_size]
        seed = int(torch.randint(2**62, (), generator=generator))
        data = dataset if augment is None else _Augmented(dataset, augment, seed)

        def make() -> Iterator[tuple[Any, ...]]:
            stream = loader(
                data, transform, batch_size, workers, indices=order.numpy(), samples=False, on_error=on_error
            )
            return ((x, labels[positions]) for positions, x, _ in stream)

        return Batches(number, make)

    return source


class _Augmented(Subset):
    def __init__(
        self, dataset: ImageDataset, augment: Callable[[Image.Image, torch.Generator], Image.Image], seed: int
    ) -> None:
        super().__init__(dataset, range(len(dataset)))
        self.augment, self.seed = augment, seed

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        sample.image = self.augment(sample.image, torch.Generator().manual_seed(self.seed ^ int(index)))
        return sample


def _number(n: int, batch_size: int, drop_last: bool) -> int:
    if batch_size < 1:
        raise UserError("batch size must be positive", given=batch_size)
    number = n // batch_size if drop_last else math.ceil(n / batch_size)
    if number == 0:
        raise UserError(
            "no batch to train on", given=f"{n} rows for batch size {batch_size}", remedy="lower the batch size"
        )
    return number
