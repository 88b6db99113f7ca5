from pathlib import Path

import numpy as np
import pytest
from vfm_core.data import open_dataset
from vfm_core.errors import UserError

HEADER = ",split,location_remapped,location,sequence_remapped,seq_num_frames,datetime,y,filename"
ROWS = [  # split, camera, day, y
    ("train", 3, 1, 0),
    ("train", 3, 3, 2),
    ("train", 3, 2, 2),
    ("id_val", 3, 4, 5),
    ("test", 8, 1, 0),
    ("test", 8, 2, 99999),
    ("val", 12, 5, 1),
]


def wilds(
    root: Path, picture, rows=ROWS, categories: str | None = "y,category_id,name\n0,0,empty\n1,5,tapir\n5,9,ocelot\n"
):
    lines = [HEADER]
    for i, (split, camera, day, y) in enumerate(rows):
        lines.append(f"{i},{split},{camera},99,7,1,2013-01-{day:02d} 13:30:20.000,{y},{i:03d}.jpg")
        picture(root / "train" / f"{i:03d}.jpg", i)
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    if categories is not None:
        (root / "categories.csv").write_text(categories)
    return root


def test_a_location_is_a_domain_and_shares_the_classes(tmp_path, picture):
    root = wilds(tmp_path, picture)
    data = open_dataset(f"iwildcam:{root}?location=3@train")
    assert data.labels.tolist() == [0, 2, 2]
    assert data.classes == ["empty", "tapir", "2", "3", "4", "ocelot"]
    assert data[1].meta == {"group": "3", "time": "2013-01-03 13:30:20.000", "split": "train"}
    assert data[1].image.size == (8, 6)
    other = open_dataset(f"iwildcam:{root}?location=8")  # one split only: no choice needed
    assert other.labels.tolist() == [0, -1]
    assert other.classes == data.classes
    assert len(open_dataset(f"iwildcam:{root}@all")) == 7
    assert len(open_dataset(f"iwildcam:{root}?location=8,12@all")) == 3
    assert open_dataset(f"iwildcam:{root}@id_val").labels.tolist() == [5]


def test_the_folder_of_the_archive_is_found(tmp_path, picture):
    wilds(tmp_path / "iwildcam_v2.0", picture, categories=None)
    data = open_dataset(f"iwildcam:{tmp_path}@test")
    assert data.classes == [str(i) for i in range(6)]
    assert len(data) == 2


def test_a_location_can_be_split_by_time(tmp_path, picture):
    rows = [("train", 1, day, 0) for day in (9, 2, 7, 4, 5, 6, 3, 8, 1, 10)]
    root = wilds(tmp_path, picture, rows)
    train, test = (open_dataset(f"iwildcam:{root}?location=1&by=time@{s}") for s in ("train", "test"))
    assert max(m["time"] for m in train.meta) < min(m["time"] for m in test.meta)
    assert (len(train), len(test)) == (7, 3)
    with pytest.raises(UserError, match="unknown split"):
        open_dataset(f"iwildcam:{root}?by=time@val")


def test_a_location_can_be_split_by_class(tmp_path, picture):
    root = wilds(tmp_path, picture, [("train", 1, 1, y) for y in [0] * 10 + [5] * 20])
    train, test = (open_dataset(f"iwildcam:{root}?location=1&by=class@{s}") for s in ("train", "test"))
    assert np.bincount(train.labels)[[0, 5]].tolist() == [7, 14]
    assert np.bincount(test.labels)[[0, 5]].tolist() == [3, 6]
    assert not set(train.ids) & set(test.ids)


def test_any_table_of_a_camera_trap(tmp_path, picture):
    table = tmp_path / "traps.csv"
    table.write_text("File,Species,Site,When\na/1.jpg,red fox,N,2020-05-01\na/2.jpg,badger,S,2020-05-02\na/3.jpg,,N,\n")
    for i in (1, 2, 3):
        picture(tmp_path / "pictures" / "a" / f"{i}.jpg", i)
    spec = f"iwildcam:{table}?image=File&label=species&camera=Site&time=When&images=pictures"
    data = open_dataset(spec)
    assert data.classes == ["badger", "red fox"]
    assert data.labels.tolist() == [1, 0, -1]
    assert data[0].meta == {"group": "N", "time": "2020-05-01"}
    assert open_dataset(spec + "&location=N").labels.tolist() == [1, -1]
    with pytest.raises(UserError, match=r"no column 'split'.*@train.*\?by=class"):
        open_dataset(spec + "@train")
    with pytest.raises(UserError, match=r"not a time in .*traps.csv, line 4, column when"):
        open_dataset(spec + "&by=time@train")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("", "several splits and none chosen"),
        ("@dev", "unknown split"),
        ("?location=4@train", "unknown location in {table}, column location_remapped: '4'"),
        ("?label=species@train", "no column 'species' in {table}, line 1"),
        ("?by=night@train", "unknown way to split in ?by=: 'night'"),
        ("?images=nowhere@train", "no such folder of pictures in ?images=: nowhere"),
        ("?loc=3", "unknown option"),
    ],
)
def test_wrong_specs_name_the_option(tmp_path, picture, spec, message):
    root = wilds(tmp_path, picture)
    with pytest.raises(UserError) as error:
        open_dataset(f"iwildcam:{root}{spec}")
    assert message.format(table=root / "metadata.csv") in str(error.value)


def test_malformed_files_name_the_line(tmp_path, picture):
    with pytest.raises(UserError, match=r"no metadata.csv"):
        open_dataset(f"iwildcam:{tmp_path}")
    root = wilds(tmp_path, picture, [("train", 1, 1, 100000)])
    with pytest.raises(UserError, match=r"class number out of range in .*line 2, column y: 100000"):
        open_dataset(f"iwildcam:{root}")
    wilds(tmp_path, picture, categories="y,name\nfox,fox\n")
    with pytest.raises(UserError, match=r"not a class number in .*categories.csv, line 2: fox"):
        open_dataset(f"iwildcam:{root}@train")
    wilds(tmp_path, picture)
    (root / "train").rename(root / "moved")
    with pytest.raises(UserError, match=r"pictures of the table not found.*\?images="):
        open_dataset(f"iwildcam:{root}@train")
    assert len(open_dataset(f"iwildcam:{root}@train?images=moved")) == 3
    text = (root / "metadata.csv").read_text().replace("000.jpg", "")
    (root / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=r"empty file name in .*line 2, column filename"):
        open_dataset(f"iwildcam:{root}@train?images=moved")
