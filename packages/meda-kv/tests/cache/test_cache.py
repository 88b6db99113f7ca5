"""The cache in generate: exact budgets, batches, turns, beams, chunks, crops, and compression at every moment."""

from __future__ import annotations

import pytest
import torch
from meda_kv.attention.reference import reference_model
from meda_kv.cache import CompressedCache, MedaCache, cache_for
from meda_kv.methods import resolve_method
from zoo import generate, kept_positions, masked_reference, plain_cache, tiny_vlm

EXACT = 2e-6


@pytest.fixture(scope="module")
def llava():
    return tiny_vlm("llava")


def ones_like_mask(inputs, more):
    return torch.cat([inputs["attention_mask"], torch.ones(len(inputs["input_ids"]), more, dtype=torch.long)], 1)


@pytest.mark.parametrize("method", ["snapkv", "h2o", "streaming", "pyramidkv", "meda-no-merge", "random"])
def test_generation_equals_the_full_cache_with_dropped_keys_masked(llava, method):
    model, inputs = llava
    x = inputs(batch=2, padded=True)
    cache = CompressedCache(model, method, 0.4, floor=4)
    logits, tokens = generate(model, x, cache)
    n = x["input_ids"].shape[1]
    assert cache.compressed
    assert (logits - masked_reference(model, x, kept_positions(cache, n), tokens)).abs().max() < EXACT
    for row in range(2):
        real = int(x["attention_mask"][row].sum())
        assert cache.summary(row)["prompt_tokens"] == real
        assert sum(cache.summary(row)["kept"]) == round(0.4 * 3 * real) == int(cache.budgets[:, row].sum())


def test_ratio_one_is_bitwise_the_plain_cache(llava):
    model, inputs = llava
    x = inputs(batch=2, padded=True)
    plain, _ = generate(model, x, plain_cache(model))
    for cache in (cache_for(model, "meda", 1.0), cache_for(model, "full", 1.0)):
        assert torch.equal(generate(model, x, cache)[0], plain)
        assert not cache.compressed
        assert cache.summary()["note"].startswith("not compressed")


@pytest.mark.parametrize("method", ["snapkv", "meda", "h2o-mass"])
def test_rows_do_not_depend_on_their_batch_mates(llava, method):
    model, inputs = llava
    x = inputs(batch=3, padded=True)
    together = CompressedCache(model, method, 0.4, floor=4)
    logits, _ = generate(model, x, together)
    for row in range(3):
        real = x["attention_mask"][row].bool()
        alone = CompressedCache(model, method, 0.4, floor=4)
        one = {
            "input_ids": x["input_ids"][row : row + 1, real],
            "attention_mask": x["attention_mask"][row : row + 1, real],
            "pixel_values": x["pixel_values"][2 * row : 2 * row + 2],
        }
        assert (generate(model, one, alone)[0][:, 0] - logits[:, row]).abs().max() < EXACT
        assert alone.budgets[:, 0].tolist() == together.budgets[:, row].tolist()
        pad = int((~real).sum())
        for layer in range(3):
            mine, theirs = alone.kept(layer), together.kept(layer, row)
            assert torch.equal(mine + pad, theirs)


def test_a_prompt_shorter_than_the_floor_is_left_whole(llava):
    model, inputs = llava
    x = inputs(images=0, text=9)
    cache = CompressedCache(model, "h2o", 0.2)
    plain, _ = generate(model, x, plain_cache(model))
    assert torch.equal(generate(model, x, cache)[0], plain)
    assert cache.summary()["note"] == "not compressed: n <= budget"
    assert cache.summary()["ratio_actual"] == 1.0


