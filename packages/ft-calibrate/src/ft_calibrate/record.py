"""The calibration record: gamma, what it applies to, and where it comes from, as a small JSON file.

A record can be applied to logits of other data, matched by class name. It says which data chose gamma, whether labels
of absent classes or test labels were used, and whether it is an oracle (an upper bound that cannot be deployed).
The file format is ours.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from vfm_core.errors import UserError, unknown_name
from vfm_core.files import write_json

from ft_calibrate.groups import ClassGroups, class_groups
from ft_calibrate.inputs import INPUT_KINDS, as_scores, like, looks_like_probabilities, to_logits

__all__ = ["VERSION", "Calibration", "read_calibration"]

log = logging.getLogger(__name__)

VERSION = 1  # of the file format
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """How to repair the logits of one head: ``z * scale + shift + gamma * 1[c moved]``, excluded columns -inf.

    Made by `ft_calibrate.calibration.fit_calibration` or `read_calibration`.

    Parameters
    ----------
    method : str
        A key of `ft_calibrate.calibration.METHODS`.
    gamma : float
        Added to the logits of the moved classes; in logit units, finite. Positive favours the absent classes.
    classes : tuple of str
        All K classes, in the column order of the fitted logits.
    seen, absent, remaining : tuple of str
        The class groups.
    remaining_mode : {"absent", "keep", "exclude"}
        Whether the remaining classes get gamma, stay as they are, or are masked out.
    criterion : str or None
        What gamma maximises; None for methods without a criterion.
    n_train : int
        Rows that chose gamma.
    chosen_on : str
        Which data these are, in words.
    per_fold_gamma : tuple of float
        Gamma of every fold of pseudo cross-validation; else empty.
    ci95 : (float, float) or None
        95 % interval of gamma.
    uses_absent_labels, uses_test_labels, oracle : bool
        Whether labels outside S, or labels of the test data, chose gamma; an oracle is an upper bound, not deployable.
    created_with : str
        Package and version.
    input_sha256 : str or None
        Hash of the input: of the file when one was named, else of logits and labels.
    input_kind : {"logit", "logprob", "prob"}
        What the fitted scores were. For ``"prob"`` gamma belongs to their logs.
    temperature : float
        Divides the calibrated logits before the softmax; cannot change a prediction.
    scale, shift : tuple of float or None
        Per class, in the order of ``classes``; None: 1 and 0.
    confidence : dict or None
        Expected calibration error before and after the temperature, when one was fitted.
    details : dict
        What the method found beside gamma.
    notes : tuple of str
        What else a reader must know.
    version : int
        Of the file format.
    """

    method: str
    gamma: float
    classes: tuple[str, ...]
    seen: tuple[str, ...]
    absent: tuple[str, ...]
    remaining: tuple[str, ...] = ()
    remaining_mode: str = "absent"
    criterion: str | None = None
    n_train: int = 0
    chosen_on: str = ""
    per_fold_gamma: tuple[float, ...] = ()
    ci95: tuple[float, float] | None = None
    uses_absent_labels: bool = False
    uses_test_labels: bool = False
    oracle: bool = False
    created_with: str = ""
    input_sha256: str | None = None
    input_kind: str = "logit"
    temperature: float = 1.0
    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
    confidence: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        if not np.isfinite(self.gamma):
            raise UserError("gamma must be finite", where="calibration", given=self.gamma)
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise UserError("the temperature must be positive", where="calibration", given=self.temperature)
        if self.input_kind not in INPUT_KINDS:
            remedy = f"use {', '.join(INPUT_KINDS)}"
            raise UserError("unknown kind of input", where="calibration", given=self.input_kind, remedy=remedy)
        for name, values in (("scale", self.scale), ("shift", self.shift)):
            if values is not None and (len(values) != len(self.classes) or not np.isfinite(values).all()):
                given = f"{len(values)} numbers for {len(self.classes)} classes"
                raise UserError(f"{name} needs one finite number per class", where="calibration", given=given)
        if self.scale is not None and min(self.scale) <= 0:
            raise UserError("scale must be positive", where="calibration", given=min(self.scale))
        groups = self.groups
        groups.moved(self.remaining_mode)  # refuses an unknown mode
        if set(groups.names(groups.remaining)) != set(self.remaining):
            given = ", ".join(sorted(set(self.remaining) ^ set(groups.names(groups.remaining)))[:5])
            raise UserError("seen, absent and remaining do not cover the classes", where="calibration", given=given)

    @cached_property
    def groups(self) -> ClassGroups:
        """The class groups, in the column order of ``classes``."""
        return class_groups(self.classes, list(self.seen), list(self.absent), where="calibration")

    def effect(self) -> str:
        """What the record does to logits, in words: gamma, factors or T, shifts, masked classes.

        Gamma is left out where it is 0 and something else is done, so that no repair reads as "gamma = 0".
        """
        parts = []
        if self.scale is not None:
            changed = [value for value in self.scale if value != 1]
            on = f"on {len(changed)} of {len(self.scale)} classes"
            t = self.details.get("temperature_absent")
            if t is not None:
                parts.append(f"logits divided by T = {t:.4g} {on}")
            elif changed:
                parts.append(f"factor {_range(changed)} {on}")
        if self.shift is not None and any(self.shift):
            parts.append(f"shift {_range(self.shift)} per class")
        if self.gamma or not parts:
            parts.insert(0, f"gamma = {self.gamma:.6g}")
        masked = len(self.groups.excluded(self.remaining_mode))
        if masked:
            parts.append(f"{masked} {'class' if masked == 1 else 'classes'} masked (-inf)")
        return ", ".join(parts)

    def origin(self) -> str:
        """Whether the method, as it was used, is the paper's; in words."""
        from ft_calibrate.methods import METHODS

        method = METHODS[self.method]
        if method.source != "paper":
            return "not from the paper"
        if method.seen_labels_only and self.uses_absent_labels:
            return "as the published code computes it, not the paper"
        return "the paper's"

    def bias(self, classes: Sequence[str] | None = None) -> Floats:
        """What is added to the (scaled) logits, (K,) float64: shift, gamma on moved classes, -inf on excluded ones.

        Parameters
        ----------
        classes
            Column order wanted; by default that of the record.

        Raises
        ------
        UserError
            Classes that the record does not know.
        """
        groups = self.groups
        bias = np.zeros(len(self.classes)) if self.shift is None else np.asarray(self.shift, dtype=np.float64)
        bias = bias.copy()
        bias[groups.moved(self.remaining_mode)] += self.gamma
        bias[groups.excluded(self.remaining_mode)] = -np.inf
        return bias[self._order(classes)]

    def scales(self, classes: Sequence[str] | None = None) -> Floats:
        """Factors of the logits, (K,) float64; 1 unless the method scales. ``classes`` as in `bias`."""
        scale = np.ones(len(self.classes)) if self.scale is None else np.asarray(self.scale, dtype=np.float64)
        return scale[self._order(classes)]

    def _order(self, classes: Sequence[str] | None) -> NDArray[np.intp]:
        if classes is None:
            return np.arange(len(self.classes), dtype=np.intp)
        place = {name: i for i, name in enumerate(self.classes)}
        names = [str(name) for name in classes]
        if len(set(names)) < len(names):
            raise UserError("class names repeat", where="classes", remedy="name every column once")
        unknown = [name for name in names if name not in place]
        if unknown:
            raise UserError(
                "classes that the calibration does not know",
                where="classes",
                given=", ".join(unknown[:8]),
                remedy="fit the calibration on the logits of this head",
            )
        if len(names) < len(place):
            log.warning("%d of the %d calibrated classes have no column here", len(place) - len(names), len(place))
        return np.asarray([place[name] for name in names], dtype=np.intp)

    def apply(self, logits: Any, classes: Sequence[str] | None = None, *, kind: str | None = None) -> Any:
        """Calibrated logits (N, K), in the column order of ``logits``.

        Parameters
        ----------
        logits
            (N, K) scores; arrays or lists give arrays, tensors give tensors on the same device.
        classes
            Names of the columns; without them the order of the record is taken, and K must agree.
        kind : {"logit", "logprob", "prob"}, optional
            What ``logits`` are. By default logits, unless the record was fitted on probabilities and these look like
            probabilities too.

        Raises
        ------
        UserError
            Another number of columns without names, unknown classes, or values that are not finite.
        """
        names = list(self.classes) if classes is None else list(classes)
        z = self._logits(logits, names, kind)
        scale, bias = self.scales(classes), self.bias(classes)
        out = z.astype(np.float64) * scale + bias if self.scale is not None else z + bias.astype(z.dtype)
        return like(out.astype(z.dtype, copy=False), logits)

    def _logits(self, logits: Any, names: list[str], kind: str | None) -> NDArray[Any]:
        scores = as_scores(logits, len(names), classes=names)
        if kind is None:
            kind = "logit"
            if looks_like_probabilities(scores):
                kind = "prob" if self.input_kind == "prob" else "logit"
                if kind == "logit":
                    log.warning("the rows look like probabilities (they sum to 1): pass kind='prob' if they are")
        return to_logits(scores, kind, classes=names)[0]

    def predict(self, logits: Any, classes: Sequence[str] | None = None, *, kind: str | None = None) -> Any:
        """Predicted columns (N,) int64, in the column order of ``logits``; the first of equal scores wins.

        Arguments and errors as in `apply`.
        """
        return self.apply(logits, classes, kind=kind).argmax(1)

    def probabilities(self, logits: Any, classes: Sequence[str] | None = None, *, kind: str | None = None) -> Any:
        """Softmax of the calibrated logits divided by ``temperature``, (N, K). Arguments and errors as in `apply`."""
        z = as_scores(self.apply(logits, classes, kind=kind))
        return like(softmax(z.astype(np.float64) / self.temperature, axis=1).astype(z.dtype), logits)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return asdict(self)

    def write(self, path: str | Path) -> Path:
        """Write the record as JSON, whole or not at all; return the path."""
        write_json(path, self.to_dict())
        return Path(path)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


