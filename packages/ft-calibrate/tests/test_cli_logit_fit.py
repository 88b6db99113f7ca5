"""The verb fit: options that do not belong to a method, data that cannot choose, and what is said of gamma."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ft_calibrate.calibration import read_calibration
from ft_calibrate.cli import app
from ft_calibrate.cli.logit_fit import OWNERS
from ft_calibrate.gap import average_logit_gap
from ft_calibrate.methods import METHODS
from ft_calibrate.tables import LogitTable, write_table
from scipy.stats import binomtest
from vfm_core.cli import run_app

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
SEEN = [0, 1, 2]
FIT = ("fit", "train.npz", "--seen-from-labels", "-o", "g.json")


def table(n: int, labels: list[int], seed: int = 0) -> LogitTable:
    rng = np.random.default_rng(seed)
    y = rng.choice(labels, n)
    z = rng.normal(size=(n, len(NAMES)))
    z[np.arange(n), y] += 2
    z[:, 3:] -= 2.5
    return LogitTable(z, NAMES, y)


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Run one command in a folder with train.npz and test.npz: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    write_table(table(80, SEEN), tmp_path / "train.npz")
    write_table(table(120, list(range(6)), 1), tmp_path / "test.npz")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            run_app(app, list(arguments))
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


def folds(*gaps: float | None) -> list[str]:
    """Files of pseudo models, whose training logits have these average logit gaps where they are given."""
    names = []
    for r, gap in enumerate(gaps):
        pseudo = [[0, 1], [1, 2], [0, 2]][r]
        val, own = table(90, SEEN, 10 + r), table(40, pseudo, 20 + r)
        out = [c for c in SEEN if c not in pseudo]
        val.logits[:, out] -= 1.5
        own.logits[:, out] -= 1.5
        if gap is not None:
            own.logits[:, out] += average_logit_gap(own.logits, own.labels, pseudo, out, remaining="exclude") - gap
        np.savez(
            f"fold{r}.npz", logits=val.logits, labels=val.labels, classes=NAMES,
            train_logits=own.logits, train_labels=own.labels,
        )  # fmt: skip
        names += ["--fold-file", f"fold{r}.npz"]
    return names


VALUES = {
    "--val": "test.npz", "--criterion": "harmonic", "--floor": "0.1", "--fold-file": "fold0.npz", "--columns": "zzz",
    "--reduce": "median", "--gamma": "2", "--rate": "0.2", "--prior": "p.json", "--smoothing": "3",
    "--head": "h.npz", "--layer": "fc", "--bic-on": "seen", "--group-temperature": "2",
}  # fmt: skip


@pytest.mark.parametrize("option", OWNERS)
def test_options_of_other_methods_are_refused(call, tmp_path, option):
    assert set(OWNERS[option]) < set(METHODS)
    code, out, err = call(*FIT, option, VALUES[option])
    assert code == 2 and f"error: {option} is for --method {', '.join(OWNERS[option])}: --method alg" in err, err
    assert not out and not (tmp_path / "g.json").exists()


def test_a_given_group_temperature_leaves_nothing_to_choose(call):
    method = ("--method", "temperature-per-group", "--group-temperature", "2")
    code, _, err = call(*FIT, *method, "--val", "test.npz")
    assert code == 2 and "--val chooses nothing: --group-temperature is given" in err
    code, out, err = call(*FIT, *method)
    assert code == 0 and out.startswith("logits divided by T = 2 on 3 of 6 classes; method temperature-per-group"), err


def test_rate_needs_target_data(call, tmp_path):
    rate = ("--method", "rate", "--rate", "0.4")
    code, _, err = call(*FIT, *rate)
    assert code == 2 and "method rate needs target data, and every label here is of a seen class in train.npz" in err
    assert "--val FILE" in err and not (tmp_path / "g.json").exists()
    assert call(*FIT, *rate, "--val", "test.npz")[0] == 0
    assert call("fit", "test.npz", "--seen", "ant,bee,cat", "-o", "g.json", *rate)[0] == 0


def test_lists_and_splits_of_absent_classes(call, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(["dog", "eel"]))
    (tmp_path / "seen.json").write_text(json.dumps(NAMES[:3]))
    (tmp_path / "split.json").write_text(json.dumps({"seen": NAMES[:3], "absent": ["dog", "eel"]}))
    fit = ("fit", "train.npz", "-o", "g.json")
    for seen, absent, want in (
        ("ant,bee,cat", "list.json", ("dog", "eel")),
        ("ant,bee,cat", "split.json", ("dog", "eel")),
        ("seen.json", "list.json", ("dog", "eel")),
        ("seen.json", None, ("dog", "eel", "fox")),
        ("split.json", None, ("dog", "eel")),
        (None, "list.json", ("dog", "eel")),
    ):
        groups = ["--seen-from-labels"] if seen is None else ["--seen", seen]
        code, _, err = call(*fit, *groups, *([] if absent is None else ["--absent", absent]))
        assert code == 0, err
        record = read_calibration("g.json")
        assert (record.seen, record.absent) == (tuple(NAMES[:3]), want)
    for seen in (["--seen", "ant,bee,cat"], ["--seen-from-labels"]):
        err = call(*fit, *seen, "--absent", "dgo")[2]
        assert "error: absent classes that are not among the classes in --absent: dgo; did you mean dog?" in err
        assert "both seen and absent in --absent: cat" in call(*fit, *seen, "--absent", "cat,dog")[2]
    assert "seen classes that are not among the classes in --seen: owl" in call(
        *fit, "--seen", "owl,ant", "--absent", "dog"
    )[2]  # fmt: skip


def test_the_published_gap_on_absent_rows_is_not_called_the_papers(call):
    fit = ("fit", "test.npz", "--seen", "ant,bee,cat", "-o", "g.json")
    assert "method alg (the paper's)" in call(*FIT)[1]
    out = call(*fit, "--allow-absent-labels")[1]
    assert "method alg (as the published code computes it, not the paper)" in out
    assert "labels of absent classes used" in out


def test_ratio_pcv_shows_its_parts(call):
    code, out, err = call(*FIT, "--method", "ratio-pcv", *folds(None, None))
    record = read_calibration("g.json")
    assert code == 0 and not record.notes, err
    ratios = ", ".join(f"{m:.4g}" for m in record.details["multipliers"])
    assert f"gamma_ALG = {record.details['gamma_alg']:.4g}, times the ratios gamma / ALG of the folds: {ratios}" in out
    assert np.mean(record.details["multipliers"]) * record.details["gamma_alg"] == pytest.approx(record.gamma)
    code, out, err = call(*FIT, "--method", "ratio-pcv", *folds(None))
    assert code == 0 and "note: a single fold counts" in out, err
    assert "a single fold counts" in " ".join(read_calibration("g.json").notes)


def test_a_fold_without_a_gap_is_named(call):
    code, out, err = call(*FIT, "--method", "ratio-pcv", *folds(None, 0.1), "--json")
    assert code == 0, err
    (note,) = json.loads(out)["notes"]
    record = read_calibration("g.json")
    gap = f"0.1, near zero beside {record.details['gamma_alg']:.4g} of the real model"
    assert note == record.notes[0]
    assert note.startswith(f"the average logit gap of the fold with gamma {record.per_fold_gamma[1]:.4g} is {gap}")


def test_pcv_takes_its_own_options(call):
    code, _, err = call(*FIT, "--method", "pcv", *folds(None, None, None), "--reduce", "median", "--columns", "all")
    record = read_calibration("g.json")
    assert code == 0 and record.gamma == np.median(record.per_fold_gamma) and record.details["columns"] == "all", err
    assert "unknown columns" in call(*FIT, "--method", "pcv", *folds(None, None), "--columns", "zzz")[2]


def test_prior_with_smoothing_reads_as_shifts(call, tmp_path):
    shifts = []
    for extra in ((), ("--smoothing", "5")):
        code, out, err = call(*FIT, "--method", "prior", *extra)
        assert code == 0 and out.startswith("shift ") and "gamma = 0" not in out, err
        shifts.append(read_calibration("g.json").shift)
    assert shifts[0] != shifts[1]
    code, out, err = call("apply", "test.npz", "--calibration", "g.json", "-o", "p.csv")
    assert code == 0 and "before: as given; after: shift " in out and "to absent classes" in out, err


def test_an_unknown_average_leaves_no_file(call, tmp_path):
    assert call(*FIT)[0] == 0
    code, _, err = call("apply", "test.npz", "--calibration", "g.json", "-o", "p.csv", "--average", "bogus")
    assert code == 2 and "unknown average in --average: bogus" in err
    assert not list(tmp_path.glob("p.csv*"))


def test_curve_needs_the_training_file_for_seen_from_labels(call, tmp_path):
    code, _, err = call("curve", "test.npz", "--seen-from-labels", "-o", "c")
    assert code == 2 and "--train FILE" in err and not (tmp_path / "c").exists()


def test_curve_prints_intervals(call):
    curve = ("curve", "test.npz", "--seen", "ant,bee,cat", "-o", "c")
    summary = json.loads(call(*curve, "--json")[1])
    counts = {"S/Y": summary["n_seen"], "U/Y": summary["n_absent"], "Y/Y": summary["n_seen"] + summary["n_absent"]}
    for row in summary["choices"]:
        for name, n in counts.items():
            exact = binomtest(round(row[name] * n), n).proportion_ci(method="wilson")
            assert row[f"{name} 95 %"] == pytest.approx([exact.low, exact.high], abs=1e-4)
    text, row = call(*curve)[1], summary["choices"][0]
    assert "{:.3f} ({:.3f} to {:.3f})".format(row["U/Y"], *row["U/Y 95 %"]) in text and "S/Y 95 %" not in text
    write_table(table(20, SEEN), Path("seen.npz"))
    row = json.loads(call("curve", "seen.npz", *curve[2:], "--json")[1])["choices"][0]
    assert row["U/Y 95 %"] is None and row["S/Y 95 %"]


def refused(call, *arguments: str) -> str:
    """The one line of a call that must leave with status 2."""
    code, out, err = call(*arguments)
    assert code == 2 and out == "" and err.count("error: ") == 1, (code, out, err)
    return err


def test_no_output_over_an_input(call, tmp_path):
    (tmp_path / "seen.json").write_text(json.dumps(["ant", "bee", "cat"]))
    (tmp_path / "prior.json").write_text("{}")
    assert call(*FIT)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    over = "the output would overwrite an input in --out"
    apply, curve = ("apply", "test.npz", "--calibration", "g.json"), ("curve", "test.npz", "--seen", "seen.json")
    assert over in refused(call, *apply, "-o", "test.npz")
    assert over in refused(call, *apply, "-o", f"../{tmp_path.name}/test.npz")
    assert over in refused(call, *apply, "--train", "train.npz", "-o", "train.npz")
    assert "a calibration is a .json file in --out: train.npz" in refused(call, *FIT[:-1], "train.npz")
    assert over in refused(call, "fit", "train.npz", "--seen", "seen.json", "-o", "seen.json")
    prior = ("--method", "prior", "--prior", "prior.json")
    assert over in refused(call, *FIT[:-1], "prior.json", *prior)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "curve.json").write_bytes(before[tmp_path / "g.json"])
    assert over in refused(call, *curve, "--calibration", "old/curve.json", "-o", "old")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_no_output_among_shards_or_in_place_of_a_folder(call, tmp_path):
    assert call(*FIT)[0] == 0
    (tmp_path / "shards").mkdir()
    (tmp_path / "train.npz").rename(tmp_path / "shards" / "0.npz")
    apply = ("apply", "shards", "--calibration", "g.json", "-o")
    assert "would lie among the files of an input" in refused(call, *apply, "shards/p.npz")
    assert call("fit", "shards", "--seen-from-labels", "-o", "shards/g.json")[0] == 0  # no table: not read as a shard
    (tmp_path / "x.csv").mkdir()
    assert "this is a folder, not a file to write in --out: x.csv" in refused(call, *apply, "x.csv")
    curve = ("curve", "test.npz", "--seen", "ant,bee,cat", "-o")
    assert "a folder with the name of a file in --out: c4.png" in refused(call, *curve, "c4.png")
    assert "this is a file, not a folder" in refused(call, *curve, "g.json")
    assert not (tmp_path / "c4.png").exists()
    assert call(*curve, "run.v1")[0] == 0 and (tmp_path / "run.v1" / "curve.csv").exists()


def test_an_interval_needs_resamples(call, tmp_path):
    val = (*FIT, "--method", "val", "--val", "test.npz", "--bootstrap")
    assert "too few resamples in --bootstrap: 1; 0 or at least 100" in refused(call, *val, "1")
    assert not (tmp_path / "g.json").exists()
    assert call(*val, "0")[0] == 0 and read_calibration("g.json").ci95 is None
    assert call(*val, "100")[0] == 0 and read_calibration("g.json").ci95 is not None


@pytest.mark.parametrize(
    "method, option",
    [("weight-align", "--head"), ("pcv", "--fold-file"), ("fixed", "--gamma"), ("val", "--val"), ("bic", "--val")],
)
def test_errors_name_options(call, method, option):
    line = refused(call, *FIT, "--method", method)
    assert option in line and "head_weight" not in line and "in folds" not in line


def test_a_rate_out_of_range_names_its_option(call):
    assert "in --rate: 2" in refused(call, *FIT, "--method", "rate", "--rate", "2", "--val", "test.npz")
    assert "in --rate" in refused(call, *FIT, "--method", "rate", "--val", "test.npz")


def test_files_without_ids_are_compared_as_wholes(call, tmp_path, caplog):
    assert call(*FIT)[0] == 0
    (tmp_path / "copy.npz").write_bytes((tmp_path / "train.npz").read_bytes())
    for data in ("train.npz", "copy.npz"):
        caplog.clear()
        code, out, err = call("apply", data, "--calibration", "g.json", "-o", "p.csv", "--json", "--train", "train.npz")
        assert code == 0 and json.loads(out)["duplicate_ids"] == 80 and "not checked" not in err
        assert f"train.npz and {data} are the same file" in caplog.text
    caplog.clear()
    code, out, err = call("curve", "test.npz", "--seen-from-labels", "--train", "train.npz", "-o", "c", "--json")
    assert code == 0 and json.loads(out)["duplicate_ids"] is None and "same file" not in caplog.text
    assert "no ids in train.npz: overlap of train.npz and test.npz not checked" in err


def test_class_names_with_commas(call, tmp_path):
    t = table(60, SEEN)
    t.classes = ["ant", "bee", "dog, big", "dog", "eel", "fox"]
    write_table(t, tmp_path / "commas.npz")
    line = refused(call, "fit", "commas.npz", "--seen", "ant,dog, big", "-o", "c.json")
    assert 'in --seen: "big"' in line and "in double quotes, or the names in a file, one per line" in line
    assert call("fit", "commas.npz", "--seen", 'ant,bee,"dog, big"', "-o", "c.json")[0] == 0
    assert read_calibration("c.json").seen == ("ant", "bee", "dog, big")


@pytest.mark.parametrize("verb", ["fit", "apply", "curve"])
def test_help_tells_the_layout_of_npz(call, verb):
    text = " ".join(call(verb, "--help")[1].replace("│", " ").split())
    assert "arrays logits (N, K), labels (N), classes (K names), ids (N), features (N, D)" in text


def test_a_seen_class_without_a_row_is_named(call, caplog):
    code, _, err = call("fit", "train.npz", "--seen", "ant,bee,cat,fox", "-o", "g.json")
    assert code == 0, err
    assert "no row of the seen classes fox" in caplog.text
