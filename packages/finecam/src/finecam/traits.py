"""Traits from Prompt-CAM attention: greedy head ranking and the analyses built on it (arXiv 2501.09333, section 2.3).

Each head of a class prompt looks at something; which of these looks carry the decision? Greedy blurring replaces one
head's attention by the uniform map at a time, keeps the replacement that hurts the class score least, and repeats. The
heads removed last are the class's traits in this image.

Only row c of the last layer changes in a trial, and there only what follows the attention. With the attended and the
uniform value of every head cached, each of the R(R + 1)/2 trials is the output projection and the MLP of one token
instead of a forward pass of the whole network; the scores are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from vfm_core.errors import UserError, unknown_name

from finecam.prompt_attention import PromptRows
from finecam.promptcam import PromptCAM

__all__ = [
    "Manipulation",
    "SharedTraits",
    "Traits",
    "every_class",
    "manipulate",
    "pruning_curve",
    "rank_traits",
    "shared_traits",
    "survival",
]

Uniform = Literal["tokens", "patches"]


@dataclass(frozen=True)
class Traits:
    """Heads of the target class ranked by greedy blurring, for a batch of B images and R heads.

    Attributes
    ----------
    target, prediction : Tensor
        (B,) int64.
    logits : Tensor
        (B, C).
    order : Tensor
        (B, R) heads in the order of their removal: the last one is the most important.
    scores : Tensor
        (B, R): s[target] after the first 1, 2, ..., R removals.
    heads : Tensor
        (B, top) the most important heads, most important first (the code's stopping rule).
    sufficient : Tensor
        (B,) number of heads left when the paper's rule stops, that is just before the image becomes misclassified;
        R for an image that is misclassified from the start.
    attention : Tensor
        (B, R, h, w) raw attention of the target's prompt.
    predicted_attention : Tensor
        (B, R, h, w) of the predicted class's prompt: for a misclassified image, show both side by side.
    """

    target: Tensor
    prediction: Tensor
    logits: Tensor
    order: Tensor
    scores: Tensor
    heads: Tensor
    sufficient: Tensor
    attention: Tensor
    predicted_attention: Tensor

    @property
    def correct(self) -> Tensor:
        """(B,) bool."""
        return self.target == self.prediction

    @property
    def ranking(self) -> Tensor:
        """(B, R) heads, most important first."""
        return self.order.flip(1)

    @property
    def maps(self) -> Tensor:
        """(B, top, h, w) raw attention of ``heads``."""
        return self.attention.take_along_dim(self.heads[:, :, None, None], dim=1)

    @property
    def peaks(self) -> Tensor:
        """(B, top) largest attention of each map: a flat head stays recognisable beside a sharp one."""
        return self.maps.amax(dim=(2, 3))

    def mean_map(self, stop: Literal["top", "misclassified"] = "top") -> Tensor:
        """Mean attention of the kept heads, (B, h, w): the pixel ranking that metrics use.

        Parameters
        ----------
        stop : {"top", "misclassified"}
            Keep the ``top`` heads, or as many as the paper's rule leaves.
        """
        if stop == "top":
            return self.maps.mean(dim=1)
        rank = torch.arange(self.order.shape[1], device=self.order.device)
        kept = (rank[None] < self.sufficient[:, None].clamp(min=1)).to(self.attention.dtype)
        ranked = self.attention.take_along_dim(self.ranking[:, :, None, None], dim=1)
        return (ranked * kept[:, :, None, None]).sum(dim=1) / kept.sum(dim=1)[:, None, None]


@torch.no_grad()
def rank_traits(
    model: PromptCAM, x: Tensor, target: Any = None, *, top: int = 4, uniform: Uniform = "tokens"
) -> Traits:
    """Rank the heads of the target class's prompt by greedy blurring.

    Parameters
    ----------
    model : PromptCAM
        Evaluated without drop-out; its mode is restored.
    x : Tensor or Tokens
        Preprocessed images (B, 3, H, W), or the model's ``frozen_tokens``.
    target : optional
        None: the prediction. One class id or name for all, a list of B, or an int64 tensor (B,).
    top : int
        Number of heads to keep, clamped to R.
    uniform : {"tokens", "patches"}
        A blurred head attends equally to all tokens (official code) or to all patches (paper).

    Returns
    -------
    Traits

    Raises
    ------
    UserError
        For an unknown option or class, a non-positive ``top``, or logits that are not finite.
    """
    if top < 1:
        raise UserError("number of traits must be positive", where="top", given=top, remedy="use 1 or more")
    if uniform not in ("tokens", "patches"):
        raise unknown_name("uniform map", uniform, ("tokens", "patches"))
    with model.evaluating():
        tokens, prompts = model.encode(x)
        rows = model.layer.rows(tokens, prompts, model.prompt_self_attention)
        logits = _finite(model.logits(rows))
        prediction = logits.argmax(dim=1)
        classes = _targets(model, target, prediction)
        order, scores = _greedy(model, rows, classes, uniform)
        shown = rows.attention(torch.stack([classes, prediction], dim=1))[..., rows.first_patch :]
    shown = shown.unflatten(-1, tokens.grid)
    rival = _rival(logits, classes)
    wrong = scores <= rival[:, None]
    removable = torch.where(wrong.any(dim=1), wrong.int().argmax(dim=1), scores.shape[1])
    correct = classes == prediction
    return Traits(
        target=classes,
        prediction=prediction,
        logits=logits,
        order=order,
        scores=scores,
        heads=order.flip(1)[:, : min(top, order.shape[1])],
        sufficient=torch.where(correct, order.shape[1] - removable, order.shape[1]),
        attention=shown[:, :, 0],
        predicted_attention=shown[:, :, 1],
    )


def _greedy(model: PromptCAM, rows: PromptRows, classes: Tensor, uniform: str) -> tuple[Tensor, Tensor]:
    attended = rows.heads(classes[:, None])[:, :, 0]  # (B, R, d)
    flat = rows.uniform_heads(uniform)
    batch, heads = attended.shape[:2]
    image = torch.arange(batch, device=classes.device)
    blurred = torch.zeros(batch, heads, dtype=torch.bool, device=classes.device)
    order, scores = [], []
    for step in range(heads):
        left = (~blurred).nonzero()[:, 1].view(batch, heads - step)
        trial = blurred[:, None] | torch.nn.functional.one_hot(left, heads).bool()  # (B, R - step, R)
        mixed = torch.where(trial[..., None], flat[:, None], attended[:, None]).flatten(0, 1)
        who = image.repeat_interleave(heads - step)
        score = model.score(rows.finish(who, classes[who], mixed)).view(batch, heads - step)
        best = score.argmax(dim=1, keepdim=True)
        order.append(left.gather(1, best)[:, 0])
        scores.append(score.gather(1, best)[:, 0])
        blurred[image, order[-1]] = True
    return torch.stack(order, dim=1), torch.stack(scores, dim=1)


def _finite(logits: Tensor) -> Tensor:
    if not torch.isfinite(logits).all():
        bad = (~torch.isfinite(logits)).any(dim=1).nonzero()[:, 0].tolist()
        raise UserError("logits are not finite", where=f"images {bad} of the batch", remedy="run in float32")
    return logits


def _targets(model: PromptCAM, target: Any, prediction: Tensor) -> Tensor:
    if target is None:
        return prediction
    ids = model.class_ids(target).to(prediction.device)
    if ids.ndim > 1 or ids.numel() not in (1, prediction.numel()):
        raise UserError(
            "target does not fit the batch",
            where="target",
            given=tuple(ids.shape),
            remedy=f"give one class or {prediction.numel()}",
        )
    return ids.reshape(-1).expand(prediction.numel()).clone()


def _rival(logits: Tensor, classes: Tensor) -> Tensor:
    """Best score of any other class, (B,)."""
    return logits.scatter(1, classes[:, None], float("-inf")).amax(dim=1)


def pruning_curve(traits: Traits) -> dict[str, np.ndarray]:
    """How the decision survives while heads are blurred, averaged over the correctly classified images.

    Parameters
    ----------
    traits : Traits

    Returns
    -------
    dict of ndarray
        ``heads_left`` (R + 1,) from R to 0, ``accuracy`` and ``probability`` (R + 1,) of the target with that many
        heads left, ``n`` () images averaged. NaN when no image is correct.
    """
    right = traits.correct
    curves = survival(traits)
    return {
        "heads_left": np.arange(curves["score"].shape[1])[::-1].copy(),
        "accuracy": curves["correct"][right].double().mean(dim=0).cpu().numpy(),
        "probability": curves["probability"][right].mean(dim=0).cpu().numpy(),
        "n": np.asarray(int(right.sum())),
    }


def survival(traits: Traits) -> dict[str, Tensor]:
    """The target's fate in every image while heads are blurred, from all R heads to none.

    Returns
    -------
    dict of Tensor
        (B, R + 1) each: ``score`` s[target], ``probability`` of the target, ``correct`` (bool) where it still beats
        every other class.
    """
    full = traits.logits.gather(1, traits.target[:, None])
    scores = torch.cat([full, traits.scores], dim=1).double()
    others = traits.logits.scatter(1, traits.target[:, None], float("-inf")).double()
    return {
        "score": scores,
        "probability": torch.sigmoid(scores - others.logsumexp(dim=1, keepdim=True)),
        "correct": scores > others.amax(dim=1, keepdim=True),
    }


@dataclass(frozen=True)
class SharedTraits:
    """How alike two classes' prompts look at the same images, head by head.

    Attributes
    ----------
    cosine, iou : Tensor
        (B, R), in [0, 1]: cosine of the maps, and overlap of their strongest patches.
    first, second : Tensor
        (B, R, h, w) raw attention of the two prompts.
    """

    cosine: Tensor
    iou: Tensor
    first: Tensor
    second: Tensor


def shared_traits(
    model: PromptCAM, x: Tensor, first: int | str, second: int | str, *, strongest: float = 0.1
) -> SharedTraits:
    """Compare the prompts of two classes on the same images (one class's image, the other class's prompt).

    Parameters
    ----------
    model : PromptCAM
    x : Tensor
        (B, 3, H, W).
    first, second : int or str
        Two different classes.
    strongest : float
        Fraction of the patches, in (0, 1], that the overlap looks at; at least one patch.

    Returns
    -------
    SharedTraits

    Raises
    ------
    UserError
        For equal or unknown classes, or a fraction out of range.
    """
    ids = model.class_ids([first, second])
    if ids[0] == ids[1]:
        raise UserError("need two different classes", where="first, second", given=first, remedy="name another class")
    if not 0 < strongest <= 1:
        raise UserError("fraction of patches out of range", where="strongest", given=strongest, remedy="use 0 < q <= 1")
    maps = model.maps(x, ids)
    a, b = maps[:, 0].flatten(2), maps[:, 1].flatten(2)
    count = math.ceil(strongest * a.shape[-1])
    top = [
        torch.zeros_like(m, dtype=torch.bool).scatter(2, m.topk(count, dim=2).indices, torch.ones_like(m).bool())
        for m in (a, b)
    ]
    iou = (top[0] & top[1]).sum(dim=2) / (top[0] | top[1]).sum(dim=2)
    return SharedTraits(torch.cosine_similarity(a, b, dim=2), iou, maps[:, 0], maps[:, 1])


def every_class(model: PromptCAM, x: Tensor, classes: Sequence[int | str] | None = None) -> Tensor:
    """Show the same image to every class: mean-head attention (B, C, h, w), or of the given ``classes`` only."""
    wanted = list(range(model.num_classes)) if classes is None else list(classes)
    return model.maps(x, wanted).mean(dim=2)


@dataclass(frozen=True)
class Manipulation:
    """What an edit of the image did to the decision and to the target prompt's attention.

    Attributes
    ----------
    target, before, after : Tensor
        (B,) the class watched and the predictions before and after the edit.
    score_change : Tensor
        (B, C): s(after) - s(before).
    attention_before, attention_after : Tensor
        (B, R, h, w) raw attention of the target's prompt.
    """

    target: Tensor
    before: Tensor
    after: Tensor
    score_change: Tensor
    attention_before: Tensor
    attention_after: Tensor

    @property
    def flipped(self) -> Tensor:
        """(B,) bool: the prediction changed."""
        return self.before != self.after


@torch.no_grad()
def manipulate(model: PromptCAM, before: Tensor, after: Tensor, target: Any = None) -> Manipulation:
    """Trait manipulation: classify images and their edited versions, and look at both.

    Parameters
    ----------
    model : PromptCAM
    before, after : Tensor
        (B, 3, H, W) images and their edited versions, in the same order.
    target : optional
        Class whose prompt is watched, as in :func:`rank_traits`; default the prediction before the edit.

    Returns
    -------
    Manipulation

    Raises
    ------
    UserError
        When the two batches differ in shape or logits are not finite.
    """
    if before.shape != after.shape:
        raise UserError(
            "images before and after the edit differ in shape",
            given=f"{tuple(before.shape)} and {tuple(after.shape)}",
            remedy="give the edited images in the same order and size",
        )
    with model.evaluating():
        both = _finite(model(torch.cat([before, after])))
        old, new = both.chunk(2)
        classes = _targets(model, target, old.argmax(dim=1))
        maps = [model.maps(x, classes[:, None])[:, 0] for x in (before, after)]
    return Manipulation(classes, old.argmax(dim=1), new.argmax(dim=1), new - old, maps[0], maps[1])
