"""Specs to models: local checkpoints of all three libraries, random models, options, classifiers, text towers."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vfm_core.backbones import families, load_backbone, load_native, wrap
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

timm = pytest.importorskip("timm")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def shake(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for _, p in sorted(model.named_parameters()):
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.eval()


def save_timm(path: Path, name: str = "vit_tiny_patch16_224", **kwargs: object) -> nn.Module:
    if name.startswith(("vit", "eva", "beit")):
        small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}
        kwargs = {**small, **kwargs}
    model = shake(timm.create_model(name, **kwargs))
    timm.models.save_for_hf(model, path, model_config={"label_names": ["ant", "bee", "cat"]}, safe_serialization="both")
    return model


def save_open_clip(path: Path, vision: dict | None = None, **cfg: object) -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    vision = vision or {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT, **cfg}
    kind = open_clip.CustomTextCLIP if cfg.get("custom_text") else open_clip.CLIP
    model = shake(kind(**{k: v for k, v in model_cfg.items() if k != "custom_text"}))
    preprocess = {"mean": HALF[0], "std": HALF[1], "interpolation": "bilinear", "resize_mode": "squash"}
    path.mkdir(parents=True, exist_ok=True)
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path / "open_clip_model.safetensors")
    return model


def hf_config(kind: str, **kwargs: object) -> object:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    values = {**small, "intermediate_size": 64, **kwargs}
    return getattr(transformers, kind)(**{k: v for k, v in values.items() if v is not None})


def save_hf(path: Path, name: str, config: str, processor: str | None = None, **kwargs: object) -> nn.Module:
    cfg = hf_config(config, **kwargs)
    import transformers

    model = shake(getattr(transformers, name)(cfg))
    model.save_pretrained(path)
    if processor:
        getattr(transformers, processor)().save_pretrained(path)
    return model


ROUND_TRIPS: dict[str, Callable[[Path], nn.Module]] = {
    "timm vit": save_timm,
    "timm dynamic reg4": lambda p: save_timm(p, "vit_small_patch14_reg4_dinov2", dynamic_img_size=True),
    "timm dinov3": lambda p: save_timm(p, "vit_small_patch16_dinov3"),
    "timm eva02": lambda p: save_timm(p, "eva02_tiny_patch14_224"),
    "timm beit": lambda p: save_timm(p, "beitv2_base_patch16_224"),
    "open_clip": save_open_clip,
    "open_clip quickgelu": lambda p: save_open_clip(p, quick_gelu=True),
    "open_clip timm tower": lambda p: save_open_clip(
        p, {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "", "timm_proj": "linear"}, custom_text=True
    ),
    "hf clip": lambda p: save_hf(p, "CLIPVisionModel", "CLIPVisionConfig"),
    "hf siglip": lambda p: save_hf(p, "SiglipVisionModel", "SiglipVisionConfig"),
    "hf dinov2": lambda p: save_hf(p, "Dinov2Model", "Dinov2Config"),
    "hf dinov2 registers": lambda p: save_hf(p, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
    "hf dinov3": lambda p: save_hf(p, "DINOv3ViTModel", "DINOv3ViTConfig"),
    "hf vit": lambda p: save_hf(p, "ViTModel", "ViTConfig"),
    "hf mae": lambda p: save_hf(p, "ViTMAEModel", "ViTMAEConfig"),
}


@pytest.mark.parametrize("save", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
@torch.no_grad()
def test_local_folder_round_trip(save: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    """A folder written by the library itself gives the same content hash and the same features, by any spelling."""
    path = tmp_path / "check@point"  # "@" in a path is not a source
    original = wrap(save(path))
    b = load_backbone(f"dir:{path}", offline=True)
    assert str(b.spec) == f"dir:{path}"
    assert b.fingerprint() == original.fingerprint()
    x = torch.randn(1, 3, *original.adapter.image_size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(b(x).tokens, original(x).tokens) and torch.equal(b(x).pooled, original(x).pooled)
    prefix = {"timm": "timm:local-dir:", "open_clip": "open_clip:local-dir:", "hf": "hf:"}[b.family]
    for spec in (str(path), f"{prefix}{path}"):
        assert load_backbone(spec).fingerprint() == original.fingerprint()
    random = load_backbone(f"random:dir:{path}")
    assert random.fingerprint() != original.fingerprint() and random.embed_dim == b.embed_dim


@torch.no_grad()
def test_dual_tower_checkpoints_load_their_vision_tower(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for kind in ("CLIP", "Siglip"):
        vision = hf_config(f"{kind}VisionConfig").to_dict()
        config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text)
        dual = shake(getattr(transformers, f"{kind}Model")(config))
        dual.save_pretrained(tmp_path / kind)
        b = load_backbone(f"hf:{tmp_path / kind}")
        assert type(b.model).__name__ == f"{kind}VisionModel"
        assert sum(p.numel() for p in b.model.parameters()) < sum(p.numel() for p in dual.parameters())
        assert torch.equal(b.run(b.embed(x)).x, wrap(dual).run(wrap(dual).embed(x)).x)
        random = load_backbone(f"random:hf:{tmp_path / kind}")
        assert type(random.model) is type(b.model)


@torch.no_grad()
def test_legacy_key_prefix_loads_completely(tmp_path: Path) -> None:
    model = save_hf(tmp_path, "CLIPVisionModel", "CLIPVisionConfig")
    file = tmp_path / "model.safetensors"
    state = {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    assert load_backbone(str(tmp_path)).fingerprint() == wrap(model).fingerprint()


@torch.no_grad()
def test_checkpoint_with_a_classifier_keeps_it_as_backbone(tmp_path: Path) -> None:
    labels = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}
    model = save_hf(tmp_path, "ViTForImageClassification", "ViTConfig", "ViTImageProcessor", **labels)
    b = load_backbone(str(tmp_path))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(b.head_logits(b.run(b.embed(x))), model(x).logits)
    assert b.class_names == ["ant", "bee", "cat"] and b.block_names[1] == "vit.layers.1"


def test_vit_without_pooler_weights_pools_cls(tmp_path: Path) -> None:
    cfg = hf_config("ViTConfig")
    import transformers

    shake(transformers.ViTModel(cfg, add_pooling_layer=False)).save_pretrained(tmp_path)
    b = load_backbone(str(tmp_path))
    with torch.no_grad():
        raw = b.run(b.embed(torch.randn(2, 3, 32, 32)))
        assert torch.equal(b.pool(raw), b.pool(raw, "cls"))


# ---------------------------------------------------------------------- state dict files
@torch.no_grad()
def test_state_dict_file_with_explicit_architecture(tmp_path: Path) -> None:
    model = shake(timm.create_model("test_vit", num_classes=7))
    for name in ("w@1.safetensors", "w.pth", "wrapped.pth"):
        file = tmp_path / name
        if file.suffix == ".safetensors":
            save_file(model.state_dict(), file)
        else:
            state = model.state_dict()
            torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if "wrap" in name else state, file)
        native = load_native(f"timm:test_vit@{file}", task="classify")
        assert native.head and native.class_names is None and str(native.spec) == f"timm:test_vit@{file}"
        x = torch.randn(1, 3, 160, 160)
        assert torch.equal(native.model(x), model(x))
    headless = {k: v for k, v in model.state_dict().items() if not k.startswith("head")}
    save_file(headless, tmp_path / "features.safetensors")
    spec = f"timm:test_vit@{tmp_path}/features.safetensors"
    assert load_backbone(spec).fingerprint() != load_backbone(f"random:{spec}").fingerprint()
    with pytest.raises(UserError, match="no classifier"):
        load_native(spec, task="classify")


@torch.no_grad()
def test_open_clip_state_dict_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16-SigLIP2", cfg)
    model = shake(open_clip.CLIP(**cfg))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    native = load_native(f"open_clip:ViT-B-16-SigLIP2@{tmp_path}/w.safetensors")
    assert wrap(native).fingerprint() == wrap(model).fingerprint()
    # open_clip itself would report CLIP's statistics for an architecture that came without a tag
    assert native.preprocess.mean == HALF[0] and native.preprocess.resize == "squash"


def test_file_inside_a_known_folder(tmp_path: Path) -> None:
    save_timm(tmp_path)
    file = tmp_path / "model.safetensors"
    assert load_backbone(f"dir:{file}").fingerprint() == load_backbone(str(tmp_path)).fingerprint()
    other = tmp_path / "other.safetensors"
    other.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"read from model\.safetensors"):
        load_backbone(str(other))


# ---------------------------------------------------------------------- random models and options
def test_random_models_follow_their_seed_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    a, same, other = (load_backbone(f"random:timm:test_vit?seed={s}") for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.fingerprint() == same.fingerprint() != other.fingerprint()
    assert a.fingerprint() == load_backbone("timm:test_vit?seed=1", pretrained=False).fingerprint()
    assert str(a.spec) == "random:timm:test_vit?seed=1" and a.family == "timm"


def test_timm_size_options() -> None:
    b = load_backbone("random:timm:vit_tiny_patch16_224?img_size=64x96")
    assert b.image_size == (64, 96) == b.preprocess.size and b.grid_size == (4, 6)
    with pytest.raises(UserError, match=r"exactly 64x96.*128x128"):
        b.embed(torch.zeros(1, 3, 128, 128))
    b = load_backbone("random:timm:vit_small_patch14_dinov2?dynamic=1", img_size=56)
    assert b.grid_size == (4, 4) and b.embed(torch.zeros(1, 3, 28, 70)).grid == (2, 5)
    assert str(b.spec) == "random:timm:vit_small_patch14_dinov2?dynamic=1&img_size=56"
    cnn = load_native("random:timm:test_resnet?img_size=96&dynamic=1", task="classify")
    assert cnn.preprocess.size == (96, 96) and cnn.model(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)


def test_pretrained_positions_are_resampled_to_the_wanted_size(tmp_path: Path) -> None:
    save_timm(tmp_path)
    small, large = load_backbone(str(tmp_path)), load_backbone(str(tmp_path), img_size=64)
    assert large.grid_size == (8, 8) and large.model.pos_embed.shape[1] == 65
    assert torch.equal(small.model.blocks[0].attn.qkv.weight, large.model.blocks[0].attn.qkv.weight)
    assert small.fingerprint() != large.fingerprint()


def test_open_clip_size_option(tmp_path: Path) -> None:
    save_open_clip(tmp_path)
    b = load_backbone(str(tmp_path), img_size=48)
    assert b.image_size == (48, 48) == b.preprocess.size and b.grid_size == (6, 6)
    assert b(torch.zeros(1, 3, 48, 48)).pooled.shape == (1, 16)


def test_hf_size_option(tmp_path: Path) -> None:
    save_hf(tmp_path, "ViTForImageClassification", "ViTConfig", "ViTImageProcessor", num_labels=3)
    b = load_backbone(str(tmp_path), img_size=(48, 40))
    assert b.image_size == (48, 40) and b.grid_size == (6, 5)
    with pytest.raises(UserError, match="fixed image size"):
        load_native(f"hf:{tmp_path}?img_size=48", task="classify")


def test_dtype_and_device() -> None:
    for given in ("bf16", "bfloat16", torch.bfloat16):
        native = load_native("random:timm:test_vit", dtype=given, device="cpu")
        assert next(native.model.parameters()).dtype == torch.bfloat16
    b = load_backbone("random:timm:test_vit?dtype=float16")
    assert b.model.head.weight.dtype == torch.float16
    assert load_native("random:timm:test_vit?dtype=bf16", dtype="float32").model.head.weight.dtype == torch.float32
    with pytest.raises(UserError, match=r"unknown dtype.*float32|unknown dtype.*float16"):
        load_native("random:timm:test_vit?dtype=float23")


def test_half_precision_checkpoints_load_as_float32(tmp_path: Path) -> None:
    """transformers would keep the precision on disk; all families give float32 unless asked."""
    cfg = hf_config("ViTConfig")
    import transformers

    transformers.ViTModel(cfg).half().save_pretrained(tmp_path)
    assert load_native(str(tmp_path)).model.dtype == torch.float32
    assert load_native(str(tmp_path), dtype="fp16").model.dtype == torch.float16


def test_the_spec_of_a_backbone_loads_the_same_again(tmp_path: Path) -> None:
    save_timm(tmp_path)
    for spec in (f"dir:{tmp_path}?img_size=48", "random:timm:test_vit?seed=3&dtype=bf16"):
        b = load_backbone(spec)
        assert load_backbone(str(b.spec)).fingerprint() == load_backbone(b.spec).fingerprint() == b.fingerprint()


def test_home_directory_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_timm(tmp_path / "t")
    save_hf(tmp_path / "h", "ViTModel", "ViTConfig")
    save_open_clip(tmp_path / "o")
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    specs = (
        "~/t",
        "dir:~/h",
        "timm:local-dir:~/t",
        "hf:~/h",
        "open_clip:local-dir:~/o",
        "timm:test_vit@~/w.safetensors",
    )
    for spec in specs:
        assert load_backbone(spec, offline=True).depth > 0


def test_number_of_classes(tmp_path: Path) -> None:
    """A pretrained model is never given a random classifier on the quiet."""
    save_timm(tmp_path)
    assert not load_native(f"{tmp_path}?num_classes=0").head
    assert load_native(f"{tmp_path}?num_classes=3", task="classify").head
    with pytest.raises(UserError, match=r"leave the classifier random.*5.*3 classes"):
        load_native(f"{tmp_path}?num_classes=5", task="classify")
    assert load_native(f"random:{tmp_path}?num_classes=5").model.head.weight.shape[0] == 5


def test_trainable_backbones() -> None:
    b = load_backbone("random:timm:test_vit", trainable=True)
    assert all(p.requires_grad for p in b.parameters()) and not b.model.training
    assert b.train().model.training
    assert not any(p.requires_grad for p in load_backbone("random:timm:test_vit").parameters())


# ---------------------------------------------------------------------- classifiers and preprocessing
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"])
def test_timm_classifiers(name: str) -> None:
    native = load_native(f"random:timm:{name}", task="classify")
    assert native.head and native.family == "timm" and native.text is None and not native.model.training
    assert native.class_names is None  # random weights know no classes
    cfg = timm.data.resolve_model_data_config(native.model)
    assert native.preprocess.size == cfg["input_size"][-2:] and native.preprocess.crop_pct == cfg["crop_pct"]
    assert native.preprocess.mean == cfg["mean"]
    assert native.model(torch.zeros(1, 3, *native.preprocess.size)).shape == (1, 1000)


def test_timm_label_names_from_the_checkpoint(tmp_path: Path) -> None:
    model = save_timm(tmp_path / "a", "test_resnet", num_classes=3)
    native = load_native(str(tmp_path / "a"), task="classify")
    assert native.class_names == ["ant", "bee", "cat"]
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(native.model(x), model(x))


def test_timm_imagenet_names_come_with_registry_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **{**k, "pretrained": False}))
    monkeypatch.setattr("vfm_core.backbones.weights._hub_answers", lambda *_: True)
    native = load_native("timm:resnet18.a1_in1k", task="classify", offline=None)
    assert (
        native.class_names is not None and native.class_names[0].startswith("tench") and len(native.class_names) == 1000
    )


HF_CLASSIFIERS = {
    "vit": ("ViTForImageClassification", "ViTConfig", "ViTImageProcessor"),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", "BitImageProcessor"),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", "ConvNextImageProcessor"),
    "swin": ("SwinForImageClassification", "SwinConfig", "ViTImageProcessor"),
}


@pytest.mark.parametrize("name", HF_CLASSIFIERS)
@torch.no_grad()
def test_hf_classifiers(name: str, tmp_path: Path) -> None:
    kind, config, processor = HF_CLASSIFIERS[name]
    extra: dict = {"id2label": {i: f"class {i}" for i in range(4)}, "label2id": {f"class {i}": i for i in range(4)}}
    if name == "resnet":
        extra |= {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    if name == "swin":
        extra |= {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
        extra |= {"num_attention_heads": None, "num_hidden_layers": None, "hidden_size": None}
    model = save_hf(tmp_path, kind, config, processor, **extra)
    native = load_native(str(tmp_path), task="classify")
    assert native.head and native.class_names == [f"class {i}" for i in range(4)] and native.family == "hf"
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(native.model(x).logits, model(x).logits)
    if name in ("resnet", "swin"):
        with pytest.raises(UserError, match="token blocks"):
            load_backbone(str(tmp_path))


def test_hf_names_that_say_nothing_are_no_names(tmp_path: Path) -> None:
    save_hf(tmp_path, "ViTForImageClassification", "ViTConfig", num_labels=3)
    assert load_native(str(tmp_path), task="classify").class_names is None


def test_checkpoints_without_a_head_are_no_classifiers(tmp_path: Path) -> None:
    save_timm(tmp_path / "t", num_classes=0)
    save_hf(tmp_path / "h", "Dinov2Model", "Dinov2Config")
    save_hf(tmp_path / "m", "ViTMAEModel", "ViTMAEConfig")
    for part in ("t", "h"):
        with pytest.raises(UserError, match=r"no classifier.*train a head"):
            load_native(str(tmp_path / part), task="classify")
    with pytest.raises(UserError, match="no image classifier for this model type"):
        load_native(str(tmp_path / "m"), task="classify")


def test_hf_preprocessing_is_the_processors(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    cases = {
        "CLIPImageProcessor": ((224, 224), "shortest", 1.0, "bicubic", CLIP),
        "SiglipImageProcessor": ((224, 224), "squash", 1.0, "bicubic", HALF),
        "ViTImageProcessor": ((224, 224), "squash", 1.0, "bilinear", HALF),
        "BitImageProcessor": ((224, 224), "shortest", 1.0, "bicubic", CLIP),
        "ConvNextImageProcessor": ((384, 384), "squash", 1.0, "bicubic", HALF),
        "DINOv3ViTImageProcessor": ((224, 224), "squash", 1.0, "bilinear", IMAGENET),
    }
    for processor, (size, resize, pct, interpolation, (mean, std)) in cases.items():
        if not hasattr(transformers, processor):
            continue
        path = tmp_path / processor
        save_hf(path, "Dinov2Model", "Dinov2Config", processor)
        native = load_native(str(path))
        assert native.preprocess == Preprocess(size, resize, pct, interpolation, mean, std), processor
    path = tmp_path / "dinov2"
    save_hf(path, "Dinov2Model", "Dinov2Config")
    transformers.BitImageProcessor(size={"shortest_edge": 256}, image_mean=IMAGENET[0]).save_pretrained(path)
    p = load_native(str(path)).preprocess
    assert (p.size, p.resize, p.crop_pct, p.mean) == ((224, 224), "shortest", 0.875, IMAGENET[0])
    transformers.ConvNextImageProcessor(size={"shortest_edge": 224}).save_pretrained(path)
    p = load_native(str(path)).preprocess
    assert (p.size, p.resize, p.crop_pct) == ((224, 224), "shortest", 224 / 256)
    transformers.ViTImageProcessor(do_resize=False, do_normalize=False, resample=0).save_pretrained(path)
    p = load_native(str(path)).preprocess
    assert (p.size, p.resize, p.interpolation, p.mean, p.std) == ((32, 32), "none", "nearest", (0,) * 3, (1,) * 3)


@pytest.mark.parametrize(
    ("name", "config", "stats"),
    [
        ("CLIPVisionModel", "CLIPVisionConfig", CLIP),
        ("SiglipVisionModel", "SiglipVisionConfig", HALF),
        ("Dinov2Model", "Dinov2Config", IMAGENET),
        ("DINOv3ViTModel", "DINOv3ViTConfig", IMAGENET),
        ("ViTModel", "ViTConfig", HALF),
        ("ViTMAEModel", "ViTMAEConfig", IMAGENET),
    ],
)
def test_missing_processor_falls_back_to_the_family_with_a_warning(
    name: str, config: str, stats: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_hf(tmp_path, name, config)
    with caplog.at_level(logging.WARNING, "vfm_core"):
        p = load_native(str(tmp_path)).preprocess
    assert (p.mean, p.std) == stats and p.size == (32, 32)
    assert "no preprocessor_config.json" in caplog.text and str(tmp_path) in caplog.text


def test_timm_preprocessing_modes() -> None:
    border = timm.create_model("test_resnet")
    border.pretrained_cfg = {**border.pretrained_cfg, "crop_mode": "border", "crop_pct": 1.0}
    from vfm_core.backbones.timm_family import preprocess_of

    p = preprocess_of(border)
    assert p.resize == "longest" and p.fill == tuple(round(255 * m) for m in p.mean)
    siglip = preprocess_of(timm.create_model("vit_base_patch16_siglip_224", depth=1, embed_dim=24))
    assert (siglip.mean, siglip.std) == HALF


def test_open_clip_preprocessing_is_that_of_the_weights(tmp_path: Path) -> None:
    """open_clip reports CLIP's statistics for SigLIP until the weights are resolved."""
    pytest.importorskip("open_clip")
    save_open_clip(tmp_path)
    p = load_native(str(tmp_path)).preprocess
    assert p == Preprocess((32, 32), "squash", 1.0, "bilinear", *HALF)
    from vfm_core.backbones.open_clip_family import _statistics

    assert _statistics("ViT-B-16-SigLIP2", "webli")["force_preprocess_cfg"]["mean"] == HALF[0]
    assert _statistics("ViT-B-32", None)["force_preprocess_cfg"].get("mean") in (None, CLIP[0])


