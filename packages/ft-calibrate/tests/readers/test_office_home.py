import logging
from pathlib import Path

import numpy as np
import pytest
from ft_calibrate.readers.office_home import COUNTS
from ft_calibrate.splits import office_home_classes, official_split
from vfm_core.data import open_dataset
from vfm_core.errors import UserError

CLASSES = ("Alarm_Clock", "Exit_Sign", "ToothBrush")  # ids 33, 1, 17: neither the alphabet's order nor their own


def tree(root: Path, picture, domain: str = "Clipart", n: int = 10, spelled=lambda name: name) -> Path:
    for c, name in enumerate(CLASSES):
        for i in range(1, n + 1):
            picture(root / domain / spelled(name) / f"{i:05d}.jpg", 20 * c + i)
    return root


def lists(root: Path, folder: str, name: str, n: int = 10, train: int = 7) -> None:
    classes = office_home_classes()
    for part, numbers in (("training", range(1, train + 1)), ("testing", range(train + 1, n + 1))):
        lines = [f"{folder}/{c}/{i:05d}.jpg {classes.index(c)}" for c in CLASSES for i in numbers]
        (root / f"{name}_{part}.txt").write_text("\n".join(lines) + "\n")


def test_lists_give_the_reference_ids_and_their_split(tmp_path, picture):
    tree(tmp_path, picture)
    lists(tmp_path, "Clipart", "Clipart")
    train, test = (open_dataset(f"office-home:{tmp_path}@{s}?domain=Cl") for s in ("train", "test"))
    assert (len(train), len(test), len(train.classes)) == (21, 9, 65)
    assert tuple(train.classes) == office_home_classes()
    assert set(train.labels.tolist()) == {33, 1, 17}
    assert not set(train.ids) & set(test.ids)
    for i in range(len(test)):
        path = Path(test.ids[i])
        assert test.classes[test.labels[i]] == path.parent.name
        expected = 20 * CLASSES.index(path.parent.name) + int(path.stem)
        assert abs(int(np.asarray(test[i].image)[0, 0, 0]) - expected) <= 1
    assert test.meta_of(0) == {"domain": "Clipart", "split": "test"}
    assert len(open_dataset(f"office-home:{tmp_path}?domain=clipart@all")) == 30


@pytest.mark.parametrize("folder", ["Real World", "Real_World", "RealWorld"])
@pytest.mark.parametrize("listed", ["Real World", "Real_World"])
def test_real_world_is_found_however_it_is_spelled(tmp_path, picture, folder, listed):
    tree(tmp_path, picture, folder, 3)
    lists(tmp_path, listed, listed, 3, 2)
    data = open_dataset(f"office-home:{tmp_path}?domain=Rw@train")
    assert len(data) == 6
    assert data[0].meta["domain"] == folder
    assert data[0].image.size == (8, 6)


def test_the_root_and_the_paths_may_hold_blanks(tmp_path, picture):
    root = tree(tmp_path / "my data" / "Office Home", picture, "Real World", 3)
    lists(root, "./Real World", "Real_World", 3, 2)
    assert len(open_dataset(f"office-home:{root}?domain=Rw@test")) == 3


def test_lists_may_lie_in_a_folder_or_start_at_the_class(tmp_path, picture):
    root = tree(tmp_path / "data", picture)
    away = tmp_path / "lists of the paper"
    away.mkdir()
    lists(away, "OfficeHome/Clipart", "Clipart")
    assert len(open_dataset(f"office-home:{root}?domain=Cl&lists={away}@test")) == 9
    (root / "image_list").mkdir()
    for part in ("training", "testing"):
        text = (away / f"Clipart_{part}.txt").read_text().replace("OfficeHome/Clipart/", "")
        (root / "image_list" / f"Clipart_{part}.txt").write_text(text)
    assert len(open_dataset(f"office-home:{root}?domain=Cl@train")) == 21


def test_without_lists_each_class_is_split_seven_to_three(tmp_path, picture):
    tree(tmp_path, picture, n=15, spelled=lambda name: name.replace("_", " ").lower())
    parts = {s: open_dataset(f"office-home:{tmp_path}?domain=Cl@{s}") for s in ("train", "test")}
    assert np.bincount(parts["train"].labels)[[1, 17, 33]].tolist() == [10, 10, 10]
    assert np.bincount(parts["test"].labels)[[1, 17, 33]].tolist() == [5, 5, 5]
    assert not set(parts["train"].ids) & set(parts["test"].ids)
    again = open_dataset(f"office-home:{tmp_path}?domain=Cl@test")
    assert again.ids == parts["test"].ids
    assert len(open_dataset(f"office-home:{tmp_path}?domain=Cl")) == 45


def test_lists_can_be_left_aside(tmp_path, picture):
    tree(tmp_path, picture, n=10)
    lists(tmp_path, "Clipart", "Clipart")
    assert len(open_dataset(f"office-home:{tmp_path}?domain=Cl&lists=none")) == 30


