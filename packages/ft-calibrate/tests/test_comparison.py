"""The comparison grid: every cell right, each training once, and the same table whatever happened in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ft_calibrate.calibration import fit_calibration
from ft_calibrate.compare_cells import CALIBRATIONS, check_calibration
from ft_calibrate.compare_rows import display
from ft_calibrate.compare_sweep import parse_sweep, settings_of_sweep
from ft_calibrate.compare_units import training_recipe
from ft_calibrate.comparison import compare, expand_recipes, run_comparison
from ft_calibrate.extraction import predict_table
from ft_calibrate.groups import class_groups
from ft_calibrate.metrics import accuracy_decomposition
from ft_calibrate.pcv_run import pcv_by_retraining
from ft_calibrate.recipes import fine_tune, interpolate
from ft_calibrate.target_data import named
from torch import Tensor, nn
from vfm_core.errors import UserError

K, D, SEEN = 8, 6, [0, 1, 2, 3]
FAST: dict[str, Any] = {"epochs": 2, "lr": 0.1, "batch_size": 8}


def blobs(classes: list[int], n: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian classes in R^6."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(K, D, generator=torch.Generator().manual_seed(99)) * 2
    y = torch.tensor(classes).repeat_interleave(n)
    return centres[y] + torch.randn(len(y), D, generator=g), y


def net(seed: int = 0) -> nn.Module:
    """A two-layer classifier."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(D, 12), nn.ReLU(), nn.Linear(12, K))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


TRAIN, TEST = blobs(list(range(K))), blobs(list(range(K)), seed=1)


def row(rows: list[dict[str, Any]], recipe: str, calibration: str = "none") -> dict[str, Any]:
    """The one row of a recipe and calibration."""
    (found,) = [r for r in rows if (r["recipe"], r["calibration"]) == (recipe, calibration)]
    return found


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    out = tmp_path_factory.mktemp("grid")
    recipes = ["ft", "wise:0.5", "source-ensemble", "lp"]
    calibrations = ["none", "alg", "pcv", "ratio-pcv", "oracle", "fixed:2", "weight-align"]
    return compare(net(), TRAIN, TEST, SEEN, recipes, calibrations, out=out, folds=2, **FAST), out


# ---------------------------------------------------------------------------------------------------------------- cells
def test_rows_are_source_recipes_and_upper_bound(grid: tuple[list[dict[str, Any]], Path]) -> None:
    recipes = list(dict.fromkeys(r["recipe"] for r in grid[0]))
    assert recipes == ["source", "ft", "wise:0.5", "source-ensemble", "lp", "oracle-ft"]
    assert row(grid[0], "oracle-ft")["upper bound"] and row(grid[0], "oracle-ft")["absent labels"]
    assert row(grid[0], "ft", "oracle")["upper bound"] and not row(grid[0], "ft", "alg")["absent labels"]


def test_a_cell_is_what_the_parts_give_by_hand(grid: tuple[list[dict[str, Any]], Path]) -> None:
    keep = TRAIN[1] < 4
    seen_rows = (TRAIN[0][keep], TRAIN[1][keep])
    run = fine_tune(net(), seen_rows, SEEN, "ft", seed=0, **FAST)
    z = predict_table(run.classifier, TEST).logits
    plain = accuracy_decomposition(z, TEST[1], SEEN)
    for key in ("Y/Y", "S/Y", "U/Y", "S/S", "U/U", "H"):
        assert row(grid[0], "ft")[key] == pytest.approx(plain[key])
    own = predict_table(run.classifier, seen_rows)
    alg = fit_calibration(own.logits, own.labels, class_groups(K, SEEN), "alg")
    assert row(grid[0], "ft", "alg")["gamma"] == pytest.approx(alg.gamma, rel=1e-5)
    calibrated = accuracy_decomposition(alg.apply(z), TEST[1], SEEN)
    assert row(grid[0], "ft", "alg")["Y/Y"] == pytest.approx(calibrated["Y/Y"])
    pcv = pcv_by_retraining(net(), seen_rows, SEEN, folds=2, gamma_alg=alg.gamma, **FAST)
    assert row(grid[0], "ft", "pcv")["gamma"] == pytest.approx(pcv.pcv.gamma, rel=1e-5)
    assert pcv.ratio is not None
    assert row(grid[0], "ft", "ratio-pcv")["gamma"] == pytest.approx(pcv.ratio.gamma, rel=1e-4)
    assert row(grid[0], "ft", "fixed:2")["gamma"] == 2.0
    half = interpolate(net(), run.model, 0.5)
    middle = accuracy_decomposition(predict_table(named(half), TEST).logits, TEST[1], SEEN)
    assert row(grid[0], "wise:0.5")["U/Y"] == pytest.approx(middle["U/Y"])
    softmax = [predict_table(named(m), TEST).logits for m in (net(), run.model)]
    mean = sum(torch.softmax(torch.from_numpy(s), 1) for s in softmax)
    assert row(grid[0], "source-ensemble")["Y/Y"] == pytest.approx(accuracy_decomposition(mean, TEST[1], SEEN)["Y/Y"])


