"""The user's data in the terms of the model's head: rows, the class column of each, and what identifies them.

Ours: the pseudo cross-validation, the comparison grid and the experiments all need the same few operations on a pair of
tensors or an image dataset (which classes are there, take these rows, has anything changed since the last start).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vfm_core.data import ImageDataset
from vfm_core.errors import UserError
from vfm_core.files import jsonable

if TYPE_CHECKING:
    from ft_calibrate.classifier import Classifier

__all__ = ["Rows", "TargetData", "fingerprint_of", "named", "target_data"]

Rows = tuple[Tensor, Tensor] | ImageDataset


@dataclass(frozen=True, eq=False)
class TargetData:
    """Pictures or tensors with the head's column of each row.

    Attributes
    ----------
    rows : (Tensor, Tensor) or ImageDataset
        As `fine_tune` and `predict_table` take them.
    columns : ndarray of int64, (N,)
        The head's column of each row's label; -1 unknown.
    classes : tuple of str
        Names of the head's columns.
    """

    rows: Rows
    columns: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.columns)

    def take(self, rows: Sequence[int] | NDArray[Any]) -> TargetData:
        """The given rows, in the given order."""
        index = np.asarray(rows, dtype=np.int64)
        if isinstance(self.rows, ImageDataset):
            return TargetData(self.rows.subset(index), self.columns[index], self.classes)
        x, y = self.rows
        at = torch.from_numpy(index)
        return TargetData((x[at.to(x.device)], y[at.to(y.device)]), self.columns[index], self.classes)

    def of(self, columns: Iterable[int]) -> TargetData:
        """The rows whose class is one of the given columns."""
        kept = np.isin(self.columns, np.fromiter(columns, dtype=np.int64))
        return self if kept.all() else self.take(np.flatnonzero(kept))

    def present(self) -> NDArray[np.int64]:
        """Columns that have at least one row, sorted."""
        return np.unique(self.columns[self.columns >= 0])

    def fingerprint(self) -> str:
        """A digest that changes when the rows or their classes do, 32 hexadecimal digits."""
        if isinstance(self.rows, ImageDataset):
            content = self.rows.fingerprint().encode()
        else:
            x = self.rows[0].detach().cpu().contiguous()
            content = hashlib.sha256(x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"").digest()
            content += repr((tuple(x.shape), str(x.dtype))).encode()
        names = "\0".join(self.classes).encode()
        return hashlib.sha256(content + self.columns.tobytes() + names).hexdigest()[:32]


def target_data(data: Any, classes: Sequence[str], where: str | None = None) -> TargetData:
    """Match data to the columns of a head.

    Parameters
    ----------
    data : ImageDataset, or pair of tensors
        Pictures, whose classes are matched by name; or inputs (N, ...) and columns (N,), -1 unknown.
    classes : sequence of str
        Names of the head's K columns.
    where : str, optional
        For errors.

    Raises
    ------
    UserError
        Neither a dataset nor a pair; a class without a column; inputs and labels that differ in number; a column out of
        range.
    """
    names = tuple(classes)
    if isinstance(data, TargetData):
        return data
    if isinstance(data, ImageDataset):
        from ft_calibrate.extraction import columns_of

        mapping = np.asarray(columns_of(data.classes, names, where or data.name), dtype=np.int64)
        labels = np.asarray(data.labels)
        columns = np.full(len(labels), -1, dtype=np.int64)
        columns[labels >= 0] = mapping[labels[labels >= 0]]
        return TargetData(data, columns, names)
    if not (isinstance(data, tuple | list) and len(data) == 2):
        tensors = isinstance(data, torch.utils.data.TensorDataset)
        remedy = "give dataset.tensors" if tensors else "give (inputs, labels) as tensors, or an ImageDataset"
        raise UserError("no pair of inputs and labels", where=where, given=type(data).__name__, remedy=remedy)
    x, y = (torch.as_tensor(part) for part in data)
    columns = y.detach().cpu().numpy().astype(np.int64)
    if columns.ndim != 1 or len(x) != len(columns):
        given = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise UserError("inputs and labels differ in number", where=where, given=given, remedy="one label per row")
    if len(columns) and not (columns.min() >= -1 and columns.max() < len(names)):
        given = f"{columns.min()}..{columns.max()}"
        raise UserError("label out of range", where=where, given=given, remedy=f"the head has {len(names)} columns")
    return TargetData((x, y), columns, names)


def named(model: Any, data: Any = None) -> Classifier:
    """A classifier whose columns have names: its own, else the data's where they are as many, else column numbers.

    Parameters
    ----------
    model : Classifier, nn.Module or str
        As for `load_classifier`.
    data : ImageDataset, pair of tensors or TargetData, optional
        Whose classes name the columns of a model without names.
    """
    from ft_calibrate.classifier import load_classifier

    classifier = model if hasattr(model, "features_and_logits") else load_classifier(model)
    if classifier.class_names is not None:
        return classifier
    rows: Any = data.rows if isinstance(data, TargetData) else data
    k = classifier.num_classes
    fits = isinstance(rows, ImageDataset) and len(rows.classes) == k
    names = list(rows.classes) if fits else [str(i) for i in range(k)]
    return replace(classifier, class_names=names)


def fingerprint_of(*parts: Any) -> str:
    """A content hash of JSON-ready parts, 16 hexadecimal digits."""
    text = json.dumps(jsonable(list(parts)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
