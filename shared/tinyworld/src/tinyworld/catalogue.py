"""What tinyworld holds: data sets with their options, models with their files and cards. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from vfm_core.errors import UserError, unknown_name
from vfm_core.specs import flag

DATA: dict[str, dict[str, Callable[[str], Any]]] = {
    "birds": {
        "n": int,
        "layout": str,
        "split": str,
        "seed": int,
        "size": int,
        "shared_marks": int,
        "spurious": float,
        "plain": flag,
    },
    "digits": {"n": int, "split": str, "size": int},
    "glyphs": {
        "n": int,
        "domain": str,
        "split": str,
        "seed": int,
        "classes": int,
        "size": int,
        "own_shift": flag,
    },
}
"""Options of every data set with their converters."""

ALBUM_OPTIONS = ("task", "n", "images", "split", "seed", "depth", "needles", "words", "start")
"""Arguments of `tinyworld.albums.make_albums`: albums are prompts, not labelled pictures, hence no data spec."""

POOLS = ("avg", "token")
"""What the head of a transformer can read: the mean of the normalised patch tokens, or CLS."""

_VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
_VIT_REG = {
    "img_size": 80,
    "patch_size": 8,
    "embed_dim": 80,
    "depth": 3,
    "num_heads": 5,
    "class_token": False,
    "reg_tokens": 4,
    "init_values": 0.1,
}


@dataclass(frozen=True)
class TinyModel:
    """Entry of the registry.

    Attributes
    ----------
    name : str
        What follows ``tiny:``.
    summary : str
        One line for lists.
    image_size : int
        Side of the input in pixels.
    seeds : tuple of int
        Shipped training seeds.
    layouts : tuple of str
        Bird layouts that a head was trained for, or "glyphs", or "albums"; ``per_layout`` says whether each has its
        own file.
    pools : tuple of str
        Pooling variants of the head, default first; empty for models without a choice.
    shape : mapping
        Arguments of the architecture.
    """

    name: str
    summary: str
    image_size: int
    seeds: tuple[int, ...]
    layouts: tuple[str, ...] = ("nested", "factorial")
    per_layout: bool = False
    pools: tuple[str, ...] = ()
    shape: Mapping[str, Any] | None = None

    def file(self, seed: int, layout: str) -> str:
        """Stem of the weight file and of the card."""
        return f"{self.name}-{layout}-{seed}" if self.per_layout else f"{self.name}-{seed}"

    def check_layout(self, layout: str) -> str:
        """The layout, or a UserError that names those the model knows."""
        if layout not in self.layouts:
            raise unknown_name("layout", layout, self.layouts, where=f"tiny:{self.name}")
        return layout

    def files(self) -> list[str]:
        """Stems of all shipped files."""
        layouts = self.layouts if self.per_layout else self.layouts[:1]
        return [self.file(seed, layout) for layout in layouts for seed in self.seeds]


MODELS: dict[str, TinyModel] = {
    model.name: model
    for model in (
        TinyModel("cnn", "convolutional classifier, 16x16 feature map", 64, (0, 1, 2), per_layout=True),
        TinyModel(
            "vit",
            "ViT 64/8, CLS; learned which part, mark and colour each patch shows (stand-in for a strong backbone)",
            64,
            (0, 1, 2),
            pools=POOLS,
            shape=_VIT,
        ),
        TinyModel(
            "vit-fair",
            "as vit, but position and colour apart, from random sets of 0 to 3 marks: no label names a species' mark",
            64,
            (0, 1, 2),
            pools=POOLS,
            shape=_VIT,
        ),
        TinyModel(
            "vit-reg",
            "ViT 80/8 with 4 registers and no CLS, other width and depth; distilled from the CNN",
            80,
            (0,),
            layouts=("nested",),
            shape=_VIT_REG,
        ),
        TinyModel(
            "glyph-cnn",
            "three convolutions with BatchNorm, 20 glyphs in the source domain (each seed its own glyphs)",
            16,
            (0, 1, 2, 3, 4),
            layouts=("glyphs",),
        ),
        TinyModel("clip", "image-text towers, contrastive on captions", 64, (0,), pools=(), shape=_VIT),
    )
}
"""All tiny vision models by name: what follows ``tiny:`` in a model spec."""

LANGUAGE_MODELS: dict[str, TinyModel] = {
    "vlm": TinyModel(
        "vlm",
        "LLaVA: CLIP tower of 1 block, Llama 64 wide, 4 blocks, 4 heads on 2; answers questions about albums",
        32,
        (0, 1, 2),
        layouts=("albums",),
    ),
}
"""Models that read and write text, for `tinyworld.vlm`; they are no backbones."""


def model_entry(name: str) -> TinyModel:
    """The registry entry of a vision model, or a UserError with the closest names."""
    if name in LANGUAGE_MODELS:
        remedy = f"use tinyworld.load_{name}(seed) or tinyworld.save_{name}(folder, seed)"
        raise UserError(
            "a language model is no vision backbone", where="model spec", given=f"tiny:{name}", remedy=remedy
        )
    if name not in MODELS:
        raise unknown_name("tiny model", name, MODELS, where=f"tiny:{name}")
    return MODELS[name]


def any_entry(name: str) -> TinyModel:
    """The registry entry of any model, or a UserError with the closest names."""
    known = MODELS | LANGUAGE_MODELS
    if name not in known:
        raise unknown_name("tiny model", name, known, where=f"tiny:{name}")
    return known[name]


def all_stems() -> list[str]:
    """Stems of all shipped weight files."""
    return [stem for model in (MODELS | LANGUAGE_MODELS).values() for stem in model.files()]


def weights_path(stem: str) -> Path:
    """Where the weights of a shipped model lie."""
    return Path(str(files("tinyworld"))) / "weights" / f"{stem}.safetensors"


def card_path(stem: str) -> Path:
    """Where the card of a shipped model lies."""
    return Path(str(files("tinyworld"))) / "cards" / f"{stem}.json"


def read_card(stem: str) -> dict[str, Any]:
    """The model card: recipe, seed, measured quality, sha256, parameter count, training seconds."""
    path = card_path(stem)
    if not path.is_file():
        raise unknown_name("model card", stem, all_stems())
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card
