"""A model that is spread over devices, as ``device_map="auto"`` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from fake_devices import FakeDevices, place, tag
from meda_kv.cache import CompressedCache, MedaCache
from torch import Tensor


def spread(family: str) -> tuple[Any, dict[str, Tensor]]:
    """Embeddings, vision and head on the CPU, layers 0 and 1 on one GPU, the last on another."""
    model, inputs = zoo.tiny_vlm(family)
    given = inputs(batch=2, padded=True)
    decoder = model.get_decoder()
    for index, layer in enumerate(decoder.layers):
        place(layer, "xla:0" if index < 2 else "xla:1")
    place(decoder.norm, "cpu")
    return model, given


def test_the_fake_notices_a_tensor_on_the_wrong_device() -> None:
    with FakeDevices():
        here, there = torch.ones(2, device="xla:0"), torch.ones(2, device="xla:1")
        with pytest.raises(RuntimeError, match=r"one device, found \['xla:0', 'xla:1'\]"):
            here + there
        assert tag(here + there.to("xla:0")) == here.device == torch.device("xla:0")
        assert tag(here[:1] * 2) == here.device and there.cpu().device.type == "cpu"


@pytest.mark.parametrize("method", ["meda", "meda-no-merge", "snapkv", "pyramidkv", "look-m-weighted", "streaming"])
def test_layers_on_two_devices(method: str) -> None:
    model, given = spread("llava")
    with FakeDevices():
        cache = CompressedCache(model, method, 0.4, floor=3)
        logits, tokens = zoo.generate(model, given, cache, 3)
        places = [{str(tag(one)) for one in (layer.keys, layer.values)} for layer in cache.layers]
        assert cache.summary()["ratio_actual"] == pytest.approx(0.4, abs=0.02)
    assert places == [{"xla:0"}, {"xla:0"}, {"xla:1"}]
    whole, _ = zoo.tiny_vlm("llava")
    wanted, again = zoo.generate(whole, given, CompressedCache(whole, method, 0.4, floor=3), 3)
    assert logits.equal(wanted) and tokens.equal(again)


def test_beams_and_turns_on_two_devices() -> None:
    model, given = spread("qwen2_5_vl")
    whole, _ = zoo.tiny_vlm("qwen2_5_vl")
    results = []
    for one in (model, whole):
        with FakeDevices():
            cache = MedaCache(one, ratio=0.4, floor=3, merge="none")
            first = one.generate(**given, past_key_values=cache, num_beams=2, max_new_tokens=3)
            results.append(first)
    assert results[0].equal(results[1])


def test_accelerate_hooks_live_beside_ours() -> None:
    from accelerate import dispatch_model

    model, inputs = zoo.tiny_vlm("llava")
    given = inputs(batch=2, padded=True)
    wanted, _ = zoo.generate(model, given, MedaCache(model, ratio=0.4, floor=3), 3)
    names = {name: "cpu" for name, _ in model.named_children()}
    spread_model = dispatch_model(model, device_map=names, force_hooks=True, main_device="cpu")
    ours, _ = zoo.generate(spread_model, given, MedaCache(spread_model, ratio=0.4, floor=3), 3)
    assert ours.equal(wanted)
