"""Scoring methods on labelled images: what is compared, on what, and what the tables say."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finecam.arms import Arm, ArmMaps, aggregation_arms, arms_of, reference_arms, similarity_arms, strength_arms
from finecam.classifiers import Classifier, load_classifier
from finecam.evaluation import EXTRAS, Evaluation, Scoring, evaluate, score_maps
from finecam.evaluation_run import run_evaluation
from finecam.explainer import Explainer
from finecam.metrics import energy_in
from finecam.regions import Differences, regions_of, to_input_mask
from tinyworld.birds import Birds
from torch import nn
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

FAST = Scoring(fractions=(0.05,), curve_steps=0)


@pytest.fixture(scope="module")
def birds() -> Birds:
    return Birds(n=16, split="test", seed=5)


@pytest.fixture(scope="module")
def found(birds: Birds) -> Evaluation:
    return evaluate(birds, "tiny:cnn", methods=["gradcam"], gammas=(0, 0.6, 1), scoring=FAST, batch_size=5)


def test_scores_are_those_of_the_explainer(birds: Birds, found: Evaluation) -> None:
    model = load_classifier("tiny:cnn")
    rows = [birds.ids.index(name) for name in found.ids]
    x = torch.stack([model.preprocess(birds[i].image) for i in rows])
    masks = torch.from_numpy(np.stack([birds.trait_mask(i) for i in rows]))
    maps = Explainer(model.model)(x, target=torch.from_numpy(birds.labels[rows])).maps
    expected = energy_in(maps, masks).numpy()
    np.testing.assert_allclose(found.values["gradcam + Finer 0.6"]["energy in trait"], expected, atol=1e-5)


def test_every_arm_sees_the_same_images_and_baselines_come_along(found: Evaluation) -> None:
    assert list(found.values) == [
        "gradcam", "gradcam + Finer 0.6", "gradcam + Finer 1", "random map", "centre Gaussian",
    ]  # fmt: skip
    assert {len(v) for scores in found.values.values() for v in scores.values()} == {len(found.ids)}
    metrics = set(found.values["gradcam"])
    assert {"energy in difference", "energy in trait", "energy in object", "RD@5% (logit)", "RD@5% (weight)"} <= metrics
    assert sum(found.relations["logit"].values()) == 3 * len(found.ids)


def test_tables_and_json_round_trip(found: Evaluation) -> None:
    again = Evaluation.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.bases == found.bases and again.relations == found.relations
    np.testing.assert_allclose(
        again.values["gradcam"]["AP of trait"], found.values["gradcam"]["AP of trait"], atol=1e-6
    )
    rows = {row["arm"]: row for row in found.table("energy in trait")}
    mean, low, high = rows["gradcam"]["energy in trait"]
    assert low <= mean <= high and mean == pytest.approx(found.values["gradcam"]["energy in trait"].mean())
    differences = found.differences("energy in trait")
    assert [row["arm"] for row in differences] == ["gradcam + Finer 0.6", "gradcam + Finer 1"]
    assert all(
        row["difference"][0] == pytest.approx(rows[row["arm"]]["energy in trait"][0] - mean) for row in differences
    )


def test_wrong_images_are_left_out_unless_asked_for(birds: Birds) -> None:
    arms = [Arm("gradcam", 0.0)]
    right = evaluate(birds, "random:tiny:cnn", arms=arms, scoring=FAST, baselines=False, correct_only=False)
    assert len(right.ids) == len(birds) and right.accuracy < 0.5
    some = evaluate(birds, "tiny:cnn", arms=arms, scoring=FAST, baselines=False, indices=[3, 1])
    assert some.ids == [birds.ids[3], birds.ids[1]]


def test_curves_are_optional(birds: Birds) -> None:
    scoring = Scoring(fractions=(0.05,), curve_steps=4)
    scores = evaluate(birds, "tiny:cnn", arms=[Arm()], scoring=scoring, limit=4, baselines=False).values[Arm().name]
    assert {"deletion", "insertion"} <= set(scores)
    assert ((scores["deletion"] >= 0) & (scores["deletion"] <= 1)).all()


def test_empty_maps_are_counted_and_excluded() -> None:
    class Blind(nn.Module):
        """Logits that do not depend on the features where they are read."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.bias = nn.Parameter(torch.eye(16)[0] * 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * self.conv(x).mean((2, 3)).sum(1, keepdim=True) + self.bias

    square = Preprocess(size=(64, 64), resize="squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    birds = Birds(n=17)
    model = Classifier(Blind(), birds.classes, square, layer="conv")
    found = evaluate(birds, model, arms=[Arm("gradcam", 0.0)], scoring=FAST, baselines=False)
    assert found.n_empty("gradcam") == len(found.ids) == 2  # the two birds of class 0
    assert np.isnan(found.table("energy in trait")[0]["energy in trait"][0])


def test_what_cannot_be_scored_is_said() -> None:
    birds = Birds(n=16, layout="factorial")
    with pytest.raises(UserError, match=r"lacks classes.*'orange bird with red wing patch'"):
        evaluate(birds, "tiny:cnn?layout=nested", arms=[Arm()], scoring=FAST)
    birds.labels[:] = -1
    with pytest.raises(UserError, match="no labelled image"):
        evaluate(birds, "tiny:cnn?layout=factorial", arms=[Arm()], scoring=FAST)


def test_arms_name_what_they_change() -> None:
    assert [arm.name for arm in arms_of(["gradcam", "layercam"], [0, 1])] == [
        "gradcam", "gradcam + Finer 1", "layercam", "layercam + Finer 1",
    ]  # fmt: skip
    for arms in (strength_arms(), reference_arms(), aggregation_arms(), similarity_arms()):
        names = [arm.name for arm in arms]
        assert len(set(names)) == len(names) and arms[0].plain
    assert reference_arms()[2].name == "gradcam + Finer 0.6 (only look-alike 2, by rank)"


def test_only_one_look_alike_is_used_by_rank(birds: Birds) -> None:
    """The arm of the second look-alike equals an explicit reference to it."""
    model = load_classifier("tiny:cnn")
    x = torch.stack([model.preprocess(birds[i].image) for i in range(4)])
    target = torch.from_numpy(birds.labels[:4])
    explain = Explainer(model.model)
    second = explain(x, target=target, references=2, similarity="rank").references[:, 1:]
    maps = explain(x, target=target, references=second).maps
    masks = torch.from_numpy(np.stack([birds.trait_mask(i) for i in range(4)]))
    arm = reference_arms()[2]
    scores = evaluate(birds, model, arms=[arm], scoring=FAST, limit=4, baselines=False, correct_only=False)
    np.testing.assert_allclose(scores.values[arm.name]["energy in trait"], energy_in(maps, masks).numpy(), atol=1e-5)


def test_regions_follow_the_crop() -> None:
    mask = np.zeros((40, 80), dtype=bool)
    mask[:, :20] = True
    crop = Preprocess(size=(32, 32), resize="shortest", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert not to_input_mask(mask, crop, (32, 32)).any()  # a centre crop leaves the left quarter out
    squash = Preprocess(size=(32, 32), resize="squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert to_input_mask(mask, squash, (32, 32)).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not to_input_mask(None, squash, (32, 32)).any()


SQUARE = Preprocess(size=(64, 64), resize="squash", mean=(0.5,) * 3, std=(0.5,) * 3)


def test_difference_region_is_every_pixel_that_changes(birds: Birds) -> None:
    target = torch.from_numpy(birds.labels[:2])
    siblings = torch.tensor([birds.siblings(int(c))[:2] for c in target])
    regions = regions_of(birds, [0, 1], target, siblings, SQUARE, (64, 64))
    for i in range(2):
        union = birds.difference_mask(i, int(siblings[i, 0])) | birds.difference_mask(i, int(siblings[i, 1]))
        assert torch.equal(regions["difference"][i], torch.from_numpy(union))
        # More than the bird's own mark: also where its siblings wear theirs.
        assert (regions["difference"][i] & ~regions["trait"][i]).any()
        assert (regions["trait"][i] & regions["object"][i]).sum() > 0


def test_same_mark_on_another_body_differs_in_the_body() -> None:
    birds = Birds(n=1, layout="factorial")
    same_mark = next(d for d in range(16) if birds.relation(int(birds.labels[0]), d) == "same mark")
    assert not birds.presence_mask(0, same_mark).any()
    target = torch.from_numpy(birds.labels)
    region = regions_of(birds, [0], target, torch.tensor([[same_mark]]), SQUARE, (64, 64))["difference"][0].numpy()
    assert (region & birds.object_mask(0)).sum() > birds.object_mask(0).sum() / 2


def test_masks_are_rendered_once_per_row_and_class(birds: Birds, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    render = Birds.difference_masks

    def counting(self: Birds, rows: Sequence[int], classes: Sequence[int]) -> np.ndarray:
        asked.extend(zip(rows, classes))
        return render(self, rows, classes)

    monkeypatch.setattr(Birds, "difference_masks", counting)
    differences = Differences(birds, [0, 1], SQUARE, (64, 64))
    first = differences.union(torch.tensor([[2, 3], [4, -1]]))
    differences.union(torch.tensor([[3, 5], [4, 6]]))
    assert sorted(asked) == [(0, 2), (0, 3), (0, 5), (1, 4), (1, 6)]
    assert torch.equal(first[1], torch.from_numpy(render(birds, [1], [4])[0]))  # -1 is no class of the dataset


def test_each_arm_is_scored_on_the_references_it_used(birds: Birds) -> None:
    model = load_classifier("tiny:cnn")
    arm = Arm("gradcam", 0.6, similarity="weight")
    found = evaluate(birds, model, arms=[arm.base, arm], scoring=FAST, baselines=False, correct_only=False)
    x = torch.stack([model.preprocess(birds[i].image) for i in range(len(birds))])
    target = torch.from_numpy(birds.labels)
    explain = Explainer(model.model)
    result = explain(x, target=target, similarity="weight")
    near = explain(x, target=target).references
    assert not torch.equal(near, result.references)

    def region(references: torch.Tensor) -> torch.Tensor:
        rows = enumerate(references.tolist())
        return torch.stack([torch.from_numpy(birds.difference_masks([i] * 3, ds).any(0)) for i, ds in rows])

    plain = explain(x, target=target, references=None).maps
    own, name = region(result.references), "energy in difference"
    np.testing.assert_allclose(found.values[arm.name][name], energy_in(result.maps, own), atol=1e-5)
    np.testing.assert_allclose(found.values["gradcam"][name], energy_in(plain, region(near)), atol=1e-5)
    (row,) = found.differences(name)
    expected = (energy_in(result.maps, own) - energy_in(plain, own)).mean().item()
    assert row["difference"][0] == pytest.approx(expected, abs=1e-5)
    assert sum(found.used[arm.name].values()) == 3 * len(birds) and not found.used["gradcam"]
    alone = evaluate(birds, model, arms=[arm], scoring=FAST, baselines=False, correct_only=False)
    np.testing.assert_allclose(alone.matched[arm.name][name], energy_in(plain, own), atol=1e-5)
    again = Evaluation.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.differences(name)[0]["difference"] == pytest.approx(row["difference"], abs=1e-5)
    assert again.used == found.used and again.radius == found.radius


def test_classes_in_another_order_score_alike(birds: Birds, found: Evaluation) -> None:
    class Reversed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).flip(1)

    known = load_classifier("tiny:cnn")
    rows = known.weights()
    assert rows is not None
    turned = Classifier(Reversed(known.model), birds.classes[::-1], known.preprocess, class_weights=rows.flip(0))
    again = evaluate(birds, turned, methods=["gradcam"], gammas=(0.0, 0.6), scoring=FAST, baselines=False)
    for arm, name in itertools.product(again.values, ("energy in difference", "RD@5% (weight)")):
        np.testing.assert_allclose(again.values[arm][name], found.values[arm][name], atol=1e-4)
    assert again.relations == found.relations


def test_an_empty_region_is_no_empty_map(birds: Birds) -> None:
    model = load_classifier("tiny:cnn")
    x = torch.stack([model.preprocess(birds[i].image) for i in range(2)])
    maps = torch.stack([torch.rand(8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 8)])
    regions = {"trait": torch.zeros(2, 64, 64, dtype=torch.bool)}
    scores = score_maps(model.model, x, torch.tensor([0, 1]), maps, regions, {}, FAST)
    assert scores["energy in trait"].isnan().all() and scores["empty"].tolist() == [0, 1]


def test_pointing_radius_is_half_a_cell_of_the_coarsest_grid(birds: Birds, found: Evaluation) -> None:
    assert found.radius == 2.0  # 16 x 16 cells on 64 pixels
    vit = load_classifier("tiny:vit")  # 8 x 8 patches
    arms = [Arm("gradcam", 0.0), Arm("rollout", 0.0)]
    assert ArmMaps(vit, arms).grid() == (8, 8)
    both = evaluate(birds, vit, arms=arms, scoring=FAST, baselines=False, correct_only=False, limit=2)
    assert both.radius == 4.0
    wide = replace(FAST, radius=90.0)
    scores = evaluate(birds, vit, arms=arms[:1], scoring=wide, baselines=False, correct_only=False, limit=2)
    assert scores.radius == 90.0 and scores.values["gradcam"]["pointing at trait"].tolist() == [1, 1]


def test_further_metrics_on_request(birds: Birds) -> None:
    scoring = Scoring(fractions=(0.05,), curve_steps=4, extras=EXTRAS)
    found = evaluate(birds, "tiny:cnn", arms=[Arm("gradcam", 0.0)], scoring=scoring, limit=2, baselines=False)
    scores = found.values["gradcam"]
    assert {
        "AD@5%", "RD@5% (max)", "curve area", "IoU@5% of trait", "average drop", "increase in confidence", "ROAD",
    } <= set(scores)  # fmt: skip
    assert (scores["RD@5% (max)"] >= scores["RD@5% (logit)"] - 1e-6).all()
    curve = found.curves["gradcam"]
    assert len(curve["target"]) == len(curve["look-alike"]) == 5
    area = np.trapezoid(np.subtract(curve["target"], curve["look-alike"]), dx=0.25)
    assert area == pytest.approx(scores["curve area"].mean(), abs=1e-5)
    with pytest.raises(UserError, match="unknown metric: 'raod'; did you mean road"):
        Scoring(extras=("raod",))


def test_the_cascade_keeps_the_question_and_destroys_the_answer(birds: Birds, tmp_path: Path) -> None:
    model = load_classifier("tiny:cnn")
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    done = run_evaluation(
        birds, model, tmp_path, methods=["gradcam", "eigencam"], gammas=(0.6,), scoring=FAST, limit=2, sanity=2
    )
    first = done.sanity[0]
    assert set(first) == {"destroyed down to", "gradcam", "gradcam + Finer 0.6", "eigencam"}
    assert first["eigencam"] == pytest.approx(1) and abs(first["gradcam"]) < 0.9  # the head alone is destroyed
    assert all(torch.equal(before[name], value) for name, value in model.model.state_dict().items())
    assert "destroyed down to" in done.report.read_text(encoding="utf-8")


def test_a_head_without_rows_leaves_relative_drop_by_weight_out(birds: Birds, tmp_path: Path) -> None:
    class Rowless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).relu().mean((2, 3))

    model = Classifier(Rowless(), birds.classes, SQUARE, layer="conv")
    done = run_evaluation(
        birds, model, tmp_path, methods=["gradcam"], gammas=(0.6,), scoring=FAST, limit=2, correct_only=False
    )
    assert not [name for name in done.table[0] if "(weight)" in name]
    assert "relative drop under 'weight' is left out" in html.unescape(done.report.read_text(encoding="utf-8"))
