"""The attention functions that are registered in front of those of transformers.

For every base function there is a wrapper named ``meda_<base>``. It computes with the base function and does two more
things when the running cache is a compressed one: it replaces the mask, which the model builds once for all layers, by
that of the layer's own slots, and it shows queries, keys and values to the cache's observers. With any other cache it
passes its arguments on untouched, so that the result is bit for bit that of the base function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from meda_kv.attention.masks import read_mask
from meda_kv.methods.base import Look

__all__ = ["BASES", "PREFIX", "RUNNING", "Running", "available_attention", "base_attention", "register"]

PREFIX = "meda_"
BASES = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Base functions that a wrapper is registered for when this module is imported."""


class RunningCache(Protocol):
    """What hooks and wrappers ask of a compressed cache."""

    layers: list[Any]

    def begin_forward(self, tokens: Any) -> None: ...
    def wants(self, layer_idx: int, q_len: int) -> bool: ...
    def after_attention(self, layer_idx: int, look: Look) -> None: ...
    def end_forward(self, error: bool) -> None: ...
    def get_seq_length(self, layer_idx: int = 0) -> int: ...


@dataclass(frozen=True)
class Running:
    """The forward in progress: whose it is, with which cache, and which tokens it reads."""

    model: nn.Module
    cache: RunningCache
    tokens: Any
    outer: Running | None = None


RUNNING: ContextVar[Running | None] = ContextVar("meda_kv_running", default=None)
"""The forward in progress on this thread (or task); None outside of forwards with a compressed cache."""

_NAMESPACES: dict[type, ModuleType | None] = {}


def base_attention(name: str | None) -> str:
    """Name of the attention function behind a configured one.

    Parameters
    ----------
    name : str or None
        As in ``config._attn_implementation``; None means ``"eager"``.

    Returns
    -------
    str
        Without our prefix.
    """
    return (name or "eager").removeprefix(PREFIX)


def available_attention() -> tuple[str, ...]:
    """Attention functions that can run on this machine and that have a wrapper.

    Returns
    -------
    tuple of str
        Always ``"eager"`` and ``"sdpa"``; ``"flex_attention"`` and flash kernels where their packages are present.
    """
    from transformers.utils import import_utils

    found = ["sdpa", "eager"]
    for name, test in (
        ("flash_attention_2", "is_flash_attn_2_available"),
        ("flash_attention_3", "is_flash_attn_3_available"),
        ("flex_attention", "is_torch_flex_attn_available"),
    ):
        check = getattr(import_utils, test, None)
        if check is not None and check():
            found.append(name)
    return tuple(found)


def modelling_namespace(module: nn.Module) -> ModuleType | None:
    """The Python module that an attention class was written in, when it uses the attention interface.

    Parameters
    ----------
    module : nn.Module
        An attention module, perhaps of a subclass defined elsewhere.

    Returns
    -------
    module or None
        That with ``ALL_ATTENTION_FUNCTIONS``; None when no class of `module` has one.
    """
    kind = type(module)
    if kind not in _NAMESPACES:
        spaces = (sys.modules.get(cls.__module__) for cls in kind.__mro__)
        _NAMESPACES[kind] = next((s for s in spaces if s is not None and hasattr(s, "ALL_ATTENTION_FUNCTIONS")), None)
    return _NAMESPACES[kind]


def base_function(module: nn.Module, base: str) -> Callable[..., Any]:
    """The function that `module` would have called without us.

    Parameters
    ----------
    module : nn.Module
        An attention module.
    base : str
        ``"eager"`` is the ``eager_attention_forward`` of the file that the module's class stands in.

    Returns
    -------
    callable
    """
    space = modelling_namespace(module)
    if space is None:
        raise TypeError(f"unsupported: {type(module).__name__}, its attention is not on the transformers interface")
    eager = getattr(space, "eager_attention_forward", None)
    function: Callable[..., Any] = space.ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
    if function is None:
        raise TypeError(f"unsupported: {type(module).__name__} has no {base} attention")
    return function


class _Under:
    """An object with some attributes replaced; all others are those of the object itself.

    The flash function of transformers chooses its kernel by ``module.config._attn_implementation``, which holds our
    name. It gets the module under this cover, since setting the attribute would disturb other threads.
    """

    def __init__(self, inner: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self.__dict__["_meda_inner"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_meda_inner"], name)


def _wrapper(base: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        function = base_function(module, base)
        target: Any = module
        if "flash" in base:
            target = _Under(module, config=_Under(module.config, _attn_implementation=base))
        running = RUNNING.get()
        layer = None if running is None else _layer(running.cache, module)
        if running is None or layer is None:
            return function(target, query, key, value, attention_mask, **kwargs)
        if kwargs.get("position_bias") is not None:
            raise TypeError(f"unsupported: {type(module).__name__}, a position bias cannot follow compressed slots")
        mask = layer.mask_for(query, attention_mask, base)
        output = function(target, query, key, value, mask, **kwargs)
        layer_idx, q_len = layer_index(module), query.shape[2]
        if running.cache.wants(layer_idx, q_len):
            with torch.no_grad():
                running.cache.after_attention(layer_idx, _look(module, layer, query, key, value, mask, kwargs, running))
        return output

    attention.__name__ = attention.__qualname__ = f"{PREFIX}{base}"
    return attention


def layer_index(module: nn.Module) -> int:
    """Index of the layer that an attention module belongs to; -1 when it does not know."""
    index: Any = getattr(module, "layer_idx", None)
    return -1 if index is None else int(index)


def _layer(cache: RunningCache, module: nn.Module) -> Any | None:
    """The compressed layer that a module writes to; None for sliding, linear and foreign layers."""
    index = layer_index(module)
    if not 0 <= index < len(cache.layers):
        return None
    layer = cache.layers[index]
    return layer if hasattr(layer, "mask_for") else None


def _look(
    module: nn.Module,
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    running: Running,
) -> Look:
    """What the observers get to see: everything but proposed tokens."""
    batch, _, queries, dim = query.shape
    slots = key.shape[2]
    drafts = running.tokens.drafts
    q, s = queries - drafts, slots - drafts
    visible = read_mask(mask, batch=batch, queries=queries, slots=slots)
    scale = kwargs.get("scaling")
    if scale is None:
        scale = getattr(module, "scaling", None) or dim**-0.5
    return Look(
        query=query[:, :, :q].detach(),
        key=key[:, :, :s].detach(),
        value=value[:, :, :s].detach(),
        visible=None if visible is None else visible[:, :, :q, :s],
        valid=None if layer.valid is None else layer.valid[..., :s],
        visual=layer.visual[..., :s],
        query_valid=running.tokens.valid[:, :q].to(query.device),
        query_visual=running.tokens.visual[:, :q].to(query.device),
        offset=slots - queries,
        scale=float(scale),
        softcap=kwargs.get("softcap"),
        layer=layer_index(module),
        sinks=kwargs.get("s_aux"),
        block=getattr(running.cache, "block", None),
    )


def register(base: str) -> str:
    """Register the wrapper of one base function; again is harmless.

    Parameters
    ----------
    base : str
        A name of transformers' ``AttentionInterface``, or ``"eager"``.

    Returns
    -------
    str
        ``"meda_" + base``, with the mask function of the base.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = PREFIX + base
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, _wrapper(base))
        masks = ALL_MASK_ATTENTION_FUNCTIONS
        AttentionMaskInterface.register(name, masks[base] if base in masks else masks["flash_attention_2"])
    return name


for _base in BASES:
    register(_base)
