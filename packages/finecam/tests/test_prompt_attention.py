"""The last layer of every family: taken apart or watched, it equals the library's own blocks run on all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def prompt_cam(model: nn.Module, **options: Any) -> PromptCAM:
    """Double precision, and weights shaken so that no part (LayerScale, biases, tables) is idle."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return PromptCAM(wrap(model), 5, **options).double()


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=0, depth=2, **options)

    return make


def _open_clip(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from open_clip.transformer import VisionTransformer

        sizes = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "heads": 3, "mlp_ratio": 2.0}
        return VisionTransformer(**(sizes | {"output_dim": 8} | options))

    return make


def _hf(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        sizes = {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 48,
        }
        model = kind if kind.endswith("VisionModel") else f"{kind}Model"
        config = f"{kind.removesuffix('Model')}Config"
        return getattr(transformers, model)(getattr(transformers, config)(**(sizes | options)))

    return make


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "timm eva02": _timm("eva02_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=24, num_heads=3),
    "timm dinov3": _timm("vit_small_patch16_dinov3", img_size=32, patch_size=8, embed_dim=24, num_heads=3),
    "timm rope mixed": _timm("vit_base_patch16_rope_mixed_224", img_size=32, patch_size=8, embed_dim=24, num_heads=3),
    "timm beit": _timm("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=24, num_heads=3),
    "timm rope, grouped keys": lambda: _eva(attn_type="rope", num_kv_heads=1, qkv_fused=False),
    "timm eva, inner norm, query norm": lambda: _eva(scale_attn_inner=True, qk_norm=True, qkv_fused=False),
    "timm eva, bias aside": lambda: _eva(qkv_bias=True, init_values=0.2),
    "timm gate and inner norm": lambda: _vit(attn_layer=_gated(), init_values=0.2),
    "timm siglip": _timm("vit_base_patch16_siglip_224", img_size=32, patch_size=8, embed_dim=24, num_heads=3),
    "timm post-norm": lambda: _vit(block_fn=_post_norm()),
    "open_clip": _open_clip(),
    "open_clip layer scale": _open_clip(ls_init_value=0.3),
    "hf vit": _hf("ViT"),
    "hf mae": _hf("ViTMAE"),
    "hf clip": _hf("CLIPVisionModel"),
    "hf siglip": _hf("SiglipVisionModel", vision_use_head=False),
    "hf dinov2": _hf("Dinov2", mlp_ratio=2),
    "hf dinov2 registers": _hf("Dinov2WithRegisters", mlp_ratio=2, num_register_tokens=3),
    "hf dinov3": _hf("DINOv3ViT", num_register_tokens=3),
}
OPAQUE = {"timm post-norm"}


def _vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    return VisionTransformer(**(sizes | options))


def _eva(**options: Any) -> nn.Module:
    from timm.models.eva import Eva

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    return Eva(**(sizes | {"use_rot_pos_emb": True, "num_reg_tokens": 2} | options))


def _gated() -> Any:
    from timm.layers import Attention

    class Gated(Attention):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"gated": True, "scale_norm": True}))

    Gated.__module__, Gated.__name__ = Attention.__module__, "Attention"  # the class itself, with other settings
    return Gated


def _post_norm() -> type[nn.Module]:
    from timm.models.vision_transformer import ResPostBlock

    return ResPostBlock


@contextmanager
def _wide(attention: Any, extra: int) -> Iterator[None]:
    """By hand: what follows ``extra`` more leading tokens is rotated; relative biases are zero for them."""
    before = getattr(attention, "num_prefix_tokens", None)
    if before is not None:
        attention.num_prefix_tokens = before + extra
    table = getattr(attention, "relative_position_bias_table", None)
    if table is not None:
        bias = attention._get_rel_pos_bias()
        full = bias.new_zeros(1, bias.shape[1], extra + bias.shape[2], extra + bias.shape[3])
        full[:, :, extra:, extra:] = bias
        attention._get_rel_pos_bias = lambda: full
    yield
    if before is not None:
        attention.num_prefix_tokens = before
    if table is not None:
        del attention._get_rel_pos_bias


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_family_equals_whole_native_blocks(family: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        native = FAMILIES[family]()
    model = prompt_cam(native, entry_layer=2)
    backbone, x = model.backbone, images()
    assert isinstance(model.layer, OpaqueLayer if family in OPAQUE else PreNormLayer)
    assert (backbone.depth, model.agnostic.shape[0]) == (2, 1)

    tokens = backbone.embed(x)
    count, z = model.num_classes, tokens.x
    for i, prompts in enumerate([*model.agnostic, model.prompts]):
        joint = torch.cat([prompts.expand(len(x), -1, -1), z], dim=1)
        with _wide(backbone.attention(i), count):
            joint = backbone.adapter.block(i, joint, tokens.ctx)
        rows, z = joint[:, :count], joint[:, count:]
    expected = model.head(backbone.adapter.pooled_norm(backbone.adapter.norm(rows)))[..., 0]

    logits, attention = model(x, return_attention=True)
    assert_close(logits, expected)
    assert attention.shape == (2, 3, 5, tokens.grid[0] * tokens.grid[1])

    with pytest.raises(AssertionError):  # the comparison can fail: images and prompts do matter
        assert_close(model(x.flip(0)), expected)
    if hasattr(backbone.attention(0), "num_prefix_tokens"):
        assert backbone.attention(0).num_prefix_tokens == backbone.num_prefix_tokens
    assert "_get_rel_pos_bias" not in vars(backbone.attention(0))
    if family.startswith("open_clip"):  # nn.MultiheadAttention hides its attention from the watcher
        return
    opaque = prompt_cam(FAMILIES[family](), entry_layer=2)  # a twin, so that nothing is shared by accident
    opaque.load_state_dict(model.state_dict())
    opaque.layer = OpaqueLayer(opaque.backbone)
    again, watched = opaque(x, return_attention=True)
    assert_close(again, expected)
    assert_close(watched, attention)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["hf vit", "hf dinov3", "open_clip"])
def test_maps_equal_the_library_s_own_attention_weights(family: str) -> None:
    model = prompt_cam(FAMILIES[family](), prompt_layers=1)
    backbone, x = model.backbone, images()
    attention: Any = backbone.attention(1)
    _, expected = model(x, return_attention=True)
    tokens = backbone.run(backbone.embed(x), 0, 1)
    rows = backbone.first_norm(1)(torch.cat([model.prompts.expand(2, -1, -1), tokens.x], dim=1))
    if family == "open_clip":
        weights = attention(rows, rows, rows, average_attn_weights=False)[1]
    else:
        backbone.attention_impl("eager")
        rope = tokens.ctx.get("pe")
        weights = attention(rows, **({} if rope is None else {"position_embeddings": rope}))[1]
    assert_close(weights[:, :, :5, 5 + tokens.prefix :], expected, atol=1e-7)  # eager softmax is float32


def test_unreadable_attention_is_one_clear_error() -> None:
    model = _vit(block_fn=_post_norm())
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"ResPostBlock made 0 calls.*fused"):
        PromptCAM(wrap(model), 3)(images().float())
