"""Right or wrong: the metrics of MileBench, on single answers.

MileBench (arXiv 2404.18532) scores a multiple-choice answer by searching it for an option, an open answer by ROUGE-L,
a needle by looking for the word, and MMCoQA by substring. The normalisation, the order of the search and the ROUGE
variant are those of its scorer, so that numbers can be compared. Followed is ``evaluate.py`` of the repository
`MileBench/MileBench` as of commit 9583e1f (unchanged since b2979ac): keys of options go A to Z, AA to AZ, BA to BZ and
on, and an answer of one or two letters is taken for a key. Its first version (730e930), which results of that time may
come from, had one-character keys only (``chr(65 + i)``), so that GPR1200 is scored otherwise there.

MileBench's own samples are scored officially, to the letter of that file. It does not do what it means in three places
of `match_option`, and never finds a needle of several words: ``official=False`` mends these, which is the default for
all other samples, and stands beside MileBench's scores as the mended ones. Files in its schemas are in
`meda_kv.data.predictions`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from vfm_core.errors import unknown_name

from meda_kv.data.samples import METRICS, Sample

__all__ = ["group_table", "match_option", "normalise", "option_letters", "rouge_l", "score", "score_text"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32


@lru_cache(maxsize=4096)  # an evaluation compares the same few texts under every arm
def normalise(text: str) -> str:
    r"""Bring an answer into the form that is compared: MileBench's variant of the VQA normalisation.

    Newlines and tabs become spaces; of the VQA punctuation marks, one that has a space beside it anywhere in the text
    (any mark at all, when a comma stands between two digits) is deleted, others become spaces; the first 32 periods
    that no digit follows are deleted; quotation marks and spaces are stripped; lower case.

    Parameters
    ----------
    text : str
        Of any length.

    Returns
    -------
    str
        Possibly empty.

    Examples
    --------
    >>> normalise(' "A. Two dogs,\n a cat" ')
    'a two dogs  a cat'
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_number = _COMMA_BETWEEN_DIGITS.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        if mark in text:
            deleted = has_number or mark + " " in text or " " + mark in text
            result = result.replace(mark, "" if deleted else " ")
    # The scorer hands re.UNICODE (32) over where re.sub expects the greatest number of replacements.
    result = _PERIOD.sub("", result, count=_MOST_PERIODS)
    return result.strip("'").strip('"').strip().lower()


