"""The audit compares two models' maps where both have seen the picture, and says what agreement means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from finecam.agreement import (
    COMMON,
    Attribute,
    attribute_table,
    compare_maps,
    on_common_region,
    read_attributes,
)
from finecam.audit_run import audit
from finecam.classifiers import Classifier
from PIL import Image
from tinyworld.birds import Birds
from torch import nn
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

CLIP = "random:tiny:clip"


def test_common_region_aligns_two_croppings() -> None:
    """Both models see a bright column at x = 50 of a 100 x 100 picture, through different crops."""
    size = (100, 100)
    wide, narrow = np.zeros((10, 10), np.float32), np.zeros((10, 10), np.float32)
    wide[:, 5] = 1  # covers 0..100: column 5 is x 50..60
    narrow[:, 4:6] = 1  # covers 30..80, cells of 5: columns 4 and 5 are x 50..60
    a, b = on_common_region(wide, (0, 0, 100, 100), narrow, (30, 30, 80, 80), size)
    assert a.shape == b.shape == (COMMON, COMMON)
    assert abs(a.mean(0).argmax() - b.mean(0).argmax()) <= 4
    centre = (55 - 30) / 50 * COMMON
    assert abs((a.mean(0) * np.arange(COMMON)).sum() / a.mean(0).sum() - centre) < 2.5
    assert compare_maps(a, b)["pearson"] > 0.85
    with pytest.raises(UserError, match=r"no common part"):
        on_common_region(wide, (0, 0, 20, 20), narrow, (50, 50, 80, 80), size)


def test_scores_of_equal_disjoint_and_flat_maps() -> None:
    left, right = np.zeros((20, 20), np.float32), np.zeros((20, 20), np.float32)
    left[:, :2], right[:, -2:] = 1, 1
    same = compare_maps(left, left)
    assert same["pearson"] == pytest.approx(1) and same["iou"] == 1
    assert same["energy of classifier in attribute"] == pytest.approx(1)
    other = compare_maps(left, right)
    assert other["iou"] == 0 and other["pearson"] < 0 and other["energy of attribute in classifier"] == 0
    assert all(np.isnan(v) for v in compare_maps(left, np.zeros_like(left)).values())


def test_the_hint_needs_an_interval_above_chance() -> None:
    def entry(iou: float | None) -> dict[str, float | None]:
        return dict.fromkeys(
            ("pearson", "energy of classifier in attribute", "energy of attribute in classifier"), 0.5
        ) | {"iou": iou}

    records = [
        {"target": {"name": "a"}, "attributes": [{"attribute": name, **entry(iou)}]}
        for name, ious in {"good": (0.4, 0.5, 0.6), "bad": (0.0, 0.05, 0.3), "none": (None, None)}.items()
        for iou in ious
    ]
    rows = {row["attribute"]: row for row in attribute_table(records)}
    assert rows["good"]["hint"] == "" and rows["good"]["images"] == 3 and rows["good"]["iou"][0] == pytest.approx(0.5)
    assert "not above chance" in rows["bad"]["hint"]
    assert rows["none"]["hint"] == "no map" and rows["none"]["empty maps"] == 2
    assert attribute_table(records[:1])[0]["hint"] == "few images"


def test_attribute_files(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("class,attribute,generic\nwren,short tail,\ncrow,black beak,animal\ncrow,black beak,animal\n")
    assert read_attributes(path, "bird") == [
        Attribute("wren", "short tail", "bird"),
        Attribute("crow", "black beak", "animal"),
    ]
    for text, said in {
        "species,attribute\na,b\n": "no column 'class'",
        "class,attribute\na,\n": "empty cell in .*line 2",
        "class,attribute\n": "no attributes",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_attributes(path)
    with pytest.raises(UserError, match=r"cannot read attributes"):
        read_attributes(tmp_path / "none.csv")


class Spot(nn.Module):
    """Class k looks at channel k."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 4, stride=4, bias=False)
        with torch.no_grad():
            self.conv.weight.zero_()
            for k in range(3):
                self.conv.weight[k, k] = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


def spot() -> Classifier:
    preprocess = Preprocess(size=(64, 64), mean=(0, 0, 0), std=(1, 1, 1))
    return Classifier(Spot().eval(), ["red", "green", "blue"], preprocess, layer="conv", spec="spot")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, (name, colour) in enumerate({"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}.items()):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(2):
            image = Image.new("RGB", (80, 64), (20, 20, 20))
            image.paste(colour, (10 + 20 * i, 20, 30 + 20 * i, 40 + k))
            image.save(tmp_path / "images" / name / f"{k}.png")
    return tmp_path / "images"


def test_audit_writes_rows_panels_and_a_report(images: Path, tmp_path: Path) -> None:
    (images / "red" / "bad.png").write_bytes(b"")
    rows = [Attribute("red", "red patch"), Attribute("red", "blue crown"), Attribute("green", "green patch")]
    done = audit(images, spot(), CLIP, rows, tmp_path / "o", references=1)
    assert (done.done, done.failed, done.skipped) == (4, 1, 2)  # blue has no attributes
    assert [(r["class"], r["attribute"], r["images"]) for r in done.rows] == [
        ("green", "green patch", 2),
        ("red", "blue crown", 2),
        ("red", "red patch", 2),
    ]
    records = [json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines()]
    for r in records:
        assert len(r["attributes"]) == {"red": 2, "green": 1, "blue": 0}[r["target"]["name"]]
        if r["attributes"]:
            with Image.open(tmp_path / "o" / r["overlay"]) as panel:
                panel.load()
    page = done.report.read_text(encoding="utf-8")
    assert "red patch" in page and "image file is empty" in page
    again = audit(images, spot(), CLIP, rows, tmp_path / "o", references=1)
    assert again.rows == done.rows and again.done == 4
    with pytest.raises(UserError, match=r"changed configuration"):
        audit(images, spot(), CLIP, rows[:1], tmp_path / "o", references=1)


def test_classifier_and_text_models_are_checked(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean red"):
        audit(images, spot(), CLIP, [Attribute("rad", "red")], tmp_path / "o")
    with pytest.raises(UserError, match=r"texts need an image-text model"):
        audit(images, spot(), "tiny:cnn", [Attribute("red", "red")], tmp_path / "o")


def test_a_model_that_agrees_with_itself(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier itself as the attribute finder: agreement must be perfect."""
    import finecam.audit_run

    finder = spot()
    finder.class_names = ["red", "green", "bird"]
    monkeypatch.setattr(finecam.audit_run, "load_classifier", lambda *a, **k: finder)
    rows = [Attribute("red", "red"), Attribute("green", "green")]
    done = audit(images, spot(), "itself", rows, tmp_path / "o", references=["blue"])
    for row in done.rows:
        assert row["pearson"][0] == pytest.approx(1, abs=1e-4) and row["iou"][0] == pytest.approx(1, abs=1e-4)
        assert row["hint"] == "few images"


@pytest.mark.slow
def test_tiny_clip_finds_the_marks_a_classifier_uses(tmp_path: Path) -> None:
    """The real pair of tiny models: the attribute's map lies on the mark more than a random region would."""
    birds = Birds(n=32, split="val")
    rows = [Attribute(name, str(species.mark)) for name, species in zip(birds.classes, birds.species)]
    done = audit(birds, "tiny:cnn", "tiny:clip", rows, tmp_path / "o")
    assert done.done == 32 and done.failed == 0
    ious = [row["iou"][0] for row in done.rows if row["iou"] is not None]
    assert np.mean(ious) > 0.0526
