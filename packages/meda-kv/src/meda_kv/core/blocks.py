"""One blockwise softmax pass over the attention of a layer, shared by every score and entropy.

Nothing here ever holds ``[H, n, n]``: rows are done a block at a time in float32 (float64 for float64 input), the two
block buffers are reused, plainly causal blocks stop at the diagonal, and query heads that share a KV head are folded
into the rows of one product instead of repeating keys.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from vfm_core.errors import UserError

_LOG = logging.getLogger(__name__)

# Upper bound on one block of attention. On a CPU 16 MB measured fastest (8,192 tokens, 8 heads: blocks of 64 rows take
# 0.7 s, of 512 rows 1.0 s, both on one core); an accelerator wants few, large products.
MAX_BLOCK_BYTES = 256 * 2**20
_CPU_BLOCK_BYTES = 16 * 2**20

T = TypeVar("T")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64 input and float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def block_rows(batch: int, heads: int, keys: int, device: torch.device, rows: int) -> int:
    """Return how many query rows one block may have.

    Parameters
    ----------
    batch, heads, keys : int
        A block holds ``batch * heads * block * keys`` float32 numbers, at most 256 MB (16 MB on a CPU).
    device : torch.device
        Where it is computed.
    rows : int
        All rows there are.

    Returns
    -------
    int
        At least 1, at most ``rows``.
    """
    limit = _CPU_BLOCK_BYTES if device.type == "cpu" else MAX_BLOCK_BYTES
    return max(1, min(rows, limit // max(1, 4 * batch * heads * keys)))


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out (an accelerator's or the machine's)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def with_smaller_blocks(
    compute: Callable[[int], T], block: int, what: str = "computing attention", option: str = "block"
) -> tuple[T, int]:
    """Call ``compute(block)``; when memory runs out, halve the block twice before giving up.

    Parameters
    ----------
    compute : callable
        Takes the block size.
    block : int
        The size to start with, >= 1.
    what, option : str
        What is being done and which option of a cache sets the block, for the message.

    Returns
    -------
    (result, int)
        What ``compute`` returned and the block size that worked.

    Raises
    ------
    RuntimeError
        When a quarter of the block still does not fit; names the block size to set.
    """
    for attempt in range(3):
        try:
            return compute(block), block
        except Exception as error:
            if not out_of_memory(error):
                raise
            smaller = max(1, block // 2)
            if attempt == 2 or smaller == block:
                raise RuntimeError(
                    f"out of memory while {what}, even in blocks of {block} rows; set {option}={smaller} or less"
                ) from error
            _LOG.warning("out of memory with blocks of %d rows; trying %d", block, smaller)
            block = smaller
    raise AssertionError("unreachable")


def check_heads(q: Tensor, k: Tensor) -> int:
    """Return the number of query heads per KV head, after checking that ``q`` and ``k`` fit together."""
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise UserError(
            "queries [B, H, q, D] and keys [B, Hkv, S, D] do not fit together",
            where="q, k",
            given=f"{tuple(q.shape)} and {tuple(k.shape)}",
        )
    groups, rest = divmod(q.shape[1], k.shape[1])
    if rest or groups == 0:
        raise UserError(
            "the number of query heads is not a multiple of the number of KV heads",
            where="q, k",
            given=f"{q.shape[1]} and {k.shape[1]}",
        )
    return groups


def check_block(block: int | None) -> None:
    """Raise :class:`UserError` unless ``block`` is None or at least 1."""
    if block is not None and block < 1:
        raise UserError(
            "a block has at least one row", where="block", given=block, remedy="leave it out or use e.g. 512"
        )


def per_slot(mask: Tensor | None, k: Tensor) -> Tensor | None:
    """Return a mask over slots as bool ``[B, Hkv, S]``, given ``[B, S]`` or ``[B, Hkv, S]``."""
    if mask is None:
        return None
    if mask.dim() == 2:
        mask = mask[:, None]
    if (
        mask.dim() != 3
        or mask.shape[0] != k.shape[0]
        or mask.shape[2] != k.shape[2]
        or mask.shape[1] not in (1, k.shape[1])
    ):
        raise UserError(
            "a mask over slots is [B, S] or [B, Hkv, S]",
            where="mask",
            given=tuple(mask.shape),
            remedy=f"the keys are {tuple(k.shape)}",
        )
    return mask.to(device=k.device, dtype=torch.bool).expand(-1, k.shape[1], -1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Take ``index``, long ``[B, 1 | H, R]`` and -1 for entry 0, along dimension 2 of ``[B, H, n, ...]``.

    The same as ``gather`` with an expanded index, which goes number by number and takes three times as long.
    """
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    heads = torch.arange(x.shape[1], device=x.device)[None, :, None]
    return x[batch, heads, index.clamp(min=0)]


