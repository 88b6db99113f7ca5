"""How every tiny model is made, measured and written down: ``tinyworld train NAME`` runs one of these.

A recipe is a function of the seed alone. It returns the tensors to ship and what to say about them; `make` adds the
measured quality, the hash and the cost, and writes the weights and the card.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from vfm_core.backbones import Native
from vfm_core.specs import Spec

from tinyworld import models
from tinyworld.backbones import load_tiny
from tinyworld.birds import Birds
from tinyworld.catalogue import any_entry, card_path, model_entry, weights_path
from tinyworld.glyphs import DOMAINS, Glyphs
from tinyworld.models import build, rounded, seeded
from tinyworld.pretext import PRETEXTS, PretextModel, pretext_loss
from tinyworld.towers import train_clip, train_distilled
from tinyworld.training import Schedule, one_thread, recipe_key, shuffled, to_input, train

log = logging.getLogger(__name__)

Report = Callable[[int, float], None]

VAL_IMAGES = 640
"""Birds of the split "val" (world seed 0) on which the cards' accuracies are measured."""

MEASURED_ON = {
    "glyphs": f'Glyphs(n={VAL_IMAGES // 20}, split="val", seed={{seed}})',
    "albums": 'make_albums(task, 240, images=8, split="val", seed=0)',
    "birds": f'Birds(n={VAL_IMAGES}, split="val", seed=0)',
}


@dataclass
class Product:
    """What a recipe returns: tensors to ship, how they came about, CPU seconds, parameters of one classifier."""

    tensors: dict[str, Tensor]
    recipe: str
    seconds: float
    parameters: int


def train_cnn(seed: int, layout: str, report: Report | None = None) -> Product:
    """Supervised classifier: 1,920 birds of the layout's training split, 12 epochs."""
    birds = Birds(1920, layout, "train", seed)
    x, y = to_input(birds.images(range(len(birds)))), torch.from_numpy(birds.labels)
    model = build("cnn", len(birds.classes), seed=seed)
    schedule = Schedule(epochs=12, steps=60, lr=1e-2)
    seconds = train(model, shuffled(x, y, batch=32, seed=seed), _classify, schedule, seed, report)
    recipe = (
        f'cross-entropy on Birds(n=1920, layout="{layout}", split="train", seed={seed}), mirrored at random; '
        "AdamW, one cycle to 1e-2, weight decay 0.01, batch 32, 12 epochs"
    )
    state = model.state_dict()
    tensors = _body(state)
    tensors.update({f"heads.{layout}.avg.{key}": state[f"fc.{key}"] for key in ("weight", "bias")})
    return Product(tensors, recipe, seconds, _size(model))


