"""Settings of a training run, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vfm_core.errors import UserError, unknown_name

__all__ = ["TrainConfig"]

_OWN_RULES = ("adamw", "adam", "sgd")  # torch's, known without importing timm


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Parameters
    ----------
    epochs : int
        Passes over the data.
    lr : float
        Peak learning rate.
    optimizer : str
        Update rule: ``adamw``, ``adam``, ``sgd``, or any other name of ``timm.optim.list_optimizers()`` (``adabelief``,
        ``adadelta``, ``adagrad``, ``rmsprop`` ...).
    weight_decay, momentum : float
        Momentum is for sgd and for those other rules that know it.
    nesterov : bool
        Look ahead along the momentum; sgd with momentum above 0 only.
    warmup_epochs : float
        Linear rise of the learning rate; for ``onecycle`` the rising part of the cycle (30% of it when 0).
    lr_min : float
        Where ``cosine`` ends.
    schedule : {"cosine", "onecycle", "constant"}
        Course of the learning rate, updated at every optimiser step where the number of batches is known.
    batch_size : int
        Rows per batch and process, for the functions that make batches.
    grad_clip : float, optional
        Greatest norm of the gradient.
    grad_accum : int
        Batches per optimiser step; their rows weigh the same, as in one large batch.
    mixed_precision : {"no", "bf16", "fp16"}
        Autocast of the forward pass; the loss is always computed in float32. fp16 needs a GPU.
    seed : int
        Of order, dropout and augmentation.

    Raises
    ------
    UserError
        A value out of range.
    """

    epochs: int = 20
    lr: float = 1e-3
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.9
    warmup_epochs: float = 0.0
    lr_min: float = 0.0
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    batch_size: int = 64
    grad_clip: float | None = None
    grad_accum: int = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in _OWN_RULES and self.optimizer not in (known := _timm_rules()):
            raise unknown_name("optimizer", str(self.optimizer), known, where="training settings")
        choices = {
            "schedule": ("cosine", "onecycle", "constant"),
            "mixed_precision": ("no", "bf16", "fp16"),
        }
        for name, options in choices.items():
            if getattr(self, name) not in options:
                raise unknown_name(name, str(getattr(self, name)), options, where="training settings")
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum > 0):
            given = f"optimizer {self.optimizer}, momentum {self.momentum}"
            remedy = "use optimizer='sgd' with momentum above 0, or nesterov=False"
            raise UserError("nesterov needs sgd with momentum", where="training settings", given=given, remedy=remedy)
        rules = {
            "epochs": self.epochs >= 1,
            "lr": 0 < self.lr < math.inf,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "momentum": 0 <= self.momentum < 1,
            "warmup_epochs": 0 <= self.warmup_epochs < self.epochs,
            "lr_min": 0 <= self.lr_min <= self.lr,
            "batch_size": self.batch_size >= 1,
            "grad_clip": self.grad_clip is None or self.grad_clip > 0,
            "grad_accum": self.grad_accum >= 1,
        }
        for name, holds in rules.items():
            if not holds:
                raise UserError(f"{name} out of range", where="training settings", given=getattr(self, name))


def _timm_rules() -> list[str]:
    from timm.optim import list_optimizers

    # The one wraps another rule, the other needs second derivatives, which the loop does not compute.
    return [name for name in list_optimizers() if name not in ("lookahead", "adahessian")]
