"""A second turn on a compressed cache, with and without new pictures, crops, and resets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from meda_kv.attention.reference import reference_model
from meda_kv.cache import CompressedCache, MedaCache
from torch import Tensor

OPTIONS: dict[str, Any] = {"merge": "none", "floor": 3, "recent_share": 0.5}
SEEDED = torch.Generator().manual_seed(7)


def second_turn(given: dict[str, Tensor], chosen: Tensor, turn: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole conversation, as a chat program would pass it."""
    ids = torch.cat([given["input_ids"], chosen, turn["input_ids"]], 1)
    new = ids.shape[1] - given["input_ids"].shape[1]
    mask = torch.cat([given["attention_mask"], torch.ones(ids.shape[0], new, dtype=torch.long)], 1)
    return {**turn, "input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_second_turn_reads_only_the_new_tokens(family: str, attn: str) -> None:
    model, inputs = zoo.tiny_vlm(family, attn=attn)
    given = inputs(batch=2, padded=True)
    n = given["input_ids"].shape[1]
    options = {**OPTIONS, "entropy": "self"} if family == "text" else OPTIONS
    cache = MedaCache(model, ratio=0.5, **options)
    first, chosen = zoo.generate(model, given, cache, 3)
    kept = zoo.kept_positions(cache, n)
    generator = torch.Generator().manual_seed(3)
    turn = {"input_ids": torch.randint(zoo.FIRST_WORD, zoo.VOCABULARY, (2, 5), generator=generator)}
    second, again = zoo.generate(model, second_turn(given, chosen, turn), cache, 3)
    both = zoo.masked_reference(model, given, kept, chosen, turn=turn, turn_steps=again)
    assert (torch.cat([first, second]) - both).abs().max() <= 1e-6
    assert cache.get_seq_length() == n + 3 + 5 + 2


@pytest.mark.parametrize("family", ["llava", "internvl", "gemma3", "idefics3"])
def test_new_pictures_in_the_second_turn(family: str) -> None:
    model, inputs = zoo.tiny_vlm(family)
    given, new = inputs(batch=2, padded=True), inputs(batch=2, images=1, text=4, seed=8)
    n = given["input_ids"].shape[1]
    cache = MedaCache(model, ratio=0.4, **OPTIONS)
    first, chosen = zoo.generate(model, given, cache, 2)
    kept = zoo.kept_positions(cache, n)
    turn = {name: value for name, value in new.items() if name not in ("attention_mask", "token_type_ids")}
    whole = second_turn(given, chosen, turn)
    second, again = zoo.generate(model, whole, cache, 2)
    both = zoo.masked_reference(model, given, kept, chosen, turn=turn, turn_steps=again)
    assert (torch.cat([first, second]) - both).abs().max() <= 1e-6
    seen = cache.layers[cache.facts.full_layers[0]]
    assert int(seen.visual[0, 0].sum()) >= int((new["input_ids"][0] == zoo.IMAGE).sum())


def step_by_step(model: Any, given: dict[str, Tensor], cache: Any, parts: list[Tensor], before: Any = None) -> Any:
    """Logits of forwards after a prompt, ours and those of a full cache that masks whatever ours no longer held."""
    plain, held, ours, wanted = zoo.plain_cache(model), {}, [], []
    begin = cache.begin_forward

    def watched(tokens: Any) -> None:
        n = cache.get_seq_length()
        begin(tokens)
        held[n] = zoo.kept_positions(cache, n)

    with torch.no_grad():
        model(**given, past_key_values=cache)
        model(**given, past_key_values=plain)
        cache.begin_forward = watched
        for index, part in enumerate(parts):
            if before is not None:
                before(index)
            n = cache.get_seq_length()
            ours.append(model(part, past_key_values=cache).logits)
            with reference_model(model, held[n], n):
                wanted.append(model(part, past_key_values=plain).logits)
    return torch.cat(ours, 1), torch.cat(wanted, 1)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "text"])
def test_a_second_compression_counts_everything_read(family: str) -> None:
    model, inputs = zoo.tiny_vlm(family)
    given = inputs(batch=2, images=3, text=20)
    options = {**OPTIONS, "entropy": "self"} if family == "text" else OPTIONS
    cache = MedaCache(model, ratio=0.6, **options)
    sizes: list[int] = []

    def again(index: int) -> None:
        if index == 3:
            sizes.append(cache.nbytes())
            cache.compress(0.3)
            sizes.append(cache.nbytes())
            n, layers = cache.get_seq_length(), cache._full()
            for row in range(2):
                held = sum(int((layer.positions[row, 0] >= 0).sum()) for layer in layers)
                assert held == round(0.3 * len(layers) * n)

    parts = [torch.randint(zoo.FIRST_WORD, zoo.VOCABULARY, (2, q), generator=SEEDED) for q in (1, 1, 8, 1, 6, 1)]
    ours, wanted = step_by_step(model, given, cache, parts, again)
    assert (ours - wanted).abs().max() <= 1e-6 and sizes[1] < sizes[0]


