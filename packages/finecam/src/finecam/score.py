"""Channel weights that come from forward passes or second derivatives: Score-CAM, Ablation-CAM, Shapley-CAM.

Score-CAM with Finer-CAM's contrast (arXiv 2501.11309, eq. 9): with H_k the channel A_k, upsampled and scaled to [0, 1],

    alpha_k = f(x * H_k)^c - gamma f(x * H_k)^d - f(x_b)^c

where x_b is the zero input. The usual implementation has no x_b and applies a softmax over the channels to the scores;
with the softmax any constant cancels. That is the default here, ``softmax_channels=False`` is the literal formula.
One pass over the channels serves any number of strengths gamma.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vfm_core.errors import UserError

from finecam.capture import Capture
from finecam.families import Family
from finecam.layers import Site, first_tensor, logits_of
from finecam.layouts import TokenLayout
from finecam.question import Question
from finecam.references import Contrast, one_hot

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """How the channels are weighed: batch size, Score-CAM's choices, a generator for random weights, progress."""

    batch_size: int = 16
    softmax_channels: bool = True
    max_channels: int | None = None
    generator: torch.Generator | None = None
    progress: Progress | None = None


def kernels(family: Family) -> AbstractContextManager[None]:
    """Context for second derivatives, which fused attention kernels lack."""
    if family.kind != "second":
        return nullcontext()
    return torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH])


def channel_weights(
    family: Family,
    x: Tensor,
    capture: Capture,
    logits: Tensor,
    contrast: Contrast,
    question: Question,
    options: Options,
) -> list[Tensor]:
    """Weights (gammas, B, K) per layer of the methods that weigh whole channels.

    Parameters
    ----------
    family
        ``scorecam``, ``ablationcam``, ``shapleycam`` or ``randomcam``.
    x, capture, logits
        Input (B, 3, H, W), its forward, and the logits with their graph.
    contrast, question
        What is asked.
    options
        How.
    """
    model, gammas, weighting = capture.model, question.gammas, question.weighting
    if family.name == "randomcam":
        draws = [torch.rand(a.shape[:2], generator=options.generator).to(a.device) * 2 - 1 for a in capture.maps]
        return [w.expand(len(gammas), -1, -1) for w in draws]
    if family.name == "shapleycam":
        return shapley_weights(capture, logits, contrast, gammas, weighting)
    if family.name == "ablationcam":
        kinds = [layout.kind if isinstance(layout, TokenLayout) else None for layout in capture.layouts]
        if None in kinds:
            raise UserError("ablationcam needs to know where the channels are", remedy="use reshape='auto'")
        with torch.no_grad():
            return [
                ablation_weights(model, site, x, str(kind), contrast, gammas, weighting, options)
                for site, kind in zip(capture.sites, kinds)
            ]
    importance: list[Any] = [None] * len(capture.maps)
    if options.max_channels is not None:
        plain = one_hot(contrast.target, logits.shape[1])[None]
        importance = [grads[0].float().abs().mean((2, 3)) for grads in capture.vjp(logits, plain)]
    with torch.no_grad():
        return [
            score_weights(model, x, a.float(), contrast, gammas, weighting, options, weight)
            for a, weight in zip(capture.maps, importance)
        ]


