"""The grid method x ratio as a list of arms.

An arm is written ``name[?option=value&...]`` and run at a ratio, such as ``meda``, ``snapkv?window=16&kernel=7`` or
``meda?merge=none``; the options are the keywords of `meda_kv.methods.resolve_method`. The full cache is one arm of
its own at ratio 1: it is what every other arm is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.errors import UserError, closest

if TYPE_CHECKING:
    from meda_kv.methods import Method

FULL = "full"


@dataclass(frozen=True)
class Arm:
    """One method at one ratio.

    Parameters
    ----------
    label
        What the user wrote, such as ``"snapkv?window=16"``; names the arm in tables and files.
    ratio
        Share of the prompt's KV to keep, in (0, 1].
    method
        What runs; ``None`` for the full cache.
    """

    label: str
    ratio: float
    method: Method | None = field(default=None, compare=False, repr=False)

    @property
    def full(self) -> bool:
        """Whether nothing is compressed."""
        return self.label == FULL

    @property
    def key(self) -> str:
        """``label@ratio``, unique in a grid."""
        return f"{self.label}@{self.ratio:g}"


def grid(
    methods: str | Iterable[Any],
    ratios: str | float | Iterable[float],
    *,
    preset: str = "paper",
    full: bool = True,
    profile: str | Path | None = None,
    model: Any = None,
    **overrides: Any,
) -> list[Arm]:
    """List every method at every ratio, the full cache once and first.

    Parameters
    ----------
    methods
        Names with options, `Method` objects, or one comma-separated string.
    ratios
        Numbers in (0, 1], or one comma-separated string.
    preset
        ``"paper"`` or ``"official-code"``.
    full
        Add the full cache when it is not among the methods. Without it nothing can be recommended.
    profile
        A budget profile: its shares per layer are the budgets of the methods that would take theirs from an entropy.
    model
        The profile is checked against it, when given.
    **overrides
        Options of every method that is given by name (``floor=4``); what is written with a name comes first.

    Raises
    ------
    UserError
        An unknown method or option, a ratio out of range, nothing to run, an arm twice, or a profile of another model.
    """
    shares = parse_ratios(ratios)
    parsed = [parse_method(item, preset, **overrides) for item in _split(methods)]
    if profile is not None:
        parsed = [(label, _profiled(method, profile, model)) for label, method in parsed]
    labels = [label for label, _ in parsed]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError("method given twice", where="--methods", given=label, remedy="name every method once")
    arms = [Arm(FULL, 1.0)] if full or FULL in labels else []
    arms += [Arm(label, ratio, method) for label, method in parsed if label != FULL for ratio in shares]
    if not arms:
        raise UserError("no method", where="--methods", remedy="name one, such as meda; `meda-kv methods` lists them")
    return arms


def parse_method(item: Any, preset: str = "paper", **overrides: Any) -> tuple[str, Method | None]:
    """Label and method of ``name[?option=value&...]`` or of a `Method` object; ``None`` for the full cache.

    Raises
    ------
    UserError
        An unknown name, an option without a value, or one that the method does not have.
    """
    if not isinstance(item, str):
        return item.name, item if item.scorer is not None else None
    name, written = split_method(item)
    if name == FULL and not written:
        return FULL, None
    options = {key: value for key, value in overrides.items() if value is not None}
    method = check_method(name, preset, **{**options, **written})
    return item.strip(), method if method.scorer is not None else None


def split_method(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of ``name[?option=value&...]``; numbers, true and false are read as such.

    Raises
    ------
    UserError
        An option without a value.
    """
    name, _, query = text.strip().partition("?")
    options: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        option, equals, value = pair.partition("=")
        if not equals or not option:
            remedy = "write name?option=value&option=value"
            raise UserError("option without a value", where=f"method {text}", given=repr(pair), remedy=remedy)
        options[option.replace("-", "_")] = _value(value)
    return name, options


def check_method(name: str, preset: str = "paper", **options: Any) -> Method:
    """`meda_kv.methods.resolve_method` for a command line: an unknown name points to the verb that lists all.

    Raises
    ------
    UserError
        An unknown name or preset, or an option that the method does not have.
    """
    from meda_kv.methods import METHODS, resolve_method

    if name not in METHODS:
        near = closest(name, METHODS)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        remedy = f"{hint}`meda-kv methods` lists all {len(METHODS)}"
        raise UserError("unknown method", where="--method", given=repr(name), remedy=remedy)
    try:
        return resolve_method(name, preset=preset, **options)
    except TypeError as e:  # an option that no part of the method takes
        raise UserError("unusable option", where=f"method {name}", given=e) from e


def floor_option(error: Exception) -> Exception:
    """Name the option in an error whose remedy is a lower floor; any other error as it is."""
    if not isinstance(error, UserError) or not error.remedy or "--floor" in error.remedy:
        return error
    if "lower the floor" not in error.remedy:
        return error
    remedy = error.remedy.replace("lower the floor", "lower the floor with --floor (16 by default)")
    return UserError(error.what, where=error.where, given=error.given, remedy=remedy)


def _profiled(method: Method | None, profile: str | Path, model: Any) -> Method | None:
    """The method with the shares of a profile, if its own budgets need an entropy; compressed when it would be."""
    if method is None or method.allocator is None or method.allocator.entropy is None:
        return method
    from meda_kv.methods import ProfileAllocator
    from meda_kv.profiles import load_profile

    return replace(method, allocator=ProfileAllocator(load_profile(profile, model).alphas))


def parse_ratios(ratios: str | float | Iterable[float]) -> list[float]:
    """Distinct ratios in (0, 1], greatest first.

    Raises
    ------
    UserError
        Nothing given, not a number, or out of range.
    """
    items: Sequence[Any] = (
        [part for part in ratios.split(",") if part.strip()]
        if isinstance(ratios, str)
        else [ratios]
        if isinstance(ratios, int | float)
        else list(ratios)
    )
    found = []
    for item in items:
        try:
            ratio = float(item)
        except (TypeError, ValueError):
            ratio = math.nan
        if not 0 < ratio <= 1:
            remedy = "use numbers above 0 and at most 1, such as 0.1,0.2"
            raise UserError("ratio out of range", where="--ratio", given=item, remedy=remedy)
        found.append(ratio)
    if not found:
        raise UserError("no ratio", where="--ratio", remedy="give at least one, such as 0.2")
    return sorted(set(found), reverse=True)


def _split(methods: str | Iterable[Any]) -> list[Any]:
    if isinstance(methods, str):
        return [part.strip() for part in methods.split(",") if part.strip()]
    if isinstance(methods, Iterable):
        return list(methods)
    return [methods]


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
