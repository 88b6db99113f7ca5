"""Questions for the trait quiz out of finished runs: each run is a method, each listed (image, trait) a question."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from vfm_core.errors import UserError, closest
from vfm_core.images import read_image

from finecam.quiz import QuizItem


def read_traits(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Rows (image, trait) of a CSV file with these two columns.

    Raises
    ------
    UserError
        No such file, a missing column, an empty cell, or no rows.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [{str(k).strip(): (v or "").strip() for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError("cannot read traits", where=path, given=e, remedy="give a CSV file: image,trait") from e
    for number, row in enumerate(rows, 2):
        if not row.get("image") or not row.get("trait"):
            raise UserError("a row needs image and trait", where=f"{path} line {number}", given=dict(row))
    if not rows:
        raise UserError("no traits", where=path, remedy="write one row per image and trait: image,trait")
    return [(row["image"], row["trait"]) for row in rows]


def items_of_runs(runs: Sequence[Path], traits: str | os.PathLike[str], images: Path | None = None) -> list[QuizItem]:
    """One question per run and row of the trait file.

    Parameters
    ----------
    runs
        Run folders of ``explain`` (the finer map; the plain one of a run without contrast) or ``promptcam traits``
        (the mean of the top heads). The folder's name is the method's.
    traits
        CSV file with the columns ``image`` (as in the runs' records) and ``trait``.
    images
        Folder of the original images; the runs' stored pictures by default.

    Raises
    ------
    UserError
        A run without records, two runs of one name, an image that a run lacks, an empty map.
    """
    wanted = read_traits(traits)
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        raise UserError("two runs of one name", given=", ".join(names), remedy="rename a folder: it names the method")
    return [
        _item(run, _records(run), name, image, trait, images)
        for run, name in zip(runs, names)
        for image, trait in wanted
    ]


def _records(run: Path) -> dict[str, dict[str, Any]]:
    try:
        lines = (run / "results.jsonl").read_text(encoding="utf-8").splitlines()
        return {record["image"]: record for record in map(json.loads, lines)}
    except (OSError, ValueError, KeyError) as e:
        raise UserError(
            "not a finished run", where=run, given=e, remedy="run finecam explain or promptcam traits"
        ) from e


def _item(
    run: Path, records: dict[str, dict[str, Any]], method: str, image: str, trait: str, images: Path | None
) -> QuizItem:
    if image not in records:
        near = closest(image, records)
        hint = f"did you mean {', '.join(near)}?" if near else "explain it first"
        raise UserError("no result for an image", where=run, given=image, remedy=hint)
    record = records[image]
    with np.load(run / record["map"]) as arrays:
        values = next(arrays[key] for key in ("finer", "mean", "plain") if key in arrays.files).astype(np.float32)
    if not np.nanmax(values) > np.nanmin(values):
        raise UserError("empty map", where=run, given=image, remedy="leave this image out of the quiz")
    picture = read_image(images / image if images is not None else run / record["pictures"]["image"])
    return QuizItem(picture, np.nan_to_num(values), trait, method, image)
