"""What the summary says, also after compressions that had nothing to drop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from meda_kv.cache import CompressedCache, MedaCache
from meda_kv.methods import ManualAllocator
from vfm_core.errors import UserError
from zoo import generate, tiny_vlm


@pytest.fixture(scope="module")
def llava():
    return tiny_vlm("llava")


def held(cache, row=0):
    """Real slots per layer, counted on the layers themselves."""
    return [int((layer.positions[row, 0] >= 0).sum()) for layer in cache.layers]


@pytest.mark.parametrize("again", [0.9, 1.0])
def test_a_compression_that_drops_nothing_says_so(llava, again):
    model, inputs = llava
    cache = CompressedCache(model, "h2o", 0.3, floor=4)
    generate(model, inputs(), cache, 5)
    before, positions = cache.summary(), [layer.positions.clone() for layer in cache.layers]
    assert before["note"] is None and before["generated_tokens"] == 4
    cache.compress(again)
    found = cache.summary()
    assert [torch.equal(a, layer.positions) for a, layer in zip(positions, cache.layers, strict=True)] == [True] * 3
    assert found["note"] == "nothing dropped: the layers held no more than their budgets"
    assert cache.ratio == found["ratio"] == 0.3  # the cache still holds what that ratio left
    assert found["prompt_tokens"] == 57 and found["generated_tokens"] == 0
    assert found["kept"] == found["budgets"] == held(cache) == [n + 4 for n in before["kept"]]
    assert found["ratio_actual"] == sum(held(cache)) / (3 * 57)
    assert cache.kept(0).shape[1] == held(cache)[0]
    generate_more(model, cache, 3)
    later = cache.summary()
    assert later["kept"] == found["kept"] and later["generated_tokens"] == 3
    assert held(cache) == [n + 3 for n in found["kept"]]


def generate_more(model, cache, tokens):
    with torch.no_grad():
        for token in range(tokens):
            model(torch.tensor([[20 + token]]), past_key_values=cache)


def test_a_compression_of_some_layers_only(llava):
    """Budgets that cover one layer leave it alone, and its newer slots count as kept."""
    model, inputs = llava
    cache = CompressedCache(model, "h2o", 0.3, budgets=[5, 20, 20])
    generate(model, inputs(), cache, 4)
    assert held(cache) == [8, 23, 23]
    cache.method = replace(cache.method, allocator=ManualAllocator((30, 10, 10)))
    cache.compress()
    found = cache.summary()
    assert found["kept"] == found["budgets"] == held(cache) == [8, 10, 10] and found["note"] is None
    assert found["ratio_actual"] == 28 / (3 * 56) and cache.kept(0).shape[1] == 8
    generate_more(model, cache, 2)
    assert cache.summary()["kept"] == [8, 10, 10] and cache.kept(0).shape[1] == 8 and cache.kept(1).shape[1] == 10


@pytest.mark.parametrize(("method", "entropies"), [("meda", True), ("h2o", False), ("full", False)])
def test_ratio_one_has_budgets_and_entropies_too(llava, method, entropies):
    model, inputs = llava
    cache = CompressedCache(model, method, 1.0)
    generate(model, inputs(batch=2, padded=True), cache, 3)
    for row, n in enumerate((53, 50)):
        found = cache.summary(row)
        assert found["budgets"] == found["kept"] == [n] * 3
        assert found["prompt_tokens"] == n and found["generated_tokens"] == 2 and found["ratio_actual"] == 1.0
        assert found["kept_text"] == [n - 32] * 3 and found["kept_visual"] == [32] * 3
        assert found["note"].startswith("not compressed: ")
        assert (found["entropy"] is not None) == entropies
    if entropies:
        other = CompressedCache(model, method, 0.5, floor=4)
        generate(model, inputs(batch=2, padded=True), other, 3)
        assert found["entropy"] == other.summary(1)["entropy"] and found["entropy_used"] == "cross"


def test_ratio_one_asks_nothing_of_the_entropies(llava, recwarn):
    """They are told where they can be; a prompt without pictures or with an empty row is no error at ratio 1."""
    model, inputs = llava
    cache = MedaCache(model, 1.0)
    generate(model, inputs(images=0, text=30), cache, 2)
    assert cache.summary()["entropy_used"] == "self" and not cache.compressed
    x = inputs(batch=2, images=0, text=30)
    x["attention_mask"][1] = 0
    empty = MedaCache(model, 1.0)
    generate(model, x, empty, 2)
    assert empty.summary(0)["entropy"] is None
    assert not [w for w in recwarn if "modality" in str(w.message)]


@pytest.mark.parametrize("entropy", ["self", "cross"])
def test_a_row_of_padding_only_is_named(llava, entropy):
    model, inputs = llava
    x = inputs(batch=3, images=0, text=40)
    x["attention_mask"][1] = 0
    cache = MedaCache(model, 0.5, floor=4, entropy=entropy)
    with pytest.raises(UserError, match=r"no real token.*attention_mask: row 1: all 0; leave the row out"):
        generate(model, x, cache, 2)
