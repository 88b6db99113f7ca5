"""Cost of greedy trait ranking: cached one-token trials against one forward pass per trial (arXiv 2501.09333, 2.3)."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from finecam.promptcam import PromptCAM
from finecam.traits import Uniform, rank_traits

__all__ = ["bench_greedy"]


@torch.no_grad()
def bench_greedy(model: PromptCAM, x: Tensor, *, repeats: int = 3, uniform: Uniform = "tokens") -> dict[str, Any]:
    """Time greedy ranking against one full forward pass per trial, as the official code does it.

    Parameters
    ----------
    model : PromptCAM
    x : Tensor
        (B, 3, H, W).
    repeats : int
        Paired runs; the median ratio is reported. Both sides are warmed up once.
    uniform : {"tokens", "patches"}

    Returns
    -------
    dict
        ``ours_s``, ``forwards_s`` (medians, seconds per batch), ``ratio`` (median of the paired ratios), ``trials``
        (R(R + 1)/2), ``images`` and ``same_order`` (whether both give the same ranking).
    """
    with model.evaluating():
        prediction = model(x).argmax(dim=1)
        ours: list[float] = []
        theirs: list[float] = []
        rank_traits(model, x, prediction, uniform=uniform)
        for _ in range(repeats):
            begin = time.perf_counter()
            fast = rank_traits(model, x, prediction, uniform=uniform).order
            _wait(x)
            middle = time.perf_counter()
            slow = _one_forward_per_trial(model, x, prediction, uniform)
            _wait(x)
            ours.append(middle - begin)
            theirs.append(time.perf_counter() - middle)
    return {
        "ours_s": statistics.median(ours),
        "forwards_s": statistics.median(theirs),
        "ratio": statistics.median(b / a for a, b in zip(ours, theirs)),
        "trials": fast.shape[1] * (fast.shape[1] + 1) // 2,
        "images": len(x),
        "same_order": bool((fast == slow).all()),
    }


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _one_forward_per_trial(model: PromptCAM, x: Tensor, classes: Tensor, uniform: str) -> Tensor:
    """The order of removal (B, R), found the slow way; with our fast last layer already, which flatters it."""
    image, heads = torch.arange(len(x), device=x.device), model.backbone.num_heads
    blurred = torch.zeros(len(x), heads, dtype=torch.bool, device=x.device)
    order = []
    for step in range(heads):
        left = (~blurred).nonzero()[:, 1].view(len(x), heads - step)
        trials = []
        for head in left.unbind(dim=1):
            rows = model.rows(x)
            logits = model.logits(rows)
            attended, flat = rows.heads(classes[:, None])[:, :, 0], rows.uniform_heads(uniform)
            trial = blurred.clone()
            trial[image, head] = True
            mixed = torch.where(trial[..., None], flat, attended)
            logits[image, classes] = model.score(rows.finish(image, classes, mixed))
            trials.append(logits.softmax(dim=1)[image, classes])
        order.append(left[image, torch.stack(trials, dim=1).argmax(dim=1)])
        blurred[image, order[-1]] = True
    return torch.stack(order, dim=1)
