import sys

import numpy as np
import pytest
from PIL import Image
from vfm_core.data import loader, open_dataset
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

SMALL = Preprocess(size=(8, 8), resize="squash")


def picture(path, colour=(10, 20, 30), size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("hub")
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    paths = [str(picture(root / f"{i}.png", c, size=(6, 5))) for i, c in enumerate(colours)]
    features = datasets.Features(
        {"picture": datasets.Image(), "text": datasets.Value("string"), "y": datasets.ClassLabel(names=["wren", "auk"])}
    )
    rows = datasets.Dataset.from_dict({"picture": paths, "text": ["r", "g", "r"], "y": [1, 0, 1]}, features=features)
    datasets.DatasetDict({"train": rows, "validation": rows.select([1])}).save_to_disk(root / "both")
    rows.save_to_disk(root / "one")
    return root


def test_hf_dataset_saved_to_disk(hub_folder):
    dataset = open_dataset(f"hf:{hub_folder}/both@train")
    assert dataset.classes == ["wren", "auk"] and dataset.labels.tolist() == [1, 0, 1]
    assert np.asarray(dataset[2].image)[0, 0].tolist() == [0, 0, 250] and dataset[2].label == 1
    assert len(open_dataset(f"hf:{hub_folder}/both", split="val")) == 1
    assert len(open_dataset(f"hf:{hub_folder}/both@all")) == 4
    assert len(open_dataset(f"hf:{hub_folder}/one")) == 3
    with pytest.raises(UserError, match="several splits"):
        open_dataset(f"hf:{hub_folder}/both")


def test_hf_column_choice_fingerprint_and_workers(hub_folder):
    dataset = open_dataset(f"hf:{hub_folder}/one?label=text")
    assert dataset.classes == ["g", "r"] and dataset.labels.tolist() == [1, 0, 1]
    assert dataset.fingerprint() == open_dataset(f"hf:{hub_folder}/one?label=text").fingerprint()
    assert dataset.fingerprint() != open_dataset(f"hf:{hub_folder}/one").fingerprint()
    assert sum(len(i) for i, _, _ in loader(dataset, SMALL, batch_size=2, workers=1)) == 3


@pytest.mark.parametrize(
    ("tail", "says"),
    [
        ("/one?label=tex", "unknown column.*did you mean text"),
        ("/one?image=text", "no image column"),
        ("/one?pages=2", "unknown option"),
        ("/both@dev", "unknown split"),
        ("/one@dev", "unknown split"),
        ("/nothing", "cannot load dataset"),
    ],
)
def test_hf_errors(hub_folder, tail, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=says):
        open_dataset(f"hf:{hub_folder}{tail}")


def test_hf_without_the_library(monkeypatch, hub_folder):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'vfm-core\[datasets\]'"):
        open_dataset(f"hf:{hub_folder}/one")
