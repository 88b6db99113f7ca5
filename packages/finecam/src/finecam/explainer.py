"""The user interface: ``Explainer(model)(images, target, references)`` -> maps of *this class and not those*.

Follow `Explainer._explain_batch` top to bottom: one forward that records the tail (`capture.Capture`), the question as
a vector on the logits (`references.Contrast`), its gradient at the layer, and a family's map of the two
(`families`). Finer-CAM is arXiv 2501.11309; its eq. 8 aggregates several references before the ReLU
(``before_relu_mean``), its Tab. 7 compares that with ``before_relu_max`` and ``after_relu_mean``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from vfm_core.errors import UserError, unknown_name

from finecam import attention, combine, score
from finecam.capture import Capture, NoGridError, Reshape
from finecam.combine import check_aggregate
from finecam.families import FAMILIES, channel_weighted
from finecam.layers import Site, find_layer, last_spatial
from finecam.layouts import TokenLayout
from finecam.question import Question, SimilarityTables, ask
from finecam.references import Contrast, Names
from finecam.result import CAMResult

if TYPE_CHECKING:
    from finecam.classifiers import Classifier

log = logging.getLogger(__name__)

ZERO_GRADIENT = (
    "the target does not depend on this layer's patches: explain the last block's first norm layer instead "
    "(a CLS-pooled transformer gives its last block's patch tokens no gradient), or run in float32"
)


@dataclass(frozen=True)
class _Part:
    """One batch: ReLU'd maps (gammas, B, h, w) per layer, the contrast, logits (B, C)."""

    maps: list[Tensor]
    contrast: Contrast
    logits: Tensor
    no_gradient: bool


