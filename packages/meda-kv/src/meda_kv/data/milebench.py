"""MileBench (arXiv 2404.18532): its folders, tasks, groups and prompts.

A task is a folder ``<Task>/`` with ``<Task>.json`` and ``images/``; beside it may lie ``<Task>-adv.json`` (adversarial
questions) and ``<Task>_combined_1.json`` with ``combined_1_images/`` (all pictures of a sample joined into one). The
data set is `FreedomIntelligence/MileBench`; unpacked, its parts make one folder that holds all tasks.

Prompt: the task's instruction, a line break, the context with a marker for every picture, and for multiple choice the
list of options. Prompts that do not fit are cut from the left (`truncate`), as the official loader does it. Where one
must choose, this module differs from the official loader on purpose: markers are resolved by their number (the loader
fills them in order), text that is kept whole is kept verbatim (the loader decodes its tokens again), and pictures that
no marker names stand before the context (the loader drops all but one).

Image-count levels are recomputed from the number of pictures, as ``evaluate.py`` of `MileBench/MileBench` does since
commit b2979ac; the file's own ``image_quantity_level``, which its first version (730e930) used, is not read.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vfm_core.errors import UserError, unknown_name

from meda_kv.data.jsonl import choice_text
from meda_kv.data.samples import MARKER, Sample, Task, level_of, make_task
from meda_kv.metrics import normalise

__all__ = ["GROUPS", "TASKS", "group_of", "metric_of", "read_annotation", "read_milebench", "split_variant", "truncate"]

_log = logging.getLogger(__name__)

GROUPS = {
    "T-1": ("ActionLocalization", "ActionPrediction", "ActionSequence"),
    "T-2": ("ObjectExistence", "ObjectInteraction", "MovingAttribute", "ObjectShuffle"),
    "T-3": ("EgocentricNavigation", "MovingDirection"),
    "T-4": ("CounterfactualInference", "StateChange", "CharacterOrder", "SceneTransition"),
    "S-1": ("WebQA", "TQA", "MultiModalQA", "WikiVQA"),
    "S-2": ("SlideVQA", "OCR-VQA", "DocVQA"),
    "S-3": ("Spot-the-Diff", "CLEVR-Change", "IEdit"),
    "S-4": ("MMCoQA", "ALFRED"),
    "S-5": ("nuscenes",),
    "NH": ("TextNeedleInAHaystack", "ImageNeedleInAHaystack"),
    "IR": ("GPR1200",),
}
"""Group of MileBench: its tasks, which are also the folders' names."""

TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
"""All 29 tasks."""

_UNLETTERED = ("GPR1200",)  # more than 26 options
_VARIANT = re.compile(r"(?P<task>.+?)(?P<variant>_combined_\d+|-adv)?")
_UNSPACED = "context with markers"  # in Sample.raw
_MARKER = re.compile(r"\{(image|table)#(\d+)\}")


def group_of(task: str) -> str:
    """Group of a task; a task outside MileBench's list is a group of its own."""
    return next((group for group, tasks in GROUPS.items() if task in tasks), task)


def metric_of(task: str, question_type: str) -> str:
    """How MileBench scores a task.

    Parameters
    ----------
    task : str
        Name without variant.
    question_type : {"multi-choice", "open-ended"}
        From the task's meta data.
    """
    if "NeedleInAHaystack" in task:
        return "needle"
    if "MMCoQA" in task:
        return "substring"
    return "accuracy" if question_type == "multi-choice" else "rouge-l"


def split_variant(name: str) -> tuple[str, str]:
    """Split ``"IEdit_combined_1"`` into ``("IEdit", "_combined_1")``; the variant is empty, that or ``"-adv"``."""
    match = _VARIANT.fullmatch(name)
    return (match["task"], match["variant"] or "") if match else (name, "")


def read_milebench(root: Path, name: str, limit: int | None = None) -> Task:
    """Samples of a task, a group or all tasks.

    Parameters
    ----------
    root : Path
        Folder that holds one folder per task.
    name : str
        ``CLEVR-Change``, ``CLEVR-Change-adv``, ``CLEVR-Change_combined_1``, ``S-3``, ``all``; a group or ``all`` may
        also end in a variant. Of a group and of all, the tasks that are present are read.
    limit : int, optional
        At most so many samples of each task.

    Returns
    -------
    Task

    Raises
    ------
    UserError
        Unknown name, no such file, or a sample that cannot be scored; the message names file and sample_id.
    """
    root = root.expanduser()
    if not root.is_dir():
        remedy = "give the folder that holds one folder per task"
        raise UserError("no such folder", where="--root", given=root, remedy=remedy)
    task, variant = split_variant(name)
    wanted = TASKS if task == "all" else GROUPS.get(task)
    if wanted is None:
        samples = _read_task(root, task, variant, limit)
    else:
        present = [known for known in wanted if _annotation_path(root, known, variant).is_file()]
        if not present:
            remedy = f"unpack MileBench there, for example {_annotation_path(root, wanted[0], variant)}"
            raise UserError(f"no task of {name}", where=root, remedy=remedy)
        absent = [known for known in wanted if known not in present]
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            shown = f"{', '.join(absent[:3])}{more}"
            _log.warning("%s holds %d of %d tasks of %s; absent: %s", root, len(present), len(wanted), name, shown)
        samples = [sample for known in present for sample in _read_task(root, known, variant, limit)]
    return make_task(name, samples, root, key=lambda sample: (sample.task, sample.id))


