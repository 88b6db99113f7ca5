"""The four small interfaces a compression method is made of, and what passes between them and the cache.

A method is a :class:`Scorer` (which tokens matter), an :class:`Allocator` (how many each layer keeps), optionally a
:class:`Merger` (what becomes of the dropped ones), and a few numbers; :class:`Method` holds them together. Scorers and
entropy meters are observers: they see the post-RoPE queries and keys of every layer while the prompt is read and keep
what they need in a ``state`` dictionary of tensors, one per layer. They are frozen dataclasses, so equal settings
compare equal and arms that share an observer share its work and its state.

A method of one's own takes a subclass of one of these and a name for it:

>>> @dataclass(frozen=True)
... class ValueNorm(Scorer):
...     def scores(self, state, key, value, valid):
...         return value.float().norm(dim=-1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.core.selection import TEXT_PRIORS
from meda_kv.methods.checks import check_count, check_flag, check_name, check_share, is_count, is_number
from meda_kv.methods.observing import Look, Observer, State, grow, observe_all, scan_look


@dataclass(frozen=True)
class Scorer(Observer):
    """Gives every slot of a layer a score; higher scores are kept."""

    def scores(self, state: State, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """Return the scores of the slots now held.

        Parameters
        ----------
        state : dict
            What was observed; its slot tensors are aligned with ``key``.
        key, value : Tensor
            ``[B, Hkv, S, D]``.
        valid : Tensor or None
            bool ``[B, Hkv, S]``; None means all.

        Returns
        -------
        Tensor
            float32 ``[B, Hkv, S]`` without NaN. What stands at invalid slots does not matter.
        """
        raise NotImplementedError(f"{type(self).__name__} must define scores(state, key, value, valid)")

    def least_recent(self, n: int) -> int:
        """Return how many of the last tokens of an ``n``-token prompt this scorer needs kept (its own window)."""
        return 0


@dataclass(frozen=True)
class LayerStats:
    """What an allocator may look at.

    Attributes
    ----------
    n : Tensor
        long ``[B]``: real tokens of each row.
    available : Tensor
        long ``[L, B]``: real slots that each layer still holds (``n`` before the first compression).
    entropy : Tensor or None
        float ``[L, B]`` in nats; None unless the allocator names a kind in ``entropy``.
    scores : list of Tensor or None
        Per layer float32 ``[B, Hkv, S]``; None unless ``wants_scores``.
    valid : list of (Tensor or None) or None
        Per layer bool ``[B, Hkv, S]``, aligned with ``scores``.
    """

    n: Tensor
    available: Tensor
    entropy: Tensor | None = None
    scores: Sequence[Tensor] | None = None
    valid: Sequence[Tensor | None] | None = None

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.available.shape[0])

    @property
    def rows(self) -> int:
        """Number of rows of the batch."""
        return int(self.available.shape[1])


@dataclass(frozen=True)
class Allocator:
    """Splits the token budget of the whole model over its layers.

    A subclass defines :meth:`row`, one row of the batch at a time, so that rows never depend on their batch mates.

    Attributes
    ----------
    wants_scores : bool
        True when :class:`LayerStats` must carry the scores.
    uses_ratio : bool
        False when the budgets are what they are at every ratio, 1 included.
    entropy : str or None
        Kind of entropy needed (``"cross"``, ``"cross-causal"``, ``"self"``), None when none.
    entropy_sample : int or None
        Queries of each modality that the entropy is measured from, None for all.
    """

    wants_scores: ClassVar[bool] = False
    uses_ratio: ClassVar[bool] = True

    @property
    def entropy(self) -> str | None:
        """Kind of entropy that :class:`LayerStats` must carry, None when none."""
        return None

    @property
    def entropy_sample(self) -> int | None:
        """Queries of each modality that the entropy is measured from, None for all."""
        return None

    def check_layers(self, layers: int) -> None:
        """Raise :class:`UserError` unless the allocator fits a model of so many compressed layers."""

    def row(self, stats: LayerStats, b: int, ratio: float, floor: int) -> Tensor:
        """Return the budgets of row ``b``, long ``[L]``."""
        raise NotImplementedError(f"{type(self).__name__} must define row(stats, b, ratio, floor)")

    def budgets(self, stats: LayerStats, ratio: float, floor: int = 16) -> Tensor:
        """Return how many slots each layer keeps, for every row.

        Parameters
        ----------
        stats : LayerStats
            Lengths, and what the allocator asked for.
        ratio : float
            Share of the prompt's slots to keep over all layers, in (0, 1].
        floor : int
            Fewest slots of a layer, >= 1.

        Returns
        -------
        Tensor
            long ``[L, B]``. The sum over layers is ``round(ratio * L * n)`` for every row, or everything available
            where that is less; no entry exceeds what is available. A row with ``n <= floor`` is left whole.

        Raises
        ------
        UserError
            When ratio is not in (0, 1] or the floors alone exceed the budget; names the smallest legal ratio.
        """
        check_ratio(ratio)
        if self.entropy is not None and stats.entropy is None:
            raise RuntimeError(
                f"{type(self).__name__} needs the {self.entropy} entropy of every layer; none was measured"
            )
        if self.wants_scores and stats.scores is None:
            raise RuntimeError(f"{type(self).__name__} needs the scores of every layer; none were given")
        columns = []
        for b in range(stats.rows):
            held = stats.available[:, b].cpu()
            if int(stats.n[b]) <= floor or ratio == 1.0:
                columns.append(held.clone())
            else:
                columns.append(torch.minimum(self.row(stats, b, ratio, floor).cpu(), held))
        return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Merger:
    """Moves what the dropped slots held into the kept ones.

    Attributes
    ----------
    wants_scores : bool
        True when :meth:`merge` must be given the scores of the slots.
    """

    wants_scores: ClassVar[bool] = False

    def merge(
        self, key: Tensor, value: Tensor, keep: Tensor, valid: Tensor | None, scores: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the kept slots after merging.

        Parameters
        ----------
        key, value : Tensor
            ``[B, Hkv, S, D]``.
        keep : Tensor
            long ``[B, Hkv, S']``, ascending; -1 marks padding on the right, which comes out zero.
        valid : Tensor or None
            bool ``[B, Hkv, S]``.
        scores : Tensor or None
            float32 ``[B, Hkv, S]``, given when ``wants_scores``.

        Returns
        -------
        (Tensor, Tensor)
            ``[B, Hkv, S', D]`` each, in new storage and the dtype of the input.
        """
        raise NotImplementedError(f"{type(self).__name__} must define merge(key, value, keep, valid, scores)")


