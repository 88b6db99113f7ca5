from pathlib import Path

import numpy as np
import pytest
from finecam.readers import register_readers
from PIL import Image
from scipy.io import savemat
from vfm_core.data import open_dataset
from vfm_core.errors import UserError


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


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


CAR = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]


def structs(fields, rows):
    out = np.empty((1, len(rows)), dtype=[(f, object) for f in fields])
    for i, row in enumerate(rows):
        out[0, i] = tuple(row)
    return out


def cells(*texts):
    out = np.empty((1, len(texts)), dtype=object)
    out[0, :] = texts
    return out


def small(*values):
    return [np.uint8(v) for v in values]


@pytest.fixture
def cars(tmp_path):
    root = tmp_path / "stanford_cars"
    for name in ("cars_train/00001.jpg", "cars_train/00002.jpg", "cars_test/00001.jpg"):
        picture(root / name)
    (root / "devkit").mkdir()
    savemat(root / "devkit/cars_meta.mat", {"class_names": cells("AM General Hummer SUV 2000", "Acura RL Sedan 2012")})
    train = [[*small(1, 1, 60, 40, 2), "00001.jpg"], [*small(5, 7, 30, 20, 1), "00002.jpg"]]
    savemat(root / "devkit/cars_train_annos.mat", {"annotations": structs(CAR, train)})
    test = [[*small(11, 3, 50, 33, 1), "00001.jpg"]]
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": structs(CAR, test)})
    return root


def test_cars_devkit_boxes_start_at_one(cars):
    for path in (cars, cars.parent):
        dataset = open_dataset(f"cars:{path}@train")
        assert dataset.classes == ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
        assert dataset.labels.tolist() == [1, 0]
        assert dataset[0].meta["box"] == (0.0, 0.0, 60.0, 40.0), "the whole picture"
        assert dataset[1].meta["box"] == (4.0, 6.0, 30.0, 20.0)
    assert open_dataset(f"cars:{cars}@test").ids == ["cars_test/00001.jpg"]
    assert len(open_dataset(f"cars:{cars}@all")) == 3
    (cars / "cars_test_annos_withlabels.mat").rename(cars / "devkit" / "cars_test_annos_withlabels.mat")
    assert open_dataset(f"cars:{cars}@test")[0].meta["box"] == (10.0, 2.0, 50.0, 33.0)


def test_cars_agree_with_torchvision(cars):
    reference = pytest.importorskip("torchvision.datasets").StanfordCars(cars.parent, split="train")
    ours = open_dataset(f"cars:{cars}@train")
    assert reference.classes == ours.classes
    assert [(Path(f).name, c) for f, c in reference._samples] == list(
        zip([f.name for f in ours.files], ours.labels.tolist())
    )


def test_cars_first_release(tmp_path):
    fields = ["relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test"]
    rows = [["car_ims/000001.jpg", *small(2, 3, 9, 8, 1, 0)], ["car_ims/000002.jpg", *small(1, 1, 9, 8, 2, 1)]]
    savemat(tmp_path / "cars_annos.mat", {"annotations": structs(fields, rows), "class_names": cells("a", "b")})
    for row in rows:
        picture(tmp_path / row[0])
    dataset = open_dataset(f"cars:{tmp_path}@train")
    assert dataset.ids == ["car_ims/000001.jpg"] and dataset[0].meta["box"] == (1.0, 2.0, 9.0, 8.0)


def test_cars_class_folders(tmp_path):
    picture(tmp_path / "train/Acura RL Sedan 2012/a.jpg")
    picture(tmp_path / "test/Acura RL Sedan 2012/b.jpg")
    assert open_dataset(f"cars:{tmp_path}@test").classes == ["Acura RL Sedan 2012"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([*small(1, 1, 9, 9, 3), "x.jpg"], r"class out of range in .*annos\.mat, annotation 1: 3; classes are 1\.\.2"),
        ([*small(9, 1, 3, 9, 1), "x.jpg"], r"empty box in .*annotation 1"),
        ([np.zeros(2), *small(1, 9, 9, 1), "x.jpg"], r"bbox_x1 is not one number in .*annotation 1"),
    ],
)
def test_cars_malformed_annotations_are_numbered(cars, row, says):
    savemat(cars / "devkit/cars_train_annos.mat", {"annotations": structs(CAR, [row])})
    with pytest.raises(UserError, match=says):
        open_dataset(f"cars:{cars}@train")


def test_cars_damaged_matlab_files(cars):
    table = cars / "devkit/cars_train_annos.mat"
    savemat(table, {"annotations": structs(CAR[:4], [small(1, 1, 9, 9)])})
    with pytest.raises(UserError, match="no field 'class'"):
        open_dataset(f"cars:{cars}@train")
    savemat(table, {"other": 1})
    with pytest.raises(UserError, match=r"no variable 'annotations' in .*: other"):
        open_dataset(f"cars:{cars}@train")
    table.write_bytes(b"MATLAB 5.0 MAT-file, cut off")
    with pytest.raises(UserError, match=r"cannot read MATLAB file.*cars_train_annos\.mat"):
        open_dataset(f"cars:{cars}@train")
    table.unlink()
    with pytest.raises(UserError, match="file of the dataset is missing"):
        open_dataset(f"cars:{cars}@train")


