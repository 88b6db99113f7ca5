"""Checks of scores: finite values, masks, probabilities, ids, the order of classes."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from ft_calibrate.table_checks import (
    FiniteChecker,
    IdCollector,
    check_finite,
    column_order,
    looks_like_probabilities,
    masked_columns,
    to_log,
    warn_duplicates,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from vfm_core.errors import UserError


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, r"\+inf"), (-np.inf, "-inf")])
def test_bad_values_are_named(value, word):
    z = np.zeros((4, 3))
    z[2, 1] = value
    with pytest.raises(UserError, match=rf"{word} score in t\.csv: id c \(row 2\), column bee; .*--nan drop"):
        check_finite(z, ["ant", "bee", "cat"], list("abcd"), "t.csv")
    with pytest.raises(UserError, match=rf"{word} score: row 2, column 1"):
        check_finite(z)


def test_whole_columns_of_minus_infinity_are_masks():
    z = np.zeros((4, 3))
    z[:, 1] = -np.inf
    check_finite(z)
    assert masked_columns(z).tolist() == [False, True, False]
    assert not masked_columns(z[:0]).any()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 7), max_size=3), masked=st.booleans())
def test_pieces_are_judged_as_the_whole(seed, cuts, masked):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(8, 3))
    if masked:
        z[:, 0] = -np.inf
    for _ in range(rng.integers(0, 2)):
        z[rng.integers(8), rng.integers(1, 3)] = rng.choice([np.nan, np.inf])

    def message(parts):
        checker, start = FiniteChecker(["a", "b", "c"], "f"), 0
        for part in parts:
            try:
                checker.check(part)
            except UserError as error:
                return str(error)
            start += len(part)
        return None

    whole = message([z])
    assert message(np.split(z, sorted(set(cuts)))) == whole
    assert (whole is None) == bool(np.isfinite(z[:, 1:]).all())


def test_a_mask_that_ends_is_an_error_in_pieces_too():
    z = np.zeros((4, 2))
    z[:2, 1] = -np.inf
    checker = FiniteChecker(["a", "b"])
    checker.check(z[:2], ["p", "q"])
    with pytest.raises(
        UserError, match=r"-inf score: id p \(row 0\), column b; -inf is for a class masked in every row"
    ):
        checker.check(z[2:], ["r", "s"])


def test_probabilities_are_told_from_logits():
    p = softmax(np.random.default_rng(0).normal(size=(300, 5)), axis=1)
    assert looks_like_probabilities(p) and looks_like_probabilities(p.astype(np.float16))
    last_differs = p.copy()
    last_differs[-1] = 0.1
    for other in (np.log(p), p * 2, last_differs, p[:, :1], p[:0], p[0]):
        assert not looks_like_probabilities(other)
    logs, zeros = to_log(np.array([[0.0, 1.0]], dtype=np.float32))
    assert zeros == 1 and logs.dtype == np.float64
    np.testing.assert_allclose(logs, [[np.log(1e-30), 0.0]])


def test_order_of_columns():
    assert column_order(["a", "b"], ["a", "b"]) is None
    assert column_order(["b", "c", "a"], ["a", "b", "c"]).tolist() == [2, 0, 1]
    with pytest.raises(UserError, match=r"the classes differ from those of x in y: missing a; unexpected d"):
        column_order(["b", "d"], ["a", "b"], where="y", against="x")
    with pytest.raises(UserError, match="3 columns, 2 expected"):
        column_order(["0", "1", "2"], ["a", "b"])


def test_the_file_without_class_names_is_named(caplog):
    for have, want, files, bare in (
        (["0", "1"], ["a", "b"], {"where": "x.npz"}, "x.npz"),
        (["a", "b"], ["0", "1"], {"where": "x.npz", "against": "y.npz"}, "y.npz"),
        (["a", "b"], ["0", "1"], {"where": "x.npz"}, "one of two class lists"),
    ):
        caplog.clear()
        assert column_order(have, want, **files) is None
        assert caplog.messages == [f"class names are missing in {bare}: columns taken in order"]


def test_ids_in_both_data_sets(caplog):
    one, two = IdCollector(), IdCollector()
    one.add(["a", "b"])
    one.add(["c", "b"])
    two.add(["b", "c", "d"])
    two.add(None)
    with caplog.at_level(logging.WARNING):
        assert warn_duplicates(one, two, ("train", "test")) == 2
    assert "2 ids are in both train and test" in caplog.text and "leak" in caplog.text
    caplog.clear()
    assert warn_duplicates(["a"], ["b"], ("train", "test")) == 0 == warn_duplicates(None, ["b"], ("train", "test"))
    assert not caplog.text