__all__ = [
    "MOMENTS",
    "TEXT_PRIORS",
    "Allocator",
    "LayerStats",
    "Look",
    "Merger",
    "Method",
    "Observer",
    "Scorer",
    "State",
    "check_ratio",
    "grow",
    "observe_all",
    "scan_look",
]

MOMENTS: tuple[str, ...] = ("decode", "prefill", "layer", "first-step")


@dataclass(frozen=True)
class Method:
    """One arm: a scorer, an allocator, a merger and the numbers of the selection.

    Attributes
    ----------
    name, summary, source : str
        How it is called, what it does in one line, where it comes from.
    scorer : Scorer or None
        None keeps everything (the full cache).
    allocator : Allocator or None
        Budgets over layers; None only without a scorer.
    merger : Merger or None
        None drops without merging.
    recent_share : float
        Share of each layer's budget that goes to its most recent tokens, in [0, 1].
    recent : int, float or None
        Recent tokens instead of ``recent_share``: a count, or a share of the prompt length when a float.
    sink : int
        First tokens that are always kept.
    text_prior : str
        ``"bias"`` ranks every text token above every visual one inside the budget, ``"keep-all"`` keeps all text even
        beyond it, ``"official"`` also widens the recent window as the official MEDA code does, ``"off"`` ignores the
        modality.
    per_head : bool
        Whether each KV head selects its own tokens.
    quota : float
        Share of the budget left after sink and recent tokens that is dealt out in turns over the pictures (ours).
    quota_block : int
        A picture of more tokens counts as several of this size.
    floor : int
        Fewest tokens of a layer.
    compress_at : str
        ``"decode"`` at the start of the first one-token forward, ``"prefill"`` at the end of the first forward,
        ``"layer"`` inside each layer (needs budgets known before), ``"first-step"`` after the first one-token forward
        (official MEDA code: its scores contain the first generated token).
    rerotate : bool
        Whether keys are re-rotated to positions without gaps (plain RoPE only; not together with a merger).
    """

    name: str
    summary: str = ""
    source: str = ""
    scorer: Scorer | None = None
    allocator: Allocator | None = None
    merger: Merger | None = None
    recent_share: float = 0.0
    recent: int | float | None = None
    sink: int = 0
    text_prior: str = "off"
    per_head: bool = True
    quota: float = 0.0
    quota_block: int = 64
    floor: int = 16
    compress_at: str = "decode"
    rerotate: bool = False
    tags: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_share("recent_share", self.recent_share)
        count = is_count(self.recent) and self.recent >= 0  # type: ignore[operator]
        share = is_number(self.recent) and not is_count(self.recent) and 0.0 <= self.recent <= 1.0  # type: ignore[operator]
        if self.recent is not None and not count and not share:
            raise UserError(
                "recent is a count of tokens >= 0 or a share of the prompt in [0, 1]",
                where="recent",
                given=repr(self.recent),
                remedy="use e.g. 32 or 0.1",
            )
        check_share("quota", self.quota, remedy="use e.g. 0.9")
        for where, value, least in (
            ("sink", self.sink, 0),
            ("floor", self.floor, 1),
            ("quota_block", self.quota_block, 1),
        ):
            check_count(where, value, least)
        check_flag("per_head", self.per_head)
        check_flag("rerotate", self.rerotate)
        check_name("text_prior", self.text_prior, TEXT_PRIORS)
        check_name("compress_at", self.compress_at, MOMENTS)
        for where, part, kind in (
            ("scorer", self.scorer, Scorer),
            ("allocator", self.allocator, Allocator),
            ("merger", self.merger, Merger),
        ):
            if part is not None and not isinstance(part, kind):
                remedy = f"give a {kind.__name__}, or None"
                raise UserError("not a part of a method", where=where, given=repr(part), remedy=remedy)
        if self.rerotate and self.merger is not None:
            raise UserError(
                "keys that are merged have no single position to be rotated to",
                where="rerotate",
                given=f"rerotate=True with {type(self.merger).__name__}",
                remedy='add merge="none", or leave rerotate out',
            )
        if (self.scorer is None) != (self.allocator is None):
            raise UserError("a method has a scorer and an allocator, or neither", where="method", given=self.name)

    @property
    def least(self) -> int:
        """Fewest tokens of a layer after the sink tokens are counted: ``max(floor, sink + 1)``."""
        return max(self.floor, self.sink + 1)

    def recent_count(self, n: int) -> int | None:
        """Return the fixed number of recent tokens for an ``n``-token prompt, None when the budget decides.

        It is never below the window that the scorer looks from, whose tokens are always kept (SnapKV).
        """
        window = self.scorer.least_recent(n) if self.scorer is not None else 0
        if self.recent is None:
            return window or None
        count = int(self.recent * n) if isinstance(self.recent, float) else self.recent
        return max(count, window)


def check_ratio(ratio: float) -> float:
    """Return ``ratio`` when it is a number in (0, 1], else raise :class:`UserError`."""
    if not is_number(ratio) or not 0.0 < ratio <= 1.0:
        raise UserError(
            "the share of the cache to keep must lie in (0, 1]", where="ratio", given=repr(ratio), remedy="use e.g. 0.2"
        )
    return float(ratio)
