"""Recipe and quality of the tiny multimodal language model (`tinyworld.vlm`).

First the vision tower learns to name the colour and the digit of every patch in the words' own embeddings, as an
image-text model would; then the whole model learns to answer, from albums that grow from one picture to eight. Every
sequence holds several questions with their answers, so that follow-up questions are nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyworld.albums import COLOURS, PALETTE, PATCHES, TASKS, VOCABULARY, Album, make_albums, paint
from tinyworld.draws import Draws, key_of
from tinyworld.models import rounded
from tinyworld.training import Schedule, to_input, train
from tinyworld.vlm import answers, build_vlm, load_vlm

IDS = {word: index for index, word in enumerate(VOCABULARY)}
IGNORED = -100
STAGE_ONE = Schedule(epochs=6, steps=30, lr=4e-3)
STAGE_TWO = Schedule(epochs=30, steps=100, lr=2e-3, warmup=0.15)
COURSE = ((80, (1,)), (220, (2,)), (420, (2, 3, 4)), (3000, (1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8, 12, 16, 24)))
"""Until which step of stage 2 the albums have one of these numbers of pictures."""

RECIPE = (
    "stage 1, vision tower and word embeddings: cross-entropy of every patch against the embeddings of the colours "
    "and of the digits, 180 batches of 32 single pictures, AdamW, one cycle to 4e-3. Stage 2, the whole model: "
    'cross-entropy of answers and end tokens on make_albums(task, split="train", seed={seed}), 80% list with every '
    "single question beside it, 10% needle, 10% gist, several questions per sequence; 1, then 2, then 2 to 4, then 1 "
    "to 24 pictures per album, 3,000 batches of about 48 pictures, AdamW, one cycle to 2e-3, weight decay 0.01"
)


def encode(text: str) -> list[int]:
    """Ids of a prompt's words; every picture takes 16 places."""
    return [IDS[word] for word in text.split() for _ in range(PATCHES if word == "<image>" else 1)]


# ------------------------------------------------------------------------------------------------ stage 1: patches
def patch_batches(seed: int, batch: int = 32) -> Any:
    """Epoch -> batches of single pictures with the words of every patch: colour (n,), digit and its patch (n,)."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        for step in range(STAGE_ONE.steps):
            start = (epoch * STAGE_ONE.steps + step) * batch
            draws = Draws(key_of("recipe", "vlm patches", seed), np.arange(start, start + batch))
            colours = draws.integers("colour", len(PALETTE))[:, 0]
            bare = colours == len(COLOURS)
            digits = np.where(bare, -1, draws.integers("digit", 10)[:, 0])
            patches = np.where(bare, -1, draws.integers("patch", PATCHES)[:, 0])
            images = to_input(paint(draws, colours, digits, patches))
            yield images, torch.from_numpy(colours), torch.from_numpy(digits), torch.from_numpy(patches)

    return batches


def patch_loss(model: Any, images: Tensor, colours: Tensor, digits: Tensor, patches: Tensor) -> Tensor:
    """Cross-entropy of every patch against the embeddings of the colours, and of the digits (``<sep>`` = none)."""
    seen = torch.stack(tuple(model.model.get_image_features(images).pooler_output))  # (n, 16, hidden)
    words = model.get_input_embeddings().weight
    colour_words = torch.tensor([IDS[word] for word in PALETTE])
    digit_words = torch.tensor([IDS[str(digit)] for digit in range(10)] + [IDS["<sep>"]])
    colour = F.cross_entropy((seen @ words[colour_words].T).flatten(0, 1), colours.repeat_interleave(PATCHES))
    target = torch.full((len(images), PATCHES), 10)
    shown = digits >= 0
    target[shown, patches[shown]] = digits[shown]
    weight = torch.ones(11)
    weight[10] = 0.1
    return colour + F.cross_entropy((seen @ words[digit_words].T).flatten(0, 1), target.flatten(), weight)


# ------------------------------------------------------------------------------------------------ stage 2: answers
def lesson(
    albums: Sequence[Album], turns: Sequence[Sequence[tuple[str, str]]], kept: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Input ids and targets, each (n, length): context, then the turns of every album, all of the same lengths.

    The target after an answer is ``<eos>``, also where the transcript goes on without it (`kept` says where it
    stays): generation may or may not leave it in the cache.
    """
    rows, goals = [], []
    for album, asked in zip(albums, turns):
        row = encode(album.context)
        goal = [IGNORED] * len(row)
        for (question, answer), keep in zip(asked, kept):
            words, said = encode(question), encode(answer)
            row += words + said + [IDS["<eos>"]] * keep
            goal += [IGNORED] * (len(words) - 1) + said + [IDS["<eos>"]] + [IGNORED] * keep
        rows.append(row)
        goals.append(goal)
    return torch.tensor(rows), torch.tensor(goals)


def answer_loss(model: Any, ids: Tensor, goals: Tensor, images: Tensor) -> Tensor:
    """Cross-entropy of all answer tokens and end tokens."""
    logits = model(input_ids=ids, pixel_values=images, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), goals.flatten(), ignore_index=IGNORED)


