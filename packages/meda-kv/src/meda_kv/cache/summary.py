"""What a cache holds and what was done to it, in numbers that were measured on its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.cache.layer import CompressedLayer

if TYPE_CHECKING:
    from meda_kv.cache.facts import CacheFacts

__all__ = ["kept_positions", "stored_bytes", "summarise", "uncompressed_bytes", "used_bytes"]


def _storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _other_tensors(layer: Any) -> list[Tensor]:
    """Tensors of a layer of another kind (sliding window, linear attention)."""
    found: list[Tensor] = []
    for value in vars(layer).values():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        found.extend(part for part in parts if isinstance(part, Tensor))
    return found


def stored_bytes(cache: CacheFacts) -> int:
    """Return the bytes that a cache keeps alive: all storages, with room to spare, flags and observers' state."""
    tensors = cache.tokens.tensors()
    for layer in cache.layers:
        tensors += layer.tensors() if isinstance(layer, CompressedLayer) else _other_tensors(layer)
    return _storage_bytes(tensors)


def _slot_bytes(layer: CompressedLayer) -> int:
    """Bytes of one slot of one row: key and value of all KV heads."""
    if layer.keys is None or layer.values is None:
        return 0
    heads = layer.keys.shape[1]
    return heads * sum(t.shape[3] * t.element_size() for t in (layer.keys, layer.values))


def used_bytes(cache: CacheFacts, row: int | None = None) -> int:
    """Return the bytes of keys and values at slots that hold a real token.

    Parameters
    ----------
    cache : CacheFacts
    row : int, optional
        One row of the batch; all by default.
    """
    total = 0.0
    for layer in cache._full():
        if layer.keys is None:
            continue
        valid = layer.valid
        if valid is None:
            slots = float(layer.physical * (layer.keys.shape[0] if row is None else 1))
        else:
            slots = float((valid if row is None else valid[row]).sum()) / layer.keys.shape[1]
        total += slots * _slot_bytes(layer)
    return round(total)


def uncompressed_bytes(cache: CacheFacts, row: int | None = None) -> int:
    """Return the bytes that the same tokens take in an uncompressed cache without room to spare.

    Parameters
    ----------
    cache : CacheFacts
    row : int, optional
        One row without its padding, full-attention layers only; by default the whole batch, padding and other layers
        included.
    """
    layers = cache._full()
    if row is not None:
        return sum(_slot_bytes(layer) for layer in layers) * int(cache.tokens.valid[row].sum())
    total = sum(_slot_bytes(layer) * layer.logical * layer.keys.shape[0] for layer in layers if layer.keys is not None)
    for layer in cache.layers:
        if not isinstance(layer, CompressedLayer):
            total += sum(tensor.numel() * tensor.element_size() for tensor in _other_tensors(layer))
    return total


def kept_positions(cache: CacheFacts, layer: int, row: int = 0) -> Tensor:
    """Return the original positions that a layer and row kept; see ``CompressedCache.kept``."""
    check_row(cache, row)
    if layer not in cache.facts.full_layers:
        known = ", ".join(str(index) for index in cache.facts.full_layers)
        raise UserError("no compressed layer has this index", where="layer", given=layer, remedy=f"use one of {known}")
    held = cache.layers[layer]
    if not cache.tokens.rows:
        return torch.empty((0, 0), dtype=torch.long)
    positions = held.positions[row, :, : _settled_slots(cache, held)]
    if held.valid is not None:
        positions = positions.masked_fill(~held.valid[row, :, : positions.shape[1]], -1)
    order = torch.argsort(positions < 0, dim=1, stable=True)  # what is no token goes to the end
    return positions.gather(1, order)[:, : int((positions >= 0).sum(dim=1).max()) if positions.numel() else 0]


def check_row(cache: CacheFacts, row: int) -> None:
    """Raise UserError unless the cache holds this row."""
    if not 0 <= row < max(1, cache.tokens.rows):
        raise UserError("no such row", where="row", given=row, remedy=f"the cache holds {cache.tokens.rows} rows")


