"""Prompts: text with images in it, turned into the tensors that a model's ``forward`` takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.media import load_frames, load_images, spread
from meda_kv.models import tokenizer_of

__all__ = [
    "MARKER",
    "Prompt",
    "Unmarked",
    "build_inputs",
    "image_token",
    "load_frames",
    "load_images",
    "ordered_images",
    "place_images",
    "process",
    "render",
    "spread",
    "to_model",
]

Unmarked = Literal["first", "error"]

MARKER = re.compile(r"<image>|\{image#(\d+)\}")
"""What stands for an image in a text: ``<image>`` for the next one, ``{image#k}`` for the k-th, counted from 1."""

_CODE_TOKENS = (("<|vision_start|>", "<|vision_end|>"),)  # pairs that a family wants around its image token


@dataclass(frozen=True, eq=False)
class Prompt:
    """One request.

    Attributes
    ----------
    text : str
        May hold ``<image>`` or ``{image#k}`` markers. Without any, the images come first.
    images : sequence of PIL.Image.Image
        In the order of their numbers.
    system : str, optional
        System message; needs a processor with a chat template.
    """

    text: str
    images: Sequence[Image.Image] = ()
    system: str | None = None


def place_images(text: str, count: int, *, unmarked: Unmarked = "first", where: str = "prompt") -> list[str | int]:
    """Split a text at its image markers.

    Parameters
    ----------
    text : str
        With or without markers.
    count : int
        How many images there are.
    unmarked : {"first", "error"}
        What to do when some images have a marker and others have none: put the others first, or refuse. Images come
        first in any case when there is no marker at all.
    where : str
        What errors call the prompt.

    Returns
    -------
    list of str or int
        Pieces of text, none empty, and indices of images (from 0) in reading order; an image may come twice.

    Raises
    ------
    UserError
        A marker without an image, or images without a marker under ``unmarked="error"``.
    """
    parts: list[str | int] = []
    used: set[int] = set()
    end = 0
    for match in MARKER.finditer(text):
        number = match.group(1)
        index = next((i for i in range(count + 1) if i not in used), count) if number is None else int(number) - 1
        if not 0 <= index < count:
            given = f"{match.group()!r} with {count} image{'' if count == 1 else 's'}"
            raise UserError(
                "an image marker without an image", where=where, given=given, remedy="give the image or drop the marker"
            )
        parts += [text[end : match.start()], index]
        used.add(index)
        end = match.end()
    parts.append(text[end:])
    missing = [i for i in range(count) if i not in used]
    if missing and used and unmarked == "error":
        raise UserError(
            "more images than markers",
            where=where,
            given=f"{count} images, {len(used)} marked",
            remedy="write {image#k} for every image, or no marker to have all images first",
        )
    return [part for part in (*missing, *parts) if part != ""]


def ordered_images(prompt: Prompt, *, unmarked: Unmarked = "first") -> list[Image.Image]:
    """Images of a prompt in the order in which the model reads them."""
    parts = place_images(prompt.text, len(prompt.images), unmarked=unmarked)
    return [prompt.images[part] for part in parts if isinstance(part, int)]


def image_token(processor: Any) -> str | None:
    """The text that a processor replaces by an image's placeholders; None for a tokenizer."""
    token = getattr(processor, "image_token", None)
    return str(token) if token is not None and tokenizer_of(processor) is not processor else None


def render(processor: Any, prompt: Prompt, *, chat: bool | None = None, unmarked: Unmarked = "first") -> str:
    """Write a prompt as the text that the processor takes, with one image token per image.

    Parameters
    ----------
    processor : ProcessorMixin or tokenizer
        Its chat template is used where it has one.
    prompt : Prompt
        What to write.
    chat : bool, optional
        False leaves the chat template out. By default it is used, except for a text that begins with the tokenizer's
        begin-of-sequence token, which counts as finished.
    unmarked : {"first", "error"}
        See `place_images`.

    Raises
    ------
    UserError
        Images for a model that reads none, bad markers, or a system message without a chat template.
    """
    token = image_token(processor)
    if prompt.images and token is None:
        raise UserError(
            "no image token for the given images",
            where=type(processor).__name__,
            given=f"{len(prompt.images)} images",
            remedy="use a vision-language model, or give no images",
        )
    parts = place_images(prompt.text, len(prompt.images), unmarked=unmarked)
    begin = tokenizer_of(processor).bos_token
    finished = bool(begin) and prompt.text.lstrip().startswith(begin)
    has_template = bool(getattr(processor, "chat_template", None))
    if chat is True and not has_template:
        raise UserError("no chat template", where=type(processor).__name__, remedy="leave it out with chat=False")
    if has_template and not finished and chat is not False:
        return _render_chat(processor, prompt, parts, token)
    if prompt.system is not None:
        raise UserError(
            "a system message needs a chat template",
            where=type(processor).__name__,
            given=prompt.system,
            remedy="write it into the prompt",
        )
    return "".join(_spaced(parts, _placeholder(processor, token)))


def _render_chat(processor: Any, prompt: Prompt, parts: list[str | int], token: str | None) -> str:
    system, inline = _pieces(processor, prompt, parts, token)
    if token is None:  # a tokenizer's template takes plain strings
        messages = [{"role": m["role"], "content": m["content"][0]["text"]} for m in [*system, inline]]
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    content: list[dict[str, str]] = [
        {"type": "image"} if isinstance(part, int) else {"type": "text", "text": part} for part in parts
    ]
    messages = [*system, {"role": "user", "content": content}]
    text = str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    if _in_order(text, parts, token):
        return text
    # Some templates (LLaVA-1.5) move all images to the front: write the image token into the text instead.
    return str(processor.apply_chat_template([*system, inline], add_generation_prompt=True, tokenize=False))


def _pieces(processor: Any, prompt: Prompt, parts: list[str | int], token: str | None) -> tuple[list[Any], Any]:
    system = [] if prompt.system is None else [_message("system", prompt.system)]
    return system, _message("user", "".join(_spaced(parts, _placeholder(processor, token))))


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _in_order(text: str, parts: list[str | int], token: str) -> bool:
    """Whether a rendered text holds the pieces and the image tokens one after the other."""
    at = 0
    for part in parts:
        piece = token if isinstance(part, int) else part.strip()
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return text.count(token) == sum(isinstance(part, int) for part in parts)


def _placeholder(processor: Any, token: str | None) -> str:
    vocabulary = tokenizer_of(processor).get_vocab()
    for before, after in _CODE_TOKENS:
        if token is not None and token.startswith("<|") and before in vocabulary and after in vocabulary:
            return f"{before}{token}{after}"
    return token or ""


def _spaced(parts: list[str | int], placeholder: str) -> list[str]:
    """Pieces as text; images that touch each other or a word get a line of their own, as templates do."""
    written: list[str] = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            written.append(part)
            continue
        following = parts[i + 1] if i + 1 < len(parts) else ""
        tight = isinstance(following, int) or (following and not following[0].isspace())
        written.append(placeholder + ("\n" if tight else ""))
    return written


def build_inputs(
    processor: Any, prompts: Sequence[Prompt], *, chat: bool | None = None, unmarked: Unmarked = "first"
) -> dict[str, Tensor]:
    """Turn a batch of prompts into the tensors of one forward, padded on the left.

    Parameters
    ----------
    processor : ProcessorMixin or tokenizer
        Of the model.
    prompts : sequence of Prompt
        At least one.
    chat, unmarked
        See `render`.

    Returns
    -------
    dict of str to Tensor
        ``input_ids``, ``attention_mask`` and what the family needs for its images, on the CPU; see `to_model`.

    Raises
    ------
    UserError
        What `render` raises, no prompt at all, or images that the processor refuses.
    """
    return _tensors(process(processor, prompts, chat=chat, unmarked=unmarked))


def process(
    processor: Any,
    prompts: Sequence[Prompt],
    *,
    chat: bool | None = None,
    unmarked: Unmarked = "first",
    **options: Any,
) -> Mapping[str, Any]:
    """Call the processor on a batch of prompts and return all that it says; see `build_inputs`.

    Parameters
    ----------
    processor, prompts, chat, unmarked
        As for `build_inputs`.
    **options
        For the processor, such as ``return_text_replacement_offsets=True``.
    """
    if not prompts:
        raise UserError("no prompt", where="build_inputs", remedy="give at least one")
    texts = [render(processor, prompt, chat=chat, unmarked=unmarked) for prompt in prompts]
    begin = tokenizer_of(processor).bos_token
    begun = [bool(begin) and text.startswith(begin) for text in texts]
    if any(begun) != all(begun):
        raise UserError(
            "some prompts of the batch begin with the begin-of-sequence token and others do not",
            where="build_inputs",
            given=begin,
            remedy="write all alike, or use batches of one",
        )
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt", **options}
    if all(begun):
        options["add_special_tokens"] = False
    rows = [ordered_images(prompt, unmarked=unmarked) for prompt in prompts]
    if not any(rows):
        result: Mapping[str, Any] = processor(text=texts, **options)
        return result
    # Families that count images per row (Gemma 3, Idefics3, SmolVLM) want every row, the others no empty one.
    counted = type(processor).__name__.startswith(("Gemma3", "Idefics3", "SmolVLM"))
    images = [row for row in rows if row or counted]
    try:
        result = processor(text=texts, images=images, **options)
        return result
    except (ValueError, TypeError, IndexError) as error:
        remedy = "check the number and the size of the images"
        given = " ".join(str(error).split())[:160]
        raise UserError(
            "the processor refuses the images", where=type(processor).__name__, given=given, remedy=remedy
        ) from error


def _tensors(features: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}


def to_model(inputs: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Move inputs to a model's device; floating-point ones (pixels) take its dtype."""
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in inputs.items()
    }
