"""The slow and obvious way to evict: keep the full cache and mask what a compressed one would not hold.

This is what a compressed cache must equal to float rounding, for every layer and head. It shares no line with the cache
or with the wrappers, which is why ``meda-kv doctor`` and the tests compare against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from meda_kv.attention.interface import layer_index
from meda_kv.attention.support import text_configs, top_model

__all__ = ["NAME", "masked_generate"]

NAME = "masked_reference"  # without our prefix: the hooks must not take it for a wrapper
_EVICTED: ContextVar[dict[int, Tensor] | None] = ContextVar("meda_kv_reference", default=None)


def reference_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Plain softmax attention; queries after the prompt do not see the keys that the layer has evicted.

    Parameters
    ----------
    module : nn.Module
        An attention module with ``layer_idx``.
    query : Tensor
        [B, H, q, D].
    key, value : Tensor
        [B, Hkv, S, D], of the full cache.
    attention_mask : Tensor or None
        Bool [B, 1, q, S]; None is causal.
    scaling : float, optional
        1/sqrt(D) by default.
    softcap : float, optional
        Scores are squeezed to ``softcap * tanh(scores / softcap)``.
    **kwargs
        Whatever else the model passes; not used.

    Returns
    -------
    tuple of Tensor and None
        [B, q, H, D].
    """
    heads, queries, dim = query.shape[1:]
    groups, slots = heads // key.shape[1], key.shape[2]
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(exact) @ key.to(exact).repeat_interleave(groups, 1).transpose(2, 3)
    scores = scores * (scaling if scaling is not None else dim**-0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    causal = torch.ones(queries, slots, dtype=torch.bool, device=query.device).tril(slots - queries)
    seen = causal[None, None] if attention_mask is None else attention_mask[..., :slots]
    evicted = (_EVICTED.get() or {}).get(layer_index(module))
    if evicted is not None:
        gone, prompt = evicted.to(query.device), evicted.shape[2]
        gone = nn.functional.pad(gone, (0, max(slots - prompt, 0)))[..., :slots].repeat_interleave(groups, 1)
        after = torch.arange(slots - queries, slots, device=query.device) >= prompt
        seen = seen & ~(gone[:, :, None] & after[:, None])
    weights = scores.masked_fill(~seen, torch.finfo(exact).min).softmax(-1)
    output = weights @ value.to(exact).repeat_interleave(groups, 1)
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


def evicted_slots(kept: Tensor, prompt: int) -> Tensor:
    """The complement of what was kept.

    Parameters
    ----------
    kept : Tensor
        Positions [B, Hkv, S'], with -1 where there is none.
    prompt : int
        Number of tokens n that there were.

    Returns
    -------
    Tensor
        Bool [B, Hkv, n].
    """
    gone = torch.ones(*kept.shape[:2], prompt + 1, dtype=torch.bool, device=kept.device)
    gone.scatter_(2, torch.where(kept < 0, prompt, kept), False)
    return gone[..., :prompt]


@contextmanager
def reference_model(
    model: nn.Module, kept: Sequence[Tensor] | Mapping[int, Tensor] = (), prompt: int = 0
) -> Iterator[Any]:
    """Let a model compute with :func:`reference_attention` for the length of a ``with`` block.

    Parameters
    ----------
    model : nn.Module
        Its attention implementation is restored at the end.
    kept : sequence or mapping of Tensor
        For every layer the positions [B, Hkv, S'] that stay (-1: none), or by layer index; absent layers keep all.
    prompt : int
        Number of tokens n that `kept` chooses from; queries after them see only what was kept.

    Yields
    ------
    nn.Module
        The model inside wrappers of ``torch.compile`` and PEFT.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, reference_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
    layers = dict(kept.items()) if isinstance(kept, Mapping) else dict(enumerate(kept))
    configs = text_configs(model)
    names = [config._attn_implementation for config in configs]
    token = _EVICTED.set({index: evicted_slots(one, prompt) for index, one in layers.items()})
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield top_model(model)
    finally:
        _EVICTED.reset(token)
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation_internal = name


@torch.no_grad()
def masked_generate(
    model: nn.Module,
    inputs: Mapping[str, Any],
    kept: Sequence[Tensor] | Mapping[int, Tensor],
    steps: int | Tensor,
    *,
    turn: Mapping[str, Any] | None = None,
    turn_steps: int | Tensor = 1,
) -> tuple[Tensor, Tensor]:
    """Generate on the full cache, with evicted prompt keys masked for every query after the prompt.

    Parameters
    ----------
    model : nn.Module
        A model with ``generate``.
    inputs : mapping
        What its processor returns.
    kept : sequence or mapping of Tensor
        As in :func:`reference_model`.
    steps : int or Tensor
        Number of tokens to choose greedily, or the tokens [B, T] to force.
    turn : mapping, optional
        Inputs of a second turn, read after the tokens: ``input_ids`` [B, t] of the new tokens alone, and pixels.
    turn_steps : int or Tensor
        As `steps`, of the second turn.

    Returns
    -------
    tuple of Tensor
        Logits [T, B, vocabulary] that each token was chosen from, and the tokens [B, T]; those of the second turn
        follow those of the first.
    """
    from transformers import DynamicCache

    ids = inputs["input_ids"]
    with reference_model(model, kept, int(ids.shape[1])) as inner:
        cache = DynamicCache(config=inner.config.get_text_config(decoder=True))
        logits, chosen = _generate(inner, inputs, cache, steps)
        if turn is not None:
            new = torch.cat([chosen, turn["input_ids"]], 1)
            mask = inputs.get("attention_mask", torch.ones_like(ids))
            mask = torch.cat([mask, mask.new_ones(new.shape)], 1)
            whole = {**turn, "input_ids": torch.cat([ids, new], 1), "attention_mask": mask}
            again = _generate(inner, whole, cache, turn_steps)
            logits, chosen = torch.cat([logits, again[0]]), torch.cat([chosen, again[1]], 1)
    return logits, chosen


def _generate(model: Any, inputs: Mapping[str, Any], cache: Any, steps: int | Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, B, vocabulary] and tokens [B, T] of an ordinary call of generate, forced when `steps` holds tokens."""
    prompt = int(inputs["input_ids"].shape[1])
    forced = None if isinstance(steps, int) else steps

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        if forced is None:
            return scores
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, forced[:, ids.shape[1] - prompt, None].to(scores.device), 0.0)

    result = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=steps if isinstance(steps, int) else int(steps.shape[1]),
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=[force],
    )
    return torch.stack(result.logits), result.sequences[:, prompt:]
