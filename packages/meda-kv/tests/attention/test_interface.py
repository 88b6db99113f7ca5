"""The wrappers, with fake base functions where no GPU is needed to see what they pass on."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from meda_kv.attention.interface import (
    BASES,
    RUNNING,
    Running,
    available_attention,
    base_attention,
    base_function,
    modelling_namespace,
    register,
)
from meda_kv.attention.tokens import TokenFacts
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


class Layer:
    """A compressed layer of which slot 1 of head 0 is empty."""

    def __init__(self) -> None:
        self.valid = torch.ones(1, 2, 5, dtype=torch.bool)
        self.visual = torch.zeros(1, 2, 5, dtype=torch.bool)
        self.own = torch.rand(1, 4, 2, 5) > 0.5
        self.asked: list[Any] = []

    def mask_for(self, query: torch.Tensor, given: Any, base: str) -> Any:
        self.asked.append((given, base))
        return self.own


class Cache:
    """Wants to see everything."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.looks: list[Any] = []

    def wants(self, layer_idx: int, q_len: int) -> bool:
        return True

    def after_attention(self, layer_idx: int, look: Any) -> None:
        assert not torch.is_grad_enabled()
        self.looks.append(look)


class Module(nn.Module):
    """An attention module whose namespace is this file."""

    def __init__(self, name: str, layer_idx: int | None = 0) -> None:
        super().__init__()
        self.is_causal = True
        self.config = SimpleNamespace(_attn_implementation=name, dtype=torch.float16)
        if layer_idx is not None:
            self.layer_idx = layer_idx


ALL_ATTENTION_FUNCTIONS = AttentionInterface()


def eager_attention_forward(module: nn.Module, *tensors: Any, **kwargs: Any) -> Any:
    """Stands for the eager function of a modelling file."""
    return "eager", module, tensors, kwargs


QKV = (torch.rand(1, 4, 2, 8), torch.rand(1, 2, 5, 8), torch.rand(1, 2, 5, 8))


@pytest.fixture
def running() -> Any:
    """A forward in progress over two tokens."""
    cache = Cache([Layer(), object()])
    tokens = TokenFacts(torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool), 2, 5)
    token = RUNNING.set(Running(nn.Module(), cache, tokens))  # type: ignore[arg-type]
    yield cache
    RUNNING.reset(token)


