"""The evaluation loop: batches of prompts of one shape, each read once for all arms, one record per (sample, arm)."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.cli import progress
from vfm_core.errors import UserError
from vfm_core.files import write_json
from vfm_core.runs import RunDir

from meda_kv.data.identity import check_unchanged, describe, file_digest
from meda_kv.evaluation.arms import Arm, floor_option, grid
from meda_kv.evaluation.outputs import describe_sample
from meda_kv.evaluation.protocols import PROTOCOLS, Exam, default_new_tokens, make_exam, no_probe
from meda_kv.evaluation.recommend import how_to_test
from meda_kv.evaluation.results import SAMPLES_FILE, Results, load_results
from meda_kv.evaluation.shards import parse_shard, sample_key, take_shard

if TYPE_CHECKING:
    from meda_kv.data import Sample, Task
    from meda_kv.evaluation.reading import Reading

log = logging.getLogger(__name__)

FACTS = (
    "prompt_tokens",
    "visual_tokens",
    "ratio_actual",
    "entropy_used",
    "note",
    "kv_bytes",
    "kv_bytes_full",
    "kv_bytes_allocated",
)


@dataclass
class _Job:
    """What every batch needs to know."""

    model: Any
    processor: Any
    run: RunDir
    arms: list[Arm]
    protocol: str
    max_new_tokens: int
    seed: int
    pad: bool
    frames: int

    def unit(self, sample: Sample, arm: Arm) -> str:
        return f"{sample_key(sample)}|{arm.key}|{self.seed}"

    def missing(self, sample: Sample) -> list[Arm]:
        return [arm for arm in self.arms if self.unit(sample, arm) not in self.run.done]


def evaluate(
    model: Any,
    processor: Any,
    task: Task | Sequence[Task],
    methods: Any = "full,meda,look-m,snapkv,pyramidkv,h2o,streaming",
    ratios: Any = (0.2,),
    *,
    out: str | Path,
    protocol: str = "generate",
    preset: str = "paper",
    floor: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    budgets: str | Path | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    pad: bool = False,
    frames: int = 8,
    seed: int = 0,
    shard: str | None = None,
    limit: int | None = None,
    model_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    quiet: bool = True,
) -> Results:
    """Answer every sample under every method at every ratio, and keep one record of each.

    Every prompt is read once; all arms continue on compressed copies of that reading. A run can be killed at any
    moment: the same call goes on where it stopped. A sample that fails (a corrupt image, a prompt too short for the
    ratio) is recorded as failed, told in `Results.errors`, and tried again by the next call. A folder whose answers
    were given to other data or by other weights is refused: prompts, scoring, names and content of pictures and the
    model's fingerprint are compared.

    Parameters
    ----------
    model, processor
        As `meda_kv.models.load_model` gives them, or any of transformers. The model comes back in the mode it had.
    task
        What to answer; several tasks are one run.
    methods, ratios
        See `meda_kv.evaluation.grid`. The full cache is always among the arms.
    out
        Run folder.
    protocol
        ``"generate"``: the prompt is answered as ``generate`` does. Its first token comes from the full cache, so that
        an answer of one token tests nothing (a warning says so). ``"asked"``: context and first question are read and
        compressed, then every question is asked again on what is left. ``"agnostic"``: only the context is read before
        compression. Samples without a list of questions are asked their own one, the text after the last picture.
    preset
        ``"paper"`` or ``"official-code"``, for the methods.
    floor
        Least tokens per layer, in place of every method's own (16); short prompts need less.
    overrides
        Further options of every method that is given by name, such as ``{"merge": "none"}``.
    budgets
        A profile (`meda_kv.profiles`): shares per layer for the methods whose budgets come from an entropy.
    max_new_tokens
        Greatest length of an answer; default from the longest expected answer.
    batch_size
        Prompts per forward; only prompts of equal length share one.
    pad
        Let prompts of unequal length share a batch, padded on the left.
    frames
        Evenly spread frames that are taken of a video.
    seed
        Of methods that draw at random.
    shard
        ``"i/k"``: only the i-th of k parts (see `meda_kv.evaluation.merge_runs`).
    limit
        At most so many samples of each task.
    model_name
        Names the model in the configuration; default what it was loaded from.
    settings
        Further settings that decide the results, for the configuration.
    overwrite
        Forget an earlier run in `out`.
    quiet
        No progress bar.

    Returns
    -------
    Results
        All records of the folder.

    Raises
    ------
    UserError
        Unknown method, ratio out of range, samples without a question for a probe, or a folder of another run.
    TypeError
        A model that cannot be compressed.
    """
    from meda_kv.models import fingerprint

    tasks = list(task) if isinstance(task, Sequence) else [task]
    samples = [sample for one in tasks for sample in one.samples[:limit]]
    check_samples(samples, protocol)
    arms = grid(methods, ratios, preset=preset, profile=budgets, model=model, floor=floor, **(overrides or {}))
    tokens = max_new_tokens or default_new_tokens(samples, processor, protocol)
    config = {
        "kind": "meda-kv eval",
        "model": model_name or getattr(model.config, "name_or_path", "") or type(model).__name__,
        "weights": fingerprint(model),
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "task": ",".join(one.name for one in tasks),
        "samples": describe(samples),
        "methods": list(dict.fromkeys(arm.label for arm in arms)),
        "ratios": sorted({arm.ratio for arm in arms if not arm.full}, reverse=True),
        "preset": preset,
        "floor": floor,
        "set": dict(overrides or {}),
        "budgets": None if budgets is None else file_digest(budgets),
        "protocol": protocol,
        "max_new_tokens": tokens,
        "seed": seed,
        "shard": shard,
        "limit": limit,
        "frames": frames,
        **(settings or {}),
    }
    if shard is not None:
        samples = take_shard(samples, *parse_shard(shard))
    training = model.training
    model.eval()
    try:
        with RunDir(out, config, overwrite=overwrite) as run:
            check_unchanged(samples, _answered(run), sample_key)
            write_json(run.path / SAMPLES_FILE, {sample_key(sample): describe_sample(sample) for sample in samples})
            job = _Job(model, processor, run, arms, protocol, tokens, seed, pad, frames)
            todo = [sample for sample in samples if job.missing(sample)]
            batches = list(_batches(todo, batch_size))
            for batch in progress(batches, "evaluating", quiet=quiet):
                _run(job, batch)
    finally:
        model.train(training)
    results = load_results(out)
    _warn(results, protocol)
    return results


def check_samples(samples: Sequence[Sample], protocol: str) -> None:
    """Refuse what a protocol cannot ask, before any model is loaded.

    Raises
    ------
    UserError
        Unknown protocol, a probe of a task without any question to put, or a sample that occurs twice.
    """
    if protocol not in PROTOCOLS:
        raise UserError("unknown protocol", where="--protocol", given=protocol, remedy=f"use {', '.join(PROTOCOLS)}")
    for task in dict.fromkeys(sample.task for sample in samples) if protocol != "generate" else ():
        part = [sample for sample in samples if sample.task == task]
        if not any(protocol in sample.probes() for sample in part):  # single ones fail alone, when they are read
            raise no_probe(part[0], protocol)
    twice = [key for key, count in Counter(map(sample_key, samples)).items() if count > 1]
    if twice:
        raise UserError("a sample occurs twice", where="--task", given=twice[0], remedy="name every task once")


def _batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Samples that look alike side by side: the same number of images, prompts of about the same length."""
    alike: dict[tuple[int, bool], list[Sample]] = {}
    for sample in samples:
        alike.setdefault((len(sample.images), sample.video is not None), []).append(sample)
    for group in alike.values():
        group.sort(key=lambda sample: len(sample.asked()))
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _run(job: _Job, batch: Sequence[Sample]) -> None:
    """Prepare the samples of a batch, part them by length unless they are to be padded, and run every part."""
    exams = []
    for sample in batch:
        try:
            exams.append(make_exam(job.processor, sample, job.protocol, job.frames))
        except Exception as error:
            _fail(job, [sample], job.missing(sample), error)
    for part in _parts(job, exams):
        wanted = {arm.key for exam in part for arm in job.missing(exam.sample)}
        _run_part(job, part, [arm for arm in job.arms if arm.key in wanted])


