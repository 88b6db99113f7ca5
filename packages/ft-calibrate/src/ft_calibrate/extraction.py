"""Logits and features of a data set on disk, in shards that survive a killed run (ours, not from a paper)."""

from __future__ import annotations

import contextlib
import csv
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from vfm_core.data import ImageDataset
from vfm_core.errors import UserError
from vfm_core.files import atomic_write, jsonable
from vfm_core.runs import RunDir

from ft_calibrate.classifier import Classifier
from ft_calibrate.fold_marks import mark, unmark
from ft_calibrate.predict import Part, columns_of, evaluating, labels_of, predict_table, stream, table_of
from ft_calibrate.tables import read_table, write_table

__all__ = ["FORMATS", "Extraction", "columns_of", "evaluating", "extract", "predict_table"]

log = logging.getLogger(__name__)

FORMATS = ("npz", "parquet")
SHARD_ROWS = 4096


@dataclass(frozen=True)
class Extraction:
    """What `extract` did.

    Attributes
    ----------
    path : Path
        The file, or the folder of shards; `ft_calibrate.tables.read_table` reads both.
    rows, num_classes : int
        Pictures scored in all, logits each.
    skipped : list of (str, str)
        Id and reason of each unreadable picture; also in ``skipped.csv``.
    shards, computed : int
        Shards in all, and those that this call computed; the others were there.
    images_per_second : float
        Of this call; nan when nothing was left to do.
    logit_scale : float, optional
        Factor on the cosines of a text or cosine head, in whose units gamma is; also in a folder's ``config.json``.
    folded : str, optional
        Which calibration the model's head holds: the logits include it. Also in a folder's ``config.json``, and noted
        in ``NAME.npz.folded_calibration.json`` beside a file or ``folded_calibration.json`` in a folder.
    """

    path: Path
    rows: int
    num_classes: int
    skipped: list[tuple[str, str]] = field(default_factory=list)
    shards: int = 0
    computed: int = 0
    images_per_second: float = float("nan")
    logit_scale: float | None = None
    folded: str | None = None


