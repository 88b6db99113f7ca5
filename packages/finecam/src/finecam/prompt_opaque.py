"""The last transformer layer of an unknown kind, run whole and watched (Prompt-CAM, arXiv 2501.09333, eq. 3-5).

Whatever a block looks like inside, its attention ends in one call of ``scaled_dot_product_attention``. Watching that
call gives the attention maps; editing its result gives the "what if this head looked everywhere alike" of greedy trait
ranking. Exact for every block, at the price of whole-block runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from vfm_core.errors import UserError

from finecam.prompt_attention import PreNormLayer, PromptRows
from finecam.prompt_tokens import run_prompted

if TYPE_CHECKING:
    from vfm_core.backbones import Backbone, Tokens

__all__ = ["OpaqueLayer", "last_layer"]


class _Watch(TorchFunctionMode):
    """Record the arguments of ``scaled_dot_product_attention``; optionally edit them and its result."""

    def __init__(
        self,
        edit: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        result: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.edit, self.result = edit, result
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | kwargs
        call = call if self.edit is None else self.edit(call)
        self.calls.append(call)
        out = func(**call)
        return out if self.result is None else self.result(out)


class OpaqueLayer:
    """Any last block, run as it is on all tokens; exact, but slower than :class:`PreNormLayer`.

    Parameters
    ----------
    backbone : Backbone
        The last block must call ``torch.nn.functional.scaled_dot_product_attention`` exactly once.

    Raises
    ------
    UserError
        From :meth:`rows`, when it does not.
    """

    trial_batch = 64  # whole blocks run per call of ``finish``: bounds the memory of trait ranking

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def rows(self, tokens: Tokens, prompts: Tensor, self_attention: bool = True) -> PromptRows:
        """As :meth:`PreNormLayer.rows`."""
        prompts = prompts.expand(tokens.x.shape[0], -1, -1)
        count, patches = prompts.shape[1], tokens.grid[0] * tokens.grid[1]

        def without_prompt_keys(call: dict[str, Any]) -> dict[str, Any]:
            mask = call.get("attn_mask")
            cut = {"key": call["key"][:, :, count:], "value": call["value"][:, :, count:]}
            return call | cut | ({} if mask is None else {"attn_mask": mask[..., count:]})

        def run(
            tokens: Tokens, prompts: Tensor, result: Callable[[Tensor], Tensor] | None = None
        ) -> tuple[Tensor, Any]:
            last = self.backbone.depth - 1
            watch = _Watch(None if self_attention else without_prompt_keys, result)
            with watch:
                out, _ = run_prompted(self.backbone, tokens, prompts, last, last + 1)
            if len(watch.calls) != 1:
                raise _unsupported(self.backbone, len(watch.calls))
            return out, watch.calls[0]

        z, call = run(tokens, prompts)
        query, key, value, mask = call["query"], call["key"], call["value"], call.get("attn_mask")
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., :count, :]
        scale = call.get("scale") or query.shape[-1] ** -0.5

        def finish(images: Tensor, classes: Tensor, heads: Tensor) -> Tensor:
            done = []
            for part in torch.arange(len(images), device=images.device).split(self.trial_batch):

                def put(out: Tensor, part: Tensor = part) -> Tensor:
                    out = out.clone()
                    out[torch.arange(len(part), device=out.device), :, classes[part]] = heads[part].to(out.dtype)
                    return out

                one = replace(tokens, x=tokens.x[images[part]])
                rows, _ = run(one, prompts[images[part]], put)
                done.append(rows[torch.arange(len(part), device=rows.device), classes[part]])
            return torch.cat(done)

        first = key.shape[2] - patches
        return PromptRows(query[:, :, :count], key, value, scale, first, mask, finish, lambda classes: z[:, classes])


def _unsupported(backbone: Backbone, calls: int) -> UserError:
    last = backbone.blocks[-1]
    return UserError(
        f"Prompt-CAM cannot read the attention of the last block ({type(last).__name__} made {calls} calls of "
        "scaled_dot_product_attention, one is needed)",
        where=str(backbone.spec),
        remedy="switch the model to fused (sdpa) attention, or use a plain ViT: timm, open_clip, transformers ViT, "
        "CLIP, SigLIP, DINOv2, DINOv3",
    )


def last_layer(backbone: Backbone) -> PreNormLayer | OpaqueLayer:
    """Choose the evaluator for a backbone's last block: taken apart when known, watched otherwise."""
    return PreNormLayer(backbone) if PreNormLayer.knows(backbone.blocks[-1]) else OpaqueLayer(backbone)
