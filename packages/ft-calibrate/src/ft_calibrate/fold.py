"""Fold a calibration into a classifier's head, so that inference costs nothing more.

FTC (arXiv 2409.16223) predicts argmax_c z_c + gamma * 1[c in U]. Since z_c = w_c . f(x) + b_c, the same logits come
from a head whose bias is ``b_c + gamma`` on U; a factor and a shift per class are linear as well:
``s_c z_c + t_c = (s_c w_c) . f(x) + (s_c b_c + t_c)``. Folding, and refusing where it cannot be represented, is ours.
"""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from vfm_core.errors import UserError

from ft_calibrate.classifier import Classifier, load_classifier, logits_of
from ft_calibrate.head import base_layer, find_head, head_classes
from ft_calibrate.head_change import SHIP, TOLERANCE, FoldRecord, HeadChange, head_change, largest_difference
from ft_calibrate.record import Calibration
from ft_calibrate.text_head import TextHead

__all__ = ["FoldRecord", "HeadChange", "fold", "fold_into_head", "head_change", "largest_difference", "random_inputs"]

log = logging.getLogger(__name__)


def fold_into_head(
    model: nn.Module | Classifier | str | os.PathLike[str],
    calibration: float | Calibration | str | os.PathLike[str],
    absent: Any = None,
    head: str | None = None,
    *,
    inputs: Tensor | None = None,
) -> nn.Module:
    """Copy a classifier with the calibration in its head.

    Parameters
    ----------
    model : torch.nn.Module, Classifier, path or spec
        A path or spec is loaded with `load_classifier` first. To change a checkpoint file as it is, see `export_file`.
    calibration : float, Calibration or path
        Gamma, or a calibration record.
    absent : optional
        With a number: which classes receive it, as names, column numbers or a mask (K,).
    head : str, optional
        Dotted name of the head where it is not found by itself.
    inputs : Tensor, optional
        A batch of the model's inputs (N, ...), on which to try out the copy. Needed for a module of one's own, whose
        input size is not known; without it a warning says that nothing was checked.

    Returns
    -------
    torch.nn.Module
        A deep copy; the given model is never changed. Of a `Classifier` or a path, its module.

    Raises
    ------
    UserError
        A head that cannot hold the change, a calibration of other classes, or a checkpoint that holds one already.
        The copy is tried out on `inputs`, or on random ones where the input size is known: a model that works on the
        head's output (a factor, a softmax) is refused.

    Examples
    --------
    >>> model = nn.Linear(4, 3)
    >>> folded = fold_into_head(model, 2.0, absent=[2])
    >>> bool(torch.allclose(folded.bias - model.bias, torch.tensor([0.0, 0.0, 2.0])))
    True
    """
    if isinstance(model, Classifier):
        classifier = model if head is None else replace(model, head_name=find_head(model.model, name=head)[0])
    else:
        classifier = load_classifier(model, head=head)
    change = head_change(calibration, classifier.num_classes, classifier.class_names, absent)
    if inputs is not None and (not isinstance(inputs, Tensor) or not len(inputs)):
        given = type(inputs).__name__ if not isinstance(inputs, Tensor) else tuple(inputs.shape)
        raise UserError("not a batch of inputs", where="inputs", given=given, remedy="give a tensor (N, ...)")
    probe = random_inputs(classifier) if inputs is None else inputs.to(classifier.device)
    if probe is None:
        log.warning(
            "%s: not checked that the model returns the head's output: give inputs=", type(classifier.model).__name__
        )
    return fold(classifier, change, probe)[0]


def fold(classifier: Classifier, change: HeadChange, probe: Tensor | None = None) -> tuple[nn.Module, FoldRecord]:
    """Copy a classifier's model and change its head.

    Parameters
    ----------
    classifier : Classifier
        Left as it is.
    change : HeadChange
        From `head_change`.
    probe : Tensor, optional
        (N, ...) inputs on which to compare the copy with the original.

    Returns
    -------
    model : torch.nn.Module
    record : FoldRecord

    Raises
    ------
    UserError
        A head that cannot hold the change; or, with `probe`, logits that do not move by it, because the model works on
        the head's output.
    """
    if head_classes(classifier.head) != len(change.bias):
        given = f"{len(change.bias)} for {head_classes(classifier.head)} logits"
        raise UserError("the change is of another number of classes", given=given)
    if classifier.folded is not None:
        remedy = "fold into the original model"
        given = classifier.folded
        raise UserError("a calibration is folded in already", where=classifier.spec or None, given=given, remedy=remedy)
    if any(kind.__name__ == "SourceEnsemble" for kind in type(classifier.model).__mro__):
        remedy = f"fold into both models before they are averaged, or {SHIP}"
        raise UserError("a source ensemble averages two models", given=classifier.spec or None, remedy=remedy)
    model = copy.deepcopy(classifier.model)
    outer = model.get_submodule(classifier.head_name)
    layer = base_layer(outer)
    if layer is not outer and change.scales:
        raise UserError(
            "an adapted head cannot be scaled", given=type(outer).__name__, remedy=f"merge it first, or {SHIP}"
        )
    changed, rounding, notes = _change_layer(layer, change, model)
    notes = (*change.notes, *notes)
    dtype = next((str(t.dtype).removeprefix("torch.") for t in _own_tensors(layer)), "quantised")
    where = f"{classifier.head_name}." if classifier.head_name else ""
    record = FoldRecord(
        head=classifier.head_name,
        changed=tuple(where + name for name in changed),
        gamma=change.gamma,
        num_classes=len(change.bias),
        moved=len(change.columns),
        source=change.source,
        dtype=dtype,
        rounding=rounding,
        notes=notes,
        effect=change.effect,
    )
    if probe is not None:
        worst, size = _compare(classifier.model, model, change, probe)
        kind = probe.dtype if probe.is_floating_point() else torch.float32
        if worst > max(10 * TOLERANCE, 4 * rounding, _step(kind, size)):
            given = f"logits differ by {worst:.3g} from logits + gamma"
            remedy = f"the model works on the head's output: name the last layer with --head, or {SHIP}"
            raise UserError(
                "the calibration cannot be folded into this layer", where=record.head, given=given, remedy=remedy
            )
        record = replace(record, max_abs_diff=worst)
    return model, record


