"""What a calibration does to a head: factor and bias per class, matched by class name, and the record of the change.

FTC (arXiv 2409.16223) predicts argmax_c z_c + gamma * 1[c in U]; calibrations with a factor and a shift per class are
ours.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vfm_core.errors import UserError

from ft_calibrate.groups import label_columns
from ft_calibrate.record import Calibration, read_calibration

__all__ = ["SHIP", "TOLERANCE", "FoldRecord", "HeadChange", "head_change", "largest_difference"]

SHIP = "ship calibration.json beside the model and use ft-calibrate apply"
TOLERANCE = 1e-5  # rounding beyond this is worth a warning; float32 heads stay below


@dataclass(frozen=True, eq=False)
class HeadChange:
    """What happens to K logits: ``z * scale + bias``.

    Attributes
    ----------
    scale, bias : ndarray of float64, (K,)
        Bias -inf masks a class out.
    gamma : float
        The part of the bias that is gamma.
    columns : ndarray of intp
        Columns that receive gamma.
    source : str
        Which method and data chose gamma, for people.
    notes : tuple of str
        What is not part of the change.
    effect : str
        What happens to the logits, in words.
    """

    scale: NDArray[np.float64]
    bias: NDArray[np.float64]
    gamma: float
    columns: NDArray[np.intp]
    source: str
    notes: tuple[str, ...] = ()
    effect: str = ""

    @property
    def scales(self) -> bool:
        """Whether any factor differs from 1: then the head's weight changes too."""
        return bool((self.scale != 1).any())

    def apply(self, logits: Any) -> NDArray[np.float64]:
        """Changed logits (N, K) in float64."""
        return np.asarray(logits, dtype=np.float64) * self.scale + self.bias

    def new_weight(self, weight: Tensor) -> Tensor:
        """Weight (K, ...) times scale, in the weight's dtype."""
        scale = torch.from_numpy(self.scale).to(weight.device).view(-1, *[1] * (weight.ndim - 1))
        return (weight.detach().double() * scale).to(weight.dtype)

    def new_bias(self, bias: Tensor | None, like: Tensor) -> tuple[Tensor, float]:
        """Changed bias (K,) in the head's dtype, and the largest rounding error."""
        old = torch.zeros(len(self.bias), dtype=torch.float64) if bias is None else bias.detach().double().cpu()
        exact = old * torch.from_numpy(self.scale) + torch.from_numpy(self.bias)
        kind = like if bias is None else bias
        dtype = kind.dtype if kind.dtype.is_floating_point else torch.float32
        rounded = exact.to(dtype)
        finite = torch.isfinite(exact)
        error = float((rounded.double() - exact)[finite].abs().max()) if finite.any() else 0.0
        return rounded.to(kind.device), error


@dataclass(frozen=True)
class FoldRecord:
    """What was done to a head.

    Attributes
    ----------
    head : str
        Dotted name of the layer, or of the ONNX node.
    changed : tuple of str
        Tensors that were changed or made.
    gamma : float
        Added to `moved` of `num_classes` classes.
    num_classes, moved : int
        K, and how many classes received gamma.
    source : str
        Which method and data chose gamma.
    dtype : str
        Of the head, kept.
    rounding : float
        Largest error that this dtype makes in the new bias.
    notes : tuple of str
        What a reader must know.
    path : Path, optional
        The written file or folder.
    max_abs_diff : float, optional
        Largest difference from logits + gamma on random inputs, where the model was run.
    effect : str
        What happens to the logits, in words.
    """

    head: str
    changed: tuple[str, ...]
    gamma: float
    num_classes: int
    moved: int
    source: str
    dtype: str
    rounding: float = 0.0
    notes: tuple[str, ...] = ()
    path: Path | None = None
    max_abs_diff: float | None = None
    effect: str = ""

    def line(self) -> str:
        """One sentence for people."""
        text = self.effect or f"gamma = {self.gamma:.6g}"
        if self.gamma:
            text += f", gamma added to {self.moved} of {self.num_classes} classes"
        text += f", in {', '.join(self.changed)} ({self.dtype}); {self.source}"
        if self.max_abs_diff is not None:
            text += f"; checked: logits differ from logits + gamma by at most {self.max_abs_diff:.2g}"
        return "; ".join([text, *self.notes])


