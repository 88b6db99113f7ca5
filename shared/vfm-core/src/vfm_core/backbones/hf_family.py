"""transformers: ``hf:ORG/NAME[@REVISION]`` or ``hf:./folder``.

Backbones: CLIP, SigLIP, DINOv2 (with and without registers), DINOv3, ViT and ViTMAE. Attribute names are those of
transformers 5 in memory; they differ from the names on disk, so weights are only ever read through ``from_pretrained``.
Any model with an image classification head loads as a classifier.
"""
# ruff: noqa: D102  (the methods of adapters are documented once, on Adapter)

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfm_core.backbones.base import Adapter, Native
from vfm_core.backbones.local import require_file
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess
from vfm_core.specs import Spec, height_width

__all__ = ["HFClip", "HFDinov2", "HFDinov3", "HFMae", "HFSiglip", "HFViT", "default_preprocess", "load"]

log = logging.getLogger(__name__)


class HFAdapter(Adapter):
    """What the transformers families share: facts from the config, a CLS token, class logits."""

    attn = "attention"
    has_cls = True
    flexible = True

    def __init__(self, trunk: nn.Module, path: str = "", head: nn.Module | None = None) -> None:
        super().__init__(trunk, path, head)
        config = self.trunk.config
        self.embed_dim, self.num_heads = config.hidden_size, config.num_attention_heads
        self.patch_size, self.image_size = _pair(config.patch_size), _pair(config.image_size)
        self.num_registers = getattr(config, "num_register_tokens", 0)
        self.classifier: nn.Module | None = None

    def embed(self, img: Tensor) -> tuple[Tensor, dict[str, Any]]:
        resized = tuple(img.shape[-2:]) != self.image_size
        return self.trunk.embeddings(img, interpolate_pos_encoding=resized), {}

    def block(self, i: int, x: Tensor, ctx: dict[str, Any]) -> Tensor:
        return _plain(self.blocks[i](x))  # type: ignore[index]

    def norm(self, x: Tensor) -> Tensor:
        return self.trunk.layernorm(x)

    def pool(self, raw: Tensor) -> Tensor:
        return self.norm(raw)[:, 0]

    def class_vector(self, raw: Tensor) -> Tensor:
        """What the family's own image classification head reads."""
        return self.norm(raw)[:, 0]

    def logits(self, raw: Tensor) -> Tensor | None:
        return self.classifier(self.class_vector(raw)) if self.classifier is not None else None

    def attention_impl(self, name: str) -> None:
        self.trunk.set_attn_implementation(name)


class HFViT(HFAdapter):
    """``ViTModel``: CLS through the pooler where there is one."""

    blocks_at, norm1 = "layers", "layernorm_before"

    def pool(self, raw: Tensor) -> Tensor:
        normed, pooler = self.norm(raw), getattr(self.trunk, "pooler", None)
        return normed[:, 0] if pooler is None else pooler(normed)


