"""The last transformer layer, evaluated only where Prompt-CAM needs it (Prompt-CAM, arXiv 2501.09333, eq. 3-5).

Prompt-CAM reads nothing but the C prompt rows of the last layer. So keys and values are computed for all tokens, but
queries, output projection and MLP only for the prompts: C x (C + p + M) attention instead of (C + p + M)^2, with C
class prompts, p prefix tokens (CLS, registers) and M patches. The same state answers "what would class c's row be if
head r looked everywhere alike", which makes greedy trait ranking a matter of one-token trials.

:class:`PreNormLayer` takes a known block apart (timm ``Block`` and ``EvaBlock``, BEiT, open_clip, transformers' ViT,
MAE, CLIP, SigLIP, DINOv2, DINOv3). Other blocks go through ``prompt_opaque``: the same numbers at more cost.

Rotary tables rotate the keys of patches only; relative-position biases are zero in the prompt rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from vfm_core.backbones import Backbone, Tokens

__all__ = ["PreNormLayer", "PromptRows"]


# ---------------------------------------------------------------------------------------------------------------------
# What one forward pass of the last layer leaves behind


@dataclass
class PromptRows:
    """Queries of the prompts, keys and values of everything, and the way from mixed heads to the layer's output.

    Attributes
    ----------
    queries : Tensor
        (B or 1, R, C, d); 1 when the prompts do not depend on the image.
    keys, values : Tensor
        (B, R, T, d) with T = (C +) p + M; the C prompt keys are absent without prompt self-attention.
    scale : float
        Factor on query . key, normally ``d ** -0.5``.
    first_patch : int
        Index of the first patch among the T keys.
    bias : Tensor or None
        Additive mask of the prompt rows, broadcastable to (B, R, C, T).
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    first_patch: int
    bias: Tensor | None
    _finish: Callable[[Tensor, Tensor, Tensor], Tensor]
    _outputs: Callable[[slice], Tensor]

    @property
    def num_prompts(self) -> int:
        """C."""
        return self.queries.shape[2]

    def outputs(self, classes: slice = slice(None)) -> Tensor:
        """Rows of Z_N (before the final norm) of some classes, (B, c, D)."""
        return self._outputs(classes)

    def finish(self, images: Tensor, classes: Tensor, heads: Tensor) -> Tensor:
        """Outputs of single prompt rows, had their heads been ``heads``.

        Parameters
        ----------
        images, classes : Tensor
            (n,) int64: row ``classes[j]`` of image ``images[j]``.
        heads : Tensor
            (n, R, d): the R attention outputs before the output projection.

        Returns
        -------
        Tensor
            (n, D), before the final norm.
        """
        return self._finish(images, classes, heads)

    def attention(self, classes: Tensor | slice = slice(None)) -> Tensor:
        """Attention of prompt rows over all keys (eq. 5, with the square root in the denominator).

        Parameters
        ----------
        classes : Tensor or slice
            A slice of the C classes for every image, or (B, k) int64 class ids per image.

        Returns
        -------
        Tensor
            (B, R, k, T), rows sum to 1. The displayed map is ``[..., first_patch:]``, not renormalised.
        """
        queries, bias = self._pick(classes)
        scores = (queries * self.scale) @ self.keys.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(dim=-1)

    def heads(self, classes: Tensor | slice = slice(None)) -> Tensor:
        """Attended values per head, (B, R, k, d); arguments as in :meth:`attention`."""
        queries, bias = self._pick(classes)
        queries = queries.expand(self.keys.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(queries, self.keys, self.values, attn_mask=bias, scale=self.scale)

    def uniform_heads(self, uniform: str = "tokens") -> Tensor:
        """What a blurred head returns: the mean value over all keys or over the patches, (B, R, d)."""
        first = {"tokens": 0, "patches": self.first_patch}[uniform]
        return self.values[:, :, first:].mean(dim=2)

    def _pick(self, classes: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        if isinstance(classes, slice):
            bias = self.bias if self.bias is None or self.bias.shape[-2] == 1 else self.bias[..., classes, :]
            return self.queries[:, :, classes], bias
        batch, heads = self.keys.shape[:2]
        queries = self.queries.expand(batch, -1, -1, -1)
        index = classes[:, None, :, None].expand(-1, heads, -1, queries.shape[-1])
        bias = self.bias
        if bias is not None:
            bias = bias.expand(batch, heads, queries.shape[2], -1)
            bias = bias.gather(2, classes[:, None, :, None].expand(-1, heads, -1, bias.shape[-1]))
        return queries.gather(2, index), bias


# ---------------------------------------------------------------------------------------------------------------------
# Known blocks, taken apart

_VIT, _EVA, _BEIT = "timm.models.vision_transformer", "timm.models.eva", "timm.models.beit"
# (module path or library, class) -> names of norm1, attention, scale1, norm2, scale2; the MLP is ``mlp`` everywhere.
_BLOCKS: dict[tuple[str, str], tuple[str, str, str | None, str, str | None]] = {
    (_VIT, "Block"): ("norm1", "attn", "ls1", "norm2", "ls2"),
    (_EVA, "EvaBlock"): ("norm1", "attn", "gamma_1", "norm2", "gamma_2"),
    (_BEIT, "Block"): ("norm1", "attn", "gamma_1", "norm2", "gamma_2"),
    ("open_clip", "ResidualAttentionBlock"): ("ln_1", "attn", "ls_1", "ln_2", "ls_2"),
    ("transformers", "ViTLayer"): ("layernorm_before", "attention", None, "layernorm_after", None),
    ("transformers", "ViTMAELayer"): ("layernorm_before", "attention", None, "layernorm_after", None),
    ("transformers", "CLIPEncoderLayer"): ("layer_norm1", "self_attn", None, "layer_norm2", None),
    ("transformers", "SiglipEncoderLayer"): ("layer_norm1", "self_attn", None, "layer_norm2", None),
    ("transformers", "Dinov2Layer"): ("norm1", "attention", "layer_scale1", "norm2", "layer_scale2"),
    ("transformers", "Dinov2WithRegistersLayer"): ("norm1", "attention", "layer_scale1", "norm2", "layer_scale2"),
    ("transformers", "DINOv3ViTLayer"): ("norm1", "attention", "layer_scale1", "norm2", "layer_scale2"),
}
_ATTENTIONS = {
    ("timm.layers.attention", "Attention"),
    ("timm.layers.attention", "AttentionRope"),
    (_EVA, "EvaAttention"),
    (_BEIT, "Attention"),
    ("torch", "MultiheadAttention"),
    ("transformers", "ViTAttention"),
    ("transformers", "ViTMAEAttention"),
    ("transformers", "CLIPAttention"),
    ("transformers", "SiglipAttention"),
    ("transformers", "Dinov2Attention"),
    ("transformers", "Dinov2WithRegistersAttention"),
    ("transformers", "DINOv3ViTAttention"),
}


def _keys_of(module: nn.Module) -> list[tuple[str, str]]:
    kind = type(module)
    return [(kind.__module__, kind.__name__), (kind.__module__.split(".")[0], kind.__name__)]


def _linears(attention: Any) -> tuple[Callable[[Tensor], Tensor], ...]:
    """The three maps (..., D) -> (..., R d) to queries, keys and values."""
    if isinstance(attention, nn.MultiheadAttention):
        weight: Tensor = attention.in_proj_weight
        bias: Tensor | None = attention.in_proj_bias
    elif getattr(attention, "qkv", None) is None:
        return attention.q_proj, attention.k_proj, attention.v_proj
    elif type(attention.qkv) is not nn.Linear:  # wrapped (LoRA, quantised): only calling it is right
        return tuple(lambda y, i=i: attention.qkv(y).chunk(3, dim=-1)[i] for i in range(3))
    else:
        weight, bias = attention.qkv.weight, attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:  # EVA and BEiT keep their biases beside the linear layer
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    weights = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(lambda y, w=w, b=b: F.linear(y, w, b) for w, b in zip(weights, biases))


def _scaled(scale: nn.Module | Tensor | None, x: Tensor) -> Tensor:
    if scale is None:
        return x
    return scale(x) if isinstance(scale, nn.Module) else scale * x


class PreNormLayer:
    """A pre-norm block ``x + s1 attn(norm1 x)``, ``x + s2 mlp(norm2 x)``, evaluated for the prompt rows only.

    The block's own modules and weights do the work; drop-out inside the block is not applied (the backbone is frozen
    and in evaluation mode).

    Parameters
    ----------
    backbone : Backbone
        Its last block must be in the list of known blocks, see :func:`last_layer`.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        block = backbone.blocks[-1]
        names = next(_BLOCKS[key] for key in _keys_of(block) if key in _BLOCKS)
        parts: list[Any] = [None if n is None else getattr(block, n) for n in names]
        self.norm1, self.attn, self.scale1, self.norm2, self.scale2 = parts
        self.mlp: Any = block.mlp
        attn = self.attn
        heads = getattr(attn, "num_heads", None) or attn.num_attention_heads
        self.num_heads = int(heads)
        self.scale = float(getattr(attn, "scale", None) or getattr(attn, "scaling", None) or attn.head_dim**-0.5)

    @staticmethod
    def knows(block: nn.Module) -> bool:
        """Whether a block and its attention module are of a known kind."""
        names = next((_BLOCKS[key] for key in _keys_of(block) if key in _BLOCKS), None)
        return names is not None and any(key in _ATTENTIONS for key in _keys_of(getattr(block, names[1])))

    def rows(self, tokens: Tokens, prompts: Tensor, self_attention: bool = True) -> PromptRows:
        """Queries of the prompts, keys and values of everything.

        Parameters
        ----------
        tokens : Tokens
            (B, p + M, D) at depth N - 1.
        prompts : Tensor
            (1, C, D), the same for every image, or (B, C, D).
        self_attention : bool
            Whether prompts are among the keys. Without it the rows of different classes are independent.

        Returns
        -------
        PromptRows
        """
        to_q, to_k, to_v = _linears(self.attn)
        prompts = prompts.to(tokens.x.dtype)
        batch, patches = tokens.x.shape[0], tokens.grid[0] * tokens.grid[1]
        prompt_rows, token_rows = self.norm1(prompts), self.norm1(tokens.x)
        keys, values = self._keys(to_k(token_rows)), self._heads(to_v(token_rows))
        rotate = _rotation(self.attn, tokens.ctx, self.backbone.depth - 1)
        if rotate is not None:
            keys = torch.cat([keys[:, :, : tokens.prefix], rotate(keys[:, :, -patches:])], dim=2).type_as(values)
        if self_attention:
            own = [self._keys(to_k(prompt_rows)), self._heads(to_v(prompt_rows))]
            own = [part.expand(batch, -1, -1, -1) for part in own]
            keys, values = torch.cat([own[0], keys], dim=2), torch.cat([own[1], values], dim=2)
        groups = int(getattr(self.attn, "num_kv_groups", 1))
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        queries = self._heads(to_q(prompt_rows))
        norm = getattr(self.attn, "q_norm", None)
        queries = queries if norm is None else norm(queries)

        def finish(images: Tensor, classes: Tensor, heads: Tensor) -> Tensor:
            return self.finish(prompts.expand(batch, -1, -1)[images, classes], heads)

        def outputs(classes: slice) -> Tensor:
            return self.finish(prompts[:, classes], state.heads(classes).transpose(1, 2))

        first = keys.shape[2] - patches
        state = PromptRows(queries, keys, values, self.scale, first, None, finish, outputs)
        return state

    def finish(self, residual: Tensor, heads: Tensor) -> Tensor:
        """From mixed heads to the block's output: (..., D) and (..., R, d) to (..., D)."""
        out = heads.flatten(-2)
        norm = getattr(self.attn, "norm", None)
        out = out if norm is None else norm(out)
        gate = getattr(self.attn, "gate", None)
        out = out if gate is None else out * gate(self.norm1(residual)).sigmoid()
        project = next(getattr(self.attn, n) for n in ("proj", "out_proj", "o_proj") if hasattr(self.attn, n))
        x = residual + _scaled(self.scale1, project(out))
        return x + _scaled(self.scale2, self.mlp(self.norm2(x)))

    def _heads(self, flat: Tensor) -> Tensor:
        # head_dim may differ from D / R, and grouped keys have fewer heads than queries.
        head_dim = int(getattr(self.attn, "head_dim", 0)) or flat.shape[-1] // self.num_heads
        return flat.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    def _keys(self, flat: Tensor) -> Tensor:
        norm = getattr(self.attn, "k_norm", None)
        return self._heads(flat) if norm is None else norm(self._heads(flat))


def _rotation(attention: nn.Module, ctx: dict[str, Any], index: int) -> Callable[[Tensor], Tensor] | None:
    """The rotary map of patch keys (B, R, M, d), None where a family has no rotary positions."""
    rope = ctx.get("rope", ctx.get("pe"))
    if rope is None:
        return None
    if isinstance(rope, tuple):  # transformers: (cos, sin), rotating the two halves against each other
        cos, sin = rope

        def rotate_halves(keys: Tensor) -> Tensor:
            left, right = keys.chunk(2, dim=-1)
            return keys * cos + torch.cat([-right, left], dim=-1) * sin

        return rotate_halves
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    table = rope[index] if isinstance(rope, list) or rope.ndim == 4 else rope  # learned per layer: (N, R, M, 2 d)
    return lambda keys: apply_rot_embed_cat(keys, table, half=bool(getattr(attention, "rotate_half", False)))
