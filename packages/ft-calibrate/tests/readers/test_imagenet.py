from pathlib import Path

import numpy as np
import pytest
from ft_calibrate.class_names import imagenet_classes
from ft_calibrate.readers import choose_rows, imagenet
from ft_calibrate.splits import official_split
from vfm_core.data import open_dataset
from vfm_core.errors import UserError

WNIDS = {"n01443537": 1, "n01484850": 2, "n02395406": 341}  # goldfish, great white shark, hog
STYLES = ("art", "cartoon", "sketch", "deviantart", "toy")


def tree(root: Path, picture, n: int = 10, name: str = "{style}_{i}.jpg") -> Path:
    for wnid in WNIDS:
        for i in range(n):
            picture(root / wnid / name.format(style=STYLES[i % len(STYLES)], i=i), i)
    return root


def test_labels_are_ilsvrc_indices_in_a_list_of_1000(tmp_path, picture):
    data = open_dataset(f"imagenet-r:{tree(tmp_path, picture)}")
    assert len(data.classes) == 1000
    assert len(set(data.classes)) == 1000
    assert sorted(set(data.labels.tolist())) == [1, 2, 341]
    for name, label in zip(data.ids, data.labels, strict=True):
        assert WNIDS[Path(name).parent.name] == label
        assert data.classes[label] == Path(name).parent.name
    assert data[0].meta["style"] in STYLES


def test_splits_are_eight_to_two_per_class(tmp_path, picture):
    tree(tmp_path / "imagenet-r", picture, 14)
    train, test = (open_dataset(f"imagenet-r:{tmp_path}@{s}") for s in ("train", "test"))
    assert np.bincount(test.labels)[[1, 2, 341]].tolist() == [2, 2, 2]  # a fifth of 14, rounded down
    assert np.bincount(train.labels)[[1, 2, 341]].tolist() == [12, 12, 12]
    assert not set(train.ids) & set(test.ids)
    assert open_dataset(f"imagenet-r:{tmp_path}@test").ids == test.ids


def test_classes_may_carry_other_names(tmp_path, picture):
    tree(tmp_path, picture, 1)
    short = open_dataset(f"imagenet-r:{tmp_path}?names=short@all")
    assert [short.classes[i] for i in (1, 2, 341)] == ["goldfish", "great white shark", "hog"]
    described = open_dataset(f"imagenet-r:{tmp_path}?names=description")
    assert described.classes[1] == "goldfish, Carassius auratus"
    assert len(set(short.classes)) == len(set(described.classes)) == 1000
    split = official_split("imagenet-r")
    assert split.for_classes(short.classes).columns == split.columns


def test_sketch_keeps_ten_test_pictures_of_each_class(tmp_path, picture):
    tree(tmp_path / "sketch", picture, 13, "sketch_{i}.JPEG")
    train, test = (open_dataset(f"imagenet-sketch:{tmp_path}@{s}") for s in ("train", "test"))
    assert np.bincount(test.labels)[[1, 2, 341]].tolist() == [10, 10, 10]
    assert np.bincount(train.labels)[[1, 2, 341]].tolist() == [3, 3, 3]
    assert not set(train.ids) & set(test.ids)
    assert len(open_dataset(f"imagenet-sketch:{tmp_path}")) == 39
    assert test[0].image.mode == "RGB"


def test_sketch_refuses_classes_that_are_too_small(tmp_path, picture):
    tree(tmp_path, picture, 10, "sketch_{i}.JPEG")
    with pytest.raises(UserError, match=r"too few pictures in a class.*n01443537 has 10.*use @all"):
        open_dataset(f"imagenet-sketch:{tmp_path}@train")


def test_a_list_takes_the_place_of_the_split(tmp_path, picture):
    tree(tmp_path / "imagenet-r", picture, 2)
    table = tmp_path / "test.txt"
    table.write_text("imagenet-r/n01443537/art_0.jpg 1\nimagenet-r/n02395406/cartoon_1.jpg 341\n")
    data = open_dataset(f"imagenet-r:{tmp_path}?list=test.txt")
    assert data.labels.tolist() == [1, 341]
    assert data[1].image.size == (8, 6)
    table.write_text("imagenet-r/n01443537/art_0.jpg 0\n")
    with pytest.raises(UserError, match=r"disagree in .*test.txt, line 1: .*n01440764.*ILSVRC indices"):
        open_dataset(f"imagenet-r:{tmp_path}?list=test.txt")
    with pytest.raises(UserError, match="a list has no splits"):
        open_dataset(f"imagenet-r:{tmp_path}?list=test.txt@test")
    with pytest.raises(UserError, match="no such image list"):
        open_dataset(f"imagenet-r:{tmp_path}?list=else.txt")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("@val", "unknown split"),
        ("?names=latin", "unknown kind of names in ?names=: 'latin'"),
        ("?style=art", "unknown option"),
    ],
)
def test_wrong_specs_are_refused(tmp_path, picture, spec, message):
    tree(tmp_path, picture, 1)
    with pytest.raises(UserError) as error:
        open_dataset(f"imagenet-r:{tmp_path}{spec}")
    assert message in str(error.value)


def test_folders_that_are_no_class_are_refused(tmp_path, picture):
    with pytest.raises(UserError, match=r"not a folder of this dataset.*WordNet"):
        open_dataset(f"imagenet-r:{tmp_path}")
    tree(tmp_path, picture, 1)
    picture(tmp_path / "n99999999" / "art_0.jpg")
    with pytest.raises(UserError, match=r"no ILSVRC class in .*: n99999999"):
        open_dataset(f"imagenet-r:{tmp_path}")
    (tmp_path / "n99999999" / "art_0.jpg").unlink()
    (tmp_path / "n99999999").rename(tmp_path / "n01494475")
    with pytest.raises(UserError, match=r"class without images.*n01494475"):
        open_dataset(f"imagenet-r:{tmp_path}")


def test_the_rounding_is_that_of_the_published_sizes():
    """Class sizes of ImageNet-R are not at hand, but its 5924 of 30000 are only met when tests are rounded down."""
    sizes = np.random.default_rng(0).integers(51, 249, 200)
    labels = np.repeat(np.arange(200), sizes)
    published = imagenet.COUNTS["ImageNet-R"]
    test = len(choose_rows(labels, "test", "ImageNet-R", train=0.8, round_up="train"))
    assert abs(test / len(labels) - published["test"] / sum(published.values())) < 0.001
    up = len(choose_rows(labels, "test", "ImageNet-R", train=0.8))
    assert abs(up / len(labels) - published["test"] / sum(published.values())) > 0.002


def test_wordnet_ids_are_in_ilsvrc_order():
    assert imagenet_classes()[0] == "n01440764"
    assert imagenet_classes()[341] == "n02395406"
    assert imagenet_classes()[999] == "n15075141"
    with pytest.raises(UserError, match="unknown kind of ImageNet names"):
        imagenet_classes("latin")
