"""What a dataset is: named pictures with labels and annotations, decoded one at a time, with a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vfm_core.errors import UserError
from vfm_core.images import read_image, read_mask

__all__ = ["CONTENT_HASH_LIMIT", "ImageDataset", "Sample", "Subset"]

CONTENT_HASH_LIMIT = 64 * 2**20
"""Datasets up to this many bytes are fingerprinted by content, larger ones by file sizes and modification times."""


@dataclass
class Sample:
    """One picture with what is known about it.

    Attributes
    ----------
    id : str
        Stable and unique in its dataset; the relative path for files.
    image : PIL.Image.Image
        Upright, 8-bit RGB.
    label : int or None
        Index into the dataset's classes; None when unknown.
    meta : dict
        Annotations, in pixels of ``image``: ``box`` (x0, y0, x1, y1) floats, ``mask`` bool (H, W), ``parts``
        {name: (x, y)}, ``reference`` class name, ``group``, ``time``, and what a format adds.
    """

    id: str
    image: Image.Image
    label: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class ImageDataset:
    """A list of pictures that are decoded when asked for.

    Formats whose pictures are files need no subclass. Others override :meth:`read`, those with heavy annotations
    :meth:`annotate`.

    Parameters
    ----------
    name : str
        For people: shown in reports and errors.
    ids : sequence of str
        Stable, unique names, usually relative paths.
    labels : sequence of int
        Index into ``classes`` per picture, -1 where unknown.
    classes : sequence of str
        Display names; empty for unlabelled data.
    files : sequence of Path, optional
        The picture files, in the order of ``ids``.
    meta : sequence of mapping, optional
        Light annotations per picture (boxes, part points, strings).
    masks : sequence of Path or None, optional
        Mask pictures, decoded with the sample into ``meta["mask"]``.
    sources : sequence of Path
        Annotation files, which count for the fingerprint.

    Raises
    ------
    UserError
        Lengths that differ, ids that repeat, labels out of range.
    """

    def __init__(
        self,
        name: str,
        ids: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        *,
        files: Sequence[Path] | None = None,
        meta: Sequence[Mapping[str, Any]] | None = None,
        masks: Sequence[Path | None] | None = None,
        sources: Sequence[Path] = (),
    ) -> None:
        self.name = name
        self.ids = list(ids)
        self.labels = np.asarray(labels, dtype=np.int64).reshape(-1)
        self.classes = list(classes)
        self.files, self.meta, self.masks, self.sources = files, meta, masks, list(sources)
        for what, values in (("labels", self.labels), ("files", files), ("meta", meta), ("masks", masks)):
            if values is not None and len(values) != len(self.ids):
                raise UserError(f"{what} and ids differ in number", where=name, given=f"{len(values)}, {len(self.ids)}")
        if len(set(self.ids)) != len(self.ids):
            repeated = Counter(self.ids).most_common(1)[0][0]
            raise UserError("image listed twice", where=name, given=repeated, remedy="keep one of them")
        if len(self.labels) and not (self.labels.min() >= -1 and self.labels.max() < max(len(self.classes), 0)):
            raise UserError("label out of range", where=name, given=f"{self.labels.min()}..{self.labels.max()}")
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} images, {len(self.classes)} classes)"

    def __getitem__(self, index: int) -> Sample:
        """Decode one picture.

        Raises
        ------
        UserError
            The picture or its mask cannot be read; the message names the file.
        IndexError
            Beyond the end.
        """
        i = self._position(index)
        image = self.read(i)
        label = int(self.labels[i])
        return Sample(self.ids[i], image, None if label < 0 else label, {**self.meta_of(i), **self.annotate(i, image)})

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def read(self, i: int) -> Image.Image:
        """Decode picture ``i`` (0 <= i < len) as upright RGB."""
        if self.files is None:
            raise NotImplementedError(f"{type(self).__name__} has no files and must override read()")
        return read_image(self.files[i])

    def meta_of(self, index: int) -> dict[str, Any]:
        """Return the light annotations of one picture without decoding anything."""
        return {} if self.meta is None else dict(self.meta[self._position(index)])

    def annotate(self, i: int, image: Image.Image) -> dict[str, Any]:
        """Return the annotations that cost a decode, such as masks; called with the decoded picture."""
        path = None if self.masks is None else self.masks[i]
        return {} if path is None else {"mask": read_mask(path, image.size)}

    def subset(self, indices: Sequence[int] | np.ndarray) -> Subset:
        """Return a view of the given pictures, in the given order, with the same classes."""
        return Subset(self, indices)

    def fingerprint(self) -> str:
        """Return a digest that changes when the data does; computed once per object.

        It covers ids, labels, class names, light annotations and the files in their order. Up to 64 MiB in all, the
        files' content is hashed, so a copied dataset keeps its fingerprint. Beyond, sizes and modification times (ns)
        stand for the content: one ``stat`` per file instead of reading terabytes, at the price that an edit which
        keeps both goes unseen, and that a copy made without times counts as new. Folder location never counts.

        Returns
        -------
        str
            32 hexadecimal digits.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(self.identity())
            masks = [m for m in self.masks or () if m is not None]
            _hash_files(digest, [*(self.files or ()), *masks, *self.sources])
            self._fingerprint = digest.hexdigest()[:32]
        return self._fingerprint

    def identity(self) -> bytes:
        """Return what the fingerprint covers apart from file content; formats without files extend it."""
        facts = [self.ids, self.labels.tolist(), self.classes, self.meta and [dict(m) for m in self.meta]]
        return json.dumps(facts, default=str, sort_keys=True).encode()

    def _position(self, index: int) -> int:
        i = int(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} images, index {i} is beyond")
        return i % len(self)


class Subset(ImageDataset):
    """Some pictures of a dataset, in a chosen order; classes and ids stay those of the whole.

    Parameters
    ----------
    dataset : ImageDataset
        The whole.
    indices : sequence of int
        Positions in it.
    """

    def __init__(self, dataset: ImageDataset, indices: Sequence[int] | np.ndarray) -> None:
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        ids = [dataset.ids[i] for i in self.indices]
        super().__init__(dataset.name, ids, np.asarray(dataset.labels)[self.indices], dataset.classes)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[int(self.indices[self._position(index)])]

    def meta_of(self, index: int) -> dict[str, Any]:
        """Return the light annotations of one picture without decoding anything."""
        return self.dataset.meta_of(int(self.indices[self._position(index)]))

    def identity(self) -> bytes:
        """Return the whole's fingerprint and the positions."""
        return self.dataset.fingerprint().encode() + self.indices.tobytes()


def _hash_files(digest: Any, files: Sequence[Path]) -> None:
    sizes: list[tuple[int, int] | None] = []
    for path in files:
        try:
            stat = os.stat(path)  # noqa: PTH116 - half the cost of Path.stat, over millions of files
            sizes.append((stat.st_size, stat.st_mtime_ns))
        except OSError:
            sizes.append(None)  # a missing file is a fact as well: it may be back next time
    by_content = sum(s[0] for s in sizes if s) <= CONTENT_HASH_LIMIT
    for path, size in zip(files, sizes, strict=True):
        try:
            content = path.read_bytes() if by_content and size else None
        except OSError:
            content = None
        fact = repr(size) if content is None else hashlib.sha256(content).hexdigest()
        digest.update(fact.encode() + b"\n")