def group_heads(x: Tensor, kv_heads: int, how: str = "mean") -> Tensor:
    """Reduce ``[B, H, ...]`` over the query heads that share a KV head to ``[B, Hkv, ...]``.

    Parameters
    ----------
    x : Tensor
        ``[B, H, ...]``; heads ``j * g`` to ``(j + 1) * g - 1`` belong to KV head ``j``.
    kv_heads : int
        Number of KV heads.
    how : {"mean", "max", "sum"}
        The reduction.
    """
    grouped = x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])
    if how == "mean":
        return grouped.mean(2)
    if how == "max":
        return grouped.amax(2)
    if how == "sum":
        return grouped.sum(2)
    raise UserError("unknown way to join query heads", where="group", given=repr(how), remedy="use mean, max or sum")


def plain_columns(visible: Tensor, reach: Tensor) -> Tensor | None:
    """Return the real slots of a mask that says no more than "slots up to a last one, if they are real".

    Parameters
    ----------
    visible : Tensor
        bool ``[B, 1 | Hkv | H, R, S]``.
    reach : Tensor
        long ``[B, R]`` or ``[1, R]``: the last slot that each row would see, -1 for a row that does not matter.

    Returns
    -------
    Tensor or None
        bool ``[B, S]``; None when the mask says more.
    """
    if visible.shape[1] != 1:
        return None
    mask = visible[:, 0].to(torch.bool)
    counted = bool((reach >= 0).all())
    columns = (mask if counted else mask & (reach >= 0)[..., None]).any(1)
    place = torch.arange(mask.shape[2], device=mask.device)
    for start in range(0, mask.shape[1], 1024):
        last = reach[:, start : start + 1024, None]
        differs = mask[:, start : start + 1024] != ((place <= last) & columns[:, None])
        if bool((differs if counted else differs & (last >= 0)).any()):
            return None
    return columns


def drop_plain_mask(
    visible: Tensor | None, valid: Tensor | None, reach: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``(visible, valid)``, or ``(None, valid)`` with the mask's real slots when it says no more than those."""
    columns = None if visible is None else plain_columns(visible, reach.to(k.device))
    if columns is None:
        return visible, valid
    real = per_slot(valid, k)
    return None, columns if real is None else real & columns[:, None]


def scan_attention(
    q: Tensor,
    k: Tensor,
    *,
    visible: Tensor | None = None,
    valid: Tensor | None = None,
    reach: Tensor | None = None,
    scale: float | None = None,
    offset: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    block: int | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Iterate over ``softmax(q k^T * scale)`` in blocks of query rows.

    Parameters
    ----------
    q : Tensor
        ``[B, H, R, D]`` queries.
    k : Tensor
        ``[B, Hkv, S, D]`` keys; query head ``h`` reads KV head ``h // (H / Hkv)``.
    visible : Tensor, optional
        bool ``[B, 1 | Hkv | H, R, S]``: which key each query attends to. Without it (and without ``reach``) attention
        is plainly causal: row ``i`` sees the slots up to ``offset + i``.
    valid : Tensor, optional
        bool ``[B, S]`` or ``[B, Hkv, S]``: keys that exist; the others get no attention.
    reach : Tensor, optional
        long ``[B, R]``: the last slot that each row sees, -1 for a row that sees nothing. For picked rows.
    scale : float, optional
        Factor on the logits, ``D ** -0.5`` by default.
    offset : int
        Slot of the first query.
    softcap : float, optional
        Soft cap on the logits.
    sinks : Tensor, optional
        ``[H]``: one more logit in every softmax of a head, that no key stands for (attention sinks, as in gpt-oss).
        Rows then sum to less than 1.
    block : int, optional
        Rows per block; by default as many as fit in 256 MB (16 MB on a CPU).

    Yields
    ------
    (start, stop, probs)
        ``probs`` is ``[B, H, stop - start, keys]``, float32 (float64 for float64 input), with ``keys <= S``: columns
        beyond the last key that any row of the block sees are left out. Rows that see nothing are zero. The storage is
        reused by the next block.

    Raises
    ------
    RuntimeError
        When memory runs out even after halving the block twice; names the block size to set.
    """
    groups = check_heads(q, k)
    check_block(block)
    batch, heads, count, dim = q.shape
    kv_heads, slots = k.shape[1:3]
    real = per_slot(valid, k)
    dtype = compute_dtype(q)
    factor = dim**-0.5 if scale is None else float(scale)
    if visible is not None and visible.shape[1] not in (1, kv_heads, heads):
        raise UserError("visible is [B, 1 | Hkv | H, R, S]", where="visible", given=tuple(visible.shape))
    if visible is not None and offset + count == slots:
        visible, real = drop_plain_mask(visible, real, torch.arange(offset, slots, device=k.device)[None], k)
        real = per_slot(real, k)
    if sinks is not None and sinks.shape != (heads,):
        raise UserError("sinks are [H], one per query head", where="sinks", given=tuple(sinks.shape))
    sunk = None if sinks is None else sinks.detach().to(q.device, dtype).view(1, heads, 1, 1)
    causal = visible is None and reach is None
    keys_all = k.detach().to(dtype).reshape(batch * kv_heads, slots, dim)
    bias = None
    if causal and real is not None:
        # Plainly causal with padding: its keys count as zero (they may hold NaN) and get a bias inside the product.
        real = real.expand(-1, kv_heads, -1)
        flat = real.reshape(batch * kv_heads, slots)
        keys_all = keys_all.masked_fill(~flat[..., None], 0)
        bias = torch.zeros(batch * kv_heads, 1, slots, dtype=dtype, device=q.device).masked_fill_(~flat[:, None], -1e30)
        filled = real.cumsum(-1)
    block = block or block_rows(batch, heads, slots, q.device, max(1, count))
    buffers: list[Tensor] = []

    def compute(start: int, size: int) -> tuple[int, Tensor]:
        stop = min(count, start + size)
        rows = stop - start
        mask: Tensor | None = None
        if causal:
            last = min(slots, offset + stop)
        elif visible is not None:
            mask = visible[:, :, start:stop].to(device=q.device, dtype=torch.bool)
            seen = mask.any(2).flatten(0, 1).any(0).nonzero()
            last = int(seen[-1]) + 1 if len(seen) else 1
            mask = mask[..., :last]
        else:
            assert reach is not None
            last = max(1, int(reach[:, start:stop].max()) + 1)
            mask = (torch.arange(last, device=q.device) <= reach[:, start:stop, None])[:, None]
        if real is not None and mask is not None:
            here = real[:, :, None, :last]
            if mask.shape[1] == heads and heads != kv_heads:
                here = here.repeat_interleave(groups, 1)
            mask = mask & here
        if mask is not None and mask.shape[1] == kv_heads and kv_heads != heads:
            mask = mask.repeat_interleave(groups, 1)
        need = batch * heads * rows * last
        if len(buffers) < 2 or buffers[0].numel() < need:
            # Once, for the widest block: fresh pages for every block would double the time on a CPU.
            buffers.clear()
            widest = batch * heads * min(size, count) * (min(slots, offset + count) if causal else slots)
            buffers.extend(q.detach().new_empty(widest, dtype=dtype) for _ in range(2))
        logits, probs = (b[:need].view(batch * kv_heads, groups * rows, last) for b in buffers)
        # torch.no_grad must not stay on between two blocks (the caller's code runs there), hence around the work only.
        with torch.no_grad():
            picked = (q.detach()[:, :, start:stop].to(dtype) * factor).reshape(batch * kv_heads, groups * rows, dim)
            keys = keys_all[:, :last].transpose(1, 2)
            if bias is not None and not softcap:
                torch.baddbmm(bias[..., :last], picked, keys, out=logits)
            else:
                torch.bmm(picked, keys, out=logits)
            if softcap:
                logits.div_(softcap).tanh_().mul_(softcap)
                if bias is not None:
                    logits.add_(bias[..., :last])
            by_head = logits.view(batch, heads, rows, last)
            if mask is None:
                future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
                by_head[..., offset + start :].masked_fill_(future[:, : last - offset - start], float("-inf"))
            elif bool(mask.all()):
                mask = None
            else:
                by_head.masked_fill_(~mask, torch.finfo(dtype).min)
            torch.softmax(logits, -1, out=probs)
            shaped = probs.view(batch, heads, rows, last)
            if sunk is not None:
                # What the sink draws: softmax over keys and sink is that over keys times sigmoid(logsumexp - sink).
                shaped.mul_(torch.sigmoid(by_head.logsumexp(-1, keepdim=True) - sunk))
            if mask is not None:
                # A row that sees nothing came out uniform; finite fill keeps a NaN in the keys visible as NaN.
                shaped.masked_fill_(~mask.any(-1, keepdim=True), 0.0)
            elif bias is not None:
                empty = filled[:, :, offset + start : offset + stop, None] == 0
                if bool(empty.any()):
                    shaped.masked_fill_(empty.repeat_interleave(groups, 1), 0.0)
            return last, shaped

    start = 0
    while start < count:
        (_, probs), block = with_smaller_blocks(partial(compute, start), block)
        stop = start + probs.shape[2]
        yield start, stop, probs
        start = stop
