"""One interface to vision backbones of timm, open_clip, transformers and other packages.

``load_backbone(spec)`` gives tokens, blocks and pooling of any vision transformer; ``load_native(spec)`` gives any
model, classifiers and CNNs included, with its preprocessing and class names; ``wrap(model)`` takes one's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vfm_core.backbones.backbone import Backbone, fingerprint
    from vfm_core.backbones.base import Adapter, Features, Native, TextTower, Tokens
    from vfm_core.backbones.native import families, load_backbone, load_native, wrap

__all__ = [
    "Adapter",
    "Backbone",
    "Features",
    "Native",
    "TextTower",
    "Tokens",
    "families",
    "fingerprint",
    "load_backbone",
    "load_native",
    "wrap",
]
_HOME = {
    **dict.fromkeys(("families", "load_backbone", "load_native", "wrap"), "native"),
    **dict.fromkeys(("Backbone", "fingerprint"), "backbone"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'base')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
