"""Where on an image each visual token looks, for every family whose processor says enough to know.

A picture becomes tokens in one of a few ways: one grid over a crop (LLaVA), a small overview and then rows of a large
picture, each closed by a newline token (LLaVA-NeXT, LLaVA-OneVision), one grid of merged patches (Qwen-VL), or tiles,
each a grid of its own, with an overview at the end (InternVL, Idefics3, SmolVLM). Where a family is not known, or its
counts do not fit what is known, the tokens are shown as a strip in reading order, and the picture says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meda_kv.models import tokenizer_of

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class View:
    """A grid of tokens over a part of an image.

    Attributes
    ----------
    name : str
        ``"image"``, ``"overview"``, ``"tiles"`` or ``"strip"``.
    tokens : Tensor
        long ``[rows, columns]``: index of the token in the prompt, -1 where there is none.
    box : tuple of float, or None
        What the grid covers: left, top, right, bottom as shares of the image's width and height; beyond 0 and 1 where
        the image was padded. None for a strip.
    """

    name: str
    tokens: Tensor
    box: Box | None


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The visual tokens of one image.

    Attributes
    ----------
    positions : Tensor
        long ``[t]``: their indices in the prompt, padding included.
    views : tuple of View
        How they lie on the image.
    note : str
        For the caption: what kind of grid it is, or why there is none.
    """

    positions: Tensor
    views: tuple[View, ...]
    note: str

    @property
    def mapped(self) -> bool:
        """Whether the tokens have places on the image."""
        return all(view.box is not None for view in self.views)


class _Unknown(Exception):
    """The counts do not fit what is known of the family."""


def locate_images(
    processor: Any, features: Mapping[str, Any], visual: Tensor, sizes: Sequence[tuple[int, int]]
) -> list[ImageTokens]:
    """Say where the visual tokens of a prompt lie.

    Parameters
    ----------
    processor
        Of the model.
    features : mapping
        What it made of one prompt, asked with ``return_text_replacement_offsets=True``.
    visual : Tensor
        bool ``[n]``: which tokens of the prompt are visual.
    sizes : sequence of (int, int)
        Width and height in pixels of the images in reading order.

    Returns
    -------
    list of ImageTokens
        One per image; a single one over all visual tokens when they cannot be told apart.
    """
    where = visual.nonzero().flatten().cpu()
    if not len(where):
        return []
    counts = _counts(processor, features, len(where), len(sizes), features["input_ids"][0][where])
    if counts is None:
        return [_strip(where, "the images' tokens cannot be told apart: all in reading order")]
    found = []
    kind = type(processor).__name__
    layout = next((layout for name, layout in _LAYOUTS if kind.startswith(name)), None)
    for index, positions in enumerate(torch.split(where, counts)):
        if layout is None:
            found.append(_strip(positions, f"the grid of {kind} is not known: tokens in reading order"))
            continue
        try:
            views, note = layout(processor, features, index, positions, sizes[index])
            found.append(ImageTokens(positions, tuple(views), note))
        except (_Unknown, KeyError, AttributeError, TypeError, ImportError):
            note = f"{len(positions)} tokens do not fit the grid of {kind}: tokens in reading order"
            found.append(_strip(positions, note))
    return found


