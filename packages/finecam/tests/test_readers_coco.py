import json

import numpy as np
import pytest
from finecam.readers import register_readers
from finecam.readers.coco import decode_rle, fill_polygon
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from PIL import Image
from vfm_core.data import loader, open_dataset
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

VIEW = Preprocess(size=(8, 8), resize="squash")


@pytest.fixture(autouse=True)
def readers():
    register_readers()


def picture(path, size=(60, 40), colour=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def runs_of(mask):
    """Run lengths down the columns, by a plain loop."""
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return [int(r) for r in runs]


def compressed(runs):
    """COCO's compressed form, after the published description."""
    text = ""
    for i, run in enumerate(runs):
        x = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits, x = x & 0x1F, x >> 5
            more = x != -1 if bits & 0x10 else x != 0
            text += chr((bits | 0x20 if more else bits) + 48)
    return text


@pytest.fixture
def coco(tmp_path):
    for name in ("train2017/a.jpg", "train2017/b.jpg", "train2017/c.jpg", "val2017/d.jpg"):
        picture(tmp_path / name)
    blob = np.zeros((40, 60), dtype=bool)
    blob[5:20, 30:50] = True
    square = [10, 10, 20, 10, 20, 20, 10, 20]
    content = {
        "images": [
            {"id": i, "file_name": f"{n}.jpg", "width": 60, "height": 40} for i, n in ((7, "a"), (3, "b"), (5, "c"))
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"image_id": 7, "category_id": 18, "bbox": [10, 10, 10, 10], "area": 100, "segmentation": [square]},
            {
                "image_id": 7,
                "category_id": 18,
                "bbox": [30, 5, 20, 15],
                "area": 300,
                "segmentation": {"size": [40, 60], "counts": compressed(runs_of(blob))},
            },
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 15, 15], "segmentation": []},
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 60, 40], "iscrowd": 1, "area": 2400},
            {"image_id": 3, "category_id": 2, "bbox": [1, 2, 3, 4]},
        ],
    }
    write(tmp_path / "annotations/instances_train2017.json", json.dumps(content))
    other = content | {"images": [{"id": 1, "file_name": "d.jpg", "width": 60, "height": 40}], "annotations": []}
    write(tmp_path / "annotations/instances_val2017.json", json.dumps(other))
    return tmp_path


def test_coco_label_boxes_and_masks(coco):
    dataset = open_dataset(f"coco:{coco}@train")
    assert dataset.classes == ["cat", "dog"] and dataset.labels.tolist() == [1, 0, -1]
    meta = dataset[0].meta
    assert meta["box"] == (10.0, 5.0, 50.0, 20.0)
    assert [c for c, _ in meta["boxes"]] == ["dog", "dog", "cat"], "the crowd does not count"
    expected = np.zeros((40, 60), dtype=bool)
    expected[10:20, 10:20] = expected[5:20, 30:50] = True
    assert np.array_equal(meta["mask"], expected)
    assert dataset[1].meta == {"box": (1.0, 2.0, 4.0, 6.0), "boxes": [("cat", (1.0, 2.0, 4.0, 6.0))]}
    assert dataset[2].meta == {} and dataset[2].label is None
    assert next(iter(loader(dataset, VIEW, workers=1)))[2][0].meta["mask"].sum() == 400


def test_coco_places(coco):
    table = coco / "annotations/instances_train2017.json"
    assert open_dataset(f"coco:{table}").ids == ["a.jpg", "b.jpg", "c.jpg"]
    assert open_dataset(f"coco:{coco}@val").ids == ["d.jpg"]
    with pytest.raises(UserError, match="several splits"):
        open_dataset(f"coco:{coco}")
    with pytest.raises(UserError, match="one split at a time"):
        open_dataset(f"coco:{coco}@all")
    (coco / "train2017").rename(coco / "pictures")
    with pytest.raises(UserError, match=r"images of the annotations not found.*\?images="):
        open_dataset(f"coco:{table}")
    assert len(open_dataset(f"coco:{table}?images=../pictures")) == 3
    with pytest.raises(UserError, match="no such image"):
        open_dataset(f"coco:{table}?images=../elsewhere")
    write(coco / "train/_annotations.coco.json", table.read_text())
    (coco / "pictures/a.jpg").rename(coco / "train/a.jpg")
    (coco / "annotations").rename(coco / "old")
    assert open_dataset(f"coco:{coco}")[0].label == 1


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"images": [', '"images": [,', r"malformed JSON in .*\.json, line 1"),
        ('"images"', '"pictures"', "no list 'images'"),
        ('"width": 60, "height": 40}', '"width": 60}', r"no height in .*images\[0\]"),
        ('"bbox": [10, 10, 10, 10]', '"box": 1', r"no bbox in .*annotations\[0\]"),
        ('"bbox": [10, 10, 10, 10]', '"bbox": [10, 10, 10]', r"bbox is not four numbers in .*annotations\[0\]"),
        ('"bbox": [10, 10, 10, 10]', '"bbox": [10, 10, 0, 10]', r"empty box in .*annotations\[0\]"),
        ('"image_id": 3', '"image_id": 99', r"unknown image_id in .*annotations\[4\]: 99"),
        ('"category_id": 18', '"category_id": 17', r"unknown category_id in .*annotations\[0\]: 17"),
        ('"name": "dog"', '"name": "cat"', "category given twice"),
    ],
)
def test_coco_malformed_annotations_are_named(coco, old, new, says):
    table = coco / "annotations/instances_train2017.json"
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=says):
        open_dataset(f"coco:{table}")


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"size": [40, 60], "counts": [5, 5]}, "runs cover 10 of 2400 pixels"),
        ({"size": [60, 40], "counts": [2400]}, "size"),
        ({"size": [40, 60], "counts": "o"}, "end too early"),
        ({"counts": [2400]}, "malformed segmentation"),
        ([[1, 2, 3]], "malformed segmentation"),
        ([["a", "b"]], "malformed segmentation"),
    ],
)
def test_coco_malformed_segmentation_is_named(coco, shape, says):
    table = coco / "annotations/instances_train2017.json"
    content = json.loads(table.read_text())
    content["annotations"][0]["segmentation"] = shape
    table.write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        open_dataset(f"coco:{table}")[0]


def test_coco_picture_of_another_size(coco):
    picture(coco / "train2017/a.jpg", (40, 60))
    with pytest.raises(UserError, match=r"image and annotation differ in size in a\.jpg: 40x60, annotated as 60x40"):
        open_dataset(f"coco:{coco}@train")[0]


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), h=st.integers(1, 40), w=st.integers(1, 40), share=st.floats(0, 1))
def test_run_lengths_round_trip(seed, h, w, share):
    mask = np.random.default_rng(seed).random((h, w)) < share
    runs = runs_of(mask)
    assert np.array_equal(decode_rle(runs, (h, w)), mask)
    assert np.array_equal(decode_rle(compressed(runs), (h, w)), mask)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 8))
def test_polygons_equal_a_point_in_polygon_test(seed, n):
    points = np.random.default_rng(seed).uniform(-5, 25, (n, 2))
    angle = np.arctan2(*(points - points.mean(0)).T[::-1])
    points = points[np.argsort(angle)]  # a simple outline, for which every rule agrees
    y, x = np.mgrid[:18, :22] + 0.5
    expected = Outline(points).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(18, 22)
    assert np.array_equal(fill_polygon(points, (18, 22)), expected)
