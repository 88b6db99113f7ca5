"""Our own format for any data: one JSON object per line.

====================  =================================================================================================
key                   value
====================  =================================================================================================
``id``                text or integer, unique in the file
``images``            list of paths, relative to the file (or to ``--data``); may be empty
``video``             instead of ``images``: a folder of frames, an animated picture or a video file
``prompt``            text; ``<image>`` or ``{image#1}`` say where the pictures go, others stand before the text
``choices``           optional, list of texts; they are listed after the prompt as A, B, ...
``answer``            text; with choices the right one's text or its letter
``questions``         instead of ``answer`` and ``choices``: list of ``{"prompt": text, "answer": text}``, see below
``metric``            optional: accuracy (default with choices), rouge-l (default without), needle, substring, exact
                      or words; with questions it is that of all of them
``task``, ``group``   optional names for the tables
====================  =================================================================================================

Paths of pictures are relative to the file::

    {"id": 1, "images": ["a.png", "b.png"], "prompt": "<image> <image> What changed?", "answer": "the red cup is gone"}
    {"id": 2, "images": ["a.png"], "prompt": "What is it?", "choices": ["a cup", "a plate"], "answer": "B"}

Several questions about the same pictures are the way to test a compression. Compression happens after the prompt was
read, and the first answer token still comes from the full cache; ``--protocol asked`` and ``agnostic`` therefore put
the questions to what is left. ``prompt`` is then what all questions share: pictures and perhaps text; it may be left
out. Markers stand there and not in the questions::

    {"id": 3, "images": ["1.png", "2.png", "3.png"], "prompt": "Three rooms of a house.", "metric": "needle",
     "questions": [{"prompt": "How many chairs are there in the first room?", "answer": "4"},
                   {"prompt": "What colour is the sofa?", "answer": "green"}]}

(on one line in the file). ``--protocol asked`` compresses after the first question, asks it again, and then asks the
others, whose scores are told apart; ``agnostic`` compresses before any question; ``generate`` asks the first only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vfm_core.errors import UserError, unknown_name
from vfm_core.files import atomic_write

from meda_kv.data.samples import MARKER, METRICS, Sample, Task, level_of, make_task

KEYS = ("id", "images", "video", "prompt", "choices", "answer", "questions", "metric", "task", "group")
QUESTION_KEYS = ("prompt", "answer")
_NUMBERED = re.compile(r"\{image#(\d+)\}")


def letter(index: int) -> str:
    """Label of an option: A to Z, then AA, AB, ..."""
    head = letter(index // 26 - 1) if index >= 26 else ""
    return head + chr(ord("A") + index % 26)


def choice_text(choices: Sequence[str], lettered: bool = True) -> str:
    """The list of options as MileBench writes it after a question; with no option nothing."""
    if not choices:
        return ""
    lines = [f"{letter(i)}. {choice}" if lettered else choice for i, choice in enumerate(choices)]
    return "\nChoice list: \n" + "\n".join(lines) + "\nYour answer is: "


def read_jsonl(
    path: str | Path, *, root: str | Path | None = None, limit: int | None = None, answers: bool = True
) -> Task:
    """Read samples from JSON lines.

    Parameters
    ----------
    path : str or Path
        The file; empty lines are skipped.
    root : str or Path, optional
        What relative paths start from, by default the folder of the file.
    limit : int, optional
        At most so many rows.
    answers : bool
        Whether every row needs an answer; without, rows may be prompts to generate from.

    Returns
    -------
    Task
        Named after the file.

    Raises
    ------
    UserError
        No such file, or a row that is not as above; the message names file and line.
    """
    path = Path(path).expanduser()
    base = Path(root).expanduser() if root is not None else path.parent
    samples: list[Sample] = []
    lines: dict[str, int] = {}
    for number, row in _rows(path):
        sample = _sample(row, path, number, base, answers)
        if sample.id in lines:
            remedy = f"line {lines[sample.id]} has it too; make ids unique"
            raise UserError("id occurs twice", where=f"{path}, line {number}", given=sample.id, remedy=remedy)
        lines[sample.id] = number
        samples.append(sample)
        if len(samples) == limit:
            break
    return make_task(path.stem, samples, path, key=lambda sample: sample.id)


def write_jsonl(path: str | Path, samples: Sequence[Sample]) -> None:
    """Write samples whose pictures are files as JSON lines that `read_jsonl` reads back; paths become relative.

    Raises
    ------
    UserError
        A picture that is not a file.
    """
    path = Path(path)
    lines = []
    for sample in samples:
        row: dict[str, Any] = {"id": sample.id}
        for image in sample.images:
            if not isinstance(image, str | Path):
                raise UserError("a picture in memory has no path", where=sample.where, remedy="save it first")
        folder = path.resolve().parent
        if sample.video is not None:
            row["video"] = _relative(sample.video, folder)
        else:
            row["images"] = [_relative(image, folder) for image in sample.images if isinstance(image, str | Path)]
        row["prompt"] = sample.prompt.removesuffix(choice_text(sample.choices))
        row |= {"choices": list(sample.choices)} if sample.choices else {}
        if sample.questions:
            row["questions"] = [{"prompt": prompt, "answer": answer} for prompt, answer in sample.questions]
        else:
            row["answer"] = sample.answer
        row |= {"metric": sample.metric, "task": sample.task, "group": sample.group}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _relative(file: str | Path, folder: Path) -> str:
    return Path(os.path.relpath(Path(file).resolve(), folder)).as_posix()


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.is_dir():
        raise UserError("a folder where a JSON lines file was expected", given=path, remedy="name the file")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parsed(line, f"{path}, line {number}")
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot read file ({error.strerror})"
        raise UserError(reason, given=path, remedy="check the path after jsonl:") from error


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=where, remedy="save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise UserError(f"not JSON ({reason})", where=where, remedy="write one object per line") from error


def _sample(row: Any, path: Path, number: int, base: Path, answers: bool) -> Sample:
    where = f"{path}, line {number}"
    if not isinstance(row, dict):
        raise UserError("a row must be an object", where=where, given=type(row).__name__)
    for key in row:
        if key not in KEYS:
            raise unknown_name("key", key, KEYS, where=where)
    identity = row.get("id")
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise UserError("id must be text or an integer", where=where, given=_shown(row, "id"))
    where += f", sample_id {identity}"
    questions = _questions(row, where, answers)
    prompt = _text(row, "prompt", where, needed=not questions)
    choices = _texts(row, "choices", where)
    answer = questions[0][1] if questions else _text(row, "answer", where, needed=answers)
    metric = row.get("metric", "accuracy" if choices else "rouge-l")
    if metric not in METRICS:
        raise unknown_name("metric", str(metric), METRICS, where=where)
    if metric == "accuracy" and questions:
        remedy = "use needle, substring, exact, words or rouge-l"
        raise UserError("questions have no choices for accuracy", where=where, remedy=remedy)
    if metric == "accuracy" and not choices and answers:
        raise UserError("accuracy needs choices", where=where, remedy="add choices, or use the metric exact")
    if choices and answer:
        answer = _chosen(answer, choices, where)
    images, video = _texts(row, "images", where), _text(row, "video", where, needed=False)
    if images and video:
        raise UserError("both images and video", where=where, remedy="keep one of them")
    prompt, order = _ordered(prompt, len(images), where)
    return Sample(
        id=str(identity),
        images=tuple(base / images[i] for i in order),
        prompt=prompt + choice_text(choices),
        answer=answer,
        choices=choices,
        questions=questions,
        metric=metric,
        task=_text(row, "task", where, needed=False) or path.stem,
        group=_text(row, "group", where, needed=False) or path.stem,
        level=level_of(len(images)),
        raw=row,
        video=base / video if video else None,
        source=str(path),
    )


def _questions(row: dict[str, Any], where: str, answers: bool) -> tuple[tuple[str, str], ...]:
    """The pairs under ``questions``; none where the key is absent."""
    if row.get("questions") is None:
        return ()
    given = row["questions"]
    for key in ("answer", "choices"):
        if row.get(key) is not None:
            raise UserError(f"both questions and {key}", where=where, remedy="keep one of them")
    if not isinstance(given, list) or not given:
        remedy = 'write [{"prompt": "...", "answer": "..."}, ...]'
        raise UserError(
            "questions must be a list that is not empty", where=where, given=_shown(row, "questions"), remedy=remedy
        )
    pairs = []
    for count, one in enumerate(given, 1):
        place = f"{where}, question {count}"
        if not isinstance(one, dict):
            raise UserError("a question must be an object", where=place, given=repr(one)[:80])
        for key in one:
            if key not in QUESTION_KEYS:
                raise unknown_name("key", key, QUESTION_KEYS, where=place)
        prompt = _text(one, "prompt", place)
        if MARKER in prompt or _NUMBERED.search(prompt):
            raise UserError("a marker in a question", where=place, remedy="put the pictures into the row's prompt")
        pairs.append((prompt, _text(one, "answer", place, needed=answers)))
    return tuple(pairs)


def _shown(row: dict[str, Any], key: str) -> str:
    return repr(row[key])[:80] if key in row else "absent"


def _text(row: dict[str, Any], key: str, where: str, needed: bool = True) -> str:
    value = row.get(key)
    if value is None and not needed:
        return ""
    if key == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or (needed and not value.strip()):
        raise UserError(f"{key} must be text that is not empty", where=where, given=_shown(row, key))
    return value


def _texts(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = row.get(key)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise UserError(f"{key} must be a list of texts", where=where, given=_shown(row, key))
    return tuple(values)


def _chosen(answer: str, choices: tuple[str, ...], where: str) -> str:
    """The option that `answer` names by its text or by its letter."""
    if answer in choices:
        return answer
    letters = [letter(i) for i in range(len(choices))]
    if answer.strip() in letters:
        return choices[letters.index(answer.strip())]
    remedy = "write the text of an option, or its letter"
    raise UserError("the answer is not among the choices", where=where, given=repr(answer), remedy=remedy)


def _ordered(prompt: str, images: int, where: str) -> tuple[str, list[int]]:
    """Turn ``{image#k}`` into ``<image>``; which picture each marker stands for, those without a marker first."""
    numbers = [int(number) - 1 for number in _NUMBERED.findall(prompt)]
    plain = prompt.count(MARKER)
    if numbers and plain:
        raise UserError("both <image> and {image#k} markers", where=where, remedy="use one kind")
    bad = next((number + 1 for number in numbers if not 0 <= number < images), None)
    if bad is not None:
        raise UserError("a marker names a picture that is not there", where=where, given=f"{bad} of {images} pictures")
    if plain > images:
        raise UserError("more markers than pictures", where=where, given=f"{plain} markers, {images} pictures")
    first = [i for i in range(images) if i not in numbers] if numbers else list(range(images))
    return _NUMBERED.sub(MARKER, prompt), first + numbers
