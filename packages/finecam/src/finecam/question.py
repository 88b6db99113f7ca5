"""What one call asks, before any logits are known, and how it becomes a contrast once they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vfm_core.errors import UserError, unknown_name

from finecam import references as rules
from finecam.families import Family
from finecam.references import Contrast, Names


@dataclass(frozen=True)
class Question:
    """Target, references and strengths of a call, checked as far as possible without logits.

    Attributes
    ----------
    target
        None (predicted class) or class ids, () or (B,).
    references
        Number T of similar classes, class ids (T,) or (B, T), or None for the plain map.
    similarity, weighting, aggregate
        Names of the rules.
    gammas
        Strengths.
    class_names
        For messages.
    """

    target: Tensor | None
    references: int | Tensor | None
    similarity: str
    weighting: str
    aggregate: str
    gammas: tuple[float, ...]
    class_names: Names = None

    @property
    def rule(self) -> str:
        """How the references came about: the name of the similarity, "explicit", or "none"."""
        return {int: self.similarity, type(None): "none"}.get(type(self.references), "explicit")

    def of(self, images: slice) -> Question:
        """The same question for some images of the batch."""
        target, refs = self.target, self.references
        target = target[images] if target is not None and target.ndim else target
        refs = refs[images] if isinstance(refs, Tensor) and refs.ndim == 2 else refs
        return replace(self, target=target, references=refs)

    def contrast(self, logits: Tensor, tables: SimilarityTables) -> Contrast:
        """Target, references and their weights for logits (B, C)."""
        if self.class_names is not None and len(self.class_names) != logits.shape[1]:
            given = f"{len(self.class_names)} names for {logits.shape[1]} logits"
            raise UserError("class names do not fit the model", given=given, remedy="give one per logit, in order")
        target = rules.resolve_target(self.target, logits)
        refs = self.references
        if refs is None or (isinstance(refs, int) and refs == 0):
            ids = target.new_zeros(len(logits), 0)
        elif isinstance(refs, int):
            table = tables.get(self.similarity, logits.shape[1])
            ids = rules.similar_classes(self.similarity, logits, target, refs, table)
        else:
            ids = rules.resolve_references(refs, target, logits.shape[1], self.class_names)
        return Contrast(target, ids, rules.reference_weights(logits, ids, self.weighting))


def ask(
    family: Family,
    target: Any,
    references: Any,
    similarity: str,
    weighting: str,
    aggregate: str,
    gammas: Sequence[float],
    *,
    class_names: Names,
    batch: int,
) -> Question:
    """Read and check the arguments of a call (see `Explainer.__call__`) for a batch of that many images.

    Raises
    ------
    UserError
        Anything wrong that can be known without logits; references for a family that depends on no class.
    """
    target = None if target is None else rules.read_classes(target, class_names, "target")
    if target is not None and target.ndim == 1 and len(target) != batch:
        raise UserError("target must be one class, or one per image", given=len(target), remedy=f"B={batch}")
    if isinstance(references, bool) or (isinstance(references, int) and references < 0):
        raise UserError("number of references must not be negative", where="references", given=references)
    if not isinstance(references, int) and references is not None:
        if not family.asks:
            raise UserError(
                f"{family.name} depends on no class, so references cannot change it",
                where="references",
                remedy="leave references out, or use a gradient method such as gradcam",
            )
        references = rules.read_classes(references, class_names, "references")
        if references.ndim == 2 and len(references) != batch:
            raise UserError("references must be one list, or one per image", given=len(references), remedy=f"B={batch}")
    if similarity not in rules.SIMILARITIES:
        raise unknown_name("similarity", similarity, rules.SIMILARITIES, where="similarity")
    if weighting not in rules.WEIGHTINGS:
        raise unknown_name("weighting", weighting, rules.WEIGHTINGS, where="weighting")
    strengths = tuple(rules.check_gamma(gamma) for gamma in gammas)
    if not strengths:
        raise UserError("no strength given", where="gammas", remedy="give at least one, such as 0.6")
    count = references if family.asks else None
    return Question(target, count, similarity, weighting, aggregate, strengths, class_names)


class SimilarityTables:
    """Class similarity (C, C) for the rules that need no image; computed once.

    Parameters
    ----------
    model
        Its class directions are used for ``"weight"`` when `class_weights` is None.
    class_weights
        (C, D) directions.
    confusion
        (C, C) matrix for ``"confusion"``, rows = true class.
    """

    def __init__(self, model: nn.Module, class_weights: Any = None, confusion: Any = None) -> None:
        self.model, self.class_weights, self.confusion = model, class_weights, confusion
        self._cosine: Tensor | None = None

    def get(self, similarity: str, num_classes: int) -> Tensor | None:
        """The table of a rule, None for rules that read the logits."""
        if similarity == "confusion":
            if self.confusion is None:
                raise UserError("similarity='confusion' needs a matrix", remedy="give confusion=(C, C) to Explainer")
            return torch.as_tensor(self.confusion).float()
        if similarity != "weight":
            return None
        if self._cosine is None:
            rows = self.class_weights
            rows = rules.class_directions(self.model, num_classes) if rows is None else torch.as_tensor(rows)
            self._cosine = rules.cosine_table(rows)
        return self._cosine
