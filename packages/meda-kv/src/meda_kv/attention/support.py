"""Which models can be served, told before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from meda_kv.attention.interface import PREFIX, available_attention, base_attention, modelling_namespace

__all__ = ["ModelFacts", "check_cache_kind", "check_model", "text_configs", "top_model"]


@dataclass(frozen=True)
class ModelFacts:
    """The shape of a model's language part.

    Attributes
    ----------
    class_name : str
        Class of the whole model.
    layer_types : tuple of str
        One per layer, as transformers names them: ``full_attention``, ``sliding_attention``, ``linear_attention`` ...
    full_layers : tuple of int
        Indices of the layers that are compressed.
    L : int
        Number of compressed layers.
    H, Hkv, D : int
        Query heads, KV heads and head dimension of the first of them.
    base_attention : str
        Attention function in use, without our prefix.
    decoder : nn.Module
        The language model inside (the model itself when there is nothing around it).
    """

    class_name: str
    layer_types: tuple[str, ...]
    full_layers: tuple[int, ...]
    L: int
    H: int
    Hkv: int
    D: int
    base_attention: str
    decoder: nn.Module


def top_model(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers of ``torch.compile`` and PEFT.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    nn.Module
        `model` itself when it is not wrapped.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def check_model(model: nn.Module) -> ModelFacts:
    """Say what a model looks like, or why it cannot be served.

    Parameters
    ----------
    model : nn.Module
        A decoder-only transformers model whose attention goes through the attention interface, with at least one layer
        of full attention. Layers with a sliding window or linear attention keep their own kind of cache.

    Returns
    -------
    ModelFacts

    Raises
    ------
    TypeError
        ``unsupported: <class>, <reason>`` and what to do about it.
    """
    from transformers import PreTrainedModel
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

    model = top_model(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise _refuse(name, "it is not a transformers model", "load it with AutoModelForImageTextToText")
    config = model.config
    ranks = getattr(model, "_tp_size", None)
    if isinstance(ranks, int) and ranks > 1:
        raise _refuse(
            name,
            f"it is split over {ranks} devices by tensor parallelism, where each would choose budgets of its own",
            "load it with device_map='auto', which puts whole layers on each device, or on one device per process",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise _refuse(name, "it is an encoder-decoder model", "use a decoder-only vision-language model")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise _refuse(
            name,
            "it has multi-head latent attention, whose cache is compressed already",
            "use the ordinary DynamicCache",
        )
    if getattr(text, "cross_attention_layers", None):
        raise _refuse(
            name,
            "some of its layers read the pictures by cross-attention, whose keys are no tokens of the prompt",
            "use the ordinary DynamicCache",
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise _refuse(name, "some of its layers read the keys of others", "use the ordinary DynamicCache")
    types, _ = get_layer_types_and_kwargs(text)
    unknown = sorted({kind for kind in types if kind not in DYNAMIC_LAYER_TYPE_MAPPING})
    if unknown:
        raise _refuse(name, f"layers of kind {', '.join(unknown)} have no dynamic cache", "use the model's own cache")
    full = tuple(index for index, kind in enumerate(types) if kind == "full_attention")
    if not full:
        kinds = ", ".join(sorted(set(types)))
        raise _refuse(name, f"it has no layer of full attention (only {kinds})", "its cache is small already")
    check_cache_kind(getattr(getattr(model, "generation_config", None), "cache_implementation", None))
    decoder = model.get_decoder()
    modules = attention_modules(decoder)
    for index in full:
        module = modules.get(index)
        if module is None or modelling_namespace(module) is None:
            reason, remedy = _off_interface(type(model).__module__)
            what = f"the attention of layer {index} is not on the attention interface of transformers"
            raise _refuse(name, f"{what} ({reason})", remedy)
    base = base_attention(text._attn_implementation)
    _check_base(name, base)
    heads, kv_heads, dim = _shape(text, modules[full[0]])
    return ModelFacts(name, tuple(types), full, len(full), heads, kv_heads, dim, base, decoder)


def check_cache_kind(kind: Any) -> None:
    """Refuse caches that cannot be compressed.

    Parameters
    ----------
    kind : str, Cache or None
        A ``cache_implementation`` of transformers, or a cache object.

    Raises
    ------
    TypeError
        Static, quantised, offloaded or paged caches, with the remedy.
    """
    if kind is None:
        return
    name = kind if isinstance(kind, str) else type(kind).__name__
    if not isinstance(kind, str):
        plain = name not in ("StaticCache", "QuantizedCache", "EncoderDecoderCache", "PagedAttentionCache")
        if plain and not getattr(kind, "offloading", False):
            return
    elif kind in ("dynamic", "hybrid"):  # transformers itself turns "hybrid" into the dynamic cache
        return
    raise TypeError(
        f"unsupported cache {name!r}: static, quantised, offloaded and paged caches cannot be compressed; "
        "leave cache_implementation unset (model.generation_config.cache_implementation = None) and pass "
        "past_key_values=MedaCache(model)"
    )


def attention_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    """The attention module of every layer.

    Parameters
    ----------
    decoder : nn.Module
        A language model.

    Returns
    -------
    dict of int to nn.Module
        By layer index; layers without attention, or with one that does not know its index, are absent.
    """
    found: dict[int, nn.Module] = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "is_causal") and hasattr(module, "config"):
            found[index] = module
    return found


def text_configs(model: nn.Module) -> list[Any]:
    """The configurations that name the attention function of the language part.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    list of PreTrainedConfig
        Usually one. Attention modules that hold a copy add theirs.
    """
    model = top_model(model)
    config: Any = model.config
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    candidates = [config.get_text_config(decoder=True), decoder.config]
    candidates += [module.config for module in attention_modules(decoder).values()]
    unique: dict[int, Any] = {id(one): one for one in candidates}
    return list(unique.values())


def _off_interface(home: str) -> tuple[str, str]:
    """Why attention may stand outside of the interface, by the module of the model's class, and what to do."""
    if home.startswith("transformers_modules."):
        return (
            "remote code",
            "load the model without trust_remote_code, from a checkpoint that transformers has a class for",
        )
    if home.startswith("transformers."):
        return "its class computes attention by itself", "use the ordinary DynamicCache, or a model of another family"
    return "a class of your own", "let it take its function from ALL_ATTENTION_FUNCTIONS, as transformers' models do"


def _check_base(name: str, base: str) -> None:
    if base in ("sdpa", "eager", "flex_attention") or "flash" in base:
        return
    usable = ", ".join(available_attention())
    raise _refuse(
        name,
        f"its attention implementation {base!r} has no {PREFIX}* wrapper",
        f"set one of those installed here: {usable} (model.set_attn_implementation('sdpa'))",
    )


def _shape(text: Any, module: nn.Module) -> tuple[int, int, int]:
    heads = int(text.num_attention_heads)
    groups = int(getattr(module, "num_key_value_groups", 1))
    dim = getattr(module, "head_dim", None) or getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, heads // groups, int(dim)


def _refuse(name: str, reason: str, remedy: str) -> TypeError:
    return TypeError(f"unsupported: {name}, {reason}; {remedy}")
