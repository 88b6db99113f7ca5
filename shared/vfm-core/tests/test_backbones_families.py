"""Every model family, instantiated small with random weights: the split forward equals the native one exactly."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from vfm_core.backbones import Backbone, Tokens, load_backbone, wrap
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

timm = pytest.importorskip("timm")


@dataclasses.dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    tokens: Callable[[nn.Module, Tensor], Tensor]  # native tokens after the final norm
    pooled: Callable[[nn.Module, Tensor], Tensor]  # native embedding
    prefix: int
    size: int = 32
    final_norm: str = "tokens"
    free: bool = False  # takes other image sizes
    heads: int = 2


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere: default init leaves layer scales at 1e-5 and tokens at 0, which hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator)
        p.data = (1 + 0.2 * noise) if name.endswith("weight") and p.ndim == 1 else 0.15 * noise
    return model.eval()


def timm_model(name: str, **kwargs: object) -> nn.Module:
    small = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
    return timm.create_model(name, **{**small, **kwargs})


def timm_case(name: str, prefix: int, norm: str = "tokens", free: bool = False, **kwargs: object) -> Case:
    return Case(
        lambda: timm_model(name, **kwargs),
        lambda m, x: m.forward_features(x),
        lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
        prefix,
        final_norm=norm,
        free=free,
    )


TIMM = {
    "vit": timm_case("vit_tiny_patch16_224", 1),
    "vit-dynamic": timm_case("vit_tiny_patch16_224", 1, free=True, dynamic_img_size=True),
    "vit-avg": timm_case("vit_tiny_patch16_224", 1, "pooled", global_pool="avg"),
    "vit-no-norm": timm_case("vit_tiny_patch16_224", 1, "none", final_norm=False),
    "dinov2": timm_case("vit_small_patch14_dinov2", 1),
    "dinov2-reg4": timm_case("vit_small_patch14_reg4_dinov2", 5),
    "clip": timm_case("vit_base_patch32_clip_224", 1),
    "siglip": timm_case("vit_base_patch16_siglip_224", 0),
    "deit3": timm_case("deit3_small_patch16_224", 1),
    "deit-distilled": timm_case("deit_tiny_distilled_patch16_224", 2),
    "dinov3": timm_case("vit_small_patch16_dinov3", 5, free=True),
    "eva02": timm_case("eva02_tiny_patch14_224", 1, "pooled"),
    "eva-rope-mixed": timm_case("vit_small_patch16_rope_mixed_224", 1),
    "eva-pe": timm_case("vit_pe_core_tiny_patch16_384", 1),
    "beit": timm_case("beit_base_patch16_224", 1, "pooled"),
    "beitv2": timm_case("beitv2_base_patch16_224", 1, "pooled"),
    "beit-shared": timm_case(
        "beit_base_patch16_224", 1, use_rel_pos_bias=False, use_shared_rel_pos_bias=True, use_abs_pos_emb=True,
        global_pool="token",
    ),
}  # fmt: skip


def open_clip_model(timm_name: str | None = None, **vision: object) -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    if timm_name is not None:
        cfg = {"timm_model_name": timm_name, "image_size": 160, "timm_pool": "", "timm_proj": "linear"} | vision
        return open_clip.model.CustomTextCLIP(16, cfg, text)
    cfg = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8} | vision
    return open_clip.CLIP(16, cfg, text)


def open_clip_tokens(model: nn.Module, x: Tensor) -> Tensor:
    return model.visual.ln_post(model.visual.transformer(model.visual._embeds(x)))


def open_clip_case(tokens: Callable = open_clip_tokens, prefix: int = 1, size: int = 32, **kwargs: object) -> Case:
    norm = str(kwargs.pop("norm", "tokens"))
    return Case(
        lambda: open_clip_model(**kwargs), tokens, lambda m, x: m.encode_image(x), prefix, size, final_norm=norm
    )


def raw_open_clip(model: nn.Module, x: Tensor) -> Tensor:
    return model.visual.transformer(model.visual._embeds(x))


OPEN_CLIP = {
    "vit": open_clip_case(),
    "vit-avg": open_clip_case(pool_type="avg"),
    "vit-norm-after-pool": open_clip_case(raw_open_clip, pool_type="avg", final_ln_after_pool=True, norm="pooled"),
    "vit-attn-pool": open_clip_case(
        raw_open_clip, attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2, norm="pooled"
    ),
    "timm-vit": open_clip_case(lambda m, x: m.visual.trunk.forward_features(x), size=160, timm_name="test_vit"),
    "timm-map": dataclasses.replace(
        open_clip_case(
            lambda m, x: m.visual.trunk.forward_features(x),
            size=160,
            timm_name="test_vit3",
            timm_pool="map",
            timm_proj="",
        ),
        heads=3,
    ),
}


def hf_config(name: str, **kwargs: object) -> object:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return getattr(transformers, name)(**{**small, "intermediate_size": 64, **kwargs})


def hf_model(name: str, config: str, **kwargs: object) -> nn.Module:
    cfg = hf_config(config, **kwargs)  # first: it skips where transformers is absent
    import transformers

    return getattr(transformers, name)(cfg)


def hf_case(name: str, config: str, prefix: int, tokens: Callable | None = None, **kwargs: object) -> Case:
    return Case(
        lambda: hf_model(name, config, **kwargs),
        tokens or (lambda m, x: m(x).last_hidden_state),
        lambda m, x: m(x).pooler_output,
        prefix,
        free=True,
    )


def mae_tokens(model: nn.Module, x: Tensor) -> Tensor:
    """The native forward with ordered noise; the model is built with mask ratio 0.75, which the call overrides."""
    ratio, model.config.mask_ratio = model.config.mask_ratio, 0.0
    count = (x.shape[2] // 8) * (x.shape[3] // 8)
    try:
        return model(x, noise=torch.arange(count).float().expand(len(x), -1)).last_hidden_state
    finally:
        model.config.mask_ratio = ratio


HF = {
    "clip": hf_case(
        "CLIPVisionModel", "CLIPVisionConfig", 1, lambda m, x: m.post_layernorm(m(x).last_hidden_state)
    ),
    "siglip": hf_case("SiglipVisionModel", "SiglipVisionConfig", 0),
    "dinov2": hf_case("Dinov2Model", "Dinov2Config", 1),
    "dinov2-reg": hf_case("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", 5),
    "dinov3": hf_case("DINOv3ViTModel", "DINOv3ViTConfig", 5, num_register_tokens=4),
    "vit": hf_case("ViTModel", "ViTConfig", 1),
    "mae": dataclasses.replace(
        hf_case("ViTMAEModel", "ViTMAEConfig", 1, mae_tokens), pooled=lambda m, x: mae_tokens(m, x)[:, 0]
    ),
}  # fmt: skip
CASES = {
    **{f"timm-{k}": v for k, v in TIMM.items()},
    **{f"open_clip-{k}": v for k, v in OPEN_CLIP.items()},
    **{f"hf-{k}": v for k, v in HF.items()},
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
FREE = {k: v for k, v in CASES.items() if v.free}


def images(size: int | tuple[int, int], n: int = 2, seed: int = 1) -> Tensor:
    h, w = (size, size) if isinstance(size, int) else size
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


def make(case: Case) -> Backbone:
    preprocess = Preprocess(size=(case.size, case.size))
    return wrap(shake(case.build()), preprocess=preprocess)


@EVERY
@torch.no_grad()
def test_split_forward_equals_native_at_every_cut(case: Case) -> None:
    b = make(case)
    x = images(case.size)
    want = case.tokens(b.model, x)
    n = b.depth
    for cut in (0, 1, n // 2, n):
        t = b.run(b.run(b.embed(x), 0, cut), cut, n)
        assert torch.equal(b.norm(t).x, want)
    assert torch.equal(b.pool(t), case.pooled(b.model, x))
    features = b(x)
    assert torch.equal(features.tokens, want)
    assert torch.equal(features.pooled, case.pooled(b.model, x))
    assert torch.equal(torch.cat([features.prefix_tokens, features.patch_tokens], 1), want)
    assert features.grid == b.grid_size == (case.size // b.patch_size[0],) * 2


@EVERY
@torch.no_grad()
def test_facts_and_names(case: Case) -> None:
    b = make(case)
    t = b.embed(images(case.size))
    assert b.num_prefix_tokens == case.prefix == t.prefix == int(b.has_cls) + b.num_registers
    assert b.final_norm == case.final_norm
    assert t.x.shape == (2, case.prefix + t.grid[0] * t.grid[1], b.embed_dim)
    assert b.image_size == (case.size, case.size) and b.transform is b.preprocess
    assert len(b.block_names) == b.depth == len(b.blocks) >= 2
    for i, name in enumerate(b.block_names):
        assert b.model.get_submodule(name) is b.blocks[i]
    assert "orm" in type(b.first_norm(-1)).__name__
    assert b.num_heads == case.heads and "ttention" in type(b.attention(0)).__name__
    assert not any(p.requires_grad for p in b.model.parameters())
    assert not b.model.training


@EVERY
@torch.no_grad()
def test_first_norm_is_what_the_block_runs_first(case: Case) -> None:
    b = make(case)
    seen: list[nn.Module] = []
    block = b.blocks[0]
    handles = [
        m.register_forward_hook(lambda m, *_: seen.append(m)) for m in block.modules() if isinstance(m, nn.LayerNorm)
    ]
    b.run(b.embed(images(case.size)), 0, 1)
    for handle in handles:
        handle.remove()
    assert seen[0] is b.first_norm(0)


@EVERY
@torch.no_grad()
def test_features_stop_early_and_equal_separate_runs(case: Case) -> None:
    b = make(case)
    x = images(case.size)
    calls = [0] * b.depth

    def count(i: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[i] += 1

        return hook

    handles = [block.register_forward_pre_hook(count(i)) for i, block in enumerate(b.blocks)]
    found = b.features(x, at=[2, 0])
    for handle in handles:
        handle.remove()
    assert calls == [1, 1] + [0] * (b.depth - 2)
    assert list(found) == [0, 2]
    for k, t in found.items():
        assert torch.equal(t.x, b.run(b.embed(x), 0, k).x)


@torch.no_grad()
def test_features_use_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks misfire under torch.compile and activation checkpointing."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a hook was registered")

    b = make(TIMM["vit"])
    for name in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        monkeypatch.setattr(nn.Module, name, refuse)
    assert sorted(b.features(images(32), at=[1, 3])) == [1, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_split_forward_equals_native_on_the_gpu(case: Case) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    b = make(case).cuda()
    x = images(case.size).cuda()
    out = b(x)
    torch.testing.assert_close(out.tokens, case.tokens(b.model, x), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.pooled, case.pooled(b.model, x), rtol=0, atol=1e-5)


@EVERY
def test_gradients_flow_through_frozen_blocks(case: Case) -> None:
    b = make(case)
    t = b.embed(images(case.size))
    x = t.x.detach().requires_grad_()
    out = b.run(Tokens(x, t.grid, t.prefix, t.ctx))
    (b.norm(out).x * torch.arange(b.embed_dim)).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0 and torch.isfinite(x.grad).all()
    assert all(p.grad is None for p in b.model.parameters())


@EVERY
@torch.no_grad()
def test_train_mode_does_not_reach_a_frozen_model(case: Case) -> None:
    b = make(case)
    x = images(case.size)
    want = b(x).tokens
    b.train()
    assert b.training and not b.model.training
    assert torch.equal(b(x).tokens, want)


@EVERY
@torch.no_grad()
def test_tokens_from_elsewhere_get_their_own_context(case: Case) -> None:
    """A context made for the grid equals the one that embedding an image of that grid makes."""
    b = make(case)
    t = b.embed(images(case.size))
    foreign = Tokens(t.x, t.grid, t.prefix, {"of another family": 1})
    assert torch.equal(b.run(foreign).x, b.run(t).x)
    explicit = Tokens(t.x, t.grid, t.prefix, b.context(t.grid, t.x.device, t.x.dtype))
    assert torch.equal(b.run(explicit).x, b.run(t).x)


@EVERY
@torch.no_grad()
def test_bfloat16_split_equals_native(case: Case) -> None:
    b = make(case)
    b.model.to(torch.bfloat16)
    x = images(case.size)
    out = b(x)  # float32 images are cast to the dtype of the patch embedding
    assert out.tokens.dtype == out.pooled.dtype == torch.bfloat16
    assert torch.equal(out.tokens, case.tokens(b.model, x.bfloat16()))
    assert torch.equal(out.pooled, case.pooled(b.model, x.bfloat16()))


@EVERY
def test_sizes_the_model_cannot_take_are_refused(case: Case) -> None:
    b = make(case)
    with pytest.raises(UserError, match="image size must be"):
        b.embed(images(case.size + 3))
    if not b.adapter.flexible:
        with pytest.raises(UserError, match=f"exactly {case.size}x{case.size}"):
            b.embed(images(case.size * 2))
    with pytest.raises(UserError, match=r"\(B, 3, H, W\)"):
        b.embed(torch.zeros(2, 1, case.size, case.size))


@pytest.mark.parametrize("case", FREE.values(), ids=FREE.keys())
@pytest.mark.parametrize("size", [(48, 48), (24, 40)])
@torch.no_grad()
def test_other_image_sizes(case: Case, size: tuple[int, int]) -> None:
    b = make(case)
    x = images(size)
    out = b(x)
    assert out.grid == (size[0] // 8, size[1] // 8)
    kwargs = {"interpolate_pos_encoding": True}
    if type(b.model).__name__ in ("CLIPVisionModel", "SiglipVisionModel", "ViTModel"):
        native = b.model(x, **kwargs).last_hidden_state
        native = b.model.post_layernorm(native) if "CLIP" in type(b.model).__name__ else native
    elif type(b.model).__name__ == "ViTMAEModel":
        b.model.config.mask_ratio = 0.0
        noise = torch.arange(out.grid[0] * out.grid[1]).float().expand(2, -1)
        native = b.model(x, noise=noise, **kwargs).last_hidden_state
    else:
        native = case.tokens(b.model, x)
    assert torch.equal(out.tokens, native)
    t = b.embed(x)
    bare = Tokens(t.x, t.grid, t.prefix)
    assert torch.equal(b.run(bare).x, b.run(t).x)


@EVERY
@torch.no_grad()
def test_pooling_by_hand(case: Case) -> None:
    b = make(case)
    raw = b.run(b.embed(images(case.size)))
    normed = b.norm(raw)
    assert b.pool(raw, "mean").shape == (2, b.embed_dim)
    if b.has_cls:
        cls = b.pool(raw, "cls")
        if b.final_norm == "tokens":
            assert torch.equal(cls, normed.x[:, 0])
    else:
        with pytest.raises(UserError, match="no CLS token"):
            b.pool(raw, "cls")
    if b.final_norm == "tokens":
        assert torch.equal(b.pool(raw, "mean"), normed.patches.mean(1))
    with pytest.raises(UserError, match="unknown pooling"):
        b.pool(raw, "max")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["timm-vit-avg", "timm-eva02", "timm-beitv2"])
@torch.no_grad()
def test_norm_behind_average_pooling(name: str) -> None:
    """timm's global_pool="avg" moves the LayerNorm behind the pooling; "mean" must apply it and equal "native"."""
    b = make(CASES[name])
    raw = b.run(b.embed(images(32)))
    assert b.norm(raw).x is raw.x or torch.equal(b.norm(raw).x, raw.x)
    assert torch.equal(b.pool(raw, "mean"), b.pool(raw))
    assert abs(float(b.pool(raw, "cls").mean())) < 10 * float(raw.x[:, 0].abs().mean())


