"""Prompt-CAM: one learned prompt per class on a frozen vision transformer (arXiv 2501.09333, section 2).

With N layers, width D, R heads, M patches and C classes, layer i sees ``[P_{i-1}; x_CLS; E_{i-1}]``. The last layer's
outputs at the prompt positions are scored by ONE vector shared by all classes (eq. 4)::

    s[c] = w^T LN(z_N^c) + b

so classes can differ only by where their prompt looks, and the attention of prompt c *is* the explanation (eq. 5)::

    alpha^{c,r} = softmax(q_c^r K_r^T / sqrt(d))[patches]

The softmax runs over prompts, prefix tokens and patches; the map is its patch part, not renormalised. The paper writes
the dimension itself in the denominator; its code, like every transformer, uses the square root, and so do we.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vfm_core.backbones import Backbone, Tokens
from vfm_core.errors import UserError, unknown_name
from vfm_core.preprocess import Preprocess

from finecam.prompt_attention import PromptRows
from finecam.prompt_opaque import last_layer
from finecam.prompt_tokens import run_prompted

if TYPE_CHECKING:
    from finecam.traits import Traits, Uniform

__all__ = ["PromptCAM"]


class PromptCAM(nn.Module):
    """Class prompts and one shared scoring vector on a frozen backbone.

    Parameters
    ----------
    backbone : Backbone
        A vision transformer; its parameters are frozen and it stays in evaluation mode.
    num_classes : int
        C, at least 2.
    entry_layer : int, optional
        Layer in 1..N at whose input the class prompts enter; they flow on to layer N. N (default) is the paper's deep
        variant, 1 the shallow one, values between are the interpolations of its supplement. Layers before have fresh
        class-agnostic prompts whose outputs are thrown away.
    prompt_layers : int, optional
        Prompts exist in the last L layers only; default all N. With 1 nothing but the last layer is adapted, and the
        tokens that enter it are constant per image, so that training can work from a cache.
    agnostic_prompts : int, optional
        Class-agnostic prompts per layer; default C as in the paper. Fewer make many classes affordable.
    prompt_self_attention : bool
        Whether prompts attend to each other in the last layer, as in the paper. Without it the classes' rows are
        independent of each other.
    dropout : float
        Drop-out of prompts in training, in [0, 1). The same mask holds for all images of a batch.
    class_names : sequence of str, optional
        C names.
    class_chunk : int, optional
        Rows of the last layer evaluated at a time; bounds its memory for many classes. Exact.
    checkpointing : bool
        Recompute blocks in the backward pass instead of storing them.
    generator : torch.Generator, optional
        Source of the initial values; default seeded with 0.

    Attributes
    ----------
    prompts : Parameter
        (C, D), class-specific, P of the entry layer.
    agnostic : Parameter
        (A, k, D), class-agnostic prompts of the A layers before; A may be 0.
    head : nn.Linear
        D -> 1, the vector w and the bias b.
    preprocess : Preprocess
        Picture to model input; the backbone's own unless training used another.
    metrics, history
        Numbers and records of the training, see :func:`finecam.promptcam_train.train_promptcam`.

    Raises
    ------
    UserError
        For arguments out of range or class names that do not fit.

    Examples
    --------
    >>> from vfm_core import load_backbone
    >>> model = PromptCAM(load_backbone("random:timm:vit_tiny_patch16_224"), num_classes=5, prompt_layers=1)
    >>> logits, attention = model(torch.zeros(2, 3, 224, 224), return_attention=True)
    >>> logits.shape, attention.shape  # (B, C) and (B, R, C, M)
    (torch.Size([2, 5]), torch.Size([2, 3, 5, 196]))
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        entry_layer: int | None = None,
        prompt_layers: int | None = None,
        agnostic_prompts: int | None = None,
        prompt_self_attention: bool = True,
        dropout: float = 0.1,
        class_names: Sequence[str] | None = None,
        class_chunk: int | None = None,
        checkpointing: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        depth, dim = backbone.depth, backbone.embed_dim
        entry = depth if entry_layer is None else entry_layer
        layers = depth if prompt_layers is None else prompt_layers
        _check_range("number of classes", "num_classes", num_classes, 2, None)
        _check_range("entry layer", "entry_layer", entry, 1, depth)
        _check_range("number of prompted layers", "prompt_layers", layers, 1, depth)
        _check_range("number of class-agnostic prompts", "agnostic_prompts", agnostic_prompts or 0, 0, None)
        _check_range("class chunk", "class_chunk", class_chunk or 1, 1, None)
        if not 0 <= dropout < 1:
            raise UserError("prompt drop-out out of range", where="dropout", given=dropout, remedy="use 0 <= p < 1")
        first = depth - layers + 1
        if entry < first:
            raise UserError(
                f"class prompts cannot enter before the first prompted layer {first} of {depth}",
                where="entry_layer",
                given=entry,
                remedy=f"use prompt_layers={depth - entry + 1} or leave one of the two out",
            )
        if class_names is not None and (len(class_names) != num_classes or len(set(class_names)) != num_classes):
            raise UserError(
                f"need {num_classes} different class names",
                where="class_names",
                given=f"{len(class_names)} names, {len(set(class_names))} different",
                remedy="give one unique name per class",
            )
        self.backbone = backbone.requires_grad_(False)
        self.num_classes, self.entry_layer, self.prompt_layers = num_classes, entry, layers
        self.agnostic_prompts = num_classes if agnostic_prompts is None else agnostic_prompts
        self.prompt_self_attention, self.dropout = prompt_self_attention, dropout
        self.class_names = [str(i) for i in range(num_classes)] if class_names is None else list(class_names)
        self.class_chunk, self.checkpointing = class_chunk, checkpointing
        self.preprocess: Preprocess = backbone.preprocess
        self.metrics: dict[str, Any] = {}
        self.history: Any = None
        self.layer = last_layer(backbone)

        generator = torch.Generator().manual_seed(0) if generator is None else generator
        area = backbone.patch_size[0] * backbone.patch_size[1]
        bound = math.sqrt(6.0 / (3 * area + dim))  # Xavier of a patch embedding, as in visual prompt tuning
        device = next(backbone.parameters()).device
        agnostic = _uniform((entry - first, self.agnostic_prompts, dim), bound, generator, device)
        self.agnostic = nn.Parameter(agnostic, requires_grad=agnostic.numel() > 0)  # an idle one would stall DDP
        self.prompts = nn.Parameter(_uniform((num_classes, dim), bound, generator, device))
        self.head = torch.nn.utils.skip_init(nn.Linear, dim, 1, device=device)  # leaves the global generator alone
        for parameter in self.head.parameters():
            parameter.data = _uniform(tuple(parameter.shape), dim**-0.5, generator, device)
        self.train(False)

    # ------------------------------------------------------------------------------------------------------- forward

    @property
    def frozen_depth(self) -> int:
        """Leading blocks without any prompt: the tokens after them depend on the image alone and can be cached."""
        return self.backbone.depth - self.prompt_layers

    def frozen_tokens(self, images: Tensor) -> Tokens:
        """Tokens (B, p + M, D) after the blocks that no prompt enters, without gradient."""
        with torch.no_grad():
            return self.backbone.run(self.backbone.embed(images), 0, self.frozen_depth)

    def tokens_of(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tokens:
        """Make :meth:`frozen_tokens`' result again from its cached tensor (B, p + M, D)."""
        grid = self.backbone.grid_size if grid is None else grid
        weight = next(self.backbone.parameters())
        x = x.to(weight.device, weight.dtype)
        ctx = self.backbone.context(grid, x.device, x.dtype)
        return Tokens(x=x, grid=grid, prefix=self.backbone.num_prefix_tokens, ctx=ctx)

    def encode(self, x: Tensor | Tokens) -> tuple[Tokens, Tensor]:
        """Run layers 1..N-1.

        Parameters
        ----------
        x : Tensor or Tokens
            Preprocessed images (B, 3, H, W); or :meth:`frozen_tokens` of them, also as their bare tensor
            (B, p + M, D) where the grid is the backbone's own.

        Returns
        -------
        tokens : Tokens
            [x_CLS; registers; E_{N-1}], (B, p + M, D).
        prompts : Tensor
            P_{N-1}: (1, C, D) when the class prompts enter at layer N, else (B, C, D).
        """
        if isinstance(x, Tensor):
            tokens = self.frozen_tokens(x) if x.ndim == 4 else self.tokens_of(x)
        else:
            tokens = x
        for index, layer in enumerate(range(self.frozen_depth, self.entry_layer - 1)):
            _, tokens = self._run(tokens, self._drop(self.agnostic[index]), layer)
        prompts = self._drop(self.prompts)[None]
        for layer in range(self.entry_layer - 1, self.backbone.depth - 1):
            prompts, tokens = self._run(tokens, prompts, layer)
        return tokens, prompts

    def rows(self, x: Tensor | Tokens) -> PromptRows:
        """Run everything up to the attention of the last layer's prompt rows; ``x`` as in :meth:`encode`."""
        tokens, prompts = self.encode(x)
        return self.layer.rows(tokens, prompts, self.prompt_self_attention)

    def score(self, z: Tensor) -> Tensor:
        """Equation 4 without the class index: rows z of the last layer, (..., D), to scores (...)."""
        flat = z.reshape(1, -1, z.shape[-1])
        normed = self.backbone.norm(Tokens(flat, grid=(1, flat.shape[1]), prefix=0)).x
        normed = self.backbone.adapter.pooled_norm(normed)  # families that norm after pooling have it here
        return self.head(normed.to(self.head.weight.dtype)).reshape(z.shape[:-1])

    def logits(self, rows: PromptRows) -> Tensor:
        """Scores s of all classes, (B, C), from :meth:`rows`."""
        step = self.class_chunk or self.num_classes
        parts = [self.score(rows.outputs(slice(i, i + step))) for i in range(0, self.num_classes, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def forward(self, x: Tensor | Tokens, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Classify.

        Parameters
        ----------
        x : Tensor or Tokens
            As in :meth:`encode`.
        return_attention : bool
            Also return the class prompts' attention on the patches.

        Returns
        -------
        logits : Tensor
            (B, C).
        attention : Tensor
            (B, R, C, M), only with ``return_attention``. Non-negative; sums to less than 1 over M.
        """
        rows = self.rows(x)
        logits = self.logits(rows)
        if not return_attention:
            return logits
        return logits, rows.attention()[..., rows.first_patch :]

    @torch.no_grad()
    def maps(self, x: Tensor | Tokens, classes: Tensor | Sequence[int | str] | int | str) -> Tensor:
        """Attention maps of chosen classes, (B, k, R, h, w).

        Parameters
        ----------
        x : Tensor or Tokens
            As in :meth:`encode`.
        classes : Tensor or sequence or int or str
            Class ids or names, the same k for every image, or an int64 tensor (B, k).
        """
        with self.evaluating():
            tokens, prompts = self.encode(x)
            rows = self.layer.rows(tokens, prompts, self.prompt_self_attention)
            ids = self.class_ids(classes).to(tokens.x.device)
            ids = ids.expand(tokens.x.shape[0], -1) if ids.ndim == 2 else ids.repeat(tokens.x.shape[0], 1)
            attention = rows.attention(ids)[..., rows.first_patch :]
        return attention.transpose(1, 2).unflatten(-1, tokens.grid)

    # ------------------------------------------------------------------------------------------- traits, save and load

    def traits(self, x: Tensor, target: Any = None, top: int = 4, uniform: Uniform = "tokens") -> Traits:
        """Rank the heads of the target class; see :func:`finecam.traits.rank_traits`."""
        from finecam.traits import rank_traits

        return rank_traits(self, x, target, top=top, uniform=uniform)

    def save(self, directory: str | Path) -> Path:
        """Write prompts, scoring vector and configuration; see :func:`finecam.promptcam_io.save`."""
        from finecam.promptcam_io import save

        return save(self, directory)

    @classmethod
    def load(cls, path: str | Path, **kwargs: Any) -> PromptCAM:
        """Read our folder or an official ``model.pt``; see :func:`finecam.promptcam_io.load`."""
        from finecam.promptcam_io import load

        return load(path, **kwargs)

    # ----------------------------------------------------------------------------------------------------------- small

    def class_ids(self, classes: Tensor | Sequence[int | str] | int | str) -> Tensor:
        """Class ids (k,) int64 of ids or names; tensors pass through after a range check.

        Raises
        ------
        UserError
            For an unknown name (with the closest ones) or an id out of range.
        """
        if isinstance(classes, int | str):
            classes = [classes]
        if not isinstance(classes, Tensor):
            ids = []
            for item in classes:
                if isinstance(item, str) and item not in self.class_names:
                    raise unknown_name("class", item, self.class_names)
                ids.append(self.class_names.index(item) if isinstance(item, str) else int(item))
            classes = torch.tensor(ids, dtype=torch.int64)
        if classes.numel() and (int(classes.min()) < 0 or int(classes.max()) >= self.num_classes):
            raise UserError(
                "class id out of range", given=classes.tolist(), remedy=f"use 0 to {self.num_classes - 1}, or a name"
            )
        return classes.long()

    def learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that training changes: all but the backbone's."""
        return ((n, p) for n, p in self.named_parameters() if not n.startswith("backbone."))

    def train(self, mode: bool = True) -> PromptCAM:
        """Switch the prompts' drop-out; the frozen backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def evaluating(self) -> _Evaluating:
        """Context in which drop-out is off; the mode comes back afterwards, also on error."""
        return _Evaluating(self)

    def _run(self, tokens: Tokens, prompts: Tensor, layer: int) -> tuple[Tensor, Tokens]:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return run_prompted(self.backbone, tokens, prompts, layer, layer + 1)
        return checkpoint(run_prompted, self.backbone, tokens, prompts, layer, layer + 1, use_reentrant=False)

    def _drop(self, prompts: Tensor) -> Tensor:
        return nn.functional.dropout(prompts, self.dropout, self.training)


class _Evaluating:
    def __init__(self, model: PromptCAM) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.mode = self.model.training
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.mode)


def _check_range(what: str, field: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        remedy = f"use {low} or more" if high is None else f"use {low} to {high}"
        raise UserError(f"{what} out of range", where=field, given=value, remedy=remedy)


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator, device: torch.device) -> Tensor:
    return ((2 * torch.rand(shape, generator=generator) - 1) * bound).to(device)
