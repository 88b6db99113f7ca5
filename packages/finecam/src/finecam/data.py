"""Data specs of this package: those of `vfm_core.data` and the readers of the fine-grained datasets.

``folder:``, ``csv:``, ``hf:`` and ``tinyworld:`` come from the core; ``cub:``, ``cars:``, ``aircraft:``, ``pet:``,
``dogs:``, ``fishvista:``, ``coco:`` and ``wds:`` from `finecam.readers`.
"""

from __future__ import annotations

import os

from vfm_core import data
from vfm_core.data import ImageDataset, Sample

from finecam.readers import register_readers

__all__ = ["ImageDataset", "Sample", "open_dataset"]


def open_dataset(spec: str | os.PathLike[str], *, split: str | None = None) -> ImageDataset:
    """Open data by its spec; see `vfm_core.data.open_dataset`.

    Parameters
    ----------
    spec
        A folder, a CSV file, or ``family:...``.
    split
        Which split; the same as ``@SPLIT`` at the end of the spec.

    Raises
    ------
    UserError
        Unknown family, missing path, absent split, files that do not fit together.
    """
    register_readers()
    return data.open_dataset(spec, split=split)
