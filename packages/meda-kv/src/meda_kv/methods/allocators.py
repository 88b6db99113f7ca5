"""Allocators: how many tokens each layer keeps. All but ``manual`` and ``official`` keep an exact total.

============== ============================================================ ======================================
allocator      budgets                                                      source
============== ============================================================ ======================================
entropy        in proportion to ``softmax(E)``                              MEDA Eq. 7, exact by water-filling
uniform        equal                                                        H2O, SnapKV, LOOK-M, StreamingLLM
pyramid        falling with depth on a line                                 PyramidKV
profile        in proportion to shares measured before                      MEDA's shares, fixed (ours)
mass           one threshold over all layers' normalised scores             ours
manual         given token counts or shares                                 -
official       clamped shares, nothing given back                           MEDA's official code
============== ============================================================ ======================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.core.budgets import allocate, mass, pyramid, total_budget, uniform, weighted
from meda_kv.core.entropy import check_kind, check_rows
from meda_kv.core.official import official_budgets
from meda_kv.methods.base import Allocator, LayerStats, check_ratio
from meda_kv.methods.checks import check_above, check_share
from meda_kv.methods.tail import check_window, tail_size


def _total(stats: LayerStats, b: int, ratio: float) -> tuple[int, int, Tensor]:
    """The row's length, its total and the most that each layer can keep."""
    n = int(stats.n[b])
    caps = stats.available[:, b].cpu()
    return n, min(total_budget(ratio, stats.layers, n), int(caps.sum())), caps


