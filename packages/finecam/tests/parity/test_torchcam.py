"""Equal to torchcam's FinerCAM (mean of the references) on random networks."""

from __future__ import annotations

import pytest
import torch
from finecam.explainer import Explainer
from torch import Tensor

methods = pytest.importorskip("torchcam.methods", reason="torchcam is not installed (extra: finecam[bench])")
pytestmark = pytest.mark.parity

LAYERS = {"resnet18": "layer4.1", "vit": "blocks.11.norm1"}


def tokens_to_grid(t: Tensor) -> Tensor:
    return t[:, 1:].reshape(len(t), 4, 6, -1).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def networks():
    """Random ResNet-18 and ViT-tiny, and three images that are not square."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(4)
        resnet = timm.create_model("resnet18", num_classes=20).eval()
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=20, img_size=(64, 96)).eval()
        for head in (resnet.fc, vit.head):
            head.weight.data *= 10  # logits of ordinary spread, so that the weightings differ
        return {"resnet18": (resnet, torch.randn(3, 3, 96, 160)), "vit": (vit, torch.randn(3, 3, 64, 96))}


def theirs(model, x, layer, method, gamma, target, reshape, references=None):
    maps = []
    for i in range(len(x)):
        options = {} if reshape is None else {"reshape_transform": reshape}
        base = getattr(methods, method)
        with methods.FinerCAM(model, layer, base_method=base, gamma=gamma, num_references=3, **options) as cam:
            scores = model(x[i : i + 1])
            maps.append(cam(int(target[i]), scores, references, normalized=False)[0])
    return torch.cat(maps)


def scaled(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    ("network", "ours", "peer"),
    [
        ("resnet18", "gradcam", "GradCAM"),
        ("resnet18", "layercam", "LayerCAM"),
        ("vit", "gradcam", "GradCAM"),
        ("vit", "layercam", "LayerCAM"),
    ],
)
def test_finer_maps_agree(networks, network, ours, peer, gamma):
    """Not Grad-CAM++: its torchcam version divides a copy and so leaves out the denominator of alpha."""
    model, x = networks[network]
    reshape = tokens_to_grid if network == "vit" else None
    result = Explainer(model, LAYERS[network], ours)(x, gamma=gamma, normalize=None, size=None)
    expected = theirs(model, x, LAYERS[network], peer, gamma, result.target, reshape)
    assert (scaled(result.maps) - scaled(expected)).abs().max() < 1e-4


def test_chosen_references_agree(networks):
    model, x = networks["resnet18"]
    target = model(x).argsort(1)[:, -3]
    result = Explainer(model, LAYERS["resnet18"])(x, target=target, gamma=0.6, normalize=None, size=None)
    assert result.maps.any()
    expected = theirs(model, x, LAYERS["resnet18"], "GradCAM", 0.6, target, None)
    assert (scaled(result.maps) - scaled(expected)).abs().max() < 1e-4
    explicit = [c for c in range(20) if c not in target.tolist()][:2]
    result = Explainer(model, LAYERS["resnet18"])(x, target, explicit, normalize=None, size=None)
    expected = theirs(model, x, LAYERS["resnet18"], "GradCAM", 0.6, target, None, explicit)
    assert (scaled(result.maps) - scaled(expected)).abs().max() < 1e-4


@pytest.mark.parametrize("weighting", ["softmax", "softmax_detached"])
def test_other_weightings_are_told_apart(networks, weighting):
    model, x = networks["vit"]
    result = Explainer(model, LAYERS["vit"])(x, gamma=1.0, weighting=weighting, normalize=None, size=None)
    expected = theirs(model, x, LAYERS["vit"], "GradCAM", 1.0, result.target, tokens_to_grid)
    assert (scaled(result.maps) - scaled(expected)).abs().max() > 1e-3