@pytest.mark.parametrize("method", ["h2o", "snapkv", "pyramidkv", "streaming"])
@pytest.mark.parametrize("family", ["llava", "text"])
def test_compression_in_the_course_of_decoding(family: str, method: str) -> None:
    model, inputs = zoo.tiny_vlm(family)
    options: dict[str, Any] = {"decode_budget": 12, "decode_slack": 3, "floor": 3}
    cache = CompressedCache(model, method, 0.5, **options)
    parts = [torch.randint(zoo.FIRST_WORD, zoo.VOCABULARY, (2, q), generator=SEEDED) for q in [1] * 9 + [5, 1, 1, 1]]
    ours, wanted = step_by_step(model, inputs(batch=2), cache, parts)
    assert (ours - wanted).abs().max() <= 1e-6
    assert sum(layer.physical for layer in cache.layers) <= 3 * (12 + 3)


def test_a_second_turn_of_a_profile_is_appended() -> None:
    model, inputs = zoo.tiny_vlm("text")
    given = inputs(text=30)
    for steps, first in ((3, 2), (1, 0)):  # a single token needs no forward after the prompt's
        cache = CompressedCache(model, "h2o", 0.5, floor=3, budgets={"alphas": [1, 1, 1]})
        _, chosen = zoo.generate(model, given, cache, steps)
        kept = [int(one) for one in cache.summary()["kept"]]
        assert sum(kept) == round(0.5 * 3 * 31)
        turn = {"input_ids": torch.arange(20, 30)[None]}
        zoo.generate(model, second_turn(given, chosen, turn), cache, 2)
        assert [layer.physical for layer in cache.layers] == [one + first + 11 + 1 for one in kept]
        cache.compress(0.3)
        assert sum(layer.physical for layer in cache.layers) == round(0.3 * 3 * cache.get_seq_length())


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("by_hand", [True, False])
def test_conversations_on_one_model_keep_their_rotary_offsets(family: str, by_hand: bool) -> None:
    model, inputs = zoo.tiny_vlm(family)
    given, other = inputs(images=3), inputs(images=1, text=5, seed=2)
    turn = {"input_ids": torch.tensor([[20, 21, 22]])}
    found = []
    for between in (False, True):
        cache = MedaCache(model, ratio=0.5, **OPTIONS)
        _, chosen = zoo.generate(model, given, cache, 2)
        if between:
            foreign = zoo.plain_cache(model) if by_hand else MedaCache(model, ratio=1.0)
            zoo.generate(model, other, foreign, 2)
        if by_hand:
            with torch.no_grad():
                found.append(model(turn["input_ids"], past_key_values=cache).logits)
        else:
            found.append(zoo.generate(model, second_turn(given, chosen, turn), cache, 3)[0])
    assert found[0].equal(found[1])


def test_crop_takes_back_a_question() -> None:
    model, inputs = zoo.tiny_vlm("llava")
    given = inputs()
    cache = CompressedCache(model, "h2o", 0.4, floor=3)
    with torch.no_grad():
        model(**given, past_key_values=cache)
        cache.compress()
        ask = torch.tensor([[20, 21, 22]])
        answers = []
        for _ in range(2):
            answers.append(model(ask, past_key_values=cache, logits_to_keep=1).logits)
            cache.crop(-3)
    assert answers[0].equal(answers[1])
    assert cache.get_seq_length() == given["input_ids"].shape[1]


def test_another_prompt_needs_a_reset() -> None:
    model, inputs = zoo.tiny_vlm("llava")
    cache = MedaCache(model, ratio=0.4, **OPTIONS)
    first, _ = zoo.generate(model, inputs(), cache, 2)
    with pytest.raises(RuntimeError, match=r"holds 1 rows .*cache\.reset\(\)"):
        zoo.generate(model, inputs(batch=2), cache, 2)
    with pytest.raises(RuntimeError, match=r"another prompt; call cache\.reset\(\)"):
        zoo.generate(model, inputs(text=30, seed=3), cache, 2)
    cache.reset()
    again, _ = zoo.generate(model, inputs(), cache, 2)
    assert again.equal(first)
