"""The other choices of gamma and the repairs that are no gamma: each against its definition."""

import logging

import numpy as np
import pytest
from ft_calibrate.choices import rate_gamma, val_gamma
from ft_calibrate.curve import CurveAccumulator, margins
from ft_calibrate.groups import class_groups
from ft_calibrate.repairs import bic, prior_shift, temperature_per_group, weight_align
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from vfm_core.errors import UserError

K = 8
GROUPS = class_groups(K, [0, 1, 2, 3])


def problem(n=400, seed=0, bias=4.0, noise=1.0):
    """Absent logits too low by ``bias``."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, n)
    z = rng.normal(size=(n, K)) * noise
    z[np.arange(n), y] += 4
    z[:, 4:] -= bias
    return z, y


def accuracy(z, y, gamma):
    return float(((z + gamma * (np.arange(K) >= 4)).argmax(1) == y).mean())


def test_gamma_is_the_best_of_all_gammas():
    z, y = problem()
    best = val_gamma(z, y, GROUPS, n_bootstrap=0).best
    tried = [accuracy(z, y, gamma) for gamma in np.linspace(-3, 12, 800)]
    assert best.value == accuracy(z, y, best.gamma) >= max(tried)
    assert accuracy(z, y, best.gamma) > accuracy(z, y, 0) + 0.2
    assert best.low < best.gamma < best.high


def test_floor():
    z, y = problem(noise=2.5)
    free = val_gamma(z, y, GROUPS, n_bootstrap=0).best
    floor = free.point.unseen + 0.05
    floored = val_gamma(z, y, GROUPS, "source-floor", floor=floor, n_bootstrap=0).best
    assert floored.gamma > free.gamma and floored.point.unseen >= free.point.unseen + 0.05


def test_val_interval_covers_the_bias_and_narrows_with_data():
    z, y = problem(n=4000)
    found = val_gamma(z, y, GROUPS, "balanced", n_bootstrap=200)
    few = val_gamma(z[:120], y[:120], GROUPS, "balanced", n_bootstrap=200)
    assert found.gamma == CurveAccumulator(GROUPS).add(z, y).curve().best("balanced").gamma == found.best.gamma
    assert found.ci95[0] <= 4.0 <= found.ci95[1] and few.ci95[0] <= 4.0 <= few.ci95[1]
    assert few.ci95[1] - few.ci95[0] > found.ci95[1] - found.ci95[0] > 0
    assert found.n_seen + found.n_absent == 4000
    assert val_gamma(z, y, GROUPS, "balanced", n_bootstrap=200) == found
    assert val_gamma(z, y, GROUPS, "balanced", n_bootstrap=200, seed=1).ci95 != found.ci95
    assert val_gamma(z, y, GROUPS, n_bootstrap=0).ci95 is None


@pytest.mark.parametrize("criterion", ["overall", "balanced", "harmonic"])
def test_the_resampled_gammas_are_the_best_of_resampled_data(criterion):
    """One resample, drawn by the same generator, gives the gamma of the curve of the drawn rows."""
    z, y = problem(n=60, noise=2.0)
    z[:, 5] = -np.inf  # a masked class
    is_absent = y >= 4
    low, high = val_gamma(z, y, GROUPS, criterion, n_bootstrap=1, seed=3).ci95
    rng = np.random.default_rng(3)
    rows = [r[rng.integers(0, len(r), len(r))] for r in (np.flatnonzero(~is_absent), np.flatnonzero(is_absent))]
    drawn = np.concatenate(rows)
    expected = CurveAccumulator(GROUPS).add(z[drawn], y[drawn]).curve().best(criterion)
    assert low == high == pytest.approx(expected.gamma, abs=1e-9)


def test_tiny_groups_are_warned_of(caplog):
    z, y = problem(n=40)
    with caplog.at_level(logging.WARNING):
        val_gamma(z, y, GROUPS, n_bootstrap=10)
    assert "labelled samples of seen classes" in caplog.text and "labelled samples of absent classes" in caplog.text


@pytest.mark.parametrize("choose", [val_gamma, bic, temperature_per_group])
def test_labelled_samples_of_both_groups_are_needed(choose):
    z, y = problem()
    for keep, name in ((y < 4, "absent"), (y >= 4, "seen")):
        with pytest.raises(UserError, match=f"needs labelled samples of {name} classes"):
            choose(z[keep], y[keep], GROUPS)
    with pytest.raises(UserError, match="nothing is absent"):
        choose(z, y, class_groups(K, range(K)))
    with pytest.raises(UserError, match="differ in length"):
        choose(z, y[1:], GROUPS)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9999), st.floats(0, 1), st.booleans())
def test_rate_predicts_the_expected_share(seed, share, ties):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(int(rng.integers(1, 60)), K))
    z = np.round(z * 2) if ties else z
    gamma = rate_gamma(z, share, GROUPS)
    d = margins(z, GROUPS)
    achieved = (gamma > d).mean()
    possible = np.array([0.0, *[(d <= v).mean() for v in np.unique(d)]])
    assert abs(achieved - share) == pytest.approx(np.abs(possible - share).min(), abs=1e-12)
    assert not np.isclose(d, gamma).any() or ties


def test_rate_needs_a_share_and_rows():
    z, _ = problem()
    with pytest.raises(UserError, match=r"share of absent samples must lie in \[0, 1\] in rate: 1.5"):
        rate_gamma(z, 1.5, GROUPS)
    with pytest.raises(UserError, match="no rows"):
        rate_gamma(z[:0], 0.5, GROUPS)
    assert rate_gamma(z, 0.5, class_groups(K, range(K))) == 0.0


def test_prior_is_the_logit_adjustment():
    y = np.array([0, 0, 0, 1, 2, -1])
    shift = prior_shift(y, GROUPS, smoothing=0.5)
    train = (np.array([3, 1, 1, 0, 0, 0, 0, 0]) + 0.5) / (5 + 0.5 * K)
    assert shift == pytest.approx(np.log(1 / K) - np.log(train))
    assert shift[4] > shift[1] > shift[0]
    # A classifier whose logits hold the training prior is made right by it.
    likelihood = np.random.default_rng(0).normal(size=(50, K))
    assert ((likelihood + np.log(train) + shift).argmax(1) == likelihood.argmax(1)).all()
    target = np.arange(1, K + 1) / 36
    named = prior_shift(y, GROUPS, {str(c): target[c] * 10 for c in range(K)}, tau=2.0)
    assert named == pytest.approx(2 * (np.log(target) - np.log((np.bincount(y[:5], minlength=K) + 1) / (5 + K))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 0.0}, "smoothing must be positive"),
        ({"prior": [1.0] * 3}, r"one share per class"),
        ({"prior": {"9x": 1.0}}, "unknown class"),
        ({"prior": {"0": 1.0}}, "every class needs a positive share in prior: 1, 2"),
    ],
)
def test_prior_refuses(options, message):
    with pytest.raises(UserError, match=message):
        prior_shift([0, 1], GROUPS, **options)
    with pytest.raises(UserError, match="needs labels"):
        prior_shift([-1], GROUPS)


def test_weight_align_is_the_scaled_head():
    rng = np.random.default_rng(0)
    weight, bias, x = rng.normal(size=(K, 5)), rng.normal(size=K), rng.normal(size=(9, 5))
    weight[4:] *= 0.3
    scale, shift = weight_align(weight, GROUPS, head_bias=bias)
    factor = np.linalg.norm(weight[:4], axis=1).mean() / np.linalg.norm(weight[4:], axis=1).mean()
    aligned = weight * np.where(np.arange(K) >= 4, factor, 1)[:, None]
    assert (x @ weight.T + bias) * scale + shift == pytest.approx(x @ aligned.T + bias)
    assert weight_align(weight, GROUPS)[1].tolist() == [0] * K
    with pytest.raises(UserError, match="does not fit the classes"):
        weight_align(weight[:5], GROUPS)
    with pytest.raises(UserError, match="all zero"):
        weight_align(weight * (np.arange(K) < 4)[:, None], GROUPS)


def nll(z, y, alpha, beta, columns, weights=None):
    out = z.copy()
    out[:, columns] = alpha * out[:, columns] + beta
    return float(np.average(-log_softmax(out, axis=1)[np.arange(len(y)), y], weights=weights))


@pytest.mark.parametrize("on", ["absent", "seen"])
@pytest.mark.parametrize("criterion", ["overall", "balanced"])
def test_bic_minimises_the_cross_entropy(on, criterion):
    z, y = problem(noise=2.0)
    drop = (y >= 4) & (np.arange(len(y)) % 3 > 0)
    z, y = z[~drop], y[~drop]
    found = bic(z, y, GROUPS, on, criterion)
    weights = np.where(y >= 4, 1 / (y >= 4).sum(), 1 / (y < 4).sum()) if criterion == "balanced" else None
    here = nll(z, y, found.alpha, found.beta, found.columns, weights)
    assert here < nll(z, y, 1, 0, found.columns, weights)
    for da, db in ((0.02, 0), (-0.02, 0), (0, 0.05), (0, -0.05)):
        assert here <= nll(z, y, found.alpha + da, found.beta + db, found.columns, weights) + 1e-7
    assert (found.beta > 0) == (on == "absent")


def test_temperature_per_group_minimises_the_cross_entropy():
    z, y = problem(noise=2.0, bias=0.0)
    z[:, 4:] /= 3  # absent logits three times too small
    t = temperature_per_group(z, y, GROUPS)
    moved = [4, 5, 6, 7]
    here = nll(z, y, 1 / t, 0, moved)
    assert 0.1 < t < 0.9 and here <= min(nll(z, y, 1 / (t + dt), 0, moved) for dt in (-0.02, 0.02)) + 1e-7


def test_a_masked_column_stays_masked_in_the_fits():
    z, y = problem(noise=2.0)
    keep = y != 6
    masked = z[keep].copy()
    masked[:, 6] = -np.inf
    without = class_groups(K, [0, 1, 2, 3], [4, 5, 7])
    assert bic(masked, y[keep], GROUPS).beta == pytest.approx(
        bic(z[keep], y[keep], without, remaining="exclude").beta, abs=1e-3
    )


def test_unknown_options_of_the_fits():
    z, y = problem()
    with pytest.raises(UserError, match="unknown group in bic"):
        bic(z, y, GROUPS, on="both")
    with pytest.raises(UserError, match="overall or balanced"):
        bic(z, y, GROUPS, criterion="harmonic")
