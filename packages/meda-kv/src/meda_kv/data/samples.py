"""What an evaluation asks: `Sample`, `Task`, and `open_task`, which reads either from a spec.

====================================  =================================================================================
spec                                  reads
====================================  =================================================================================
``milebench:NAME``                    one task of a MileBench folder (see `meda_kv.data.milebench`), a group such as
                                      ``T-1`` or ``NH``, or ``all``
``jsonl:PATH``                        our own JSON lines (see `meda_kv.data.jsonl`)
``tinyworld:needle|gist|list``        the embedded albums (see `meda_kv.data.embedded`); options after ``?``
====================================  =================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.errors import UserError, unknown_name
from vfm_core.specs import Spec, parse_spec

if TYPE_CHECKING:
    from PIL import Image

METRICS = ("accuracy", "rouge-l", "needle", "substring", "exact", "words")
"""How an answer is scored; see `meda_kv.metrics.score`."""

LEVELS = ("Few", "Medium", "Many")
MARKER = "<image>"
FAMILIES = ("milebench", "jsonl", "tinyworld")


def level_of(images: int) -> str:
    """MileBench's bin of a number of images: ``"Few"`` below 6, ``"Medium"`` 6 to 31, ``"Many"`` above."""
    return LEVELS[0] if images < 6 else LEVELS[1] if images <= 31 else LEVELS[2]


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt with its pictures and the answer that is expected.

    Attributes
    ----------
    id : str
        Unique within the task.
    images : tuple of Path or PIL.Image.Image
        In the order of the ``<image>`` markers of `prompt`; pictures beyond the markers stand before the text.
    prompt : str
        Text with ``<image>`` markers. For a probe sample this is the shared context only: see `asked`.
    answer : str
        Never empty; for a sample with choices the text of the right one.
    choices : tuple of str
        Texts of the options; empty for an open question.
    questions : tuple of (str, str)
        Probe samples only: what may be asked after the shared context, and the answers. `answer` is that of the first.
    metric : str
        One of `METRICS`.
    task, group : str
        Name of the task, and of the group that it is averaged in.
    level : {"Few", "Medium", "Many"}
        Bin of the number of images of the sample as it was read, before any truncation.
    raw : dict
        What the file held, and what was done to it (`truncate` adds ``"truncated"`` and ``"images_dropped"``).
    instruction : str
        The head of `prompt` that truncation never touches; empty when there is none.
    video : Path, optional
        Instead of images: a folder of frames, an animated picture or a video file.
    source : str
        The file that the sample comes from, for messages.
    official : bool
        Answers are scored to the letter of MileBench's scorer (see `meda_kv.metrics`), as MileBench's own samples are.
    """

    id: str
    images: tuple[Path | Image.Image, ...]
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    metric: str = "rouge-l"
    task: str = ""
    group: str = ""
    level: str = "Few"
    raw: dict[str, Any] = field(default_factory=dict, repr=False)
    instruction: str = ""
    video: Path | None = None
    source: str = ""
    official: bool = False

    @property
    def where(self) -> str:
        """File and id, as messages name the sample."""
        return f"{self.source or self.task}, sample_id {self.id}"

    def asked(self, question: int = 0) -> str:
        """The whole prompt: `prompt` itself, or for a probe sample the context followed by one of the questions."""
        if not self.questions:
            return self.prompt
        asked = self.questions[question][0]
        return f"{self.prompt} {asked}" if self.prompt else asked

    def own_question(self) -> tuple[str, str]:
        """Part a prompt without `questions` into what is shown and what is asked about it: the text after the last
        picture (and after `instruction`, and all of the text about a video) is the question.

        Returns
        -------
        head, question : str
            ``head + question`` is `prompt`. The question is empty when the picture stands at the end, and when nothing
            is shown, since a text alone does not tell its question from the rest.
        """
        if self.questions or not (self.images or self.video is not None):
            return self.prompt, ""
        cut = max(self.prompt.rfind(MARKER) + len(MARKER) if MARKER in self.prompt else 0, len(self.instruction))
        head, question = self.prompt[:cut], self.prompt[cut:]
        return (head, question) if question.strip() else (self.prompt, "")

    def probes(self) -> tuple[str, ...]:
        """Protocols, of ``asked`` and ``agnostic``, that can put this sample's question to a compressed cache."""
        if self.questions or self.own_question()[1]:
            return ("asked", "agnostic")
        return ("asked",) if self.images and self.prompt.replace(MARKER, "").strip() else ()

    def load_images(self) -> list[Image.Image]:
        """Read the pictures as upright RGB.

        Raises
        ------
        UserError
            A picture is missing, corrupt, empty or a folder; the message names file and sample_id.
        """
        from vfm_core.images import read_image, to_rgb

        pictures = []
        for image in self.images:
            if not isinstance(image, str | Path):
                pictures.append(to_rgb(image))
                continue
            try:
                pictures.append(read_image(image))
            except UserError as error:
                remedy = error.remedy or "replace the file"
                raise UserError(error.what, where=self.where, given=error.given or image, remedy=remedy) from error
        return pictures