def test_gamma_never_changes_the_area_and_the_oracle_is_best(grid: tuple[list[dict[str, Any]], Path]) -> None:
    own = [r for r in grid[0] if r["recipe"] == "ft" and r["calibration"] != "weight-align"]
    assert len({round(r["AUSUC"], 9) for r in own}) == 1
    assert max(own, key=lambda r: r["Y/Y"])["Y/Y"] == row(grid[0], "ft", "oracle")["Y/Y"]


def test_differences_to_ft_are_paired_intervals_around_the_difference(grid: tuple[list[dict[str, Any]], Path]) -> None:
    base, alg = row(grid[0], "ft"), row(grid[0], "ft", "alg")
    assert "Y/Y - ft" not in base
    for key in ("Y/Y", "U/Y", "S/Y"):
        difference, low, high = alg[f"{key} - ft"]
        assert difference == pytest.approx(alg[key] - base[key]) and low <= difference <= high


def test_wise_and_ensemble_share_the_training_of_ft(grid: tuple[list[dict[str, Any]], Path]) -> None:
    trained = [json.loads(line) for line in (grid[1] / "results.jsonl").read_text().splitlines()]
    runs = [(r["recipe"], r["fold"]) for r in trained if r["kind"] == "training"]
    assert sorted(runs, key=str) == sorted(
        [("source", None), ("oracle-ft", None), *(("ft", f) for f in (None, 0, 1)), *(("lp", f) for f in (None, 0, 1))],
        key=str,
    )


def test_cells_without_head_weights_fail_alone(grid: tuple[list[dict[str, Any]], Path]) -> None:
    failures = json.loads((grid[1] / "summary.json").read_text())["failures"]
    (failure,) = [f for f in failures if f["calibration"] == "weight-align"]
    assert failure["recipe"] == "source-ensemble" and "no head weights to align" in failure["error"]
    assert {f["kind"] for f in failures} == {"cell"}
    assert not [r for r in grid[0] if (r["recipe"], r["calibration"]) == ("source-ensemble", "weight-align")]


def test_report_has_table_curves_and_the_source_of_every_gamma(grid: tuple[list[dict[str, Any]], Path]) -> None:
    html = (grid[1] / "report.html").read_text()
    assert "data:image/svg+xml" in html and "upper bound, not deployable" in html and "wise:0.5" in html
    for name in ("alg", "pcv", "oracle"):
        assert CALIBRATIONS[name][1] in html
    shown = display(grid[0])
    assert all(line["gamma from"] and line["absent labels"] in ("yes", "no") for line in shown)


