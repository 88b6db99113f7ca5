"""A linear classifier on a frozen backbone, as one module to explain (the models of Finer-CAM, arXiv 2501.11309).

The paper's classifier is one ``nn.Linear`` on the mean of the patch tokens after the final norm, and its maps are read
at the last block's first norm. `load_head` reads folders written by `finecam.head.fit_head` and the official head
files, plain state dicts ``{"weight": (C, D), "bias": (C,)}``.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vfm_core.backbones import Backbone, fingerprint, load_backbone, load_native
from vfm_core.errors import UserError, unknown_name
from vfm_core.files import jsonable
from vfm_core.preprocess import Preprocess
from vfm_core.runs import config_diff

from finecam.classifiers import Classifier, read_class_names

CONFIG, WEIGHTS, FORMAT = "config.json", "head.safetensors", "finecam-head"
POOLS = ("mean", "cls", "native")


@dataclass
class FittedHead:
    """Result of `finecam.head.fit_head`.

    Parameters
    ----------
    out
        The head folder; give it as a model.
    classes, images
        Numbers of classes and of training images.
    accuracy
        Validation accuracy with its 95 % interval (low, high); None when there was nothing to validate on.
    train_accuracy
        On the training images.
    skipped
        Unreadable images left out.
    reused
        The folder held this head already; nothing was trained.
    """

    out: Path
    classes: int
    images: int
    accuracy: tuple[float, float, float] | None
    train_accuracy: float
    skipped: int
    reused: bool = False

    def line(self) -> str:
        """One line for a person."""
        held = "no validation images"
        if self.accuracy is not None:
            held = "validation accuracy {:.1%} [{:.1%}, {:.1%}]".format(*self.accuracy)
        left_out = f", {self.skipped} unreadable images left out" if self.skipped else ""
        there = "there already: " if self.reused else ""
        return f"{there}{self.classes} classes, {self.images} images, {held}{left_out}"


class ConvBackbone(nn.Module):
    """A model without tokens (a CNN), read at its own pooled features.

    Parameters
    ----------
    native
        A loaded model with timm's ``forward_features`` and ``forward_head``.
    """

    def __init__(self, native: Any) -> None:
        super().__init__()
        self.model, self.spec, self.preprocess = native.model, native.spec, native.preprocess

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of preprocessed images."""
        model: Any = self.model
        return model.forward_head(model.forward_features(images), pre_logits=True)

    def fingerprint(self) -> str:
        """Content hash of the model."""
        return fingerprint(self.model)


def head_backbone(spec: str, *, pretrained: bool = True, **how: Any) -> Backbone | ConvBackbone:
    """Load a backbone to put a head on: a vision transformer of any family, or a CNN of timm's interface.

    Raises
    ------
    UserError
        Unknown spec, missing weights, or a model that gives no features.
    """
    try:
        return load_backbone(spec, pretrained=pretrained, **how).eval()
    except UserError:
        native = load_native(spec, task="features", pretrained=pretrained, **how)
        if not (hasattr(native.model, "forward_features") and hasattr(native.model, "forward_head")):
            raise
        return ConvBackbone(native).eval()


def pool_features(backbone: nn.Module, images: Tensor, pool: str) -> Tensor:
    """Image features (B, D): the mean of the normalised patch tokens (``"mean"``), CLS, or the model's own."""
    if isinstance(backbone, ConvBackbone):
        return backbone(images)
    view: Any = backbone
    return view.pool(view.run(view.embed(images)), how=pool)


class HeadModel(nn.Module):
    """A frozen backbone and one linear layer on its pooled features.

    Parameters
    ----------
    backbone
        A `vfm_core` backbone or a `ConvBackbone`.
    head
        ``nn.Linear(D, C)``.
    pool
        ``"mean"`` (the paper's), ``"cls"`` or ``"native"``; see `pool_features`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear, pool: str = "mean") -> None:
        super().__init__()
        self.backbone, self.head, self.pool = backbone, head, pool

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of preprocessed images (B, 3, h, w)."""
        return self.head(pool_features(self.backbone, images, self.pool).to(self.head.weight.dtype))

    def class_weights(self) -> Tensor:
        """Rows (C, D) of the head: what ``similarity="weight"`` compares."""
        return self.head.weight.detach()


