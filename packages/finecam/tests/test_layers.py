"""Default layers, grids of every layout, the candidates' table, and the model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from finecam.capture import Capture
from finecam.explainer import Explainer
from finecam.layers import find_layer, list_layers, logits_of, quiet
from finecam.layouts import TokenLayout, find_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vfm_core.errors import UserError


def test_default_layer_and_grid(built):
    architecture, model, x = built
    site = find_layer(model, None, x)
    assert site.name == architecture.layer
    explain = Explainer(model)
    result = explain(x, references=2, size=None)
    assert result.layer == architecture.layer
    assert tuple(result.maps.shape) == (2, *architecture.grid)
    assert tuple(explain(x, references=2).maps.shape) == (2, *architecture.image)
    with Capture(model, [site]) as capture:
        logits = capture.forward(x)
        (gradient,) = capture.vjp(logits, torch.eye(7)[None, :2])[0]
    assert tuple(capture.maps[0].shape[2:]) == architecture.grid
    assert gradient.shape == capture.maps[0].shape
    assert (gradient.abs().amax((1, 2, 3)) > 0).all(), "the layer's patches must matter"


@pytest.mark.parametrize("kind", ["nchw", "nhwc", "bnd", "nbd"])
def test_layouts_place_every_cell(kind):
    h, w, k, prefix = 3, 5, 4, 2
    grid = torch.arange(2 * k * h * w, dtype=torch.float).view(2, k, h, w)
    output = {
        "nchw": grid,
        "nhwc": grid.permute(0, 2, 3, 1),
        "bnd": torch.cat([torch.zeros(2, prefix, k), grid.flatten(2).transpose(1, 2)], 1),
    }
    output["nbd"] = output["bnd"].transpose(0, 1)
    layout = TokenLayout(kind, (h, w), prefix if kind in ("bnd", "nbd") else 0)
    assert torch.equal(layout.to_map(output[kind]), grid)


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(2, 16), w=st.integers(2, 16), patch=st.integers(4, 20), spare=st.integers(0, 3),
    channels=st.integers(65, 400), tokens_first=st.booleans(),
)  # fmt: skip
def test_any_grid_is_recovered(h, w, patch, spare, channels, tokens_first):
    """Whatever the image's aspect, with and without a remainder that the patches do not cover."""
    image = (h * patch + min(spare, patch - 1), w * patch + min(spare, patch - 1))
    net = nn.Module()
    net.patch_size = patch
    net.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
    net.block = nn.Identity()
    tokens = torch.zeros(2, h * w + 1, channels)
    tokens = tokens.transpose(0, 1) if tokens_first else tokens
    found = find_layout(net, "block", net.block, tokens, image, 2)
    assert found == TokenLayout("nbd" if tokens_first else "bnd", (h, w), 1)
    last = find_layout(net, "block", net.block, torch.zeros(2, h, w, 4 * channels), image, 2)
    assert last == TokenLayout("nhwc", (h, w))
    assert find_layout(net, "block", net.block, torch.zeros(2, 4 * channels, h, w), image, 2).kind == "nchw"


def test_few_channels_are_told_apart_by_the_layer():
    square = torch.zeros(1, 8, 8, 8)
    net = nn.ModuleDict({"norm": nn.LayerNorm(8), "conv": nn.Conv2d(8, 8, 1)})
    assert find_layout(net, "norm", net["norm"], square, (64, 64), 1).kind == "nhwc"
    assert find_layout(net, "conv", net["conv"], square, (64, 64), 1).kind == "nchw"


def test_output_that_is_no_grid_lists_candidates(make, images):
    model = make["vit"]()
    with pytest.raises(UserError, match=r"fits the layer's output in head: \(2, 7\).*blocks\.2\.norm1"):
        Explainer(model, "head")(images(2, 64, 64))


def test_wrong_token_count():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.cut, self.head = nn.Identity(), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.cut(torch.zeros(len(x), 13, 4) + x.mean()).mean(1))

    with pytest.raises(UserError, match="no grid of an image of 64x64"):
        Explainer(Odd(), "cut")(torch.ones(1, 3, 64, 64))
    with pytest.raises(UserError, match=r"reshape must return \(B, K, h, w\)"):
        Explainer(Odd(), "cut", reshape=lambda t: t)(torch.ones(1, 3, 64, 64))
    result = Explainer(Odd(), "cut", reshape=lambda t: t[:, 1:].mT.unflatten(2, (3, 4)))(torch.ones(1, 3, 64, 64))
    assert tuple(result.maps.shape) == (1, 64, 64)


