"""How a sample is asked: as ``generate`` answers it, or by questions put to the compressed cache.

Compression happens after the prompt was read, and the first answer token comes from the full cache. An answer of one
token, such as the letter of a choice, is therefore the same under every method: it does not test a compression. The
two probe protocols ask on what is left: ``asked`` compresses after context and first question and then puts every
question once more, ``agnostic`` compresses before any question was read. After every question the cache is cropped
back, so that questions do not see each other.

A sample without a list of questions has its own one, the text after its last picture (`Sample.own_question`):
``asked`` puts it once more to what is left of the whole prompt, ``agnostic`` holds it back until the rest was read and
compressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.data.identity import content
from meda_kv.data.samples import MARKER
from meda_kv.evaluation.reading import Copy, Reading, answer_on, ask_on, end_tokens, trim

if TYPE_CHECKING:
    from meda_kv.data import Sample
    from meda_kv.prompts import Prompt

PROTOCOLS = ("generate", "asked", "agnostic")

_USER, _ASSISTANT = "0first0", "0reply0"  # words that no template writes


@dataclass(frozen=True, eq=False)
class Exam:
    """A sample, ready to be read and asked.

    Attributes
    ----------
    sample, prompt
        What is asked, and what is read before compression.
    cut
        Tokens at the end of the prompt that are not read (the agnostic protocol's first question).
    feeds
        Tokens of every question of a probe; none for ``generate``.
    shape
        Exams of equal shape make prompts of equal length.
    content
        Digest of what the sample shows, for its records (`meda_kv.data.identity.content`).
    """

    sample: Sample
    prompt: Prompt
    cut: int
    feeds: tuple[tuple[int, ...], ...]
    shape: tuple[Any, ...]
    content: str = ""


def make_exam(processor: Any, sample: Sample, protocol: str, frames: int = 8) -> Exam:
    """Load the images of a sample and turn its questions into tokens.

    Raises
    ------
    UserError
        An image that cannot be read, or a question that the protocol cannot tell from the rest of the prompt; the
        message names file and sample.
    """
    from meda_kv.prompts import Prompt, load_frames, render

    if protocol != "generate" and protocol not in sample.probes():
        raise no_probe(sample, protocol)

    images = sample.load_images() if sample.video is None else load_frames(sample.video, frames, sample.where)
    prompt = Prompt(sample.asked(), images)
    tokens = _tokens(processor, render(processor, prompt))
    cut = 0
    feeds: tuple[tuple[int, ...], ...] = ()
    head, own = sample.own_question()
    if protocol == "agnostic":
        others = [sample.asked(j) for j in range(1, len(sample.questions))]
        whole = [tokens, *(_tokens(processor, render(processor, Prompt(text, images))) for text in others)]
        bare = _tokens(processor, render(processor, Prompt(head, images)))
        common = _common_prefix([*whole, bare])
        cut = len(tokens) - common
        feeds = tuple(tuple(row[common:]) for row in whole)
    elif protocol == "asked":
        again = [text for text, _ in sample.questions] or [own.strip() or sample.prompt.replace(MARKER, "").strip()]
        feeds = tuple(tuple(_tokens(processor, next_turn(processor, text))) for text in again)
    shape = (len(tokens), cut, tuple(image.size for image in images))
    return Exam(sample, prompt, cut, feeds, shape, content(sample))


def no_probe(sample: Sample, protocol: str) -> UserError:
    """The error about a sample whose question a protocol cannot put to a compressed cache."""
    other = "use --protocol asked, or give" if "asked" in sample.probes() else "use --protocol generate, or give"
    return UserError(
        "no text that can be told as the question from the rest of the prompt",
        where=sample.where,
        given=f"protocol {protocol}",
        remedy=f"{other} the samples questions of their own (key questions of JSON lines)",
    )


def next_turn(processor: Any, text: str) -> str:
    """What a chat that stands after a question goes on with to put another one.

    Without a chat template the text itself, after a space. With one, the end of an empty reply (where the template
    opens a reply) and the next question's turn.
    """
    if not getattr(processor, "chat_template", None):
        return f" {text}"
    parts = getattr(processor, "tokenizer", None) is not None

    def turn(role: str, words: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": words}] if parts else words}

    def write(*turns: dict[str, Any], opened: bool = True) -> str:
        written = processor.apply_chat_template(list(turns), add_generation_prompt=opened, tokenize=False)
        return str(written)

    first = turn("user", _USER)
    if write(first) == write(first, opened=False):
        try:
            return write(first, turn("user", text)).partition(_USER)[2]
        except Exception:  # a template that wants the roles to alternate
            pass
    return write(first, turn("assistant", _ASSISTANT), turn("user", text)).partition(_ASSISTANT)[2]


def collate(processor: Any, exams: Sequence[Exam]) -> dict[str, Tensor]:
    """Model inputs of a batch of exams, padded on the left, each without the tokens that it does not read."""
    from meda_kv.prompts import build_inputs

    inputs = build_inputs(processor, [exam.prompt for exam in exams])
    if not any(exam.cut for exam in exams):
        return inputs
    shape = inputs["input_ids"].shape
    mask = inputs["attention_mask"].clone()
    for row, exam in enumerate(exams):
        mask[row] = mask[row].roll(exam.cut)
        mask[row, : exam.cut] = 0
    spare = int((mask.sum(0) == 0).long().cumprod(0).sum())  # leading columns that are padding in every row
    cropped = {}
    for name, value in inputs.items():
        if value.shape == shape:  # ids, mask and token types; pixels stay
            rows = [value[row].roll(exam.cut) for row, exam in enumerate(exams)]
            value = (mask if name == "attention_mask" else torch.stack(rows))[:, spare:]
        cropped[name] = value
    return cropped


def grade(
    model: Any,
    processor: Any,
    exams: Sequence[Exam],
    reading: Reading,
    copy: Copy,
    protocol: str,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Ask a batch on one arm's cache and score the answers.

    Returns
    -------
    list of dict
        Per row ``scores`` (``all``, and under ``asked``, of several questions, the ``asked`` one and the mean of the
        ``other`` ones), ``points`` per question, ``answers``, ``tokens`` (answer tokens) and ``tokens_after`` (those
        computed on the compressed cache). Samples that are scored by MileBench's scorer also have ``mended_scores``,
        as ``scores`` with that scorer's slips mended (see `meda_kv.metrics`).
    """
    from meda_kv.metrics import score

    ends = end_tokens(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    if protocol == "generate":
        rounds = [answer_on(model, reading, copy, max_new_tokens)]
    else:
        pad = tokenizer.pad_token_id or 0
        count = max(len(exam.feeds) for exam in exams)
        rounds = [
            ask_on(
                model, reading, copy, [exam.feeds[min(j, len(exam.feeds) - 1)] for exam in exams], pad, max_new_tokens
            )
            for j in range(count)
        ]
    graded = []
    for row, exam in enumerate(exams):
        sample = exam.sample
        said = [trim(tokens[row], ends) for tokens in rounds[: max(1, len(exam.feeds))]]
        answers = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in said]
        points = [score(sample, answer, j) for j, answer in enumerate(answers)]
        facts: dict[str, Any] = {"scores": _by_kind(points, protocol), "points": points}
        if sample.official:
            mended = [score(sample, answer, j, official=False) for j, answer in enumerate(answers)]
            facts["mended_scores"] = _by_kind(mended, protocol)
        tokens = sum(map(len, said))
        after = tokens if protocol != "generate" else max(0, tokens - 1 - copy.pending)
        graded.append({**facts, "answers": answers, "tokens": tokens, "tokens_after": after})
    return graded


def _by_kind(points: list[float], protocol: str) -> dict[str, float]:
    scores = {"all": sum(points) / len(points)}
    if protocol == "asked" and len(points) > 1:
        scores |= {"asked": points[0], "other": sum(points[1:]) / (len(points) - 1)}
    return scores


def default_new_tokens(samples: Sequence[Sample], processor: Any, protocol: str) -> int:
    """Greatest answer length for a task, from its longest expected answer.

    The embedded tasks answer with nothing but the answer, and probes are scored on its length alone; other models talk
    around it, so that open prompts get twice its length and 16 tokens more.
    """
    golds = {gold for sample in samples for _, gold in sample.questions or (("", sample.answer),)}
    longest = max((len(_tokens(processor, gold)) for gold in golds), default=1)
    terse = all(sample.source.startswith("tinyworld:") for sample in samples)
    return max(1, longest) if terse else 2 * longest + 16


def tokens_per_image(processor: Any, sample: Sample) -> int:
    """Placeholder tokens that an image of `sample` takes, on average and rounded up."""
    from meda_kv.prompts import Prompt, build_inputs, render

    prompt = Prompt(sample.asked(), sample.load_images())
    length = build_inputs(processor, [prompt])["input_ids"].shape[1]
    words = len(_tokens(processor, render(processor, prompt))) - len(prompt.images)
    return -(-(length - words) // len(prompt.images))


def _tokens(processor: Any, text: str) -> list[int]:
    tokenizer = getattr(processor, "tokenizer", processor)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    length = min(map(len, rows))
    return next((i for i in range(length) if len({row[i] for row in rows}) > 1), length)
