import json
import logging
import math
from importlib.resources import files

import numpy as np
import pytest
from ft_calibrate.class_names import imagenet_classes
from ft_calibrate.splits import (
    OFFICIAL,
    Split,
    is_official,
    make_split,
    office_home_classes,
    official_split,
    per_class_split,
    pseudo_splits,
    read_split,
    seen_sweep,
    write_split,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from vfm_core.errors import UserError

SIZES = {  # classes, seen, absent
    "office-home:Ar": (65, 30, 35),
    "office-home:Rw": (65, 30, 35),
    "imagenet-r": (1000, 100, 100),
    "imagenet-sketch": (1000, 500, 500),
}


# ------------------------------------------------------------------------------------------------------------- official
@pytest.mark.parametrize("name", OFFICIAL)
def test_reference_splits_have_the_published_sizes(name):
    split = official_split(name)
    assert (len(split.classes), len(split.seen), len(split.absent)) == SIZES[name]
    assert len(split.remaining) == 1000 - 200 if name == "imagenet-r" else not split.remaining
    assert split.kind == "official"


def test_reference_orders_are_the_published_ones():
    """First and last ids of each order as the published code lists them."""
    homes, ids = office_home_classes(), imagenet_classes()
    for name, classes, first, last in (
        ("office-home:Ar", homes, (2, 58, 46), (60, 62, 64)),
        ("office-home:Rw", homes, (14, 50, 42), (22, 53, 58)),
        ("imagenet-r", ids, (341, 245, 613), (291, 609, 207)),
        ("imagenet-sketch", ids, (312, 897, 632), (721, 854, 275)),
    ):
        split = official_split(name)
        assert split.seen[:3] == tuple(classes[i] for i in first)
        assert split.absent[-3:] == tuple(classes[i] for i in last)
    assert homes[:3] == ("Drill", "Exit_Sign", "Bottle")
    assert homes[33] == "Alarm_Clock"
    assert homes[64] == "Marker"


def test_the_classes_of_imagenet_r_are_those_of_timm():
    listed = files("timm.data").joinpath("_info/imagenet_r_synsets.txt").read_text().split()
    split = official_split("imagenet-r")
    assert {*split.seen, *split.absent} == set(listed)


@pytest.mark.parametrize(
    "short, name, n",
    [
        ("ar-30", "office-home:Ar", 30),
        ("RW_30", "office-home:Rw", 30),
        ("imagenet-s", "imagenet-sketch", 500),
        ("office-home:ar", "office-home:Ar", 30),
        ("imagenet-r-100", "imagenet-r", 100),
    ],
)
def test_short_names(short, name, n):
    assert is_official(short)
    assert official_split(short) == official_split(name)
    assert len(official_split(short).seen) == n


def test_another_number_of_seen_classes_keeps_the_order():
    whole, few = official_split("ar-30"), official_split("ar-10")
    assert few.seen == whole.seen[:10]
    assert few.absent == whole.seen[10:] + whole.absent
    assert official_split("ar", 10) == few
    assert make_split(office_home_classes(), 10, kind="ar") == few
    for wrong in ("ar-0", "ar-65"):
        with pytest.raises(UserError, match=r"number of seen classes out of range in split ar-.*choose 1 to 64"):
            official_split(wrong)
    with pytest.raises(UserError, match="two numbers"):
        official_split("ar-30", 20)
    with pytest.raises(UserError, match="unknown reference split"):
        official_split("cl-30")
    assert not is_official("cl-30")


def test_a_split_can_be_told_in_other_names():
    split = official_split("ar-30")
    spelled = [name.replace("_", " ").lower() for name in sorted(split.classes)]
    other = split.for_classes(spelled)
    assert other.classes == tuple(spelled)
    assert other.seen == tuple(name.replace("_", " ").lower() for name in split.seen)
    assert not other.remaining
    wider = split.for_classes([*split.classes, "Zebra"])
    assert wider.remaining == ("Zebra",)
    with pytest.raises(UserError, match=r"unknown class in model: 'Bottle'"):
        split.for_classes([c for c in split.classes if c != "Bottle"], "model")


def test_names_that_differ_in_case_only_stay_apart():
    split = Split(("A", "a", "b"), ("A",), ("a", "b"))
    assert split.for_classes(["b", "a", "A"]).seen == ("A",)
    with pytest.raises(UserError, match="unknown class"):
        Split(("x", "y"), ("x",), ("y",)).for_classes(["X", "x ", "y", "z"])


# --------------------------------------------------------------------------------------------------------------- random
@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.data())
def test_random_splits_cover_all_classes(k, data):
    n = data.draw(st.integers(1, k - 1))
    seed = data.draw(st.integers(0, 5))
    split = make_split(k, n, seed=seed)
    assert len(split.seen) == n
    assert sorted([*split.seen, *split.absent], key=int) == [str(i) for i in range(k)]
    assert split == make_split(k, n, seed=seed)
    assert split.columns["seen"] == sorted(map(int, split.seen))