def test_layer_by_name_module_index(make):
    model = make["vit"]()
    assert find_layer(model, model.blocks[1].norm2).name == "blocks.1.norm2"
    assert find_layer(model, "blocks[-2].norm2").name == "blocks.1.norm2"
    assert find_layer(model, "blocks.-1").name == "blocks.2"
    with pytest.raises(UserError, match=r"unknown layer.*'blocks.2.nrm1'; did you mean blocks.2.norm1"):
        find_layer(model, "blocks.2.nrm1")
    with pytest.raises(UserError, match="unknown layer"):
        find_layer(model, "blocks[-9].norm1")
    with pytest.raises(UserError, match="not part of the model"):
        find_layer(model, nn.LayerNorm(3))
    with pytest.raises(UserError, match="module or a name"):
        find_layer(model, 3)
    with pytest.raises(UserError, match="call index"):
        find_layer(model, "blocks.2#last")


def test_default_that_is_no_grid_gives_way_to_the_last_map(images):
    """A first norm inside windows of its own: the default by name does not fit, the maps around it do."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 3)
            self.blocks = nn.ModuleList([nn.ModuleDict({"norm1": nn.LayerNorm(8), "mix": nn.Conv2d(8, 8, 3, 1, 1)})])

        def forward(self, x):
            a = self.stem(x)
            windows = a.unflatten(2, (2, -1)).permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2)
            a = a + self.blocks[0]["norm1"](windows).mean()
            return self.fc(self.blocks[0]["mix"](a).mean((2, 3)))

    result = Explainer(Windows())(images(2))
    assert result.layer == "blocks.0.mix" and result.maps.any()
    with pytest.raises(UserError, match="no grid of an image"):
        Explainer(Windows(), "blocks.0.norm1")(images(2))


def test_no_default(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 96, 4))
    with pytest.raises(UserError, match=r"no default layer known for Sequential; give layer=NAME"):
        Explainer(model)(images(1))


class Shared(nn.Module):
    """One ReLU for two convolutions, as in older ResNets."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu, self.fc = (
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.Conv2d(4, 6, 3, 2, 1),
            nn.ReLU(),
            nn.Linear(6, 3),
        )

    def forward(self, x):
        return self.fc(self.relu(self.b(self.relu(self.a(x)))).mean((2, 3)))


def test_shared_module_needs_the_call(images):
    model, x = Shared(), images(2)
    with pytest.raises(UserError, match=r"runs more than once.*layer='relu#0', 'relu#1'"):
        Explainer(model, "relu")(x)
    first, second = Explainer(model, "relu#0")(x, size=None), Explainer(model, "relu#1")(x, size=None)
    assert first.maps.shape[1:] == (32, 48) and second.maps.shape[1:] == (16, 24)
    assert second.layer == "relu#1"
    assert not model.relu._forward_hooks
    with pytest.raises(UserError, match="layer runs 2 times"):
        Explainer(model, "relu#2")(x)
    # the default avoids the shared module: the convolution below it is called once
    assert find_layer(model, None, x).name == "b"


def test_list_layers(make, images):
    rows = {row.name: row for row in list_layers(make["vit"](), images(3, 64, 64))}
    assert rows["blocks.2.norm1"].map_shape == (32, 4, 4)
    assert rows["blocks.2.norm1"].shape == (17, 32)
    assert rows["head"].map_shape is None
    assert [row.calls for row in list_layers(Shared(), images(1)) if row.name == "relu"] == [2]


def test_layer_that_does_not_run(make, images):
    model = make["cnn"]()
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(UserError, match="layer did not run in the model's forward in spare"):
        Explainer(model, "spare")(images(1))


def test_outputs_of_all_kinds():
    y = torch.zeros(2, 3)

    class Output:
        logits = y

    for output in (y, Output(), (y, 1), [y], {"logits": y}):
        assert logits_of(output) is y
    for output in (y[0], {"a": y}, None, [], "y"):
        with pytest.raises(UserError, match="must return logits"):
            logits_of(output)