def layer_name(model: HeadModel) -> str | None:
    """Dotted name, inside `model`, of the first norm of the backbone's last block; None for a CNN (its default)."""
    if isinstance(model.backbone, ConvBackbone):
        return None
    view: Any = model.backbone
    wanted = view.first_norm(view.depth - 1)
    return next((name for name, module in model.named_modules() if module is wanted), None)


def classifier_of(
    backbone: Any, head: nn.Linear, pool: str, names: list[str] | None, spec: str, preprocess: Preprocess | None = None
) -> Classifier:
    """Put a head on a backbone and make a `Classifier` of the two."""
    device = next(backbone.parameters()).device
    model = HeadModel(backbone, head.to(device), pool).eval()
    return Classifier(
        model,
        names,
        preprocess or backbone.preprocess,
        layer=layer_name(model),
        spec=spec,
        class_weights=head.weight.detach(),
    )


# --- reading ---------------------------------------------------------------------------


def is_head(path: Path) -> bool:
    """Whether a path is a folder written by `fit_head`, or a file of a linear head's two tensors."""
    if path.is_dir():
        return bool(read_head_config(path))
    return path.is_file() and path.suffix in (".pth", ".pt", ".bin", ".safetensors") and _has_two_tensors(path)


def _has_two_tensors(path: Path) -> bool:
    try:
        state = read_state(path)
    except UserError:
        return False
    return "weight" in state and set(state) <= {"weight", "bias"}


def read_state(path: Path) -> dict[str, Any]:
    """Read a state dict; pickles with ``weights_only=True``, so that a file cannot run code.

    Raises
    ------
    UserError
        A pickle that holds more than tensors, a damaged file, or something that is no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(
            "refused to unpickle",
            where=path,
            given="the file holds more than tensors, or is no torch file",
            remedy="save the state dict alone: torch.save(model.state_dict(), PATH)",
        ) from e
    except FileNotFoundError as e:
        raise UserError("no such file", where=path, remedy="check the path") from e
    except Exception as e:  # zip, pickle and safetensors each have their own error for a damaged file
        given = " ".join(str(e).split())[:200]
        raise UserError("cannot read weights", where=path, given=given, remedy="write the file again") from e
    if not isinstance(state, Mapping):
        raise UserError("not a state dict", where=path, given=type(state).__name__, remedy="save model.state_dict()")
    return dict(state)


def check_finite(state: Mapping[str, Any], path: Path) -> None:
    """Refuse weights that hold NaN or infinity, by name.

    Raises
    ------
    UserError
        Naming the first such tensor and the file.
    """
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            raise UserError("weights are not finite", where=path, given=name, remedy="train again, or restore the file")


def read_head_config(path: Path) -> dict[str, Any]:
    """Read what `fit_head` noted in a folder; empty when the folder's ``config.json`` is not a head's."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and config.get("format") == FORMAT else {}


def stored_head(out: Path, asked: dict[str, Any]) -> FittedHead:
    """Report the head that is in a folder, if it is the one asked for (entries of its ``config.json``).

    Raises
    ------
    UserError
        It has other settings (which are named), or the folder holds something else.
    """
    config, remedy = read_head_config(out), "use --overwrite, or another --out"
    if not config or not (out / WEIGHTS).is_file():
        raise UserError("not a complete head folder", where=out, remedy=remedy)
    if diff := config_diff({name: config.get(name) for name in asked}, jsonable(asked)):
        raise UserError("a head of other settings is there already", where=out, given=", ".join(diff), remedy=remedy)
    numbers = config["metrics"]
    held = numbers["val_accuracy"] and tuple(numbers["val_accuracy"])
    train_accuracy, skipped = numbers["train_accuracy"], config["skipped"]
    return FittedHead(out, len(config["classes"]), config["images"], held, train_accuracy, skipped, reused=True)


