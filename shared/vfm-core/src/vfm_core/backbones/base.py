"""What all model families share: tokens, features, a native model with its belongings, and the adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess
from vfm_core.specs import Spec

__all__ = ["Adapter", "Features", "FinalNorm", "Native", "TextTower", "Tokens"]

FinalNorm = Literal["tokens", "pooled", "none"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """What flows between blocks.

    Attributes
    ----------
    x : Tensor
        (B, prefix + h * w, D); prefix tokens first, then the patches row by row.
    grid : tuple of int
        (h, w), the patch grid.
    prefix : int
        Number of prefix tokens: CLS, where there is one, then registers.
    ctx : dict
        What this family's blocks need besides tokens (rotary tables, relative bias); opaque.

    Raises
    ------
    UserError
        ``prefix + h * w`` is not the number of tokens.
    """

    x: Tensor
    grid: tuple[int, int]
    prefix: int
    ctx: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        h, w = self.grid
        if self.x.ndim != 3 or self.prefix < 0 or self.prefix + h * w != self.x.shape[1]:
            given = f"shape {tuple(self.x.shape)}, prefix {self.prefix}, grid {self.grid}"
            raise UserError("tokens must be (B, prefix + h * w, D)", given=given)

    @property
    def patches(self) -> Tensor:
        """(B, h * w, D) patch tokens."""
        return self.x[:, self.prefix :]

    @property
    def prefixes(self) -> Tensor:
        """(B, prefix, D) CLS and register tokens."""
        return self.x[:, : self.prefix]

    def map(self) -> Tensor:
        """(B, D, h, w) patch tokens as a feature map."""
        return self.patches.transpose(1, 2).unflatten(2, self.grid)


@dataclass(frozen=True, eq=False)
class Features:
    """What :meth:`Backbone.forward` returns.

    Attributes
    ----------
    tokens : Tensor
        (B, prefix + h * w, D) after the final norm.
    patch_tokens, prefix_tokens : Tensor
        (B, h * w, D) and (B, prefix, D), the two parts of ``tokens``.
    grid : tuple of int
        (h, w).
    pooled : Tensor
        (B, D'), the model's own image embedding.
    """

    tokens: Tensor
    patch_tokens: Tensor
    prefix_tokens: Tensor
    grid: tuple[int, int]
    pooled: Tensor


class TextTower(Protocol):
    """Text side of an image-text model."""

    logit_scale: float

    def encode(self, texts: list[str]) -> Tensor:
        """Return (n, D) L2-normalised embeddings of the texts as they are, no template added."""


@dataclass
class Native:
    """A native model with what is needed to use it; made by ``load_native``.

    Attributes
    ----------
    spec : Spec
        Where it came from.
    family : str
        "timm", "open_clip", "hf", "tiny" or a third party's.
    model : torch.nn.Module
        The library's own module, in eval mode, otherwise untouched.
    preprocess : Preprocess
        Its inference preprocessing.
    class_names : list of str or None
        Names of the logits, where the checkpoint has them.
    text : TextTower or None
        Text side of an image-text model.
    head : bool
        Whether ``model(images)`` gives class logits.
    """

    spec: Spec
    family: str
    model: nn.Module
    preprocess: Preprocess
    class_names: list[str] | None = None
    text: TextTower | None = None
    head: bool = False


class Adapter:
    """How one family's image tower is cut into embed, blocks, norm and pool.

    A subclass sets the attributes in ``__init__`` and overrides what differs. Nothing is copied: all methods call the
    native module's own parts.

    Parameters
    ----------
    trunk : torch.nn.Module
        The module that holds the blocks.
    path : str
        Its dotted name inside the native model, "" for the model itself.
    head : torch.nn.Module, optional
        What the native model applies to the pooled vector (an image-text projection).
    """

    blocks_at = "blocks"  # dotted name of the block list inside trunk
    norm1 = "norm1"  # a block's first norm
    attn = "attn"  # a block's attention
    ctx_keys: tuple[str, ...] = ()  # what a block needs in Tokens.ctx

    embed_dim: int
    num_heads: int
    patch_size: tuple[int, int]
    image_size: tuple[int, int]  # native (H, W)
    has_cls: bool
    num_registers: int = 0
    final_norm: FinalNorm = "tokens"
    flexible: bool = False  # accepts any image size that the patch divides

    def __init__(self, trunk: nn.Module, path: str = "", head: nn.Module | None = None) -> None:
        self.trunk: Any = trunk
        self.path = path
        self.head = head

    @property
    def blocks(self) -> nn.Module:
        """The native block list, looked up at each use so that wrapping a block later is seen."""
        return self.trunk.get_submodule(self.blocks_at)

    def grid(self, height: int, width: int) -> tuple[int, int] | None:
        """Patch grid of an image of this size, None where the model cannot take it."""
        (ph, pw), fits = self.patch_size, self.flexible or (height, width) == self.image_size
        return (height // ph, width // pw) if fits and height % ph == width % pw == 0 else None

    def embed(self, img: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Image (B, 3, H, W) to depth-0 tokens (B, prefix + h * w, D) and the blocks' context."""
        raise NotImplementedError

    def block(self, i: int, x: Tensor, ctx: dict[str, Any]) -> Tensor:
        """Run block ``i``."""
        return self.blocks[i](x)  # type: ignore[index]

    def norm(self, x: Tensor) -> Tensor:
        """Final token norm."""
        return self.trunk.norm(x)

    def pooled_norm(self, pooled: Tensor) -> Tensor:
        """Final norm of families that norm after pooling."""
        return pooled

    def pool(self, raw: Tensor) -> Tensor:
        """The model's own embedding from raw last-block tokens."""
        raise NotImplementedError

    def logits(self, raw: Tensor) -> Tensor | None:
        """The native classifier on raw last-block tokens, None without one."""
        return None

    def context(self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Context for tokens of this grid that did not come from :meth:`embed`."""
        return {}

    def attention_impl(self, name: str) -> None:
        """Switch the attention kernels, where the library has a switch."""
