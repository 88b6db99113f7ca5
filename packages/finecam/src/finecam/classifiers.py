"""Classifiers by name: whatever gives logits, with its class names, its preprocessing and its identity.

One spec grammar for all of them: ``timm:NAME``, ``torchvision:NAME``, ``hf:ORG/NAME``, ``open_clip:NAME@TAG`` (with
class names or texts), ``dir:PATH``, ``tiny:NAME``, a folder written by ``finecam fit-head``, or a head file in the
layout of the official Finer-CAM release (a plain ``{"weight": (C, D), "bias": (C,)}`` state dict, arXiv 2501.11309)
over a backbone of its own. Mean and standard deviation always come from the checkpoint's own data configuration:
normalising with another model's numbers changes the maps without any error.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vfm_core.backbones import fingerprint, load_native
from vfm_core.backbones.weights import is_offline, reaching, require_downloaded
from vfm_core.errors import UserError, unknown_name
from vfm_core.preprocess import Preprocess

from finecam.references import class_directions

RANDOM = "random:"  # how the spec of a model with untrained weights starts


@dataclass
class Classifier:
    """A model that gives logits, and what is needed to explain it.

    Parameters
    ----------
    model
        Maps (B, 3, h, w), preprocessed, to logits (B, C).
    class_names
        C names, or None when the checkpoint has none.
    preprocess
        From a picture to the model's input and back.
    layer
        Dotted name of the layer to explain, where the kind of model settles it; None leaves the choice to `Explainer`.
    spec
        Where the model came from.
    reshape
        How tokens become a grid (see `Explainer`); ``"auto"`` for models whose layout is known.
    """

    model: nn.Module
    class_names: list[str] | None
    preprocess: Preprocess
    layer: str | None = None
    spec: str = ""
    reshape: Any = "auto"
    class_weights: Tensor | None = None
    _fingerprint: str | None = field(default=None, repr=False)

    @property
    def fingerprint(self) -> str:
        """Hash over structure, parameters and buffers of the model; computed once."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model)[:32]
        return self._fingerprint

    @property
    def num_classes(self) -> int | None:
        """C where it is known without running the model."""
        if self.class_names is not None:
            return len(self.class_names)
        rows = self.weights()
        return None if rows is None else len(rows)

    def weights(self) -> Tensor | None:
        """Rows (C, D) whose cosine says how alike two classes are: the last linear layer, or text embeddings."""
        if self.class_weights is not None:
            return self.class_weights
        linear = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        count = len(self.class_names) if self.class_names is not None else linear[-1].out_features if linear else 0
        try:
            return class_directions(self.model, count).detach()
        except UserError:  # no layer with one row per class
            return None

    def name(self, index: int) -> str:
        """Name of a class, or ``class 7`` where there are no names."""
        return self.class_names[index] if self.class_names is not None else f"class {index}"

    def index(self, name: str | int) -> int:
        """Id of a class given by name or by number; exact, never by resemblance.

        Raises
        ------
        UserError
            No such class; the message names the three closest.
        """
        names = self.class_names
        if isinstance(name, str) and names is not None:
            if name in names:
                if names.count(name) > 1:
                    ids = [i for i, other in enumerate(names) if other == name]
                    raise UserError("class name is not unique", given=f"{name!r} is {ids}", remedy="give the number")
                return names.index(name)
            if not name.isdecimal():
                raise unknown_name("class", name, names, where=self.spec or None)
        if isinstance(name, str) and not name.isdecimal():
            raise UserError(
                "this model has no class names", where=self.spec or None, given=repr(name), remedy="give class names"
            )
        index, count = int(name), self.num_classes
        if index < 0 or (count is not None and index >= count):
            remedy = f"use 0 to {count - 1}" if count else "use 0 or more"
            raise UserError("no such class id", where=self.spec or None, given=index, remedy=remedy)
        return index


