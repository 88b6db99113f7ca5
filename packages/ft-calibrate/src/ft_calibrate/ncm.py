"""What the features know, without the head: nearest class mean, k nearest neighbours, linear probe.

FTC (arXiv 2409.16223), the diagnosis of damaged features: class means of *target-domain training data of all classes*
(so it may use labels of absent classes: a diagnosis, not a remedy),
mu_c = normalize(mean_i normalize(f(x_i))) over y_i = c; score_c(x) = normalize(f(x)) . mu_c; then the same accuracies
on these scores. A class without samples scores -inf. Leave-one-out means, the euclidean form, nearest neighbours and
the finished linear probe (the published one stops half-way) are ours.

Arrays give arrays, tensors give tensors on the same device. Sums are float64; the result has the precision of the
features. Rows go in blocks, so that beside the result (N, K) little is held.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vfm_core.errors import UserError, unknown_name
from vfm_core.metrics import as_array

__all__ = ["class_means", "knn_scores", "linear_probe_scores", "ncm_scores"]

_BLOCK = 1 << 22  # numbers of a block of rows
_EPS = 1e-12


def class_means(features: Any, labels: Any, num_classes: int) -> Any:
    """Normalised mean of the normalised features of every class.

    Parameters
    ----------
    features
        (N, D) features.
    labels
        (N,) column numbers; -1 is left out.
    num_classes
        K.

    Returns
    -------
    ndarray or Tensor
        (K, D) rows of length 1 (like ``features``); NaN for a class without samples.

    Raises
    ------
    UserError
        Wrong shapes, labels outside -1..K-1, or features that are not finite.
    """
    f, give = _features(features)
    y = _labels(labels, len(f), num_classes, f.device)
    sums, counts = _class_sums(f, y, num_classes)
    means = _unit(sums / counts[:, None])  # 0 / 0: NaN where there is no sample
    return give(means.to(f.dtype))


def ncm_scores(
    features: Any,
    means: Any,
    num_classes: int | None = None,
    metric: str = "cosine",
    leave_one_out: bool = False,
) -> Any:
    """Nearest-class-mean scores: higher is nearer.

    Parameters
    ----------
    features
        (N, D).
    means
        Class means (K, D) of `class_means`, or the pair (reference features (M, D), reference labels (M,)).
    num_classes
        K; needed with a pair, and checked with means.
    metric
        ``"cosine"``: cosine to the class mean, in [-1, 1]. ``"euclidean"``: minus the squared distance of the
        normalised feature to it, 2 cos - 2: the same order.
    leave_one_out
        The reference is ``features`` themselves (same rows): each sample is left out of the mean of its own class,
        exactly. The only sample of a class then has no mean to meet: -inf.

    Returns
    -------
    ndarray or Tensor
        (N, K) like ``features``; -inf for classes without samples.

    Raises
    ------
    UserError
        Wrong shapes, unknown metric, or ``leave_one_out`` without a pair of the same rows.
    """
    if metric not in ("cosine", "euclidean"):
        raise unknown_name("metric", metric, ("cosine", "euclidean"))
    f, give = _features(features)
    sums = counts = y = None
    if isinstance(means, tuple):
        if num_classes is None:
            raise UserError("the number of classes is needed with reference features", remedy="give num_classes")
        reference = _features(means[0])[0].to(f.device)
        y = _labels(means[1], len(reference), num_classes, f.device)
        sums, counts = _class_sums(reference, y, num_classes)
        mu = _unit(sums / counts[:, None])
        if leave_one_out and len(reference) != len(f):
            raise UserError(
                "leave-one-out needs the reference to be the same samples", given=f"{len(f)}, {len(reference)}"
            )
    else:
        if leave_one_out:
            raise UserError("leave-one-out needs the reference features, not their means")
        mu = _tensor(means).to(f.device).double()
        if mu.ndim != 2 or num_classes not in (None, len(mu)):
            raise UserError("class means must be (K, D)", given=f"shape {tuple(mu.shape)}, K {num_classes}")
    if mu.shape[1] != f.shape[1]:
        raise UserError("features must have one length", given=f"{f.shape[1]} and {mu.shape[1]}")
    there = ~mu.isnan().any(dim=1)
    mu = mu.nan_to_num(0.0).to(f.dtype)
    scores = f.new_empty((len(f), len(mu)))
    for part in _blocks(len(f), f.shape[1] + len(mu)):
        unit = _unit(f[part].double())
        scores[part] = unit.to(f.dtype) @ mu.T
        if leave_one_out and y is not None and sums is not None and counts is not None:
            _leave_out(scores[part], unit, y[part], sums, counts)
    scores[:, ~there] = -torch.inf
    if metric == "euclidean":
        scores.mul_(2).sub_(2)
    return give(scores)


def _leave_out(scores: Tensor, unit: Tensor, y: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Put the score against the mean of one's own class without oneself into ``scores``."""
    rows = torch.nonzero(y >= 0).squeeze(1)
    own = y[rows]
    others = counts[own] - 1
    mean = _unit((sums[own] - unit[rows]) / others.clamp(min=1)[:, None])
    score = (unit[rows] * mean).sum(dim=1)
    scores[rows, own] = torch.where(others > 0, score, -torch.inf).to(scores.dtype)


