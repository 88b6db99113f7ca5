"""Prompt-CAM checkpoints: ours round-trip, the official layout loads, damage is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finecam.promptcam import PromptCAM
from finecam.promptcam_io import CONFIG, WEIGHTS, load, save
from torch import Tensor, nn
from vfm_core.backbones import wrap
from vfm_core.errors import UserError

torch.set_num_threads(1)


def vit(seed: int = 0, **options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(**(sizes | options))


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------------------------- our format


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"entry_layer": 1},
        {"prompt_layers": 1, "dropout": 0.0},
        {"entry_layer": 2, "agnostic_prompts": 3, "prompt_self_attention": False},
    ],
)
def test_round_trip(tmp_path: Path, variant: dict[str, Any]) -> None:
    backbone = wrap(vit())
    model = PromptCAM(backbone, 4, class_names=["a", "b", "c", "é"], **variant)
    with torch.no_grad():
        model.head.bias += 0.5
    model.metrics = {"accuracy": 0.75}
    assert save(model, tmp_path / "pc") == tmp_path / "pc"
    again = load(tmp_path / "pc", backbone=backbone)
    assert torch.equal(again(images()), model(images()))
    for name in ("class_names", "entry_layer", "prompt_layers", "agnostic_prompts", "dropout", "metrics", "preprocess"):
        assert getattr(again, name) == getattr(model, name)
    assert not again.training
    learned = sum(p.numel() for _, p in model.learned())
    assert (tmp_path / "pc" / WEIGHTS).stat().st_size < 4 * learned + 1000  # the backbone is not in there


def test_backbone_is_loaded_again_from_its_spec(tmp_path: Path) -> None:
    import timm
    from vfm_core.backbones import load_backbone

    folder = tmp_path / "vit"
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    timm.models.save_for_hf(model, folder, model_args={"img_size": 32, "depth": 2}, safe_serialization=True)
    first = PromptCAM(load_backbone(f"timm:local-dir:{folder}"), 3)
    first.save(tmp_path / "pc")
    second = PromptCAM.load(tmp_path / "pc")
    assert second.backbone is not first.backbone
    assert torch.equal(first(images()), second(images()))


def test_other_backbone_weights_are_refused(tmp_path: Path) -> None:
    save(PromptCAM(wrap(vit()), 3), tmp_path)
    with pytest.raises(UserError, match="weights differ from those the prompts were trained on"):
        load(tmp_path, backbone=wrap(vit(seed=1)))


def _break_json(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def _other_format(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps({"format": "something/9"}))


def _drop_field(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config["classes"]
    (folder / CONFIG).write_text(json.dumps(config))


def _change_classes(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["classes"] = ["a", "b"]
    (folder / CONFIG).write_text(json.dumps(config))


def _cut_weights(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), "no Prompt-CAM here"),
        (_break_json, "damaged configuration"),
        (_other_format, "format 'something/9'"),
        (_drop_field, "without classes"),
        (_change_classes, r"prompts must have shape \(2, 64\)"),
        (lambda f: (f / WEIGHTS).unlink(), "weights are missing"),
        (_cut_weights, "do not belong to this configuration"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    backbone = wrap(vit())
    save(PromptCAM(backbone, 3), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load(tmp_path, backbone=backbone)


# ------------------------------------------------------------------------------------------------- official checkpoints


def official(path: Path, classes: int = 5, net: nn.Module | None = None, **changes: Any) -> tuple[nn.Module, dict]:
    """Write a file in the official layout: a timm-named ViT, vpt.prompt_embeddings (N, C, D), head (1, D)."""
    net = vit() if net is None else net
    generator = torch.Generator().manual_seed(4)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    depth, dim = len(net.blocks), net.embed_dim  # type: ignore[arg-type]
    state["vpt.prompt_embeddings"] = torch.randn(depth, classes, dim, generator=generator)  # type: ignore[call-overload]
    state["head.weight"] = torch.randn(1, dim, generator=generator)  # type: ignore[call-overload]
    state["head.bias"] = torch.randn(1, generator=generator)
    state |= changes
    torch.save({"model_state_dict": {k: v for k, v in state.items() if v is not None}}, path)
    return net, state


def official_forward(net: Any, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the official code computes: fresh prompts before CLS at each layer, outputs dropped but in the last."""
    prompts = state["vpt.prompt_embeddings"]
    h = net.norm_pre(net._pos_embed(net.patch_embed(x)))
    for i, block in enumerate(net.blocks):
        h = block(torch.cat([prompts[i].expand(len(x), -1, -1), h], dim=1))
        h = h if i == len(net.blocks) - 1 else h[:, prompts.shape[1] :]
    rows = net.norm(h)[:, : prompts.shape[1]]
    return rows @ state["head.weight"][0] + state["head.bias"]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({}, 2),
        ({"num_heads": 1}, None),
        ({"init_values": 1e-5}, 2),
        ({"reg_tokens": 4, "no_embed_class": True, "patch_size": 16}, 2),
        ({"qkv_bias": False, "mlp_ratio": 2.0}, 2),
        ({"pre_norm": True}, 4),
    ],
    ids=["plain", "heads from width", "layer scale", "registers", "no bias, thin MLP", "pre-norm"],
)
def test_official_layout(tmp_path: Path, options: dict[str, Any], heads: int | None) -> None:
    net = vit(**({"num_heads": heads or 1} | options)).eval()
    for module in net.modules():
        if type(module).__name__ == "LayerScale":
            nn.init.constant_(module.gamma, 0.3)  # type: ignore[arg-type]
    net, state = official(tmp_path / "model.pt", net=net)
    model = load(tmp_path / "model.pt", heads=heads)
    torch.testing.assert_close(model(images()), official_forward(net, state, images()), atol=1e-5, rtol=1e-5)
    assert (model.entry_layer, model.prompt_layers, model.num_classes) == (3, 3, 5)
    assert (model.preprocess.mean, model.preprocess.size, model.preprocess.resize) == ((0.5,) * 3, (32, 32), "squash")


