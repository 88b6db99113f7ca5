from __future__ import annotations

import pytest
import torch
from meda_kv.benchmark.caches import (
    Arm,
    copy_into,
    fill,
    kv_shapes,
    our_cache,
    parse_arm,
    stock_bytes,
    stock_cache,
    trimmed,
)
from meda_kv.benchmark.subjects import BENCH_MODELS, Subject, bench_prompt, build_llama, load_subject
from vfm_core.errors import UserError

SLOT = 2 * 2 * 2 * 8 * 4  # bytes of one token: layers, keys and values, KV heads, head size, float32


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load_subject("tiny?random=1&hidden=32&layers=2&heads=4&kv_heads=2", device="cpu")


def test_arms_with_options() -> None:
    assert parse_arm("snapkv") == Arm("snapkv", "snapkv", {})
    arm = parse_arm("meda?merge=none&score_queries=window:32&recent_share=0.5")
    assert arm.method == "meda"
    assert arm.options == {"merge": "none", "score_queries": "window:32", "recent_share": 0.5}
    assert parse_arm("snapkv?per_head=false").options == {"per_head": False}
    assert parse_arm("meda?floor=4", floor=8, recent_share=0.5).options == {"floor": 4, "recent_share": 0.5}
    assert parse_arm("meda", "official-code", floor=None).options == {"preset": "official-code"}
    with pytest.raises(UserError, match="without a value"):
        parse_arm("meda?merge")
    with pytest.raises(UserError, match="snapkv"):
        parse_arm("snapvk")
    with pytest.raises(UserError):
        parse_arm("meda?nonsense=1")


def test_a_prompt_is_as_long_and_as_visual_as_asked(subject: Subject) -> None:
    prompt = bench_prompt(subject, 100, 0.9)
    assert prompt.ids.shape == prompt.visual.shape == (1, 100)
    assert int(prompt.visual.sum()) == 90 and not prompt.visual[0, 0] and not prompt.visual[0, -1]
    assert subject.model.config.image_token_index not in prompt.ids
    assert torch.equal(prompt.ids, bench_prompt(subject, 100, 0.9).ids)
    assert int(bench_prompt(subject, 100, 0.0).visual.sum()) == 0
    assert int(bench_prompt(subject, 70, 0.999).visual.sum()) == 68


def test_stock_bytes_are_the_tokens(subject: Subject) -> None:
    cache = stock_cache(subject)
    subject.read(bench_prompt(subject, 64).ids, cache)
    assert stock_bytes(cache) == 64 * SLOT
    assert kv_shapes(subject) == [(2, 8), (2, 8)]
    subject.decode(cache, 3)
    assert cache.get_seq_length() == 67 and stock_bytes(cache) == 67 * SLOT


def test_trimming_keeps_the_end_and_leaves_the_source(subject: Subject) -> None:
    cache = stock_cache(subject)
    subject.read(bench_prompt(subject, 64).ids, cache)
    short = trimmed(cache, 16)
    assert stock_bytes(short) == 16 * SLOT and stock_bytes(cache) == 64 * SLOT
    assert torch.equal(short.layers[1].keys, cache.layers[1].keys[:, :, -16:])


def test_a_copied_cache_decodes_like_its_source(subject: Subject) -> None:
    stock = stock_cache(subject)
    prompt = bench_prompt(subject, 64)
    subject.read(prompt.ids, stock)
    full = our_cache(subject, Arm("full", "full"), 1.0, prompt)
    copy_into(subject, stock, full, 64)
    with torch.inference_mode():
        token = prompt.ids[:, :1]
        theirs = subject.model(input_ids=token, past_key_values=stock, use_cache=True).logits
        ours = subject.model(input_ids=token, past_key_values=full, use_cache=True).logits
    assert torch.equal(theirs, ours)


def test_a_filled_cache_compresses_and_decodes(subject: Subject) -> None:
    prompt = bench_prompt(subject, 200)
    cache = our_cache(subject, Arm("any", "streaming"), 0.25, prompt)
    fill(subject, cache, 200, kv_shapes(subject))
    assert cache.get_seq_length() == 200
    cache.compress()
    assert [layer.physical for layer in cache.layers] == [50, 50]
    subject.decode(cache, 2)
    assert cache.get_seq_length() == 202 and cache.layers[0].physical == 52


def test_filling_is_the_same_for_every_cache(subject: Subject) -> None:
    shapes = kv_shapes(subject)
    stock, again = stock_cache(subject), stock_cache(subject)
    fill(subject, stock, 64, shapes)
    fill(subject, again, 64, shapes)
    assert torch.equal(stock.layers[1].values, again.layers[1].values)
    assert stock_bytes(stock) == 64 * SLOT


def test_built_in_models_are_random_but_fixed() -> None:
    shape = dict(BENCH_MODELS["bench:gqa"], hidden=16, layers=1, intermediate=16)
    state = torch.random.get_rng_state()
    first, second = build_llama(shape, 0, "sdpa"), build_llama(shape, 0, "sdpa")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, build_llama(shape, 1, "sdpa").lm_head.weight)
    assert not first.training
    with pytest.raises(UserError, match="did you mean bench:mha"):
        load_subject("bench:mah", device="cpu")