def test_random_splits_differ_by_seed_and_leave_global_state_alone():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    seen = {make_split(20, seed=s).seen for s in range(8)}
    assert len(seen) == 8
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_share_and_default_number():
    assert len(make_split(5).seen) == 3
    assert len(make_split(20, share=0.3).seen) == 6
    assert len(make_split(3, share=0.01).seen) == 1
    for options in ({"n_seen": 0}, {"n_seen": 20}, {"share": 1.0}, {"share": 0.5, "n_seen": 3}):
        with pytest.raises(UserError):
            make_split(20, **options)
    with pytest.raises(UserError, match=r"unknown kind of split: 'randon'; did you mean random"):
        make_split(20, kind="randon")
    with pytest.raises(UserError, match="too few classes"):
        make_split(1)


@pytest.mark.parametrize(
    "seen, absent, message",
    [
        (("a", "a"), ("b",), "class given twice in seen"),
        (("a",), ("a",), "both seen and absent"),
        (("q",), (), "unknown class in seen of split split: 'q'"),
        ((), ("a",), "no seen class"),
    ],
)
def test_contradictory_splits_are_refused(seen, absent, message):
    with pytest.raises(UserError) as error:
        Split(("a", "b"), seen, absent)
    assert message in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- files
def test_a_written_split_reads_back(tmp_path):
    split = official_split("imagenet-r")
    write_split(split, tmp_path / "splits.json")
    assert read_split(tmp_path / "splits.json") == split
    facts = json.loads((tmp_path / "splits.json").read_text())
    assert len(facts["remaining"]) == 800
    short = imagenet_classes("short")
    assert read_split(tmp_path / "splits.json", short) == split.for_classes(short)


