"""What stands in front of the methods by which generate prepares a forward: put there, taken away, copied, harmless."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
from typing import Any
from weakref import ref

import pytest
import torch
import zoo
from meda_kv.attention import install, uninstall
from meda_kv.attention.generating import InFront
from meda_kv.cache import CompressedCache

NAMES = {"_prefill", "prepare_inputs_for_generation", "_prepare_position_ids_for_generation"}


def in_front(model: Any) -> set[str]:
    return {name for name, value in vars(model).items() if isinstance(value, InFront)}


def test_uninstall_takes_them_away_and_gives_back_what_was_there() -> None:
    model, _ = zoo.tiny_vlm("text")
    mine = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = mine
    install(model)
    install(model)
    assert in_front(model) == NAMES
    uninstall(model)
    assert not in_front(model) and vars(model)["prepare_inputs_for_generation"] is mine
    assert "_prefill" not in vars(model)


def test_signatures_are_those_of_the_methods() -> None:
    """generate reads them to tell which arguments a model takes."""
    model, _ = zoo.tiny_vlm("qwen2_5_vl")
    wanted = {name: inspect.signature(getattr(model, name)) for name in NAMES}
    install(model)
    assert {name: inspect.signature(getattr(model, name)) for name in NAMES} == wanted
    with pytest.raises(ValueError, match="not_an_argument"):
        model.generate(torch.tensor([[1, 9]]), max_new_tokens=1, not_an_argument=1)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_model_has_its_own(how: str) -> None:
    model, inputs = zoo.tiny_vlm("text")
    install(model)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert in_front(other) == NAMES
    assert all(vars(other)[name].model is other and vars(model)[name].model is model for name in NAMES)
    given = inputs(text=33)
    cache = CompressedCache(other, "h2o", 0.5, floor=3)
    wanted, _ = zoo.generate(model, given, CompressedCache(model, "h2o", 0.5, floor=3))
    found, _ = zoo.generate(other, given, cache, prefill_chunk_size=11)
    assert (found - wanted).abs().max() <= 1e-6


def test_a_model_is_freed_without_the_garbage_collector() -> None:
    model, _ = zoo.tiny_vlm("text")
    install(model)
    seen = ref(model)
    gc.collect()
    gc.disable()
    try:
        del model, _
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 5}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_another_cache_is_served_as_ever(how: dict[str, int]) -> None:
    model, inputs = zoo.tiny_vlm("qwen2_5_vl")
    given = inputs()
    wanted = model.generate(**given, past_key_values=zoo.plain_cache(model), max_new_tokens=6, **how)
    install(model)
    assert model.generate(**given, past_key_values=zoo.plain_cache(model), max_new_tokens=6, **how).equal(wanted)