def score_weights(
    model: nn.Module,
    x: Tensor,
    a: Tensor,
    contrast: Contrast,
    gammas: Sequence[float],
    weighting: str,
    options: Options,
    importance: Tensor | None = None,
) -> Tensor:
    """Score-CAM channel weights.

    Parameters
    ----------
    model
        Classifier, already in eval mode.
    x
        (B, 3, H, W) input.
    a
        (B, K, h, w) activations.
    contrast, gammas, weighting
        The question; `weighting` ``"softmax"`` takes each masked image's own probabilities.
    options
        ``batch_size`` masked images per forward pass (images and channels are batched together);
        ``softmax_channels``: softmax over the channels, or the paper's formula with its baseline; ``max_channels``:
        only that many channels of each image are scored, the others weigh nothing.
    importance
        (B, K), which channels come first under ``max_channels``.

    Returns
    -------
    Tensor
        (len(gammas), B, K).
    """
    wanted = a.flatten(2).any(2)  # a channel that is zero everywhere adds nothing to the map
    if options.max_channels is not None and importance is not None:
        order = torch.where(wanted, importance, -1.0).sort(dim=1, descending=True, stable=True)[1][
            :, : options.max_channels
        ]
        wanted &= torch.zeros_like(wanted).scatter_(1, order, True)
    images, channels = wanted.nonzero(as_tuple=True)
    scores = torch.full((len(gammas), *wanted.shape), -torch.inf, device=a.device)
    for start in range(0, len(images), options.batch_size):
        i, k = images[start : start + options.batch_size], channels[start : start + options.batch_size]
        # Corner-aligned upsampling is what the reference implementation of Score-CAM does.
        masks = nn.functional.interpolate(a[i, k][:, None].float(), x.shape[-2:], mode="bilinear", align_corners=True)
        low = masks.amin((2, 3), keepdim=True)
        masks = (masks - low) / (masks.amax((2, 3), keepdim=True) - low + 1e-8)
        logits = logits_of(model(x[i] * masks.to(x.dtype))).float()
        for g, gamma in enumerate(gammas):
            scores[g, i, k] = contrast[i].objective(logits, gamma, weighting)
        if options.progress is not None:
            options.progress(start + len(i), len(images))
    if options.softmax_channels:
        return scores.softmax(2).nan_to_num(0.0)  # an image without any active channel
    baseline = logits_of(model(torch.zeros_like(x[:1]))).float()[0, contrast.target]
    return torch.where(wanted, scores - baseline[:, None], 0.0)


def ablation_weights(
    model: nn.Module,
    site: Site,
    x: Tensor,
    kind: str,
    contrast: Contrast,
    gammas: Sequence[float],
    weighting: str,
    options: Options,
) -> Tensor:
    """Ablation-CAM channel weights ``(J(full) - J(A_k := min A)) / |J(full)|``, re-running only the tail.

    The magnitude in the denominator keeps a negative J(full), usual for a contrast, from turning the map inside out.

    Parameters
    ----------
    model, site, x
        Classifier in eval mode, layer, input (B, 3, H, W).
    kind
        Memory layout of the layer's output (`TokenLayout.kind`).
    contrast, gammas, weighting
        The question.
    options
        ``batch_size`` channels per run of the tail.

    Returns
    -------
    Tensor
        (len(gammas), B, K).
    """
    weights = []
    for image in range(len(x)):
        replay = TailReplay(model, site, x[image : image + 1])
        full = replay.activation
        dim = {"nchw": 1, "nhwc": 3, "bnd": 2, "nbd": 2}[kind]
        batch_dim = 1 if kind == "nbd" else 0
        low, count = full.amin(), full.shape[dim]
        question = contrast[image : image + 1]
        whole = torch.stack([question.objective(replay.logits, gamma, weighting) for gamma in gammas])
        ablated = []
        for start in range(0, count, options.batch_size):
            k = torch.arange(start, min(start + options.batch_size, count), device=x.device)
            n = len(k)
            changed = full.repeat_interleave(n, batch_dim).movedim((batch_dim, dim), (0, 1))
            changed[torch.arange(n, device=x.device), k] = low
            logits = replay(changed.movedim((0, 1), (batch_dim, dim)), n)
            many = Contrast(
                *(t.expand(n, *t.shape[1:]) for t in (question.target, question.references, question.weights))
            )
            ablated.append(torch.stack([many.objective(logits, gamma, weighting) for gamma in gammas]))
            if options.progress is not None:
                options.progress(image * count + start + n, len(x) * count)
        drop = whole - torch.cat(ablated, 1)
        weights.append(drop / whole.abs().clamp(min=torch.finfo(drop.dtype).tiny))
    return torch.stack(weights, 1)


