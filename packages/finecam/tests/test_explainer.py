"""The interface: sweeps, batches, per-image questions, closed form, faults, sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from finecam.capture import Capture
from finecam.explainer import Explainer
from finecam.families import FAMILIES
from PIL import Image
from torch import nn
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

GRADIENT = [n for n, f in FAMILIES.items() if f.kind == "gradient" and n != "cam"]
NAMES = ["wren", "robin", "finch", "swift", "heron", "crane", "eagle"]


@pytest.mark.parametrize("method", [*GRADIENT, "shapleycam", "scorecam", "ablationcam"])
@pytest.mark.parametrize("model", ["cnn", "mlp", "vit"])
def test_zero_strength_and_no_references_are_the_plain_method_bit_for_bit(make, images, method, model):
    x = images(2, 64, 64)
    explain = Explainer(make[model](), method=method)
    plain = explain(x, references=None)
    for other in (
        explain(x, gamma=0),
        explain(x, references=0),
        explain(x, gamma=0.0, references=[[1], [2]], target=0),
    ):
        if other.target.tolist() == plain.target.tolist():
            assert torch.equal(other.maps, plain.maps)
    assert plain.references.shape == (2, 0) and plain.similarity == "none"
    if method in GRADIENT:
        swept = explain.sweep(x, (0.6, 0.0))
        assert torch.equal(swept.maps[:, 1], plain.maps)
        for rule in ("before_relu_max", "after_relu_mean"):
            assert torch.equal(explain(x, gamma=0, aggregate=rule).maps, plain.maps)


@pytest.mark.parametrize("method", GRADIENT)
@pytest.mark.parametrize("weighting", ["mean", "softmax"])
def test_a_sweep_equals_single_calls_with_one_forward(make, images, method, weighting):
    model, x = make["vit"](), images(3, 64, 64)
    explain = Explainer(model, method=method)
    gammas = (0.0, 0.3, 0.6, 1.0, 1.5, 2.0)
    forwards = []
    handle = model.register_forward_hook(lambda *a: forwards.append(1))
    swept = explain.sweep(x, gammas, weighting=weighting)
    handle.remove()
    assert len(forwards) == 1
    assert swept.maps.shape == (3, 6, 64, 64) and swept.gamma == gammas and swept.empty.shape == (3, 6)
    for i, gamma in enumerate(gammas):
        single = explain(x, gamma=gamma, weighting=weighting)
        assert torch.allclose(swept.maps[:, i], single.maps, atol=1e-5)
        assert single.gamma == gamma and single.empty.shape == (3,)


def test_a_sweep_costs_two_backwards_however_many_strengths(make, images, monkeypatch):
    counted = []
    original = Capture.vjp

    def count(self, logits, vectors, keep=False):
        counted.append(len(vectors))
        return original(self, logits, vectors, keep)

    monkeypatch.setattr(Capture, "vjp", count)
    explain, x = Explainer(make["vit"]()), images(2, 64, 64)
    for call, expected in (
        (lambda: explain(x), 1),
        (lambda: explain.sweep(x, [0.6]), 1),
        (lambda: explain.sweep(x, list(np.linspace(0, 2, 21))), 2),
        (lambda: explain(x, aggregate="before_relu_max"), 4),
    ):
        counted.clear()
        call()
        assert counted == [expected]


BATCHED = [*GRADIENT, "scorecam", "ablationcam", "eigencam", "shapleycam"]


@pytest.mark.parametrize(("model", "method"), [("cnn", "cam"), *itertools.product(("cnn", "vit"), BATCHED)])
def test_a_batch_of_eight_equals_eight_singles(make, images, method, model):
    x = images(8, 64, 64)
    explain = Explainer(make[model](), method=method, batch_size=8)
    given = {} if method == "eigencam" else {"references": torch.tensor([[1 + i % 3, 5] for i in range(8)])}
    target = torch.tensor([0, 4, 0, 6, 4, 0, 0, 6])
    whole = explain(x, target=target, **given)
    in_threes = Explainer(explain.model, method=method, batch_size=3)(x, target=target, **given)
    assert torch.allclose(whole.maps, in_threes.maps, atol=1e-5)
    for i in range(8):
        one = explain(x[i : i + 1], target=target[i : i + 1], **{k: v[i : i + 1] for k, v in given.items()})
        assert torch.allclose(one.maps[0], whole.maps[i], atol=1e-5)
        assert torch.equal(one.references[0], whole.references[i])


def test_similar_classes_are_chosen_per_image(make, images):
    x = images(4, 64, 64)
    result = Explainer(make["cnn"](), batch_size=3)(x, target=[0, 1, 2, 3])
    for y, c, refs in zip(result.logits, result.target, result.references):
        order = sorted((abs(float(y[d] - y[c])), d) for d in range(7) if d != int(c))
        assert refs.tolist() == [d for _, d in order[:3]]
    assert result.similarity == "logit" and torch.allclose(result.weights, torch.full((4, 3), 1 / 3))


def test_names_lists_and_ids_agree(make, images):
    explain, x = Explainer(make["cnn"](), class_names=NAMES), images(2)
    by_name = explain(x, target="finch", references=["wren", "eagle"])
    by_id = explain(x, target=2, references=torch.tensor([0, 6]))
    assert torch.equal(by_name.maps, by_id.maps) and by_name.similarity == "explicit"
    per_image = explain(x, target=["finch", 3], references=[["wren"], ["eagle"]])
    assert per_image.target.tolist() == [2, 3] and per_image.references.tolist() == [[0], [6]]
    assert by_name.name(2) == "finch" and by_name.to_dict()[0]["references"][1]["name"] == "eagle"


def test_weight_and_confusion_similarity(make, images):
    model, x = make["cnn"](), images(2)
    result = Explainer(model)(x, target=3, references=2, similarity="weight")
    rows = nn.functional.normalize(model.fc.weight, dim=1)
    expected = (rows @ rows[3]).index_fill(0, torch.tensor(3), -9).topk(2).indices
    assert result.references.tolist() == [expected.tolist()] * 2
    directions = torch.eye(7)
    directions[3, 5] = directions[3, 1] = 0.5
    assert Explainer(model, class_weights=directions)(x, 3, 2, "weight").references[0].tolist() == [1, 5]
    confusion = np.zeros((7, 7))
    confusion[3, 6], confusion[3, 2] = 9, 4
    assert Explainer(model, confusion=confusion)(x, 3, 2, "confusion").references[0].tolist() == [6, 2]


def test_more_references_than_classes(make, images):
    result = Explainer(make["cnn"](classes=3))(images(1), references=9)
    assert result.references.shape == (1, 2) and result.weights.sum() == pytest.approx(1)


def test_one_class(make, images):
    explain = Explainer(make["cnn"](classes=1))
    with pytest.raises(UserError, match="a contrast needs two classes"):
        explain(images(1))
    assert explain(images(1), references=None).maps.shape == (1, 64, 96)


# --- closed form -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", GRADIENT)
@pytest.mark.parametrize("rule", ["before_relu_mean", "before_relu_max", "after_relu_mean"])
def test_closed_form_equals_autograd(make, images, monkeypatch, method, rule):
    model, x = make["cnn"](), images(3)
    closed = Explainer(model, method=method)
    first = closed.sweep(x, (0, 0.6), aggregate=rule)
    monkeypatch.setattr(Capture, "vjp", lambda *a, **k: pytest.fail("autograd was used"))
    again = closed.sweep(x, (0, 0.6), aggregate=rule)
    assert torch.equal(first.maps, again.maps)
    monkeypatch.undo()
    slow = Explainer(model, method=method)
    slow._tails._heads["features.3"] = None
    assert torch.allclose(slow.sweep(x, (0, 0.6), aggregate=rule).maps, again.maps, atol=1e-5)


def test_closed_form_is_not_taken_for_a_tail_that_only_looks_linear(images):
    """A ReLU on an output that is already positive keeps the values but not the gradient."""

    class Twice(nn.Module):
        def __init__(self, twice):
            super().__init__()
            self.conv, self.fc, self.twice = nn.Conv2d(3, 6, 3, 4, 1), nn.Linear(6, 4), twice
            self.act = nn.ReLU()

        def forward(self, x):
            a = self.act(self.conv(x))
            return self.fc((a.relu() if self.twice else a).mean((2, 3)))

    x = images(2)
    for twice in (False, True):
        explain = Explainer(Twice(twice), "act")
        explain(x)
        assert (explain._tails._heads["act"] is None) == twice
    with pytest.raises(UserError, match="cam needs a layer that is averaged"):
        Explainer(Twice(True), "act", "cam")(x)


def test_closed_form_is_checked_on_every_batch(make, images):
    model, x = make["cnn"](), images(2)
    explain = Explainer(model)
    explain(x)
    model.forward = lambda x: nn.Module.__getattr__(model, "fc")(torch.tanh(model.features(x).mean((2, 3))) * 3)
    assert torch.allclose(explain(x).maps, Explainer(model)(x).maps, atol=1e-6)


def test_original_cam(make, images):
    model, x = make["cnn"](), images(2)
    result = Explainer(model, method="cam")(x, target=1, references=[2], gamma=0.6, normalize=None, size=None)
    w = model.fc.weight[1] - 0.6 * model.fc.weight[2]
    expected = torch.einsum("k,bkhw->bhw", w, model.features(x)).relu()
    assert torch.allclose(result.maps, expected, atol=1e-5)
    assert torch.allclose(
        Explainer(model, method="cam")(x).maps, Explainer(model, method="hirescam")(x).maps, atol=1e-5
    )
    for other in ("mlp", "vit"):
        with pytest.raises(UserError, match="cam needs a layer that is averaged and fed to one linear layer"):
            Explainer(make[other](), method="cam")(images(1, 64, 64))


def test_what_two_classes_share_cancels(make, images):
    """The paper's point: a channel that both classes use alike is gone at gamma = 1."""
    model, x = make["cnn"](), images(1)
    with torch.no_grad():
        model.fc.weight[1] = model.fc.weight[0]
        model.fc.weight[0, 3] += 1.0
    result = Explainer(model)(x, target=0, references=[1], gamma=1.0, normalize=None, size=None)
    a = model.features(x)
    assert torch.allclose(result.maps, a[:, 3] / a[0, 0].numel(), atol=1e-6)