def head_change(
    calibration: float | Calibration | str | os.PathLike[str],
    num_classes: int,
    class_names: Sequence[str] | None = None,
    absent: Any = None,
) -> HeadChange:
    """What a calibration does to the K logits of a head.

    Parameters
    ----------
    calibration : float, Calibration or path
        Gamma itself (needs `absent`), or a record, which names its classes.
    num_classes : int
        K.
    class_names : sequence of str, optional
        Names of the head's classes: a record is then matched by name, else by position.
    absent : optional
        With a number: the classes that receive it, as names, column numbers or a mask (K,).

    Returns
    -------
    HeadChange

    Raises
    ------
    UserError
        Another number of classes, unknown names, a number without `absent`, or a calibration that is not linear.
    """
    if isinstance(calibration, str | os.PathLike):
        calibration = read_calibration(Path(calibration))
    if not isinstance(calibration, Calibration):
        return _plain_change(float(calibration), num_classes, class_names, absent)
    if absent is not None:
        remedy = "leave absent out, or give gamma as a number"
        raise UserError("the calibration names its absent classes", where="absent", remedy=remedy)
    names = _matching_names(calibration, num_classes, class_names)
    if calibration.scale is not None and calibration.input_kind != "logit":
        given = f"{calibration.method} fitted on {calibration.input_kind}s"
        raise UserError("factors per class belong to the fitted scores, not to logits", given=given, remedy=SHIP)
    moved = {calibration.classes[i] for i in calibration.groups.moved(calibration.remaining_mode)}
    order = calibration.classes if names is None else names
    columns = np.asarray([i for i, name in enumerate(order) if name in moved], dtype=np.intp)
    notes = []
    if class_names is None and calibration.classes != _numbers(num_classes):
        notes.append("the checkpoint names no classes: matched by position (--classes FILE matches them by name)")
    elif class_names is not None and names is None and tuple(class_names) != calibration.classes:
        notes.append("the calibration names no classes: matched by position")
    if calibration.temperature != 1:
        notes.append(f"the temperature {calibration.temperature:.4g} is not folded: divide the logits by it")
    if calibration.oracle:
        notes.append("gamma is an oracle: an upper bound, not deployable")
    labels = "labels of absent classes" if calibration.uses_absent_labels else "no labels of absent classes"
    if calibration.uses_test_labels:
        labels += ", test labels"
    source = f"method {calibration.method}, {calibration.n_train} rows, {labels} used"
    scale, bias = calibration.scales(names), calibration.bias(names)
    return HeadChange(scale, bias, calibration.gamma, columns, source, tuple(notes), calibration.effect())


def _plain_change(gamma: float, num_classes: int, class_names: Sequence[str] | None, absent: Any) -> HeadChange:
    if not np.isfinite(gamma):
        raise UserError("gamma must be finite", where="gamma", given=gamma)
    if absent is None:
        remedy = "name the absent classes, or give a calibration file"
        raise UserError("a gamma needs the classes that receive it", where="absent", remedy=remedy)
    names = list(class_names) if class_names is not None else list(_numbers(num_classes))
    if len(names) != num_classes:
        raise UserError("class names do not fit the head", given=f"{len(names)} names for {num_classes} logits")
    array = absent.detach().cpu().numpy() if isinstance(absent, Tensor) else absent
    if getattr(array, "dtype", None) == np.bool_ or (len(array) and all(isinstance(v, bool | np.bool_) for v in array)):
        if len(array) != num_classes:
            raise UserError(
                "the mask of absent classes has another length", given=f"{len(array)} for {num_classes} logits"
            )
        columns = np.flatnonzero(np.asarray(array))
    else:
        columns = np.unique(label_columns(list(array), names, where="absent"))
    if not len(columns) or columns[0] < 0:
        raise UserError("no absent class", where="absent", remedy="name the classes that receive gamma")
    bias = np.zeros(num_classes)
    bias[columns] = gamma
    effect = f"gamma = {gamma:.6g}"
    return HeadChange(np.ones(num_classes), bias, gamma, columns.astype(np.intp), "given as a number", effect=effect)


def _numbers(num_classes: int) -> tuple[str, ...]:
    return tuple(map(str, range(num_classes)))


def _matching_names(
    calibration: Calibration, num_classes: int, class_names: Sequence[str] | None
) -> Sequence[str] | None:
    """The head's names in the calibration's spelling, or None to go by position."""
    known = calibration.classes
    if len(known) != num_classes:
        given = f"{len(known)} calibrated classes, {num_classes} logits"
        remedy = "fit the calibration on the logits of this head"
        raise UserError("the calibration is of another head", given=given, remedy=remedy)
    if class_names is None or tuple(class_names) == known or known == _numbers(num_classes):
        return None
    return class_names  # unknown ones are refused when the bias is asked for


def largest_difference(got: Any, expected: Any) -> float:
    """Largest absolute difference of two arrays; -inf equals -inf, and anything else beside it is inf."""
    a, b = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.where(a == b, 0.0, np.abs(a - b))
    return float(np.nan_to_num(gap, nan=np.inf).max(initial=0.0))
