"""Architectures of the tiny models, and how their weights are read and written.

Vision transformers are plain ``timm.models.VisionTransformer`` instances on purpose: what works on them works on
the large ones. Weights are kept in float16 (half the bytes) and used in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vfm_core.errors import UserError

from tinyworld.catalogue import model_entry

MEAN = STD = (0.5, 0.5, 0.5)
"""Input normalisation of every tiny model: pixels from [0, 1] to [-1, 1]."""


class TinyCNN(nn.Module):
    """Four 3x3 convolutions (two of stride 2), global average pooling and one linear layer; about 0.05 M parameters.

    Images (B, 3, 64, 64) -> logits (B, num_classes); the feature map before pooling is (B, 64, 16, 16). Because the
    head is linear on the pooled map, its class-activation maps have a closed form.
    """

    def __init__(self, num_classes: int = 16) -> None:
        super().__init__()
        self.layer1 = _conv_block(3, 16, stride=2)
        self.layer2 = _conv_block(16, 32, stride=2)
        self.layer3 = _conv_block(32, 48)
        self.layer4 = _conv_block(48, 64)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes) if num_classes else nn.Identity()
        self.num_features = 64

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map (B, 64, H/4, W/4)."""
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes), or pooled features (B, 64) when there is no head."""
        logits: Tensor = self.fc(self.avgpool(self.forward_features(x)).flatten(1))
        return logits


class GlyphCNN(nn.Module):
    """Three 3x3 convolutions, each with BatchNorm, ReLU and 2x2 max pooling, then global average pooling and a head.

    Images (B, 3, 16, 16) -> logits (B, num_classes); about 25 k parameters, so that fine-tuning takes a second.
    """

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.layer1 = _pooled_block(3, 16)
        self.layer2 = _pooled_block(16, 32)
        self.layer3 = _pooled_block(32, 64)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes) if num_classes else nn.Identity()
        self.num_features = 64

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map (B, 64, H/8, W/8)."""
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes), or pooled features (B, 64) when there is no head."""
        logits: Tensor = self.fc(self.avgpool(self.forward_features(x)).flatten(1))
        return logits


def _pooled_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*_conv_block(inputs, outputs), nn.MaxPool2d(2))


def _conv_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def vision_transformer(num_classes: int = 16, pool: str = "avg", **shape: Any) -> nn.Module:
    """A timm VisionTransformer whose head reads the mean of the normalised patch tokens ("avg") or CLS ("token")."""
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(num_classes=num_classes, global_pool=pool, fc_norm=False, **shape)
    return model


def build(name: str, num_classes: int = 16, pool: str = "avg", seed: int = 0) -> nn.Module:
    """A tiny image model with random weights (of the image tower for "clip"); the global generator is left alone.

    Parameters
    ----------
    name : str
        Key of `MODELS`.
    num_classes : int
        Rows of the head, 0 for none.
    pool : {"avg", "token"}
        What a transformer's head reads.
    seed : int
        Seed of the initial weights.

    Returns
    -------
    nn.Module
        In eval mode, on the CPU.
    """
    entry = model_entry(name)
    with seeded(seed):
        if entry.shape is None:
            return (GlyphCNN if name == "glyph-cnn" else TinyCNN)(num_classes).eval()
        return vision_transformer(num_classes, pool, **entry.shape).eval()


class seeded:
    """Context in which torch's CPU generator starts from a seed; the caller's state comes back at the end."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._state = torch.random.get_rng_state()
        torch.random.default_generator.manual_seed(self._seed)

    def __exit__(self, *error: object) -> None:
        torch.random.set_rng_state(self._state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a weight file as float32."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError("no weights", where=path, remedy="re-make them with `tinyworld train`")
    return {name: value.float() for name, value in load_file(path).items()}


def write_weights(path: Path, tensors: Mapping[str, Tensor], model: str) -> None:
    """Write tensors as float16 safetensors, whole or not at all, with the model's spec as the only metadata.

    One entry, because safetensors writes several in random order and the same weights should give the same bytes.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    half = {name: value.detach().cpu().half().contiguous() for name, value in sorted(tensors.items())}
    partial = path.with_suffix(".tmp")
    save_file(half, partial, metadata={"model": model})
    partial.chmod(0o644)  # safetensors makes it readable for the owner only
    partial.replace(path)


def load_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model; batch counters, which are not shipped, may be absent, nothing else may differ."""
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise UserError("weights do not fit the model", given=", ".join([*missing, *unexpected][:5]))


def rounded(model: nn.Module) -> nn.Module:
    """The model with its weights rounded through float16, as it will be after a round trip to disk."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half().float())
    return model


def shipped(name: str, tensors: Mapping[str, Tensor], layout: str | None, pool: str = "avg") -> nn.Module:
    """A tiny image model from the tensors of a weight file.

    Parameters
    ----------
    name : str
        Key of `MODELS`, except "clip" (see `tinyworld.clip`).
    tensors : mapping
        As `read_weights` gives them.
    layout : str or None
        Whose classes the head knows; None = without a head.
    pool : {"avg", "token"}
        What a transformer's head reads.

    Returns
    -------
    nn.Module
        In eval mode, float32, on the CPU.
    """
    entry = model_entry(name)
    body = {key: value for key, value in tensors.items() if not key.startswith("heads.")}
    head = "fc." if entry.shape is None else "head."
    prefix = f"heads.{layout}.{pool}."
    body.update({head + key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)})
    model = build(name, len(tensors[prefix + "weight"]) if layout else 0, pool)
    load_state(model, body)
    return model
