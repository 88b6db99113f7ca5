"""Which data a run was made with, so that a resumed run never mixes answers to other data.

Two parts, since they change for different reasons. `describe` sums up what is asked, how it is scored and which files
are shown; it stands in the configuration of a run. `content` looks into the files of one sample; it stands beside its
answer, so that a picture that could not be read may still be mended, while one that was answered may not be exchanged.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from meda_kv.data.samples import Sample

__all__ = ["asked", "check_unchanged", "content", "describe", "file_digest", "shown_names"]

_WHOLE = 2**16
_END = 2**15


def describe(samples: Sequence[Sample]) -> dict[str, Any]:
    """What a list of samples is, for a configuration.

    Returns
    -------
    dict
        ``count``, and a digest each of ``prompts`` (ids, prompts, questions and answers), ``scoring`` (metric, choices,
        scorer) and ``images`` (names of pictures and videos): a refusal names what changed.
    """
    return {
        "count": len(samples),
        "prompts": _digest((s.task, s.id, s.prompt, s.answer, s.questions) for s in samples),
        "scoring": _digest((s.metric, s.choices, s.official) for s in samples),
        "images": _digest(shown_names(s) for s in samples),
    }


def asked(sample: Sample) -> str:
    """Digest of what one sample asks, and of the names of what it shows."""
    return _digest([(sample.prompt, sample.questions, sample.choices, shown_names(sample))])


def shown_names(sample: Sample) -> list[str]:
    """Names of a sample's pictures or its video: relative to the file that lists them where they lie below it."""
    folder = Path(sample.source).expanduser().absolute().parent if sample.source else None
    names = []
    for number, image in enumerate(sample.images if sample.video is None else (sample.video,), 1):
        if not isinstance(image, str | Path):
            names.append(f"picture {number}")
            continue
        path = Path(image).expanduser().absolute()
        below = folder is not None and path.is_relative_to(folder)
        names.append((path.relative_to(folder) if folder is not None and below else path).as_posix())
    return names


def content(sample: Sample) -> str:
    """Digest of the bytes that a sample shows: files, frames of a folder, or pictures in memory."""
    parts: list[str] = []
    for image in sample.images if sample.video is None else (sample.video,):
        if not isinstance(image, str | Path):
            parts.append(_pixels(image))
            continue
        path = Path(image).expanduser()
        inside = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        parts += [f"{p.name} {file_digest(p)}" for p in inside]
    return _digest(parts)


def file_digest(path: str | Path) -> str:
    """Digest of a file: the whole of it up to 64 KiB, otherwise its size and 32 KiB of either end."""
    path = Path(path)
    try:
        facts = path.stat()
        return _file_digest(str(path), facts.st_size, facts.st_mtime_ns)
    except OSError:
        return "absent"


@lru_cache(maxsize=2**16)  # one picture is shown by many samples
def _file_digest(path: str, size: int, _mtime: int) -> str:
    with Path(path).open("rb") as file:
        if size <= _WHOLE:
            return hashlib.sha256(file.read()).hexdigest()[:16]
        digest = hashlib.sha256(str(size).encode() + file.read(_END))
        file.seek(-_END, os.SEEK_END)
        digest.update(file.read(_END))
    return digest.hexdigest()[:16]


def check_unchanged(samples: Iterable[Sample], recorded: Mapping[str, Mapping[str, Any]], key: Any) -> None:
    """Refuse samples that were answered when they were something else.

    Parameters
    ----------
    samples
        As they are now.
    recorded
        ``{"asked": ..., "content": ...}`` of the finished ones as they were, by key; either may be missing.
    key
        Function from a sample to its key.

    Raises
    ------
    UserError
        Names the first sample that changed, what changed, and how many did.
    """
    checks = {"asked": ("prompt or names of pictures", asked), "content": ("pictures", content)}
    changed: list[tuple[Sample, str]] = []
    for sample in samples:
        before = recorded.get(key(sample), {})
        wrong = [what for name, (what, now) in checks.items() if name in before and before[name] != now(sample)]
        changed += [(sample, wrong[0])] if wrong else []
    if changed:
        first, what = changed[0]
        count = f"{what} of {len(changed)} answered sample{'s' if len(changed) > 1 else ''}"
        remedy = "use --overwrite to start afresh, another --out, or put the data back"
        raise UserError("the data changed since they were answered", where=first.where, given=count, remedy=remedy)


def _pixels(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()[:16]


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\n")
    return digest.hexdigest()[:16]
