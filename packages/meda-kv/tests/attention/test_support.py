"""Which models are served, and what is said about the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers as hf
import zoo
from meda_kv.attention import check_cache_kind, check_model
from meda_kv.attention.support import attention_modules, text_configs, top_model
from torch import nn


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_facts_of_every_family(family: str) -> None:
    model, _ = zoo.tiny_vlm(family)
    facts = check_model(model)
    assert facts.class_name == type(model).__name__
    width = 16 if family.startswith("qwen") else 8
    full = (1, 3) if family == "gemma3" else (0, 1, 2)
    assert (facts.L, facts.H, facts.Hkv, facts.D, facts.base_attention) == (len(full), 4, 2, width, "sdpa")
    assert facts.full_layers == full
    assert len(facts.layer_types) == len(attention_modules(facts.decoder))
    assert text_configs(model) == [model.config.get_text_config(decoder=True)]


def tiny(kind: type, config: type, **fields: object) -> hf.PreTrainedModel:
    base = {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return kind(config(**{**base, **fields}))


def deepseek() -> hf.PreTrainedModel:
    return tiny(
        hf.DeepseekV2ForCausalLM,
        hf.DeepseekV2Config,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=8,
        first_k_dense_replace=2,
    )


def remote() -> hf.PreTrainedModel:
    model, _ = zoo.tiny_vlm("text")
    for layer in model.model.layers:
        layer.self_attn = nn.Identity()
    return model


def shared_keys() -> hf.PreTrainedModel:
    model, _ = zoo.tiny_vlm("text")
    model.config.num_kv_shared_layers = 1
    return model


def odd_attention() -> hf.PreTrainedModel:
    model, _ = zoo.tiny_vlm("text")
    model.config._attn_implementation_internal = "paged|sdpa"
    return model


def bloom() -> hf.PreTrainedModel:
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=16, hidden_size=16, n_layer=2, n_head=2))


def mllama() -> hf.PreTrainedModel:
    model, _ = zoo.tiny_vlm("text")
    model.config.cross_attention_layers = [1]
    return model


def tensor_parallel() -> hf.PreTrainedModel:
    model, _ = zoo.tiny_vlm("text")
    model._tp_size = 2  # what from_pretrained leaves behind
    return model


def from_the_hub() -> hf.PreTrainedModel:
    model = remote()
    model.__class__ = type("Hub", (type(model),), {"__module__": "transformers_modules.someone.modeling"})
    return model


def static() -> hf.PreTrainedModel:
    model, _ = zoo.tiny_vlm("text")
    model.generation_config.cache_implementation = "static"
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Linear(2, 2), "unsupported: Linear, it is not a transformers model; load it with"),
        (
            lambda: hf.T5ForConditionalGeneration(
                hf.T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1)
            ),
            "unsupported: T5ForConditionalGeneration, it is an encoder-decoder",
        ),
        (
            lambda: tiny(hf.MistralForCausalLM, hf.MistralConfig, sliding_window=8),
            r"unsupported: MistralForCausalLM, it has no layer of full attention \(only sliding_attention\)",
        ),
        (lambda: tiny(hf.MambaForCausalLM, hf.MambaConfig), "unsupported: MambaForCausalLM, "),
        (deepseek, "unsupported: DeepseekV2ForCausalLM, it has multi-head latent attention"),
        (remote, "unsupported: LlamaForCausalLM, the attention of layer 0 is not on the attention interface"),
        (remote, r"interface of transformers \(its class computes attention by itself\)"),
        (bloom, r"unsupported: BloomForCausalLM, the attention .* \(its class computes attention by itself\); use the"),
        (from_the_hub, r"unsupported: Hub, the attention .* \(remote code\); load the model without trust_remote_code"),
        (mllama, "unsupported: LlamaForCausalLM, some of its layers read the pictures by cross-attention"),
        (tensor_parallel, "split over 2 devices by tensor parallelism.*load it with device_map='auto'"),
        (shared_keys, "unsupported: LlamaForCausalLM, some of its layers read the keys of others"),
        (odd_attention, r"'paged\|sdpa' has no meda_\* wrapper; set one of those installed here: sdpa, eager"),
        (static, "unsupported cache 'static'.*cache_implementation = None"),
    ],
)
def test_unsupported_models_are_told_before_anything_runs(make, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        check_model(make())


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded", "offloaded_static", "paged"])
def test_cache_kinds_by_name(kind: str) -> None:
    with pytest.raises(TypeError, match=f"unsupported cache '{kind}'.*past_key_values=MedaCache"):
        check_cache_kind(kind)


def test_cache_kinds_by_object() -> None:
    model, _ = zoo.tiny_vlm("text")
    check_cache_kind(None), check_cache_kind("dynamic"), check_cache_kind(zoo.plain_cache(model))
    with pytest.raises(TypeError, match="StaticCache"):
        check_cache_kind(hf.StaticCache(config=model.config, max_cache_len=8))
    offloaded = zoo.plain_cache(model)
    offloaded.offloading = True  # the constructor wants a GPU for it
    with pytest.raises(TypeError, match="DynamicCache"):
        check_cache_kind(offloaded)


def test_wrappers_are_looked_through() -> None:
    model, _ = zoo.tiny_vlm("text")
    compiled = nn.Module()
    compiled._orig_mod = model
    peft = nn.Module()
    peft.peft_config, peft.get_base_model = SimpleNamespace(), lambda: model
    assert top_model(compiled) is model and top_model(peft) is model
    assert check_model(peft).decoder is model.model
