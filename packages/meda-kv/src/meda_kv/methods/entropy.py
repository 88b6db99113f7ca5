"""Measures one attention entropy per layer and row while the prompt is read (MEDA, arXiv 2502.17599, Eq. 4-6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from meda_kv.core.entropy import (
    check_kind,
    check_rows,
    cross_entropy_sums,
    finish_cross,
    self_entropy_rows,
    self_entropy_sums,
)
from meda_kv.core.tiles import TileSums
from meda_kv.methods.observing import Look, Observer, State


@dataclass(frozen=True)
class EntropyMeter(Observer):
    """One entropy per layer and row, in nats; kinds as in :func:`meda_kv.core.attention_entropy`.

    Attributes
    ----------
    kind : {"cross", "cross-causal", "self"}
        What is measured. ``"self"`` and ``"cross-causal"`` add up exactly over a prompt that is read in chunks.
        ``"cross"`` lets queries see later keys, so over chunks each query only sees the keys read so far; the state
        tensor ``"chunked"`` then says so.
    keep_queries : bool
        Makes ``"cross"`` exact over chunks too: queries are kept and the entropy is measured anew after each chunk,
        about ``c / 3`` times the work for ``c`` chunks.
    sample : int, optional
        Measures a stratified sample of so many queries of each modality and forward (kind ``"self"``: of each forward)
        instead of all (ours, not from a paper). Draws are the same in every layer; see
        :func:`meda_kv.core.attention_entropy`.
    """

    kind: str = "cross"
    keep_queries: bool = False
    sample: int | None = None
    totals: ClassVar[tuple[str, ...]] = ("entropy",)

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_rows(self.sample)
        object.__setattr__(self, "attention", self.kind == "self" and self.sample is None)

    def observe(self, state: State, look: Look) -> None:
        """Add this forward's queries."""
        batch = len(look.query)
        if self.sample is not None and self.kind == "self":
            self._observe_sample(state, look)
            return
        zero = torch.zeros(batch, dtype=torch.bool, device=look.query.device)
        if self.kind == "self":
            state["total"] = state.get("total", torch.zeros(batch, device=look.query.device)).clone()
            state["rows"] = state.get("rows", torch.zeros_like(state["total"])) + look.query_valid.sum(1)
            state.setdefault("chunked", zero)
            return
        again = "sums" in state
        query, visual, real = look.query, look.query_visual, look.query_valid
        offset = look.offset
        exact = self.kind == "cross-causal"
        if self.keep_queries and self.kind == "cross":
            exact = True
            if again:
                query = torch.cat([state["queries"], query], 2)
                visual = torch.cat([state["query_visual"], visual], 1)
                real = torch.cat([state["query_valid"], real], 1)
            state["queries"], state["query_visual"], state["query_valid"] = query, visual, real
            offset = look.key.shape[2] - query.shape[2]
        sums = cross_entropy_sums(
            query,
            look.key,
            visual,
            look.visual,
            causal=self.kind == "cross-causal",
            query_valid=real,
            valid=look.valid,
            visible=look.visible,
            offset=offset,
            scale=look.scale,
            softcap=look.softcap,
            block=look.block,
            rows=self.sample,
        )
        replace = not again or "queries" in state
        state["sums"] = sums if replace else state["sums"] + sums
        state["chunked"] = zero if exact or not again else ~zero

    def _observe_sample(self, state: State, look: Look) -> None:
        """Add a sample of this forward's queries (kind ``"self"``)."""
        sums = self_entropy_sums(
            look.query,
            look.key,
            self.sample or 1,
            query_valid=look.query_valid,
            valid=look.valid,
            visible=look.visible,
            offset=look.offset,
            scale=look.scale,
            softcap=look.softcap,
            sinks=look.sinks,
            block=look.block,
        )
        state["total"] = state.get("total", torch.zeros_like(sums[:, 0])) + sums[:, 0]
        state["rows"] = state.get("rows", torch.zeros_like(sums[:, 1])) + sums[:, 1]
        state.setdefault("chunked", torch.zeros(len(sums), dtype=torch.bool, device=sums.device))

    def rows(self, state: State, look: Look, start: int, stop: int, probs: Tensor) -> None:
        """Add the row entropies of a block (kind ``"self"``)."""
        state["total"] += self_entropy_rows(probs, look.query_valid[:, start:stop])

    def whole(self, state: State, look: Look, totals: TileSums) -> None:
        """Add the row entropies of this forward (kind ``"self"``)."""
        assert totals.entropy is not None
        state["total"] += totals.entropy

    def value(self, state: State) -> Tensor:
        """Return the entropy, float32 ``[B]``; NaN in a row of one modality only (cross kinds)."""
        if self.kind == "self":
            return state["total"].float() / state["rows"]
        return finish_cross(state["sums"]).float()
