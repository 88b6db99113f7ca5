"""Features in the plane: fair samples, repeatable pictures, and numbers that know separated groups from mixed ones."""

from __future__ import annotations

import numpy as np
import pytest
from ft_calibrate.groups import class_groups
from ft_calibrate.projection import group_separation, project, sample_rows
from vfm_core.errors import UserError

GROUPS = class_groups(8, [0, 1, 2, 3], [4, 5, 6])  # 7 remains


def clusters(offset: float, n: int = 15, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Seven classes; `offset` moves the absent ones away along an axis of their own."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(7), n)
    centres = np.eye(7, 9) * 2
    f = centres[y] + 0.3 * rng.normal(size=(len(y), 9))
    f[y >= 4, 8] += offset
    f[y < 4, 8] -= offset
    return f, y


def test_sample_rows_takes_equally_from_all_classes() -> None:
    y = np.concatenate([np.zeros(500, int), np.full(5, 4), np.full(40, 7), np.full(50, 1), [-1]])
    rows = sample_rows(y, GROUPS, 30)
    counts = np.bincount(y[rows], minlength=8)
    assert len(rows) == 30 and counts[4] == 5 and counts[7] == 0 and {counts[0], counts[1]} <= {12, 13}
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, sample_rows(y, GROUPS, 30))
    assert len(sample_rows(y, GROUPS, 10_000)) == 555


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_project_keeps_clusters_apart_and_repeats(method: str) -> None:
    f, y = clusters(0.0, n=8)
    state = np.random.get_state(legacy=True)[1].tolist()  # type: ignore[index]  # noqa: NPY002 - it must stay
    points = project(f, method, seed=0)
    assert points.shape == (len(y), 2) and np.isfinite(points).all()
    np.testing.assert_array_equal(points, project(f, method, seed=0))
    assert state == np.random.get_state(legacy=True)[1].tolist()  # type: ignore[index]  # noqa: NPY002
    if method == "tsne":
        nearest = np.linalg.norm(points[:, None] - points, axis=2) + np.eye(len(y)) * 1e9
        assert (y[nearest.argmin(1)] == y).mean() > 0.9


def test_project_small_and_bad_inputs() -> None:
    assert project(np.random.default_rng(0).normal(size=(4, 60)), "tsne").shape == (4, 2)
    assert project([[1.0], [2.0], [-1.0]], "pca").shape == (3, 2)
    with pytest.raises(UserError, match="too few"):
        project(np.zeros((2, 3)))
    with pytest.raises(UserError, match="unknown projection"):
        project(np.zeros((5, 3)), "umap")


def test_separation_knows_mixed_groups_from_separate_ones() -> None:
    mixed, apart = (group_separation(*clusters(offset), GROUPS) for offset in (0.0, 4.0))
    assert abs(mixed["silhouette_groups"]) < 0.3 < 0.6 < apart["silhouette_groups"]
    assert mixed["silhouette_classes"] > 0.4
    assert apart["mixed_neighbours"] == 0.0 < mixed["mixed_neighbours"]
    assert mixed["mixed_by_chance"] == pytest.approx(2 * 3 * 4 / (7 * 6))


def test_separation_of_one_group_is_undefined() -> None:
    f, y = clusters(0.0)
    found = group_separation(f[y < 4], y[y < 4], GROUPS)
    assert np.isnan(found["silhouette_groups"]) and np.isnan(found["mixed_neighbours"])
    assert found["silhouette_classes"] > 0
