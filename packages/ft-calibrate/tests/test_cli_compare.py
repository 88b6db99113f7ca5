"""The verbs pcv, pcv-merge, compare and reproduce through the entry point: output, exit status, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ft_calibrate.cli import app
from ft_calibrate.cli.compare_options import from_anywhere, seed_list, words
from vfm_core.cli import run_app
from vfm_core.errors import UserError

TRAIN, TEST = (f"tinyworld:glyphs?domain=target&split={s}&n=4" for s in ("train", "test"))
SEEN = "g00,g01,g02,g03"
FAST = ["--epochs", "1", "--batch-size", "16", "--lr", "0.05"]
COMPARE = ["compare", "--model", "tiny:glyph-cnn", "--data", TRAIN, "--test", TEST, "--seen", SEEN, *FAST]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as left:
            run_app(app, [str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert left.value.code == code, err
        return out, err

    return call


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np
    from ft_calibrate.classifier import load_classifier
    from ft_calibrate.recipes import fine_tune
    from vfm_core.data import open_dataset

    data = open_dataset(TRAIN)
    rows = data.subset(np.flatnonzero(np.asarray(data.labels) < 4))
    out = tmp_path_factory.mktemp("runs") / "ft"
    fine_tune(load_classifier("tiny:glyph-cnn"), rows, SEEN.split(","), "ft", epochs=1, lr=0.05, batch_size=16, out=out)
    return out


# ------------------------------------------------------------------------------------------------------------------ pcv
def test_pcv_reads_everything_from_the_run_and_writes_calibrations(run: Any, tuned: Path, tmp_path: Path) -> None:
    out, err = run("pcv", "--model", tuned, "--data", TRAIN, "--folds", "2", "--out", tmp_path, "--json")
    found = json.loads(out)
    pcv = json.loads((tmp_path / "calibration.json").read_text())
    ratio = json.loads((tmp_path / "calibration-ratio-pcv.json").read_text())
    assert [e["method"] for e in found["estimates"]] == ["pcv", "ratio-pcv"] == [pcv["method"], ratio["method"]]
    assert pcv["gamma"] == pytest.approx(found["estimates"][0]["gamma"]) and len(pcv["per_fold_gamma"]) == 2
    assert ratio["gamma"] == pytest.approx(found["estimates"][1]["gamma"])
    assert pcv["seen"] == SEEN.split(",") and not pcv["uses_absent_labels"] and not pcv["uses_test_labels"]
    assert "64 of 80 images are of other classes: left out" in err
    assert (tmp_path / "report.html").exists() and (tmp_path / "fold-1" / "results.jsonl").exists()


def test_more_folds_are_told_and_ratio_pcv_shows_gammas_of_its_own(run: Any, tuned: Path, tmp_path: Path) -> None:
    base = ["pcv", "--model", tuned, "--data", TRAIN, "--out", tmp_path]
    out, err = run(*base, "--folds", "1")
    assert "earlier call" not in err
    found = json.loads((tmp_path / "summary.json").read_text())["ratio-pcv"]
    (line,) = [line for line in out.splitlines() if "ratio-pcv" in line and "json" not in line]
    assert f"{found['multipliers'][0] * found['gamma_alg']:.3g}" in line.split()[-1]
    assert line.split()[-1] != f"{found['per_fold'][0]:.3g}"
    _, err = run(*base, "--folds", "2")
    assert f"{tmp_path}: 1 fold added to the 1 of an earlier call" in err
    _, err = run(*base, "--folds", "1")
    assert "1 of the 2 folds of an earlier call left out" in err
    _, err = run(*base, "--folds", "1")
    assert "earlier call" not in err


def test_a_changed_source_is_named_though_no_option_named_it(run: Any, tuned: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tuned, tmp_path / "ft")
    record = next(path for path in (tmp_path / "ft").glob("*.json") if '"tiny:glyph-cnn' in path.read_text())
    record.write_text(record.read_text().replace('"tiny:glyph-cnn', '"tiny:glyph-cnn?seed=1', 1))
    _, err = run("pcv", "--model", tmp_path / "ft", "--data", TRAIN, "--out", tmp_path / "out", code=2)
    assert err.startswith("error: the source model is no longer that of the run in tiny:glyph-cnn?seed=1")
    assert err.strip().endswith("or give the model that the run started from with --source-model")


def test_pcv_refuses_a_run_that_is_calibrated_already(run: Any, tuned: Path, tmp_path: Path) -> None:
    run("export", "--model", tuned, "--gamma", "3", "--absent", "g19", "--out", tmp_path / "done")
    _, err = run("pcv", "--model", tmp_path / "done", "--data", TRAIN, "--out", tmp_path / "pcv", code=2)
    assert "folded in already" in err and "as it was trained" in err and not list((tmp_path / "pcv").glob("fold-*"))


def test_separate_folds_and_pcv_merge_give_the_same_file(run: Any, tuned: Path, tmp_path: Path) -> None:
    base = ["pcv", "--model", tuned, "--source-model", "tiny:glyph-cnn", "--data", TRAIN, "--folds", "2", "--quiet"]
    run(*base, "--out", tmp_path / "whole")
    parts = tmp_path / "parts"
    out, _ = run(*base, "--out", parts, "--fold", "1")
    assert "fold 1 of 2 is done" in out and not (parts / "calibration.json").exists()
    _, err = run("pcv-merge", parts, code=2)
    assert err.startswith("error: folds are missing in") and ": 0; run them with --fold" in err
    run(*base, "--out", parts, "--fold", "0")
    out, _ = run("pcv-merge", parts)
    assert "ratio-pcv" in out
    for name in ("calibration.json", "calibration-ratio-pcv.json"):
        assert (parts / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_merging_works_from_another_folder(
    run: Any, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from PIL import Image
    from vfm_core.data import open_dataset

    rows = open_dataset(TRAIN)
    for label in range(4):  # four pictures of each seen class
        for j, i in enumerate([i for i, y in enumerate(rows.labels) if y == label]):
            path = tmp_path / "pictures" / rows.classes[label] / f"seen{j}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows[i].image.save(path)
    broken = tmp_path / "pictures" / "g00" / "seen0.png"
    Image.new("RGB", (16, 16)).save(broken)
    broken.write_bytes(broken.read_bytes()[:40])
    shutil.copytree(tuned, tmp_path / "ft")
    monkeypatch.chdir(tmp_path)
    base = ["pcv", "--model", "ft", "--source-model", "tiny:glyph-cnn", "--data", "folder:pictures", "--folds", "1"]
    _, err = run(*base, "--out", "pcv", "--fold", "0")
    assert "1 unreadable images skipped: pcv/skipped.csv" in err
    _, err = run(*base, "--out", "strict", "--fold", "0", "--strict", code=2)
    assert "seen0.png" in err
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run("pcv-merge", tmp_path / "pcv")
    assert (tmp_path / "pcv" / "calibration.json").exists() and not list(elsewhere.iterdir())


def test_specs_become_absolute_where_they_name_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "resnet50", "runs/pre"):
        (tmp_path / name).mkdir(parents=True)
    for spec, wanted in (
        ("pictures", f"{tmp_path}/pictures"),
        ("folder:pictures", f"folder:{tmp_path}/pictures"),
        ("folder:./pictures?split=train", f"folder:{tmp_path}/pictures?split=train"),
        ("office-home:pictures@train?domain=Cl", f"office-home:{tmp_path}/pictures@train?domain=Cl"),
        ("timm:local-dir:runs/pre", f"timm:local-dir:{tmp_path}/runs/pre"),
        ("timm:resnet50", "timm:resnet50"),
        ("tinyworld:glyphs?n=4", "tinyworld:glyphs?n=4"),
        ("nowhere", "nowhere"),
    ):
        assert from_anywhere(spec) == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "error: no finished training here in nowhere"),
        (["--source-model", "tiny:glyph-cnn?seed=1"], "error: another source model than that of the run"),
        (["--fold", "3"], "error: no such fold in fold: 3; use 0..2"),
        (["--fold", "0", "--merge"], "error: one fold or all?"),
        (["--criterion", "best"], "error: unknown criterion: 'best'"),
        (["--data", "tinyworld:glyphs?n=2&classes=25"], "error: the model has no logit for classes of the data"),
    ],
)
def test_pcv_says_what_is_wrong(run: Any, tuned: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    _, err = run("pcv", "--model", tuned, "--data", TRAIN, "--out", tmp_path, *arguments, code=2)
    assert message in err and err.strip().count("\n") <= 1


def test_pcv_merge_needs_a_folder_of_pcv(run: Any, tmp_path: Path) -> None:
    _, err = run("pcv-merge", tmp_path, code=2)
    assert "error: no pseudo cross-validation here" in err


# -------------------------------------------------------------------------------------------------------------- compare
def test_compare_prints_a_table_and_resumes(run: Any, tmp_path: Path) -> None:
    command = [*COMPARE, "--recipes", "ft,wise:0.5", "--calibrations", "none,alg,oracle", "--out", tmp_path]
    out, _ = run(*command, "--markdown")
    assert "wise:0.5" in out and "oracle-ft" in out and str(tmp_path / "report.html") in out
    assert (tmp_path / "report.md").exists()
    stamp = (tmp_path / "results.jsonl").read_text()
    rows = json.loads(run(*command, "--json")[0])["rows"]
    assert (tmp_path / "results.jsonl").read_text() == stamp
    assert {r["calibration"] for r in rows if r["recipe"] == "ft"} == {"none", "alg", "oracle"}


def test_compare_sweeps(run: Any, tmp_path: Path) -> None:
    sweep = ["--sweep", "share=0.5,1", "--sweep", "lr=0.01", "--seeds", "0,1"]
    out, _ = run(*COMPARE, "--recipes", "lp", "--calibrations", "none", *sweep, "--out", tmp_path, "--json")
    rows = json.loads(out)["rows"]
    assert [(r["share"], r["lr"], r["seeds"]) for r in rows if r["recipe"] == "lp"] == [(0.5, 0.01, 2), (1, 0.01, 2)]


def test_failed_trainings_end_with_status_2_and_a_table(run: Any, tmp_path: Path) -> None:
    command = [*COMPARE, "--recipes", "ft", "--calibrations", "none", "--sweep", "lr=0.05,1e30", "--out", tmp_path]
    # ft and oracle-ft diverge at the second rate; the first one's table is printed all the same.
    out, err = run(*command, code=2)
    assert "0.05" in out and "error: 2 trainings failed in" in err and "run again to try them again" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "ft,lolsdg"], "unknown recipe: 'lolsdg'; did you mean lolsgd"),
        (["--recipes", ","], "empty list in --recipes"),
        (["--calibrations", "agl"], "unknown calibration in --calibrations: 'agl'"),
        (["--seeds", "0,x"], "not a list of seeds in --seeds"),
        (["--sweep", "lr"], "axis without values in --sweep"),
        (["--executor", "gpu"], "unknown executor in --executor"),
        (["--seen", "g00,g77"], "g77"),
        (["--seen-split", "ar-30"], "which classes are seen?"),
        (["--device", "tpu"], "unknown device in --device"),
        (["--remaining", "drop"], "drop"),
    ],
)
def test_compare_says_what_is_wrong(run: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    _, err = run(*COMPARE, "--out", tmp_path, "--calibrations", "none", *arguments, code=2)
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_ray_without_ray_names_the_extra(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is there") if _has_ray() else None
    if not _has_ray():
        _, err = run(*COMPARE, "--out", tmp_path, "--recipes", "ft", "--executor", "ray", code=2)
        assert 'pip install "ft-calibrate[ray]"' in err


def _has_ray() -> bool:
    import importlib.util

    return importlib.util.find_spec("ray") is not None


# ------------------------------------------------------------------------------------------------------------ reproduce
def test_reproduce_lists_and_refuses(run: Any, tmp_path: Path) -> None:
    out, _ = run("reproduce", "--list")
    assert "office-home" in out and "imagenet-rs" in out and "arXiv 2311.01420" in out
    assert "error: unknown experiment: 'ofice-home'" in run("reproduce", "ofice-home", code=2)[1]
    assert "missing option: --data-root" in run("reproduce", "office-home", code=2)[1]
    _, err = run("reproduce", "office-home", "--data-root", tmp_path / "no", "--out", tmp_path / "o", code=2)
    assert "no such folder in --data-root" in err


def test_reproduce_prints_own_numbers_and_claims(run: Any, tmp_path: Path) -> None:
    import numpy as np
    from ft_calibrate.splits import official_split
    from PIL import Image

    split = official_split("imagenet-sketch")
    for i, wnid in enumerate([*split.seen[:2], *split.absent[:2]]):
        folder = tmp_path / "data" / "imagenet-sketch" / wnid
        folder.mkdir(parents=True)
        for j in range(12):
            Image.fromarray(np.full((16, 16, 3), 60 * i + j, np.uint8)).save(folder / f"sketch_{j}.JPEG")
    command = ["reproduce", "imagenet-sketch", "--data-root", tmp_path / "data", "--out", tmp_path / "out", "--quick"]
    command += ["--model", "random:timm:test_resnet?num_classes=1000", "--image-size", "32", "--recipes", "ft"]
    out, _ = run(*command, "--calibrations", "none,alg")
    assert "own numbers" in out and "Claims of the paper" in out and "not tested" in out
    assert "these numbers mean nothing" in out and str(tmp_path / "out" / "report.html") in out


# ---------------------------------------------------------------------------------------------------------------- lists
def test_lists_keep_the_options_of_a_recipe_together() -> None:
    assert words("ft, distill:T=2,lambda=1,lp", "--recipes") == ["ft", "distill:T=2,lambda=1", "lp"]
    assert seed_list("0,2") == [0, 2]
    with pytest.raises(UserError, match="not a list of seeds"):
        seed_list("1,1")
