"""The verbs fit, apply and curve through the real command line: results, options, messages and exit codes."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from ft_calibrate.calibration import fit_calibration, read_calibration
from ft_calibrate.cli import app
from ft_calibrate.groups import class_groups
from ft_calibrate.methods import METHODS
from ft_calibrate.prediction_files import read_predictions
from ft_calibrate.record import Calibration
from ft_calibrate.tables import LogitTable, read_table, write_table
from vfm_core.cli import run_app

K = 6
NAMES = ["ant", "bee", "cat", "dog", "eel, old", "fox"]
S = [0, 1, 2]


def table(n: int, labels: list[int], seed: int = 0) -> LogitTable:
    rng = np.random.default_rng(seed)
    y = rng.choice(labels, n)
    z = rng.normal(size=(n, K)).astype(np.float32)
    z[np.arange(n), y] += 2
    z[:, 3:] -= 2.5
    return LogitTable(z, NAMES, y, ids=[f"s{seed}.{i}" for i in range(n)])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with train.npz and test.parquet, as the working directory."""
    write_table(table(80, S), tmp_path / "train.npz")
    write_table(table(120, list(range(K)), 1), tmp_path / "test.parquet")
    (tmp_path / "seen.txt").write_text("ant\nbee\n# a remark\ncat\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(capsys):
    """Run one command in this process: exit code, stdout, stderr, with logged warnings among the latter."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            run_app(app, [str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


def fails(call, *arguments: str) -> str:
    """The one line that a bad call prints; it must leave with status 2 and write nothing on stdout."""
    code, out, err = call(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and out == "" and len(lines) == 1, (code, out, err)
    return lines[0]


def gamma_of(path: str = "gamma.json") -> Calibration:
    return read_calibration(path)


def test_the_two_commands_of_the_readme(here):
    """In real processes: fit on npz, apply on parquet, and the Python API agree."""
    command = [sys.executable, "-m", "ft_calibrate"]
    fit = [*command, "fit", "train.npz", "--seen-from-labels", "--method", "alg", "-o", "gamma.json"]
    apply = [*command, "apply", "test.parquet", "--calibration", "gamma.json", "-o", "pred.parquet"]
    outputs = [subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in (fit, apply)]
    train, test = read_table("train.npz"), read_table("test.parquet")
    want = fit_calibration(train.logits, train.labels, class_groups(NAMES, S), "alg")
    assert gamma_of().gamma == want.gamma
    columns, facts = read_predictions("pred.parquet")
    assert columns["prediction"] == [NAMES[c] for c in want.predict(test.logits, test.classes)]
    assert columns["id"] == test.ids and facts["gamma"] == want.gamma and facts["method"] == "alg"
    for text in outputs:
        assert f"gamma = {want.gamma:.6g}" in text and "method alg (the paper's)" in text
        assert "train.npz" in text and "labels of absent classes not used" in text
    assert "U/Y" in outputs[1] and "U: " in outputs[1]
    bad = subprocess.run([*command, "fit", "gone.npz", "--seen", "ant", "-o", "g.json"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr == "error: no such file in gone.npz; check the path\n" and not bad.stdout


def test_npz_csv_and_log_probabilities_give_one_gamma(here, call):
    from scipy.special import log_softmax, softmax

    t = read_table("train.npz")
    write_table(t, here / "train.csv")
    z = t.logits.astype(np.float64)
    np.savez("logprob.npz", logits=log_softmax(z, axis=1), labels=t.labels, classes=NAMES)
    np.savez("prob.npz", logits=softmax(z, axis=1), labels=t.labels, classes=NAMES)
    found = {}
    for name, extra in (("train.npz", []), ("train.csv", []), ("logprob.npz", ["--input", "logprob"]),
                        ("prob.npz", ["--input", "prob"])):  # fmt: skip
        code, _, err = call("fit", name, "--seen-from-labels", *extra, "-o", f"{name}.json")
        assert code == 0, err
        found[name] = gamma_of(f"{name}.json")
    assert found["train.csv"].gamma == pytest.approx(found["train.npz"].gamma, abs=1e-9)
    assert found["logprob.npz"].gamma == pytest.approx(found["train.npz"].gamma, abs=1e-6)
    assert found["prob.npz"].gamma == pytest.approx(found["train.npz"].gamma, abs=1e-6)
    assert [found[n].input_kind for n in found] == ["logit", "logit", "logprob", "prob"]
    test = read_table("test.parquet")
    np.savez("new_prob.npz", logits=softmax(test.logits.astype(float), axis=1), classes=NAMES)
    predictions = {}
    for data, calibration in (
        ("test.parquet", "train.npz"),
        ("new_prob.npz", "prob.npz"),
        ("test.parquet", "logprob.npz"),
    ):
        assert call("apply", data, "--calibration", f"{calibration}.json", "-o", "p.npz")[0] == 0
        predictions[calibration] = read_predictions("p.npz")[0]["prediction"]
    assert predictions["train.npz"] == predictions["prob.npz"] == predictions["logprob.npz"]


def fold_files() -> list[str]:
    names = []
    for r, pseudo in enumerate(([0, 1], [1, 2])):
        val, own = table(60, S, 10 + r), table(40, pseudo, 20 + r)
        for part in (val, own):
            part.logits[:, [c for c in S if c not in pseudo]] -= 1.5
        extra = {"pseudo_seen": np.array([NAMES[c] for c in pseudo])} if r == 0 else {}  # else from train_labels
        np.savez(
            f"fold{r}.npz", logits=val.logits, labels=val.labels, train_logits=own.logits, train_labels=own.labels,
            source_logits=val.logits, **extra,
        )  # fmt: skip
        names += ["--fold-file", f"fold{r}.npz"]
    return names


@pytest.mark.parametrize("method", METHODS)
def test_every_method(here, call, method):
    np.savez("head.npz", weight=np.random.default_rng(0).normal(size=(K, 3)))
    folds = fold_files()
    options = {
        "pcv": [*folds, "--criterion", "harmonic"],
        "ratio-pcv": [*folds, "--reduce", "median", "--columns", "all"],
        "fixed": ["--gamma", "1.5"],
        "rate": ["--rate", "0.5", "--val", "test.parquet"],
        "weight-align": ["--head", "head.npz"],
    }
    on_test = (
        ["--val", "test.parquet", "--bootstrap", "100"] if METHODS[method].needs.startswith("logits and labels") else []
    )
    arguments = [*options.get(method, on_test), "--method", method, "-o", "gamma.json", "--json"]
    code, out, err = call("fit", "train.npz", "--seen-from-labels", *arguments)
    assert code == 0, err
    record, printed = gamma_of(), json.loads(out)
    assert record.method == printed["method"] == method and printed["gamma"] == record.gamma
    assert record.uses_absent_labels == bool(on_test) and record.oracle == (method == "oracle")
    assert record.chosen_on and (record.gamma > 0 or record.scale or record.shift)
    code, out, err = call("apply", "test.parquet", "--calibration", "gamma.json", "-o", "p.csv", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["calibration"]["method"] == method
    if method not in ("weight-align", "temperature-per-group"):  # scaling negative scores up may lower them
        assert result["after"]["U/Y"] > result["before"]["U/Y"]


def test_folds_with_a_floor_and_their_faults(here, call):
    folds = fold_files()
    base = ["fit", "train.npz", "--seen-from-labels", "--method", "pcv", "-o", "g.json"]
    assert call(*base, *folds, "--criterion", "source-floor")[0] == 0
    assert len(gamma_of("g.json").per_fold_gamma) == 2
    assert "pseudo cross-validation needs folds" in fails(call, *base)
    with np.load("fold1.npz") as stored:
        np.savez("bare.npz", logits=stored["logits"], labels=stored["labels"])
    assert "which classes did the pseudo model see?" in fails(call, *base, "--fold-file", "bare.npz")
    write_table(table(9, S), here / "f.csv")
    assert "a fold must be an .npz file" in fails(call, *base, "--fold-file", "f.csv")


def test_seen_classes_in_every_spelling(here, call):
    (here / "splits.json").write_text(json.dumps({"seen": NAMES[:3], "absent": ["dog", "fox"]}))
    spellings = ("ant,bee,cat", "0,1,2", 'cat, "bee",ant', "seen.txt", "splits.json")
    for spelling in spellings:
        code, _, err = call("fit", "train.npz", "--seen", spelling, "-o", "g.json")
        assert code == 0, err
        assert gamma_of("g.json").seen == ("ant", "bee", "cat")
    assert gamma_of("g.json").absent == ("dog", "fox") and gamma_of("g.json").remaining == ("eel, old",)
    for mode in ("absent", "keep", "exclude"):
        arguments = ("--seen", "seen.txt", "--absent", 'dog,"eel, old"', "--remaining", mode, "-o", "g.json")
        assert call("fit", "train.npz", *arguments)[0] == 0
        assert gamma_of("g.json").remaining == ("fox",) and gamma_of("g.json").remaining_mode == mode
    assert "which classes are seen?" in fails(call, "fit", "train.npz", "-o", "g.json")
    both = ("--seen", "ant", "--seen-from-labels")
    assert "which classes are seen? in --seen, --seen-from-labels: both" in fails(
        call, "fit", "train.npz", *both, "-o", "g.json"
    )
    wrong = fails(call, "fit", "train.npz", "--seen", "ant,bea", "-o", "g.json")
    assert "seen classes that are not among the classes in --seen: bea; did you mean bee?" in wrong
    assert "no such file of classes" in fails(call, "fit", "train.npz", "--seen", "gone.txt", "-o", "g.json")
    assert "an empty name" in fails(call, "fit", "train.npz", "--seen", "ant,,bee", "-o", "g.json")
    overlap = ("--seen", "ant,bee", "--absent", "bee,cat")
    assert "both seen and absent" in fails(call, "fit", "train.npz", *overlap, "-o", "g.json")
    assert "unknown treatment of the remaining" in fails(
        call, "fit", "train.npz", "--seen", "seen.txt", "--remaining", "x", "-o", "g.json"
    )


def test_all_seen_gives_zero_with_a_warning(here, call, caplog):
    code, out, _ = call("fit", "test.parquet", "--seen-from-labels", "-o", "g.json")
    assert code == 0 and "gamma = 0;" in out and "all 6 classes are seen" in caplog.text
    (here / "none.txt").write_text("# nothing\n")
    assert "no seen class" in fails(call, "fit", "train.npz", "--seen", "none.txt", "-o", "g.json")


def test_nan_rows(here, call):
    t = table(80, S)
    t.logits[7, 4] = np.nan
    write_table(t, here / "nan.csv")
    line = fails(call, "fit", "nan.csv", "--seen-from-labels", "-o", "g.json")
    assert line.startswith("error: NaN score in nan.csv: id s0.7 (row 7), column eel, old;") and "--nan drop" in line
    code, out, err = call("fit", "nan.csv", "--seen-from-labels", "--nan", "drop", "-o", "g.json")
    assert code == 0 and "79 rows, 1 dropped" in out, err
    rest = t.subset(np.arange(80) != 7)
    want = fit_calibration(rest.logits.astype(float), rest.labels, class_groups(NAMES, S)).gamma
    assert gamma_of("g.json").gamma == pytest.approx(want, abs=1e-12)
    t.logits[:, 4] = -np.inf  # a masked class
    t.logits[7] = 0
    t.logits[7, 4] = -np.inf
    write_table(t, here / "mask.npz")
    assert call("fit", "mask.npz", "--seen-from-labels", "-o", "g.json")[0] == 0
    t.logits[9, 2] = -np.inf
    write_table(t, here / "mask.npz")
    line = fails(call, "fit", "mask.npz", "--seen-from-labels", "-o", "g.json")
    assert "-inf score in mask.npz: id s0.9 (row 9), column cat; -inf is for a class masked in every row" in line


def test_labels_and_leaks(here, call):
    np.savez(
        "odd.npz", logits=np.eye(3), labels=np.array(["ant", "owl", "bee"]), classes=np.array(["ant", "bee", "cat"])
    )
    assert "labels that are not among the classes in labels of odd.npz: owl" in fails(
        call, "fit", "odd.npz", "--seen", "ant,bee", "-o", "g.json"
    )
    line = fails(call, "fit", "test.parquet", "--seen", "seen.txt", "-o", "g.json")
    assert "leak" in line and "test.parquet: dog (" in line and "--allow-absent-labels" in line
    assert call("fit", "test.parquet", "--seen", "seen.txt", "--allow-absent-labels", "-o", "g.json")[0] == 0
    assert gamma_of("g.json").uses_absent_labels and gamma_of("g.json").uses_test_labels
    write_table(table(30, [1]), here / "one.npz")
    line = fails(call, "fit", "one.npz", "--seen-from-labels", "-o", "g.json")
    assert "undefined" in line and "--method rate or --method fixed" in line


def test_order_of_classes_is_by_name(here, call):
    test = read_table("test.parquet")
    assert call("fit", "train.npz", "--seen-from-labels", "-o", "g.json")[0] == 0
    write_table(test.reordered(NAMES[::-1]), here / "other.npz")
    found = []
    for name in ("test.parquet", "other.npz"):
        assert call("apply", name, "--calibration", "g.json", "-o", "p.csv")[0] == 0
        found.append((here / "p.csv").read_text())
    assert found[0] == found[1]
    np.savez("unnamed.npz", logits=test.logits[:, :4])
    line = fails(call, "apply", "unnamed.npz", "--calibration", "g.json", "-o", "p.csv")
    assert "different numbers of classes, and no class names to match them by in unnamed.npz: 4 columns, 6" in line
    write_table(LogitTable(test.logits, [*NAMES[:5], "gnu"]), here / "gnu.npz")
    line = fails(call, "apply", "gnu.npz", "--calibration", "g.json", "-o", "p.csv")
    assert "the classes differ in gnu.npz: missing fox; unexpected gnu" in line


def test_ids_in_both_files_are_a_leak(here, call, caplog):
    write_table(table(40, list(range(K)), 0), here / "mixed.npz")  # ids s0.0 .. s0.39 are in train.npz too
    chosen = ("--method", "val", "--val", "mixed.npz", "--bootstrap", "0")
    code, out, err = call("fit", "train.npz", "--seen-from-labels", *chosen, "-o", "g.json", "--json")
    assert code == 0 and json.loads(out)["duplicate_ids"] == 40, err
    assert "40 ids are in both train.npz and mixed.npz" in caplog.text
    caplog.clear()
    arguments = ("apply", "mixed.npz", "--calibration", "g.json", "-o", "p.csv", "--json", "--train")
    assert json.loads(call(*arguments, "train.npz")[1])["duplicate_ids"] == 40
    assert "40 ids are in both train.npz and mixed.npz" in caplog.text
    caplog.clear()
    assert (
        json.loads(call(*arguments, "test.parquet")[1])["duplicate_ids"] == 0 and "ids are in both" not in caplog.text
    )


def test_probabilities_given_as_logits(here, call, caplog):
    from scipy.special import softmax

    for name in ("train.npz", "test.parquet"):
        t = read_table(name)
        values = softmax(t.logits.astype(np.float64), axis=1)
        np.savez(f"p_{name.split('.')[0]}.npz", logits=values, labels=t.labels, classes=NAMES)
    line = fails(call, "fit", "p_train.npz", "--seen-from-labels", "-o", "g.json")
    assert "the scores look like probabilities" in line and "--input prob" in line
    assert not (here / "g.json").exists()
    assert call("fit", "train.npz", "--seen-from-labels", "-o", "g.json")[0] == 0
    for verb in (("apply", "--calibration", "g.json", "-o", "p.csv"), ("curve", "--seen", "ant,bee,cat", "-o", "c")):
        line = fails(call, verb[0], "p_test.npz", *verb[1:])
        assert "look like probabilities (rows sum to 1), not logits in p_test.npz; say --input prob" in line
    line = fails(call, "fit", "p_train.npz", "--seen-from-labels", "--method", "val", "--val", "p_test.npz",
                 "-o", "v.json")  # fmt: skip
    assert "p_test.npz" in line and not any((here / name).exists() for name in ("p.csv", "c", "v.json"))
    write_table(read_table("p_test.npz", input="logit"), here / "extracted.npz")  # says itself that it holds logits
    assert "look like probabilities" in fails(call, "apply", "extracted.npz", "--calibration", "g.json", "-o", "p.csv")
    caplog.clear()
    how = ("--calibration", "g.json", "--input", "logit", "-o", "p.csv")
    assert call("apply", "p_test.npz", *how)[0] == 0 and "p_test.npz look like probabilities" in caplog.text
    line = fails(call, "fit", "train.npz", "--seen-from-labels", "--input", "prob", "-o", "g.json")
    assert "not a probability in train.npz" in line and "use --input logit" in line


def test_pickles_and_damage(here, call):
    (here / "ckpt_10").write_bytes(pickle.dumps({"logits": 1}))
    line = fails(call, "curve", "ckpt_10", "--seen", "ant", "-o", "c")
    assert "a pickled Python object" in line and "extract the logits again" in line
    whole = (here / "test.parquet").read_bytes()
    (here / "torn.parquet").write_bytes(whole[: len(whole) // 2])
    assert "not a parquet file in torn.parquet" in fails(call, "curve", "torn.parquet", "--seen", "ant", "-o", "c")


def test_options_that_do_not_belong(here, call):
    base = ["fit", "train.npz", "--seen-from-labels", "-o", "g.json"]
    assert "--gamma is for --method fixed" in fails(call, *base, "--gamma", "2")
    assert "--rate is for --method rate" in fails(call, *base, "--rate", "0.2")
    assert "--val is for --method oracle, val, bic" in fails(call, *base, "--val", "test.parquet")
    assert "--held-out needs --temperature" in fails(call, *base, "--held-out", "test.parquet")
    assert "unknown method in --method: 'agl'; did you mean" in fails(call, *base, "--method", "agl")
    assert "method fixed needs a finite gamma" in fails(call, *base, "--method", "fixed")
    assert "unknown criterion" in fails(call, *base, "--method", "val", "--val", "test.parquet", "--criterion", "best")
    assert call(*base)[0] == 0
    apply = ["apply", "test.parquet", "--calibration", "g.json", "-o"]
    assert "unknown format of predictions in p.xls" in fails(call, *apply, "p.xls")
    assert "no such calibration file" in fails(call, "apply", "test.parquet", "--calibration", "x.json", "-o", "p.csv")
    assert "unknown average" in fails(call, *apply, "p.csv", "--average", "mean")
    assert "not a JSON object of class shares" in fails(call, *base, "--method", "prior", "--prior", "seen.txt")


def test_named_columns_and_temperature(here, call):
    t = read_table("train.npz")
    lines = ["file;".replace(";", ",") + ",".join(f'"p_{n}"' for n in NAMES) + ",truth"]
    lines += [
        f"{i}," + ",".join(map(repr, map(float, z))) + f",{NAMES[y]}" for i, z, y in zip(t.ids, t.logits, t.labels)
    ]
    (here / "t.csv").write_text("\n".join(lines) + "\n")
    columns = ("--logit-prefix", "p_", "--label-col", "truth", "--id-col", "file")
    assert call("fit", "t.csv", "--seen-from-labels", *columns, "-o", "a.json")[0] == 0
    code, out, err = call("fit", "train.npz", "--seen-from-labels", "--temperature", "-o", "b.json")
    assert code == 0 and "temperature = " in out and "ECE" in out, err
    assert gamma_of("a.json").gamma == gamma_of("b.json").gamma and gamma_of("b.json").temperature != 1
    some = ("--logit-cols", "p_ant,p_bee,p_cat,p_dog")
    assert call("fit", "t.csv", "--seen", "ant,bee,cat", *some, *columns, "-o", "c.json")[0] == 0
    assert gamma_of("c.json").classes == ("ant", "bee", "cat", "dog")


def test_gamma_without_any_label(here, call):
    test = read_table("test.parquet")
    write_table(LogitTable(test.logits, NAMES), here / "new.feather")
    code, out, err = call(
        "fit", "new.feather", "--seen", "seen.txt", "--method", "rate", "--rate", "0.5", "-o", "g.json"
    )
    assert code == 0 and "method rate (not from the paper)" in out and "unlabelled rows" in out, err
    code, out, _ = call("apply", "new.feather", "--calibration", "g.json", "-o", "p.npz", "--json")
    after = json.loads(out)["predicted"]["after"]
    assert code == 0 and after["absent"] == 60 and json.loads(out)["before"] is None
    assert "no labels to take the seen classes from" in fails(
        call, "fit", "new.feather", "--seen-from-labels", "-o", "g.json"
    )


def test_curve(here, call):
    assert call("fit", "train.npz", "--seen-from-labels", "--method", "fixed", "--gamma", "2", "-o", "two.json")[0] == 0
    write_table(table(120, list(range(K)), 1), here / "before.npz")
    base = ("curve", "test.parquet", "--seen-from-labels", "--train", "train.npz", "--calibration", "two.json")
    code, out, err = call(*base, "--before", "before.npz", "--out", "c")
    assert code == 0, err
    assert "AUSUC = " in out and "upper bound, not deployable" in out and "labels of test.parquet" in out
    assert (here / "c/curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (here / "c/curve.csv").read_text().startswith("gamma,acc_seen,acc_unseen,acc_overall,harmonic\n")
    code, out, _ = call(*base, "--before", "before.npz", "--out", "c", "--json", "--chunk-rows", "11")
    summary = json.loads(out)
    rows = {row["gamma by"]: row for row in summary["choices"]}
    assert list(rows) == [
        "none",
        "alg",
        "oracle",
        "oracle (balanced)",
        "oracle (harmonic)",
        "oracle (source-floor)",
        "two",
    ]
    assert rows["alg"]["absent labels"] == "no" and "train.npz" in rows["alg"]["chosen on"]
    assert rows["two"]["gamma"] == 2 and rows["oracle"]["Y/Y"] >= max(row["Y/Y"] for row in rows.values())
    assert json.loads((here / "c/curve.json").read_text())["ausuc"] == summary["ausuc"]
    code, out, err = call("curve", "train.npz", "--seen", "seen.txt", "--out", "d")
    assert code == 0 and "AUSUC = nan" in out, err
