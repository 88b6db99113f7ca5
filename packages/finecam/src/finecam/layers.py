"""Where a class-activation map is read: finding a layer, listing the candidates, leaving the model as it was.

Default layers follow Finer-CAM (arXiv 2501.11309): the last block's first LayerNorm of a transformer, because the last
block's output of a CLS-pooled ViT has zero gradient at its patch tokens; the last spatial map of a CNN.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vfm_core.errors import UserError, unknown_name

from finecam.layouts import find_layout

_FIRST_NORM = ("norm1", "ln_1", "layernorm_before", "layer_norm1")
_IMAGE_TOWER = ("visual", "vision_model", "vision_tower", "image_encoder")


@dataclass(frozen=True)
class Site:
    """A layer of a model: dotted name, module, and which of its calls within one forward (None: it has only one)."""

    name: str
    module: nn.Module
    call: int | None = None

    @property
    def label(self) -> str:
        """Name as the user writes it, ``name`` or ``name#call``."""
        return self.name if self.call is None else f"{self.name}#{self.call}"


# --- finding layers ------------------------------------------------------------------------


def find_layer(model: nn.Module, layer: nn.Module | str | None = None, x: Tensor | None = None) -> Site:
    """Find the layer that a map is read from.

    Parameters
    ----------
    model
        Any module.
    layer
        A submodule, its name (``"blocks.11.norm1"``, ``"blocks[-1].norm1"``, ``"relu#2"`` for the third call of a
        module that runs several times), or None for the default of the architecture.
    x
        (B, 3, H, W) input, only used when the default has to be found by running the model on its first image.

    Returns
    -------
    Site
        The layer.

    Raises
    ------
    UserError
        Unknown name, module of another model, or no default found.
    """
    if layer is None:
        name = default_name(model)
        if name is None and x is not None:
            name = last_spatial(model, x)
        if name is None:
            raise UserError(
                f"no default layer known for {type(model).__name__}",
                remedy="give layer=NAME; `finecam layers MODEL` or list_layers(model, x) shows the candidates",
            )
        return Site(name, model.get_submodule(name))
    if isinstance(layer, nn.Module):
        for name, module in model.named_modules():
            if module is layer:
                return Site(name, module)
        raise UserError("layer is not part of the model", where="layer", given=type(layer).__name__)
    if not isinstance(layer, str):
        raise UserError("layer must be a module or a name", where="layer", given=repr(layer))
    name, _, call = layer.partition("#")
    if call and not call.isdigit():
        raise UserError("call index must be a number", where="layer", given=layer, remedy="write NAME#0, NAME#1, ...")
    name = _plain_name(model, name)
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules or not name:
        raise unknown_name("layer", name, (n for n in modules if n), where=type(model).__name__)
    return Site(name, modules[name], int(call) if call else None)


def _plain_name(model: nn.Module, name: str) -> str:
    """``blocks[-1].norm1`` -> ``blocks.11.norm1``."""
    plain = ""
    for part in re.sub(r"\[(-?\d+)\]", r".\1", name).split("."):
        if re.fullmatch(r"-\d+", part):
            try:
                part = str(len(model.get_submodule(plain)) + int(part))  # type: ignore[arg-type]
            except (AttributeError, TypeError):
                return name
        plain = f"{plain}.{part}" if plain else part
    return plain


def default_name(model: nn.Module) -> str | None:
    """Default layer by the naming habits of timm, torchvision, open_clip and transformers; None if none fits."""
    modules = dict(model.named_modules())
    tower = next((n for n in modules if n.rpartition(".")[2] in _IMAGE_TOWER), None)
    if tower is not None:
        modules = {n: m for n, m in modules.items() if n == tower or n.startswith(f"{tower}.")}
    norms = [n for n, m in modules.items() if _is_first_norm(n) and _normalises_tokens(m)]
    if norms:
        swins = [m for m in modules.values() if type(m).__module__ == "torchvision.models.swin_transformer"]
        # torchvision's Swin blocks give background-heavy maps at norm1 (frgfm/torch-cam#412).
        return norms[-1][: -len("norm1")] + "norm2" if swins else norms[-1]
    stages = [
        n
        for n, m in modules.items()
        if n.rpartition(".")[2] in ("layer4", "stages", "features") and isinstance(m, (nn.Sequential, nn.ModuleList))
    ]
    if stages:
        children = list(modules[stages[-1]].named_children())
        return f"{stages[-1]}.{children[-1][0]}" if children else stages[-1]
    return None


