"""Arms of a comparison: one explainer setting each, and the named sets that the Finer-CAM paper compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from vfm_core.errors import unknown_name

from finecam.classifiers import Classifier
from finecam.explainer import Explainer
from finecam.families import FAMILIES
from finecam.references import cosine_table, similar_classes

__all__ = [
    "ABLATIONS", "Arm", "ArmMaps", "aggregation_arms", "arms_of", "reference_arms", "similarity_arms", "strength_arms",
]  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to explain: the arguments of `finecam.Explainer` that a comparison varies.

    Attributes
    ----------
    method : str
        CAM family.
    gamma : float
        Strength of the contrast; 0 is the plain method.
    references : int
        Number T of similar classes.
    rank : int, optional
        Only the class of this similarity rank (1 = the most similar) instead of the first T.
    similarity, weighting, aggregate : str
        See `finecam.Explainer`.
    """

    method: str = "gradcam"
    gamma: float = 0.6
    references: int = 3
    rank: int | None = None
    similarity: str = "logit"
    weighting: str = "mean"
    aggregate: str = "before_relu_mean"

    @property
    def plain(self) -> bool:
        """Whether no reference enters."""
        return self.gamma == 0

    @property
    def base(self) -> Arm:
        """The plain arm of the same method."""
        return Arm(method=self.method, gamma=0.0)

    @property
    def name(self) -> str:
        """A label that names what differs from the paper's default (T = 3 nearest logits, mean weights)."""
        if self.plain:
            return self.method
        parts = []
        if self.rank is not None:
            parts.append(f"only look-alike {self.rank}")
        elif self.references != 3:
            parts.append(f"T={self.references}")
        parts += [f"by {self.similarity}"] if self.similarity != "logit" else []
        parts += [f"{self.weighting} weights"] if self.weighting != "mean" else []
        parts += [self.aggregate.replace("_", " ")] if self.aggregate != "before_relu_mean" else []
        return f"{self.method} + Finer {self.gamma:g}" + (f" ({', '.join(parts)})" if parts else "")


def arms_of(methods: Iterable[str], gammas: Iterable[float], **settings: object) -> list[Arm]:
    """Every method at every strength; 0 gives the plain method.

    Examples
    --------
    >>> [arm.name for arm in arms_of(["gradcam"], [0, 0.6])]
    ['gradcam', 'gradcam + Finer 0.6']
    """
    found = [Arm(method=m, gamma=float(g), **settings) for m in methods for g in gammas]  # type: ignore[arg-type]
    return list(dict.fromkeys(arm.base if arm.plain else arm for arm in found))


def strength_arms(method: str = "gradcam", gammas: Sequence[float] = (0, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0)) -> list[Arm]:
    """Strength of the contrast (Finer-CAM, Fig. 6b and 13)."""
    return arms_of([method], gammas)


def reference_arms(method: str = "gradcam", gamma: float = 0.6) -> list[Arm]:
    """None, one similar class, or the first three together (Finer-CAM, Tab. 2: 2nd, 3rd, 4th prediction)."""
    one = [Arm(method, gamma, references=1, rank=rank, similarity="rank") for rank in (1, 2, 3)]
    return [Arm(method, 0.0), *one, Arm(method, gamma, similarity="rank")]


def aggregation_arms(method: str = "gradcam", gamma: float = 0.6) -> list[Arm]:
    """Where several references are joined (Finer-CAM, Tab. 7), and the subtraction of maps (Fig. 9b)."""
    rules = ("before_relu_mean", "before_relu_max", "after_relu_mean", "map_subtraction")
    return [Arm(method, 0.0), *(Arm(method, gamma, aggregate=rule) for rule in rules)]


def similarity_arms(method: str = "gradcam", gamma: float = 0.6) -> list[Arm]:
    """How the similar classes are chosen, and how the official code weights them."""
    base = Arm(method, gamma)
    return [
        base.base,
        base,
        replace(base, similarity="rank"),
        replace(base, similarity="weight"),
        replace(base, references=1, gamma=1.0),
        replace(base, weighting="softmax", gamma=1.0),
    ]


ABLATIONS: dict[str, Callable[[str], list[Arm]]] = {
    "references": reference_arms,
    "aggregation": aggregation_arms,
    "similarity": similarity_arms,
    "strength": strength_arms,
}
"""Name -> function from a method to its arms."""


class ArmMaps:
    """Maps of several arms; those that differ only in strength share one forward and one backward pass.

    Parameters
    ----------
    classifier
        What is explained.
    arms
        In any order; an arm that comes twice is explained once.
    layer
        Layer to read; the classifier's own otherwise.
    batch_size
        Images per forward pass.
    """

    def __init__(
        self, classifier: Classifier, arms: Iterable[Arm], layer: str | None = None, batch_size: int = 32
    ) -> None:
        self.classifier, self.layer, self.batch_size = classifier, layer or classifier.layer, batch_size
        self.directions = classifier.weights()
        self.cosines = None if self.directions is None else cosine_table(self.directions)
        self.groups: dict[Arm, list[Arm]] = {}
        for arm in dict.fromkeys(arms):
            self.groups.setdefault(replace(arm, gamma=1.0) if not arm.plain else arm, []).append(arm)
        self._explainers: dict[str, Explainer] = {}

    def explain(self, shared: Arm, x: Tensor, target: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, arms, H, W) of one of the groups, and the references (B, T) they were built against (T may be 0).

        Parameters
        ----------
        shared
            Key of `groups`, or any other arm.
        x, target, logits
            (B, 3, H, W), (B,) and (B, C).
        """
        references: int | Tensor | None = None if shared.plain else shared.references
        if shared.rank is not None:
            every = similar_classes(shared.similarity, logits, target, shared.rank, self.cosines)
            references = every[:, shared.rank - 1 : shared.rank]
        gammas = [arm.gamma for arm in self.groups.get(shared, [shared])]
        sweep = self._explainer(shared.method).sweep(
            x, gammas, target, references, shared.similarity, shared.weighting,
            shared.aggregate, ablation=shared.aggregate == "map_subtraction",
        )  # fmt: skip
        return sweep.maps, sweep.references

    def grid(self) -> tuple[int, int]:
        """The coarsest feature grid (h, w) among the methods."""
        x = torch.rand((1, 3, *self.classifier.preprocess.size), generator=torch.Generator().manual_seed(0))
        grids = []
        # The grid is the layer's, so one forward pass tells it for all methods but those that read attention.
        for method in {m if FAMILIES[m].kind == "attention" else "eigencam" for m in self._methods()}:
            maps = self._explainer(method)(x, 0, None, size=None).maps
            grids.append((maps.shape[-2], maps.shape[-1]))
        return min(grids, key=lambda grid: grid[0] * grid[1])

    def _methods(self) -> set[str]:
        for arm in self.groups:
            if arm.method not in FAMILIES:
                raise unknown_name("method", arm.method, FAMILIES, where="method")
        return {arm.method for arm in self.groups}

    def _explainer(self, method: str) -> Explainer:
        if method not in self._explainers:
            self._explainers[method] = Explainer(
                self.classifier.model, self.layer, method, self.classifier.reshape, self.classifier.class_names,
                batch_size=self.batch_size, class_weights=self.directions,
            )  # fmt: skip
        return self._explainers[method]
