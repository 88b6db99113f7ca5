"""Averages of weights and of predictions.

HT (arXiv 2311.01420) compares averages of the training's iterates (SWA type), the interpolation of source and
fine-tuned weights (WiSE-FT, arXiv 2109.01903) and the ensemble of both models' predictions. Averages of weights include
the BN statistics, which are floating-point tensors; integer buffers (counters) are copied. The update rules of SWA and
EMA are torch's (``torch.optim.swa_utils``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn
from vfm_core.errors import UserError

from ft_calibrate.classifier import logits_of

__all__ = ["IterateAverage", "RunningMean", "SourceEnsemble", "average_weights", "interpolate", "interpolate_states"]

State = Mapping[str, Tensor]


class RunningMean:
    """Weighted mean of state dicts that come one after another: one sum in float64, never all of them.

    Examples
    --------
    >>> mean = RunningMean()
    >>> mean.add({"w": torch.tensor([1.0])}, 0.5)
    >>> mean.add({"w": torch.tensor([3.0])}, 0.5)
    >>> mean.result()["w"].item()
    2.0
    """

    def __init__(self) -> None:
        self._sum: dict[str, Tensor] = {}
        self._like: dict[str, Tensor] = {}  # without storage, but for the integer tensors, which are kept
        self._total = 0.0

    @torch.no_grad()
    def add(self, state: State, weight: float) -> None:
        """Add a state with its share of the mean; the shares must sum to 1 in the end.

        Raises
        ------
        UserError
            Names or shapes that differ from the first state's; a share that is negative or not finite.
        """
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError("averaging weight out of range", given=weight, remedy="give weights from 0 to 1")
        if not self._like:
            self._like = {
                k: v.detach().to("meta") if v.is_floating_point() else v.detach().clone() for k, v in state.items()
            }
        _same_tensors(self._like, state)
        for name, value in state.items():
            if value.is_floating_point():
                part = value.detach().to(torch.float64) * weight
                self._sum[name] = self._sum[name].add_(part) if name in self._sum else part
        self._total += weight

    def result(self) -> dict[str, Tensor]:
        """The mean, in the tensors' own types; integer tensors are those of the first state.

        Raises
        ------
        UserError
            Nothing was added, or the shares do not sum to 1.
        """
        if not self._like or abs(self._total - 1) > 1e-6:
            remedy = "give one share per state"
            raise UserError("averaging weights must sum to 1", given=f"{self._total:g}", remedy=remedy)
        return {k: self._sum[k].to(v.dtype) if k in self._sum else v for k, v in self._like.items()}


def average_weights(states: Iterable[State], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Mean of state dicts: floating-point tensors averaged (BN statistics too), integer tensors copied from the first.

    Parameters
    ----------
    states : iterable of mapping
        State dicts of the same model; a generator is read one at a time.
    weights : sequence of float, optional
        Shares that sum to 1; equal ones by default, for which ``states`` must have a length.

    Raises
    ------
    UserError
        No state, states of different models, or shares that do not sum to 1.
    """
    if weights is None:
        states = list(states)
        weights = [1 / len(states)] * len(states) if states else []
    mean = RunningMean()
    for state, weight in zip(states, weights, strict=True):
        mean.add(state, weight)
    return mean.result()


