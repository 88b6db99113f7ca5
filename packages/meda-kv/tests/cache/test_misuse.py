"""Wrong use ends in one clear error, and leaves the cache usable or says that it is not."""

from __future__ import annotations

import pytest
import torch
from meda_kv.cache import CompressedCache, MedaCache
from vfm_core.errors import UserError
from zoo import generate, plain_cache, tiny_vlm


@pytest.fixture(scope="module")
def llava():
    return tiny_vlm("llava")


@pytest.fixture
def filled(llava):
    model, inputs = llava
    cache = CompressedCache(model, "h2o", 0.5, floor=4)
    generate(model, inputs(), cache, 3)
    return cache


def test_another_prompt_without_reset(llava, filled):
    model, inputs = llava
    x = inputs(images=0, text=20)
    length = filled.get_seq_length()
    with pytest.raises(RuntimeError, match=r"another prompt; call cache\.reset\(\)"):
        model(**x, past_key_values=filled)
    assert filled.get_seq_length() == filled.tokens.length == length  # nothing was changed
    filled.reset()
    plain, _ = generate(model, x, plain_cache(model), 1)
    assert torch.equal(generate(model, x, filled, 1)[0], plain)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 8}, {"prompt_lookup_num_tokens": 2}], ids=str)
@pytest.mark.parametrize("text", [-15, 0, 2, 3, 40], ids="{:+d}".format)
@pytest.mark.parametrize("family", ["text", "llava"])
def test_generate_refuses_another_prompt(family, text, options):
    """Shorter, as long, as long as what was read, longer; without padding, so that no mask tells."""
    model, inputs = tiny_vlm(family)
    cache = CompressedCache(model, "h2o", 0.5, floor=2)
    generate(model, inputs(text=20), cache, 3)
    length = cache.get_seq_length()
    x = inputs(text=20 + text, seed=5)
    with pytest.raises(RuntimeError, match=r"another prompt; call cache\.reset\(\)"):
        generate(model, x, cache, 3, **options)
    assert cache.get_seq_length() == cache.tokens.length == length
    cache.reset()
    wanted, _ = generate(model, x, CompressedCache(model, "h2o", 0.5, floor=2), 3, **options)
    assert torch.equal(generate(model, x, cache, 3, **options)[0], wanted)


def test_generate_refuses_another_prompt_of_embeddings_or_of_new_tokens_alone(llava, filled):
    model, inputs = llava
    embeds = model.get_input_embeddings()(inputs(images=0)["input_ids"]).detach()
    with pytest.raises(RuntimeError, match="another prompt"):
        model.generate(inputs_embeds=embeds, past_key_values=filled, max_new_tokens=2)
    length = filled.get_seq_length()
    new, wrong = torch.tensor([[20, 21, 22]]), torch.ones(1, length + 4, dtype=torch.long)
    with pytest.raises(RuntimeError, match="another prompt"):
        model.generate(input_ids=new, attention_mask=wrong, past_key_values=filled, max_new_tokens=2)
    model.generate(input_ids=new, attention_mask=wrong[:, 1:], past_key_values=filled, max_new_tokens=2)
    assert filled.get_seq_length() == length + 4


def test_a_forward_without_tokens(llava, filled):
    model, _ = llava
    with pytest.raises(RuntimeError, match="another prompt"):
        model(torch.zeros(1, 0, dtype=torch.long), past_key_values=filled)


@pytest.mark.parametrize("by_hand", [True, False])
def test_use_cache_false_is_refused(llava, by_hand):
    model, inputs = llava
    cache = CompressedCache(model, "h2o", 0.5, floor=4)
    with pytest.raises(RuntimeError, match="use_cache=False"):
        if by_hand:
            model(**inputs(), past_key_values=cache, use_cache=False)
        else:
            model.generate(**inputs(), past_key_values=cache, use_cache=False, max_new_tokens=2)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("action", ["compress", "fork", "summary", "next"])
def test_several_logits_of_ones_own_do_not_leave_a_forward_open(llava, action):
    model, inputs = llava
    cache = CompressedCache(model, "h2o", 0.5, floor=4, compress_at="prefill")
    model(**inputs(), past_key_values=cache, logits_to_keep=5)
    if action == "compress":
        assert cache.compress().compressed
    elif action == "fork":
        assert cache.fork().compressed and not cache.compressed
    elif action == "summary":
        assert cache.summary()["note"] == "not compressed yet: waits for the first decoded token"
        generate(model, inputs(), CompressedCache(model, "h2o", 0.5, floor=4), 2)
    model(torch.tensor([[9]]), past_key_values=cache)
    assert cache.compressed and cache.summary()["note"] is None


