"""vfm-core: what every package of the toolbox shares, and nothing more.

Backbones behind one interface, data specs, run folders, reports, metrics and command-line conventions. The public names
below are loaded on first use (PEP 562), so that ``import vfm_core`` and ``--help`` of any command stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vfm_core.backbones import Backbone, Features, Native, Tokens, load_backbone, load_native, wrap
    from vfm_core.cache import cached_features
    from vfm_core.data import ImageDataset, Sample, open_dataset, register_data_family
    from vfm_core.errors import UserError
    from vfm_core.images import read_image
    from vfm_core.preprocess import Preprocess
    from vfm_core.report import Report
    from vfm_core.runs import RunDir
    from vfm_core.specs import Spec, parse_spec
    from vfm_core.train import TrainConfig, fit

_HOME = {
    "Backbone": "backbones",
    "Features": "backbones",
    "ImageDataset": "data",
    "Native": "backbones",
    "Preprocess": "preprocess",
    "Report": "report",
    "RunDir": "runs",
    "Sample": "data",
    "Spec": "specs",
    "Tokens": "backbones",
    "TrainConfig": "train",
    "UserError": "errors",
    "cached_features": "cache",
    "fit": "train",
    "load_backbone": "backbones",
    "load_native": "backbones",
    "open_dataset": "data",
    "parse_spec": "specs",
    "read_image": "images",
    "register_data_family": "data",
    "wrap": "backbones",
}

__all__ = [
    "Backbone",
    "Features",
    "ImageDataset",
    "Native",
    "Preprocess",
    "Report",
    "RunDir",
    "Sample",
    "Spec",
    "Tokens",
    "TrainConfig",
    "UserError",
    "cached_features",
    "fit",
    "load_backbone",
    "load_native",
    "open_dataset",
    "parse_spec",
    "read_image",
    "register_data_family",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vfm-core")
    if name not in _HOME:
        raise AttributeError(f"module 'vfm_core' has no attribute {name!r}")
    value = getattr(import_module(f"vfm_core.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
