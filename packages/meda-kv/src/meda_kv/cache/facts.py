"""What can be asked of a compressed cache at any time; nothing here changes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from meda_kv.cache.layer import CompressedLayer
from meda_kv.cache.observation import Entropies
from meda_kv.cache.rerotate import PlainRope
from meda_kv.cache.summary import kept_positions, stored_bytes, summarise, uncompressed_bytes
from meda_kv.cache.tokens import TokenTable
from meda_kv.methods.base import Method

__all__ = ["CacheFacts"]


class CacheFacts(Cache):
    """The questions that :class:`meda_kv.cache.CompressedCache` answers."""

    facts: Any
    method: Method
    ratio: float
    tokens: TokenTable
    compress_seconds: float
    note: str | None
    _rope: PlainRope | None
    _entropies: dict[str, Entropies]
    _budgets: Tensor | None
    _prompt: tuple[Tensor, Tensor] | None
    _prompt_length: int | None

    def _full(self) -> list[CompressedLayer]:
        return [self.layers[index] for index in self.facts.full_layers]

    def _counts(self) -> tuple[Tensor, Tensor]:
        """Return real tokens and visual tokens read, long ``[B]`` each, on the CPU."""
        return self.tokens.valid.sum(dim=1).cpu(), self.tokens.visual.sum(dim=1).cpu()

    def _places(self) -> Tensor | None:
        """Return the rotary position of every token, long ``[B, n]``; None when nobody needs it."""
        return None if self._rope is None else (self.tokens.valid.long().cumsum(dim=1) - 1).clamp(min=0)

    @property
    def compressed(self) -> bool:
        """Whether any layer holds fewer slots than it has seen tokens."""
        return any(layer.prefix > 0 for layer in self._full())

    @property
    def entropies(self) -> Tensor | None:
        """float32 ``[L, B]`` in nats: what the budgets followed; None for methods without entropy."""
        kind = None if self.method.allocator is None else self.method.allocator.entropy
        found = None if kind is None else self._entropies.get(kind)
        return None if found is None else found.values

    @property
    def budgets(self) -> Tensor | None:
        """Long ``[L, B]``: slots per full-attention layer and row asked for last; None before a compression."""
        return self._budgets

    def kept(self, layer: int, row: int = 0) -> Tensor:
        """Return the original positions that the last compression kept in one layer.

        Parameters
        ----------
        layer : int
            Index in the model, of a full-attention layer.
        row : int
            Row of the batch.

        Returns
        -------
        Tensor
            long ``[Hkv, S']``, ascending, -1 behind shorter heads. All slots before a compression.
        """
        return kept_positions(self, layer, row)

    def nbytes(self) -> int:
        """Return the bytes allocated: storages with their room to spare, flags, and what observers keep."""
        return stored_bytes(self)

    def nbytes_full(self) -> int:
        """Return the bytes that the same tokens take in an uncompressed cache."""
        return uncompressed_bytes(self)

    def summary(self, row: int = 0) -> dict[str, Any]:
        """Return what was done to one row, ready for JSON; see :func:`meda_kv.cache.summary.summarise`."""
        return summarise(self, row)
