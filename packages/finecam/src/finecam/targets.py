"""Which class is explained and against which classes, image by image, settled before any computation.

A name that fits no class is an error that lists the closest ones; it is never silently replaced by a similar one (the
official script of Finer-CAM, arXiv 2501.11309, matched names by resemblance, so that a slip of the pen explained
another species).
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.errors import UserError, closest

if TYPE_CHECKING:
    from torch import Tensor

    from finecam.classifiers import Classifier

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetPlan:
    """Target and references of every image of a data set.

    Parameters
    ----------
    label_ids
        Model class id of each data class, None where the model does not know it.
    data_classes
        Names of the data's classes.
    target
        ``"predicted"``, ``"label"`` or the id of one class for all images.
    references
        A number T (the rule of similarity picks them), a tuple of class ids, or None for plain maps.
    """

    label_ids: tuple[int | None, ...]
    data_classes: tuple[str, ...]
    target: str | int
    references: int | tuple[int, ...] | None

    def label(self, data_label: int | None) -> int | None:
        """Model class id of an image's label, None when it has none or the model does not know it."""
        return None if data_label is None or data_label < 0 else self.label_ids[data_label]

    def target_of(self, image: str, data_label: int | None) -> int | None:
        """Model class id to explain; None means the predicted class.

        Raises
        ------
        UserError
            The target is the label and this image has none.
        """
        if self.target == "predicted":
            return None
        if isinstance(self.target, int):
            return self.target
        label = self.label(data_label)
        if label is None:
            raise UserError("no label for the target", where=image, remedy="use --target predicted, or a class name")
        return label

    def references_of(
        self, image: str, meta: Mapping[str, Any], classifier: Classifier
    ) -> int | tuple[int, ...] | None:
        """References of one image: those its own record names (a ``reference`` column), else the plan's."""
        own = meta.get("reference")
        if self.references is None or own is None or own == "":
            return self.references
        names = [own] if isinstance(own, str | int) else list(own)
        if isinstance(own, str) and ";" in own and own not in (classifier.class_names or ()):
            names = [part.strip() for part in own.split(";") if part.strip()]
        return tuple(classifier.index(name) for name in names)


def without_prediction(
    references: tuple[int, ...], prediction: int, classifier: Classifier
) -> tuple[tuple[int, ...] | None, str | None]:
    """Given references of an image whose target is its prediction, and a note where the prediction is one of them.

    Returns
    -------
    references : tuple of int or None
        Without the predicted class; None (a plain map) when nothing is left.
    note : str or None
        For the record.
    """
    if prediction not in references:
        return references, None
    note = f"predicted as the reference {classifier.name(prediction)!r}, which was dropped"
    left = tuple(d for d in references if d != prediction)
    return (left, note) if left else (None, f"{note}: nothing to subtract, so every map is the plain one")