class KeyedLogits(nn.Module):
    """A model whose logits stand under a key (or attribute) of their own in its output.

    Parameters
    ----------
    model
        Returns a dict or an object. (Tensors, ``.logits``, tuples and ``{"logits": ...}`` need no wrapper.)
    key
        Where the logits (B, C) are.
    """

    def __init__(self, model: nn.Module, key: str) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (B, C) of the wrapped model's output."""
        output = self.model(*args, **kwargs)
        try:
            found = output[self.key] if isinstance(output, Mapping) else getattr(output, self.key)
        except (KeyError, AttributeError) as e:
            given = sorted(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
            raise UserError("no such entry in the model's output", where=self.key, given=given) from e
        return found


def read_class_names(source: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """Class names from a list, a text file (one per line) or a JSON file (a list, or a dict of id to name).

    Raises
    ------
    UserError
        No such file, or JSON of another form.
    """
    if not isinstance(source, str | os.PathLike):
        return [str(name) for name in source]
    path = Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(
            "cannot read class names", where=path, given=e.strerror, remedy="give a .txt or .json file"
        ) from e
    if path.suffix.lower() != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            by_id = {int(k): str(v) for k, v in value.items()}
            if sorted(by_id) != list(range(len(by_id))):
                raise ValueError("ids must be 0, 1, 2, ...")
            return [by_id[i] for i in range(len(by_id))]
        if not isinstance(value, list):
            raise ValueError("neither a list nor a dict")
        return [str(name) for name in value]
    except ValueError as e:
        remedy = "write a list of names, or a dict of id to name"
        raise UserError("cannot read class names", where=path, given=e, remedy=remedy) from e


def load_classifier(
    spec: str | os.PathLike[str],
    *,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    templates: Sequence[str] = (),
    scale: float | None = None,
    backbone: str | None = None,
    random_weights: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    offline: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    output_key: str | None = None,
) -> Classifier:
    """Load a classifier by its spec.

    Parameters
    ----------
    spec
        ``timm:NAME``, ``torchvision:NAME``, ``open_clip:NAME@TAG``, ``hf:ORG/NAME``, ``tiny:NAME``, ``dir:PATH``, a
        folder written by `fit_head`, or a ``.pth``/``.safetensors`` file of a linear head (needs `backbone`).
    classes
        Class names: a list, or a ``.txt``/``.json`` file. Needed by image-text models unless `texts` is given;
        replaces the checkpoint's names otherwise.
    texts, templates, scale
        For image-text models: the texts that act as classes, prompt templates with ``{}`` for the class name, and the
        factor on the cosines (see `TextClassifier`).
    backbone
        Spec of the backbone under a head file.
    random_weights
        Initialise at random instead of loading weights. Never done unasked; the classifier's spec then starts with
        ``random:``.
    device, dtype, offline, cache_dir
        As in `vfm_core.load_native`.
    output_key
        Key of the logits when the model returns a dict.

    Returns
    -------
    Classifier
        In eval mode.

    Raises
    ------
    UserError
        Unknown spec or name, missing weights, class names that do not fit the model, a head that does not fit its
        backbone, an unsafe pickle.
    """
    from finecam.head_model import is_head, load_head

    text = os.fspath(spec)
    path = _local_path(text)
    how: dict[str, Any] = {"device": device, "dtype": dtype, "offline": offline, "cache_dir": cache_dir}
    if path is not None and (is_head(path) or (path.is_file() and backbone is not None)):
        found = load_head(path, backbone=backbone, classes=classes, pretrained=not random_weights, **how)
    elif backbone is not None:
        raise UserError(
            "--backbone is for head files", where="--model", given=text, remedy="give a head's .pth file or folder"
        )
    elif text.removeprefix("random:").startswith("torchvision:"):
        random_weights = random_weights or text.startswith("random:")
        found = _load_torchvision(text.removeprefix("random:"), random_weights, device, dtype, offline)
    else:
        found = _load_native_classifier(text, classes, texts, templates, scale, random_weights, how, output_key)
    if classes is not None and texts is None:
        found = _rename(found, read_class_names(classes))
    if random_weights and not found.spec.startswith(RANDOM):
        found.spec = RANDOM + found.spec
    found.model.eval()
    return found


def _rename(found: Classifier, names: list[str]) -> Classifier:
    have = found.num_classes
    if have is not None and have != len(names):
        raise UserError(
            "class names do not fit the model",
            where=found.spec,
            given=f"{len(names)} names for {have} classes",
            remedy="give one name per logit, in order",
        )
    found.class_names = names
    return found


def _local_path(text: str) -> Path | None:
    text = text.removeprefix("dir:")
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        path = Path(text).expanduser()
        if path.exists():
            return path
    return None


# --- native models ------------------------------------------------------------------------


def _load_native_classifier(
    text: str,
    classes: Any,
    texts: Sequence[str] | None,
    templates: Sequence[str],
    scale: float | None,
    random_weights: bool,
    how: dict[str, Any],
    output_key: str | None,
) -> Classifier:
    native = load_native(text, task="classify", pretrained=not random_weights, **how)
    if native.text is not None:
        if texts is None and classes is None and native.class_names is None:
            raise UserError(
                "an image-text model needs classes",
                where=text,
                remedy="give --classes names.txt, or --text and --against",
            )
        from finecam.text import TextClassifier

        names = list(texts) if texts is not None else read_class_names(classes or native.class_names or [])
        by_text = TextClassifier(native, names, tuple(templates), scale)
        return Classifier(by_text, names, native.preprocess, spec=text, class_weights=by_text.weights())
    if texts is not None:
        raise UserError("texts need an image-text model", where=text, remedy="use an open_clip: model, or drop --text")
    if not native.head:
        raise UserError(
            "this model has no classifier head",
            where=text,
            remedy="train one with: finecam fit-head DATA --backbone SPEC --out DIR",
        )
    model = native.model if output_key is None else KeyedLogits(native.model, output_key)
    return Classifier(model, native.class_names, native.preprocess, spec=text)


# --- torchvision ------------------------------------------------------------------------


def _load_torchvision(
    text: str, random_weights: bool, device: Any, dtype: torch.dtype | None, offline: bool | None
) -> Classifier:
    """``torchvision:NAME[@WEIGHTS]``: weights, names and preprocessing from torchvision's own registry."""
    from torchvision import models

    name, _, tag = text.removeprefix("torchvision:").partition("@")
    known = [m for m in models.list_models() if "quantized" not in m and "raft" not in m]
    if name not in known:
        raise unknown_name("torchvision model", name, known)
    entries = models.get_model_weights(name)
    if tag and tag not in entries.__members__:
        raise unknown_name("torchvision weights", tag, entries.__members__, where=name)
    entry = entries[tag] if tag else entries.DEFAULT
    preprocess = _torchvision_preprocess(entry.transforms())
    offline = is_offline(offline)
    if not random_weights and offline:
        require_downloaded(text, entry.url, None)
    with (
        reaching(text, offline=offline, local=None, cache_dir=None, hub=False),
        torch.random.fork_rng(devices=[]),
    ):
        torch.default_generator.manual_seed(0)
        model = models.get_model(name, weights=None if random_weights else entry)
    model.to(device=device, dtype=dtype).eval()
    return Classifier(model, list(entry.meta["categories"]), preprocess, spec=text)


def _torchvision_preprocess(transform: Any) -> Preprocess:
    """Plain data from torchvision's `ImageClassification` preset (resize the short side, centre crop)."""
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    crop_pct = crop / resize
    while math.floor(crop / crop_pct) < resize:  # the ratio's rounding must not lose a pixel
        crop_pct = math.nextafter(crop_pct, 0)
    return Preprocess(
        size=(crop, crop),
        resize="shortest",
        crop_pct=crop_pct,
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )
