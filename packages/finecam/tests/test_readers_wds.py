import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from finecam.readers import register_readers
from PIL import Image
from vfm_core.data import loader, open_dataset
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
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


def jpeg(colour, size=(60, 40), kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def shard(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            content = content if isinstance(content, bytes) else str(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_wds_random_access_labels_boxes_and_masks(tmp_path):
    mask = io.BytesIO()
    Image.fromarray(np.eye(40, 60, dtype=np.uint8)).save(mask, "PNG")
    notes = {"box": [1, 2, 30, 40], "group": "site 4", "camera": "x"}
    shard(
        tmp_path / "birds-000.tar",
        [
            ("a/0001.jpg", jpeg((200, 0, 0))),
            ("a/0001.cls", 1),
            ("a/0001.json", json.dumps(notes)),
            ("a/0002.cls", "0\n"),
            ("a/0002.PNG", jpeg((0, 200, 0), kind="PNG")),
            ("a/0002.mask.png", mask.getvalue()),
            ("README", "no sample"),
        ],
    )
    shard(tmp_path / "birds-001.tar", [("b.jpeg", jpeg((0, 0, 200)))])
    dataset = open_dataset(f"wds:{tmp_path}")
    assert dataset.ids == ["birds-000/a/0001", "birds-000/a/0002", "birds-001/b"]
    assert dataset.labels.tolist() == [1, 0, -1] and dataset.classes == ["0", "1"]
    for i, channel in ((2, 2), (0, 0), (1, 1)):
        assert np.asarray(dataset[i].image).reshape(-1, 3).mean(0).argmax() == channel
    assert dataset[0].meta == {"box": (1.0, 2.0, 30.0, 40.0), "group": "site 4"}
    assert dataset[1].meta["mask"].sum() == 40
    write(tmp_path / "classnames.txt", "auk\nwren\n")
    assert open_dataset(f"wds:{tmp_path / 'birds-000.tar'}").classes == ["auk", "wren"]
    assert sum(len(i) for i, _, _ in loader(dataset, VIEW, 2, workers=2)) == 3


def test_wds_patterns_and_splits(tmp_path):
    for split, n in (("train", 2), ("test", 1)):
        for s in range(n):
            shard(tmp_path / split / f"{s:04d}.tar", [("x.jpg", jpeg((0, 0, 0))), ("x.cls", "auk")])
    assert open_dataset(f"wds:{tmp_path}@train").ids == ["0000/x", "0001/x"]
    assert open_dataset(f"wds:{tmp_path}@all").ids == ["test/0000/x", "train/0000/x", "train/0001/x"]
    assert open_dataset(f"wds:{tmp_path}/train/*.tar").classes == ["auk"]
    with pytest.raises(UserError, match="several splits"):
        open_dataset(f"wds:{tmp_path}")
    pytest.importorskip("braceexpand")
    assert len(open_dataset(f"wds:{tmp_path}/train/{{0000..0001}}.tar")) == 2
    with pytest.raises(UserError, match=r"no such shard.*0002\.tar"):
        open_dataset(f"wds:{tmp_path}/train/{{0000..0002}}.tar")


def test_wds_braces_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(UserError, match=r"pip install 'finecam\[webdataset\]'"):
        open_dataset(f"wds:{tmp_path}/{{0..1}}.tar")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([("a.cls", 1)], "sample without a picture in .*0.tar: a: cls"),
        ([("a.jpg", b""), ("a.json", "{")], "malformed JSON"),
        ([("a.jpg", b""), ("a.json", "[1]")], "JSON is not an object"),
        ([("a.jpg", b""), ("a.json", '{"box": [1, 2]}')], "box is not four numbers"),
        ([("a.jpg", b""), ("a.json", '{"label": [1]}')], "label is neither"),
        ([("a.jpg", b""), ("a.cls", "wren"), ("b.jpg", b""), ("b.cls", 1)], "labels are numbers in some samples"),
        ([("a.jpg", b""), ("b.jpg", b""), ("a.jpg", b"")], "image listed twice.*0/a"),
        ([], "no pictures"),
    ],
)
def test_wds_malformed_shards_are_named(tmp_path, files, says):
    shard(tmp_path / "0.tar", files)
    with pytest.raises(UserError, match=says):
        open_dataset(f"wds:{tmp_path}")


def test_wds_damaged_and_compressed_shards(tmp_path):
    whole = shard(tmp_path / "a/0.tar", [(f"{i}.jpg", jpeg((i, 0, 0))) for i in range(5)]).read_bytes()
    cut = tmp_path / "b/0.tar"
    cut.parent.mkdir()
    cut.write_bytes(whole[:1500])
    with pytest.raises(UserError, match=r"cannot read shard.*0\.tar"):
        open_dataset(f"wds:{cut}")
    shard(tmp_path / "c/0.tar", [("x.jpg", jpeg((0, 0, 0)))], mode="w:gz")
    with pytest.raises(UserError, match="uncompressed"):
        open_dataset(f"wds:{tmp_path / 'c'}")
    with pytest.raises(UserError, match=r"no \.tar shards"):
        open_dataset(f"wds:{picture(tmp_path / 'd/x.jpg').parent}")
    shard(tmp_path / "e/0.tar", [("x.jpg", b"no picture")])
    with pytest.raises(UserError, match=r"cannot read image.*0\.tar: x"):
        open_dataset(f"wds:{tmp_path / 'e'}")[0]


def test_wds_fewer_names_than_classes(tmp_path):
    shard(tmp_path / "0.tar", [("x.jpg", b""), ("x.cls", 2)])
    write(tmp_path / "classnames.txt", "auk\nwren\n")
    with pytest.raises(UserError, match="label 2 for 2 names"):
        open_dataset(f"wds:{tmp_path}")


@pytest.mark.skipif(not DATA.is_dir(), reason="real data folder ../shared/data is absent")
def test_wds_written_by_webdataset_from_real_photos(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    photos = open_dataset(DATA / "birds")
    with webdataset.ShardWriter(str(tmp_path / "birds-%02d.tar"), maxcount=4, verbose=0) as sink:
        for i, file in enumerate(photos.files):
            sink.write({"__key__": f"{i:03d}", "jpg": file.read_bytes(), "cls": i})
    dataset = open_dataset(f"wds:{tmp_path}")
    assert len(dataset) == 9 and len(list(tmp_path.glob("*.tar"))) == 3
    assert dataset.labels.tolist() == list(range(9))
    assert all(np.array_equal(np.asarray(a.image), np.asarray(b.image)) for a, b in zip(dataset, photos))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tmp_path.glob("*.tar"):
        (copy / path.name).write_bytes(path.read_bytes())
    assert open_dataset(f"wds:{copy}").fingerprint() == dataset.fingerprint()
