import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from ft_calibrate.cli import app
from ft_calibrate.splits import official_split, pseudo_splits, read_split
from PIL import Image
from vfm_core.cli import run_app


@pytest.fixture
def call(capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leave:
            run_app(app, [str(a) for a in arguments])
        out, err = capsys.readouterr()
        return leave.value.code, out, err

    return run


@pytest.fixture
def table(tmp_path) -> Path:
    """Scores of 6 classes with features in two groups: 0, 2, 4 and 1, 3, 5."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 5)
    features = np.where((labels % 2 == 0)[:, None], [5.0, 0, 0], [0, 5.0, 0]) + 0.3 * rng.normal(size=(30, 3))
    path = tmp_path / "t.npz"
    logits = rng.normal(size=(30, 6)).astype(np.float32)
    np.savez(path, logits=logits, labels=labels, features=features, classes=np.array(list("abcdef")))
    return path


def test_the_real_command_writes_a_reference_split(tmp_path):
    """Through the entry point, in a process of its own."""
    command = [str(Path(sys.executable).with_name("ft-calibrate")), "split", "ar-30", "--out", "s.json", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["seen"] == list(official_split("ar-30").seen)
    assert read_split(tmp_path / "s.json") == official_split("ar-30")
    bad = subprocess.run([*command[:2], "nothing", *command[3:]], cwd=tmp_path, capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: unknown kind of split in KIND: 'nothing'; use random")
    assert bad.stderr.count("\n") == 1


def test_random_splits_of_data_classes_and_numbers(call, tmp_path):
    out = tmp_path / "s.json"
    code, text, _ = call("split", "random", "--data", "tinyworld:glyphs?n=1", "--n-seen", 10, "--seed", 1, "-o", out)
    assert code == 0
    assert str(out) in text
    split = read_split(out)
    assert (len(split.seen), split.seed, split.classes[0]) == (10, 1, "g00")
    names = tmp_path / "names.txt"
    names.write_text("owl\nfox\nbat\n")
    assert call("split", "random", "--classes", names, "--share", 0.3, "-o", tmp_path / "n.json")[0] == 0
    assert len(read_split(tmp_path / "n.json").seen) == 1
    assert call("split", "random", "--classes", 7, "-o", tmp_path / "k.json")[0] == 0
    assert read_split(tmp_path / "k.json").classes == tuple("0123456")


def test_similarity_splits_of_a_table(call, tmp_path, table):
    code, text, _ = call("split", "similarity", "--features", table, "--n-seen", 3, "-o", tmp_path / "s.json", "--json")
    assert code == 0
    assert json.loads(text)["seen"] in (["a", "c", "e"], ["b", "d", "f"])
    np.savez(tmp_path / "bare.npz", logits=np.zeros((2, 3), dtype=np.float32), labels=np.array([0, 1]))
    code, _, err = call("split", "similarity", "--features", tmp_path / "bare.npz", "-o", tmp_path / "x.json")
    assert (code, err.startswith("error: no features in")) == (2, True)


def test_similarity_splits_by_a_model(call, tmp_path):
    arguments = ("--data", "tinyworld:glyphs?n=2", "--model", "tiny:glyph-cnn?seed=0", "--device", "cpu", "--quiet")
    code, _, err = call("split", "similarity", *arguments, "--n-seen", 6, "-o", tmp_path / "s.json")
    assert code == 0, err
    assert len(read_split(tmp_path / "s.json").seen) == 6


def test_a_file_becomes_a_split(call, tmp_path):
    (tmp_path / "seen.txt").write_text("g03\ng01\n")
    out = tmp_path / "s.json"
    assert call("split", tmp_path / "seen.txt", "--data", "tinyworld:glyphs?n=1", "-o", out)[0] == 0
    assert read_split(out).columns["seen"] == [1, 3]


def test_sweeps_and_folds(call, tmp_path):
    out = tmp_path / "s.json"
    code, text, _ = call("split", "rw-30", "--sweep", "0.2,1", "-o", out, "--json", "--folds", 2)
    assert code == 0
    assert [len(read_split(tmp_path / f"s-{s}.json").seen) for s in ("0.2", "1")] == [6, 30]
    shown = json.loads(text)
    assert len(shown["sweep"]) == 2
    expected = pseudo_splits(official_split("rw-30").seen, 2, 0)
    assert [(tuple(p["seen"]), tuple(p["absent"])) for p in shown["pseudo"]] == expected
    code, text, _ = call("split", "rw-30", "-o", out, "--folds", 2)
    assert "pseudo-absent" in text


def test_another_split_is_not_overwritten(call, tmp_path):
    out = tmp_path / "s.json"
    assert call("split", "ar-30", "-o", out)[0] == 0
    assert call("split", "ar-30", "-o", out)[0] == 0
    code, _, err = call("split", "rw-30", "-o", out)
    assert code == 2
    assert err == f"error: the file holds another split in --out: {out}; choose another --out or add --overwrite\n"
    assert read_split(out) == official_split("ar-30")
    assert call("split", "rw-30", "-o", out, "--overwrite")[0] == 0
    assert read_split(out) == official_split("rw-30")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("random",), "no list of all classes in split random; give --data, --classes or --features"),
        (("similarity", "--classes", "5"), "no features in split similarity; give --features FILE"),
        (("random", "--classes", "5", "--data", "tinyworld:glyphs"), "two sources of classes"),
        (("ar-30", "--share", "0.5"), "a share applies to random and similarity in --share"),
        (("ar-30", "--sweep", "half"), "not a list of numbers in --sweep: 'half'"),
        (("ar-30", "--sweep", "2"), "share of seen classes out of range: 2.0"),
        (("random", "--classes", "5", "--n-seen", "5"), "number of seen classes out of range: 5; choose 1 to 4"),
        (("ar-30", "--classes", "5"), "unknown class in classes for split office-home:Ar: 'Bottle'"),
    ],
)
def test_wrong_options_are_named(call, tmp_path, arguments, message):
    code, _, err = call("split", *arguments, "-o", tmp_path / "s.json")
    assert code == 2
    assert message in err
    assert not (tmp_path / "s.json").exists()


# ----------------------------------------------------------------------------------------------------------------- data
def test_the_formats_are_listed(call):
    code, text, _ = call("data", "--json")
    assert code == 0
    listed = {row["spec"].split(":")[0] for row in json.loads(text)}
    ours = {p.name for p in entry_points(group="vfm_core.data") if p.value.startswith("ft_calibrate.")}
    assert len(ours) >= 7
    assert ours < listed
    assert listed <= {"folder", "csv", "hf"} | {p.name for p in entry_points(group="vfm_core.data")}
    assert "office-home:ROOT" in call("data")[1]


def test_data_are_described(call, tmp_path):
    for part, n in (("train", 3), ("test", 2)):
        for name in ("owl", "fox", "bat"):
            for i in range(n + (name == "owl")):
                path = tmp_path / "animals" / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "seen.txt").write_text("owl\n")
    code, text, _ = call("data", f"folder:{tmp_path / 'animals'}", "--seen", tmp_path / "seen.txt", "--json")
    assert code == 0
    found = json.loads(text)
    assert found["classes"] == ["bat", "fox", "owl"]
    assert [(row["split"], row["images"], row["smallest"], row["largest"]) for row in found["splits"]] == [
        ("test", 7, 2, 3),
        ("train", 10, 3, 4),
    ]
    groups = {row["group"]: (row["train"], row["test"]) for row in found["groups"]}
    assert groups == {"S (seen)": (4, 3), "U (absent)": (6, 4)}
    code, text, _ = call("data", f"folder:{tmp_path / 'animals'}", "--seen", "owl,fox", "--json")
    assert [(row["train"], row["test"]) for row in json.loads(text)["groups"]] == [(7, 5), (3, 2)]
    code, text, _ = call("data", f"folder:{tmp_path / 'animals'}@train", "--per-class")
    assert "owl" in text
    assert "Per class" in text
    for seen in ("ar-30", "owl,fux"):
        code, _, err = call("data", f"folder:{tmp_path / 'animals'}", "--seen", seen)
        assert (code, "unknown class" in err) == (2, True)
    assert call("data", "folder:nowhere")[0] == 2


def test_a_split_without_files_of_its_own_is_described(call, tmp_path):
    for c, name in enumerate(("Bottle", "Exit_Sign")):
        for i in range(10):
            path = tmp_path / "Real World" / name / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (c, i, 0)).save(path)
    code, text, _ = call("data", f"office-home:{tmp_path}?domain=Rw", "--seen", "ar-30", "--json")
    assert code == 0
    found = json.loads(text)
    assert {row["split"]: row["images"] for row in found["splits"]} == {"train": 14, "test": 6}
    assert len(found["classes"]) == 65
    assert found["groups"][0] == {"group": "S (seen)", "classes": 30, "train": 14, "test": 6}
