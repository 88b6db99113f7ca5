"""MEDA as a cache (arXiv 2502.17599), and any other arm by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from meda_kv.cache.cache import CompressedCache
from meda_kv.methods.base import Method

__all__ = ["MedaCache", "cache_for"]


class MedaCache(CompressedCache):
    """MEDA (arXiv 2502.17599) as a cache for ``model.generate``, every step of it adjustable.

    Parameters
    ----------
    model : nn.Module
        A transformers model, vision-language or text only.
    ratio : float
        Share of the prompt's slots to keep over all layers, in (0, 1]. The paper: 0.1 for images, 0.2 for video.
    preset : str
        ``"paper"`` or ``"official-code"``, the two differ in most of what follows. Everything below is the preset's
        where it is None; the values in brackets are the paper's.
    method : str or Method
        An arm of the family, such as ``"meda-no-merge"``.
    budgets : str, Path, dict or sequence, optional
        ``"entropy"`` (Eq. 7), ``"uniform"``, ``"pyramid"``, a profile, or one share or count per layer.
    entropy : str, optional
        ``"cross"`` (Eq. 4-6), ``"cross-causal"`` (ours: no key from the future) or ``"self"`` (official code).
    score_queries : str, optional
        Whose attention is accumulated: ``"all"`` (Eq. 8), ``"text"``, ``"window:W"`` or ``"sample:S"`` (ours).
    recent_share : float, optional
        Share of a layer's budget for its most recent tokens (0.75; official code 0.5).
    text_prior : str, optional
        ``"bias"`` (Eq. 9), ``"keep-all"`` (text beyond the budget too, as the official code), ``"off"``.
    merge : str, optional
        ``"average"`` (Eq. 11-12), ``"pivot"`` and ``"weighted"`` (LOOK-M, arXiv 2406.18139), ``"none"``. Merging keys
        of different rotary phases can hurt retrieval; ``"none"`` is the safe choice there.
    gate : str or float, optional
        Which dropped tokens are merged: ``"none"`` (all), ``"mean"``, or a least similarity.
    temperature : float, optional
        Of the softmax over layers (1).
    floor : int, optional
        Fewest tokens of a layer (16).
    compress_at, decode_budget, visual_mask, buffer_step, **options
        As in :class:`CompressedCache`.

    Examples
    --------
    >>> cache = MedaCache(model, ratio=0.2)                                            # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache, max_new_tokens=256)            # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float = 0.2,
        *,
        preset: str = "paper",
        method: str | Method = "meda",
        budgets: str | Path | dict[str, Any] | Sequence[float] | None = None,
        entropy: str | None = None,
        score_queries: str | None = None,
        recent_share: float | None = None,
        text_prior: str | None = None,
        merge: str | None = None,
        gate: str | float | None = None,
        temperature: float | None = None,
        floor: int | None = None,
        compress_at: str | None = None,
        decode_budget: int | None = None,
        visual_mask: Tensor | None = None,
        buffer_step: int = 256,
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {
            "entropy": entropy,
            "score_queries": score_queries,
            "recent_share": recent_share,
            "text_prior": text_prior,
            "merge": merge,
            "gate": gate,
            "temperature": temperature,
            "floor": floor,
        }
        super().__init__(
            model,
            method,
            ratio,
            preset=preset,
            compress_at=compress_at,
            budgets=budgets,
            decode_budget=decode_budget,
            visual_mask=visual_mask,
            buffer_step=buffer_step,
            **{name: value for name, value in given.items() if value is not None},
            **options,
        )


def cache_for(model: nn.Module, method: str | Method = "snapkv", ratio: float = 0.2, **options: Any) -> CompressedCache:
    """Return a cache of any arm: ``CompressedCache(model, method, ratio, **options)``.

    Parameters
    ----------
    model : nn.Module
        A transformers model.
    method : str or Method
        A name of ``METHODS`` or a method of your own.
    ratio : float
        Share of the prompt's slots to keep, in (0, 1].
    **options
        As in :class:`CompressedCache`.

    Returns
    -------
    CompressedCache

    Examples
    --------
    >>> cache = cache_for(model, "pyramidkv", ratio=0.1, beta=10)                      # doctest: +SKIP
    """
    return CompressedCache(model, method, ratio, **options)
