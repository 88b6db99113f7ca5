"""What a training borrows and gives back: module modes, random state, and accelerate's process-wide settings."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import nn

from vfm_core.checkpoints import frozen_parts
from vfm_core.errors import UserError
from vfm_core.train_config import TrainConfig

__all__ = ["forked_rng", "lent_accelerator", "modes_kept", "seed_device", "stream", "train_mode"]


def train_mode(model: nn.Module) -> None:
    """Put the model in train mode, except for its frozen parts.

    Dropout, running batch statistics and randomly rescaled position tables of a frozen backbone stay off.
    """
    model.train()
    for part in frozen_parts(model):
        part.eval()


def stream(*parts: object) -> int:
    """Return a seed for one purpose; neighbouring seeds and epochs share nothing."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the generators that layers draw from on this device; to be used inside :func:`forked_rng`."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def forked_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context that puts the random state of the CPU and of ``device`` back at its end."""
    return torch.random.fork_rng([device.index or 0] if device.type == "cuda" else [])


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back in its mode at the end, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def lent_accelerator(config: TrainConfig, device: torch.device) -> Iterator[Accelerator]:
    """Yield an accelerator for these settings.

    In one process, accelerate's process-wide settings are put back at the end, so that trainings of different precision
    or device can follow each other and the caller's own use of accelerate is not disturbed.

    Raises
    ------
    UserError
        fp16 without a GPU, or a distributed mode other than data parallel.
    """
    options: dict[str, Any] = {
        "mixed_precision": config.mixed_precision,
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=1),  # the loop accumulates by itself
    }
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        AcceleratorState._reset_state()  # settings of an earlier training; the process group stays
        accelerator = Accelerator(**options)
        if accelerator.distributed_type not in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
            given = str(accelerator.distributed_type)
            raise UserError("distributed mode not supported", given=given, remedy="launch with multi-GPU or multi-CPU")
        yield accelerator
        return
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("fp16 training needs a GPU", given="cpu", remedy="use mixed_precision='bf16' or 'no'")
    # accelerate keeps its settings process-wide and refuses a second, different training: lend it a clean slate.
    states = [AcceleratorState, PartialState, GradientState]
    kept = [dict(state._shared_state) for state in states]
    try:
        for state in states:
            state._shared_state.clear()
        yield Accelerator(cpu=device.type == "cpu", **options)
    finally:
        for state, values in zip(states, kept, strict=True):
            state._shared_state.clear()
            state._shared_state.update(values)
