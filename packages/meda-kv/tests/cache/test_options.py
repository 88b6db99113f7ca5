"""What a cache may be asked for, what it refuses, and options that reach the layers."""

from __future__ import annotations

import math
import re

import pytest
import torch
from meda_kv.cache import CompressedCache, MedaCache
from meda_kv.methods import Method, RecencyScorer, UniformAllocator
from vfm_core.errors import UserError
from zoo import generate, plain_cache, tiny_vlm


@pytest.fixture(scope="module")
def llava():
    return tiny_vlm("llava")


@pytest.mark.parametrize(
    ("options", "field", "remedy"),
    [
        ({"ratio": "0.2"}, "ratio", "(0, 1]"),
        ({"ratio": True}, "ratio", "(0, 1]"),
        ({"recent_share": "a"}, "recent_share", "between 0 and 1"),
        ({"recent_share": True}, "recent_share", "between 0 and 1"),
        ({"recent": True}, "recent", "[0, 1]"),
        ({"recent": "all"}, "recent", "[0, 1]"),
        ({"temperature": "a"}, "temperature", "above 0"),
        ({"temperature": math.nan}, "temperature", "above 0"),
        ({"cap": "a"}, "cap", "(0, 1]"),
        ({"floor": "a"}, "floor", "use 1 or more"),
        ({"floor": 2.5}, "floor", "use 1 or more"),
        ({"sink": 1.5}, "sink", "use 0 or more"),
        ({"quota": "half"}, "quota", "between 0 and 1"),
        ({"quota_block": 1.5}, "quota_block", "use 1 or more"),
        ({"per_head": "no"}, "per_head", "True or False"),
        ({"rerotate": 1}, "rerotate", "True or False"),
        ({"merge": 3}, "merge", "average"),
        ({"merge_keys": 1}, "merge_keys", "True or False"),
        ({"merge_block": 0}, "merge_block", "use 1 or more"),
        ({"gate": [1]}, "gate", "none, mean or a cosine"),
        ({"text_prior": ["bias"]}, "text_prior", "keep-all"),
        ({"score_queries": 3}, "queries", "use all, text"),
        ({"group": 1}, "group", "mean, max, sum"),
        ({"compress_at": 1}, "compress_at", "first-step"),
        ({"preset": ["paper"]}, "preset", "paper"),
        ({"seed": "a"}, "seed", "whole number"),
        ({"keep_queries": "yes"}, "keep_queries", "True or False"),
        ({"record": "h2o"}, "record", '["h2o"]'),
        ({"block": 0}, "block", "use 1 or more"),
        ({"block": 1.5}, "block", "use 1 or more"),
        ({"decode_budget": 20.5}, "decode_budget", "use 16 or more"),
        ({"buffer_step": True}, "buffer_step", "use 1 or more"),
        ({"visual_mask": "x"}, "visual_mask", "[batch, tokens]"),
        ({"visual_mask": torch.ones(5, dtype=torch.bool)}, "visual_mask", "[batch, tokens]"),
        ({"visual_mask": torch.ones(1, 5)}, "visual_mask", "[batch, tokens]"),
        ({"scorer": "h2o"}, "scorer", "Scorer"),
        ({"method": "snapkv", "window": "a"}, "window", "use e.g. 32"),
        ({"method": "snapkv", "most": "a"}, "most", "(0, 1]"),
        ({"method": "snapkv", "kernel": 2.5}, "kernel", "use 1 or more"),
        ({"method": "pyramidkv", "beta": "a"}, "beta", "PyramidKV uses 20"),
        ({"method": "random", "seed": 1.5}, "seed", "whole number"),
    ],
)
def test_wrong_types_are_told_at_construction(llava, options, field, remedy):
    with pytest.raises(UserError) as error:
        MedaCache(llava[0], **options)
    told = str(error.value)
    assert field in told and remedy in told and "\n" not in told


@pytest.mark.parametrize("budgets", [[10, 10], [0.5, 0.5], {"alphas": [1, 1]}])
def test_budgets_for_another_number_of_layers_are_refused_at_construction(llava, budgets):
    with pytest.raises(UserError, match=r"one budget per full-attention layer is needed in budgets: 2; give 3"):
        CompressedCache(llava[0], "h2o", 0.3, budgets=budgets)


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_budgets_given_as_counts_do_not_use_the_ratio(llava, ratio):
    model, inputs = llava
    cache = CompressedCache(model, "h2o", ratio, budgets=[10, 20, 30])
    generate(model, inputs(), cache, 2)
    assert cache.compressed and cache.note is None
    assert cache.summary()["kept"] == cache.summary()["budgets"] == [10, 20, 30]