@pytest.fixture
def aircraft(tmp_path):
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    for name in ("1025794", "1340192", "0056978", "1"):
        path = picture(data / f"images/{name}.jpg", (60, 50), (0, 0, 200))
        with Image.open(path) as image:
            image.paste((255, 255, 255), (0, 30, 60, 50))  # the banner
            image.save(path, quality=95)
    write(data / "variants.txt", "707-320\nDC-9-30\nFalcon 2000\n")
    write(data / "families.txt", "Boeing 707\nDC-9\nFalcon 2000\n")
    write(data / "manufacturers.txt", "Boeing\nDassault Aviation\nMcDonnell Douglas\n")
    write(data / "images_variant_train.txt", "1025794 707-320\n1340192 Falcon 2000\n")
    write(data / "images_variant_val.txt", "0056978 DC-9-30\n")
    write(data / "images_variant_trainval.txt", "1025794 707-320\n1340192 Falcon 2000\n0056978 DC-9-30\n")
    write(data / "images_variant_test.txt", "1 DC-9-30\n")
    write(data / "images_family_train.txt", "1025794 Boeing 707\n")
    write(data / "images_manufacturer_train.txt", "1340192 Dassault Aviation\n")
    write(data / "images_box.txt", "1025794 3 14 60 50\n1340192 1 1 60 30\n0056978 2 2 9 9\n")
    return data.parent


def test_aircraft_banner_and_boxes(aircraft):
    dataset = open_dataset(f"aircraft:{aircraft}@train")
    assert dataset.classes == ["707-320", "DC-9-30", "Falcon 2000"]
    assert dataset.ids == ["1025794", "1340192"] and dataset.labels.tolist() == [0, 2]
    sample = dataset[0]
    assert sample.image.size == (60, 30)
    assert np.asarray(sample.image)[:26].max(axis=(0, 1)).tolist()[0] < 60, "nothing of the white banner is left"
    assert dataset.meta_of(0)["box"] == (2.0, 13.0, 60.0, 50.0)
    assert sample.meta["box"] == (2.0, 13.0, 60.0, 30.0), "the box ends where the picture does"
    assert dataset[1].meta["box"] == (0.0, 0.0, 60.0, 30.0)


def test_aircraft_levels_and_splits(aircraft):
    assert open_dataset(f"aircraft:{aircraft.parent}@train?level=family").classes == [
        "Boeing 707",
        "DC-9",
        "Falcon 2000",
    ]
    assert open_dataset(f"aircraft:{aircraft}@train?level=manufacturer").labels.tolist() == [1]
    assert len(open_dataset(f"aircraft:{aircraft}@trainval")) == 3
    assert sorted(open_dataset(f"aircraft:{aircraft}@all").ids) == ["0056978", "1", "1025794", "1340192"]
    assert open_dataset(f"aircraft:{aircraft}@test").meta_of(0) == {}
    with pytest.raises(UserError, match="unknown level"):
        open_dataset(f"aircraft:{aircraft}@train?level=model")


def test_aircraft_agrees_with_torchvision(aircraft):
    reference = pytest.importorskip("torchvision.datasets").FGVCAircraft(aircraft.parent, split="trainval")
    ours = open_dataset(f"aircraft:{aircraft}@trainval")
    assert reference.classes == ours.classes
    assert reference._labels == ours.labels.tolist() and [Path(f) for f in reference._image_files] == list(ours.files)


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("images_variant_train.txt", "Falcon 2000", "Falcon", r"class is not listed in .*train\.txt, line 2: 'Falcon'"),
        ("images_variant_train.txt", "1340192 Falcon 2000", "1340192", r"expected 2 fields in .*train\.txt, line 2"),
        ("images_box.txt", "1 1 60 30", "1 1 60", r"expected 5 fields in .*images_box\.txt, line 2"),
        ("images_box.txt", "1 1 60 30", "1 x 60 30", r"not a number in .*images_box\.txt, line 2: 'x'"),
    ],
)
def test_aircraft_malformed_lines_are_named(aircraft, file, old, new, says):
    replace(aircraft / "data" / file, old, new)
    with pytest.raises(UserError, match=says):
        open_dataset(f"aircraft:{aircraft}@train")


def test_aircraft_picture_that_is_only_banner(aircraft):
    picture(aircraft / "data/images/1025794.jpg", (60, 20))
    with pytest.raises(UserError, match="not higher than its banner"):
        open_dataset(f"aircraft:{aircraft}@train")[0]
