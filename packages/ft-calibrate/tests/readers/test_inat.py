import json
from pathlib import Path

import pytest
from vfm_core.data import open_dataset
from vfm_core.errors import UserError

CATEGORIES = [
    {"id": 7, "name": "Boletus edulis", "common_name": "Porcini", "supercategory": "Fungi"},
    {"id": 3, "name": "Amanita muscaria", "common_name": "Fly Agaric", "supercategory": "Fungi"},
    {"id": 5, "name": "Parus major", "common_name": "Great Tit", "supercategory": "Birds"},
    {"id": 9, "name": "Amanita regalis", "common_name": "Fly Agaric", "supercategory": "Fungi"},
]
LABELS = {"val": [7, 5, 3, 7], "train_mini": [3, 3, 9, 5, 7]}


def tree(root: Path, picture, **changes) -> Path:
    for split, categories in LABELS.items():
        images, annotations = [], []
        for i, category in enumerate(categories):
            name = f"{split}/{category:05d}_x/{i}.jpg"
            picture(root / name, 10 * i)
            images.append({"id": 100 + i, "file_name": name, "width": 8, "height": 6, "date": f"2020-01-0{i + 1}"})
            annotations.append({"id": i, "image_id": 100 + i, "category_id": category})
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES, "info": {"year": 2021}}
        (root / f"{split}.json").write_text(json.dumps({**content, **changes}))
    return root


def test_a_supercategory_keeps_its_classes_in_the_order_of_their_ids(tmp_path, picture):
    data = open_dataset(f"inat:{tree(tmp_path, picture)}@val?supercategory=Fungi")
    assert data.classes == ["Amanita muscaria", "Boletus edulis", "Amanita regalis"]
    assert data.labels.tolist() == [1, 0, 1]
    assert data.ids == ["val/00007_x/0.jpg", "val/00003_x/2.jpg", "val/00007_x/3.jpg"]
    assert data[1].meta["time"] == "2020-01-03"
    assert data[1].image.size == (8, 6)
    mini = open_dataset(f"inat:{tmp_path}?supercategory=fungi@train_mini")
    assert mini.labels.tolist() == [0, 0, 2, 1]
    assert mini.classes == data.classes


def test_all_supercategories_and_common_names(tmp_path, picture):
    data = open_dataset(f"inat:{tree(tmp_path, picture)}@val?names=common")
    shared = ["Fly Agaric (Amanita muscaria)", "Fly Agaric (Amanita regalis)"]
    assert data.classes == [shared[0], "Great Tit", "Porcini", shared[1]]
    assert data.labels.tolist() == [2, 1, 0, 2]


def test_a_file_or_a_year_in_its_name(tmp_path, picture):
    tree(tmp_path, picture)
    (tmp_path / "val.json").rename(tmp_path / "2021_val.json")
    assert len(open_dataset(f"inat:{tmp_path}@val")) == 4
    assert len(open_dataset(f"inat:{tmp_path / '2021_val.json'}?supercategory=Birds")) == 1
    with pytest.raises(UserError, match="a single file has no splits"):
        open_dataset(f"inat:{tmp_path / 'train_mini.json'}@val")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("", "several splits and none chosen"),
        ("@all", "reads one split at a time"),
        ("@train", "did you mean train_mini"),
        ("@val?supercategory=Fungus", "unknown supercategory in {root}/val.json: 'Fungus'"),
        ("@val?names=latin", "unknown kind of names"),
    ],
)
def test_wrong_specs_are_refused(tmp_path, picture, spec, message):
    tree(tmp_path, picture)
    with pytest.raises(UserError) as error:
        open_dataset(f"inat:{tmp_path}{spec}")
    assert message.format(root=tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"categories": None}, "no list 'categories'"),
        ({"annotations": [{"image_id": 100}]}, "no category_id in {table}, annotations[0]"),
        ({"annotations": [{"image_id": 100, "category_id": 8}]}, "unknown category_id in {table}, annotations[0]: 8"),
        ({"annotations": [{"image_id": 100, "category_id": 7}] * 2}, "picture annotated twice"),
        ({"annotations": [{"image_id": 1, "category_id": 7}]}, "annotation of a picture that is not listed"),
        ({"images": [{"id": 100}]}, "no file_name in {table}, images[0]"),
        ({"categories": [CATEGORIES[0]] * 2}, "category given twice"),
    ],
)
def test_malformed_files_name_the_place(tmp_path, picture, changes, message):
    tree(tmp_path, picture, **changes)
    with pytest.raises(UserError) as error:
        open_dataset(f"inat:{tmp_path}@val")
    assert message.format(table=tmp_path / "val.json") in str(error.value)


def test_missing_things_are_named(tmp_path, picture):
    with pytest.raises(UserError, match="no annotations of iNaturalist 2021"):
        open_dataset(f"inat:{tmp_path}")
    tree(tmp_path, picture)
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"pictures of the annotations not found.*val/00007_x/0.jpg"):
        open_dataset(f"inat:{tmp_path}@val")
