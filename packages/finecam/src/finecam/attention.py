"""Attention baselines without a class: rollout (arXiv 2005.00928) and the last block's CLS attention.

Every library computes attention in one of three ways: PyTorch's fused kernel, its multi-head function, or a softmax
over the scores. A `TorchFunctionMode` sees all three, so no model has to be rewritten or switched to a slow path.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from vfm_core.errors import UserError

from finecam.layers import logits_of, quiet
from finecam.layouts import token_grid

_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")


class _Watch(TorchFunctionMode):
    """Collect the attention probabilities, averaged over heads, (B, N, N), of every self-attention that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            call = dict(zip(_SDPA_ARGUMENTS, args)) | kwargs
            self._add(_probabilities(call["query"], call["key"], call.get("attn_mask"), call.get("scale")))
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            wanted = kwargs.get("need_weights", True)
            out, weights = func(*args, **kwargs | {"need_weights": True, "average_attn_weights": True})
            self._add(weights)
            return out, weights if wanted and kwargs.get("average_attn_weights", True) else None
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "") == "softmax" and isinstance(out, Tensor) and out.ndim == 4:
            self._add(out)
        return out

    def _add(self, probabilities: Tensor | None) -> None:
        if probabilities is not None and probabilities.shape[-1] == probabilities.shape[-2]:
            self.maps.append(probabilities.mean(1) if probabilities.ndim == 4 else probabilities)


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    if key.shape[1] != query.shape[1]:  # grouped heads share keys
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def self_attentions(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, C) and the head-averaged attention (B, N, N) of every block, first block first.

    Raises
    ------
    UserError
        No self-attention over all tokens of the image (a CNN, or windows only).
    """
    with quiet(model), torch.no_grad(), _Watch() as watch:
        logits = logits_of(model(x))
    maps = [m for m in watch.maps if m.shape[0] == len(x) and m.shape == watch.maps[-1].shape]
    if not maps or len(maps) != len(watch.maps):
        raise UserError(
            "attention maps need a transformer whose blocks all attend over the same tokens",
            where=type(model).__name__,
            given=f"{len(watch.maps)} attentions",
            remedy="use a gradient method such as gradcam",
        )
    return logits, maps


def rollout(attentions: list[Tensor]) -> Tensor:
    """Attention rollout (B, N, N): the product over blocks of ``(mean_heads A + I) / 2``, rows normalised."""
    total = torch.eye(attentions[0].shape[-1], device=attentions[0].device).expand_as(attentions[0])
    for a in attentions:
        step = (a + torch.eye(a.shape[-1], device=a.device)) / 2
        total = step / step.sum(-1, keepdim=True) @ total
    return total


def attention_map(model: nn.Module, x: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and the map (B, h, w) of ``"rollout"`` or ``"cls_attention"``.

    Rollout reads the row of the CLS token, or the mean of the patch rows of a model without prefix tokens.

    Raises
    ------
    UserError
        No transformer, no grid, or ``"cls_attention"`` without a CLS token.
    """
    logits, maps = self_attentions(model, x)
    found = token_grid(list(model.modules()), maps[-1].shape[-1], (x.shape[-2], x.shape[-1]))
    if found is None:
        raise UserError("attention does not fit the image", given=tuple(maps[-1].shape), remedy="use a gradient method")
    grid, prefix = found
    if method == "cls_attention":
        if not prefix or not _has_cls(model):
            raise UserError(
                "cls_attention needs a CLS token", where=type(model).__name__, remedy="use method='rollout'"
            )
        row = maps[-1][:, 0]
    else:
        total = rollout([m.float() for m in maps])
        row = total[:, 0] if _has_cls(model) and prefix else total[:, prefix:].mean(1)
    return logits, row[:, prefix:].float().reshape(len(x), *grid)


def _has_cls(model: nn.Module) -> bool:
    """False only where a model says it has none: timm's register-only transformers."""
    return not any(getattr(m, "has_class_token", None) is False for m in model.modules())