def option_letters(count: int, official: bool = False) -> list[str]:
    """Keys of the options: A to Z, AA to AZ, ...

    Parameters
    ----------
    count : int
        Number of options.
    official : bool
        As MileBench's scorer counts: the same up to 78 options, other characters beyond.
    """
    if official:
        return [("", "A", "B")[min(i // 26, 2)] + chr(ord("A") + i - 26 * min(i // 26, 2)) for i in range(count)]
    return [_letter(i) for i in range(count)]


def _letter(index: int) -> str:
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def match_option(answer: str, choices: Sequence[str], *, official: bool = False) -> str:
    """Key of the option that an answer names, in MileBench's order of search.

    1. letter and text of an option, such as ``"a two dogs"`` of "A. Two dogs"; 2. the text of an option, spaces left
    out; 3. an answer that is a letter; else all letters of the answer that are keys, which is right only when there is
    exactly one. The leftmost match counts, and at one place the earlier option.

    Parameters
    ----------
    answer : str
        As generated; it is normalised here.
    choices : sequence of str
        Texts of the options.
    official : bool
        Repeat the scorer to the letter. By default three places are mended: an empty answer names no option (the
        scorer reads it as C), a two-letter key is found whole (the scorer takes its first letter), and an option with
        a special character such as the point of "2.5" can be found by its text (the scorer compares it escaped).

    Returns
    -------
    str
        A key, several keys in a row, or nothing.

    Examples
    --------
    >>> match_option("The answer is: Two dogs.", ["A cat", "Two dogs"])
    'B'
    """
    text = normalise(answer)
    options = [normalise(choice) for choice in choices]
    keys = option_letters(len(options), official)
    if text == "":
        return "C" if official else ""
    # 1. letter and text
    labelled = [normalise(f"{key} {option}") for key, option in zip(keys, options)]
    found = _leftmost(text, labelled, empty=official)
    if found is not None:
        return text[found[0]].upper() if official else keys[found[1]]
    # 2. text
    packed = [option.replace(" ", "") for option in options]
    found = _leftmost(text.replace(" ", ""), packed, empty=official)
    if found is not None:
        matched = packed[found[1]]
        same = [key for key, option in zip(keys, packed) if matched == (_escaped(option) if official else option)]
        if same:
            return same[0].upper() if official else same[0]
    # 3. letter
    if len(text) in (1, 2) and text.upper() in keys:
        return text.upper()
    return "".join(character.upper() for character in text if character.upper() in keys)


def _leftmost(text: str, options: Sequence[str], empty: bool) -> tuple[int, int] | None:
    """Place and index of the option that begins first in `text`; at one place the first of the list."""
    places = [(text.find(option), index) for index, option in enumerate(options) if option or empty]
    return min((place for place in places if place[0] >= 0), default=None)


def _escaped(option: str) -> str:
    return "".join("\\" + c if c in "\\.^$*+?{}[]|()" else c for c in option)


def rouge_l(answer: str, gold: str) -> float:
    """ROUGE-L F of two texts as the package ``rouge`` counts it, in [0, 1].

    Words are compared as sets over the sentences of the text (union of longest common subsequences), precision and
    recall are divided by the numbers of *different* words, and F = 2 P R / (P + R + 1e-8). The package ``rouge_score``
    counts repeated words and gives slightly different values.

    Parameters
    ----------
    answer, gold : str
        Normalised by the caller where that is wanted.

    Returns
    -------
    float
        0 when one of them has no word.
    """
    from rouge import Rouge

    if not answer.strip(". \n\t") or not gold.strip(". \n\t"):
        return 0.0
    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores(answer, gold)[0]["rouge-l"]["f"])
    except RecursionError:  # the package walks back through its table by recursion, one call per word
        return _rouge_l_long(answer, gold)


def _rouge_l_long(answer: str, gold: str) -> float:
    """`rouge_l` without recursion, for texts of any length."""
    hypothesis = [" ".join(part.split()).split(" ") for part in answer.split(".") if part]
    reference = [" ".join(part.split()).split(" ") for part in gold.split(".") if part]
    union: set[str] = set()
    for words in reference:
        for other in hypothesis:
            union |= _common_subsequence(words, other)
    recall = len(union) / len({word for words in reference for word in words})
    precision = len(union) / len({word for words in hypothesis for word in words})
    return 2.0 * precision * recall / (precision + recall + 1e-8)


def _common_subsequence(x: Sequence[str], y: Sequence[str]) -> set[str]:
    """Words of the longest common subsequence; among several the one that ``rouge`` walks back along."""
    table = [[0] * (len(y) + 1)]
    for word in x:
        above, row = table[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    words, i, j = set(), len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.add(x[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def score_text(
    answer: str, gold: str, metric: str, choices: Sequence[str] = (), *, official: bool = False, where: str = ""
) -> float:
    """Score one answer against one gold text.

    Parameters
    ----------
    answer, gold : str
        As generated and as annotated; both are normalised here.
    metric : {"accuracy", "rouge-l", "needle", "substring", "exact", "words"}
        accuracy: the option found (`match_option`) is the gold one. rouge-l: `rouge_l` of the normalised texts.
        needle: the gold is one of the words of the answer (of several words: they occur in a row). substring: the gold
        occurs in the answer. exact: the texts are equal. words (ours, not MileBench's): the share of words right in
        their place, of as many as the longer of the two texts has, so that it is 1 where exact is.
    choices : sequence of str
        For accuracy; the gold is one of them.
    official : bool
        See `match_option`. For needle: a gold of several words is never found.
    where : str
        What an error about the metric names.

    Returns
    -------
    float
        0 or 1; for rouge-l and words in [0, 1].

    Raises
    ------
    UserError
        Unknown metric.
    ValueError
        Accuracy without choices, or a gold that is none of them.
    """
    text, wanted = normalise(answer), normalise(gold)
    if metric == "accuracy":
        options = [normalise(choice) for choice in choices]
        if wanted not in options:
            raise ValueError(f"the gold answer {gold!r} is not among the choices {list(choices)!r}")
        key = option_letters(len(options), official)[options.index(wanted)]
        return float(match_option(answer, choices, official=official) == key)
    if metric == "rouge-l":
        return rouge_l(text, wanted)
    if metric == "needle":
        words, sought = text.split(), [wanted] if official else wanted.split()
        return float(any(words[i : i + len(sought)] == sought for i in range(len(words) - len(sought) + 1)))
    if metric == "substring":
        return float(wanted in text)
    if metric == "exact":
        return float(text.split() == wanted.split())
    if metric == "words":
        said, sought = text.split(), wanted.split()
        return sum(a == b for a, b in zip(said, sought)) / max(len(said), len(sought), 1)
    raise unknown_name("metric", metric, METRICS, where=where or None)


def score(sample: Sample, answer: str, question: int = 0, *, official: bool | None = None) -> float:
    """Score an answer to a sample by its metric.

    Parameters
    ----------
    sample : Sample
        What was asked.
    answer : str
        As generated, without special tokens.
    question : int
        For a probe sample: which of its questions was asked.
    official : bool, optional
        See `match_option`; by default as the sample says (`Sample.official`).

    Returns
    -------
    float
        In [0, 1].
    """
    official = sample.official if official is None else official
    gold = sample.questions[question][1] if sample.questions else sample.answer
    return score_text(answer, gold, sample.metric, sample.choices, official=official, where=sample.where)


def group_table(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean scores per task, and per group as the mean over its tasks.

    Parameters
    ----------
    records : iterable of mapping
        With ``task``, ``group`` and ``score``; all further keys among ``method``, ``ratio`` separate arms.

    Returns
    -------
    list of dict
        ``{"method", "ratio", "group", "task", "n", "score"}``, in the order of first appearance; the row of a group
        follows its tasks and has ``"task": None`` and ``n`` samples in all. Arms without method or ratio lack the key.
    """
    arms: dict[tuple[Any, ...], dict[str, dict[str, list[float]]]] = {}
    for record in records:
        arm = tuple((key, record[key]) for key in ("method", "ratio") if key in record)
        tasks = arms.setdefault(arm, {}).setdefault(str(record["group"]), {})
        tasks.setdefault(str(record["task"]), []).append(float(record["score"]))
    rows: list[dict[str, Any]] = []
    for arm, groups in arms.items():
        for group, tasks in groups.items():
            means = {task: sum(values) / len(values) for task, values in tasks.items()}
            for task, values in tasks.items():
                rows.append({**dict(arm), "group": group, "task": task, "n": len(values), "score": means[task]})
            total = sum(map(len, tasks.values()))
            rows.append(
                {**dict(arm), "group": group, "task": None, "n": total, "score": sum(means.values()) / len(means)}
            )
    return rows
