import pytest
from ft_calibrate.class_names import (
    IMAGENET_NAMES,
    ClassNames,
    distinct_names,
    imagenet_classes,
    imagenet_translation,
    match_columns,
)
from ft_calibrate.splits import official_split
from timm.data import ImageNetInfo
from vfm_core.errors import UserError


@pytest.fixture(scope="module")
def timm_names() -> list[str]:
    """What timm models call their columns; two different classes are called "crane"."""
    info = ImageNetInfo()
    names = [info.index_to_description(i) for i in range(1000)]
    assert names.count("crane") == 2
    return names


@pytest.mark.parametrize("kind", IMAGENET_NAMES)
def test_imagenet_names_are_distinct_and_in_order(kind):
    names = imagenet_classes(kind)
    assert len(set(names)) == len(names) == 1000
    assert names[1] == {"wnid": "n01443537", "description": "goldfish, Carassius auratus", "short": "goldfish"}[kind]


def test_imagenet_columns_are_found_by_names_that_repeat(timm_names):
    for kind in IMAGENET_NAMES:
        assert match_columns(imagenet_classes(kind), timm_names) == list(range(1000))
        assert match_columns(timm_names, imagenet_classes(kind)) == list(range(1000))
    part = [imagenet_classes()[i] for i in (517, 3, 134)]
    assert match_columns(part, timm_names) == [517, 3, 134]


@pytest.mark.parametrize("kind", ["description", "short", "number", "distinct"])
def test_imagenet_splits_fit_models_that_name_classes_otherwise(kind, timm_names):
    if kind == "number":
        names = [f"class {i}" for i in range(1000)]
    else:
        names = distinct_names(timm_names) if kind == "distinct" else imagenet_classes(kind)
    split = official_split("imagenet-r")
    assert split.for_classes(names).columns == split.columns


def test_repeated_names_are_told_apart(timm_names):
    names = distinct_names(timm_names)
    assert len(set(names)) == 1000
    assert (names[134], names[517]) == ("crane (n02012849)", "crane (n03126707)")
    assert [a for a, b in zip(names, timm_names, strict=True) if a != b] == [names[134], names[517]]
    assert imagenet_translation(names)["n03126707"] == names[517]
    assert distinct_names(["a", "b", "a"]) == ["a (0)", "b", "a (2)"]
    assert distinct_names([]) == []


def test_translation_leaves_out_what_is_not_there():
    assert imagenet_translation(["goldfish", "zorilla"]) == {"n01443537": "goldfish"}


def test_matching_columns():
    assert match_columns(["Dog", "sea_lion"], ["x", "sea lion", "dog"]) == [2, 1]
    assert match_columns(["dog", "newt"], ["dog"]) == [0, None]
    ten = imagenet_classes("description")[5:15]
    assert match_columns(ten, imagenet_classes()) == list(range(5, 15))
    assert match_columns(imagenet_classes()[3:5], ten) == [None, None]
    assert match_columns(["a", "a"], ["a", "a"]) == [0, 1]
    assert match_columns(["Dog", "cat"], ["cat, house cat", "dog, hound"]) == [1, 0]
    assert match_columns(["Tench", "Great_White Shark"], imagenet_classes("description")) == [0, 2]


def test_a_cardigan_to_wear_is_no_cardigan_that_barks():
    columns = imagenet_classes("description")
    assert match_columns(["Cardigan"], columns) == [264] and match_columns(["cardigan"], columns) == [474]
    assert match_columns(["Cardigan"], ["shirt", "cardigan"]) == [1]  # where there is no dog


def test_names_are_found_as_people_spell_them():
    names = ClassNames(["Real_World", "A", "a", "b"], "list.txt")
    assert [names.get(n) for n in ("real world", "REAL-WORLD", "A", "a", "B")] == ["Real_World"] * 2 + ["A", "a", "b"]
    assert names.get("a ") is None  # could be either
    assert names.find("3") == "b"
    with pytest.raises(UserError, match=r"unknown class in list.txt: 'real word'; did you mean Real_World"):
        names.find("real word")
