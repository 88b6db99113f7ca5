"""Confidence after the repair: one temperature, and the expected calibration error before and after it.

In this package "calibration" means the bias between seen and absent logits (FTC, arXiv 2409.16223). Confidence
calibration is the other thing of that name: whether a confidence of 0.8 is right in 80 % of the cases. Gamma repairs
the first and leaves the softmax over-confident; a temperature T (Guo et al. 2017) repairs the second:
p = softmax((z + gamma 1[U]) / T). T is common to all logits, so it cannot change an argmax, and it cannot stand in for
gamma. Fitting it on held-out *seen* data is ours, not from the paper: nothing of the absent classes is labelled, so
their confidence is extrapolated.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax
from vfm_core.errors import UserError
from vfm_core.metrics import expected_calibration_error

from ft_calibrate.inputs import as_scores

__all__ = ["TEMPERATURE_RANGE", "TemperatureFit", "ece", "fit_temperature", "temperature_report"]

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
TEMPERATURE_RANGE = (1e-2, 1e2)


@dataclass(frozen=True)
class TemperatureFit:
    """A temperature and what it does to the confidence on the data it was fitted on.

    Parameters
    ----------
    temperature : float
        T, in [0.01, 100]; above 1: the logits were over-confident.
    ece_before, ece_after : float
        Expected calibration error (15 bins) in [0, 1]. ``ece_after`` is cross-fitted: each half of the samples is
        judged with the temperature of the other half.
    nll_before, nll_after : float
        Mean negative log-likelihood (nats), cross-fitted alike.
    n : int
        Samples.
    """

    temperature: float
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return asdict(self)


def fit_temperature(logits: Any, labels: Any) -> float:
    """The T that minimises the cross-entropy of ``softmax(logits / T)``, in [0.01, 100].

    Parameters
    ----------
    logits
        (N, K) calibrated logits of held-out data; whole columns may be -inf.
    labels
        (N,) columns.

    Returns
    -------
    float
        At an end of the range when the data do not bound T (every prediction right: T = 0.01).

    Raises
    ------
    UserError
        No rows, lengths that disagree, or labels that are no column or a masked one.
    """
    z, y = _checked(logits, labels)
    own, rest = _relative(z, y)

    def nll(log_t: float) -> float:
        return float(logsumexp(rest / np.exp(log_t), axis=1).mean() - own.mean() / np.exp(log_t))

    low, high = np.log(TEMPERATURE_RANGE)
    found = minimize_scalar(nll, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    # The bounded search never evaluates the ends of its range.
    best = min((float(found.x), float(low), float(high)), key=nll)
    if best in (low, high):
        log.warning("the temperature reached the end of its range, %.3g: too few errors to fit it", np.exp(best))
    return float(np.exp(best))


def temperature_report(logits: Any, labels: Any, n_bins: int = 15, seed: int = 0) -> TemperatureFit:
    """Fit T and report ECE and likelihood before and after.

    Parameters
    ----------
    logits, labels
        As in `fit_temperature`.
    n_bins
        Bins of the expected calibration error.
    seed
        Of the halves that judge each other's temperature. With fewer than 4 samples there are no halves, and T is
        judged on the samples that it was fitted on.

    Returns
    -------
    TemperatureFit

    Raises
    ------
    UserError
        As in `fit_temperature`.
    """
    z, y = _checked(logits, labels)
    temperature = fit_temperature(z, y)
    each = np.full(len(y), temperature)
    if len(y) >= 4:
        order = np.random.default_rng(seed).permutation(len(y))
        halves = order[: len(y) // 2], order[len(y) // 2 :]
        for fit_on, judge_on in (halves, halves[::-1]):
            each[judge_on] = fit_temperature(z[fit_on], y[fit_on])
    after = z / each[:, None]
    return TemperatureFit(temperature, ece(z, y, n_bins), ece(after, y, n_bins), _nll(z, y), _nll(after, y), len(y))


def ece(logits: Any, labels: Any, n_bins: int = 15) -> float:
    """Expected calibration error of ``softmax(logits)``, in [0, 1] (torchmetrics).

    Arguments and errors as in `fit_temperature`.
    """
    z, y = _checked(logits, labels)
    return expected_calibration_error(softmax(z, axis=1), y, n_bins=n_bins)


def _checked(logits: Any, labels: Any) -> tuple[Floats, NDArray[np.int64]]:
    z = as_scores(logits).astype(np.float64)
    y = np.asarray(labels)
    if y.shape != (len(z),) or len(y) == 0:
        given = f"{len(z)} rows, labels {y.shape}"
        raise UserError("a temperature needs held-out logits with labels", given=given, remedy="give seen data")
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= z.shape[1]:
        raise UserError("labels must be columns", given=f"{y.min()}..{y.max()} for {z.shape[1]} columns")
    if np.isneginf(z[0, y]).any():  # a -inf column is -inf in every row
        column = int(y[np.isneginf(z[0, y])][0])
        raise UserError("a label is a masked class", given=f"column {column}", remedy="drop these rows")
    return z, y.astype(np.int64)


def _relative(z: Floats, y: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """The true logits and all logits, both with the row maximum taken off."""
    rest = z - z.max(axis=1, keepdims=True)
    return rest[np.arange(len(y)), y], rest


def _nll(z: Floats, y: NDArray[np.int64]) -> float:
    return float((logsumexp(z, axis=1) - z[np.arange(len(y)), y]).mean())
