import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from ft_calibrate.cli import app
from ft_calibrate.record import Calibration
from ft_calibrate.tables import read_table
from PIL import Image
from safetensors.torch import load_file, save_file
from vfm_core.cli import run_app
from vfm_core.data import open_dataset

BIRDS = "tinyworld:birds?n=32"
COMMAND = [sys.executable, "-m", "ft_calibrate"]


def call(capsys, *arguments):
    """Run the command line in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as caught:
        run_app(app, [str(a) for a in arguments])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def extract(capsys, out, *more, data=BIRDS, model="tiny:cnn"):
    return call(capsys, "extract", "--model", model, "--data", data, "--out", out, "--device", "cpu", *more)


def gamma_file(tmp_path, classes, absent, gamma=4.0):
    seen = tuple(c for c in classes if c not in absent)
    path = tmp_path / "gamma.json"
    Calibration("fixed", gamma, tuple(classes), seen, tuple(absent)).write(path)
    return path


# ---------------------------------------------------------------------- extract
def test_extract_writes_one_file_or_shards(capsys, tmp_path):
    code, out, err = extract(capsys, tmp_path / "a.npz")
    assert code == 0 and "32 images x 16 logits" in out and "images/s" in out, err
    one = read_table(tmp_path / "a.npz")
    assert one.features.shape == (32, 64) and (one.labels >= 0).all() and "bird" in one.classes[0]
    arguments = ("--shard-rows", 10, "--no-features", "--format", "parquet", "--json")
    code, out, err = extract(capsys, tmp_path / "shards", *arguments)
    found = json.loads(out)
    assert code == 0 and (found["rows"], found["shards"], found["computed"]) == (32, 4, 4), err
    shards = read_table(tmp_path / "shards")
    np.testing.assert_allclose(shards.logits, one.logits, atol=1e-5)
    assert shards.features is None and shards.labels.tolist() == one.labels.tolist()
    code, out, _ = extract(capsys, tmp_path / "shards", *arguments[:-1])
    assert code == 0 and "4 of 4 shards kept" in out


def test_extract_tells_the_factor_in_whose_units_gamma_is(capsys, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(open_dataset(BIRDS).classes))
    arguments = ("--classes", tmp_path / "names.txt")
    code, out, err = extract(capsys, tmp_path / "shards", *arguments, model="tiny:clip")
    assert code == 0 and "logits are cosines x 15.31, gamma is in these units" in out, err
    assert json.loads((tmp_path / "shards" / "config.json").read_text())["logit_scale"] == pytest.approx(
        15.31, abs=0.01
    )
    code, out, _ = extract(capsys, tmp_path / "shards", *arguments, "--json", model="tiny:clip")
    assert json.loads(out)["logit_scale"] == pytest.approx(15.31, abs=0.01)
    code, out, _ = extract(capsys, tmp_path / "plain.npz", "--no-features")
    assert code == 0 and "cosines" not in out


def test_unreadable_images_are_listed_or_stop_a_strict_run(capsys, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (90, 9, 9)).save(tmp_path / "photos" / name / "0.png")
    (tmp_path / "photos" / "a" / "1.png").write_bytes(b"cut")
    (tmp_path / "names.txt").write_text("b\na\n" + "".join(f"other {i}\n" for i in range(14)))
    more = ("--classes", tmp_path / "names.txt")
    code, out, _ = extract(capsys, tmp_path / "o", *more, data=tmp_path / "photos")
    assert code == 0 and "1 unreadable images skipped" in out
    assert [r[0] for r in csv.reader((tmp_path / "o" / "skipped.csv").open())] == ["id", "a/1.png"]
    table = read_table(tmp_path / "o")
    assert dict(zip(table.ids, table.labels.tolist())) == {"a/0.png": 1, "b/0.png": 0}
    code, _, err = extract(capsys, tmp_path / "s", *more, "--strict", data=tmp_path / "photos")
    assert code == 2 and err.startswith("error: cannot read image") and "a/1.png" in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--model", "timm:resnet18.a1_in1k", "--offline"), "resnet18.a1_in1k"),
        (("--source-ckpt", "absent.pth"), "no such checkpoint file: absent.pth"),
        (("--data", "folder:nowhere"), "no such folder or file: nowhere"),
        (("--autocast", "int8"), "unknown dtype in --dtype: 'int8'"),
        (("--head", "nothing"), "unknown layer"),
        (("--format", "hdf"), "unknown format"),
    ],
)
def test_bad_input_of_extract_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, more, words):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    code, out, err = extract(capsys, tmp_path / "o", *more)
    assert code == 2 and words in err and err.count("\n") == 1 and err.startswith("error: ") and not out
    if "--offline" in more:
        assert "--source-ckpt" in err and "cache" in err


def test_a_killed_extract_resumes(capsys, tmp_path):
    data, arguments = "tinyworld:birds?n=240", ("--shard-rows", "16", "--batch-size", "16")
    command = [*COMMAND, "extract", "--model", "tiny:cnn", "--data", data, "--out", str(tmp_path / "o"), *arguments]
    process = subprocess.Popen([*command, "--device", "cpu"], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("o/shard-*.npz"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("o/shard-*.npz")}
    recorded = len((tmp_path / "o" / "results.jsonl").read_text().splitlines())
    assert len(done) >= 2 and recorded >= 1
    code, out, err = extract(capsys, tmp_path / "o", *arguments, "--json", data=data)
    assert code == 0, err
    assert json.loads(out)["computed"] == 15 - recorded
    assert sum(p.stat().st_mtime_ns == at for p, at in done.items()) >= recorded
    table = read_table(tmp_path / "o")
    assert len(table) == 240 and len(set(table.ids)) == 240


# ---------------------------------------------------------------------- export
def test_export_says_what_it_did(capsys, tmp_path):
    state = {"fc.weight": torch.zeros(3, 4), "fc.bias": torch.tensor([1.0, 2.0, 3.0])}
    save_file(state, tmp_path / "m.safetensors")
    gamma = gamma_file(tmp_path, ["a", "b", "c"], ["c"])
    arguments = ("export", "--model", tmp_path / "m.safetensors", "--head", "fc")
    code, out, err = call(capsys, *arguments, "--calibration", gamma, "-o", tmp_path / "o.safetensors")
    assert code == 0 and "gamma = 4, gamma added to 1 of 3 classes, in fc.bias (float32); method fixed" in out, err
    assert "matched by position" in out
    assert load_file(tmp_path / "o.safetensors")["fc.bias"].tolist() == [1.0, 2.0, 7.0]
    more = ("--gamma", 2, "--absent", "0,2", "-o", tmp_path / "p.safetensors", "--json")
    code, out, _ = call(capsys, *arguments, *more)
    assert code == 0 and json.loads(out)["moved"] == 2
    assert load_file(tmp_path / "p.safetensors")["fc.bias"].tolist() == [3.0, 2.0, 5.0]
    (tmp_path / "absent.txt").write_text("b\n")
    (tmp_path / "names.json").write_text('["a", "b", "c"]')
    more = ("--gamma", -1, "--absent", tmp_path / "absent.txt", "--classes", tmp_path / "names.json", "--overwrite")
    code, _, err = call(capsys, *arguments, *more, "-o", tmp_path / "p.safetensors")
    assert code == 0 and load_file(tmp_path / "p.safetensors")["fc.bias"].tolist() == [1.0, 1.0, 3.0], err


def test_extract_then_export_then_extract_gives_logits_plus_gamma(capsys, tmp_path, caplog):
    extract(capsys, tmp_path / "before.npz")
    before = read_table(tmp_path / "before.npz")
    gamma = gamma_file(tmp_path, before.classes, before.classes[8:])
    code, out, err = call(
        capsys, "export", "--model", "tiny:cnn", "--calibration", gamma, "-o", tmp_path / "cnn.safetensors"
    )
    assert code == 0 and "checked: logits differ from logits + gamma by at most" in out, err
    code, _, err = extract(capsys, tmp_path / "after.npz", "--source-ckpt", tmp_path / "cnn.safetensors")
    assert code == 0, err
    after = read_table(tmp_path / "after.npz")
    moved = before.logits + 4.0 * (np.arange(16) >= 8)
    np.testing.assert_allclose(after.logits, moved, atol=1e-5)
    assert (after.logits.argmax(1) == moved.argmax(1)).all()
    caplog.clear()
    call(capsys, "apply", tmp_path / "after.npz", "--calibration", gamma, "-o", tmp_path / "twice.csv")
    assert "holds a calibration already" in caplog.text
    caplog.clear()
    call(capsys, "apply", tmp_path / "before.npz", "--calibration", gamma, "-o", tmp_path / "once.csv")
    assert "holds a calibration" not in caplog.text


def test_a_head_without_bias_says_what_to_ship(capsys, tmp_path):
    save_file({"fc.weight": torch.zeros(3, 4)}, tmp_path / "m.safetensors")
    gamma = gamma_file(tmp_path, ["a", "b", "c"], ["c"])
    code, _, err = call(
        capsys,
        "export",
        "--model",
        tmp_path / "m.safetensors",
        "--calibration",
        gamma,
        "-o",
        tmp_path / "o.safetensors",
    )
    assert code == 2 and "has no bias" in err and "ship calibration.json" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "one of --calibration and --gamma"),
        (("--gamma", "1"), "needs the classes"),
        (("--gamma", "1", "--calibration", "x.json"), "one of --calibration and --gamma"),
        (("--calibration", "x.json"), "no such calibration file"),
        (("--gamma", "1", "--absent", "zebra"), "zebra"),
    ],
)
def test_bad_input_of_export_is_one_line_and_status_2(capsys, tmp_path, more, words):
    save_file({"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}, tmp_path / "m.safetensors")
    model = ("--model", tmp_path / "m.safetensors", "--head", "fc")
    code, _, err = call(capsys, "export", *model, "-o", tmp_path / "o.safetensors", *more)
    assert code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "o.safetensors").exists()


def test_help_of_the_real_command_shows_examples():
    done = subprocess.run([*COMMAND, "export", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "ft-calibrate export --model model.onnx" in done.stdout
