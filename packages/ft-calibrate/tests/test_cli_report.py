"""The verb ``report``: the folder it writes, what it prints, and how it fails."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ft_calibrate import diagnosis_report, figure_style
from ft_calibrate.cli import main
from ft_calibrate.tables import LogitTable, write_table
from PIL import Image

K = 8
CLASSES = [f"c{i}" for i in range(K)]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Answer]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: Path) -> Call:
    """``ft-calibrate report`` in the folder of `files`."""

    def call(*arguments: object) -> Answer:
        monkeypatch.chdir(files)
        monkeypatch.setattr(sys, "argv", ["ft-calibrate", "report", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Answer(int(end.value.code or 0), out, err)

    return call


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw only the quick ones."""
    kept = ("delta_w_cosine.png", "head_norms.png")
    monkeypatch.setattr(diagnosis_report, "FIGURES", {name: diagnosis_report.FIGURES[name] for name in kept})
    monkeypatch.setattr(figure_style, "DPI", 70)


@pytest.fixture(scope="module")
def tables() -> dict[str, LogitTable]:
    y = np.repeat(np.arange(K), 15)
    found = {}
    for name, lowered, seed in (
        ("test", 6.0, 0),
        ("test_before", 0.0, 0),
        ("oracle", 6.0, 1),
        ("oracle_before", 0.0, 1),
    ):
        f = np.eye(K, 10)[y] + 0.3 * np.random.default_rng(seed).normal(size=(len(y), 10))
        z = f[:, :K] * 8
        z[:, 4:] -= lowered
        found[name] = LogitTable(z, CLASSES, y, f, [f"{seed}-{i}" for i in range(len(y))])
    found["train"] = found["oracle"].subset(np.flatnonzero(y < 4))
    found["test_before"] = found["test_before"].subset(np.random.default_rng(2).permutation(len(y)))
    return found


@pytest.fixture
def files(tmp_path: Path, tables: dict[str, LogitTable]) -> Path:
    for name, table in tables.items():
        write_table(table, tmp_path / f"{name}.npz")
    (tmp_path / "seen.txt").write_text("c0\nc1\nc2\nc3\n")
    return tmp_path


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"not strict JSON: {word}"))


