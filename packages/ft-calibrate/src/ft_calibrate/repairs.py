"""Repairs of the absent logits that are no single gamma.

None of this is from the paper; all of it is known from neighbouring fields and applied here by us: ``prior`` (logit
adjustment, long-tailed recognition), ``weight-align`` and ``bic`` (continual learning), and a temperature for the
absent logits alone.

A temperature common to *all* logits cannot change an argmax, so it cannot repair predictions: it only changes
confidence (see `ft_calibrate.confidence`).

Repairs that scale logits (``weight-align``, ``bic``, ``temperature-per-group``) are not invariant to row constants:
apply them to the kind of scores that they were fitted on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp
from vfm_core.errors import UserError, unknown_name
from vfm_core.metrics import as_array

from ft_calibrate.groups import ClassGroups, label_columns
from ft_calibrate.inputs import as_scores
from ft_calibrate.metrics import FEW

__all__ = [
    "GroupScaling",
    "bic",
    "labelled_rows",
    "prior_shift",
    "temperature_per_group",
    "weight_align",
]

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class GroupScaling:
    """An affine map of one group's logits: ``alpha * z + beta`` on ``columns``.

    Parameters
    ----------
    alpha : float
        Positive factor.
    beta : float
        Shift, in logit units.
    columns : ndarray of intp
        The columns that are mapped.
    """

    alpha: float
    beta: float
    columns: NDArray[np.intp]


def labelled_rows(
    logits: Any, labels: Any, groups: ClassGroups, purpose: str
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.bool_]]:
    """Rows with a label in S or U, their labels as columns, and whether that is in U; both groups must be there.

    ``purpose`` names the method for messages. Warns of a group with fewer than 30 samples.
    """
    z = as_scores(logits, groups.num_classes, classes=groups.classes)
    y = label_columns(labels, groups.classes, rows=len(z))
    if len(groups.absent) == 0:
        raise UserError("nothing is absent, so there is no gamma to choose", where="seen classes")
    is_absent, is_seen = np.isin(y, groups.absent), np.isin(y, groups.seen)
    for name, mask in (("seen", is_seen), ("absent", is_absent)):
        n = int(mask.sum())
        if n == 0:
            remedy = "choose a method that needs no absent labels, such as alg, pcv or rate"
            raise UserError(f"{purpose} needs labelled samples of {name} classes", given="none", remedy=remedy)
        if n < FEW:
            log.warning("only %d labelled samples of %s classes: look at the interval of gamma", n, name)
    kept = is_seen | is_absent
    return z[kept], y[kept], is_absent[kept]


def prior_shift(
    labels: Any,
    groups: ClassGroups,
    prior: Mapping[str, float] | Sequence[float] | None = None,
    smoothing: float = 1.0,
    tau: float = 1.0,
) -> Floats:
    """Logit adjustment: ``tau * (log pi_target - log pi_train)`` per class (Menon et al. 2021, applied here by us).

    Parameters
    ----------
    labels
        (N,) labels of the fine-tuning data; pi_train_c = (n_c + smoothing) / (N + smoothing K), so that absent classes
        (n_c = 0) have a finite prior.
    groups
        The classes of the head.
    prior
        pi_target: a share per class, in class order or by name (classes not named get 0 and are refused); uniform by
        default. Rescaled to sum 1.
    smoothing
        Positive count added to every class.
    tau
        Strength; 1 is the Bayes rule for a well calibrated model.

    Returns
    -------
    ndarray
        (K,) shift of the logits.

    Raises
    ------
    UserError
        Shares that are not positive, unknown names, or a smoothing that is not positive.
    """
    if not smoothing > 0:
        raise UserError("smoothing must be positive", where="prior", given=smoothing)
    k = groups.num_classes
    y = label_columns(labels, groups.classes)
    y = y[y >= 0]
    if len(y) == 0:
        raise UserError("method prior needs labels of the fine-tuning data", given="none")
    train = (np.bincount(y, minlength=k) + smoothing) / (len(y) + smoothing * k)
    return tau * (np.log(_shares(prior, groups)) - np.log(train))


def _shares(prior: Mapping[str, float] | Sequence[float] | None, groups: ClassGroups) -> Floats:
    k = groups.num_classes
    if prior is None:
        return np.full(k, 1 / k)
    if isinstance(prior, Mapping):
        for name in prior:
            if str(name) not in groups.classes:
                raise unknown_name("class", str(name), groups.classes, where="prior")
        given = {str(name): float(share) for name, share in prior.items()}
        shares = np.asarray([given.get(name, 0.0) for name in groups.classes])
    else:
        shares = np.asarray(as_array(prior), dtype=np.float64)
    if shares.shape != (k,):
        raise UserError("the prior needs one share per class", where="prior", given=f"{shares.shape} for {k} classes")
    if not (np.isfinite(shares) & (shares > 0)).all():
        bad = groups.names(np.flatnonzero(~(shares > 0)))[:5]
        raise UserError("every class needs a positive share", where="prior", given=", ".join(bad))
    return shares / shares.sum()


def weight_align(
    head_weight: Any, groups: ClassGroups, remaining: str = "absent", head_bias: Any = None
) -> tuple[Floats, Floats]:
    """WA: scale the absent rows of the head by mean ||w_S|| / mean ||w_U|| (Zhao et al. 2020, applied here by us).

    Parameters
    ----------
    head_weight
        (K, D) weight of the linear head.
    groups, remaining
        The classes of the head; moved columns are scaled.
    head_bias
        (K,) its bias, which is not scaled; by default none.

    Returns
    -------
    scale, shift : ndarray
        (K,), so that ``z * scale + shift`` are the logits of the scaled head.

    Raises
    ------
    UserError
        Shapes that disagree with the classes, or absent rows that are all zero.
    """
    weight = np.asarray(as_array(head_weight), dtype=np.float64)
    k = groups.num_classes
    bias = np.zeros(k) if head_bias is None else np.asarray(as_array(head_bias), dtype=np.float64)
    if weight.ndim != 2 or len(weight) != k or bias.shape != (k,):
        given = f"weight {weight.shape}, bias {bias.shape} for {k} classes"
        raise UserError("the head does not fit the classes", where="head_weight", given=given)
    scale = np.ones(k)
    moved = groups.moved(remaining)
    if len(moved):
        norms = np.linalg.norm(weight, axis=1)
        if not norms[moved].mean() > 0 or not norms[groups.seen].mean() > 0:
            raise UserError("the weights of a group are all zero", where="head_weight")
        scale[moved] = norms[groups.seen].mean() / norms[moved].mean()
    return scale, (1 - scale) * bias


def bic(
    logits: Any,
    labels: Any,
    groups: ClassGroups,
    on: str = "absent",
    criterion: str = "overall",
    remaining: str = "absent",
) -> GroupScaling:
    """BiC: ``alpha z + beta`` on one group's logits, fitted by cross-entropy (Wu et al. 2019, applied here by us).

    Parameters
    ----------
    logits, labels, groups, remaining
        As in `ft_calibrate.choices.val_gamma`: labelled held-out samples of both groups.
    on : {"absent", "seen"}
        The group that is mapped.
    criterion : {"overall", "balanced"}
        ``"balanced"``: both groups weigh the same in the loss.

    Returns
    -------
    GroupScaling
        alpha in [1e-3, 1e3].

    Raises
    ------
    UserError
        No labelled sample in a group, or bad input.
    """
    if on not in ("absent", "seen"):
        raise UserError("unknown group", where="bic", given=repr(on), remedy="use absent or seen")
    z, y, is_absent = labelled_rows(logits, labels, groups, "bic")
    columns = groups.moved(remaining) if on == "absent" else groups.seen
    alpha, beta = _fit_affine(z, y, _weights(is_absent, criterion), columns, groups.columns(remaining), shift=True)
    return GroupScaling(alpha, beta, columns)


def temperature_per_group(
    logits: Any, labels: Any, groups: ClassGroups, criterion: str = "overall", remaining: str = "absent"
) -> float:
    """T_U of ``z_U / T_U``, fitted by cross-entropy on labelled samples of both groups (ours).

    Arguments and errors as in `bic`. The result lies in [1e-3, 1e3]. Scaling logits of either sign moves them to or
    from 0: unlike gamma this is no bias, and it depends on where 0 lies in a row.
    """
    z, y, is_absent = labelled_rows(logits, labels, groups, "temperature-per-group")
    moved, columns = groups.moved(remaining), groups.columns(remaining)
    alpha, _ = _fit_affine(z, y, _weights(is_absent, criterion), moved, columns, shift=False)
    return 1 / alpha


def _weights(is_absent: NDArray[np.bool_], criterion: str) -> Floats:
    """Sample weights of sum 1."""
    if criterion == "overall":
        return np.full(len(is_absent), 1 / len(is_absent))
    if criterion == "balanced":
        return np.where(is_absent, 0.5 / is_absent.sum(), 0.5 / (~is_absent).sum())
    raise UserError("unknown criterion", where="cross-entropy fit", given=repr(criterion), remedy="overall or balanced")


def _fit_affine(
    z: NDArray[Any],
    y: NDArray[np.int64],
    weights: Floats,
    mapped: NDArray[np.intp],
    competing: NDArray[np.intp],
    shift: bool,
) -> tuple[float, float]:
    """Minimise the weighted cross-entropy over (alpha, beta): convex, since both enter the softmax linearly."""
    place = np.searchsorted(competing, y)  # labels lie in S or U, which always compete
    logits = z[:, competing].astype(np.float64)
    is_mapped = np.isin(competing, mapped) & np.isfinite(logits).all(axis=0)  # masked columns stay masked
    own = is_mapped[place]
    true = logits[np.arange(len(y)), place]
    rest, moving = logsumexp(logits[:, ~is_mapped], axis=1), logits[:, is_mapped]
    if moving.shape[1] == 0:
        return 1.0, 0.0
    highest = moving.max(axis=1)

    def loss(p: Floats) -> tuple[float, Floats]:
        alpha, beta = p
        top = np.maximum(alpha * highest + beta, rest)
        share = np.exp(alpha * moving + (beta - top)[:, None])
        total = share.sum(axis=1) + np.exp(rest - top)
        d_alpha = np.einsum("nk,nk->n", share, moving) / total - np.where(own, true, 0.0)
        d_beta = share.sum(axis=1) / total - own
        value = weights @ (top + np.log(total) - np.where(own, alpha * true + beta, true))
        return float(value), np.array([weights @ d_alpha, weights @ d_beta * shift])

    bounds = [(1e-3, 1e3), (None, None) if shift else (0.0, 0.0)]
    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds)
    return float(found.x[0]), float(found.x[1])
