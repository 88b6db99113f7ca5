"""The experiments as declared, and each of them end to end on a miniature of its data."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ft_calibrate.compare_cells import check_calibration
from ft_calibrate.experiments import BEST_OF_HT, EXPERIMENTS, Check, find_experiment
from ft_calibrate.recipes import fine_tune, parse_recipe
from ft_calibrate.reproduce_report import read_reference, with_reference
from ft_calibrate.reproduction import QUICK, _checks, _mean_over_cases, reproduce
from ft_calibrate.splits import official_split
from PIL import Image
from vfm_core.errors import UserError

NET = "random:timm:test_resnet"
SMALL: dict[str, Any] = {"quick": True, "image_size": 32, "recipes": ["ft"], "calibrations": ["none", "alg"]}


def picture(path: Path, number: int) -> None:
    """A small noisy picture whose colour depends on the class number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([number, len(path.name)])
    pixels = rng.integers(0, 60, (24, 24, 3))
    pixels[..., number % 3] += 120
    Image.fromarray(pixels.astype(np.uint8)).save(path)


# ------------------------------------------------------------------------------------------------------------ the table
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_made_of_things_that_exist(name: str) -> None:
    experiment = EXPERIMENTS[name]
    for recipe in experiment.recipes:
        parse_recipe(recipe)
    for calibration in experiment.calibrations:
        check_calibration(calibration)
    assert {*experiment.training, *experiment.source_training} <= set(inspect.signature(fine_tune).parameters)
    for check in experiment.checks:
        for recipe, calibration, _ in (check.left, check.right):
            assert recipe in ("source", BEST_OF_HT, *experiment.recipes) and calibration in experiment.calibrations


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_number_of_the_papers_is_remembered(name: str) -> None:
    reference = read_reference(name)
    assert reference["filled_by"] is None and reference["experiment"] == name
    values = [value for cells in reference["cells"].values() for value in cells.values()]
    assert values and all(value is None for value in values)
    rows = {
        f"{r} + {c}"
        for r in ("source", "oracle-ft", *EXPERIMENTS[name].recipes)
        for c in ("none", "alg", "pcv", "oracle")
    }
    assert set(reference["cells"]) <= rows


def test_settings_are_those_of_the_published_code() -> None:
    office, imagenet = EXPERIMENTS["office-home"].training, EXPERIMENTS["imagenet-r"].training
    assert (office["lr"], office["backbone_lr_scale"], office["momentum"], office["batch_size"]) == (1e-3, 0.1, 0.9, 64)
    assert (office["weight_decay"], office["epochs"], office["steps_per_epoch"]) == (5e-4, 20, 500)
    assert (imagenet["weight_decay"], imagenet["epochs"], imagenet["steps_per_epoch"]) == (1e-4, 50, 500)


def test_cases_are_those_of_the_paper() -> None:
    pairs = [case.name for case in EXPERIMENTS["office-home"].cases(Path("d"))]
    assert pairs == ["Ar-Cl", "Ar-Pr", "Ar-Rw", "Rw-Ar", "Rw-Cl", "Rw-Pr"]
    both = {case.name: case.remaining for case in EXPERIMENTS["imagenet-rs"].cases(Path("d"))}
    assert both == {"imagenet-r": "exclude", "imagenet-sketch": "absent"}
    with pytest.raises(UserError, match="unknown experiment: 'imagenet-q'"):
        find_experiment("imagenet-q")


def test_claims_are_inequalities_between_cells() -> None:
    rows = [
        {"recipe": "ft", "calibration": "none", "U/Y": 0.1},
        {"recipe": "source", "calibration": "none", "U/Y": 0.4},
    ]
    check = Check("falls", ("ft", "none", "U/Y"), "<", ("source", "none", "U/Y"))
    experiment = type("E", (), {"checks": (check, Check("?", ("ft", "none", "U/Y"), ">", ("lp", "none", "U/Y")))})
    found = _checks(experiment, rows)  # type: ignore[arg-type]
    assert [f["holds"] for f in found] == [True, None] and found[0]["inequality"] == "U/Y of ft < U/Y of source"
    rows[0]["U/Y"] = 0.5
    assert _checks(experiment, rows)[0]["holds"] is False  # type: ignore[arg-type]


def test_the_best_of_ht_is_found_in_the_table_and_named() -> None:
    areas = {"ft": 0.5, "lp": 0.9, "lolsgd": 0.6, "lolsgd+rank": 0.55, "oracle-ft+swa": 0.95, "source": 0.8}
    rows: list[dict[str, Any]] = [{"recipe": r, "calibration": "none", "AUSUC": a} for r, a in areas.items()]
    rows.append({"recipe": "distill", "calibration": "none", "AUSUC": None})
    check = Check("beats HT", ("ft", "none", "AUSUC"), ">", (BEST_OF_HT, "none", "AUSUC"))
    experiment: Any = type("E", (), {"checks": (check,)})
    (found,) = _checks(experiment, rows)
    assert found["right"] == 0.6 and found["holds"] is False and found["inequality"] == "AUSUC of ft > AUSUC of lolsgd"
    (alone,) = _checks(experiment, [rows[0]])
    assert alone["holds"] is None and "the best of HT's" in alone["inequality"]