def load_head(
    path: str | os.PathLike[str],
    *,
    backbone: str | None = None,
    classes: Any = None,
    pretrained: bool = True,
    **how: Any,
) -> Classifier:
    """Load a head with its backbone.

    Parameters
    ----------
    path
        A folder written by `fit_head`, or a file ``{"weight": (C, D), "bias": (C,)}`` as the official release ships
        them (``.pth``, ``.pt`` or ``.safetensors``).
    backbone
        Spec of the backbone: needed for a file; replaces the recorded one for a folder.
    classes
        Class names of a head file; by default ``class_names.json`` beside it, where the official training leaves them.
    pretrained
        False leaves the backbone at random weights.
    **how
        ``device``, ``dtype``, ``offline`` and ``cache_dir`` of `vfm_core.load_backbone`.

    Raises
    ------
    UserError
        A head that does not fit the backbone, another backbone than the head was trained on, weights that are not
        finite, an unsafe or damaged file.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, backbone, pretrained, how)
    state = read_state(path)
    if "weight" not in state or not set(state) <= {"weight", "bias"}:
        raise UserError(
            "not a linear head",
            where=path,
            given=f"entries {sorted(map(str, state))[:6]}",
            remedy="give the state dict of one nn.Linear: weight (C, D) and bias (C,)",
        )
    if backbone is None:
        raise UserError("a head file alone", where=path, remedy="name the backbone it was trained on (--backbone SPEC)")
    beside = path.with_name("class_names.json")
    names = read_class_names(classes) if classes is not None else read_class_names(beside) if beside.is_file() else None
    trunk = head_backbone(backbone, pretrained=pretrained, **how)
    pool = "native" if isinstance(trunk, ConvBackbone) else "mean"
    head = _linear(state, trunk, pool, path)
    if names is not None and len(names) != head.out_features:
        raise UserError(
            "class names do not fit the head",
            where=beside if classes is None else path,
            given=f"{len(names)} names for {head.out_features} rows",
            remedy="give --classes with one name per row",
        )
    return classifier_of(trunk, head, pool, names, f"{path.resolve()}@{backbone}")


def _load_folder(path: Path, backbone: str | None, pretrained: bool, how: dict[str, Any]) -> Classifier:
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    try:
        spec, pool, names = backbone or config["backbone"], config["pool"], [str(c) for c in config["classes"]]
        preprocess, wanted = Preprocess.from_dict(config["preprocess"]), config["backbone_fingerprint"]
    except (KeyError, TypeError) as e:
        raise UserError("incomplete head folder", where=path / CONFIG, given=e, remedy="run fit-head again") from e
    state = read_state(path / WEIGHTS)
    trunk = head_backbone(spec, pretrained=pretrained, **how)
    head = _linear(state, trunk, pool, path / WEIGHTS)
    if pretrained and backbone is None and trunk.fingerprint() != wanted:
        raise UserError(
            "the backbone is not the one this head was trained on",
            where=path,
            given=spec,
            remedy="restore the same weights, or run fit-head again",
        )
    return classifier_of(trunk, head, pool, names, str(path.resolve()), preprocess)


def feature_width(backbone: nn.Module, pool: str) -> int:
    """D of `pool_features`, found with one blank image."""
    view: Any = backbone
    first = next(view.parameters())
    with torch.inference_mode():
        blank = torch.zeros(1, 3, *view.preprocess.size, device=first.device, dtype=first.dtype)
        return int(pool_features(view, blank, pool).shape[-1])


def _linear(state: Mapping[str, Any], backbone: Any, pool: str, path: Path) -> nn.Linear:
    if pool not in POOLS:
        raise unknown_name("pool", pool, POOLS, where=path)
    check_finite(state, path)
    weight = torch.as_tensor(state["weight"]).float()
    width = feature_width(backbone, pool)
    if weight.ndim != 2 or weight.shape[1] != width:
        raise UserError(
            f"head expects D={weight.shape[-1]}, backbone gives {width}",
            where=path,
            given=str(backbone.spec),
            remedy="name the backbone this head was trained on",
        )
    head = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(torch.as_tensor(state["bias"]).float() if "bias" in state else torch.zeros(len(weight)))
    return head