def test_the_labels_fit_the_reference_split(tmp_path, picture):
    data = open_dataset(f"office-home:{tree(tmp_path, picture, n=2)}")
    split = official_split("ar-30").for_classes(data.classes)
    assert split.classes == tuple(data.classes)
    assert {"Alarm_Clock", "Exit_Sign"} <= set(split.seen)
    assert "ToothBrush" in split.absent


def test_other_counts_than_the_published_ones_are_a_warning(tmp_path, picture, caplog):
    with caplog.at_level(logging.WARNING):
        open_dataset(f"office-home:{tree(tmp_path, picture, n=2)}?domain=Cl@all")
    assert str(sum(COUNTS["Cl"].values())) in caplog.text


@pytest.mark.parametrize(
    "spec, message",
    [
        ("?domain=Xx@train", "unknown domain in ?domain=: 'Xx'"),
        ("?domain=Pr@train", "domain folder is missing"),
        ("?domain=Cl", "several splits and none chosen"),
        ("?domain=Cl@val", "unknown split"),
        ("?domian=Cl@train", "did you mean domain?"),
        ("?domain=Cl&lists=nowhere@train", "no such folder of lists in ?lists=: nowhere"),
    ],
)
def test_wrong_specs_name_the_option(tmp_path, picture, spec, message):
    tree(tmp_path, picture, n=2)
    lists(tmp_path, "Clipart", "Clipart", 2, 1)
    with pytest.raises(UserError) as error:
        open_dataset(f"office-home:{tmp_path}{spec}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("Clipart/Exit_Sign/00001.jpg", "no label at the end in {table}, line 2"),
        ("Clipart/Exit_Sign/00001.jpg 65", "label out of range in {table}, line 2: 65; labels are 0 to 64"),
        ("Clipart/Exit_Sign/00001.jpg 2", "label and class folder disagree in {table}, line 2"),
        ("Clipart/Alarm_Clock/00001.jpg 33", "image listed twice in {table}, line 2"),
    ],
)
def test_wrong_lines_of_a_list_are_named(tmp_path, picture, line, message):
    tree(tmp_path, picture, n=2)
    lists(tmp_path, "Clipart", "Clipart", 2, 1)
    table = tmp_path / "Clipart_training.txt"
    table.write_text(f"Clipart/Alarm_Clock/00001.jpg 33\n{line}\n")
    with pytest.raises(UserError) as error:
        open_dataset(f"office-home:{tmp_path}?domain=Cl@train")
    assert str(error.value).startswith(message.format(table=table))


def test_missing_pieces_are_named(tmp_path, picture):
    with pytest.raises(UserError, match="not a folder of Office-Home"):
        open_dataset(f"office-home:{tmp_path}")
    tree(tmp_path, picture, n=2)
    picture(tmp_path / "Art" / "Bike" / "00001.jpg")
    with pytest.raises(UserError, match=r"several domains.*\?domain=Ar, \?domain=Cl"):
        open_dataset(f"office-home:{tmp_path}")
    (tmp_path / "Art" / "Byke").mkdir()
    with pytest.raises(UserError, match=r"unknown class in .*Art: 'Byke'; did you mean Bike"):
        open_dataset(f"office-home:{tmp_path}?domain=Ar")
    (tmp_path / "Art" / "Byke").rename(tmp_path / "Art" / "Fan")
    with pytest.raises(UserError, match=r"class without images.*Fan"):
        open_dataset(f"office-home:{tmp_path}?domain=Ar")
    lists(tmp_path, "Clipart", "Clipart", 2, 1)
    (tmp_path / "Clipart_testing.txt").unlink()
    with pytest.raises(UserError, match=r"image list is missing: .*Clipart_testing.txt"):
        open_dataset(f"office-home:{tmp_path}?domain=Cl@train")
    lists(tmp_path, "elsewhere", "Clipart", 9, 3)
    (tmp_path / "Clipart_training.txt").write_text("other/dir/7.jpg 3\n")
    with pytest.raises(UserError, match=r"images of the list not found in .*Clipart_training.txt"):
        open_dataset(f"office-home:{tmp_path}?domain=Cl@train")


def test_an_image_in_both_lists_is_refused(tmp_path, picture):
    tree(tmp_path, picture, n=2)
    lists(tmp_path, "Clipart", "Clipart", 2, 1)
    test = tmp_path / "Clipart_testing.txt"
    test.write_text(test.read_text() + "Clipart/Alarm_Clock/00001.jpg 33\n")
    with pytest.raises(UserError, match=r"image in both lists in .*testing.txt, line 4"):
        open_dataset(f"office-home:{tmp_path}?domain=Cl@all")


def test_a_corrupt_picture_keeps_its_label_and_names_its_file(tmp_path, picture):
    tree(tmp_path, picture, n=2)
    (tmp_path / "Clipart" / "Exit_Sign" / "00001.jpg").write_bytes(b"\xff\xd8 no jpeg")
    data = open_dataset(f"office-home:{tmp_path}?domain=Cl")
    bad = data.ids.index("Clipart/Exit_Sign/00001.jpg")
    with pytest.raises(UserError, match=r"Exit_Sign/00001.jpg"):
        data[bad]
    assert data.labels[bad] == 1
    assert data[bad + 1].label == 1
