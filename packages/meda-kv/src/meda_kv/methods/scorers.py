"""Scorers: which tokens of a layer matter.

==================== ===================================================== =========================================
scorer               score of a slot                                       source
==================== ===================================================== =========================================
AccumulatedScorer    attention it drew from all (or some) queries          H2O; LOOK-M; MEDA Eq. 8; RoCo (mean)
WindowScorer         attention from the last W queries, pooled             SnapKV; PyramidKV
RecencyScorer        how late it came                                      StreamingLLM
MixedScorer          window and all queries, both, in equal parts          ours
KeyNormScorer        minus the norm of its key                             the L2-norm strategy (sanity baseline)
RandomScorer         a random number                                       sanity baseline
==================== ===================================================== =========================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.core.blocks import group_heads
from meda_kv.core.scores import column_sums, finish_window, parse_queries, pick_queries, picked_sums, pool_scores
from meda_kv.core.tiles import TileSums
from meda_kv.methods.base import Scorer
from meda_kv.methods.checks import check_count, check_name
from meda_kv.methods.observing import Look, State, grow
from meda_kv.methods.tail import TAIL_SLOTS, check_window, remember_tail, tail_size, tail_sums

GROUPS: tuple[str, ...] = ("mean", "max", "sum")
REDUCTIONS: tuple[str, ...] = ("sum", "mean", "mean-all")


def _check_group(group: str) -> None:
    check_name("group", group, GROUPS, "unknown way to join query heads")


def _add(state: State, name: str, sums: Tensor, kv_heads: int, group: str) -> None:
    """Add ``[B, H, keys]`` to the first slots of a state tensor that :func:`grow` has made long enough."""
    if group == "max":  # the maximum is taken over finished sums, so the query heads stay apart until then
        state[name][:, :, : sums.shape[2]] += sums.unflatten(1, (kv_heads, -1)).transpose(2, 3)
    else:
        state[name][:, :, : sums.shape[2]] += group_heads(sums, kv_heads, group)


@dataclass(frozen=True)
class AccumulatedScorer(Scorer):
    """Attention that a slot drew, summed over queries (H2O; ``A_s`` of MEDA Eq. 8) or averaged (RoCo).

    Attributes
    ----------
    queries : str
        ``"all"`` (the papers), ``"text"``, ``"window:W"``, or ``"sample:S"`` (ours: a stratified sample of ``S``
        queries of each forward, always with the last 32, unbiased for ``"all"``).
    group : {"mean", "max", "sum"}
        How the query heads of a KV head are joined.
    reduction : {"sum", "mean", "mean-all"}
        ``"mean"`` divides by the number of queries that could see the slot (RoCo). ``"mean-all"`` divides by all
        queries of the forward, as ``mean_h2o`` of the LOOK-M and MEDA code does, which ranks a prompt like the sum.
    seed : int
        For ``"sample:S"``.
    """

    queries: str = "all"
    group: str = "mean"
    reduction: str = "sum"
    seed: int = 0
    slots: ClassVar[tuple[str, ...]] = ("sums", "counts", *TAIL_SLOTS)
    totals: ClassVar[tuple[str, ...]] = ("columns",)

    def __post_init__(self) -> None:
        kind, _ = parse_queries(self.queries)
        _check_group(self.group)
        check_name("reduction", self.reduction, REDUCTIONS, "unknown reduction")
        check_count("seed", self.seed)
        if self.reduction != "sum" and kind not in ("all", "text"):
            raise UserError(
                "a mean over queries is defined for queries all and text",
                where="reduction",
                given=f"{self.reduction} with queries={self.queries}",
                remedy="use reduction=sum",
            )
        object.__setattr__(self, "attention", kind == "all")

    def observe(self, state: State, look: Look) -> None:
        """Make room for the new slots; take in picked queries (all but ``"all"``)."""
        kind, size = parse_queries(self.queries)
        if kind == "window":
            remember_tail(state, look, size)
            return
        kv_heads = look.key.shape[1]
        extra = (look.query.shape[1] // kv_heads,) if self.group == "max" else ()
        grow(state, "sums", look.key, extra=extra)
        if self.reduction == "mean":
            wanted = look.query_valid & ~look.query_visual if kind == "text" else look.query_valid
            counts = grow(state, "counts", look.key)
            counts += _seen_by(look, wanted)
        if kind == "all":
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + look.layer)
        rows, weights = pick_queries(self.queries, look.query_valid, look.query_visual, generator)
        sums = picked_sums(
            look.query,
            look.key,
            rows,
            weights,
            visible=look.visible,
            valid=look.valid,
            scale=look.scale,
            offset=look.offset,
            softcap=look.softcap,
            sinks=look.sinks,
            block=look.block,
        ).float()
        if self.reduction == "mean-all":
            sums = sums / weights.sum(1).clamp(min=1)[:, None, None]
        _add(state, "sums", sums, kv_heads, self.group)

    def rows(self, state: State, look: Look, start: int, stop: int, probs: Tensor) -> None:
        """Add the column sums of a block (queries ``"all"``)."""
        weights = look.query_valid[:, start:stop].to(probs.dtype)
        if self.reduction == "mean-all":
            weights = weights / look.query_valid.sum(1, keepdim=True).clamp(min=1)
        _add(state, "sums", column_sums(probs, weights).float(), look.key.shape[1], self.group)

    def whole(self, state: State, look: Look, totals: TileSums) -> None:
        """Add the column sums of this forward (queries ``"all"``)."""
        assert totals.columns is not None
        sums = totals.columns.float()
        if self.reduction == "mean-all":
            sums = sums / look.query_valid.sum(1).clamp(min=1)[:, None, None]
        _add(state, "sums", sums, look.key.shape[1], self.group)

    def scores(self, state: State, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """Return the sums or means."""
        kind, size = parse_queries(self.queries)
        if kind == "window":
            sums, _ = tail_sums(state, key, valid, lambda n: size)
            return group_heads(sums, key.shape[1], self.group).float()
        if "sums" not in state:
            raise RuntimeError("no attention was observed: the prompt was not read through this cache")
        sums = grow(state, "sums", key)
        sums = sums.amax(-1) if self.group == "max" else sums
        if self.reduction == "mean":
            sums = sums / grow(state, "counts", key).clamp(min=1)
        return sums


def _seen_by(look: Look, wanted: Tensor) -> Tensor:
    """How many of the wanted queries could see each slot, float32 ``[B, 1 or Hkv, S]``."""
    if look.visible is not None:
        seen = torch.matmul(wanted[:, None, None].float(), look.visible.float())[:, :, 0]
        return seen if seen.shape[1] == 1 else group_heads(seen, look.key.shape[1], "mean")
    later = wanted.float().flip(1).cumsum(1).flip(1)
    return torch.cat([later[:, :1].expand(-1, look.offset), later], 1)[:, None]


@dataclass(frozen=True)
class WindowScorer(Scorer):
    """Attention of the prompt's last queries to what came before, summed and pooled (SnapKV).

    Attributes
    ----------
    window : int or float
        Queries at the end: a count, or a share of the prompt when a float (the SnapKV arm of MEDA's code uses 0.1).
    kernel : int
        Odd pooling kernel; 1 does not pool.
    pool : {"avg", "max"}
        Official: 5 and avg by default, 7 and max in its LongBench runs.
    group : {"mean", "max", "sum"}
        How the query heads of a KV head are joined.
    most : float
        The window is at most this share of the prompt (ours): below 512 tokens a window of 32 would leave a small
        budget no room for anything else. The original never meets this case, since it leaves such prompts whole; 1 is
        no limit, as in ``preset="official-code"``.
    """

    window: int | float = 32
    kernel: int = 5
    pool: str = "avg"
    group: str = "mean"
    most: float = 1 / 16
    slots: ClassVar[tuple[str, ...]] = TAIL_SLOTS

    def __post_init__(self) -> None:
        check_window(self.window, self.most)
        _check_group(self.group)
        check_count("kernel", self.kernel, 1)
        pool_scores(torch.zeros(1, 1, 1), self.kernel, self.pool)

    def least_recent(self, n: int) -> int:
        """Return the window, whose own tokens are always kept."""
        return tail_size(self.window, n, self.most)

    def observe(self, state: State, look: Look) -> None:
        """Keep the last queries."""
        remember_tail(state, look, self.window)

    def scores(self, state: State, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """Return the pooled sums; the window's own slots hold the best score of the prefix."""
        sums, own = tail_sums(state, key, valid, self.least_recent)
        return finish_window(group_heads(sums, key.shape[1], self.group).float(), own, self.kernel, self.pool, valid)


@dataclass(frozen=True)
class MixedScorer(WindowScorer):
    """What the last queries attend to and what all queries attend to, in equal parts (ours, not from a paper).

    The window knows the question at hand, the sum over all queries what other questions may need. Each is divided by
    its own sum over the row's slots before they are added.

    Attributes
    ----------
    queries : str
        Of the second part, as in `AccumulatedScorer`; not ``"window:W"``.
    seed : int
        For ``"sample:S"``.
    """

    queries: str = "sample:256"
    seed: int = 0
    slots: ClassVar[tuple[str, ...]] = (*TAIL_SLOTS, "sums", "counts")
    totals: ClassVar[tuple[str, ...]] = ("columns",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("seed", self.seed)
        if parse_queries(self.queries)[0] == "window":
            raise UserError("the window is there already", where="queries", given=self.queries, remedy="use all")
        object.__setattr__(self, "attention", self._all.attention)

    @property
    def _all(self) -> AccumulatedScorer:
        return AccumulatedScorer(self.queries, self.group, seed=self.seed)

    def observe(self, state: State, look: Look) -> None:
        """Keep the last queries, take in the others."""
        super().observe(state, look)
        self._all.observe(state, look)

    def rows(self, state: State, look: Look, start: int, stop: int, probs: Tensor) -> None:
        """Add the column sums of a block."""
        self._all.rows(state, look, start, stop, probs)

    def whole(self, state: State, look: Look, totals: TileSums) -> None:
        """Add the column sums of this forward."""
        self._all.whole(state, look, totals)

    def scores(self, state: State, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """Return the sum of both, each normalised."""
        parts = (super().scores(state, key, value, valid), self._all.scores(state, key, value, valid))
        if valid is not None:
            parts = (parts[0].masked_fill(~valid, 0), parts[1].masked_fill(~valid, 0))
        return sum((part / part.sum(-1, keepdim=True).clamp(min=1e-30) for part in parts), torch.zeros_like(parts[0]))


@dataclass(frozen=True)
class RecencyScorer(Scorer):
    """The later the better; with sink tokens this is StreamingLLM."""

    def scores(self, state: State, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """Return the slot number."""
        return torch.arange(key.shape[2], dtype=torch.float32, device=key.device).expand(key.shape[:3])


@dataclass(frozen=True)
class KeyNormScorer(Scorer):
    """Keys of small norm draw attention in many models: score ``-||k||`` (a sanity baseline)."""

    def scores(self, state: State, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """Return minus the norm of the keys."""
        return -torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32)


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """A random number per token, layer and KV head (a sanity baseline).

    The number is a hash of seed, layer, head and the token's rank among the row's real tokens: it depends neither on
    batch mates nor on how the prompt was cut into chunks, and no generator is touched.

    Attributes
    ----------
    seed : int
        Another seed, other numbers.
    """

    seed: int = 0
    slots: ClassVar[tuple[str, ...]] = ("draw",)

    def __post_init__(self) -> None:
        check_count("seed", self.seed)

    def observe(self, state: State, look: Look) -> None:
        """Draw for the new tokens."""
        draw = grow(state, "draw", look.key)
        before = state.get("seen", torch.zeros(len(look.query), dtype=torch.long, device=look.query.device))
        rank = before[:, None] + look.query_valid.cumsum(1)
        head = torch.arange(look.key.shape[1], device=look.query.device)[None, :, None]
        draw[:, :, look.offset :] = hash_uniform(rank[:, None], head, look.layer, self.seed)
        state["seen"] = before + look.query_valid.sum(1)

    def scores(self, state: State, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """Return the numbers drawn."""
        return grow(state, "draw", key)


def hash_uniform(rank: Tensor, head: Tensor, layer: int, seed: int) -> Tensor:
    """Return float32 numbers in [0, 1) from a 64-bit mix of four integers (broadcast), the same on every device."""
    start = (layer * 0x5851F42D4C957F2D + seed * 0x14057B7EF767814F) & (2**62 - 1)
    x = rank.long() * 0x9E3779B97F4A7C1 + head.long() * 0x2545F4914F6CDD1 + start
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        x = (x ^ ((x >> 29) & 0x7FFFFFFFF)) * factor
    return ((x >> 24) & 0xFFFFFF).float() / 2**24