def _counts(processor: Any, features: Mapping[str, Any], total: int, images: int, ids: Tensor) -> list[int] | None:
    """Visual tokens per image, from the texts that the processor put in place of the image tokens."""
    rows = features.get("text_replacement_offsets") or []
    if rows:
        words = tokenizer_of(processor).convert_ids_to_tokens(ids.unique().tolist())
        counts = [sum(part["replacement"].count(word) for word in words) for part in rows[0]]
        if len(counts) == images and sum(counts) == total:
            return counts
    return [total // images] * images if images and total % images == 0 else None


def _strip(positions: Tensor, note: str) -> ImageTokens:
    columns = min(len(positions), 64)
    rows = math.ceil(len(positions) / columns)
    tokens = torch.full((rows * columns,), -1, dtype=torch.long)
    tokens[: len(positions)] = positions
    return ImageTokens(positions, (View("strip", tokens.view(rows, columns), None),), note)


def _square(positions: Tensor) -> Tensor:
    side = math.isqrt(len(positions))
    if side * side != len(positions):
        raise _Unknown
    return positions.view(side, side)


def _padded_to_square(size: tuple[int, int]) -> Box:
    """What a square picture covers that holds the image in its middle."""
    width, height = size
    side = max(width, height)
    x, y = (side / width - 1) / 2, (side / height - 1) / 2
    return (-x, -y, 1 + x, 1 + y)


def _cropped(image_processor: Any, size: tuple[int, int]) -> Box:
    """What CLIP's resize of the short side and centre crop leave of an image."""
    width, height = size
    short = _number(image_processor.size, "shortest_edge")
    crop_w, crop_h = _number(image_processor.crop_size, "width"), _number(image_processor.crop_size, "height")
    scale = short / min(width, height)
    x, y = (1 - crop_w / (width * scale)) / 2, (1 - crop_h / (height * scale)) / 2
    return (x, y, 1 - x, 1 - y)


def _number(sizes: Any, name: str) -> int:
    value = sizes.get(name) if isinstance(sizes, Mapping) else getattr(sizes, name, None)
    if value is None:
        raise _Unknown
    return int(value)


Layout = tuple[list[View], str]


def _llava(processor: Any, features: Any, index: int, positions: Tensor, size: tuple[int, int]) -> Layout:
    reader = processor.image_processor
    if getattr(reader, "do_pad", False):
        return [View("image", _square(positions), _padded_to_square(size))], "one grid over the padded image"
    if getattr(reader, "do_center_crop", False):
        return [View("image", _square(positions), _cropped(reader, size))], "one grid over the centre crop"
    return [View("image", _square(positions), WHOLE)], "one grid over the image"


def _anyres(processor: Any, features: Any, index: int, positions: Tensor, size: tuple[int, int]) -> Layout:
    """An overview, then the rows of the picture at high resolution, each with a newline token at its end."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = features["pixel_values"].shape[-2:]
    one_vision = hasattr(processor, "num_image_tokens")
    if one_vision:
        rows = columns = math.isqrt(processor.num_image_tokens)
    else:
        rows, columns = height // processor.patch_size, width // processor.patch_size
    base = rows * columns
    if one_vision and len(positions) in (base, base + 1):  # several images: one grid each, a newline at the end
        grid = positions[:base].view(rows, columns)
        return [View("image", grid, _padded_to_square(size))], "one grid over the padded image"
    best_h, best_w = select_best_resolution([size[1], size[0]], processor.image_processor.image_grid_pinpoints)
    tiles = (best_h // height, best_w // width)
    cells, lines = processor._get_unpadded_features(size[1], size[0], rows, columns, *tiles)
    if len(positions) != base + cells + lines or cells % lines:
        raise _Unknown
    large = positions[base:].view(lines, cells // lines + 1)[:, :-1]
    views = [
        View("overview", positions[:base].view(rows, columns), WHOLE),
        View("tiles", large, WHOLE),
    ]
    return views, f"overview, and {tiles[0]}x{tiles[1]} tiles joined; newline tokens are not shown"


def _qwen(processor: Any, features: Any, index: int, positions: Tensor, size: tuple[int, int]) -> Layout:
    frames, rows, columns = (int(value) for value in features["image_grid_thw"][index])
    merge = int(processor.image_processor.merge_size)
    rows, columns = rows // merge, columns // merge
    if frames * rows * columns != len(positions):
        raise _Unknown
    views = [
        View("image" if frames == 1 else f"frame {i + 1}", part.view(rows, columns), WHOLE)
        for i, part in enumerate(positions.view(frames, -1))
    ]
    return views, f"one grid of {merge}x{merge} merged patches"


def _internvl(processor: Any, features: Any, index: int, positions: Tensor, size: tuple[int, int]) -> Layout:
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    each, reader = int(processor.image_seq_length), processor.image_processor
    count, rest = divmod(len(positions), each)
    if rest:
        raise _Unknown
    if count == 1:
        return [View("image", _square(positions), WHOLE)], "one grid over the image"
    target = (_number(reader.size, "height"), _number(reader.size, "width"))
    columns, rows = get_optimal_tiled_canvas((size[1], size[0]), target, reader.min_patches, reader.max_patches)
    return _tiled(positions, rows, columns, each)


def _idefics(processor: Any, features: Any, index: int, positions: Tensor, size: tuple[int, int]) -> Layout:
    each = int(processor.image_seq_len)
    if len(positions) == each:
        return [View("image", _square(positions), WHOLE)], "one grid over the image"
    # The token before each tile names its row and column.
    ids = features["input_ids"][0]
    before = tokenizer_of(processor).convert_ids_to_tokens([int(ids[start - 1]) for start in positions[::each]])
    places = [word.strip("<>").split("_") for word in before if word.startswith("<row_")]
    if not places:
        raise _Unknown
    rows, columns = max(int(place[1]) for place in places), max(int(place[3]) for place in places)
    return _tiled(positions, rows, columns, each)


def _tiled(positions: Tensor, rows: int, columns: int, each: int) -> Layout:
    """Tiles row by row, each a square grid, then perhaps an overview."""
    tiles = rows * columns
    if len(positions) not in (tiles * each, (tiles + 1) * each):
        raise _Unknown
    side = math.isqrt(each)
    if side * side != each:
        raise _Unknown
    large = positions[: tiles * each].view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, -1)
    views = [View("tiles", large, WHOLE)]
    if len(positions) > tiles * each:
        views.insert(0, View("overview", positions[tiles * each :].view(side, side), WHOLE))
    return views, f"{rows}x{columns} tiles joined" + (", and an overview" if len(views) > 1 else "")


def _gemma(processor: Any, features: Any, index: int, positions: Tensor, size: tuple[int, int]) -> Layout:
    if len(positions) != processor.image_seq_length:  # pan and scan: the crops' places are not told
        raise _Unknown
    return [View("image", _square(positions), WHOLE)], "one grid over the image"


_LAYOUTS = (
    ("LlavaNext", _anyres),
    ("LlavaOnevision", _anyres),
    ("Llava", _llava),
    ("Qwen", _qwen),
    ("InternVL", _internvl),
    ("Idefics3", _idefics),
    ("SmolVLM", _idefics),
    ("Gemma3", _gemma),
)
