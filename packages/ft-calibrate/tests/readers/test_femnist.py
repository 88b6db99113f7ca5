import json
from pathlib import Path

import numpy as np
import pytest
from ft_calibrate.readers import femnist
from ft_calibrate.readers.femnist import CLASSES
from vfm_core.data import open_dataset
from vfm_core.errors import UserError


def leaf(path: Path, users: dict[str, list[int]], start: int = 0, **changes) -> Path:
    """Each character is one grey value: (start + its number) / 255."""
    data, number = {}, start
    for user, labels in users.items():
        x = [[(number + i) / 255] * 784 for i in range(len(labels))]
        number += len(labels)
        data[user] = {"x": x, "y": labels}
    content = {"users": list(users), "num_samples": [len(y) for y in users.values()], "user_data": data}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_classes_are_digits_capitals_and_small_letters():
    assert len(CLASSES) == 62
    assert (CLASSES[0], CLASSES[9], CLASSES[10], CLASSES[35], CLASSES[36], CLASSES[61]) == tuple("09AZaz")


def test_a_writer_is_a_domain(tmp_path):
    leaf(tmp_path / "all_data_0.json", {"f0001_41": [0, 10, 61], "f0002_07": [3]})
    leaf(tmp_path / "all_data_1.json", {"f0003_12": [5, 5]}, start=100)
    data = open_dataset(f"femnist:{tmp_path}?writer=f0001_41")
    assert data.labels.tolist() == [0, 10, 61]
    assert [np.asarray(sample.image)[0, 0].tolist() for sample in data] == [[0] * 3, [1] * 3, [2] * 3]
    assert data[0].image.size == (28, 28)
    assert data[0].meta["group"] == "f0001_41"
    both = open_dataset(f"femnist:{tmp_path}?writer=f0001_41,f0003_12")
    assert both.labels.tolist() == [0, 10, 61, 5, 5]
    assert len(set(both.ids)) == 5
    assert len(open_dataset(f"femnist:{tmp_path}")) == 6
    assert len(open_dataset(f"femnist:{tmp_path / 'all_data_1.json'}")) == 2


def test_folders_are_splits(tmp_path):
    leaf(tmp_path / "data" / "train" / "a_train_9.json", {"w0": [1, 2], "w1": [3]})
    leaf(tmp_path / "data" / "test" / "a_test_9.json", {"w0": [4]})
    with pytest.raises(UserError, match="several splits"):
        open_dataset(f"femnist:{tmp_path}?writer=w0")
    assert open_dataset(f"femnist:{tmp_path}?writer=w0@train").labels.tolist() == [1, 2]
    assert open_dataset(f"femnist:{tmp_path}@test?writer=w0").labels.tolist() == [4]
    everything = open_dataset(f"femnist:{tmp_path}@all")
    assert sorted(everything.labels.tolist()) == [1, 2, 3, 4]


def test_without_folders_classes_are_split_seven_to_three(tmp_path):
    leaf(tmp_path / "a.json", {"w": [4] * 10 + [7] * 20})
    train, test = (open_dataset(f"femnist:{tmp_path}@{s}") for s in ("train", "test"))
    assert np.bincount(train.labels)[[4, 7]].tolist() == [7, 14]
    assert np.bincount(test.labels)[[4, 7]].tolist() == [3, 6]
    assert not set(train.ids) & set(test.ids)
    grey = [np.asarray(train[i].image)[0, 0, 0] for i in range(len(train))]
    assert grey == [int(name.split("/")[1]) for name in train.ids]


def test_the_fingerprint_covers_the_pixels(tmp_path):
    leaf(tmp_path / "a.json", {"w": [4, 5]})
    before = open_dataset(f"femnist:{tmp_path}").fingerprint()
    assert open_dataset(f"femnist:{tmp_path}").fingerprint() == before
    leaf(tmp_path / "a.json", {"w": [4, 5]}, start=9)
    assert open_dataset(f"femnist:{tmp_path}").fingerprint() != before


def test_a_writer_in_several_files_keeps_unique_ids(tmp_path):
    leaf(tmp_path / "a.json", {"w": [4, 5]})
    leaf(tmp_path / "b.json", {"w": [6]})
    assert open_dataset(f"femnist:{tmp_path}").ids == ["w/0", "w/1", "w/2"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"user_data": None}, "no field 'user_data'"),
        ({"user_data": {"w": {"x": [[0.0] * 784], "y": [62]}}}, "labels from 62 to 62, expected whole numbers 0 to 61"),
        ({"user_data": {"w": {"x": [[2.0] * 784], "y": [6]}}}, "pixels from 2 to 2, expected 0 to 1"),
        ({"user_data": {"w": {"x": [[0.0] * 783], "y": [6]}}}, "x has shape (1, 783)"),
        ({"user_data": {"w": {"x": [["a"] * 784], "y": [6]}}}, "something else than numbers"),
        ({"user_data": {"w": {"x": [[0.0] * 784]}}}, "no y"),
        ({"user_data": {"v": {"x": [[0.0] * 784], "y": [6]}}}, "writer has no data"),
        ({"num_samples": [2]}, "1 characters, num_samples says 2"),
        ({"num_samples": [1, 2]}, "users and num_samples differ in length"),
    ],
)
def test_malformed_files_name_writer_and_field(tmp_path, changes, message):
    path = leaf(tmp_path / "a.json", {"w": [1]}, **changes)
    with pytest.raises(UserError) as error:
        open_dataset(f"femnist:{tmp_path}")
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(UserError, match="no JSON files of LEAF"):
        open_dataset(f"femnist:{tmp_path}")
    path = leaf(tmp_path / "a.json", {"f0001_41": [1]})
    with pytest.raises(UserError, match=r"unknown writer in .*: 'f0001_14'; did you mean f0001_41"):
        open_dataset(f"femnist:{tmp_path}?writer=f0001_14")
    with pytest.raises(UserError, match="unknown split"):
        open_dataset(f"femnist:{tmp_path}@dev")
    path.write_text(path.read_text()[:-30])
    with pytest.raises(UserError, match=r"malformed JSON .* in .*a.json, line 1"):
        open_dataset(f"femnist:{tmp_path}")


def test_each_writers_pixels_are_parsed_once(tmp_path, monkeypatch):
    parsed = []

    class Counting:
        def __getattr__(self, name):
            return getattr(np, name)

        def asarray(self, values, *args, **kwargs):
            found = np.asarray(values, *args, **kwargs)
            parsed.extend([found.shape] * (found.shape[1:] == (784,)))
            return found

    leaf(tmp_path / "a.json", {"w0": [1, 2], "w1": [3]})
    monkeypatch.setattr(femnist, "np", Counting())
    assert len(open_dataset(f"femnist:{tmp_path}")) == 3
    assert parsed == [(2, 784), (1, 784)]