# --- layers, sizes, scaling --------------------------------------------------------------------


def test_several_layers(make, images):
    model, x = make["resnet"](), images(2)
    both = Explainer(model, ["layer3.0", model.layer4[0]])(x, size=(64, 96))
    assert both.layer == "layer3.0, layer4.0" and both.maps.shape == (2, 64, 96)
    parts = [Explainer(model, name)(x, size=None).maps for name in ("layer3.0", "layer4.0")]
    from finecam.families import minmax, resize

    expected = minmax(sum(resize(p, (64, 96)) for p in parts) / 2)
    assert torch.allclose(both.maps, expected, atol=1e-5), "an earlier layer must not cut the later one's gradient"
    assert Explainer(model, ["layer3.0", "layer4.0"])(x, size=None).maps.shape == (2, 4, 6)
    with pytest.raises(UserError, match="empty list of layers"):
        Explainer(model, [])(x)


def test_sizes_and_scaling(make, images):
    explain, x = Explainer(make["cnn"]()), images(2)
    grid = explain(x, size=None, normalize=None)
    assert grid.maps.shape == (2, 16, 24) and (grid.maps >= 0).all()
    scaled = explain(x, size=None)
    low, high = grid.maps.amin((1, 2), keepdim=True), grid.maps.amax((1, 2), keepdim=True)
    assert torch.allclose(scaled.maps, (grid.maps - low) / (high - low), atol=1e-4)
    assert explain(x, size=(10, 20)).maps.shape == (2, 10, 20)
    big = explain(x)
    assert big.maps.shape == (2, 64, 96) and big.maps.dtype == torch.float32
    assert torch.allclose(big.maps.amax((1, 2)), torch.ones(2), atol=1e-4) and (big.maps.amin((1, 2)) == 0).all()
    for bad in ("inputs", (10,), (0, 5), 7, (1.5, 2)):
        with pytest.raises(UserError, match="size must be 'input', 'original', None or"):
            explain(x, size=bad)
    with pytest.raises(UserError, match="unknown normalization"):
        explain(x, normalize="max")


