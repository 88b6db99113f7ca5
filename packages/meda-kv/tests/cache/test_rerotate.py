"""Keys moved to positions without gaps equal keys that were computed there."""

from __future__ import annotations

import pytest
import torch
from meda_kv.cache import CompressedCache
from zoo import generate, tiny_vlm


def keys_at(model, ids, positions):
    """Keys of the first layer of a text model for tokens at given positions, [1, Hkv, n, D]."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model.model(input_ids=ids, position_ids=positions, past_key_values=cache)
    return cache.layers[0].keys


@pytest.fixture(scope="module")
def text_model():
    return tiny_vlm("text")


@pytest.mark.parametrize("padded", [False, True])
def test_streaming_closes_the_gap(text_model, padded):
    model, inputs = text_model
    x = inputs(batch=2, text=60, padded=padded)
    cache = CompressedCache(model, "streaming", 0.4, rerotate=True)
    with torch.no_grad():
        model(**x, position_ids=(x["attention_mask"].cumsum(1) - 1).clamp(min=0), past_key_values=cache)
        cache.compress()
        for row in range(2):
            kept = cache.kept(0, row)[0]
            kept = kept[kept >= 0]
            assert kept[4] - kept[3] > 1  # there is a gap behind the sinks
            last = int(x["attention_mask"][row].sum()) - 1
            places = last - torch.arange(len(kept) - 1, -1, -1)
            wanted = keys_at(model, x["input_ids"][row : row + 1, kept], places[None])
            found = cache.layers[0].keys[row, :, : len(kept)]
            assert (found - wanted[0]).abs().max() < 1e-5


def test_closing_again_while_decoding(text_model):
    model, inputs = text_model
    x = inputs(text=60)
    cache = CompressedCache(model, "streaming", 0.5, rerotate=True, decode_budget=20, decode_slack=3)
    _, tokens = generate(model, x, cache, 18)
    ids = torch.cat([x["input_ids"], tokens], 1)[:, : cache.get_seq_length()]
    held = cache.layers[0].positions[0, 0]
    assert (held[1:] - held[:-1]).max() > 20
    places = cache.get_seq_length() - 1 - torch.arange(len(held) - 1, -1, -1)
    with torch.no_grad():
        wanted = keys_at(model, ids[:, held], places[None])
    assert (cache.layers[0].keys - wanted).abs().max() < 1e-5


def test_other_rotary_embeddings_are_refused():
    for family, reason in (("qwen2_vl", "M-RoPE"), ("qwen2_5_vl", "M-RoPE"), ("gemma3", "no single rotary embedding")):
        model, _ = tiny_vlm(family)
        with pytest.raises(TypeError, match=f"unsupported: rerotate=True .*{reason}"):
            CompressedCache(model, "streaming", rerotate=True)


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "depend on the length"),
        ({"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}, None),
    ],
)
def test_frequencies_of_other_types(rope, reason):
    if rope["rope_type"] == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model, inputs = tiny_vlm("text", rope_parameters=rope)
    if reason:
        with pytest.raises(TypeError, match=reason):
            CompressedCache(model, "streaming", rerotate=True)
        return
    cache = CompressedCache(model, "streaming", 0.5, rerotate=True)
    with torch.no_grad():
        x = inputs(text=40)
        model(**x, past_key_values=cache)
        cache.compress()
        kept = cache.kept(0)[0]
        wanted = keys_at(model, x["input_ids"][:, kept], (40 - torch.arange(len(kept) - 1, -1, -1))[None])
    assert (cache.layers[0].keys - wanted).abs().max() < 1e-5