def train_glyph_cnn(seed: int, report: Report | None = None) -> Product:
    """Supervised classifier of 20 glyphs in the source domain, 120 pictures each, 10 epochs."""
    glyphs = Glyphs(120, "source", "train", seed)
    x, y = to_input(glyphs.images(range(len(glyphs)))), torch.from_numpy(glyphs.labels)
    model = build("glyph-cnn", len(glyphs.classes), seed=seed)
    schedule = Schedule(epochs=10, steps=len(x) // 64, lr=0.1, weight_decay=5e-4, clip=float("inf"), rule="sgd")

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        return ((x[rows], y[rows]) for rows in order.split(64)[: schedule.steps])

    seconds = train(model, batches, _classify, schedule, seed, report)
    recipe = (
        f'cross-entropy on Glyphs(n=120, domain="source", split="train", seed={seed}); SGD, Nesterov momentum 0.9, '
        "cosine from 0.1, weight decay 5e-4, batch 64, 10 epochs"
    )
    state = model.state_dict()
    tensors = _body(state) | {f"heads.glyphs.avg.{key}": state[f"fc.{key}"] for key in ("weight", "bias")}
    return Product(tensors, recipe, seconds, _size(model))


def train_vit(name: str, seed: int, report: Report | None = None) -> Product:
    """Dense attribute prediction (see `tinyworld.pretext`), then linear heads on the frozen features."""
    pretext, key = PRETEXTS[name], recipe_key(name, seed)
    parts = [pretext.batch(key, np.arange(start, start + 256), 64, 8) for start in range(0, 6400, 256)]
    x, patches, image = (torch.cat(column) for column in zip(*parts))
    vit = build(name, 0, seed=seed)
    with seeded(seed + 1):
        model = PretextModel(vit, pretext, 64)
    batches = shuffled(x, patches, image, batch=32, seed=seed, grid=8)
    schedule = Schedule(epochs=15, steps=100, lr=3e-3, weight_decay=0.05)
    seconds = train(model, lambda epoch: islice(batches(epoch), 100), pretext_loss, schedule, seed, report)
    rounded(vit)
    tensors = _body(vit.state_dict())
    for layout in model_entry(name).layouts:
        tensors.update(_linear_heads(vit, layout))
    birds = "0 to 3 marks of any colour and position" if pretext.mark_sets else "one of the 16 nested marks, or none"
    labels = "position, colour" if pretext.mark_sets else "mark, its position, its colour"
    recipe = (
        f"binary cross-entropy on attributes of every patch (8 body parts, {labels}, body colour) and of the image "
        f"(through CLS; without body parts), 6,400 birds with {birds}; AdamW, one cycle to 3e-3, weight decay 0.05, "
        "batch 32, 1,500 steps. Heads: multinomial logistic regression on the frozen features of "
        'Birds(n=1920, split="train", seed=0)'
    )
    return Product(tensors, recipe, seconds, _size(vit) + 65 * 16)


def train_vit_reg(seed: int, report: Report | None = None) -> Product:
    """Distillation from the CNN (see `tinyworld.towers`)."""
    vit, head, seconds = train_distilled(seed, report)
    tensors = _body(vit.state_dict())
    tensors.update({f"heads.nested.avg.{key}": value for key, value in head.state_dict().items()})
    recipe = (
        "distillation without labels: every patch token predicts the standardised feature map of tiny:cnn (nested, "
        "seed 0) around its patch (squared error), their mean predicts its class probabilities (cross-entropy); "
        "6,400 birds enlarged from 64 to 80 pixels; AdamW, one cycle to 3e-3, weight decay 0.05, batch 32, 1,400 steps"
    )
    return Product(tensors, recipe, seconds, _size(vit) + _size(head))


def train_clip_towers(seed: int, report: Report | None = None) -> Product:
    """Image and text tower on captions (see `tinyworld.towers`)."""
    model, seconds = train_clip(seed, report)
    recipe = (
        "pairwise sigmoid loss between 64 pictures and 128 captions per step, every pair labelled by whether the "
        "caption is true of the picture; 6,400 scenes (8% without a bird, marks of any colour and position); image "
        "tower starts from tiny:vit-fair (seed 0); AdamW, one cycle to 2e-3, weight decay 0.02, 8 epochs"
    )
    return Product(dict(model.state_dict()), recipe, seconds, _size(model))


def train_language(seed: int, report: Report | None = None) -> Product:
    """Pictures, words and answers (see `tinyworld.vlm_training`)."""
    from tinyworld.vlm_training import RECIPE, train_vlm

    model, seconds = train_vlm(seed, report)
    tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}  # tied
    return Product(tensors, RECIPE.format(seed=seed), seconds, _size(model))


