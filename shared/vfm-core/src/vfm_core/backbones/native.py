"""From a spec to a model: ``load_native``, ``load_backbone``, ``wrap``.

Families of the built-in table come first, then those that other packages announce under the entry-point group
``vfm_core.backbones``: a callable ``(spec, *, task, pretrained, device, dtype, offline, cache_dir) -> Native``.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vfm_core.backbones import hf_family, open_clip_family, timm_family, weights
from vfm_core.backbones.backbone import Backbone
from vfm_core.backbones.base import Adapter, Native
from vfm_core.backbones.local import detect, local_path
from vfm_core.errors import UserError, unknown_name
from vfm_core.preprocess import Preprocess
from vfm_core.specs import Spec, parse_spec

__all__ = ["ADAPTERS", "families", "load_backbone", "load_native", "wrap"]

log = logging.getLogger(__name__)

GROUP = "vfm_core.backbones"
_BUILT_IN: dict[str, Callable[..., Native]] = {
    "timm": timm_family.load,
    "open_clip": open_clip_family.load,
    "hf": hf_family.load,
}
# Library and class name, so that no library is imported just to ask. Subclasses are found through their bases.
ADAPTERS: dict[str, type[Adapter]] = {
    "timm.VisionTransformer": timm_family.TimmViT,
    "timm.Eva": timm_family.TimmEva,
    "timm.Beit": timm_family.TimmBeit,
    "open_clip.VisionTransformer": open_clip_family.OpenClipViT,
    "transformers.CLIPVisionModel": hf_family.HFClip,
    "transformers.SiglipVisionModel": hf_family.HFSiglip,
    "transformers.Dinov2Model": hf_family.HFDinov2,
    "transformers.Dinov2WithRegistersModel": hf_family.HFDinov2,
    "transformers.DINOv3ViTModel": hf_family.HFDinov3,
    "transformers.ViTModel": hf_family.HFViT,
    "transformers.ViTMAEModel": hf_family.HFMae,
}
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
}


def families() -> list[str]:
    """Names of all model families: built in, announced by installed packages, and the two prefixes."""
    announced = {entry.name for entry in importlib.metadata.entry_points(group=GROUP)}
    return sorted({*_BUILT_IN, *announced, "dir", "random"})


def load_native(
    spec: str | Spec,
    *,
    task: Literal["features", "classify"] = "features",
    pretrained: bool = True,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offline: bool | None = None,
    cache_dir: str | Path | None = None,
) -> Native:
    """Load a model of any family as its library builds it.

    Parameters
    ----------
    spec : str or Spec
        ``timm:NAME``, ``open_clip:NAME@TAG``, ``hf:ORG/NAME``, ``dir:PATH``, ``tiny:NAME``, ``random:SPEC`` ...
        Options: ``img_size``, ``dtype``, ``revision``, ``dynamic``, ``seed`` (of ``random:``), as far as the family
        has them.
    task : {"features", "classify"}
        With "classify" the model must come with its classifier; image-text models are returned whole, to be given
        classes by text.
    pretrained : bool
        False builds the same architecture with random weights; so does the prefix ``random:``.
    device, dtype : optional
        Applied to the whole module; dtype also by name ("bf16"). CPU and float32 by default.
    offline : bool, optional
        True never opens a socket. By default as the hub client's environment switches say.
    cache_dir : str or Path, optional
        Cache of downloaded weights.

    Returns
    -------
    Native
        Its model in eval mode.

    Raises
    ------
    UserError
        Anything wrong with the spec, the checkpoint or the way to it.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    if task not in ("features", "classify"):
        raise unknown_name("task", task, ["features", "classify"])
    inner = parsed
    if inner.family == "random":
        inner, pretrained = replace(parse_spec(inner.name), source=inner.source, options=inner.options), False
    if inner.family == "dir":
        inner = replace(detect(Path(inner.name).expanduser()), options=inner.options)
    known = families()
    if inner.family not in known or inner.family in ("dir", "random"):
        raise unknown_name("model family", inner.family, known, where=str(parsed))
    options = dict(inner.options)
    torch_dtype = _dtype(dtype or options.get("dtype"))
    options.pop("dtype", None)
    seed = 0
    if inner.family in _BUILT_IN and not pretrained and "seed" in options:  # elsewhere a seed may name weights
        seed = Spec(inner.family, inner.name, options={"seed": options.pop("seed")}).read(seed=int)["seed"]
    inner = replace(inner, options=options)
    # Building a model draws from the global generator even when the weights are then overwritten.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        native = _call(inner, parsed, task, pretrained, device, torch_dtype, offline, cache_dir)
    native.spec = parsed
    native.model.eval()
    if device is not None or torch_dtype is not None:
        native.model.to(device=device, dtype=torch_dtype)
    return native


def _call(
    spec: Spec,
    shown: Spec,
    task: str,
    pretrained: bool,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    offline: bool | None,
    cache_dir: str | Path | None,
) -> Native:
    offline = weights.is_offline(offline)
    common: dict[str, Any] = {"task": task, "pretrained": pretrained, "cache_dir": cache_dir, "dtype": dtype}
    if spec.family not in _BUILT_IN:
        (entry, *_) = importlib.metadata.entry_points(group=GROUP, name=spec.family)
        return entry.load()(spec, offline=offline, device=device, **common)
    spec, local = local_path(spec)
    by_name = spec.family != "hf" and not spec.name.startswith("hf-hub:")
    hub = pretrained or not by_name  # a random model of a known name needs nothing from anywhere
    with weights.reaching(str(shown), offline=offline, local=local, cache_dir=cache_dir, hub=hub) as quiet:
        return _BUILT_IN[spec.family](spec, offline=quiet, **common)


