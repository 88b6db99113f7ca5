"""Prompts as observers see them: read at once or in chunks, with and without padding."""

from __future__ import annotations

from itertools import pairwise

import torch
from meda_kv.methods import Look, observe_all

N = 50


def prompt(seed=0, batch=2, heads=4, kv_heads=2, n=N, dim=8):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, h, n, dim, generator=g) * 1.5 for h in (heads, kv_heads))
    return q, k, torch.rand(batch, n, generator=g) < 0.6


def looks(q, k, visual, real=None, cuts=(), causal_mask=False, softcap=None, scale=0.3):
    """The forwards of a prompt that is read up to each cut in turn."""
    n = q.shape[2]
    edges = [0, *cuts, n]
    real = torch.ones_like(visual) if real is None else real
    for a, b in pairwise(edges):
        slots = real[:, None, :b].expand(-1, k.shape[1], -1)
        visible = None
        if causal_mask:
            visible = torch.ones(n, n, dtype=torch.bool).tril()[a:b, :b].expand(len(q), 1, -1, -1)
        yield Look(
            query=q[:, :, a:b],
            key=k[:, :, :b],
            value=k[:, :, :b],
            visible=visible,
            valid=None if bool(real.all()) else slots,
            visual=visual[:, None, :b].expand(-1, k.shape[1], -1),
            query_valid=real[:, a:b],
            query_visual=visual[:, a:b],
            offset=a,
            scale=scale,
            softcap=softcap,
            layer=1,
        )


def run(observer, seen, block=None):
    state, last = {}, None
    for last in seen:
        observe_all([observer], [state], last, block)
    return state, last


def scores(observer, seen, block=None):
    state, last = run(observer, seen, block)
    out = observer.scores(state, last.key, last.value, last.valid)
    assert out.dtype == torch.float32 and out.shape == last.key.shape[:3] and not torch.isnan(out).any()
    for name in set(observer.slots) & set(state):
        assert state[name].shape[:3] == last.key.shape[:3]
    assert all(len(tensor) == len(last.query) for tensor in state.values())
    return out
