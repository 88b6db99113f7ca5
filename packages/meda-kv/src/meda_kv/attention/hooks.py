"""Installing on a model: the name of its attention function, and hooks around its forward.

Nothing is kept beside the model. What is installed is read off the model itself (our hooks among its hooks, our prefix
before the name in its text configuration), so copies, pickles and two models that share one configuration stay right.
An installation stays until :func:`uninstall`; it does nothing when a forward runs without a compressed cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from meda_kv.attention.generating import announced, keep_deltas, restore_deltas, stand_in_front, step_aside
from meda_kv.attention.interface import PREFIX, RUNNING, Running, RunningCache, base_attention, register
from meda_kv.attention.support import check_model, text_configs, top_model
from meda_kv.attention.tokens import token_facts

__all__ = ["install", "installed", "is_installed", "running_cache", "uninstall"]

_PARAMETERS: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()
_CONFIGS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""The configurations that name a model's attention function, as found by the last walk over its modules."""


def install(model: nn.Module) -> bool:
    """Make a model ready for compressed caches. Twice is once.

    The attention functions of the language model get our wrapper in front (their name becomes ``meda_<name>``), and
    the model's forward gets a hook before and after it; three methods by which ``generate`` prepares a forward get a
    function in front (see :mod:`meda_kv.attention.generating`). The vision tower is left alone, and so is every forward
    with another cache, bit for bit.

    Parameters
    ----------
    model : nn.Module
        A transformers model, perhaps under PEFT or ``torch.compile``.

    Returns
    -------
    bool
        False when it was installed before.

    Raises
    ------
    TypeError
        The model cannot be served; the message begins with ``unsupported: <class>`` and says why.
    """
    model = top_model(model)
    facts = check_model(model)
    _activate(model)
    stand_in_front(model)
    decoder = facts.decoder
    fresh = _before not in model._forward_pre_hooks.values()
    if fresh:
        model.register_forward_pre_hook(_before, with_kwargs=True, prepend=True)
        model.register_forward_hook(_after, with_kwargs=True, always_call=True)
    if decoder is not model and _guard not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_guard, with_kwargs=True)
    return fresh


def uninstall(model: nn.Module) -> bool:
    """Take :func:`install` back: hooks are removed and the attention function has its former name.

    Parameters
    ----------
    model : nn.Module
        As given to :func:`install`; a model without our hooks is left alone.

    Returns
    -------
    bool
        Whether something was installed.
    """
    model = top_model(model)
    if not is_installed(model):
        return False
    for module in model.modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks: dict[int, Any] = getattr(module, kind)
            for key in [key for key, hook in hooks.items() if hook in (_before, _after, _guard)]:
                del hooks[key]
                getattr(module, f"{kind}_with_kwargs").pop(key, None)
                if kind == "_forward_hooks":
                    module._forward_hooks_always_called.pop(key, None)
    step_aside(model)
    for config in text_configs(model):
        config._attn_implementation_internal = base_attention(config._attn_implementation)
    return True


def is_installed(model: nn.Module) -> bool:
    """Whether a model carries our hooks.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    bool
    """
    return _before in top_model(model)._forward_pre_hooks.values()


@contextmanager
def installed(model: nn.Module) -> Iterator[nn.Module]:
    """Install for the length of a ``with`` block; what was installed before stays.

    Parameters
    ----------
    model : nn.Module

    Yields
    ------
    nn.Module
        The same model.
    """
    fresh = install(model)
    try:
        yield model
    finally:
        if fresh:
            uninstall(model)


def running_cache() -> RunningCache | None:
    """The compressed cache whose forward is in progress on this thread.

    Returns
    -------
    cache or None
    """
    running = RUNNING.get()
    return None if running is None else running.cache


def _activate(model: nn.Module, search: bool = True) -> None:
    """Put the wrapper in front of whatever attention function is configured now.

    The walk over all modules takes longer than the rest of a one-token step costs us, so that it is taken once a prompt
    (`search`); between two tokens only the configurations found then are looked at, which is where
    ``set_attn_implementation`` writes.
    """
    configs = None if search else _CONFIGS.get(model)
    if configs is None:
        configs = _CONFIGS[model] = text_configs(model)
    for config in configs:
        name = config._attn_implementation
        if not (name or "").startswith(PREFIX):
            # Set without `set_attn_implementation`: that one would look for a flash kernel of our name.
            config._attn_implementation_internal = register(base_attention(name))


def _compressed(kwargs: dict[str, Any]) -> RunningCache | None:
    cache = kwargs.get("past_key_values")
    return cache if hasattr(cache, "begin_forward") else None


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    if not args:
        return kwargs
    names = _PARAMETERS.get(model)
    if names is None:
        names = _PARAMETERS[model] = tuple(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    stale = RUNNING.get()
    if stale is not None and stale.model is model:
        # Torch runs no hook after a KeyboardInterrupt, so the forward that it broke is closed here.
        RUNNING.set(stale.outer)
        stale.cache.end_forward(error=True)
    named = _named(model, args, kwargs)
    cache = _compressed(named)
    if cache is None:
        return
    owner = getattr(cache, "model", None)
    if owner is not None and top_model(owner) is not model:
        raise RuntimeError(
            f"this cache was made for another model ({type(owner).__name__}), not for this {type(model).__name__}; "
            "make a cache for this model"
        )
    if named.get("use_cache") is False:
        raise RuntimeError(
            "use_cache=False reads the whole sequence again for every token, so that nothing is ever compressed; leave "
            "it out, or leave the compressed cache out"
        )
    past = cache.get_seq_length()
    _activate(model, search=past == 0)
    restore_deltas(model, cache, past)
    said = announced(cache, past)
    tokens = token_facts(model, named, past, getattr(cache, "visual_mask", None), said)
    cache.begin_forward(tokens)
    RUNNING.set(Running(model, cache, tokens, outer=RUNNING.get()))


def _after(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    running = RUNNING.get()
    if running is None or running.model is not model:
        return
    RUNNING.set(running.outer)
    if output is not None:
        keep_deltas(model, running.cache)
    running.cache.end_forward(error=output is None)


def _guard(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _compressed(_named(decoder, args, kwargs))
    if cache is not None and running_cache() is not cache:
        raise RuntimeError(
            f"{type(decoder).__name__} was called by itself with a compressed cache, which then cannot see the tokens; "
            "call the model that the cache was made for, or make the cache for the model that you call"
        )
