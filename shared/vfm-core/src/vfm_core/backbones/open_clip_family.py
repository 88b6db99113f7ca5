"""open_clip: ``open_clip:NAME@TAG``, ``:NAME@FILE``, ``:hf-hub:ORG/NAME``, ``:local-dir:PATH``.

The native model is the whole image-text model; the backbone is its image tower, open_clip's own ``VisionTransformer``
or a timm model inside ``TimmModel``. Towers without token blocks (RN50, ConvNeXt) still load as native models.
"""
# ruff: noqa: D102  (the methods of adapters are documented once, on Adapter)

from __future__ import annotations

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
from vfm_core.specs import Spec, height_width

__all__ = ["OpenClipText", "OpenClipViT", "load", "preprocess_of"]

log = logging.getLogger(__name__)


class OpenClipViT(Adapter):
    """``open_clip.transformer.VisionTransformer`` (OpenAI and LAION CLIP, BioCLIP, CoCa)."""

    blocks_at, norm1 = "transformer.resblocks", "ln_1"
    has_cls = True

    def __init__(self, trunk: nn.Module, path: str = "", head: nn.Module | None = None) -> None:
        super().__init__(trunk, path, head)
        t = self.trunk
        self.embed_dim = t.transformer.width
        self.num_heads = t.transformer.resblocks[0].attn.num_heads
        self.patch_size, self.image_size = tuple(t.patch_size), tuple(t.image_size)
        # With an attention pooler ln_post belongs to the pooler's output, not to the tokens.
        self.final_norm = "pooled" if t.attn_pool is not None or t.final_ln_after_pool else "tokens"

    def embed(self, img: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.trunk._embeds(img), {}

    def block(self, i: int, x: Tensor, ctx: dict[str, Any]) -> Tensor:
        if self.trunk.transformer.batch_first:
            return self.blocks[i](x)  # type: ignore[index]
        return self.blocks[i](x.transpose(0, 1)).transpose(0, 1)  # type: ignore[index]

    def norm(self, x: Tensor) -> Tensor:
        return self.trunk.ln_post(x) if self.final_norm == "tokens" else x

    def pooled_norm(self, pooled: Tensor) -> Tensor:
        after_pool = self.final_norm == "pooled" and self.trunk.attn_pool is None
        return self.trunk.ln_post(pooled) if after_pool else pooled

    def pool(self, raw: Tensor) -> Tensor:
        pooled, _ = self.trunk._pool(raw)
        return pooled if self.trunk.proj is None else pooled @ self.trunk.proj


class OpenClipText:
    """Text tower of an open_clip model.

    Parameters
    ----------
    model : torch.nn.Module
        The image-text model.
    tokenizer_name : str
        What ``open_clip.get_tokenizer`` takes; the tokenizer is made at first use, for some need files from the hub.
    what : str
        The spec, for messages.
    offline : bool or None
        As in ``load_native``.
    cache_dir : str, Path or None
        As in ``load_native``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer_name: str,
        *,
        what: str,
        offline: bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.model = model
        self.logit_scale = float(self.model.logit_scale.detach().exp())
        self._name, self._what, self._offline, self._cache_dir = tokenizer_name, what, offline, cache_dir
        self._tokenizer: Any = None

    def encode(self, texts: list[str]) -> Tensor:
        """Return (n, D) L2-normalised embeddings on the model's device; texts are used as they are, no template.

        Raises
        ------
        UserError
            No texts, or a tokenizer whose files cannot be reached.
        """
        if isinstance(texts, str) or not texts:
            raise UserError("expected a non-empty list of texts", given=repr(texts))
        device = self.model.logit_scale.device
        with torch.no_grad():
            parts = [
                self.model.encode_text(self.tokenize(texts[i : i + 256]).to(device), normalize=True)
                for i in range(0, len(texts), 256)
            ]
        return torch.cat(parts)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Return (n, context length) token ids, cut or padded by the model's own tokenizer."""
        if self._tokenizer is None:
            import open_clip

            local = Path(self._name[10:]) if self._name.startswith("local-dir:") else None
            cache = str(self._cache_dir) if self._cache_dir else None
            offline, what = weights.is_offline(self._offline), f"tokenizer of {self._what}"
            with weights.reaching(
                what, offline=offline, local=local, cache_dir=cache, hub=_tokenizer_in_hub(self.model)
            ):
                self._tokenizer = open_clip.get_tokenizer(self._name, cache_dir=cache)
        return self._tokenizer(texts)


def _tokenizer_in_hub(model: Any) -> bool:
    # 49408 is the vocabulary of CLIP's byte-pair encoding, which comes with open_clip.
    return int(getattr(model, "vocab_size", 0)) != 49408


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
    """Create an image-text model. Option: ``img_size`` (N or HxW); the classifier is left to text prompts."""
    import open_clip

    size = spec.read(img_size=height_width).get("img_size")
    name, source = spec.name, spec.source
    kwargs: dict[str, Any] = {"cache_dir": str(cache_dir) if cache_dir else None, "pretrained_text": False}
    if source is not None and name.startswith("hf-hub:"):
        raise UserError("open_clip reads the main revision only", where=str(spec), given=source, remedy="drop the '@'")
    if name.startswith("local-dir:"):
        if pretrained:
            require_file(Path(name[10:]))
    elif name.startswith("hf-hub:"):
        if pretrained and offline:
            weights.require_cached(str(spec), name[7:], WEIGHT_FILES, None, cache_dir)
    else:
        name, source = _known(spec, open_clip.list_models())
        kwargs.update(_source(name, source, spec, offline, cache_dir) if pretrained else _statistics(name, source))
    if not pretrained:
        kwargs["load_weights"] = False
    if size:
        kwargs["force_image_size"] = size if size[0] != size[1] else size[0]
    model = open_clip.create_model(name, require_pretrained=pretrained, **kwargs)
    text = OpenClipText(model, name, what=str(spec), offline=offline, cache_dir=cache_dir)
    return Native(spec, "open_clip", model, preprocess_of(model), text=text)


def _known(spec: Spec, known: list[str]) -> tuple[str, str | None]:
    """Read ``NAME``, ``NAME@TAG`` or ``NAME/TAG``; names may be written the old way, ``ViT-B/16``."""
    for head, tail in ((spec.name, spec.source), tuple(spec.name.rsplit("/", 1)) if "/" in spec.name else ("", None)):
        if head.replace("/", "-") in known:
            return head.replace("/", "-"), tail
    if "/" in spec.name:
        remedy = f"for a model of the hub write open_clip:hf-hub:{spec.name}"
        raise UserError("unknown open_clip model", given=repr(spec.name), remedy=remedy)
    raise unknown_name("open_clip model", spec.name, known)


def _source(name: str, source: str | None, spec: Spec, offline: bool, cache_dir: str | Path | None) -> dict[str, Any]:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tags = open_clip.list_pretrained_tags_by_model(name)
    if source is None:
        remedy = f"add one of {', '.join(tags)}, or use random:{spec}" if tags else f"use random:{spec}"
        raise UserError("a pretrained tag is needed (open_clip:NAME@TAG)", given=str(spec), remedy=remedy)
    if Path(source).is_file():
        return {"pretrained": str(Path(source)), **_statistics(name, None)}
    cfg = get_pretrained_cfg(name, source)
    if not cfg:
        raise unknown_name("checkpoint file or pretrained tag", source, tags, where=str(spec))
    if offline and cfg.get("hf_hub"):
        repo, _, file = cfg["hf_hub"].rpartition("/")
        weights.require_cached(str(spec), repo, [file] if file else WEIGHT_FILES, None, cache_dir)
    # Weights trained with QuickGELU load into a plain GELU model without an error and give worse features.
    quick = bool(cfg.get("quick_gelu")) and "quickgelu" not in name
    if quick:
        log.info("%s: trained with QuickGELU, which is switched on", spec)
    return {"pretrained": source, "force_quick_gelu": quick}


def _statistics(name: str, tag: str | None) -> dict[str, Any]:
    """Preprocessing that goes with a name when open_clip has no tag to read it from: that of the given or first tag."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    cfg = get_pretrained_cfg(name, tag or next(iter(open_clip.list_pretrained_tags_by_model(name)), ""))
    kept = {key: cfg[key] for key in ("mean", "std", "interpolation", "resize_mode") if cfg.get(key) is not None}
    return {"force_preprocess_cfg": kept}


def preprocess_of(model: nn.Module) -> Preprocess:
    """Inference preprocessing, right only once the weights are resolved: before, SigLIP reports CLIP's statistics."""
    import open_clip

    cfg = open_clip.get_model_preprocess_cfg(model)
    size = cfg["size"]
    return Preprocess(
        size=(size, size) if isinstance(size, int) else tuple(size),
        resize=cfg["resize_mode"],
        interpolation=cfg["interpolation"] if cfg["interpolation"] != "random" else "bicubic",
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        fill=(cfg.get("fill_color", 0),) * 3,
    )
