"""Glyphs: two drawing styles of the same classes."""

from __future__ import annotations

import numpy as np
import pytest
from tinyworld.glyphs import Glyphs, figures, stroke_distance
from vfm_core.data import open_dataset
from vfm_core.errors import UserError


def test_a_picture_depends_on_its_own_number_alone() -> None:
    glyphs = Glyphs(n=4, domain="target", classes=5)
    together = glyphs.images([7, 2, 19])
    assert together.shape == (3, 16, 16, 3) and together.dtype == np.uint8
    for row, i in enumerate([7, 2, 19]):
        np.testing.assert_array_equal(together[row], np.asarray(glyphs[i].image))
    longer = Glyphs(n=9, domain="target", classes=5)
    np.testing.assert_array_equal(longer.images([7]), together[:1])
    assert np.bincount(glyphs.labels).tolist() == [4] * 5


def test_domains_splits_and_seeds_differ() -> None:
    kinds = [
        Glyphs(2, domain, split, seed)
        for domain in ("source", "target")
        for split in ("train", "val", "test")
        for seed in (0, 1)
    ]
    assert len({one.fingerprint() for one in kinds}) == len({one.images([0, 1]).tobytes() for one in kinds}) == 12


def test_distance_to_a_stroke() -> None:
    points = np.array([[[[-0.5, 0.0], [0.5, 0.0]]]])
    distance = stroke_distance(points, 8)[0]
    axis = (np.arange(8) + 0.5) / 4 - 1
    for row, y in enumerate(axis):
        for column, x in enumerate(axis):
            expected = np.hypot(max(abs(x) - 0.5, 0), y)
            assert distance[row, column] == pytest.approx(expected, abs=1e-6)


def test_solid_strokes_in_the_source_and_outlines_in_the_target() -> None:
    source, target = Glyphs(200, "source", "test"), Glyphs(200, "target", "test")
    assert source.ink(np.arange(400)).mean() < target.ink(np.arange(400)).mean() + 0.5
    still = figures(20, 0)
    assert still.shape == (20, 4, 2, 2) and np.abs(still).max() <= 0.75
    chained = np.all(still[:, 1:, 0] == still[:, :-1, 1], axis=-1).mean()
    assert 0.5 < chained < 0.9


def test_own_shift_moves_the_second_half_of_the_classes_only() -> None:
    shared, own = Glyphs(3, "target"), Glyphs(3, "target", own_shift=True)
    same = (shared.images(range(60)) == own.images(range(60))).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(same, shared.labels < 10)
    plain, odd = Glyphs(3, "source"), Glyphs(3, "source", own_shift=True)
    np.testing.assert_array_equal(plain.images(range(60)), odd.images(range(60)))


def test_specs_and_bad_options() -> None:
    data = open_dataset("tinyworld:glyphs@test?domain=target&n=3&classes=4&own_shift=1")
    assert len(data) == 12 and data.classes == ["g00", "g01", "g02", "g03"]
    for options in ({"domain": "ink"}, {"split": "dev"}, {"n": 0}, {"classes": 1}, {"size": 4}):
        with pytest.raises(UserError, match="tinyworld:glyphs"):
            Glyphs(**options)
