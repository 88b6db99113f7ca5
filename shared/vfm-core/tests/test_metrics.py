"""Metrics against scikit-learn, scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vfm_core.metrics import (
    accuracy,
    as_array,
    balanced_accuracy,
    bootstrap_interval,
    expected_calibration_error,
    harmonic_mean,
    paired_difference,
    per_class_accuracy,
    rank_correlation,
    wilson_interval,
)

labels_and_predictions = st.integers(2, 6).flatmap(
    lambda c: st.lists(st.tuples(st.integers(0, c - 1), st.integers(0, c - 1)), min_size=1, max_size=40)
)


@pytest.mark.parity
@settings(max_examples=60, deadline=None)
@given(labels_and_predictions)
def test_accuracies_equal_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import accuracy_score, recall_score

    t, y = np.array(pairs).T
    assert accuracy(y, t) == pytest.approx(accuracy_score(t, y))
    present = np.unique(t)
    recalls = recall_score(t, y, labels=present, average=None, zero_division=0)
    assert balanced_accuracy(y, t) == pytest.approx(recalls.mean())
    per_class = per_class_accuracy(y, t, num_classes=6)
    assert per_class[present] == pytest.approx(recalls)
    assert np.isnan(np.delete(per_class, present)).all()


def test_scores_and_tensors_are_accepted() -> None:
    logits = torch.tensor([[0.1, 2.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    assert accuracy(logits, torch.tensor([1, 1])) == 0.5
    assert np.isnan(per_class_accuracy(logits, [1, 1])[[0, 2]]).all()
    assert as_array(torch.tensor([1, 2])).dtype == np.int64


def test_bad_shapes_and_labels() -> None:
    for y, t in (([0, 1], [0]), ([], []), (0, 0)):
        with pytest.raises(ValueError, match="labels"):
            accuracy(y, t)
    for labels in ([0, 3], [0, -1]):
        with pytest.raises(ValueError, match=r"0\.\.2"):
            per_class_accuracy([0, 0], labels, num_classes=3)


def test_bootstrap_matches_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 4000)
    mean, low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)
    assert bootstrap_interval(values) == (mean, low, high)
    assert bootstrap_interval(values, seed=1) != (mean, low, high)
    wide = bootstrap_interval(values, level=0.99)
    assert wide.low < low and wide.high > high


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = sum(low <= 1.0 <= high for _, low, high in (bootstrap_interval(rng.exponential(1, 60)) for _ in range(200)))
    assert 0.86 <= hits / 200 <= 0.99


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=30))
def test_bootstrap_ignores_nan_and_stays_in_range(values: list[float]) -> None:
    mean, low, high = bootstrap_interval(values, n=50)
    kept = [v for v in values if not math.isnan(v)]
    if not kept:
        assert math.isnan(mean) and math.isnan(low) and math.isnan(high)
    else:
        slack = 1e-9 * (1 + max(abs(v) for v in kept))
        assert mean == pytest.approx(np.mean(kept), abs=slack)
        assert min(kept) - slack <= low <= high <= max(kept) + slack
        assert bootstrap_interval(kept, n=50) == (mean, low, high)


def test_bootstrap_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    import vfm_core.metrics as metrics

    values = np.arange(100.0)
    whole = bootstrap_interval(values, n=64)
    monkeypatch.setattr(metrics, "_BLOCK", 100 * 7)
    assert bootstrap_interval(values, n=64) == whole


@pytest.mark.parity
def test_exact_sign_flip_equals_scipy() -> None:
    from scipy.stats import permutation_test

    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 9), rng.normal(0, 1, 9)
    expected = permutation_test(
        (a - b,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert paired_difference(a, b).p == pytest.approx(expected.pvalue)


def test_sign_flip_by_hand() -> None:
    # Differences 1, 1, 1: of the 8 sign patterns only +++ and --- are as extreme.
    result = paired_difference([2, 3, 4], [1, 2, 3])
    assert result == (1, 1, 1, 0.25)
    assert paired_difference([1, 2], [1, 2]).p == 1


def test_random_sign_flip_is_calibrated_and_never_zero() -> None:
    rng = np.random.default_rng(0)
    ps = [paired_difference(rng.normal(size=30), rng.normal(size=30), n=200).p for _ in range(200)]
    assert 0.01 <= np.mean(np.array(ps) <= 0.05) <= 0.10
    strong = paired_difference(np.ones(100) + rng.normal(0, 0.01, 100), np.zeros(100))
    assert strong.p == pytest.approx(1 / 2001)
    assert strong.low > 0.9


def test_pairs_with_nan_are_left_out() -> None:
    assert paired_difference([1, math.nan, 3], [0, 5, math.nan]) == paired_difference([1.0], [0.0])
    assert all(math.isnan(v) for v in paired_difference([math.nan], [0]))
    with pytest.raises(ValueError, match="one length"):
        paired_difference([1, 2], [1])


def test_wilson_interval() -> None:
    # Wilson (1927) for 8 of 10 at 95%: 0.490..0.943.
    assert wilson_interval(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=5e-5)
    assert wilson_interval(0, 5).low == pytest.approx(0, abs=1e-12)
    assert wilson_interval(5, 5).high == pytest.approx(1, abs=1e-12)
    assert math.isnan(wilson_interval(0, 0).mean)
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson_interval(6, 5)
    with pytest.raises(ValueError, match="level"):
        wilson_interval(1, 5, level=95)


@pytest.mark.parity
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
def test_rank_correlation_equals_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import spearmanr

    a, b = np.array(pairs, dtype=float).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert math.isnan(rank_correlation(a, b))
    else:
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
        assert rank_correlation([*a, math.nan], [*b, 1]) == pytest.approx(rank_correlation(a, b))


def test_rank_correlation_sees_order_only() -> None:
    x = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert rank_correlation(x, x.exp()) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    with pytest.raises(ValueError, match="one length"):
        rank_correlation([1, 2], [1])


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3) and isinstance(harmonic_mean(0.5, 1), float)
    assert harmonic_mean(0, 0) == 0 and harmonic_mean(0, 0.9) == 0 and math.isnan(harmonic_mean(math.nan, 0.0))
    found = harmonic_mean([0.0, 0.5, math.nan], torch.tensor([0.0, 0.5, 0.5]))
    np.testing.assert_allclose(found, [0, 0.5, math.nan])
    with pytest.raises(ValueError, match="at least 0"):
        harmonic_mean(-0.1, 0.5)


@pytest.mark.parity
@given(st.floats(1e-3, 1), st.floats(1e-3, 1))
def test_harmonic_mean_equals_scipy(a: float, b: float) -> None:
    from scipy.stats import hmean

    assert harmonic_mean(a, b) == pytest.approx(float(hmean([a, b])))


def test_expected_calibration_error_by_hand() -> None:
    # Two bins of [0, 1]: confidences 0.6 (right), 0.6 (wrong) and 0.9 (right) all in the upper one: |2/3 - 0.7|.
    p = np.array([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]])
    assert expected_calibration_error(p, [0, 1, 1], n_bins=2) == pytest.approx(0.7 - 2 / 3)
    # Ten bins: 0.6 is right half of the time, 0.9 always.
    assert expected_calibration_error(p, [0, 1, 1], n_bins=10) == pytest.approx(2 / 3 * 0.1 + 1 / 3 * 0.1)
    assert expected_calibration_error(torch.from_numpy(p), [0, 1, 1], n_bins=10, norm="max") == pytest.approx(0.1)
    assert expected_calibration_error(np.eye(3)[[0, 1, 2]], [0, 1, 2]) == 0
    assert expected_calibration_error(np.eye(3)[[0, 1, 2]] * (1 + 1e-7), [1, 2, 0]) == pytest.approx(1)


def test_expected_calibration_error_needs_probabilities() -> None:
    with pytest.raises(ValueError, match="softmax"):
        expected_calibration_error([[2.0, -1.0]], [0])
    with pytest.raises(ValueError, match="need probabilities"):
        expected_calibration_error([[0.5, 0.5]], [0, 1])
    with pytest.raises(ValueError, match="need probabilities"):
        expected_calibration_error(np.empty((0, 2)), [])
