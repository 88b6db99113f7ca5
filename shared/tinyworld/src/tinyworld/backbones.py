"""Model specs ``tiny:NAME`` (entry point of the group ``vfm_core.backbones``).

``tiny:cnn``, ``tiny:vit``, ``tiny:vit-fair``, ``tiny:vit-reg``, ``tiny:glyph-cnn``, ``tiny:clip``; options ``seed``
(training run), ``layout`` (which classes a head knows), ``pool`` (what a transformer's head reads), ``img_size``;
``@FILE`` reads weights made by ``tinyworld train`` instead of the shipped ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vfm_core.backbones import Native
from vfm_core.errors import UserError, unknown_name
from vfm_core.preprocess import Preprocess
from vfm_core.specs import Spec, height_width

from tinyworld.catalogue import TinyModel, model_entry, weights_path
from tinyworld.glyphs import glyph_names
from tinyworld.models import MEAN, STD, build, read_weights, shipped
from tinyworld.species import species_of


def load_tiny(
    spec: Spec,
    *,
    task: str = "features",
    pretrained: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **_: Any,
) -> Native:
    """Load a tiny model.

    Parameters
    ----------
    spec : Spec
        See the module docstring.
    task : {"features", "classify"}
        "classify" adds the linear head over `Birds.classes` of the layout, or over the 20 glyphs. ``tiny:clip`` comes
        with both towers, and with the species' names as texts to classify by.
    pretrained : bool
        False gives random weights from ``?seed=``.
    device, dtype : optional
        Where the model goes; float32 on the CPU by default.

    Returns
    -------
    Native
        Family "tiny"; the transformers are plain timm ``VisionTransformer`` modules.

    Raises
    ------
    UserError
        Unknown model, option, layout or pooling, or a seed for which nothing is shipped.
    """
    entry = model_entry(spec.name)
    options = spec.read(seed=int, layout=str, pool=str, img_size=height_width)
    seed, layout = options.get("seed", 0), options.get("layout", entry.layouts[0])
    pool = options.get("pool", entry.pools[0] if entry.pools else "avg")
    entry.check_layout(layout)
    if "pool" in options and pool not in entry.pools:
        if not entry.pools:
            raise UserError("this model has one pooling only", where=str(spec), given=pool, remedy="drop the option")
        raise unknown_name("pooling", pool, entry.pools, where=str(spec))
    tensors = read_weights(_file(spec, entry, seed, layout)) if pretrained else None
    size = options.get("img_size", (entry.image_size, entry.image_size))
    names = glyph_names(20) if layout == "glyphs" else [str(one) for one in species_of(layout)]
    preprocess = Preprocess(size, "shortest", 1.0, "bicubic", MEAN, STD)
    if entry.name == "clip":
        from tinyworld.clip import ClipText, TinyCLIP, clip_from

        clip = TinyCLIP(seed) if tensors is None else clip_from(tensors)
        _resize(clip.visual, size, spec)
        clip.to(device=device, dtype=dtype)
        return Native(spec, "tiny", clip, preprocess, names, text=ClipText(clip))
    classify = task == "classify"
    if tensors is None:
        model = build(entry.name, len(names) if classify else 0, pool, seed)
    else:
        model = shipped(entry.name, tensors, layout if classify else None, pool)
    _resize(model, size, spec)
    model.to(device=device, dtype=dtype)
    return Native(spec, "tiny", model, preprocess, names if classify else None, head=classify)


def _file(spec: Spec, entry: TinyModel, seed: int, layout: str) -> Path:
    if spec.source is not None:
        return Path(spec.source).expanduser()
    if seed not in entry.seeds:
        shipped_seeds = ", ".join(map(str, entry.seeds))
        remedy = f"shipped: {shipped_seeds}; make others with `tinyworld train {entry.name} --seed {seed}`"
        raise UserError("no weights for this seed", where=str(spec), given=seed, remedy=remedy)
    return weights_path(entry.file(seed, layout))


def _resize(model: nn.Module, size: tuple[int, int], spec: Spec) -> None:
    """Give a transformer another input size (positions are resampled); the CNN takes any."""
    patch_embed: Any = getattr(model, "patch_embed", None)
    if patch_embed is None or tuple(patch_embed.img_size) == size:
        return
    height, width = patch_embed.patch_size
    if size[0] % height or size[1] % width:
        remedy = f"give multiples of {height}"
        raise UserError(
            "image size does not fit the patches", where=str(spec), given=f"{size[0]}x{size[1]}", remedy=remedy
        )
    model.set_input_size(img_size=size)  # type: ignore[operator]
