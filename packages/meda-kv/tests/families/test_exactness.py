"""Ratio 1 is the ordinary cache in every family; below, the cache is the full one with evicted keys masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from meda_kv.attention import installed
from meda_kv.cache import CompressedCache, MedaCache

STEPS = 3


def settings(family: str, **changes: Any) -> dict[str, Any]:
    """Eviction without merging, with budgets that differ between layers."""
    base = {"merge": "none", "floor": 3, "recent_share": 0.5, "temperature": 0.05}
    if family == "text":
        base["entropy"] = "self"
    return {**base, **changes}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_ratio_one_is_the_ordinary_cache(family: str, attn: str) -> None:
    model, inputs = zoo.tiny_vlm(family, attn=attn)
    given = inputs(batch=2, padded=True)
    plain, tokens = zoo.generate(model, given, zoo.plain_cache(model), STEPS)
    cache = MedaCache(model, ratio=1.0)
    ours, chosen = zoo.generate(model, given, cache, STEPS)
    assert float((ours - plain).abs().max()) == 0.0 and chosen.equal(tokens)
    assert not cache.compressed and len(chosen[0]) == STEPS
    stock = zoo.plain_cache(model)
    zoo.generate(model, given, stock, STEPS)
    kept = [t for layer in stock.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    assert cache.nbytes_full() == sum(t.numel() * t.element_size() for t in kept)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_any_ratio_is_the_full_cache_with_evicted_keys_masked(family: str, padded: bool, attn: str) -> None:
    model, inputs = zoo.tiny_vlm(family, attn=attn)
    given = inputs(batch=2, images=3, padded=padded)
    n = given["input_ids"].shape[1]
    cache = MedaCache(model, ratio=0.4, **settings(family))
    ours, tokens = zoo.generate(model, given, cache, STEPS)
    kept = zoo.kept_positions(cache, n)
    reference = zoo.masked_reference(model, given, kept, tokens)
    assert (ours - reference).abs().max() <= 1e-6
    # The check means something: budgets differ, their total is exact, and what was evicted mattered.
    real = given["attention_mask"].sum(1)
    held = torch.stack([(one >= 0).sum(-1)[:, 0] for one in kept.values()])
    assert held.sum(0).tolist() == [round(0.4 * len(kept) * int(count)) for count in real]
    assert held.equal(cache.budgets) and (held[:, 0].unique().numel() > 1 or family == "text")
    everything = zoo.masked_reference(model, given, {}, tokens)
    assert ours[0].equal(everything[0]) or (ours[0] - everything[0]).abs().max() <= 1e-6
    assert (ours[1:] - everything[1:]).abs().max() > 1e-3


@pytest.mark.parametrize("ratio", [0.15, 0.75])
@pytest.mark.parametrize(
    "method", ["streaming", "h2o", "snapkv", "pyramidkv", "look-m", "meda-no-alloc", "knorm", "random", "roco"]
)
def test_every_method_evicts_exactly(method: str, ratio: float) -> None:
    model, inputs = zoo.tiny_vlm("llava")
    given = inputs(batch=2, padded=True)
    options: dict[str, Any] = {"floor": 3}
    if method in ("look-m", "meda-no-alloc"):
        options["merge"] = "none"
    cache = CompressedCache(model, method, ratio, **options)
    ours, tokens = zoo.generate(model, given, cache, STEPS)
    kept = zoo.kept_positions(cache, given["input_ids"].shape[1])
    assert (ours - zoo.masked_reference(model, given, kept, tokens)).abs().max() <= 1e-6
    total = torch.stack([(one >= 0).sum(-1)[:, 0] for one in kept.values()]).sum(0)
    assert total.tolist() == [round(ratio * 3 * int(count)) for count in given["attention_mask"].sum(1)]


def test_padding_never_enters_a_cache() -> None:
    model, inputs = zoo.tiny_vlm("qwen2_vl")
    given = inputs(batch=3, padded=True)
    cache = MedaCache(model, ratio=0.5, **settings("qwen2_vl"))
    zoo.generate(model, given, cache, STEPS)
    for one in zoo.kept_positions(cache, given["input_ids"].shape[1]).values():
        for row in range(3):
            padding = int((given["attention_mask"][row] == 0).sum())
            assert one[row][one[row] >= 0].min() >= padding


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_untouched_with_the_wrapper_installed(family: str, attn: str) -> None:
    model, inputs = zoo.tiny_vlm(family, attn=attn)
    given = inputs(batch=2, padded=True)
    before, _ = zoo.generate(model, given, zoo.plain_cache(model), STEPS)
    with installed(model):
        after, _ = zoo.generate(model, given, zoo.plain_cache(model), STEPS)
        with torch.no_grad():
            bare = model(**given, use_cache=False).logits
    with torch.no_grad():
        assert model(**given, use_cache=False).logits.equal(bare)
    assert after.equal(before)
    assert model.config.get_text_config()._attn_implementation == attn


def test_merging_changes_what_is_kept() -> None:
    model, inputs = zoo.tiny_vlm("llava")
    given = inputs(images=3)
    logits = {}
    for merge in ("none", "average", "pivot", "weighted"):
        cache = MedaCache(model, ratio=0.3, **settings("llava", merge=merge))
        logits[merge], _ = zoo.generate(model, given, cache, 2)
    for merge in ("average", "pivot", "weighted"):
        assert logits[merge][0].equal(logits["none"][0])  # the first token comes from the full cache
        assert (logits[merge][1] - logits["none"][1]).abs().max() > 1e-4