def fake(monkeypatch: pytest.MonkeyPatch, base: str) -> list[Any]:
    """Put a function in the place of a base function; returns what it is called with."""
    calls: list[Any] = []

    def function(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        calls.append((module, (query, key, value), mask, kwargs))
        return "output", None

    monkeypatch.setitem(AttentionInterface._global_mapping, base, function)
    monkeypatch.setattr(sys.modules[__name__], "ALL_ATTENTION_FUNCTIONS", AttentionInterface())
    return calls


@pytest.mark.parametrize("base", BASES)
def test_wrapper_and_mask_function_are_registered(base: str) -> None:
    assert f"meda_{base}" in AttentionInterface()
    assert ALL_MASK_ATTENTION_FUNCTIONS[f"meda_{base}"] is ALL_MASK_ATTENTION_FUNCTIONS[base]
    assert base_attention(f"meda_{base}") == base_attention(base) == base


def test_names() -> None:
    assert base_attention(None) == "eager"
    assert set(available_attention()) >= {"sdpa", "eager"}


@pytest.mark.parametrize("base", [base for base in BASES if base != "eager"])
def test_wrapper_passes_through_without_a_running_cache(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch, base)
    module = Module(f"meda_{base}")
    mask = object()
    output = AttentionInterface()[f"meda_{base}"](module, *QKV, mask, scaling=0.5, dropout=0.0)
    assert output == ("output", None)
    _, tensors, given, kwargs = calls[0]
    assert all(a is b for a, b in zip(tensors, QKV)) and given is mask
    assert kwargs == {"scaling": 0.5, "dropout": 0.0}


@pytest.mark.parametrize("base", ["flash_attention_2", "flash_attention_3"])
def test_flash_sees_the_name_of_its_kernel(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch, base)
    module = Module(f"meda_{base}")
    module.proj = nn.Linear(2, 2)
    AttentionInterface()[f"meda_{base}"](module, *QKV, None)
    seen = calls[0][0]
    assert seen.config._attn_implementation == base and seen.config.dtype is torch.float16
    assert seen.is_causal and seen.layer_idx == 0 and module.proj in list(seen.modules())
    assert module.config._attn_implementation == f"meda_{base}"


def test_the_flash_function_of_transformers_gets_along(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import flash_attention

    seen: dict[str, Any] = {}

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> torch.Tensor:
        seen.update(kwargs, mask=mask)
        return query

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    module = Module("meda_flash_attention_2")
    module.proj = nn.Linear(2, 2)
    output, _ = AttentionInterface()["meda_flash_attention_2"](module, *QKV, None, scaling=0.5)
    assert output.shape == (1, 2, 4, 8)
    assert seen["attn_implementation"] == "flash_attention_2" and seen["is_causal"] and seen["layer_idx"] == 0


@pytest.mark.parametrize("base", ["sdpa", "flash_attention_2", "flex_attention"])
def test_layer_gives_the_mask_and_observers_see_it(base: str, monkeypatch: pytest.MonkeyPatch, running: Cache) -> None:
    calls = fake(monkeypatch, base)
    AttentionInterface()[f"meda_{base}"](Module(f"meda_{base}"), *QKV, "given", scaling=0.5, softcap=30.0)
    layer, look = running.layers[0], running.looks[0]
    assert calls[0][2] is layer.own and layer.asked == [("given", base)]
    assert look.visible.equal(layer.own) and look.valid.equal(layer.valid) and look.key.equal(QKV[1])
    assert (look.offset, look.scale, look.softcap, look.layer) == (3, 0.5, 30.0, 0)


def test_proposed_tokens_are_not_shown(monkeypatch: pytest.MonkeyPatch, running: Cache) -> None:
    fake(monkeypatch, "sdpa")
    facts = RUNNING.get()
    assert facts is not None
    token = RUNNING.set(Running(facts.model, facts.cache, TokenFacts(facts.tokens.valid, facts.tokens.visual, 2, 5, 1)))
    AttentionInterface()["meda_sdpa"](Module("meda_sdpa"), *QKV, None)
    RUNNING.reset(token)
    look = running.looks[0]
    assert look.query.equal(QKV[0][:, :, :1]) and look.key.equal(QKV[1][:, :, :4]) and look.offset == 3
    assert look.visible.equal(running.layers[0].own[:, :, :1, :4])
    assert look.valid.shape == look.visual.shape == (1, 2, 4) and look.query_valid.shape == (1, 1)


def test_scale_falls_back_to_the_head_dimension(monkeypatch: pytest.MonkeyPatch, running: Cache) -> None:
    fake(monkeypatch, "sdpa")
    AttentionInterface()["meda_sdpa"](Module("meda_sdpa"), *QKV, None)
    module = Module("meda_sdpa")
    module.scaling = 0.25
    AttentionInterface()["meda_sdpa"](module, *QKV, None)
    assert [look.scale for look in running.looks] == [pytest.approx(8**-0.5), 0.25]


@pytest.mark.parametrize("layer_idx", [1, 7, None])
def test_other_layers_are_left_alone(layer_idx: int | None, monkeypatch: pytest.MonkeyPatch, running: Cache) -> None:
    calls = fake(monkeypatch, "sdpa")
    mask = object()
    AttentionInterface()["meda_sdpa"](Module("meda_sdpa", layer_idx), *QKV, mask)
    assert calls[0][2] is mask and not running.looks


def test_position_bias_is_refused(monkeypatch: pytest.MonkeyPatch, running: Cache) -> None:
    fake(monkeypatch, "sdpa")
    with pytest.raises(TypeError, match="unsupported: Module, a position bias"):
        AttentionInterface()["meda_sdpa"](Module("meda_sdpa"), *QKV, None, position_bias=torch.zeros(1))


def test_eager_is_that_of_the_modelling_file() -> None:
    from transformers.models.gemma3 import modeling_gemma3
    from transformers.models.llama import modeling_llama

    llama, _ = zoo.tiny_vlm("llava", attn="eager")
    gemma, _ = zoo.tiny_vlm("gemma3", attn="eager")
    first, second = llama.model.language_model.layers[0].self_attn, gemma.model.language_model.layers[0].self_attn
    assert base_function(first, "eager") is modeling_llama.eager_attention_forward
    assert base_function(second, "eager") is modeling_gemma3.eager_attention_forward
    name, module, *_ = AttentionInterface()["meda_eager"](Module("meda_eager"), *QKV, None)
    assert name == "eager" and isinstance(module, Module)


def test_subclass_from_elsewhere_finds_its_modelling_file() -> None:
    class Attention(Module):
        pass

    Attention.__module__ = "builtins"
    assert modelling_namespace(Attention("sdpa")) is sys.modules[__name__]
    assert modelling_namespace(nn.Linear(1, 1)) is None
    with pytest.raises(TypeError, match="unsupported: Linear"):
        base_function(nn.Linear(1, 1), "sdpa")


def test_a_local_override_of_a_model_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    local = AttentionInterface()
    local["sdpa"] = lambda *args, **kwargs: ("local", None)
    monkeypatch.setattr(sys.modules[__name__], "ALL_ATTENTION_FUNCTIONS", local)
    assert AttentionInterface()["meda_sdpa"](Module("meda_sdpa"), *QKV, None) == ("local", None)


def test_hub_kernels_get_a_wrapper_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", dict(AttentionMaskInterface._global_mapping))
    name = register("kernels-community/flash-attn2")
    assert name == "meda_kernels-community/flash-attn2" and name in AttentionInterface._global_mapping
    flash = AttentionMaskInterface._global_mapping["flash_attention_2"]
    assert AttentionMaskInterface._global_mapping[name] is flash