@EVERY
@torch.no_grad()
def test_fingerprint_follows_content(case: Case) -> None:
    b, same = make(case), make(case)
    assert b.fingerprint() == same.fingerprint() and len(b.fingerprint()) == 64
    parameter = next(b.blocks[1].parameters())
    parameter.data.view(-1)[0] += 1e-3
    assert b.fingerprint() != same.fingerprint()


def test_fingerprint_sees_what_weights_do_not_say() -> None:
    from vfm_core.backbones import fingerprint

    def prints(**kwargs: object) -> str:
        return wrap(shake(timm_model("vit_tiny_patch16_224", **kwargs))).fingerprint()

    base = prints()
    assert prints(act_layer="quick_gelu") != base
    assert prints(num_heads=4) != base
    assert fingerprint(nn.Linear(2, 2).double()) != fingerprint(nn.Linear(2, 2))
    assert len(fingerprint(nn.ReLU(), 1)) == 64 and fingerprint(nn.ReLU(), 1) != fingerprint(nn.ReLU(), 2)
    odd = nn.Module()
    for i, kind in enumerate((torch.bfloat16, torch.bool, torch.int64, torch.complex64, torch.float64)):
        odd.register_buffer(f"b{i}", torch.ones(2, 3).to(kind).T, persistent=False)
        before = fingerprint(odd)
        getattr(odd, f"b{i}")[0, 0] = 0
        assert fingerprint(odd) != before
    assert len(fingerprint(nn.ParameterList([torch.tensor(1.0), torch.zeros(0, 3)]))) == 64