class Explainer:
    """Contrastive class-activation maps of any image classifier.

    Parameters
    ----------
    model
        Module from (B, 3, H, W) to logits (B, C): a tensor, an object with ``.logits``, a tuple, or a dict. It is put
        in eval mode and frozen only during a call; nothing stays hooked between calls. A `Classifier`, or the spec of
        one (see `load_classifier`), also brings class names, preprocessing and its own layer.
    layer
        Where to read the map: a submodule, its name (``"blocks[-1].norm1"``, ``"relu#2"``), a list of either (maps are
        scaled to [0, 1] per layer and averaged), or None for the architecture's default.
    method
        One of `families.FAMILIES`.
    reshape
        ``"auto"``, or a callable from the layer's output to (B, K, h, w).
    class_names
        Names by class id, so that targets and references can be names; by default the model's ``class_names``, if any.
    batch_size
        Images per forward pass (for Score-CAM: masked images). Halved when memory runs out.
    preprocess
        Picture -> (3, H, W) input, so that calls accept PIL images and paths; a `vfm_core.Preprocess` also allows
        ``size="original"``.
    class_weights
        (C, D) class directions for ``similarity="weight"``; default: the model's ``weights()`` or last linear layer.
    confusion
        (C, C) confusion matrix, rows = true class, for ``similarity="confusion"``.
    softmax_channels, max_channels
        Score-CAM options, see `score.score_weights`.
    channels_last
        Run convolutions in channels-last memory order: faster on most CPUs and GPUs, equal up to rounding.
    seed
        Of ``method="randomcam"``.
    progress
        Called with (done, total) by the methods that need many forward passes.

    Examples
    --------
    >>> import timm, torch
    >>> model = timm.create_model("resnet18", num_classes=5)
    >>> explain = Explainer(model, class_names=["a", "b", "c", "d", "e"])
    >>> result = explain(torch.randn(2, 3, 64, 96), target="a", references=["b", "c"])
    >>> tuple(result.maps.shape), result.layer
    ((2, 64, 96), 'layer4.1')
    """

    def __init__(
        self,
        model: nn.Module | Classifier | str,
        layer: nn.Module | str | Sequence[nn.Module | str] | None = None,
        method: str = "gradcam",
        reshape: str | Reshape = "auto",
        class_names: Names = None,
        batch_size: int = 16,
        *,
        preprocess: Callable[[Any], Tensor] | None = None,
        class_weights: Tensor | None = None,
        confusion: Any = None,
        softmax_channels: bool = True,
        max_channels: int | None = None,
        channels_last: bool = False,
        seed: int = 0,
        progress: score.Progress | None = None,
    ) -> None:
        if isinstance(model, str):
            from finecam.classifiers import load_classifier

            model = load_classifier(model)
        if not isinstance(model, nn.Module):
            if not isinstance(getattr(model, "model", None), nn.Module):
                raise UserError("model must be a torch module", where="model", given=type(model).__name__)
            layer = model.layer if layer is None else layer
            reshape = model.reshape if reshape == "auto" else reshape
            class_names, preprocess = class_names or model.class_names, preprocess or model.preprocess
            class_weights = model.class_weights if class_weights is None else class_weights
            model = model.model
        if method not in FAMILIES:
            raise unknown_name("method", method, FAMILIES, where="method")
        if reshape != "auto" and not callable(reshape):
            raise UserError("reshape must be 'auto' or a callable", where="reshape", given=repr(reshape))
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UserError("batch size must be positive", where="batch_size", given=batch_size)
        if max_channels is not None and max_channels < 1:
            raise UserError("max_channels must be positive", where="max_channels", given=max_channels)
        model = getattr(model, "_orig_mod", model)  # a compiled module bypasses the hooks of its layers
        self.model, self.layer, self.method, self.reshape = model, layer, method, reshape
        own = getattr(model, "class_names", None)
        self.class_names = own if class_names is None and isinstance(own, list) else class_names
        self.batch_size, self.preprocess = batch_size, preprocess
        self.softmax_channels, self.max_channels, self.channels_last = softmax_channels, max_channels, channels_last
        self.seed, self.progress = seed, progress
        self._sites: list[Site] | None = None
        self._traced = False
        self._tables = SimilarityTables(model, class_weights, confusion)
        self._tails = combine.LinearTails()
        self._layouts: dict[Any, TokenLayout] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """Nothing to undo: every call leaves the model as it was."""

    def __call__(
        self,
        x: Any,
        target: Any = None,
        references: Any = 3,
        similarity: str = "logit",
        gamma: float = 0.6,
        weighting: str = "mean",
        aggregate: str = "before_relu_mean",
        normalize: str | None = "minmax",
        size: str | tuple[int, int] | None = "input",
        *,
        ablation: bool = False,
    ) -> CAMResult:
        """Explain a batch.

        Parameters
        ----------
        x
            Preprocessed images (B, 3, H, W), or pictures and paths when `preprocess` is known.
        target
            None (predicted class), an id or a name for all images, or one per image (list or (B,) tensor).
        references
            Number T of similar classes to choose, a list of ids or names for all images, one such list per image
            ((B, T) tensor), or None for the plain map. T above C - 1 is cut down.
        similarity
            How T classes are chosen, see `references.similar_classes`.
        gamma
            Strength of the contrast, >= 0; 0 is exactly the plain method.
        weighting
            ``"mean"`` (the paper), ``"softmax"`` (the official code), ``"softmax_detached"``.
        aggregate
            ``"before_relu_mean"``, ``"before_relu_max"`` or ``"after_relu_mean"``.
        normalize
            ``"minmax"`` scales each map to [0, 1]; None leaves the ReLU'd values.
        size
            ``"input"``, None (the layer's grid), (h, w), or ``"original"`` (the pictures given; NaN where the model
            saw nothing).
        ablation
            Allow ``aggregate="map_subtraction"``, the paper's noisy counter-example.

        Returns
        -------
        CAMResult
            maps (B, H, W) float32 on the device of `x`.

        Raises
        ------
        UserError
            Bad arguments, an unusable layer, NaN or Inf anywhere (names image and layer).
        """
        result = self.sweep(
            x, (gamma,), target, references, similarity, weighting, aggregate, normalize, size, ablation=ablation
        )
        result.maps, result.empty, result.gamma = result.maps[:, 0], result.empty[:, 0], float(gamma)
        return result

    def sweep(
        self,
        x: Any,
        gammas: Sequence[float],
        target: Any = None,
        references: Any = 3,
        similarity: str = "logit",
        weighting: str = "mean",
        aggregate: str = "before_relu_mean",
        normalize: str | None = "minmax",
        size: str | tuple[int, int] | None = "input",
        *,
        ablation: bool = False,
    ) -> CAMResult:
        """Explain a batch at several strengths from one forward and one backward per distinct class mix.

        As `__call__`, with `gammas` in place of `gamma`: maps (B, len(gammas), H, W), empty (B, len(gammas)).
        """
        images, boxes = self._images(x)
        check_aggregate(aggregate, weighting, FAMILIES[self.method], ablation)
        question = ask(
            FAMILIES[self.method],
            target,
            references,
            similarity,
            weighting,
            aggregate,
            gammas,
            class_names=self.class_names,
            batch=len(images),
        )
        if normalize not in ("minmax", None):
            raise unknown_name("normalization", str(normalize), ["minmax"], where="normalize")
        parts = self._batches(images, question)
        shape = combine.output_size(size, images, boxes)
        maps = torch.cat([combine.finish(p.maps, shape, normalize).transpose(0, 1) for p in parts])
        empty = torch.cat([torch.stack([m.amax((2, 3)) == 0 for m in p.maps]).all(0).T for p in parts])
        if any(p.no_gradient for p in parts):
            log.warning("all-zero gradient at %s: %s", self._label(), ZERO_GRADIENT)
        if size == "original":
            maps = combine.on_pictures(maps, boxes)
        device = x.device if isinstance(x, Tensor) else torch.device("cpu")
        contrast = [p.contrast for p in parts]
        return CAMResult(
            maps=maps.float().to(device),
            target=torch.cat([c.target for c in contrast]).to(device),
            references=torch.cat([c.references for c in contrast]).to(device),
            weights=torch.cat([c.weights for c in contrast]).to(device),
            logits=torch.cat([p.logits for p in parts]).to(device),
            layer=self._label(),
            method=self.method,
            gamma=question.gammas,
            similarity=question.rule,
            weighting=weighting,
            aggregate=aggregate,
            empty=empty.to(device),
            class_names=list(self.class_names) if self.class_names is not None else None,
            advice=ZERO_GRADIENT if any(p.no_gradient for p in parts) else None,
        )

    # --- input ---------------------------------------------------------------------------------

    def _images(self, x: Any) -> tuple[Tensor, list[combine.Placement]]:
        """Input batch on the model's device, and where each picture lies in it (empty for tensors)."""
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        placements: list[combine.Placement] = []
        if not isinstance(x, Tensor):
            x, placements = combine.read_pictures(x, self.preprocess)
        if x.ndim != 4 or not len(x):
            raise UserError(
                "images must be (B, 3, H, W), B > 0", given=tuple(x.shape), remedy="add a batch axis: x[None]"
            )
        if not x.is_floating_point():
            raise UserError(
                "images must be preprocessed floats", given=x.dtype, remedy="apply the model's preprocessing"
            )
        if parameter is not None:
            x = x.to(parameter.device, parameter.dtype)
        return (x.contiguous(memory_format=torch.channels_last) if self.channels_last else x), placements

    def _label(self) -> str:
        return ", ".join(site.label for site in self._sites) if self._sites else "attention"

    # --- computation ---------------------------------------------------------------------------

    def _batches(self, x: Tensor, question: Question) -> list[_Part]:
        parts: list[_Part] = []
        start, generator = 0, torch.Generator().manual_seed(self.seed)
        while start < len(x):
            images = slice(start, start + self.batch_size)
            try:
                parts.append(self._explain_batch(x[images], question.of(images), generator, start))
            except NoGridError:
                if self.layer is not None or self._traced:
                    raise
                self._traced = True  # the architecture's habit does not hold: run the model to see its maps
                name = last_spatial(self.model, x)
                if name is None:
                    raise
                self._sites = [Site(name, self.model.get_submodule(name))]
                continue
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size = max(1, self.batch_size // 2)
                log.warning("out of memory: batch size halved to %d", self.batch_size)
                continue
            start = images.stop
        return parts

    def _explain_batch(self, x: Tensor, question: Question, generator: torch.Generator, offset: int) -> _Part:
        family = FAMILIES[self.method]
        if family.kind == "attention":
            logits, grid_map = attention.attention_map(self.model, x, self.method)
            y = _finite(logits.float(), "logits", offset)
            maps = [grid_map.relu().expand(len(question.gammas), *grid_map.shape)]
            return _Part(maps, question.contrast(y, self._tables), y, False)
        sites = self._find_sites(x)
        differentiate = family.kind in ("gradient", "second") or (
            family.kind == "score" and self.max_channels is not None
        )
        with Capture(self.model, sites, self.reshape, differentiate, self._layouts) as capture, score.kernels(family):
            logits = capture.forward(x)
            y = _finite(logits.detach().float(), "logits", offset)
            contrast = question.contrast(y, self._tables)
            labels = [site.label for site in sites]
            activations = [_finite(a.float(), f"activations of {at}", offset) for a, at in zip(capture.maps, labels)]
            grads: list[list[Tensor]] = []
            if family.kind == "gradient":
                cotangents = combine.cotangents(contrast, question.gammas, question.aggregate, y.shape[1])
                grads = self._tails.gradients(self.model, capture, logits, cotangents, self.method == "cam")
                grads = [[_finite(g.float(), f"gradient at {at}", offset) for g in gs] for gs, at in zip(grads, labels)]
                maps = [
                    combine.finer_maps(family, a, gs, question.gammas, question.aggregate)
                    for a, gs in zip(activations, grads)
                ]
            elif family.map is not None:
                maps = [family.map(a, a).relu().expand(len(question.gammas), -1, -1, -1) for a in activations]
            else:
                options = score.Options(
                    self.batch_size, self.softmax_channels, self.max_channels, generator, self.progress
                )
                weights = score.channel_weights(family, x, capture, logits, contrast, question, options)
                maps = [torch.stack([channel_weighted(w, a).relu() for w in ws]) for ws, a in zip(weights, activations)]
        for m, at in zip(maps, labels):
            _finite(m.transpose(0, 1), f"map of {at}", offset)
        blank = any(bool((m.amax((2, 3)) == 0).any()) for m in maps)  # only then is the costlier question worth asking
        no_gradient = blank and any(not gs[0].flatten(1).any(1).all() for gs in grads)
        return _Part(maps, contrast, y, no_gradient)

    def _find_sites(self, x: Tensor) -> list[Site]:
        if self._sites is None:
            layers: list[Any] = list(self.layer) if isinstance(self.layer, (list, tuple)) else [self.layer]
            if not layers:
                raise UserError("empty list of layers", where="layer")
            self._sites = [find_layer(self.model, layer, x) for layer in layers]
        return self._sites


def _finite(values: Tensor, what: str, offset: int) -> Tensor:
    """The values (B, ...), or a UserError that names the images with NaN or Inf."""
    sums = values.sum(tuple(range(1, values.ndim)))  # one number per image shows it, without a mask of all elements
    good = sums.isfinite()
    if not good.all() and not (good := values.isfinite().flatten(1).all(1)).all():
        images = [int(i) + offset for i in (~good).nonzero().flatten()]
        raise UserError(
            f"NaN or Inf in {what}",
            where=f"image{'s' if len(images) > 1 else ''} {', '.join(map(str, images))} of the batch",
            remedy="run in float32 and without autocast, and check the pictures",
        )
    return values


__all__ = ["CAMResult", "Explainer"]