def test_a_layer_with_a_tuple(images):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, 4, 1)

        def forward(self, x):
            return self.conv(x), x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.fc = Pair(), nn.Linear(5, 4)

        def forward(self, x):
            return self.fc(self.pair(x)[0].mean((2, 3)))

    model = Net()
    assert torch.equal(Explainer(model, "pair")(images(2)).maps, Explainer(model, "pair.conv")(images(2)).maps)


# --- nothing is left behind --------------------------------------------------------------------


def state(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )


@pytest.mark.parametrize("mode", ["train", "frozen", "no_grad", "inference_mode", "mixed"])
def test_any_mode_gives_the_same_map_and_is_restored(make, images, mode):
    model, x = make["vit"](drop_path_rate=0.3, proj_drop_rate=0.2), images(2, 64, 64)
    expected = Explainer(model)(x)
    if mode == "train":
        model.train()
    elif mode == "frozen":
        model.requires_grad_(False)
    elif mode == "mixed":
        model.blocks[1].train()
        model.blocks[0].requires_grad_(False)
    before, weights = state(model), copy.deepcopy(model.state_dict())
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        result = Explainer(model)(x.clone() if mode == "inference_mode" else x)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
        assert torch.is_inference_mode_enabled() == (mode == "inference_mode")
    assert torch.equal(result.maps, expected.maps)
    assert state(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not result.maps.requires_grad and not result.logits.requires_grad


def test_gradients_of_a_training_loop_survive(make, images):
    model, x = make["cnn"]().train(), images(2)
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    Explainer(model, method="layercam")(x)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before))


@pytest.mark.parametrize("method", ["gradcam", "scorecam", "ablationcam", "shapleycam", "eigencam"])
def test_everything_is_restored_after_an_exception(make, images, method):
    model, x = make["cnn"]().train(), images(2)
    calls = 0

    def explode(module, args, output):
        nonlocal calls
        calls += 1
        if calls > (1 if method in ("scorecam", "ablationcam") else 0):
            raise RuntimeError("boom")

    handle = model.fc.register_forward_hook(explode)
    before = state(model)
    with pytest.raises(RuntimeError, match="boom"):
        Explainer(model, method=method)(x)
    assert state(model) == before
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert torch.is_grad_enabled()
    handle.remove()


def test_a_models_own_no_grad_around_the_layer(make, images):
    """A frozen backbone run under no_grad inside the model's forward."""
    inner = make["vit"]()

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            with torch.no_grad():
                tokens = self.inner.forward_features(x)
            return self.inner.forward_head(tokens)

    x = images(2, 64, 64)
    assert torch.equal(Explainer(Frozen())(x).maps, Explainer(inner)(x).maps)

    class Inference(Frozen):
        @torch.inference_mode()
        def forward(self, x):
            return self.inner(x)

    with pytest.raises(UserError, match="turns inference mode on"):
        Explainer(Inference())(x)


def test_gradient_checkpointing_rests(make, images):
    model, x = make["vit"](), images(1, 64, 64)
    expected = Explainer(model)(x).maps
    model.set_grad_checkpointing(True)
    assert torch.equal(Explainer(model)(x).maps, expected)
    assert model.grad_checkpointing


def test_compiled_models_are_explained_uncompiled(make, images):
    """A compiled module (the attribute is torch's) runs none of its layers' hooks."""
    model, x = make["vit"](), images(1, 64, 64)

    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod = model

        def forward(self, x):
            raise AssertionError("the compiled path must not run")

    assert torch.equal(Explainer(Compiled())(x).maps, Explainer(model)(x).maps)


def test_in_place_layers_above_do_not_touch_the_activations(images):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3, 4, 1), nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(self.conv(x).relu_().mean((2, 3)))

    model, x = InPlace(), images(2)
    with Capture(model, [find_layer(model, "conv")]) as capture:
        logits = capture.forward(x)
        (gradient,) = capture.vjp(logits, torch.eye(3)[None, :2])[0]
    assert torch.equal(capture.maps[0], model.conv(x))
    assert (capture.maps[0] < 0).any()
    assert torch.equal(gradient != 0, capture.maps[0] > 0)
    with Capture(model, [find_layer(model, "conv")], gradient=False) as capture:
        capture.forward(x)
    assert torch.equal(capture.maps[0], model.conv(x))


def test_quiet_restores_module_by_module(make):
    model = make["mlp"]()
    model.hidden.train()
    model.fc.weight.requires_grad_(False)
    with quiet(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert [n for n, m in model.named_modules() if m.training] == ["hidden"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["fc.weight"]
