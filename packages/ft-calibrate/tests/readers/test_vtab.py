import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision.datasets
from ft_calibrate.readers.vtab_tasks import TASKS, find_task, prompt_templates
from torchvision.datasets.utils import calculate_md5
from vfm_core.data import open_dataset
from vfm_core.errors import UserError


def grey(sample) -> int:
    return int(np.asarray(sample.image)[0, 0, 0])


# ------------------------------------------------------------------------------------ trees as torchvision expects them
def caltech(root: Path, picture) -> dict:
    folder = root / "caltech101" / "101_ObjectCategories"
    for c, name in enumerate(("BACKGROUND_Google", "Faces", "accordion", "airplanes")):
        for i in range(1, 11):
            picture(folder / name / f"image_{i:04d}.jpg", 20 * c + i)
    return {"classes": ["face", "accordion", "airplane"], "train": 21, "test": 9, "grey": None}


def dtd(root: Path, picture) -> dict:
    for split, numbers in (("train", (1, 2)), ("val", (3,)), ("test", (4,))):
        lines = []
        for c, name in enumerate(("banded", "polka-dotted")):
            for i in numbers:
                picture(root / "dtd" / "dtd" / "images" / name / f"{name}_{i}.jpg", 20 * c + i)
                lines.append(f"{name}/{name}_{i}.jpg")
        table = root / "dtd" / "dtd" / "labels" / f"{split}1.txt"
        table.parent.mkdir(exist_ok=True)
        table.write_text("\n".join(lines) + "\n")
    return {"classes": ["banded", "polka-dotted"], "train": 4, "test": 2, "grey": 1}


def pets(root: Path, picture) -> dict:
    home = root / "oxford-iiit-pet"
    (home / "annotations").mkdir(parents=True)
    names = ("Abyssinian", "american_bulldog")
    for split, numbers in (("trainval", (1, 2)), ("test", (3,))):
        rows = [f"{n}_{i} {c + 1} 1 1" for c, n in enumerate(names) for i in numbers]
        (home / "annotations" / f"{split}.txt").write_text("\n".join(rows) + "\n")
        for c, n in enumerate(names):
            for i in numbers:
                picture(home / "images" / f"{n}_{i}.jpg", 20 * c + i)
    return {"classes": ["Abyssinian", "American Bulldog"], "train": 4, "test": 2, "grey": 1}


def sun397(root: Path, picture) -> dict:
    home = root / "SUN397"
    for c, name in enumerate(("a/abbey", "a/apse/indoor")):
        for i in range(10):
            picture(home / name / f"sun_{'qjzx'[i % 4]}{i}.jpg", 20 * c + i)
    (home / "ClassName.txt").write_text("/a/abbey\n/a/apse/indoor\n")
    return {"classes": ["abbey", "apse indoor"], "train": 14, "test": 6, "grey": None}


def eurosat(root: Path, picture) -> dict:
    for c, name in enumerate(("AnnualCrop", "SeaLake")):
        for i in range(10):
            picture(root / "eurosat" / "2750" / name / f"{name}_{i}.jpg", 20 * c + i)
    return {"classes": ["annual crop land", "lake or sea"], "train": 14, "test": 6, "grey": None}


def clevr(root: Path, picture) -> dict:
    home = root / "clevr" / "CLEVR_v1.0"
    for split in ("train", "val"):
        scenes = []
        for i, n in enumerate((3, 10, 4)):
            name = f"CLEVR_{split}_{i:06d}.png"
            picture(home / "images" / split / name, i)
            scenes.append({"image_filename": name, "objects": [{}] * n})
        table = home / "scenes" / f"CLEVR_{split}_scenes.json"
        table.parent.mkdir(exist_ok=True)
        table.write_text(json.dumps({"scenes": scenes}))
    return {"classes": [str(n) for n in range(3, 11)], "train": 3, "test": 3, "grey": 0, "labels": [0, 7, 1]}


def aircraft(root: Path, picture) -> dict:
    home = root / "fgvc-aircraft-2013b" / "data"
    home.mkdir(parents=True)
    (home / "variants.txt").write_text("707-320\nSR-20\n")
    for s, split in enumerate(("train", "val", "trainval", "test")):
        rows = [f"{s}{c} {name}" for c, name in enumerate(("707-320", "SR-20"))]
        (home / f"images_variant_{split}.txt").write_text("\n".join(rows) + "\n")
        for c in (0, 1):
            picture(home / "images" / f"{s}{c}.jpg", 20 * s + c)
    return {"classes": ["707-320", "SR-20"], "train": 2, "test": 2, "grey": 0}


