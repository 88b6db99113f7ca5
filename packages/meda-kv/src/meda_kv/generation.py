"""Answering prompts on a compressed cache: a list of prompts, or a file of them with resume."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vfm_core.errors import UserError
from vfm_core.files import atomic_write, jsonable
from vfm_core.runs import RunDir

from meda_kv.models import describe_model, tokenizer_of
from meda_kv.prompts import Prompt, Unmarked, build_inputs, load_frames, to_model

if TYPE_CHECKING:
    from meda_kv.data import Sample
    from meda_kv.methods import Method

log = logging.getLogger(__name__)

_OF_THE_CACHE = ("decode_budget", "decode_slack", "buffer_step", "keep_queries", "visual_mask", "record", "model")
_KWARGS = ("preset", "max_new_tokens", "seed", "cache_options")  # what predictions say of the generation


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes
    ----------
    text : str
        Decoded, without special tokens.
    tokens : int
        Generated tokens, the end token included.
    summary : dict
        What the cache says of this row (`CompressedCache.summary`).
    seconds : float
        Wall time of the batch that it was part of.
    """

    text: str
    tokens: int
    summary: dict[str, Any] = field(repr=False)
    seconds: float = 0.0


def generate(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    method: str | Method = "meda",
    ratio: float = 0.2,
    *,
    preset: str = "paper",
    max_new_tokens: int = 256,
    batch_size: int = 1,
    chat: bool | None = None,
    unmarked: Unmarked = "first",
    seed: int = 0,
    budgets: Any = None,
    cache_options: Mapping[str, Any] | None = None,
) -> list[Generation]:
    """Answer prompts greedily on a compressed cache.

    Parameters
    ----------
    model, processor
        As `meda_kv.load_model` gives them, or any of transformers.
    prompts : sequence of Prompt
        At least one.
    method : str or Method
        An arm such as ``"meda"`` or ``"meda?merge=none&floor=4"``; ``"full"`` compresses nothing.
    ratio : float
        Share of the prompt's KV to keep, in (0, 1].
    preset : {"paper", "official-code"}
        Which of the two descriptions of MEDA decides the defaults.
    max_new_tokens : int
        At least 1. The first token comes from the prompt's full cache; compression shows from the second on.
    batch_size : int
        Prompts per forward; rows do not influence each other.
    chat, unmarked
        See `meda_kv.prompts.render`.
    seed : int
        Of methods that draw at random.
    budgets : path, dict or list, optional
        A profile (`meda_kv.profiles`) or shares per layer.
    cache_options : mapping, optional
        More keywords of `CompressedCache`, such as ``merge="none"`` or ``decode_budget=512``; what is written with the
        method's name comes first.

    Returns
    -------
    list of Generation
        In the order of the prompts.

    Raises
    ------
    UserError
        Bad prompts, method, ratio or options.
    TypeError
        A model whose cache cannot be compressed.
    """
    if max_new_tokens < 1:
        raise UserError("at least one new token", where="max_new_tokens", given=max_new_tokens, remedy="use e.g. 64")
    from meda_kv.cache import CompressedCache
    from meda_kv.evaluation.arms import split_method

    written: dict[str, Any] = {}
    if isinstance(method, str):
        method, written = split_method(method)
    done: list[Generation] = []
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(prompts), max(1, batch_size)):
            batch = prompts[start : start + max(1, batch_size)]
            inputs = to_model(build_inputs(processor, batch, chat=chat, unmarked=unmarked), model)
            options = {"preset": preset, "seed": seed, **(cache_options or {}), **written}
            if budgets is not None:
                options["budgets"] = budgets
            cache = CompressedCache(model, method, 1.0 if method == "full" else ratio, **options)
            began = time.perf_counter()
            out = model.generate(
                **inputs, past_key_values=cache, max_new_tokens=max_new_tokens, **greedy(model, processor)
            )
            seconds = time.perf_counter() - began
            done += [
                Generation(text, count, _noted(cache, cache.summary(row)), seconds)
                for row, (text, count) in enumerate(decode(model, processor, out[:, inputs["input_ids"].shape[1] :]))
            ]
    return done


