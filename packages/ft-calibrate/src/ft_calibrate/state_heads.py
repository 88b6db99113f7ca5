"""Finding the head in a state dict, by name and by shape (ours)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from vfm_core.errors import UserError

__all__ = ["head_keys", "state_dicts"]

# Training codes keep the weights, and often their moving average, under one of these.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "ema")
_NAMES = ("fc", "classifier", "heads.head", "head.fc", "head", "last_linear", "logits", "linear")
_NOT_HEADS = re.compile(r"lora_|original_module|AuxLogits|aux1|aux2|aux_classifier")
Shapes = Mapping[str, tuple[int, ...]]


def state_dicts(stored: Any) -> Iterator[dict[str, Tensor]]:
    """Yield the state dicts in what a checkpoint file holds: the dict itself, or those under the usual names."""
    inner = [stored[key] for key in _WRAPPERS if isinstance(stored.get(key), Mapping)]
    inner = [part for part in inner if any(isinstance(v, Tensor) for v in part.values())]
    yield from inner or [stored]


def head_keys(shapes: Shapes, num_classes: int | None, head: str | None, where: str | Path) -> tuple[str, str | None]:
    """Names of the head's weight and bias.

    Parameters
    ----------
    shapes : mapping
        Shape of each tensor.
    num_classes : int, optional
        K, where it is known.
    head : str, optional
        Dotted name of the layer, or of a container that ends with it. Without it: a usual name of the right shape, else
        the only layer with K rows and K biases.
    where : str or Path
        For messages.

    Returns
    -------
    weight : str
    bias : str or None
        None where the layer has none.

    Raises
    ------
    UserError
        No such layer, or several and none chosen.
    """
    layers = [k.removesuffix(".weight") for k, s in shapes.items() if k.endswith(".weight") and _is_layer(s)]
    layers = [name for name in layers if not _NOT_HEADS.search(name)]
    plain = {_plain(name): name for name in layers}
    if head is not None:
        wanted = _plain(head)
        inside = [name for short, name in plain.items() if short.startswith(f"{wanted}.")]
        found = plain.get(wanted, inside[-1] if inside else None)
        if found is None:
            remedy = f"layers there: {', '.join(layers[-6:])}"
            raise UserError("no such layer in the checkpoint", where=where, given=head, remedy=remedy)
        rows = shapes[f"{found}.weight"][0]
        if num_classes is not None and rows != num_classes:
            given = f"{found} has {rows} rows for {num_classes} classes"
            raise UserError("the number of classes differs", where=where, given=given, remedy="check --head")
        return _pair(shapes, found)
    fitting = [name for name in layers if num_classes in (None, shapes[f"{name}.weight"][0])]
    if any(_plain(name) in ("head_dist", "distillation_classifier") for name in fitting):
        raise UserError("the model averages two heads", where=where, remedy="calibrate its logits (ft-calibrate apply)")
    for usual in _NAMES:
        chosen = [n for n in fitting if _plain(n) == usual or re.fullmatch(rf"{re.escape(usual)}\.\d+", _plain(n))]
        if chosen:
            return _pair(shapes, chosen[-1])
    biased = [name for name in fitting if shapes.get(f"{name}.bias") == shapes[f"{name}.weight"][:1]]
    for group in (biased, fitting):
        if len(group) == 1 and num_classes is not None:
            return _pair(shapes, group[0])
    rows_text = "" if num_classes is None else f" with {num_classes} rows"
    given = f"{len(fitting)} layers{rows_text}" + (f", such as {', '.join(fitting[-4:])}" if fitting else "")
    raise UserError("cannot tell the head", where=where, given=given, remedy="name it with --head")


def _is_layer(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))


def _plain(name: str) -> str:
    """Without the prefixes of data-parallel training and of wrappers."""
    for prefix in ("module.", "model.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name


def _pair(shapes: Shapes, layer: str) -> tuple[str, str | None]:
    bias = f"{layer}.bias"
    return f"{layer}.weight", bias if bias in shapes else None