def flowers(root: Path, picture) -> dict:
    home = root / "flowers-102"
    for i in range(1, 5):
        picture(home / "jpg" / f"image_{i:05d}.jpg", i)
    scipy.io.savemat(home / "imagelabels.mat", {"labels": np.array([[5, 1, 102, 5]])})
    ids = {"trnid": np.array([[2, 1]]), "valid": np.array([[3, 3]]), "tstid": np.array([[4, 3]])}
    scipy.io.savemat(home / "setid.mat", ids)
    return {"classes": 102, "train": 2, "test": 2, "grey": 2, "labels": [0, 4], "md5": home}


def cifar(root: Path, picture) -> dict:
    home = root / "cifar-100-python"
    home.mkdir()
    for split, n in (("train", 4), ("test", 2)):
        data = np.arange(n, dtype=np.uint8)[:, None].repeat(3072, 1)
        (home / split).write_bytes(pickle.dumps({"data": data, "fine_labels": [1, 0, 1, 0][:n]}))
    (home / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "aquarium_fish"]}))
    return {
        "classes": ["apple", "aquarium fish"],
        "train": 4,
        "test": 2,
        "grey": 0,
        "labels": [1, 0, 1, 0],
        "md5": home,
    }


def svhn(root: Path, picture) -> dict:
    for split, n in (("train", 3), ("test", 2)):
        x = np.arange(n, dtype=np.uint8)[None, None, None].repeat(32, 0).repeat(32, 1).repeat(3, 2)
        scipy.io.savemat(root / f"{split}_32x32.mat", {"X": x, "y": np.array([[10], [1], [9]])[:n]})
    return {"classes": list("0123456789"), "train": 3, "test": 2, "grey": 0, "labels": [0, 1, 9], "md5": root}


MAKERS = {
    "caltech101": caltech,
    "dtd": dtd,
    "pets": pets,
    "sun397": sun397,
    "eurosat": eurosat,
    "clevr_count": clevr,
    "fgvc_aircraft": aircraft,
    "flowers102": flowers,
    "cifar100": cifar,
    "svhn": svhn,
}


def accept_checksums(monkeypatch, task: str, home: Path) -> None:
    """Let torchvision take the miniature files for the published ones."""
    if task == "cifar100":
        kind = torchvision.datasets.CIFAR100
        for what in ("train", "test"):
            monkeypatch.setattr(kind, f"{what}_list", [[what, calculate_md5(str(home / what))]])
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": calculate_md5(str(home / "meta"))})
    elif task == "svhn":
        kind = torchvision.datasets.SVHN
        found = {s: ["", f"{s}_32x32.mat", calculate_md5(str(home / f"{s}_32x32.mat"))] for s in ("train", "test")}
        monkeypatch.setattr(kind, "split_list", {**kind.split_list, **found})
    else:
        kind = torchvision.datasets.Flowers102
        names = {"label": "imagelabels.mat", "setid": "setid.mat"}
        found = {key: (name, calculate_md5(str(home / name))) for key, name in names.items()}
        monkeypatch.setattr(kind, "_file_dict", {**kind._file_dict, **found})


@pytest.mark.parametrize("task", MAKERS)
def test_torchvision_trees_are_read(tmp_path, picture, monkeypatch, task):
    expected = MAKERS[task](tmp_path, picture)
    if "md5" in expected:
        accept_checksums(monkeypatch, task, expected["md5"])
    train = open_dataset(f"vtab:{tmp_path}?task={task}@train")
    test = open_dataset(f"vtab:{tmp_path}@test?task={task}")
    classes = expected["classes"]
    assert (len(train.classes) if isinstance(classes, int) else train.classes) == classes
    assert test.classes == train.classes
    assert (len(train), len(test)) == (expected["train"], expected["test"])
    if "labels" in expected:
        assert train.labels.tolist() == expected["labels"]
    if expected["grey"] is not None:
        assert abs(grey(train[0]) - expected["grey"]) <= 1
    for data in (train, test):
        assert len(set(data.ids)) == len(data)
        if data.files is not None:  # the class stands in the path, and the picture at it
            for i, path in enumerate(data.files):
                assert path.is_file(), path
                assert data[i].label == data.labels[i]
    if train.files is not None:
        assert not set(train.ids) & set(test.ids)
    assert train.prompts()[0] == [t.replace("{}", train.classes[0]) for t in TASKS[task].templates]