@pytest.mark.parametrize("name", ["timm-vit", "timm-dinov3", "hf-vit", "hf-dinov3", "open_clip-vit"])
@torch.no_grad()
def test_attention_implementation_switch(name: str) -> None:
    b = make(CASES[name])
    x = images(32)
    want = b(x).tokens
    b.attention_impl("eager")
    assert torch.allclose(b(x).tokens, want, atol=1e-4)
    if name.startswith("timm"):
        assert not b.attention(0).fused_attn
    if name.startswith("hf"):
        assert b.model(x, output_attentions=True).attentions[0].shape[1] == 2
    b.attention_impl("sdpa")
    assert torch.equal(b(x).tokens, want)
    with pytest.raises(UserError, match="attention implementation"):
        b.attention_impl("flash")


@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-avg", "timm-dinov3", "timm-beit", "timm-deit-distilled"])
@torch.no_grad()
def test_timm_head_logits_equal_native(name: str) -> None:
    b = make(CASES[name])
    x = images(32)
    logits = b.head_logits(b.run(b.embed(x)))
    assert logits is not None and torch.equal(logits, b.model(x)) and logits.shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "config", "extra"),
    [
        ("ViTForImageClassification", "ViTConfig", {}),
        ("Dinov2ForImageClassification", "Dinov2Config", {}),
        ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {}),
    ],
)
@torch.no_grad()
def test_hf_head_logits_equal_native(name: str, config: str, extra: dict) -> None:
    b = wrap(shake(hf_model(name, config, num_labels=7, **extra)))
    x = images(32)
    raw = b.run(b.embed(x))
    logits = b.head_logits(raw)
    assert logits is not None and torch.equal(logits, b.model(x).logits)
    assert b.block_names[0].split(".")[0] in ("vit", "dinov2", "dinov2_with_registers")


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
@torch.no_grad()
def test_hf_dual_tower_models(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    vision = hf_config(f"{kind}VisionConfig").to_dict()
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text, num_labels=4)
    x = images(32)
    dual = shake(getattr(transformers, f"{kind}Model")(config))
    b = wrap(dual)
    assert b.block_names[0] == "vision_model.encoder.layers.0"
    assert torch.equal(b(x).pooled, dual.get_image_features(x).pooler_output)
    classifier = shake(getattr(transformers, f"{kind}ForImageClassification")(config))
    b = wrap(classifier)
    assert torch.equal(b.head_logits(b.run(b.embed(x))), classifier(x).logits)


