"""Where classifiers come from: every family of ``vfm_core``, torchvision, state dicts, modules of one's own.

The mapping of ``backbone.*`` and ``head.*`` follows the checkpoints of FTC's code (arXiv 2409.16223): a
torchvision-style ResNet without ``fc`` and a linear head, as a plain state dict. Pickled objects are never executed.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vfm_core.backbones import Native, load_native
from vfm_core.backbones.native import families
from vfm_core.backbones.weights import is_offline, reaching, require_downloaded
from vfm_core.errors import UserError, unknown_name
from vfm_core.preprocess import Preprocess
from vfm_core.specs import Spec, parse_spec

from ft_calibrate.class_names import distinct_names, imagenet_classes
from ft_calibrate.classifier import Classifier
from ft_calibrate.head import find_head, head_classes
from ft_calibrate.text_head import ImageTextClassifier, TextHead, encode_classes

__all__ = [
    "from_module",
    "from_native_text",
    "from_spec",
    "read_names",
    "read_raw",
    "read_state",
    "rename_official",
]

DEFAULT_TEMPLATE = "a photo of a {}."


# ---------------------------------------------------------------------- class names
def read_names(source: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """Class names from a list, a text file (one per line) or a JSON file (a list, or a dict of number to name).

    Raises
    ------
    UserError
        No such file, JSON of another form, no names, or a name twice.
    """
    if isinstance(source, str | os.PathLike):
        names, where = _names_in(Path(source).expanduser()), str(source)
    else:
        names, where = [str(name) for name in source], "classes"
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError("class name given twice", where=where, given=repr(twice), remedy="keep one of them")
    if not names:
        raise UserError("no class names", where=where, remedy="write one name per line")
    return names


def _names_in(path: Path) -> list[str]:
    remedy = "give a .txt file (one name per line) or a .json file (a list, or a dict of number to name)"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError("cannot read class names", where=path, given=error.strerror, remedy=remedy) from error
    if path.suffix.lower() != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            by_number = {int(k): str(v) for k, v in value.items()}
            return [by_number[i] for i in range(len(by_number))]
        if isinstance(value, list):
            return [str(name) for name in value]
    except (ValueError, KeyError) as error:
        raise UserError("cannot read class names", where=path, given=error, remedy=remedy) from error
    raise UserError("cannot read class names", where=path, given=type(value).__name__, remedy=remedy)


# ---------------------------------------------------------------------- state dicts
def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a checkpoint's tensors without executing anything stored in it.

    Parameters
    ----------
    path : path
        ``.safetensors``, or a torch file: a state dict, or a dict with one under ``state_dict``, ``model`` or
        ``model_state_dict``. A prefix ``module.`` (data-parallel training) is dropped.

    Returns
    -------
    dict of Tensor
        On the CPU.

    Raises
    ------
    UserError
        No such file, a damaged one, one with pickled objects, or one without tensors.
    """
    path, stored = Path(path), read_raw(path)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
            break
    state = {str(k): v for k, v in stored.items() if isinstance(v, Tensor)} if isinstance(stored, Mapping) else {}
    if not state:
        raise UserError(
            "no tensors", where=path, given=type(stored).__name__, remedy="give a state dict: name -> tensor"
        )
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def read_raw(path: str | os.PathLike[str]) -> Any:
    """Read a checkpoint file as it is, with its wrappers and prefixes; errors as `read_state`."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError("no such checkpoint file", given=str(path), remedy="check the path")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        remedy = "the file is damaged or cut off: copy it again"
        raise UserError("cannot read weights", where=path, given=error, remedy=remedy) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        remedy = (
            "only plain state dicts are read: save model.state_dict() again; of stored evaluations (pickled objects) "
            "extract the logits again with ft-calibrate extract"
        )
        raise UserError("refused to unpickle arbitrary objects", where=path, given=reason, remedy=remedy) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        remedy = "the file is damaged or no checkpoint: copy it again"
        raise UserError("cannot read weights", where=path, given=reason, remedy=remedy) from error


def rename_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename ``backbone.X`` to ``X`` and ``head.X`` to ``fc.X``; other state dicts are returned as they are."""
    if not any(key.startswith("backbone.") for key in state) or not any(key.startswith("head.") for key in state):
        return dict(state)
    rename = {"backbone": "", "head": "fc."}
    parts = {key: key.partition(".") for key in state}
    return {rename.get(a, f"{a}.") + b: state[key] for key, (a, _, b) in parts.items()}


def _rows(state: Mapping[str, Tensor], names: Sequence[str]) -> int | None:
    """Number of classes of a state dict, read off the first of these layers that it has."""
    return next((len(state[f"{name}.weight"]) for name in names if f"{name}.weight" in state), None)


