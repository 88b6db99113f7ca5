"""A comparison in unusual places: upper bounds, unreadable pictures, killed units, repairs that are no gamma."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ft_calibrate.compare_cells import Material, measure
from ft_calibrate.compare_grid import REQUESTS, add_request
from ft_calibrate.compare_report import _caption
from ft_calibrate.compare_rows import display, table
from ft_calibrate.compare_units import _averaged, is_upper_bound
from ft_calibrate.comparison import Comparison, run_comparison
from ft_calibrate.confidence import ece
from ft_calibrate.groups import class_groups
from ft_calibrate.tables import LogitTable
from ft_calibrate.target_data import named
from torch import Tensor, nn
from vfm_core.data import open_dataset
from vfm_core.errors import UserError

K, D, SEEN = 6, 5, [0, 1, 2]
FAST: dict[str, Any] = {"epochs": 1, "lr": 0.1, "batch_size": 8}


def blobs(classes: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian classes in R^5, eight samples each."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(K, D, generator=torch.Generator().manual_seed(99)) * 2
    y = torch.tensor(classes).repeat_interleave(8)
    return centres[y] + torch.randn(len(y), D, generator=g), y


def net() -> nn.Module:
    """A two-layer classifier."""
    model = nn.Sequential(nn.Linear(D, 10), nn.ReLU(), nn.Linear(10, K))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
    return model


TRAIN, TEST = blobs(list(range(K))), blobs(list(range(K)), seed=1)


def rows_of(found: Comparison) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["recipe"], row["calibration"]): row for row in found.rows}


# --------------------------------------------------------------------------------------------------------- upper bounds
def test_an_upper_bound_stays_one_whatever_is_added_to_it(tmp_path: Path) -> None:
    recipes = ["ft", "oracle-ft + swa", "oracle-ft+wise:0.5"]
    found = run_comparison(net(), TRAIN, TEST, SEEN, recipes, ["none", "alg", "pcv"], out=tmp_path, folds=1, **FAST)
    rows = rows_of(found)
    assert not rows["ft", "alg"]["upper bound"] and not rows["ft", "alg"]["absent labels"]
    for key in (
        ("oracle-ft + swa", "none"),
        ("oracle-ft + swa", "alg"),
        ("oracle-ft+wise:0.5", "none"),
        ("oracle-ft", "none"),
    ):
        assert rows[key]["upper bound"] and rows[key]["absent labels"]
    (shown,) = display([rows["oracle-ft + swa", "alg"]])
    assert shown["gamma from"].startswith("training data of S, by a model trained on all classes; upper bound")
    assert {(f["recipe"], f["calibration"]) for f in found.failures} == {(r, "pcv") for r in recipes[1:]}
    trained = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    sizes = {r["recipe"]: r["n_train"] for r in trained if r["kind"] == "training" and r["fold"] is None}
    assert sizes == {"source": 24, "ft": 24, "oracle-ft+swa": 48, "oracle-ft": 48}
    assert not is_upper_bound("source")


def test_an_upper_bound_without_absent_classes_is_among_the_failures(tmp_path: Path) -> None:
    found = run_comparison(net(), blobs(SEEN), TEST, SEEN, ["ft", "oracle-ft"], ["none"], out=tmp_path, **FAST)
    (failure,) = found.failures
    assert failure["recipe"] == "oracle-ft" and failure["error"] == "needs training data of every absent class"
    assert "needs training data of every absent class" in found.report.read_text()
    assert run_comparison(net(), blobs(SEEN), TEST, SEEN, ["ft"], ["none"], out=tmp_path, **FAST).failures == []


# -------------------------------------------------------------------------------------------------------------- repairs
def test_repairs_that_scale_or_shift_have_no_gamma_and_say_what_they_do(tmp_path: Path) -> None:
    uneven = tuple(t[3:] for t in TRAIN)
    calibrations = ["none", "alg", "prior", "weight-align"]
    found = run_comparison(net(), uneven, TEST, SEEN, ["ft", "cosine-head"], calibrations, out=tmp_path, **FAST)
    rows = rows_of(found)
    assert rows["ft", "alg"]["gamma"] != 0 and rows["ft", "none"]["gamma"] == 0
    for name, word in (("prior", "shift"), ("weight-align", "factor")):
        row = rows["ft", name]
        assert row["gamma"] is None and word in row["effect"] and word in display([row])[0]["gamma from"]
    assert rows["ft", "prior"]["gamma from"] == "class counts of the training data of S"
    # The rows of a cosine head have no norm that counts: aligning them would be another model's repair.
    (failure,) = found.failures
    assert (failure["recipe"], failure["calibration"]) == ("cosine-head", "weight-align")


def test_the_calibration_error_is_that_of_the_softmax() -> None:
    groups = class_groups(K, SEEN)
    z = np.random.default_rng(0).normal(size=(40, K)).astype(np.float32) * 3
    tables = LogitTable(z, list(groups.classes), np.arange(40) % K)
    record = measure(Material(tables, tables, groups), "none").record
    assert record["ECE"] == pytest.approx(ece(z, np.arange(40) % K))


def test_averages_with_the_source_work_where_the_training_ran() -> None:
    source, tuned = named(net()), named(net().to("meta"))
    context: Any = SimpleNamespace(source=source)
    for output in ("wise:0.5", "source-ensemble"):
        made = _averaged(context, tuned, output, "ft")
        assert {p.device.type for p in made.model.parameters()} == {"meta"}
    assert source.device.type == "cpu"


# ----------------------------------------------------------------------------------------------------- rows and records
def test_differences_are_taken_over_the_samples_that_all_could_read(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 3, 4, 5, 0, 3])
    setting = SimpleNamespace(labels={}, seen=("0", "1", "2"), absent=("3", "4", "5"))
    cells: list[Any] = []
    records: dict[str, Any] = {}
    for key, recipe, seed, gone, wrong in (("a", "ft", 0, 1, 3), ("b", "ft", 1, 0, 3), ("c", "lp", 0, 4, 5)):
        kept = np.setdiff1d(np.arange(8), [gone])
        predicted = np.where(np.arange(8) == wrong, 1, labels)
        arrays = {"rows": kept, "predicted": predicted[kept], "labels": labels[kept]}
        np.savez(tmp_path / f"{key}.npz", allow_pickle=False, **arrays)
        own = {"key": key, "recipe": recipe, "calibration": "none", "seed": seed, "setting": setting}
        cells.append(SimpleNamespace(**own, classes=tuple("012345")))
        facts = {"chosen_on": "-", "test_labels": False, "absent_labels": False, "oracle": False}
        records[key] = {**facts, "gamma": 0.0, "effect": "", "Y/Y": 0.5}
    rows = table(cells, records, tmp_path, n_bootstrap=50)
    # Common samples are 2, 3, 5, 6, 7: ft is wrong on 3, lp on 5.
    assert rows[1]["Y/Y - ft"][0] == pytest.approx(0.0) and rows[1]["S/Y - ft"][0] == pytest.approx(0.0)
    assert rows[1]["Y/Y - ft"][1] < 0 < rows[1]["Y/Y - ft"][2]


def test_a_unit_that_was_killed_before_its_record_gets_one(tmp_path: Path) -> None:
    arguments: Any = (net(), TRAIN, TEST, SEEN, ["ft"], ["none"])
    first = run_comparison(*arguments, out=tmp_path, **FAST)
    results = tmp_path / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    kept = [line for line in lines if line["recipe"] != "ft"]
    results.write_text("".join(json.dumps(line) + "\n" for line in kept))
    again = run_comparison(*arguments, out=tmp_path, **FAST)
    assert again.rows == first.rows
    (record,) = [
        line
        for line in map(json.loads, results.read_text().splitlines())
        if line["kind"] == "training" and line["recipe"] == "ft"
    ]
    assert record["n_train"] == 24 and record["seconds"] is None


def test_a_row_says_of_how_many_seeds_it_is_and_keeps_its_place(tmp_path: Path) -> None:
    setting = SimpleNamespace(labels={}, seen=("0",), absent=("1",))
    facts = {"chosen_on": "-", "test_labels": False, "absent_labels": False, "oracle": False, "effect": ""}
    cells: list[Any] = []
    records: dict[str, Any] = {}
    for seed in (0, 1):
        for recipe in ("ft", "lp"):
            key = f"{recipe}{seed}"
            own = {"key": key, "recipe": recipe, "calibration": "none", "seed": seed, "setting": setting}
            cells.append(SimpleNamespace(**own, classes=("0", "1")))
            np.savez(tmp_path / f"{key}.npz", rows=np.arange(2), predicted=np.zeros(2, int), labels=np.arange(2))
            records[key] = {**facts, "gamma": 0.0, "Y/Y": 0.5, "skipped": ["1 of lp: why"] if recipe == "lp" else []}
    del records["ft0"]  # the first seed of ft failed
    rows = table(cells, records, tmp_path, n_bootstrap=50)
    assert [(r["recipe"], r["seeds"], r["seeds asked"]) for r in rows] == [("ft", 1, 2), ("lp", 2, 2)]
    ft, lp = display(rows)
    assert ft["seeds"] == "1 of 2" and lp["seeds"] == 2
    assert "does not compare" in _caption(rows) and "does not compare" not in _caption(rows[1:])
    assert rows[1]["skipped folds"] == ["1 of lp: why"] * 2 and lp["gamma from"].endswith("2 folds skipped")


# ----------------------------------------------------------------------------------------------- one folder, many calls
def on_folder(out: Path, recipes: list[str], calibrations: list[str], **options: Any) -> Comparison:
    return run_comparison(net(), TRAIN, TEST, SEEN, recipes, calibrations, out=out, **FAST, **options)


def test_cells_of_earlier_calls_stay_in_table_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ft_calibrate.recipes

    first = on_folder(tmp_path, ["ft"], ["none", "alg"])
    both = on_folder(tmp_path, ["lp"], ["none"], seeds=(1,))
    wanted = [("source", "none"), ("ft", "none"), ("ft", "alg"), ("lp", "none"), ("oracle-ft", "none")]
    assert list(rows_of(both)) == wanted
    assert rows_of(both)["ft", "alg"] == rows_of(first)["ft", "alg"]
    assert rows_of(both)["oracle-ft", "none"]["seeds"] == 2  # seed 0 of the first call, seed 1 of the second
    assert [r["recipe"] for r in json.loads((tmp_path / "summary.json").read_text())["rows"]] == [w[0] for w in wanted]
    assert "average logit gap" in both.report.read_text()

    def no_training(*args: Any, **options: Any) -> Any:
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr(ft_calibrate.recipes, "fine_tune", no_training)
        assert on_folder(tmp_path, ["ft"], ["none", "alg"]).rows == both.rows
    fresh = on_folder(tmp_path, ["lp"], ["none"], overwrite=True)
    assert [row["recipe"] for row in fresh.rows] == ["source", "lp", "oracle-ft"]


def test_a_sweep_grows_by_values_and_not_by_axes(tmp_path: Path) -> None:
    on_folder(tmp_path, ["lp"], ["none"], sweep={"lr": [0.1]})
    grown = on_folder(tmp_path, ["lp"], ["none"], sweep={"lr": [0.2]})
    assert [(r["recipe"], r["lr"]) for r in grown.rows] == [
        (recipe, lr) for lr in (0.1, 0.2) for recipe in ("source", "lp", "oracle-ft")
    ]
    assert "&#39;lr&#39;: 0.1" in grown.report.read_text() and "&#39;lr&#39;: 0.2" in grown.report.read_text()
    with pytest.raises(UserError, match=r"changed configuration.*sweep"):
        on_folder(tmp_path, ["lp"], ["none"])


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"lr": 0.2}, r"training\.lr = 0\.1 -> 0\.2"),
        ({"seen": [0, 1]}, "seen = "),
        ({"criterion": "overall"}, 'criterion = "balanced" -> "overall"'),
        ({"remaining": "keep"}, 'remaining = "absent" -> "keep"'),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    tmp_path: Path, changed: dict[str, Any], difference: str
) -> None:
    options: dict[str, Any] = {"seen": SEEN, "recipes": ["lp"], "calibrations": ["none"], **FAST}
    run_comparison(net(), TRAIN, TEST, out=tmp_path, **options)
    with pytest.raises(UserError, match=rf"changed configuration.*{difference}.*--overwrite.*another --out"):
        run_comparison(net(), TRAIN, TEST, out=tmp_path, **{**options, **changed})


def test_a_damaged_record_of_earlier_calls_is_named(tmp_path: Path) -> None:
    add_request(tmp_path, {"recipes": ["ft"]})
    for _ in range(2):
        assert add_request(tmp_path, {"recipes": ["lp"]}) == [{"recipes": ["ft"]}, {"recipes": ["lp"]}]
    (tmp_path / REQUESTS).write_text("[1")
    with pytest.raises(UserError, match=r"unreadable record of earlier calls in .*requests\.json"):
        add_request(tmp_path, {"recipes": ["ft"]})


def test_folds_that_do_not_count_are_named_with_recipe_and_seed_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):  # one of the two halves of three classes is a single class, whose gap is not defined
        found = on_folder(tmp_path, ["ft"], ["none", "ratio-pcv"], folds=4, seeds=(7,))
        report = found.report.read_text()
        reasons = rows_of(found)["ft", "ratio-pcv"]["skipped folds"]
        assert reasons and all(" of ft, seed 7: " in reason for reason in reasons)
        assert f"fold {reasons[0].partition(':')[0]}" in report and "Folds that do not count" in report
    assert f"fold {reasons[0].partition(':')[0]} is skipped" in caplog.text


# ------------------------------------------------------------------------------------------------------------- pictures
@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Train and test pictures of five glyphs; the second one of g01 in each, and one of absent g04, are damaged."""
    for split in ("train", "test"):
        data = open_dataset(f"tinyworld:glyphs?domain=target&split={split}&n=5")
        for i, label in enumerate(data.labels):
            if label < 5:
                path = tmp_path / split / data.classes[int(label)] / f"{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                data[i].image.save(path)
        for name, which in (("g01", 1), ("g04", 0)):
            path = sorted((tmp_path / split / name).iterdir())[which]
            path.write_bytes(path.read_bytes()[:30])
    return tmp_path


