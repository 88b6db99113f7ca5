"""Files of whole arrays: npz, npy, torch and safetensors. Large ones are mapped or streamed, never loaded whole."""

from __future__ import annotations

import logging
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError, closest

from ft_calibrate.table_formats import (
    ALIASES,
    PICKLE_REMEDY,
    ArraySource,
    Column,
    TableOptions,
    names_from_json,
    texts,
)

__all__ = ["open_npy", "open_npy_folder", "open_npz", "open_safetensors", "open_torch"]

log = logging.getLogger(__name__)

FOLD_KEYS = ("pseudo_seen", "train_logits", "train_labels", "floor", "source_logits")  # of a fold of pcv
MEANT = {
    "classes": ("class_names", "classnames", "class_name", "names", "label_names", "categories"),
    "labels": ("targets", "target", "y_true", "truth", "ground_truth", "gt"),
    "ids": ("sample_ids", "filenames", "paths", "files", "image_ids"),
    "features": ("embeddings", "feature", "x"),
}
PICKLED = "a pickled Python object, which can run code when loaded"


def open_npz(path: Path, options: TableOptions) -> ArraySource:
    """Arrays of a ``.npz`` archive: members stored uncompressed are mapped, compressed ones streamed in row order."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
            keys = _keys(members, options, path)
            columns = {field: _npz_column(path, archive, members[key]) for field, key in keys.items()}
            names = {key: _npz_column(path, archive, members[key]) for key in ("classes", "kind") if key in members}
    except zipfile.BadZipFile as e:
        raise UserError("damaged .npz file", where=path, given=e, remedy="write it again") from e
    classes = None if "classes" not in names else _names(names["classes"], path)
    kind = None if "kind" not in names else _all(names["kind"]).reshape(-1)[:1].astype(str).tolist()[0]
    return ArraySource(path, columns, classes, kind)


def _names(column: Column, path: Path) -> list[str]:
    if len(column.shape) != 1:
        raise UserError("class names must be a vector", where=f"{path}, classes", given=f"shape {column.shape}")
    return texts(_all(column))


def _all(column: Column) -> NDArray[Any]:
    """A small column in memory."""
    return np.array(column.read(0, column.shape[0] if column.shape else 1) if column.mapped is None else column.mapped)


def _keys(have: Iterable[str], options: TableOptions, path: Path) -> dict[str, str]:
    """Which array of a file is which column."""
    have = list(have)
    if "logits" not in have:
        given = f"arrays are {', '.join(have[:12]) or 'none'}"
        raise UserError("no array logits", where=path, given=given, remedy="name the (N, K) scores `logits`")
    keys = {"logits": "logits"}
    asked = {"labels": options.label_col, "ids": options.id_col, "features": None}
    for field, aliases in ALIASES.items():
        name = asked[field]
        if name is not None and name not in have:
            raise UserError(f"no array {name}", where=path, given=f"arrays are {', '.join(have[:12])}")
        found = name if name is not None else next((alias for alias in aliases if alias in have), None)
        if found is not None:
            keys[field] = found
    _tell_unread(set(have) - set(keys.values()), path)
    return keys


def _tell_unread(names: set[str], path: Path) -> None:
    """Warn of arrays that nothing reads, with what they may have been meant to be."""
    known = {"classes", "kind", *(alias for aliases in ALIASES.values() for alias in aliases), *FOLD_KEYS}
    for name in sorted(names - known):
        near = next((key for key, words in MEANT.items() if name.lower() in words), None)
        near = near or next(iter(closest(name, ["classes", *ALIASES], n=1)), None)
        log.warning("array %s in %s is not read%s", name, path, f" (did you mean {near}?)" if near else "")


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of a .npy stream, which is left at its first number."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, EOFError) as e:
        raise UserError("damaged array", where=where, given=e, remedy="write the file again") from e
    if dtype.hasobject:
        raise UserError(PICKLED, where=where, remedy=f"store names as strings, not objects; {PICKLE_REMEDY}")
    return shape, fortran, dtype


def _npz_column(path: Path, archive: zipfile.ZipFile, member: str) -> Column:
    where = f"{path}, {member}"
    info = archive.getinfo(member)
    try:
        with archive.open(member) as stream:
            shape, fortran, dtype = _header(stream, where)
            start = stream.tell()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as e:
        raise UserError("damaged or encrypted member", where=where, given=e, remedy="write the file again") from e
    size = int(np.prod(shape)) * dtype.itemsize
    if start + size > info.file_size:
        raise UserError("array is cut short", where=where, remedy="write the file again")
    if info.compress_type == zipfile.ZIP_STORED and size:
        with path.open("rb") as file:
            file.seek(info.header_offset + 26)  # the local header's own lengths: they differ from the directory's
            name_length, extra_length = struct.unpack("<HH", file.read(4))
        offset = info.header_offset + 30 + name_length + extra_length + start
        return Column.of(np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C"))
    if fortran and len(shape) > 1:  # columns lie together: rows can only be had from the whole
        with archive.open(member) as stream:
            return Column.of(np.lib.format.read_array(stream, allow_pickle=False))
    return Column(shape, _RowStream(path, member, shape, dtype, start))


class _RowStream:
    """Rows of a compressed member in order: asking for earlier rows starts the stream again."""

    def __init__(self, path: Path, member: str, shape: tuple[int, ...], dtype: np.dtype[Any], start: int) -> None:
        self.path, self.member, self.shape, self.dtype, self.start = path, member, shape, dtype, start
        self.width = int(np.prod(shape[1:])) * dtype.itemsize
        self._file: IO[bytes] | None = None
        self._row = 0

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        try:
            if self._file is None or start < self._row:
                if self._file is not None:
                    self._file.close()
                with zipfile.ZipFile(self.path) as archive:  # an open member keeps the file open after this
                    self._file = archive.open(self.member)
                self._file.read(self.start)
                self._row = 0
            while self._row < start:
                step = min(start - self._row, max(1, 2**24 // max(self.width, 1)))
                self._file.read(step * self.width)
                self._row += step
            stop = min(stop, self.shape[0]) if self.shape else 1
            data = self._file.read((stop - start) * self.width)
        except (zipfile.BadZipFile, zlib.error, EOFError) as e:
            raise UserError("damaged .npz file", where=f"{self.path}, {self.member}", given=e) from e
        self._row = stop
        if self._row >= (self.shape[0] if self.shape else 1):
            self._file.close()
            self._file = None
        return np.frombuffer(data, self.dtype).reshape(-1 if self.shape else 1, *self.shape[1:])


def _npy(path: Path) -> NDArray[Any]:
    with path.open("rb") as file:
        shape, _, _ = _header(file, str(path))  # refuses objects with our own message
    if int(np.prod(shape)) == 0:
        return np.load(path, allow_pickle=False)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise UserError("damaged array", where=path, given=e, remedy="write the file again") from e


def open_npy(path: Path, options: TableOptions) -> ArraySource:
    """Scores alone in a ``.npy`` file, mapped."""
    return ArraySource(path, {"logits": Column.of(_npy(path))}, None)


def open_npy_folder(path: Path, options: TableOptions) -> ArraySource:
    """``logits.npy`` with ``labels.npy``, ``classes.npy``, ``ids.npy``, ``features.npy`` beside it, mapped."""
    keys = _keys([file.stem for file in sorted(path.glob("*.npy"))], options, path)
    columns = {field: Column.of(_npy(path / f"{key}.npy")) for field, key in keys.items()}
    names = path / "classes.npy"
    return ArraySource(path, columns, _names(Column.of(_npy(names)), path) if names.exists() else None)


def open_torch(path: Path, options: TableOptions) -> ArraySource:
    """Tensors of a ``.pt`` file under the keys of ``.npz``: loaded with ``weights_only=True``, mapped if possible."""
    import pickle

    import torch

    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format from before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, AttributeError, ImportError) as e:
        raise UserError(PICKLED, where=path, remedy=PICKLE_REMEDY) from e
    except (RuntimeError, EOFError, zipfile.BadZipFile) as e:
        raise UserError("not a torch file", where=path, given=str(e).split("\n")[0], remedy="write it again") from e
    if not isinstance(content, Mapping):
        given = type(content).__name__
        raise UserError("not a dictionary of tensors", where=path, given=given, remedy="save {'logits': tensor, ...}")
    keys = _keys([str(k) for k in content], options, path)
    columns = {field: Column.of(_plain(content[key], f"{path}, {key}")) for field, key in keys.items()}
    classes, kind = content.get("classes"), content.get("kind")
    names = None if classes is None else texts(_plain(classes, f"{path}, classes"))
    return ArraySource(path, columns, names, kind if isinstance(kind, str) else None)


def _plain(value: Any, where: str) -> NDArray[Any]:
    """Array of a tensor, or of a list of names or numbers."""
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, list | tuple):
        return np.array(["" if v is None else v for v in value] if any(isinstance(v, str) for v in value) else value)
    raise UserError("neither a tensor nor a list", where=where, given=type(value).__name__)


def open_safetensors(path: Path, options: TableOptions) -> ArraySource:
    """Tensors of a safetensors file; ``classes``, ``ids`` and named ``labels`` are JSON lists in its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise UserError("not a safetensors file", where=path, given=e, remedy="write it again") from e
    meta = file.metadata() or {}
    texts_of = {name: names_from_json(meta.get(name), path, name) for name in ("labels", "ids", "classes")}
    keys = _keys([*file.keys(), *(n for n in ("labels", "ids") if texts_of[n] is not None)], options, path)
    columns = {}
    for field, key in keys.items():
        listed = texts_of.get(key)
        if key not in file.keys() and listed is not None:  # noqa: SIM118 - not a dictionary
            columns[field] = Column.of(np.array(listed, dtype=str))
        else:
            cut = file.get_slice(key)
            columns[field] = Column(tuple(cut.get_shape()), _slices(cut))
    return ArraySource(path, columns, texts_of["classes"], meta.get("kind"))


def _slices(cut: Any) -> Callable[[int, int], NDArray[Any]]:
    return lambda start, stop: _plain(cut[start:stop], "safetensors")
