from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from meda_kv.benchmark.cost import CostLine, fit_cost, growth_exponent


@given(st.floats(1e-4, 1e-1), st.floats(1e-8, 1e-4))
def test_a_line_is_found_again(a: float, b: float) -> None:
    lengths = [256, 1024, 4096, 16384]
    line = fit_cost(lengths, [a + b * n for n in lengths])
    assert line.a == pytest.approx(a, rel=1e-4, abs=1e-9)
    assert line.b == pytest.approx(b, rel=1e-4, abs=1e-12)
    assert line.error is not None and line.error < 1e-6


def test_the_limit_is_the_formula() -> None:
    # A small Llama on one core: a fifth of the tokens can be 3.4 times as fast at 16k, but only 1.3 times at 1k.
    line = CostLine(7.5e-3, 3.4e-6, 0.0)
    assert line.limit(16384, 0.2 * 16384) == pytest.approx(3.4, abs=0.05)
    assert line.limit(1024, 0.2 * 1024) == pytest.approx(1.34, abs=0.05)


def test_coefficients_are_never_negative() -> None:
    falling = fit_cost([100, 200, 300], [3.0, 2.0, 1.0])
    assert falling.b == 0 and falling.a > 0
    steep = fit_cost([100, 200, 300], [1e-3, 5e-3, 9e-3])
    assert steep.a == 0 and steep.b > 0


def test_small_contexts_count_as_much_as_large_ones() -> None:
    # A tenth too slow at the longest context must not swallow the cost of an empty cache, as it
    # would (0.3 of it left) if all points counted by their milliseconds.
    lengths = [256, 1024, 16384]
    seconds = [1e-3 + 1e-5 * n for n in lengths]
    seconds[2] *= 1.1
    assert fit_cost(lengths, seconds).a == pytest.approx(1e-3, rel=0.25)


def test_a_line_is_doubted_when_it_cannot_be_wrong_or_does_not_fit() -> None:
    two = fit_cost([256, 4096], [1e-3, 5e-3])
    assert two.error is None and "two lengths" in str(two.doubt)
    flat = fit_cost([256, 1024, 4096], [1.0, 1.0, 0.9])
    assert flat.b == 0 and "does not get slower" in str(flat.doubt)
    noisy = fit_cost([256, 1024, 4096], [1e-3, 3e-3, 4e-3])
    assert noisy.error is not None and noisy.error > 0.1 and "off the line" in str(noisy.doubt)
    assert fit_cost([256, 1024, 4096], [1e-3 + 1e-6 * n for n in (256, 1024, 4096)]).doubt is None


def test_one_length_makes_no_line() -> None:
    with pytest.raises(ValueError, match="two lengths"):
        fit_cost([64, 64], [1.0, 2.0])
    with pytest.raises(ValueError, match="positive"):
        fit_cost([64, 128], [0.0, 2.0])


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_exponent_of_a_power_law(power: float) -> None:
    assert growth_exponent([1, 2, 4, 8], [3 * n**power for n in (1, 2, 4, 8)]) == pytest.approx(power)


def test_no_exponent_from_one_size() -> None:
    assert growth_exponent([8, 8], [1.0, 2.0]) is None
    assert growth_exponent([1, 8], [0.0, 2.0]) is None