class HFMae(HFAdapter):
    """``ViTMAEModel``, which masks and permutes patches even at ``mask_ratio=0`` unless the noise is ordered."""

    blocks_at, norm1 = "layers", "layernorm_before"

    def embed(self, img: Tensor) -> tuple[Tensor, dict[str, Any]]:
        embeddings, (h, w), (ph, pw) = self.trunk.embeddings, img.shape[-2:], self.patch_size
        ordered = torch.arange((h // ph) * (w // pw), device=img.device, dtype=torch.float32).expand(len(img), -1)
        ratio = embeddings.config.mask_ratio
        embeddings.config.mask_ratio = 0.0
        try:
            x, _, _ = embeddings(img, noise=ordered, interpolate_pos_encoding=(h, w) != self.image_size)
        finally:
            embeddings.config.mask_ratio = ratio
        return x, {}


class HFDinov2(HFAdapter):
    """``Dinov2Model`` and ``Dinov2WithRegistersModel``; positions are always interpolated to the image."""

    blocks_at = "encoder.layer"

    def embed(self, img: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.trunk.embeddings(img), {}

    def class_vector(self, raw: Tensor) -> Tensor:
        normed = self.norm(raw)
        return torch.cat([normed[:, 0], normed[:, 1 + self.num_registers :].mean(dim=1)], dim=1)


class HFDinov3(HFAdapter):
    """``DINOv3ViTModel``: rotary positions from the image size."""

    blocks_at, ctx_keys = "model.layer", ("pe",)

    def embed(self, img: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.trunk.embeddings(img), {"pe": self.trunk.rope_embeddings(img)}

    def block(self, i: int, x: Tensor, ctx: dict[str, Any]) -> Tensor:
        return _plain(self.blocks[i](x, position_embeddings=ctx["pe"]))  # type: ignore[index]

    def norm(self, x: Tensor) -> Tensor:
        return self.trunk.norm(x)

    def context(self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        (h, w), (ph, pw) = grid, self.patch_size
        return {"pe": self.trunk.rope_embeddings(torch.empty(1, 3, h * ph, w * pw, device=device, dtype=dtype))}


class HFClip(HFAdapter):
    """``CLIPVisionModel``: pre-norm (spelled so), CLS pooled before the post-norm."""

    blocks_at, norm1, attn = "encoder.layers", "layer_norm1", "self_attn"

    def embed(self, img: Tensor) -> tuple[Tensor, dict[str, Any]]:
        x, ctx = super().embed(img)
        return self.trunk.pre_layrnorm(x), ctx

    def block(self, i: int, x: Tensor, ctx: dict[str, Any]) -> Tensor:
        return _plain(self.blocks[i](x, None))  # type: ignore[index]

    def norm(self, x: Tensor) -> Tensor:
        return self.trunk.post_layernorm(x)

    def pool(self, raw: Tensor) -> Tensor:
        pooled = self.trunk.post_layernorm(raw[:, 0])
        return pooled if self.head is None else self.head(pooled)

    def class_vector(self, raw: Tensor) -> Tensor:
        return raw[:, 1:].mean(dim=1)


class HFSiglip(HFClip):
    """``SiglipVisionModel``, also that of the fixed-size SigLIP 2 checkpoints: no CLS, attention pooling."""

    has_cls = False

    def embed(self, img: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return HFAdapter.embed(self, img)

    def pool(self, raw: Tensor) -> Tensor:
        normed = self.norm(raw)
        return self.trunk.head(normed) if self.trunk.use_head else normed.mean(dim=1)

    def class_vector(self, raw: Tensor) -> Tensor:
        return self.norm(raw).mean(dim=1)


def _plain(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # tuples up to transformers 4


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


# ---------------------------------------------------------------------- loading
# model_type -> vision class; a dual-tower checkpoint loads straight into its vision class, without the text weights
_VISION = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "vit": "ViTModel",
    "vit_mae": "ViTMAEModel",
}
_NAFLEX = ("siglip2", "siglip2_vision_model")
# Parts that a checkpoint may lack without harm: nothing that we call reads them.
_HARMLESS = ("mask_token", "pooler.", "decoder.")
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {**_CLIP, "resize": "shortest"},
    "siglip": {**_HALF, "resize": "squash"},
    "dinov2": {**_IMAGENET, "resize": "shortest", "crop_pct": 0.875},
    "dinov3": {**_IMAGENET, "resize": "squash", "interpolation": "bilinear"},
    "vit_mae": {**_IMAGENET, "resize": "squash"},
    "vit": {**_HALF, "resize": "squash", "interpolation": "bilinear"},
}
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def load(
    spec: Spec,
    *,
    task: str = "features",
    pretrained: bool = True,
    dtype: torch.dtype | None = None,
    offline: bool = False,
    cache_dir: str | Path | None = None,
    **_: Any,
) -> Native:
    """Create a transformers vision model. Options: ``img_size`` (N or HxW), ``revision``."""
    import transformers

    options = spec.read(img_size=height_width, revision=str)
    where: dict[str, Any] = {
        "revision": options.get("revision") or spec.source or "main",
        "cache_dir": str(cache_dir) if cache_dir else None,
        "local_files_only": offline,
    }
    with _quiet():
        config = transformers.AutoConfig.from_pretrained(spec.name, **where)
        cls = _model_class(spec, config, task)
        if pretrained:
            if Path(spec.name).is_dir():
                require_file(Path(spec.name))
            # Without dtype, transformers keeps the precision on disk; float32 is what the other families give.
            model, info = cls.from_pretrained(
                spec.name, output_loading_info=True, dtype=dtype or torch.float32, **where
            )
            _check_complete(spec, model, info)
        elif hasattr(cls, "from_config"):
            model = cls.from_config(config, dtype=torch.float32)
        else:
            wanted = cls.config_class
            model = cls(config if isinstance(config, wanted) else config.vision_config)
        preprocess = _preprocess(spec, model.config, where)
    head = getattr(model, "classifier", None) is not None
    names = _class_names(model.config) if head else None
    size = options.get("img_size")
    if size is not None:
        _check_size(spec, model, size, task)
        preprocess = preprocess.with_size(*size)
    return Native(spec, "hf", model, preprocess, names, head=head)


def _model_class(spec: Spec, config: Any, task: str) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as HEADS

    kind = config.model_type
    trained_head = any(a.endswith("ForImageClassification") for a in config.architectures or [])
    if task == "classify":
        if kind not in HEADS:
            raise UserError("no image classifier for this model type", where=str(spec), given=kind)
        return transformers.AutoModelForImageClassification
    if kind in _NAFLEX:
        remedy = "use a fixed-size checkpoint such as hf:google/siglip2-base-patch16-224"
        raise UserError("NaFlex models have a patch grid that varies", given=str(spec), remedy=remedy)
    if kind not in _VISION:
        remedy = f"supported: {', '.join(sorted(set(_VISION)))}; as a classifier any model loads"
        raise UserError("model type without token blocks that we know", where=str(spec), given=kind, remedy=remedy)
    if trained_head and kind in HEADS:
        return transformers.AutoModelForImageClassification
    return getattr(transformers, _VISION[kind])


def _check_complete(spec: Spec, model: Any, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that leaves weights random; transformers only logs it."""
    missing = sorted(k for k in info["missing_keys"] if not any(part in k for part in _HARMLESS))
    if any(key.split(".")[0] in ("classifier", "head") and "classifier" in key for key in missing):
        remedy = "train a head on its features, or give a fine-tuned checkpoint"
        raise UserError("this checkpoint has no classifier", given=str(spec), remedy=remedy)
    if missing:
        given = f"{len(missing)} weights are missing, first {missing[0]}"
        raise UserError("checkpoint does not fit its config", where=str(spec), given=given, remedy="check config.json")
    if any("pooler." in key for key in info["missing_keys"]):
        model.pooler = None  # as if built with add_pooling_layer=False, rather than pooling with random weights


def _class_names(config: Any) -> list[str] | None:
    names = [str(config.id2label[i]) for i in range(config.num_labels)] if config.id2label else []
    return None if not names or names == [f"LABEL_{i}" for i in range(len(names))] else names


def _check_size(spec: Spec, model: Any, size: tuple[int, int], task: str) -> None:
    fixed = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    if task == "classify" and fixed and size != _pair(model.config.image_size):
        remedy = f"leave img_size out: the classifier takes {model.config.image_size} pixels"
        raise UserError("this classifier has a fixed image size", where=str(spec), given=f"{size}", remedy=remedy)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and loading reports: what matters in them becomes an error here."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


# ---------------------------------------------------------------------- preprocessing
def default_preprocess(config: Any) -> Preprocess:
    """The family's published preprocessing, for checkpoints that come without a preprocessor file."""
    config = getattr(config, "vision_config", config)
    kind = config.model_type
    family = next((name for name in _DEFAULTS if kind.startswith(name) and (name != "vit" or kind == "vit")), None)
    values = _DEFAULTS[family] if family else {**_IMAGENET, "crop_pct": 0.875}
    h, w = _pair(getattr(config, "image_size", 224))
    if family == "dinov2":  # position tables for 518 pixels, but published and evaluated at 224
        h, w = min(h, 224), min(w, 224)
    return Preprocess(size=(h, w), **values)


def _preprocess(spec: Spec, config: Any, where: dict[str, Any]) -> Preprocess:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(spec.name, **where)
    except (OSError, ValueError):
        log.warning("%s: no preprocessor_config.json, using the default of %s", spec, config.model_type)
        return default_preprocess(config)
    return _from_processor(processor, default_preprocess(config))


def _from_processor(p: Any, default: Preprocess) -> Preprocess:
    """Read a processor's fields; ``size`` is a SizeDict with height and width or a shortest edge."""

    def field(owner: Any, *names: str) -> int | None:
        return next((v for n in names if (v := (getattr(owner, n, None) if owner is not None else None))), None)

    size = getattr(p, "size", None)
    edge, height, width = field(size, "shortest_edge"), field(size, "height"), field(size, "width")
    crop_size = p.crop_size if getattr(p, "do_center_crop", False) else None
    crop = (field(crop_size, "height", "shortest_edge"), field(crop_size, "width", "shortest_edge"))
    out, resize, pct = default.size, "none", 1.0
    if not getattr(p, "do_resize", True):
        out = (crop[0] or out[0], crop[1] or out[1])
    elif edge:
        out, resize = (crop[0] or edge, crop[1] or edge), "shortest"
        pct = _crop_pct(out[0], edge)
        if getattr(p, "crop_pct", None):  # ConvNeXt: crops below 384 pixels, squashes from there on
            pct, resize = (float(p.crop_pct), "shortest") if edge < 384 else (1.0, "squash")
    elif height and width:
        out, resize = (crop[0] or height, crop[1] or width), "squash"
        pct = _crop_pct(out[0], height)
    normalise = getattr(p, "do_normalize", True)
    resample = getattr(p, "resample", None)
    return Preprocess(
        size=out,
        resize=resize,  # type: ignore[arg-type]
        crop_pct=pct,
        interpolation=_RESAMPLE[2 if resample is None else int(resample)],  # type: ignore[arg-type]
        mean=tuple(p.image_mean) if normalise else (0.0, 0.0, 0.0),
        std=tuple(p.image_std) if normalise else (1.0, 1.0, 1.0),
    )


def _crop_pct(crop: int, edge: int) -> float:
    """Return the fraction whose ``floor(crop / fraction)`` is exactly ``edge``."""
    fraction = min(crop / edge, 1.0)
    return fraction if math.floor(crop / fraction) >= edge else math.nextafter(fraction, 0.0)
