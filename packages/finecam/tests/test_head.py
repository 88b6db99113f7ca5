"""Heads on frozen backbones: the two recipes, what is stored, and that the stored head is the fitted one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from finecam.classifiers import load_classifier
from finecam.explainer import Explainer
from finecam.head import RandomResizedCrop, fit_head
from finecam.head_model import load_head
from PIL import Image
from safetensors.torch import load_file, save_file
from tinyworld.birds import Birds
from vfm_core.backbones import load_backbone
from vfm_core.errors import UserError

BACKBONE = "tiny:vit"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("head") / "exact"
    done = fit_head(
        Birds(n=192, split="train"), BACKBONE, out, val=Birds(n=64, split="val"), recipe="exact", cache_dir=cache
    )
    assert done.classes == 16 and done.images == 192 and done.skipped == 0
    assert done.accuracy is not None and done.accuracy[0] > 0.3  # chance is 1/16
    assert done.accuracy[1] <= done.accuracy[0] <= done.accuracy[2]
    assert "validation accuracy" in done.line()
    return out


def test_the_stored_head_is_a_model(fitted: Path) -> None:
    config = json.loads((fitted / "config.json").read_text(encoding="utf-8"))
    assert config["backbone"] == BACKBONE and config["pool"] == "mean" and len(config["classes"]) == 16
    assert config["metrics"]["val_images"] == 64
    found = load_classifier(fitted)
    birds = Birds(n=64, split="val")
    x = torch.stack([found.preprocess(birds[i].image) for i in range(64)])
    with torch.inference_mode():
        right = (found.model(x).argmax(1).numpy() == birds.labels).mean()
    assert right == pytest.approx(config["metrics"]["val_accuracy"][0])
    assert found.class_names == birds.classes
    result = Explainer(found.model, found.layer, class_names=found.class_names)(x[:2], size=None)
    assert found.layer is not None and found.layer.endswith("norm1")
    assert result.maps.shape == (2, 8, 8) and not result.empty.any()


def test_exact_solves_the_regression(cache: Path, tmp_path: Path) -> None:
    """At the optimum of C * cross-entropy + |w|^2 / 2 on standardised features, the gradient is zero."""
    birds = Birds(n=48, split="train")
    fit_head(
        birds, BACKBONE, tmp_path / "h", val=Birds(n=16, split="val"), recipe="exact", strength=0.1, cache_dir=cache
    )
    found = load_classifier(tmp_path / "h")
    x = torch.stack([found.preprocess(birds[i].image) for i in range(48)])
    backbone = load_backbone(BACKBONE)
    with torch.inference_mode():
        features = backbone.pool(backbone.run(backbone.embed(x)), how="mean").double().clone()
    mean, scale = features.mean(0), features.std(0, correction=0)
    z = (features - mean) / scale
    head = load_file(tmp_path / "h" / "head.safetensors")
    weight = (head["weight"].double() * scale).requires_grad_()
    bias = (head["bias"].double() + head["weight"].double() @ mean).requires_grad_()
    data = torch.nn.functional.cross_entropy(z @ weight.T + bias, torch.as_tensor(birds.labels), reduction="sum")
    loss = 0.1 * data + weight.square().sum() / 2
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(float(g.abs().max()) for g in gradients) < 0.02


def test_official_recipe_keeps_the_best_epoch_and_repeats_exactly(cache: Path, tmp_path: Path) -> None:
    train, val = Birds(n=48, split="train"), Birds(n=64, split="val")
    epochs: list[dict[str, float]] = []
    for name in ("a", "b"):
        done = fit_head(
            train, BACKBONE, tmp_path / name, val=val, epochs=5, lr=3e-2, batch_size=16, cache_dir=cache, seed=1,
            on_epoch=epochs.append,
        )  # fmt: skip
        assert done.accuracy is not None and done.accuracy[0] == max(e["accuracy"] for e in epochs)
    first, second = (load_file(tmp_path / name / "head.safetensors") for name in ("a", "b"))
    assert torch.equal(first["weight"], second["weight"])
    config = json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))
    assert config["recipe"]["lr"] == 3e-2 and len(config["history"]["records"]) == 5


def test_augmented_training_sees_new_views_and_leaves_the_backbone_alone(cache: Path, tmp_path: Path) -> None:
    done = fit_head(
        Birds(n=32, split="train"), BACKBONE, tmp_path / "h", val=Birds(n=16, split="val"), augment=True, epochs=2,
        batch_size=16, cache_dir=cache,
    )  # fmt: skip
    plain = fit_head(
        Birds(n=32, split="train"), BACKBONE, tmp_path / "p", val=Birds(n=16, split="val"), epochs=2, batch_size=16,
        cache_dir=cache,
    )  # fmt: skip
    a, p = (load_file(f.out / "head.safetensors")["weight"] for f in (done, plain))
    assert not torch.equal(a, p)
    load_classifier(tmp_path / "h")  # checks the backbone's fingerprint


def test_views_are_random_but_reproducible() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 80, 3), dtype=np.uint8), "RGB")
    crop = RandomResizedCrop((32, 48))
    views = [np.asarray(crop(image, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    assert views[0].shape == (32, 48, 3)
    assert (views[0] == views[1]).all() and (views[0] != views[2]).any()
    assert crop(Image.new("RGB", (1, 400)), torch.Generator().manual_seed(0)).size == (48, 32)


def _folder(root: Path, counts: dict[str, int]) -> Path:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise, "RGB").save(root / name / f"{i:02d}.png")
    return root


def test_every_tenth_image_is_held_out(tmp_path: Path, cache: Path) -> None:
    data = _folder(tmp_path / "data", {"a": 20, "b": 11, "c": 3})
    done = fit_head(data, BACKBONE, tmp_path / "h", recipe="exact", cache_dir=cache)
    config = json.loads((done.out / "config.json").read_text(encoding="utf-8"))
    assert config["metrics"]["val_images"] == 3 and done.images == 31
    assert config["data"]["val"] == "every tenth of each class"


def test_splits_beside_each_other_are_used(tmp_path: Path, cache: Path) -> None:
    _folder(tmp_path / "data" / "train", {"a": 4, "b": 4})
    _folder(tmp_path / "data" / "val", {"b": 2, "a": 1})
    done = fit_head(tmp_path / "data", BACKBONE, tmp_path / "h", recipe="exact", cache_dir=cache)
    config = json.loads((done.out / "config.json").read_text(encoding="utf-8"))
    assert done.images == 8 and config["metrics"]["val_images"] == 3 and config["data"]["val"] == "val"


def test_two_classes_have_two_rows(tmp_path: Path, cache: Path) -> None:
    data = _folder(tmp_path / "data", {"a": 8, "b": 8})
    fit_head(data, BACKBONE, tmp_path / "h", recipe="exact", cache_dir=cache)
    head = load_file(tmp_path / "h" / "head.safetensors")
    assert head["weight"].shape == (2, 64) and torch.allclose(head["weight"][0], -head["weight"][1])


def test_unreadable_images_are_left_out_and_counted(tmp_path: Path, cache: Path) -> None:
    data = _folder(tmp_path / "data", {"a": 6, "b": 6})
    (data / "a" / "00.png").write_bytes(b"not a picture")
    done = fit_head(data, BACKBONE, tmp_path / "h", recipe="exact", cache_dir=cache)
    assert done.skipped == 1 and done.images == 11 and "1 unreadable" in done.line()


def test_bad_input(tmp_path: Path, cache: Path) -> None:
    one = _folder(tmp_path / "one", {"a": 3})
    two = _folder(tmp_path / "two", {"a": 3, "b": 3})
    more = _folder(tmp_path / "more", {"a": 1, "z": 1})
    with pytest.raises(UserError, match=r"needs two classes"):
        fit_head(one, BACKBONE, tmp_path / "h", cache_dir=cache)
    with pytest.raises(UserError, match=r"class without a training image in .*: "):
        fit_head(Birds(n=8, split="train"), BACKBONE, tmp_path / "h", cache_dir=cache)
    with pytest.raises(UserError, match=r"validation classes that training lacks.*'z'"):
        fit_head(two, BACKBONE, tmp_path / "h", val=more, cache_dir=cache)
    with pytest.raises(UserError, match=r"unknown recipe"):
        fit_head(two, BACKBONE, tmp_path / "h", recipe="best", cache_dir=cache)
    with pytest.raises(UserError, match=r"unknown pool"):
        fit_head(two, BACKBONE, tmp_path / "h", pool="max", cache_dir=cache)
    with pytest.raises(UserError, match=r"augmentation needs the official recipe"):
        fit_head(two, BACKBONE, tmp_path / "h", recipe="exact", augment=True, cache_dir=cache)
    assert not (tmp_path / "h").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the folder in .*use another --out"):
        fit_head(two, BACKBONE, tmp_path / "file" / "h", cache_dir=cache)
    fit_head(two, BACKBONE, tmp_path / "h", recipe="exact", cache_dir=cache)
    with pytest.raises(UserError, match=r"a head of other settings is there already.*recipe.*--overwrite"):
        fit_head(two, BACKBONE, tmp_path / "h", cache_dir=cache)


def test_another_backbone_under_a_head_is_noticed(fitted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((fitted / "config.json").read_text(encoding="utf-8"))
    config["backbone_fingerprint"] = "0" * 64
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(load_file(fitted / "head.safetensors"), other / "head.safetensors")
    with pytest.raises(UserError, match=r"not the one this head was trained on"):
        load_classifier(other)
    with pytest.raises(UserError, match=r"no such file in .*head\.safetensors"):
        (other / "head.safetensors").unlink()
        load_classifier(other)


def test_weights_that_are_not_finite_are_named(fitted: Path, tmp_path: Path) -> None:
    state = load_file(fitted / "head.safetensors")
    state["bias"][3] = float("nan")
    save_file(state, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match=r"weights are not finite in .*head\.safetensors: bias"):
        load_head(tmp_path / "head.safetensors", backbone=BACKBONE)
    (tmp_path / "config.json").write_bytes((fitted / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"weights are not finite in .*head\.safetensors: bias"):
        load_classifier(tmp_path)