@dataclass(frozen=True, eq=False)
class Task:
    """Samples under one name.

    Attributes
    ----------
    name : str
        The spec that it was opened with, without family and options.
    samples : tuple of Sample
        At least one.
    metric : str
        That of all samples, or ``"mixed"``.
    """

    name: str
    samples: tuple[Sample, ...]
    metric: str

    def __len__(self) -> int:
        return len(self.samples)

    def truncated(self, tokenizer: Any, max_context_len: int, tokens_per_image: int) -> Task:
        """The task with over-long prompts cut from the left; see `meda_kv.data.milebench.truncate`."""
        from meda_kv.data.milebench import truncate

        samples = (truncate(sample, tokenizer, max_context_len, tokens_per_image) for sample in self.samples)
        return Task(self.name, tuple(samples), self.metric)


def make_task(name: str, samples: Iterable[Sample], where: str | Path, *, key: Callable[[Sample], Any]) -> Task:
    """Bundle samples after checking that there is one, and that `key` differs between them."""
    kept = tuple(samples)
    if not kept:
        raise UserError("no sample", where=where, remedy="check the file, or raise --limit")
    for sample, count in ((s, c) for s, c in Counter(map(key, kept)).items() if c > 1):
        name_of = sample[-1] if isinstance(sample, tuple) else sample
        raise UserError(f"sample_id occurs {count} times", where=where, given=name_of, remedy="make ids unique")
    metrics = {sample.metric for sample in kept}
    return Task(name, kept, metrics.pop() if len(metrics) == 1 else "mixed")


def open_task(spec: str, data: str | Path | None = None, limit: int | None = None) -> Task:
    """Read the samples that a spec names.

    Parameters
    ----------
    spec : str
        ``milebench:NAME|GROUP|all``, ``jsonl:PATH`` or ``tinyworld:needle|gist|list[?n=&images=&seed=...]``.
    data : str or Path, optional
        ``milebench``: the folder that holds one folder per task. ``jsonl``: what relative paths of pictures start
        from, by default the folder of the file.
    limit : int, optional
        At most so many samples of each task, from its beginning.

    Returns
    -------
    Task

    Raises
    ------
    UserError
        Unknown family, task or option, a missing or malformed file, or a sample that cannot be scored; the message
        names the file and the sample_id or line. Pictures are not opened here: `Sample.load_images` does.

    Examples
    --------
    >>> open_task("tinyworld:needle?n=2&images=3").samples[1].prompt
    '<image> <image> <image>'
    """
    if limit is not None and limit < 1:
        raise UserError("limit must be positive", given=limit, remedy="use 1 or more")
    parsed = _parse(spec)
    if parsed.family == "milebench":
        from meda_kv.data.milebench import read_milebench

        parsed.read()
        if data is None:
            remedy = "give --root DIR, the folder that holds one folder per task"
            raise UserError("MileBench needs its folder", where=spec, remedy=remedy)
        return read_milebench(Path(data), parsed.name, limit)
    if parsed.family == "jsonl":
        from meda_kv.data.jsonl import read_jsonl

        return read_jsonl(parsed.name, root=data, limit=limit)
    from meda_kv.data.embedded import read_albums

    return read_albums(parsed, limit)


def _parse(spec: str) -> Spec:
    family, colon, rest = spec.strip().partition(":")
    if family == "jsonl" and rest:
        return Spec("jsonl", rest)  # a path may hold any character
    if not colon and family.endswith(".jsonl"):
        return Spec("jsonl", family)
    if not colon or family not in FAMILIES:
        raise unknown_name("task family", family, FAMILIES, where=spec or "task")
    return parse_spec(spec)
