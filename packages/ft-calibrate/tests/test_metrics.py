"""Accuracy by group against scikit-learn and by hand."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from ft_calibrate.groups import class_groups
from ft_calibrate.metrics import accuracy_decomposition, correct_per_sample, group_intervals, score_chunks, take_columns
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from vfm_core.errors import UserError


def _problem(n: int = 300, k: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    z = rng.normal(size=(n, k)).astype(np.float32)
    z[np.arange(n), y] += 1.2
    return z, y


def test_by_hand() -> None:
    z = [[3, 2, 1, 0], [0, 1, 3, 2], [5, 1, 2, 4], [9, 8, 0, 1]]
    found = accuracy_decomposition(z, [0, 1, 2, 3], seen=[0, 1], topk=(1, 2))
    # Best of all: 0, 2, 0, 0. Among the seen: 0, 1. Among the absent: 3, 3.
    assert (found["Y/Y"], found["S/Y"], found["U/Y"], found["S/S"], found["U/U"]) == (0.25, 0.5, 0, 1, 0.5)
    assert (found["Y/Y@2"], found["S/Y@2"], found["U/Y@2"], found["S/S@2"]) == (0.25, 0.5, 0, 1)
    assert found["H"] == 0 and (found["n_S"], found["n_U"], found["n_R"]) == (2, 2, 0)
    assert "R/Y" not in found


@pytest.mark.parity
@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_scikit_learn(k: int) -> None:
    z, y = _problem()
    seen, absent = [0, 2, 4, 6, 8], [1, 3, 5, 7]
    found = accuracy_decomposition(z, y, seen, topk=(k,))
    suffix = "" if k == 1 else f"@{k}"
    for key, group, columns in (("S/S", seen, seen), ("U/U", absent, absent), ("U/Y", absent, range(9))):
        rows = np.isin(y, group)
        place = {c: i for i, c in enumerate(columns)}
        expected = top_k_accuracy_score(
            [place[c] for c in y[rows]], z[rows][:, list(columns)], k=min(k, len(place) - 1), labels=range(len(place))
        )
        assert found[key + suffix] == pytest.approx(expected if k < len(place) else 1.0)


@pytest.mark.parity
def test_macro_is_the_mean_over_classes() -> None:
    z, y = _problem(seed=1)
    y[y == 3] = 4
    z[:, 3] = -5  # scikit-learn warns of predictions that no label has
    found = accuracy_decomposition(z, y, [0, 1, 2], average="macro")
    assert found["Y/Y"] == pytest.approx(balanced_accuracy_score(y, z.argmax(axis=1)))
    rows = np.isin(y, [0, 1, 2])
    assert found["S/S"] == pytest.approx(balanced_accuracy_score(y[rows], z[rows, :3].argmax(axis=1)))


def test_remaining_classes_absent_keep_or_exclude() -> None:
    z, y = _problem(seed=2)
    seen, absent, rest = [0, 1, 2], [3, 4, 5], [6, 7, 8]
    both = {mode: accuracy_decomposition(z, y, seen, absent, remaining=mode) for mode in ("absent", "keep", "exclude")}
    assert both["absent"] == both["keep"]  # nothing moves at gamma = 0
    rows = np.isin(y, seen + absent)
    assert both["exclude"]["Y/Y"] == pytest.approx(float((z[rows, :6].argmax(axis=1) == y[rows]).mean()))
    assert both["keep"]["R/R"] == pytest.approx(float((z[y >= 6, 6:].argmax(axis=1) + 6 == y[y >= 6]).mean()))
    assert math.isnan(both["exclude"]["R/Y"]) and both["exclude"]["n_R"] == np.isin(y, rest).sum()


def test_nan_counts_as_minus_infinity_and_a_masked_class_is_never_right() -> None:
    z, y = _problem()
    z[::3, 4] = np.nan
    filled = np.where(np.isnan(z), -np.inf, z)
    assert accuracy_decomposition(z, y, [0, 4]) == accuracy_decomposition(filled, y, [0, 4])
    nothing = np.full((3, 4), np.nan)
    found = accuracy_decomposition(nothing, [0, 1, 2], seen=[0])
    assert found["Y/Y"] == found["S/S"] == found["U/U@5"] == 0


def test_ties_go_to_the_first_column() -> None:
    z = np.zeros((3, 3))
    assert correct_per_sample(z, [0, 1, 2], seen=[0, 1])["Y/Y"].tolist() == [1, 0, 0]
    found = correct_per_sample(z, [0, 1, 2], seen=[1, 2], topk=(2,))
    assert found["S/S"].tolist()[1:] == [1, 0] and found["Y/Y@2"].tolist() == [1, 1, 0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_top_k_follows_a_stable_sort(data: st.DataObject) -> None:
    k, n = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 8))
    cells = st.sampled_from([-1.0, 0.0, 1.0, math.nan])
    z = np.array(data.draw(st.lists(st.lists(cells, min_size=k, max_size=k), min_size=n, max_size=n)))
    y = np.array(data.draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n)))
    top = data.draw(st.integers(1, k))
    clean = np.where(np.isnan(z), -np.inf, z)
    best = np.argsort(-clean, axis=1, kind="stable")[:, :top]
    expected = (best == y[:, None]).any(axis=1) & np.isfinite(clean[np.arange(n), y])
    found = correct_per_sample(z, y, seen=[0], topk=(top,))["Y/Y" if top == 1 else f"Y/Y@{top}"]
    assert found.tolist() == expected.astype(float).tolist()


def test_empty_group_is_nan_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    z, y = _problem()
    y = y % 3
    with caplog.at_level(logging.WARNING):
        found = accuracy_decomposition(z, y, seen=[0, 1, 2])
    assert math.isnan(found["U/Y"]) and math.isnan(found["U/U@5"]) and math.isnan(found["H"])
    assert found["S/Y"] > 0 and found["n_U"] == 0
    assert "no sample of the absent classes: U/Y, U/U is not defined (nan)" in caplog.text


def test_samples_without_label_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    z, y = _problem()
    hidden = y.copy()
    hidden[::2] = -1
    with caplog.at_level(logging.WARNING):
        assert accuracy_decomposition(z, hidden, [0, 1]) == accuracy_decomposition(z[1::2], y[1::2], [0, 1])
    assert "150 of 300 samples have no label" in caplog.text
    assert np.isnan(correct_per_sample(z, hidden, [0, 1])["Y/Y"][::2]).all()


def test_names_tensors_lists_and_groups_give_the_same() -> None:
    z, y = _problem(60)
    names = [f"c{i}" for i in range(9)]
    expected = accuracy_decomposition(z, y, [0, 1])
    assert accuracy_decomposition(torch.from_numpy(z), torch.from_numpy(y), torch.tensor([0, 1])) == expected
    assert accuracy_decomposition(z.tolist(), [names[i] for i in y], ["c0", "c1"], classes=names) == expected
    assert accuracy_decomposition(z, y, class_groups(names, ["c0", "c1"])) == expected
    half = torch.from_numpy(z).bfloat16()
    assert accuracy_decomposition(half, y, [0, 1]) == accuracy_decomposition(half.float().numpy(), y, [0, 1])


def test_blocks_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = _problem()
    whole = accuracy_decomposition(z, y, [0, 1], [2, 3])
    monkeypatch.setattr("ft_calibrate.metrics._BLOCK", 9 * 7)
    assert len(list(score_chunks(z))) == 43
    assert accuracy_decomposition(z, y, [0, 1], [2, 3]) == whole


def test_intervals_cover_and_warn_about_small_groups(caplog: pytest.LogCaptureFixture) -> None:
    z, y = _problem(2000)
    with caplog.at_level(logging.WARNING):
        found = group_intervals(z, y, [0, 1, 2])
    assert not caplog.records
    shares = accuracy_decomposition(z, y, [0, 1, 2])
    for key in ("Y/Y", "S/Y", "U/U", "H"):
        assert found[key].mean == pytest.approx(shares[key])
        assert found[key].low < shares[key] < found[key].high
    half_width = 1.96 * math.sqrt(shares["Y/Y"] * (1 - shares["Y/Y"]) / 2000)
    assert found["Y/Y"].high - found["Y/Y"].low == pytest.approx(2 * half_width, rel=0.15)
    assert group_intervals(z, y, [0, 1, 2]) == found != group_intervals(z, y, [0, 1, 2], seed=1)
    with caplog.at_level(logging.WARNING):
        few = group_intervals(z[:40], y[:40] % 4, [0, 1, 2])
    assert "samples of the absent classes" in caplog.text and few["U/Y"].high > few["U/Y"].low


def test_intervals_of_an_empty_group() -> None:
    z, y = _problem()
    found = group_intervals(z, y % 2, [0, 1])
    assert all(math.isnan(v) for v in (*found["U/Y"], *found["H"])) and found["S/Y"].low > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"average": "weighted"}, "use micro or macro"),
        ({"topk": (0,)}, "at least 1"),
        ({"labels": [0]}, "300 rows, 1 labels"),
        ({"logits": np.zeros(5)}, "matrix"),
        ({"logits": np.full((300, 9), "a")}, "matrix of numbers"),
        ({"classes": ["a", "b"]}, "2 classes, 9 columns"),
        ({"remaining": "drop"}, "use absent, keep, exclude"),
        ({"seen": [11]}, "seen classes"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    z, y = _problem()
    arguments = {"logits": z, "labels": y, "seen": [0, 1], **change}
    with pytest.raises(UserError, match=message):
        accuracy_decomposition(**arguments)  # type: ignore[arg-type]


def test_bad_level() -> None:
    with pytest.raises(UserError, match="level"):
        group_intervals(*_problem(), seen=[0], level=95)


@pytest.mark.parametrize("columns", [[], [2], [1, 2, 3], [0, 2, 5], [0, 1, 2, 3, 4, 5]])
def test_a_run_of_columns_is_a_view_and_any_others_are_in_row_order(columns: list[int]) -> None:
    z = np.arange(24.0).reshape(4, 6)
    found = take_columns(z, np.array(columns, dtype=np.intp))
    np.testing.assert_array_equal(found, z[:, columns])
    run = bool(columns) and len(columns) == columns[-1] - columns[0] + 1
    assert np.shares_memory(found, z) is run and (run or found.flags.c_contiguous)


def test_nan_scores_are_told_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        accuracy_decomposition([[np.nan, np.nan], [1.0, 2.0]], [0, 1], seen=[0])
    assert "2 scores are NaN and count as -inf" in caplog.text
    caplog.clear()
    accuracy_decomposition([[-np.inf, 1.0], [1.0, 2.0]], [0, 1], seen=[0])
    assert "NaN" not in caplog.text