@pytest.mark.parametrize("task", ["eurosat", "caltech101", "sun397"])
def test_labels_stay_with_their_files_where_the_split_is_ours(tmp_path, picture, task):
    MAKERS[task](tmp_path, picture)
    words = {"annual crop land": "AnnualCrop", "lake or sea": "SeaLake", "face": "Faces", "airplane": "airplanes"}
    words["apse indoor"] = "indoor"
    data = open_dataset(f"vtab:{tmp_path}?task={task}@test")
    for i, path in enumerate(data.files):
        name = data.classes[data.labels[i]]
        assert path.parent.name == words.get(name, name)
    assert np.bincount(data.labels).tolist() == [3] * len(data.classes)


def test_splits_can_be_joined(tmp_path, picture):
    cifar(tmp_path, picture)
    svhn(tmp_path, picture)
    with pytest.MonkeyPatch.context() as patch:
        accept_checksums(patch, "svhn", tmp_path)
        with pytest.raises(UserError, match="several splits"):
            open_dataset(f"vtab:{tmp_path}?task=svhn")
    dtd(tmp_path, picture)
    data = open_dataset(f"vtab:{tmp_path}?task=dtd@all")
    assert len(data) == 8
    assert {m["split"] for m in data.meta} == {"train", "val", "test"}
    assert len(open_dataset(f"vtab:{tmp_path}?task=dtd@validation")) == 2


def test_pictures_inside_files_follow_their_label(tmp_path, picture, monkeypatch):
    home = cifar(tmp_path, picture)["md5"]
    accept_checksums(monkeypatch, "cifar100", home)
    data = open_dataset(f"vtab:{tmp_path}?task=cifar100@all")
    assert [grey(sample) for sample in data] == [0, 1, 0, 1, 2, 3]  # test before train
    assert data.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert data.ids[0] == "test/000000"
    before = data.fingerprint()
    raw = pickle.loads((home / "train").read_bytes())
    raw["data"] += 1
    (home / "train").write_bytes(pickle.dumps(raw))
    accept_checksums(monkeypatch, "cifar100", home)
    assert open_dataset(f"vtab:{tmp_path}?task=cifar100@all").fingerprint() != before


def test_pcam_reads_hdf5_or_says_that_h5py_is_missing(tmp_path):
    (tmp_path / "pcam").mkdir()
    try:
        import h5py
    except ImportError:
        with pytest.raises(UserError, match=r"h5py is missing in .*pcam.*; pip install h5py"):
            open_dataset(f"vtab:{tmp_path}?task=pcam@test")
        return
    stem = tmp_path / "pcam" / "camelyonpatch_level_2_split_test_"
    with h5py.File(f"{stem}x.h5", "w") as file:
        file["x"] = np.arange(2, dtype=np.uint8)[:, None, None, None].repeat(96, 1).repeat(96, 2).repeat(3, 3)
    with h5py.File(f"{stem}y.h5", "w") as file:
        file["y"] = np.array([1, 0], dtype=np.uint8).reshape(2, 1, 1, 1)
    data = open_dataset(f"vtab:{tmp_path}?task=pcam@test")
    assert data.labels.tolist() == [1, 0]
    assert [grey(sample) for sample in data] == [0, 1]


# -------------------------------------------------------------------------------------------------------------- exports
def export(root: Path, picture, *parts: str, n: int = 10) -> Path:
    for part in parts or ("",):
        for c, name in enumerate(("dense_residential", "airport")):
            for i in range(n):
                picture(root / part / name / f"{part}{i}.png", 20 * c + i)
    return root


def test_exported_folders_are_split_or_hold_splits(tmp_path, picture):
    export(tmp_path / "one" / "resisc45", picture)
    train, test = (open_dataset(f"vtab:{tmp_path / 'one'}?task=resisc45@{s}") for s in ("train", "test"))
    assert train.classes == ["airport", "dense residential"]
    assert (len(train), len(test)) == (14, 6)
    assert not set(train.ids) & set(test.ids)
    export(tmp_path / "two" / "kitti_closest_vehicle_distance", picture, "train", "test", n=2)
    data = open_dataset(f"vtab:{tmp_path / 'two'}?task=kitti@test")
    assert len(data) == 4
    assert data.meta_of(0) == {"split": "test"}
    with pytest.raises(UserError, match="several splits"):
        open_dataset(f"vtab:{tmp_path / 'two'}?task=kitti")


