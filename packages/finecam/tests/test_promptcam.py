"""PromptCAM: its logits, maps and gradients equal a naive full forward, for every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from finecam.prompt_attention import PreNormLayer
from finecam.prompt_opaque import OpaqueLayer
from finecam.promptcam import PromptCAM
from torch import Tensor, nn
from vfm_core.backbones import wrap
from vfm_core.errors import UserError

torch.set_num_threads(1)


def assert_close(actual: Tensor, expected: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-9)


def vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 0}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return VisionTransformer(**(sizes | options))


def images(size: int = 32, n: int = 2) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def prompt_cam(model: nn.Module, classes: int = 5, **options: Any) -> PromptCAM:
    """Double precision, and weights shaken so that no part (LayerScale, biases) is idle."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return PromptCAM(wrap(model), classes, **options).double()


def naive(model: PromptCAM, x: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt-CAM written out for a timm ViT: full attention over all tokens in every layer."""
    net: Any = model.backbone.model
    e = net.norm_pre(net._pos_embed(net.patch_embed(x)))
    p = e[:, :0]
    for i, block in enumerate(net.blocks):
        if i >= model.frozen_depth:
            if i < model.entry_layer - 1:
                p = model.agnostic[i - model.frozen_depth].expand(len(x), -1, -1)
            elif i == model.entry_layer - 1:
                p = model.prompts.expand(len(x), -1, -1)
        h = torch.cat([p, e], dim=1)
        b, t, d = h.shape
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(h)).view(b, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        scores = q @ k.transpose(-1, -2) / (d // heads) ** 0.5
        if i == len(net.blocks) - 1 and not model.prompt_self_attention:
            scores[..., : model.num_classes] = float("-inf")
        alpha = scores.softmax(-1)
        h = h + block.ls1(block.attn.proj((alpha @ v).transpose(1, 2).reshape(b, t, d)))
        h = h + block.ls2(block.mlp(block.norm2(h)))
        p, e = h[:, : p.shape[1]], h[:, p.shape[1] :]
    s = model.head(net.fc_norm(net.norm(p)))[..., 0]
    c = model.num_classes
    return s, alpha[:, :, :c, c + net.num_prefix_tokens :]


VARIANTS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": {"entry_layer": 1},
    "interpolated": {"entry_layer": 3},
    "last layer only": {"prompt_layers": 1},
    "last two layers": {"prompt_layers": 2},
    "few agnostic": {"agnostic_prompts": 2},
    "no agnostic": {"agnostic_prompts": 0},
    "entry and layers": {"entry_layer": 3, "prompt_layers": 3, "agnostic_prompts": 1},
    "chunked": {"class_chunk": 2},
    "no self-attention": {"prompt_self_attention": False},
    "no self-attention, shallow, chunked": {"prompt_self_attention": False, "entry_layer": 1, "class_chunk": 3},
    "checkpointing": {"checkpointing": True, "entry_layer": 2},
}


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "kind",
    [{}, {"reg_tokens": 4, "no_embed_class": True, "qk_norm": True, "init_values": 0.5}, {"global_pool": "avg"}],
    ids=["plain", "registers", "pooled norm"],
)
@pytest.mark.parametrize("layer", [PreNormLayer, OpaqueLayer])
def test_equals_naive_full_forward(variant: str, kind: dict[str, Any], layer: type) -> None:
    model = prompt_cam(vit(**kind), **VARIANTS[variant])
    assert isinstance(model.layer, PreNormLayer)
    model.layer = layer(model.backbone)
    x = images()
    logits, attention = model(x, return_attention=True)
    expected, alpha = naive(model, x)
    assert_close(logits, expected)
    assert_close(attention, alpha)
    assert attention.shape == (2, 3, 5, 16)
    assert torch.all(attention.sum(-1) < 1)


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["deep", "shallow", "chunked", "checkpointing"])
def test_gradients_equal_those_of_the_naive_forward(variant: str) -> None:
    model = prompt_cam(vit(), **VARIANTS[variant])
    x, labels = images(), torch.tensor([1, 4])
    found = []
    for forward in (model, lambda y: naive(model, y)[0]):
        model.zero_grad()
        nn.functional.cross_entropy(forward(x), labels).backward()
        found.append({name: p.grad.clone() for name, p in model.learned() if p.grad is not None})
    assert set(found[0]) >= {"prompts", "head.weight"}
    for name, gradient in found[0].items():
        assert name == "head.bias" or gradient.abs().max() > 0
        assert_close(gradient, found[1][name])
    assert all(p.grad is None for p in model.backbone.parameters())


# ---------------------------------------------------------------------------------------------- options and state


def test_lora_wrapped_projection_is_called_not_read() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.extra = inner, nn.Linear(inner.in_features, inner.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.extra(x)

    net = vit()
    attention: Any = net.get_submodule("blocks.3.attn")
    attention.qkv = Wrapped(attention.qkv)
    model = prompt_cam(net)
    assert_close(model(images()), naive(model, images())[0])


def test_prompts_start_uniform_within_the_published_bound() -> None:
    model = PromptCAM(wrap(vit()), 50)
    bound = (6 / (3 * 8 * 8 + 24)) ** 0.5
    for values in (model.prompts, model.agnostic):
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.98 * bound
        assert abs(float(values.detach().mean())) < 0.05 * bound
    again = PromptCAM(wrap(vit()), 50)
    assert torch.equal(model.prompts, again.prompts)
    other = PromptCAM(wrap(vit()), 50, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(model.prompts, other.prompts)


def test_only_prompts_and_scoring_vector_learn() -> None:
    model = PromptCAM(wrap(vit()), 5)
    learned = dict(model.learned())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(learned)
    assert sum(p.numel() for p in learned.values()) == 5 * 24 * 4 + 24 + 1  # C D N + D + 1
    alone = PromptCAM(wrap(vit()), 5, prompt_layers=1)
    alone(images().float()).sum().backward()
    assert all(p.grad is not None for p in alone.parameters() if p.requires_grad)  # nothing idle, as DDP demands


def test_training_mode_keeps_the_backbone_in_eval_and_drops_whole_batches_alike() -> None:
    model = PromptCAM(wrap(vit(drop_path_rate=0.5)), 5, dropout=0.5)
    model.train()
    assert model.training
    assert not any(m.training for m in model.backbone.model.modules())
    x = images(n=1).float().repeat(3, 1, 1, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = model(x)
    assert torch.equal(dropped[0], dropped[1])
    model.eval()
    assert not torch.allclose(model(x), dropped)
    model.train()
    with model.evaluating():
        assert not model.training
    assert model.training
    with pytest.raises(RuntimeError, match="inside"), model.evaluating():
        raise RuntimeError("inside")
    assert model.training


def test_construction_leaves_the_global_generator_alone() -> None:
    net = vit()
    before = torch.get_rng_state()
    PromptCAM(wrap(net), 5)
    assert torch.equal(before, torch.get_rng_state())


def test_without_self_attention_a_class_does_not_depend_on_the_others() -> None:
    model = prompt_cam(vit(), prompt_self_attention=False, prompt_layers=1)
    x = images()
    before = model(x)
    with torch.no_grad():
        model.prompts[3:] = model.prompts[3:].flip(-1)
    after = model(x)
    assert_close(after[:, :3], before[:, :3])
    model.prompt_self_attention = True
    with torch.no_grad():
        one = model(x)
        model.prompts[3:] = -model.prompts[3:]
    assert not torch.allclose(model(x)[:, :3], one[:, :3])


def test_cached_tokens_give_the_same_logits() -> None:
    model = prompt_cam(vit(reg_tokens=2), prompt_layers=2)
    x = images()
    tokens = model.frozen_tokens(x)
    assert not tokens.x.requires_grad
    assert tokens.x.shape == (2, 1 + 2 + 16, 24)
    assert torch.equal(model(tokens), model(x))
    assert torch.equal(model(model.tokens_of(tokens.x)), model(x))


def test_maps_of_chosen_classes() -> None:
    model = prompt_cam(vit())
    model.class_names = ["a", "b", "c", "d", "e"]
    x = images()
    full = model(x, return_attention=True)[1].unflatten(-1, (4, 4))
    assert_close(model.maps(x, ["d", 0]), full[:, :, [3, 0]].transpose(1, 2))
    assert_close(model.maps(x, "b")[:, 0], full[:, :, 1])
    each = model.maps(x, torch.tensor([[4], [2]]))[:, 0]
    assert_close(each, torch.stack([full[0, :, 4], full[1, :, 2]]))


def test_non_square_images() -> None:
    model = prompt_cam(vit(dynamic_img_size=True))
    x = images()[:, :, :, :24]
    assert model.maps(x, 0).shape == (2, 1, 3, 4, 3)
    assert_close(model(x), naive(model, x)[0])


def test_half_precision_backbone_with_float_prompts() -> None:
    net = vit()
    reference = PromptCAM(wrap(vit()), 5)(images().float())
    model = PromptCAM(wrap(net.bfloat16()), 5)
    assert model.prompts.dtype == torch.float32
    logits = model(images().float())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "number of classes out of range in num_classes: 1"),
        ({"entry_layer": 0}, "use 1 to 4"),
        ({"entry_layer": 5}, "use 1 to 4"),
        ({"prompt_layers": 0}, "use 1 to 4"),
        ({"entry_layer": 2, "prompt_layers": 2}, "use prompt_layers=3"),
        ({"agnostic_prompts": -1}, "use 0 or more"),
        ({"class_chunk": -1}, "use 1 or more"),
        ({"dropout": 1.0}, "use 0 <= p < 1"),
        ({"class_names": ["a", "b"]}, "need 5 different class names"),
        ({"class_names": ["a", "b", "c", "d", "d"]}, "4 different"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptCAM(wrap(vit()), **({"num_classes": 5} | options))


def test_bad_classes() -> None:
    model = PromptCAM(wrap(vit()), 3, class_names=["robin", "wren", "finch"])
    with pytest.raises(UserError, match="did you mean robin"):
        model.maps(images().float(), "robins")
    with pytest.raises(UserError, match="use 0 to 2"):
        model.maps(images().float(), 3)
