import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vfm_core.data
import vfm_core.dataset
from PIL import Image
from vfm_core.data import ImageDataset, open_dataset
from vfm_core.errors import UserError


def picture(path, colour=(10, 20, 30), size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def birds(root):
    for name in ("002.Wren/b.png", "002.Wren/a.jpg", "010.Auk/c.PNG", "001.Yellow_Crow/deep/d.png"):
        picture(root / name)
    return root


def table(tmp_path, text, name="birds.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_text(text, encoding=encoding)
    return path


def test_bad_construction_is_refused():
    with pytest.raises(UserError, match="labels and ids differ"):
        ImageDataset("x", ["a", "b"], [0], ["c"])
    with pytest.raises(UserError, match=r"image listed twice.*: a;"):
        ImageDataset("x", ["b", "a", "a"], [0, 0, 0], ["c"])
    for labels in ([-2], [1]):
        with pytest.raises(UserError, match="label out of range"):
            ImageDataset("x", ["a"], labels, ["c"])
    with pytest.raises(UserError, match="masks and ids differ"):
        ImageDataset("x", ["a"], [0], ["c"], masks=[])
    with pytest.raises(NotImplementedError):
        ImageDataset("x", ["a"], [0], ["c"])[0]


def test_subset_keeps_ids_classes_and_annotations(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    whole = open_dataset(table(tmp_path, "path,label,group\na.png,x,1\nb.png,y,2\n"))
    part = whole.subset([1])
    assert (part.ids, part.classes, part.labels.tolist()) == (["b.png"], ["x", "y"], [1])
    assert part[0].id == "b.png" and part[0].label == 1 and part.meta_of(0) == {"group": "2"}
    prints = [
        whole.fingerprint(),
        part.fingerprint(),
        whole.subset([0]).fingerprint(),
        whole.subset([1, 0]).fingerprint(),
    ]
    assert len(set(prints)) == 4
    assert part.fingerprint() == whole.subset([1]).fingerprint()


def test_fingerprint_follows_content_not_place(tmp_path, monkeypatch):
    original = birds(tmp_path / "here")
    copy = tmp_path / "there"
    shutil.copytree(original, copy, copy_function=shutil.copy)
    before = open_dataset(original).fingerprint()
    assert len(before) == 32 and int(before, 16) >= 0
    assert open_dataset(copy).fingerprint() == before
    picture(copy / "002.Wren/a.jpg", (0, 0, 0))
    assert open_dataset(copy).fingerprint() != before
    (original / "002.Wren/b.png").rename(original / "002.Wren/z.png")
    assert open_dataset(original).fingerprint() != before


def test_large_data_is_fingerprinted_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(vfm_core.dataset, "CONTENT_HASH_LIMIT", 0)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("content must not be read"))
    birds(tmp_path)
    before = open_dataset(tmp_path).fingerprint()
    assert open_dataset(tmp_path).fingerprint() == before
    path = tmp_path / "002.Wren/b.png"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_dataset(tmp_path).fingerprint() != before


def test_fingerprint_covers_labels_boxes_masks_and_missing_files(tmp_path):
    picture(tmp_path / "a.png")
    mask = picture(tmp_path / "m.png")
    texts = [
        "path,label\na.png,x\n",
        "path,label\na.png,y\n",
        "path,label,x0,y0,x1,y1\na.png,x,0,0,1,1\n",
        "path,label,x0,y0,x1,y1\na.png,x,0,0,1,2\n",
        "path,label,mask\na.png,x,m.png\n",
    ]
    prints = [open_dataset(table(tmp_path, text)).fingerprint() for text in texts]
    picture(mask, (0, 0, 0))
    prints.append(open_dataset(tmp_path / "birds.csv").fingerprint())
    mask.unlink()
    prints.append(open_dataset(tmp_path / "birds.csv").fingerprint())
    assert len(set(prints)) == len(prints)


def test_dataset_pickles(tmp_path):
    dataset = open_dataset(birds(tmp_path)).subset([1, 2])
    again = pickle.loads(pickle.dumps(dataset))
    assert again.ids == dataset.ids and again.fingerprint() == dataset.fingerprint()


def test_importing_data_does_not_import_heavy_libraries():
    heavy = ("datasets", "timm", "transformers", "open_clip")
    code = f"import sys, vfm_core.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
