"""Copies of a full cache that are compressed by different arms, from one reading of the prompt."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer
from vfm_core.errors import UserError

from meda_kv.cache.compression import compress_cache
from meda_kv.cache.layer import CompressedLayer
from meda_kv.methods.base import Method

if TYPE_CHECKING:
    from meda_kv.cache.cache import CompressedCache

__all__ = ["copy_of", "fork_of"]


def copy_of(cache: CompressedCache, memo: dict[int, Any]) -> CompressedCache:
    """Return what ``copy.deepcopy`` makes of a cache: tensors of its own, the same model.

    Parameters
    ----------
    cache : CompressedCache
        Not in the course of a forward.
    memo : dict
        Of ``copy.deepcopy``.
    """
    if cache._before is not None:
        raise RuntimeError("cannot copy a cache while a forward reads into it; copy it afterwards")
    # Settings never change, and a copy of an observer or of the model would be another one.
    for shared in (cache.model, cache.facts, cache.options, cache.method, cache.watch, *cache.watch.known()):
        memo[id(shared)] = shared
    other = type(cache).__new__(type(cache))
    memo[id(cache)] = other
    for name, value in vars(cache).items():
        setattr(other, name, copy.deepcopy(value, memo))
    for layer in other._full():
        layer._lent = False
    return other


def fork_of(cache: CompressedCache, method: str | Method | None, ratio: float | None) -> CompressedCache:
    """Return a compressed copy of a full cache; see ``CompressedCache.fork``."""
    from meda_kv.cache.cache import CompressedCache

    if cache.compressed or not cache.tokens.length:
        what = "compressed already" if cache.compressed else "empty"
        raise RuntimeError(
            f'cannot fork a cache that is {what}; read the prompt with CompressedCache(model, "full", record=[...])'
        )
    options = cache.options.variant(method, ratio)
    other = CompressedCache.__new__(CompressedCache)
    other._setup(cache.model, cache.facts, options, cache.visual_mask)
    if not cache.watch.covers(other.watch):
        known = ", ".join(one.name for one in (cache.options.method, *cache.options.record))
        raise UserError(
            "the prompt was not observed for this method",
            where="method",
            given=options.method.name,
            remedy=f"name it in record=[...] when the cache is made (recorded: {known})",
        )
    needed = other.watch.known()
    other.tokens = cache.tokens.copy()
    other._entropies = dict(cache._entropies)
    lent = [layer._lent for layer in cache._full()]
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CompressedLayer):
            twin = layer.lend()
            twin.tokens = other.tokens
            twin.state = {
                observer: {name: t.clone() if isinstance(t, Tensor) else t for name, t in state.items()}
                for observer, state in layer.state.items()
                if observer in needed
            }
            other.layers[index] = twin
        else:
            plain = isinstance(layer, DynamicLayer) and type(layer).__name__.startswith("Dynamic")
            other.layers[index] = copy.copy(layer) if plain else copy.deepcopy(layer)
    if options.compress_at != "first-step":
        compress_cache(other, options.ratio)
    for layer, twin, before in zip(cache._full(), other._full(), lent, strict=True):
        if not twin._lent:  # it has storage of its own by now
            layer._lent = before
    return other