def read_calibration(path: str | Path) -> Calibration:
    """Read a record that `Calibration.write` made.

    Raises
    ------
    UserError
        A missing file, one that is no calibration, a newer version, an unknown method, or contradictions.
    """
    from ft_calibrate.methods import METHODS

    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such calibration file", given=path, remedy="make one with ft-calibrate fit") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError("unreadable calibration file", where=path, given=error) from None
    if not isinstance(data, dict) or not {"version", "method", "gamma", "classes", "seen", "absent"} <= data.keys():
        remedy = "it needs version, method, gamma, classes, seen and absent"
        raise UserError("this is no calibration file", where=path, remedy=remedy)
    if not isinstance(data["version"], int) or data["version"] > VERSION:
        remedy = f"this version of ft-calibrate reads up to version {VERSION}: update it"
        raise UserError("unknown version of the calibration file", where=path, given=data["version"], remedy=remedy)
    if str(data["method"]) not in METHODS:
        raise unknown_name("method", str(data["method"]), METHODS, where=f"{path}, field method")
    known = {f.name for f in fields(Calibration)}
    kept: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items() if name in known}
    try:
        return Calibration(**kept)
    except UserError as error:
        raise UserError(error.what, where=path, given=error.given, remedy=error.remedy) from None
    except (TypeError, ValueError) as error:
        raise UserError("a field of the calibration file has the wrong type", where=path, given=error) from None