def test_rerotation_and_merging_exclude_each_other(llava):
    model, inputs = tiny_vlm("text")
    for make in (
        lambda: MedaCache(model, 0.4, rerotate=True, entropy="self"),
        lambda: CompressedCache(model, "streaming", 0.4, rerotate=True, merge="average"),
        lambda: (
            CompressedCache(model, Method("own", "", "", RecencyScorer(), UniformAllocator(), rerotate=True), 0.4)
            and CompressedCache(model, "look-m", rerotate=True)
        ),
    ):
        with pytest.raises(UserError, match=r'rerotate.*add merge="none"'):
            make()
    cache = MedaCache(model, 0.4, rerotate=True, merge="none", entropy="self", floor=4)
    generate(model, inputs(text=40), cache, 2)
    assert cache.compressed and cache.layers[0].closed


def test_block_changes_nothing_but_the_work(llava, monkeypatch):
    from meda_kv.methods import observing

    model, inputs = llava
    rows = []
    real = observing.scan_attention

    def watched(*args, **options):
        for start, stop, probs in real(*args, **options):
            rows.append(stop - start)
            yield start, stop, probs

    monkeypatch.setattr(observing, "scan_attention", watched)
    caches = [MedaCache(model, 0.4, floor=4, block=block) for block in (None, 6)]
    logits = [generate(model, inputs(), cache)[0] for cache in caches]
    assert set(rows[-9:]) == {6, 53 % 6} and max(rows[: len(rows) - 27]) > 6
    assert (logits[0] - logits[1]).abs().max() < 2e-6
    assert torch.equal(caches[0].budgets, caches[1].budgets)


class SmallMachine:
    """torch, but a product of more than so many rows does not fit."""

    def __init__(self, most):
        self.most = most

    def __getattr__(self, name):
        return getattr(torch, name)

    def bmm(self, a, b, *, out):
        if a.shape[1] > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return torch.bmm(a, b, out=out)


@pytest.mark.parametrize(("option", "module", "most"), [("block", "blocks", 2 * 3), ("merge_block", "merging", 2)])
def test_the_remedy_for_memory_that_runs_out_can_be_followed(llava, monkeypatch, option, module, most):
    """The message names an option of the cache; with the value that it gives, the prompt is read."""
    model, inputs = llava
    wanted, _ = generate(model, inputs(), MedaCache(model, 0.3, floor=4))
    monkeypatch.setattr(f"meda_kv.core.{module}.torch", SmallMachine(most))
    cache, told = MedaCache(model, 0.3, floor=4), []
    for _ in range(3):
        try:
            found, _ = generate(model, inputs(), cache)
            break
        except RuntimeError as error:
            told.append(int(re.search(rf"even in blocks of \d+ rows; set {option}=(\d+) or less", str(error)).group(1)))
            cache = MedaCache(model, 0.3, floor=4, **{option: told[-1]})
    assert told and cache.compressed
    assert (found - wanted).abs().max() < 2e-6


def test_a_visual_mask_belongs_to_one_prompt(llava):
    model, inputs = llava
    first = inputs(images=2)
    cache = CompressedCache(model, "meda", 0.5, floor=4, visual_mask=first["input_ids"] == 5)
    generate(model, first, cache, 2)
    assert cache.summary()["visual_tokens"] == 32
    cache.reset()
    assert cache.visual_mask is None
    generate(model, inputs(images=1, text=40), cache, 2)
    assert cache.summary()["visual_tokens"] == 16
    cache.reset()
    second = inputs(images=1, text=40)
    cache.visual_mask = second["input_ids"] > 0  # everything
    with pytest.warns(UserWarning, match="one modality only"):
        generate(model, second, cache, 2)
    assert cache.summary()["visual_tokens"] == second["input_ids"].shape[1]


def test_a_visual_mask_survives_a_prompt_that_failed(llava):
    model, inputs = llava
    x = inputs()
    mask = torch.zeros_like(x["input_ids"], dtype=torch.bool)
    mask[:, :7] = True
    cache = CompressedCache(model, "h2o", 0.5, floor=4, visual_mask=mask)

    def fail(*_):
        raise KeyError("on purpose")

    hook = model.get_decoder().layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        model(**x, past_key_values=cache)
    hook.remove()
    generate(model, x, cache, 2)
    assert cache.summary()["visual_tokens"] == 7


def test_a_second_kind_of_cache_is_refused_by_generate(llava):
    model, inputs = llava
    x = inputs()
    cache = MedaCache(model, 0.5, floor=4)
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        model.generate(**x, past_key_values=cache, cache_implementation="static", max_new_tokens=2)
    assert cache.get_seq_length() == 0
    plain, _ = generate(model, x, plain_cache(model), 1)
    assert torch.equal(generate(model, x, cache, 1)[0], plain)
