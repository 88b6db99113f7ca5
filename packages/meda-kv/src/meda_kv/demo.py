"""`meda-kv demo`: the embedded study as one run folder with tables, pictures and a report. No download.

Every method under the same exact budgets on three small networks that read several pictures: what the paper's parts
bring (MEDA, arXiv 2502.17599, Tables 1 and 5), what they do not, and a rule of our own beside them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfm_core.errors import UserError
from vfm_core.files import write_json
from vfm_core.runs import RunDir

from meda_kv import study

__all__ = ["DemoResult", "run_demo"]

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class DemoResult:
    """What the study found.

    Attributes
    ----------
    rows : list of dict
        Score per part, method and ratio, all networks together.
    checks : list
        `meda_kv.study_claims.Check`: the claims with their intervals and the value of every network.
    recommendations : list of str
        One measured sentence per part.
    report : Path
        The page with everything.
    seconds : float
        Time this call took.
    """

    rows: list[dict[str, Any]]
    checks: list[Any]
    recommendations: list[str]
    report: Path
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "rows": self.rows,
            "checks": [one.to_dict() for one in self.checks],
            "recommendations": self.recommendations,
            "report": str(self.report),
            "seconds": self.seconds,
        }


def run_demo(
    out: str | Path = "demo",
    *,
    seed: int = 0,
    seeds: int = 3,
    albums: int = 70,
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
        First network; the others follow, of the three that are shipped.
    seeds
        How many networks, 1 to 3.
    albums
        Albums per network and part.
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
        Networks that are not there, or a folder that holds a run with other settings.
    """
    from vfm_core.executors import make_executor

    from meda_kv import study_claims
    from meda_kv.demo_report import entropy_rows, result_rows, write_report
    from meda_kv.evaluation import recommend

    start = time.perf_counter()
    size = study.StudySize(seeds=_seeds(seed, seeds), albums=albums)
    with RunDir(out, {"study": size.to_dict(), "version": study.VERSION}, overwrite=overwrite) as run:
        units = [unit for unit in size.units() if _name(unit) not in run.done]
        workers = make_executor(executor or f"local:{min(4, os.cpu_count() or 1)}")
        outcomes = workers.run(study.run_unit, (size, run.path, overwrite), units)
        for outcome in progress(outcomes, len(units)) if progress else outcomes:
            if outcome.error is not None:
                raise outcome.error
            run.append({"unit": _name(units[outcome.index]), "part": outcome.value})
        results = {part: study.results_of(size, run.path, part) for part in size.parts}
        checks = study_claims.check(results, size.seeds)
        rows = [row for part, one in results.items() for row in result_rows(part, one)]
        said = [_without_task(part, one.sentence()) for part, found in results.items() for one in recommend(found)]
        entropies = {one: study.entropy_spread(one) for one in size.seeds}
        seconds = time.perf_counter() - start
        report = write_report(run, size, results, checks, said, entropy_rows(entropies), seconds)
        done = DemoResult(rows, checks, said, report, seconds)
        write_json(run.path / "summary.json", {**done.to_dict(), "entropies": entropies})
    return done


def _name(unit: tuple[int, str]) -> str:
    return f"{unit[1]} {unit[0]}"


def _without_task(part: str, sentence: str) -> str:
    """Name the part instead of its task, which two parts share."""
    task, rest = sentence.split(":", 1) if "(" not in sentence.split(":", 1)[0] else sentence.split(" (", 1)
    return f"{part}:{rest}" if sentence.startswith(f"{task}:") else f"{part} ({rest}"


def _seeds(first: int, count: int) -> tuple[int, ...]:
    known = study.MODEL_SEEDS
    chosen = tuple(range(first, first + count))
    if not chosen or any(seed not in known for seed in chosen):
        raise UserError(
            "no network for the seed",
            where="--seed, --seeds",
            given=f"{first}, {count}",
            remedy=f"networks are shipped for {known[0]} to {known[-1]}",
        )
    return chosen
