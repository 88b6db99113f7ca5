"""Deletion, insertion, drops and ROAD: brute force, closed forms, peers, batching, and faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from finecam.fills import NOISE, make_filler, noisy_linear
from finecam.metrics import (
    absolute_drop,
    average_drop,
    deletion,
    deletion_curves,
    increase_in_confidence,
    insertion,
    other_classes,
    relative_drop,
    road_combined,
    road_lerf,
    road_morf,
)
from finecam.perturbation import nearest_class
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

B, C, SIDE = 3, 5, 16


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_net(classes: int = C, seed: int = 0) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, classes),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)) * 0.5)
    return net.eval()


@pytest.fixture
def net() -> nn.Sequential:
    return small_net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, 3, SIDE, SIDE, generator=seeded(1))


@pytest.fixture
def maps() -> Tensor:
    """Half-tied maps: rounding makes the stable order matter."""
    return (torch.rand(B, SIDE, SIDE, generator=seeded(2)) * 20).round() / 20


TARGET = torch.tensor([0, 3, 4])
REFERENCE = torch.tensor([1, 2, 0])


def brute_force(net: nn.Module, x: Tensor, maps: Tensor, base: Tensor, steps: int, insert: bool) -> np.ndarray:
    """Probabilities (B, steps + 1, C), one image and one step at a time."""
    curves = np.zeros((len(x), steps + 1, C))
    start, end = (base, x) if insert else (x, base)
    for b in range(len(x)):
        values = maps[b].flatten().tolist()
        order = torch.tensor(sorted(range(len(values)), key=lambda i: (-values[i], i)))
        for n in range(steps + 1):
            chosen = order[: math.floor(n / steps * len(values) + 0.5)]
            image = start[b].flatten(1).clone()
            image[:, chosen] = end[b].flatten(1)[:, chosen]
            with torch.no_grad():
                curves[b, n] = net(image.view(1, 3, SIDE, SIDE)).double().softmax(-1)[0].numpy()
    return curves


def area(curve: np.ndarray) -> np.ndarray:
    """Trapezoid rule on equal steps from 0 to 1."""
    return (curve[:, 1:] + curve[:, :-1]).mean(1) / 2


@pytest.mark.parity
@pytest.mark.parametrize(("fill", "steps"), [("zero", 50), ("zero", 1), ("image_mean", 7), ("blur", 7)])
def test_deletion_and_insertion_equal_a_brute_force_loop(
    net: nn.Module, x: Tensor, maps: Tensor, fill: Any, steps: int
) -> None:
    base = make_filler(fill, x)(torch.arange(B), torch.ones(B, SIDE, SIDE, dtype=torch.bool))
    for metric, insert in ((deletion, False), (insertion, True)):
        p = brute_force(net, x, maps, base, steps, insert)
        value = metric(net, x, maps, TARGET, steps=steps, fill=fill, batch_size=11)
        assert value.tolist() == pytest.approx(area(p[np.arange(B), :, TARGET]), abs=1e-5)


@pytest.mark.parity
def test_curves_and_their_area_equal_a_brute_force_loop(net: nn.Module, x: Tensor, maps: Tensor) -> None:
    curves = deletion_curves(net, x, maps, TARGET, REFERENCE, steps=10)
    p = brute_force(net, x, maps, torch.zeros_like(x), 10, insert=False)
    target, reference = p[np.arange(B), :, TARGET], p[np.arange(B), :, REFERENCE]
    assert curves.fractions.tolist() == pytest.approx(np.linspace(0, 1, 11))
    np.testing.assert_allclose(curves.target, target, atol=1e-5)
    np.testing.assert_allclose(curves.reference, reference, atol=1e-5)
    assert curves.area.tolist() == pytest.approx(area(target - reference), abs=1e-5)
    assert deletion(net, x, maps, TARGET, steps=10).tolist() == pytest.approx(area(target), abs=1e-5)


@pytest.mark.parity
def test_deletion_and_insertion_equal_torchcam(net: nn.Module, x: Tensor, maps: Tensor) -> None:
    torchcam = pytest.importorskip("torchcam.metrics", reason="torchcam is not installed")
    from contextlib import nullcontext
    from functools import partial

    class Extractor:
        model = net
        _hooks_off = staticmethod(nullcontext)

        def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
            return [maps]

        def fuse_cams(self, cams: list[Tensor]) -> Tensor:
            return cams[0]

    # 16 steps divide the 256 pixels: the peer's steps are then ours.
    peer = torchcam.DeletionInsertionMetric(Extractor(), partial(torch.softmax, dim=-1), steps=16)
    peer.update(x, TARGET.tolist())
    ours = [m(net, x, maps, TARGET, steps=16, fill="zero").mean().item() for m in (deletion, insertion)]
    assert ours == pytest.approx([peer.summary()["deletion_auc"], peer.summary()["insertion_auc"]], abs=1e-5)

    # Looser: the peer adds 1e-7 to p, and one of these p is small.
    peer = torchcam.ClassificationMetric(Extractor(), partial(torch.softmax, dim=-1))
    peer.update(x, TARGET.tolist())
    ours = [m(net, x, maps, TARGET).mean().item() for m in (average_drop, increase_in_confidence)]
    assert ours == pytest.approx(
        [peer.summary()["avg_drop"], peer.summary()["conf_increase"]], abs=5e-4
    )  # they add 1e-7 to p


@pytest.mark.parity
def test_road_equals_grad_cam_without_noise(net: nn.Module, x: Tensor, maps: Tensor) -> None:
    peer = pytest.importorskip("pytorch_grad_cam.metrics.road", reason="grad-cam is not installed")
    from pytorch_grad_cam.metrics import perturbation_confidence as base
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    targets = [ClassifierOutputSoftmaxTarget(c) for c in TARGET.tolist()]
    means = {}
    for name, remove in (("morf", base.RemoveMostRelevantFirst), ("lerf", base.RemoveLeastRelevantFirst)):
        metrics = [
            base.PerturbationConfidenceMetric(remove(percentile, peer.NoisyLinearImputer(noise=0)))
            for percentile in range(10, 100, 10)
        ]
        means[name] = np.mean([m(x, maps.numpy(), targets, net) for m in metrics], axis=0)
    assert road_morf(net, x, maps, TARGET, noise=0).tolist() == pytest.approx(means["morf"], abs=1e-4)
    assert road_lerf(net, x, maps, TARGET, noise=0).tolist() == pytest.approx(means["lerf"], abs=1e-4)
    combined = road_combined(net, x, maps, TARGET, noise=0, batch_size=7)
    assert combined.tolist() == pytest.approx((means["lerf"] - means["morf"]) / 2, abs=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_imputation_equals_the_sparse_solve_of_grad_cam(x: Tensor, share: float) -> None:
    peer = pytest.importorskip("pytorch_grad_cam.metrics.road", reason="grad-cam is not installed")
    removed = torch.rand(B, SIDE, SIDE, generator=seeded(5)) < share
    removed[0, :8] = True  # a hole at the border
    ours = noisy_linear(x, removed, noise=0)
    for image, mask, filled in zip(x, removed, ours):
        expected = peer.NoisyLinearImputer(noise=0)(image, (~mask).float())
        torch.testing.assert_close(filled, expected, atol=1e-5, rtol=0)


def test_imputation_keeps_known_pixels_and_smooths_the_rest(x: Tensor) -> None:
    removed = torch.zeros(B, SIDE, SIDE, dtype=torch.bool)
    removed[:, 4:12, 4:12] = True
    filled = noisy_linear(x, removed, noise=0)
    keep = ~removed[:, None].expand_as(x)
    assert torch.equal(filled[keep], x[keep])
    assert filled.amax() <= x.amax() and filled.amin() >= x.amin()  # a weighted mean of known values
    constant = torch.full_like(x, 0.7)
    torch.testing.assert_close(noisy_linear(constant, removed, noise=0), constant)
    assert torch.equal(noisy_linear(x, torch.ones_like(removed), noise=0), torch.zeros_like(x))
    assert torch.equal(noisy_linear(x, torch.zeros_like(removed)), x)


def test_imputation_noise_has_its_size_and_its_own_generator(x: Tensor) -> None:
    removed = torch.ones(B, SIDE, SIDE, dtype=torch.bool)
    state = torch.random.get_rng_state()
    first, again = noisy_linear(x, removed), noisy_linear(x, removed)
    assert torch.equal(first, again) and first.std().item() == pytest.approx(NOISE, rel=0.1)
    assert not torch.equal(first, noisy_linear(x, removed, generator=seeded(9)))
    assert torch.equal(state, torch.random.get_rng_state())


def two_class_linear(weights: list[float]) -> Callable[[Tensor], Tensor]:
    """Logits (z, 0) with z linear in the four pixels of a 2 x 2 image."""
    w = torch.tensor(weights)

    def model(x: Tensor) -> Tensor:
        z = x.mean(1).flatten(1) @ w
        return torch.stack([z, torch.zeros_like(z)], 1)

    return model


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def test_drops_of_a_linear_model_have_their_closed_form() -> None:
    model = two_class_linear([2.0, 1.0, -1.0, 0.5])
    x = torch.ones(2, 3, 2, 2)
    maps = torch.tensor([[[4.0, 3.0], [2.0, 1.0]], [[1.0, 2.0], [3.0, 4.0]]])
    # z = 2.5; image 0 loses the pixel of weight 2, image 1 the one of weight 0.5.
    drops = [sigmoid(2.5) - sigmoid(0.5), sigmoid(2.5) - sigmoid(2.0)]
    assert absolute_drop(model, x, maps, 0, q=0.25).tolist() == pytest.approx(drops, abs=1e-6)
    assert relative_drop(model, x, maps, 0, 1, q=0.25).tolist() == pytest.approx([2 * d for d in drops], abs=1e-6)
    assert relative_drop(model, x, maps, 1, 0, q=0.25).tolist() == pytest.approx([-2 * d for d in drops], abs=1e-6)
    # Half of the pixels: image 0 keeps -0.5, image 1 keeps 3.
    both = relative_drop(model, x, maps, 0, q=[0.25, 0.5])
    expected = [[2 * drops[0], 2 * (sigmoid(2.5) - sigmoid(-0.5))], [2 * drops[1], 2 * (sigmoid(2.5) - sigmoid(3))]]
    np.testing.assert_allclose(both, expected, atol=1e-6)
    # A fill equal to the image moves nothing.
    assert relative_drop(model, x, maps, 0, q=1.0, fill=torch.ones(3, 1, 1)).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_relative_drop_is_made_of_absolute_drops(net: nn.Module, x: Tensor, maps: Tensor) -> None:
    c, d = (absolute_drop(net, x, maps, k, q=0.1) for k in (TARGET, REFERENCE))
    torch.testing.assert_close(relative_drop(net, x, maps, TARGET, REFERENCE, q=0.1), c - d)


def test_relative_drop_over_several_references_is_the_largest(net: nn.Module, x: Tensor, maps: Tensor) -> None:
    every = other_classes(TARGET, C)
    assert every.tolist() == [[1, 2, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3]]
    singles = torch.stack([relative_drop(net, x, maps, TARGET, every[:, t]) for t in range(C - 1)], 1)
    torch.testing.assert_close(relative_drop(net, x, maps, TARGET, every), singles.amax(1))


def test_default_reference_is_the_nearest_logit(net: nn.Module, x: Tensor, maps: Tensor) -> None:
    with torch.no_grad():
        y = net(x)
    expected = [min((abs(float(y[b, k] - y[b, c])), k) for k in range(C) if k != c)[1] for b, c in enumerate(TARGET)]
    nearest = nearest_class(net, x, TARGET)
    assert nearest.tolist() == expected
    by_default = relative_drop(net, x, maps, TARGET)
    torch.testing.assert_close(by_default, relative_drop(net, x, maps, TARGET, nearest))
    tied = nearest_class(lambda images: torch.zeros(len(images), 4), x, torch.tensor([0, 1, 3]))
    assert tied.tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="two classes"):
        nearest_class(lambda images: torch.zeros(len(images), 1), x, torch.zeros(B, dtype=torch.long))


def test_average_drop_by_hand() -> None:
    model = two_class_linear([2.0, 1.0, -1.0, 0.5])
    x = torch.ones(2, 3, 2, 2)
    maps = torch.tensor([[[0.0, 5.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]]])
    p, after = sigmoid(2.5), [sigmoid(1.0), sigmoid(3.5)]
    assert average_drop(model, x, maps, 0).tolist() == pytest.approx([(p - after[0]) / p, 0], abs=1e-6)
    assert increase_in_confidence(model, x, maps, 0).tolist() == [0, 1]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    height=st.integers(5, 9),
    width=st.integers(5, 9),
    grid=st.integers(2, 5),
    steps=st.integers(1, 6),
)
def test_properties_of_curves(seed: int, height: int, width: int, grid: int, steps: int) -> None:
    net = small_net()
    x = torch.randn(2, 3, height, width, generator=seeded(seed))
    maps = torch.rand(2, grid, grid, generator=seeded(seed + 1))
    value = deletion(net, x, maps, 1, steps=steps)
    assert ((value >= 0) & (value <= 1)).all()
    # Images do not see each other, and only the order of a map counts (powers of two are exact).
    torch.testing.assert_close(deletion(net, x[1:], maps[1:], 1, steps=steps), value[1:])
    torch.testing.assert_close(deletion(net, x, 4 * maps, 1, steps=steps), value)
    # The curve starts at the image and ends at the fill.
    ends = deletion_curves(net, x, maps, 1, 2, steps=steps)
    with torch.no_grad():
        whole, nothing = (net(images).softmax(-1) for images in (x, torch.zeros_like(x)))
    torch.testing.assert_close(ends.target[:, 0], whole[:, 1])
    torch.testing.assert_close(ends.reference[:, -1], nothing[:, 2])
    drop = relative_drop(net, x, maps, 1, 2, q=0.5)
    torch.testing.assert_close(drop, -relative_drop(net, x, maps, 2, 1, q=0.5))


def test_a_better_map_has_lower_deletion_and_higher_insertion() -> None:
    weights = torch.linspace(-2, 2, 64)
    model = two_class_linear(weights.tolist())
    x = torch.full((1, 3, 8, 8), 0.5)
    good = weights.view(1, 8, 8)
    for worse in (-good, torch.rand(1, 8, 8, generator=seeded())):
        assert deletion(model, x, good, 0) < deletion(model, x, worse, 0)
        assert insertion(model, x, good, 0, fill="zero") > insertion(model, x, worse, 0, fill="zero")
        assert absolute_drop(model, x, good, 0, q=0.2) > absolute_drop(model, x, worse, 0, q=0.2)


def test_empty_maps_give_nan_and_leave_the_others_alone(net: nn.Module, x: Tensor, maps: Tensor) -> None:
    broken = maps.clone()
    broken[0] = 0
    broken[2, 3, 3] = math.nan
    metrics: list[Callable[..., Tensor]] = [
        deletion, insertion, absolute_drop, relative_drop, average_drop, increase_in_confidence, road_combined,
    ]  # fmt: skip
    for metric in metrics:
        value = metric(net, x, broken, TARGET)
        assert value.isnan().tolist() == [True, False, True]
        torch.testing.assert_close(value[1], metric(net, x[1:2], maps[1:2], TARGET[1:2])[0], atol=1e-3, rtol=0)
    curves = deletion_curves(net, x, broken, TARGET, REFERENCE, steps=3)
    assert curves.target[0].isnan().all() and curves.area.isnan().tolist() == [True, False, True]


def test_steps_and_images_form_one_stream_of_batches(x: Tensor, maps: Tensor) -> None:
    sizes: list[int] = []

    def model(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return images.mean((-2, -1))

    deletion(model, x, maps, 0, steps=20, batch_size=25)
    assert sizes == [25, 25, 13]  # 3 images x 21 steps
    sizes.clear()
    relative_drop(model, x, maps, 0, 1, q=[0.05, 0.1])
    assert sizes == [9]  # the whole image and two fractions, all classes from the same pass


def test_outputs_other_than_tensors_are_read(x: Tensor, maps: Tensor, net: nn.Module) -> None:
    plain = deletion(net, x, maps, TARGET, steps=3)
    torch.testing.assert_close(deletion(lambda v: {"logits": net(v)}, x, maps, TARGET, steps=3), plain)
    torch.testing.assert_close(deletion(lambda v: (net(v), None), x, maps, TARGET, steps=3), plain)


def test_model_is_evaluated_and_left_as_it_was(net: nn.Sequential, x: Tensor, maps: Tensor) -> None:
    plain = deletion(net, x, maps, TARGET, steps=3)
    net.train()
    net[1].eval()
    norm = net[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    statistics = norm.running_mean.clone()
    torch.testing.assert_close(deletion(net, x.requires_grad_(), maps.requires_grad_(), TARGET, steps=3), plain)
    assert net.training and net[7].training and not net[1].training
    assert torch.equal(norm.running_mean, statistics)
    assert all(p.requires_grad and p.grad is None for p in net.parameters()) and x.grad is None

    def explode(module: nn.Module, arguments: Any) -> None:
        raise RuntimeError("boom")

    handle = net.register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="boom"):
        deletion(net, x, maps, TARGET)
    handle.remove()
    assert net.training and not net[1].training


def test_no_images_give_no_values(net: nn.Module) -> None:
    nothing, target = torch.zeros(0, 3, SIDE, SIDE), torch.zeros(0, dtype=torch.long)
    for metric in (deletion, relative_drop, road_combined):
        assert metric(net, nothing, torch.zeros(0, 4, 4), target).shape == (0,)


def test_bad_arguments_are_named(net: nn.Module, x: Tensor, maps: Tensor) -> None:
    with pytest.raises(ValueError, match=r"0\.\.4, got 0\.\.5"):
        deletion(net, x, maps, torch.tensor([0, 1, 5]))
    with pytest.raises(ValueError, match="class ids must be integers"):
        deletion(net, x, maps, torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="B = 3"):
        deletion(net, x, maps, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one map each"):
        deletion(net, x, maps[:2], TARGET)
    with pytest.raises(ValueError, match="steps"):
        deletion(net, x, maps, TARGET, steps=0)
    with pytest.raises(ValueError, match="'grey'"):
        deletion(net, x, maps, TARGET, fill="grey")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fraction"):
        absolute_drop(net, x, maps, TARGET, q=5)
    with pytest.raises(ValueError, match="reference equals the target"):
        relative_drop(net, x, maps, TARGET, torch.tensor([1, 3, 0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_gives_the_same_values(net: nn.Module, x: Tensor, maps: Tensor) -> None:
    metrics: list[Callable[..., Tensor]] = [deletion, insertion, relative_drop, average_drop, road_combined]
    on_cpu = [metric(net, x, maps, TARGET) for metric in metrics]
    net.cuda()
    for metric, expected in zip(metrics, on_cpu):
        value = metric(net, x.cuda(), maps.cuda(), TARGET)
        assert value.device.type == "cuda"
        torch.testing.assert_close(value.cpu(), expected, atol=1e-4, rtol=0)
