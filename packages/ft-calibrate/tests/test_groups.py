"""Groups of columns: every way to name them, and every way to get them wrong."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from ft_calibrate.groups import ClassGroups, class_groups, label_columns
from hypothesis import given
from hypothesis import strategies as st
from vfm_core.errors import UserError

NAMES = ["cat", "dog", "owl", "fox", "hen"]


@pytest.mark.parametrize(
    "seen",
    [
        ["fox", "cat"],
        ("cat", "fox"),
        {"cat", "fox"},
        [3, 0],
        np.array([0, 3]),
        torch.tensor([3, 0]),
        [torch.tensor(0), torch.tensor(3)],
        np.array(["cat", "fox"]),
        np.array(["cat", "fox"], dtype=object),
        [True, False, False, True, False],
        np.array([True, False, False, True, False]),
        torch.tensor([True, False, False, True, False]),
        ["0", " 3 "],
        ["cat", 3],
        [0.0, 3.0],
        range(0, 4, 3),
    ],
    ids=lambda seen: type(seen).__name__,  # the text of a set differs from process to process
)
def test_every_way_to_name_the_seen_classes(seen: object) -> None:
    groups = class_groups(NAMES, seen)
    assert groups.seen.tolist() == [0, 3] and groups.absent.tolist() == [1, 2, 4] and len(groups.remaining) == 0
    assert groups.names(groups.seen) == ["cat", "fox"]
    assert groups.group_of.tolist() == ["S", "U", "U", "S", "U"]


def test_a_single_name_is_one_class_and_a_name_beats_a_number() -> None:
    assert class_groups(NAMES, "owl").seen.tolist() == [2]
    assert class_groups(["2", "1", "0"], ["0"]).seen.tolist() == [2]  # the name, not the column
    assert class_groups(["2", "1", "0"], [0]).seen.tolist() == [0]
    assert class_groups(3, ["1"]).classes == ("0", "1", "2")


def test_remaining_classes_and_who_competes() -> None:
    groups = class_groups(NAMES, ["dog"], ["hen", "cat"])
    assert groups.remaining.tolist() == [2, 3]
    assert groups.moved().tolist() == [0, 2, 3, 4] and groups.fixed().tolist() == [1]
    assert groups.moved("keep").tolist() == [0, 4] and groups.fixed("keep").tolist() == [1, 2, 3]
    assert groups.columns("exclude").tolist() == [0, 1, 4] and groups.excluded("exclude").tolist() == [2, 3]
    assert groups.columns("keep").tolist() == [0, 1, 2, 3, 4] and len(groups.excluded("keep")) == 0
    assert repr(groups) == "ClassGroups(5 classes: seen=1, absent=2, remaining=2)"
    with pytest.raises(UserError, match="use absent, keep, exclude"):
        groups.moved("drop")


@given(st.data())
def test_groups_are_a_partition(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 12))
    kinds = data.draw(st.lists(st.sampled_from("SUR"), min_size=k, max_size=k).filter(lambda x: "S" in x))
    columns = {kind: [i for i in range(k) if kinds[i] == kind] for kind in "SUR"}
    groups = class_groups(k, columns["S"], columns["U"])
    assert "".join(groups.group_of) == "".join(kinds)
    for mode in ("absent", "keep", "exclude"):
        parts = [*groups.fixed(mode), *groups.moved(mode), *groups.excluded(mode)]
        assert sorted(parts) == list(range(k))
        assert groups.columns(mode).tolist() == sorted([*groups.fixed(mode), *groups.moved(mode)])


def test_all_seen_is_allowed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        groups = class_groups(3, [0, 1, 2])
        again = class_groups(3, [0, 1, 2], [])  # as a record or a fold does it: known already
    assert len(groups.absent) == len(again.absent) == 0
    assert caplog.text.count("all 3 classes are seen") == 1


@pytest.mark.parametrize(
    ("seen", "absent", "message"),
    [
        ([], None, "no seen class"),
        (["cta"], None, "cta; did you mean cat"),
        ([7], None, "7; the 5 classes are cat"),
        ([-1], None, "-1"),
        ([0.5], None, "0.5"),
        ([None], None, "None"),
        (["cat", "dog"], ["dog"], "both seen and absent in seen.txt: dog"),
        (["cat", "cat"], None, "seen classes repeat in seen.txt: cat"),
        (["cat", 0], None, "seen classes repeat"),
        (["cat"], ["elk"], "absent classes that are not among the classes"),
        (np.array([True, False]), None, "mask of seen classes must have one entry per class"),
    ],
)
def test_bad_groups_are_named(seen: object, absent: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        class_groups(NAMES, seen, absent, where="seen.txt")
    assert message in str(caught.value) and "seen.txt" in str(caught.value)


def test_repeated_class_names() -> None:
    with pytest.raises(UserError, match="class names repeat: a"):
        class_groups(["a", "b", "a"], ["b"])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["owl", "cat", "", None, float("nan"), "-1"], [2, 0, -1, -1, -1, -1]),
        ([2, 0, -1], [2, 0, -1]),
        (np.array([2, 0, -1], dtype=np.int16), [2, 0, -1]),
        (np.array([2.0, np.nan]), [2, -1]),
        (torch.tensor([4, 1]), [4, 1]),
        (np.array(["hen", "1"]), [4, 1]),
        (["cat", 4], [0, 4]),
        (np.array([], dtype=np.int64), []),
        ([], []),
    ],
)
def test_labels_to_columns(labels: object, expected: list[int]) -> None:
    columns = label_columns(labels, NAMES)
    assert columns.tolist() == expected and columns.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["owl", "wolf", "elk", "wolf"], "wolf, elk"),
        ([0, 5, -2], "-2, 5"),
        ([0.5], "0.5"),
        (["6"], "6"),
        ([True], "True"),
        (np.zeros((2, 2), dtype=int), "vector"),
    ],
)
def test_unknown_labels_are_named(labels: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        label_columns(labels, NAMES, where="test.npz")
    assert message in str(caught.value) and "test.npz" in str(caught.value)


def test_many_unknown_labels_are_counted() -> None:
    with pytest.raises(UserError, match=r"100, 101, .* \(20 in all\)"):
        label_columns(list(range(100, 120)), NAMES)


def test_groups_are_values() -> None:
    groups = class_groups(NAMES, ["cat"])
    assert isinstance(groups, ClassGroups) and groups.num_classes == 5
    with pytest.raises(AttributeError):
        groups.seen = np.array([1])  # type: ignore[misc]


@pytest.mark.parametrize("label", [float("inf"), -float("inf"), 0.5, np.float32("inf")])
def test_labels_that_are_no_whole_number_are_named(label: float) -> None:
    with pytest.raises(UserError, match=f"labels that are not among the classes in y: {label}"):
        label_columns([0.0, label], ["a", "b"], where="y")


def test_the_number_of_labels_is_checked() -> None:
    assert label_columns([0, 1], ["a", "b"], rows=2).tolist() == [0, 1]
    with pytest.raises(UserError, match="logits and labels differ in length in y: 3 rows, 2 labels"):
        label_columns([0, 1], ["a", "b"], rows=3, where="y")


def test_a_number_that_is_no_name_among_numbered_classes_is_told(caplog):
    with caplog.at_level("WARNING"):
        assert class_groups(["1", "2", "3"], ["0"]).seen.tolist() == [0]
    assert "0 is not the name of a class and is read as a column number: the class named 1" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        class_groups(["1", "2", "3"], ["1"])
        class_groups(["1", "2", "3"], [1])
        class_groups(["ant", "bee", "cat"], ["0"])
    assert not caplog.records


def test_names_with_commas_are_quoted_in_messages():
    with pytest.raises(UserError, match='did you mean "dog, big"'):
        class_groups(["cat", "dog, big"], ["dog big"])
    with pytest.raises(UserError, match='"a, b"'):
        class_groups(["cat", "dog"], ["a, b"])
