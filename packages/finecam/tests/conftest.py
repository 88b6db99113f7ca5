"""Small, randomly initialised models of every architecture that is explained, built without the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class TinyNet(nn.Module):
    """Two convolutions, global average pooling, one linear layer: the case with a closed form."""

    def __init__(self, classes: int = 7, channels: int = 12) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, channels, 3, 2, 1), nn.ReLU(inplace=True)
        )
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class TinyMLPNet(TinyNet):
    """The same with a nonlinear head: no closed form."""

    def __init__(self, classes: int = 7, channels: int = 12) -> None:
        super().__init__(classes, channels)
        self.hidden = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.hidden(self.features(x).mean((2, 3)))))


def timm_vit(classes: int = 7, img_size: Any = 64, **options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    shape: dict[str, Any] = {"patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return VisionTransformer(img_size=img_size, num_classes=classes, **shape | options)


def _resnet(module: Any, **options: Any) -> nn.Module:
    from timm.models.resnet import ResNet

    return ResNet(module, [1, 1, 1, 1], channels=(8, 8, 16, 32), num_classes=7, stem_width=8, **options)


def timm_resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock

    return _resnet(BasicBlock)


def timm_swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=64, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1, 2), num_heads=(1, 2, 2), num_classes=7,
        strict_img_size=False,
    )  # fmt: skip


def timm_convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 24), num_classes=7)


def timm_efficientnet() -> nn.Module:
    import timm

    return timm.create_model("efficientnet_b0", num_classes=7)


def torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=7
    )


def torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=[1, 2], num_heads=[1, 2], window_size=[4, 4], num_classes=7
    )


def torchvision_densenet() -> nn.Module:
    from torchvision.models.densenet import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=7)


def open_clip_model(kind: str) -> nn.Module:
    import open_clip

    vision: dict[str, Any] = {"image_size": 64, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
    if kind == "rn50":
        vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


class ImageTower(nn.Module):
    """Image side of an open_clip model with a linear head."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.clip.encode_image(x))


def hugging_face(kind: str) -> nn.Module:
    import transformers as tf

    small: dict[str, Any] = {
        "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64,
        "patch_size": 16, "num_labels": 7,
    }  # fmt: skip
    if kind == "vit":
        return tf.ViTForImageClassification(tf.ViTConfig(**small))
    if kind == "dinov2":
        return tf.Dinov2ForImageClassification(tf.Dinov2Config(**small))
    if kind == "dinov2-registers":
        config = tf.Dinov2WithRegistersConfig(**small, num_register_tokens=4)
        return tf.Dinov2WithRegistersForImageClassification(config)
    if kind == "dinov3":
        return PooledHead(tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**small, num_register_tokens=3)))
    if kind == "swin":
        config = tf.SwinConfig(
            image_size=64, embed_dim=16, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4, num_labels=7
        )
        return tf.SwinForImageClassification(config)
    config = tf.ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1], num_labels=7)
    return tf.ConvNextForImageClassification(config)


