"""Geometry and pictures: maps land on the right pixels, unknown stays clear, nothing is stretched silently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from finecam import render
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vfm_core.errors import UserError


@pytest.fixture
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8), "RGB")


def test_resize_equals_torch_bilinear() -> None:
    values = np.random.default_rng(1).random((2, 7, 5)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(values)[None], (31, 40), mode="bilinear")[0].numpy()
    np.testing.assert_allclose(render.resize_map(values, (31, 40)), expected, atol=1e-6)


def test_a_centre_crop_leaves_the_border_unknown() -> None:
    # a 100 x 60 picture, the model saw the square 20..80 x 0..60
    values = np.ones((6, 6), np.float32)
    placed = render.to_original(values, (20, 0, 80, 60), (100, 60), (60, 100))
    assert np.isnan(placed[:, :20]).all() and np.isnan(placed[:, 80:]).all()
    np.testing.assert_array_equal(placed[:, 20:80], 1)


def test_a_letterboxed_input_loses_its_padding() -> None:
    # the input covers -20..120 of 100 rows: the first and last seventh are padding and must not reach the picture
    values = np.zeros((7, 4), np.float32)
    values[0] = values[-1] = 9
    placed = render.to_original(values, (0, -20, 80, 120), (80, 100), (100, 80))
    assert np.isfinite(placed).all()
    assert placed[10:-10].max() == 0
    assert placed[0, 0] == pytest.approx(9 * 0.475, abs=1e-5)  # half a pixel below the padding's edge


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(8, 200),
    height=st.integers(8, 200),
    x=st.floats(0.05, 0.95),
    y=st.floats(0.05, 0.95),
    margin=st.floats(-0.3, 0.3),
)
def test_a_hot_cell_lands_where_the_geometry_says(width: int, height: int, x: float, y: float, margin: float) -> None:
    box = (width * margin / 2, height * margin / 2, width * (1 - margin / 2), height * (1 - margin / 2))
    grid = np.zeros((8, 8), np.float32)
    row, column = int(y * 8), int(x * 8)
    grid[row, column] = 1
    centre_x = box[0] + (column + 0.5) / 8 * (box[2] - box[0])
    centre_y = box[1] + (row + 0.5) / 8 * (box[3] - box[1])
    if not (0 <= centre_x <= width and 0 <= centre_y <= height):
        return
    placed = render.to_original(grid, box, (width, height), (200, 200))
    found = render.peak(placed, (width, height))
    assert found is not None
    assert abs(found[0] - centre_x) <= (box[2] - box[0]) / 16 + width / 200
    assert abs(found[1] - centre_y) <= (box[3] - box[1]) / 16 + height / 200


def test_unknown_cells_do_not_spread_when_resized() -> None:
    values = np.ones((10, 10), np.float32)
    values[:, :3] = np.nan
    fine = render.resize_map(values, (40, 40))
    assert np.isnan(fine[:, :11]).all()
    np.testing.assert_allclose(fine[:, 12:], 1)


def test_cells_keep_the_grids_size_on_the_original() -> None:
    assert render.cells_on_original((7, 7), (0, 0, 640, 480), (640, 480)) == (7, 7)
    assert render.cells_on_original((14, 14), (160, 0, 640, 480), (800, 480)) == (14, 23)


def test_minmax_per_map_and_constant_maps() -> None:
    maps = np.stack([np.linspace(2, 6, 12).reshape(3, 4), np.full((3, 4), 5.0)]).astype(np.float32)
    maps[0, 0, 0] = np.nan
    scaled = render.minmax(maps)
    assert np.isnan(scaled[0, 0, 0])
    assert np.nanmin(scaled[0]) == 0 and np.nanmax(scaled[0]) == 1
    np.testing.assert_array_equal(scaled[1], 0)
    tiny = render.minmax(np.array([[0, 1e-9]], np.float32))
    assert tiny.max() == 1  # no epsilon eats a weak but real map


def test_top_region_is_the_connected_part_at_the_peak() -> None:
    values = np.zeros((20, 40), np.float32)
    values[2:6, 30:36] = 1.0
    values[4, 33] = 2.0
    values[15:17, 3:5] = 1.5  # as strong as the rest but elsewhere
    box = render.top_region(values, (400, 200), q=28 / 800)
    assert box == (300.0, 20.0, 360.0, 60.0)
    assert render.peak(values, (400, 200)) == (335.0, 45.0)


def test_flat_maps_have_no_peak_and_no_region() -> None:
    flat = np.zeros((4, 4), np.float32)
    assert render.peak(flat, (10, 10)) is None
    assert render.top_region(flat, (10, 10)) is None
    assert render.peak(np.full((4, 4), np.nan, np.float32), (10, 10)) is None


@pytest.mark.parametrize("q", [0, 1.5, -0.1])
def test_top_region_refuses_a_fraction_out_of_range(q: float) -> None:
    with pytest.raises(UserError, match="q out of range"):
        render.top_region(np.eye(4, dtype=np.float32), (4, 4), q)


def test_overlay_is_clear_where_the_map_is_zero_or_unknown(photo: Image.Image) -> None:
    values = np.zeros((6, 9), np.float32)
    values[:, :3] = np.nan
    values[:, 6:] = 1
    before, after = np.asarray(photo), np.asarray(render.overlay(photo, values))
    np.testing.assert_array_equal(after[:, :50], before[:, :50])
    assert (after[:, 70:] != before[:, 70:]).any(-1).all()


def test_difference_is_red_where_gained_and_blue_where_lost(photo: Image.Image) -> None:
    plain, finer = np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32)
    plain[0, 0], finer[1, 1] = 1, 1
    layer = np.asarray(render.difference_layer(plain, finer)).astype(int)
    assert layer[1, 1, 0] > layer[1, 1, 2] and layer[1, 1, 3] > 200
    assert layer[0, 0, 2] > layer[0, 0, 0] and layer[0, 0, 3] > 200
    assert layer[0, 1, 3] == 0
    assert render.difference(photo, plain, finer).size == photo.size


def test_titles() -> None:
    assert render.title("A", ["B", "C", "D"], 0.6) == "A vs B, C, D (gamma 0.6)"
    assert render.title("A", [], 0.6) == "A"
    assert render.title("A", ["B"], 0) == "A"


def test_panel_keeps_order_and_shortens_long_headings(photo: Image.Image) -> None:
    red, blue = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (80, 40), "blue")
    sheet = render.panel([(red, "image"), (blue, "finer")], "x" * 500, height=64)
    assert sheet.width == 64 + 128 + 3 * 8 + 44
    assert sheet.getpixel((20, 60)) == (255, 0, 0)
    assert sheet.getpixel((100, 60)) == (0, 0, 255)
    assert np.asarray(sheet)[:, -1].min() == 255  # nothing runs off the sheet
    with pytest.raises(UserError, match="panel without pictures"):
        render.panel([])


def test_unknown_colormap_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="viridis"):
        render.colour_table("virids")


@pytest.mark.parametrize("name", render.COLORMAPS)
def test_colour_tables(name: str) -> None:
    table = render.colour_table(name)
    assert table.shape == (256, 3) and table.dtype == np.uint8
    assert len(np.unique(table, axis=0)) > 200


@dataclass
class FakeResult:
    maps: torch.Tensor
    target: torch.Tensor
    references: torch.Tensor | None
    gamma: Any = 0.6
    method: str = "gradcam"
    class_names: list[str] | None = None


def test_display_of_a_result(photo: Image.Image) -> None:
    maps = torch.rand(3, 4, 6)
    names = ["a", "b", "<c>"]
    result: Any = FakeResult(maps, torch.tensor([0, 1, 2]), torch.tensor([[1], [2], [0]]), class_names=names)
    assert render.result_title(result, 2) == "<c> vs a (gamma 0.6)"
    assert render.result_overlay(result, 0, photo).size == photo.size
    assert render.result_overlay(result, 0).size == (224, 149)
    page = render.result_html(result, [photo] * 3, limit=2)
    assert page.count("<img") == 2 and "1 more" in page
    assert "&lt;c&gt;" in render.result_html(result) and "<c>" not in render.result_html(result)
    x0, y0, x1, y1 = render.result_top_region(result, 0, 0.05, photo.size) or (0, 0, 0, 0)
    assert 0 <= x0 < x1 <= 90 and 0 <= y0 < y1 <= 60


def test_display_of_a_sweep(photo: Image.Image) -> None:
    result: Any = FakeResult(torch.rand(1, 3, 4, 6), torch.tensor([5]), torch.tensor([[1, 2]]), gamma=(0, 0.6, 1))
    assert render.result_title(result, 0) == "class 5 vs class 1, class 2 (gamma 0.6, 1)"
    sheet = render.result_overlay(result, 0, photo)
    assert sheet.width > 3 * 256
    assert render.result_top_region(result, 0) is not None