def knn_scores(
    features: Any,
    reference_features: Any,
    reference_labels: Any,
    num_classes: int,
    k: int = 20,
    temperature: float | None = None,
    leave_one_out: bool = False,
) -> Any:
    """Share of the k nearest reference samples (by cosine) that belong to each class.

    Parameters
    ----------
    features, reference_features
        (N, D), (M, D).
    reference_labels
        (M,) column numbers; -1 is left out.
    num_classes
        K.
    k
        Neighbours; all of them when there are fewer.
    temperature
        None: every neighbour has one vote, and equal votes go to the class of the nearer neighbours. A number: votes
        exp(cos / temperature).
    leave_one_out
        The reference is ``features`` themselves: no sample is its own neighbour.

    Returns
    -------
    ndarray or Tensor
        (N, K) like ``features``, rows sum to about 1; -inf for classes without reference samples.

    Raises
    ------
    UserError
        Wrong shapes, no labelled reference sample, or k below 1.
    """
    if k < 1 or (temperature is not None and not temperature > 0):
        raise UserError("k and the temperature must be positive", given=f"k {k}, temperature {temperature}")
    f, give = _features(features)
    whole = _features(reference_features)[0].to(f.device)
    labels = _labels(reference_labels, len(whole), num_classes, f.device)
    if whole.shape[1] != f.shape[1]:
        raise UserError("features must have one length", given=f"{f.shape[1]} and {whole.shape[1]}")
    if leave_one_out and len(whole) != len(f):
        raise UserError("leave-one-out needs the reference to be the same samples", given=f"{len(f)}, {len(whole)}")
    kept = torch.nonzero(labels >= 0).squeeze(1)
    if len(kept) == 0:
        raise UserError("no labelled reference sample")
    y = labels[kept]
    reference = _unit(whole[kept].double()).to(f.dtype)
    place = torch.full((len(whole),), -1, device=f.device, dtype=torch.long)
    place[kept] = torch.arange(len(kept), device=f.device)
    near = min(k, len(kept))
    scores = f.new_zeros((len(f), num_classes))
    for part in _blocks(len(f), f.shape[1] + len(kept)):
        cosine = _unit(f[part].double()).to(f.dtype) @ reference.T
        if leave_one_out:
            rows = torch.nonzero(place[part] >= 0).squeeze(1)
            cosine[rows, place[part][rows]] = -torch.inf
        value, neighbour = cosine.topk(near, dim=1)
        if temperature is None:
            # Whole votes plus less than one vote's worth of nearness.
            votes = 1 + (value + 1).clamp(min=0) / (4 * near)
        else:
            votes = ((value - value[:, :1]) / temperature).exp()
        votes = votes.where(value > -torch.inf, votes.new_zeros(()))
        votes = votes / votes.sum(dim=1, keepdim=True).clamp(min=_EPS)
        scores[part] = f.new_zeros((len(cosine), num_classes)).scatter_add_(1, y[neighbour], votes)
    scores[:, torch.bincount(y, minlength=num_classes) == 0] = -torch.inf
    return give(scores)