@pytest.mark.parametrize(
    "name, text",
    [
        ("s.txt", "# seen\nb\n\n D \n"),
        ("s.txt", "1\n3\n"),
        ("s.json", '["b", "d"]'),
        ("s.json", '{"seen": [1, 3]}'),
        ("s.json", '{"seen": ["b", "d"], "classes": ["d", "c", "b", "a"]}'),
    ],
)
def test_files_of_seen_classes(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    split = read_split(tmp_path / name, ["a", "b", "c", "d"])
    assert split.seen == ("b", "d")
    assert set(split.absent) == {"a", "c"}
    assert make_split(["a", "b", "c", "d"], kind="file", path=tmp_path / name) == split


def test_a_file_may_name_the_absent_classes(tmp_path):
    (tmp_path / "s.json").write_text('{"seen": ["a"], "absent": ["c"]}')
    split = read_split(tmp_path / "s.json", ["a", "b", "c"])
    assert (split.absent, split.remaining) == (("c",), ("b",))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("s.json", '{"seen": [', "malformed JSON"),
        ("s.json", '{"sein": ["a"]}', "no field 'seen'"),
        ("s.json", '{"seen": "a"}', "not a list of class names in {path}, field seen"),
        ("s.txt", "Q\n", "unknown class in {path}: 'Q'"),
        ("s.txt", "", "no seen class"),
        ("s.txt", b"\xff\xfe\x00", "not UTF-8 text in {path}"),
        ("s.txt", None, "cannot read the file of classes (No such file or directory): {path}"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_split(path, ["a", "b"])
    assert message.format(path=path) in str(error.value)


def test_a_class_list_is_needed(tmp_path):
    (tmp_path / "s.txt").write_text("a\n")
    with pytest.raises(UserError, match="no list of all classes"):
        read_split(tmp_path / "s.txt")
    with pytest.raises(UserError, match="no file of classes"):
        make_split(3, kind="file")


# ----------------------------------------------------------------------------------------------------- sweeps and folds
def test_a_sweep_is_nested():
    split = official_split("rw-30")
    steps = seen_sweep(split, [0.1, 0.5, 1.0])
    assert [len(s.seen) for s in steps] == [3, 15, 30]
    assert set(steps[0].seen) < set(steps[1].seen) < set(steps[2].seen)
    assert all(not s.remaining for s in steps)
    assert steps[2].absent == split.absent
    kept = seen_sweep(split, [0.5], dropped="remaining")[0]
    assert kept.absent == split.absent
    assert len(kept.remaining) == 15
    assert seen_sweep(split, [0.5], seed=1)[0].seen != kept.seen
    for wrong in ({"shares": [0]}, {"shares": [1.1]}, {"shares": [0.5], "dropped": "gone"}):
        with pytest.raises(UserError):
            seen_sweep(split, **wrong)


def test_pseudo_splits_halve_the_seen_classes_and_nothing_else():
    seen = official_split("ar-30").seen
    folds = pseudo_splits(seen, 3, seed=0)
    assert [(len(s), len(a)) for s, a in folds] == [(15, 15)] * 3
    for s, a in folds:
        assert sorted(s + a) == sorted(seen)
        assert list(s) == [c for c in seen if c in s]
    assert len({s for s, _ in folds}) == 3
    assert pseudo_splits(seen, 5, seed=0)[:3] == folds  # a fold can be run alone
    assert pseudo_splits(seen, 3, seed=1) != folds


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 4))
def test_pseudo_splits_differ_while_there_are_choices(n, folds, seed):
    found = pseudo_splits(np.arange(n), folds, seed)
    assert all(len(s) == n - n // 2 and len(a) == n // 2 for s, a in found)
    assert len({s for s, _ in found}) == min(folds, math.comb(n, n // 2))
    assert all(isinstance(c, int) for s, a in found for c in s + a)


def test_pseudo_splits_say_what_is_impossible(caplog):
    with pytest.raises(UserError, match="too few seen classes"):
        pseudo_splits(["a"])
    with pytest.raises(UserError, match="given twice"):
        pseudo_splits(["a", "a"])
    for wrong in ({"folds": 0}, {"share": 1.0}):
        with pytest.raises(UserError, match="folds must be positive"):
            pseudo_splits(["a", "b"], **wrong)
    with caplog.at_level(logging.WARNING):
        pseudo_splits(["a", "b"], 3)
    assert "repeat" in caplog.text


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-1, 4), max_size=60), st.sampled_from(["train", "test"]))
def test_samples_of_every_class_are_split(labels, round_up):
    y = np.asarray(labels, dtype=int)
    train, test = per_class_split(y, 0.7, round_up=round_up)
    assert sorted([*train, *test]) == np.flatnonzero(y >= 0).tolist()
    for c in range(5):
        n, n_train = int((y == c).sum()), int((y[train] == c).sum())
        if n >= 2:
            exact = 0.7 * n
            expected = int(np.floor(exact + 1e-9) if round_up == "test" else np.ceil(exact - 1e-9))
            assert n_train == min(max(expected, 1), n - 1)
        else:
            assert n_train == n


def test_sample_splits_are_fixed_by_seed_and_class_alone():
    y = np.array([0] * 10 + [1] * 10)
    first = per_class_split(y)[1]
    assert (per_class_split(y)[1] == first).all()
    assert (per_class_split(np.array([0] * 10 + [1] * 30))[1][:3] == first[:3]).all()
    assert per_class_split(y, seed=1)[1].tolist() != first.tolist()
    with pytest.raises(UserError, match="share of the training part"):
        per_class_split(y, 1.0)
    with pytest.raises(UserError, match="unknown part"):
        per_class_split(y, round_up="val")
