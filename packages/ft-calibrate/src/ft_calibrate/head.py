"""Finding the layer that makes the logits, by structure and by name (ours, not from a paper)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from vfm_core.errors import UserError, unknown_name

__all__ = ["base_layer", "find_head", "head_classes", "head_features", "is_head"]

# Where timm, torchvision, transformers and most people keep the classifier; a Sequential stands for its last layer.
_NAMES = ("fc", "classifier", "heads.head", "head.fc", "head", "heads", "last_linear", "linear", "logits", "output")
# Parts of wrapped models whose linear layers are no classifier: adapters, kept originals, auxiliary exits.
_NOT_HEADS = ("lora_A", "lora_B", "original_module", "AuxLogits", "aux1", "aux2", "aux_classifier")
_DISTILLED = (
    ("head", "head_dist"),
    ("cls_classifier", "distillation_classifier"),
    ("classifier", "classifier_distill"),
)


def is_head(module: nn.Module) -> bool:
    """Whether a layer can be a classifier's head: linear, 1x1 convolution, or a cosine or text head (K, D)."""
    if isinstance(module, nn.Linear):
        return True
    if type(module).__module__.endswith("quantized.dynamic.modules.linear"):
        return True
    if isinstance(module, nn.Conv2d):
        return tuple(module.kernel_size) == (1, 1) and module.groups == 1
    kinds = {kind.__name__ for kind in type(module).__mro__}
    weight = getattr(module, "weight", None)
    return bool(kinds & {"CosineHead", "TextHead"}) and isinstance(weight, Tensor) and weight.ndim == 2


def head_classes(head: nn.Module) -> int:
    """Number of classes K of a head: the rows of its weight."""
    weight = getattr(base_layer(head), "weight", None)
    if isinstance(weight, Tensor):
        return int(weight.shape[0])
    return int(getattr(base_layer(head), "out_features"))  # noqa: B009 - packed (quantised) weights have no shape


def head_features(head: nn.Module) -> int:
    """Feature width D of a head."""
    weight = getattr(base_layer(head), "weight", None)
    if isinstance(weight, Tensor):
        return int(weight.shape[1])
    return int(getattr(base_layer(head), "in_features"))  # noqa: B009


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside a PEFT wrapper."""
    inner = module._modules.get("modules_to_save")
    if isinstance(inner, nn.ModuleDict) and len(inner):
        adapter = getattr(module, "active_adapter", None)
        name = adapter if isinstance(adapter, str) and adapter in inner else next(iter(inner))
        return inner[name]
    inner = module._modules.get("base_layer")
    return inner if isinstance(inner, nn.Module) else module


def find_head(model: nn.Module, num_classes: int | None = None, name: str | None = None) -> tuple[str, nn.Module]:
    """Find the layer that makes the logits.

    Asked in this order: `name`; the model's own ``get_classifier()`` (timm); the usual names (``fc``, ``classifier``,
    ``heads.head``, ``head.fc``, ``head``), of a Sequential its last layer that fits; the last layer of the model that
    fits at all.

    Parameters
    ----------
    model : torch.nn.Module
        Any image classifier.
    num_classes : int, optional
        K, where it is known: layers with another number of rows are passed over.
    name : str, optional
        Dotted name of the head, or of a container that ends with it.

    Returns
    -------
    name : str
        Dotted name within `model`, ``""`` when the model is itself the head.
    head : torch.nn.Module
        Linear, 1x1 convolution, cosine or text head.

    Raises
    ------
    UserError
        An unknown name, a layer that is no head or has other rows than `num_classes`, two heads whose logits are
        averaged (distilled models), or no head at all.

    Examples
    --------
    >>> find_head(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    ('1', Linear(in_features=4, out_features=3, bias=True))
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name is not None:
        if name not in modules:
            candidates = [n for n, m in modules.items() if is_head(m)]
            raise unknown_name("layer", name, candidates, where=f"--head of {type(model).__name__}")
        found = _last_head(name, modules[name], num_classes)
        if found is None:
            given = f"{name!r}, a {type(modules[name]).__name__}"
            other = _last_head(name, modules[name], None)
            if other is not None:
                given += f" with {head_classes(other[1])} rows for {num_classes} classes"
            raise UserError("not a classifier head", where="--head", given=given, remedy=_remedy(modules))
        return found
    for pair in _DISTILLED:
        if all(is_head(modules[n]) if n in modules else False for n in pair):
            remedy = "use the plain model, or calibrate its logits (ft-calibrate apply) instead of the checkpoint"
            raise UserError(
                "the model averages two heads", where=type(model).__name__, given=" and ".join(pair), remedy=remedy
            )
    for path, module in _usual(model, modules):
        found = _last_head(path, module, num_classes)
        if found is not None:
            return found
    found = _last_head("", model, num_classes)
    if found is None:
        wanted = "no classifier head" if num_classes is None else f"no classifier head with {num_classes} rows"
        raise UserError(wanted, where=type(model).__name__, remedy=_remedy(modules))
    return found


def _usual(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    ask = getattr(model, "get_classifier", None)
    if callable(ask):
        head = ask()
        for path, module in modules.items():
            if module is head:
                yield path, module
    for path in _NAMES:
        for prefix in ("", "model.", "base_model.model.", "timm_model."):
            if prefix + path in modules:
                yield prefix + path, modules[prefix + path]


def _last_head(path: str, module: nn.Module, num_classes: int | None) -> tuple[str, nn.Module] | None:
    """The last head at or below a module, wrappers (PEFT) included."""
    inside = base_layer(module)
    if inside is not module:
        return (path, module) if is_head(inside) and num_classes in (None, head_classes(inside)) else None
    if is_head(module):
        return (path, module) if num_classes in (None, head_classes(module)) else None
    for name, child in reversed(list(module.named_children())):
        if name in _NOT_HEADS:
            continue
        found = _last_head(f"{path}.{name}" if path else name, child, num_classes)
        if found is not None:
            return found
    return None


def _remedy(modules: Mapping[str, nn.Module]) -> str:
    heads = [f"{n} ({head_classes(m)})" for n, m in modules.items() if n and is_head(m)]
    return (
        f"name the head with --head; layers that could be one: {', '.join(heads[-6:])}"
        if heads
        else "give a classifier"
    )