def _parts(job: _Job, exams: list[Exam]) -> Iterator[list[Exam]]:
    if len(exams) < 2 or job.pad:
        if exams:
            yield exams
        return
    parts: dict[Any, list[Exam]] = {}
    for exam in exams:
        parts.setdefault(exam.shape, []).append(exam)
    yield from parts.values()


def _run_part(job: _Job, exams: list[Exam], arms: list[Arm]) -> None:
    """Run arms on one batch; what fails is tried sample by sample, and what fails then is recorded as failed."""
    from meda_kv.evaluation.protocols import collate
    from meda_kv.evaluation.reading import read_prompts

    def alone(error: Exception, arms: list[Arm]) -> None:
        if len(exams) == 1:
            _fail(job, [exams[0].sample], arms, error)
        else:
            for exam in exams:
                _run_part(job, [exam], arms)

    try:
        inputs = collate(job.processor, exams)
    except Exception as error:
        return alone(error, arms)
    try:
        reading = read_prompts(job.model, inputs, arms, seed=job.seed)
    except TypeError:  # a model that is not supported would fail every sample alike
        raise
    except Exception as error:
        return alone(error, arms)
    again = []
    for arm in arms:
        try:
            records = _run_arm(job, exams, reading, arm)
        except Exception as error:
            if len(exams) == 1 or (isinstance(error, UserError) and not job.pad):  # equal lengths fail alike
                _fail(job, [exam.sample for exam in exams], [arm], error)
            else:
                again.append(arm)
            continue
        job.run.append_all([record for record in records if record["unit"] not in job.run.done])
    if again:
        del reading
        for exam in exams:
            _run_part(job, [exam], again)


