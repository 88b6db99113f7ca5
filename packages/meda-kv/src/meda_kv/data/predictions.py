"""Predictions and their scores in MileBench's files: ``pred.json``, ``eval.json`` and ``eval_score.json``.

The official scorer reads the ``pred.json`` written here, and a ``pred.json`` made elsewhere can be scored here, against
the same annotation files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vfm_core.errors import UserError
from vfm_core.files import write_json

from meda_kv.data.samples import LEVELS, Sample, Task, open_task
from meda_kv.metrics import normalise, score

__all__ = [
    "Evaluation",
    "prediction",
    "read_predictions",
    "score_file",
    "score_predictions",
    "single_question",
    "write_evaluation",
    "write_predictions",
]

_log = logging.getLogger(__name__)

_SCORED_TWICE = ("accuracy", "needle")  # the metrics in which the official scorer and the mended one can differ


def prediction(
    sample: Sample, answer: str, *, model_id: str, gen_kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One entry of ``pred.json``.

    Parameters
    ----------
    sample : Sample
        What was asked.
    answer : str
        As generated, without special tokens.
    model_id : str
        Names the model, and the method where it matters.
    gen_kwargs : mapping, optional
        Settings of the generation.

    Returns
    -------
    dict
        ``sample_id`` (an integer where it reads as one: the official scorer looks it up as such), ``image``,
        ``question``, ``gt_response``, ``gen_model_id``, ``pred_response``, ``gen_kwargs``.
    """
    pictures = [str(image) if isinstance(image, str | Path) else f"image {i}" for i, image in enumerate(sample.images)]
    return {
        "sample_id": _number(sample.id),
        "image": pictures if sample.video is None else [str(sample.video)],
        "question": sample.asked(),
        "gt_response": sample.answer,
        "gen_model_id": model_id,
        "pred_response": answer,
        "gen_kwargs": dict(gen_kwargs or {}),
    }