def test_official_class_names(tmp_path: Path) -> None:
    official(tmp_path / "model.pt", classes=3)
    for name in ("003.Wren", "001.Robin", "002.Finch"):
        (tmp_path / "train" / name).mkdir(parents=True)
    model = load(tmp_path / "model.pt", heads=2, class_names=tmp_path / "train")
    assert model.class_names == ["Robin", "Finch", "Wren"]
    assert load(tmp_path / "model.pt", heads=2, class_names=["x", "y", "z"]).class_names == ["x", "y", "z"]
    with pytest.raises(UserError, match="the checkpoint has 3 classes in class_names: 2 names"):
        load(tmp_path / "model.pt", heads=2, class_names=["x", "y"])
    (tmp_path / "names.txt").write_text("c\nb\na\n", encoding="utf-8")
    assert load(tmp_path / "model.pt", heads=2, class_names=tmp_path / "names.txt").class_names == ["c", "b", "a"]
    with pytest.raises(UserError, match="cannot read class names"):
        load(tmp_path / "model.pt", heads=2, class_names=tmp_path / "nowhere")
    (tmp_path / "train" / "004.Wren").mkdir()
    with pytest.raises(UserError, match=r"duplicate class name in .*train: 003.Wren and 004.Wren both show as 'Wren'"):
        load(tmp_path / "model.pt", heads=2, class_names=tmp_path / "train")
    save(model, tmp_path / "ours")
    for given in ({"class_names": ["x", "y", "z"]}, {"heads": 2}):
        with pytest.raises(UserError, match="class names and heads are for official files"):
            load(tmp_path / "ours", backbone=model.backbone, **given)  # type: ignore[arg-type]


def test_official_file_can_be_saved_as_ours(tmp_path: Path) -> None:
    official(tmp_path / "model.pt")
    model = load(tmp_path / "model.pt", heads=2)
    save(model, tmp_path / "ours")
    again = load(tmp_path / "ours", backbone=model.backbone)
    assert torch.equal(again(images()), model(images()))
    assert again.preprocess == model.preprocess


class _NotATensor:
    pass


@pytest.mark.parametrize(
    ("changes", "heads", "message"),
    [
        ({"vpt.prompt_embeddings": None}, 2, "not an official Prompt-CAM checkpoint.*vpt.prompt_embeddings"),
        ({"vpt.prompt_embeddings": torch.zeros(1, 5, 64)}, 2, r"prompts must have shape \(3, C, 64\)"),
        ({"blocks.1.norm1.weight": None}, 2, "missing .'blocks.1.norm1.weight'"),
        ({"blocks.1.adapter.weight": torch.zeros(1)}, 2, "unexpected .'blocks.1.adapter.weight'"),
        ({"head.weight": torch.zeros(5, 64)}, 2, r"head.weight must have shape \(1, 64\)"),
        ({"pos_embed": torch.zeros(1, 19, 64)}, 2, "not of a square grid"),
        ({}, 3, "heads must divide the width 64"),
    ],
)
def test_files_that_are_not_official(tmp_path: Path, changes: Any, heads: int, message: str) -> None:
    official(tmp_path / "model.pt", **changes)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "model.pt", heads=heads)


def test_width_that_is_no_multiple_of_64_needs_heads(tmp_path: Path) -> None:
    official(tmp_path / "model.pt", net=vit(embed_dim=24, num_heads=3))
    with pytest.raises(UserError, match="cannot guess the number of heads"):
        load(tmp_path / "model.pt")
    assert load(tmp_path / "model.pt", heads=3).backbone.num_heads == 3


def test_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model_state_dict": {"a": _NotATensor()}}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"refused to unpickle.*more than tensors"):
        load(tmp_path / "model.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match="or is no torch file"):
        load(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="not a state dict"):
        load(tmp_path / "list.pt")