NOT_REACHED = "not compressed: the answer ended before the first decode step"
"""Note of a summary whose answers were over with the token that comes from the full cache."""


def _noted(cache: Any, summary: dict[str, Any]) -> dict[str, Any]:
    """Say why nothing was compressed, where the cache itself never came to it."""
    waits = not summary.get("note") or str(summary["note"]).startswith("not compressed yet")  # and now never will
    if cache.compressed or not waits:
        return summary
    return {**summary, "note": None if cache.method.scorer is None or cache.ratio == 1 else NOT_REACHED}


def check_names(method: str, preset: str = "paper", cache_options: Mapping[str, Any] | None = None) -> None:
    """Refuse unknown methods and options before any work: they are not the failure of every sample.

    Raises
    ------
    UserError
        As `generate` would raise it.
    """
    from meda_kv.evaluation.arms import check_method, split_method

    name, written = split_method(method)
    options = {**(cache_options or {}), **written}
    check_method(name, preset, **{key: value for key, value in options.items() if key not in _OF_THE_CACHE})


def greedy(model: Any, processor: Any) -> dict[str, Any]:
    """Arguments of ``model.generate`` for greedy search, whatever the checkpoint's own settings of sampling are."""
    pad = tokenizer_of(processor).pad_token_id
    if pad is None:
        pad = next(iter(end_tokens(model)), 0)
    return {
        "do_sample": False,
        "num_beams": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "pad_token_id": pad,
        "return_dict_in_generate": False,
    }


def end_tokens(model: Any) -> tuple[int, ...]:
    """Ids that end an answer."""
    ends = model.generation_config.eos_token_id
    return () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)


def decode(model: Any, processor: Any, tokens: torch.Tensor) -> list[tuple[str, int]]:
    """Text and number of generated tokens of every row; what stands after an end token is padding."""
    ends, rows = set(end_tokens(model)), []
    for row in tokens.tolist():
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        rows.append((str(tokenizer_of(processor).decode(row[:length], skip_special_tokens=True)).strip(), length))
    return rows


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode for the length of a block; the former mode of every module is put back."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@dataclass(frozen=True)
class FileRun:
    """What `generate_file` did.

    Attributes
    ----------
    records : list of dict
        One per finished sample in the order of the file: ``id``, ``text``, ``tokens``, ``seconds``, ``summary``.
    failed : list of dict
        ``id`` and ``error`` of the samples that could not be answered.
    path : Path
        ``pred.jsonl``: MileBench's entries (`meda_kv.data.predictions.prediction`), which ``meda-kv score`` reads.
    """

    records: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    path: Path