def _load_into(model: nn.Module, state: Mapping[str, Tensor], where: Path, spec: str) -> None:
    own = model.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if wrong and not missing and not surplus and len({k.rpartition(".")[0] for k in wrong}) == 1:
        k = wrong[0]
        given = f"{k} {tuple(state[k].shape)} there, {tuple(own[k].shape)} in the model"
        raise UserError(
            "the number of classes differs", where=where, given=given, remedy="give the spec of that many classes"
        )
    if missing or surplus or wrong:
        facts = [
            f"{len(keys)} {kind}, first {keys[0]}"
            for kind, keys in (("missing", missing), ("unexpected", surplus), ("of another shape", wrong))
            if keys
        ]
        remedy = "check the architecture of the model spec"
        raise UserError(f"the checkpoint does not fit {spec}", where=where, given="; ".join(facts), remedy=remedy)
    model.load_state_dict(dict(state), strict=False)


# ---------------------------------------------------------------------- specs
def from_spec(
    text: str,
    names: list[str] | None,
    head: str | None,
    source_ckpt: str | os.PathLike[str] | None,
    templates: Sequence[str] | None,
    how: dict[str, Any],
) -> Classifier:
    """Build a classifier from its spec; see `ft_calibrate.load_classifier`."""
    state = rename_official(read_state(source_ckpt)) if source_ckpt is not None else None
    if text.removeprefix("random:").startswith("torchvision:"):
        found = _torchvision(text, state, names, head, how)
    else:
        native = _native(text, state, how, names is not None)
        if native.text is not None:
            if state is not None:
                _load_into(native.model, state, Path(str(source_ckpt)), text)
            return from_native_text(native, names, templates)
        if not native.head:
            remedy = "give a fine-tuned checkpoint, or an image-text model with --classes"
            raise UserError("this model has no classifier head", where=text, remedy=remedy)
        expected = len(native.class_names) if native.class_names is not None else None
        path, _ = find_head(native.model, None if state is not None else expected, head)
        found = Classifier(native.model, path, native.preprocess, None, str(native.spec))
        if native.class_names is not None and len(native.class_names) == found.num_classes:
            found.class_names = distinct_names(native.class_names)
        elif native.class_names is None and found.num_classes == 1000 and _is_imagenet(text, native.model):
            found.class_names = list(imagenet_classes("description"))
    if state is not None:
        _load_into(found.model, state, Path(str(source_ckpt)), text)
        found.spec = f"{text} with {Path(str(source_ckpt)).name}"
    if names is not None:
        found = Classifier(found.model, found.head_name, found.preprocess, names, found.spec)
    return found


def _is_imagenet(text: str, model: nn.Module) -> bool:
    """Whether a model of timm's registry without pretrained weights is one that timm trains on the ImageNet classes."""
    family, _, name = text.removeprefix("random:").partition(":")
    return family == "timm" and ":" not in name and getattr(model, "pretrained_cfg", {}).get("num_classes") == 1000


def _native(text: str, state: Mapping[str, Tensor] | None, how: dict[str, Any], named: bool) -> Native:
    try:
        if state is None:
            return load_native(text, task="classify", **how)
        spec = parse_spec(text)
        inner = parse_spec(spec.name) if spec.family == "random" else spec
        if inner.family == "timm" and "num_classes" not in spec.options:
            rows = _rows(state, ("fc", "head.fc", "head", "classifier", "classif", "last_linear"))
            options = {**spec.options, **({"num_classes": str(rows)} if rows is not None else {})}
            spec = replace(spec, options=options)
        if spec.family not in ("random", "tiny"):
            spec = Spec("random", f"{spec.family}:{spec.name}", None, spec.options)
        native = load_native(spec, task="classify", pretrained=False, **how)
        native.spec = parse_spec(text)
        return native
    except UserError as error:
        if error.what == "unknown model family":
            name = str(error.given).strip("'")
            raise unknown_name("model family", name, [*families(), "torchvision"], where=error.where) from error
        if "there are no pretrained weights" in error.what:
            remedy = f"{error.remedy}, or give a state dict with --source-ckpt FILE"
            raise UserError(error.what, where=error.where, given=error.given, remedy=remedy) from error
        if error.what in ("this checkpoint has no classifier", "no image classifier for this model type"):
            kind = _image_text(text)
            if kind and named and state is None:
                from ft_calibrate.hf_text import load_hf_text

                return load_hf_text(text, how)
            if kind:
                remedy = "as an image-text model it needs --classes names.txt"
                raise UserError(error.what, where=error.where, given=error.given, remedy=remedy) from error
        raise


