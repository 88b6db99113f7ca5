"""Rollout and CLS attention: the same attention maps from every library's way of computing them."""

from __future__ import annotations

import pytest
import torch
from finecam.attention import attention_map, rollout, self_attentions
from finecam.explainer import Explainer
from torch import nn
from vfm_core.errors import UserError


def by_hand(model, x):
    """Attention of a timm ViT from its own weights."""
    maps = []
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    for block in model.blocks:
        n, d, heads = tokens.shape[1], tokens.shape[2], block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(tokens)).view(len(x), n, 3, heads, d // heads)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        maps.append((q @ k.mT / (d // heads) ** 0.5).softmax(-1).mean(1))
        tokens = block(tokens)
    return maps


@torch.no_grad()
def test_fused_and_explicit_attention_agree_with_the_weights(make, images):
    model, x = make["vit"](), images(2, 64, 64)
    expected = by_hand(model, x)
    logits, fused = self_attentions(model, x)
    assert torch.allclose(logits, model(x), atol=1e-5)
    for block in model.blocks:
        block.attn.fused_attn = False
    _, explicit = self_attentions(model, x)
    assert len(fused) == len(explicit) == 3
    for a, b, c in zip(fused, explicit, expected):
        assert torch.allclose(a, c, atol=1e-5) and torch.allclose(b, c, atol=1e-5)


@torch.no_grad()
def test_rollout_by_hand(make, images):
    maps = by_hand(make["vit"](), images(1, 64, 64))
    total = torch.eye(17)
    for a in maps:
        step = 0.5 * a[0] + 0.5 * torch.eye(17)
        total = (step / step.sum(1, keepdim=True)) @ total
    assert torch.allclose(rollout(maps)[0], total, atol=1e-6)
    assert torch.allclose(rollout(maps).sum(-1), torch.ones(1, 17), atol=1e-5)


@torch.no_grad()
def test_maps_are_the_cls_row(make, images):
    model, x = make["vit"](), images(2, 64, 64)
    maps = by_hand(model, x)
    found = Explainer(model, method="cls_attention")(x, size=None, normalize=None)
    assert torch.allclose(found.maps, maps[-1][:, 0, 1:].view(2, 4, 4), atol=1e-5)
    assert found.references.shape == (2, 0) and found.layer == "attention"
    found = Explainer(model, method="rollout")(x, size=None, normalize=None)
    assert torch.allclose(found.maps, rollout(maps)[:, 0, 1:].view(2, 4, 4), atol=1e-5)


@torch.no_grad()
def test_registers_and_missing_cls(images):
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    x = images(2, 64, 64)
    registers = VisionTransformer(**shape, reg_tokens=4).eval()
    assert tuple(attention_map(registers, x, "cls_attention")[1].shape) == (2, 4, 4)
    without = VisionTransformer(**shape, reg_tokens=4, class_token=False, global_pool="avg").eval()
    total = rollout(self_attentions(without, x)[1])
    assert torch.allclose(attention_map(without, x, "rollout")[1].flatten(1), total[:, 4:, 4:].mean(1), atol=1e-6)
    for model in (without, VisionTransformer(**shape, class_token=False, global_pool="avg").eval()):
        with pytest.raises(UserError, match="needs a CLS token"):
            attention_map(model, x, "cls_attention")


def test_other_libraries(built):
    """Either a map of the grid, or a clear refusal where attention is windowed or absent."""
    architecture, model, x = built
    name = type(model).__name__  # open_clip's ResNet pools by attention, so it has a map
    if any(word in name for word in ("Swin", "ResNet", "ConvNeXt", "ConvNext", "EfficientNet", "DenseNet")):
        with pytest.raises(UserError, match="attention maps need a transformer"):
            Explainer(model, method="rollout")(x)
        return
    result = Explainer(model, method="rollout")(x, size=None)
    assert tuple(result.maps.shape) == (2, *architecture.grid)
    assert torch.allclose(result.logits, model(x).logits if hasattr(model(x), "logits") else model(x), atol=1e-4)


def test_references_are_refused(make, images):
    for method in ("rollout", "cls_attention", "eigencam", "randomcam"):
        explain = Explainer(make["vit"](), method=method)
        with pytest.raises(UserError, match=f"{method} depends on no class, so references cannot change it"):
            explain(images(1, 64, 64), references=[1, 2])
        swept = explain.sweep(images(1, 64, 64), (0, 0.6))
        assert torch.equal(swept.maps[:, 0], swept.maps[:, 1])


def test_modes_are_restored(make, images):
    model = make["vit"](proj_drop_rate=0.5).train()
    x = images(1, 64, 64)
    first, second = (Explainer(model, method="rollout")(x).maps for _ in range(2))
    assert torch.equal(first, second) and model.training and all(isinstance(m, nn.Module) for m in model.blocks)
