"""Channel weights from forward passes, against loops; the tail re-run alone; Shapley-CAM's second derivative."""

from __future__ import annotations

import pytest
import torch
from finecam.explainer import Explainer
from finecam.layers import find_layer
from finecam.score import TailReplay
from torch import nn
from torch.nn import functional as F
from vfm_core.errors import UserError


def activations(model, x):
    return model.features(x)


def masked_logits(model, x, a):
    """f(x * H_k) for every channel, by a loop: (K, C)."""
    rows = []
    for channel in a[0]:
        mask = F.interpolate(channel[None, None], x.shape[-2:], mode="bilinear", align_corners=True)[0, 0]
        mask = (mask - mask.min()) / (mask.max() - mask.min() + 1e-8)
        rows.append(model(x * mask)[0])
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("softmax_channels", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.6])
def test_scorecam_by_a_loop(make, images, softmax_channels, gamma):
    model, x = make["mlp"](), images(3)
    c, refs = 2, [0, 5]
    explain = Explainer(model, method="scorecam", batch_size=5, softmax_channels=softmax_channels)
    found = explain(x, target=c, references=refs, gamma=gamma, normalize=None, size=None)
    for i in range(3):
        one = x[i : i + 1]
        a = activations(model, one)
        y = masked_logits(model, one, a)
        alpha = y[:, c] - gamma * y[:, refs].mean(1)
        if softmax_channels:
            alive = a[0].flatten(1).any(1)
            alpha = torch.where(alive, alpha, -torch.inf).softmax(0)
        else:
            alpha = alpha - model(torch.zeros_like(one))[0, c]
        expected = (alpha[:, None, None] * a[0]).sum(0).relu()
        assert torch.allclose(found.maps[i], expected, atol=1e-5)


@torch.no_grad()
def test_scorecam_softmax_weighting_uses_each_masked_images_probabilities(make, images):
    model, x = make["mlp"](), images(1)
    found = Explainer(model, method="scorecam", softmax_channels=False)(
        x, target=1, references=[3, 4], gamma=1.0, weighting="softmax", normalize=None, size=None
    )
    a = activations(model, x)
    y = masked_logits(model, x, a)
    q = y[:, [3, 4]].softmax(1)
    alpha = (q * (y[:, [1]] - y[:, [3, 4]])).sum(1) - model(torch.zeros_like(x))[0, 1]
    assert torch.allclose(found.maps[0], (alpha[:, None, None] * a[0]).sum(0).relu(), atol=1e-5)


def test_scorecam_limits_channels_and_reports_progress(make, images):
    model, x = make["mlp"](), images(2)
    seen = []
    explain = Explainer(model, method="scorecam", max_channels=4, batch_size=3, progress=lambda *p: seen.append(p))
    forwards = []
    handle = model.register_forward_hook(lambda m, i, o: forwards.append(len(o)))
    result = explain(x, gamma=0, normalize=None, size=None)
    handle.remove()
    assert seen[-1] == (8, 8) and [p[0] for p in seen] == [3, 6, 8]
    assert sum(forwards[1:]) == 8, "four channels of two images"
    # the four channels are those with the largest gradient of the target
    a = activations(model, x).detach().requires_grad_(True)
    y = model.fc(torch.tanh(model.hidden(a.mean((2, 3)))))
    (g,) = torch.autograd.grad(y.gather(1, result.target[:, None]).sum(), a)
    importance = torch.where(a.flatten(2).any(2), g.abs().mean((2, 3)), -1.0)
    keep = importance.topk(4).indices[0]
    with torch.no_grad():
        scores = masked_logits(model, x[:1], a[:1])[:, result.target[0]]
        weights = torch.full((12,), -torch.inf).index_copy(0, keep, scores[keep]).softmax(0)
        assert torch.allclose(result.maps[0], torch.einsum("k,khw->hw", weights, a[0]).relu(), atol=1e-5)


def test_scorecam_without_any_activation(make, images):
    model = make["cnn"]()
    nn.init.constant_(model.features[2].bias, -100.0)
    result = Explainer(model, method="scorecam")(images(1))
    assert not result.maps.any() and result.empty.tolist() == [True]


@torch.no_grad()
@pytest.mark.parametrize("gamma", [0.0, 0.6])
def test_ablationcam_by_a_loop(make, images, gamma):
    model, x = make["mlp"](), images(2)
    found = Explainer(model, method="ablationcam", batch_size=5)(
        x, target=2, references=[0, 5], gamma=gamma, normalize=None, size=None
    )
    for i in range(2):
        a = activations(model, x[i : i + 1])

        def j(features):
            y = model.fc(torch.tanh(model.hidden(features.mean((2, 3)))))[0]
            return y[2] - gamma * y[[0, 5]].mean()

        weights = []
        for k in range(a.shape[1]):
            ablated = a.clone()
            ablated[0, k] = a.min()
            weights.append((j(a) - j(ablated)) / j(a).abs())
        expected = torch.einsum("k,khw->hw", torch.stack(weights), a[0]).relu()
        assert torch.allclose(found.maps[i], expected, atol=1e-5)


