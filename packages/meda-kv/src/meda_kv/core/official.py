"""The formulas of MEDA's official code where they differ from the paper (repository AIoT-MLSys-Lab/MEDA).

Our own lines, written from what that code computes: the entropy of full causal attention, per head and then averaged;
shares clamped to [0.01, 1] with nothing given back; as many recent as important tokens; every text token kept, over
budget if need be, and a recent window widened to the text length plus 100. ``preset="official-code"`` uses them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.core.entropy import attention_entropy
from meda_kv.core.selection import OFFICIAL_EXTRA

LEAST_SHARE, MOST_SHARE = 0.01, 1.0


def official_entropy(q: Tensor, k: Tensor, scale: float | None = None, block: int = 1024) -> Tensor:
    """Entropy of ordinary causal attention per head, averaged over heads and rows, ``[B]`` in nats.

    The official code clamps probabilities at 1e-12 before the logarithm; the exact value at 0 used here differs from
    that by at most ``2.8e-11`` per key. It also reads the first row of the batch only; here every row has its own.
    """
    visual = torch.zeros(len(q), q.shape[2], dtype=torch.bool, device=q.device)
    return attention_entropy(q, k, visual, kind="self", scale=scale, block=block)


def official_alphas(entropy: Tensor, ratio: float) -> Tensor:
    """Return ``clamp(softmax(E) * L * ratio, 0.01, 1)``, float ``[L]``: what the clamp cuts off is not given back.

    Parameters
    ----------
    entropy : Tensor
        ``[L]`` in nats.
    ratio : float
        Share of the cache to keep, in (0, 1]. The shares returned do not average to it when one is clamped.
    """
    if not 0.0 < ratio <= 1.0:
        raise UserError("the share of the cache to keep must lie in (0, 1]", where="ratio", given=ratio)
    e = torch.as_tensor(entropy)
    return (torch.softmax(e, 0) * len(e) * ratio).clamp(LEAST_SHARE, MOST_SHARE)


def official_budgets(entropy: Tensor, ratio: float, n: int) -> Tensor:
    """Return ``int(n alpha_l / 2) + int(n alpha_l / 2)`` (important and recent tokens, 1 : 1), long ``[L]``."""
    return 2 * (n * official_alphas(entropy, ratio) / 2).long()


def official_keep(scores: Tensor, visual: Tensor, alpha: float, extra: int = OFFICIAL_EXTRA) -> Tensor:
    """Slots that the official average-merge class keeps in one layer.

    Parameters
    ----------
    scores : Tensor
        ``[H, n]``, >= 0: accumulated attention of every head, the first generated token included.
    visual : Tensor
        bool ``[n]``.
    alpha : float
        The layer's share.
    extra : int
        What a too short recent window is widened by beyond the text length (100 in the code).

    Returns
    -------
    Tensor
        bool ``[H, n]``. All text is kept; an image token is kept when it is recent, or when it is among the top
        ``int(n alpha / 2)`` of the scores before the recent window, in which every text token comes first.
    """
    n = scores.shape[-1]
    important = recent = int(n * alpha / 2)
    text_length = n - int(visual.sum())
    if recent < text_length:
        recent = text_length + extra
    recent = min(recent, n)
    kept = ~visual.expand_as(scores).clone()
    kept[:, n - recent :] = True
    # The code subtracts 65516 from image tokens in the model's precision, where that rounds their order away.
    early = torch.where(visual, scores.double() - 65516.0, scores.double())[:, : n - recent]
    top = torch.argsort(early, dim=-1, descending=True, stable=True)[:, : min(important, early.shape[-1])]
    return kept.scatter_(-1, top, True)
