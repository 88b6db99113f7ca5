"""Frozen features, computed once: a memory-mapped safetensors file per (backbone, data, transform, quantity).

A frozen backbone gives the same features at every epoch and in every run, so they are computed in one streaming pass
and read from disk afterwards. The file appears under its final name only when it is complete; one that was damaged
later is noticed by its structure, its shape and (up to 1 GiB) its checksum, and computed again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vfm_core.dataset import ImageDataset
from vfm_core.errors import UserError
from vfm_core.loading import OnError, loader

__all__ = ["cache_folder", "cached_features", "feature_key"]

CHECKSUM_LIMIT = 2**30
"""Files up to this many bytes are checksummed when read; beyond, structure and shape are checked."""

_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORMAT = "vfm-core features 1"
_log = logging.getLogger(__name__)


class Fingerprinted(Protocol):
    """Anything whose content has a stable digest, such as a ``Backbone``."""

    def fingerprint(self) -> str:
        """Return a digest of the content."""
        ...


def cached_features(
    backbone: Fingerprinted,
    dataset: ImageDataset,
    compute: Callable[[Tensor], Tensor],
    what: str,
    *,
    transform: Callable[[Image.Image], Tensor],
    cache_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    dtype: torch.dtype = torch.float16,
    device: str | torch.device = "cpu",
    on_error: OnError | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the features of a whole dataset, from the cache when they are there.

    Parameters
    ----------
    backbone : object with ``fingerprint()``
        What ``compute`` uses. A module is in eval mode meanwhile, and back in its modes afterwards.
    dataset : ImageDataset
        The pictures.
    compute : callable
        Batch of transformed pictures (b, 3, h, w) on ``device`` -> features (b, ...). Runs in inference mode.
    what : str
        Names what ``compute`` computes, with every setting that matters, such as ``"pooled"`` or ``"tokens@11"``:
        the function itself cannot be part of the key.
    transform : callable
        Picture -> tensor; a ``Preprocess``, or another object whose ``repr`` says all about it.
    cache_dir : path, optional
        Folder of the cache; by default :func:`cache_folder`.
    batch_size, workers, device
        As for :func:`vfm_core.data.loader`.
    dtype : torch.dtype
        Of the stored features: float16, bfloat16, float32 or float64.
    on_error : callable, optional
        ``on_error(index, id, error)`` for each unreadable picture, whose row is then NaN; it is called again when the
        features come from the cache. Without it the first one raises.
    on_progress : callable, optional
        ``on_progress(pictures done, pictures in all)`` after each batch.

    Returns
    -------
    Tensor, (N, ...)
        On the CPU, memory-mapped: rows are read from disk when touched. Writing to it does not reach the file.

    Raises
    ------
    UserError
        An unreadable picture (see ``on_error``); features that are NaN or do not fit ``dtype``; a cache folder that
        cannot be written or is full.
    """
    if dtype not in _DTYPES:
        raise UserError("features are stored as floating point", given=dtype, remedy=f"use one of {[*_DTYPES]}")
    key = feature_key(backbone, dataset, transform, what, dtype)
    path = (Path(cache_dir) if cache_dir is not None else cache_folder()) / key[:2] / f"{key}.safetensors"
    found = _read(path, len(dataset))
    if found is None:
        with _storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            lock.acquire()  # a second process waits here, then finds the file
        try:
            found = _read(path, len(dataset))
            if found is None:
                batches = loader(
                    dataset, transform, batch_size, workers, device, samples=False, on_error=_skip if on_error else None
                )
                with _evaluating(backbone):
                    _build(path, dataset, batches, compute, dtype, {"what": what, "data": dataset.name}, on_progress)
                found = _read(path, len(dataset))
        finally:
            lock.release()
        if found is None:
            raise UserError("features cannot be read back after writing", where=path, remedy="check the disk")
    features, readable = found
    for i in torch.nonzero(~readable).flatten().tolist():
        try:
            dataset[i]
            error = UserError("unreadable when the features were cached", given=dataset.ids[i])
        except UserError as reason:
            error = reason
        if on_error is None:
            raise error
        on_error(i, dataset.ids[i], error)
    return features