def write_predictions(path: str | Path, predictions: Iterable[Mapping[str, Any]]) -> None:
    """Write ``pred.json``, atomically, in the order given."""
    write_json(path, list(predictions))


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """Read a ``pred.json``, or a ``pred.jsonl`` with one entry per line.

    Raises
    ------
    UserError
        No such file, not JSON, or an entry without ``sample_id`` or ``pred_response``; names file and entry.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = json.loads(text)
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot read file ({error.strerror})"
        raise UserError(what, given=path, remedy="name a pred.json or pred.jsonl") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", where=path, remedy="write the file again") from error
    if not isinstance(entries, list):
        raise UserError("predictions must be a list", where=path, given=type(entries).__name__)
    for index, entry in enumerate(entries):
        for key in ("sample_id", "pred_response"):
            if not isinstance(entry, dict) or key not in entry:
                raise UserError(f"entry without {key}", where=f"{path}, entry {index}")
        if not isinstance(entry["pred_response"], str):
            where = f"{path}, sample_id {entry['sample_id']}"
            raise UserError("pred_response must be text", where=where, given=repr(entry["pred_response"])[:80])
    return entries


@dataclass(frozen=True)
class Evaluation:
    """Scores of the predictions of one task.

    Attributes
    ----------
    task : str
        Name of the task.
    metric : str
        One of `meda_kv.data.METRICS`.
    scores : dict of str to float
        By sample id, each in [0, 1].
    levels : dict of str to str
        ``"Few"``, ``"Medium"`` or ``"Many"`` by sample id.
    official_score, mended_score : float
        What MileBench's scorer gives for the same predictions, the number to compare with published ones, and what it
        gives with the places mended that `meda_kv.metrics` lists. `score` is one of them: the official one for
        MileBench's samples, the mended one for all others.
    empty : int
        Answers without a word.
    """

    task: str
    metric: str
    scores: dict[str, float]
    levels: dict[str, str]
    official_score: float
    mended_score: float
    empty: int = 0

    @property
    def score(self) -> float:
        """Mean over the samples, in [0, 1]."""
        return sum(self.scores.values()) / len(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """``eval.json``: ``Accuracy`` or ``Rouge-L f``, and by image-count level the mean and [sum, count].

        Where scorers can differ, ``official_score`` and ``mended_score`` stand beside.
        """
        by_level: dict[str, list[float]] = {level: [] for level in LEVELS}
        for identity, value in self.scores.items():
            by_level[self.levels[identity]].append(value)
        both = {"official_score": self.official_score, "mended_score": self.mended_score}
        return {
            "Rouge-L f" if self.metric == "rouge-l" else "Accuracy": self.score,
            "image_quantity_level-Accuracy": {k: sum(v) / len(v) if v else 0 for k, v in by_level.items()},
            "image_quantity_level-Result": {k: [sum(v), len(v)] for k, v in by_level.items()},
            **(both if self.metric in _SCORED_TWICE else {}),
        }

    def score_list(self) -> list[dict[str, str]]:
        """``eval_score.json``: ``[{"id", "score"}]`` as text, three decimals for ROUGE-L and shares of words."""
        digits = 3 if self.metric in ("rouge-l", "words") else 0
        return [
            {"id": identity, "score": str(round(value, digits)) if digits else str(int(value))}
            for identity, value in self.scores.items()
        ]


def score_predictions(
    predictions: Sequence[Mapping[str, Any]],
    task: Task | Sequence[Sample],
    *,
    official: bool | None = None,
    partial: bool = False,
    where: str | Path = "predictions",
) -> Evaluation:
    """Score the predictions of one task against its samples.

    Parameters
    ----------
    predictions : sequence of mapping
        Entries of ``pred.json``; only ``sample_id`` and ``pred_response`` are needed. Ids are compared as numbers where
        they read as numbers.
    task : Task or sequence of Sample
        Of one task; answers, choices and image counts are taken from here.
    official : bool, optional
        Score to the letter of MileBench's scorer; by default as the samples say (`Sample.official`).
    partial : bool
        Score what is there when some samples have no prediction.
    where : str or Path
        What errors call the predictions.

    Returns
    -------
    Evaluation

    Raises
    ------
    UserError
        A prediction is missing, occurs twice, belongs to no sample, or was made for another gold answer.
    """
    samples = list(task.samples if isinstance(task, Task) else task)
    names = list(dict.fromkeys(sample.task for sample in samples))
    if len(names) != 1:
        raise UserError("predictions are scored task by task", where=where, given=f"{len(names)} tasks: {names[:4]}")
    known = {_number(sample.id): sample for sample in samples}
    given: dict[int | str, Mapping[str, Any]] = {}
    for entry in predictions:
        key = _number(entry["sample_id"])
        place = f"{where}, sample_id {entry['sample_id']}"
        if key in given:
            raise UserError("two predictions for one sample", where=place, remedy="keep one of them")
        if key not in known:
            raise UserError(f"no such sample in task {names[0]}", where=place, remedy="check the task and its variant")
        gold = entry.get("gt_response")
        if gold not in (None, "") and normalise(str(gold)) != normalise(known[key].answer):
            shown = f"{gold!r}, annotated {known[key].answer!r}"
            raise UserError("prediction made for another gold answer", where=place, given=shown)
        given[key] = entry
    absent = [sample.id for sample in samples if _number(sample.id) not in given]
    if absent and (not partial or not given):
        shown = f"{len(absent)} of {len(samples)}, such as {', '.join(absent[:5])}"
        raise UserError(
            "samples without a prediction",
            where=where,
            given=shown,
            remedy="finish the run, or score the others with --partial",
        )
    rows = [(known[key], str(entry["pred_response"])) for key, entry in given.items()]
    twice = samples[0].metric in _SCORED_TWICE
    exact = [score(sample, answer, official=True) for sample, answer in rows]
    mended = [score(sample, answer, official=False) for sample, answer in rows] if twice else exact
    points = exact if (samples[0].official if official is None else official) else mended
    if exact != mended:
        moved = sum(a != b for a, b in zip(exact, mended))
        _log.info("%s: MileBench's scorer and the mended one judge %d answers differently", names[0], moved)
    return Evaluation(
        task=names[0],
        metric=samples[0].metric,
        scores={sample.id: value for (sample, _), value in zip(rows, points)},
        levels={sample.id: sample.level for sample, _ in rows},
        official_score=sum(exact) / len(exact),
        mended_score=sum(mended) / len(mended),
        empty=sum(normalise(answer) == "" for _, answer in rows),
    )


def score_file(
    path: str | Path, spec: str, data: str | Path | None = None, *, official: bool | None = None, partial: bool = False
) -> Evaluation:
    """Score a ``pred.json``, made by any program, against a task.

    Parameters
    ----------
    path : str or Path
        ``pred.json`` or ``pred.jsonl``. An id ``<sample>#<k>`` means the k-th question of a sample, from 0, as an
        evaluation that asks several writes it.
    spec, data
        The task; see `meda_kv.data.open_task`.
    official, partial
        See `score_predictions`.

    Returns
    -------
    Evaluation

    Raises
    ------
    UserError
        As `read_predictions`, `open_task` and `score_predictions`.
    """
    samples: Sequence[Sample] = open_task(spec, data).samples
    entries = read_predictions(path)
    known = {sample.id for sample in samples}
    if any("#" in str(entry["sample_id"]) and str(entry["sample_id"]) not in known for entry in entries):
        samples = [single_question(s, j, numbered=True) for s in samples for j in range(max(1, len(s.questions)))]
    return score_predictions(entries, samples, official=official, partial=partial, where=path)


def single_question(sample: Sample, question: int, *, numbered: bool) -> Sample:
    """One question of a sample as a sample of its own.

    Parameters
    ----------
    question : int
        From 0; a sample without questions has this one.
    numbered : bool
        Give samples with questions the id ``<sample>#<question>``.
    """
    if not sample.questions:
        return sample  # a probe of its own question has one answer, under its own id
    identity = f"{sample.id}#{question}" if numbered else sample.id
    return replace(
        sample, id=identity, prompt=sample.asked(question), answer=sample.questions[question][1], questions=()
    )


def write_evaluation(folder: str | Path, evaluation: Evaluation) -> None:
    """Write ``eval.json`` and ``eval_score.json`` into a folder, beside ``pred.json``."""
    write_json(Path(folder) / "eval.json", evaluation.to_dict())
    write_json(Path(folder) / "eval_score.json", evaluation.score_list())


def _number(identity: object) -> int | str:
    """An id as the official scorer looks it up: a number where it reads as one."""
    text = str(identity)
    return int(text) if text.removeprefix("-").isdecimal() else text
