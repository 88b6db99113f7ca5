"""Files of a finished evaluation: tables, recommendation, report, and the official prediction files of every arm.

::

    out/
      config.json  environment.json  results.jsonl  errors.jsonl    the run (one record per sample and arm)
      samples.json                                                  what was asked, once per sample
      table.csv  table.md  recommendation.json  report.html
      arms/<method>@<ratio>/<task>/pred.json, eval.json, ...        in MileBench's schemas
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.files import write_json

from meda_kv.evaluation.recommend import Recommendation, recommend
from meda_kv.evaluation.report import build_report, write_report
from meda_kv.evaluation.results import Results, Row, read_samples
from meda_kv.evaluation.tables import markdown, write_csv, write_markdown

if TYPE_CHECKING:
    from meda_kv.data import Sample


def divisions(results: Results) -> dict[str, list[Row]]:
    """Rows per task, and per group and image-count level where there are several tasks or levels."""
    parts = {"task": results.rows("task")}
    if len(results.tasks) > 1:
        parts["group"] = results.rows("group")
        parts["all"] = results.rows("all")
    if len(results.names("level")) > 1:
        parts["level"] = results.rows("level")
    return parts


def write_outputs(
    results: Results,
    out: str | Path,
    *,
    tolerance: float = 0.05,
    missing: Sequence[str] = (),
    markdown_report: bool = False,
) -> list[Recommendation]:
    """Write every file of a finished evaluation; each is whole or absent.

    Parameters
    ----------
    results
        All records of the run.
    out
        The run folder.
    tolerance
        See `recommend`.
    missing
        Shards that are not there yet.
    markdown_report
        Also write the report as Markdown.

    Returns
    -------
    list of Recommendation
        Empty when nothing was answered.
    """
    out = Path(out)
    recommendations = recommend(results, tolerance) if results.records else []
    parts = divisions(results)
    sentences = [item.sentence() for item in recommendations]
    write_csv(out / "table.csv", parts)
    write_markdown(out / "table.md", markdown(results, parts, sentences))
    write_json(out / "recommendation.json", [item.to_dict() for item in recommendations])
    write_arm_files(results, out)
    report = build_report(results, parts, recommendations, missing)
    write_report(out / "report.html", report, markdown_report)
    return recommendations


def arm_folder(out: str | Path, arm: str) -> Path:
    """Folder of an arm's files; characters that file systems refuse are replaced."""
    return Path(out) / "arms" / _file_name(arm)


def write_arm_files(results: Results, out: str | Path) -> None:
    """Write ``pred.json``, ``eval.json`` and ``eval_score.json`` of every arm and task, in MileBench's schemas.

    A probe has one entry per question, with ids ``<sample>#<question from 0>``. Several seeds have folders of their
    own.
    """
    from meda_kv.data.predictions import (
        prediction,
        score_predictions,
        single_question,
        write_evaluation,
        write_predictions,
    )

    asked = {key: restore_sample(facts) for key, facts in read_samples(out).items()}
    settings = {name: results.config.get(name) for name in ("protocol", "preset", "max_new_tokens")}
    seeds = {record["seed"] for record in results.records}
    parts: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for record in results.records:
        parts.setdefault((record["arm"], record["task"], record["seed"]), []).append(record)
    for (arm, task, seed), records in parts.items():
        entries, samples = [], []
        for record in sorted(records, key=lambda r: r["sample_id"]):
            sample = asked.get(f"{task}/{record['sample_id']}")
            if sample is None:
                continue
            several = results.config.get("protocol") != "generate"
            for j, answer in enumerate(record["answers"]):
                one = single_question(sample, j, numbered=several)
                kwargs = {"method": record["method"], "ratio": record["ratio"], "seed": seed, **settings}
                model_id = f"{results.config.get('model')} {arm}"
                entries.append(prediction(one, answer, model_id=model_id, gen_kwargs=kwargs))
                samples.append(one)
        if samples:
            folder = arm_folder(out, arm) / (f"seed-{seed}" if len(seeds) > 1 else "") / _file_name(task)
            write_predictions(folder / "pred.json", entries)
            write_evaluation(folder, score_predictions(entries, samples, where=folder / "pred.json"))


def describe_sample(sample: Sample) -> dict[str, Any]:
    """What a run folder keeps of a sample, once: enough to write predictions without the data."""
    facts = {name: getattr(sample, name) for name in ("id", "task", "group", "metric", "level", "prompt", "answer")}
    return {
        **facts,
        "questions": [list(pair) for pair in sample.questions],
        "choices": list(sample.choices),
        "images": [str(i) if isinstance(i, str | Path) else f"picture {k}" for k, i in enumerate(sample.images, 1)],
        "video": None if sample.video is None else str(sample.video),
        "source": sample.source,
        "official": sample.official,
    }


def restore_sample(facts: dict[str, Any]) -> Sample:
    """The sample that `describe_sample` described, its pictures by name only."""
    from meda_kv.data import Sample

    return Sample(
        **{
            **facts,
            "questions": tuple((question, gold) for question, gold in facts["questions"]),
            "choices": tuple(facts["choices"]),
            "images": tuple(Path(name) for name in facts["images"]),
            "video": None if facts["video"] is None else Path(facts["video"]),
        }
    )


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.@=+-]", "_", text)