def test_the_promised_call_writes_the_promised_folder(files: Path) -> None:
    """One call, through the real entry point, gives verdict and folder."""
    command = "report test.npz --seen seen.txt --before test_before.npz --features -o report/"
    done = subprocess.run(
        [sys.executable, "-m", "ft_calibrate", *command.split()], cwd=files, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Logit scale:" in done.stdout and done.stdout.strip().endswith("report.html")
    for words in ("for diagnosis only", "upper bound, not deployable", "must not be deployed"):
        assert words in done.stdout
    out = files / "report"
    written = {path.name for path in out.iterdir()}
    assert {"summary.json", "report.html", "curve.csv", "curve.png", "nn_vs_ncm.png", "logit_gap.png", "tsne.png",
            "feature_movement.png", "margin.png", "absent_among_absent.png"} == written  # fmt: skip
    summary = read(out / "summary.json")
    assert summary["verdict"] == "logit scale" and summary["gamma"]["alg-test"]["uses_test_labels"]
    assert summary["inputs"]["after"]["path"].endswith("test.npz")
    assert "delta_w_cosine.png" in summary["skipped"] or "class_relationship" in summary["skipped"]
    with (out / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["gamma", "acc_seen", "acc_unseen", "acc_overall", "harmonic"] and len(rows) > 50
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            image.verify()


def test_the_page_is_self_contained_and_complete(report: Call, files: Path) -> None:
    more = "--train train.npz --before test_before.npz --reference oracle.npz --reference-before oracle_before.npz"
    answer = report("test.npz", "--seen-from-labels", *more.split(), "--projection", "pca", "--out", "r")
    assert answer.code == 0, answer.err
    page = (files / "r" / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page) and page.count("data:image/") >= 6
    for words in ("Logit scale:", "upper bound, not deployable", "for diagnosis only", "gamma_ALG", "SHA-256", "AUSUC",
                  "linear probe", "What could not be computed"):  # fmt: skip
        assert words in page, words
    assert "must not be deployed" not in page  # gamma_ALG is of the fine-tuning data here


@pytest.mark.usefixtures("few_figures")
def test_heads_from_models_and_json(report: Call, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ft_calibrate.classifier as classifier

    heads = {"pre": torch.nn.Linear(10, K), "ft": torch.nn.Linear(10, K)}
    asked = []

    def load(spec: str, **options: Any) -> Any:
        asked.append((spec, options["head"]))
        return heads[spec]

    monkeypatch.setattr(classifier, "load_classifier", load)
    answer = report("test.npz", "--seen", "c0,c1,c2,c3", "--before", "test_before.npz", "--model-before", "pre",
                    "--model-after", "ft", "--head", "fc", "--json", "--projection", "pca", "-o", "r")  # fmt: skip
    assert answer.code == 0, answer.err
    assert asked == [("pre", "fc"), ("ft", "fc")]
    found = json.loads(answer.out)
    assert found == read(files / "r" / "summary.json")
    assert {"class_relationship", "head_norms"} <= set(found["tables"])
    assert (files / "r" / "delta_w_cosine.png").exists() and (files / "r" / "head_norms.png").exists()
    again = report("test.npz", "--seen", "c0,c1,c2,c3", "--projection", "pca", "-o", "r")
    assert again.code == 0 and "cannot be judged" in again.out
    assert not (files / "r" / "delta_w_cosine.png").exists()  # the figures of the earlier report are gone


@pytest.mark.usefixtures("few_figures")
def test_epochs_absent_and_remaining(report: Call, files: Path) -> None:
    lines = [json.dumps({"epoch": e, "head_norm/S": 1.0 + e, "head_norm/U": 1.0}) for e in range(3)]
    (files / "history.jsonl").write_text("\n".join(lines))
    answer = report("test.npz", "--seen", "seen.txt", "--absent", "c4,c5", "--remaining", "exclude", "--epochs",
                    "history.jsonl", "--projection", "pca", "-o", "r")  # fmt: skip
    assert answer.code == 0, answer.err
    summary = read(files / "r" / "summary.json")
    assert summary["classes"]["remaining"] == ["c6", "c7"] and summary["classes"]["remaining_mode"] == "exclude"
    assert len(summary["epochs"]) == 3 and (files / "r" / "head_norms.png").exists()


@pytest.mark.usefixtures("few_figures")
def test_tiny_groups_warn(report: Call, files: Path, tables: dict[str, LogitTable]) -> None:
    small = tables["test"].subset(np.r_[0:60, 60:70])
    write_table(small, files / "small.npz")
    answer = report("small.npz", "--seen", "seen.txt", "--projection", "pca", "-o", "r")
    assert answer.code == 0 and "Only 10 test samples of the absent classes" in answer.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test.npz", "-o", "r"], "which classes are seen? in --seen, --seen-from-labels: neither"),
        (["test.npz", "-o", "r", "--seen", "c0,c1", "--seen-from-labels"], "both"),
        (["test.npz", "-o", "r", "--seen-from-labels"], "give them with --train"),
        (["test.npz", "-o", "r", "--seen", "c0,cat"], "cat"),
        (["test.npz", "-o", "r", "--seen", "c0,c1", "--projection", "umap"], "unknown projection in --projection"),
        (["test.npz", "-o", "r", "--seen", "c0,c1", "--remaining", "drop"], "drop; use absent, keep, exclude"),
        (["missing.npz", "-o", "r", "--seen", "c0,c1"], "missing.npz"),
        (["test.npz", "-o", "r", "--seen", "seen.txt", "--train", "oracle.npz"], "go to --reference"),
        (["test.npz", "-o", "r", "--seen", "seen.txt", "--before", "train.npz"], "60 rows"),
        (["test.npz", "-o", "r", "--seen", "seen.txt", "--before", "oracle_before.npz"], "120 of 120 ids are missing"),
        (["bare.npz", "-o", "r", "--seen", "seen.txt", "--features"], "no features in bare.npz"),
        (["test.npz", "-o", "seen.txt", "--seen", "seen.txt"], "not a folder in seen.txt"),
        (["test.npz", "-o", "r", "--seen", "seen.txt", "--epochs", "seen.txt"], "not JSON lines"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    report: Call, files: Path, tables: dict[str, LogitTable], arguments: list[str], message: str
) -> None:
    write_table(LogitTable(tables["test"].logits, CLASSES, tables["test"].labels), files / "bare.npz")
    if message == "60 rows":
        message = "60 of 120 ids are missing"
        train = tables["test_before"].subset(slice(0, 60))
        write_table(train, files / "train.npz")
    answer = report(*arguments)
    assert answer.code == 2 and message in answer.err
    lines = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in answer.err


@pytest.mark.filterwarnings("error")
def test_every_class_seen_is_said_without_numpy_warnings(report: Call) -> None:
    answer = report("test.npz", "--seen", ",".join(CLASSES), "--projection", "pca", "-o", "r")
    assert answer.code == 0, answer.err
    assert "Nothing to calibrate" in answer.out and "Fit gamma" not in answer.out and "RuntimeWarning" not in answer.err


@pytest.mark.usefixtures("few_figures")
def test_a_calibration_file_is_shown(report: Call, files: Path, tables: dict[str, LogitTable]) -> None:
    from ft_calibrate.calibration import fit_calibration
    from ft_calibrate.groups import class_groups

    groups = class_groups(CLASSES, CLASSES[:4])
    fit_calibration(tables["train"].logits, tables["train"].labels, groups).write(files / "g.json")
    answer = report("test.npz", "--seen", "seen.txt", "--before", "test_before.npz", "--calibration", "g.json",
                    "--projection", "pca", "-o", "r")  # fmt: skip
    assert answer.code == 0, answer.err
    assert "calibration file (alg)" in answer.out and "Fit gamma" not in answer.out
    assert read(files / "r" / "summary.json")["gamma"]["given"]["deployable"]
    same = report("test.npz", "--seen", "seen.txt", "--before", "test.npz", "-o", "r")
    assert same.code == 2 and "the same data before and after" in same.err


def test_help_shows_examples(report: Call) -> None:
    answer = report("--help")
    assert answer.code == 0 and "Examples" in answer.out and "--before" in answer.out
