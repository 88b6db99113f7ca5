"""Training of the models that learn from other things than labels: captions (``clip``), a teacher (``vit-reg``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from vfm_core.preprocess import Preprocess

from tinyworld import models
from tinyworld.bird_body import COLOURS, GENERA, SLOTS, Mark
from tinyworld.birds import portray
from tinyworld.captions import describe, holds
from tinyworld.catalogue import weights_path
from tinyworld.clip import TinyCLIP
from tinyworld.draws import Draws
from tinyworld.models import MEAN, STD, build, read_weights, seeded
from tinyworld.species import Species, all_marks
from tinyworld.training import Schedule, as_float, random_species, recipe_key, shuffled, to_input, train

Report = Callable[[int, float], None]


def caption_scenes(key: int, index: np.ndarray) -> list[Species | None]:
    """Scenes for captions: 8% empty, 10% of the birds plain, one in five with two marks; half of the marks are any
    colour on any position, half one of the sixteen.
    """
    draws = Draws(key, index)
    known, names = all_marks(), list(GENERA)
    anything = [Mark(colour, slot) for slot in SLOTS for colour in COLOURS]
    empty, bare, two = draws.coin("empty", 0.08), draws.coin("bare", 0.1), draws.coin("two marks", 0.2)
    genus = draws.integers("genus", len(names))[:, 0]
    usual = draws.uniforms("usual", 2) < 0.5
    pick, any_pick = draws.integers("usual mark", len(known), 2), draws.integers("any mark", len(anything), 2)
    scenes: list[Species | None] = []
    for row in range(len(index)):
        first, second = (known[pick[row, k]] if usual[row, k] else anything[any_pick[row, k]] for k in (0, 1))
        distinct = first.slot.split()[0] != second.slot.split()[0]
        extra = (second,) if two[row] and distinct else ()
        bird = Species(names[genus[row]], None) if bare[row] else Species(names[genus[row]], first, extra)
        scenes.append(None if empty[row] else bird)
    return scenes


def train_clip(seed: int, report: Report | None = None) -> tuple[TinyCLIP, float]:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343) against the truth of every caption for every picture.

    Returns
    -------
    model : TinyCLIP
    seconds : float
        CPU seconds.
    """
    key, pool, batch = recipe_key("clip", seed), 6400, 64
    scenes = caption_scenes(key, np.arange(pool))
    blocks = [np.arange(start, start + 256) for start in range(0, pool, 256)]
    images = torch.cat([_planar(portray(key, rows, [scenes[i] for i in rows])[0]) for rows in blocks])
    model = TinyCLIP(seed)
    start = {k: v for k, v in read_weights(weights_path("vit-fair-0")).items() if not k.startswith("heads.")}
    models.load_state(model.visual, start)

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for step, rows in enumerate(torch.randperm(pool, generator=generator).split(batch)):
            shown = [scenes[int(i)] for i in rows]
            draws = Draws(recipe_key(f"captions {epoch} {step}", seed), np.arange(2 * batch))
            said = describe(draws, [*shown, *shown])
            mirrored = torch.rand(batch, generator=generator).view(-1, 1, 1, 1) < 0.5
            x = as_float(images[rows])
            x = torch.where(mirrored, x.flip(-1), x)
            yield x, model.tokenizer([one.text for one in said]), torch.from_numpy(holds(said, shown))

    schedule = Schedule(epochs=8, steps=pool // batch, lr=2e-3, weight_decay=0.02)
    seconds = train(model, batches, _pairwise, schedule, seed, report)
    return model, seconds


def train_distilled(seed: int, report: Report | None = None) -> tuple[nn.Module, nn.Linear, float]:
    """``vit-reg``: a transformer that imitates the feature map and the logits of ``tiny:cnn`` (nested, seed 0).

    No label is used. Every patch token predicts, linearly, the teacher's feature map around its patch; the mean of the
    normalised patch tokens predicts the teacher's class probabilities.

    Returns
    -------
    model : nn.Module
        Without a head.
    head : nn.Linear
        Classes of the nested layout.
    seconds : float
        CPU seconds.
    """
    key, pool = recipe_key("vit-reg", seed), 6400
    teacher = models.shipped("cnn", read_weights(weights_path("cnn-nested-0")), "nested")
    prepare = Preprocess((80, 80), "shortest", 1.0, "bicubic", MEAN, STD)
    images, maps, soft = [], [], []
    for start in range(0, pool, 256):
        index = np.arange(start, start + 256)
        pixels = portray(key, index, random_species(key, index, all_marks(), none=0.0))[0]
        fmap, probabilities = _teach(teacher, pixels)
        images.append(torch.stack([prepare.geometry(Image.fromarray(one)) for one in pixels]).mul(255).round().byte())
        maps.append(fmap)
        soft.append(probabilities)
    fmaps = torch.cat(maps)
    fmaps = (fmaps - fmaps.mean((0, 1))) / (fmaps.std((0, 1)) + 1e-6)
    with seeded(seed + 1):
        model = _Student(build("vit-reg", 0, seed=seed), 80, fmaps.shape[-1])
    batches = shuffled(torch.cat(images), fmaps, torch.cat(soft), batch=32, seed=seed, grid=10)
    schedule = Schedule(epochs=14, steps=100, lr=3e-3, weight_decay=0.05)
    seconds = train(model, lambda epoch: islice(batches(epoch), 100), _imitate, schedule, seed, report)
    return model.vit, model.classify, seconds


@torch.no_grad()
def _teach(teacher: nn.Module, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """The teacher's feature map on a 10x10 grid (n, 100, 64) and its class probabilities (n, 16)."""
    fmap = teacher.forward_features(to_input(pixels))  # type: ignore[operator]
    logits = teacher.fc(fmap.mean((2, 3)))  # type: ignore[operator]
    return F.adaptive_avg_pool2d(fmap, 10).flatten(2).transpose(1, 2), logits.softmax(1)


class _Student(nn.Module):
    def __init__(self, vit: nn.Module, dim: int, channels: int) -> None:
        super().__init__()
        self.vit = vit
        self.imitate = nn.Linear(dim, channels)
        self.classify = nn.Linear(dim, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.vit.forward_features(x)[:, 4:]  # type: ignore[operator]
        return self.imitate(patches), self.classify(patches.mean(1))


def _imitate(model: nn.Module, x: Tensor, fmap: Tensor, soft: Tensor) -> Tensor:
    predicted, logits = model(x)
    return F.mse_loss(predicted, fmap) + F.cross_entropy(logits, soft)


def _pairwise(model: nn.Module, x: Tensor, ids: Tensor, truth: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(x, ids), truth, pos_weight=torch.tensor(3.0))


def _planar(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