def test_pictures_and_paths(make, tmp_path):
    preprocess = Preprocess(size=(64, 64), resize="shortest", crop_pct=1.0)
    explain = Explainer(make["cnn"](), preprocess=preprocess)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (50, 90, 3), dtype=np.uint8)) for _ in range(2)]
    pictures[0].save(tmp_path / "a.png")
    result = explain(pictures)
    assert torch.equal(result.maps, explain(torch.stack([preprocess(p) for p in pictures])).maps)
    assert torch.allclose(explain(tmp_path / "a.png").maps[0], result.maps[0], atol=1e-5)
    placed = explain(pictures, size="original")
    assert placed.maps.shape == (2, 50, 90)
    assert placed.maps[:, :, :20].isnan().all() and placed.maps[:, :, 22:68].isfinite().all()
    with pytest.raises(UserError, match=r"pictures of one size: 30x30, 90x50"):
        explain([pictures[0], Image.new("RGB", (30, 30))], size="original")
    with pytest.raises(UserError, match="pictures need preprocessing"):
        Explainer(make["cnn"]())(pictures)
    with pytest.raises(UserError, match="must be a tensor"):
        explain([3])
    with pytest.raises(UserError, match="needs pictures and a"):
        explain(torch.zeros(1, 3, 64, 64), size="original")