# ---------------------------------------------------------------------- image-text models
@torch.no_grad()
def test_text_tower(tmp_path: Path) -> None:
    model = save_open_clip(tmp_path)
    native = load_native(str(tmp_path), task="classify")
    assert not native.head and native.class_names is None and native.text is not None
    import open_clip

    texts = ["a photo of a bird", "red epaulets"]
    want = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts), normalize=True)
    got = native.text.encode(texts)
    assert torch.equal(got, want) and got.shape == (2, 16)
    assert torch.allclose(got.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert native.text.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    many = native.text.encode([f"bird {i}" for i in range(300)])
    assert torch.allclose(many[299], native.text.encode(["bird 299"])[0], atol=1e-6)
    for bad in ([], "a bird"):
        with pytest.raises(UserError, match="list of texts"):
            native.text.encode(bad)  # type: ignore[arg-type]
    assert load_backbone(str(tmp_path)).text is not None
    assert torch.equal(wrap(model).text.encode(texts), want)


def test_cnn_image_towers_load_as_native_models(tmp_path: Path) -> None:
    save_open_clip(tmp_path, {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8})
    native = load_native(str(tmp_path), task="classify")
    assert native.model.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 16)
    with pytest.raises(UserError, match="ModifiedResNet has no token blocks"):
        load_backbone(str(tmp_path))