def test_another_batch_size(llava, filled):
    model, inputs = llava
    with pytest.raises(RuntimeError, match=r"holds 1 rows .* batch of 2; call cache\.reset\(\)"):
        model(**inputs(batch=2, images=0), past_key_values=filled)


def test_another_model(llava, filled):
    other, inputs = tiny_vlm("llava", seed=1)
    CompressedCache(other)
    with pytest.raises(RuntimeError, match="another model"):
        other(**inputs(images=0), past_key_values=filled)


def test_a_model_without_hooks(llava):
    from meda_kv.attention import install, uninstall

    model, inputs = llava
    cache = CompressedCache(model, "h2o", 0.5, floor=4)
    uninstall(model)
    try:
        with pytest.raises(RuntimeError, match=r"call meda_kv\.install"):
            model(**inputs(), past_key_values=cache)
    finally:
        install(model)
    assert cache.get_seq_length() == 0
    generate(model, inputs(), cache, 2)
    assert cache.compressed


def test_crop_into_the_compressed_prompt(filled):
    length = filled.get_seq_length()
    with pytest.raises(RuntimeError, match=r"only 2 were read since .*cache\.reset\(\)"):
        filled.crop(-3)
    assert filled.get_seq_length() == filled.tokens.length == length
    filled.crop(-2)
    assert filled.get_seq_length() == length - 2


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_keys_that_are_not_finite(llava, what):
    model, inputs = llava
    cache = CompressedCache(model, "snapkv", 0.5, floor=4, compress_at="decode")
    model(**inputs(), past_key_values=cache)
    clean = cache.layers[2].keys[0, 1, 3, 0].clone()
    cache.layers[2].keys[0, 1, 3, 0] = what
    with pytest.raises(RuntimeError, match="in the keys of layer 2, head 1"):
        cache.compress()
    assert not cache.compressed  # not even the layers before
    cache.layers[2].keys[0, 1, 3, 0] = clean
    cache.compress()
    assert cache.compressed


def test_scores_that_are_not_finite(llava):
    from dataclasses import dataclass

    from meda_kv.methods import Method, Scorer, UniformAllocator

    @dataclass(frozen=True)
    class Broken(Scorer):
        def scores(self, state, key, value, valid):
            found = key.float().norm(dim=-1)
            found[:, 1, 5] = torch.nan
            return found

    @dataclass(frozen=True)
    class Misshapen(Scorer):
        def scores(self, state, key, value, valid):
            return key.float().norm(dim=-1)[:, :, 1:]

    model, inputs = llava
    for scorer, message in ((Broken(), "scores of layer 0, head 1"), (Misshapen(), "gave scores of shape")):
        cache = CompressedCache(model, Method("own", scorer=scorer, allocator=UniformAllocator()), 0.5)
        with pytest.raises(RuntimeError, match=message):
            generate(model, inputs(), cache, 2)


def test_padding_that_is_not_a_number_does_not_matter(llava):
    model, inputs = llava
    x = inputs(batch=2, padded=True)
    cache = CompressedCache(model, "h2o", 0.5, floor=4)
    model(**x, past_key_values=cache)
    cache.layers[0].keys[1, :, 0] = torch.nan  # a padding slot
    cache.compress()
    assert cache.layers[0].keys.isfinite().all()


def test_a_ratio_too_small_for_the_floors_says_which_is_legal(llava):
    model, inputs = llava
    cache = CompressedCache(model, "h2o", 0.1)
    with pytest.raises(UserError, match=r"smallest legal ratio is 0\.3019"):
        generate(model, inputs(), cache, 2)
    assert cache.get_seq_length() == 0  # before anything was read
    model(**inputs(), past_key_values=cache)  # whether more follows cannot be known
    with pytest.raises(UserError, match=r"smallest legal ratio is 0\.3019"):
        model(torch.tensor([[9]]), past_key_values=cache)
    assert not cache.compressed
    cache.compress(0.5)
    assert cache.compressed


