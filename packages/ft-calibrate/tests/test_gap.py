"""The average logit gap: the formula, what it must not depend on, and what it refuses."""

import logging

import numpy as np
import pytest
import torch
from ft_calibrate.gap import GapAccumulator, GapUndefined, average_logit_gap
from ft_calibrate.groups import class_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from vfm_core.errors import UserError

K = 6
SEEN = [0, 2, 3]


def problem(n=40, seed=0, labels=SEEN):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, K)) * 3
    z[:, SEEN] += 4
    return z, rng.choice(labels, n)


def by_hand(z, y, seen, moved):
    gaps = [
        np.mean([row[c] for c in seen if c != label]) - np.mean([row[c] for c in moved]) for row, label in zip(z, y)
    ]
    return float(np.mean(gaps))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 30))
def test_is_the_formula(seed, n_seen, n):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, K)) * rng.uniform(0.1, 50)
    seen = np.sort(rng.permutation(K)[:n_seen])
    y = rng.choice(seen, n)
    absent = np.setdiff1d(np.arange(K), seen)
    assert average_logit_gap(z, y, seen) == pytest.approx(by_hand(z, y, seen, absent), rel=1e-9, abs=1e-9)


def test_log_probabilities_and_shifted_rows_give_the_same_gamma():
    z, y = problem()
    gamma = average_logit_gap(z, y, SEEN)
    assert average_logit_gap(log_softmax(z, axis=1), y, SEEN) == pytest.approx(gamma, abs=1e-6)
    assert average_logit_gap(log_softmax(z.astype(np.float32), axis=1), y, SEEN) == pytest.approx(gamma, abs=1e-5)
    shift = np.random.default_rng(1).normal(size=(len(z), 1)) * 100
    assert average_logit_gap(z + shift, y, SEEN) == pytest.approx(gamma, abs=1e-9)


def test_the_ground_truth_logit_does_not_count():
    z, y = problem()
    louder = z.copy()
    louder[np.arange(len(y)), y] += 1000
    assert average_logit_gap(louder, y, SEEN) == pytest.approx(average_logit_gap(z, y, SEEN), abs=1e-9)


def test_pieces_equal_the_whole_and_keep_one_number_per_row():
    z, y = problem(n=41)
    groups = class_groups(K, SEEN)
    pieces = GapAccumulator(groups)
    for part in np.array_split(np.arange(41), 5):
        pieces.add(z[part], y[part])
    assert pieces.n == 41 and pieces.gaps.shape == (41,)
    assert pieces.gamma() == average_logit_gap(z, y, SEEN)
    whole = GapAccumulator(groups)
    whole.add(z, y)
    assert whole.gaps.tolist() == pieces.gaps.tolist()


@pytest.mark.parametrize(("mode", "moved"), [("absent", [1, 4, 5]), ("keep", [4, 5]), ("exclude", [4, 5])])
def test_remaining_classes_count_only_when_they_are_moved(mode, moved):
    z, y = problem()
    found = average_logit_gap(z, y, SEEN, [4, 5], remaining=mode)
    assert found == pytest.approx(by_hand(z, y, SEEN, moved), abs=1e-12)


def test_names_lists_and_tensors():
    z, y = problem()
    names = list("abcdef")
    gamma = average_logit_gap(z, y, SEEN)
    assert average_logit_gap(z.tolist(), [names[c] for c in y], ["a", "c", "d"], classes=names) == gamma
    assert average_logit_gap(torch.from_numpy(z), torch.from_numpy(y), torch.tensor(SEEN)) == gamma
    half = average_logit_gap(torch.from_numpy(z).bfloat16(), y, SEEN)
    assert half == pytest.approx(gamma, abs=0.05) and half != gamma


def test_masked_columns_are_left_out():
    z, y = problem()
    kept, masked = z.copy(), z.copy()
    masked[:, [2, 5]] = -np.inf
    y = np.where(y == 2, 0, y)
    assert average_logit_gap(masked, y, SEEN) == pytest.approx(by_hand(kept, y, [0, 3], [1, 4]), abs=1e-12)
    accumulator = GapAccumulator(class_groups(K, SEEN))
    accumulator.add(masked[:5], y[:5])
    with pytest.raises(UserError, match="-inf in a part of the rows: 2, 5"):
        accumulator.add(z[5:], y[5:])


def test_nothing_absent_is_gamma_zero_with_a_warning(caplog):
    z, y = problem(labels=list(range(K)))
    with caplog.at_level(logging.WARNING):
        assert average_logit_gap(z, y, list(range(K))) == 0.0
    assert "nothing is absent" in caplog.text


def test_one_seen_class_is_refused_with_a_remedy():
    z, _ = problem()
    with pytest.raises(GapUndefined, match=r"fewer than two seen classes.*--method rate or --method fixed"):
        average_logit_gap(z, np.zeros(len(z), int), [0])
    masked = z.copy()
    masked[:, [2, 3]] = -np.inf
    with pytest.raises(UserError, match="--method rate or --method fixed"):
        average_logit_gap(masked, np.zeros(len(z), int), SEEN)


def test_unlabelled_rows_are_left_out_and_counted(caplog):
    z, y = problem()
    gamma = average_logit_gap(z[:30], y[:30], SEEN)
    with caplog.at_level(logging.WARNING):
        assert average_logit_gap(z, np.where(np.arange(40) < 30, y, -1), SEEN) == gamma
    assert "10 rows without a label" in caplog.text
    with pytest.raises(UserError, match="needs labelled rows"):
        average_logit_gap(z, np.full(40, -1), SEEN)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_named(value):
    z, y = problem()
    z[7, 4] = value
    with pytest.raises(UserError, match="row 7, column 4"):
        average_logit_gap(z, y, SEEN)


def test_shapes_are_checked():
    z, y = problem()
    with pytest.raises(UserError, match="differ in length: 40 rows, 39 labels"):
        average_logit_gap(z, y[:39], SEEN)
    with pytest.raises(UserError, match="6 columns for 4 classes"):
        average_logit_gap(z, y, [0, 1], classes=["a", "b", "c", "d"])
    with pytest.raises(UserError, match="matrix"):
        average_logit_gap(z[0], y, SEEN)


def test_all_absent_columns_masked_is_refused_and_the_file_is_named():
    z, y = problem()
    z[:, [1, 4, 5]] = -np.inf
    with pytest.raises(UserError, match=r"all classes of a group are masked in train\.npz; leave one column unmasked"):
        GapAccumulator(class_groups(K, SEEN)).add(z, y, where="train.npz")
    with pytest.raises(UserError, match="all classes of a group are masked"):
        average_logit_gap(z, y, SEEN)


def test_blocks_of_rows_give_the_gaps_of_the_whole(monkeypatch):
    z, y = problem(n=41)
    y[5] = -1
    expected = by_hand(z[y >= 0], y[y >= 0], SEEN, [1, 4, 5])
    monkeypatch.setattr("ft_calibrate.metrics._BLOCK", 4 * K)
    monkeypatch.setattr("ft_calibrate.inputs._BLOCK", 4 * K)
    pieces = GapAccumulator(class_groups(K, SEEN))
    pieces.add(z, y)
    assert (pieces.n, pieces.n_unlabelled) == (40, 1) and pieces.gamma() == pytest.approx(expected, abs=1e-12)
    z[33, 4] = np.nan  # named by its row in the whole
    with pytest.raises(UserError, match="row 33, column 4"):
        pieces.add(z, y)