def extract(
    classifier: Classifier,
    data: ImageDataset,
    out: str | Path,
    *,
    features: bool = True,
    format: str | None = None,
    shard_rows: int = SHARD_ROWS,
    batch_size: int = 256,
    workers: int = 0,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    strict: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Write logits (and features) of a data set, shard by shard; the same call again resumes.

    Parameters
    ----------
    classifier, features, batch_size, workers, device, autocast
        As for `predict_table`.
    data : ImageDataset
        The pictures.
    out : path
        ``NAME.npz`` or ``NAME.parquet`` for one file (put together from shards in ``NAME.npz.parts`` at the end, in
        memory), else a folder of shards, which is never held in memory as a whole; a name with another suffix is
        taken for a folder only where there is one, or with `format`.
    format : {"npz", "parquet"}, optional
        Of the shards in a folder; npz by default.
    shard_rows : int
        Pictures per shard: what a killed run can lose.
    strict : bool
        Stop at the first unreadable picture instead of listing it in ``skipped.csv``.
    overwrite : bool
        Start afresh.
    on_progress : callable, optional
        ``on_progress(pictures done, pictures in all)`` after each batch.

    Returns
    -------
    Extraction

    Raises
    ------
    UserError
        As `predict_table`; a suffix of another format; an existing file without `overwrite`; a folder of
        another extraction.
    """
    out = Path(out)
    single = out.suffix.lower().lstrip(".") in FORMATS
    kind = out.suffix.lower().lstrip(".") if single else format or "npz"
    if kind not in FORMATS:
        raise UserError("unknown format", where="--format", given=repr(kind), remedy=f"use {' or '.join(FORMATS)}")
    if not single and format is None and not out.is_dir() and re.fullmatch(r"\.[A-Za-z]\w{0,7}", out.suffix):
        remedy = f"end it in .npz or .parquet; for a folder of shards leave {out.suffix} out, or give --format npz"
        raise UserError("unknown file format", where="--out", given=out.name, remedy=remedy)
    if shard_rows < 1:
        raise UserError("a shard needs at least one row", where="--shard-rows", given=shard_rows)
    if single and out.exists() and not overwrite:
        raise UserError("file exists", given=str(out), remedy="use --overwrite, or another --out")
    folder = out.with_name(f"{out.name}.parts") if single else out
    classes, labels = labels_of(classifier, data)
    config = {
        "model": classifier.spec,
        "model_fingerprint": classifier.fingerprint(),
        "preprocess": None if classifier.preprocess is None else classifier.preprocess.to_dict(),
        "data": data.name,
        "data_fingerprint": data.fingerprint(),
        "classes": classes,
        "logit_scale": classifier.logit_scale,
        "features": features,
        "autocast": None if autocast is None else str(autocast),
        "shard_rows": shard_rows,
        "format": kind,
        **({} if classifier.folded is None else {"folded_calibration": classifier.folded}),
    }
    with RunDir(folder, jsonable(config), overwrite=overwrite) as run:
        if overwrite:
            for stale in (*folder.glob("shard-*.npz"), *folder.glob("shard-*.parquet")):
                stale.unlink()
        starts = {f"shard-{i:05d}.{kind}": start for i, start in enumerate(range(0, len(data), shard_rows))}
        sizes = {record["unit"]: record["bytes"] for record in run.records()}
        todo = {unit: start for unit, start in starts.items() if not _is_whole(folder / unit, sizes.get(unit))}
        began, done = time.monotonic(), len(data) - sum(min(shard_rows, len(data) - start) for start in todo.values())
        before = done
        shards = _Shards(run, todo, min(shard_rows, len(data)), data, classes, labels)
        indices = np.concatenate(
            [np.arange(s, min(s + shard_rows, len(data))) for s in todo.values()] or [np.arange(0)]
        )
        if len(indices):
            note = None if strict else shards.skip
            for part in stream(classifier, data, indices, batch_size, workers, device, note, features, autocast):
                shards.add(part)
                if on_progress is not None:
                    on_progress(before + shards.taken, len(data))
            shards.finish()
        seconds = time.monotonic() - began
        records = run.records()
        skipped = [
            (str(i), str(why)) for record in sorted(records, key=lambda r: r["unit"]) for i, why in record["skipped"]
        ]
        rows = sum(record["rows"] for record in records)
        if not rows:
            raise UserError(
                "no readable picture", where=data.name, given=f"{len(skipped)} skipped", remedy="check the files"
            )
        if single:
            write_table(read_table(folder), out)
        unmark(out) if classifier.folded is None else mark(out, classifier.folded)
        _write_skipped(out.with_name(f"{out.stem}.skipped.csv") if single else folder / "skipped.csv", skipped)
    if single:
        _remove(folder)
    speed = len(indices) / seconds if len(indices) and seconds else float("nan")
    shards_done, scale = (len(starts), len(todo)), classifier.logit_scale
    return Extraction(out, rows, classifier.num_classes, skipped, *shards_done, speed, scale, classifier.folded)


def _is_whole(path: Path, size: int | None) -> bool:
    """Whether a recorded shard is there in full; one whose pictures were all unreadable has no file (size 0)."""
    return size == 0 or (size is not None and path.is_file() and path.stat().st_size == size)


class _Shards:
    """Collects streamed rows and writes each shard as soon as its last picture has been seen."""

    def __init__(
        self,
        run: RunDir,
        todo: dict[str, int],
        shard_rows: int,
        data: ImageDataset,
        classes: list[str],
        labels: NDArray[np.int64] | None,
    ) -> None:
        self.run, self.todo, self.shard_rows, self.data = run, todo, shard_rows, data
        self.classes, self.labels = classes, labels
        self.unit_at = {start: unit for unit, start in todo.items()}
        self.parts: dict[int, list[Part]] = {start: [] for start in todo.values()}
        self.skipped: dict[int, list[tuple[int, str, str]]] = {start: [] for start in todo.values()}
        self.left = {start: min(shard_rows, len(data) - start) for start in todo.values()}
        self.taken = 0

    def skip(self, index: int, name: str, error: UserError) -> None:
        start = index - index % self.shard_rows
        self.skipped[start].append((index, name, error.what))
        self.left[start] -= 1
        self.taken += 1

    def add(self, part: Part) -> None:
        rows, features, logits = part
        starts = rows - rows % self.shard_rows
        for start in np.unique(starts):
            mine = starts == start
            piece = (rows[mine], None if features is None else features[mine], logits[mine])
            self.parts[int(start)].append(piece)
            self.left[int(start)] -= int(mine.sum())
        self.taken += len(rows)
        for start in [s for s, left in self.left.items() if left == 0]:
            self._write(start)

    def finish(self) -> None:
        """Write the shards that ended with unreadable pictures."""
        for start in list(self.left):
            self._write(start)

    def _write(self, start: int) -> None:
        parts, skipped, unit = self.parts.pop(start), sorted(self.skipped.pop(start)), self.unit_at[start]
        del self.left[start]
        path, count = self.run.path / unit, 0
        if parts:
            rows = np.concatenate([p[0] for p in parts])
            order = np.argsort(rows, kind="stable")
            features = [p[1] for p in parts if p[1] is not None]
            logits = np.concatenate([p[2] for p in parts])[order]
            kept = np.concatenate(features)[order] if features else None
            write_table(table_of(rows[order], logits, kept, self.classes, self.labels, self.data), path)
            count = len(rows)
        if unit not in self.run.done:
            facts = {"rows": count, "bytes": path.stat().st_size if count else 0}
            self.run.append({"unit": unit, **facts, "skipped": [(name, why) for _, name, why in skipped]})


def _write_skipped(path: Path, skipped: list[tuple[str, str]]) -> None:
    if not skipped:
        path.unlink(missing_ok=True)
        return
    log.warning("%d unreadable pictures are listed in %s", len(skipped), path)
    with atomic_write(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "reason"), *skipped])


def _remove(folder: Path) -> None:
    """Remove a folder of shards whose rows are in one file now; files that are not ours stay."""
    for pattern in ("shard-*", "*.json", "*.jsonl", ".lock*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
