"""Statistics -> budgets -> selection -> merging, one layer after the other.

A layer's old tensors are let go before the next layer is touched, so the peak is the full cache and one compressed
layer. Everything is done on all rows of the batch at once, and no row's result depends on its batch mates.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meda_kv.cache.layer import CompressedLayer
from meda_kv.cache.observation import measure
from meda_kv.cache.rerotate import PlainRope, close_gaps
from meda_kv.core import select, token_blocks, water_fill
from meda_kv.methods.base import LayerStats, Method

if TYPE_CHECKING:
    from meda_kv.cache.cache import CompressedCache

__all__ = [
    "apply_budgets",
    "available_slots",
    "budgets_for",
    "compress_cache",
    "compress_layer",
    "decode_budgets",
    "growing_budgets",
    "layer_scores",
    "note_budgets",
]


_UNCHANGED = "nothing dropped: the layers held no more than their budgets"


def available_slots(layer: CompressedLayer) -> Tensor:
    """Return how many real slots a layer holds, long ``[B]`` on the CPU (the most of any head)."""
    assert layer.keys is not None
    valid = layer.valid
    if valid is None:
        return torch.full((layer.keys.shape[0],), layer.physical, dtype=torch.long)
    return valid.sum(dim=2).amax(dim=1).cpu()


def layer_scores(method: Method, layer: CompressedLayer, index: int) -> Tensor:
    """Return the scores of a layer's slots.

    Parameters
    ----------
    method : Method
        With a scorer.
    layer : CompressedLayer
        With keys and the scorer's state.
    index : int
        The layer's index in the model, for messages.

    Returns
    -------
    Tensor
        float32 ``[B, Hkv, S]``, finite at real slots.

    Raises
    ------
    RuntimeError
        NaN or infinity in the keys or the scores; names layer and head.
    """
    assert method.scorer is not None and layer.keys is not None and layer.values is not None
    valid = layer.valid
    # One number per slot: a sum in float32 is finite exactly when every part is (and does not overflow).
    _check_finite(layer.keys.sum(dim=-1, dtype=torch.float32), valid, index, "keys")
    scores = method.scorer.scores(layer.state.get(method.scorer, {}), layer.keys, layer.values, valid)
    if scores.shape != layer.keys.shape[:3]:
        raise RuntimeError(
            f"{type(method.scorer).__name__} gave scores of shape {tuple(scores.shape)} for layer {index}; "
            f"{tuple(layer.keys.shape[:3])} (rows, KV heads, slots) is needed"
        )
    _check_finite(scores, valid, index, "scores")
    return scores


def _check_finite(numbers: Tensor, valid: Tensor | None, index: int, what: str) -> None:
    bad = ~torch.isfinite(numbers)
    if valid is not None:
        bad &= valid
    if bool(bad.any()):
        row, head, slot = (int(i) for i in bad.nonzero()[0])
        raise RuntimeError(
            f"NaN or infinity in the {what} of layer {index}, head {head} (row {row}, slot {slot}): nothing can be "
            "selected by them; load the model in float32 or bfloat16"
        )


def budgets_for(
    method: Method,
    layers: Sequence[CompressedLayer],
    n: Tensor,
    ratio: float,
    entropy: Tensor | None,
    scores: Sequence[Tensor] | None,
) -> Tensor:
    """Return how many slots every layer keeps, long ``[L, B]``.

    Parameters
    ----------
    method : Method
        With a scorer and an allocator.
    layers : sequence of CompressedLayer
        The full-attention layers.
    n : Tensor
        long ``[B]``: real tokens read.
    ratio : float
        Share of ``L * n`` to keep.
    entropy : Tensor or None
        float ``[L, B]``.
    scores : sequence of Tensor or None
        Per layer ``[B, Hkv, S]``, for allocators that want them.
    """
    assert method.allocator is not None
    stats = LayerStats(
        n=n,
        available=torch.stack([available_slots(layer) for layer in layers]),
        entropy=entropy,
        scores=scores,
        valid=None if scores is None else [layer.valid for layer in layers],
    )
    if scores is not None or entropy is not None:
        return method.allocator.budgets(stats, ratio, method.least)
    # Rows alike in length have the same budgets, so each kind of row is worked out once.
    kinds, which = torch.cat([n[None], stats.available]).unique(dim=1, return_inverse=True)
    stats = LayerStats(n=kinds[0], available=kinds[1:])
    return method.allocator.budgets(stats, ratio, method.least)[:, which]


def growing_budgets(
    method: Method, layers: Sequence[CompressedLayer], n: Tensor, new: Tensor, ratio: float, more: bool = True
) -> Tensor:
    """Return the budgets of every layer while the prompt is still being read, long ``[L, B]``.

    Parameters
    ----------
    method : Method
        Its allocator knows its shares before the prompt is read.
    layers : sequence of CompressedLayer
        Before the forward.
    n, new : Tensor
        long ``[B]``: real tokens read including this forward's, and this forward's alone.
    ratio : float
        Share of the tokens read so far.
    more : bool
        Whether more of the prompt may follow; the share is then raised to ``floor / n`` where it is smaller.
    """
    assert method.allocator is not None
    held = [available_slots(layer) if layer.keys is not None else torch.zeros_like(n) for layer in layers]
    available = torch.stack(held) + new
    kinds, which = torch.cat([n[None], available]).unique(dim=1, return_inverse=True)
    columns: list[Tensor] = []
    for kind in kinds.unbind(dim=1):
        count = int(kind[0])
        least = min(1.0, method.least / count) if more and count else 0.0
        stats = LayerStats(n=kind[:1], available=kind[1:, None])
        columns.append(method.allocator.budgets(stats, max(ratio, least), method.least))
    return torch.cat(columns, dim=1)[:, which]


def decode_budgets(method: Method, layers: Sequence[CompressedLayer], first: Tensor | None, mean_budget: int) -> Tensor:
    """Return what every layer keeps when it is compressed again while decoding, long ``[L, B]``.

    Parameters
    ----------
    method : Method
        For its floor.
    layers : sequence of CompressedLayer
        After the forward.
    first : Tensor or None
        long ``[L, B]``: budgets of the first compression, whose proportions between layers are kept; None for equal
        ones.
    mean_budget : int
        Slots per layer, on average over layers.
    """
    available = torch.stack([available_slots(layer) for layer in layers])
    if first is None or bool((first == first[:1]).all()):
        return available.clamp(max=mean_budget)
    columns = []
    for b in range(available.shape[1]):
        caps = available[:, b]
        total = min(mean_budget * len(layers), int(caps.sum()))
        floors = caps.clamp(max=min(method.least, mean_budget))
        columns.append(water_fill(first[:, b].double(), total, floors, caps))
    return torch.stack(columns, dim=1)


def compress_layer(
    method: Method,
    layer: CompressedLayer,
    index: int,
    budget: Tensor,
    n: Tensor,
    places: Tensor | None = None,
    rope: PlainRope | None = None,
    scores: Tensor | None = None,
) -> bool:
    """Select, merge and store anew what one layer keeps.

    Parameters
    ----------
    method : Method
        With a scorer.
    layer : CompressedLayer
        Changed in place.
    index : int
        Its index in the model, for messages.
    budget : Tensor
        long ``[B]``: slots to keep.
    n : Tensor
        long ``[B]``: real tokens read, of which a fixed share may be recent ones.
    places : Tensor, optional
        long ``[B, tokens]``: rotary position of every token; with `rope`.
    rope : PlainRope, optional
        Re-rotates the kept keys to positions without gaps.
    scores : Tensor, optional
        ``[B, Hkv, S]``, worked out here when absent.

    Returns
    -------
    bool
        False when the budget covers everything, and the layer was left alone.
    """
    if _covers(budget, layer):
        return False
    assert layer.keys is not None and layer.values is not None
    if scores is None:
        scores = layer_scores(method, layer, index)
    keep = _keep(method, layer, scores, budget, n)
    if keep.shape[2] == layer.physical and not bool((keep < 0).any()):
        return False  # a text prior that keeps more than the budget kept everything
    if rope is not None:
        assert places is not None
        merged: tuple[Tensor, Tensor] | None = close_gaps(rope, layer, keep, places)
    elif method.merger is None:
        merged = None
    else:
        # A scorer's state sees nothing of the merging; the slots of a head stay those of `keep`.
        given = scores if method.merger.wants_scores else None
        merged = method.merger.merge(layer.keys, layer.values, keep, layer.valid, given)
    del scores
    layer.settle(keep, merged)
    return True


def _covers(budget: Tensor, layer: CompressedLayer) -> bool:
    """Whether budgets ``[B]`` leave nothing to drop."""
    return bool((budget >= available_slots(layer)).all())


def _keep(method: Method, layer: CompressedLayer, scores: Tensor, budget: Tensor, n: Tensor) -> Tensor:
    """Return the slots to keep, long ``[B, Hkv, S']`` with -1 behind shorter rows."""
    counts = [method.recent_count(int(count)) for count in n]
    recent: Tensor | None = None
    if any(count is not None for count in counts):
        shares = (budget.double() * method.recent_share).round().long().tolist()
        recent = torch.tensor([share if count is None else count for count, share in zip(counts, shares, strict=True)])
    return select(
        scores,
        budget,
        recent_share=method.recent_share,
        visual=layer.visual,
        text_prior=method.text_prior,
        sink=method.sink,
        valid=layer.valid,
        recent=recent,
        per_head=method.per_head,
        blocks=_blocks(method, layer) if method.quota else None,
        quota=method.quota,
    )


def _blocks(method: Method, layer: CompressedLayer) -> Tensor:
    """Return the block of every slot, long ``[B, Hkv, S]``, by the tokens read so far."""
    assert layer.keys is not None
    tokens = layer.tokens
    of = token_blocks(tokens.visual, tokens.valid, method.quota_block).to(layer.keys.device)
    places = layer.positions
    found = of[:, None].expand(*places.shape[:2], -1).gather(2, places.clamp(min=0))
    return found.masked_fill(places < 0, -1)


def compress_cache(cache: CompressedCache, ratio: float) -> None:
    """Compress a cache to a share of all tokens that it has read."""
    method = cache.method
    before = cache.compressed
    if method.scorer is None or method.allocator is None:
        _leave(cache, "the method keeps everything", before)
        return
    start = time.perf_counter()
    whole = ratio >= 1.0 and method.allocator.uses_ratio
    meter = cache.watch.meter(method)
    if meter is not None and meter.kind not in cache._entropies:
        found = measure(meter, cache.watch.fallback, cache._full(), needed=not whole)
        if found is not None:
            cache._entropies[meter.kind] = found
    if whole:
        cache.compress_seconds += time.perf_counter() - start
        _leave(cache, "ratio 1", before)
        if not before:
            cache.ratio = ratio
        return
    entropy = None if meter is None else cache._entropies[meter.kind].values
    scores = None
    if method.allocator.wants_scores:
        scores = [layer_scores(method, cache.layers[index], index) for index in cache.facts.full_layers]
    budgets = budgets_for(method, cache._full(), cache._counts()[0], ratio, entropy, scores)
    cache.compress_seconds += time.perf_counter() - start
    changed = apply_budgets(cache, budgets, scores=scores)
    if changed or not before:
        cache.ratio = ratio
    cache._settled = True


def _leave(cache: CompressedCache, why: str, before: bool) -> None:
    """Settle a cache that keeps all that it holds."""
    note_budgets(cache, torch.stack([available_slots(layer) for layer in cache._full()]))
    cache.note = _UNCHANGED if before else f"not compressed: {why}"
    cache._settled = True


def apply_budgets(
    cache: CompressedCache, budgets: Tensor, prompt: bool = True, scores: list[Tensor] | None = None
) -> bool:
    """Bring every layer down to its budget.

    All scores are worked out before the first layer is changed, so a layer whose keys are not finite leaves the cache
    as it was. They take about a hundredth of the cache's bytes.

    Parameters
    ----------
    cache : CompressedCache
    budgets : Tensor
        long ``[L, B]``.
    prompt : bool
        Whether this is the compression of a prompt, not one in the course of decoding.
    scores : list of Tensor, optional
        Per layer ``[B, Hkv, S]``, when known already.

    Returns
    -------
    bool
        Whether any layer was changed.
    """
    start = time.perf_counter()
    changed = False
    n, places = cache._counts()[0], cache._places()
    meters = {*cache.watch.meters, cache.watch.fallback}
    with torch.no_grad():
        pending: list[tuple[CompressedLayer, int, Tensor, Tensor]] = []
        for position, (layer, index) in enumerate(zip(cache._full(), cache.facts.full_layers, strict=True)):
            if not _covers(budgets[position], layer):
                found = layer_scores(cache.method, layer, index) if scores is None else scores[position]
                pending.append((layer, index, budgets[position], found))
        cache._broken = True  # until every layer is done
        del scores
        while pending:
            layer, index, budget, found = pending.pop(0)
            changed |= compress_layer(cache.method, layer, index, budget, n, places, cache._rope, found)
    for layer in cache._full():
        layer.state = {one: state for one, state in layer.state.items() if one not in meters}
    device = cache._full()[-1].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cache.compress_seconds += time.perf_counter() - start
    cache._broken = False
    note_budgets(cache, budgets, prompt)
    if prompt and not changed and cache.compressed:
        cache.note = _UNCHANGED
    return changed


def note_budgets(cache: CompressedCache, budgets: Tensor, prompt: bool = True) -> None:
    """Remember what was asked for, and whether anything came of it."""
    cache._budgets = budgets
    if prompt:
        cache._prompt, cache._prompt_length = cache._counts(), cache.tokens.length
    if cache._first is None:
        cache._first = budgets
    cache.note = None if cache.compressed else "not compressed: n <= budget"
