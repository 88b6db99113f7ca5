"""timm: ``timm:NAME``, ``timm:NAME@FILE``, ``timm:hf-hub:ORG/NAME[@REVISION]``, ``timm:local-dir:PATH``.

Adapters for ``VisionTransformer`` (DINOv2, CLIP, SigLIP, MAE, DeiT, AugReg), ``Eva`` (DINOv3, EVA-02, PE) and ``Beit``.
Any other timm model, CNNs included, still loads as a classifier.
"""
# ruff: noqa: D102  (the methods of adapters are documented once, on Adapter)

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfm_core.backbones import weights
from vfm_core.backbones.base import Adapter, Native
from vfm_core.backbones.local import WEIGHT_FILES, require_file
from vfm_core.errors import UserError, unknown_name
from vfm_core.preprocess import Preprocess
from vfm_core.specs import Spec, flag, height_width

__all__ = ["TimmBeit", "TimmEva", "TimmViT", "load", "preprocess_of"]

log = logging.getLogger(__name__)


class TimmViT(Adapter):
    """``timm.models.vision_transformer.VisionTransformer`` and its subclasses."""

    def __init__(self, trunk: nn.Module, path: str = "", head: nn.Module | None = None) -> None:
        super().__init__(trunk, path, head)
        t, patch = self.trunk, self.trunk.patch_embed
        self.embed_dim = t.embed_dim
        self.num_heads = next((m.num_heads for m in t.blocks.modules() if hasattr(m, "num_heads")), 0)
        self.patch_size = tuple(patch.patch_size)
        self.image_size = tuple(patch.img_size)
        self.has_cls = t.cls_token is not None
        self.num_registers = t.num_prefix_tokens - int(self.has_cls)  # a distillation token counts as a register
        self.flexible = bool(getattr(t, "dynamic_img_size", False))
        # With global_pool="avg" timm moves the LayerNorm behind the pooling: norm is the identity then.
        if isinstance(t.norm, nn.Identity):
            self.final_norm = "none" if isinstance(t.fc_norm, nn.Identity) else "pooled"

    def grid(self, height: int, width: int) -> tuple[int, int] | None:
        if self.flexible and self.trunk.patch_embed.dynamic_img_pad:
            return self.trunk.patch_embed.dynamic_feat_size((height, width))
        return super().grid(height, width)

    def embed(self, img: Tensor) -> tuple[Tensor, dict[str, Any]]:
        t = self.trunk
        return t.norm_pre(t.patch_drop(t._pos_embed(t.patch_embed(img)))), {}

    def pooled_norm(self, pooled: Tensor) -> Tensor:
        return getattr(self.trunk, "fc_norm", nn.Identity())(pooled)

    def pool(self, raw: Tensor) -> Tensor:
        normed = self.norm(raw)
        if self.head is not None:  # open_clip's TimmModel: the trunk's own head, then the projection
            return self.head(self.trunk.forward_head(normed))
        if not self.trunk.global_pool:
            prefix = self.trunk.num_prefix_tokens
            return self.pooled_norm(normed[:, 0] if self.has_cls else normed[:, prefix:].mean(dim=1))
        return self.trunk.forward_head(normed, pre_logits=True)

    def logits(self, raw: Tensor) -> Tensor | None:
        has_head = self.head is None and self.trunk.global_pool and self.trunk.num_classes > 0
        return self.trunk.forward_head(self.norm(raw)) if has_head else None

    def attention_impl(self, name: str) -> None:
        for module in self.blocks.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = name == "sdpa"  # type: ignore[assignment]


