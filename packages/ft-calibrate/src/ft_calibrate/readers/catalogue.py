"""The formats that a data spec can name, for people."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points

__all__ = ["FORMATS", "Format", "available"]


@dataclass(frozen=True)
class Format:
    """One family of data specs.

    Attributes
    ----------
    family : str
        What stands before the colon.
    pattern : str
        How a spec looks.
    title : str
        What it is.
    splits : str
        Which splits there are.
    """

    family: str
    pattern: str
    title: str
    splits: str


FORMATS = (
    Format("office-home", "office-home:ROOT?domain=Ar|Cl|Pr|Rw", "Office-Home, one domain", "train, test"),
    Format("imagenet-r", "imagenet-r:ROOT[?names=short]", "ImageNet-R under 1000 classes", "train, test (8:2)"),
    Format("imagenet-sketch", "imagenet-sketch:ROOT", "ImageNet-Sketch", "train, test (10 a class)"),
    Format("vtab", "vtab:ROOT?task=dtd", "VTAB tasks, with prompts", "train, val, test"),
    Format(
        "iwildcam", "iwildcam:ROOT[?location=N&by=class|time]", "iWildCam (WILDS), camera tables", "train, val, test"
    ),
    Format("femnist", "femnist:ROOT[?writer=ID]", "FEMNIST (LEAF), by writer", "train, test"),
    Format("inat", "inat:ROOT[?supercategory=Fungi]", "iNaturalist 2021", "train, train_mini, val"),
    Format(
        "domains", "domains:ROOT?domain=NAME", "own pictures: a folder or a CSV with several domains", "train, test"
    ),
    Format("tinyworld", "tinyworld:glyphs?domain=target&split=test", "built-in, no files needed", "?split="),
    Format("folder", "folder:PATH", "a folder per class, or per split and class", "as the folders say"),
    Format("csv", "csv:PATH", "path,label[,split,group,time]", "as the column says"),
    Format("hf", "hf:ORG/NAME@SPLIT", "Hugging Face datasets, and saved ones", "as the dataset says"),
)
"""In the order of the listing."""

_CORE = {"folder", "csv", "hf"}


def available() -> list[Format]:
    """Return the formats that this installation knows, in the order of the listing."""
    known = _CORE | {point.name for point in entry_points(group="vfm_core.data")}
    return [f for f in FORMATS if f.family in known]
