"""Metrics by hand, against plain re-statements of MileBench's rules, and against the package ``rouge``."""

import re
import string
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.data import Sample
from meda_kv.metrics import (
    _rouge_l_long,
    group_table,
    match_option,
    normalise,
    option_letters,
    rouge_l,
    score,
    score_text,
)
from rouge import Rouge
from vfm_core.errors import UserError

COLOURS = ["red", "dark blue", "green", "2.5"]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A. Blastomycosis", "a blastomycosis"),
        (" Two\tdogs,\nthen one. ", "two dogs then one"),
        ("red-car", "red car"),  # no space beside the hyphen: it becomes one
        ("red -car", "red car"),  # a space beside it: it goes
        ("red-car - bus", "redcar  bus"),  # a space beside one of them: all go
        ("1,000-2", "10002"),  # a comma between digits: every mark goes
        ("3.5 m", "3.5 m"),  # a point before a digit stays
        ("3. 5", "3 5"),
        ("'it's'", "it's"),
        ("?!", ""),
        ("", ""),
        ("." * 40, "." * 8),  # the scorer deletes 32 at most
    ],
)
def test_normalisation_by_hand(text, normal):
    assert normalise(text) == normal


def plain_normalisation(text):
    """The rules, one character class at a time, with regular expressions only."""
    text = re.sub(r"[\n\t]", " ", text).strip()
    result = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = re.search(re.escape(mark) + " | " + re.escape(mark), text)
        result = re.sub(re.escape(mark), "" if beside_space or re.search(r"\d,\d", text) else " ", result)
    return re.sub(r"\.(?!\d)", "", result, count=32).strip("'").strip('"').strip().lower()


messy = st.text(st.sampled_from(list("abAB12 .,;-_/()[]{}'\"?!\n\t|^$*+\\")), max_size=30)


@settings(deadline=None)
@given(messy)
def test_normalisation_is_the_rules(text):
    assert normalise(text) == plain_normalisation(text)


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ("B. dark blue", "B"),
        ("b dark  blue", "B"),  # step 2: spaces do not count
        ("The answer is: Dark blue.", "B"),
        ("It is green, not red", "C"),  # the leftmost option counts
        ("infrared", "A"),  # part of a word counts
        ("C", "C"),
        ("c)", "C"),
        ("E", ""),
        ("A or B", "AB"),  # all letters that are keys
        ("2.5", "D"),
        ("", ""),
        ("what?", "A"),  # the only key among its letters
    ],
)
def test_option_matching_by_hand(answer, key):
    assert match_option(answer, COLOURS) == key


def test_letter_and_text_come_before_text():
    # "green" stands first, but "a red" is letter and text.
    assert match_option("Not green: A. red", COLOURS) == "A"


def test_the_three_places_where_the_official_scorer_differs():
    assert (match_option("", COLOURS), match_option("", COLOURS, official=True)) == ("", "C")
    assert (match_option("it is 2.5", COLOURS), match_option("2.5", COLOURS, official=True)) == ("D", "")
    many = [f"thing{string.ascii_lowercase[i // 26]}{string.ascii_lowercase[i % 26]}" for i in range(30)]
    answer = f"AB {many[27]}"
    assert (match_option(answer, many), match_option(answer, many, official=True)) == ("AB", "A")


def plain_official_match(answer, choices):
    """The official search written with regular expressions, option by option."""
    text, keys = plain_normalisation(answer), option_letters(len(choices), official=True)
    escape = {ord(c): "\\" + c for c in "\\.^$*+?{}[]|()"}
    if text == "":
        return "C"
    with_letter = "|".join(
        plain_normalisation(f"{k} {plain_normalisation(c)}").translate(escape) for k, c in zip(keys, choices)
    )
    found = re.search(f"({with_letter})", text)
    if found:
        return found.group(0)[0].upper() if found.group(0) else None
    bare = [plain_normalisation(c).translate(escape).replace(" ", "") for c in choices]
    found = re.search("(" + "|".join(bare) + ")", text.replace(" ", ""))
    if found and found.group(0) in bare:
        return keys[bare.index(found.group(0))].upper()
    if len(text) in (1, 2) and text.upper() in keys:
        return text.upper()
    return "".join(c.upper() for c in text if c.upper() in keys)


@pytest.mark.parity
@settings(deadline=None)
@given(answer=messy, choices=st.lists(messy.filter(lambda c: normalise(c) != ""), min_size=1, max_size=5))
def test_official_matching_is_the_official_search(answer, choices):
    assert match_option(answer, choices, official=True) == plain_official_match(answer, choices)


@pytest.mark.parametrize("official", [True, False])
def test_letters_of_options(official):
    letters = option_letters(78, official)
    assert letters[:2] + letters[25:28] + letters[51:53] + letters[77:] == ["A", "B", "Z", "AA", "AB", "AZ", "BA", "BZ"]
    assert len(set(option_letters(200))) == 200