def test_ablation_reruns_only_the_tail(make, images):
    model, x = make["vit"](), images(1, 64, 64)
    runs = {"first": 0, "last": 0}
    model.blocks[0].mlp.register_forward_hook(lambda *a: runs.__setitem__("first", runs["first"] + 1))
    model.blocks[2].mlp.register_forward_hook(lambda *a: runs.__setitem__("last", runs["last"] + 1))
    Explainer(model, method="ablationcam", batch_size=8)(x)
    assert runs["first"] == 2, "once to explain, once to record"
    assert runs["last"] == 2 + 1 + 32 // 8, "and once to see that it reproduces the logits"


@torch.no_grad()
def test_tail_replay_equals_the_whole_model(built):
    architecture, model, x = built
    site = find_layer(model, None, x)
    replay = TailReplay(model, site, x[:1])
    assert replay.skips_trunk
    dim = {3: 2, 4: 3 if "swin" in architecture.layer or "norm2" in architecture.layer else 1}[replay.activation.ndim]
    changed = replay.activation.repeat_interleave(3, 0)
    changed.movedim(dim, 0)[: changed.shape[dim] // 2] *= 0.5
    fast = replay(changed, 3)
    replay.skips_trunk = False
    assert torch.allclose(fast, replay(changed, 3), atol=1e-4)
    assert not torch.allclose(fast[0], replay.logits[0], atol=1e-6)
    assert all("forward" not in m.__dict__ and not m._forward_hooks for m in model.modules())


@torch.no_grad()
def test_tail_replay_gives_up_where_modules_are_not_everything(images):
    class Sideways(nn.Module):
        """Hands the image past its modules."""

        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.Linear(6, 3)

        def forward(self, x):
            y = self.stem(x)
            y += y.mean()  # in place: the recorded output is already changed
            return self.fc(self.conv(y).relu().mean((2, 3)))

    model, x = Sideways(), images(2)
    replay = TailReplay(model, find_layer(model, "conv"), x[:1])
    assert torch.allclose(replay(replay.activation, 1), model(x[:1]), atol=1e-5)
    result = Explainer(model, "conv", method="ablationcam")(x)
    assert result.maps.isfinite().all()


def test_ablation_needs_a_known_layout(make, images):
    with pytest.raises(UserError, match="needs to know where the channels are"):
        Explainer(make["cnn"](), "features.3", "ablationcam", reshape=lambda t: t)(images(1))


@pytest.mark.parametrize("method", ["scorecam", "ablationcam", "shapleycam"])
def test_a_sweep_equals_single_calls(make, images, method):
    explain, x = Explainer(make["mlp"](), method=method), images(2)
    gammas = (0.0, 0.6, 2.0)
    swept = explain.sweep(x, gammas)
    for i, gamma in enumerate(gammas):
        assert torch.allclose(swept.maps[:, i], explain(x, gamma=gamma).maps, atol=1e-5)


def test_shapley_uses_the_hessian(make, images):
    model, x = make["mlp"](), images(1)
    a = activations(model, x).detach().requires_grad_(True)

    def j(features):
        y = model.fc(torch.tanh(model.hidden(features.mean((2, 3)))))[0]
        return y[1] - 0.6 * y[[3, 4]].mean()

    g = torch.autograd.functional.jacobian(j, a)
    hessian = torch.autograd.functional.hessian(j, a).flatten(4).flatten(0, 3)
    product = (hessian @ a.flatten()).view_as(a)
    weights = (g - 0.5 * product).mean((2, 3))
    expected = torch.einsum("bk,bkhw->bhw", weights, a).relu()
    options = {"target": 1, "references": [3, 4], "normalize": None, "size": None}
    found = Explainer(model, method="shapleycam")(x, **options)
    assert torch.allclose(found.maps, expected, atol=1e-6)
    assert not torch.allclose(found.maps, Explainer(model)(x, **options).maps, atol=1e-7)


def test_shapley_of_a_linear_tail_is_gradcam_and_works_behind_fused_attention(make, images):
    x = images(2, 64, 64)
    cnn = make["cnn"]()
    assert torch.allclose(Explainer(cnn, method="shapleycam")(x).maps, Explainer(cnn)(x).maps, atol=1e-5)
    result = Explainer(make["vit"](), method="shapleycam")(x)
    assert result.maps.any() and result.maps.isfinite().all()


def test_randomcam_is_seeded_and_leaves_the_global_generator_alone(make, images):
    model, x = make["cnn"](), images(3)
    before = torch.random.get_rng_state()
    maps = [Explainer(model, method="randomcam", seed=s)(x).maps for s in (0, 0, 1)]
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])
    assert torch.equal(torch.random.get_rng_state(), before)