def lesson_at(step: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, targets and pictures of one step: about 48 pictures in albums of one size, all asked alike."""
    draws = Draws(key_of("recipe", "vlm lessons", seed), [step])
    sizes = next(sizes for last, sizes in COURSE if step < last)
    size = sizes[draws.integers("size", len(sizes))[0, 0]]
    task = str(np.array(TASKS)[np.searchsorted([0.1, 0.2], draws.uniform("task")[0])])
    words = int(draws.integers("words", 5)[0, 0]) if draws.coin("wordy", 0.3)[0] else 0
    needles: int | None = None
    if task != "gist" and size > 2 and (size > len(COLOURS) or draws.coin("bare", 0.15)[0]):
        needles = 1 + int(draws.integers("needles", min(size, len(COLOURS)))[0, 0])
    n = max(2, 48 // size)
    albums = make_albums(task, n, size, "train", seed, needles=needles, words=words, start=64 * step)
    turns = [list(album.questions) for album in albums]
    if task == "list":  # the list among single questions, first in half of the lessons
        count = needles or min(size, len(COLOURS))
        place = 0 if draws.coin("list first")[0] else int(draws.integers("place", count + 1)[0, 0])
        order = np.argsort(Draws(key_of("recipe", "vlm turns", seed, step), np.arange(n)).uniforms("order", count))
        turns = [_around(album, order[row], place) for row, album in enumerate(albums)]
    kept = draws.integers("kept", 2, len(turns[0]))[0].astype(bool).tolist()
    ids, goals = lesson(albums, turns, kept)
    return ids, goals, to_input(np.concatenate([album.images for album in albums]))


def _around(album: Album, order: np.ndarray, place: int) -> list[tuple[str, str]]:
    """Questions about every picture in the given order, the album's own question in between."""
    shown = [i for i, digit in enumerate(album.digits) if digit >= 0]
    single = [(f"Q {album.colours[shown[k]]}", str(album.digits[shown[k]])) for k in order]
    return [*single[:place], *album.questions, *single[place:]]


def train_vlm(seed: int, report: Callable[[int, float], None] | None = None) -> tuple[Any, float]:
    """Both stages; the model with its weights rounded as on disk, and the CPU seconds."""
    model = build_vlm(seed)
    seconds = train(model, patch_batches(seed), patch_loss, STAGE_ONE, seed, report)
    steps = STAGE_TWO.steps

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        return (lesson_at(epoch * steps + step, seed) for step in range(steps))

    seconds += train(model, batches, answer_loss, STAGE_TWO, seed, report)
    return rounded(model), seconds


# ------------------------------------------------------------------------------------------------ quality
def measure_vlm(
    path: Path | None = None, n: int = 240, split: str = "val", seed: int = 0, images: int = 8
) -> dict[str, float]:
    """Quality of a weight file on n albums per task.

    Parameters
    ----------
    path : Path, optional
        Weights; those of `seed` as shipped by default.
    n : int
        Albums per task.
    split : str
        Of the albums, seed 0.
    seed : int
        Which shipped weights, without `path`.
    images : int
        Pictures per album, 2 or more.

    Returns
    -------
    dict
        Fractions in [0, 1] of generated answers: "needle" (first question), "needle, follow-up" (the others in the
        same transcript), "gist", "list, per digit" and "list, whole answer" with its end.
    """
    model, processor = load_vlm(seed, path=path)
    albums = {task: make_albums(task, n, images, split) for task in TASKS}
    said = {task: answers(model, processor, albums[task]) for task in TASKS}
    right = {task: [a.questions[0][1] for a in albums[task]] for task in TASKS}
    same = {task: float(np.mean([x == y for x, y in zip(said[task], right[task])])) for task in TASKS}
    digits = [
        x == y
        for a, b in zip(said["list"], right["list"])
        for x, y in zip_longest(a.split()[: len(b.split())], b.split())
    ]
    found = {
        "needle": same["needle"],
        "needle, follow-up": follow_up(model, albums["needle"]),
        "gist": same["gist"],
        "list, per digit": float(np.mean(digits)),
        "list, whole answer": same["list"],
    }
    return {name: round(value, 4) for name, value in found.items()}


@torch.inference_mode()
def follow_up(model: Any, albums: Sequence[Album]) -> float:
    """Accuracy of all questions but the first, each asked after the earlier ones and their right answers."""
    hits = []
    for start in range(0, len(albums), 40):
        part = albums[start : start + 40]
        count = len(part[0].questions)
        ids, goals = lesson(part, [album.questions for album in part], [True] * count)
        images = to_input(np.concatenate([album.images for album in part]))
        found = model(input_ids=ids, pixel_values=images).logits.argmax(-1)
        asked = goals != IGNORED  # an answer and its end, per question
        hits.append((found == goals)[asked].view(len(part), count, 2)[:, 1:, 0])
    return float(torch.cat(hits).float().mean())