def test_rouge_l_by_hand():
    # longest common subsequence "the cat sat" of 4 and 6 different words: P = 3/4, R = 3/6, F = 0.6
    assert rouge_l("the cat sat down", "the old cat sat quite still") == pytest.approx(0.6, abs=1e-7)
    assert rouge_l("a b", "a b") == pytest.approx(1.0, abs=1e-7)
    assert rouge_l("x", "a b") == 0.0
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l(" . ", "a") == 0.0


def test_rouge_l_counts_different_words():
    # "a a a b" has two different words, both in the gold text: P = R = 1 although the lengths differ
    assert rouge_l("a a a b", "a b") == pytest.approx(1.0, abs=1e-7)


sentences = st.lists(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=7).map(" ".join), min_size=1, max_size=3
).map(". ".join)


@pytest.mark.parity
@settings(deadline=None)
@given(sentences, sentences)
def test_the_long_variant_is_the_package(answer, gold):
    package = Rouge().get_scores(answer, gold)[0]["rouge-l"]["f"]
    assert rouge_l(answer, gold) == package
    assert _rouge_l_long(answer, gold) == pytest.approx(package, abs=1e-12)


def test_texts_too_long_for_the_package_are_scored():
    answer = " ".join(f"w{i}" for i in range(400))
    gold = " ".join(f"w{i}" for i in range(0, 800, 2))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(500)
    try:
        with pytest.raises(RecursionError):
            Rouge(metrics=["rouge-l"]).get_scores(answer, gold)
        assert rouge_l(answer, gold) == pytest.approx(0.5, abs=1e-6)  # 200 of 400 words on both sides
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(
    ("metric", "answer", "gold", "value"),
    [
        ("needle", "The secret is BLUE-42.", "blue 42", 1.0),
        ("needle", "blueish", "blue", 0.0),
        ("needle", "It is blue!", "Blue", 1.0),
        ("substring", "blueish", "blue", 1.0),
        ("substring", "red", "blue", 0.0),
        ("exact", " 7 3  0.", "7 3 0", 1.0),
        ("exact", "7 3", "7 3 0", 0.0),
        ("words", "7, 3 0.", "7 3 0", 1.0),
        ("words", "7 4 0", "7 3 0", 2 / 3),
        ("words", "3 0", "7 3 0", 0.0),  # every word one place too early
        ("words", "7 3 0 5", "7 3 0", 3 / 4),
        ("words", "7", "7 3 0", 1 / 3),
        ("words", "", "7", 0.0),
        ("rouge-l", "A  dog!", "a dog", 1.0),
    ],
)
def test_other_metrics_by_hand(metric, answer, gold, value):
    assert score_text(answer, gold, metric) == pytest.approx(value, abs=1e-7)


def test_a_needle_of_two_words_is_never_found_officially():
    assert score_text("it is dark blue", "dark blue", "needle") == 1.0
    assert score_text("it is dark blue", "dark blue", "needle", official=True) == 0.0


def test_accuracy_by_hand():
    assert score_text("B", "dark blue", "accuracy", COLOURS) == 1.0
    assert score_text("A", "dark blue", "accuracy", COLOURS) == 0.0
    assert score_text("", "green", "accuracy", COLOURS) == 0.0
    assert score_text("", "green", "accuracy", COLOURS, official=True) == 1.0


def test_misuse_is_told():
    with pytest.raises(ValueError, match="'pink' is not among the choices"):
        score_text("A", "pink", "accuracy", COLOURS)
    sample = Sample(id="3", images=(), prompt="p", answer="a", metric="bleu", task="t")
    with pytest.raises(UserError, match="unknown metric in t, sample_id 3: 'bleu'"):
        score(sample, "a")


@settings(deadline=None, max_examples=50)
@given(answer=messy, gold=messy, metric=st.sampled_from(["rouge-l", "needle", "substring", "exact", "words"]))
def test_scores_lie_between_0_and_1_and_ignore_case(answer, gold, metric):
    value = score_text(answer, gold, metric)
    assert 0.0 <= value <= 1.0
    assert score_text(answer.swapcase(), gold, metric) == value


def test_groups_are_means_of_tasks_not_of_samples():
    records = [
        {"method": "meda", "ratio": 0.2, "group": "S-3", "task": task, "score": value}
        for task, values in {"IEdit": [1, 0, 0], "Spot-the-Diff": [1]}.items()
        for value in values
    ]
    records.append({"method": "full", "ratio": 1.0, "group": "S-3", "task": "IEdit", "score": 1})
    arm = {"method": "meda", "ratio": 0.2, "group": "S-3"}
    full = {"method": "full", "ratio": 1.0, "group": "S-3", "n": 1, "score": 1.0}
    assert group_table(records) == [
        {**arm, "task": "IEdit", "n": 3, "score": pytest.approx(1 / 3)},
        {**arm, "task": "Spot-the-Diff", "n": 1, "score": 1.0},
        {**arm, "task": None, "n": 4, "score": pytest.approx(2 / 3)},
        {**full, "task": "IEdit"},
        {**full, "task": None},
    ]
    assert "method" not in group_table([{"group": "g", "task": "t", "score": 1}])[0]