def summarise(cache: CacheFacts, row: int = 0) -> dict[str, Any]:
    """Return what was done to one row of a cache.

    Parameters
    ----------
    cache : CacheFacts
    row : int
        Row of the batch.

    Returns
    -------
    dict
        Ready for JSON. Per full-attention layer: ``entropy`` (nats; None for budgets that do not come from one),
        ``budgets`` (slots asked for; None before the prompt is read), ``kept``, ``kept_text``, ``kept_visual`` (slots
        of the prompt that are held, mean over KV heads). Per row: ``method``, ``ratio`` (asked for), ``ratio_actual``
        (kept over ``L * prompt_tokens``), ``overshoot`` (slots kept beyond the budgets, by the official text prior),
        ``prompt_tokens``, ``visual_tokens``, ``generated_tokens`` (read after the compression), ``entropy_used``,
        ``layers`` and ``other_layers`` (indices in the model),
        ``row_bytes_in_use``, ``row_bytes_full``, ``note``. For the whole batch: ``rows``, ``bytes`` (allocated, with
        room to spare), ``bytes_in_use`` (keys and values of real slots), ``bytes_full``, ``compress_seconds``.
    """
    check_row(cache, row)
    layers = cache._full()
    read, visual = cache._counts()
    prompt, seen = (read, visual) if cache._prompt is None else cache._prompt
    n = int(prompt[row]) if len(prompt) else 0
    kept, kept_visual = [], []
    for layer in layers:
        slots = _settled_slots(cache, layer)
        if layer.keys is None:
            real = torch.zeros((1, 0), dtype=torch.bool)
            shown = real
        else:
            real = torch.ones((layer.keys.shape[1], slots), dtype=torch.bool, device=layer.keys.device)
            if layer.valid is not None:
                real = layer.valid[row, :, :slots]
            real = real & (layer.positions[row, :, :slots] < _settled_length(cache))
            shown = layer.visual[row, :, :slots] & real
        kept.append(float(real.sum()) / real.shape[0])
        kept_visual.append(float(shown.sum()) / shown.shape[0])
    kind = None if cache.method.allocator is None else cache.method.allocator.entropy
    found = None if kind is None else cache._entropies.get(kind)
    budgets = cache._budgets
    return {
        "method": cache.method.name,
        "ratio": cache.ratio,
        "ratio_actual": sum(kept) / (len(layers) * n) if n else None,
        "prompt_tokens": n,
        "visual_tokens": int(seen[row]) if len(seen) else 0,
        "generated_tokens": (int(read[row]) - n) if len(read) else 0,
        "entropy": None if found is None else found.values[:, row].tolist(),
        "entropy_used": None if found is None else found.used[row],
        "budgets": None if budgets is None else budgets[:, row].tolist(),
        "overshoot": None
        if budgets is None
        else sum(max(0.0, have - asked) for have, asked in zip(kept, budgets[:, row].tolist(), strict=True))
        if cache.compressed
        else 0.0,
        "kept": kept,
        "kept_text": [total - part for total, part in zip(kept, kept_visual, strict=True)],
        "kept_visual": kept_visual,
        "layers": list(cache.facts.full_layers),
        "other_layers": [i for i in range(len(cache.layers)) if i not in cache.facts.full_layers],
        "rows": cache.tokens.rows,
        "bytes": cache.nbytes(),
        "bytes_in_use": used_bytes(cache),
        "bytes_full": cache.nbytes_full(),
        "row_bytes_in_use": used_bytes(cache, row) if cache.tokens.rows else 0,
        "row_bytes_full": uncompressed_bytes(cache, row) if cache.tokens.rows else 0,
        "compress_seconds": cache.compress_seconds,
        "note": cache.note,
    }


def _settled_slots(cache: CacheFacts, layer: CompressedLayer) -> int:
    """Slots that the last compression chose, or left: those after them hold what was read since."""
    if cache._prompt_length is None:
        return layer.prefix or layer.physical
    read_since = layer.logical - cache._prompt_length
    return max(layer.prefix, layer.physical - max(0, read_since))


def _settled_length(cache: CacheFacts) -> int:
    """Tokens, padding included, that had been read at the last compression of a prompt (all, before that)."""
    return cache.tokens.length if cache._prompt_length is None else cache._prompt_length
