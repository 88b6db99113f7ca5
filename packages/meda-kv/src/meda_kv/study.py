"""The embedded study: what every method loses on small networks that really read several pictures.

Three trained networks (``tiny:vlm``, seeds 0 to 2) answer albums of eight pictures: ``needle`` asks for the digit on
the picture of one colour, ``gist`` for the commonest colour, ``list`` for all digits in order. A one-token answer comes
from the full cache and tests nothing, so ``needle`` and ``gist`` are asked on what compression left: after the first
question was read ("asked"), or after the pictures alone ("agnostic"). ``list`` is plain `generate`, whose second to
last tokens come from the compressed cache. A unit of work is one network on one part, a run folder of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.errors import UserError

if TYPE_CHECKING:
    from meda_kv.evaluation import Results
    from meda_kv.methods import Method

VERSION = 1
MODEL_SEEDS = (0, 1, 2)
PARTS: dict[str, tuple[str, str]] = {
    "needle, asked": ("needle", "asked"),
    "needle, agnostic": ("needle", "agnostic"),
    "gist, agnostic": ("gist", "agnostic"),
    "list, generate": ("list", "generate"),
}
"""Task and protocol of every part."""

PAPER_METHODS = ("meda", "meda-no-alloc", "meda-no-merge", "meda-no-both", "look-m", "h2o", "snapkv", "pyramidkv")
BASELINES = ("streaming", "random")
OURS = ("quota", "snapkv-entropy")
WINDOW = {"window": 3, "kernel": 3}
"""For the methods that look from the last queries: a question has two tokens here, where theirs expect a paragraph."""
FLOOR = 4
"""Fewest tokens of a layer: the methods' own 16 is more than a tenth of these prompts."""


@dataclass(frozen=True)
class StudySize:
    """How much of the study to run.

    Parameters
    ----------
    seeds : tuple of int
        Of `MODEL_SEEDS`.
    albums : int
        Per network and part.
    images : int
        Pictures per album.
    ratios : tuple of float
        Shares of the prompt's cache.
    methods : tuple of str
        Beside the full cache.
    parts : tuple of str
        Of `PARTS`.
    draw : int
        Which albums: other draws, other albums.
    """

    seeds: tuple[int, ...] = MODEL_SEEDS
    albums: int = 70
    images: int = 8
    ratios: tuple[float, ...] = (0.5, 0.2, 0.1)
    methods: tuple[str, ...] = (*PAPER_METHODS, *BASELINES, *OURS)
    parts: tuple[str, ...] = tuple(PARTS)
    draw: int = 0

    def __post_init__(self) -> None:
        for seed in self.seeds:
            if seed not in MODEL_SEEDS:
                raise UserError("no network for the seed", where="--seed", given=seed, remedy="use 0, 1 or 2")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def units(self) -> list[tuple[int, str]]:
        """Seed and part of every unit, the slowest parts first."""
        return [(seed, part) for part in self.parts for seed in self.seeds]

    def arms(self) -> list[Method]:
        """The methods as they run here."""
        return [study_method(name) for name in ("full", *self.methods)]


def study_method(name: str) -> Method:
    """A method as the study runs it: floors of `FLOOR`, and `WINDOW` where it looks from a window."""
    from meda_kv.methods import WindowScorer, resolve_method

    method = resolve_method(name)
    if method.scorer is None:
        return method
    options: dict[str, Any] = dict(WINDOW) if isinstance(method.scorer, WindowScorer) else {}
    if name == "pyramidkv":
        options["budgets"] = "pyramid"
    return replace(resolve_method(name, floor=FLOOR, **options), name=name)


def unit_folder(out: Path, unit: tuple[int, str]) -> Path:
    """Where a unit's records lie."""
    return out / "study" / f"{unit[1].replace(', ', '-')}-{unit[0]}"


def run_unit(context: tuple[StudySize, Path, bool], unit: tuple[int, str]) -> str:
    """Run what is missing of one unit; returns its part."""
    from meda_kv.data import open_task
    from meda_kv.evaluation import evaluate
    from meda_kv.models import load_model

    size, out, overwrite = context
    seed, part = unit
    task, protocol = PARTS[part]
    model, processor = load_model(f"tiny?seed={seed}", device="cpu")
    albums = f"tinyworld:{task}?n={size.albums}&images={size.images}&seed={1000 * size.draw + seed}"
    evaluate(
        model,
        processor,
        open_task(albums),
        size.arms(),
        size.ratios,
        out=unit_folder(out, unit),
        protocol=protocol,
        batch_size=35,
        seed=seed,
        model_name=f"tiny?seed={seed}",
        overwrite=overwrite,
    )
    return part


def results_of(size: StudySize, out: Path, part: str) -> Results:
    """The records of a part, all seeds together."""
    from meda_kv.evaluation import load_results

    return load_results([unit_folder(out, (seed, part)) for seed in size.seeds])


def entropy_spread(seed: int, albums: int = 8) -> dict[str, list[float]]:
    """Entropy of every layer by kind, in nats, mean over needle prompts of one network."""
    import numpy as np

    from meda_kv.data import open_task
    from meda_kv.inspection import entropies
    from meda_kv.models import load_model
    from meda_kv.prompts import Prompt

    model, processor = load_model(f"tiny?seed={seed}", device="cpu")
    found = [
        entropies(model, processor, Prompt(f"{sample.prompt} {sample.questions[0][0]}", sample.load_images()))
        for sample in open_task(f"tinyworld:needle?n={albums}&seed={seed}").samples
    ]
    return {kind: np.mean([one[kind] for one in found], axis=0).tolist() for kind in found[0]}
