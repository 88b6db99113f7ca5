"""The renderer: geometry, blending, id maps, independence of the batch, speed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinyworld.bench import render_speed
from tinyworld.draws import Draws, key_of
from tinyworld.render import (
    KEEP,
    Capsule,
    Ellipse,
    Frame,
    Layer,
    Triangle,
    coverage,
    paint,
    snap,
    to_uint8,
    value_noise,
)


def one(*values: float) -> list[np.ndarray]:
    return [snap([value]) for value in values]


def disc(x: float, y: float, r: float) -> Ellipse:
    return Ellipse(*one(x, y, r, r, 1, 0))


def blank(n: int = 1, size: int = 32, level: float = 0.0) -> np.ndarray:
    return np.full((3, n, size, size), level, dtype=np.float32)


RED = np.array([[1.0, 0.0, 0.0]])
GREEN = np.array([[0.0, 1.0, 0.0]])


@settings(max_examples=30, deadline=None)
@given(x=st.floats(12, 20), y=st.floats(12, 20), rx=st.floats(3, 10), ry=st.floats(3, 10), angle=st.floats(0, 3))
def test_ellipse_covers_its_area(x: float, y: float, rx: float, ry: float, angle: float) -> None:
    shape = Ellipse(*one(x, y, rx, ry, np.cos(angle), np.sin(angle)))
    area = coverage(shape, (40, 40)).sum()
    assert area == pytest.approx(np.pi * rx * ry, rel=0.06)


def test_capsule_and_triangle_cover_their_areas() -> None:
    straight = Capsule(*one(8, 16, 24, 16, 3, 3))
    assert coverage(straight, (32, 32)).sum() == pytest.approx(16 * 6 + np.pi * 9, rel=0.02)
    for corners in ((4, 4, 28, 4, 4, 28), (4, 28, 28, 4, 4, 4)):  # either turn
        assert coverage(Triangle(*one(*corners)), (32, 32)).sum() == pytest.approx(24 * 24 / 2, rel=0.03)


def test_distance_is_exact_on_circles() -> None:
    px = np.arange(32, dtype=np.float32)[None, None, :]
    py = np.full((1, 1, 1), 16, dtype=np.float32)
    expected = np.abs(np.arange(32) - 10) - 5
    far = np.abs(np.arange(32) - 10) > 0.5  # at the centre the direction is undefined
    np.testing.assert_allclose(disc(10, 16, 5).distance(px, py)[0, 0][far], expected[far], atol=1e-4)


def test_window_equals_whole_image() -> None:
    """Painting touches a window around the shape only; outside it nothing may be missing."""
    shapes: list[Ellipse | Capsule | Triangle] = [
        disc(1, 30, 6),
        Ellipse(*one(16, 16, 9, 2, 0.8, 0.6)),
        Capsule(*one(-4, 3, 36, 20, 2, 1)),
        Triangle(*one(20, 20, 30, 22, 25, 31)),
    ]
    for shape in shapes:
        painted = paint(blank(), [Layer(shape, RED)]).canvas
        np.testing.assert_array_equal(painted[0], coverage(shape, (32, 32)))


def test_blending_order_alpha_and_clip() -> None:
    over = paint(blank(level=0.5), [Layer(disc(16, 16, 8), RED), Layer(disc(16, 16, 4), GREEN, alpha=0.25)]).canvas
    assert over[:, 0, 15, 15] == pytest.approx([0.75, 0.25, 0.0])
    assert over[:, 0, 15, 22] == pytest.approx([1.0, 0.0, 0.0])
    assert over[:, 0, 0, 0] == pytest.approx([0.5, 0.5, 0.5])
    clipped = paint(blank(), [Layer(disc(16, 16, 8), RED, clip=(disc(22, 16, 4), disc(10, 16, 4)))]).canvas
    assert clipped[0, 0, 16, 22] == 1 and clipped[0, 0, 16, 10] == 1 and clipped[0, 0, 16, 16] == 0


def test_id_maps_follow_occlusion() -> None:
    layers = [
        Layer(disc(16, 16, 10), RED, {"part": 1, "object": 1}),
        Layer(disc(16, 16, 3), GREEN, {"part": KEEP, "object": KEEP, "mark": np.array([7])}),
        Layer(disc(24, 16, 4), GREEN, {"part": 2, "object": 1}),
        Layer(disc(16, 24, 3), GREEN),
    ]
    ids = paint(blank(), layers, ("part", "mark", "object")).ids
    assert (ids["part"][0, 16, 16], ids["mark"][0, 16, 16], ids["object"][0, 16, 16]) == (1, 7, 1)
    assert ids["part"][0, 16, 24] == 2
    assert ids["part"][0, 24, 16] == ids["object"][0, 24, 16] == 0  # a layer that names no map clears it
    assert (ids["mark"] > 0).sum() == pytest.approx(np.pi * 9, rel=0.2)


def test_invisible_images_stay_untouched() -> None:
    shape = Ellipse(*(np.repeat(value, 3) for value in one(16, 16, 6, 6, 1, 0)))
    painted = paint(blank(3), [Layer(shape, np.repeat(RED, 3, 0), visible=np.array([True, False, True]))]).canvas
    assert painted[:, 1].max() == 0 and painted[0, 0].max() == painted[0, 2].max() == 1


def test_frame_turns_and_mirrors() -> None:
    ones = np.ones(1)
    right = Frame(10 * ones, 20 * ones, 2 * ones, 0 * ones, ones, ones)  # quarter turn, u goes down
    assert [float(v[0]) for v in right.point(3, 0)] == [10, 26]
    mirrored = Frame(10 * ones, 20 * ones, 2 * ones, ones, 0 * ones, -ones)
    assert [float(v[0]) for v in mirrored.point(3, 1)] == [4, 22]
    tilted = mirrored.ellipse(0, 0, 4, 1, 0.5)
    assert float(tilted.sin[0]) == pytest.approx(-np.sin(0.5), abs=1e-3)


def test_value_noise_keeps_corners() -> None:
    cells = snap(np.random.default_rng(0).random((2, 9, 9)))
    noise = value_noise(cells, (64, 64))
    assert noise.shape == (2, 64, 64)
    np.testing.assert_array_equal(noise[:, [0, 0, -1, -1], [0, -1, 0, -1]], cells[:, [0, 0, -1, -1], [0, -1, 0, -1]])
    assert noise.min() >= cells.min() and noise.max() <= cells.max()


def test_to_uint8_rounds_and_clips() -> None:
    canvas = np.array([-0.2, 0.0, 0.5, 1.0, 1.7], dtype=np.float32).reshape(1, 1, 1, 5).repeat(3, axis=0)
    assert to_uint8(canvas)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=12), st.integers(0, 2**31))
def test_draws_do_not_depend_on_the_batch(indices: list[int], seed: int) -> None:
    key = key_of("test", seed)
    batch = Draws(key, indices)
    for row, index in enumerate(indices):
        alone = Draws(key, [index])
        assert batch.uniform("a")[row] == alone.uniform("a")[0]
        np.testing.assert_array_equal(batch.grain("g", (3, 5))[row], alone.grain("g", (3, 5))[0])
        np.testing.assert_array_equal(batch.integers("i", 7, 4)[row], alone.integers("i", 7, 4)[0])


def test_draws_are_uniform_and_unrelated() -> None:
    draws = Draws(key_of("test"), np.arange(20_000))
    a, b = draws.uniform("a"), draws.uniform("b")
    assert abs(a.mean() - 0.5) < 0.01 and abs(a.std() - 12**-0.5) < 0.01
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03 and abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(a, Draws(key_of("test", 1), np.arange(20_000)).uniform("a"))[0, 1]) < 0.03
    counts = np.bincount(draws.integers("i", 4)[:, 0], minlength=4)
    assert counts.min() > 4800 and counts.sum() == 20_000
    assert abs(draws.coin("c", 0.3).mean() - 0.3) < 0.02
    grain = Draws(key_of("test"), [0]).grain("g", (3, 64, 64))
    assert abs(grain.mean()) < 0.01 and grain.std() == pytest.approx(0.408, abs=0.01)


def test_draws_have_fixed_values() -> None:
    """Integers only, so the same on every machine; a change here changes every picture."""
    assert key_of("birds", "val", 0) == 2_818_255_257_039_735_118
    assert Draws(key_of("birds", "val", 0), [5]).bits("pose", 2)[0].tolist() == [
        621_505_356_932_725_131,
        16_704_581_063_411_570_017,
    ]


def test_speed_is_of_the_promised_order() -> None:
    """The aim is 1,000 images a second on an idle core; a tenth of it on a busy one still catches a slow path."""
    assert render_speed(48, batch=64, repeats=2) > 100
