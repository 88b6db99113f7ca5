"""The one error type for bad input, and the wording every package shares.

A :class:`UserError` is something the user can mend: a wrong name, a missing file, a value out of range. The command
line prints it as one line and leaves with status 2. Anything else that is raised is a fault of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["UserError", "closest", "unknown_name"]


class UserError(ValueError):
    """Bad input, told in one line: ``<what> in <where>: <given>; <remedy>``.

    Parameters
    ----------
    what : str
        What is wrong.
    where : str or Path, optional
        The file, field or option that it was found in.
    given : object, optional
        The offending value, shown with ``str``.
    remedy : str, optional
        What to do about it.

    Notes
    -----
    Absent parts are left out, and line breaks inside the parts become single spaces, so that ``str(error)`` is always
    one line. The parts stay available as attributes of the same names.

    Examples
    --------
    >>> print(UserError("batch size must be positive", where="--batch-size", given=0, remedy="use 1 or more"))
    batch size must be positive in --batch-size: 0; use 1 or more
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        given: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.where, self.given, self.remedy = what, where, given, remedy
        text = what
        if where is not None:
            text += f" in {where}"
        if given is not None:
            text += f": {given}"
        if remedy is not None:
            text += f"; {remedy}"
        super().__init__(" ".join(text.split()))

    def __reduce__(self) -> tuple[object, ...]:
        # ValueError pickles by its arguments alone; worker processes must hand the parts over as well.
        return _rebuild, (type(self), self.what, self.where, self.given, self.remedy)


def _rebuild(cls: type[UserError], what: str, where: str | Path | None, given: object, remedy: str | None) -> UserError:
    return cls(what, where=where, given=given, remedy=remedy)


def closest(name: str, options: Iterable[str], n: int = 3) -> list[str]:
    """Return up to ``n`` of ``options`` that are spelled most like ``name``, best first.

    Case is ignored in the comparison, and an option that contains ``name`` counts as close.

    Parameters
    ----------
    name : str
        What was written.
    options : iterable of str
        What could have been meant.
    n : int
        Greatest number of suggestions.

    Returns
    -------
    list of str
        Possibly empty.
    """
    by_lower: dict[str, str] = {}
    for option in options:
        by_lower.setdefault(option.lower(), option)
    wanted = name.lower()
    found = difflib.get_close_matches(wanted, by_lower, n=n, cutoff=0.6)
    # The shortest containing names are the likeliest abbreviations ("resnet50" for "resnet50.a1_in1k").
    containing = sorted((o for o in by_lower if wanted and wanted in o and o not in found), key=lambda o: (len(o), o))
    return [by_lower[o] for o in (found + containing)[:n]]


def unknown_name(kind: str, name: str, options: Iterable[str], where: str | Path | None = None) -> UserError:
    """Build the error for a name that is not among ``options``.

    Parameters
    ----------
    kind : str
        What the name stands for, such as ``"method"``.
    name : str
        The unknown name.
    options : iterable of str
        The known names.
    where : str or Path, optional
        The file, field or option that the name was found in.

    Returns
    -------
    UserError
        To be raised by the caller. Names the closest matches, or all options when none is close and they are few.
    """
    known = sorted(set(options))
    near = closest(name, known)
    if near:
        remedy = f"did you mean {', '.join(near)}?"
    elif not known:
        remedy = "none is available"
    else:
        remedy = f"known: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"
    return UserError(f"unknown {kind}", where=where, given=repr(name), remedy=remedy)