def generate_file(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    out: str | Path,
    method: str = "meda",
    ratio: float = 0.2,
    *,
    frames: int = 8,
    overwrite: bool = False,
    bar: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
    batch_size: int = 1,
    **options: Any,
) -> FileRun:
    """Answer the samples of a file, one record per sample on disk as soon as it is there.

    The same call again goes on where the last one stopped. A sample whose images cannot be read is listed and the
    others go on; the next call tries it again.

    Parameters
    ----------
    model, processor
        As for `generate`.
    samples : sequence of Sample
        Of `meda_kv.data.read_jsonl`; ids must differ.
    out : path
        Run folder: ``results.jsonl`` grows by one fsynced line per sample, ``pred.jsonl`` holds the finished ones in
        the order of the file, in the schema of MileBench's predictions, and is renewed when the call ends, however it
        ends.
    method, ratio
        As for `generate`, the method by name.
    frames : int
        Frames of a video.
    overwrite : bool
        Forget what `out` holds.
    bar : callable, optional
        Wraps the iterable of batches for a progress bar, given it and its length.
    batch_size : int
        Prompts per forward.
    **options
        More keywords of `generate`.

    Returns
    -------
    FileRun

    Raises
    ------
    UserError
        The folder belongs to a run with other settings, other weights or another file, a sample that was answered
        has another prompt or other pictures now, or another process writes to the folder.
    """
    from meda_kv.data.identity import check_unchanged, file_digest
    from meda_kv.data.predictions import prediction

    twice = [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]
    if twice:
        raise UserError(
            "an id occurs twice", where="--data", given=twice[0], remedy="name a single task, or mend the ids"
        )
    check_names(method, options.get("preset", "paper"), options.get("cache_options"))
    config = {
        "command": "generate",
        "model": describe_model(model),
        "data": sorted({_place(sample.source) for sample in samples}),
        "method": method,
        "ratio": ratio,
        "frames": frames,
        "options": {key: _plain(value) for key, value in sorted(options.items())},
    }
    if isinstance(options.get("budgets"), str | Path):
        config["profile"] = file_digest(options["budgets"])
    kwargs = {"method": method, "ratio": ratio, **{k: options[k] for k in _KWARGS if k in options}}
    model_id = f"{describe_model(model)['name'] or type(model).__name__} {method}@{ratio:g}"
    with RunDir(out, config, overwrite=overwrite, key="id") as run:
        path = run.path / "pred.jsonl"
        check_unchanged(samples, {record["id"]: record for record in run.records()}, lambda sample: sample.id)
        try:
            todo = [sample for sample in samples if sample.id not in run.done]
            batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
            for batch in bar(batches, len(batches)) if bar is not None else batches:
                _answer(run, model, processor, batch, method, ratio, frames, options)
        finally:
            records = {record["id"]: record for record in run.records()}
            ordered = [records[sample.id] for sample in samples if sample.id in records]
            texts = {record["id"]: record["text"] for record in ordered}
            answered = [sample for sample in samples if sample.id in texts]
            _write_lines(path, [prediction(s, texts[s.id], model_id=model_id, gen_kwargs=kwargs) for s in answered])
        known = {sample.id for sample in samples}
        failed = [error for error in run.errors() if error["id"] in known]
    return FileRun(ordered, failed, path)


def _answer(
    run: RunDir,
    model: Any,
    processor: Any,
    batch: Sequence[Sample],
    method: str,
    ratio: float,
    frames: int,
    options: Mapping[str, Any],
) -> None:
    """Answer one batch and record it; a sample that cannot be read is recorded as an error."""
    from meda_kv.data.identity import asked, content, shown_names

    ready: list[tuple[Sample, Prompt]] = []
    for sample in batch:
        try:
            ready.append((sample, read_prompt(sample, frames)))
        except UserError as error:
            _failed(run, sample, error)
    if not ready:
        return
    try:
        prompts = [prompt for _, prompt in ready]
        answers = generate(model, processor, prompts, method, ratio, batch_size=len(ready), **options)
    except UserError as error:
        if len(ready) == 1:
            _failed(run, ready[0][0], error)
        else:  # one of them is to blame
            for sample, _ in ready:
                _answer(run, model, processor, [sample], method, ratio, frames, options)
        return
    for (sample, prompt), answer in zip(ready, answers, strict=True):
        shown = {"prompt": prompt.text, "images": shown_names(sample)}
        identity = {"asked": asked(sample), "content": content(sample)}
        run.append({"id": sample.id, **shown, **identity, **asdict(answer)})


def _failed(run: RunDir, sample: Sample, error: UserError) -> None:
    from meda_kv.evaluation.arms import floor_option

    run.append_error({"id": sample.id, "error": str(floor_option(error))})
    log.info("sample %s failed: %s", sample.id, error)


def read_prompt(sample: Sample, frames: int = 8) -> Prompt:
    """The prompt of a sample with its images, or the frames of its video, read from disk.

    Raises
    ------
    UserError
        An image or video that cannot be read; the message names the file and the sample.
    """
    if sample.video is not None:
        return Prompt(sample.asked(), load_frames(sample.video, frames, sample.where))
    return Prompt(sample.asked(), sample.load_images())


def _place(source: str) -> str:
    return str(Path(source).expanduser().resolve()) if source and Path(source).expanduser().exists() else source


def _plain(value: Any) -> Any:
    return jsonable(value) if isinstance(value, str | int | float | bool | list | tuple | dict | None) else str(value)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic_write(path) as temporary:
        text = "".join(json.dumps(jsonable(row), ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")
