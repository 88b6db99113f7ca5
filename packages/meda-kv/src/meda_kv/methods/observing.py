"""What an observer sees of a layer, and how several observers share one pass over its attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from meda_kv.core.blocks import scan_attention
from meda_kv.core.tiles import TileSums, causal_sums

State = dict[str, Tensor]


@dataclass(frozen=True)
class Look:
    """What one layer's attention saw in one forward: the queries of this forward and all slots held after it.

    Attributes
    ----------
    query : Tensor
        ``[B, H, q, D]``, after RoPE, this forward's tokens only.
    key, value : Tensor
        ``[B, Hkv, S, D]``, after RoPE, every slot of the layer including this forward's (its last ``q`` slots).
    visible : Tensor or None
        bool ``[B, 1 or H, q, S]``: which slot each query attends to. None means plainly causal over real slots.
    valid : Tensor or None
        bool ``[B, Hkv, S]``: slots that hold a real token. None means all.
    visual : Tensor
        bool ``[B, Hkv, S]``: slots that hold an image or video placeholder token.
    query_valid, query_visual : Tensor
        bool ``[B, q]``: the same two facts of this forward's tokens.
    offset : int
        Slot of the first query, that is ``S - q``.
    scale : float
        Factor on the logits, usually ``D ** -0.5``.
    softcap : float or None
        Soft cap on the logits (``cap * tanh(x / cap)``) where the model has one.
    layer : int
        Index of the layer in the model.
    sinks : Tensor or None
        float ``[H]``: one more logit in every softmax of a head, that no key stands for (attention sinks, as in
        gpt-oss); None without.
    block : int or None
        Most query rows of attention to compute at a time; None chooses.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    valid: Tensor | None
    visual: Tensor
    query_valid: Tensor
    query_visual: Tensor
    offset: int
    scale: float
    softcap: float | None
    layer: int
    sinks: Tensor | None = None
    block: int | None = None


@dataclass(frozen=True)
class Observer:
    """Reads queries and keys while the prompt is read and keeps per-layer state for later.

    Attributes
    ----------
    attention : bool
        True when :meth:`rows` wants the full causal attention, block by block; one softmax pass serves all observers.
    totals : tuple of str
        Of ``"columns"`` and ``"entropy"``: an observer of the full attention that names any needs no more than those
        sums over all real queries, and may get them in one call of :meth:`whole` instead of blocks in :meth:`rows`.
    slots : tuple of str
        Names of the state tensors shaped ``[B, Hkv, S, ...]``. The cache gathers, pads, crops and reorders them
        together with the slots. Every other state tensor has the batch first and follows beams only.

    Notes
    -----
    State adds up over several forwards (a prompt read in chunks, a second turn). Before the first forward it is empty.
    """

    attention: ClassVar[bool] = False
    totals: ClassVar[tuple[str, ...]] = ()
    slots: ClassVar[tuple[str, ...]] = ()

    def observe(self, state: State, look: Look) -> None:
        """Take in one forward. Called once per layer and forward, before any :meth:`rows` of the same forward."""

    def rows(self, state: State, look: Look, start: int, stop: int, probs: Tensor) -> None:
        """Take in the attention of queries ``start:stop`` of this forward.

        Parameters
        ----------
        state : dict
            This layer's state.
        look : Look
            The forward.
        start, stop : int
            Rows of ``look.query``.
        probs : Tensor
            float32 ``[B, H, stop - start, keys]`` with ``keys <= S``; the columns left out are zero. The storage is
            reused for the next block: copy what is to be kept.
        """

    def whole(self, state: State, look: Look, totals: TileSums) -> None:
        """Take in the sums over all real queries of this forward, instead of any :meth:`rows` of it.

        Parameters
        ----------
        state : dict
            This layer's state.
        look : Look
            The forward.
        totals : TileSums
            ``columns`` ``[B, H, S]`` and ``entropy`` ``[B]`` (summed over queries, averaged over heads), those that
            :attr:`totals` names. Queries that are not real count nowhere.
        """
        raise NotImplementedError(f"{type(self).__name__} names totals, so it must define whole(state, look, totals)")


def observe_all(observers: Iterable[Observer], states: Sequence[State], look: Look, block: int | None = None) -> None:
    """Show one forward to several observers, computing the attention once for all that want it.

    Parameters
    ----------
    observers : iterable of Observer
        Whom to show it to.
    states : sequence of dict
        Their states for this layer, in the same order; changed in place.
    look : Look
        The forward.
    block : int, optional
        Rows per block of the attention, ``look.block`` by default. Without either it is chosen from the shapes, and
        where every observer is content with sums these are made the short way, see :mod:`meda_kv.core.tiles`.
    """
    block = look.block if block is None else block
    pairs = list(zip(observers, states, strict=True))
    with torch.no_grad():
        for observer, state in pairs:
            observer.observe(state, look)
        readers = [(observer, state) for observer, state in pairs if observer.attention]
        if not readers:
            return
        totals = _totals(readers, look) if block is None else None
        if totals is not None:
            for observer, state in readers:
                observer.whole(state, look, totals)
            return
        for start, stop, probs in scan_look(look, block):
            for observer, state in readers:
                observer.rows(state, look, start, stop, probs)


def _totals(readers: Sequence[tuple[Observer, State]], look: Look) -> TileSums | None:
    """The sums that all readers want, None when one wants more or only a scan serves this forward."""
    if look.sinks is not None or not all(observer.totals for observer, _ in readers):
        return None
    wanted = {name for observer, _ in readers for name in observer.totals}
    return causal_sums(
        look.query,
        look.key,
        look.query_valid,
        visible=look.visible,
        valid=look.valid,
        scale=look.scale,
        offset=look.offset,
        softcap=look.softcap,
        columns="columns" in wanted,
        entropy="entropy" in wanted,
    )


def scan_look(look: Look, block: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """Iterate over the attention of a look in blocks of rows; see :func:`meda_kv.core.scan_attention`."""
    return scan_attention(
        look.query,
        look.key,
        visible=look.visible,
        valid=look.valid,
        scale=look.scale,
        offset=look.offset,
        softcap=look.softcap,
        sinks=look.sinks,
        block=look.block if block is None else block,
    )


def grow(
    state: State, name: str, like: Tensor, dtype: torch.dtype = torch.float32, extra: tuple[int, ...] = ()
) -> Tensor:
    """Return the slot tensor ``name`` of a state, made or lengthened with zeros to the slots of ``like``.

    Parameters
    ----------
    state : dict
        The state; holds the returned tensor afterwards.
    name : str
        Which tensor.
    like : Tensor
        ``[B, Hkv, S, D]``: the keys now held.
    dtype : torch.dtype
        For a new tensor.
    extra : tuple of int
        Sizes after the slot dimension.

    Returns
    -------
    Tensor
        ``[B, Hkv, S, *extra]``.
    """
    rows, heads, slots = like.shape[:3]
    old = state.get(name)
    if old is None:
        state[name] = torch.zeros((rows, heads, slots, *extra), dtype=dtype, device=like.device)
    elif old.shape[2] < slots:
        new = old.new_zeros((rows, heads, slots, *extra))
        new[:, :, : old.shape[2]] = old
        state[name] = new
    elif old.shape[2] > slots:
        raise RuntimeError(
            f"observed state {name!r} holds {old.shape[2]} slots but the layer holds {slots}; call cache.reset()"
        )
    return state[name]