def _annotation_path(root: Path, task: str, variant: str) -> Path:
    path = root / task / f"{task}{variant}.json"
    # Joined into one picture per sample is the official loader's default, read from the plain file where it lies there.
    return root / task / f"{task}.json" if variant == "_combined_1" and not path.is_file() else path


def read_annotation(path: str | Path) -> dict[str, Any]:
    """Read a task's JSON file and check its frame.

    Returns
    -------
    dict
        ``{"meta_data": {"task_instruction": [...], "question_type": ...}, "data": [...]}``.

    Raises
    ------
    UserError
        No such file, not JSON, or without these parts.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot read file ({error.strerror})"
        raise UserError(what, given=path, remedy="unpack MileBench, or check --root") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", where=path, remedy="unpack the file again") from error
    meta = content.get("meta_data") if isinstance(content, dict) else None
    if not isinstance(meta, dict) or not isinstance(content.get("data"), list):
        raise UserError("not a MileBench file", where=path, remedy='it must hold "meta_data" and a list "data"')
    instructions = meta.get("task_instruction")
    if not isinstance(instructions, list) or not all(isinstance(text, str) for text in instructions):
        raise UserError("task_instruction must be a list of texts", where=f"{path}, meta_data")
    if meta.get("question_type") not in ("multi-choice", "open-ended"):
        given, remedy = meta.get("question_type"), "multi-choice or open-ended"
        raise UserError("unknown question_type", where=f"{path}, meta_data", given=given, remedy=remedy)
    return content


def _read_task(root: Path, task: str, variant: str, limit: int | None) -> list[Sample]:
    path = _annotation_path(root, task, variant)
    if not path.is_file() and not (root / task).is_dir():
        folders = [folder.name for folder in root.iterdir() if folder.is_dir()]
        raise unknown_name("task", task, {*folders, *TASKS, *GROUPS, "all"}, where=root)
    content = read_annotation(path)
    samples, seen = [], set()
    for index, row in enumerate(content["data"][:limit]):
        sample = _sample(row, index, content["meta_data"], path, task, variant)
        if sample.id in seen:
            raise UserError("sample_id occurs twice", where=path, given=sample.id, remedy="make ids unique")
        seen.add(sample.id)
        samples.append(sample)
    if not samples:
        raise UserError("no sample", where=path)
    return samples


def _sample(row: Any, index: int, meta: dict[str, Any], path: Path, task: str, variant: str) -> Sample:
    identity = row.get("sample_id") if isinstance(row, dict) else None
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise UserError("sample without sample_id", where=f"{path}, data[{index}]", given=repr(identity))
    where = f"{path}, sample_id {identity}"
    instance = row.get("task_instance")
    if not isinstance(instance, dict) or not isinstance(instance.get("context"), str):
        raise UserError("task_instance without context", where=where)
    names = _texts(instance, "images_path", where)
    choices = _texts(instance, "choice_list", where) if "choice_list" in instance else ()
    instructions, number = meta["task_instruction"], row.get("task_instruction_id", 0)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(instructions):
        given = f"{number!r} of {len(instructions)} instructions"
        raise UserError("task_instruction_id names no instruction", where=where, given=given)
    metric = metric_of(task, meta["question_type"])
    answer = _answer(row.get("response"), choices if metric == "accuracy" else None, where)
    context = instance["context"] + choice_text(choices, lettered=task not in _UNLETTERED)
    instruction = instructions[number]
    if variant.startswith("_combined_"):
        count = variant.removeprefix("_combined_")
        folder, names_read = f"combined_{count}_images", _texts(instance, f"combined_{count}_images", where)
        if not names_read or len(names_read) > int(count):
            given = f"{len(names_read)} pictures"
            raise UserError(f"combined_{count}_images must hold 1 to {count} pictures", where=where, given=given)
        context = _MARKER.sub(lambda match: _caption(match, len(names)), context)
        head = MARKER * len(names_read) + "\n" + instruction
        images = tuple(path.parent / folder / name for name in names_read)
    else:
        context, order = _resolve(context, len(names), where)
        head = instruction
        images = tuple(path.parent / "images" / names[i] for i in order)
        context = MARKER * (len(images) - context.count(MARKER)) + context
    return Sample(
        id=str(identity),
        images=images,
        prompt=f"{head}\n{_spaced(context)}",
        answer=answer,
        choices=choices,
        metric=metric,
        task=task + variant,
        group=group_of(task),
        level=level_of(len(names)),
        raw={**row, _UNSPACED: context},
        instruction=head,
        source=str(path),
        official=True,
    )


def _texts(instance: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = instance.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
        raise UserError(f"{key} must be a list of texts", where=where, given=repr(values)[:80])
    return tuple(str(value) for value in values)


def _answer(response: Any, choices: Sequence[str] | None, where: str) -> str:
    answer = "" if response is None else str(response)
    if normalise(answer) == "":
        raise UserError("the gold answer (response) is empty", where=where, remedy="mend or remove the sample")
    if choices is not None and normalise(answer) not in map(normalise, choices):
        given = f"{answer!r} of {len(choices)} choices"
        raise UserError("the gold answer is not in choice_list", where=where, given=given, remedy="mend the sample")
    return answer


def _caption(match: re.Match[str], images: int) -> str:
    return f"<Image {match[2]}> " if 1 <= int(match[2]) <= images else match[0]


def _resolve(context: str, images: int, where: str) -> tuple[str, list[int]]:
    """Turn ``{image#k}`` and ``{table#k}`` into markers; which picture each stands for, those that none names first.

    Numbers count from 1 in the list of pictures. Where pictures and tables are numbered apart, or a number lies outside
    the list, the markers stand for the pictures in order, if there are as many.
    """
    markers = [(kind, int(number) - 1) for kind, number in _MARKER.findall(context)]
    numbers = [number for _, number in markers]
    apart = {number for kind, number in markers if kind == "image"} & {n for kind, n in markers if kind == "table"}
    if apart or not all(0 <= number < images for number in numbers):
        if len(markers) != images:
            given = f"{len(markers)} markers, {images} pictures"
            raise UserError("markers do not fit the pictures", where=where, given=given, remedy="mend the sample")
        numbers = list(range(images))
    unnamed = [i for i in range(images) if i not in numbers]
    return _MARKER.sub(MARKER, context), unnamed + numbers


def _spaced(context: str) -> str:
    """Line breaks between adjacent pictures (CLEVR-Change), as the official model worker puts them."""
    return context.replace(MARKER + MARKER, f"{MARKER}\n{MARKER}\n")


def truncate(sample: Sample, tokenizer: Any, max_context_len: int, tokens_per_image: int) -> Sample:
    """Cut an over-long prompt from the left, as MileBench's loader does.

    The instruction and the end of the prompt are kept. From the right, pieces of text and the pictures before them are
    taken as long as ``tokens(instruction) + tokens(pieces) + tokens_per_image * pictures`` fits; the first that does
    not fit ends it. When already the last piece does not fit, its last tokens are kept, without a picture.

    Parameters
    ----------
    sample : Sample
        Of any task; without an `instruction` the whole prompt may be cut.
    tokenizer
        A tokenizer of transformers: called with ``add_special_tokens=False``, and ``decode``.
    max_context_len : int
        Tokens that instruction, text and pictures may have.
    tokens_per_image : int
        Tokens of one picture.

    Returns
    -------
    Sample
        The same object when the prompt fits; otherwise a copy whose `raw` also says ``"truncated"`` (True) and
        ``"images_dropped"``.

    Raises
    ------
    UserError
        A limit out of range, or an instruction that leaves no room.
    """
    for name, value, least in (("max_context_len", max_context_len, 1), ("tokens_per_image", tokens_per_image, 0)):
        if value < least:
            raise UserError(f"{name} is too small", given=value, remedy=f"use {least} or more")
    head, tail = _split_head(sample)
    fixed = head.count(MARKER)  # the joined picture stands before the instruction and is never dropped
    left = len(sample.images) - fixed - tail.count(MARKER)
    if left > 0:  # pictures without a marker stand before the text
        tail = MARKER * left + tail
    room = max_context_len - _length(tokenizer, head.replace(MARKER, "")) - fixed * tokens_per_image
    if room < 1:
        raise UserError(
            "the instruction leaves no room", where=sample.where, given=f"max_context_len {max_context_len}"
        )
    pieces = tail.split(MARKER)
    kept: list[str] = []
    used, pictures = 0, 0
    for number, piece in enumerate(reversed(pieces)):
        length = _length(tokenizer, piece)
        if used + length > room:
            if not kept:
                ids = tokenizer(piece, add_special_tokens=False).input_ids
                kept.append(tokenizer.decode(ids[-room:]))
            break
        kept.insert(0, piece)
        used += length
        if number == len(pieces) - 1 or used + tokens_per_image > room:
            break
        pictures, used = pictures + 1, used + tokens_per_image
    if kept == pieces:
        return sample
    text = _spaced((MARKER if pictures == len(kept) else "") + MARKER.join(kept))
    dropped = len(sample.images) - fixed - pictures
    images = sample.images[:fixed] + sample.images[len(sample.images) - pictures :]
    raw = {key: value for key, value in sample.raw.items() if key != _UNSPACED}
    raw |= {"truncated": True, "images_dropped": dropped + sample.raw.get("images_dropped", 0)}
    return replace(sample, images=images, prompt=f"{head}\n{text}" if head else text, raw=raw)


def _split_head(sample: Sample) -> tuple[str, str]:
    if not sample.instruction:
        return "", sample.prompt
    # The official loader counts tokens before it puts line breaks between pictures.
    return sample.instruction, sample.raw.get(_UNSPACED, sample.prompt[len(sample.instruction) + 1 :])


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)
