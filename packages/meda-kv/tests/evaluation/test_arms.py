from __future__ import annotations

from typing import Any

import pytest
from meda_kv.evaluation.arms import grid, parse_method, parse_ratios
from vfm_core.errors import UserError


def test_grid_has_the_full_cache_once_and_first() -> None:
    arms = grid("snapkv,full,meda", "0.1,0.5")
    assert [arm.key for arm in arms] == ["full@1", "snapkv@0.5", "snapkv@0.1", "meda@0.5", "meda@0.1"]
    assert arms[0].full and arms[0].method is None and not arms[1].full
    assert [arm.key for arm in grid(["meda"], 0.2, full=False)] == ["meda@0.2"]


def test_options_reach_the_method_and_name_the_arm() -> None:
    label, method = parse_method("meda?merge=none&floor=4")
    assert label == "meda?merge=none&floor=4"
    assert method is not None and method.merger is None and method.floor == 4
    plain = parse_method("meda")[1]
    assert plain is not None and plain.merger is not None and plain.floor == 16


def test_common_options_yield_to_those_of_a_name() -> None:
    arms = grid("meda,meda?floor=2", 0.5, full=False, floor=4)
    assert [arm.method.floor for arm in arms if arm.method] == [4, 2]


@pytest.mark.parametrize("bad", [0, -0.1, 1.01, float("nan"), "x", "0.2,,zero"])
def test_ratios_out_of_range_are_refused_and_named(bad: Any) -> None:
    with pytest.raises(UserError, match="--ratio"):
        parse_ratios(bad)


def test_ratios_are_distinct_and_sorted() -> None:
    assert parse_ratios("0.1, 1,0.5,0.1") == [1.0, 0.5, 0.1]


@pytest.mark.parametrize(
    ("methods", "word"),
    [("medda", "meda"), ("meda,meda", "twice"), ("meda?merge", "without a value"), ("meda?nonsense=1", "nonsense")],
)
def test_wrong_methods_are_refused_in_one_line(methods: Any, word: Any) -> None:
    with pytest.raises(UserError, match=word) as caught:
        grid(methods, 0.2)
    assert "\n" not in str(caught.value)


def test_nothing_to_run_is_refused() -> None:
    with pytest.raises(UserError, match="no method"):
        grid("", 0.2, full=False)
