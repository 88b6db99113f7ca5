"""Losses of the recipes, as pure functions of logits and features.

FTC (arXiv 2409.16223): cross-entropy over all K columns while labels come from S only; that choice makes the
seen-absent bias. HT (arXiv 2311.01420): distillation and a regulariser of the feature rank. The rank penalty has the
form of the dimensional-collapse literature (arXiv 2210.00226); ``l2sp`` is the common baseline of arXiv 1802.01483.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["correlation_penalty", "cross_entropy", "distillation", "squared_distance"]


def cross_entropy(logits: Tensor, labels: Tensor, columns: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over all K columns, or over some of them.

    Parameters
    ----------
    logits : Tensor, (N, K)
        Scores.
    labels : Tensor of int64, (N,)
        Columns in 0..K-1.
    columns : Tensor of int64, optional
        The sorted columns that compete; every label must be among them.

    Returns
    -------
    Tensor
        Scalar.
    """
    if columns is not None:
        logits, labels = logits[:, columns], torch.searchsorted(columns, labels)
    return F.cross_entropy(logits, labels)


def distillation(logits: Tensor, teacher: Tensor, temperature: float, columns: Tensor | None = None) -> Tensor:
    """T^2 KL(softmax(z_O / T) || softmax(z / T)), mean over rows.

    Parameters
    ----------
    logits, teacher : Tensor, (N, K)
        z of the trained model and z_O of the source model.
    temperature : float
        T > 0; T^2 keeps the gradient's size independent of it.
    columns : Tensor of int64, optional
        Take both softmaxes over these columns only (the absent ones: their relations, not their level, are kept).

    Returns
    -------
    Tensor
        Scalar, >= 0.
    """
    if columns is not None:
        logits, teacher = logits[:, columns], teacher[:, columns]
    target = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, dim=1), target, reduction="batchmean", log_target=True
    )


def correlation_penalty(features: Tensor, eps: float = 1e-5) -> Tensor:
    """||corr(F)||_F^2 / D^2 of a mini-batch: 1 when all dimensions move together, 1 / D when none do.

    Parameters
    ----------
    features : Tensor, (N, D)
        A mini-batch; with fewer than two rows the penalty is 0.
    eps : float
        Added to the variance: a dimension that does not vary has no correlation.

    Returns
    -------
    Tensor
        Scalar in [0, 1].
    """
    n, d = features.shape
    if n < 2:
        return features.sum() * 0.0
    f = features.float()
    f = f - f.mean(dim=0)
    f = f * torch.rsqrt(f.square().mean(dim=0) + eps)
    # The (D, D) correlations and the (N, N) products have the same Frobenius norm: take the smaller.
    product = f.T @ f if d <= n else f @ f.T
    return product.square().sum() / (n * n * d * d)


def squared_distance(parameters: Iterable[Tensor], origin: Iterable[Tensor]) -> Tensor:
    """||theta - theta_O||^2, summed over all given tensors.

    Parameters
    ----------
    parameters, origin : iterable of Tensor
        The same shapes in the same order.

    Returns
    -------
    Tensor
        Scalar.
    """
    return torch.stack([(p - o).square().sum() for p, o in zip(parameters, origin, strict=True)]).sum()
