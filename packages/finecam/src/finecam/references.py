"""The question a map answers: which class, against which similar classes, how strongly.

Finer-CAM (arXiv 2501.11309), eq. 5-8: explain ``y^c - gamma * sum_t a_t y^{d_t}`` instead of ``y^c``. Everything based
on gradients follows from one vector on the logits, the cotangent

    v[c] = 1,   v[d_t] = -gamma * a_t,   0 elsewhere.

Weightings a_t of the references:

- ``mean``: 1/T, the paper's eq. 8.
- ``softmax``: q_t (1 + y^{d_t} - sum_s q_s y^{d_s}) with q the softmax over the references' logits. This is the exact
  gradient of the official code's objective ``sum_t p_t (y^c - gamma y^{d_t}) / sum_t p_t``, whose probabilities p are
  not detached, so that a single coefficient can even change sign.
- ``softmax_detached``: q_t, what one would think the official code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vfm_core.errors import UserError, unknown_name

SIMILARITIES = ("logit", "rank", "weight", "confusion")
WEIGHTINGS = ("mean", "softmax", "softmax_detached")

Names = Sequence[str] | None


@dataclass(frozen=True)
class Contrast:
    """Target and references of a batch.

    Attributes
    ----------
    target : Tensor
        (B,) class ids c.
    references : Tensor
        (B, T) class ids d_t, T = 0 for a plain map.
    weights : Tensor
        (B, T) coefficients a_t.
    """

    target: Tensor
    references: Tensor
    weights: Tensor

    def __getitem__(self, images: slice | Tensor) -> Contrast:
        return Contrast(self.target[images], self.references[images], self.weights[images])

    def cotangent(self, gamma: float, num_classes: int) -> Tensor:
        """The vector v on the logits, (B, C); with gamma = 0 exactly the plain method's."""
        v = one_hot(self.target, num_classes)
        if gamma and self.references.shape[1]:
            v.scatter_add_(1, self.references, -gamma * self.weights.to(v.dtype))
        return v

    def basis(self, num_classes: int, mixed: bool) -> Tensor:
        """Cotangents (n, B, C) from which the gradient for any gamma follows: ``e_c`` first.

        Then ``sum_t a_t e_{d_t}`` when `mixed` (n = 2), else every ``e_{d_t}`` (n = 1 + T).
        """
        plain = one_hot(self.target, num_classes)
        if not self.references.shape[1]:
            return plain[None]
        if mixed:
            rest = torch.zeros_like(plain).scatter_add_(1, self.references, self.weights.to(plain.dtype))[None]
        else:
            rest = torch.stack([one_hot(d, num_classes) for d in self.references.T])
        return torch.cat([plain[None], rest])

    def objective(self, logits: Tensor, gamma: float, weighting: str) -> Tensor:
        """J of every row of `logits` (B, C), differentiable; ``softmax`` takes each row's own probabilities."""
        y_c = logits.gather(1, self.target[:, None]).squeeze(1)
        if not gamma or not self.references.shape[1]:
            return y_c
        y_d = logits.gather(1, self.references)
        if weighting == "softmax":
            return (y_d.softmax(1) * (y_c[:, None] - gamma * y_d)).sum(1)
        return y_c - gamma * (self.weights.to(y_d.dtype) * y_d).sum(1)


def one_hot(classes: Tensor, num_classes: int) -> Tensor:
    """(B,) ids -> (B, C) float32."""
    v = torch.zeros(len(classes), num_classes, device=classes.device)
    return v.scatter_(1, classes[:, None], 1.0)


# --- target and references as the user gives them ------------------------------------------


def read_classes(given: Any, names: Names, where: str) -> Tensor:
    """Ids (long, on the CPU, any shape) of classes given as ids, names, nested lists, arrays or tensors.

    Raises
    ------
    UserError
        Unknown name, names without ``class_names``, ragged lists, anything that is no class.
    """
    if isinstance(given, (Tensor, np.ndarray)):
        ids = torch.as_tensor(given).detach().cpu()
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise UserError("class ids must be integers", where=where, given=ids.dtype)
        return ids.long()
    try:
        return torch.tensor(_lookup(given, names, where), dtype=torch.long)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        remedy = "give ids or names, as many for every image"
        raise UserError("cannot read classes", where=where, given=repr(given), remedy=remedy) from error


def _in_range(ids: Tensor, num_classes: int, where: str) -> Tensor:
    outside = ids[(ids < 0) | (ids >= num_classes)]
    if len(outside):
        remedy = f"the model has {num_classes} classes"
        raise UserError("class id out of range", where=where, given=int(outside[0]), remedy=remedy)
    return ids


def _lookup(given: Any, names: Names, where: str) -> Any:
    if isinstance(given, str):
        if names is None:
            raise UserError("class name without class names", where=where, given=repr(given), remedy="give class_names")
        matches = [i for i, name in enumerate(names) if name == given]
        if not matches:
            raise unknown_name("class", given, names, where=where)
        if len(matches) > 1:
            raise UserError("class name is not unique", where=where, given=given, remedy=f"give an id: {matches}")
        return matches[0]
    if isinstance(given, (bool, float)):
        raise UserError("class ids must be integers", where=where, given=given)
    if isinstance(given, (list, tuple, range)):
        return [_lookup(item, names, where) for item in given]
    return int(given)


