"""The settings that a comparison runs over: optimisers, learning rates, shares of S, types of split.

FTC varies the optimiser, learning rate and weight decay (claim: SGD is robust, the others need small steps), the number
of fine-tuning classes, and the type of the split (random, or S and U far apart in feature space). An axis is
``name=value,value``; several axes give their product.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfm_core.errors import UserError

from ft_calibrate.groups import class_groups
from ft_calibrate.splits import Split, make_split, seen_sweep

__all__ = ["SPLIT_AXES", "Setting", "parse_sweep", "settings_of_sweep"]

SPLIT_AXES = ("share", "n_seen", "split")
"""Axes that choose S; all others are settings of the training."""

TRAINING_AXES = (
    "optimizer",
    "lr",
    "backbone_lr_scale",
    "momentum",
    "weight_decay",
    "epochs",
    "batch_size",
    "steps_per_epoch",
    "mixed_precision",
)


@dataclass(frozen=True)
class Setting:
    """One point of a sweep.

    Attributes
    ----------
    labels : mapping
        Axis -> value, for the table; empty without a sweep.
    seen, absent : tuple of str
        S and U.
    training : mapping
        Settings of the training.
    """

    labels: Mapping[str, Any]
    seen: tuple[str, ...]
    absent: tuple[str, ...]
    training: Mapping[str, Any] = field(default_factory=dict)


def parse_sweep(axes: Sequence[str]) -> dict[str, list[Any]]:
    """``["optimizer=sgd,adam", "lr=1e-3,1e-2"]`` to axis -> values; numbers become numbers.

    Raises
    ------
    UserError
        An axis without values, given twice, or unknown.

    Examples
    --------
    >>> parse_sweep(["optimizer=sgd,adam", "lr=0.01"])
    {'optimizer': ['sgd', 'adam'], 'lr': [0.01]}
    """
    from vfm_core.errors import unknown_name

    found: dict[str, list[Any]] = {}
    for text in axes:
        name, _, tail = text.partition("=")
        name = name.strip().replace("-", "_")
        values = [_value(part.strip()) for part in tail.split(",") if part.strip()]
        if not values:
            raise UserError("axis without values", where="--sweep", given=repr(text), remedy="write lr=0.001,0.01")
        if name not in (*SPLIT_AXES, *TRAINING_AXES):
            raise unknown_name("axis", name, (*SPLIT_AXES, *TRAINING_AXES), where="--sweep")
        if name in found:
            raise UserError("axis given twice", where="--sweep", given=name, remedy="list all its values at once")
        found[name] = values
    return found


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def settings_of_sweep(
    classes: Sequence[str],
    seen: Any,
    absent: Any,
    training: Mapping[str, Any],
    sweep: Mapping[str, Sequence[Any]] | None = None,
    *,
    seed: int = 0,
    features: Callable[[], tuple[Any, Any]] | None = None,
) -> list[Setting]:
    """The product of the axes as a list of settings.

    Parameters
    ----------
    classes : sequence of str
        Names of the K columns.
    seen, absent
        S and U of the settings that do not choose their own. ``share`` keeps a share of this S, nested, the rest
        becoming absent; ``n_seen`` and ``split`` (``random``, ``similarity``) draw a new S from all classes.
    training : mapping
        Settings of the training that the axes change.
    sweep : mapping, optional
        Axis -> values.
    seed : int
        Of the drawn splits.
    features : callable, optional
        ``() -> (features (N, D), columns (N,))`` of the source model, for similarity-based splits.

    Raises
    ------
    UserError
        ``share`` together with ``n_seen`` or ``split``; values out of range.
    """
    axes = dict(sweep or {})
    if "share" in axes and ("n_seen" in axes or "split" in axes):
        remedy = "sweep share of the given seen classes, or n_seen and split of all classes"
        raise UserError("axes that exclude each other", where="--sweep", given=", ".join(axes), remedy=remedy)
    groups = class_groups(list(classes), seen, absent)
    names = tuple(groups.names(groups.seen)), tuple(groups.names(groups.absent))
    settings = []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        own = {axis: value for axis, value in point.items() if axis not in SPLIT_AXES}
        s, u = names
        if "share" in point:
            base = Split(tuple(classes), s, u, "given", "file")
            step = seen_sweep(base, [float(point["share"])])[0]
            s, u = tuple(step.seen), tuple(step.absent)
        elif "n_seen" in point or "split" in point:
            kind = str(point.get("split", "random"))
            extra: dict[str, Any] = {}
            if kind == "similarity" and features is not None:
                extra = dict(zip(("features", "labels"), features(), strict=True))
            drawn = make_split(list(classes), n_seen=int(point.get("n_seen", len(s))), kind=kind, seed=seed, **extra)
            s, u = tuple(drawn.seen), tuple(drawn.absent)
        settings.append(Setting(point, s, u, {**training, **own}))
    return settings