def test_unreadable_pictures_are_left_out_listed_and_shift_no_label(pictures: Path, tmp_path: Path) -> None:
    from ft_calibrate.classifier import load_classifier

    train, test = (open_dataset(f"folder:{pictures / split}") for split in ("train", "test"))
    model = load_classifier("tiny:glyph-cnn")
    seen = ["g00", "g01", "g02"]
    base: Any = (model, train, test, seen)
    grid: Any = (*base, ["ft", "lp"], ["none", "alg", "pcv"])
    options: dict[str, Any] = {"absent": ["g03", "g04"], "remaining": "exclude", "folds": 1, **FAST}
    found = run_comparison(*grid, out=tmp_path / "out", **options)
    assert found.failures == [] and len(found.skipped) == 4
    listed = [line.split(",")[0] for line in (tmp_path / "out" / "skipped.csv").read_text().splitlines()]
    bad = [name for name in listed if not name.startswith("test: ")][1:]  # damaged under the same names in both
    assert listed == ["id", *bad, *(f"test: {name}" for name in bad)] and [b[:4] for b in bad] == ["g01/", "g04/"]
    names = model.class_names or []
    columns = np.array([names.index(test.classes[int(y)]) for y in test.labels])
    for path in (tmp_path / "out" / "cells").glob("*.npz"):
        with np.load(path) as stored:
            assert len(stored["rows"]) == len(test) - 2
            np.testing.assert_array_equal(stored["labels"], columns[stored["rows"]])
    assert "4 images could not be read" in found.report.read_text()
    again = run_comparison(*grid, out=tmp_path / "out", **options)  # nothing is read again, nothing forgotten
    assert again.skipped == found.skipped and again.rows == found.rows
    strict = run_comparison(*base, out=tmp_path / "strict", strict=True, **options)
    assert strict.rows == [] and {f["kind"] for f in strict.failures} == {"training"}


