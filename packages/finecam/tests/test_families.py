"""Every family against its formula written with loops, in float64."""

from __future__ import annotations

import pytest
import torch
from finecam import families
from finecam.combine import finer_maps, finish
from finecam.families import FAMILIES, minmax, principal_map, resize

B, K, H, W = 2, 5, 3, 4


@pytest.fixture
def ag():
    generator = torch.Generator().manual_seed(1)
    a, g = (torch.randn(B, K, H, W, generator=generator, dtype=torch.double) for _ in range(2))
    g[0, 1] = 0  # a channel without gradient
    g[1, 2, 0, 0] = 0
    return a, g


def loops(name, a, g):
    out = torch.zeros(B, H, W, dtype=torch.double)
    for b in range(B):
        for k in range(K):
            A, G = a[b, k], g[b, k]
            if name == "gradcam":
                out[b] += G.sum() / (H * W) * A
            elif name == "cam":
                out[b] += G.sum() * A
            elif name == "gradcam++":
                w = 0.0
                for i in range(H):
                    for j in range(W):
                        if G[i, j] != 0:
                            alpha = G[i, j] ** 2 / (2 * G[i, j] ** 2 + A.sum() * G[i, j] ** 3 + 1e-6)
                            w += max(G[i, j], 0) * alpha
                out[b] += w * A
            elif name == "xgradcam":
                out[b] += (G * A).sum() / (A.sum() + 1e-7) * A
            elif name == "layercam":
                out[b] += G.clamp(min=0) * A
            elif name == "hirescam":
                out[b] += G * A
            elif name == "gradcam_elementwise":
                out[b] += (G * A).clamp(min=0)
    return out


@pytest.mark.parametrize(
    "name", ["gradcam", "cam", "gradcam++", "xgradcam", "layercam", "hirescam", "gradcam_elementwise"]
)
def test_formula(ag, name):
    assert torch.allclose(FAMILIES[name].map(*ag), loops(name, *ag), atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 3, 4), (4, 5, 5)])  # fewer and more cells than channels
def test_principal_map_equals_svd(shape):
    values = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    found = principal_map(values)
    for image, projection in zip(values, found):
        m = image.flatten(1).T
        m = m - m.mean(0)
        _, _, vt = torch.linalg.svd(m, full_matrices=False)
        expected = (m @ vt[0]).view(shape[1:])
        assert torch.allclose(projection.abs(), expected.abs(), atol=1e-9)
        assert projection.max() >= -projection.min(), "the larger magnitude is positive"
    assert torch.equal(families.eigengradcam(values, values), principal_map(values * values))
    assert torch.equal(families.eigencam(values, values * 0), found)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.kind == "gradient"])
def test_broadcast_gradient_equals_a_full_one(ag, name):
    """The closed form hands over one value per channel as a view."""
    a, g = ag
    constant = g[:, :, :1, :1].expand_as(a)
    assert torch.allclose(FAMILIES[name].map(a, constant), FAMILIES[name].map(a, constant.contiguous()), atol=1e-12)
    assert torch.equal(g, ag[1])


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.kind == "gradient"])
def test_linear_flag_is_true(ag, name):
    a, g = ag
    family, other = FAMILIES[name], g.roll(1, 2) + 0.3
    combined = family.map(a, g - 0.6 * other)
    separate = family.map(a, g) - 0.6 * family.map(a, other)
    assert torch.allclose(combined, separate, atol=1e-9) == family.linear


@pytest.mark.parametrize("name", ["gradcam", "layercam"])
@pytest.mark.parametrize("rule", ["before_relu_mean", "before_relu_max", "after_relu_mean", "map_subtraction"])
def test_aggregates(ag, name, rule):
    a, g = ag
    d1, d2 = g.roll(1, 3), g.roll(2, 3) * 0.7
    family, relu = FAMILIES[name], torch.relu
    grads = [g, (d1 + d2) / 2] if rule == "before_relu_mean" else [g, d1, d2]
    found = finer_maps(family, a, grads, (0.0, 0.6, 2.0), rule)
    assert torch.equal(found[0], relu(family.map(a, g)))
    for gamma, maps in zip((0.6, 2.0), found[1:]):
        one, two = family.map(a, g - gamma * d1), family.map(a, g - gamma * d2)
        expected = {
            "before_relu_mean": relu(family.map(a, g - gamma * (d1 + d2) / 2)),
            "before_relu_max": relu(torch.maximum(one, two)),
            "after_relu_mean": (relu(one) + relu(two)) / 2,
            "map_subtraction": relu(
                relu(family.map(a, g)) - gamma * (relu(family.map(a, d1)) + relu(family.map(a, d2))) / 2
            ),
        }[rule]
        assert torch.allclose(maps, expected, atol=1e-12)


def test_minmax_and_resize():
    maps = torch.stack([torch.arange(6.0).view(2, 3), torch.zeros(2, 3), torch.full((2, 3), 5.0)])
    scaled = minmax(maps)
    assert scaled[0].min() == 0 and scaled[0].max() == pytest.approx(1, abs=1e-6)
    assert not scaled[1:].any(), "constant maps become zero, not NaN"
    up = resize(maps, (4, 6))
    expected = torch.nn.functional.interpolate(maps[:, None], (4, 6), mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(up, expected)
    assert resize(maps, (2, 3)) is maps
    assert resize(maps.view(3, 1, 2, 3), (4, 6)).shape == (3, 1, 4, 6)


def test_finish_merges_layers():
    small, large = torch.rand(1, 2, 2, 3), torch.rand(1, 2, 4, 6)
    merged = finish([small, large], None, "minmax")
    assert torch.allclose(merged, minmax((resize(minmax(small), (4, 6)) + minmax(large)) / 2))
    assert torch.equal(finish([small], None, None), small)
    tiny = finish([small * 1e-7], (8, 8), "minmax")
    assert torch.allclose(tiny, finish([small], (8, 8), "minmax"), atol=1e-5), "tiny maps are scaled like ordinary ones"
    assert finish([small, large], (8, 8), None).max() <= 1