class TimmEva(TimmViT):
    """``timm.models.eva.Eva``: rotary positions, one table for all blocks or one per block ("mixed")."""

    ctx_keys = ("rope",)

    def embed(self, img: Tensor) -> tuple[Tensor, dict[str, Any]]:
        x, rope = self.trunk._pos_embed(self.trunk.patch_embed(img))
        return self.trunk.norm_pre(x), {"rope": rope}

    def block(self, i: int, x: Tensor, ctx: dict[str, Any]) -> Tensor:
        rope = ctx["rope"]
        if rope is not None and self.trunk.rope_mixed:
            rope = rope[i]
        return self.blocks[i](x, rope=rope)  # type: ignore[index]

    def context(self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        rope, patch = self.trunk.rope, self.trunk.patch_embed
        if rope is None:
            return {"rope": None}
        fixed = not self.flexible and hasattr(rope, "feat_shape")
        if fixed and tuple(grid) != tuple(patch.grid_size):
            raise UserError(
                f"this model's rotary table is for a {patch.grid_size} grid", given=grid, remedy="load with ?dynamic=1"
            )
        return {"rope": rope.get_embed() if fixed else rope.get_embed(shape=list(grid))}


class TimmBeit(TimmViT):
    """``timm.models.beit.Beit``: relative positions, in the blocks or shared; no ``.pool`` of its own."""

    ctx_keys = ("bias",)

    def embed(self, img: Tensor) -> tuple[Tensor, dict[str, Any]]:
        t = self.trunk
        x = t.patch_embed(img)
        x = torch.cat((t.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if t.pos_embed is not None:
            x = x + t.pos_embed
        return t.pos_drop(x), self._bias()

    def block(self, i: int, x: Tensor, ctx: dict[str, Any]) -> Tensor:
        return self.blocks[i](x, shared_rel_pos_bias=ctx["bias"])  # type: ignore[index]

    def context(self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        if tuple(grid) != tuple(self.trunk.patch_embed.grid_size):
            native = self.trunk.patch_embed.grid_size
            raise UserError(f"this model's position bias is for a {native} grid", given=grid, remedy="set img_size")
        return self._bias()

    def _bias(self) -> dict[str, Any]:
        return {"bias": self.trunk.rel_pos_bias() if self.trunk.rel_pos_bias is not None else None}


# ---------------------------------------------------------------------- loading
def load(
    spec: Spec,
    *,
    task: str = "features",
    pretrained: bool = True,
    offline: bool = False,
    cache_dir: str | Path | None = None,
    **_: Any,
) -> Native:
    """Create a timm model.

    Options: ``img_size`` (N or HxW), ``dynamic`` (0/1: any size that the patch divides), ``num_classes``, ``revision``.
    """
    import timm

    options = spec.read(img_size=height_width, dynamic=flag, num_classes=int, revision=str)
    name, arch, kwargs, overlay = _resolve(spec, options.pop("revision", None), pretrained, offline, cache_dir)
    size = options.pop("img_size", None)
    cfg = timm.models.get_pretrained_cfg(arch)
    if cfg is not None and cfg.fixed_input_size:  # only such models take these; CNNs accept any size as they are
        kwargs.update({"img_size": size} if size else {})
        kwargs.update({"dynamic_img_size": True} if options.pop("dynamic", False) else {})
    options.pop("dynamic", None)
    kwargs.update(options)
    model = timm.create_model(
        name,
        pretrained=pretrained,
        pretrained_cfg_overlay=overlay,
        cache_dir=str(cache_dir) if cache_dir else None,
        **kwargs,
    )
    given, trained = options.get("num_classes", 0), (overlay or model.pretrained_cfg).get("num_classes")
    if pretrained and given and given != trained:
        remedy = f"the checkpoint has {trained} classes: drop the option, or train a head on its features"
        raise UserError("num_classes would leave the classifier random", where=str(spec), given=given, remedy=remedy)
    head = getattr(model, "num_classes", 0) > 0
    if task == "classify" and not head:
        raise UserError("this checkpoint has no classifier", given=str(spec), remedy="train a head on its features")
    from_registry = ":" not in name and overlay is None and pretrained
    names = _class_names(model, from_registry) if head else None
    return Native(spec, "timm", model, preprocess_of(model, size), names, head=head)


def _resolve(
    spec: Spec, revision: str | None, pretrained: bool, offline: bool, cache_dir: str | Path | None
) -> tuple[str, str, dict[str, Any], dict[str, Any] | None]:
    """Return timm's model name, the architecture, and what to pass on for a checkpoint file."""
    import timm
    from timm.models import get_pretrained_cfg, is_model, split_model_name_tag

    name, source = spec.name, spec.source
    if name.startswith("local-dir:"):
        arch, _ = split_model_name_tag(json.loads(Path(name[10:], "config.json").read_text())["architecture"])
        if pretrained:
            require_file(Path(name[10:]))
        return name, arch, {}, None
    if name.startswith("hf-hub:"):
        revision = revision or source
        name = f"{name}@{revision}" if revision else name
        _, arch, _ = timm.models.load_model_config_from_hf(name[7:], cache_dir=str(cache_dir) if cache_dir else None)
        if pretrained and offline:
            weights.require_cached(str(spec), name[7:].split("@")[0], WEIGHT_FILES, revision, cache_dir)
        return name, split_model_name_tag(arch)[0], {}, None
    arch, _ = split_model_name_tag(name)
    if not is_model(arch):
        if "/" in name:
            raise UserError(
                "not a timm model name", given=name, remedy=f"use timm:hf-hub:{name} or timm:local-dir:{name}"
            )
        raise unknown_name("timm model", name, timm.list_models() + timm.list_pretrained())
    if source is not None and Path(source).is_file():
        if not pretrained:
            return name, arch, {}, None
        return name, arch, *_from_file(arch, Path(source))
    name = name if source is None else f"{arch}.{source}"
    tags = timm.list_pretrained(f"{arch}.*")
    if name != arch and name not in tags:
        what = "checkpoint file or pretrained tag" if source is not None else "pretrained tag"
        raise unknown_name(what, source if source is not None else name, tags, where=str(spec))
    if pretrained:
        cfg = get_pretrained_cfg(name)
        if cfg is None or not cfg.has_weights:
            raise UserError("no pretrained weights exist", given=str(spec), remedy=f"use random:{spec}")
        if arch.endswith(("_clip_224", "_clip_336")) and (cfg.tag or "").startswith("openai"):
            log.warning("%s: these weights were trained with QuickGELU; use %s", name, _quickgelu(arch, cfg.tag))
        if offline and cfg.hf_hub_id:
            names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else WEIGHT_FILES
            weights.require_cached(str(spec), cfg.hf_hub_id, names, None, cache_dir)
        elif offline:
            weights.require_downloaded(str(spec), cfg.url, cache_dir)
    return name, arch, {}, None


def _quickgelu(arch: str, tag: str) -> str:
    return f"timm:{arch.replace('_clip_', '_clip_quickgelu_')}.{tag}"


def _from_file(arch: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint file and size the classifier to it: a fine-tuned model rarely has 1000 classes."""
    import timm

    state = timm.models.load_state_dict(str(path), weights_only=True)
    cfg = timm.models.get_pretrained_cfg(arch)
    classifier = cfg.classifier if cfg is not None else None
    weight = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
    classes = 0 if weight is None else int(weight.shape[0])
    overlay = {"state_dict": state, "custom_load": False, "num_classes": classes, "label_names": None}
    return {"num_classes": classes}, overlay


def preprocess_of(model: nn.Module, size: tuple[int, int] | None = None) -> Preprocess:
    """Inference preprocessing of a timm model, at the size that it was really built for."""
    from timm.data import resolve_model_data_config

    cfg = resolve_model_data_config(model)
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    fill = tuple(round(255 * m) for m in cfg["mean"]) if cfg["crop_mode"] == "border" else (0, 0, 0)
    return Preprocess(
        size=tuple(size or built or cfg["input_size"][-2:]),
        resize={"squash": "squash", "border": "longest"}.get(cfg["crop_mode"], "shortest"),  # type: ignore[arg-type]
        crop_pct=cfg["crop_pct"],
        interpolation=cfg["interpolation"] if cfg["interpolation"] != "random" else "bicubic",
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        fill=fill,
    )


def _class_names(model: Any, from_registry: bool) -> list[str] | None:
    cfg = model.pretrained_cfg
    names, described = cfg.get("label_names"), cfg.get("label_descriptions") or {}
    if names and len(names) == model.num_classes:
        return [described.get(n, n) for n in names]
    if from_registry and cfg.get("num_classes") == model.num_classes:
        from timm.data import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset(model)
        if subset:
            info = ImageNetInfo(subset)
            return [info.index_to_description(i) for i in range(model.num_classes)]
    return None
