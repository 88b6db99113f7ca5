"""Scores as they are handed over: logits, log-probabilities or probabilities, as lists, numpy arrays or tensors.

Row constants cancel in every argmax and in the average logit gap, so log-probabilities serve as well as logits.
Probabilities do not: they are turned into logs first (floor 1e-30).
This part is ours, not from a paper.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

from ft_calibrate.table_checks import PROBABILITY_FLOOR, FiniteChecker, looks_like_probabilities, to_log

__all__ = ["INPUT_KINDS", "InputKind", "as_scores", "like", "looks_like_probabilities", "to_logits", "untensored"]

log = logging.getLogger(__name__)

_BLOCK = 1 << 20  # scores looked through at once

InputKind = Literal["logit", "logprob", "prob"]
INPUT_KINDS: tuple[InputKind, ...] = get_args(InputKind)


def untensored(values: Any) -> Any:
    """A tensor (any device and precision) as a numpy array that keeps float64; anything else unchanged."""
    if not hasattr(values, "detach"):
        return values
    tensor = values.detach().cpu()
    half = tensor.is_floating_point() and tensor.element_size() < 4  # numpy has no bfloat16
    return (tensor.float() if half else tensor).numpy()


def as_scores(
    scores: Any,
    num_classes: int | None = None,
    *,
    classes: Sequence[str] | None = None,
    where: str | Path | None = None,
) -> NDArray[Any]:
    """``scores`` as a checked floating array (N, K); float32 and float64 keep their precision.

    Parameters
    ----------
    scores
        (N, K) list, array or tensor. A column may be -inf as a whole (a masked class); any other value must be finite.
    num_classes
        K, when it is known.
    classes
        Names of the columns, for messages.
    where
        File or field, for messages.

    Raises
    ------
    UserError
        Not a matrix, another number of columns, NaN or infinite values (the first row and column are named).
    """
    array = np.asarray(untensored(scores))
    if array.ndim != 2:
        raise UserError("logits must be a matrix (samples, classes)", where=where, given=f"shape {array.shape}")
    if array.dtype.kind not in "fiub":
        raise UserError("logits must be numbers", where=where, given=f"dtype {array.dtype}")
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
        array = array.astype(np.float32 if array.dtype.itemsize <= 2 else np.float64)
    if num_classes is not None and array.shape[1] != num_classes:
        raise UserError(
            "the number of columns differs from the number of classes",
            where=where,
            given=f"{array.shape[1]} columns for {num_classes} classes",
            remedy="give the class names of the columns, so that they can be matched by name",
        )
    checker = FiniteChecker([str(c) for c in range(array.shape[1])] if classes is None else classes, where)
    rows = max(1, _BLOCK // max(1, array.shape[1]))
    for start in range(0, len(array), rows):
        checker.check(array[start : start + rows])
    return array


def to_logits(
    scores: Any, kind: str = "logit", *, classes: Sequence[str] | None = None, where: str | Path | None = None
) -> tuple[NDArray[Any], int]:
    """Scores of any kind as something that can be calibrated, and the number of zeros that were floored.

    Parameters
    ----------
    scores
        (N, K).
    kind : {"logit", "logprob", "prob"}
        What they are. Probabilities are logged with floor 1e-30; logits and log-probabilities pass unchanged.
    classes, where
        For messages.

    Returns
    -------
    logits : ndarray
        (N, K).
    zeros : int
        How many probabilities were exactly 0; always 0 for other kinds.

    Raises
    ------
    UserError
        An unknown kind, values that cannot be of that kind, or the errors of `as_scores`.
    """
    if kind not in INPUT_KINDS:
        raise UserError("unknown kind of input", where=where, given=repr(kind), remedy=f"use {', '.join(INPUT_KINDS)}")
    array = as_scores(scores, classes=classes, where=where)
    if kind == "logprob" and array.size and array.max() > 1e-3:
        remedy = "log-probabilities are at most 0: say logit for plain scores"
        raise UserError("not log-probabilities", where=where, given=f"largest value {array.max():.4g}", remedy=remedy)
    if kind != "prob":
        return array, 0
    logs, zeros = to_log(array.astype(np.float64), where)
    if zeros:
        log.warning("%d probabilities are exactly 0 and count as %.0e", zeros, PROBABILITY_FLOOR)
    return logs, zeros


def like(result: NDArray[Any], template: Any) -> Any:
    """``result`` as a tensor on the device of ``template`` when that is a tensor, else unchanged."""
    if not hasattr(template, "detach"):
        return result
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(result)).to(template.device)
    return tensor.to(template.dtype) if tensor.is_floating_point() and template.is_floating_point() else tensor
