"""One thin view on every vision transformer: embed, blocks, norm, pool.

A :class:`Backbone` holds the untouched native module of timm, open_clip or transformers and an adapter, ten to thirty
lines per family, that says where that module keeps its parts. Running ``embed``, then all blocks, then ``norm`` calls
the same kernels in the same order as the native forward, so the results are equal to the last bit.

Depth ``k`` means the tokens after ``k`` executed blocks, raw, before any final norm. It is ``hidden_states[k]`` of
transformers and ``forward_intermediates(indices=[k - 1], norm=False)`` of timm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vfm_core.backbones.base import Adapter, Features, Native, Tokens
from vfm_core.errors import UserError, unknown_name
from vfm_core.preprocess import Preprocess

__all__ = ["Backbone", "fingerprint"]


class Backbone(nn.Module):
    """Thin view on a native vision transformer; made by ``load_backbone`` or ``wrap``.

    Parameters
    ----------
    native : Native
        The model and what belongs to it.
    adapter : Adapter
        Where its parts are.
    trainable : bool
        False freezes the parameters and keeps the native module in eval mode even under ``train()``, which would
        otherwise switch on dropout and the random rotary rescaling of DINOv3.

    Attributes
    ----------
    model : torch.nn.Module
        The native module. ``block_names`` are dotted names inside it, for hooks, LoRA targets and CAM layers.
    depth, embed_dim, num_heads, num_prefix_tokens, num_registers : int
    patch_size, image_size, grid_size : tuple of int
        Each (height, width).
    has_cls : bool
    final_norm : {"tokens", "pooled", "none"}
        Where the final norm stands; with "pooled", token features are un-normalised.
    preprocess : Preprocess
        Also as ``transform``.
    """

    def __init__(self, native: Native, adapter: Adapter, *, trainable: bool = False) -> None:
        super().__init__()
        self.model = native.model
        self.adapter = adapter
        self.trainable = trainable
        self.spec, self.family = native.spec, native.family
        self.text, self.class_names = native.text, native.class_names
        self.preprocess = native.preprocess
        self.embed_dim, self.num_heads = adapter.embed_dim, adapter.num_heads
        self.patch_size = adapter.patch_size
        self.has_cls, self.num_registers = adapter.has_cls, adapter.num_registers
        self.num_prefix_tokens = int(adapter.has_cls) + adapter.num_registers
        self.final_norm = adapter.final_norm
        if adapter.grid(*native.preprocess.size) is None:  # keep the two in step: the input must fit the model
            (h, w), (ph, pw) = native.preprocess.size if adapter.flexible else adapter.image_size, adapter.patch_size
            self.preprocess = native.preprocess.with_size(max(h - h % ph, ph), max(w - w % pw, pw))
        self.image_size = self.preprocess.size
        self.grid_size = self._grid(*self.image_size)
        if not trainable:
            self.model.requires_grad_(False)
        self.model.eval()
        self.training = False

    @property
    def transform(self) -> Preprocess:
        """The right preprocessing: picture to model input."""
        return self.preprocess

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The native blocks: indexable, real modules."""
        return self.adapter.blocks  # type: ignore[return-value]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def block_names(self) -> list[str]:
        """Dotted names of the blocks inside ``model``."""
        prefix = f"{self.adapter.path}." if self.adapter.path else ""
        return [f"{prefix}{self.adapter.blocks_at}.{i}" for i in range(self.depth)]

    def first_norm(self, i: int) -> nn.Module:
        """The first LayerNorm of block ``i``, the usual CAM target."""
        return self.blocks[i].get_submodule(self.adapter.norm1)

    def attention(self, i: int) -> nn.Module:
        """The attention module of block ``i``."""
        return self.blocks[i].get_submodule(self.adapter.attn)

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode; the native module follows only when ``trainable``."""
        super().train(mode)
        if not self.trainable:
            self.model.eval()
        return self

    # ------------------------------------------------------------------ the split forward
    def embed(self, img: Tensor) -> Tokens:
        """Patchify, add positions and prefix tokens, apply any pre-norm: the depth-0 tokens.

        Parameters
        ----------
        img : Tensor
            (B, 3, H, W), normalised; cast to the dtype of the patch embedding.

        Raises
        ------
        UserError
            Not an image batch, or a size that the model cannot take.
        """
        if img.ndim != 4 or img.shape[1] != 3:
            raise UserError("expected images of shape (B, 3, H, W)", given=tuple(img.shape))
        grid = self._grid(img.shape[2], img.shape[3])
        conv = next(m for m in self.adapter.trunk.modules() if isinstance(m, nn.Conv2d))
        x, ctx = self.adapter.embed(img.to(conv.weight.dtype))
        return Tokens(x, grid, self.num_prefix_tokens, ctx)

    def run(self, t: Tokens, start: int = 0, stop: int | None = None) -> Tokens:
        """Run ``blocks[start:stop]``.

        Tokens from elsewhere may come without ``ctx``: it is then made by :meth:`context` for their grid.

        Raises
        ------
        UserError
            ``0 <= start <= stop <= depth`` does not hold.
        """
        stop = self.depth if stop is None else stop
        if not 0 <= start <= stop <= self.depth:
            raise UserError(f"blocks must satisfy 0 <= start <= stop <= {self.depth}", given=f"{start}:{stop}")
        x, ctx = t.x, t.ctx
        if any(key not in ctx for key in self.adapter.ctx_keys):
            ctx = self.context(t.grid, x.device, x.dtype)
        for i in range(start, stop):
            x = self.adapter.block(i, x, ctx)
        return replace(t, x=x, ctx=ctx)

    def norm(self, t: Tokens) -> Tokens:
        """Apply the final token norm; the identity where the family norms after pooling."""
        return replace(t, x=self.adapter.norm(t.x))

    def pool(self, t: Tokens, how: Literal["native", "cls", "mean"] = "native") -> Tensor:
        """Pool RAW last-block tokens, as :meth:`run` returns them.

        Parameters
        ----------
        t : Tokens
            At depth ``depth``, not yet normed.
        how : {"native", "cls", "mean"}
            The model's own embedding, the normed CLS token, or the mean of the normed patch tokens. A model without
            an embedding of its own (MAE, SigLIP without head) gives CLS, or the mean if it has no CLS.

        Returns
        -------
        Tensor
            (B, D'); D' is the width, or the width of the model's projection for "native".
        """
        if how == "native":
            return self.adapter.pool(t.x)
        if how == "mean":
            return self.adapter.pooled_norm(self.norm(t).patches.mean(dim=1))
        if how != "cls":
            raise unknown_name("pooling", how, ["native", "cls", "mean"])
        if not self.has_cls:
            raise UserError("this model has no CLS token", given=str(self.spec), remedy='use how="native" or "mean"')
        return self.adapter.pooled_norm(self.adapter.norm(t.x)[:, 0])

    def head_logits(self, t: Tokens) -> Tensor | None:
        """Class logits (B, C) of the checkpoint's own classifier on RAW last-block tokens, None without one."""
        return self.adapter.logits(t.x)

    def context(self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Return the ``ctx`` of tokens with this grid that did not come from :meth:`embed`."""
        return self.adapter.context(grid, device, dtype)

    def features(self, img: Tensor, at: Iterable[int]) -> dict[int, Tokens]:
        """Raw tokens at several depths in one pass, which stops at the deepest.

        Parameters
        ----------
        img : Tensor
            (B, 3, H, W), normalised.
        at : iterable of int
            Depths in 0..depth.

        Raises
        ------
        UserError
            No depth, or one out of range.
        """
        depths = sorted(set(at))
        if not depths or depths[0] < 0 or depths[-1] > self.depth:
            raise UserError(f"depths must be in 0..{self.depth}", given=depths)
        t, done, found = self.embed(img), 0, {}
        for depth in depths:  # no hooks: they misfire under torch.compile and activation checkpointing
            t, done = self.run(t, done, depth), depth
            found[depth] = t
        return found

    def forward(self, img: Tensor) -> Features:
        """Image batch (B, 3, H, W) to normed tokens and the model's own embedding."""
        raw = self.run(self.embed(img))
        normed = self.norm(raw)
        return Features(normed.x, normed.patches, normed.prefixes, normed.grid, self.pool(raw))

    # ------------------------------------------------------------------ identity
    def fingerprint(self) -> str:
        """Content hash of everything that the image features depend on: weights, buffers, structure."""
        a = self.adapter
        facts = (self.family, self.depth, a.embed_dim, a.num_heads, a.patch_size, self.num_prefix_tokens, a.final_norm)
        pooling = [getattr(a.trunk, name, None) for name in ("global_pool", "pool_type")]
        return fingerprint(nn.ModuleList([a.trunk] + ([a.head] if a.head is not None else [])), *facts, *pooling)

    def attention_impl(self, name: str) -> None:
        """Choose the attention kernels: "sdpa" (fast) or "eager" (transformers returns attention maps only then).

        timm and transformers switch; open_clip's ``nn.MultiheadAttention`` has nothing to switch.
        """
        if name not in ("sdpa", "eager"):
            raise unknown_name("attention implementation", name, ["sdpa", "eager"])
        self.adapter.attention_impl(name)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        grid = self.adapter.grid(height, width)
        if grid is None:
            (ph, pw), size = self.patch_size, self.adapter.image_size
            wanted = f"a multiple of the patch {ph}x{pw}" if self.adapter.flexible else f"exactly {size[0]}x{size[1]}"
            remedy = "resize the images" if self.adapter.flexible else "resize the images, or load with img_size=..."
            raise UserError(
                f"image size must be {wanted}", where=str(self.spec), given=f"{height}x{width}", remedy=remedy
            )
        return grid


def fingerprint(module: nn.Module, *facts: object) -> str:
    """Hash a module's content.

    Parameters
    ----------
    module : torch.nn.Module
        Its parameters and buffers count (name, shape, dtype, bytes) and its printed structure, which tells apart
        models with equal weights but different activations.
    *facts : object
        Anything else with a stable ``repr``.

    Returns
    -------
    str
        64 hexadecimal digits (SHA-256).
    """
    digest = hashlib.sha256(repr((str(module), facts)).encode())
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
