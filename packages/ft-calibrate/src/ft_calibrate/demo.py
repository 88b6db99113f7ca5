"""`ft-calibrate demo`: the embedded study as one run folder with tables, pictures and a report. No download.

Collapse and repair of "Fine-Tuning is Fine, if Calibrated" (arXiv 2409.16223) over several seeds, the remedies of
"Holistic Transfer" (arXiv 2311.01420), and the whole diagnosis of one run. What does not show at this scale is in the
report too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vfm_core.errors import UserError
from vfm_core.files import write_json
from vfm_core.runs import RunDir

from ft_calibrate import study
from ft_calibrate.study_claims import Check, check

__all__ = ["DemoResult", "run_demo"]

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class DemoResult:
    """What the study found.

    Attributes
    ----------
    rows : list of dict
        One per arm: mean over seeds of the main numbers.
    checks : list of Check
        The claims with their margins per seed.
    verdict : str
        Sentence of the diagnosis of the first seed's fine-tuning.
    report : Path
        The page with everything.
    seconds : float
        Time this call took.
    """

    rows: list[dict[str, Any]]
    checks: list[Check]
    verdict: str
    report: Path
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "rows": self.rows,
            "checks": [one.to_dict() for one in self.checks],
            "verdict": self.verdict,
            "report": str(self.report),
            "seconds": self.seconds,
        }


def run_demo(
    out: str | Path = "demo",
    *,
    seed: int = 0,
    seeds: int = 3,
    photos: str | None = None,
    executor: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DemoResult:
    """Run the embedded study, or what is missing of it.

    Parameters
    ----------
    out
        Run folder.
    seed
        First seed; the others follow, of the five that networks are shipped for.
    seeds
        How many, 1 to 5.
    photos
        Also repeat collapse and repair on the photos of this data spec (splits ``train`` and ``test``).
    executor
        ``local:N`` works in N processes; default: one per CPU core, at most four.
    overwrite
        Forget an earlier run with other settings.
    progress
        Wraps the iterable of units.

    Returns
    -------
    DemoResult

    Raises
    ------
    UserError
        Seeds that are not there, or a folder that holds a run with other settings.
    """
    from vfm_core.executors import make_executor

    from ft_calibrate.demo_report import arm_rows, write_report

    start = time.perf_counter()
    chosen = _seeds(seed, seeds)
    size = study.StudySize(seeds=chosen)
    units: list[tuple[str, Any]] = [("glyphs", unit) for unit in size.units()]
    config: dict[str, Any] = {"study": size.to_dict(), "version": study.VERSION, "photos": photos}
    if photos is not None:
        from ft_calibrate.photos import PhotoSize

        config["photo_study"] = replace(PhotoSize(), seeds=chosen).to_dict()
        units += [("photos", (photos, one)) for one in chosen]
    with RunDir(out, config, overwrite=overwrite) as run:
        todo = [unit for unit in units if _name(unit) not in run.done]
        workers = make_executor(executor or f"local:{min(4, os.cpu_count() or 1)}")
        outcomes = workers.run(_work, size, todo)
        for outcome in progress(outcomes, len(todo)) if progress else outcomes:
            if outcome.error is not None:
                raise outcome.error
            run.append({"unit": _name(todo[outcome.index]), "result": outcome.value})
        results = {record["unit"]: record["result"] for record in run.records()}
        records = [{part: results[f"{part}-{one}"] for part in size.parts} for one in chosen]
        photo_records = [results[f"photos-{one}"] for one in chosen] if photos is not None else []
        checks = check(records)
        diagnosis = _first_diagnosis(run.path, chosen[0], size)
        rows = arm_rows(records)
        write_report(run, size, records, checks, diagnosis, photo_records)
        result = DemoResult(rows, checks, diagnosis.sentence, run.report_path, time.perf_counter() - start)
        summary = {**config, **result.to_dict(), "records": records, "photo_records": photo_records}
        write_json(run.path / "summary.json", summary)
        return result


def _seeds(first: int, count: int) -> tuple[int, ...]:
    known = study.MODEL_SEEDS
    if first not in known or not 1 <= count <= len(known):
        remedy = f"give a seed of {known[0]} to {known[-1]} and 1 to {len(known)} seeds"
        raise UserError("no such seeds", where="--seed, --seeds", given=f"{first}, {count}", remedy=remedy)
    return tuple(known[(known.index(first) + i) % len(known)] for i in range(count))


def _name(unit: tuple[str, Any]) -> str:
    kind, what = unit
    return f"photos-{what[1]}" if kind == "photos" else f"{what[1]}-{what[0]}"


def _work(size: study.StudySize, unit: tuple[str, Any]) -> dict[str, Any]:
    """One unit; in a worker process."""
    kind, what = unit
    if kind == "glyphs":
        return study.run_unit(size, what)
    from ft_calibrate.photos import PhotoSize, photo_seed

    return photo_seed(what[0], what[1], PhotoSize())


def _first_diagnosis(out: Path, seed: int, size: study.StudySize) -> Any:
    """Fine-tune once more with a look after every epoch, keep the logits as files, and write the whole diagnosis."""
    from ft_calibrate.epoch_log import EpochLog
    from ft_calibrate.recipes import fine_tune
    from ft_calibrate.tables import write_table

    one = study.setting(seed, size)
    log = EpochLog(one.seen, one.test, classes=study.CLASSES, train=one.oracle)
    run = fine_tune(one.model, one.train, one.seen, "ft", validate=log, **one.training)
    folder = study.folder_of(out, seed)
    for name, model, data in _tables(one, run):
        write_table(one.table(model, data), folder / f"{name}.npz")
    diagnosis = study.diagnosis_of(one, run, log.records)
    diagnosis.to_html(out / "diagnosis")
    return diagnosis


def _tables(one: study.Setting, run: Any) -> Sequence[tuple[str, Any, Any]]:
    return (
        ("train", run, one.train),
        ("test", run, one.test),
        ("test_before", one.model, one.test),
        ("reference", run, one.oracle),
        ("reference_before", one.model, one.oracle),
    )
