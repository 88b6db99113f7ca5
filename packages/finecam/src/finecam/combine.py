"""From gradients to finished maps: strengths, aggregations, layers, sizes (Finer-CAM, arXiv 2501.11309, eq. 8, Tab. 7).

The gradient is linear in the vector on the logits, so the gradients of the target and of the references, once known,
give every strength gamma: ``G = G_c - gamma sum_t a_t G_{d_t}``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from vfm_core.errors import UserError, unknown_name

from finecam.capture import Capture
from finecam.families import Family, minmax, resize
from finecam.references import Contrast, linear_heads

AGGREGATES = ("before_relu_mean", "before_relu_max", "after_relu_mean")
COUNTER_EXAMPLE = "map_subtraction"


def check_aggregate(aggregate: str, weighting: str, family: Family, ablation: bool) -> None:
    """Refuse combinations that mean nothing, and the counter-example unless it is asked for.

    Raises
    ------
    UserError
        Unknown aggregate, `map_subtraction` without `ablation`, or an aggregate that `family` or `weighting` excludes.
    """
    if aggregate == COUNTER_EXAMPLE and not ablation:
        raise UserError(
            "map_subtraction is the paper's noisy counter-example, not the method",
            where="aggregate",
            remedy="pass ablation=True to compare with it",
        )
    if aggregate not in (*AGGREGATES, COUNTER_EXAMPLE):
        raise unknown_name("aggregate", aggregate, AGGREGATES, where="aggregate")
    if aggregate != "before_relu_mean":
        if family.kind != "gradient":
            raise UserError(f"{family.name} aggregates before the ReLU only", where="aggregate", given=aggregate)
        if weighting != "mean":
            raise UserError(
                f"{aggregate} weighs references alike", where="weighting", given=weighting, remedy="use mean"
            )


def cotangents(contrast: Contrast, gammas: Sequence[float], aggregate: str, num_classes: int) -> Tensor:
    """The fewest vectors on the logits, (n, B, C), whose gradients give all maps.

    One for a single map, two for any number of strengths, 1 + T where references must be told apart.
    """
    if aggregate != "before_relu_mean":
        return contrast.basis(num_classes, mixed=False)
    if len(gammas) == 1:
        return contrast.cotangent(gammas[0], num_classes)[None]
    return contrast.basis(num_classes, mixed=True)


def finer_maps(family: Family, a: Tensor, grads: list[Tensor], gammas: Sequence[float], aggregate: str) -> Tensor:
    """ReLU'd maps (gammas, B, h, w) from activations (B, K, h, w) and the gradients of `cotangents`."""
    fn = family.map
    assert fn is not None
    if len(grads) == 1:
        return fn(a, grads[0]).relu().expand(len(gammas), -1, -1, -1)
    g_c, others = grads[0], grads[1:]
    plain = fn(a, g_c)
    single = [fn(a, g_d) for g_d in others] if family.linear or aggregate == COUNTER_EXAMPLE else []

    def signed(gamma: float, t: int) -> Tensor:
        return plain - gamma * single[t] if family.linear else fn(a, g_c - gamma * others[t])

    maps = []
    for gamma in gammas:
        if gamma == 0:
            maps.append(plain.relu())
        elif aggregate == "before_relu_mean":
            maps.append(signed(gamma, 0).relu())
        elif aggregate == "before_relu_max":
            maps.append(torch.stack([signed(gamma, t) for t in range(len(others))]).amax(0).relu())
        elif aggregate == "after_relu_mean":
            maps.append(torch.stack([signed(gamma, t).relu() for t in range(len(others))]).mean(0))
        else:
            maps.append((plain.relu() - gamma * torch.stack([m.relu() for m in single]).mean(0)).relu())
    return torch.stack(maps)


class LinearTails:
    """Gradients in closed form where the tail is a mean over the grid and one linear layer: ``G = v W / Z``.

    Nothing declares such a tail, so it is recognised by its numbers: the logits must equal ``W mean(A) + b`` on every
    batch, and on the first one the gradient must agree with autograd's (a clipping between could hide in the values).
    """

    def __init__(self) -> None:
        self._heads: dict[str, tuple[Tensor, Tensor | None] | None] = {}

    def gradients(
        self, model: nn.Module, capture: Capture, logits: Tensor, vectors: Tensor, required: bool = False
    ) -> list[list[Tensor]]:
        """As `Capture.vjp`; `required` refuses tails that are not linear.

        Raises
        ------
        UserError
            The closed form is required and does not hold.
        """
        closed = [self._closed(model, capture, logits, vectors, i) for i in range(len(capture.sites))]
        found = [grads for grads in closed if grads is not None]
        if len(found) == len(closed):
            return found
        if required:
            raise UserError(
                "cam needs a layer that is averaged and fed to one linear layer",
                where=", ".join(site.label for site in capture.sites),
                remedy="use gradcam, which is the same where cam exists",
            )
        return capture.vjp(logits, vectors)

    def _closed(
        self, model: nn.Module, capture: Capture, logits: Tensor, vectors: Tensor, i: int
    ) -> list[Tensor] | None:
        name, a, y = capture.sites[i].label, capture.maps[i], logits.detach().float()
        pooled = a.float().mean((2, 3))
        if name not in self._heads:
            fits = [h for h in linear_heads(model, y.shape[1]) if _predicts(h, pooled, y)]
            self._heads[name] = fits[-1] if fits else None
            if fits:
                expected = capture.vjp(logits, vectors[:1], keep=True)[i][0].float()
                difference = (_linear_gradients(fits[-1][0], vectors[:1], a)[0] - expected).abs().amax()
                if not expected.isfinite().all() or difference > 1e-4 * expected.abs().amax():
                    self._heads[name] = None
        head = self._heads[name]
        return _linear_gradients(head[0], vectors, a) if head is not None and _predicts(head, pooled, y) else None


