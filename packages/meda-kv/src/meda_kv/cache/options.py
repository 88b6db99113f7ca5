"""Reading and checking what a cache is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.methods.allocators import ProfileAllocator
from meda_kv.methods.base import MOMENTS, Allocator, Method, check_ratio
from meda_kv.methods.checks import check_count, check_flag, check_name
from meda_kv.methods.registry import BUDGETS, resolve_method

__all__ = ["Options", "check_visual_mask", "read_options"]

_REFUSED = ("offloading", "cache_implementation", "quantized", "nbits", "max_cache_len", "backend")


@dataclass(frozen=True)
class Options:
    """What a cache was asked for, checked; names and meaning as in :class:`meda_kv.cache.CompressedCache`."""

    method: Method
    ratio: float
    compress_at: str
    preset: str
    decode_budget: int | None
    decode_slack: int
    buffer_step: int
    record: tuple[Method, ...]
    keep_queries: bool
    block: int | None
    seed: int

    def variant(self, method: str | Method | None, ratio: float | None) -> Options:
        """Return the options of a fork: another method and ratio, nothing recorded."""
        share = self.ratio if ratio is None else check_ratio(ratio)
        if method is None:
            return replace(self, ratio=share, record=())
        if isinstance(method, str):
            known = {one.name: one for one in (*reversed(self.record), self.method)}
            method = known.get(method) or resolve_method(method, preset=self.preset)
        method = _seeded(method, self.seed)
        moment = self.compress_at if method == self.method else method.compress_at
        return replace(self, method=method, ratio=share, compress_at=moment, record=())


def read_options(
    model: Any,
    layers: int,
    *,
    method: str | Method,
    ratio: float,
    preset: str,
    compress_at: str | None,
    budgets: str | Path | Mapping[str, Any] | Sequence[float] | None,
    decode_budget: int | None,
    decode_slack: int,
    buffer_step: int,
    record: Sequence[str | Method],
    keep_queries: bool,
    block: int | None,
    seed: int,
    overrides: dict[str, Any],
) -> Options:
    """Check everything a cache is asked for; see :class:`meda_kv.cache.CompressedCache`.

    Parameters
    ----------
    model : nn.Module
        A profile must fit it.
    layers : int
        L, its full-attention layers; budgets given one by one must be as many.
    method, ratio, ... : as in CompressedCache
    overrides : dict
        Options of the method.

    Raises
    ------
    UserError
        Names the field, the value and the legal range.
    """
    for name in _REFUSED:
        if name in overrides:
            raise UserError(
                "static, quantised and offloaded caches cannot be compressed",
                where=name,
                given=overrides[name],
                remedy="leave it out: a compressed cache grows by itself and stays on the model's device",
            )
    share = check_ratio(ratio)
    check_count("buffer_step", buffer_step, 1)
    check_count("decode_slack", decode_slack, 1)
    check_count("seed", seed)
    check_flag("keep_queries", keep_queries)
    if block is not None:
        check_count("block", block, 1)
    if isinstance(record, (str, Method)) or not isinstance(record, Sequence):
        raise UserError("a list of methods is needed", where="record", given=repr(record), remedy='use e.g. ["h2o"]')
    profile = None if budgets is None else _profile(budgets, model)
    if profile is None:
        chosen = resolve_method(method, preset=preset, budgets=budgets, **overrides)
    else:
        chosen = resolve_method(method, preset=preset, **overrides)
        if chosen.scorer is None:
            raise UserError("this method keeps everything", where="budgets", given=budgets, remedy="leave budgets out")
        chosen = replace(chosen, allocator=profile)
    if chosen.allocator is not None:
        chosen.allocator.check_layers(layers)
    chosen = _seeded(chosen, seed)
    moment = compress_at or ("layer" if profile is not None else None)
    moment = moment or chosen.compress_at
    check_name("compress_at", moment, MOMENTS)
    if moment == "layer" and chosen.allocator is not None and _waits(chosen.allocator):
        raise UserError(
            "a layer cannot be compressed on its own when the budgets depend on all layers",
            where="compress_at",
            given="layer",
            remedy='give budgets that are known before: a profile file, a list of shares, "uniform" or "pyramid"',
        )
    if decode_budget is not None:
        if chosen.scorer is None:
            raise UserError(
                "this method keeps everything", where="decode_budget", given=decode_budget, remedy="name another method"
            )
        check_count("decode_budget", decode_budget, chosen.least)
    return Options(
        method=chosen,
        ratio=share,
        compress_at=moment,
        preset=preset,
        decode_budget=decode_budget,
        decode_slack=decode_slack,
        buffer_step=buffer_step,
        record=tuple(_seeded(resolve_method(one, preset=preset), seed) for one in record),
        keep_queries=keep_queries,
        block=block,
        seed=seed,
    )


def _waits(allocator: Allocator) -> bool:
    """Whether an allocator needs something of every layer before it can answer."""
    return allocator.entropy is not None or allocator.wants_scores


def check_visual_mask(mask: Any) -> None:
    """Raise :class:`UserError` unless a visual mask is None or bool (or 0 and 1) ``[B, n]``."""
    if mask is None:
        return
    fits = isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point() and not mask.is_complex()
    if not fits:
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise UserError(
            "a visual mask is a bool tensor [batch, tokens]",
            where="visual_mask",
            given=given,
            remedy="pass True at image and video tokens",
        )


def _seeded(method: Method, seed: int) -> Method:
    """Give a scorer that draws random numbers the cache's seed, when there is one."""
    if seed and method.scorer is not None and "seed" in {field.name for field in fields(method.scorer)}:
        return replace(method, scorer=replace(method.scorer, seed=seed))  # type: ignore[call-arg]
    return method


def _profile(budgets: Any, model: Any) -> ProfileAllocator | None:
    """Read a budget profile: a file, its contents or a bare ``{"alphas": [...]}``; None for anything else."""
    if isinstance(budgets, Mapping) and "format" not in budgets:
        alphas = budgets.get("alphas")
        numbers = isinstance(alphas, Sequence) and all(
            isinstance(alpha, (int, float)) and not isinstance(alpha, bool) for alpha in alphas
        )
        if not alphas or not numbers:
            raise UserError(
                'a budget profile holds "alphas", one number per full-attention layer',
                where="budgets",
                given=alphas,
                remedy="make one with `meda-kv profile`",
            )
        return ProfileAllocator(tuple(alphas))
    path = isinstance(budgets, Path) or (
        isinstance(budgets, str) and budgets not in BUDGETS and _looks_like_path(budgets)
    )
    if not path and not isinstance(budgets, Mapping):
        return None
    from meda_kv.profiles import load_profile

    return ProfileAllocator(load_profile(budgets, model).alphas)


def _looks_like_path(name: str) -> bool:
    return name.endswith(".json") or "/" in name or Path(name).exists()
