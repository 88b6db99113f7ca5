"""Toy worlds in the plane (A10, after FTC, arXiv 2409.16223): why features of classes never shown get better.

Four classes of points in 2-D, drawn as squares (pre-training domain) and circles (target domain). The target differs
from the source by a shift that all classes share. A two-layer network with a linear 4-way head is pre-trained on all
squares and fine-tuned on the circles of two classes. Two worlds:

- ``shared-shift``: the classes lie at the corners of a square; the two absent ones lie apart from the seen ones;
- ``resembling``: each absent class lies right beside a seen one, so absent data resemble the fine-tuning data.

Exact placements are ours (the paper shows pictures). Everything is deterministic for a seed and takes about a second;
what came out is in ``ToyResult.rows``, measured and not assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from vfm_core.errors import unknown_name

Floats = NDArray[np.float64]

CENTRES = {
    "shared-shift": ((-1.0, 1.0), (1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)),
    "resembling": ((-1.0, 0.5), (1.0, 0.5), (-1.0, -0.3), (1.0, -0.3)),
}
WORLDS = tuple(CENTRES)
SEEN, ABSENT = (0, 1), (2, 3)
SHIFT = (1.0, 0.0)  # of the target domain, the same for all classes: left ones land on the old border to right ones
SPREAD = {"shared-shift": 0.3, "resembling": 0.2}


class ToyNet(nn.Module):
    """Two layers to 2-D features, and a linear head of four classes."""

    def __init__(self, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        # Not initialised here: the usual initialisation would draw from the global generator.
        self.layer1, self.layer2, self.head = (
            nn.utils.skip_init(nn.Linear, *sizes) for sizes in ((2, width), (width, 2), (2, 4))
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.layer1, self.layer2, self.head):
                bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.zero_()

    def features(self, x: Tensor) -> Tensor:
        """(N, 2) points to (N, 2) features."""
        return self.layer2(F.relu(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2) points to (N, 4) logits."""
        return self.head(self.features(x))


@dataclass(frozen=True, eq=False)
class ToyResult:
    """One toy world before and after fine-tuning.

    Attributes
    ----------
    world
        Name, of `WORLDS`.
    source, target : (N, 2)
        Points of the two domains; ``labels`` (N,) in 0..3 are of both. Classes `SEEN` were fine-tuned.
    features_before, features_after : (N, 2)
        Features of the target points.
    source_features : (N, 2)
        Features of the source points before fine-tuning.
    rows
        Accuracies before and after on the target points: ``Y/Y, S/Y, U/Y, U/U`` of the head, ``NCM U/Y, NCM U/U`` of
        the class means of the same points (each sample's own share in its mean, 1 %, is left in).
    """

    world: str
    source: Floats
    target: Floats
    labels: NDArray[np.int64]
    source_features: Floats
    features_before: Floats
    features_after: Floats
    rows: list[dict[str, Any]]


def toy_points(world: str, n: int = 100, seed: int = 0) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Source points, target points (N, 2) and labels (N,), ``n`` of each class.

    Raises
    ------
    UserError
        Unknown world.
    """
    if world not in CENTRES:
        raise unknown_name("toy world", world, WORLDS)
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), n)
    centres = np.asarray(CENTRES[world])[labels]
    source = centres + SPREAD[world] * rng.standard_normal((4 * n, 2))
    target = centres + np.asarray(SHIFT) + SPREAD[world] * rng.standard_normal((4 * n, 2))
    return source, target, labels.astype(np.int64)


def run_toy(world: str = "shared-shift", n: int = 100, seed: int = 0, steps: int = 400) -> ToyResult:
    """Pre-train on the source points of all classes, fine-tune on the target points of two, look at the features.

    Parameters
    ----------
    world
        ``"shared-shift"`` or ``"resembling"``.
    n
        Points of each class and domain.
    seed
        Of the points and the weights.
    steps
        Full-batch SGD steps of pre-training, and of fine-tuning.

    Raises
    ------
    UserError
        Unknown world.
    """
    source, target, labels = toy_points(world, n, seed)
    xs, xt, y = (torch.as_tensor(v, dtype=torch.float32) for v in (source, target, labels))
    y = y.long()
    net = ToyNet(seed=seed)
    _train(net, xs, y, steps, lr=0.1)
    with torch.inference_mode():
        source_features, before, logits_before = net.features(xs), net.features(xt), net(xt)
    seen = y < len(SEEN)
    _train(net, xt[seen], y[seen], steps, lr=0.05)
    with torch.inference_mode():
        after, logits_after = net.features(xt), net(xt)
    rows = [
        {"model": name, **_accuracies(z.double().numpy(), f.double().numpy(), labels)}
        for name, z, f in (("before", logits_before, before), ("after", logits_after, after))
    ]
    fs, fb, fa = (v.double().numpy() for v in (source_features, before, after))
    return ToyResult(world, source, target, labels, fs, fb, fa, rows)


def run_toys(seed: int = 0) -> list[ToyResult]:
    """Both worlds."""
    return [run_toy(world, seed=seed) for world in WORLDS]


def _train(net: ToyNet, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def _accuracies(logits: Floats, features: Floats, labels: NDArray[np.int64]) -> dict[str, float]:
    of_u = np.isin(labels, ABSENT)
    absent = np.asarray(ABSENT)
    # Plane distances: the features have two dimensions, so their directions alone would throw half of them away.
    means = np.stack([features[labels == c].mean(0) for c in range(4)])
    ncm = -np.linalg.norm(features[:, None] - means, axis=2)

    def among(scores: Floats, rows: NDArray[np.bool_], columns: NDArray[Any]) -> float:
        return float((columns[scores[rows][:, columns].argmax(1)] == labels[rows]).mean())

    everything = np.arange(4)
    return {
        "Y/Y": among(logits, of_u | ~of_u, everything),
        "S/Y": among(logits, ~of_u, everything),
        "U/Y": among(logits, of_u, everything),
        "U/U": among(logits, of_u, absent),
        "NCM U/Y": among(ncm, of_u, everything),
        "NCM U/U": among(ncm, of_u, absent),
    }
