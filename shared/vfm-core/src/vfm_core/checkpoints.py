"""Training checkpoints: what was trained, and all it takes to go on, in one file that is whole or absent."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfm_core.errors import UserError
from vfm_core.files import atomic_write

__all__ = ["Checkpoint", "frozen_parts", "load_checkpoint", "put_weights", "save_checkpoint", "trained_weights"]

_FORMAT = 1


@dataclass
class Checkpoint:
    """State of a training run after an epoch.

    Attributes
    ----------
    config : dict
        Settings of the run.
    epoch : int
        Epochs done.
    finished : bool
        Nothing is left to do.
    weights : dict of Tensor
        See :func:`trained_weights`.
    optimizer, scheduler, scaler : dict
        Their states; scaler only for fp16.
    records : list of dict
        One per epoch.
    best : tuple or None
        Value, epoch and weights of the best epoch.
    order : Tensor or None
        State of a DataLoader's own generator. All other random streams follow from seed and epoch.
    """

    config: dict[str, Any]
    epoch: int
    finished: bool
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    records: list[dict[str, float]]
    best: tuple[float, int, dict[str, Tensor]] | None
    order: Tensor | None


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; until it is complete and on disk, the previous one stays.

    Raises
    ------
    UserError
        The folder cannot be written or is full.
    """
    fields = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}
    try:
        with atomic_write(path) as draft:
            torch.save({"format": _FORMAT, **fields}, draft)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        remedy = "free space or choose another folder; the previous checkpoint is intact"
        raise UserError("cannot write the checkpoint", where=path, given=reason, remedy=remedy) from error


def load_checkpoint(path: Path, expected: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read a checkpoint.

    Parameters
    ----------
    path : Path
        The file; read without executing anything stored in it.
    expected : mapping, optional
        Settings that it must have been written with.

    Raises
    ------
    UserError
        Damaged, of another kind, with weights that are NaN, or of other settings (which are named).
    """
    remedy = "delete it to train from the start"
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        if stored.pop("format") != _FORMAT:
            raise KeyError("format")
        checkpoint = Checkpoint(**stored)
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError("not a readable checkpoint", where=path, given=type(error).__name__, remedy=remedy) from error
    if broken := next((name for name, w in checkpoint.weights.items() if bool(torch.isnan(w).any())), None):
        raise UserError("weights are NaN", where=path, given=broken, remedy=remedy)
    if expected is not None and checkpoint.config != dict(expected):
        keys = sorted({*checkpoint.config, *expected})
        changes = [
            f"{k} {checkpoint.config.get(k)!r} -> {expected.get(k)!r}"
            for k in keys
            if checkpoint.config.get(k) != expected.get(k)
        ]
        given = ", ".join(changes)
        raise UserError(
            "settings differ from the checkpoint's", where=path, given=given, remedy=f"restore them, or {remedy}"
        )
    return checkpoint


def frozen_parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest submodules that have parameters, none of which requires a gradient."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        yield module
    else:
        for child in module.children():
            yield from frozen_parts(child)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes: parameters that require a gradient, and buffers outside frozen parts.

    Returns
    -------
    dict of Tensor
        By name; the tensors are the model's own, not copies.
    """
    frozen = {id(b) for part in frozen_parts(model) for b in part.buffers()}
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return found | {name: b for name, b in model.named_buffers() if id(b) not in frozen}


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy stored weights into the model.

    Raises
    ------
    UserError
        Names or shapes that do not fit; nothing is copied then.
    """
    own = trained_weights(model)
    for name in sorted({*own, *weights}):
        have, want = (tuple(t[name].shape) if name in t else "absent" for t in (weights, own))
        if have != want:
            given = f"{name} is {have} there and {want} here"
            remedy = "use the model that it was written for"
            raise UserError("weights of another model", where=where, given=given, remedy=remedy)
    for name, tensor in own.items():
        tensor.copy_(weights[name])
