import numpy as np
import pytest
from finecam.readers import register_readers
from PIL import Image
from scipy.io import savemat
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
def pet(tmp_path):
    root = tmp_path / "oxford-iiit-pet"
    for name in ("Abyssinian_100", "american_bulldog_10", "Abyssinian_2"):
        picture(root / f"images/{name}.jpg")
    write(root / "annotations/trainval.txt", "Abyssinian_100 1 1 1\namerican_bulldog_10 2 2 1\n")
    write(root / "annotations/test.txt", "Abyssinian_2 1 1 1\n")
    trimap = np.full((40, 60), 2)
    trimap[8:32, 18:42] = 3
    trimap[10:30, 20:40] = 1
    grey(root / "annotations/trimaps/Abyssinian_100.png", trimap)
    grey(root / "annotations/trimaps/._Abyssinian_2.png", trimap)
    return root


def test_pet(pet):
    dataset = open_dataset(f"pet:{pet}@trainval")
    assert dataset.classes == ["Abyssinian", "american_bulldog"] and dataset.labels.tolist() == [0, 1]
    mask = dataset[0].meta["mask"]
    assert mask.sum() == 400 and mask[10:30, 20:40].all(), "1 is the pet, not its border"
    assert dataset[0].meta["species"] == "cat" and dataset[1].meta == {"species": "dog"}
    test = open_dataset(f"pet:{pet.parent}@test")
    assert test.classes == dataset.classes and "mask" not in test[0].meta
    with pytest.raises(UserError, match="several splits"):
        open_dataset(f"pet:{pet}")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("american_bulldog_10 2 2 1", "american_bulldog_10 2 2", r"expected 4 fields in .*trainval\.txt, line 2"),
        ("10 2 2 1", "10 two 2 1", r"not a number in .*trainval\.txt, line 2: 'two'"),
        ("10 2 2 1", "10 2 3 1", r"malformed entry in .*trainval\.txt, line 2"),
        ("10 2 2 1", "10 1 2 1", r"class has two names in .*trainval\.txt, line 2: Abyssinian and american_bulldog"),
    ],
)
def test_pet_malformed_lines_are_named(pet, old, new, says):
    replace(pet / "annotations/trainval.txt", old, new)
    with pytest.raises(UserError, match=says):
        open_dataset(f"pet:{pet}@trainval")


def test_pet_trimap_of_another_size(pet):
    grey(pet / "annotations/trimaps/Abyssinian_100.png", np.ones((60, 40)))
    with pytest.raises(UserError, match=r"mask and image differ in size in .*Abyssinian_100\.png"):
        open_dataset(f"pet:{pet}@trainval")[0]


def voc(*boxes):
    objects = "".join(
        f"<object><name>dog</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for a, b, c, d in boxes
    )
    return f"<annotation>\n\t<folder>02085620</folder>\n\t{objects}\n</annotation>\n"


@pytest.fixture
def dogs(tmp_path):
    names = [
        "n02085620-Chihuahua/n02085620_7",
        "n02085620-Chihuahua/n02085620_9",
        "n02106662-German_shepherd/n02106662_1",
    ]
    boxes = [[(25, 10, 50, 38)], [(1, 2, 20, 30), (15, 1, 59, 20)], [(0, 0, 60, 40)]]
    for name, own in zip(names, boxes):
        picture(tmp_path / "Images" / f"{name}.jpg")
        write(tmp_path / "Annotation" / name, voc(*own))
    for split, rows in (("train", [0, 2]), ("test", [1])):
        files = np.empty((len(rows), 1), dtype=object)
        files[:, 0] = [f"{names[r]}.jpg" for r in rows]
        labels = np.array([[1, 1, 2][r] for r in rows], dtype=float)[:, None]
        savemat(tmp_path / f"{split}_list.mat", {"file_list": files, "labels": labels})
    return tmp_path


def test_dogs(dogs):
    dataset = open_dataset(f"dogs:{dogs}@train")
    assert dataset.classes == ["Chihuahua", "German_shepherd"] and dataset.labels.tolist() == [0, 1]
    assert dataset[0].meta == {"box": (25.0, 10.0, 50.0, 38.0), "boxes": [(25.0, 10.0, 50.0, 38.0)]}
    test = open_dataset(f"dogs:{dogs}@test")
    assert test.ids == ["n02085620-Chihuahua/n02085620_9.jpg"]
    assert test.meta_of(0)["box"] == (1.0, 1.0, 59.0, 30.0) and len(test.meta_of(0)["boxes"]) == 2
    assert next(iter(loader(test, VIEW, workers=1)))[2][0].meta["box"] == (1.0, 1.0, 59.0, 30.0)
    with pytest.raises(UserError, match="several splits"):
        open_dataset(f"dogs:{dogs}")


def test_dogs_lists_in_their_own_folder_or_absent(dogs):
    (dogs / "lists").mkdir()
    for name in ("train_list.mat", "test_list.mat"):
        (dogs / name).rename(dogs / "lists" / name)
    assert len(open_dataset(f"dogs:{dogs}@train")) == 2
    for name in ("train_list.mat", "test_list.mat"):
        (dogs / "lists" / name).unlink()
    dataset = open_dataset(f"dogs:{dogs}")
    assert len(dataset) == 3 and dataset.meta_of(0)["box"] == (25.0, 10.0, 50.0, 38.0)
    with pytest.raises(UserError, match="unknown split"):
        open_dataset(f"dogs:{dogs}@train")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<annotation>\n<object>\n", r"malformed XML \(.*\) in .*n02085620_7, line 3"),
        (voc((1, 2, "x", 4)), r"malformed box in .*n02085620_7, bndbox 1"),
        (voc((5, 2, 5, 4)), r"empty box in .*n02085620_7, bndbox 1"),
        (voc(), "no bndbox"),
    ],
)
def test_dogs_malformed_xml_is_named_and_costs_one_picture(dogs, text, says):
    write(dogs / "Annotation/n02085620-Chihuahua/n02085620_7", text)
    dataset = open_dataset(f"dogs:{dogs}@train")
    with pytest.raises(UserError, match=says):
        dataset[0]
    errors = []
    assert sum(len(i) for i, _, _ in loader(dataset, VIEW, on_error=lambda *e: errors.append(e))) == 1 == len(errors)


def test_dogs_missing_folders(dogs, tmp_path):
    with pytest.raises(UserError, match="it should hold Images"):
        open_dataset(f"dogs:{dogs / 'Annotation'}")
    (dogs / "Images/n02106662-German_shepherd").rename(dogs / "away")
    with pytest.raises(UserError, match=r"no folder for a listed image.*n02106662-German_shepherd"):
        open_dataset(f"dogs:{dogs}@train")