def cell(recipe: str, value: float | None) -> dict[str, Any]:
    facts = {
        "gamma from": "-",
        "absent labels": False,
        "upper bound": False,
        "NCM reference": None,
        "seeds": 1,
        "sd": {},
    }
    return {"recipe": recipe, "calibration": "none", "Y/Y": value, **facts}


def test_cases_are_averaged_row_by_row() -> None:
    rows = _mean_over_cases([[cell("ft", 0.2), cell("lp", 0.5)], [cell("ft", 0.4)], [cell("ft", None)]])
    assert [(r["recipe"], r["cases"]) for r in rows] == [("ft", 3), ("lp", 1)]
    assert rows[0]["Y/Y"] == pytest.approx(0.3) and rows[0]["sd"]["Y/Y"] == pytest.approx(np.sqrt(0.02))


def test_cells_of_the_paper_stand_beside_ours_when_filled() -> None:
    rows = _mean_over_cases([[cell("ft", 0.2)]])
    assert "Y/Y (paper)" not in with_reference(rows, read_reference("office-home"))[0]
    filled = {"cells": {"ft + none": {"Y/Y": 0.25}}}
    assert with_reference(rows, filled)[0]["Y/Y (paper)"] == 0.25


# ----------------------------------------------------------------------------------------------------------- miniatures
@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("office")
    for split in ("office-home:Ar", "office-home:Rw"):
        s = official_split(split)
        for domain in ("Art", "Clipart", "Real World"):
            for i, name in enumerate([*s.seen[:3], *s.absent[:2]]):
                for j in range(4):
                    picture(root / domain / name / f"{j:05d}.jpg", i)
    return root


def test_office_home_in_miniature(office: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        **SMALL,
        "model": NET,
        "cases": ["Ar-Cl", "Rw-Cl"],
    }
    found = reproduce("office-home", office, out=tmp_path, **options)
    assert [(r["recipe"], r["calibration"]) for r in found.rows] == [
        ("source", "none"),
        ("ft", "none"),
        ("ft", "alg"),
        ("oracle-ft", "none"),
    ]
    assert found.failures == [] and set(found.cases) == {"Ar-Cl", "Rw-Cl"}
    assert all(r["cases"] == 2 for r in found.rows)
    assert len(list((tmp_path / "sources").iterdir())) == 2  # one source model per source domain
    html = found.report.read_text()
    assert "trial run" in html and "Ar-Cl/report.html" in html and "not tested" in html
    config = json.loads((tmp_path / "Ar-Cl" / "config.json").read_text())
    assert config["classes"] == list(official_split("office-home:Ar").classes)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["settings"]["augment"]["size"] == 32 and summary["settings"]["epochs"] == QUICK["epochs"]

    def no_units(*args: Any) -> Any:
        raise AssertionError("ran again")

    monkeypatch.setattr(sys.modules["ft_calibrate.comparison"], "run_unit", no_units)
    assert reproduce("office-home", office, out=tmp_path, **options).rows == found.rows