def read_class_map(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read ``data class,model class`` rows of a CSV file; a first row ``data,model`` or ``folder,class`` is a header.

    Raises
    ------
    UserError
        No such file, a row without exactly two fields, or a data class given twice.
    """
    path = Path(path).expanduser()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError("cannot read class map", where=path, given=e, remedy="give a CSV file of two columns") from e
    if rows and [cell.strip().lower() for cell in rows[0]] in (["data", "model"], ["folder", "class"]):
        rows = rows[1:]
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise UserError(
                "a class map has two columns",
                where=f"{path} row {number}",
                given=",".join(row),
                remedy="write: data class,model class",
            )
        name, other = row[0].strip(), row[1].strip()
        if name in found:
            raise UserError("class given twice", where=f"{path} row {number}", given=repr(name), remedy="keep one row")
        found[name] = other
    return found


def read_confusion(path: str | os.PathLike[str]) -> Tensor:
    """Read a square table of numbers from a CSV file without header.

    Raises
    ------
    UserError
        No such file, a cell that is no number, or a table that is not square.
    """
    import numpy as np
    import torch

    try:
        table = np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError) as e:
        raise UserError(
            "cannot read confusion matrix", where=os.fspath(path), given=e, remedy="give C rows of C numbers"
        ) from e
    if table.shape[0] != table.shape[1]:
        raise UserError("confusion matrix is not square", where=os.fspath(path), given=table.shape)
    return torch.from_numpy(table).float()


def ids_by_name(names: Sequence[str], known: Sequence[str] | None) -> tuple[int | None, ...]:
    """Place of each name in `known`, by exact name; None for a name that is not there."""
    place: dict[str, int] = {}
    for i, name in enumerate(known or ()):
        place.setdefault(name, i)
    return tuple(place.get(name) for name in names)


def match_classes(
    data_classes: Sequence[str], classifier: Classifier, class_map: Mapping[str, str] | None = None
) -> tuple[int | None, ...]:
    """Model class id of each data class by exact name, through `class_map` where it has an entry.

    Raises
    ------
    UserError
        An entry of the map names a class that the data or the model does not have.
    """
    class_map = class_map or {}
    for name, other in class_map.items():
        if name not in data_classes:
            near = closest(name, data_classes)
            hint = f"did you mean {', '.join(near)}?" if near else "mend the --class-map file"
            raise UserError("class map names no class of the data", where="--class-map", given=repr(name), remedy=hint)
        classifier.index(other)  # raises with the closest model classes
    found = ids_by_name([class_map.get(name, name) for name in data_classes], classifier.class_names)
    # `index` refuses a name that two classes share, and takes a map's numbers.
    return tuple(
        classifier.index(class_map.get(name, name)) if c is not None or name in class_map else None
        for name, c in zip(data_classes, found)
    )


def unmatched_error(unmatched: Sequence[str], classifier: Classifier) -> UserError:
    """The error for data classes that the model does not have, with the closest of its classes beside each."""
    names = classifier.class_names or []
    shown = []
    for name in unmatched[:6]:
        near = closest(name, names, 1)
        shown.append(f"{name!r} (closest: {near[0]!r})" if near else repr(name))
    more = f" and {len(unmatched) - 6} more" if len(unmatched) > 6 else ""
    return UserError(
        f"{len(unmatched)} classes of the data are not classes of the model",
        where=classifier.spec or None,
        given=", ".join(shown) + more,
        remedy="map them with --class-map map.csv, or use --target predicted",
    )


def plan_targets(
    classifier: Classifier,
    data_classes: Sequence[str] = (),
    *,
    target: str | int | None = None,
    references: int | Iterable[str | int] | None = 3,
    class_map: Mapping[str, str] | None = None,
    used: Iterable[int] | None = None,
) -> TargetPlan:
    """Check targets, references and class names, and settle them.

    Parameters
    ----------
    classifier
        The model.
    data_classes
        Names of the data's classes; empty for unlabelled images.
    target
        None or ``"predicted"``, ``"label"``, or a class name or id.
    references
        Number of similar classes, names or ids of classes, or None (or 0) for plain maps.
    class_map
        Data class name to model class name, where they differ.
    used
        Data class ids that occur; the others need no counterpart in the model. All by default.

    Raises
    ------
    UserError
        A name that does not exist, a reference equal to the target or given twice, a negative number of references,
        ``"label"`` without labels, or labels that the model does not know.
    """
    ids = match_classes(data_classes, classifier, class_map)
    known = set(range(len(data_classes)) if used is None else used)
    unmatched = [name for i, name in enumerate(data_classes) if i in known and ids[i] is None]
    chosen: str | int
    if target is None or target == "predicted":
        chosen = "predicted"
        if unmatched and len(unmatched) < len(known):
            log.warning("%s", unmatched_error(unmatched, classifier))
    elif target == "label":
        chosen = "label"
        if not data_classes:
            raise UserError(
                "the data has no labels",
                where="--target",
                given="label",
                remedy="put the images into one folder per class, or use --target predicted",
            )
        if unmatched:
            raise unmatched_error(unmatched, classifier)
    else:
        chosen = classifier.index(target)
    refs: int | tuple[int, ...] | None
    if references is None or isinstance(references, int):
        if references is not None and references < 0:
            raise UserError("number of references must not be negative", where="--references", given=references)
        refs = references or None
    else:
        refs = tuple(classifier.index(name) for name in references)
        for i, d in enumerate(refs):
            if d == chosen:
                raise UserError(
                    "a reference equals the target",
                    where="--reference",
                    given=repr(classifier.name(d)),
                    remedy="name another class",
                )
            if d in refs[:i]:
                raise UserError(
                    "reference given twice", where="--reference", given=repr(classifier.name(d)), remedy="name it once"
                )
        refs = refs or None
    return TargetPlan(ids, tuple(data_classes), chosen, refs)