def _image_text(text: str) -> bool:
    """Whether a spec is of transformers and may have a text tower: CLIP or SigLIP by its name, or a local folder."""
    spec = parse_spec(text)
    return spec.family == "dir" or (spec.family == "hf" and ("clip" in text.lower() or "siglip" in text.lower()))


def from_native_text(native: Native, names: list[str] | None, templates: Sequence[str] | None) -> Classifier:
    """Give an image-text model's classes; see `ft_calibrate.load_classifier`."""
    names = names or native.class_names
    if names is None:
        remedy = "give --classes names.txt, one name per line"
        raise UserError("an image-text model needs class names", where=str(native.spec), remedy=remedy)
    assert native.text is not None
    if templates is None:
        templates = ("{}",) if native.family == "tiny" else (DEFAULT_TEMPLATE,)
    weight = encode_classes(native.text.encode, names, templates)
    model = ImageTextClassifier(_visual(native), TextHead(weight, float(native.text.logit_scale))).eval()
    return Classifier(model, "head", native.preprocess, names, str(native.spec))


def _visual(native: Native) -> nn.Module:
    """The image tower, which alone is enough once the classes are encoded."""
    visual = getattr(native.model, "visual", None)
    if not isinstance(visual, nn.Module):
        given = type(native.model).__name__
        raise UserError("no image tower", where=str(native.spec), given=given, remedy="it should be at .visual")
    return visual


def from_module(
    model: nn.Module, names: list[str] | None, head: str | None, source_ckpt: str | os.PathLike[str] | None
) -> Classifier:
    """Take a model as it is; timm and transformers models bring their preprocessing and their names with them."""
    if source_ckpt is not None:
        _load_into(model, rename_official(read_state(source_ckpt)), Path(source_ckpt), type(model).__name__)
    path, layer = find_head(model, len(names) if names is not None else None, head)
    config = getattr(model, "config", None)
    labels = getattr(config, "id2label", None)
    if names is None and isinstance(labels, Mapping) and len(labels) == head_classes(layer):
        own = [str(labels[i]) for i in range(len(labels)) if i in labels]
        names = (
            distinct_names(own) if len(own) == len(labels) and own != [f"LABEL_{i}" for i in range(len(own))] else None
        )
    preprocess = None
    if getattr(model, "pretrained_cfg", None):
        from vfm_core.backbones.timm_family import preprocess_of

        preprocess = preprocess_of(model)
    return Classifier(model, path, preprocess, names, type(model).__name__)


# ---------------------------------------------------------------------- torchvision
def _torchvision(
    text: str, state: Mapping[str, Tensor] | None, names: list[str] | None, head: str | None, how: dict[str, Any]
) -> Classifier:
    """``torchvision:NAME[@WEIGHTS][?num_classes=K]``: weights, names and preprocessing from torchvision's registry."""
    from torchvision import models

    spec = parse_spec(text.removeprefix("random:"))
    options = spec.read(num_classes=int)
    known = models.list_models(module=models)
    if spec.name not in known:
        raise unknown_name("torchvision model", spec.name, known)
    entries = models.get_model_weights(spec.name)
    if spec.source is not None and spec.source not in entries.__members__:
        raise unknown_name("torchvision weights", spec.source, entries.__members__, where=text)
    entry = entries[spec.source] if spec.source is not None else entries.DEFAULT
    random = text.startswith("random:") or state is not None
    rows = options.get("num_classes") or (_rows(state, _torchvision_heads(state)) if state is not None else None)
    offline = is_offline(how.get("offline"))
    if not random and offline:
        require_downloaded(text, entry.url, None)
    what, cache = f"{text} ({Path(entry.url).name})", Path(torch.hub.get_dir(), "checkpoints")
    with reaching(what, offline=offline, local=None, cache_dir=cache, hub=False), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        arguments = {"num_classes": rows} if rows else {}
        model = models.get_model(spec.name, weights=None if random else entry, **arguments).eval()
    path, layer = find_head(model, None, head)
    categories = list(entry.meta["categories"])
    own = distinct_names(categories) if len(categories) == head_classes(layer) else None
    return Classifier(model, path, _preset(entry.transforms()), own, text)


def _torchvision_heads(state: Mapping[str, Tensor]) -> list[str]:
    last = max((k for k in state if k.startswith("classifier.") and k.endswith(".weight")), default="classifier.weight")
    return ["fc", "heads.head", "head", last.removesuffix(".weight")]


def _preset(transform: Any) -> Preprocess:
    """Plain data from torchvision's preset: resize the short side, centre crop, normalise."""
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    share = crop / resize
    while math.floor(crop / share) < resize:  # the ratio's rounding must not lose a pixel
        share = math.nextafter(share, 0)
    mean, std = tuple(transform.mean), tuple(transform.std)
    return Preprocess((crop, crop), "shortest", share, transform.interpolation.value, mean, std)
