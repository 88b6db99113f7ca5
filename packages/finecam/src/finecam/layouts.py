"""From a layer's output to a grid: tokens, channels-last and channels-first maps all become (B, K, h, w).

The grid comes from the image that was really given, never from the model's nominal size, so dynamic and non-square
inputs need no options. Prefix tokens (CLS, distillation, registers) are counted from what the libraries declare
(timm ``num_prefix_tokens``) or from the learned tokens that a model owns (transformers, open_clip, torchvision).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SINGLE_TOKENS = ("cls_token", "class_token", "class_embedding", "distillation_token", "dist_token")
_MANY_TOKENS = ("register_tokens", "reg_token", "storage_tokens")


@dataclass(frozen=True)
class TokenLayout:
    """How a layer's output lies in memory.

    Attributes
    ----------
    kind
        ``"nchw"``, ``"nhwc"``, ``"bnd"`` (batch, tokens, channels) or ``"nbd"`` (tokens first).
    grid
        Rows and columns (h, w).
    prefix
        Tokens before the grid that belong to no place.
    """

    kind: str
    grid: tuple[int, int]
    prefix: int = 0

    def to_map(self, output: Tensor) -> Tensor:
        """View the output as (B, K, h, w)."""
        if self.kind == "nchw":
            return output
        if self.kind == "nhwc":
            return output.permute(0, 3, 1, 2)
        if self.kind == "nbd":
            output = output.transpose(0, 1)
        patches = output[:, self.prefix :]
        return patches.reshape(len(patches), *self.grid, patches.shape[-1]).permute(0, 3, 1, 2)


def find_layout(
    model: nn.Module, name: str, module: nn.Module, output: Tensor, image_hw: tuple[int, int], batch: int
) -> TokenLayout | None:
    """Tell how a layer's output maps to the image.

    Parameters
    ----------
    model, name, module
        The model, the layer's dotted name in it, and the layer.
    output
        What the layer returned.
    image_hw
        Height and width of the input.
    batch
        Number of images.

    Returns
    -------
    TokenLayout or None
        None when no grid fits.
    """
    if output.ndim == 4 and output.shape[0] == batch:
        return _spatial(module, output, image_hw)
    if output.ndim == 3:
        owners = list(_ancestors(model, name))
        tokens_first = output.shape[0] != batch or (output.shape[1] == batch and _says_tokens_first(owners))
        if tokens_first and output.shape[1] != batch:
            return None
        grid = token_grid(owners, output.shape[0 if tokens_first else 1], image_hw)
        if grid is not None:
            return TokenLayout("nbd" if tokens_first else "bnd", *grid)
    return None


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Modules around a layer, nearest first."""
    while name:
        name = name.rpartition(".")[0]
        yield model.get_submodule(name)


def _says_tokens_first(owners: list[nn.Module]) -> bool:
    return any(getattr(owner, "batch_first", True) is False for owner in owners)


def _strides(side: int, cells: int) -> range:
    """Strides s with floor(side / s) <= cells <= ceil(side / s), also where padding adds a cell."""
    if cells < 1 or cells > side:
        return range(0)
    return range(max(1, -(-side // (cells + 1))), side // max(1, cells - 1) + 1)


def _is_grid(h: int, w: int, image_hw: tuple[int, int]) -> bool:
    """One stride explains both sides."""
    rows, columns = _strides(image_hw[0], h), _strides(image_hw[1], w)
    return max(rows.start, columns.start, 1) < min(rows.stop, columns.stop)


def _spatial(module: nn.Module, output: Tensor, image_hw: tuple[int, int]) -> TokenLayout | None:
    _, a, b, c = output.shape
    first, last = _is_grid(b, c, image_hw), _is_grid(a, b, image_hw)
    if first and last:  # few channels: let the layer say how many it has
        shape = getattr(module, "normalized_shape", ())
        last = tuple(shape) == (c,) and "2d" not in type(module).__name__
        first = not last
    if first:
        return TokenLayout("nchw", (b, c))
    return TokenLayout("nhwc", (a, b)) if last else None


def token_grid(owners: list[nn.Module], n: int, image_hw: tuple[int, int]) -> tuple[tuple[int, int], int] | None:
    """Grid and prefix count of n tokens."""
    prefix = _declared_prefix(owners)
    prefixes = [prefix] if prefix is not None else [0, 1, 2, 5]
    patch = _declared_patch(owners)
    for p in prefixes:
        grids = [] if patch is None else [(image_hw[0] // patch[0], image_hw[1] // patch[1])]
        grids += [(-(-image_hw[0] // s), -(-image_hw[1] // s)) for s in range(1, max(image_hw) + 1)]
        grids += [(image_hw[0] // s, image_hw[1] // s) for s in range(1, max(image_hw) + 1)]
        for h, w in grids:
            if h * w > 1 and h * w + p == n:
                return (h, w), p
    return None


def _declared_prefix(owners: list[nn.Module]) -> int | None:
    for owner in owners:
        count = getattr(owner, "num_prefix_tokens", None)
        if isinstance(count, int):
            return count
    for owner in owners:
        count = sum(_token_count(name.rpartition(".")[2], p) for name, p in owner.named_parameters())
        if count:
            return count
    return None


def _token_count(name: str, parameter: Tensor) -> int:
    if name in _SINGLE_TOKENS:
        return 1
    return parameter.shape[-2] if name in _MANY_TOKENS and parameter.ndim >= 2 else 0


def _declared_patch(owners: list[nn.Module]) -> tuple[int, int] | None:
    for owner in owners:
        sources: list[Any] = [getattr(owner, "patch_embed", None), owner, getattr(owner, "config", None)]
        for source in sources:
            size = getattr(source, "patch_size", None)
            if isinstance(size, int):
                return size, size
            if isinstance(size, (tuple, list, torch.Size)) and len(size) == 2:
                return int(size[0]), int(size[1])
    return None