def linear_probe_scores(
    features: Any,
    reference_features: Any,
    reference_labels: Any,
    num_classes: int,
    c: float = 1.0,
    scale: str = "standard",
    max_iter: int = 500,
) -> Any:
    """Scores of a logistic regression on the reference features (scikit-learn, L-BFGS).

    Parameters
    ----------
    features, reference_features
        (N, D), (M, D).
    reference_labels
        (M,) column numbers; -1 is left out.
    num_classes
        K.
    c
        Inverse strength of the L2 penalty.
    scale
        ``"standard"``: every feature to mean 0 and standard deviation 1 over the reference. ``"normalise"``: every
        sample to length 1.
    max_iter
        Greatest number of L-BFGS iterations.

    Returns
    -------
    ndarray or Tensor
        (N, K) logits like ``features``; -inf for classes without reference samples.

    Raises
    ------
    UserError
        Wrong shapes, no labelled reference sample, or unknown ``scale``.
    """
    from sklearn.linear_model import LogisticRegression

    if scale not in ("standard", "normalise"):
        raise unknown_name("scale", scale, ("standard", "normalise"))
    f, give = _features(features)
    whole = _features(reference_features)[0]
    if whole.shape[1] != f.shape[1]:
        raise UserError("features must have one length", given=f"{f.shape[1]} and {whole.shape[1]}")
    labels = _labels(reference_labels, len(whole), num_classes, whole.device)
    reference, y = whole[labels >= 0].double().cpu(), labels[labels >= 0].cpu().numpy()
    if len(y) == 0:
        raise UserError("no labelled reference sample")
    x = f.double().cpu()
    if scale == "standard":
        mean, spread = reference.mean(dim=0), reference.std(dim=0, correction=0)
        spread[spread < _EPS] = 1.0
        reference, x = (reference - mean) / spread, (x - mean) / spread
    else:
        reference, x = _unit(reference), _unit(x)
    scores = np.full((len(x), num_classes), -np.inf)
    present = np.unique(y)
    if len(present) == 1:
        scores[:, present] = 0.0
    else:
        probe = LogisticRegression(C=c, solver="lbfgs", max_iter=max_iter).fit(reference.numpy(), y)
        decision = probe.decision_function(x.numpy())
        # Of two classes scikit-learn gives the log-odds of the second.
        scores[:, present] = np.stack([-decision / 2, decision / 2], axis=1) if decision.ndim == 1 else decision
    return give(torch.from_numpy(scores).to(f.device, f.dtype))


def _features(features: Any) -> tuple[Tensor, Any]:
    """Features (N, D) as a float32 or float64 tensor, and what turns a result back into the caller's kind."""
    f = _tensor(features)
    if f.ndim != 2:
        raise UserError("features must be a matrix, one row per sample", given=f"shape {tuple(f.shape)}")
    if not torch.isfinite(f.sum()) and not bool(torch.isfinite(f).all()):
        row = int(torch.nonzero(~torch.isfinite(f).all(dim=1))[0])
        raise UserError("features must be finite", where=f"row {row}")
    return f, (lambda result: result) if isinstance(features, Tensor) else (lambda result: result.cpu().numpy())


def _tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        tensor = values.detach()
    else:
        array = as_array(values)
        if array.dtype.kind not in "fiub":
            raise UserError("features must be numbers", given=array.dtype)
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _labels(labels: Any, rows: int, num_classes: int, device: torch.device) -> Tensor:
    y = as_array(labels)
    if y.shape != (rows,) or y.dtype.kind not in "iu":
        raise UserError("labels must be one column number per sample", given=f"shape {y.shape}, {y.dtype}, {rows} rows")
    if len(y) and (y.min() < -1 or y.max() >= num_classes):
        raise UserError(f"labels must lie in -1..{num_classes - 1}", given=f"{y.min()}..{y.max()}")
    return torch.from_numpy(y.astype(np.int64)).to(device)


def _class_sums(f: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sums (K, D) of the normalised features and counts (K,) per class, float64."""
    sums = torch.zeros((num_classes + 1, f.shape[1]), dtype=torch.float64, device=f.device)
    for part in _blocks(len(f), f.shape[1]):
        sums.index_add_(0, y[part] % (num_classes + 1), _unit(f[part].double()))  # -1 goes to the last row
    counts = torch.bincount(y[y >= 0], minlength=num_classes).double()
    return sums[:num_classes], counts


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1, eps=_EPS)


def _blocks(rows: int, width: int) -> list[slice]:
    step = max(1, _BLOCK // max(1, width))
    return [slice(start, start + step) for start in range(0, rows, step)]