def _classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _body(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the head and without batch counters."""
    skipped = ("fc.", "head.")
    return {k: v for k, v in state.items() if not k.startswith(skipped) and not k.endswith("num_batches_tracked")}


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _linear_heads(vit: nn.Module, layout: str) -> dict[str, Tensor]:
    """Heads on the mean of the normalised patch tokens and on CLS, as tensors "heads.<layout>.<pool>.*"."""
    birds = Birds(1920, layout, "train", 0, size=64)
    tokens = final_tokens(vit, to_input(birds.images(range(len(birds)))))
    y = torch.from_numpy(birds.labels)
    pooled = {"avg": tokens[:, 1:].mean(1), "token": tokens[:, 0]}
    found = {}
    for pool, features in pooled.items():
        weight, bias = logistic_regression(features, y, len(birds.classes))
        found[f"heads.{layout}.{pool}.weight"], found[f"heads.{layout}.{pool}.bias"] = weight, bias
    return found


@torch.no_grad()
def final_tokens(vit: nn.Module, x: Tensor) -> Tensor:
    """All tokens after the final norm, (n, prefix + M, D)."""
    return torch.cat([vit.forward_features(part) for part in x.split(64)])  # type: ignore[operator]


def logistic_regression(features: Tensor, y: Tensor, classes: int, penalty: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS.

    Parameters
    ----------
    features : Tensor, shape (n, D)
        Standardised inside; the result applies to the raw features.
    y : Tensor of int64, shape (n,)
        Classes.
    classes : int
        Number of classes.
    penalty : float
        Factor of the squared weights.

    Returns
    -------
    weight : Tensor, shape (classes, D)
    bias : Tensor, shape (classes,)
    """
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    z = (features - mean) / deviation
    weight = torch.zeros(classes, z.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z @ weight.T + bias, y) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with one_thread(), torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        raw = weight / deviation
        return raw, bias - raw @ mean


def accuracy(native: Native, birds: Birds | Glyphs) -> float:
    """Top-1 accuracy on birds or glyphs, in [0, 1]; an image-text model classifies by the species' captions."""
    hits = 0
    text = native.text.encode(birds.captions) if native.text and isinstance(birds, Birds) else None
    with torch.inference_mode():
        for rows in np.array_split(np.arange(len(birds)), max(1, len(birds) // 64)):
            x = torch.stack([native.preprocess(Image.fromarray(one)) for one in birds.images(rows)])
            if text is None:
                scores = native.model(x)
            else:
                scores = native.model.encode_image(x, normalize=True) @ text.T  # type: ignore[operator]
            hits += int((scores.argmax(1).numpy() == birds.labels[rows]).sum())
    return hits / len(birds)


def measure(
    name: str, path: Path, layout: str, n: int = VAL_IMAGES, split: str = "val", seed: int = 0
) -> dict[str, float]:
    """Accuracies of a weight file on n birds of world seed 0, one per layout and head.

    Of a glyph model: on ``n // 20`` pictures of each of its own glyphs in both domains.
    """
    entry = any_entry(name)
    found = {}
    if layout == "albums":
        from tinyworld.vlm_training import measure_vlm

        return measure_vlm(path)
    if layout == "glyphs":
        native = load_tiny(Spec("tiny", name, str(path)), task="classify")
        for domain in DOMAINS:
            glyphs = Glyphs(n // 20, domain, split, seed)
            found[f"accuracy, {domain} domain"] = round(accuracy(native, glyphs), 4)
        return found
    for one in [layout] if entry.per_layout else entry.layouts:
        birds = Birds(n, one, split, 0)
        for pool in entry.pools or (None,):
            options = {"layout": one} | ({"pool": pool} if pool else {})
            native = load_tiny(Spec("tiny", name, str(path), options), task="classify")
            label = f"accuracy, {one}" + (f", {pool} pooling" if pool else "")
            found[label] = round(accuracy(native, birds), 4)
    return found


def make(
    name: str, seed: int = 0, layout: str | None = None, out: Path | None = None, report: Report | None = None
) -> dict[str, Any]:
    """Train a tiny model, write its weights and its card, and return the card.

    Parameters
    ----------
    name : str
        Key of `MODELS` or `LANGUAGE_MODELS`.
    seed : int
        Training seed.
    layout : str, optional
        For models with one file per layout; the model's first by default.
    out : Path, optional
        Folder for ``NAME.safetensors`` and ``NAME.json``; by default the shipped files are replaced.
    report : callable, optional
        Called with (epoch, mean loss).

    Raises
    ------
    UserError
        Unknown model, or a layout that the model has no file for.
    """
    entry = any_entry(name)
    layout = entry.check_layout(layout or entry.layouts[0])
    recipes: dict[str, Callable[..., Product]] = {
        "cnn": partial(train_cnn, layout=layout),
        "vit": partial(train_vit, name),
        "vit-fair": partial(train_vit, name),
        "vit-reg": train_vit_reg,
        "glyph-cnn": train_glyph_cnn,
        "clip": train_clip_towers,
        "vlm": train_language,
    }
    product = recipes[name](seed=seed, report=report)
    stem = entry.file(seed, layout)
    path = out / f"{stem}.safetensors" if out else weights_path(stem)
    spec = f"tiny:{name}?seed={seed}" + (f"&layout={layout}" if entry.per_layout else "")
    models.write_weights(path, product.tensors, spec)
    card = {
        "model": spec,
        "summary": entry.summary,
        "remake": f"tinyworld train {name} --seed {seed}" + (f" --layout {layout}" if entry.per_layout else ""),
        "recipe": product.recipe,
        "seed": seed,
        "parameters": product.parameters,
        "image_size": entry.image_size,
        "shape": dict(entry.shape or {}),
        "measured": measure(name, path, layout, seed=seed),
        "measured_on": MEASURED_ON.get(layout, MEASURED_ON["birds"]).format(seed=seed),
        "training_cpu_seconds": round(product.seconds, 1),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "made_with": {"torch": torch.__version__.split("+")[0], "numpy": np.__version__, "machine": platform.machine()},
    }
    write_card(out / f"{stem}.json" if out else card_path(stem), card)
    return card


def write_card(path: Path, card: dict[str, Any]) -> None:
    """Write a card, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(".tmp")
    partial_file.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial_file.replace(path)
