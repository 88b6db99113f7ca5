import json

import numpy as np
import pytest
from finecam.readers import register_readers
from PIL import Image
from vfm_core.data import open_dataset
from vfm_core.errors import UserError


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


HEADER = "filename,family,standardized_species,adipose_fin,pelvic_fin,file_name\n"


@pytest.fixture
def fish(tmp_path):
    write(
        tmp_path / "segmentation_train.csv",
        HEADER + "100096-p#0.jpg,Ictaluridae,Noturus gyrinus,1,0.0,x\nb.jpg,Cyprinidae,Notropis texanus,-1,,x\n",
    )
    write(tmp_path / "segmentation_test.csv", HEADER + "c.jpg,Esocidae,Esox lucius,NA,1,x\n")
    write(tmp_path / "segmentation_data.csv", HEADER + "c.jpg,Esocidae,Esox lucius,NA,1,x\n")
    write(tmp_path / "classification_train.csv", HEADER + "b.jpg,Cyprinidae,Notropis texanus,,,x\n")
    picture(tmp_path / "Images/chunk_1/100096-p#0.jpg")
    picture(tmp_path / "Images/chunk_2/b.jpg")
    picture(tmp_path / "Images/c.jpg")
    labels = np.zeros((40, 60))
    labels[10:30, 5:20] = 1
    labels[15:18, 8:11] = 2
    labels[12:28, 50:58] = 7
    grey(tmp_path / "segmentation_masks/images/100096-p#0.png", labels)
    names = {"0": "Background", "1": "Head", "2": "Eye", "3": "Dorsal fin", "7": "Caudal fin"}
    write(tmp_path / "segmentation_masks/seg_id_trait_map.json", json.dumps(names))
    return tmp_path


def test_fishvista_traits_as_part_masks(fish):
    dataset = open_dataset(f"fishvista:{fish}@train")
    assert dataset.classes == ["Esox lucius", "Notropis texanus", "Noturus gyrinus"], "those of all splits"
    assert dataset.labels.tolist() == [2, 1]
    meta = dataset[0].meta
    assert list(meta["part_masks"]) == ["Head", "Eye", "Caudal fin"]
    assert {name: int(mask.sum()) for name, mask in meta["part_masks"].items()} == {
        "Head": 300 - 9,
        "Eye": 9,
        "Caudal fin": 128,
    }
    assert meta["trait_mask"].sum() == 300 + 128
    assert meta["family"] == "Ictaluridae" and meta["traits"] == {"adipose_fin": True, "pelvic_fin": False}
    assert dataset[1].meta == {"family": "Cyprinidae"}, "no segmentation, no known traits"


def test_fishvista_splits_and_tasks(fish):
    assert open_dataset(f"fishvista:{fish}@test").ids == ["c.jpg"]
    assert len(open_dataset(f"fishvista:{fish}@all")) == 3, "segmentation_data.csv is not a split"
    assert len(open_dataset(f"fishvista:{fish}?task=classification")) == 1
    with pytest.raises(UserError, match="unknown task"):
        open_dataset(f"fishvista:{fish}?task=segment")
    with pytest.raises(UserError, match=r"it should hold identification_train\.csv"):
        open_dataset(f"fishvista:{fish}?task=identification")
    (fish / "Images/chunk_2/b.jpg").unlink()
    with pytest.raises(UserError, match=r"no such image file: .*b\.jpg"):
        open_dataset(f"fishvista:{fish}@train")[1]


def test_fishvista_malformed_files(fish):
    table, names = fish / "segmentation_train.csv", fish / "segmentation_masks/seg_id_trait_map.json"
    replace(table, "b.jpg,Cyprinidae", "b.jpg")
    with pytest.raises(UserError, match=r"wrong number of cells in .*segmentation_train\.csv, line 3"):
        open_dataset(f"fishvista:{fish}@train")
    replace(table, "b.jpg,", ",Cyprinidae,")
    with pytest.raises(UserError, match=r"empty filename in .*segmentation_train\.csv, line 3"):
        open_dataset(f"fishvista:{fish}@train")
    replace(table, HEADER, HEADER.replace("standardized_species", "species"))
    with pytest.raises(UserError, match=r"no column 'standardized_species' in .*line 1"):
        open_dataset(f"fishvista:{fish}@train")
    replace(table, "species,adipose", "standardized_species,adipose")
    write(names, '{"1": "Head",\n "2" "Eye"}')
    with pytest.raises(UserError, match=r"malformed JSON .*seg_id_trait_map\.json, line 2"):
        open_dataset(f"fishvista:{fish}@test")
    write(names, '["Head"]')
    with pytest.raises(UserError, match=r"expected \{number: trait\}"):
        open_dataset(f"fishvista:{fish}@test")


def test_fishvista_pixel_value_without_a_trait(fish):
    grey(fish / "segmentation_masks/images/100096-p#0.png", np.full((40, 60), 9))
    with pytest.raises(UserError, match=r"pixel value without a trait in .*: \[9\]"):
        open_dataset(f"fishvista:{fish}@train")[0]