def test_quickgelu_is_switched_on_with_openai_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights trained with QuickGELU load into a plain GELU model without any error."""
    open_clip = pytest.importorskip("open_clip")
    seen: dict = {}

    def create(name: str, **kwargs: object) -> nn.Module:
        seen.update(kwargs, name=name)
        raise UserError("stop here")

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr("vfm_core.backbones.weights._hub_answers", lambda *_: True)
    for spec, quick in (
        ("open_clip:ViT-B-16@openai", True),
        ("open_clip:ViT-B-16/openai", True),
        ("open_clip:ViT-B/16@openai", True),
        ("open_clip:ViT-B-16-quickgelu@openai", False),  # has it by name
        ("open_clip:ViT-B-16@laion2b_s34b_b88k", False),
    ):
        with pytest.raises(UserError, match="stop here"):
            load_native(spec)
        assert seen["force_quick_gelu"] is quick and spec.endswith(seen["pretrained"])


def test_timm_openai_weights_without_quickgelu_warn(caplog: pytest.LogCaptureFixture) -> None:
    for name, warns in (("vit_large_patch14_clip_224.openai", True), ("vit_base_patch16_clip_224.laion2b", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vfm_core"), pytest.raises(UserError, match="offline mode"):
            load_native(f"timm:{name}", offline=True)
        assert ("timm:vit_large_patch14_clip_quickgelu_224.openai" in caplog.text) is warns


# ---------------------------------------------------------------------- third parties
def test_families_of_other_packages_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    from vfm_core.backbones import Native

    def loader(spec: object, **kwargs: object) -> Native:
        assert set(kwargs) == {"task", "pretrained", "device", "dtype", "offline", "cache_dir"}
        model = timm.create_model("test_vit")
        return Native(spec, "mine", model, Preprocess(size=(160, 160)))  # type: ignore[arg-type]

    entry = importlib.metadata.EntryPoint("mine", "somewhere:loader", "vfm_core.backbones")
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: loader)
    real = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda **kw: [entry] if kw.get("group") == "vfm_core.backbones" else real(**kw),
    )
    assert "mine" in families()
    b = load_backbone("mine:anything?seed=3")
    assert b.family == "mine" and str(b.spec) == "mine:anything?seed=3"


def test_wrapping_a_users_own_model() -> None:
    model = timm.create_model("test_vit", num_classes=2)
    b = wrap(model, class_names=["a", "b"])
    assert b.model is model and b.class_names == ["a", "b"] and b.family == "timm"
    assert b.preprocess.size == (160, 160)
    tower = wrap(pytest.importorskip("open_clip").CLIP(
        16, {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}, TEXT
    ))  # fmt: skip
    assert tower.family == "open_clip" and tower.preprocess.size == (32, 32) and tower.text is not None


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (print, ("executed",))

    file = tmp_path / "evil.pth"
    file.write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))
    with pytest.raises(UserError, match=r"evil\.pth"):
        load_native(f"timm:test_vit@{file}")
    torch.save({"w": Evil()}, file)
    with pytest.raises(UserError, match=r"refused to unpickle.*evil\.pth"):
        load_native(f"timm:test_vit@{file}")