def cache_folder() -> Path:
    """Return the default cache folder: ``$VFM_CORE_CACHE``, else ``vfm-core`` in the user's cache folder."""
    given = os.environ.get("VFM_CORE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given).expanduser() if given else Path(base).expanduser() / "vfm-core" / "features"


def feature_key(
    backbone: Fingerprinted,
    dataset: ImageDataset,
    transform: Callable[[Image.Image], Tensor],
    what: str,
    dtype: torch.dtype,
) -> str:
    """Return the digest that names a feature file: 40 hexadecimal digits.

    Raises
    ------
    UserError
        The transform cannot be told from another one by its ``repr``.
    """
    if hasattr(transform, "to_dict"):
        view: Any = [type(transform).__name__, transform.to_dict()]
    else:
        view = repr(transform)
        if " at 0x" in view:  # a memory address: another transform may get it tomorrow
            raise UserError(
                "transform has no stable description", given=view, remedy="use a Preprocess or define __repr__"
            )
    facts = [_FORMAT, backbone.fingerprint(), dataset.fingerprint(), view, what, str(dtype)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


# ------------------------------------------------------------------------------------------------------------- reading
def _read(path: Path, n: int) -> tuple[Tensor, Tensor] | None:
    """Return features and their readable flags, or None when the file is absent or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            features, readable, stored = (file.get_tensor(k) for k in ("features", "readable", "checksum"))
        if len(features) != n or len(readable) != n:
            raise ValueError(f"{len(features)} rows for {n} images")
        if int(stored) != _checksum(features, readable):
            raise ValueError("checksum differs")
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        _log.warning("cached features %s are damaged (%s) and will be computed again", path, error)
        return None
    return features, readable.bool()


def _checksum(features: Tensor, readable: Tensor) -> int:
    start = zlib.crc32(_bytes(readable))
    if features.numel() * features.element_size() > CHECKSUM_LIMIT:
        return start
    return zlib.crc32(_bytes(features), start)


# ------------------------------------------------------------------------------------------------------------- writing
def _build(
    path: Path,
    dataset: ImageDataset,
    batches: Iterator[tuple[Tensor, Tensor, list[Any]]],
    compute: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    notes: dict[str, str],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    draft = path.with_suffix(".tmp")  # the lock makes us its only writer, so a killed run's draft is simply replaced
    readable = torch.zeros(len(dataset), dtype=torch.uint8)
    shape: torch.Size | None = None
    start = row_bytes = 0
    with contextlib.ExitStack() as stack:
        file: BinaryIO | None = None
        for positions, x, _ in batches:
            rows = _rows(compute, x, dtype, [dataset.ids[i] for i in positions])
            if file is None:
                shape, row_bytes = rows.shape[1:], rows[0].numel() * rows.element_size()
                with _storage_errors(path.parent, needed=row_bytes * len(dataset)):
                    file = stack.enter_context(draft.open("wb+"))
                    stack.callback(draft.unlink, missing_ok=True)
                    start = _reserve(file, (len(dataset), *shape), dtype, row_bytes, notes)
            elif rows.shape[1:] != shape:
                given = f"{tuple(rows.shape[1:])} after {tuple(shape or ())}"
                raise UserError("features differ in shape", given=given, remedy="use a transform of one output size")
            with _storage_errors(path.parent, needed=row_bytes * len(dataset)):
                for i, row in zip(positions.tolist(), rows, strict=True):
                    file.seek(start + i * row_bytes)
                    file.write(_bytes(row))
            readable[positions] = 1
            if on_progress is not None:
                on_progress(int(readable.sum()), len(dataset))
        if file is None:
            raise UserError("no readable image", where=dataset.name, remedy="check the files")
        with _storage_errors(path.parent, needed=row_bytes * len(dataset)):
            _finish(file, draft, start, row_bytes, readable, dtype)
            os.replace(draft, path)  # noqa: PTH105 - the one call that is atomic


@torch.inference_mode()
def _rows(compute: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype, ids: list[str]) -> Tensor:
    values = compute(x).detach()
    if len(values) != len(ids):
        raise UserError("compute must give one row per image", given=f"{len(values)} rows for {len(ids)} images")
    rows = values.to(dtype)
    for what, bad, remedy in (
        ("features are not finite", ~torch.isfinite(values), "compute in float32"),
        (f"features do not fit {dtype}", ~torch.isfinite(rows), "store bfloat16 or float32: dtype="),
    ):
        if bad.any():
            first = int(bad.flatten(1).any(1).nonzero()[0]) if bad.ndim > 1 else int(bad.nonzero()[0])
            raise UserError(what, given=ids[first], remedy=remedy)
    return rows.cpu().contiguous()


def _reserve(file: BinaryIO, shape: tuple[int, ...], dtype: torch.dtype, row_bytes: int, notes: dict[str, str]) -> int:
    """Write the header, claim the space (a full disk shows before hours of work) and return where the rows start."""
    n, end = shape[0], 8 + shape[0] * row_bytes
    header: dict[str, Any] = {
        "__metadata__": {"format": _FORMAT, **notes},
        "checksum": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
        "features": {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [8, end]},
        "readable": {"dtype": "U8", "shape": [n], "data_offsets": [end, end + n]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors must start at multiples of eight bytes
    file.write(struct.pack("<Q", len(text)) + text)
    file.flush()
    start = 8 + len(text)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, start + end + n)
    else:
        file.truncate(start + end + n)
    return start + 8


def _finish(file: BinaryIO, draft: Path, start: int, row_bytes: int, readable: Tensor, dtype: torch.dtype) -> None:
    blank = torch.full((row_bytes // dtype.itemsize,), torch.nan, dtype=dtype)
    for i in torch.nonzero(readable == 0).flatten().tolist():
        file.seek(start + i * row_bytes)
        file.write(_bytes(blank))
    file.seek(start + len(readable) * row_bytes)
    file.write(_bytes(readable))
    file.flush()
    with safe_open(draft, framework="pt") as written:
        checksum = _checksum(written.get_tensor("features"), readable)
    file.seek(start - 8)
    file.write(struct.pack("<q", checksum))
    file.flush()
    os.fsync(file.fileno())


def _bytes(values: Tensor) -> memoryview:
    return values.reshape(-1).view(torch.uint8).numpy().data


def _skip(index: int, name: str, error: UserError) -> None:
    """Leave an unreadable picture's row for the end; it is reported once, with those of a later cache hit."""


@contextlib.contextmanager
def _evaluating(backbone: object) -> Iterator[None]:
    modes = [(m, m.training) for m in backbone.modules()] if isinstance(backbone, torch.nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _storage_errors(folder: Path, needed: int = 0) -> Iterator[None]:
    remedy = "choose another folder with cache_dir or the variable VFM_CORE_CACHE"
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            given = f"{needed / 2**20:.1f} MiB needed"
            raise UserError(
                "no space for cached features", where=folder, given=given, remedy=f"free some, or {remedy}"
            ) from error
        raise UserError("cannot write the cache folder", where=folder, given=error.strerror, remedy=remedy) from error