def test_exported_classes_and_prompts_can_be_named(tmp_path, picture):
    folder = export(tmp_path / "resisc45", picture, n=1)
    (folder / "classes.txt").write_text("dense_residential\ta dense residential area\nairport\n")
    (folder / "templates.txt").write_text("seen from above: {}\n")
    data = open_dataset(f"vtab:{tmp_path}?task=RESISC45")
    assert data.classes == ["a dense residential area", "airport"]
    assert [grey(sample) for sample in data] == [0, 20]
    assert data.prompts() == [["seen from above: a dense residential area"], ["seen from above: airport"]]
    (folder / "templates.txt").write_text("seen from above\n")
    with pytest.raises(UserError, match=r"template must hold \{\} once in .*templates.txt"):
        open_dataset(f"vtab:{tmp_path}?task=resisc45")
    (folder / "classes.txt").write_text("airport\n")
    with pytest.raises(UserError, match=r"class folder is not listed in .*classes.txt: dense_residential"):
        open_dataset(f"vtab:{tmp_path}?task=resisc45")
    (folder / "classes.txt").write_text("airport\nairport\n")
    with pytest.raises(UserError, match="class given twice"):
        open_dataset(f"vtab:{tmp_path}?task=resisc45")


def test_a_task_of_torchvision_may_be_exported_too(tmp_path, picture):
    export(tmp_path / "dtd", picture)
    assert len(open_dataset(f"vtab:{tmp_path}?task=dtd")) == 20


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.torchvision])
def test_missing_files_name_the_folder_and_what_belongs_there(tmp_path, task):
    with pytest.raises(UserError) as error:
        open_dataset(f"vtab:{tmp_path}?task={task}@test")
    assert str(tmp_path / TASKS[task].home) in str(error.value)
    assert TASKS[task].holds in str(error.value)
    assert list(tmp_path.iterdir()) == []  # nothing is downloaded or made


def test_other_faults_are_named(tmp_path, picture):
    with pytest.raises(
        UserError, match=r"task is not there in .*dmlab; export its pictures as .*dmlab/\[SPLIT/\]CLASS"
    ):
        open_dataset(f"vtab:{tmp_path}?task=dmlab")
    with pytest.raises(UserError, match=r"no task chosen.*\?task=dtd"):
        open_dataset(f"vtab:{tmp_path}")
    with pytest.raises(UserError, match=r"unknown task in \?task=: 'flower'; did you mean flowers102"):
        open_dataset(f"vtab:{tmp_path}?task=flower")
    cifar(tmp_path, picture)
    with pytest.raises(
        UserError, match=r"incomplete or corrupt files \(Dataset not found or corrupted\) in .*cifar-100"
    ):
        open_dataset(f"vtab:{tmp_path}?task=cifar100@train")
    dtd(tmp_path, picture)
    (tmp_path / "dtd" / "dtd" / "labels" / "test1.txt").unlink()
    with pytest.raises(UserError, match=r"incomplete or corrupt files .*test1.txt.*task dtd test"):
        open_dataset(f"vtab:{tmp_path}?task=dtd@test")
    clevr(tmp_path, picture)
    table = tmp_path / "clevr" / "CLEVR_v1.0" / "scenes" / "CLEVR_val_scenes.json"
    table.write_text(table.read_text().replace("[{}, {}, {}]", "[]"))
    with pytest.raises(UserError, match=r"label out of range in .*CLEVR_v1.0 test: 0..10"):
        open_dataset(f"vtab:{tmp_path}?task=clevr_count@test")
    (tmp_path / "dmlab").mkdir()
    with pytest.raises(UserError, match="no pictures of the task"):
        open_dataset(f"vtab:{tmp_path}?task=dmlab")


def test_every_task_has_prompts_and_is_found_by_its_names():
    assert len(TASKS) == 20
    for name, task in TASKS.items():
        assert all(template.count("{}") == 1 for template in prompt_templates(name))
        for alias in (name.upper(), name.replace("_", "-"), *task.aliases):
            assert find_task(alias) is task
        if task.torchvision:
            assert find_task(task.torchvision) is task
            assert hasattr(torchvision.datasets, task.torchvision)