def _dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        return value
    if value not in _DTYPES:
        raise unknown_name("dtype", value, _DTYPES)
    return _DTYPES[value]


# ---------------------------------------------------------------------- backbones
def load_backbone(
    spec: str | Spec,
    *,
    pretrained: bool = True,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    img_size: int | tuple[int, int] | None = None,
    offline: bool | None = None,
    cache_dir: str | Path | None = None,
    trainable: bool = False,
) -> Backbone:
    """Load a vision transformer as a :class:`Backbone`.

    Parameters
    ----------
    spec, pretrained, device, dtype, offline, cache_dir
        As in :func:`load_native`.
    img_size : int or tuple of int, optional
        Input size (height, width); the same as the option ``?img_size=``.
    trainable : bool
        True leaves parameters trainable and lets ``train()`` reach the native module.

    Raises
    ------
    UserError
        As :func:`load_native`, or a model without token blocks.

    Examples
    --------
    >>> backbone = load_backbone("random:timm:vit_tiny_patch16_224")
    >>> backbone.depth, backbone.embed_dim, backbone.grid_size
    (12, 192, (14, 14))
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    if img_size is not None:
        h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
        parsed = replace(parsed, options={**parsed.options, "img_size": f"{h}" if h == w else f"{h}x{w}"})
    native = load_native(
        parsed, pretrained=pretrained, device=device, dtype=dtype, offline=offline, cache_dir=cache_dir
    )
    return wrap(native, trainable=trainable)


def wrap(
    model: nn.Module | Native,
    *,
    preprocess: Preprocess | None = None,
    class_names: list[str] | None = None,
    trainable: bool = False,
) -> Backbone:
    """View a timm, open_clip or transformers model of one's own as a :class:`Backbone`.

    Parameters
    ----------
    model : torch.nn.Module or Native
        The model itself, or an image-text model with its image tower under ``visual`` or ``vision_model``.
    preprocess : Preprocess, optional
        By default what the library recorded in the module, or the family's published one.
    class_names : list of str, optional
        Names of the logits.
    trainable : bool
        As in :func:`load_backbone`.

    Raises
    ------
    UserError
        A model without token blocks.
    """
    spec = str(model.spec) if isinstance(model, Native) else type(model).__name__
    module = model.model if isinstance(model, Native) else model
    adapter = _adapter(module, spec)
    if isinstance(model, Native):
        native = replace(model, preprocess=preprocess or model.preprocess, class_names=class_names or model.class_names)
    else:
        family = _key(type(adapter.trunk)).split(".")[0].replace("transformers", "hf")
        family = "open_clip" if adapter.path.startswith("visual") else family
        native = Native(
            Spec(family, spec),
            family,
            module,
            preprocess or _preprocess(module, adapter, family),
            class_names,
            _text(module, spec) if family == "open_clip" else None,
        )
    return Backbone(native, adapter, trainable=trainable)


def _key(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def _adapter(model: nn.Module, what: str) -> Adapter:
    """Find the image tower inside a native model and its adapter."""
    inner = getattr(model, "base_model_prefix", "")
    for path in dict.fromkeys(("", "visual", "visual.trunk", "vision_model", inner)):
        try:
            trunk = model.get_submodule(path)
        except AttributeError:
            continue
        for kind in type(trunk).__mro__:
            if _key(kind) in ADAPTERS:
                owner = model.get_submodule(path.rpartition(".")[0])
                head = (
                    getattr(owner, "head", None)
                    if path == "visual.trunk"
                    else getattr(model, "visual_projection", None)
                )
                adapter = ADAPTERS[_key(kind)](trunk, path, head)
                if isinstance(adapter, hf_family.HFAdapter):
                    adapter.classifier = getattr(model, "classifier", None)
                return adapter
    tower = getattr(model, "visual", model)
    tower = getattr(tower, "trunk", tower)
    kind_name = type(tower).__name__
    if kind_name == "NaFlexVit":
        raise UserError("NaFlexVit has a patch grid that varies", given=what, remedy="use a fixed-size ViT")
    remedy = "use a vision transformer; any image model loads as a classifier"
    raise UserError(f"the image tower {kind_name} has no token blocks that we know", given=what, remedy=remedy)


def _preprocess(model: nn.Module, adapter: Adapter, family: str) -> Preprocess:
    if family == "timm":
        return timm_family.preprocess_of(model)
    if family == "hf":
        return hf_family.default_preprocess(adapter.trunk.config)
    try:
        return open_clip_family.preprocess_of(model)
    except (KeyError, AttributeError):  # built by hand, without create_model
        log.warning("%s: no preprocessing recorded, using timm's default", type(model).__name__)
        return Preprocess(size=adapter.image_size)


def _text(model: Any, what: str) -> open_clip_family.OpenClipText | None:
    standard = getattr(model, "vocab_size", None) == 49408 and getattr(model, "context_length", None) == 77
    return open_clip_family.OpenClipText(model, "", what=what, offline=True) if standard else None