def test_unreadable_pictures_of_source_and_target_are_listed(office: Path, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "data"
    shutil.copytree(office, root)
    broken = [sorted(root.glob(f"{domain}/*/*.jpg"))[0] for domain in ("Art", "Clipart")]
    for path in broken:
        path.write_bytes(b"no picture")
    found = reproduce("office-home", root, out=tmp_path / "out", **SMALL, model=NET, cases=["Ar-Cl"])
    assert found.failures == [] and len(found.skipped) == 2
    listed = (tmp_path / "out" / "skipped.csv").read_text()
    assert all(f"{path.parent.name}/{path.name}" in listed for path in broken)


def test_the_source_model_is_loaded_where_it_will_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ft_calibrate.classifier

    class Loaded(Exception):
        """Ends the experiment once the model has been asked for."""

    places: list[Any] = []

    def load(*args: Any, device: Any = "cpu", **options: Any) -> Any:
        places.append(device)
        raise Loaded

    monkeypatch.setattr(ft_calibrate.classifier, "load_classifier", load)
    for i, name in enumerate(official_split("imagenet-r").seen[:2]):
        picture(tmp_path / "data" / "imagenet-r" / name / "art_0.jpg", i)
    with pytest.raises(Loaded):
        reproduce("imagenet-r", tmp_path / "data", out=tmp_path / "out", device="cuda:1", **SMALL)
    assert places == ["cuda:1"]


def test_office_home_takes_a_checkpoint_per_source_domain(office: Path, tmp_path: Path) -> None:
    import torch
    from ft_calibrate.classifier import load_classifier

    model = load_classifier(f"{NET}?num_classes=65").model
    torch.save(model.state_dict(), tmp_path / "Ar.pth")
    options: dict[str, Any] = {**SMALL, "cases": ["Ar-Cl"], "source_ckpt": str(tmp_path / "{source}.pth")}
    found = reproduce("office-home", office, out=tmp_path / "out", model=NET, **options)
    assert not (tmp_path / "out" / "sources").exists() and len(found.rows) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ["Ar-Xx"]}, r"unknown case in --cases: 'Ar-Xx'; did you mean"),
        ({"data_root": "nowhere"}, "no such folder in --data-root: nowhere"),
    ],
)
def test_bad_requests_are_named(office: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reproduce("office-home", **{"data_root": office, "out": tmp_path, "model": NET, **SMALL, **options})


def test_imagenet_r_leaves_the_other_800_columns_out(tmp_path: Path) -> None:
    s = official_split("imagenet-r")
    for i, wnid in enumerate([*s.seen[:2], *s.absent[:2]]):
        for j in range(5):
            picture(tmp_path / "data" / "imagenet-r" / wnid / f"art_{j}.jpg", i)
    model = f"{NET}?num_classes=1000"
    reproduce("imagenet-r", tmp_path / "data", out=tmp_path / "out", model=model, **SMALL)
    allowed = [s.classes.index(name) for name in (*s.seen, *s.absent)]
    for path in (tmp_path / "out" / "imagenet-r" / "cells").glob("*.npz"):
        with np.load(path) as stored:
            assert np.isin(stored["predicted"], allowed).all()


def test_femnist_trains_its_source_without_the_target_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    users = ["w0", "w1", "w2"]
    data = {u: {"x": rng.random((15, 784)).round(2).tolist(), "y": [i % 5 for i in range(15)]} for u in users}
    content = {"users": users, "num_samples": [15] * 3, "user_data": data}
    (tmp_path / "all.json").write_text(json.dumps(content))
    import ft_calibrate.recipes

    real, writers = ft_calibrate.recipes.fine_tune, []

    def spy(model: Any, train: Any, *args: Any, **options: Any) -> Any:
        writers.append({train.meta_of(i)["group"] for i in range(len(train))})
        return real(model, train, *args, **options)

    monkeypatch.setattr(ft_calibrate.recipes, "fine_tune", spy)
    reproduce("femnist", tmp_path, out=tmp_path / "out", model=NET, cases=["writer-w1"], **SMALL)
    assert writers[0] == {"w0", "w2"} and all(w == {"w1"} for w in writers[1:])


def test_iwildcam_takes_cameras_that_the_source_has_not_seen(tmp_path: Path) -> None:
    lines = ["filename,y,split,location_remapped,datetime"]
    for camera, split in (("1", "train"), ("2", "train"), ("7", "test")):
        for y in range(4):
            for j in range(4):
                name = f"{camera}-{y}-{j}.jpg"
                picture(tmp_path / "train" / name, y)
                lines.append(f"{name},{y},{split},{camera},2013-05-17 0{j}:00:00")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    found = reproduce("iwildcam", tmp_path, out=tmp_path / "out", model=NET, **SMALL)
    assert list(found.cases) == ["location-7"] and [c["claim"] for c in found.checks][1].endswith("damaged (NCM)")


def test_inat_uses_the_fungi(tmp_path: Path) -> None:
    for split in ("train", "val"):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for c in range(5):
            for j in range(3):
                name = f"{split}/{c}/{j}.jpg"
                picture(tmp_path / name, c)
                images.append({"id": len(images), "file_name": name})
                annotations.append({"id": len(annotations), "image_id": len(annotations), "category_id": c})
        categories = [{"id": c, "name": f"s{c}", "supercategory": "Fungi" if c < 4 else "Birds"} for c in range(5)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    found = reproduce("inat", tmp_path, out=tmp_path / "out", model=f"{NET}?num_classes=4", **SMALL)
    assert list(found.cases) == ["fungi"]
    classes = json.loads((tmp_path / "out" / "fungi" / "config.json").read_text())["classes"]
    assert sorted(classes) == ["s0", "s1", "s2", "s3"]


def test_vtab_runs_the_tasks_that_are_there(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for c in range(4):
            for j in range(3):
                picture(tmp_path / "dtd" / split / f"texture{c}" / f"{j}.png", c)
    found = reproduce("vtab", tmp_path, out=tmp_path / "out", model=f"{NET}?num_classes=4", **SMALL)
    assert list(found.cases) == ["dtd"]
    with pytest.raises(UserError, match="no task of VTAB found"):
        reproduce("vtab", tmp_path / "out", out=tmp_path / "none", **SMALL)
