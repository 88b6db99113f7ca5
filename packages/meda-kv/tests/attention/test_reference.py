"""The masked reference is itself right: checked against plain attention and by what must not change."""

from __future__ import annotations

import pytest
import torch
import zoo
from meda_kv.attention.reference import evicted_slots


def test_evicted_slots_are_the_complement() -> None:
    kept = torch.tensor([[[0, 3, -1], [1, 2, 4]]])
    assert evicted_slots(kept, 5).int().tolist() == [[[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]]]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_keeping_everything_is_the_full_cache(family: str) -> None:
    model, inputs = zoo.tiny_vlm(family)
    given = inputs(batch=2, padded=True)
    full, tokens = zoo.generate(model, given, zoo.plain_cache(model))
    reference = zoo.masked_reference(model, given, {}, tokens)
    assert (reference - full).abs().max() <= 1e-6
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_eviction_is_deleting_the_tokens_keys_after_the_prompt() -> None:
    model, inputs = zoo.tiny_vlm("text")
    given = inputs(text=11)
    n = given["input_ids"].shape[1]
    keep = torch.tensor([0, 3, 4, 7, n - 1])
    kept = [keep[None, None].expand(1, 2, -1)] * 3
    logits, tokens = [], []
    cache = zoo.plain_cache(model)
    with torch.no_grad():
        logits.append(model(**given, past_key_values=cache).logits[:, -1])
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
        for step in range(2):
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            # No mask and one query: sdpa looks at every key there is.
            position = torch.tensor([[n + step]])
            output = model(tokens[-1], position_ids=position, past_key_values=cache)
            logits.append(output.logits[:, -1])
    reference = zoo.masked_reference(model, given, kept, 3)
    torch.testing.assert_close(reference, torch.stack(logits), atol=1e-6, rtol=0)


def test_heads_and_rows_are_told_apart() -> None:
    model, inputs = zoo.tiny_vlm("text")
    given = inputs(batch=2, text=11)
    n = given["input_ids"].shape[1]
    everything = torch.arange(n).expand(2, 2, n)
    full = zoo.masked_reference(model, given, [everything] * 3, 3)
    one_head = everything.clone()
    one_head[1, 1, :6] = -1
    changed = zoo.masked_reference(model, given, [everything, one_head, everything], 3)
    assert changed[0].equal(full[0]) and changed[:, 0].equal(full[:, 0])
    assert (changed[1, 1] - full[1, 1]).abs().max() > 1e-4