def interpolate_states(a: State, b: State, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) a + alpha b for every floating-point tensor; integer tensors come from b, and from a at alpha = 0.

    The ends are exact: alpha 0 gives a and alpha 1 gives b, bit for bit.

    Raises
    ------
    UserError
        alpha outside 0..1, or state dicts of different models.
    """
    if not 0 <= alpha <= 1:
        raise UserError("interpolation out of range", given=alpha, remedy="give alpha from 0 (first) to 1 (second)")
    _same_tensors(a, b)
    if alpha in (0, 1):
        return {k: v.detach().clone() for k, v in (b if alpha else a).items()}
    return {
        k: ((1 - alpha) * a[k].detach() + alpha * v.detach()) if v.is_floating_point() else v.detach().clone()
        for k, v in b.items()
    }


def interpolate(model_a: nn.Module, model_b: nn.Module, alpha: float) -> nn.Module:
    """A copy of ``model_b`` with the weights (1 - alpha) a + alpha b, BN statistics included (WiSE-FT).

    Parameters
    ----------
    model_a, model_b : nn.Module
        Source and fine-tuned model of the same architecture; neither is changed.
    alpha : float
        0..1; the ends are exact.

    Raises
    ------
    UserError
        alpha out of range, or models of different architecture.
    """
    state = interpolate_states(model_a.state_dict(), model_b.state_dict(), alpha)
    made = copy.deepcopy(model_b)
    made.load_state_dict(state)
    return made


def _same_tensors(a: State, b: State) -> None:
    wrong = sorted({*a} ^ {*b}) or sorted(k for k in a if a[k].shape != b[k].shape)
    if wrong:
        given = f"{wrong[0]}{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}"
        remedy = "average models of the same architecture and number of classes"
        raise UserError("weights of different models", given=given, remedy=remedy)


class IterateAverage(nn.Module):
    """Average of a model's trained parameters along the training, as buffers, so that checkpoints carry it.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require a gradient are averaged.
    kind : {"swa", "ema"}
        Equal weights once per epoch, or an exponential moving average once per step.
    decay : float
        Of ``ema``: weight of the past, 0..1; at most (1 + n) / (10 + n) after n updates.
    start : float
        Of ``swa``: share of the training before the first iterate counts.
    epochs : int
        Length of the training, for ``start``.
    """

    averaged: Tensor
    pending: Tensor
    finished_epochs: Tensor

    def __init__(
        self, model: nn.Module, kind: str, *, decay: float = 0.99, start: float = 0.5, epochs: int = 1
    ) -> None:
        super().__init__()
        self.kind, self.decay, self.start, self.epochs = kind, decay, start, epochs
        self._count = 0
        for i, p in enumerate(self._trained(model)):
            self.register_buffer(f"mean_{i}", p.detach().clone())
            self._count = i + 1
        self.register_buffer("averaged", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pending", torch.zeros((), dtype=torch.int64))
        self.register_buffer("finished_epochs", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def _trained(model: nn.Module) -> list[Tensor]:
        return [p for p in model.parameters() if p.requires_grad]

    def _means(self) -> list[Tensor]:
        return [getattr(self, f"mean_{i}") for i in range(self._count)]

    def before_step(self, model: nn.Module) -> None:
        """Take in the weights of the step before; called at the start of each training step."""
        if self.kind == "ema":
            if bool(self.pending):
                self._update(model)
            self.pending.fill_(1)

    def after_epoch(self, model: nn.Module) -> None:
        """Take in the weights after the last step of an epoch (or of a round of averaging)."""
        self.finished_epochs += 1
        late = int(self.finished_epochs) > self.start * self.epochs or int(self.finished_epochs) == self.epochs
        if self.kind == "ema" or late:
            self._update(model)
        self.pending.fill_(0)

    @torch.no_grad()
    def _update(self, model: nn.Module) -> None:
        now = [p.detach() for p in self._trained(model)]
        if int(self.averaged) == 0:
            for mean, p in zip(self._means(), now, strict=True):
                mean.copy_(p)
        else:
            n = int(self.averaged)
            decay = min(self.decay, (1 + n) / (10 + n))  # a short training must not stay at its first steps
            rule = get_swa_multi_avg_fn() if self.kind == "swa" else get_ema_multi_avg_fn(decay)
            rule(self._means(), now, self.averaged)
        self.averaged += 1

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Give the model the averaged weights; its BN statistics must then be estimated again."""
        if int(self.averaged) > 0:
            for p, mean in zip(self._trained(model), self._means(), strict=True):
                p.copy_(mean)


class SourceEnsemble(nn.Module):
    """Mean of the predictions of source and fine-tuned model.

    Parameters
    ----------
    source, tuned : nn.Module
        Two classifiers with the same K classes.
    mean : {"softmax", "logit"}
        ``softmax``: log of (softmax z_O + softmax z) / 2; ``logit``: (z_O + z) / 2.

    Notes
    -----
    ``forward`` gives (N, K): log-probabilities or logits. Both serve for accuracy and for gamma, which row constants do
    not move.
    """

    def __init__(self, source: nn.Module, tuned: nn.Module, mean: str = "softmax") -> None:
        super().__init__()
        self.source, self.tuned, self.mean = source, tuned, mean

    def forward(self, x: Tensor) -> Tensor:
        """Inputs of either model -> (N, K)."""
        a, b = logits_of(self.source(x)).float(), logits_of(self.tuned(x)).float()
        if self.mean == "logit":
            return (a + b) / 2
        return torch.logaddexp(a.log_softmax(1), b.log_softmax(1)) - math.log(2)