def _predicts(head: tuple[Tensor, Tensor | None], pooled: Tensor, y: Tensor) -> bool:
    weight, bias = head
    if weight.shape[1] != pooled.shape[1]:
        return False
    predicted = nn.functional.linear(pooled, weight.detach().float(), None if bias is None else bias.detach().float())
    return bool((predicted - y).abs().amax() <= 1e-4 * y.abs().amax())


def _linear_gradients(weight: Tensor, vectors: Tensor, a: Tensor) -> list[Tensor]:
    cells = a.shape[2] * a.shape[3]
    return [(v @ weight.detach().float() / cells)[:, :, None, None].expand_as(a) for v in vectors]


# --- finishing -----------------------------------------------------------------------------


def finish(maps: list[Tensor], size: tuple[int, int] | None, normalize: str | None) -> Tensor:
    """Merge layers, scale and resize: (gammas, B, h, w) per layer -> (gammas, B, H, W).

    Several layers are scaled to [0, 1] each, resized and averaged. A map is scaled before it is resized and again
    after, so that maps of tiny values come out as those of ordinary ones.
    """
    if len(maps) > 1:
        largest = max(((m.shape[-2], m.shape[-1]) for m in maps), key=lambda s: s[0] * s[1])
        merged = torch.stack([resize(minmax(m), size or largest) for m in maps]).mean(0)
    else:
        merged = minmax(maps[0]) if normalize else maps[0]
        merged = resize(merged, size or (merged.shape[-2], merged.shape[-1]))
    return minmax(merged) if normalize else merged


@dataclass(frozen=True)
class Placement:
    """A picture's (width, height) and the part of it, in its pixels, that the model input covers."""

    size: tuple[int, int]
    box: tuple[float, float, float, float] | None


def output_size(size: Any, images: Tensor, placements: list[Placement]) -> tuple[int, int] | None:
    """Rows and columns of the maps before they are put on pictures; None keeps the grid."""
    if size == "input":
        return images.shape[-2], images.shape[-1]
    if size == "original":
        if not placements or any(p.box is None for p in placements):
            raise UserError("size='original' needs pictures and a vfm_core.Preprocess", where="size", given=size)
        if len({p.size for p in placements}) > 1:
            sizes = ", ".join(sorted({f"{p.size[0]}x{p.size[1]}" for p in placements}))
            raise UserError("size='original' needs pictures of one size", given=sizes, remedy="explain them one by one")
        return None
    if size is None:
        return None
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
        raise UserError("size must be 'input', 'original', None or (h, w)", where="size", given=repr(size))
    return size[0], size[1]


def on_pictures(maps: Tensor, placements: list[Placement]) -> Tensor:
    """Maps (B, gammas, h, w) of the model input -> maps of the whole pictures; NaN where the model saw nothing."""
    from finecam.render import to_original

    placed = []
    for values, place in zip(maps.cpu().numpy(), placements):
        assert place.box is not None
        placed.append(torch.from_numpy(to_original(values, place.box, place.size, place.size[::-1])))
    return torch.stack(placed)


def read_pictures(x: Any, preprocess: Callable[[Any], Tensor] | None) -> tuple[Tensor, list[Placement]]:
    """One picture or path, or a list of them -> batch (B, 3, H, W) and each picture's placement."""
    from vfm_core.images import read_image

    items = list(x) if isinstance(x, (list, tuple)) else [x]
    if not items or not all(isinstance(item, (Image.Image, str, Path)) for item in items):
        kinds = ", ".join(sorted({type(item).__name__ for item in items})) or "nothing"
        raise UserError("images must be a tensor (B, 3, H, W), pictures or paths", given=kinds)
    if preprocess is None:
        raise UserError("pictures need preprocessing", remedy="give preprocess= to Explainer, or a tensor (B, 3, H, W)")
    pictures = [item if isinstance(item, Image.Image) else read_image(item) for item in items]
    find_box = getattr(preprocess, "box", None)
    places = [Placement(p.size, find_box(p.size) if callable(find_box) else None) for p in pictures]
    return torch.stack([preprocess(picture) for picture in pictures]), places
