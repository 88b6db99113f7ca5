"""Grids: a spot on the picture changes the token that the grid puts there, for every family."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from meda_kv.attention import token_facts
from meda_kv.inspection.grids import ImageTokens, View, locate_images
from meda_kv.prompts import Prompt, process, to_model
from PIL import Image
from processor_zoo import tiny_processor
from zoo import tiny_vlm

FAMILIES = [
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "gemma3",
]
SPOTS = [(0.3, 0.2), (0.68, 0.3), (0.4, 0.85)]


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(90, 160, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def spotted(image: Image.Image, x: float, y: float) -> Image.Image:
    """The image with a white and black spot of about a sixteenth of its short side around a point."""
    changed = np.array(image)
    radius = max(2, min(image.size) // 16)
    row, column = int(y * image.height), int(x * image.width)
    area = changed[max(0, row - radius) : row + radius, max(0, column - radius) : column + radius]
    area[:] = np.where((np.indices(area.shape[:2]).sum(axis=0) % 2)[..., None], 255, 0)
    return Image.fromarray(changed)


def embedded(model, processor, images: list[Image.Image]) -> tuple[torch.Tensor, list[ImageTokens]]:
    """What the language model gets at every position, and the grids."""
    prompt = Prompt("w1 " + "<image> w2 " * len(images), images)
    features = process(processor, [prompt], return_text_replacement_offsets=True)
    inputs = to_model({k: v for k, v in features.items() if isinstance(v, torch.Tensor)}, model)
    seen: list[torch.Tensor] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    visual = token_facts(model, inputs).visual[0]
    return seen[0], locate_images(processor, features, visual, [image.size for image in images])


def cell_at(view: View, x: float, y: float) -> tuple[int, int] | None:
    assert view.box is not None
    left, top, right, bottom = view.box
    rows, columns = view.tokens.shape
    row, column = (y - top) / (bottom - top) * rows, (x - left) / (right - left) * columns
    return (int(row), int(column)) if 0 <= row < rows and 0 <= column < columns else None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(64, 32), (48, 80)])
def test_a_spot_changes_the_token_at_its_place(family: str, size: tuple[int, int]) -> None:
    model, _ = tiny_vlm(family)
    processor = tiny_processor(family)
    image = noise(*size)
    before, (found,) = embedded(model, processor, [image])
    assert found.mapped, found.note
    tokens = torch.cat([view.tokens.flatten() for view in found.views])
    assert len(set(tokens.tolist())) == len(tokens)  # every token has one place
    assert set(tokens.tolist()) <= set(found.positions.tolist())
    checked = 0
    for x, y in SPOTS:
        after, _ = embedded(model, processor, [spotted(image, x, y)])
        change = (after - before).norm(dim=-1)
        for view in found.views:
            place = cell_at(view, x, y)
            if place is None:
                continue  # outside of a centre crop
            grid = change[view.tokens]
            row, column = divmod(int(grid.argmax()), grid.shape[1])
            assert math.dist((row, column), place) < 1.5, (view.name, (row, column), place, grid)
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_several_images_share_no_token(family: str) -> None:
    model, _ = tiny_vlm(family)
    processor = tiny_processor(family)
    images = [noise(64, 32), noise(40, 40)]
    before, found = embedded(model, processor, images)
    assert [image.mapped for image in found] == [True, True]
    assert not set(found[0].positions.tolist()) & set(found[1].positions.tolist())
    after, _ = embedded(model, processor, [images[0], spotted(images[1], 0.5, 0.5)])
    change = (after - before).norm(dim=-1)
    assert int(change.argmax()) in found[1].positions.tolist()
    assert float(change[found[0].positions].max()) <= 1e-5


def test_the_parts_of_a_tiled_image() -> None:
    processor = tiny_processor("llava_next")
    model, _ = tiny_vlm("llava_next")
    _, (found,) = embedded(model, processor, [noise(64, 32)])
    assert [(view.name, tuple(view.tokens.shape)) for view in found.views] == [("overview", (4, 4)), ("tiles", (4, 8))]
    assert len(found.positions) == 16 + 4 * 9  # a newline token closes every row
    assert "newline" in found.note


def test_boxes_of_crops_and_padding() -> None:
    model, _ = tiny_vlm("llava")
    _, (cropped,) = embedded(model, tiny_processor("llava"), [noise(64, 32)])
    assert cropped.views[0].box == pytest.approx((0.25, 0.0, 0.75, 1.0))
    model, _ = tiny_vlm("llava_onevision")
    _, (padded, _) = embedded(model, tiny_processor("llava_onevision"), [noise(64, 32), noise(64, 32)])
    assert padded.views[0].box == pytest.approx((0.0, -0.5, 1.0, 1.5))


def test_an_unknown_family_and_odd_counts_become_a_strip() -> None:
    processor = tiny_processor("llava")
    features = process(processor, [Prompt("<image>", [noise(32, 32)])], return_text_replacement_offsets=True)
    visual = features["input_ids"][0] == 5

    class Other:
        tokenizer = processor.tokenizer

    (unknown,) = locate_images(Other(), features, visual, [(32, 32)])
    assert not unknown.mapped
    assert "grid of Other is not known" in unknown.note
    assert unknown.views[0].tokens.flatten()[:16].tolist() == unknown.positions.tolist()
    odd = {"input_ids": torch.full((1, 15), 5)}
    (strip,) = locate_images(processor, odd, torch.ones(15, dtype=torch.bool), [(32, 32)])
    assert "15 tokens do not fit" in strip.note
    (joined,) = locate_images(processor, odd, torch.ones(15, dtype=torch.bool), [(32, 32), (32, 32)])
    assert "cannot be told apart" in joined.note
    assert locate_images(processor, odd, torch.zeros(15, dtype=torch.bool), []) == []
