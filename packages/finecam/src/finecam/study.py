"""The embedded study: both papers' claims on birds whose every differing pixel is known, over several training seeds.

One function per unit of work; each returns plain JSON, so that a run can be interrupted and resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tinyworld import models
from tinyworld.birds import Birds
from tinyworld.training import Schedule, shuffled, to_input, train
from torch.nn.functional import cross_entropy

from finecam import metrics
from finecam.arms import aggregation_arms, arms_of, reference_arms, similarity_arms, strength_arms
from finecam.classifiers import load_classifier
from finecam.evaluation import Scoring, evaluate
from finecam.explainer import Explainer
from finecam.references import cosine_table
from finecam.study_prompts import prompt_folder, prompt_unit

VERSION = 1
"""Raised when a unit's result changes, so that an old run folder is not continued."""

PAIRED = ("gradcam", "layercam")
"""CAM families that the study compares with and without references."""

TEXT_GAMMAS = (0.0, 0.6, 1.0)


@dataclass(frozen=True)
class Size:
    """How much of the study is run.

    Attributes
    ----------
    seeds : tuple of int
        Training runs of the classifier, and test birds.
    images : int
        Birds per seed.
    prompt_seeds : tuple of int
        Training runs of backbone and prompts.
    prompt_backbones : tuple of str
        Tiny transformers under the prompts.
    prompt_train : int
        Birds that prompts and linear probes are trained on.
    curve_steps : int
        Steps of deletion and insertion curves.
    ablations : bool
        Every table of the Finer-CAM paper instead of the main one.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    images: int = 96
    prompt_seeds: tuple[int, ...] = (0,)
    prompt_backbones: tuple[str, ...] = ("vit",)
    prompt_train: int = 1280
    curve_steps: int = 0
    ablations: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


QUICK = Size()
FULL = Size(images=240, prompt_seeds=(0, 1, 2), prompt_backbones=("vit", "vit-fair"), curve_steps=10, ablations=True)


def units(size: Size, out: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> work of every unit of a study, in order; trained prompts go to ``out/promptcam/SEED``."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in size.seeds:
        found[f"finer/nested/{seed}"] = partial(finer_unit, "nested", seed, size)
        if size.ablations:
            found[f"finer/factorial/{seed}"] = partial(finer_unit, "factorial", seed, size)
            found[f"scorecam/{seed}"] = partial(score_unit, seed, size)
            found[f"shortcut/{seed}"] = partial(shortcut_unit, seed, size)
    for backbone in size.prompt_backbones:
        for seed in size.prompt_seeds:
            folder = prompt_folder(out, backbone, seed)
            birds = unseen_birds("nested", seed, size.images)
            unit = partial(prompt_unit, backbone, seed, birds, size.prompt_train, size.curve_steps, folder)
            found[f"promptcam/{backbone}/{seed}"] = unit
    found["text"] = partial(text_unit, size)
    return found


def unseen_birds(layout: str, seed: int, images: int) -> Birds:
    """Birds that neither training nor development has seen."""
    return Birds(n=images, layout=layout, split="test", seed=seed)


def finer_unit(layout: str, seed: int, size: Size) -> dict[str, Any]:
    """Finer-CAM against its plain methods on one training run of the tiny CNN."""
    birds = unseen_birds(layout, seed, size.images)
    model = load_classifier(f"tiny:cnn?seed={seed}&layout={layout}")
    scoring = Scoring(curve_steps=size.curve_steps)
    found = evaluate(birds, model, arms=arms_of(PAIRED, (0.0, 0.6, 1.0)), scoring=scoring)
    if size.ablations:
        arms = [
            *strength_arms(),
            *reference_arms(),
            *aggregation_arms(),
            *similarity_arms(),
            *arms_of(["eigencam"], [0]),
        ]
        new = [arm for arm in dict.fromkeys(arms) if arm.name not in found.values]
        # The curves cost ten times all other scores together and decide nothing here.
        more = evaluate(birds, model, arms=new, scoring=replace(scoring, curve_steps=0), baselines=False)
        found.values |= more.values
        found.bases |= more.bases
        found.matched |= more.matched
        found.used |= more.used
    return found.to_dict()


def score_unit(seed: int, size: Size) -> dict[str, Any]:
    """Score-CAM, which needs a forward pass per channel, on a quarter of the birds."""
    birds = unseen_birds("nested", seed, max(size.images // 4, 16))
    model = f"tiny:cnn?seed={seed}"
    return evaluate(birds, model, methods=["scorecam"], gammas=(0.0, 0.6), scoring=Scoring(curve_steps=0)).to_dict()


def shortcut_unit(seed: int, size: Size) -> dict[str, Any]:
    """Does a map give a shortcut away? A net trained with a disc whose colour betrays the species, and a clean one.

    Returns
    -------
    dict
        Net -> accuracy on birds whose disc says nothing, and map -> region -> per-bird share of energy.
    """
    train_birds = Birds(n=960, split="train", seed=seed, spurious=0.95)
    birds = Birds(n=size.images, split="test", seed=seed, spurious=0.95)  # here the disc's colour is random
    shortcut = models.build("cnn", seed=seed)
    x, y = to_input(train_birds.images(range(len(train_birds)))), torch.from_numpy(train_birds.labels)
    batches = shuffled(x, y, batch=32, seed=seed)
    train(shortcut, batches, lambda net, x, y: cross_entropy(net(x), y), Schedule(epochs=8, steps=30, lr=1e-2), seed)
    clean = load_classifier(f"tiny:cnn?seed={seed}")
    unseen = to_input(birds.images(range(len(birds))))
    target = torch.from_numpy(birds.labels)
    regions = {
        "energy in disc": torch.from_numpy(np.stack([birds.cue_mask(i) for i in range(len(birds))])),
        "energy in trait": torch.from_numpy(np.stack([birds.trait_mask(i) for i in range(len(birds))])),
    }
    found: dict[str, Any] = {}
    for name, net in (("trained with the shortcut", shortcut), ("clean", clean.model)):
        result = Explainer(net).sweep(unseen, (0.0, 0.6, 1.0))  # of what the net says, right or wrong
        maps = dict(zip(("gradcam", "gradcam + Finer 0.6", "gradcam + Finer 1"), result.maps.unbind(1)))
        found[name] = {
            "accuracy": float((result.logits.argmax(1) == target).float().mean()),
            "maps": {
                m: {region: metrics.energy_in(values, mask).tolist() for region, mask in regions.items()}
                for m, values in maps.items()
            },
        }
    return found


def text_unit(size: Size) -> dict[str, Any]:
    """Concept localisation in the image-text model: a text against a more general one (Finer-CAM, Fig. 2 and 8).

    Returns
    -------
    dict
        ``scores``: pair of texts -> gamma -> metric -> per-bird values; ``cosine``: pair -> mean cosine of its texts.
    """
    birds = unseen_birds("nested", 0, size.images)
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    cosines: dict[str, list[float]] = {}
    for c, species in enumerate(birds.species):
        rows = np.flatnonzero(birds.labels == c).tolist()
        masks = torch.from_numpy(np.stack([birds.trait_mask(i) for i in rows]))
        genus, sibling = f"{species.genus} bird", str(birds.species[birds.siblings(c)[0]])
        plain = f"{species.caption.split()[0]} plain {genus}"
        pairs = {
            "mark against 'bird'": (str(species.mark), "bird"),
            "mark against its genus": (str(species.mark), genus),
            "mark against the plain bird": (str(species.mark), plain),
            "name against its genus": (str(species), genus),
            "name against a sibling's": (str(species), sibling),
            "caption against the plain bird": (species.caption, plain),
        }
        for pair, texts in pairs.items():
            model = load_classifier("tiny:clip", texts=texts)
            x = torch.stack([model.preprocess(birds[i].image) for i in rows])
            maps = Explainer(model.model).sweep(x, TEXT_GAMMAS, target=0, references=[1]).maps
            cosines.setdefault(pair, []).append(float(cosine_table(torch.as_tensor(model.weights()))[0, 1]))
            for k, gamma in enumerate(TEXT_GAMMAS):
                row = scores.setdefault(pair, {}).setdefault(f"{gamma:g}", {"energy in trait": [], "AP of trait": []})
                row["energy in trait"] += metrics.energy_in(maps[:, k], masks).tolist()
                row["AP of trait"] += metrics.average_precision(maps[:, k], masks).tolist()
    return {"scores": scores, "cosine": {pair: float(np.mean(values)) for pair, values in cosines.items()}}
