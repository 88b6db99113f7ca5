"""Checks of single options: a wrong type or range is one :class:`UserError` that names the option and its range."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from vfm_core.errors import UserError

__all__ = ["check_above", "check_count", "check_flag", "check_name", "check_share", "is_count", "is_number"]


def is_count(value: Any) -> bool:
    """Whether a value is a whole number (not a bool)."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number (not a bool)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_count(where: str, value: Any, least: int | None = None) -> None:
    """Raise :class:`UserError` unless ``value`` is a whole number, and at least ``least`` where that is given."""
    if not is_count(value):
        remedy = "use e.g. 0" if least is None else f"use {least} or more"
        raise UserError("a whole number is needed", where=where, given=repr(value), remedy=remedy)
    if least is not None and value < least:
        raise UserError("too small: a whole number is needed", where=where, given=value, remedy=f"use {least} or more")


def check_share(where: str, value: Any, zero: bool = True, remedy: str = "use e.g. 0.5") -> None:
    """Raise :class:`UserError` unless ``value`` is a number in [0, 1], or (0, 1] without ``zero``."""
    if not is_number(value) or not 0.0 <= value <= 1.0 or (value == 0.0 and not zero):
        bounds = "between 0 and 1" if zero else "in (0, 1]"
        raise UserError(f"a share must lie {bounds}", where=where, given=repr(value), remedy=remedy)


def check_above(where: str, value: Any, remedy: str) -> None:
    """Raise :class:`UserError` unless ``value`` is a finite number above 0."""
    if not is_number(value) or not value > 0:
        raise UserError("a number above 0 is needed", where=where, given=repr(value), remedy=remedy)


def check_flag(where: str, value: Any) -> None:
    """Raise :class:`UserError` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise UserError("yes or no is needed", where=where, given=repr(value), remedy="use True or False")


def check_name(where: str, value: Any, known: Iterable[str], what: str = "unknown value") -> None:
    """Raise :class:`UserError` unless ``value`` is one of the known names."""
    names = tuple(known)
    if not isinstance(value, str) or value not in names:
        raise UserError(what, where=where, given=repr(value), remedy=f"use {', '.join(names)}")
