"""Which files hold a calibration already: the marks that folding and `extract` leave, and reading them (ours).

Folding twice, or fitting gamma on logits that contain one, counts gamma twice. A safetensors file is marked in its
metadata, a folder by ``folded_calibration.json``, any other file by ``NAME.folded_calibration.json`` beside it; the
latter holds the file's SHA-256, so a file written anew under the same name is not taken for calibrated.
"""

from __future__ import annotations

import json
from pathlib import Path

from vfm_core.errors import UserError
from vfm_core.files import write_json
from vfm_core.specs import parse_spec

from ft_calibrate.logit_table import file_sha256

__all__ = ["MARK", "RECORD_FILE", "folded_in", "folded_in_spec", "mark", "refuse_folded", "unmark"]

MARK = "ft_calibrate_fold"  # metadata key of a file that holds a calibration already
RECORD_FILE = "folded_calibration.json"  # the same, in a folder
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{RECORD_FILE}")


def mark(path: Path, what: str, content: Path | None = None) -> None:
    """Note beside a file, or inside a folder, that a calibration is in it.

    Parameters
    ----------
    path : Path
        The file or folder.
    what : str
        Which calibration, in words.
    content : Path, optional
        Where the file's bytes are now, when it is not in its place yet.
    """
    if path.is_dir():
        write_json(path / RECORD_FILE, {"calibration": what})
    else:
        write_json(_beside(path), {"calibration": what, "sha256": file_sha256(content or path)})


def unmark(path: Path) -> None:
    """Take away a mark made by `mark`: what is there now holds no calibration."""
    (path / RECORD_FILE if path.is_dir() else _beside(path)).unlink(missing_ok=True)


def folded_in(path: Path) -> str | None:
    """Which calibration a checkpoint (or a file of logits), or a folder of them, holds: in words; None without one."""
    if path.is_dir():
        if (path / RECORD_FILE).is_file():
            facts = _read(path / RECORD_FILE)
            return str(facts.get("calibration") or facts.get("effect") or RECORD_FILE)
        return next((found for name in _WEIGHTS if (found := folded_in(path / name)) is not None), None)
    if not path.is_file():
        return None
    if path.suffix == ".safetensors":
        return _in_metadata(path)
    if not _beside(path).is_file():
        return None
    facts = _read(_beside(path))
    if facts.get("sha256") not in (None, file_sha256(path)):
        return None
    return str(facts.get("calibration") or _beside(path).name)


def folded_in_spec(spec: str) -> str | None:
    """As `folded_in`, of the folder or file that a model spec names."""
    found = folded_in(Path(spec.removeprefix("dir:")).expanduser())
    if found is not None or ":" not in spec:
        return found
    parsed = parse_spec(spec)
    places = [parsed.name] if parsed.family == "dir" else []
    places += [parsed.source] if parsed.source is not None else []
    return next((found for place in places if (found := folded_in(Path(place).expanduser())) is not None), None)


def refuse_folded(path: Path, remedy: str = "fold into the original checkpoint") -> None:
    """Raise where a calibration is in a checkpoint already.

    Raises
    ------
    UserError
        Naming the calibration.
    """
    found = folded_in(path)
    if found is not None:
        raise UserError("a calibration is folded in already", where=path, given=found, remedy=remedy)


def _read(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a cut record still says that there is one
        return {}
    return value if isinstance(value, dict) else {}


def _in_metadata(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(MARK)
    except (SafetensorError, OSError):  # damaged: reading the weights says so
        return None