def _step(dtype: torch.dtype, size: float) -> float:
    """How far logits up to this size may be apart by the rounding of this dtype alone."""
    return (4 * size if dtype.itemsize >= 4 else max(100.0, size)) * torch.finfo(dtype).eps


def _own_tensors(layer: nn.Module) -> list[Tensor]:
    return [t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)) if t.ndim]


def _change_layer(layer: nn.Module, change: HeadChange, model: nn.Module) -> tuple[list[str], float, tuple[str, ...]]:
    """Change a layer in place; returns the names of its changed tensors, the rounding error, and notes."""
    if callable(getattr(layer, "set_weight_bias", None)):
        return _change_quantised(layer, change)
    if parametrize.is_parametrized(layer, "bias") or (change.scales and parametrize.is_parametrized(layer)):
        remedy = f"remove the parametrization (torch.nn.utils.parametrize.remove_parametrizations), or {SHIP}"
        raise UserError(
            "the head's tensors are computed by a parametrization", given=type(layer).__name__, remedy=remedy
        )
    normalises = any(kind.__name__ == "CosineHead" for kind in type(layer).__mro__)
    if change.scales and (normalises or any(hasattr(layer, n) for n in ("weight_g", "weight_orig"))):
        raise UserError(
            "this head normalises its weight: factors have no place", given=type(layer).__name__, remedy=SHIP
        )
    weight, old = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    notes: list[str] = []
    bias, rounding = change.new_bias(old if isinstance(old, Tensor) else None, weight)
    if rounding > TOLERANCE:
        note = f"{bias.dtype} rounds the new bias by up to {rounding:.2g}"
        notes.append(note.replace("torch.", ""))
        log.warning("%s", notes[-1])
    tensors = {"bias": bias, **({"weight": change.new_weight(weight)} if change.scales else {})}
    for name, tensor in tensors.items():
        current = getattr(layer, name, None)
        shared = isinstance(current, Tensor) and _users(model, current) > 1
        if shared:
            notes.append(f"{name} was shared with another layer and is now the head's own")
        _put(layer, name, tensor, like=weight)
    if old is None:
        kind = "buffer" if isinstance(layer, TextHead) else "parameter"
        notes.append(f"the head had no bias: a {kind} was made")
    return list(tensors), rounding, tuple(notes)


def _put(layer: nn.Module, name: str, tensor: Tensor, like: Tensor) -> None:
    """Give a layer a tensor of its own: never written into the old one, which other layers may use."""
    if name in layer._buffers:
        layer._buffers[name] = tensor
        return
    if name == "bias" and not hasattr(layer, "bias"):
        remedy = f"give a linear layer or 1x1 convolution, or {SHIP}"
        raise UserError("the head has no place for a bias", given=type(layer).__name__, remedy=remedy)
    setattr(layer, name, nn.Parameter(tensor, requires_grad=like.requires_grad))


def _users(model: nn.Module, tensor: Tensor) -> int:
    """How many places of a model hold this tensor, or a view on its memory."""
    held = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    start = tensor.untyped_storage().data_ptr()
    return sum(t is tensor or (start != 0 and t.untyped_storage().data_ptr() == start) for t in held)


def _change_quantised(layer: Any, change: HeadChange) -> tuple[list[str], float, tuple[str, ...]]:
    if change.scales or not np.isfinite(change.bias).all():
        raise UserError("a quantised head takes a bias only", given=type(layer).__name__, remedy=SHIP)
    weight, old = layer._packed_params._weight_bias()
    bias, rounding = change.new_bias(old, torch.zeros(1) if old is None else old)
    layer.set_weight_bias(weight, bias)
    return ["bias"], rounding, ("the quantised weight is as it was",)


# ---------------------------------------------------------------------- checking
def random_inputs(classifier: Classifier, count: int = 2) -> Tensor | None:
    """Random inputs of the model's size, on its device; None where the size is not known."""
    generator = torch.Generator().manual_seed(0)
    if not classifier.head_name:
        shape: tuple[int, ...] = (count, classifier.feature_dim)
    elif classifier.preprocess is not None:
        shape = (count, 3, *classifier.preprocess.size)
    else:
        return None
    kind = next((p.dtype for p in classifier.model.parameters()), torch.float32)
    return torch.randn(shape, generator=generator).to(classifier.device, kind)


def _compare(before: nn.Module, after: nn.Module, change: HeadChange, probe: Tensor) -> tuple[float, float]:
    """Largest difference from logits + gamma, and the largest logit."""
    from ft_calibrate.predict import evaluating

    with evaluating(before), evaluating(after), torch.inference_mode():
        z, got = logits_of(before(probe)), logits_of(after(probe))
    z = z.double().cpu()
    return largest_difference(got.double().cpu(), change.apply(z)), float(z.abs().max())
