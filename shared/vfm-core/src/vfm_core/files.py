"""Files that are whole or absent: atomic writing, and what strict JSON can hold."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TEMPORARY = ".vfm-tmp-"  # how an unfinished file's name begins


def jsonable(value: Any) -> Any:
    """Turn ``value`` into what strict JSON can hold.

    Dataclasses become dicts, arrays and tensors lists, paths strings, sets sorted lists. NaN and infinities become
    ``None``: strict JSON has no word for them, and readers in other languages refuse Python's.

    Raises
    ------
    TypeError
        For an object without a JSON form.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((jsonable(v) for v in value), key=str)
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors: no import of either needed
        return jsonable(value.tolist())
    if hasattr(value, "to_dict"):
        return jsonable(value.to_dict())
    raise TypeError(f"no JSON form for {type(value).__name__}: {value!r}")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder (same suffix); on success it is fsynced and renamed to ``path``.

    A reader therefore sees the old file or the whole new one, never a part, also after ``kill -9`` or a power cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_folder(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` (see `jsonable`) as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable; not every platform can open a folder."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
