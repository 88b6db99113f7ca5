"""A prompt that is read in several forwards: the same choice as in one, and queries kept for it where that is cheap."""

from __future__ import annotations

import pytest
import torch
from meda_kv.cache import CompressedCache, MedaCache
from zoo import IMAGE, generate, tiny_vlm

EXACT = 1e-6


@pytest.fixture(scope="module")
def llava():
    return tiny_vlm("llava")


@pytest.mark.parametrize("method", ["snapkv", "h2o", "meda"])
def test_prompts_in_chunks(llava, method):
    model, inputs = llava
    x = inputs()
    whole = CompressedCache(model, method, 0.4, floor=4)
    chunked = CompressedCache(model, method, 0.4, floor=4, keep_queries=True)
    wanted, _ = generate(model, x, whole)
    found, _ = generate(model, x, chunked, prefill_chunk_size=16)
    assert (found - wanted).abs().max() < EXACT
    assert all(torch.equal(whole.kept(layer), chunked.kept(layer)) for layer in range(3))


def test_chunked_cross_entropy_says_so(llava):
    model, inputs = llava
    ids = inputs()["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach()
    for keep in (False, True):  # generate would say that the prompt comes in chunks
        cache = MedaCache(model, 0.4, floor=4, keep_queries=keep, visual_mask=ids == IMAGE)
        for start in range(0, ids.shape[1], 16):
            model(inputs_embeds=embeds[:, start : start + 16], past_key_values=cache)
        cache.compress()
        assert cache.summary()["entropy_used"] == ("cross" if keep else "cross (by chunks)")


def test_queries_of_long_prompts_are_kept_only_when_asked_for(llava, monkeypatch):
    model, inputs = llava
    monkeypatch.setattr("meda_kv.cache.cache.SHORT", 20)
    for keep in (False, True):
        cache = MedaCache(model, 0.4, floor=4, keep_queries=keep)
        generate(model, inputs(), cache, prefill_chunk_size=16)
        assert cache.summary()["entropy_used"] == ("cross" if keep else "cross (by chunks)")


def test_forks_of_a_prompt_in_chunks_know_its_queries(llava):
    model, inputs = llava
    cache = CompressedCache(model, "full", 1.0, record=["meda"])
    generate(model, inputs(), cache, 1, prefill_chunk_size=16)
    assert cache.fork("meda", 0.5).summary()["entropy_used"] == "cross"
    cache.reset()
    generate(model, inputs(), cache, 1)
    assert not cache.watch.keep_queries
    assert cache.fork("meda", 0.5).summary()["entropy_used"] == "cross"