def resolve_target(ids: Tensor | None, logits: Tensor) -> Tensor:
    """Target ids (B,) on the device of `logits` (B, C).

    Parameters
    ----------
    ids
        None (the predicted class), one id for all images, or (B,) from `read_classes`.
    logits
        (B, C).

    Raises
    ------
    UserError
        An id out of range, or neither one nor B of them.
    """
    if ids is None:
        return logits.argmax(1)
    ids = _in_range(ids, logits.shape[1], "target")
    if ids.ndim == 0:
        ids = ids.expand(len(logits))
    if ids.shape != (len(logits),):
        remedy = f"the batch has {len(logits)} images"
        raise UserError("target must be one class, or one per image", given=tuple(ids.shape), remedy=remedy)
    return ids.to(logits.device)


def resolve_references(ids: Tensor, target: Tensor, num_classes: int, names: Names = None) -> Tensor:
    """Explicit references as ids (B, T), from (T,) for all images or (B, T).

    Raises
    ------
    UserError
        A reference equals the target or is given twice (names the class), or the shape fits no batch.
    """
    ids = _in_range(ids, num_classes, "references")
    if ids.ndim == 0:
        ids = ids[None]
    if ids.ndim == 1:
        ids = ids.expand(len(target), -1)
    if ids.ndim != 2 or len(ids) != len(target):
        raise UserError(
            "references must be a list of classes, or one such list per image",
            given=tuple(ids.shape),
            remedy=f"the batch has {len(target)} images",
        )
    ids = ids.to(target.device)

    def name(c: Tensor) -> str:
        return repr(names[int(c)]) if names is not None else f"class {int(c)}"

    same = (ids == target[:, None]).nonzero()
    if len(same):
        raise UserError("a reference equals the target", where="references", given=name(target[same[0, 0]]))
    ordered = ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).nonzero()
    if len(twice):
        raise UserError("a reference is given twice", where="references", given=name(ordered[tuple(twice[0])]))
    return ids


# --- similar classes -----------------------------------------------------------------------


def similar_classes(similarity: str, logits: Tensor, target: Tensor, count: int, table: Tensor | None = None) -> Tensor:
    """The classes most similar to the target.

    Parameters
    ----------
    similarity
        ``"logit"`` (smallest ``|y^d - y^c|``), ``"rank"`` (largest ``y^d``), or ``"weight"`` and ``"confusion"``
        (largest entry of row c of `table`).
    logits
        (B, C).
    target
        (B,).
    count
        How many; at most C - 1 are returned.
    table
        (C, C) similarity for the last two rules.

    Returns
    -------
    Tensor
        (B, min(count, C - 1)) ids, most similar first; ties go to the smaller id.
    """
    if similarity not in SIMILARITIES:
        raise unknown_name("similarity", similarity, SIMILARITIES, where="similarity")
    num_classes = logits.shape[1]
    if num_classes < 2:
        raise UserError("a contrast needs two classes", given=num_classes, remedy="use references=None for a plain map")
    if similarity == "logit":
        distance = (logits - logits.gather(1, target[:, None])).abs()
    elif similarity == "rank":
        distance = -logits.detach()
    else:
        if table is None:
            raise UserError(f"similarity={similarity!r} needs a table", remedy="give a (C, C) matrix")
        if table.shape != (num_classes, num_classes):
            raise UserError("similarity table must be (C, C)", given=tuple(table.shape), remedy=f"C={num_classes}")
        distance = -table.to(logits.device)[target]
    distance = distance.scatter(1, target[:, None], float("inf"))
    return distance.sort(dim=1, stable=True).indices[:, : min(count, num_classes - 1)]


def cosine_table(weights: Tensor) -> Tensor:
    """Cosine between the class directions (C, D) of a linear head or of text embeddings, as (C, C)."""
    rows = nn.functional.normalize(weights.detach().float(), dim=1)
    return rows @ rows.T


def class_directions(model: nn.Module, num_classes: int) -> Tensor:
    """The (C, D) rows that score the classes: the model's own ``weights()``, or its last linear layer's.

    Raises
    ------
    UserError
        The model has no linear layer with C outputs.
    """
    own = getattr(model, "weights", None)
    if callable(own):
        found: Tensor = own()
        return found
    head = linear_heads(model, num_classes)
    if not head:
        raise UserError(
            "no linear layer with one output per class",
            where=type(model).__name__,
            given=num_classes,
            remedy="give class_weights=(C, D) to Explainer, or use similarity='logit'",
        )
    return head[-1][0]


def linear_heads(model: nn.Module, outputs: int) -> list[tuple[Tensor, Tensor | None]]:
    """Weight (outputs, D) and bias of every linear or 1x1 convolutional layer with that many outputs."""
    found: list[tuple[Tensor, Tensor | None]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == outputs:
            found.append((module.weight, module.bias))
        elif isinstance(module, nn.Conv2d) and (module.out_channels, module.kernel_size) == (outputs, (1, 1)):
            found.append((module.weight.flatten(1), module.bias))
    return found


def reference_weights(logits: Tensor, references: Tensor, weighting: str) -> Tensor:
    """Coefficients a_t (B, T); see the module's head.

    Raises
    ------
    UserError
        Unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise unknown_name("weighting", weighting, WEIGHTINGS, where="weighting")
    if weighting == "mean":
        return torch.full(references.shape, 1 / max(1, references.shape[1]), device=logits.device)
    y_d = logits.detach().gather(1, references).float()
    q = y_d.softmax(1)
    if weighting == "softmax_detached":
        return q
    return q * (1 + y_d - (q * y_d).sum(1, keepdim=True))


def check_gamma(gamma: float) -> float:
    """A finite, non-negative strength, or a UserError."""
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float, np.floating)) or not 0 <= gamma < float("inf"):
        raise UserError(
            "gamma must be finite and not negative", where="gamma", given=gamma, remedy="the paper uses 0.6"
        )
    return float(gamma)
