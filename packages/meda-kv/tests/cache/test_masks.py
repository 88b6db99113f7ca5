"""The mask of a layer with slots of its own: past as far as it is real, then this forward's pattern."""

from __future__ import annotations

import pytest
import torch
from meda_kv.cache.layer import CompressedLayer
from meda_kv.cache.masks import layer_mask

HEADS, GROUPS = 2, 2


def query_of(rows, q):
    return torch.zeros(rows, HEADS * GROUPS, q, 4)


def naive(query, slots, valid, own):
    """bool [B, H, q, S], slot by slot."""
    rows, heads, q = query.shape[:3]
    out = torch.zeros(rows, heads, q, slots, dtype=torch.bool)
    for b in range(rows):
        for h in range(heads):
            real = torch.ones(slots, dtype=torch.bool) if valid is None else valid[b, h * valid.shape[1] // heads]
            for i in range(q):
                for j in range(slots):
                    mine = j - (slots - q)
                    if mine == i:
                        out[b, h, i, j] = True
                    elif real[j]:
                        out[b, h, i, j] = mine < 0 or bool(own[i, mine])
    return out


@pytest.mark.parametrize("per_head", [1, HEADS])
@pytest.mark.parametrize("q", [1, 3])
def test_visible_slots(q, per_head):
    query, slots = query_of(2, q), 8
    valid = torch.ones(2, per_head, slots, dtype=torch.bool)
    valid[0, 0, 2:4] = False
    valid[1, -1, 7] = False
    causal = torch.ones(q, q, dtype=torch.bool).tril()
    wanted = naive(query, slots, valid, causal)
    found = layer_mask(query, slots, valid, None, "sdpa")
    assert torch.equal(found.expand_as(wanted), wanted)
    additive = layer_mask(query, slots, valid, None, "eager")
    assert torch.equal(additive.expand_as(wanted) == 0, wanted)
    assert additive.min() == torch.finfo(torch.float32).min


def test_pattern_of_this_forward_is_that_of_the_given_mask():
    """Pictures of a later turn see themselves in both directions; the given mask says so in its last columns."""
    query = query_of(1, 3)
    own = torch.tensor([[True, True, False], [True, True, False], [True, True, True]])
    given = torch.cat([torch.ones(3, 5, dtype=torch.bool), own], 1)[None, None]
    wanted = naive(query, 7, None, own)
    assert torch.equal(layer_mask(query, 7, None, given, "sdpa").expand_as(wanted), wanted)
    additive = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
    assert torch.equal(layer_mask(query, 7, None, additive, "sdpa").expand_as(wanted), wanted)


def test_one_query_over_real_slots_needs_no_mask():
    assert layer_mask(query_of(2, 1), 9, None, None, "sdpa") is None
    assert layer_mask(query_of(2, 3), 9, None, None, "flash_attention_2") is None
    assert layer_mask(query_of(2, 1), 9, torch.ones(2, 1, 9, dtype=torch.bool), None, "flash_attention_2") is None


def test_flash_attention_cannot_skip_slots():
    valid = torch.ones(2, 1, 9, dtype=torch.bool)
    valid[1, 0, 4] = False
    with pytest.raises(RuntimeError, match="sdpa"):
        layer_mask(query_of(2, 1), 9, valid, None, "flash_attention_2")


def test_flex_attention_gets_a_block_mask():
    from torch.nn.attention.flex_attention import create_mask

    valid = torch.ones(2, HEADS, 8, dtype=torch.bool)
    valid[0, 1, 2] = False
    query = query_of(2, 3)
    block = layer_mask(query, 8, valid, None, "flex_attention")
    found = create_mask(block.mask_mod, 2, HEADS * GROUPS, 3, 8, device="cpu")
    assert torch.equal(found, naive(query, 8, valid, torch.ones(3, 3, dtype=torch.bool).tril()))


def test_layer_returns_the_given_mask_while_nothing_is_compressed():
    layer, given = CompressedLayer(), object()
    layer.update(*torch.randn(2, 1, HEADS, 4, 4))
    assert layer.mask_for(query_of(1, 4), given, "sdpa") is given
    layer.own_mask = True
    layer.settle(torch.tensor([[[0, 2], [1, 3]]]))
    layer.update(*torch.randn(2, 1, HEADS, 1, 4))
    assert layer.mask_for(query_of(1, 1), given, "sdpa") is None
