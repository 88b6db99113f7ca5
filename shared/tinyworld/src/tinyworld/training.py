"""The training loop of the tiny models, and the data that it is fed.

It stands apart from `vfm_core.train` on purpose: a recipe must re-make its file for years, so it depends on nothing
that may gain features. One CPU thread, one seed, no checkpoints: every recipe ends within a few CPU minutes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tinyworld.bird_body import GENERA, Mark
from tinyworld.birds import portray
from tinyworld.draws import Draws, key_of
from tinyworld.models import MEAN, STD, seeded
from tinyworld.species import Species

log = logging.getLogger(__name__)

Batches = Callable[[int], Iterator[tuple[Tensor, ...]]]
"""Epoch -> batches (images, targets ...)."""


@dataclass(frozen=True)
class Schedule:
    """AdamW with a one-cycle learning rate, or SGD with Nesterov momentum 0.9 and a cosine.

    Attributes
    ----------
    epochs, steps : int
        Passes, and batches per pass.
    lr, weight_decay : float
        Peak learning rate, decoupled weight decay.
    warmup : float
        Fraction of all steps during which the rate rises.
    clip : float
        Largest gradient norm.
    rule : {"adamw", "sgd"}
        SGD decays every parameter, AdamW those with more than one axis.
    """

    epochs: int
    steps: int
    lr: float
    weight_decay: float = 0.01
    warmup: float = 0.25
    clip: float = 1.0
    rule: str = "adamw"


class one_thread:
    """Context in which torch uses one thread: the order of additions, and so the result, is then fixed."""

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._threads)


def train(
    model: nn.Module,
    batches: Batches,
    loss: Callable[..., Tensor],
    schedule: Schedule,
    seed: int,
    report: Callable[[int, float], None] | None = None,
) -> float:
    """Train in place.

    Parameters
    ----------
    model : nn.Module
        Left in eval mode.
    batches : callable
        ``batches(epoch)`` yields `schedule.steps` tuples.
    loss : callable
        ``loss(model, *batch) -> scalar``.
    schedule : Schedule
        Optimiser settings.
    seed : int
        For dropout and other draws inside the model.
    report : callable, optional
        Called with (epoch, mean loss).

    Returns
    -------
    float
        CPU seconds.
    """
    start = time.process_time()
    optimizer, course = _optimizer(model, schedule)
    model.train()
    with seeded(seed), one_thread(), torch.enable_grad():
        for epoch in range(schedule.epochs):
            running = []
            for batch in batches(epoch):
                value = loss(model, *batch)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
                optimizer.step()
                course.step()
                running.append(value.item())
            mean = float(np.mean(running))
            log.info("epoch %d: loss %.4f", epoch, mean)
            if report:
                report(epoch, mean)
    model.eval()
    return time.process_time() - start


def _optimizer(
    model: nn.Module, schedule: Schedule
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    total = schedule.epochs * schedule.steps
    trained = [p for p in model.parameters() if p.requires_grad]
    if schedule.rule == "sgd":
        sgd = torch.optim.SGD(trained, schedule.lr, 0.9, nesterov=True, weight_decay=schedule.weight_decay)
        return sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, total)
    decay, plain = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=schedule.lr)
    return adamw, torch.optim.lr_scheduler.OneCycleLR(adamw, schedule.lr, total, pct_start=schedule.warmup)


def to_input(images: np.ndarray) -> Tensor:
    """uint8 (n, H, W, 3) to the models' normalised float (n, 3, H, W)."""
    return as_float(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2))


def as_float(x: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) to normalised float; floats are taken as normalised already."""
    if x.is_floating_point():
        return x
    return (x.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def shuffled(x: Tensor, *targets: Tensor, batch: int, seed: int, grid: int = 0) -> Batches:
    """Batches from tensors in memory: another order each epoch, every image mirrored with probability 1/2.

    With ``grid`` > 0, targets of shape (n, grid*grid, ...) belong to patches and are mirrored along.
    """

    def epoch_batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(x), generator=generator)
        for rows in order.split(batch)[: len(x) // batch]:
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            images = as_float(x[rows])
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
            yield (images, *(_mirror(target[rows], mirrored, grid) for target in targets))

    return epoch_batches


def _mirror(target: Tensor, mirrored: Tensor, grid: int) -> Tensor:
    if not grid or target.ndim != 3:
        return target
    flipped = target.unflatten(1, (grid, grid)).flip(2).flatten(1, 2)
    return torch.where(mirrored.view(-1, 1, 1), flipped, target)


def random_species(key: int, index: np.ndarray, marks: list[Mark], none: float) -> list[Species]:
    """For every image a random genus with one random mark, or with none (probability `none`)."""
    draws = Draws(key, index)
    genus, mark = draws.integers("genus", len(GENERA))[:, 0], draws.integers("species mark", len(marks))[:, 0]
    bare = draws.coin("bare", none)
    names = list(GENERA)
    return [Species(names[g], None if b else marks[m]) for g, m, b in zip(genus, mark, bare)]


def random_mark_sets(key: int, index: np.ndarray, colours: list[str], slots: list[str]) -> list[Species]:
    """For every image a random genus with 0 to 3 marks of any colours on different slots of `slots`."""
    draws = Draws(key, index)
    names = list(GENERA)
    genus, count = draws.integers("genus", len(names))[:, 0], draws.integers("how many", 4)[:, 0]
    order = np.argsort(draws.uniforms("which slots", len(slots)), axis=1, kind="stable")
    colour = draws.integers("which colours", len(colours), len(slots))
    found = []
    for row in range(len(index)):
        chosen = [slots[k] for k in order[row]]
        # A wing carries one mark: a bar painted over a patch would hide it.
        if "wing patch" in chosen[:3] and "wing bar" in chosen[:3]:
            chosen.remove("wing bar")
        worn = tuple(Mark(colours[colour[row, k]], chosen[k]) for k in range(count[row]))
        found.append(Species(names[genus[row]], worn[0] if worn else None, worn[1:]))
    return found


def pictures(key: int, index: np.ndarray, species: list[Species], size: int) -> Tensor:
    """Normalised images (n, 3, size, size) of the given birds."""
    return to_input(portray(key, index, species, size)[0])


def recipe_key(recipe: str, seed: int) -> int:
    """World key of a recipe's own birds: unrelated to those of any `Birds` split."""
    return key_of("recipe", recipe, seed)
