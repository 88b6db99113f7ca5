"""Bytes are those of the tensors: what is counted is what is alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from meda_kv.cache import CompressedCache
from zoo import generate, tiny_vlm


@pytest.fixture(scope="module")
def llava():
    return tiny_vlm("llava")


def test_compressed_cache_does_not_keep_the_full_one_alive(llava):
    model, inputs = llava
    cache = CompressedCache(model, "knorm", 0.2, floor=4, buffer_step=1)
    with torch.no_grad():
        model(**inputs(images=8), past_key_values=cache)
    full = cache.nbytes()
    old = [weakref.ref(tensor) for layer in cache.layers for tensor in layer.tensors()]
    cache.compress()
    gc.collect()
    assert all(reference() is None for reference in old)
    assert cache.nbytes() < 0.35 * full  # a fifth, positions and one slot of room
    storages = sum(layer.keys.untyped_storage().nbytes() for layer in cache.layers)
    assert storages == sum(2 * 8 * 4 * (layer.physical + 1) for layer in cache.layers)


def test_peak_is_the_full_cache_and_one_compressed_layer(llava, monkeypatch):
    model, inputs = llava
    cache = CompressedCache(model, "knorm", 0.5, floor=4)
    with torch.no_grad():
        model(**inputs(images=8), past_key_values=cache)
    held = []
    settle = type(cache.layers[0]).settle

    def watched(layer, keep, merged=None):
        settle(layer, keep, merged)
        held.append(cache.nbytes())

    monkeypatch.setattr(type(cache.layers[0]), "settle", watched)
    cache.compress()
    assert held == sorted(held, reverse=True) and len(set(held)) == 3


def test_bytes_in_the_summary(llava):
    model, inputs = llava
    x = inputs(batch=2, images=8, text=40, padded=True)
    cache = CompressedCache(model, "h2o", 0.25)
    generate(model, x, cache, 4)
    slot = 2 * 2 * 8 * 4  # key and value, two heads, eight numbers of four bytes
    found = [cache.summary(row) for row in range(2)]
    for row, one in enumerate(found):
        n = int(x["attention_mask"][row].sum())
        assert one["row_bytes_full"] == 3 * (n + 3) * slot
        assert one["row_bytes_in_use"] == (round(0.25 * 3 * n) + 3 * 3) * slot
    assert found[0]["bytes_in_use"] == sum(one["row_bytes_in_use"] for one in found)
    assert found[0]["bytes_full"] == cache.nbytes_full() == 2 * 3 * (x["input_ids"].shape[1] + 3) * slot
    assert found[0]["bytes"] == cache.nbytes() > found[0]["bytes_in_use"]
    assert all(one["compress_seconds"] > 0 for one in found)
    assert {"method", "ratio", "ratio_actual", "visual_tokens", "entropy", "entropy_used"} < found[0].keys()


def test_summary_is_json(llava):
    import json

    model, inputs = llava
    cache = CompressedCache(model, "meda", 0.5, floor=4)
    generate(model, inputs(), cache, 2)
    again = json.loads(json.dumps(cache.summary()))
    assert again == cache.summary()
    assert again["budgets"] == again["kept"]
    assert [a + b for a, b in zip(again["kept_text"], again["kept_visual"], strict=True)] == again["kept"]


def test_meters_let_go_of_what_they_measured(llava):
    model, inputs = llava
    cache = CompressedCache(model, "snapkv-entropy", 0.5, floor=4, keep_queries=True)
    generate(model, inputs(), cache, 2)
    kinds = {type(observer).__name__ for layer in cache.layers for observer in layer.state}
    assert kinds == {"WindowScorer"}
    assert cache.entropies is not None


def test_compression_is_vectorised_over_rows(llava):
    """Fifty rows take about as many operations as one, and not fifty times as many."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.calls += 1
            return function(*args, **(kwargs or {}))

    model, inputs = llava
    counts = []
    for batch in (1, 50):
        cache = CompressedCache(model, "look-m", 0.4)
        with torch.no_grad():
            model(**inputs(batch=batch, images=4), past_key_values=cache)
            Count.calls = 0
            with Count():
                cache.compress()
        assert cache.compressed
        counts.append(Count.calls)
    assert 0 < counts[1] < 2 * counts[0]