def test_a_long_and_a_short_row_together(llava):
    model, inputs = llava
    x = inputs(batch=2, images=0, text=30)
    x["attention_mask"][1, :22] = 0
    cache = CompressedCache(model, "h2o", 0.7)
    logits, tokens = generate(model, x, cache)
    assert cache.summary(1)["kept"] == [9.0, 9.0, 9.0]
    assert sum(cache.summary(0)["kept"]) == round(0.7 * 3 * 31)
    assert (logits - masked_reference(model, x, kept_positions(cache, 31), tokens)).abs().max() < EXACT


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_second_turn_and_compressing_again(attn):
    model, inputs = tiny_vlm("llava", attn=attn)
    x = inputs(batch=2, padded=True)
    n = x["input_ids"].shape[1]
    cache = CompressedCache(model, "h2o", 0.5, floor=4)
    logits, tokens = generate(model, x, cache)
    kept = kept_positions(cache, n)
    turn = torch.randint(8, 90, (2, 5), generator=torch.Generator().manual_seed(3))
    y = {"input_ids": torch.cat([x["input_ids"], tokens, turn], 1), "attention_mask": ones_like_mask(x, 9)}
    more, answer = generate(model, y, cache, 3)
    reference = masked_reference(model, x, kept, tokens, turn={"input_ids": turn}, turn_steps=answer)
    assert (torch.cat([logits, more]) - reference).abs().max() < EXACT
    before = [set(cache.layers[0].positions[1, h].tolist()) for h in range(2)]
    entropies = cache.entropies
    read = int(cache.tokens.valid[1].sum())
    cache.compress(0.3)
    after = [set(cache.layers[0].positions[1, h].tolist()) for h in range(2)]
    assert all(new - {-1} < old for new, old in zip(after, before, strict=True))  # nothing comes back
    assert int(cache.budgets[:, 1].sum()) == round(0.3 * 3 * read)
    assert entropies is cache.entropies is None
    cache.compress(1.0)  # more than is there: nothing happens
    assert [set(cache.layers[0].positions[1, h].tolist()) for h in range(2)] == after
    z = {
        "input_ids": torch.cat([y["input_ids"], answer, turn], 1),
        "attention_mask": torch.cat([y["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1),
    }
    assert generate(model, z, cache, 2)[0].isfinite().all()


def test_compressing_again_follows_the_new_queries_and_the_old_entropies(llava):
    model, inputs = llava
    x = inputs()
    kept = []
    for seed in (1, 2):
        cache = CompressedCache(model, "snapkv-entropy", 0.8, floor=4)
        _, tokens = generate(model, x, cache, 2)
        entropies = cache.entropies.clone()
        turn = torch.randint(8, 90, (1, 12), generator=torch.Generator().manual_seed(seed))
        ids = torch.cat([x["input_ids"], tokens, turn], 1)
        model(input_ids=ids[:, cache.get_seq_length() :], past_key_values=cache)
        cache.compress(0.3)
        assert torch.equal(cache.entropies, entropies)
        kept.append(cache.kept(1))
    assert not torch.equal(*kept)


def test_beam_search_equals_the_masked_reference(llava):
    model, inputs = llava
    x = inputs(batch=2, padded=True)
    n = x["input_ids"].shape[1]
    options = {"max_new_tokens": 5, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    probe = CompressedCache(model, "h2o", 0.4, floor=4)
    generate(model, x, probe, 2)
    kept = {layer: positions.repeat_interleave(3, 0) for layer, positions in kept_positions(probe, n).items()}
    with reference_model(model, kept, n):
        wanted = model.generate(**x, past_key_values=plain_cache(model), **options)
    cache = CompressedCache(model, "h2o", 0.4, floor=4)
    found = model.generate(**x, past_key_values=cache, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert (found.sequences_scores - wanted.sequences_scores).abs().max() < EXACT
    assert cache.summary(4)["prompt_tokens"] == int(x["attention_mask"][1].sum())


def test_prompt_lookup_with_compression_after_the_prefill(llava):
    model, inputs = llava
    x = inputs()
    caches = [CompressedCache(model, "h2o", 0.5, compress_at="prefill") for _ in range(2)]
    plain = model.generate(**x, past_key_values=caches[0], max_new_tokens=12)
    looked = model.generate(**x, past_key_values=caches[1], max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, looked)


def test_crop_goes_back_and_generation_repeats(llava):
    model, inputs = llava
    x = inputs(batch=2, padded=True)
    cache = CompressedCache(model, "snapkv", 0.5, floor=4)
    generate(model, x, cache, 2)
    length, question = cache.get_seq_length(), torch.tensor([[9, 11], [12, 13]])
    answers = []
    for _ in range(2):
        mask = ones_like_mask(x, length - x["input_ids"].shape[1] + 2)
        out = model(input_ids=question, attention_mask=mask, past_key_values=cache)
        answers.append(out.logits)
        cache.crop(length - cache.get_seq_length())
        assert cache.get_seq_length() == cache.tokens.length == length
    assert torch.equal(*answers)


def test_row_operations_reach_everything(llava):
    model, inputs = llava
    cache = MedaCache(model, 0.5, floor=4, merge="none")
    generate(model, inputs(batch=2, padded=True), cache, 2)
    first = cache.summary(1)
    cache.batch_repeat_interleave(2)
    assert cache.summary(2)["kept"] == cache.summary(3)["kept"] == first["kept"]
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert cache.summary(0)["entropy"] == first["entropy"]
    cache.batch_select_indices(torch.tensor([0]))
    assert {key: cache.summary(0)[key] for key in ("kept_visual", "budgets", "prompt_tokens", "entropy_used")} == {
        key: first[key] for key in ("kept_visual", "budgets", "prompt_tokens", "entropy_used")
    }


def test_layers_compress_themselves_with_a_profile(llava):
    model, inputs = llava
    x = inputs(batch=2, padded=True)
    profile = {"alphas": [1.0, 2.0, 3.0]}
    inside = CompressedCache(model, "h2o", 0.4, budgets=profile, floor=4)
    after = CompressedCache(model, "h2o", 0.4, budgets=profile, floor=4, compress_at="decode")
    assert inside.compress_at == "layer"
    most = []
    update = inside.update

    def watched(key, value, layer_idx, *rest):
        found = update(key, value, layer_idx, *rest)
        most.append(sum(layer.physical for layer in inside.layers))
        return found

    inside.update = watched
    found, _ = generate(model, x, inside)
    wanted, _ = generate(model, x, after)
    assert (found - wanted).abs().max() < EXACT
    assert torch.equal(inside.budgets, after.budgets)
    n = x["input_ids"].shape[1]
    assert max(most[:3]) <= n + int(inside.budgets[:, 0].sum())  # one full layer and compressed ones, never all full


def test_profile_file_follows_its_shares(llava, tmp_path):
    from meda_kv.profiles import make_profile

    model, inputs = llava
    path = make_profile(model, [[1.0, 2.0, 3.0]]).save(tmp_path / "profile.json")
    cache = MedaCache(model, 0.4, budgets=path, floor=4)
    generate(model, inputs(), cache, 2)
    first, second, third = cache.summary()["budgets"]
    assert first + second + third == round(0.4 * 3 * 53)
    assert first < second < third
    assert cache.compress_at == "layer"


def test_profile_with_a_prompt_in_chunks_never_holds_more_than_its_share(llava):
    model, inputs = llava
    cache = CompressedCache(model, "snapkv", 0.4, budgets={"alphas": [1, 1, 1]}, floor=4)
    held = []
    end = cache.end_forward
    cache.end_forward = lambda error: (end(error), held.append(sum(layer.physical for layer in cache.layers)))
    generate(model, inputs(), cache, 1, prefill_chunk_size=16)
    read = [16, 32, 48, 53]
    assert held == [round(0.4 * 3 * n) for n in read]


@pytest.mark.parametrize("method", ["h2o", "snapkv-entropy", "streaming"])
def test_decode_budget_bounds_the_length(llava, method):
    model, inputs = llava
    cache = CompressedCache(model, method, 0.5, decode_budget=20, decode_slack=4)
    lengths = []
    end = cache.end_forward
    cache.end_forward = lambda error: (end(error), lengths.append(sum(layer.physical for layer in cache.layers)))
    generate(model, inputs(batch=2, padded=True), cache, 20)
    assert max(lengths[1:]) <= 3 * 24 and min(lengths[1:]) == 3 * 20
    assert cache.summary()["prompt_tokens"] == 53
    assert cache.summary()["generated_tokens"] == 19


def test_scores_go_on_adding_up_while_decoding(llava):
    """With a decode budget, later queries decide which prompt tokens survive."""
    model, inputs = llava
    x = inputs()
    watched = CompressedCache(model, "h2o", 0.5, decode_budget=200)
    still = CompressedCache(model, "h2o", 0.5)
    for cache in (watched, still):
        generate(model, x, cache, 12)
    total = [next(iter(cache.layers[0].state.values()))["sums"].sum() for cache in (watched, still)]
    assert total[0] - total[1] > 10  # about one per decoded query and KV head


def test_first_step_scores_contain_the_first_decoded_query(llava):
    model, inputs = llava
    x = inputs()
    cache = CompressedCache(model, "h2o", 0.5, compress_at="first-step")
    plain, tokens = generate(model, x, plain_cache(model), 6)
    logits, _ = generate(model, x, cache, 6)
    assert torch.equal(logits[:2], plain[:2])  # the first step still reads the full cache
    assert not torch.equal(logits[2], plain[2])
    assert int(cache.budgets.sum()) == round(0.5 * 3 * 54)
    key = {"input_ids": torch.cat([x["input_ids"], tokens[:, :1]], 1), "attention_mask": ones_like_mask(x, 1)}
    late = CompressedCache(model, "h2o", 0.5)
    model(**key, pixel_values=x["pixel_values"], past_key_values=late)
    late.compress()
    assert all(torch.equal(late.kept(layer), cache.kept(layer)) for layer in range(3))


def test_official_text_prior_reports_its_overshoot(llava):
    model, inputs = llava
    cache = MedaCache(model, 0.3, text_prior="keep-all", floor=4)
    generate(model, inputs(), cache, 2)
    found = cache.summary()
    assert found["overshoot"] == sum(found["kept"]) - sum(found["budgets"]) > 0
    assert found["kept_text"] == [21.0, 21.0, 21.0]


def test_text_only_prompt_uses_self_entropy_and_warns(llava):
    model, inputs = llava
    cache = MedaCache(model, 0.5, floor=4)
    with pytest.warns(UserWarning, match="one modality only"):
        generate(model, inputs(images=0, text=40), cache, 2)
    assert cache.summary()["entropy_used"] == "self"
    wanted = MedaCache(model, 0.5, floor=4, entropy="self")
    generate(model, inputs(images=0, text=40), wanted, 2)
    assert torch.equal(cache.entropies, wanted.entropies)


def test_reset_makes_it_new(llava):
    model, inputs = llava
    cache = MedaCache(model, 0.5, floor=4)
    first, _ = generate(model, inputs(), cache)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes() == 0
    assert not cache.compressed and cache.budgets is None
    assert torch.equal(generate(model, inputs(), cache)[0], first)


def test_a_method_of_ones_own(llava):
    from dataclasses import dataclass

    from meda_kv.methods import Method, Scorer, UniformAllocator

    @dataclass(frozen=True)
    class ValueNorm(Scorer):
        def scores(self, state, key, value, valid):
            return value.float().norm(dim=-1)

    model, inputs = llava
    cache = CompressedCache(model, Method("value-norm", scorer=ValueNorm(), allocator=UniformAllocator()), 0.5)
    generate(model, inputs(), cache, 2)
    assert cache.summary()["kept"] == [27.0, 27.0, 26.0]


def test_inference_mode_then_ordinary_calls(llava):
    model, inputs = llava
    x = inputs()
    cache = CompressedCache(model, "h2o", 0.5, decode_budget=30)
    with torch.inference_mode():
        _, tokens = generate(model, x, cache, 3)
    ids = torch.cat([x["input_ids"], tokens.clone(), torch.tensor([[9, 10, 11]])], 1)
    assert generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache, 3)[0].isfinite().all()


def test_untouched_layers_of_another_kind():
    """Sliding layers keep their own cache; only full-attention layers count for the budget."""
    model, inputs = tiny_vlm("gemma3")
    x = inputs(batch=2, padded=True)
    cache = CompressedCache(model, "h2o", 0.5, floor=4)
    logits, tokens = generate(model, x, cache)
    kept = kept_positions(cache, x["input_ids"].shape[1])
    assert (logits - masked_reference(model, x, kept, tokens)).abs().max() < EXACT
    found = cache.summary()
    assert found["layers"] == [1, 3] and found["other_layers"] == [0, 2]
    assert sum(found["kept"]) == round(0.5 * 2 * found["prompt_tokens"])


def test_the_seed_reaches_methods_that_draw(llava):
    model, inputs = llava
    caches = [CompressedCache(model, "random", 0.5, seed=seed) for seed in (0, 1, 1)]
    for cache in caches:
        generate(model, inputs(), cache, 2)
    assert not torch.equal(caches[0].kept(0), caches[1].kept(0))
    assert torch.equal(caches[1].kept(0), caches[2].kept(0))
    assert caches[0].method == resolve_method("random")
