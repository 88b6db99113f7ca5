"""One layer of a compressed cache: a growth buffer, two lengths, and the tensors that belong to its slots.

A stock ``DynamicLayer`` joins the whole cache anew for every decoded token. Here keys and values lie in a buffer with
room to spare and a token is written into it; only every ``buffer_step`` tokens is the buffer copied to a larger one.

After a compression a layer holds fewer slots than it has seen tokens. ``get_seq_length`` answers with the tokens seen
(the *logical* length), so that positions, rotary phases and the slicing of a continued conversation stay right without
touching a key; ``get_mask_sizes`` answers with the *physical* slots, the way a sliding-window layer does.

The growth buffer and the bookkeeping of slots are ours, not from a paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from meda_kv.cache.masks import layer_mask
from meda_kv.cache.slots import blank, owns_storage, padded, roomy, taker
from meda_kv.cache.tokens import TokenTable
from meda_kv.methods.base import Observer, State

__all__ = ["CompressedLayer"]


class CompressedLayer(DynamicLayer):
    """Keys and values of one full-attention layer, growing in place and compressible.

    Parameters
    ----------
    buffer_step : int
        Most slots of room that a new buffer gets beyond what it must hold, >= 1; short caches get a quarter of their
        length, at least 16.
    tokens : TokenTable, optional
        Which tokens are visual; shared by the layers of a cache.

    Attributes
    ----------
    keys, values : Tensor or None
        ``[B, Hkv, S, D]``: views of the buffer, the slots held.
    physical : int
        S, slots held.
    logical : int
        Tokens seen, padding included.
    prefix : int
        Slots that a compression has settled; the ``S - prefix`` slots after them are tokens in the order they came.
    own_mask : bool
        Whether the mask that transformers builds no longer fits the slots; set by the cache before each forward.
    closed : bool
        Whether the settled keys were re-rotated to positions without gaps.
    incoming_valid : Tensor or None
        bool ``[B, q]``: which tokens of the next update are real; None means all. Used up by :meth:`update`.
    state : dict
        Per observer, its tensors. They follow every operation on rows and slots.
    copies : int
        How often a buffer was copied to a larger one (for benchmarks and tests).

    Notes
    -----
    For inference: what is stored is detached from the graph.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, buffer_step: int = 256, tokens: TokenTable | None = None) -> None:
        super().__init__()
        self.buffer_step = buffer_step
        self.tokens = TokenTable() if tokens is None else tokens
        self._clear()

    def _clear(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self.physical = self.logical = self.prefix = 0
        self.own_mask = False
        self.incoming_valid: Tensor | None = None
        self.state: dict[Observer, State] = {}
        self.copies = 0
        self._key_buffer: Tensor | None = None
        self._value_buffer: Tensor | None = None
        self._valid_buffer: Tensor | None = None  # bool [B, 1 or Hkv, capacity], None while every slot is real
        self._settled: Tensor | None = None  # int32 [B, Hkv, prefix], original positions of the settled slots
        self.closed = False
        self._lent = False  # a fork reads the same storage: copy before the next write

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device; the buffer is made by the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # -- growing ------------------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the tokens of one forward.

        Parameters
        ----------
        key_states, value_states : Tensor
            ``[B, Hkv, q, D]``. The first ones are adopted without a copy when they own their storage.

        Returns
        -------
        (Tensor, Tensor)
            All slots held, ``[B, Hkv, S + q, D]``: views of the buffer, valid until the next update.
        """
        key_states, value_states = key_states.detach(), value_states.detach()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self.physical, self.physical + key_states.shape[-2]
        if self._key_buffer is None and owns_storage(key_states) and owns_storage(value_states):
            self._key_buffer, self._value_buffer = key_states, value_states
        else:
            self._reserve(stop, key_states, value_states)
            assert self._key_buffer is not None and self._value_buffer is not None
            self._key_buffer[:, :, start:stop] = key_states
            self._value_buffer[:, :, start:stop] = value_states
        self.physical = stop
        self.logical += stop - start
        self._mark_valid(start, stop)
        self._view()
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _reserve(self, slots: int, key_like: Tensor, value_like: Tensor) -> None:
        """Make the buffer hold ``slots`` slots and be writable here and now."""
        old_key, old_value = self._key_buffer, self._value_buffer
        if old_key is not None and old_value is not None:
            # A tensor made under inference_mode may not be written in place outside of it.
            locked = old_key.is_inference() and not torch.is_inference_mode_enabled()
            if old_key.shape[2] >= slots and not locked and not self._lent:
                return
            self.copies += 1
        capacity = max(slots + self._room(slots) - 1, 0 if old_key is None else old_key.shape[2])
        self._key_buffer = roomy(old_key, self.physical, capacity, key_like)
        del old_key
        self.keys = None
        self._value_buffer = roomy(old_value, self.physical, capacity, value_like)
        self._lent = False

    def _room(self, slots: int) -> int:
        return min(self.buffer_step, max(16, slots // 4))

    def _mark_valid(self, start: int, stop: int) -> None:
        """Enter which of the slots ``start:stop`` hold real tokens."""
        incoming, self.incoming_valid = self.incoming_valid, None
        assert self._key_buffer is not None
        if self._valid_buffer is None and incoming is None:
            return
        rows, _, capacity = self._key_buffer.shape[:3]
        old = self._valid_buffer
        if old is None or old.shape[2] < stop or (old.is_inference() and not torch.is_inference_mode_enabled()):
            new = torch.ones((rows, 1 if old is None else old.shape[1], capacity), dtype=torch.bool, device=self.device)
            if old is not None:
                new[:, :, :start] = old[:, :, :start]
            self._valid_buffer = new
        assert self._valid_buffer is not None
        self._valid_buffer[:, :, start:stop] = True if incoming is None else incoming.to(self.device)[:, None, :]

    def _view(self) -> None:
        assert self._key_buffer is not None and self._value_buffer is not None
        self.keys = self._key_buffer[:, :, : self.physical]
        self.values = self._value_buffer[:, :, : self.physical]

    # -- what the slots are -------------------------------------------------------------------------------------------

    @property
    def valid(self) -> Tensor | None:
        """Bool ``[B, Hkv, S]``: slots that hold a real token; None when all do."""
        if self._valid_buffer is None or self.keys is None:
            return None
        return self._valid_buffer[:, :, : self.physical].expand(-1, self.keys.shape[1], -1)

    @property
    def positions(self) -> Tensor:
        """Long ``[B, Hkv, S]``: original index of each slot's token, counting padding; -1 for slots without one."""
        if self.keys is None:
            return torch.empty((0, 0, 0), dtype=torch.long)
        rows, heads = self.keys.shape[:2]
        tail = torch.arange(self.logical - (self.physical - self.prefix), self.logical, device=self.device)
        tail = tail.expand(rows, heads, -1)
        return tail if self._settled is None else torch.cat([self._settled.long(), tail], dim=2)

    @property
    def visual(self) -> Tensor:
        """Bool ``[B, Hkv, S]``: slots that hold an image or video placeholder."""
        if self.keys is None:
            return torch.zeros((0, 0, 0), dtype=torch.bool)
        first = self.logical - (self.physical - self.prefix)
        return self.tokens.visual_slots(self._settled, first, self.logical, self.keys)

    def get_seq_length(self) -> int:
        """Return the tokens seen, not the slots held."""
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return ``(slots after the forward, tokens seen minus slots held)``."""
        return self.physical + query_length, self.logical - self.physical

    def mask_for(self, query: Tensor, given: Any, base: str) -> Any:
        """Return the attention mask that fits this layer's slots, called after :meth:`update`.

        Parameters
        ----------
        query : Tensor
            ``[B, H, q, D]``.
        given : Tensor, BlockMask or None
            What transformers built; returned untouched while no layer of the cache is compressed. Of it only the part
            about this forward's own tokens is used otherwise (images may see themselves in both directions).
        base : str
            Attention implementation that gets the mask: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"``,
            ``"flash_attention_3"`` or ``"flex_attention"``.

        Returns
        -------
        Tensor, BlockMask or None
            None for one query over slots that are all real, and for flash attention.

        Raises
        ------
        RuntimeError
            Flash attention, with slots that hold no token.
        """
        if not self.own_mask:
            return given
        valid = None if self._valid_buffer is None else self._valid_buffer[:, :, : self.physical]
        return layer_mask(query, self.physical, valid, given, base)

    # -- compression --------------------------------------------------------------------------------------------------

    def settle(self, keep: Tensor, merged: tuple[Tensor, Tensor] | None = None) -> None:
        """Keep only some slots, in new storage, and let go of the old one.

        Parameters
        ----------
        keep : Tensor
            long ``[B, Hkv, S']``: slots to keep, ascending per head; -1 marks padding on the right.
        merged : (Tensor, Tensor), optional
            Keys and values ``[B, Hkv, S', D]`` to store in place of the kept ones.
        """
        assert self.keys is not None and self.values is not None
        rows, heads, slots = keep.shape
        index, missing = keep.clamp(min=0), keep < 0
        ragged = bool(missing.any())
        take = taker(index)
        positions = take(self.positions).to(torch.int32)
        valid = None if self.valid is None else take(self.valid)
        if ragged:
            positions = positions.masked_fill(missing, -1)
            valid = ~missing if valid is None else valid & ~missing
        capacity = slots + self._room(slots)
        for name, which in (("keys", 0), ("values", 1)):
            old = getattr(self, name)
            new = old.new_empty((rows, heads, capacity, old.shape[-1]))
            new[:, :, :slots] = take(old) if merged is None else merged[which]
            if ragged:
                new[:, :, :slots].masked_fill_(missing[..., None], 0)
            # Dropped before the next one is made: at most one compressed tensor stands beside the full pair.
            setattr(self, name, None)
            setattr(self, f"_{name[:-1]}_buffer", new)
        for observer, state in self.state.items():
            for name in observer.slots:
                if name in state:
                    state[name] = blank(take(padded(state[name], self.physical)), missing if ragged else None)
        self.physical = self.prefix = slots
        self._settled = positions
        self._valid_buffer = None
        if valid is not None and not bool(valid.all()):
            if bool((valid == valid[:, :1]).all()):
                valid = valid[:, :1]
            room = torch.ones((*valid.shape[:2], capacity), dtype=torch.bool, device=valid.device)
            room[:, :, :slots] = valid
            self._valid_buffer = room
        self._lent = False
        self._view()

    def lend(self) -> CompressedLayer:
        """Return a layer that reads the same storage; whichever of the two writes first copies."""
        other = CompressedLayer(self.buffer_step, self.tokens)
        other.__dict__.update(self.__dict__)
        other.state = {observer: dict(state) for observer, state in self.state.items()}
        self._lent = other._lent = True
        if self._valid_buffer is not None:
            other._valid_buffer = self._valid_buffer.clone()
        return other

    # -- rows and tokens ----------------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Parameters
        ----------
        tokens_to_remove : int
            Negative count, or 0.

        Raises
        ------
        ValueError
            Positive count.
        RuntimeError
            More tokens than were appended since the last compression.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.check_crop(tokens_to_remove)
        removed = min(-tokens_to_remove, self.physical)
        self.physical -= removed
        self.logical -= removed
        for observer, state in self.state.items():
            for name in observer.slots:
                if name in state and state[name].shape[2] > self.physical:
                    state[name] = state[name][:, :, : self.physical]
        self._view()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise RuntimeError when a crop would reach into the settled slots."""
        free = self.physical - self.prefix
        if self.prefix and -tokens_to_remove > free:
            raise RuntimeError(
                f"cannot remove {-tokens_to_remove} tokens: only {free} were read since the cache was compressed, and "
                "what was dropped cannot be brought back; crop less, or cache.reset() and read the prompt again"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take row ``beam_idx[b]`` for row ``b`` (beam search)."""
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, neighbours together."""
        if self.keys is not None:
            self._take_rows(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows (indices, or one bool per row)."""
        if self.keys is not None:
            self._take_rows(torch.arange(self.keys.shape[0], device=indices.device)[indices])

    def _take_rows(self, rows: Tensor) -> None:
        if self.keys is None or self.values is None:
            return
        assert self._key_buffer is not None
        rows = rows.to(self.device)
        capacity = self._key_buffer.shape[2]
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty((rows.shape[0], old.shape[1], capacity, old.shape[3]))
            new[:, :, : self.physical] = old.index_select(0, rows)
            setattr(self, f"_{name[:-1]}_buffer", new)
        self._each(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        self._lent = False
        self._view()

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change to every tensor with rows that stands beside keys and values."""
        if self._valid_buffer is not None:
            self._valid_buffer = change(self._valid_buffer)
        if self._settled is not None:
            self._settled = change(self._settled)
        for state in self.state.values():
            for name, tensor in state.items():
                if isinstance(tensor, Tensor) and tensor.ndim:
                    state[name] = change(tensor)

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if self._key_buffer is None or self._value_buffer is None or self._key_buffer.device == device:
            return
        self._key_buffer = self._key_buffer.to(device, non_blocking=True)
        self._value_buffer = self._value_buffer.to(device, non_blocking=True)
        self._each(lambda tensor: tensor.to(device, non_blocking=True))
        self._lent = False
        self._view()

    def reset(self) -> None:
        """Forget everything; the layer is as new."""
        self._clear()

    def tensors(self) -> list[Tensor]:
        """Return every tensor the layer keeps alive, observers' state included."""
        own = [self._key_buffer, self._value_buffer, self._valid_buffer, self._settled]
        kept = [tensor for tensor in own if tensor is not None]
        for state in self.state.values():
            kept.extend(tensor for tensor in state.values() if isinstance(tensor, Tensor))
        return kept
