"""What a cache knows of the tokens that it has read: which are real, which are visual, and their ids."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TokenTable"]


class TokenTable:
    """Two flags and the id of every token read, in the order of reading.

    Attributes
    ----------
    length : int
        Tokens read, padding included.
    padded : bool
        Whether any of them is padding.
    rope_deltas : Tensor or None
        What a model with multimodal rotary positions adds to the positions of the text that follows, [B, 1].
    """

    def __init__(self) -> None:
        self.length = 0
        self.padded = False
        self.rope_deltas: Tensor | None = None
        self._ids: list[Tensor] = []  # [B, q] of the forwards so far, -1 where only embeddings were given
        self._flags: Tensor | None = None  # bool [2, B, capacity]: real, visual
        self._moved: dict[torch.device, tuple[int, Tensor]] = {}

    @property
    def rows(self) -> int:
        """Rows of the batch, 0 before the first token."""
        return 0 if self._flags is None else int(self._flags.shape[1])

    @property
    def valid(self) -> Tensor:
        """Bool ``[B, n]``: real tokens."""
        return self._read()[0]

    @property
    def visual(self) -> Tensor:
        """Bool ``[B, n]``: image and video placeholders."""
        return self._read()[1]

    @property
    def ids(self) -> Tensor:
        """Int32 ``[B, n]``: the tokens, -1 where they came as embeddings."""
        if len(self._ids) != 1:
            self._ids = [torch.cat(self._ids, dim=1) if self._ids else torch.zeros((self.rows, 0), dtype=torch.int32)]
        return self._ids[0]

    def visual_on(self, device: torch.device) -> Tensor:
        """Return :attr:`visual` on a device (copied once per length)."""
        flags = self._read()
        if flags.device == device:
            return flags[1]
        length, moved = self._moved.get(device, (-1, flags))
        if length != self.length:
            moved = flags[1].to(device)
            self._moved[device] = (self.length, moved)
        return moved

    def visual_slots(self, settled: Tensor | None, start: int, stop: int, keys: Tensor) -> Tensor:
        """Return which slots of a layer are visual.

        Parameters
        ----------
        settled : Tensor or None
            Original positions ``[B, Hkv, P]`` of the first slots, -1 for none.
        start, stop : int
            The slots after them hold these tokens.
        keys : Tensor
            ``[B, Hkv, S, D]``, for shape and device.

        Returns
        -------
        Tensor
            Bool ``[B, Hkv, S]``.
        """
        rows, heads = keys.shape[:2]
        flags = self.visual_on(keys.device)
        if flags.shape[1] < stop:
            flags = torch.nn.functional.pad(flags.expand(rows, -1), (0, stop - flags.shape[1]))
        tail = flags[:, None, start:stop].expand(rows, heads, -1)
        if settled is None:
            return tail
        places = settled.long()
        found = flags[:, None].expand(rows, heads, -1).gather(2, places.clamp(min=0)) & (places >= 0)
        return torch.cat([found, tail], dim=2)

    def append(self, valid: Tensor, visual: Tensor, ids: Tensor | None = None) -> None:
        """Add the tokens of one forward, bool ``[B, q]`` each, and their ids ``[B, q]`` where known."""
        # A copy, since callers reuse their tensors; joined rarely, so that a decoded token costs little.
        part = valid.new_full(valid.shape, -1, dtype=torch.int32) if ids is None else ids.to(torch.int32, copy=True)
        self._ids.append(part)
        if len(self._ids) > 256:
            self._ids = [self.ids]
        new = torch.stack([valid, visual & valid])
        stop = self.length + new.shape[2]
        old = self._flags
        locked = old is not None and old.is_inference() and not torch.is_inference_mode_enabled()
        if old is None or old.shape[2] < stop or locked:
            self._flags = new.new_zeros((2, new.shape[1], stop + 256))
            if old is not None:
                self._flags[:, :, : self.length] = old[:, :, : self.length]
        assert self._flags is not None
        self._flags[:, :, self.length : stop] = new
        self.length = stop

    def crop(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        self.length = max(0, self.length - count)
        self._ids = [self.ids[:, : self.length].clone()]
        self._moved.clear()

    def take_rows(self, rows: Tensor) -> None:
        """Take row ``rows[b]`` for row ``b``."""
        if self._flags is not None:
            if self.rope_deltas is not None and self.rope_deltas.shape[0] == self.rows:
                self.rope_deltas = self.rope_deltas.index_select(0, rows.to(self.rope_deltas.device))
            self._ids = [self.ids.index_select(0, rows.to(self.ids.device))]
            self._flags = self._flags.index_select(1, rows.to(self._flags.device))
            self._moved.clear()

    def copy(self) -> TokenTable:
        """Return an independent table with the same contents."""
        other = TokenTable()
        other.length, other.padded = self.length, self.padded
        other.rope_deltas, other._ids = self.rope_deltas, [self.ids] if self._ids else []
        other._flags = None if self._flags is None else self._flags.clone()
        return other

    def tensors(self) -> list[Tensor]:
        """Return the tensors held."""
        return [] if self._flags is None else [self._flags, self.ids]

    def _read(self) -> Tensor:
        if self._flags is None:
            return torch.zeros((2, 0, 0), dtype=torch.bool)
        return self._flags[:, :, : self.length]
