"""Budgets: exact totals whatever the weights, the paper's formula where nothing is clamped, the official line."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.core import (
    allocate,
    mass,
    official_alphas,
    official_budgets,
    pyramid,
    pyramid_line,
    total_budget,
    uniform,
    water_fill,
    weighted,
)
from vfm_core.errors import UserError

cases = st.tuples(
    st.lists(st.floats(-30, 30), min_size=1, max_size=40),
    st.floats(0.01, 1.0),
    st.integers(1, 3000),
    st.integers(0, 40),
    st.sampled_from([1e-3, 0.1, 1.0, 7.0, 1e4]),
)


@settings(max_examples=200, deadline=None)
@given(cases)
def test_allocate_keeps_the_exact_total_within_floor_and_cap(case):
    entropy, ratio, n, floor, temperature = case
    total, least = round(ratio * len(entropy) * n), min(floor, n)
    if least * len(entropy) > total:
        with pytest.raises(UserError, match="smallest legal ratio"):
            allocate(entropy, ratio, n, floor, temperature)
        return
    budgets = allocate(entropy, ratio, n, floor, temperature)
    assert budgets.dtype == torch.long and int(budgets.sum()) == total
    assert int(budgets.min()) >= least and int(budgets.max()) <= n
    order = torch.tensor(entropy, dtype=torch.float64).argsort()
    assert bool((budgets[order].diff() >= -1).all())  # more entropy, more tokens (up to rounding)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.data())
def test_allocate_water_fill_is_the_clamped_proportional_solution(weights, data):
    layers = len(weights)
    caps = data.draw(st.lists(st.integers(0, 500), min_size=layers, max_size=layers))
    floors = [data.draw(st.integers(0, c)) for c in caps]
    total = data.draw(st.integers(sum(floors), sum(caps)))
    budgets = water_fill(torch.tensor(weights, dtype=torch.float64), total, floors, caps)
    assert int(budgets.sum()) == total
    assert all(f <= b <= c for f, b, c in zip(floors, budgets.tolist(), caps))
    # one constant c explains every layer that is not at a bound: intervals of (budget -+ 1) / weight intersect
    low, high = 0.0, math.inf
    for f, b, c, w in zip(floors, budgets.tolist(), caps, weights):
        if w > 1e-9 * max(weights):
            low = max(low, (b - 1) / w if b > f else 0.0)
            high = min(high, (b + 1) / w if b < c else math.inf)
    assert low <= high * (1 + 1e-6) + 1e-9


def test_allocate_is_the_papers_formula_where_nothing_is_clamped():
    entropy = torch.tensor([3.0, 3.4, 2.8, 3.1], dtype=torch.float64)
    wanted = entropy.softmax(0) * 4 * 0.2 * 1000
    budgets = allocate(entropy, 0.2, 1000)
    assert bool(((budgets - wanted).abs() < 1).all()) and int(budgets.sum()) == 800
    torch.testing.assert_close(weighted(entropy.softmax(0), 0.2, 1000), budgets)


def test_allocate_hands_on_what_a_full_layer_cannot_take():
    # softmax alone would give layer 2 2.9 times the prompt
    budgets = allocate([0.0, 0.0, 8.0, 0.0], 0.75, 100, floor=4)
    assert budgets.tolist() == [67, 67, 100, 66]
    assert allocate([0.0, -900.0, 900.0], 0.5, 100, floor=4).tolist() == [46, 4, 100]
    # what the official code does with the same entropies is not 0.75 of the cache
    assert int(official_budgets(torch.tensor([0.0, 0.0, 8.0, 0.0]), 0.75, 100).sum()) == 100


def test_allocate_freezes_only_one_kind_of_bound_at_a_time():
    # freezing floors and caps together would leave layer 1 at its floor although the cap gives tokens back
    budgets = water_fill(torch.tensor([100.0, 9.0, 9.0]), 60, [0, 10, 0], [20, 60, 60])
    assert budgets.tolist() == [20, 20, 20]


def test_allocate_temperature_and_uniform():
    entropy = torch.tensor([1.0, 2.0, 3.0])
    hot, cold = allocate(entropy, 0.3, 300, temperature=1e6), allocate(entropy, 0.3, 300, temperature=0.05)
    assert hot.tolist() == uniform(3, 0.3, 300).tolist() == [90, 90, 90]
    assert cold.tolist() == [16, 16, 238]
    assert uniform(3, 0.5, 33, floor=1).tolist() == [17, 17, 16]  # 50 tokens: the remainder goes to lower layers
    assert allocate(entropy, 0.3, 300, cap=100).tolist() == [70, 100, 100]


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, math.nan, math.inf, True])
def test_allocate_refuses_a_ratio_out_of_range(ratio):
    with pytest.raises(UserError, match=r"\(0, 1\] in ratio"):
        allocate([1.0, 2.0], ratio, 100)


def test_allocate_refuses_bad_input():
    with pytest.raises(UserError) as error:
        allocate([1.0, 2.0, 3.0], 0.1, 100)
    assert "prompt of 100 tokens" in str(error.value) and "ratio: 0.1" in str(error.value)
    assert "smallest legal ratio is 0.16" in str(error.value)
    assert int(allocate([1.0, 2.0, 3.0], 0.16, 100).sum()) == 48
    for bad in ({"temperature": 0.0}, {"temperature": math.inf}, {"floor": -1}, {"cap": [3, 3]}):
        with pytest.raises(UserError):
            allocate([1.0, 2.0, 3.0], 0.5, 100, **bad)
    with pytest.raises(UserError, match="finite entropy"):
        allocate([1.0, math.nan], 0.5, 100)
    with pytest.raises(UserError, match="at least one token"):
        allocate([1.0], 0.5, 0)
    with pytest.raises(UserError, match="weights"):
        water_fill(torch.tensor([1.0, -1.0]), 3)
    with pytest.raises(UserError, match="the caps to 4"):
        water_fill(torch.tensor([1.0, 1.0]), 5, 0, 2)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 60), st.floats(0.05, 1.0), st.integers(50, 3000), st.integers(1, 100), st.sampled_from([1.5, 20.0])
)
def test_allocate_pyramid_has_the_exact_total_and_falls(layers, ratio, n, window, beta):
    if min(16, n) * layers > round(ratio * layers * n):
        return
    budgets = pyramid(layers, ratio, n, window, beta)
    assert int(budgets.sum()) == round(ratio * layers * n) and int(budgets.max()) <= n and int(budgets.min()) >= 1
    assert bool((budgets.diff() <= 1).all())


@pytest.mark.parity
@pytest.mark.parametrize(
    ("capacity", "n", "window", "beta"), [(320, 5000, 64, 20), (1024, 2100, 32, 20), (200, 390, 8, 5)]
)
def test_pyramid_line_equals_the_official_code(capacity, n, window, beta):
    # KVCache-Factory computes with integers: // for the least and for the step between layers
    layers = 32
    least = (capacity - window) // beta
    most = (capacity - window) * 2 - least
    if most >= n - window:
        most = n - window
        least = (capacity - window) * 2 - most
    official = [most - layer * ((most - least) // (layers - 1)) for layer in range(layers)]
    line = pyramid_line(layers, capacity, n, window, beta)
    assert float(line.mean()) == pytest.approx(capacity - window)
    rounding = torch.arange(layers) + 2.0  # their step is floored, so their line falls less with every layer
    assert bool(((line - torch.tensor(official)).abs() <= rounding).all())
    budgets = pyramid(layers, capacity / n, n, window, beta)
    torch.testing.assert_close(budgets.double(), line + window, rtol=0, atol=1.0)


def test_pyramid_of_short_prompts():
    assert pyramid_line(4, 100, 90, 10).tolist() == [80.0] * 4  # shorter than the capacity: everything
    assert pyramid_line(4, 100, 150, 10).tolist() == [90.0] * 4  # shorter than twice the inside: equal
    # a window of 64 does not fit in 20 tokens per layer: it counts as 10, so the line runs from 29.5 to 10.5
    assert pyramid(4, 0.2, 100, window=64, floor=1).tolist() == [30, 23, 17, 10]


@pytest.mark.parity
def test_official_alphas_clamp_and_give_nothing_back():
    entropy = torch.tensor([0.0, 5.0, 6.0, 1.0], dtype=torch.float64)
    weights = entropy.exp() / entropy.exp().sum()
    wanted = (weights * 4 * 0.5).clamp(0.01, 1.0)
    torch.testing.assert_close(official_alphas(entropy, 0.5), wanted)
    assert float(wanted.sum()) < 4 * 0.5  # the total is missed
    halves = [int(700 * float(a) / 2) for a in wanted]
    assert official_budgets(entropy, 0.5, 700).tolist() == [2 * h for h in halves]
    with pytest.raises(UserError, match="ratio"):
        official_alphas(entropy, 0.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=25), min_size=1, max_size=8), st.data())
def test_mass_is_one_threshold_with_the_exact_total(lists, data):
    curves = [torch.tensor(sorted(values, reverse=True), dtype=torch.float64) for values in lists]
    floors = [data.draw(st.integers(0, len(c))) for c in curves]
    total = data.draw(st.integers(sum(floors), sum(len(c) for c in curves)))
    budgets = mass(curves, total, floors).tolist()
    assert sum(budgets) == total and all(f <= b <= len(c) for f, b, c in zip(floors, budgets, curves))
    kept = [float(c[b - 1]) for c, b, f in zip(curves, budgets, floors) if b > f]
    dropped = [float(c[b]) for c, b in zip(curves, budgets) if b < len(c)]
    assert not kept or not dropped or min(kept) >= max(dropped)
    best = sum(sorted((float(x) for c, f in zip(curves, floors) for x in c[f:]), reverse=True)[: total - sum(floors)])
    assert sum(float(c[f:b].sum()) for c, f, b in zip(curves, floors, budgets)) == pytest.approx(best)


def test_total_budget_is_pythons_round():
    assert [total_budget(r, 4, 139) for r in (0.2, 0.1, 1.0)] == [111, 56, 556]
