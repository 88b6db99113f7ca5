"""What decoding must cost: ``a + b * len``, the limit of any compression that follows, and how a cost grows.

A decode step reads every weight once (``a``, with the overhead of launching the layers) and every cached token once
(``b`` each). Keeping the share ``r`` of ``n`` tokens can therefore speed decoding up by
``(a + b n) / (a + b r n)`` at best. A small model with a short context cannot show the paper's figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MISFIT", "CostLine", "fit_cost", "growth_exponent"]

MISFIT = 0.1
"""Largest relative deviation from a cost line with which limits are still told."""


@dataclass(frozen=True)
class CostLine:
    """``seconds(len) = a + b * len``.

    Attributes
    ----------
    a : float
        Seconds of a step over an empty cache, >= 0.
    b : float
        Seconds per cached token, >= 0.
    error : float or None
        Largest relative deviation of a measurement from the line; None where it went through two lengths only, which
        every line does.
    """

    a: float
    b: float
    error: float | None

    @property
    def doubt(self) -> str | None:
        """Why no limit should be told from this line; None when there is no reason."""
        if self.error is None:
            return "measured at two lengths only"
        if self.b <= 0:
            return "decoding does not get slower with the context here"
        if self.error > MISFIT:
            return f"the measurements lie up to {100 * self.error:.0f} % off the line (more than {100 * MISFIT:.0f} %)"
        return None

    def seconds(self, length: float) -> float:
        """Cost of one step over ``length`` cached tokens."""
        return self.a + self.b * length

    def limit(self, full: float, kept: float) -> float:
        """Best possible speed-up when ``kept`` of ``full`` tokens are left."""
        return self.seconds(full) / self.seconds(kept) if self.seconds(kept) > 0 else math.nan


def fit_cost(lengths: Sequence[float], seconds: Sequence[float]) -> CostLine:
    """Fit the line with a and b not below zero, every measurement counting by its relative error.

    Parameters
    ----------
    lengths : sequence of float
        Cached tokens, at least two different values.
    seconds : sequence of float
        Cost of a step, > 0.

    Returns
    -------
    CostLine

    Raises
    ------
    ValueError
        Fewer than two different lengths, or a cost that is not positive.
    """
    if len(set(lengths)) < 2 or min(seconds) <= 0:
        raise ValueError(f"a line needs two lengths and positive times, got lengths {list(lengths)}")
    weights = [1 / (t * t) for t in seconds]
    total = sum(weights)
    x = sum(w * n for w, n in zip(weights, lengths, strict=True)) / total
    y = sum(w * t for w, t in zip(weights, seconds, strict=True)) / total
    spread = sum(w * (n - x) ** 2 for w, n in zip(weights, lengths))
    b = sum(w * (n - x) * (t - y) for w, n, t in zip(weights, lengths, seconds)) / spread
    a = y - b * x
    if b < 0:  # noise on a model whose cache does not matter
        a, b = y, 0.0
    elif a < 0:
        squares = sum(w * n * n for w, n in zip(weights, lengths))
        a, b = 0.0, sum(w * n * t for w, n, t in zip(weights, lengths, seconds)) / squares
    error = max(abs(a + b * n - t) / t for n, t in zip(lengths, seconds))
    return CostLine(a, b, error if len(set(lengths)) > 2 else None)


def growth_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """Slope of log cost over log size: 1 grows in proportion, 2 with the square.

    Returns
    -------
    float or None
        None with fewer than two sizes that cost something.
    """
    points = [(math.log(n), math.log(c)) for n, c in zip(sizes, costs, strict=True) if n > 0 and c > 0]
    if len({x for x, _ in points}) < 2:
        return None
    x = sum(p[0] for p in points) / len(points)
    y = sum(p[1] for p in points) / len(points)
    return sum((p - x) * (q - y) for p, q in points) / sum((p - x) ** 2 for p, _ in points)