def _run_arm(job: _Job, exams: list[Exam], reading: Reading, arm: Arm) -> list[dict[str, Any]]:
    """One arm on one batch: a record per sample."""
    from meda_kv.evaluation.protocols import grade
    from meda_kv.evaluation.reading import compressed_copy

    start = time.perf_counter()
    copy = compressed_copy(job.model, reading, arm, now=job.protocol != "generate")
    grades = grade(job.model, job.processor, exams, reading, copy, job.protocol, job.max_new_tokens)
    seconds = (time.perf_counter() - start) / len(exams)
    records = []
    for row, (exam, graded) in enumerate(zip(exams, grades)):
        sample, facts = exam.sample, copy.facts(row)
        records.append(
            {
                "unit": job.unit(sample, arm),
                "sample_id": sample.id,
                "task": sample.task,
                "group": sample.group,
                "level": sample.level,
                "metric": sample.metric,
                "content": exam.content,
                "probes": sample.probes(),
                "method": arm.label,
                "ratio": arm.ratio,
                "arm": arm.key,
                "seed": job.seed,
                **graded,
                **{name: facts[name] for name in FACTS},
                "compress_seconds": facts["compress_seconds"] / len(exams),
                "seconds": seconds,
                "read_seconds": reading.seconds / len(exams),
            }
        )
    return records


def _fail(job: _Job, samples: Sequence[Sample], arms: Sequence[Arm], error: Exception) -> None:
    error = floor_option(error)
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    log.debug("a sample failed", exc_info=error)
    for sample in samples:
        for arm in arms:
            unit = job.unit(sample, arm)
            if unit not in job.run.done:
                record = {"unit": unit, "sample_id": sample.id, "task": sample.task, "arm": arm.key}
                job.run.append_error({**record, "error": " ".join(text.split())})


def _answered(run: RunDir) -> dict[str, dict[str, str]]:
    """What the finished samples of a folder showed when they were answered."""
    return {f"{r['task']}/{r['sample_id']}": {"content": r["content"]} for r in run.records() if "content" in r}


def _warn(results: Results, protocol: str) -> None:
    for task in untested(results):
        log.warning(
            "task %s: 0 answer tokens were generated after compression, its scores say nothing about any method; %s",
            task,
            how_to_test(results, task),
        )


def untested(results: Results) -> list[str]:
    """Tasks whose answers were all complete before any compression could matter: their scores compare nothing."""
    tested = {r["task"] for r in results.records if r["arm"] != results.baseline and r["tokens_after"] > 0}
    arms = {r["task"] for r in results.records if r["arm"] != results.baseline}
    return [task for task in results.tasks if task in arms and task not in tested]
