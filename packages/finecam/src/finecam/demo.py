"""`finecam demo`: the embedded study as one run folder with pictures, tables and a report. No download.

The main claims of Finer-CAM (arXiv 2501.11309) and Prompt-CAM (arXiv 2501.09333) on birds that differ in one small,
known mark. What does not show at this scale is in the report too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vfm_core.runs import RunDir

from finecam import study
from finecam.demo_pictures import difference_panels, trait_panels
from finecam.demo_report import finer_rows, prompt_rows, write_report
from finecam.study_prompts import PROMPT_TRAINING, prompt_folder

__all__ = ["DemoResult", "run_demo"]


@dataclass(frozen=True)
class DemoResult:
    """What the study found.

    Attributes
    ----------
    finer, prompt : list of dict
        Rows of the two main tables.
    report : Path
        The page with everything.
    seconds : float
        Time this call took.
    """

    finer: list[dict[str, Any]]
    prompt: list[dict[str, Any]]
    report: Path
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"finer": self.finer, "prompt": self.prompt, "report": str(self.report), "seconds": self.seconds}


def run_demo(
    out: str | Path = "demo",
    *,
    seeds: int | None = None,
    full: bool = False,
    overwrite: bool = False,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> DemoResult:
    """Run the embedded study, or what is missing of it.

    Parameters
    ----------
    out
        Run folder.
    seeds
        Training runs to repeat on, 1 to 3; default 3 (for Prompt-CAM, which is trained here, 1 unless `full`).
    full
        Every table of the papers, more birds, three runs of everything: the figures of the README.
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
        The folder holds a run with other settings.
    """
    start = time.perf_counter()
    size = study.FULL if full else study.QUICK
    if seeds is not None:
        size = replace(size, seeds=size.seeds[:seeds], prompt_seeds=size.prompt_seeds[:seeds])
    out = Path(out)
    work = study.units(size, out)
    config = {"study": size.to_dict(), "prompts": PROMPT_TRAINING, "version": study.VERSION}
    with RunDir(out, config, overwrite=overwrite) as run:
        todo = [name for name in work if name not in run.done]
        for name in progress(todo, len(todo)) if progress else todo:
            run.append({"unit": name, "result": work[name]()})
        records = {record["unit"]: record["result"] for record in run.records()}
        pictures = difference_panels(seed=size.seeds[0])
        traits = trait_panels(prompt_folder(out, "vit", size.prompt_seeds[0]), seed=size.prompt_seeds[0])
        for name, picture in [*pictures, *traits]:
            picture.save(run.figure(f"{name}.webp"), quality=90)
        write_report(run.report_path, size, records, pictures, traits)
        return DemoResult(finer_rows(records), prompt_rows(records), run.report_path, time.perf_counter() - start)