def _is_first_norm(name: str) -> bool:
    """``blocks.11.norm1``, ``layers.encoder_layer_11.ln_1``, but not ``stem.norm1``: it belongs to a numbered block."""
    block, _, last = name.rpartition(".")
    return last in _FIRST_NORM and block[-1:].isdigit()


def _normalises_tokens(module: nn.Module) -> bool:
    kind = type(module).__name__
    return ("LayerNorm" in kind or "RMSNorm" in kind) and "2d" not in kind


@dataclass(frozen=True)
class LayerRow:
    """One line of `list_layers`: name, class, output shape, map shape (K, h, w) if it can be a target, calls."""

    name: str
    kind: str
    shape: tuple[int, ...]
    map_shape: tuple[int, int, int] | None
    calls: int


def list_layers(model: nn.Module, x: Tensor) -> list[LayerRow]:
    """Every submodule that returns a tensor, in the order of execution.

    Parameters
    ----------
    model
        Any module.
    x
        (B, 3, H, W) input; only its first image is used.

    Returns
    -------
    list of LayerRow
        Rows with a ``map_shape`` can be a target layer.
    """
    return [row for row, _ in _trace(model, x)]


def _trace(model: nn.Module, x: Tensor) -> list[tuple[LayerRow, Tensor]]:
    rows: dict[str, tuple[LayerRow, Tensor]] = {}
    image_hw = (x.shape[-2], x.shape[-1])

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensor, _ = first_tensor(output)
            if tensor is None:
                return
            calls = rows.pop(name)[0].calls + 1 if name in rows else 1  # pop: the last call sets the place in the order
            layout = find_layout(model, name, module, tensor, image_hw, batch=1)
            map_shape = None if layout is None else tuple(layout.to_map(tensor).shape[1:])
            row = LayerRow(name, type(module).__name__, tuple(tensor.shape[1:]), map_shape, calls)  # type: ignore[arg-type]
            rows[name] = (row, tensor)

        return hook

    handles = [m.register_forward_hook(record(n)) for n, m in model.named_modules() if n]
    try:
        with quiet(model), torch.no_grad():
            model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    return list(rows.values())


def last_spatial(model: nn.Module, x: Tensor) -> str | None:
    """Last module that returns a map larger than 1x1, called once; of nested modules with one output the innermost."""
    found: list[tuple[str, Tensor]] = []
    for row, tensor in _trace(model, x):
        if row.map_shape is not None and row.map_shape[1] * row.map_shape[2] > 1 and row.calls == 1:
            found.append((row.name, tensor))
    if not found:
        return None
    last = found[-1][1]
    same = [name for name, tensor in found if tensor is last]
    # `layer4.2` and `layer4` return one tensor: the block says more than the stage, but a bare activation says less.
    blocks = [name for name in same if any(True for _ in model.get_submodule(name).children())]
    return blocks[0] if blocks else same[0]


# --- running a model without leaving traces -------------------------------------------------


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode with frozen parameters; both come back on exit, module by module.

    Gradient checkpointing (timm, open_clip) rests meanwhile: it would run the tail again, without our hooks.
    """
    modules = list(model.modules())  # one walk: on small models walking costs as much as running
    training = [module for module in modules if module.training]
    checkpointing: list[Any] = [m for m in modules if m.__dict__.get("grad_checkpointing") is True]
    trainable = [p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad]
    try:
        if training:
            model.eval()
        for module in checkpointing:
            module.grad_checkpointing = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for module in checkpointing:
            module.grad_checkpointing = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def logits_of(output: Any) -> Tensor:
    """Logits (B, C) of whatever a classifier returns: tensor, ``.logits``, first of a tuple or list, or dict key."""
    value = output
    if not isinstance(value, Tensor):
        if getattr(value, "logits", None) is not None:
            value = value.logits
        elif isinstance(value, dict) and "logits" in value:
            value = value["logits"]
        elif isinstance(value, (tuple, list)) and value:
            value = value[0]
    if not isinstance(value, Tensor) or value.ndim != 2:
        given = tuple(value.shape) if isinstance(value, Tensor) else type(output).__name__
        raise UserError("the model must return logits (B, C)", given=given, remedy="wrap it so that it does")
    return value


def first_tensor(output: Any) -> tuple[Tensor | None, Callable[[Tensor], Any]]:
    """The tensor of a layer's output and how to put another in its place."""
    if isinstance(output, Tensor):
        return output, lambda new: new
    if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
        return output[0], lambda new: type(output)((new, *output[1:]))
    return None, lambda new: output
