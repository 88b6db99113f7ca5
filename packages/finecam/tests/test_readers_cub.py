import numpy as np
import pytest
import torch
from finecam.readers import register_readers
from finecam.readers.cub import attribute_matrix
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


def grey(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def cub(tmp_path):
    root = tmp_path / "CUB_200_2011"
    names = ["002.Laysan_Albatross/Laysan_1.jpg", "001.Black_Tern/Tern_1.jpg", "001.Black_Tern/Tern 2.jpg"]
    for name in names:
        picture(root / "images" / name)
    write(root / "images.txt", "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    write(root / "image_class_labels.txt", "1 2\n2 1\n3 1\n")
    write(root / "train_test_split.txt", "1 1\n2 0\n3 1\n")
    write(root / "classes.txt", "1 001.Black_Tern\n2 002.Laysan_Albatross\n")
    write(root / "bounding_boxes.txt", "1 10.0 5.0 40.0 30.0\n2 1.5 2.5 20.0 10.0\n3 0.0 0.0 60.0 40.0\n")
    write(root / "parts/parts.txt", "1 back\n2 left eye\n3 tail\n")
    write(
        root / "parts/part_locs.txt",
        "1 1 30.0 20.0 1\n1 2 0.0 0.0 0\n1 3 12.5 8.0 1\n"
        + "".join(f"{i} {p} 5.0 6.0 {v}\n" for i, p, v in [(2, 1, 0), (2, 2, 1), (2, 3, 0), (3, 1, 0), (3, 2, 0)]),
    )
    write(tmp_path / "attributes.txt", "1 has_bill_shape::curved_(up_or_down)\n2 has_wing_color::red\n")
    write(
        root / "attributes/image_attribute_labels.txt",
        "1 1 0 3 27.7080\n1 2 1 4 27.7080\n2 1 1 3 0 5.0000\n2 2 0 1 1.1\n3 1 1 2 1.0\n3 2 1 3 2.0\n",
    )
    return root


def test_cub(cub):
    dataset = open_dataset(f"cub:{cub}@all")
    assert dataset.classes == ["Black_Tern", "Laysan_Albatross"]
    assert dataset.labels.tolist() == [1, 0, 0]
    assert dataset.ids[2] == "001.Black_Tern/Tern 2.jpg"
    sample = dataset[0]
    assert sample.meta["box"] == (10.0, 5.0, 50.0, 35.0)
    assert sample.meta["parts"] == {"back": (30.0, 20.0), "tail": (12.5, 8.0)}, "invisible parts are left out"
    assert dataset.meta_of(1)["parts"] == {"left eye": (5.0, 6.0)}
    assert "mask" not in sample.meta and "attributes" not in sample.meta
    assert dataset[2].meta["parts"] == {} and "part_masks" not in dataset[2].meta


def test_cub_part_discs_have_a_twentieth_of_the_box(cub):
    meta = open_dataset(f"cub:{cub}@all")[0].meta
    assert meta["part_radius"] == pytest.approx(0.05 * 40)
    mask = meta["part_masks"]["back"]
    y, x = np.mgrid[:40, :60] + 0.5
    assert mask.shape == (40, 60) and np.array_equal(mask, (x - 30) ** 2 + (y - 20) ** 2 <= 4)
    assert mask.sum() == 12
    assert set(meta["part_masks"]) == {"back", "tail"}


def test_cub_splits(cub):
    assert open_dataset(f"cub:{cub}@train").ids == ["002.Laysan_Albatross/Laysan_1.jpg", "001.Black_Tern/Tern 2.jpg"]
    assert open_dataset(f"cub:{cub.parent}", split="test").labels.tolist() == [0], "the folder above is found as well"
    with pytest.raises(UserError, match="several splits"):
        open_dataset(f"cub:{cub}")
    with pytest.raises(UserError, match="unknown split"):
        open_dataset(f"cub:{cub}@val")


@pytest.mark.parametrize("inside", [False, True])
def test_cub_attributes_above_or_inside_and_lines_with_six_fields(cub, inside):
    if inside:
        (cub.parent / "attributes.txt").rename(cub / "attributes" / "attributes.txt")
    dataset = open_dataset(f"cub:{cub}@all?attributes=1")
    curved, red = "has_bill_shape::curved_(up_or_down)", "has_wing_color::red"
    assert [dataset.meta_of(i)["attributes"] for i in range(3)] == [{red: 4}, {curved: 3}, {curved: 2, red: 3}]
    assert attribute_matrix(dataset, [red, curved]).tolist() == [[4, 0], [0, 3], [3, 2]]


def test_cub_segmentation_is_the_majority_of_annotators(cub):
    values = np.zeros((40, 60))
    values[10:20, 10:30] = 255
    values[20:25, 10:30] = 102  # two of five annotators
    values[25:30, 10:30] = 153  # three of five
    for name in ("002.Laysan_Albatross/Laysan_1", "001.Black_Tern/Tern_1", "001.Black_Tern/Tern 2"):
        grey(cub / "segmentations" / f"{name}.png", values)
    assert np.array_equal(open_dataset(f"cub:{cub}@train")[0].meta["mask"], values >= 128)


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("images.txt", "2 001", "x 001", r"not a number in .*images\.txt, line 2: 'x'"),
        ("images.txt", "2 001", "1 001", r"image id given twice in .*images\.txt, line 2: 1"),
        ("images.txt", "1 002.Laysan_Albatross/Laysan_1.jpg", "1", r"expected 2 fields in .*images\.txt, line 1"),
        (
            "image_class_labels.txt",
            "2 1",
            "2 9",
            r"class is not in classes\.txt in .*image_class_labels\.txt, line 2: 9",
        ),
        ("image_class_labels.txt", "3 1\n", "", r"image without an entry in .*image_class_labels\.txt: id 3"),
        ("image_class_labels.txt", "3 1", "7 1", r"image id is not in images\.txt in .*labels\.txt, line 3: 7"),
        ("train_test_split.txt", "2 0\n", "", r"image without an entry in .*train_test_split\.txt: id 2"),
        ("bounding_boxes.txt", "1.5 2.5 20.0", "1.5 20.0", r"expected 5 fields in .*bounding_boxes\.txt, line 2"),
        ("bounding_boxes.txt", "1.5", "wide", r"not a number in .*bounding_boxes\.txt, line 2: 'wide'"),
        ("bounding_boxes.txt", "20.0 10.0", "0.0 10.0", r"empty box in .*bounding_boxes\.txt, line 2"),
        ("parts/part_locs.txt", "2 3 5.0", "2 8 5.0", r"part is not in parts\.txt in .*part_locs\.txt, line 6: 8"),
        ("parts/part_locs.txt", "12.5", "nan", r"not a number in .*part_locs\.txt, line 3: 'nan'"),
        ("classes.txt", "002.Laysan_Albatross", "002.Black_Tern", "duplicate class name"),
        (
            "attributes/image_attribute_labels.txt",
            "2 1 1 3 0",
            "2 5 1 3 0",
            r"attribute is not .*labels\.txt, line 3: 5",
        ),
    ],
)
def test_cub_malformed_lines_are_named(cub, file, old, new, says):
    replace(cub / file, old, new)
    with pytest.raises(UserError, match=says):
        open_dataset(f"cub:{cub}@all?attributes=1")


def test_cub_missing_files(cub, tmp_path):
    with pytest.raises(UserError, match=r"not a folder of this dataset.*images\.txt"):
        open_dataset(f"cub:{cub / 'images'}")
    (cub / "bounding_boxes.txt").unlink()
    with pytest.raises(UserError, match=r"file of the dataset is missing: .*bounding_boxes\.txt"):
        open_dataset(f"cub:{cub}@all")
    with pytest.raises(UserError, match="unknown option"):
        open_dataset(f"cub:{cub}@all?atributes=1")


def test_cub_streams_through_workers_and_survives_a_bad_file(cub):
    (cub / "images/001.Black_Tern/Tern_1.jpg").write_bytes(b"no")
    errors = []
    batches = list(
        loader(open_dataset(f"cub:{cub}@all"), VIEW, 2, workers=1, on_error=lambda i, name, e: errors.append(name))
    )
    assert errors == ["001.Black_Tern/Tern_1.jpg"]
    assert torch.cat([i for i, _, _ in batches]).tolist() == [0, 2]
    assert batches[0][2][0].meta["part_masks"]["tail"].any()
