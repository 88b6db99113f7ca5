"""The spec grammar that names models and data everywhere: ``family:name[@source][?key=value&key=value]``.

Examples: ``timm:vit_small_patch14_dinov2.lvd142m?img_size=224``, ``timm:vit_base_patch16_224@./w.safetensors``,
``open_clip:ViT-B-16@openai``, ``open_clip:hf-hub:imageomics/bioclip-2``, ``hf:facebook/dinov2-small?revision=main``,
``dir:./checkpoint``, ``random:timm:vit_small_patch16_224``, ``folder:./photos``, ``tinyworld:birds?n=320``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vfm_core.errors import UserError, unknown_name

__all__ = ["Spec", "flag", "height_width", "parse_spec"]

# Everything after the colon of these families is a path: "@" and "?" are ordinary characters of file names there,
# except for a tail that reads as key=value pairs.
_PATH_FAMILIES = ("dir", "folder", "csv")
_FAMILY = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]+")  # two characters at least: "C:\x" is a drive, not a family
_OPTIONS = re.compile(r"[A-Za-z_][\w.-]*=[^&?]*(?:&[A-Za-z_][\w.-]*=[^&?]*)*")
_REMEDY = "write family:name[@source][?key=value], for example timm:vit_small_patch16_224, or an existing path"


@dataclass(frozen=True)
class Spec:
    """A parsed spec; ``str(spec)`` gives back an equivalent text.

    Attributes
    ----------
    family : str
        What comes before the first colon, such as ``"timm"``.
    name : str
        Name, repository or path; for ``random:`` the whole inner name including its family.
    source : str or None
        Checkpoint tag, file or data split after ``@``.
    options : dict of str to str
        The ``key=value`` pairs after ``?``, in the order written.
    """

    family: str
    name: str
    source: str | None = None
    options: dict[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        text = f"{self.family}:{self.name}"
        if self.source is not None:
            text += f"@{self.source}"
        if self.options:
            text += "?" + "&".join(f"{key}={value}" for key, value in self.options.items())
        return text

    def read(self, **kinds: Callable[[str], Any]) -> dict[str, Any]:
        """Convert the options that were given.

        Parameters
        ----------
        **kinds : callable
            One converter per known option, such as ``n=int`` or ``dynamic=flag``.

        Returns
        -------
        dict
            Only the options that the spec holds, converted.

        Raises
        ------
        UserError
            An option that is not among ``kinds``, or a value that its converter refuses with a ValueError.
        """
        values: dict[str, Any] = {}
        for key, text in self.options.items():
            if key not in kinds:
                raise unknown_name("option", key, kinds, where=str(self))
            try:
                values[key] = kinds[key](text)
            except ValueError as error:
                what = f"option {key} cannot be read"
                raise UserError(what, where=str(self), given=repr(text), remedy=str(error)) from error
        return values


def flag(text: str) -> bool:
    """Convert an on/off option: 1, true, yes, on or 0, false, no, off."""
    value = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in value:
        raise ValueError("write 1 or 0")
    return value[text.lower()]


def height_width(text: str) -> tuple[int, int]:
    """Convert an image size option: ``"224"`` to (224, 224), ``"224x336"`` to height 224 and width 336."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ValueError("write pixels, such as 224, or height x width, such as 224x336")
    return int(parts[0]), int(parts[-1])


def parse_spec(text: str) -> Spec:
    r"""Parse ``family:name[@source][?key=value&key=value]``.

    The text is split at its first colon only, so names may hold colons (``open_clip:hf-hub:org/name``,
    ``dir:C:\models``). A bare path that exists is read as ``dir:PATH``; a name that exists as a path keeps any ``@``
    and ``?`` that it holds. After ``random:`` a whole spec follows; its source and options become those of the result.

    Parameters
    ----------
    text : str
        The spec.

    Returns
    -------
    Spec

    Raises
    ------
    UserError
        No family, no name, or options that are not ``key=value`` pairs.

    Examples
    --------
    >>> parse_spec("timm:vit_small_patch14_dinov2.lvd142m?img_size=224").options
    {'img_size': '224'}
    >>> str(parse_spec("open_clip:ViT-B-16@openai"))
    'open_clip:ViT-B-16@openai'
    """
    text = text.strip()
    family, colon, rest = text.partition(":")
    if not colon or not _FAMILY.fullmatch(family):
        if text and _exists(text):
            return Spec("dir", text)
        head, mark, tail = text.rpartition("?")
        if mark and _exists(head):
            return Spec("dir", head, options=_parse_options(tail, text))
        what = "no such file or folder" if _looks_like_path(text) else "a spec needs a family"
        raise UserError(what, given=repr(text), remedy=_REMEDY)
    if not rest:
        raise UserError("a spec needs a name after the family", given=repr(text), remedy=_REMEDY)
    if family == "random":
        inner = parse_spec(rest)
        return Spec(family, f"{inner.family}:{inner.name}", inner.source, inner.options)
    is_path = family in _PATH_FAMILIES or rest.startswith("local-dir:")
    if _exists(rest.removeprefix("local-dir:")):
        return Spec(family, rest)
    options: dict[str, str] = {}
    head, mark, tail = rest.rpartition("?")
    if mark and (_OPTIONS.fullmatch(tail) or not is_path):
        rest, options = head, _parse_options(tail, text)
    source: str | None = None
    if not is_path and not _exists(rest):
        rest, at, tail = rest.partition("@")
        source = tail if at else None
    if not rest or source == "":
        missing = "name" if not rest else "source after '@'"
        raise UserError(f"a spec needs a {missing}", given=repr(text), remedy=_REMEDY)
    return Spec(family, rest, source, options)


def _parse_options(tail: str, text: str) -> dict[str, str]:
    if not _OPTIONS.fullmatch(tail):
        raise UserError(
            "options must read key=value, joined by '&'",
            where=repr(text),
            given=repr(tail),
            remedy="mend the part after '?'",
        )
    options: dict[str, str] = {}
    for pair in tail.split("&"):
        key, _, value = pair.partition("=")
        if key in options:
            raise UserError("option given twice", where=repr(text), given=key, remedy="keep one of them")
        options[key] = value
    return options


def _looks_like_path(text: str) -> bool:
    return "/" in text or "\\" in text or text.startswith((".", "~"))


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, embedded null, unknown user
        return False
