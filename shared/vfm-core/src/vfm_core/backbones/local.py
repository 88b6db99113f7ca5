"""Local checkpoints: whose they are, which file holds the weights, and whether it can be read at all.

Layouts: an open_clip folder (``open_clip_config.json``), a timm folder (``config.json`` with "architecture"), a
transformers folder (``config.json`` with "model_type"), each beside its weights; or a lone state dict whose
architecture the spec names (``timm:NAME@FILE``).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from vfm_core.errors import UserError
from vfm_core.specs import Spec

__all__ = ["WEIGHT_FILES", "detect", "find_weights", "local_path", "require_file"]

# In the order in which the libraries themselves prefer them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


def local_path(spec: Spec) -> tuple[Spec, Path | None]:
    """Find the file or folder that a spec of a built-in family reads.

    Returns
    -------
    spec : Spec
        The same with its home directory written out.
    path : Path or None
        None for names of the hub and of a library's registry.

    Raises
    ------
    UserError
        A path that does not exist, or a folder without the family's config.
    """
    if spec.source is not None and spec.family != "hf" and not spec.name.startswith("hf-hub:"):
        file = Path(spec.source).expanduser()
        if file.is_file():
            return replace(spec, source=str(file)), file
        if "/" in spec.source or spec.source.startswith(("~", ".")):
            raise UserError("no such checkpoint file", where=str(spec), given=spec.source, remedy="check the path")
    if spec.name.startswith("local-dir:"):
        folder = Path(spec.name.removeprefix("local-dir:")).expanduser()
        found = replace(spec, name=f"local-dir:{folder}")
    elif spec.family == "hf":
        folder = Path(spec.name).expanduser()
        looks_like_hub = not spec.name.startswith((".", "/", "~")) and spec.name.count("/") <= 1
        if looks_like_hub and not folder.exists():
            return spec, None
        found = replace(spec, name=str(folder))
    else:
        return spec, None
    if not folder.is_dir():
        raise UserError("no such checkpoint folder", given=str(folder), remedy="check the path")
    config = folder / ("open_clip_config.json" if spec.family == "open_clip" else "config.json")
    if not config.is_file():
        remedy = f"is it a {spec.family} folder?"
        raise UserError("checkpoint folder lacks its config", given=str(config), remedy=remedy)
    return found, folder


def detect(path: Path) -> Spec:
    """Tell whose checkpoint a local folder, or a weights file inside one, is.

    Returns
    -------
    Spec
        Of family "open_clip", "timm" or "hf".

    Raises
    ------
    UserError
        The path does not exist, or holds no known layout.
    """
    if path.is_file():
        return _detect_file(path)
    if not path.is_dir():
        raise UserError("no such checkpoint", given=str(path), remedy="check the path")
    if (path / "open_clip_config.json").is_file():
        return Spec("open_clip", f"local-dir:{path}")
    config = path / "config.json"
    if not config.is_file():
        remedy = "expected open_clip_config.json, or a config.json of timm or transformers"
        raise UserError("not a checkpoint folder", given=str(path), remedy=remedy)
    try:
        fields = json.loads(config.read_text())
    except ValueError as error:
        raise UserError("not valid JSON", where=config, given=error, remedy="copy the file again") from error
    if isinstance(fields, dict) and "architecture" in fields:
        return Spec("timm", f"local-dir:{path}")
    if isinstance(fields, dict) and "model_type" in fields:
        return Spec("hf", str(path))
    remedy = 'timm configs name an "architecture", transformers configs a "model_type"'
    raise UserError("cannot tell whose checkpoint this is", where=config, remedy=remedy)


def _detect_file(path: Path) -> Spec:
    if path.suffix not in (".safetensors", ".bin", ".pth", ".pt"):
        raise UserError("not a checkpoint file", given=str(path), remedy="use .safetensors, .bin, .pth or .pt")
    try:
        found = detect(path.parent)
    except UserError as error:
        remedy = f"say which architecture it is: timm:NAME@{path} or open_clip:NAME@{path}"
        raise UserError("a lone weights file does not say its model", given=str(path), remedy=remedy) from error
    read = require_file(path.parent)
    if read != path:
        remedy = f"give the folder, or timm:NAME@{path}"
        raise UserError(f"this folder's model is read from {read.name}", given=str(path), remedy=remedy)
    return found


def find_weights(folder: Path) -> Path | None:
    """Return the weights file that the libraries would read from a checkpoint folder, None without one."""
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    found += sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    return found[0] if found else None


def require_file(folder: Path) -> Path:
    """Return the weights file of a checkpoint folder.

    Raises
    ------
    UserError
        There is none, or it is a damaged safetensors file.
    """
    found = find_weights(folder)
    if found is None:
        raise UserError("no weights file", where=folder, remedy=f"expected one of {', '.join(WEIGHT_FILES[:5])}")
    if found.suffix == ".safetensors":
        _open_safetensors(found)
    return found


def _open_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        remedy = "the file is damaged or cut off: copy or download it again"
        raise UserError("cannot read weights", where=path, given=error, remedy=remedy) from error
