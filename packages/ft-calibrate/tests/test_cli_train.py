"""``ft-calibrate train``: from a command to a run folder, and what is told when that cannot be."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from ft_calibrate import diagnosis_report
from ft_calibrate.calibration import fit_calibration
from ft_calibrate.classifier import load_classifier
from ft_calibrate.cli import main
from ft_calibrate.groups import class_groups
from ft_calibrate.predict import predict_table
from ft_calibrate.recipes import load_run, recipe_names
from ft_calibrate.record import read_calibration
from ft_calibrate.tables import write_table
from tinyworld.glyphs import Glyphs
from vfm_core.data import open_dataset

SEEN = "g00,g01,g02,g03,g04"
DATA, TEST = "tinyworld:glyphs?domain=target&n=8", "tinyworld:glyphs?domain=target&split=test&n=4"
FAST = ("--epochs", 2, "--lr", 0.05, "--batch-size", 16, "--device", "cpu")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """The command in this process: its exit code, standard output and standard error."""
    monkeypatch.setenv("VFM_CORE_CACHE", str(tmp_path / "cache"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ft-calibrate", "train", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture
def train(call, tmp_path):
    def run(*arguments, out=tmp_path / "run", data=DATA, seen=("--seen", SEEN)):
        return call("--model", "tiny:glyph-cnn", "--data", data, *seen, "--out", out, *FAST, *arguments)

    return run


def test_help_and_list(call):
    code, out, _ = call("--help")
    assert code == 0 and "Examples" in out and "--seen-split" in out
    code, out, _ = call("--list-recipes")
    assert code == 0 and all(name in out for name in recipe_names()) and "common baseline" in out


def test_a_run_folder_holds_everything(train, tmp_path):
    out = tmp_path / "run"
    code, text, err = train("--test", TEST, "--recipe", "lolsgd:M=2,E=2+distill")
    assert code == 0, err
    assert "60 of 160" not in err and "120 of 160 training images are of other classes: left out" in err
    assert "Accuracy on test data" in text and "lolsgd:M=2,E=2+distill + ALG" in text and "gamma_ALG" in text
    assert {p.name for p in out.iterdir() if p.name[0] != "."} == {
        *("config.json", "environment.json", "results.jsonl", "model.safetensors", "ft_calibrate.json"),
        *("calibration.json", "report.html"),
    }
    record = json.loads((out / "ft_calibrate.json").read_text())
    assert record["recipe"] == "lolsgd:M=2,E=2+distill" and record["seen"] == SEEN.split(",") and record["head"] == "fc"
    assert record["settings"]["parts"]["lolsgd"]["T"] == 2 and record["source"] == {"spec": "tiny:glyph-cnn"}
    assert [r["epoch"] for r in record["history"]] == [0, 1, 2] and "U/Y" in record["history"][0]
    run = load_run(out)
    folder = load_classifier(str(out))
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run.model(images), folder.model(images)) and folder.class_names == run.classes


def test_the_stored_gamma_is_the_logit_gap_on_the_training_rows(train, tmp_path):
    code, _, err = train("--recipe", "wise:0.5")
    assert code == 0, err
    stored = read_calibration(tmp_path / "run" / "calibration.json")
    start = load_run(tmp_path / "run").classifier
    data = Glyphs(n=8, domain="target")
    part = data.subset(np.flatnonzero(data.labels < 5))
    with torch.no_grad():
        z = start.model(torch.stack([start.preprocess(s.image) for s in part]))
    own = fit_calibration(z, part.labels, class_groups(start.class_names, SEEN.split(",")))
    assert (
        stored.gamma == pytest.approx(own.gamma, rel=1e-5) and stored.method == "alg" and not stored.uses_absent_labels
    )
    assert list(stored.seen) == SEEN.split(",")


def test_the_same_command_again_trains_nothing_and_another_is_refused(train, tmp_path):
    assert train()[0] == 0
    weights = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    code, out, err = train("--json")
    assert code == 0 and "epoch" not in err and json.loads(out)["recipe"] == "ft"
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == weights
    code, _, err = train("--lr", 0.1)
    assert code == 2 and "lr = 0.05 -> 0.1" in err and len(err.strip().splitlines()) <= 2
    code, out, _ = train("--lr", 0.1, "--overwrite", "--json", "--quiet", "--test", TEST, "--at-the-end")
    report = json.loads(out)
    assert code == 0 and [row["model"] for row in report["accuracies"]] == ["source", "ft", "ft + ALG"]
    assert report["gamma_alg"] == report["accuracies"][2]["gamma"] and "Y/Y" not in report["history"][1]


def test_a_finished_run_keeps_its_report_unless_there_is_a_new_test(train, tmp_path):
    page = tmp_path / "run" / "report.html"
    assert train("--test", TEST)[0] == 0
    first = page.read_text()
    assert "Accuracy on test data" in first
    assert train()[0] == 0 and page.read_text() == first
    assert train("--test", TEST.replace("n=4", "n=3"))[0] == 0
    assert "Accuracy on test data" in page.read_text() != first
    page.unlink()
    assert train()[0] == 0 and page.exists()
    assert train("--overwrite")[0] == 0 and "<h2>Accuracy on test data" not in page.read_text()
    assert train("--overwrite", seen=("--seen", "g03"))[0] == 0
    assert not (tmp_path / "run" / "calibration.json").exists(), "gamma of the run before"


def test_analyses_per_epoch_from_training_to_report(call, train, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    code, _, err = train("--test", TEST, "--log-analyses", "--all-data", DATA, "--recipe", "source-ensemble")
    assert code == 0, err
    assert "Y/Y 0." in err and "logit_scale" not in err and "logit_scale" not in (out / "report.html").read_text()
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 2] and not (out / "state").exists()
    for key in ("logit_scale/test/softmax_S", "logit_scale/train/max_U", "margin/test/margin", "head_norm/U"):
        assert all(np.isfinite(line[key]) for line in lines)
    assert any(k.startswith("movement/train/U") for k in lines[1])
    plain = train("--test", TEST, "--recipe", "source-ensemble", out=tmp_path / "plain")
    assert plain[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "plain" / "results.jsonl").read_text().splitlines()]
    assert all(line[k] == row[k] for line, row in zip(lines, rows) for k in ("Y/Y", "S/Y", "U/Y", "S/S", "U/U"))

    run = load_run(out)
    table = predict_table(run.classifier, open_dataset(TEST))
    write_table(table, tmp_path / "test.npz")
    command = ["report", tmp_path / "test.npz", "--seen", SEEN, "--bootstrap", 10, "--json", "-o", tmp_path / "page"]
    monkeypatch.setattr(diagnosis_report, "FIGURES", {"logit_gap.png": diagnosis_report.FIGURES["logit_gap.png"]})
    for history, expected in ((out, 0), (tmp_path / "plain", 2), (tmp_path / "nothing", 2)):
        monkeypatch.setattr(sys, "argv", ["ft-calibrate", *map(str, command), "--epochs", str(history)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert int(end.value.code or 0) == expected, printed.err
        if expected:
            assert "no series per epoch" in printed.err or "no history" in printed.err
        else:
            assert len(json.loads(printed.out)["epochs"]) == 4
    code, _, err = train("--test", TEST, "--log-analyses", "--recipe", "source-ensemble", out=tmp_path / "plain")
    assert code == 0 and "finished without --log-analyses" in err


def test_seen_classes_from_files_labels_and_all(train, tmp_path, caplog):
    names = [f"g{i:02d}" for i in range(20)]
    split = tmp_path / "splits.json"
    split.write_text(json.dumps({"classes": names, "seen": names[:4], "absent": names[10:12]}))
    code, _, err = train(seen=("--seen-split", split), out=tmp_path / "a")
    assert code == 0, err
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    assert settings["seen"] == names[:4] and settings["absent"] == names[10:12] and settings["rows"] == 32
    (tmp_path / "seen.txt").write_text("g07\ng03\n")
    assert train(seen=("--seen", tmp_path / "seen.txt"), out=tmp_path / "b")[0] == 0
    assert json.loads((tmp_path / "b" / "config.json").read_text())["seen"] == ["g03", "g07"]
    code, _, err = train(seen=(), out=tmp_path / "c")
    assert code == 0 and "all 20 classes are seen" in caplog.text
    assert read_calibration(tmp_path / "c" / "calibration.json").gamma == 0
    code, _, err = train("--seen-split", split, out=tmp_path / "d")
    assert code == 2 and "give one of them" in err


def test_oracle_trains_on_all_classes_and_one_class_has_no_gap(train, tmp_path, caplog):
    code, text, err = train("--recipe", "oracle-ft", "--test", TEST)
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["rows"] == 160 and "oracle-ft + ALG" in text
    page = (tmp_path / "run" / "report.html").read_text()
    assert "oracle-ft (upper bound, not deployable)" in page and "labels of absent classes were not used" not in page
    assert "The training used labels of absent classes" in page and "upper bound" in text
    assert not (tmp_path / "run" / "calibration.json").exists() and "gamma_ALG" not in text
    code, text, err = train("--test", TEST, seen=("--seen", "g03"), out=tmp_path / "one")
    assert code == 0 and "no calibration" in caplog.text and not (tmp_path / "one" / "calibration.json").exists()
    assert "ALG" not in text and "--method" in (tmp_path / "one" / "report.html").read_text()


def test_augmentation_squashes_the_test_pictures(train, tmp_path):
    code, _, err = train("--augment", "office-home", "--steps", 3, "--recipe", "bn-frozen")
    assert code == 0, err
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["augment"].startswith("Augmentation(size=16") and settings["steps_per_epoch"] == 3
    assert load_run(tmp_path / "run").classifier.preprocess.resize == "squash"
    assert load_classifier("tiny:glyph-cnn").preprocess.resize != "squash"


def test_unreadable_pictures_are_listed(call, tmp_path):
    folder = tmp_path / "photos"
    data = Glyphs(n=4, domain="target")
    for i in np.flatnonzero(data.labels < 3):
        path = folder / data.classes[data.labels[i]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data[i].image.save(path)
    (folder / "g01" / "torn.png").write_bytes(b"\x89PNG torn")
    arguments = ("--model", "tiny:glyph-cnn", "--data", folder, *FAST)
    code, _, err = call(*arguments, "--out", tmp_path / "run")
    assert code == 0 and "1 unreadable images skipped" in err
    listed = list(csv.reader((tmp_path / "run" / "skipped.csv").open()))
    assert listed[0] == ["id", "reason"] and [row[0] for row in listed[1:]] == ["g01/torn.png"]
    code, _, err = call(*arguments, "--out", tmp_path / "strict", "--strict")
    assert code == 2 and "torn.png" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "lolsgdd"), "unknown recipe: 'lolsgdd'; did you mean lolsgd"),
        (("--recipe", "wise:7"), "a out of range"),
        (("--log-analyses",), "give --test"),
        (("--log-analyses", "--test", TEST, "--at-the-end"), "leave --at-the-end out"),
        (("--optimizer", "sdg"), "unknown optimizer"),
        (("--augment", "cutmix"), "unknown augmentation"),
        (("--device", "tpu"), "unknown device"),
        (("--seen", "g99"), "not among the classes"),
        (("--model", "tiny:glyph-cnnn"), "did you mean"),
        (("--lr", "1e37"), "not finite"),
        (("--executor", "slurm", "--recipe", "lolsgd"), "unknown executor"),
        (("--local", "9", "--recipe", "lolsgd"), "a local run that there is not"),
    ],
)
def test_bad_input_is_one_line_and_status_2(train, arguments, message):
    code, out, err = train("--quiet", *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in err and not out
