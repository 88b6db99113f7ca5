"""Equal to grad-cam's FinerCAM (the official code's objective) on random networks; other weightings are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from finecam.explainer import Explainer

peer = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed (extra: finecam[bench])")
pytestmark = pytest.mark.parity

ALPHAS = (0.0, 0.6, 1.0)
METHODS = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "hirescam": "HiResCAM",
    "gradcam_elementwise": "GradCAMElementWise",
    "layercam": "LayerCAM",
}
LAYERS = {"resnet18": "layer4.1", "vit": "blocks.11.norm1"}


def tokens_to_grid(t):
    return t[:, 1:].reshape(len(t), 4, 6, -1).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def networks():
    """Random ResNet-18 and ViT-tiny, and two images that are not square."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(3)
        resnet = timm.create_model("resnet18", num_classes=20).eval()
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=20, img_size=(64, 96)).eval()
        for head in (resnet.fc, vit.head):
            head.weight.data *= 30  # logits of ordinary spread, so that the weightings differ
        return {"resnet18": (resnet, torch.randn(2, 3, 96, 160)), "vit": (vit, torch.randn(2, 3, 64, 96))}


def theirs(model, x, layer, method, alpha, target=None, reshape=None):
    """FinerCAM image by image, as its objective is written for one."""
    maps = []
    with peer.FinerCAM(model, [model.get_submodule(layer)], reshape, getattr(peer, method)) as cam:
        for i in range(len(x)):
            index = None if target is None else int(target[i])
            maps.append(cam(x[i : i + 1], None, alpha=alpha, target_idx=index)[0])
    return torch.from_numpy(np.stack(maps))


@pytest.mark.parametrize("network", list(LAYERS))
@pytest.mark.parametrize("method", list(METHODS))
def test_finer_maps_agree(networks, network, method):
    model, x = networks[network]
    reshape = tokens_to_grid if network == "vit" else None
    ours = Explainer(model, LAYERS[network], method).sweep(x, ALPHAS, weighting="softmax")
    for i, alpha in enumerate(ALPHAS):
        expected = theirs(model, x, LAYERS[network], METHODS[method], alpha, reshape=reshape)
        assert (ours.maps[:, i] - expected).abs().max() < 1e-4
        single = Explainer(model, LAYERS[network], method)(x, gamma=alpha, weighting="softmax")
        assert (single.maps - expected).abs().max() < 1e-4


@pytest.mark.parametrize("network", list(LAYERS))
def test_a_given_target_agrees(networks, network):
    """Also where it is not the predicted class, so that classes scored above it become references."""
    model, x = networks[network]
    reshape = tokens_to_grid if network == "vit" else None
    target = model(x).argsort(1)[:, -3]  # not far down: there the peer's 1e-9 in the denominator begins to count
    ours = Explainer(model, LAYERS[network])(x, target=target, gamma=1.0, weighting="softmax")
    expected = theirs(model, x, LAYERS[network], "GradCAM", 1.0, target, reshape)
    assert (ours.maps - expected).abs().max() < 1e-4


@pytest.mark.parametrize("network", list(LAYERS))
@pytest.mark.parametrize("weighting", ["softmax_detached", "mean"])
def test_other_weightings_are_told_apart(networks, network, weighting):
    """The negative control: the comparison above would notice a wrong weighting."""
    model, x = networks[network]
    reshape = tokens_to_grid if network == "vit" else None
    ours = Explainer(model, LAYERS[network])(x, gamma=1.0, weighting=weighting)
    expected = theirs(model, x, LAYERS[network], "GradCAM", 1.0, reshape=reshape)
    assert (ours.maps - expected).abs().max() > 1e-2


@pytest.mark.parametrize("alpha", ALPHAS)
def test_scorecam_agrees(make, networks, images, alpha, capsys):
    for model, x, layer, reshape in (
        (make["resnet"](), images(2), "layer4.0", None),
        (networks["vit"][0], networks["vit"][1][:1], LAYERS["vit"], tokens_to_grid),
    ):
        ours = Explainer(model, layer, "scorecam")(x, gamma=alpha, weighting="softmax")
        assert (ours.maps - theirs(model, x, layer, "ScoreCAM", alpha, reshape=reshape)).abs().max() < 1e-3


def test_ablationcam_agrees_where_the_objective_is_positive(make, images):
    model, x = make["resnet"](), images(3)
    target = model(x).argmax(1)
    assert (model(x).amax(1) > 0).all()
    ours = Explainer(model, "layer4.0", "ablationcam")(x, references=None)
    with peer.AblationCAM(model, [model.layer4[0]]) as cam:
        expected = cam(x, [peer.utils.model_targets.ClassifierOutputTarget(int(c)) for c in target])
    assert np.abs(ours.maps.numpy() - expected).max() < 1e-4


def test_shapleycam_agrees(make, images):
    """On a nonlinear tail, where the second derivative counts; the peer takes no tokens."""
    model, x = make["mlp"](), images(2)
    ours = Explainer(model, "features.3", "shapleycam")(x, gamma=0.6, weighting="softmax")
    assert (ours.maps - theirs(model, x, "features.3", "ShapleyCAM", 0.6)).abs().max() < 1e-4
    plain = Explainer(model, "features.3", "gradcam")(x, gamma=0.6, weighting="softmax")
    assert (ours.maps - plain.maps).abs().max() > 1e-4


def test_several_layers_agree(networks):
    model, x = networks["resnet18"]
    layers = ["layer3.1", "layer4.1"]
    ours = Explainer(model, layers)(x, references=None)
    with peer.GradCAM(model, [model.get_submodule(name) for name in layers]) as cam:
        expected = cam(x, None)
    assert np.abs(ours.maps.numpy() - expected).max() < 1e-4
