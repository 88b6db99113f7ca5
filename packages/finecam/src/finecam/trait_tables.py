"""Numbers beside the pictures of Prompt-CAM: the pruning curve and annotated traits found (arXiv 2501.09333, sec. 4).

Both are kept per image in its record, so that a resumed run averages over all of its images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.metrics import wilson_interval

from finecam.quiz import cells_of, trait_hits
from finecam.traits import Traits, survival

__all__ = ["annotated_hits", "hits_table", "pruning_figure", "pruning_rows", "survival_of"]

Record = Mapping[str, Any]
TRAIT = "trait"  # what a sample's ``trait_mask`` is called in the table
ALL = "all"


def survival_of(traits: Traits, i: int) -> dict[str, list[Any]]:
    """Score, probability and correctness of image `i`'s target with R, R - 1, ..., 0 heads left, as JSON values."""
    curves = {name: values[i].tolist() for name, values in survival(traits).items()}
    return {name: [v if isinstance(v, bool) else round(v, 5) for v in values] for name, values in curves.items()}


def pruning_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Mean curve over the images classified as their target, most heads first.

    Parameters
    ----------
    records
        Lines of a run with ``survival``, ``target`` and ``prediction``; those without are left out.

    Returns
    -------
    list of dict
        ``heads kept``, ``mean score``, ``mean probability``, ``accuracy`` in [0, 1] and ``images``; empty when no image
        is classified as its target.
    """
    right = [r["survival"] for r in records if r.get("survival") and r["prediction"]["id"] == r["target"]["id"]]
    if not right:
        return []
    score, probability, correct = (
        np.array([one[name] for one in right], np.float64).mean(0) for name in ("score", "probability", "correct")
    )
    return [
        {
            "heads kept": len(score) - 1 - k,
            "mean score": float(score[k]),
            "mean probability": float(probability[k]),
            "accuracy": float(correct[k]),
            "images": len(right),
        }
        for k in range(len(score))
    ]


def pruning_figure(rows: Sequence[Record]) -> Any:
    """Draw `pruning_rows`: accuracy and probability, and the class score, against the number of heads kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    kept = [row["heads kept"] for row in rows]
    for name in ("accuracy", "mean probability"):
        left.plot(kept, [row[name] for row in rows], marker="o", label=name)
    right.plot(kept, [row["mean score"] for row in rows], marker="o", color="C2", label="mean score")
    for axes in (left, right):
        axes.set_xlabel("heads kept")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_ylim(-0.03, 1.03)
    return figure


def annotated_hits(
    maps: NDArray[np.floating], meta: Mapping[str, Any], box: Sequence[float]
) -> dict[str, tuple[bool, float]] | None:
    """Whether some head finds each annotated trait or part of an image.

    Parameters
    ----------
    maps
        (k, h, w) raw attention of the heads shown.
    meta
        Of the sample; ``part_masks`` {name: (H, W)} and ``trait_mask`` (H, W) count.
    box
        What the maps cover, in original pixels.

    Returns
    -------
    dict or None
        Name -> (found, chance that k different cells drawn at random find it); None without annotations.
    """
    masks = {name: np.asarray(mask, bool) for name, mask in dict(meta.get("part_masks") or {}).items()}
    if meta.get("trait_mask") is not None:
        masks[TRAIT] = np.asarray(meta["trait_mask"], bool)
    found = trait_hits(maps, masks, box)
    k, h, w = maps.shape
    chances = {name: 1 - _all_miss(h * w, len(cells_of(masks[name], (h, w), box)), k) for name in found}
    return {name: (hit, round(chances[name], 5)) for name, hit in found.items()} or None


def _all_miss(cells: int, inside: int, draws: int) -> float:
    """Probability that `draws` different cells out of `cells` all miss the `inside` ones."""
    return float(np.prod([max(0, cells - inside - i) / (cells - i) for i in range(min(draws, cells))]))


def hits_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per annotated trait or part, and one for all of them together: fraction found, 95 % Wilson interval.

    Empty when no record has annotations.
    """
    by_name: dict[str, list[tuple[bool, float]]] = {}
    for record in records:
        for name, (hit, chance) in (record.get("hits") or {}).items():
            by_name.setdefault(name, []).append((hit, chance))
    rows = []
    if len(by_name) > 1:
        by_name = {ALL: [entry for entries in by_name.values() for entry in entries]} | dict(sorted(by_name.items()))
    for name, entries in by_name.items():
        hits = sum(hit for hit, _ in entries)
        chance = sum(chance for _, chance in entries) / len(entries)
        rows.append(
            {
                "trait or part": name,
                "visible in images": len(entries),
                "found by a head": wilson_interval(hits, len(entries)),
                "by chance": chance,
            }
        )
    return rows
