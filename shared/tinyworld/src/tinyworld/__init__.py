"""tinyworld: a procedural natural world with complete ground truth, and tiny pretrained models that know it.

The public names below are loaded on first use (PEP 562), so that importing the package stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyworld.albums import Album, make_albums
    from tinyworld.backbones import load_tiny
    from tinyworld.birds import Birds
    from tinyworld.catalogue import read_card
    from tinyworld.datasets import open_tinyworld
    from tinyworld.digits import Digits
    from tinyworld.glyphs import Glyphs
    from tinyworld.vlm import build_vlm, load_vlm, save_vlm

_HOME = {
    "Album": "albums",
    "Birds": "birds",
    "Digits": "digits",
    "Glyphs": "glyphs",
    "build_vlm": "vlm",
    "load_tiny": "backbones",
    "load_vlm": "vlm",
    "make_albums": "albums",
    "open_tinyworld": "datasets",
    "read_card": "catalogue",
    "save_vlm": "vlm",
}

__all__ = [
    "Album",
    "Birds",
    "Digits",
    "Glyphs",
    "build_vlm",
    "load_tiny",
    "load_vlm",
    "make_albums",
    "open_tinyworld",
    "read_card",
    "save_vlm",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tinyworld")
    if name not in _HOME:
        raise AttributeError(f"module 'tinyworld' has no attribute {name!r}")
    value = getattr(import_module(f"tinyworld.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
