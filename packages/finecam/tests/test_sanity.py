"""Parameter randomisation and the baselines that know nothing."""

from __future__ import annotations

import math

import pytest
import torch
from finecam.metrics import energy_in, pointing
from finecam.sanity import (
    center_gaussian,
    map_rank_correlation,
    parameter_stages,
    random_maps,
    randomization_cascade,
    randomize_,
)
from torch import Tensor, nn


class Net(nn.Module):
    """Convolutions, a position bias of its own, and a head: CAM is exact for it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_map = nn.Parameter(torch.zeros(1, 6, 1, 1))
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        self.act = nn.ReLU()
        self.head = nn.Linear(6, 4)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.blocks(self.stem(x) + self.bias_map))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((-2, -1)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(7))


def cam(x: Tensor, c: int = 1):  # type: ignore[no-untyped-def]
    def explain(model: nn.Module) -> Tensor:
        assert isinstance(model, Net)
        with torch.no_grad():
            return torch.einsum("bkhw,k->bhw", model.features(x), model.head.weight[c])

    return explain


def test_stages_go_from_the_head_down() -> None:
    assert parameter_stages(Net()) == ["head", "blocks.2", "blocks.0", "stem", ""]


def test_stages_of_real_models() -> None:
    import timm

    vit = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=32, num_classes=4, pretrained=False
    )
    assert parameter_stages(vit) == ["head", "norm", "blocks.1", "blocks.0", "patch_embed", ""]
    resnet = timm.create_model("resnet18", num_classes=4, pretrained=False)
    stages = parameter_stages(resnet)
    assert stages[:3] == ["fc", "layer4.1", "layer4.0"] and stages[-1] == "conv1"


def test_cascade_sees_a_map_that_depends_on_the_model(x: Tensor) -> None:
    net = Net()
    result = randomization_cascade(net, cam(x))
    assert result.stages == ["head", "blocks.2", "blocks.0", "stem", ""]
    assert result.spearman.shape == (5, 3)
    assert result.spearman[1:].abs().mean() < 0.5
    assert (result.spearman[0] < 0.99).all()


def test_cascade_exposes_a_map_that_does_not(x: Tensor) -> None:
    result = randomization_cascade(Net(), lambda model: x.abs().mean(1))
    assert torch.equal(result.spearman, torch.ones(5, 3))


def test_cascade_is_cumulative(x: Tensor) -> None:
    """Only the last of the stages below may change the features: the head alone leaves them."""
    unchanged = randomization_cascade(Net(), lambda m: m.features(x).detach().mean(1), stages=["head"])  # type: ignore[operator]
    assert torch.equal(unchanged.spearman, torch.ones(1, 3))
    both = randomization_cascade(Net(), cam(x), stages=["head", "stem"])
    alone = randomization_cascade(Net(), cam(x), stages=["stem"])
    assert not torch.allclose(both.spearman[1], alone.spearman[0])


def test_cascade_leaves_model_and_global_state_alone(x: Tensor) -> None:
    net = Net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.random.get_rng_state()
    first = randomization_cascade(net, cam(x))
    again = randomization_cascade(net, cam(x))
    assert torch.equal(first.spearman, again.spearman)
    other = randomization_cascade(net, cam(x), generator=torch.Generator().manual_seed(5))
    assert not torch.equal(first.spearman, other.spearman)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training and torch.equal(state, torch.random.get_rng_state())


def test_unknown_stage_and_no_stage(x: Tensor) -> None:
    with pytest.raises(ValueError, match="'neck' is no module"):
        randomization_cascade(Net(), cam(x), stages=["neck"])
    assert randomization_cascade(Net(), cam(x), stages=[]).spearman.shape == (0, 3)


def test_randomize_keeps_the_first_two_moments_and_nothing_else() -> None:
    layer = nn.Linear(200, 100)
    with torch.no_grad():
        layer.weight.copy_(2 + 3 * torch.randn(100, 200, generator=torch.Generator().manual_seed(0)))
        layer.bias.fill_(0.5)
    old = layer.weight.clone()
    randomize_(layer, torch.Generator().manual_seed(1))
    assert layer.weight.mean().item() == pytest.approx(2, abs=0.1)
    assert layer.weight.std().item() == pytest.approx(3, abs=0.1)
    assert torch.corrcoef(torch.stack([old.flatten(), layer.weight.detach().flatten()]))[0, 1].abs() < 0.03
    assert torch.equal(layer.bias.detach(), torch.full((100,), 0.5))  # a constant has no spread to draw from


def test_map_rank_correlation() -> None:
    a = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    b = torch.stack([a[0].exp(), -a[1], torch.zeros(5, 5)])
    values = map_rank_correlation(a, b)
    assert values[:2].tolist() == pytest.approx([1, -1]) and math.isnan(values[2])
    with pytest.raises(ValueError, match="one shape"):
        map_rank_correlation(a, b[:, :4])


def test_random_maps_score_at_chance() -> None:
    maps = random_maps(400, (16, 16))
    assert maps.shape == (400, 16, 16) and maps.min() >= 0 and maps.max() <= 1
    region = torch.zeros(400, 16, 16, dtype=torch.bool)
    region[:, :4, :8] = True  # an eighth of the image
    assert energy_in(maps, region).mean().item() == pytest.approx(1 / 8, abs=0.01)
    assert pointing(maps, region).mean().item() == pytest.approx(1 / 8, abs=0.05)
    assert torch.equal(maps, random_maps(400, (16, 16)))
    assert not torch.equal(maps, random_maps(400, (16, 16), generator=torch.Generator().manual_seed(3)))


def test_random_maps_at_grid_resolution_are_smooth() -> None:
    smooth, rough = random_maps(20, (32, 32), grid=(4, 4)), random_maps(20, (32, 32))
    assert smooth.diff(dim=2).abs().mean() < 0.2 * rough.diff(dim=2).abs().mean()


def test_center_gaussian_peaks_in_the_middle_and_is_symmetric() -> None:
    maps = center_gaussian(2, (9, 15))
    assert maps.shape == (2, 9, 15) and maps[0, 4, 7] == 1 and maps[0].argmax() == 4 * 15 + 7
    torch.testing.assert_close(maps, maps.flip(1, 2))
    # Column 6 of 8 is 2.5 pixels = 1.25 standard deviations (of 2 pixels) right of the centre, column 4 only 0.25.
    line = center_gaussian(1, (8, 8))[0, 4]
    assert math.log(line[6] / line[4]) == pytest.approx(-(1.25**2 - 0.25**2) / 2, rel=1e-4)
    with pytest.raises(ValueError, match="sigma"):
        center_gaussian(1, (4, 4), sigma=0)
