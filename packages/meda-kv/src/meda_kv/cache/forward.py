"""What happens around a forward: misuse is refused, the right observers watch, compression comes when it is time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from meda_kv.cache.compression import apply_budgets, compress_cache, decode_budgets, growing_budgets, note_budgets
from meda_kv.cache.layer import CompressedLayer
from meda_kv.core import uniform
from meda_kv.methods import allocators

if TYPE_CHECKING:
    from meda_kv.cache.cache import CompressedCache

__all__ = ["begin", "check_length", "check_prompt", "end", "end_prompt"]

_REMEDY = "call cache.reset() before a new prompt, or make a new cache"
_FLOORED = (
    allocators.EntropyAllocator,
    allocators.MassAllocator,
    allocators.ProfileAllocator,
    allocators.PyramidAllocator,
    allocators.UniformAllocator,
)
WAITING = "not compressed yet: waits for the first decoded token"


def begin(cache: CompressedCache, tokens: Any) -> None:
    """Take note of the tokens that a forward is about to read, and compress first when it is time.

    Parameters
    ----------
    tokens : TokenFacts
        Which are real and which are visual, and how long the attention mask is.

    Raises
    ------
    RuntimeError
        The cache belongs to another batch or another prompt.
    UserError
        The floors of the layers do not fit the ratio.
    """
    past, rows = cache.tokens.length, int(tokens.valid.shape[0])
    _check_use(cache, tokens, past, rows)
    reading = tokens.q_len > 1 if tokens.reading is None else tokens.reading
    decoding = past > 0 and not reading
    if not cache._settled:
        if cache._due or (decoding and cache.compress_at != "first-step"):
            _settle(cache)
        elif tokens.end is not None and past + tokens.q_len == tokens.end:
            _check_floors(cache, _read(cache, tokens, past))
    if cache._croppable:  # by now generate has taken the wrong proposals back
        _trim(cache)
    growing = cache.compress_at == "layer" and not (decoding or cache._settled or tokens.drafts)
    if growing and cache.method.allocator is not None:  # before anything is changed, since it may refuse the ratio
        n, new = _read(cache, tokens, past), tokens.valid.sum(dim=1).cpu()
        more = tokens.end is None or past + tokens.q_len < tokens.end
        cache._targets = growing_budgets(cache.method, cache._full(), n, new, cache.ratio, more)
    cache._before, cache._decoding, cache._announced_end, cache._drafts = past, decoding, tokens.end, tokens.drafts
    cache.tokens.append(tokens.valid, tokens.visual, tokens.ids)
    padded = not bool(tokens.valid.all())
    cache.tokens.padded |= padded
    compressed = cache.compressed
    for layer in cache._full():
        layer.incoming_valid = tokens.valid if padded else None
        layer.own_mask = compressed
    cache._observers = _watching(cache, decoding)


def _read(cache: CompressedCache, tokens: Any, past: int) -> Tensor:
    """Real tokens read when a forward will be over, long ``[B]`` on the CPU."""
    new: Tensor = tokens.valid.sum(dim=1).cpu()
    return cache._counts()[0] + new if past else new


def _settle(cache: CompressedCache) -> None:
    """Do the automatic compression; layers that compressed themselves have done it."""
    if cache.compress_at == "layer" and cache._first is not None:
        _check_floors(cache, cache._counts()[0])
        cache._settled = True
    else:
        compress_cache(cache, cache.ratio)
    cache._due = False


def _check_floors(cache: CompressedCache, n: Tensor) -> None:
    """Refuse a ratio that leaves less than the floors of all layers, once the length of the prompt is known."""
    method, layers = cache.method, len(cache.facts.full_layers)
    if isinstance(method.allocator, _FLOORED) and cache.ratio < 1.0:
        for count in set(n.tolist()):
            if count > method.least:
                uniform(layers, cache.ratio, count, method.least)


def _trim(cache: CompressedCache) -> None:
    """Compress again when decoding has filled the budget for it."""
    budget = cache.options.decode_budget
    if budget is not None and cache._settled:
        slots = sum(layer.physical for layer in cache._full())
        if slots > len(cache.facts.full_layers) * (budget + cache.options.decode_slack):
            apply_budgets(cache, decode_budgets(cache.method, cache._full(), cache._first, budget), prompt=False)
    cache._croppable = False


def check_length(cache: CompressedCache, tokens: int, end: int | None = None) -> None:
    """Refuse a conversation that cannot go on from what a cache has read.

    Parameters
    ----------
    cache : CompressedCache
    tokens : int
        Tokens of the conversation.
    end : int, optional
        Tokens that will have been read when its new ones are added, `tokens` by default.

    Raises
    ------
    RuntimeError
        It holds nothing new, or is not as long as it must be.
    """
    past = cache.tokens.length
    if past and (tokens <= past or (end is not None and tokens != end)):
        given = f"is given {tokens} in all" if end is None else f"is given {end - past} more of {tokens} in all"
        raise RuntimeError(f"this cache has read {past} tokens and {given}: it belongs to another prompt; {_REMEDY}")


def check_prompt(cache: CompressedCache, ids: Tensor) -> None:
    """Refuse a conversation that does not begin with the tokens that a cache has read.

    Parameters
    ----------
    cache : CompressedCache
    ids : Tensor
        Integer ``[B, n]``: the conversation from its first token on.

    Raises
    ------
    RuntimeError
        Another batch, another beginning, or nothing new.
    """
    past = cache.tokens.length
    if not past:
        return
    _check_rows(cache, int(ids.shape[0]))
    check_length(cache, int(ids.shape[1]))
    known = cache.tokens.ids
    wrong = (ids[:, :past].to(known.device) != known) & (known >= 0) & cache.tokens.valid.to(known.device)
    if bool(wrong.any()):
        row, place = (int(i) for i in wrong.nonzero()[0])
        raise RuntimeError(
            f"the conversation does not begin with the {past} tokens that this cache has read (row {row} differs from "
            f"token {place} on): it belongs to another prompt; {_REMEDY}"
        )


def _check_rows(cache: CompressedCache, rows: int) -> None:
    if rows != cache.tokens.rows:
        raise RuntimeError(f"this cache holds {cache.tokens.rows} rows and was given a batch of {rows}; {_REMEDY}")


def _check_use(cache: CompressedCache, tokens: Any, past: int, rows: int) -> None:
    if cache._broken:
        raise RuntimeError(f"the last forward or compression of this cache failed half-way; {_REMEDY}")
    if past:
        _check_rows(cache, rows)
    if not tokens.q_len:
        raise RuntimeError(
            f"no token is given to a cache that has read {past}: it belongs to another prompt; {_REMEDY}"
        )
    if past and tokens.total is not None and tokens.total != past + tokens.q_len:
        raise RuntimeError(
            f"the attention mask covers {tokens.total} tokens, but this cache has read {past} and is given "
            f"{tokens.q_len} more: it belongs to another prompt; {_REMEDY}"
        )


def _watching(cache: CompressedCache, decoding: bool) -> list[Any]:
    """Return the observers of the forward that begins."""
    if decoding:
        pending = cache.compress_at == "first-step" and not cache._settled
        if not (pending or cache.options.decode_budget is not None):
            return []
        return cache.watch.observers(meters=False, fallback=False)
    meters, alone = not cache._settled, False
    if meters and cache.watch.fallback is not None:
        n, visual = cache._counts()
        alone = bool(((visual == 0) | (visual == n)).any())
    return cache.watch.observers(meters, alone)


def end(cache: CompressedCache, error: bool) -> None:
    """Close a forward: compress when it is time, or take back what a failed one left half-done."""
    before, cache._before = cache._before, None
    targets, cache._targets = cache._targets, None
    if error:
        _take_back(cache, before)
        return
    q_len = cache.tokens.length - (before or 0)
    cache._croppable = cache._drafts > 0 or (cache._decoding and q_len > 1)
    if targets is not None:
        cache._first = targets
        note_budgets(cache, targets)
    elif not cache._settled:
        _compress_or_wait(cache)
    if not cache._croppable:
        _trim(cache)


def _compress_or_wait(cache: CompressedCache) -> None:
    """Compress at the end of a forward where that is the moment; wait where proposals may still be taken back."""
    complete = cache._announced_end is None or cache.tokens.length >= cache._announced_end
    if cache.compress_at == "first-step":
        now = cache._decoding
    elif cache.compress_at == "layer":
        now = cache._drafts > 0  # the layers leave proposals to the next forward
    else:
        now = cache.compress_at == "prefill" and complete
    if now and not cache._croppable:
        _settle(cache)
    else:
        cache._due = now
        allocator = cache.method.allocator
        if cache.method.scorer is not None and (cache.ratio < 1.0 or not getattr(allocator, "uses_ratio", True)):
            cache.note = WAITING


def end_prompt(cache: CompressedCache) -> None:
    """Close the reading of a prompt: what follows is another turn, which layers do not compress by themselves."""
    if cache.compress_at == "layer" and not cache._settled and cache._first is not None:
        _settle(cache)


def _take_back(cache: CompressedCache, before: int | None) -> None:
    """Undo a forward that raised: layers that had its tokens already lose them again."""
    if before is None:
        return
    if before == 0:
        mask = cache.visual_mask
        cache.reset()
        cache.visual_mask = mask  # the prompt may be tried again
        return
    try:
        for layer in cache.layers:
            if getattr(layer, "is_initialized", False) and layer.get_seq_length() > before:
                layer.crop(before - layer.get_seq_length())
            if isinstance(layer, CompressedLayer):
                layer.incoming_valid = None
        cache.tokens.crop(cache.tokens.length - before)
    except (RuntimeError, AttributeError, ValueError):
        cache._broken = True
