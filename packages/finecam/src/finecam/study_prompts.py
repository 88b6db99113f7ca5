"""The Prompt-CAM half of the embedded study: prompts against map methods on one frozen backbone.

Prompt-CAM (arXiv 2501.09333), Tab. 1 and 2 and its trait manipulation.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tinyworld.birds import Birds
from torch import Tensor
from vfm_core.backbones import load_backbone
from vfm_core.errors import UserError
from vfm_core.metrics import wilson_interval

from finecam.arms import Arm, arms_of
from finecam.classifiers import Classifier, load_classifier
from finecam.evaluation import Scoring, evaluate, score_maps
from finecam.head import fit_head
from finecam.metrics import half_cell
from finecam.promptcam import PromptCAM
from finecam.promptcam_train import train_promptcam
from finecam.references import cosine_table, similar_classes
from finecam.regions import regions_of
from finecam.traits import rank_traits

MAP_METHODS = ("gradcam", "layercam", "eigencam", "rollout", "cls_attention")
"""Rivals of Prompt-CAM on the same frozen backbone (Prompt-CAM, Tab. 1), and its CLS attention."""

PROMPT_TRAINING: dict[str, Any] = {
    "prompt_layers": 1,
    "epochs": 40,
    "lr": 2e-2,
    "optimizer": "adamw",
    "schedule": "onecycle",
    "batch_size": 32,
    "dropout": 0.1,
}
"""Prompts in the last layer only: tokens are cached and training takes seconds. Drop-out is the paper's for DINO."""


def prompt_folder(out: Path, backbone: str, seed: int) -> Path:
    """Where a run keeps the prompts of a seed."""
    return out / "promptcam" / f"{backbone}-{seed}"


def prompt_unit(
    backbone: str, seed: int, birds: Birds, train: int, curve_steps: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Prompts and linear probes trained on the same birds, their maps on the same unseen birds, and mark repainting.

    Parameters
    ----------
    backbone
        Tiny transformer, such as ``"vit"``.
    seed
        Training run of the backbone, and of everything trained here.
    birds
        Unseen birds.
    train
        Number of training birds.
    curve_steps
        Of deletion and insertion; 0 leaves them out.
    out
        Keeps the prompts and probes.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        spec = f"tiny:{backbone}?seed={seed}"
        known = Birds(n=train, split="train", seed=seed)
        model = train_promptcam(
            known, load_backbone(spec), seed=seed, out=folder, resume=out is not None, **PROMPT_TRAINING
        )
        probes = {pool: _probe(known, spec, pool, folder) for pool in ("mean", "cls")}
    x = torch.stack([model.preprocess(birds[i].image) for i in range(len(birds))])
    target = torch.from_numpy(birds.labels)
    with torch.inference_mode():
        logits = model(x).clone()
        right = logits.argmax(1) == target
        probe_right = {pool: probe.model(x).argmax(1) == target for pool, probe in probes.items()}
    # Every row of the table is scored on the same images: those that prompts and probes get right.
    rows = (right & probe_right["mean"] & probe_right["cls"]).nonzero()[:, 0]
    if not len(rows):
        raise UserError("no bird is classified correctly by prompts and probes", where=spec)
    radius = half_cell(model.backbone.grid_size, model.backbone.image_size)
    scoring = Scoring(curve_steps=curve_steps, radius=radius)
    maps = _prompt_rows(model, birds, rows, x[rows], target[rows], logits[rows], scoring)
    found = {
        "prompt accuracy": float(right.float().mean()),
        "probe accuracy": {pool: float(hits.float().mean()) for pool, hits in probe_right.items()},
        "images": len(rows),
        "rivals": _probe_rows(birds, rows.tolist(), probes, scoring),
        "prompt": {arm: {k: v.double().tolist() for k, v in scores.items()} for arm, scores in maps.items()},
    }
    return found | manipulation(model, birds, right.nonzero()[:, 0].tolist())


def _probe(birds: Birds, spec: str, pool: str, folder: Path) -> Classifier:
    """Logistic regression on the frozen features of the same birds."""
    fit_head(birds, spec, folder / f"probe-{pool}", pool=pool, recipe="exact", overwrite=True)
    return load_classifier(folder / f"probe-{pool}")


def _probe_rows(
    birds: Birds, rows: list[int], probes: dict[str, Classifier], scoring: Scoring
) -> dict[str, dict[str, list[float | None]]]:
    """Scores of map methods on the linear probes: arm and probe -> metric -> per-bird values."""
    arms = {
        "mean": [*arms_of(MAP_METHODS, (0.0,)), *arms_of(["gradcam"], (0.6, 1.0))],
        "cls": arms_of(["gradcam", "layercam"], (0.0,)),
    }
    free = {Arm(method, 0.0).name for method in ("eigencam", "rollout", "cls_attention")}  # these see no probe
    found: dict[str, dict[str, list[float | None]]] = {}
    for pool, probe in probes.items():
        scored = evaluate(
            birds,
            probe,
            arms=arms[pool],
            scoring=scoring,
            indices=rows,
            correct_only=False,
            baselines=pool == "mean",
        )
        for name, scores in scored.to_dict()["values"].items():
            known = name in free or not name.startswith(MAP_METHODS)
            found[name if known else f"{name}, {pool} probe"] = scores
    return found


def _prompt_rows(
    model: PromptCAM, birds: Birds, rows: Tensor, x: Tensor, target: Tensor, logits: Tensor, scoring: Scoring
) -> dict[str, dict[str, Tensor]]:
    """Mean of all heads, the greedy top head, and a sibling's prompt on the same image."""
    top = rank_traits(model, x, target, top=1).maps[:, 0]
    siblings = torch.tensor([birds.siblings(int(c))[0] for c in target])
    maps = model.maps(x, torch.stack([target, siblings], dim=1))
    near = similar_classes("logit", logits, target, scoring.references)
    weight = cosine_table(model.prompts.detach())
    look_alikes = {"logit": near, "weight": similar_classes("weight", logits, target, scoring.references, weight)}
    size = (x.shape[-2], x.shape[-1])
    regions = regions_of(birds, rows.tolist(), target, near, model.preprocess, size)
    score = partial(score_maps, model, x, target, regions=regions, look_alikes=look_alikes, scoring=scoring)
    return {
        "Prompt-CAM (mean of heads)": score(maps[:, 0].mean(1)),
        "Prompt-CAM (greedy top head)": score(top),
        "Prompt-CAM (a sibling's prompt)": score(maps[:, 1].mean(1)),
    }


def manipulation(model: PromptCAM, birds: Birds, rows: list[int]) -> dict[str, Any]:
    """Repaint the mark as a sibling's: how often does the prediction follow (Prompt-CAM, trait manipulation)?"""
    if not rows:
        return {"edited": 0, "to the sibling": 0, "unchanged": 0}
    siblings = [birds.siblings(int(birds.labels[i]))[0] for i in rows]
    edited = np.stack([birds.edit(i, birds.species[s].mark) for i, s in zip(rows, siblings)])
    x = torch.from_numpy(edited).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        prediction = model(model.preprocess.normalise(x)).argmax(1)
    return {
        "edited": len(rows),
        "to the sibling": int((prediction == torch.tensor(siblings)).sum()),
        "unchanged": int((prediction == torch.from_numpy(birds.labels[rows])).sum()),
    }


def flipped(record: dict[str, Any]) -> tuple[float, float, float]:
    """Share of edited birds whose prediction follows the edit, with its Wilson interval."""
    return tuple(wilson_interval(record["to the sibling"], record["edited"]))  # type: ignore[return-value]
