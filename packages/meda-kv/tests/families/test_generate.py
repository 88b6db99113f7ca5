"""The ways in which generate calls a model: beams, samples, looked-up tokens, chunks, streaming."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import zoo
from meda_kv.attention.reference import reference_model
from meda_kv.cache import CompressedCache, MedaCache

OPTIONS: dict[str, Any] = {"merge": "none", "floor": 3, "recent_share": 0.5}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_beams(family: str, attn: str) -> None:
    model, inputs = zoo.tiny_vlm(family, attn=attn)
    given = inputs(batch=2, padded=True)
    n = given["input_ids"].shape[1]
    how = {"num_beams": 3, "max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True}
    options = {**OPTIONS, "entropy": "self"} if family == "text" else OPTIONS
    cache = MedaCache(model, ratio=0.4, **options)
    ours = model.generate(**given, past_key_values=cache, **how)
    kept = zoo.kept_positions(cache, n)
    with reference_model(model, kept, n):
        wanted = model.generate(**given, past_key_values=zoo.plain_cache(model), **how)
    assert ours.sequences.equal(wanted.sequences)
    torch.testing.assert_close(ours.sequences_scores, wanted.sequences_scores, atol=1e-6, rtol=0)
    moved = ours.beam_indices[:, :4]
    assert (moved[:, 1:] != moved[:, :-1]).any() or family not in ("llava", "text")


def test_rows_follow_a_reordering() -> None:
    model, inputs = zoo.tiny_vlm("llava")
    given = inputs(batch=3, padded=True)
    logits = []
    for order in (torch.arange(3), torch.tensor([2, 0, 0])):
        cache = MedaCache(model, ratio=0.4, **OPTIONS)
        with torch.no_grad():
            model(**given, past_key_values=cache)
            cache.compress()
            cache.reorder_cache(order)
            mask = torch.cat([given["attention_mask"], torch.ones(3, 2, dtype=torch.long)], 1)[order]
            positions = mask.cumsum(1)[:, -2:] - 1
            ids = torch.tensor([[9, 10]] * 3)
            logits.append(model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    assert (logits[1] - logits[0][torch.tensor([2, 0, 0])]).abs().max() <= 1e-6


def test_several_samples_of_one_prompt() -> None:
    model, inputs = zoo.tiny_vlm("qwen3_vl")
    given = inputs(batch=2, padded=True)
    cache = MedaCache(model, ratio=0.4, **OPTIONS)
    torch.manual_seed(0)
    result = model.generate(
        **given,
        past_key_values=cache,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_logits=True,
    )
    n = given["input_ids"].shape[1]
    kept = zoo.kept_positions(cache, n)
    assert kept[0].shape[0] == 6 and kept[0][0].equal(kept[0][2])
    wide = inputs(batch=2, padded=True)
    for row in (0, 5):  # samples of a prompt are rows beside each other
        alone = {name: value[row // 3 : row // 3 + 1] for name, value in wide.items() if value.shape[0] == 2}
        half = wide["pixel_values"].shape[0] // 2
        alone["pixel_values"] = wide["pixel_values"][row // 3 * half :][:half]
        alone["image_grid_thw"] = wide["image_grid_thw"][row // 3 * 2 :][:2]
        mine = {index: one[row : row + 1] for index, one in kept.items()}
        tokens = result.sequences[row : row + 1, n:]
        reference = zoo.masked_reference(model, alone, mine, tokens)
        assert (torch.stack(result.logits)[:, row : row + 1] - reference).abs().max() <= 1e-6


@pytest.mark.parametrize("moment", ["decode", "prefill"])
@pytest.mark.parametrize("method", ["h2o", "meda", "snapkv"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "text"])
def test_prompt_lookup_equals_greedy(family: str, method: str, moment: str) -> None:
    model, inputs = zoo.tiny_vlm(family)
    given = inputs(images=3)
    if family == "text":  # repeats, so that something is found, in the prompt already
        given["input_ids"] = torch.tensor([[1, *([9, 10, 11, 12] * 6)]])
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    options = {"entropy": "self"} if method == "meda" and family == "text" else {}
    results, kept = [], []
    read: list[int] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    for how in ({}, {"prompt_lookup_num_tokens": 3}):
        cache = CompressedCache(model, method, 0.4, floor=3, compress_at=moment, **options)
        results.append(model.generate(**given, past_key_values=cache, max_new_tokens=8, **how))
        assert cache.compressed
        kept.append(zoo.kept_positions(cache, given["input_ids"].shape[1]))
    handle.remove()
    assert results[0].equal(results[1])
    assert all(one.equal(other) for one, other in zip(kept[0].values(), kept[1].values(), strict=True))
    assert read[0] == given["input_ids"].shape[1] and max(read[9:]) > 1  # verification read several tokens at once
    if family == "text":
        assert read[8] == read[0] + 3  # and the first proposals came with the prompt


REPEATS = torch.tensor([[1, *([9, 10, 11, 12] * 8)]])


def test_prompt_lookup_with_a_profile_and_an_assistant() -> None:
    """The layers leave the proposals that come with the prompt to the next forward."""
    model, inputs = zoo.tiny_vlm("text")
    helper, _ = zoo.tiny_vlm("text", seed=4)
    for ids, how in (
        (REPEATS, {"prompt_lookup_num_tokens": 3}),
        (inputs(text=30)["input_ids"], {"assistant_model": helper}),
    ):
        results = []
        for extra in ({}, how):
            cache = CompressedCache(model, "h2o", 0.5, floor=3, budgets={"alphas": [3, 2, 1]})
            results.append(model.generate(ids, past_key_values=cache, max_new_tokens=10, **extra))
            assert sum(cache.summary()["kept"]) == round(0.5 * 3 * cache.summary()["prompt_tokens"])
        assert results[0].equal(results[1])


@pytest.mark.parametrize("moment", ["decode", "prefill", "first-step"])
@pytest.mark.parametrize("budget", [8, 16])
def test_prompt_lookup_with_a_decode_budget(budget: int, moment: str) -> None:
    model, _ = zoo.tiny_vlm("text")
    options: dict[str, Any] = {"floor": 3, "decode_budget": budget, "decode_slack": 4, "compress_at": moment}
    for how in ({}, {"prompt_lookup_num_tokens": 3}):
        cache = CompressedCache(model, "h2o", 0.4, **options)
        result = model.generate(REPEATS, past_key_values=cache, max_new_tokens=30, **how)
        assert result.shape[1] == REPEATS.shape[1] + 30
        # Whatever the last forward added may still be there, when it read proposals.
        assert sum(layer.physical for layer in cache.layers) <= 3 * (budget + 4 + (4 if how else 0))


def test_prompt_lookup_in_the_second_turn_reads_only_the_new_tokens() -> None:
    model, _ = zoo.tiny_vlm("text")
    results = []
    for how in ({}, {"prompt_lookup_num_tokens": 3}):
        cache = CompressedCache(model, "h2o", 0.5, floor=3)
        first = model.generate(REPEATS, past_key_values=cache, max_new_tokens=4)
        again = torch.cat([first, torch.tensor([[9, 10, 11, 12, 9, 10]])], 1)
        results.append(model.generate(again, past_key_values=cache, max_new_tokens=8, **how))
        assert cache.get_seq_length() == results[-1].shape[1] - 1
    assert results[0].equal(results[1])


def test_proposals_that_come_with_the_prompt_may_be_right() -> None:
    """Those were chosen on the full cache; from then on only what was kept is seen."""
    model, _ = zoo.tiny_vlm("text")
    prompt = torch.tensor([[1, *([9, 10, 11, 12] * 6)]])
    with torch.no_grad():
        best = int(model(prompt).logits[0, -1].argmax())
    prompt[0, 5] = prompt[0, 9] = best  # what follows "12" in the prompt
    with torch.no_grad():
        best = int(model(prompt).logits[0, -1].argmax())
    cache = CompressedCache(model, "h2o", 0.4, floor=3, compress_at="prefill")
    draft = torch.tensor([[best, 30, 31]])
    with torch.no_grad():
        whole = torch.cat([prompt, draft], 1)
        first = model(whole, past_key_values=cache, logits_to_keep=4).logits
        assert first.shape[1] == 4 and int(first[0, 0].argmax()) == best
        cache.crop(-2)
        model(draft[:, 1:], past_key_values=cache)
    assert cache.compressed and cache.get_seq_length() == prompt.shape[1] + 3
    held = sum(int((layer.positions < prompt.shape[1] + 1).sum(-1)[0, 0]) for layer in cache.layers)
    assert held == round(0.4 * 3 * (prompt.shape[1] + 1))
    cache.reset()
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    assert cache.compressed


@pytest.mark.parametrize("family", ["llava", "internvl", "text"])
def test_prefill_in_chunks(family: str) -> None:
    model, inputs = zoo.tiny_vlm(family)
    given = inputs(batch=2, padded=True)
    n = given["input_ids"].shape[1]
    options: dict[str, Any] = {"floor": 3}
    whole = CompressedCache(model, "h2o", 0.4, **options)
    wanted, tokens = zoo.generate(model, given, whole, 3)
    cache = CompressedCache(model, "h2o", 0.4, **options)
    if family == "text":
        ours, again = zoo.generate(model, given, cache, 3, prefill_chunk_size=8)
    else:
        ours, again = in_chunks(model, given, cache, 8)
    assert again.equal(tokens) and (ours[-2:] - wanted[-2:]).abs().max() <= 1e-6
    for one, other in zip(zoo.kept_positions(cache, n).values(), zoo.kept_positions(whole, n).values(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("moment", ["decode", "prefill"])
@pytest.mark.parametrize("family", ["text", "llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_last_chunk_of_one_token_is_still_prompt(family: str, moment: str) -> None:
    model, inputs = zoo.tiny_vlm(family)
    given = inputs(batch=2, padded=True, text=12)
    n = given["input_ids"].shape[1]
    options: dict[str, Any] = {**OPTIONS, "compress_at": moment, **({"entropy": "self"} if family == "text" else {})}
    whole, cache = (MedaCache(model, ratio=0.4, **options) for _ in range(2))
    wanted, tokens = zoo.generate(model, given, whole, 4)
    full, _ = zoo.generate(model, given, zoo.plain_cache(model), 1)
    size = next(size for size in range(5, n) if n % size == 1)
    found, again = zoo.generate(model, given, cache, 4, prefill_chunk_size=size)
    assert (found[0] - full[0]).abs().max() <= 1e-6  # the first token is chosen on the full cache
    assert (found - wanted).abs().max() <= 1e-6 and again.equal(tokens)
    assert cache.budgets.equal(whole.budgets)
    assert (
        cache.summary()["entropy_used"] == whole.summary()["entropy_used"] == ("self" if family == "text" else "cross")
    )


@pytest.mark.parametrize("size", [16, 20, 32])
def test_a_profile_reads_chunks_that_are_short_of_its_floors(size: int) -> None:
    model, inputs = zoo.tiny_vlm("text")
    ids = inputs(text=200)["input_ids"]
    for by_hand in (True, False) if 201 % size > 1 else (False,):  # one token by hand is a decoded one
        cache = CompressedCache(model, "h2o", 0.2, budgets={"alphas": [1, 1, 1]})  # floors of 16
        if by_hand:
            with torch.no_grad():
                for start in range(0, 201, size):
                    model(ids[:, start : start + size], past_key_values=cache)
        else:
            model.generate(ids, past_key_values=cache, max_new_tokens=3, prefill_chunk_size=size)
        assert sum(cache.summary()["kept"]) == round(0.2 * 3 * 201)


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_profile_says_at_the_prompts_end_that_its_floors_do_not_fit(by_hand: bool) -> None:
    model, inputs = zoo.tiny_vlm("text")
    ids = inputs(text=60)["input_ids"]
    cache = CompressedCache(model, "h2o", 0.2, budgets={"alphas": [1, 1, 1]})
    with pytest.raises(ValueError, match=r"prompt of 61 tokens.*smallest legal ratio is 0\.26"):
        if by_hand:
            model(ids[:, :40], past_key_values=cache)
            model(ids[:, 40:], past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
        else:
            model.generate(ids, past_key_values=cache, max_new_tokens=3, prefill_chunk_size=40)


def in_chunks(model: Any, given: dict[str, torch.Tensor], cache: Any, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a prompt with pictures as embeddings, a few tokens at a time, then decode greedily."""
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        features = model.model.get_image_features(given["pixel_values"])
        pictures = getattr(features, "pooler_output", features)
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == zoo.IMAGE] = torch.cat([one.reshape(-1, one.shape[-1]) for one in pictures])
        cache.visual_mask = ids == zoo.IMAGE
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits, tokens = [], []
        for start in range(0, ids.shape[1], size):
            stop = min(start + size, ids.shape[1])
            part = model(
                inputs_embeds=embeds[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
            )
        logits.append(part.logits[:, -1])
        for _ in range(2):
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            place = mask.sum(1, keepdim=True) - 1
            part = model(tokens[-1], attention_mask=mask, position_ids=place, past_key_values=cache)
            logits.append(part.logits[:, -1])
    tokens.append(logits[-1].argmax(-1, keepdim=True))
    return torch.stack(logits), torch.cat(tokens, 1)


def test_embeddings_without_ids_ask_for_a_visual_mask() -> None:
    model, inputs = zoo.tiny_vlm("llava")
    given = inputs()
    embeds = model.get_input_embeddings()(given["input_ids"]).detach()
    cache = MedaCache(model, ratio=0.4)
    with pytest.raises(ValueError, match="visual_mask="):
        model(inputs_embeds=embeds, past_key_values=cache)
    masked = MedaCache(model, ratio=0.4, visual_mask=given["input_ids"] == zoo.IMAGE, **OPTIONS)
    result = model.generate(inputs_embeds=embeds, past_key_values=masked, max_new_tokens=3)
    assert result.shape[1] == 3 and masked.summary()["visual_tokens"] == int((given["input_ids"] == zoo.IMAGE).sum())


def test_a_static_cache_is_refused_by_name() -> None:
    model, inputs = zoo.tiny_vlm("text")
    cache = MedaCache(model, ratio=0.4, entropy="self")
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(**inputs(), past_key_values=cache, cache_implementation="static", max_new_tokens=2)


def test_two_threads_with_two_models_and_two_caches() -> None:
    made = [zoo.tiny_vlm(family, seed=3) for family in ("llava", "gemma3")]
    given = [inputs(batch=2, padded=True) for _, inputs in made]

    def run(index: int) -> torch.Tensor:
        model = made[index][0]
        return zoo.generate(model, given[index], MedaCache(model, ratio=0.4, **OPTIONS), 6)[0]

    wanted = [run(0), run(1)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, [0, 1] * 4))
    for index, result in enumerate(results):
        assert result.equal(wanted[index % 2])


def test_a_failing_step_is_taken_back_and_can_be_repeated() -> None:
    model, inputs = zoo.tiny_vlm("qwen2_5_vl")
    given = inputs()
    caches = [MedaCache(model, ratio=0.4, **OPTIONS) for _ in range(2)]
    ids = torch.tensor([[9]])
    with torch.no_grad():
        for cache in caches:
            model(**given, past_key_values=cache)
            model(ids, past_key_values=cache)
        length, bytes_before = caches[0].get_seq_length(), caches[0].nbytes()

        def broken(*_: Any) -> None:
            raise ArithmeticError("broken layer")

        handle = model.model.language_model.layers[1].mlp.register_forward_pre_hook(broken)
        with pytest.raises(ArithmeticError):
            model(ids, past_key_values=caches[0])
        handle.remove()
        assert caches[0].get_seq_length() == length and caches[0].nbytes() == bytes_before
        logits = [model(ids, past_key_values=cache).logits for cache in caches]
    assert logits[0].equal(logits[1])