def test_a_spec_or_a_classifier_brings_names_and_preprocessing():
    from finecam.classifiers import load_classifier

    classifier = load_classifier("tiny:cnn")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8))
    expected = Explainer(classifier.model)(classifier.preprocess(picture)[None])
    for model in ("tiny:cnn", classifier):
        explain = Explainer(model)
        result = explain(picture)
        assert torch.equal(result.maps, expected.maps) and result.class_names == classifier.class_names
        assert explain(picture, target=classifier.class_names[3], size="original").maps.shape == (1, 80, 120)


def test_channels_last_is_equal(make, images):
    model, x = make["resnet"](), images(2)
    fast = Explainer(model, channels_last=True)(x)
    assert torch.allclose(fast.maps, Explainer(model)(x).maps, atol=1e-4)


def test_half_precision_model(make, images):
    model, x = make["cnn"]().bfloat16(), images(2)
    result = Explainer(model)(x)
    assert result.maps.dtype == result.logits.dtype == torch.float32 and result.maps.any()


# --- results -----------------------------------------------------------------------------------


def test_map_subtraction_only_as_an_ablation(make, images):
    explain, x = Explainer(make["mlp"]()), images(1)
    options = {"target": 0, "references": [1], "normalize": None, "size": None}
    found = explain(x, aggregate="map_subtraction", ablation=True, **options).maps
    plain = [explain(x, target=c, references=None, normalize=None, size=None).maps for c in (0, 1)]
    assert torch.allclose(found, (plain[0] - 0.6 * plain[1]).relu(), atol=1e-6)


def test_result_in_pictures_and_records(make, images):
    result = Explainer(make["cnn"](), class_names=NAMES)(images(2))
    assert len(result) == 2
    record = result.to_dict()[0]
    assert record["method"] == "gradcam" and len(record["references"]) == 3 and record["empty"] is False
    assert record["prediction"]["name"] == NAMES[int(result.logits[0].argmax())]
    assert result.overlay(0).size[0] / result.overlay(0).size[1] == pytest.approx(96 / 64, abs=0.02)
    x0, y0, x1, y1 = result.top_region(1)
    assert 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= 64
    assert "<img" in result._repr_html_()
    assert Explainer(make["cnn"]())(images(1)).name(3) == "class 3"


def test_context_manager_and_independence_of_calls(make, images):
    model, x = make["vit"](), images(2, 64, 64)
    with Explainer(model) as explain:
        first = explain(x).maps
    explain(images(1, 64, 64, seed=5), gamma=2.0, references=1)
    assert torch.equal(explain(x).maps, first)
    assert not any(m._forward_hooks for m in model.modules())


def test_every_family_runs_with_every_weighting(make, images):
    model, x = make["cnn"](), images(2)
    for method, weighting in itertools.product(FAMILIES, ("mean", "softmax", "softmax_detached")):
        if FAMILIES[method].kind == "attention":
            continue
        result = Explainer(model, method=method)(x, weighting=weighting)
        assert result.maps.shape == (2, 64, 96) and result.maps.isfinite().all() and result.method == method


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [*GRADIENT, "scorecam", "ablationcam", "shapleycam", "rollout"])
def test_gpu_equals_cpu(make, images, method):
    model, x = make["vit"](), images(3, 64, 64)
    expected = Explainer(model, method=method).sweep(x, (0, 0.6))
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = Explainer(model.cuda(), method=method).sweep(x, (0, 0.6))
    assert found.maps.device == x.device, "maps come back to where the images are"
    assert torch.equal(found.references, expected.references)
    assert torch.allclose(found.maps, expected.maps, atol=1e-3)
