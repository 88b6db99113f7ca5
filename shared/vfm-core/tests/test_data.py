from pathlib import Path

import numpy as np
import pytest
import vfm_core.data
import vfm_core.dataset
from PIL import Image
from vfm_core.data import Sample, open_dataset, pick_splits, register_data_family
from vfm_core.data_sources import display_names, folder_dataset
from vfm_core.errors import UserError
from vfm_core.specs import Spec

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="real data folder ../shared/data is absent")


def picture(path, colour=(10, 20, 30), size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def birds(root):
    for name in ("002.Wren/b.png", "002.Wren/a.jpg", "010.Auk/c.PNG", "001.Yellow_Crow/deep/d.png"):
        picture(root / name)
    return root


def test_class_folders_sort_by_number_and_show_by_name(tmp_path):
    dataset = open_dataset(f"folder:{birds(tmp_path)}")
    assert dataset.classes == ["Yellow_Crow", "Wren", "Auk"]
    assert dataset.ids == ["001.Yellow_Crow/deep/d.png", "002.Wren/a.jpg", "002.Wren/b.png", "010.Auk/c.PNG"]
    assert dataset.labels.tolist() == [0, 1, 1, 2] and dataset.labels.dtype == np.int64
    sample = dataset[-1]
    assert isinstance(sample, Sample) and (sample.id, sample.label) == ("010.Auk/c.PNG", 2)
    assert len(list(dataset)) == len(dataset) == 4
    with pytest.raises(IndexError):
        dataset[4]


def test_bare_path_path_object_and_spec_are_the_same(tmp_path):
    birds(tmp_path)
    texts = [str(tmp_path), tmp_path, f"folder:{tmp_path}", f"dir:{tmp_path}", Spec("folder", str(tmp_path))]
    assert len({open_dataset(text).fingerprint() for text in texts}) == 1


def test_hidden_and_other_files_do_not_count(tmp_path):
    birds(tmp_path)
    picture(tmp_path / "002.Wren/._a.png")
    picture(tmp_path / ".thumbnails/x.png")
    (tmp_path / "002.Wren/notes.txt").write_text("seen at dawn")
    (tmp_path / "LICENSE").write_text("free")
    assert len(open_dataset(str(tmp_path))) == 4


def test_run_folders_do_not_count(tmp_path):
    birds(tmp_path)
    for run in (tmp_path / "cams", tmp_path / "002.Wren/cams"):
        picture(run / "overlays/a.png")
        (run / "config.json").write_text("{}")
        (run / "results.jsonl").write_text("")
    picture(tmp_path / "parts/overlays/a.png")
    (tmp_path / "parts/shards/1-of-2").mkdir(parents=True)
    (tmp_path / "parts/shards/1-of-2/environment.json").write_text("{}")
    dataset = open_dataset(str(tmp_path))
    assert len(dataset) == 4 and dataset.classes == ["Yellow_Crow", "Wren", "Auk"]


def test_flat_folder_has_no_labels(tmp_path):
    picture(tmp_path / "b.jpg")
    picture(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    dataset = open_dataset(str(tmp_path))
    assert dataset.ids == ["a.png", "b.jpg"] and dataset.classes == []
    assert dataset.labels.tolist() == [-1, -1] and dataset[0].label is None


def test_pictures_beside_class_folders_are_left_out_with_a_warning(tmp_path, caplog):
    birds(tmp_path)
    picture(tmp_path / "montage.png")
    assert "montage.png" not in open_dataset(str(tmp_path)).ids
    assert "montage.png" in caplog.text


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_split_folders_and_their_spellings(tmp_path, name):
    birds(tmp_path / "train")
    picture(tmp_path / name / "002.Wren/v.png")
    for dataset in (open_dataset(f"folder:{tmp_path}@val"), open_dataset(str(tmp_path), split="valid")):
        assert dataset.ids == [f"{name}/002.Wren/v.png"]
        assert dataset.classes == ["Yellow_Crow", "Wren", "Auk"], "classes are those of all splits"
        assert dataset.labels.tolist() == [1]
    assert len(open_dataset(f"{tmp_path}@all")) == 5
    with pytest.raises(UserError, match=r"several splits and none chosen.*@train"):
        open_dataset(str(tmp_path))
    with pytest.raises(UserError, match=r"unknown split.*test.*"):
        open_dataset(str(tmp_path), split="test")
    with pytest.raises(UserError, match="two splits"):
        open_dataset(f"{tmp_path}@train", split="val")


def test_one_split_folder_needs_no_choice(tmp_path):
    birds(tmp_path / "train")
    (tmp_path / "annotations").mkdir()
    assert open_dataset(str(tmp_path)).ids[0].startswith("train/001.")


def test_vehicles_may_be_called_train(tmp_path):
    for name in ("train", "bus"):
        picture(tmp_path / name / "a.png")
    assert open_dataset(str(tmp_path)).classes == ["bus", "train"]


def test_a_split_of_an_unsplit_folder_is_refused_but_all_is_not(tmp_path):
    birds(tmp_path)
    with pytest.raises(UserError, match="unknown split"):
        open_dataset(str(tmp_path), split="train")
    assert len(open_dataset(str(tmp_path), split="all")) == 4


def test_empty_class_is_named(tmp_path):
    birds(tmp_path)
    (tmp_path / "003.Emu").mkdir()
    with pytest.raises(UserError, match=r"class without images.*003\.Emu"):
        open_dataset(str(tmp_path))


def test_no_images_no_folder_no_path(tmp_path):
    with pytest.raises(UserError, match="no images"):
        open_dataset(str(tmp_path))
    file = picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="not a folder"):
        open_dataset(f"folder:{file}")
    for spec in (f"folder:{tmp_path}/gone", f"{tmp_path}/gone", "gone", f"csv:{tmp_path}/gone.csv@val"):
        with pytest.raises(UserError, match=r"no such folder or file.*gone"):
            open_dataset(spec)


def test_duplicate_display_names_are_refused(tmp_path):
    picture(tmp_path / "001.Wren/a.png")
    picture(tmp_path / "002.Wren/a.png")
    with pytest.raises(UserError, match=r"001\.Wren and 002\.Wren both show as 'Wren'"):
        open_dataset(str(tmp_path))
    assert display_names(["7", "1.5", "3.Emu"], "x") == ["7", "1.5", "Emu"]


def test_path_that_holds_an_at_sign(tmp_path):
    birds(tmp_path / "a@b")
    assert len(open_dataset(f"folder:{tmp_path}/a@b")) == 4
    birds(tmp_path / "c@d" / "train")
    picture(tmp_path / "c@d" / "test" / "002.Wren" / "a.png")
    assert len(open_dataset(f"folder:{tmp_path}/c@d@test")) == 1


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    birds(tmp_path / "real")
    root = tmp_path / "linked"
    root.mkdir()
    (root / "Wren").symlink_to(tmp_path / "real" / "002.Wren")
    (tmp_path / "real" / "002.Wren" / "again").symlink_to(tmp_path / "real" / "002.Wren")
    assert open_dataset(str(root)).ids == ["Wren/a.jpg", "Wren/b.png"]


@needs_data
def test_real_folders():
    train, test = (open_dataset(DATA / "cifar10-mini", split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == (3000, 1000)
    assert train.classes == test.classes and len(train.classes) == 10
    assert np.bincount(train.labels).tolist() == [300] * 10
    assert len(open_dataset(DATA / "birds")) == 9


def table(tmp_path, text, name="birds.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_text(text, encoding=encoding)
    return path


def test_csv_with_everything(tmp_path):
    picture(tmp_path / "img/a.png")
    mask = np.zeros((9, 12), np.uint8)
    mask[2:5, 3:7] = 255
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    path = table(
        tmp_path,
        "path,label,split,group,time,reference,x0,y0,x1,y1,mask,observer\n"
        "img/a.png,wren,train,site 1,2021-05-01T06:00,auk,1,2.5,7,8,a_mask.png,kim\n"
        "img/a.png,auk,train,,,,,,,,,\n"
        '"img/b, c.png",,test,,,,,,,,,\n',
    )
    dataset = open_dataset(f"csv:{path}@train")
    assert dataset.ids == ["img/a.png", "img/a.png#3"] and dataset.classes == ["auk", "wren"]
    assert dataset.labels.tolist() == [1, 0]
    assert dataset.meta_of(0) == {
        "split": "train",
        "group": "site 1",
        "time": "2021-05-01T06:00",
        "reference": "auk",
        "box": (1.0, 2.5, 7.0, 8.0),
    }
    assert np.array_equal(dataset[0].meta["mask"], mask > 0)
    assert "mask" not in dataset[1].meta
    rest = open_dataset(path, split="test")
    assert rest.ids == ["img/b, c.png"] and rest.labels.tolist() == [-1] and rest.classes == ["auk", "wren"]
    with pytest.raises(UserError, match=r"no such image file: .*b, c\.png"):
        rest[0]
    with pytest.raises(UserError, match="several splits"):
        open_dataset(path)


def test_csv_numbers_sort_as_numbers_and_byte_order_mark_is_ignored(tmp_path):
    path = table(tmp_path, "Path,Label\n" + "".join(f"{i}.png,{i}\n" for i in (10, 2, 1)), encoding="utf-8-sig")
    assert open_dataset(path).classes == ["1", "2", "10"]
    assert open_dataset(table(tmp_path, "path\na.png\n")).labels.tolist() == [-1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty table"),
        ("file,label\na.png,x\n", r"no column 'path' in .*birds\.csv, line 1"),
        ("path,lable\na.png,x\n", r"unknown column .*lable; did you mean label"),
        ("path,label,label\na.png,x,y\n", "column given twice"),
        ("path,label,x0,y0,x1\na.png,x,1,2,3\n", "incomplete box columns.*no y1"),
        ("path,label\na.png,x\nb.png\n", r"line 3: 1 cells for 2 columns"),
        ("path,label\na.png,x,y\n", r"line 2: 3 cells for 2 columns"),
        ("path,label\n,x\n", r"empty path in .*line 2, column path"),
        ("path,label,x0,y0,x1,y1\n\na.png,x,1,2,three,4\n", r"not a number in .*line 3, column x1: 'three'"),
        ("path,label,x0,y0,x1,y1\na.png,x,1,2,,4\n", r"not a number in .*line 2, column x1: ''"),
        ("path,label,x0,y0,x1,y1\na.png,x,1,2,nan,4\n", r"not a number in .*column x1"),
        ("path,label,x0,y0,x1,y1\na.png,x,5,2,5,4\n", r"empty box in .*line 2.*5,2,5,4"),
        ("path,label\n", "no rows"),
        ("path,split\na.png,train\nb.png,\n", r"empty split in .*line 3, column split"),
    ],
)
def test_csv_errors_name_line_and_column(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        open_dataset(table(tmp_path, text))


def test_csv_split_errors_and_encoding(tmp_path):
    with pytest.raises(UserError, match="no column 'split'"):
        open_dataset(table(tmp_path, "path\na.png\n"), split="val")
    with pytest.raises(UserError, match="unknown split"):
        open_dataset(table(tmp_path, "path,split\na.png,train\n"), split="val")
    (tmp_path / "latin.csv").write_bytes("path,label\na.png,Bl\xe4sshuhn\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        open_dataset(tmp_path / "latin.csv")


def test_csv_mask_of_another_size_is_refused(tmp_path):
    picture(tmp_path / "a.png", size=(12, 9))
    picture(tmp_path / "m.png", size=(9, 12))
    with pytest.raises(UserError, match=r"9x12 against 12x9"):
        open_dataset(table(tmp_path, "path,mask\na.png,m.png\n"))[0]


def test_registered_family(tmp_path, monkeypatch):
    monkeypatch.setattr(vfm_core.data, "_OPENERS", {})
    birds(tmp_path)

    def opener(spec, split=None):
        return folder_dataset(spec.name, split)

    with pytest.raises(UserError, match="unknown data family: 'nest'"):
        open_dataset(f"nest:{tmp_path}")
    register_data_family("nest", opener)
    register_data_family("nest", opener)
    assert len(open_dataset(f"nest:{tmp_path}")) == 4
    for taken in ("nest", "folder"):
        with pytest.raises(ValueError, match="is taken"):
            register_data_family(taken, lambda spec, split=None: None)


def test_entry_point_family(monkeypatch, tmp_path):
    class Point:
        name = "plugged"

        def load(self):
            return lambda spec, split=None: folder_dataset(tmp_path, split)

    monkeypatch.setattr(vfm_core.data, "entry_points", lambda group: [Point()] if group == "vfm_core.data" else [])
    birds(tmp_path)
    assert len(open_dataset("plugged:anything")) == 4


def test_misspelled_family_is_told(tmp_path):
    with pytest.raises(UserError, match=r"unknown data family: 'fodler'; did you mean folder"):
        open_dataset(f"fodler:{tmp_path}")


def test_pick_splits():
    assert pick_splits(["test", "train"], "training", "x") == ["train"]
    assert pick_splits(["b", "a"], "all", "x") == ["a", "b"]
    assert pick_splits(["all", "a"], "all", "x") == ["all"]
    assert pick_splits(["only"], None, "x") == ["only"]
    assert pick_splits([], None, "x") == []