def test_pseudo_cross_validation_leaves_unreadable_pictures_out(pictures: Path, tmp_path: Path) -> None:
    from ft_calibrate.classifier import load_classifier
    from ft_calibrate.pcv_folds import plan_folds
    from ft_calibrate.pcv_run import pcv_by_retraining
    from ft_calibrate.target_data import target_data

    whole = open_dataset(f"folder:{pictures / 'train'}")
    train = whole.subset([i for i, y in enumerate(whole.labels) if y < 3])
    model = load_classifier("tiny:glyph-cnn")
    seen = ["g00", "g01", "g02"]
    found = pcv_by_retraining(model, train, seen, folds=2, out=tmp_path / "pcv", **FAST)
    (bad,) = found.skipped
    assert bad.startswith("g01/") and bad in (tmp_path / "pcv" / "skipped.csv").read_text()
    data = target_data(train, model.class_names or [])
    for fold, plan in zip(found.folds, plan_folds(data, seen, 2), strict=True):
        kept = [row for row in plan.val_rows if train.ids[row] != bad]
        np.testing.assert_array_equal(fold.labels, data.columns[kept])
        assert len(fold.logits) == len(kept)
    assert dataclasses.replace(found, skipped={}).ratio is not None
    with pytest.raises(UserError, match="g01"):
        pcv_by_retraining(model, train, seen, folds=2, out=tmp_path / "strict", strict=True, **FAST)
