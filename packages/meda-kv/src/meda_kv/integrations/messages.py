"""Chat messages, as evaluation programs hand them over, turned into prompts and settings of ``generate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.errors import UserError
from vfm_core.images import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from PIL import Image

    from meda_kv.prompts import Prompt

__all__ = ["Settings", "as_prompt", "generation_settings", "stopped"]

_MARKER = "<image>"


def as_prompt(messages: Sequence[Mapping[str, Any]], *, frames: int = 32, system: str | None = None) -> Prompt:
    """Turn a chat into one prompt.

    Parameters
    ----------
    messages : sequence of mapping
        ``{"role", "content"}``; content is text or a list of ``{"type": "text", "text"}``, ``{"type": "image", "url"}``
        and ``{"type": "video", "url"}``, whose url is a picture, a path, or a list of frames. Texts of all turns but
        the system's are joined by line breaks.
    frames : int
        Frames per video, evenly spread.
    system : str, optional
        Used where the chat has no system message of its own.

    Returns
    -------
    Prompt
        Pictures stand where the content has them. Where the text itself holds one ``<image>`` per picture, they stand
        there instead.

    Raises
    ------
    UserError
        Audio, or a picture or video that cannot be read.
    """
    from meda_kv.prompts import Prompt

    pieces: list[str | Image.Image] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message.get("role") == "system":
            system = "\n".join(str(part["text"]) for part in parts if part["type"] == "text")
            continue
        if pieces:
            pieces.append("\n")
        for part in parts:
            pieces += [part["text"]] if part["type"] == "text" else _pictures(part, frames)
    images: list[Image.Image] = [piece for piece in pieces if not isinstance(piece, str)]
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    if text.count(_MARKER) != len(images) or not images:
        plain = (piece.replace(_MARKER, "") if isinstance(piece, str) else _MARKER for piece in pieces)
        text = "".join(plain)
    return Prompt(text, images, system or None)


def _pictures(part: Mapping[str, Any], frames: int) -> list[Any]:
    from meda_kv.prompts import load_frames, load_images, spread

    source = part.get("url", part.get("image", part.get("video")))
    if isinstance(source, Mapping):
        source = source.get("url", source.get("path"))
    if isinstance(source, list | tuple):
        return load_images([source[i] for i in spread(len(source), frames)], "video frames")
    if part["type"] not in ("image", "video", "visual") or source is None:
        remedy = "use tasks with text, pictures and videos"
        raise UserError("unsupported content", where="messages", given=part["type"], remedy=remedy)
    if not isinstance(source, str | Path):
        return load_images([source], "messages")
    is_picture = Path(source).suffix.lower() in IMAGE_SUFFIXES and not Path(source).is_dir()
    if part["type"] == "image" or (part["type"] == "visual" and is_picture):
        return load_images([source], "messages")
    return load_frames(source, frames, "messages")


@dataclass(frozen=True)
class Settings:
    """How one request is to be answered.

    Attributes
    ----------
    arguments : dict
        For ``generate``.
    until : tuple of str
        The answer ends before the first of these.
    """

    arguments: dict[str, Any]
    until: tuple[str, ...] = ()


def generation_settings(kwargs: Mapping[str, Any]) -> Settings:
    """Read the generation settings of a task: ``max_new_tokens``, ``temperature``, ``top_p``, ``num_beams``, ``until``.

    Sampling takes a positive ``temperature`` and no ``do_sample: false``; everything else is greedy or beam search.
    Keys that are no business of a text model (such as ``image_sizes``) are left out.

    Raises
    ------
    UserError
        ``until`` that is neither a text nor a list of texts.
    """
    until = kwargs.get("until") or ()
    until = (until,) if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(text, str) for text in until):
        raise UserError("until must be a text or a list of texts", where="generation_kwargs", given=repr(until))
    heat = kwargs.get("temperature") or 0
    sample = bool(kwargs.get("do_sample", True)) and heat > 0
    arguments: dict[str, Any] = {"do_sample": sample, "num_beams": int(kwargs.get("num_beams") or 1)}
    arguments |= {"temperature": float(heat), "top_p": kwargs.get("top_p")} if sample else {}
    if not sample:
        arguments |= {"temperature": None, "top_p": None, "top_k": None}
    if kwargs.get("max_new_tokens"):
        arguments["max_new_tokens"] = int(kwargs["max_new_tokens"])
    return Settings(arguments, tuple(text for text in until if text))


def stopped(text: str, until: Sequence[str]) -> str:
    """The text before the first of the endings that it holds."""
    places = [text.find(ending) for ending in until]
    return text[: min((place for place in places if place >= 0), default=len(text))]
