"""Optimisers and learning-rate schedules of the training loop, by name."""

from __future__ import annotations

import math
from typing import Any

import torch

from vfm_core.errors import UserError
from vfm_core.train_config import TrainConfig

__all__ = ["learning_rate_factor", "make_optimizer", "make_scheduler"]


def make_optimizer(parameters: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimiser over parameter groups, which may name their own ``lr`` and ``weight_decay``.

    ``sgd``, ``adam`` and ``adamw`` are torch's. Other names are timm's; a rule without momentum ignores it.

    Raises
    ------
    UserError
        A rule of timm that needs more than it is given, or a library that is absent.
    """
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
    if config.optimizer in ("adam", "adamw"):
        rule = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return rule(parameters, config.lr, weight_decay=config.weight_decay)
    from timm.optim import create_optimizer_v2

    options = {"opt": config.optimizer, "lr": config.lr, "weight_decay": config.weight_decay}
    # timm's own switch for parameters without decay is off: groups say what they want.
    try:
        return create_optimizer_v2(parameters, **options, momentum=config.momentum, filter_bias_and_bn=False)
    except (ImportError, AssertionError, ValueError, TypeError, RuntimeError) as error:
        remedy = "choose another, such as sgd, adam, adabelief or rmsprop"
        raise UserError(f"optimizer {config.optimizer} cannot be made", given=error, remedy=remedy) from error


def learning_rate_factor(config: TrainConfig, epoch: float, step: float) -> float:
    """Return the learning rate as a fraction of its peak, for ``cosine`` and ``constant``.

    Parameters
    ----------
    config : TrainConfig
        Settings.
    epoch : float
        Time since the start, in epochs.
    step : float
        Length of one update, in epochs: the first one of a warm-up already moves.

    Returns
    -------
    float
        In [0, 1]: linear up to 1 over the warm-up, then constant, or half a cosine down to ``lr_min``.
    """
    if epoch < config.warmup_epochs:
        return min((epoch + step) / config.warmup_epochs, 1.0)
    if config.schedule == "constant":
        return 1.0
    part = min((epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs), 1.0)
    low = config.lr_min / config.lr
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * part))


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int | None
) -> torch.optim.lr_scheduler.LRScheduler:
    """Build the schedule.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Each of its groups follows the same course, scaled by its own learning rate.
    config : TrainConfig
        Settings.
    steps : int or None
        Optimiser steps per epoch; None when unknown, then the schedule moves once per epoch.

    Raises
    ------
    UserError
        ``onecycle`` without a known number of steps.
    """
    if config.schedule == "onecycle":
        if steps is None:
            remedy = "give batches that have a length, or use schedule='cosine'"
            raise UserError("onecycle needs to know the number of batches", remedy=remedy)
        rise = config.warmup_epochs / config.epochs if config.warmup_epochs else 0.3
        peaks = [float(group["lr"]) for group in optimizer.param_groups]
        total = max(config.epochs * steps, 2)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=total, pct_start=rise)
    per_epoch = steps or 1
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(config, step / per_epoch, 1 / per_epoch)
    )
