"""How many tokens each layer keeps: an exact total, whatever the weights (MEDA, arXiv 2502.17599, Eq. 7 and 13-16).

The paper gives layer ``l`` the share ``alpha_l = softmax(E)_l * L * rho`` of its ``n`` tokens. A share can exceed 1 or
fall to 0, so the budgets here are the water-filling solution ``clamp(c * w_l, floor, cap)`` whose constant ``c`` makes
the sum equal ``round(rho * L * n)``, rounded by largest remainder: the total is exact, which the paper's formula and
the official code's clamp do not guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from vfm_core.errors import UserError

Limits = int | Sequence[int] | Tensor


def total_budget(ratio: float, layers: int, n: int) -> int:
    """Return ``round(ratio * layers * n)``, the tokens that all layers keep together."""
    if isinstance(ratio, bool) or not 0.0 < ratio <= 1.0:
        raise UserError(
            "the share of the cache to keep must lie in (0, 1]", where="ratio", given=ratio, remedy="use e.g. 0.2"
        )
    return round(ratio * layers * n)


def _per_layer(value: Limits, layers: int, name: str) -> Tensor:
    out = torch.as_tensor(value, dtype=torch.long).cpu()
    if out.dim() == 0:
        return out.expand(layers).clone()
    if out.shape != (layers,):
        raise UserError("one value per layer is needed", where=name, given=tuple(out.shape), remedy=f"give {layers}")
    return out.clone()


def water_fill(weights: Tensor, total: int, floors: Limits = 0, caps: Limits | None = None) -> Tensor:
    """Split ``total`` over layers in proportion to ``weights`` within floors and caps, exactly.

    Parameters
    ----------
    weights : Tensor
        ``[L]``, finite, >= 0. Layers without weight get their floor; when only such layers have room left they share
        what remains evenly.
    total : int
        Tokens to hand out; between the sum of the floors and the sum of the caps.
    floors, caps : int or sequence of int
        Bounds per layer; ``caps`` None means ``total``.

    Returns
    -------
    Tensor
        long ``[L]``, summing to ``total``: the one solution of the form ``clamp(c * weights, floors, caps)``, rounded
        by largest remainder (the lower layer first on a tie).

    Raises
    ------
    UserError
        When weights are negative or not finite, or the bounds leave no solution.
    """
    w = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    if w.dim() != 1 or len(w) == 0 or not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
        raise UserError("weights are finite numbers >= 0, one per layer", where="weights", given=w.tolist())
    return _fill(w.log(), total, floors, caps)


def _fill(log_weights: Tensor, total: int, floors: Limits, caps: Limits | None) -> Tensor:
    """Water-filling on log weights, so that weights far apart never underflow."""
    layers = len(log_weights)
    low = _per_layer(floors, layers, "floors")
    high = _per_layer(total if caps is None else caps, layers, "caps")
    if bool((low > high).any()) or not int(low.sum()) <= total <= int(high.sum()):
        raise UserError(
            "no split of the budget lies within its bounds",
            where="total",
            given=total,
            remedy=f"the floors sum to {int(low.sum())} and the caps to {int(high.sum())}",
        )
    share = torch.empty(layers, dtype=torch.float64)
    free = torch.ones(layers, dtype=torch.bool)
    left = float(total)
    while bool(free.any()):
        logs = log_weights[free]
        # All free weights are zero: what is left is shared evenly.
        parts = torch.softmax(logs, 0) if bool(torch.isfinite(logs).any()) else torch.full_like(logs, 1 / len(logs))
        want = torch.full_like(share, math.nan)
        want[free] = parts * left
        clamped = want.clamp(low.double(), high.double())
        excess = float((clamped - want)[free].sum())
        # Too much handed out: the floors that bind are final; too little: the caps are. (Freezing both kinds at once,
        # as a plain loop would, can freeze a layer that the other kind's change sets free again.)
        fixed = free & ((clamped > want) if excess > 0 else (clamped < want) if excess < 0 else free)
        share[fixed] = clamped[fixed]
        left -= float(clamped[fixed].sum())
        free &= ~fixed
    return _round_to(share, total, low, high)


def _round_to(share: Tensor, total: int, low: Tensor, high: Tensor) -> Tensor:
    """Largest remainder: floor everything, then one more for the largest fractional parts."""
    whole = torch.minimum(torch.maximum((share + 1e-9).floor().long(), low), high)
    rest = total - int(whole.sum())
    order = torch.argsort(share - whole, descending=rest > 0, stable=True)
    step = 1 if rest > 0 else -1
    while rest:
        before = rest
        for index in order.tolist():
            if rest and low[index] <= whole[index] + step <= high[index]:
                whole[index] += step
                rest -= step
        if rest == before:
            raise AssertionError(f"rounding cannot place {rest} tokens")
    return whole


def _floored(ratio: float, layers: int, n: int, floor: int, total: int) -> int:
    """Return the floor of every layer, or say which ratio would make room for it."""
    if floor < 0:
        raise UserError("too small", where="floor", given=floor, remedy="use 0 or more")
    least = min(floor, n)
    if least * layers > total:
        raise UserError(
            f"a ratio this small does not leave {floor} tokens for each of {layers} layers (prompt of {n} tokens)",
            where="ratio",
            given=ratio,
            remedy=f"the smallest legal ratio is {_smallest_ratio(least, layers, n):g}, or lower the floor",
        )
    return least


def _smallest_ratio(least: int, layers: int, n: int) -> float:
    exact = least / n
    shown = math.ceil(exact * 1e4) / 1e4
    return shown if shown <= 1.0 else exact


def allocate(
    entropy: Tensor | Sequence[float],
    ratio: float,
    n: int,
    floor: int = 16,
    temperature: float = 1.0,
    cap: Limits | None = None,
    total: int | None = None,
) -> Tensor:
    """Budgets in proportion to ``softmax(E / temperature)``: more for layers of higher entropy (MEDA Eq. 7).

    Parameters
    ----------
    entropy : Tensor
        ``[L]`` in nats, finite.
    ratio : float
        Share of the ``L * n`` prompt slots to keep, in (0, 1].
    n : int
        Prompt tokens, >= 1.
    floor : int
        Fewest tokens of a layer (``n`` where that is less).
    temperature : float
        > 0; 1 is the paper. Large values approach equal budgets.
    cap : int or sequence of int, optional
        Most tokens of a layer, ``n`` by default.
    total : int, optional
        Instead of ``round(ratio * L * n)``.

    Returns
    -------
    Tensor
        long ``[L]``, summing exactly to the total.

    Raises
    ------
    UserError
        For a ratio outside (0, 1] or too small for the floors (names ratio, n and the smallest legal ratio), a
        temperature <= 0, or an entropy that is not finite.
    """
    e = torch.as_tensor(entropy).detach().to("cpu", torch.float64)
    if e.dim() != 1 or len(e) == 0 or not bool(torch.isfinite(e).all()):
        raise UserError("one finite entropy per layer is needed", where="entropy", given=e.tolist())
    if not temperature > 0 or not math.isfinite(temperature):
        raise UserError("must be above 0", where="temperature", given=temperature, remedy="1 is the paper's value")
    tokens = total_budget(ratio, len(e), _length(n)) if total is None else total
    least = torch.as_tensor(_floored(ratio, len(e), n, floor, tokens))
    caps = _per_layer(n if cap is None else cap, len(e), "cap")
    return _fill(torch.log_softmax(e / temperature, 0), tokens, torch.minimum(least, caps), caps)


def uniform(
    layers: int, ratio: float, n: int, floor: int = 16, cap: Limits | None = None, total: int | None = None
) -> Tensor:
    """Equal budgets for all layers: long ``[L]`` with the exact total; errors and options as :func:`allocate`."""
    return allocate(torch.zeros(layers), ratio, n, floor, 1.0, cap, total)


def weighted(
    weights: Tensor | Sequence[float],
    ratio: float,
    n: int,
    floor: int = 16,
    cap: Limits | None = None,
    total: int | None = None,
) -> Tensor:
    """Budgets in proportion to given weights (a profile's alphas), long ``[L]`` with the exact total."""
    w = torch.as_tensor(weights, dtype=torch.float64)
    tokens = total_budget(ratio, len(w), _length(n)) if total is None else total
    least = torch.as_tensor(_floored(ratio, len(w), n, floor, tokens))
    caps = _per_layer(n if cap is None else cap, len(w), "cap")
    return water_fill(w, tokens, torch.minimum(least, caps), caps)


def pyramid_line(layers: int, capacity: float, n: int, window: int, beta: float = 20.0) -> Tensor:
    """PyramidKV's line of kept prefix tokens, before rounding (KVCache-Factory), float64 ``[L]``.

    With C the mean kept tokens of a layer and W the window: ``min = (C - W) / beta``, ``max = 2 (C - W) - min``; if
    ``max >= n - W`` then ``max = n - W`` and ``min = 2 (C - W) - max``; layer ``l`` keeps
    ``max - l (max - min) / (L - 1)`` besides its window. ``n < C`` keeps ``n - W``; ``n < 2 (C - W)`` is uniform.

    Parameters
    ----------
    layers : int
        L.
    capacity : float
        C, with ``C > W``.
    n : int
        Prompt tokens.
    window : int
        W, always kept.
    beta : float
        Slope, > 0 (20 in the official code).
    """
    if beta <= 0:
        raise UserError("must be above 0", where="beta", given=beta, remedy="PyramidKV uses 20")
    inner = capacity - window
    if n < capacity:
        return torch.full((layers,), float(n - window), dtype=torch.float64)
    if n < 2 * inner or layers == 1:
        return torch.full((layers,), inner, dtype=torch.float64)
    least = inner / beta
    most = 2 * inner - least
    if most >= n - window:
        most = float(n - window)
        least = 2 * inner - most
    return most - torch.arange(layers, dtype=torch.float64) * (most - least) / (layers - 1)


def pyramid(
    layers: int,
    ratio: float,
    n: int,
    window: int = 32,
    beta: float = 20.0,
    floor: int = 16,
    cap: Limits | None = None,
    total: int | None = None,
) -> Tensor:
    """PyramidKV budgets: lower layers keep more, on the official line, with an exact total.

    Parameters
    ----------
    layers, ratio, n, floor, cap, total
        As :func:`allocate`.
    window : int
        Tokens at the end that every layer keeps; the floor is at least this. When the mean budget is not above the
        window (the official code refuses that), the window counts as half the mean budget (ours).
    beta : float
        Slope of the line.

    Returns
    -------
    Tensor
        long ``[L]``, the window included, summing exactly to the total.
    """
    tokens = total_budget(ratio, layers, _length(n)) if total is None else total
    least = _floored(ratio, layers, n, floor, tokens)
    mean = tokens / layers
    inside = window if window < mean else int(mean / 2)
    caps = _per_layer(n if cap is None else cap, layers, "cap")
    line = pyramid_line(layers, mean, n, inside, beta) + inside
    floors = torch.minimum(torch.as_tensor(max(least, min(inside, n))), caps)
    return water_fill(line, tokens, floors, caps)


def mass(curves: Sequence[Tensor], total: int, floors: Limits = 0) -> Tensor:
    """One threshold over all layers (ours, not from a paper): keep the ``total`` largest normalised scores anywhere.

    Parameters
    ----------
    curves : sequence of Tensor
        Per layer ``[n_l]``: normalised scores in descending order. Entry ``j`` is what keeping a ``j + 1``-th token
        of that layer is worth.
    total : int
        Tokens to keep; between the sum of the floors and that of the lengths.
    floors : int or sequence of int
        Fewest tokens of each layer.

    Returns
    -------
    Tensor
        long ``[L]``, summing to ``total``. Beyond the floors the smallest kept score of any layer is at least the
        largest dropped score of any layer; equal scores go to the earlier rank, then to the lower layer.
    """
    lengths = torch.tensor([len(c) for c in curves])
    low = torch.minimum(_per_layer(floors, len(curves), "floors"), lengths)
    if not int(low.sum()) <= total <= int(lengths.sum()):
        raise UserError(
            "no split of the budget lies within its bounds",
            where="total",
            given=total,
            remedy=f"the floors sum to {int(low.sum())} and the layers hold {int(lengths.sum())}",
        )
    open_ranks = [torch.arange(int(low[i]), int(lengths[i])) for i in range(len(curves))]
    ranks = torch.cat(open_ranks)
    layer = torch.repeat_interleave(torch.arange(len(curves)), lengths - low)
    worth = torch.cat([c.detach().cpu().double()[r] for c, r in zip(curves, open_ranks, strict=True)])
    by_rank = torch.argsort(ranks, stable=True)
    order = by_rank[torch.argsort(worth[by_rank], descending=True, stable=True)]
    return low + torch.bincount(layer[order[: total - int(low.sum())]], minlength=len(curves))


def _length(n: int) -> int:
    if n < 1:
        raise UserError("a prompt has at least one token", where="n", given=n)
    return int(n)
