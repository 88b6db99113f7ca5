"""The exact curve against the definition: a fresh argmax at every gamma."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ft_calibrate.curve import (
    CRITERIA,
    Curve,
    CurveAccumulator,
    FloorNotReached,
    ausuc,
    margins,
    seen_unseen_curve,
)
from ft_calibrate.groups import ClassGroups, class_groups
from ft_calibrate.metrics import accuracy_decomposition
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc
from vfm_core.errors import UserError

MODES = ("absent", "keep", "exclude")


def brute(z: np.ndarray, y: np.ndarray, groups: ClassGroups, mode: str, gamma: float) -> tuple[float, float, float]:
    """Seen, absent and overall accuracy at one gamma: shift, mask, argmax (the first of equals)."""
    scores = np.where(np.isnan(z), -np.inf, z).astype(np.float64)
    scores[:, groups.moved(mode)] += gamma
    scores[:, groups.excluded(mode)] = -np.inf
    right = (scores.argmax(axis=1) == y) & np.isfinite(scores.max(axis=1))
    rows = np.isin(y, groups.seen) | np.isin(y, groups.absent)

    def share(of: np.ndarray) -> float:
        return float(right[of].sum() / of.sum()) if of.any() else math.nan

    return share(np.isin(y, groups.seen)), share(np.isin(y, groups.absent)), share(rows)


def check(z: np.ndarray, y: np.ndarray, groups: ClassGroups, mode: str) -> Curve:
    curve = CurveAccumulator(groups, mode).add(z, y).curve()
    for i, gamma in enumerate(curve.gamma):
        expected = brute(z, y, groups, mode, gamma)
        np.testing.assert_array_equal((curve.seen[i], curve.unseen[i], curve.overall[i]), expected)
    assert (np.diff(curve.gamma) > 0).all() and len(curve.gamma) == len(curve.breaks) + 1
    return curve


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, ClassGroups]:
    """Every third problem has heavy ties, some have NaN, one seen class, remaining classes or an empty group."""
    rng = np.random.default_rng(seed)
    k, n = int(rng.integers(2, 10)), int(rng.integers(1, 70))
    z = rng.normal(0, 2, (n, k)).astype(np.float32)
    if seed % 3 == 0:
        z = np.round(z)  # heavy ties, inside and between the groups
    order = rng.permutation(k)
    n_seen = 1 if seed % 5 == 0 else int(rng.integers(1, k))
    n_absent = k - n_seen if seed % 2 else int(rng.integers(0, k - n_seen + 1))
    y = rng.integers(0, k, n)
    if seed % 7 == 0:
        y = rng.choice(order[:n_seen], n)  # N_U = 0
    if seed % 11 == 0 and n_seen < k:
        y = rng.choice(order[n_seen:], n)  # N_S = 0
    if seed % 4 == 0:
        z[rng.random((n, k)) < 0.2] = np.nan
        z[rng.random(n) < 0.1] = np.nan
    return z, y, class_groups(k, order[:n_seen], order[n_seen : n_seen + n_absent])


@pytest.mark.parametrize("seed", range(50))
def test_equals_brute_force(seed: int) -> None:
    z, y, groups = problem(seed)
    for mode in MODES:
        curve = check(z, y, groups, mode)
        found = accuracy_decomposition(z, y, groups, remaining=mode, topk=(1,))
        # gamma = 0 may be a tie between the groups, where column order decides; else the curve passes through it.
        if 0.0 not in curve.breaks:
            point = curve.at(0.0)
            values = (point.seen, point.unseen, point.harmonic)
            np.testing.assert_allclose(values, [found[key] for key in ("S/Y", "U/Y", "H")], atol=1e-15)
            if curve.n_rest == 0:  # else Y/Y counts those samples, and overall does not
                np.testing.assert_allclose(point.overall, found["Y/Y"], atol=1e-15)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equals_brute_force_on_anything(data: st.DataObject) -> None:
    k, n = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    cells = st.sampled_from([0.0, 0.5, 1.0, -3.0, 7.25, math.nan, -math.inf])
    z = np.array(data.draw(st.lists(st.lists(cells, min_size=k, max_size=k), min_size=n, max_size=n)))
    y = np.array(data.draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n)))
    kinds = data.draw(st.lists(st.sampled_from("SUR"), min_size=k, max_size=k).filter(lambda x: "S" in x))
    groups = class_groups(k, [i for i in range(k) if kinds[i] == "S"], [i for i in range(k) if kinds[i] == "U"])
    mode = data.draw(st.sampled_from(MODES))
    curve = check(z, y, groups, mode)
    assert (np.diff(curve.seen) <= 0).all() or not curve.n_seen
    assert (np.diff(curve.unseen) >= 0).all() or not curve.n_unseen
    if curve.n_seen and curve.n_unseen:
        assert 0 <= curve.ausuc <= 1
        for criterion in ("overall", "balanced", "harmonic"):
            best = curve.best(criterion)
            assert best.value == pytest.approx(np.max(getattr(curve, criterion)), abs=1e-12)
            assert best.low < best.gamma < best.high and best.gamma not in curve.breaks
            assert getattr(best.point, criterion) == pytest.approx(best.value, abs=1e-12)


def test_ends_and_area() -> None:
    z, y, _ = problem(1)
    groups = class_groups(z.shape[1], [0])
    curve = seen_unseen_curve(z, y, groups)
    found = accuracy_decomposition(z, y, groups)
    assert (curve.seen[0], curve.unseen[0]) == (found["S/S"], 0) and (curve.seen[-1], curve.unseen[-1]) == (
        0,
        found["U/U"],
    )
    assert curve.ausuc == pytest.approx(auc(curve.seen, curve.unseen)) == ausuc(z, y, [0])
    # Perfect scores: the curve goes through (1, 1).
    perfect = np.eye(4)[[0, 1, 2, 3]] * 9
    assert ausuc(perfect, [0, 1, 2, 3], [0, 1]) == 1
    # Perfect inside the groups, useless between them: every sample has the same d.
    assert (
        ausuc(np.eye(4)[:, [0, 1, 2, 3]] + [[0, 0, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]], range(4), [0, 1])
        == 0.5
    )


def test_nothing_absent_means_gamma_zero(caplog: pytest.LogCaptureFixture) -> None:
    z = np.random.default_rng(0).normal(size=(20, 3))
    with caplog.at_level(logging.WARNING):
        curve = seen_unseen_curve(z, np.arange(20) % 3, [0, 1, 2])
    assert curve.best().gamma == 0 and math.isnan(curve.ausuc) and len(curve) == 1
    assert curve.at(5.0).seen == pytest.approx((z.argmax(axis=1) == np.arange(20) % 3).mean())
    assert "nothing is absent" in caplog.text and "no sample of the absent classes" in caplog.text


def _curve(d: list[float], y: list[int]) -> Curve:
    """Two classes, 0 seen and 1 absent, sample i with margin d[i]."""
    return seen_unseen_curve(np.stack([d, np.zeros(len(d))], axis=1), y, [0])


def test_best_is_the_middle_of_the_plateau() -> None:
    # Absent samples at 1 and 2, seen ones at 4 and 10: all right for gamma in (2, 4).
    best = _curve([1, 2, 4, 10], [1, 1, 0, 0]).best()
    assert (best.gamma, best.low, best.high, best.value) == (3, 2, 4, 1)
    assert best.point.to_dict()["seen"] == 1 and best.to_dict()["point"]["unseen"] == 1
    # Of two plateaus of one height the longer: (1, 2) and (4, 10).
    best = _curve([1, 2, 4, 10], [1, 0, 1, 0]).best()
    assert (best.gamma, best.low, best.high, best.value) == (7, 4, 10, 0.75)
    # A break inside a plateau (its seen and absent sample trade places) is stepped off: (1, 5) with 3 inside.
    curve = _curve([1, 3, 3, 5], [1, 0, 1, 0])
    best = curve.best("balanced")
    assert (best.low, best.high, best.value) == (1, 5, 0.75) and best.gamma == 4 and best.point.balanced == 0.75


def test_best_at_the_open_ends() -> None:
    assert _curve([2, 3], [0, 0]).best().gamma == 1  # nothing absent to gain: 1 below the first break
    assert _curve([2, 3], [1, 1]).best().gamma == 4
    assert _curve([0, 0], [0, 1]).best().gamma == 1  # every gamma but the tie at 0 is as good
    both = _curve([2.0], [0])
    assert (both.at(2.0).seen, both.at(2.0000001).seen) == (1, 0)  # absent iff gamma > d
    assert both.at(-math.inf).seen == 1 and both.at(math.inf).seen == 0


def test_source_floor() -> None:
    # Overall favours low gamma (many seen samples); the floor asks for half of the absent ones.
    curve = _curve([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 0])
    assert curve.best().point.unseen == 0
    best = curve.best("source-floor", floor=0.5)
    assert best.point.unseen == 1 and best.gamma == 5.5
    assert curve.best("source-floor", floor=0.0).gamma == curve.best().gamma
    with pytest.raises(FloorNotReached, match="at most 1"):
        curve.best("source-floor", floor=1.01)


def test_criteria_differ_as_they_should() -> None:
    z, y, _ = problem(2)
    curve = seen_unseen_curve(z, y, [0])
    for criterion in ("overall", "balanced", "harmonic"):
        values = getattr(curve, criterion)
        assert curve.best(criterion).value == pytest.approx(values.max())
    assert CRITERIA == ("overall", "balanced", "harmonic", "source-floor")
    n, m = curve.n_seen, curve.n_unseen
    np.testing.assert_allclose(curve.overall, (n * curve.seen + m * curve.unseen) / (n + m), atol=1e-12)
    np.testing.assert_allclose(curve.balanced, (curve.seen + curve.unseen) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("best",), "unknown criterion"),
        (("source-floor",), "floor"),
        (("overall", 0.5), "floor"),
        (("balanced",), "needs samples of the absent classes"),
        (("harmonic",), "needs samples of the absent classes"),
        (("source-floor", 0.1), "needs samples of the absent classes"),
    ],
)
def test_bad_criteria(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _curve([1, 2], [0, 0]).best(*arguments)  # type: ignore[arg-type]


def test_bad_gamma_and_empty_curve() -> None:
    with pytest.raises(UserError, match="number"):
        _curve([1], [0]).at(math.nan)
    empty = CurveAccumulator(class_groups(2, [0])).curve()
    assert math.isnan(empty.ausuc) and len(empty) == 1
    with pytest.raises(UserError, match="no sample"):
        empty.best()


def test_infinite_scores() -> None:
    with pytest.raises(UserError, match="infinite in row 1"):
        seen_unseen_curve([[0.0, 1.0], [math.inf, 0.0]], [0, 1], [0])
    masked = np.array([[1.0, -math.inf, 2.0], [2.0, -math.inf, 1.0]])  # a whole column masked
    assert seen_unseen_curve(masked, [2, 0], [0]).ausuc == 1
    d = margins([[1.0, math.nan], [math.nan, 1.0], [math.nan, math.nan]], class_groups(2, [0]))
    assert d[0] == math.inf and d[1] == -math.inf and math.isnan(d[2])


def test_margins_float32_in_float64_out() -> None:
    z = np.array([[16777216.0, 0.1, 16777215.0]], dtype=np.float32)
    d = margins(z, class_groups(3, [0], [1]), "exclude")
    assert d.dtype == np.float64 and d[0] == 16777216.0 - float(np.float32(0.1))
    assert margins(torch.from_numpy(z), class_groups(3, [0]))[0] == 1.0
    assert margins(z[:0], class_groups(3, [0])).shape == (0,)


def test_streamed_blocks_tensors_and_names_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y, groups = problem(8)
    names = [f"n{i}" for i in range(groups.num_classes)]
    whole = seen_unseen_curve(z, y, groups)
    parts = CurveAccumulator(class_groups(names, groups.seen, groups.absent))
    parts.add(z[:5], y[:5]).add(torch.from_numpy(z[5:9]), [names[i] for i in y[5:9]]).add(z[9:9], y[9:9])
    parts.add(z[9:].tolist(), y[9:].tolist())
    monkeypatch.setattr("ft_calibrate.metrics._BLOCK", 3)
    for other in (parts.curve(), seen_unseen_curve(torch.from_numpy(z), y, groups)):
        for name in ("gamma", "seen", "unseen", "rest", "breaks"):
            np.testing.assert_array_equal(getattr(other, name), getattr(whole, name))
        assert (other.n_seen, other.n_unseen, other.n_rest) == (whole.n_seen, whole.n_unseen, whole.n_rest)
    assert len(parts) == len(y)


def test_samples_without_label_leave_no_trace() -> None:
    z, y, groups = problem(13)
    hidden = np.where(np.arange(len(y)) % 2 == 0, -1, y)
    a, b = seen_unseen_curve(z, hidden, groups), seen_unseen_curve(z[1::2], y[1::2], groups)
    np.testing.assert_array_equal(a.gamma, b.gamma)
    np.testing.assert_array_equal(a.overall, b.overall)


def test_float64_tensors_keep_their_precision() -> None:
    z = torch.tensor([[1.0, 1.0 + 1e-12], [1.0 + 1e-12, 1.0]], dtype=torch.float64)
    assert seen_unseen_curve(z, [1, 0], [0]).ausuc == 1


def test_wrong_shapes() -> None:
    accumulator = CurveAccumulator(class_groups(3, [0]))
    with pytest.raises(UserError, match="3 classes, 2 columns"):
        accumulator.add(np.zeros((4, 2)), [0, 0, 0, 0])
    with pytest.raises(UserError, match="4 rows, 1 labels"):
        accumulator.add(np.zeros((4, 3)), [0])
    with pytest.raises(UserError, match="matrix"):
        seen_unseen_curve([1.0, 2.0], [0, 0], [0])


def test_rows_and_csv(tmp_path: Path) -> None:
    curve = _curve([1, 2, 4, 10], [1, 0, 1, 0])
    with curve.to_csv(tmp_path / "curve.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == ["gamma", "acc_seen", "acc_unseen", "acc_overall", "harmonic"]
    assert [{k: float(v) for k, v in row.items()} for row in read] == curve.rows()
    path = _curve([1, 2], [0, 0]).to_csv(tmp_path / "empty.csv")
    assert path.read_text(encoding="utf-8").splitlines()[1] == "0.0,1.0,,1.0,"


def test_a_shift_of_one_group_shifts_gamma_only() -> None:
    rng = np.random.default_rng(3)
    z, y = rng.integers(-8, 8, (80, 6)) / 4, rng.integers(0, 6, 80)
    moved = z.copy()
    moved[:, 3:] -= 2.5
    moved += rng.integers(-4, 4, (80, 1))  # what all classes share (log-probabilities) does not matter
    a, b = seen_unseen_curve(z, y, [0, 1, 2]), seen_unseen_curve(moved, y, [0, 1, 2])
    np.testing.assert_allclose(b.gamma, a.gamma + 2.5)
    np.testing.assert_array_equal(a.overall, b.overall)
    assert b.best().gamma == pytest.approx(a.best().gamma + 2.5)


@pytest.mark.parametrize("remaining", ["absent", "keep"])
def test_samples_of_remaining_classes_are_apart_from_overall(remaining: str) -> None:
    rng = np.random.default_rng(3)
    z, y = rng.normal(size=(120, 6)), rng.integers(0, 6, 120)
    z[np.arange(120), y] += 1.5
    groups = class_groups(6, [0, 1], [2, 3])
    whole = seen_unseen_curve(z, y, groups, remaining=remaining)
    without = seen_unseen_curve(z[y < 4], y[y < 4], groups, remaining=remaining)
    assert whole.n_rest == (y > 3).sum() and np.isfinite(whole.rest).all()
    for criterion in ("overall", "balanced", "harmonic"):
        assert whole.best(criterion).value == without.best(criterion).value
    right = whole.n_seen * whole.seen + whole.n_unseen * whole.unseen
    np.testing.assert_allclose(whole.overall, right / (whole.n_seen + whole.n_unseen), atol=1e-12)
    with pytest.raises(UserError, match="no sample"):
        seen_unseen_curve(z[y > 3], y[y > 3], groups, remaining=remaining).best()


def test_nan_scores_are_told_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        seen_unseen_curve([[np.nan, np.nan, 1.0], [1.0, 2.0, 0.0]], [0, 1], seen=[0])
    assert caplog.text.count("2 scores are NaN and count as -inf") == 1
    caplog.clear()
    seen_unseen_curve([[0.0, -np.inf], [1.0, 2.0]], [0, 1], seen=[0])
    assert "NaN" not in caplog.text