class PooledHead(nn.Module):
    """A linear head on a transformers backbone's CLS token."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).last_hidden_state[:, 0])


@dataclass(frozen=True)
class Architecture:
    """How to build a model, the default layer it must get, and the grid for an image of `image` pixels."""

    build: Callable[[], nn.Module]
    layer: str
    grid: tuple[int, int]
    image: tuple[int, int] = (64, 64)
    optional: str | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "timm resnet": Architecture(timm_resnet, "layer4.0", (2, 3), (64, 96)),
    "timm convnext": Architecture(timm_convnext, "stages.3", (2, 3), (64, 96)),
    "timm efficientnet": Architecture(timm_efficientnet, "bn2", (2, 3), (64, 96)),
    "timm vit": Architecture(timm_vit, "blocks.2.norm1", (4, 4)),
    "timm vit mean pooled": Architecture(
        lambda: timm_vit(global_pool="avg", fc_norm=False), "blocks.2.norm1", (4, 4)
    ),
    "timm vit registers": Architecture(lambda: timm_vit(reg_tokens=4), "blocks.2.norm1", (4, 4)),
    "timm vit registers only": Architecture(
        lambda: timm_vit(reg_tokens=4, class_token=False, global_pool="avg"), "blocks.2.norm1", (4, 4)
    ),
    "timm vit non-square": Architecture(lambda: timm_vit(img_size=(64, 96)), "blocks.2.norm1", (4, 6), (64, 96)),
    "timm vit dynamic size": Architecture(
        lambda: timm_vit(dynamic_img_size=True, reg_tokens=2), "blocks.2.norm1", (14, 21), (224, 336)
    ),
    "timm swin": Architecture(timm_swin, "layers.2.blocks.1.norm1", (4, 4)),
    "timm swin non-square": Architecture(timm_swin, "layers.2.blocks.1.norm1", (4, 8), (64, 128)),
    "torchvision vit": Architecture(torchvision_vit, "encoder.layers.encoder_layer_1.ln_1", (4, 4)),
    "torchvision swin": Architecture(torchvision_swin, "features.3.1.norm2", (8, 12), (64, 96)),
    "torchvision densenet": Architecture(torchvision_densenet, "features.norm5", (8, 12), (64, 96)),
    "open_clip vit": Architecture(
        lambda: ImageTower(open_clip_model("vit")), "clip.visual.transformer.resblocks.1.ln_1", (4, 4),
        optional="open_clip",
    ),
    "open_clip rn50": Architecture(
        lambda: ImageTower(open_clip_model("rn50")), "clip.visual.layer4.0", (2, 2), optional="open_clip"
    ),
    "hf vit": Architecture(
        lambda: hugging_face("vit"), "vit.layers.1.layernorm_before", (4, 4), optional="transformers"
    ),
    "hf dinov2": Architecture(
        lambda: hugging_face("dinov2"), "dinov2.encoder.layer.1.norm1", (4, 6), (64, 96), optional="transformers"
    ),
    "hf dinov2 registers": Architecture(
        lambda: hugging_face("dinov2-registers"), "dinov2_with_registers.encoder.layer.1.norm1", (4, 6), (64, 96),
        optional="transformers",
    ),
    "hf dinov3": Architecture(
        lambda: hugging_face("dinov3"), "backbone.model.layer.1.norm1", (4, 6), (64, 96), optional="transformers"
    ),
    "hf swin": Architecture(
        lambda: hugging_face("swin"), "swin.encoder.layers.2.blocks.0.layernorm_before", (4, 4), optional="transformers"
    ),
    "hf convnext": Architecture(
        lambda: hugging_face("convnext"), "convnext.encoder.stages.3", (2, 3), (64, 96), optional="transformers"
    ),
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `architecture` run once for each."""
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", list(ARCHITECTURES.values()), ids=list(ARCHITECTURES))


@pytest.fixture
def built(architecture: Architecture) -> tuple[Architecture, nn.Module, Tensor]:
    """Architecture, its model in eval mode with random weights, and two images."""
    if architecture.optional is not None:
        pytest.importorskip(architecture.optional)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = architecture.build().eval()
        for parameter in model.parameters():
            if not parameter.any():  # torchvision's zero-initialised heads would make every gradient zero
                nn.init.normal_(parameter, std=0.1)
        return architecture, model, torch.randn(2, 3, *architecture.image)


@pytest.fixture
def make() -> dict[str, Callable[..., nn.Module]]:
    """Builders by name; each call starts from the same weights."""

    def seeded(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def call(*args: Any, **kwargs: Any) -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return build(*args, **kwargs).eval()

        return call

    builders = {"cnn": TinyNet, "mlp": TinyMLPNet, "vit": timm_vit, "resnet": timm_resnet, "clip": open_clip_model}
    return {name: seeded(build) for name, build in builders.items()}


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """Random images (n, 3, h, w), the same for the same arguments."""

    def draw(n: int, h: int = 64, w: int = 96, seed: int = 0) -> Tensor:
        return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))

    return draw