@torch.no_grad()
def test_transformers_hidden_states_agree_at_every_depth() -> None:
    for name, case in HF.items():
        b = make(case)
        x = images(case.size)
        if name == "mae":
            continue
        states = b.model(x, output_hidden_states=True).hidden_states
        found = b.features(x, at=range(b.depth + 1))
        assert len(states) == b.depth + 1
        for k in range(b.depth + 1):
            assert torch.equal(found[k].x, states[k]), (name, k)


@torch.no_grad()
def test_timm_forward_intermediates_agree() -> None:
    for name in ("vit", "dinov2-reg4", "dinov3", "beitv2"):
        b = make(TIMM[name])
        x = images(32)
        maps = b.model.forward_intermediates(x, indices=[0, 1, 2], norm=False, intermediates_only=True)
        for k in (1, 2, 3):
            assert torch.equal(b.features(x, at=[k])[k].map(), maps[k - 1])


@torch.no_grad()
def test_mae_keeps_patches_in_order_and_restores_the_mask_ratio() -> None:
    """transformers' MAE permutes patches even with mask ratio 0; patch i of the image must be token i."""
    b = make(HF["mae"])
    assert b.model.config.mask_ratio == 0.75
    x = images(32, 1)
    other = x.clone()
    other[:, :, 8:16, 16:24] += 1.0  # patch (1, 2) of a 4 x 4 grid
    changed = (b.embed(x).patches - b.embed(other).patches).abs().sum(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 2]
    assert b.model.config.mask_ratio == 0.75
    with pytest.raises(AttributeError):
        b.adapter.embed(None)  # type: ignore[arg-type]
    assert b.model.config.mask_ratio == 0.75