def test_a_failed_forward_is_taken_back(llava):
    model, inputs = llava
    x = inputs()
    cache = CompressedCache(model, "h2o", 0.5, floor=4)
    wanted, tokens = generate(model, x, CompressedCache(model, "h2o", 0.5, floor=4), 5)
    model(**x, past_key_values=cache)

    def fail(*_):
        raise KeyError("on purpose")

    hook = model.get_decoder().layers[2].mlp.register_forward_pre_hook(fail)
    step = tokens[:, :1]
    for _ in range(2):
        with pytest.raises(KeyError):
            model(input_ids=step, past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == cache.tokens.length == 53
    assert {layer.get_seq_length() for layer in cache.layers} == {53}
    assert torch.equal(model(input_ids=step, past_key_values=cache).logits[:, -1], wanted[1])


def test_a_failed_prompt_leaves_an_empty_cache(llava):
    model, inputs = llava
    cache = CompressedCache(model, "h2o", 0.5, budgets={"alphas": [1, 1, 1]})

    def fail(*_):
        raise KeyError("on purpose")

    hook = model.get_decoder().layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        model(**inputs(), past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 0
    generate(model, inputs(), cache, 2)
    assert cache.compressed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"method": "snapvk"}, "did you mean snapkv"),
        ({"preset": "papier"}, "preset"),
        ({"compress_at": "later"}, "use decode, prefill, layer, first-step"),
        ({"compress_at": "layer", "method": "meda"}, "known before"),
        ({"compress_at": "layer", "method": "h2o-mass"}, "known before"),
        ({"decode_budget": 3}, "use 16 or more"),
        ({"decode_budget": 30, "method": "full"}, "keeps everything"),
        ({"buffer_step": 0}, "use 1 or more"),
        ({"decode_slack": 0}, "use 1 or more"),
        ({"budgets": {"alphas": []}}, "alphas"),
        ({"budgets": {"alphas": ["a"]}}, "alphas"),
        ({"budgets": "missing.json"}, "no such profile"),
        ({"budgets": {"alphas": [1, 1]}, "go": True}, "give 3"),
        ({"offloading": True}, "cannot be compressed"),
        ({"cache_implementation": "static"}, "cannot be compressed"),
        ({"merging": "none"}, "unknown option"),
        ({"record": ["nothing"]}, "unknown method"),
    ],
)
def test_bad_options_are_user_errors(llava, options, message):
    model, inputs = llava
    options = {"method": "h2o", **options}
    go = options.pop("go", False)
    with pytest.raises(UserError, match=message):
        cache = CompressedCache(model, **options)
        assert go
        generate(model, inputs(), cache, 1)


def test_questions_too_early_or_out_of_range(llava, filled):
    model, _ = llava
    empty = CompressedCache(model, "h2o")
    with pytest.raises(RuntimeError, match="nothing has been read yet"):
        empty.compress()
    assert empty.summary()["prompt_tokens"] == 0
    assert empty.nbytes() == empty.nbytes_full() == 0
    with pytest.raises(UserError, match="no such row"):
        filled.summary(1)
    with pytest.raises(UserError, match="use one of 0, 1, 2"):
        filled.kept(3)


def test_unsupported_models_are_refused_before_anything_is_computed():
    with pytest.raises(TypeError, match="unsupported"):
        MedaCache(torch.nn.Linear(2, 2))


def test_new_pictures_that_stock_transformers_cannot_read_either():
    """Qwen's classes want the grids of all pictures; with those of the new ones alone they stop, whatever the cache."""
    from zoo import IMAGE

    model, inputs = tiny_vlm("qwen2_5_vl")
    given, new = inputs(), inputs(images=1, text=4, seed=8)
    for cache in (plain_cache(model), MedaCache(model, 0.5, floor=4)):
        _, tokens = generate(model, given, cache, 2)
        ids = torch.cat([given["input_ids"], tokens, new["input_ids"]], 1)
        whole = {**new, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole["mm_token_type_ids"] = (ids == IMAGE).long()
        with pytest.raises(StopIteration):
            generate(model, whole, cache, 2)


def test_nothing_is_kept_before_anything_was_read(llava) -> None:
    cache = CompressedCache(llava[0] if isinstance(llava, tuple) else llava, "h2o", 0.5)
    assert cache.kept(0).numel() == 0