# ------------------------------------------------------------------------------------------------------ resume and grow
def test_again_and_with_more_nothing_finished_runs_again(
    grid: tuple[list[dict[str, Any]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ft_calibrate.recipes

    module = sys.modules["ft_calibrate.comparison"]

    kwargs: dict[str, Any] = {"out": tmp_path, "folds": 2, **FAST}
    first = compare(net(), TRAIN, TEST, SEEN, ["ft"], ["none", "alg"], **kwargs)

    def no_training(*args: Any, **options: Any) -> Any:
        raise AssertionError("trained again")

    measured: list[str] = []
    real = module.measure

    def counted(material: Any, calibration: str) -> Any:
        measured.append(calibration)
        return real(material, calibration)

    with monkeypatch.context() as patched:
        patched.setattr(ft_calibrate.recipes, "fine_tune", no_training)
        patched.setattr(module, "measure", counted)
        assert compare(net(), TRAIN, TEST, SEEN, ["ft"], ["none", "alg"], **kwargs) == first
        assert measured == []
        grown = compare(net(), TRAIN, TEST, SEEN, ["ft"], ["none", "alg", "oracle", "prior"], **kwargs)
        assert measured == ["oracle", "prior"]
    assert row(grown, "ft", "alg") == row(first, "ft", "alg")
    wider = compare(net(), TRAIN, TEST, SEEN, ["ft", "wise:0.5"], ["none", "alg"], **kwargs)  # reads the training of ft
    assert row(wider, "wise:0.5", "alg") == row(grid[0], "wise:0.5", "alg")


def test_lost_tables_are_made_again(tmp_path: Path) -> None:
    import shutil

    kwargs: dict[str, Any] = {"out": tmp_path, **FAST}
    compare(net(), TRAIN, TEST, SEEN, ["ft"], ["none"], **kwargs)
    shutil.rmtree(tmp_path / "units")
    again = compare(net(), TRAIN, TEST, SEEN, ["ft"], ["none", "alg"], **kwargs)
    assert row(again, "ft", "alg")["gamma"] > 0


def test_another_model_or_data_is_refused(tmp_path: Path) -> None:
    compare(net(), TRAIN, TEST, SEEN, ["ft"], ["none"], out=tmp_path, **FAST)
    with pytest.raises(UserError, match="changed configuration"):
        compare(net(1), TRAIN, TEST, SEEN, ["ft"], ["none"], out=tmp_path, **FAST)
    with pytest.raises(UserError, match="changed configuration"):
        compare(net(), TRAIN, blobs([0, 5], seed=3), SEEN, ["ft"], ["none"], out=tmp_path, **FAST)


def test_a_diverging_training_ends_its_own_cells_only(tmp_path: Path) -> None:
    sweep: dict[str, Any] = {"lr": [0.1, 1e30]}
    found = run_comparison(net(), TRAIN, TEST, SEEN, ["ft"], ["none", "alg"], out=tmp_path, sweep=sweep, **FAST)
    assert {r["lr"] for r in found.rows if r["recipe"] == "ft"} == {0.1}
    assert found.failures and "not finite" in found.failures[0]["error"]
    assert "not finite" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_processes_and_seeds_give_the_same_table(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"seeds": (0, 1), **FAST}
    one = compare(net(), TRAIN, TEST, SEEN, ["ft"], ["none", "alg"], out=tmp_path / "one", **kwargs)
    two = compare(net(), TRAIN, TEST, SEEN, ["ft"], ["none", "alg"], out=tmp_path / "two", executor="local:2", **kwargs)
    assert one == two
    ft = row(one, "ft", "alg")
    assert ft["seeds"] == 2 and ft["sd"]["gamma"] > 0
    assert "gamma ±" in display([ft])[0]


@pytest.mark.slow
def test_killed_from_outside_and_resumed_gives_the_same_table(tmp_path: Path) -> None:
    """Kill -9 the command in the middle of its trainings; the same call completes the table of an unbroken run."""
    from ft_calibrate.classifier import load_classifier
    from vfm_core.data import open_dataset

    data, test = (f"tinyworld:glyphs?domain=target&split={s}&n=6" for s in ("train", "test"))
    seen = ",".join(f"g{i:02d}" for i in range(6))
    command = [sys.executable, "-m", "ft_calibrate", "compare", "--model", "tiny:glyph-cnn", "--data", data]
    command += ["--test", test, "--seen", seen, "--recipes", "ft,frozen-head", "--calibrations", "none,alg"]
    command += ["--epochs", "6", "--batch-size", "16", "--lr", "0.05", "--out", str(tmp_path / "out"), "--quiet"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # the last digits depend on it
    process = subprocess.Popen(command, start_new_session=True, env=env)
    results = tmp_path / "out" / "results.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not results.exists() or results.read_text().count("\n") < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "units").glob("*/*.test.npz")}
    args: list[Any] = [load_classifier("tiny:glyph-cnn"), open_dataset(data), open_dataset(test), seen.split(",")]
    grid: list[Any] = [["ft", "frozen-head"], ["none", "alg"]]
    kwargs: dict[str, Any] = {"epochs": 6, "batch_size": 16, "lr": 0.05, "steps_per_epoch": None}
    kwargs |= {"backbone_lr_scale": 0.1, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4}
    kwargs |= {"mixed_precision": "no"}
    tables = [compare(*args, *grid, out=tmp_path / name, **kwargs) for name in ("out", "new")]
    assert tables[0] == tables[1]
    assert before and all(p.stat().st_mtime_ns == stamp for p, stamp in before.items())


# ----------------------------------------------------------------------------------------------------------- inputs
def test_training_data_without_absent_classes_have_no_upper_bound_and_leave_one_out_features(tmp_path: Path) -> None:
    rows = compare(net(), blobs(SEEN), TEST, SEEN, ["ft"], ["none"], out=tmp_path, **FAST)
    assert [r["recipe"] for r in rows] == ["source", "ft"]
    assert "leaving the sample itself out" in rows[1]["NCM reference"] and 0 <= rows[1]["NCM U/U"] <= 1


def test_remaining_classes_can_be_excluded(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"absent": [4, 5], "remaining": "exclude", **FAST}
    rows = compare(net(), TRAIN, TEST, SEEN, ["ft"], ["none", "alg"], out=tmp_path, **kwargs)
    with np.load(next((tmp_path / "cells").glob("*.npz"))) as stored:
        assert stored["predicted"].max() <= 5 and (stored["labels"] == -1).sum() == 20
    counted = row(rows, "ft")
    assert counted["Y/Y"] == pytest.approx((40 * counted["S/Y"] + 20 * counted["U/Y"]) / 60)
    assert row(rows, "ft", "alg")["Y/Y - ft"][0] == pytest.approx(row(rows, "ft", "alg")["Y/Y"] - counted["Y/Y"])


def test_recipes_are_expanded_and_checked() -> None:
    assert expand_recipes(["wise:*"])[::5] == ["wise:0", "wise:0.5", "wise:1"]
    assert expand_recipes(["source", "ft", "ft", "oracle-ft"]) == ["ft"]
    for bad in (["fft"], []):
        with pytest.raises(UserError, match=r"unknown recipe|no recipe"):
            expand_recipes(bad)


@pytest.mark.parametrize(
    ("recipe", "trained"),
    [
        ("wise:0.5", "ft"),
        ("distill+wise:0.3", "distill"),
        ("lolsgd+source-ensemble", "lolsgd"),
        ("cosine-head+wise:0.5", "cosine-head+wise"),
    ],
)
def test_what_has_to_be_trained(recipe: str, trained: str) -> None:
    assert training_recipe(recipe) == trained


@pytest.mark.parametrize("text", ["algo", "fixed", "alg:2", "fixed:x"])
def test_bad_calibrations_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        check_calibration(text)


# --------------------------------------------------------------------------------------------------------------- sweeps
def test_sweep_axes_are_parsed() -> None:
    assert parse_sweep(["optimizer=sgd,adam", "lr=1e-3", "n-seen=2"]) == {
        "optimizer": ["sgd", "adam"],
        "lr": [1e-3],
        "n_seen": [2],
    }
    for bad in (["lr"], ["lr=1", "lr=2"], ["learning=1"]):
        with pytest.raises(UserError, match="axis"):
            parse_sweep(bad)


def test_sweep_is_a_product_and_shares_are_nested() -> None:
    names = [f"c{i}" for i in range(8)]
    settings = settings_of_sweep(names, SEEN, None, {"epochs": 1}, {"share": [0.5, 1], "lr": [0.1, 0.2, 0.3]})
    assert len(settings) == 6 and settings[0].training == {"epochs": 1, "lr": 0.1}
    small, large = settings[0], settings[3]
    assert len(small.seen) == 2 and set(small.seen) < set(large.seen) == {"c0", "c1", "c2", "c3"}
    assert set(small.absent) == set(names) - set(small.seen)


def test_split_types_draw_their_own_classes() -> None:
    names = [f"c{i}" for i in range(8)]
    features = np.eye(2)[np.arange(8) // 4] + 0.01 * np.arange(8)[:, None]  # two far groups of four
    sweep: dict[str, Any] = {"split": ["random", "similarity"], "n_seen": [4]}
    random, similar = settings_of_sweep(names, SEEN, None, {}, sweep, features=lambda: (features, np.arange(8)))
    assert len(random.seen) == 4
    assert set(similar.seen) in ({"c0", "c1", "c2", "c3"}, {"c4", "c5", "c6", "c7"})  # far apart in feature space
    with pytest.raises(UserError, match="axes that exclude each other"):
        settings_of_sweep(names, SEEN, None, {}, {"share": [0.5], "n_seen": [2]})


def test_a_sweep_over_splits_and_optimisers_makes_one_table(tmp_path: Path) -> None:
    sweep: dict[str, Any] = {"n_seen": [3, 4], "optimizer": ["sgd", "adam"]}
    rows = compare(net(), TRAIN, TEST, SEEN, ["ft"], ["none"], out=tmp_path, sweep=sweep, **FAST)
    points = [(r["n_seen"], r["optimizer"]) for r in rows if r["recipe"] == "ft"]
    assert points == [(3, "sgd"), (3, "adam"), (4, "sgd"), (4, "adam")]
    assert len({r["AUSUC"] for r in rows if r["recipe"] == "ft"}) == 4
    assert '<h2 id="sweep">Sweep</h2>' in (tmp_path / "report.html").read_text()