@EVERY
@torch.no_grad()
def test_patch_tokens_are_row_major(case: Case) -> None:
    """Changing one image patch changes exactly that depth-0 token, and .map() puts it where it was in the image."""
    b = make(case)
    x = images(case.size, 1)
    p = b.patch_size[0]
    other = x.clone()
    other[:, :, p : 2 * p, 2 * p : 3 * p] += 1.0
    delta = (b.embed(x).map() - b.embed(other).map()).abs().sum(1)[0] > 1e-6
    assert delta.nonzero().tolist() == [[1, 2]]
    assert torch.equal(b.embed(x).prefixes, b.embed(other).prefixes)


@torch.no_grad()
def test_dinov3_random_rescaling_stays_off() -> None:
    """transformers' DINOv3 rescales rotary coordinates at random in train mode, even without dropout."""
    case = HF["dinov3"]
    x = images(32)
    frozen = make(case).train()
    assert torch.equal(frozen(x).tokens, frozen(x).tokens)
    free = wrap(shake(case.build()), trainable=True).train()
    assert free.model.training and all(p.requires_grad for p in free.model.parameters())
    assert not torch.equal(free(x).tokens, free(x).tokens)
    free.eval()
    assert torch.equal(free(x).tokens, frozen(x).tokens)


@torch.no_grad()
def test_open_clip_sequence_first_transformer() -> None:
    model = open_clip_model()
    from open_clip.transformer import Transformer

    old = model.visual.transformer
    model.visual.transformer = Transformer(old.width, old.layers, 2, batch_first=False)
    b = wrap(shake(model))
    x = images(32)
    assert torch.equal(b(x).pooled, model.encode_image(x))