class TailReplay:
    """Run only what lies above a layer, again and again, on changed activations of one image.

    Every largest module that finished before the layer did is made to return what it returned the first time, so a
    further forward of the model consists of the glue between modules and of the tail. Where that does not reproduce
    the logits (a model that computes outside of modules, in place), the whole model runs with the layer's output
    exchanged.

    Parameters
    ----------
    model
        Classifier in eval mode.
    site
        The layer.
    x
        (1, 3, H, W).

    Attributes
    ----------
    activation : Tensor
        The layer's output.
    logits : Tensor
        (1, C), float32.
    skips_trunk : bool
        False if the whole model has to run.
    """

    def __init__(self, model: nn.Module, site: Site, x: Tensor) -> None:
        self.model, self.site, self.x = model, site, x
        self._records: list[tuple[nn.Module, Any]] = []
        self._record()
        self.skips_trunk = True
        try:
            again = self(_expand(self.activation, 2), 2)  # of two, because in-place glue fails on repeated views
            scale = float(self.logits.abs().max())
            self.skips_trunk = torch.allclose(again, self.logits.expand_as(again), rtol=1e-4, atol=1e-5 * scale)
        except (RuntimeError, TypeError, ValueError):
            self.skips_trunk = False

    def __call__(self, activation: Tensor, n: int) -> Tensor:
        """Logits (n, C) for n changed copies of the layer's output."""
        with self._patched(activation, n):
            return logits_of(self.model(self.x.expand(n, *self.x.shape[1:]))).float()

    def _record(self) -> None:
        starts: list[int] = []
        calls = 0
        done = False

        def before(module: nn.Module, args: Any) -> None:
            starts.append(len(self._records))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal calls, done
            start = starts.pop()
            if done:
                return
            del self._records[start:]  # what ran inside this module need not be known
            self._records.append((module, output))
            if module is self.site.module:
                if calls == (self.site.call or 0):
                    done = True
                    found = first_tensor(output)[0]
                    if found is None:
                        raise UserError("layer does not return a tensor", where=self.site.label)
                    self.activation = found.clone()
                calls += 1

        handles = [m.register_forward_pre_hook(before) for m in self.model.modules()]
        handles += [m.register_forward_hook(after) for m in self.model.modules()]
        try:
            self.logits = logits_of(self.model(self.x)).float()
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _patched(self, activation: Tensor, n: int) -> Iterator[None]:
        records = self._records if self.skips_trunk else []
        queues: dict[nn.Module, deque[Any]] = {}
        for module, output in records[:-1]:
            queues.setdefault(module, deque()).append(_expand(output, n))
        if self.skips_trunk:
            queues.setdefault(self.site.module, deque()).append(first_tensor(records[-1][1])[1](activation.clone()))
        handle = None
        if not self.skips_trunk:
            calls = iter(range(10**9))

            def exchange(module: nn.Module, args: Any, output: Any) -> Any:
                return first_tensor(output)[1](activation.clone()) if next(calls) == (self.site.call or 0) else None

            handle = self.site.module.register_forward_hook(exchange)
        own = {module: module.__dict__.get("forward") for module in queues}
        for module, queue in queues.items():
            module.forward = _answering(module.forward, queue)
        try:
            yield
        finally:
            for module, forward in own.items():
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward
            if handle is not None:
                handle.remove()


def _answering(forward: Callable[..., Any], queue: deque[Any]) -> Callable[..., Any]:
    """Answer from the queue while it lasts, then compute again."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        return queue.popleft() if queue else forward(*args, **kwargs)

    return answer


def _expand(output: Any, n: int) -> Any:
    """Repeat the one image of a recorded output n times, as a view; what has no batch axis is left alone."""
    if isinstance(output, Tensor):
        if output.ndim >= 2 and output.shape[0] == 1:
            return output.expand(n, *output.shape[1:])
        if output.ndim == 3 and output.shape[1] == 1:
            return output.expand(-1, n, -1)
        return output
    if type(output) in (tuple, list):
        return type(output)(_expand(item, n) for item in output)
    if isinstance(output, dict):
        copy = output.copy()
        for key, item in output.items():
            copy[key] = _expand(item, n)
        return copy
    return output


def shapley_weights(
    capture: Capture, logits: Tensor, contrast: Contrast, gammas: Sequence[float], weighting: str
) -> list[Tensor]:
    """Shapley-CAM (arXiv 2501.06261) weights ``mean_ij (G - H A / 2)``, H = Hessian of J; per site (gammas, B, K)."""
    per_site: list[list[Tensor]] = [[] for _ in capture.sites]
    for gamma in gammas:
        j = contrast.objective(logits.float(), gamma, weighting).sum()
        grads = torch.autograd.grad(j, capture.outputs, create_graph=True, retain_graph=True)
        for i, (grad, a) in enumerate(zip(grads, capture.outputs)):
            product = None
            if grad.requires_grad:  # a linear tail has no second derivative
                product = torch.autograd.grad(grad, a, a.detach(), retain_graph=True, allow_unused=True)[0]
            weight = grad.detach() if product is None else grad.detach() - 0.5 * product
            per_site[i].append(capture.to_map(i, weight).float().mean((2, 3)))
    return [torch.stack(weights) for weights in per_site]


__all__ = ["Options", "TailReplay", "channel_weights", "kernels"]