@dataclass(frozen=True)
class EntropyAllocator(Allocator):
    """More for layers whose attention is spread more widely (MEDA Eq. 7).

    Attributes
    ----------
    kind : {"cross", "cross-causal", "self"}
        Which entropy.
    temperature : float
        > 0; 1 is the paper, larger values approach equal budgets.
    cap : float
        Most of a layer, as a share of the prompt in (0, 1].
    sample : int, optional
        Measure the entropy from a stratified sample of so many queries of each modality instead of all (ours).
    """

    kind: str = "cross"
    temperature: float = 1.0
    cap: float = 1.0
    sample: int | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_above("temperature", self.temperature, "1 is the paper's value")
        check_share("cap", self.cap, zero=False, remedy="1 is no limit")
        check_rows(self.sample)

    @property
    def entropy(self) -> str | None:
        """The kind."""
        return self.kind

    @property
    def entropy_sample(self) -> int | None:
        """The sample."""
        return self.sample

    def row(self, stats: LayerStats, b: int, ratio: float, floor: int) -> Tensor:
        """Return ``[L]`` budgets."""
        assert stats.entropy is not None
        n, total, caps = _total(stats, b, ratio)
        # A limit per layer below the mean could not hold the total.
        most = caps.clamp(max=max(int(self.cap * n), -(-total // stats.layers), floor))
        if int(most.sum()) < total:
            most = caps
        return allocate(stats.entropy[:, b], ratio, n, floor, self.temperature, most, total)


@dataclass(frozen=True)
class UniformAllocator(Allocator):
    """The same for every layer."""

    def row(self, stats: LayerStats, b: int, ratio: float, floor: int) -> Tensor:
        """Return ``[L]`` budgets."""
        n, total, caps = _total(stats, b, ratio)
        return uniform(stats.layers, ratio, n, floor, caps, total)


@dataclass(frozen=True)
class PyramidAllocator(Allocator):
    """More for lower layers, on PyramidKV's line.

    Attributes
    ----------
    window : int or float
        Tokens at the end that every layer keeps, as in the scorer.
    beta : float
        Slope of the line, > 0; 20 in the official code.
    most : float
        As in :class:`meda_kv.methods.WindowScorer`.
    """

    window: int | float = 32
    beta: float = 20.0
    most: float = 1 / 16

    def __post_init__(self) -> None:
        check_above("beta", self.beta, "PyramidKV uses 20")
        check_window(self.window, self.most)

    def row(self, stats: LayerStats, b: int, ratio: float, floor: int) -> Tensor:
        """Return ``[L]`` budgets."""
        n, total, caps = _total(stats, b, ratio)
        window = tail_size(self.window, n, self.most)
        return pyramid(stats.layers, ratio, n, window, self.beta, floor, caps, total)


@dataclass(frozen=True)
class ProfileAllocator(Allocator):
    """In proportion to fixed shares, so that budgets are known before the prompt is read (ours).

    Attributes
    ----------
    alphas : tuple of float
        One per layer, >= 0; only their proportions matter.
    """

    alphas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", tuple(float(a) for a in self.alphas))
        if not self.alphas or any(not math.isfinite(a) or a < 0 for a in self.alphas) or not any(self.alphas):
            raise UserError("shares are numbers >= 0, one per layer", where="budgets", given=list(self.alphas))

    def check_layers(self, layers: int) -> None:
        """Raise :class:`UserError` unless there is one share per layer."""
        _same_layers(len(self.alphas), layers)

    def row(self, stats: LayerStats, b: int, ratio: float, floor: int) -> Tensor:
        """Return ``[L]`` budgets."""
        _same_layers(len(self.alphas), stats.layers)
        n, total, caps = _total(stats, b, ratio)
        return weighted(self.alphas, ratio, n, floor, caps, total)


@dataclass(frozen=True)
class ManualAllocator(Allocator):
    """Exactly what is asked for; the ratio is not used, not even a ratio of 1.

    Attributes
    ----------
    tokens : tuple of int or float
        Per layer a count >= 1, or a share of the prompt in (0, 1] when every entry is a float.
    """

    tokens: tuple[int | float, ...] = ()
    uses_ratio: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        shares = bool(self.tokens) and all(isinstance(t, float) and 0.0 < t <= 1.0 for t in self.tokens)
        counts = bool(self.tokens) and all(
            isinstance(t, int) and not isinstance(t, bool) and t >= 1 for t in self.tokens
        )
        if not shares and not counts:
            raise UserError(
                "budgets are counts of tokens >= 1, or shares in (0, 1] written as floats, one per layer",
                where="budgets",
                given=list(self.tokens),
            )

    def check_layers(self, layers: int) -> None:
        """Raise :class:`UserError` unless there is one budget per layer."""
        _same_layers(len(self.tokens), layers)

    def budgets(self, stats: LayerStats, ratio: float, floor: int = 16) -> Tensor:
        """Return the counts for every row, at most what each layer holds, long ``[L, B]``."""
        check_ratio(ratio)
        _same_layers(len(self.tokens), stats.layers)
        columns = [
            torch.tensor([round(t * int(n)) if isinstance(t, float) else t for t in self.tokens]).clamp(min=1)
            for n in stats.n
        ]
        return torch.minimum(torch.stack(columns, 1), stats.available.cpu())


@dataclass(frozen=True)
class OfficialAllocator(Allocator):
    """The official MEDA code: ``2 int(n alpha / 2)`` with alpha clamped to [0.01, 1] and nothing given back.

    Attributes
    ----------
    kind : {"self", "cross", "cross-causal"}
        The code uses ``"self"``.
    """

    kind: str = "self"

    def __post_init__(self) -> None:
        check_kind(self.kind)

    @property
    def entropy(self) -> str | None:
        """The kind."""
        return self.kind

    def budgets(self, stats: LayerStats, ratio: float, floor: int = 16) -> Tensor:
        """Return long ``[L, B]``; the floor is not used and the total is not exact, as in that code."""
        check_ratio(ratio)
        if stats.entropy is None:
            raise RuntimeError(f"OfficialAllocator needs the {self.kind} entropy of every layer; none was measured")
        columns = [official_budgets(stats.entropy[:, b].cpu(), ratio, int(stats.n[b])) for b in range(stats.rows)]
        return torch.minimum(torch.stack(columns, 1), stats.available.cpu())


@dataclass(frozen=True)
class MassAllocator(Allocator):
    """One threshold over all layers (ours, not from a paper): the smallest kept normalised score is equal everywhere.

    Scores of a KV head are normalised to sum 1, sorted, and averaged over the heads rank by rank; a layer keeps its
    ranks above the threshold that makes the total exact. With accumulated attention this keeps as much attention mass
    as any split of the total can, beyond the floors.
    """

    wants_scores: ClassVar[bool] = True

    def row(self, stats: LayerStats, b: int, ratio: float, floor: int) -> Tensor:
        """Return ``[L]`` budgets."""
        assert stats.scores is not None
        n, total, caps = _total(stats, b, ratio)
        # The check for ratios too small for the floors, with its message.
        uniform(stats.layers, ratio, n, floor, caps, total)
        curves = []
        for index, scores in enumerate(stats.scores):
            valid = stats.valid[index] if stats.valid is not None else None
            curves.append(mass_curve(scores[b], None if valid is None else valid[b])[: int(caps[index])])
        return mass(curves, total, torch.minimum(torch.as_tensor(floor), caps))


def mass_curve(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the normalised, sorted and head-averaged scores of one layer and row.

    Parameters
    ----------
    scores : Tensor
        ``[Hkv, S]``. Scores below 0 (key norms) are shifted up so that the least is 0.
    valid : Tensor, optional
        bool ``[Hkv, S]``.

    Returns
    -------
    Tensor
        float64 ``[S]``, falling, summing to 1 (all zero only when there is no real slot).
    """
    s = scores.double()
    real = torch.ones_like(s, dtype=torch.bool) if valid is None else valid
    least = torch.where(real, s, torch.inf).amin(-1, keepdim=True).clamp(max=0.0)
    s = torch.where(real, s - least, 0.0)
    total = s.sum(-1, keepdim=True)
    even = real.double() / real.sum(-1, keepdim=True).clamp(min=1)
    s = torch.where(total > 0, s / total.clamp(min=torch.finfo(s.dtype).tiny), even)
    return s.sort(-1, descending=True).values.mean(0)


def _same_layers(given: int, layers: int) -> None:
    if given != layers:
        raise UserError(
            "one budget per full-attention layer is needed", where="budgets", given=given, remedy=f"give {layers}"
        )