@torch.no_grad()
def test_blocks_from_transformers_4_returned_tuples() -> None:
    b = make(HF["vit"])
    x = images(32)
    want = b(x).tokens

    class Old(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: object, **kwargs: object) -> tuple[Tensor]:
            return (self.block(*args, **kwargs),)

    b.model.layers[1] = Old(b.model.layers[1])
    assert torch.equal(b(x).tokens, want)


def test_siglip_without_head_pools_the_mean() -> None:
    b = wrap(shake(hf_model("SiglipVisionModel", "SiglipVisionConfig", vision_use_head=False)))
    with torch.no_grad():
        raw = b.run(b.embed(images(32)))
        assert torch.equal(b.pool(raw), b.pool(raw, "mean"))


@torch.no_grad()
def test_timm_without_pooling_gives_cls() -> None:
    b = wrap(shake(timm_model("vit_tiny_patch16_224", global_pool="", num_classes=0)))
    raw = b.run(b.embed(images(32)))
    assert torch.equal(b.pool(raw), b.pool(raw, "cls")) and b.head_logits(raw) is None


@torch.no_grad()
def test_timm_padding_of_odd_sizes() -> None:
    b = wrap(shake(timm_model("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True)))
    x = images((30, 37))
    assert b.embed(x).grid == (4, 5)
    assert torch.equal(b(x).tokens, b.model.forward_features(x))


def test_tokens_check_their_shape() -> None:
    x = torch.zeros(2, 17, 4)
    t = Tokens(x, (4, 4), 1)
    assert t.patches.shape == (2, 16, 4) and t.prefixes.shape == (2, 1, 4) and t.map().shape == (2, 4, 4, 4)
    for bad in ((x, (4, 4), 0), (x, (4, 5), 1), (x[0], (4, 4), 1), (x, (6, 3), -1)):
        with pytest.raises(UserError, match="prefix"):
            Tokens(*bad)


def test_ranges_are_checked() -> None:
    b = make(TIMM["vit"])
    t = b.embed(images(32))
    for start, stop in ((2, 1), (0, 4), (-1, 2)):
        with pytest.raises(UserError, match="start <= stop"):
            b.run(t, start, stop)
    for at in ([], [-1], [4]):
        with pytest.raises(UserError, match=r"0\.\.3"):
            b.features(images(32), at=at)


def test_fixed_position_tables_refuse_other_grids() -> None:
    for name in ("eva02", "beitv2"):
        b = make(TIMM[name])
        with pytest.raises(UserError, match="grid"):
            b.context((3, 3), torch.device("cpu"), torch.float32)


def test_preprocess_follows_what_the_model_takes() -> None:
    fixed = wrap(timm_model("vit_tiny_patch16_224"), preprocess=Preprocess(size=(224, 224)))
    assert fixed.preprocess.size == fixed.image_size == (32, 32)
    flexible = wrap(hf_model("ViTModel", "ViTConfig"), preprocess=Preprocess(size=(60, 45)))
    assert flexible.preprocess.size == (56, 40) and flexible.grid_size == (7, 5)


def test_towers_without_token_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="ModifiedResNet has no token blocks"):
        wrap(open_clip_model(layers=[1, 1, 1, 1], width=8, head_width=8, image_size=64))
    with pytest.raises(UserError, match="ConvNeXt has no token blocks"):
        wrap(open_clip_model("test_convnext", timm_pool="avg"))
    with pytest.raises(UserError, match=r"ResNet has no token blocks.*classifier"):
        wrap(timm.create_model("test_resnet"))
    with pytest.raises(UserError, match="NaFlexVit has a patch grid that varies"):
        wrap(timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=32, num_heads=2))
    with pytest.raises(UserError, match="Linear has no token blocks"):
        wrap(nn.Linear(2, 2))


def test_backbones_are_copied_and_stored_whole() -> None:
    import copy

    b = make(TIMM["dinov3"])
    x = images(32)
    twin = copy.deepcopy(b)
    twin.model.blocks[0].norm1.weight.data.zero_()
    assert not torch.equal(twin(x).tokens, b(x).tokens)
    buffer = io.BytesIO()
    torch.save(b.state_dict(), buffer)
    assert all(key.startswith("model.") for key in b.state_dict())


@torch.no_grad()
def test_lora_style_replacement_inside_a_block_is_seen() -> None:
    b = make(TIMM["vit"])
    x = images(32)
    before = b(x).tokens
    b.blocks[1].mlp.fc2 = nn.Linear(128, 32)
    assert not torch.equal(b(x).tokens, before)
    b.model.blocks = nn.Sequential(*list(b.model.blocks)[:2])
    assert b.depth == 2 and torch.equal(b(x).tokens, b.model.forward_features(x))


def test_building_never_touches_the_global_generator() -> None:
    state = torch.get_rng_state()
    load_backbone("random:timm:test_vit")
    assert torch.equal(torch.get_rng_state(), state)
