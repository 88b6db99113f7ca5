"""Runs over folders: right files for every image, maps on the original picture, resume, and one bad image at a time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finecam import render
from finecam.classifiers import Classifier, load_classifier
from finecam.explain import explain_dataset, explain_folder
from finecam.explainer import Explainer
from finecam.options import ExplainOptions
from finecam.products import Style, relative_name
from finecam.streaming import aspect_preserving, patch_multiple
from finecam.summary import class_table
from finecam.targets import ids_by_name, match_classes, plan_targets, read_class_map
from PIL import Image
from tinyworld.birds import Birds
from torch import nn
from vfm_core.data import open_dataset
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess


def records(out: Path, name: str = "results.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def bird_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Birds of six species as files of several sizes and formats, one folder per species."""
    root = tmp_path_factory.mktemp("birds")
    birds = Birds(n=12, split="val")
    for i in range(12):
        image, species = birds[i].image, birds.classes[int(birds.labels[i])]
        if int(birds.labels[i]) >= 6:
            continue
        (root / species).mkdir(exist_ok=True)
        image = image.resize(((64, 64), (96, 64), (64, 100))[i % 3])
        image.save(root / species / f"{i}.{('png', 'jpg')[i % 2]}", quality=95)
    return root


@pytest.fixture(scope="module")
def run(bird_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "cams"
    done = explain_folder(bird_folder, "tiny:cnn", out, target="label", gammas=(0.6, 1.0), metrics=("relative_drop",))
    assert done.failed == 0 and done.done == done.new == 6 and done.index == out / "index.html"
    return out


def test_records_say_what_was_asked_and_found(run: Path, bird_folder: Path) -> None:
    rows = records(run)
    assert {r["image"] for r in rows} == {str(p.relative_to(bird_folder)) for p in bird_folder.rglob("*.*")}
    for r in rows:
        assert r["target"]["name"] == r["label"] == r["image"].split("/")[0]
        assert [d["weight"] for d in r["references"]] == pytest.approx([1 / 3] * 3, abs=1e-4)
        assert r["target"]["id"] not in [d["id"] for d in r["references"]]
        assert (r["method"], r["layer"], r["gamma"], r["gammas"]) == ("gradcam", "layer4.2", 0.6, [0.0, 0.6, 1.0])
        assert len({d["id"] for d in r["references"]}) == 3
        assert set(r["metrics"]) == {
            f"relative_drop@{q}, {name}" for q in ("0.05", "0.1") for name in ("plain", "finer")
        }
        gaps = [abs(d["gap"]) for d in r["references"]]
        assert gaps == sorted(gaps)  # most similar first
        x0, y0, x1, y1 = r["top5pct_box"]
        assert x0 <= r["peak"][0] <= x1 <= r["size"][0] and y0 <= r["peak"][1] <= y1 <= r["size"][1]


def test_arrays_are_plain_and_span_the_original(run: Path) -> None:
    for r in records(run):
        with np.load(run / r["map"], allow_pickle=False) as arrays:
            width, height = r["size"]
            assert tuple(arrays["size"]) == (width, height)
            for key in ("plain", "finer"):
                values = arrays[key]
                assert values.dtype == np.float16 and values.ndim == 2
                x0, _, x1, _ = arrays["box"]
                assert values.shape[1] == round(16 * width / (x1 - x0))
                assert np.nanmin(values) >= 0 and np.nanmax(values) <= 1
            assert arrays["sweep"].shape == (3, *arrays["plain"].shape)
            assert (arrays["sweep"][0] == arrays["plain"])[np.isfinite(arrays["plain"])].all()
            if width != height:  # the model saw a centred square: the rest is unknown
                assert np.isnan(arrays["plain"]).any()
            else:
                assert np.isfinite(arrays["plain"]).all()


def test_maps_equal_the_explainers_own(run: Path, bird_folder: Path) -> None:
    classifier = load_classifier("tiny:cnn")
    explainer = Explainer(classifier.model, class_names=classifier.class_names)
    r = next(r for r in records(run) if r["size"] == [64, 64])
    x = classifier.preprocess(Image.open(bird_folder / r["image"]).convert("RGB"))[None]
    expected = explainer(x, target=r["label"], references=[d["name"] for d in r["references"]], size=None).maps[0]
    with np.load(run / r["map"]) as arrays:
        np.testing.assert_allclose(arrays["finer"].astype(np.float32), expected.numpy(), atol=2e-3)


def test_pictures_of_every_image(run: Path) -> None:
    for r in records(run):
        for name in (r["overlay"], r["pictures"]["image"], *r["pictures"]["layers"]):
            with Image.open(run / name) as picture:
                picture.load()
                assert picture.format == "WEBP"
        assert len(r["pictures"]["layers"]) == 4  # plain, two strengths, difference
        example = r["pictures"]["example"]
        first = r["references"][0]["name"]
        known = {q["label"] for q in records(run)}
        assert (example is not None) == (first in known)
        if example is not None:
            assert (run / example).is_file()


def test_tables(run: Path) -> None:
    with (run / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and all(row["images"] == "1" and row["labelled"] == "1" for row in rows)
    from pyarrow import parquet

    table = parquet.read_table(run / "results.parquet").to_pylist()
    assert len(table) == 6
    by_image = {r["image"]: r for r in records(run)}
    for row in table:
        assert row["target_name"] == by_image[row["image"]]["target"]["name"]
        assert row["peak_x"] == by_image[row["image"]]["peak"][0]
    assert "finecam explain" in (run / "report.html").read_text(encoding="utf-8")
    assert not list(run.rglob(".vfm-tmp-*"))


def test_the_same_command_again_does_nothing(run: Path, bird_folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (run / "maps").rglob("*.npz")}
    again = explain_folder(bird_folder, "tiny:cnn", run, target="label", gammas=(0.6, 1.0), metrics=("relative_drop",))
    assert (again.done, again.new, again.failed) == (6, 0, 0)
    assert before == {p: p.stat().st_mtime_ns for p in (run / "maps").rglob("*.npz")}


def test_other_options_need_overwrite(run: Path, bird_folder: Path, tmp_path: Path) -> None:
    import shutil

    out = shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(UserError, match=r"changed configuration .*gammas.*--overwrite"):
        explain_folder(bird_folder, "tiny:cnn", out, target="label", gammas=(0.3,))
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    done = explain_folder(bird_folder, "tiny:cnn", out, references=None, limit=2, overwrite=True)
    assert (done.done, done.new) == (2, 2)
    assert len(list((out / "maps").rglob("*.npz"))) == 2  # the earlier run's files are gone
    assert (out / "notes.txt").exists()  # nobody else's are
    for r in records(out):
        with np.load(out / r["map"]) as arrays:
            assert "finer" not in arrays.files
        assert r["references"] == [] and len(r["pictures"]["layers"]) == 1


def test_limit_can_grow(bird_folder: Path, tmp_path: Path) -> None:
    for limit, new in ((2, 2), (5, 3), (None, 1)):
        assert explain_folder(bird_folder, "tiny:cnn", tmp_path / "o", limit=limit).new == new


def test_batches_do_not_change_results(bird_folder: Path, tmp_path: Path) -> None:
    for name, batch in (("one", 1), ("many", 16)):
        explain_folder(bird_folder, "tiny:cnn", tmp_path / name, batch_size=batch, workers=batch)
    one, many = ({r["image"]: r for r in records(tmp_path / n)} for n in ("one", "many"))
    assert one.keys() == many.keys()
    for image in one:
        a, b = (np.load(tmp_path / n / one[image]["map"])["finer"].astype(np.float32) for n in ("one", "many"))
        np.testing.assert_allclose(a, b, atol=2e-3)
        assert [d["id"] for d in one[image]["references"]] == [d["id"] for d in many[image]["references"]]


# --- targets --------------------------------------------------------------------------------


class Flat(nn.Module):
    """Three classes; NaN for a white picture; reads one mean per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for p, generator in zip(self.parameters(), map(torch.Generator().manual_seed, range(9))):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(self.conv(x).relu().mean((2, 3)))
        return torch.where((x.amin((1, 2, 3)) >= 0.999)[:, None], torch.full_like(y, float("nan")), y)


def flat(names: list[str] | None = None) -> Classifier:
    preprocess = Preprocess(size=(16, 16), crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    return Classifier(Flat().eval(), names or ["wren", "robin", "crow"], preprocess, layer="conv", spec="flat")


def pictures(root: Path, names: list[str], size: tuple[int, int] = (24, 20)) -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 200, (size[1], size[0], 3), dtype=np.uint8), "RGB").save(root / name)
    return root


def test_one_pair_of_classes_for_all(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png", "b.png"])
    explain_folder(data, flat(), tmp_path / "o", target="crow", references=("wren",))
    for r in records(tmp_path / "o"):
        assert r["target"]["name"] == "crow" and [d["name"] for d in r["references"]] == ["wren"]
        assert r["similarity"] == "given" and r["label"] is None


def test_references_by_image_from_a_table(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png", "b.png", "c.png"])
    (data / "t.csv").write_text(
        "path,label,reference\na.png,crow,wren\nb.png,wren,robin;crow\nc.png,robin,\n", encoding="utf-8"
    )
    done = explain_folder(f"csv:{data}/t.csv", flat(), tmp_path / "o", target="label", references=1)
    assert done.failed == 0
    found = {r["image"]: [d["name"] for d in r["references"]] for r in records(tmp_path / "o")}
    assert found["a.png"] == ["wren"] and found["b.png"] == ["robin", "crow"] and len(found["c.png"]) == 1


def test_names_that_do_not_match_are_an_error_before_any_work(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["wren/a.png", "robbin/b.png"])
    with pytest.raises(UserError, match=r"1 classes of the data are not .*'robbin' \(closest: 'robin'\).*--class-map"):
        explain_folder(data, flat(), tmp_path / "o", target="label")
    assert not (tmp_path / "o").exists()
    (tmp_path / "m.csv").write_text("folder,class\nrobbin,robin\n", encoding="utf-8")
    explain_folder(data, flat(), tmp_path / "o", target="label", class_map=tmp_path / "m.csv")
    assert {r["image"]: r["target"]["name"] for r in records(tmp_path / "o")} == {
        "wren/a.png": "wren",
        "robbin/b.png": "robin",
    }


@pytest.mark.parametrize(
    "options, said",
    [
        ({"target": "wrenn"}, "unknown class in flat: 'wrenn'; did you mean wren"),
        ({"references": ("wern",)}, "did you mean wren"),
        ({"target": "wren", "references": ("wren",)}, "a reference equals the target in --reference: 'wren'"),
        ({"references": ("crow", "crow")}, "reference given twice"),
        ({"references": -1}, "must not be negative"),
        ({"target": "label"}, "the data has no labels"),
        ({"target": 7}, "no such class id"),
        ({"gammas": (-0.1,)}, "gamma must be finite and not negative"),
        ({"gammas": (float("nan"),)}, "gamma must be finite"),
        ({"gammas": (0.5, 0.5)}, "gamma given twice"),
        ({"layer": "conf"}, "did you mean conv"),
        ({"layer": "head"}, "head"),
        ({"method": "gradcamm"}, "did you mean gradcam"),
        ({"similarity": "cosine"}, "unknown similarity"),
        ({"metrics": ("accuracy",)}, "unknown metric"),
        ({"method": "eigencam", "references": ("wren",)}, "depends on no class.*references; drop references"),
        ({"method": "eigencam", "references": 2, "gammas": (0.3,)}, "depends on no class.*references, gammas"),
        ({"method": "randomcam", "similarity": "rank"}, "randomcam depends on no class.*similarity"),
    ],
)
def test_bad_questions_fail_before_any_image(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    data = pictures(tmp_path / "d", ["a.png"])
    with pytest.raises(UserError, match=said):
        explain_folder(data, flat(), tmp_path / "o", **options)
    assert not (tmp_path / "o" / "results.jsonl").exists()


def test_a_classless_method_needs_no_references(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png"])
    done = explain_folder(data, flat(), tmp_path / "o", method="eigencam")
    r = records(tmp_path / "o")[0]
    assert done.done == 1 and r["references"] == [] == r["gammas"]
    assert r["gamma"] is r["similarity"] is r["weighting"] is None
    assert len(r["pictures"]["layers"]) == 1 and not list((tmp_path / "o").rglob("*difference*"))
    with np.load(tmp_path / "o" / r["map"]) as arrays:
        assert "plain" in arrays.files and not {"finer", "sweep"} & set(arrays.files)
    config = json.loads((tmp_path / "o" / "config.json").read_text(encoding="utf-8"))
    assert not {"references", "gammas", "similarity", "weighting", "aggregate"} & set(config)
    page = (tmp_path / "o" / "gallery" / "data.js").read_text(encoding="utf-8")
    assert '"views": ["image", "map"]' in page and "finer" not in page


def test_plain_maps_record_no_similarity(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png"])
    explain_folder(data, flat(), tmp_path / "o", references=None)
    r = records(tmp_path / "o")[0]
    assert r["similarity"] is r["weighting"] is None and (r["gamma"], r["gammas"]) == (0, [0])
    with pytest.raises(UserError, match="depends on no class"):
        ExplainOptions(method="eigencam", references=("wren",))


def test_more_references_than_classes_are_cut(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png"])
    explain_folder(data, flat(), tmp_path / "o", references=9)
    r = records(tmp_path / "o")[0]
    assert len(r["references"]) == 2 and r["references"][0]["weight"] == pytest.approx(0.5)


def test_wrong_number_of_names_for_the_logits(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png"])
    with pytest.raises(UserError, match=r"2 names for 3 logits"):
        explain_folder(data, flat(["a", "b"]), tmp_path / "o")


def test_class_maps_are_checked(tmp_path: Path) -> None:
    (tmp_path / "three.csv").write_text("a,b,c\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"two columns in .*row 1"):
        read_class_map(tmp_path / "three.csv")
    (tmp_path / "twice.csv").write_text("data,model\na,x\na,y\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"class given twice"):
        read_class_map(tmp_path / "twice.csv")
    with pytest.raises(UserError, match=r"names no class of the data.*did you mean robin"):
        match_classes(["robin"], flat(), {"robbin": "wren"})
    with pytest.raises(UserError, match=r"did you mean crow"):
        match_classes(["x"], flat(), {"x": "crw"})


def test_labels_unknown_to_the_model_are_no_error_for_predicted_targets(tmp_path: Path) -> None:
    plan = plan_targets(flat(), ["cats", "dogs"])
    assert plan.label(0) is None and plan.target_of("x", 0) is None
    data = pictures(tmp_path / "d", ["cats/a.png", "dogs/b.png"])
    explain_folder(data, flat(), tmp_path / "o")
    rows = class_table(records(tmp_path / "o"))
    assert sum(row["labelled"] for row in rows) == 2  # shown, and never right


# --- one bad image at a time ------------------------------------------------------------------


def test_bad_images_are_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", [f"{i}.png" for i in range(6)])
    (data / "1.png").write_bytes(b"")
    (data / "2.png").write_bytes((data / "3.png").read_bytes()[:200])
    Image.new("RGB", (24, 20), "white").save(data / "4.png")  # its logits are NaN
    done = explain_folder(data, flat(), tmp_path / "o", batch_size=6)
    assert (done.done, done.failed) == (3, 3)
    reasons = {e["image"]: e["error"] for e in records(tmp_path / "o", "errors.jsonl")}
    assert "image file is empty" in reasons["1.png"] and "cannot read image" in reasons["2.png"]
    assert "NaN or Inf in logits in 4.png" in reasons["4.png"] and "float32" in reasons["4.png"]
    assert not (tmp_path / "o" / "maps" / "4.png.npz").exists()
    page = (tmp_path / "o" / "gallery" / "data.js").read_text(encoding="utf-8")
    assert page.count('"error"') == 3
    pictures(data, ["1.png", "2.png", "4.png"])
    again = explain_folder(data, flat(), tmp_path / "o")
    assert (again.done, again.new, again.failed) == (6, 3, 0)


def test_strict_stops_at_the_first(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png", "b.png", "c.png"])
    (data / "b.png").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"b\.png.*--strict"):
        explain_folder(data, flat(), tmp_path / "o", strict=True, batch_size=1)
    assert "a.png" in {r["image"] for r in records(tmp_path / "o")}
    assert len(records(tmp_path / "o", "errors.jsonl")) == 1


def test_empty_maps_are_flagged_and_zero(tmp_path: Path) -> None:
    model = flat()
    with torch.no_grad():
        model.model.head.weight.zero_()  # type: ignore[union-attr, operator]
    done = explain_folder(pictures(tmp_path / "d", ["a.png"]), model, tmp_path / "o", metrics=("relative_drop",))
    assert done.empty == 1 and done.failed == 0
    r = records(tmp_path / "o")[0]
    assert r["empty"] and "first norm layer" in r["warning"] and r["peak"] is None
    assert all(value is None for value in r["metrics"].values())
    with np.load(tmp_path / "o" / r["map"]) as arrays:
        assert (np.nan_to_num(arrays["finer"]) == 0).all()


def test_a_contrast_that_leaves_nothing_is_told_from_a_dead_layer(tmp_path: Path) -> None:
    """The reference's row is twice the target's: plain evidence, but none that the reference lacks."""
    model = flat()
    head: Any = model.model.head
    with torch.no_grad():
        head.weight.abs_()
        head.weight[1] = 2 * head.weight[0]
    data = pictures(tmp_path / "d", ["a.png"])
    done = explain_folder(data, model, tmp_path / "o", target="wren", references=("robin",), gammas=(1.0,))
    r = records(tmp_path / "o")[0]
    assert done.empty == 1 and r["empty"] and "smaller gamma" in r["warning"]
    with np.load(tmp_path / "o" / r["map"]) as arrays:
        assert np.nanmax(arrays["plain"]) > 0 and np.nanmax(arrays["finer"]) == 0


def test_empty_names_the_strengths_and_counts_any(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = flat()
    head: Any = model.model.head
    with torch.no_grad():
        head.weight.abs_()
        head.weight[1] = 2 * head.weight[0]
    data = pictures(tmp_path / "d", ["a.png"])
    pair: dict[str, Any] = {"target": "wren", "references": ("robin",)}
    done = explain_folder(data, model, tmp_path / "o", gammas=(0.1, 1.0), **pair)
    assert done.empty == 1 and records(tmp_path / "o")[0]["empty"] == [1.0]
    assert class_table(records(tmp_path / "o"))[0]["empty maps"] == 1 and "every map" not in caplog.text
    with torch.no_grad():
        head.weight.zero_()
    explain_folder(data, model, tmp_path / "p", gammas=(0.1, 1.0), **pair)
    assert records(tmp_path / "p")[0]["empty"] == [0.0, 0.1, 1.0]
    assert caplog.text.count("every map is empty at conv") == 1 and "all-zero gradient" not in caplog.text


def test_an_image_predicted_as_a_given_reference_is_no_failure(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png", "b.png"])
    explain_folder(data, flat(), tmp_path / "plain", references=None)
    first = records(tmp_path / "plain")[0]["prediction"]["name"]
    other = next(name for name in ("wren", "robin", "crow") if name != first)
    assert explain_folder(data, flat(), tmp_path / "one", references=(first,)).failed == 0
    r = records(tmp_path / "one")[0]
    assert r["references"] == [] and r["target"]["name"] == first and "nothing to subtract" in r["note"]
    with np.load(tmp_path / "one" / r["map"]) as arrays:
        np.testing.assert_array_equal(arrays["finer"], arrays["plain"])
    assert explain_folder(data, flat(), tmp_path / "two", references=(first, other)).failed == 0
    r = records(tmp_path / "two")[0]
    assert [d["name"] for d in r["references"]] == [other] and repr(first) in r["note"]


def test_images_of_one_batch_predicted_as_different_classes_keep_their_own_maps(
    bird_folder: Path, tmp_path: Path
) -> None:
    explain_folder(bird_folder, "tiny:cnn", tmp_path / "plain", references=None)
    guesses = {r["image"]: r["prediction"]["name"] for r in records(tmp_path / "plain")}
    first = next(iter(guesses.values()))
    assert len(set(guesses.values())) > 1
    assert explain_folder(bird_folder, "tiny:cnn", tmp_path / "o", references=(first,)).failed == 0
    for r in records(tmp_path / "o"):
        assert r["target"]["name"] == guesses[r["image"]]
        assert [d["name"] for d in r["references"]] == ([] if guesses[r["image"]] == first else [first])
        with np.load(tmp_path / "o" / r["map"]) as a, np.load(tmp_path / "plain" / r["map"]) as b:
            np.testing.assert_allclose(a["plain"].astype(np.float32), b["plain"].astype(np.float32), atol=2e-3)


def test_results_inside_the_data_are_not_explained(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png", "b.png"])
    for _ in range(2):
        assert explain_folder(data, flat(), data / "cams").done == 2
    explain_folder(data, flat(), data / "parts", shard=(1, 2))
    assert explain_folder(data, flat(), tmp_path / "o").done == 2
    birds = pictures(tmp_path / "birds", ["wren/a.png", "crow/b.png"])
    for out in (birds, birds / "wren"):
        with pytest.raises(UserError, match=r"results cannot go among the images in --out: .*folder of their own"):
            explain_folder(birds, flat(), out)
        assert not (out / "config.json").exists()


def test_random_weights_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, out = pictures(tmp_path / "d", ["a.png"], (64, 64)), tmp_path / "o"
    explain_folder(data, "timm:vit_tiny_patch16_224?img_size=32", out, loading={"random_weights": True})
    spec = json.loads((out / "config.json").read_text(encoding="utf-8"))["model"]
    assert spec == "random:timm:vit_tiny_patch16_224?img_size=32" and records(out)[0]["random_weights"] is True
    assert caplog.text.count("has random weights") == 1 and "random:timm" in (out / "index.html").read_text("utf-8")
    explain_folder(data, flat(), tmp_path / "p")
    assert "random_weights" not in records(tmp_path / "p")[0]


def test_a_finished_image_without_its_map_is_explained_again(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png", "b.png"])
    explain_folder(data, flat(), tmp_path / "o")
    lost = tmp_path / "o" / "maps" / "b.png.npz"
    lost.unlink()
    done = explain_folder(data, flat(), tmp_path / "o")
    assert (done.done, done.new) == (2, 1) and lost.is_file()
    assert sorted(r["image"] for r in records(tmp_path / "o")) == ["a.png", "b.png"]
    assert done.line().startswith("2 images explained (1 now")


def test_equal_stems_and_names_that_climb_out(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a/x.png", "b/x.png", "a/x.jpg", "b/ü #1%.png"])
    done = explain_folder(data, flat(), tmp_path / "o", references=None)
    assert done.done == 4
    assert len({r["map"] for r in records(tmp_path / "o")}) == 4
    assert relative_name("a/x.png") == "a/x.png"
    for hostile in ("../x.png", "/etc/x.png", "a/../../x.png", "C:\\x.png", ".."):
        inside = relative_name(hostile)
        assert not inside.startswith("/") and ".." not in inside.split("/") and inside.startswith("elsewhere/")
    assert relative_name("/a/x.png") != relative_name("/b/x.png")


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match=r"d"):
        explain_folder(tmp_path / "d", flat(), tmp_path / "o")


# --- geometry ---------------------------------------------------------------------------------


def test_aspect_is_kept_up_to_whole_patches() -> None:
    kept = aspect_preserving(Preprocess(), (1600, 900), 14, 1000)
    assert kept.size == (574, 1008) and kept.box((1600, 900)) == (0, 0, 1600, 900)
    assert aspect_preserving(Preprocess(), (100, 50), 14, 1000).size == (56, 112)
    assert patch_multiple(nn.Conv2d(3, 3, 1)) == 32


def test_keep_aspect_explains_the_whole_picture(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["wide.png"], (96, 48))
    pictures(data, ["tall.png"], (40, 90))
    done = explain_folder(
        data,
        "timm:vit_tiny_patch16_224?img_size=32",
        tmp_path / "o",
        keep_aspect=True,
        loading={"random_weights": True},
    )
    assert done.done == 2
    shapes = {r["image"]: np.load(tmp_path / "o" / r["map"])["finer"] for r in records(tmp_path / "o")}
    assert shapes["wide.png"].shape == (3, 6) and shapes["tall.png"].shape == (6, 3)
    assert all(np.isfinite(values).all() for values in shapes.values())


def test_keep_aspect_on_a_fixed_size_model_is_explained(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["wide.png"], (96, 48))
    model = load_classifier("random:timm:vit_tiny_patch16_224?img_size=32")
    with pytest.raises(UserError, match=r"one input size only.*--keep-aspect"):
        explain_folder(data, model, tmp_path / "o", keep_aspect=True)


@pytest.mark.parametrize("map_size, shape", [("grid", (8, 10)), (50, (42, 50)), ("original", (20, 24))])
def test_map_sizes(tmp_path: Path, map_size: str | int, shape: tuple[int, int]) -> None:
    data = pictures(tmp_path / "d", ["a.png"])
    explain_folder(data, flat(), tmp_path / "o", style=Style(map_size=map_size))
    with np.load(tmp_path / "o" / "maps" / "a.png.npz") as arrays:
        assert arrays["plain"].shape == shape


def test_a_hot_pixel_lands_on_its_place_in_the_original(tmp_path: Path) -> None:
    """A model that looks at red: the map's peak is the red spot of the original, whatever was cropped."""

    class Red(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 2, stride=2, bias=False)
            with torch.no_grad():
                self.conv.weight.zero_()
                self.conv.weight[0, 0] = 1
                self.conv.weight[1, 2] = 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mean((2, 3))

    image = Image.new("RGB", (200, 120), "black")
    image.paste("red", (70, 30, 80, 40))
    (tmp_path / "d").mkdir()
    image.save(tmp_path / "d" / "a.png")
    preprocess = Preprocess(size=(40, 40), crop_pct=0.8, mean=(0, 0, 0), std=(1, 1, 1))
    model = Classifier(Red().eval(), ["red", "blue"], preprocess, layer="conv", spec="red")
    explain_folder(tmp_path / "d", model, tmp_path / "o", target="red", references=("blue",), style=Style("original"))
    r = records(tmp_path / "o")[0]
    assert 68 <= r["peak"][0] <= 82 and 28 <= r["peak"][1] <= 42
    with np.load(tmp_path / "o" / r["map"]) as arrays:
        values = arrays["finer"].astype(np.float32)
    x0, y0, x1, y1 = render.top_region(values, (200, 120), q=0.01) or (0, 0, 0, 0)
    assert x0 >= 62 and x1 <= 88 and y0 >= 22 and y1 <= 48
    seen = np.isfinite(values)
    assert not seen[:, :50].any() and seen[60, 60:140].all()  # crop 0.8 of the short side: 52..148


def test_a_dataset_object_and_an_examples_source(tmp_path: Path) -> None:
    data = open_dataset(pictures(tmp_path / "d", ["a.png"]))
    shown = open_dataset(pictures(tmp_path / "e", ["wren/1.png", "robin/1.png", "crow/1.png"]))
    options = ExplainOptions(target="crow", references=("robin",))
    done = explain_dataset(data, flat(), tmp_path / "o", options, examples=shown)
    r = records(tmp_path / "o")[0]
    assert done.done == 1 and r["pictures"]["example"] == "gallery/examples/1.webp"
    with Image.open(tmp_path / "o" / r["overlay"]) as panel:
        assert panel.width > 4 * 160  # image, reference, plain, finer


def test_confusion_decides_the_references(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png"])
    (tmp_path / "c.csv").write_text("9,0,1\n0,9,1\n5,2,9\n", encoding="utf-8")
    explain_folder(
        data, flat(), tmp_path / "o", target="crow", references=1, similarity="confusion", confusion=tmp_path / "c.csv"
    )
    assert records(tmp_path / "o")[0]["references"][0]["name"] == "wren"
    (tmp_path / "c.csv").write_text("9,0,1\n0,9,1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"not square"):
        explain_folder(data, flat(), tmp_path / "p", similarity="confusion", confusion=tmp_path / "c.csv")


def test_another_confusion_matrix_is_another_run(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png", "b.png"])
    table, options = tmp_path / "c.csv", {"target": "crow", "references": 1, "similarity": "confusion"}
    table.write_text("9,0,1\n0,9,1\n5,2,9\n", encoding="utf-8")
    explain_folder(data, flat(), tmp_path / "o", confusion=table, limit=1, **options)
    (tmp_path / "same.csv").write_text("9.0,0,1\n0,9,1\n5,2,9\n", encoding="utf-8")
    assert explain_folder(data, flat(), tmp_path / "o", confusion=tmp_path / "same.csv", **options).new == 1
    table.write_text("9,0,1\n0,9,1\n2,5,9\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"changed configuration .*confusion_sha256"):
        explain_folder(data, flat(), tmp_path / "o", confusion=table, **options)
    assert {r["references"][0]["name"] for r in records(tmp_path / "o")} == {"wren"}


def test_a_run_folder_tells_machine_counts_and_seconds(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d", ["a.png", "b.png"])
    for limit in (1, None):
        explain_folder(data, flat(), tmp_path / "o", limit=limit)
    first, second = json.loads((tmp_path / "o" / "runs.json").read_text(encoding="utf-8"))["runs"]
    assert (first["done"], first["new"], second["done"], second["new"]) == (1, 1, 2, 1)
    assert (second["device"], second["dtype"], second["failed"]) == ("cpu", "float32", 0) and second["seconds"] > 0
    (tmp_path / "o" / "runs.json").write_text("{", encoding="utf-8")  # a damaged log costs no run
    explain_folder(data, flat(), tmp_path / "o")
    assert len(json.loads((tmp_path / "o" / "runs.json").read_text(encoding="utf-8"))["runs"]) == 1
    explain_folder(data, flat(), tmp_path / "o", overwrite=True)
    assert len(json.loads((tmp_path / "o" / "runs.json").read_text(encoding="utf-8"))["runs"]) == 1


def test_names_are_matched_exactly_and_in_one_place() -> None:
    assert ids_by_name(["crow", "Wren", "wren"], ["wren", "crow"]) == (1, None, 0)
    assert ids_by_name(["a"], None) == (None,)
    assert match_classes(["wren", "x", "7"], flat(), {"x": "2"}) == (0, 2, None)
    twice = flat(["wren", "wren", "crow"])
    with pytest.raises(UserError, match="class name is not unique"):
        match_classes(["wren"], twice)
