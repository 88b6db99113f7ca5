"""Preprocessing equals that of timm, open_clip and transformers, and its geometry can be inverted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess, shared_view

SIZES = [(300, 200), (200, 300), (64, 64), (333, 97), (50, 41), (224, 224), (97, 640)]  # width, height


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4 + 2, size[0] // 4 + 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("pct", [1.0, 0.95, 0.9, 0.875])
@pytest.mark.parametrize("out", [(64, 64), (48, 80)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_timm(mode: str, pct: float, out: tuple[int, int], interpolation: str) -> None:
    timm_data = pytest.importorskip("timm.data")
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    theirs = timm_data.create_transform(
        (3, *out), crop_mode=mode, crop_pct=pct, interpolation=interpolation, mean=mean, std=std
    )
    resize = {"center": "shortest", "squash": "squash", "border": "longest"}[mode]
    fill = tuple(round(255 * m) for m in mean) if mode == "border" else (0, 0, 0)
    ours = Preprocess(out, resize, pct, interpolation, mean, std, fill)  # type: ignore[arg-type]
    for size in SIZES:
        image = picture(size)
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("out", [(64, 64), (48, 80)])
def test_equals_open_clip(mode: str, out: tuple[int, int]) -> None:
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.image_transform(out, is_train=False, resize_mode=mode, fill_color=7)
    ours = Preprocess(out, mode, 1.0, "bicubic", open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, (7, 7, 7))
    for size in SIZES:
        image = picture(size)
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("CLIPImageProcessor", {}),
        ("SiglipImageProcessor", {}),
        ("ViTImageProcessor", {}),
        ("BitImageProcessor", {"size": {"shortest_edge": 256}}),
        ("BitImageProcessor", {"size": {"shortest_edge": 255}, "crop_size": {"height": 230, "width": 230}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
        ("DINOv3ViTImageProcessor", {}),
    ],
)
def test_equals_transformers_up_to_rounding(name: str, kwargs: dict) -> None:
    """transformers resizes tensors, which rounds differently from PIL by at most a few grey levels."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    from vfm_core.backbones.hf_family import _from_processor

    processor = getattr(transformers, name)(**kwargs)
    ours = _from_processor(processor, Preprocess())
    for size in SIZES[:4]:
        image = picture(size)
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        assert theirs.shape == (3, *ours.size)
        grey = (ours.denormalise(theirs) - ours.geometry(image)).abs() * 255
        assert grey.max() <= 3 and grey.mean() < 0.6


def test_normalise_and_back() -> None:
    p = Preprocess((8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x = torch.rand(2, 5, 3, 8, 8, dtype=torch.float64)
    z = p.normalise(x)
    assert z.dtype == torch.float64
    torch.testing.assert_close(z[..., 1, :, :], (x[..., 1, :, :] - 0.2) / 0.6)
    torch.testing.assert_close(p.denormalise(z), x)
    image = picture((20, 30))
    assert torch.equal(p(image), p.normalise(p.geometry(image)))


def test_any_image_mode_and_range() -> None:
    p = Preprocess((16, 16))
    for mode in ("L", "RGB", "RGBA", "P", "CMYK", "1", "I;16"):
        x = p.geometry(Image.new(mode, (20, 30)))
        assert x.shape == (3, 16, 16) and x.dtype == torch.float32 and 0 <= x.min() <= x.max() <= 1
    with pytest.raises(UserError, match=r"PIL image.*ndarray"):
        p.geometry(np.zeros((4, 4, 3)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preprocess", "size", "box"),
    [
        (Preprocess((100, 100), "shortest"), (200, 100), (50, 0, 150, 100)),
        (Preprocess((100, 100), "shortest", 0.5), (400, 200), (150, 50, 250, 150)),
        (Preprocess((100, 100), "squash"), (200, 100), (0, 0, 200, 100)),
        (Preprocess((100, 100), "squash", 0.5), (200, 100), (50, 25, 150, 75)),
        (Preprocess((100, 100), "longest"), (200, 100), (0, -50, 200, 150)),
        (Preprocess((100, 100), "none"), (60, 140), (-20, 20, 80, 120)),
        (Preprocess((100, 200), "shortest"), (100, 100), (0, 25, 100, 75)),
    ],
)
def test_box_by_hand(preprocess: Preprocess, size: tuple[int, int], box: tuple[float, ...]) -> None:
    assert preprocess.box(size) == pytest.approx(box)


geometries = st.builds(
    Preprocess,
    size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    resize=st.sampled_from(["shortest", "squash", "longest", "none"]),
    crop_pct=st.floats(0.5, 1.0),
    interpolation=st.just("bilinear"),
    fill=st.just((0, 0, 0)),
)


@settings(max_examples=150, deadline=None)
@given(geometries, st.integers(6, 90), st.integers(6, 90))
def test_box_inverts_the_geometry(p: Preprocess, width: int, height: int) -> None:
    """Column u of the input shows original x0 + u / w * (x1 - x0): a picture of its own coordinates tells."""
    x = np.broadcast_to((np.arange(width) + 0.5)[None, :], (height, width))
    y = np.broadcast_to((np.arange(height) + 0.5)[:, None], (height, width))
    scale = 200 / max(width, height)
    coordinates = np.stack([x * scale, y * scale, np.full_like(x, 255.0)], -1).round().astype(np.uint8)
    seen = p.geometry(Image.fromarray(coordinates)) * 255
    x0, y0, x1, y1 = p.box((width, height))
    h, w = p.size
    gx = x0 + (torch.arange(w) + 0.5) / w * (x1 - x0)
    gy = y0 + (torch.arange(h) + 0.5) / h * (y1 - y0)
    # Near the border the filter has nothing beyond the picture to average with, so only the inside is exact.
    mx, my = 1.5 * max((x1 - x0) / w, 1), 1.5 * max((y1 - y0) / h, 1)
    inside = ((gx > mx) & (gx < width - mx))[None, :] & ((gy > my) & (gy < height - my))[:, None]
    assert torch.all((seen[0] / scale - gx[None, :]).abs()[inside] < 1.2 / scale + 0.02)
    assert torch.all((seen[1] / scale - gy[:, None]).abs()[inside] < 1.2 / scale + 0.02)
    padded = (gx[None, :].expand(h, w) < 0) | (gx[None, :] > width) | (gy[:, None] < 0) | (gy[:, None] > height)
    assert torch.equal(seen[2] == 0, padded)


@given(geometries)
def test_dict_round_trip(p: Preprocess) -> None:
    again = Preprocess.from_dict(json.loads(json.dumps(p.to_dict())))
    assert again == p and hash(again) == hash(p)


def test_settings_are_checked_and_canonical() -> None:
    assert Preprocess(size=[8, 8.0], mean=[0, 0, 0], crop_pct=1) == Preprocess((8, 8), mean=(0.0, 0.0, 0.0))  # type: ignore
    assert Preprocess((8, 8)).with_size(4, 6).size == (4, 6)
    assert Preprocess.from_dict({"size": [8, 8]}) == Preprocess((8, 8))
    for bad, match in (
        ({"size": (0, 8)}, "size"),
        ({"size": (8,)}, "size"),
        ({"size": (8.5, 8)}, "size"),
        ({"resize": "shortst"}, "unknown resize mode.*shortest"),
        ({"interpolation": "cubic"}, "unknown interpolation.*bicubic"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_pct": 1.1}, "crop_pct"),
        ({"std": (1, 1, 0)}, "std"),
        ({"mean": (0.5,)}, "mean must have three values"),
        ({"fill": (0, 0)}, "fill must have three"),
    ):
        with pytest.raises(UserError, match=match):
            Preprocess(**bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"unknown field.*'crop'.*crop_pct"):
        Preprocess.from_dict({"crop": 1})


def test_shared_view() -> None:
    small = Preprocess((32, 32), "squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    large = Preprocess((64, 64), "shortest", 0.9)
    geometry, (to_small, to_large) = shared_view([small, large])
    image = picture((120, 90))
    view = geometry(image)
    assert torch.equal(view, large.geometry(image))
    assert torch.equal(to_large(view), large(image))
    reduced = to_small(view)
    assert reduced.shape == (3, 32, 32) and small.denormalise(reduced).min() >= -1e-6
    flat = torch.full((2, 5, 3, 64, 64), 0.25)
    torch.testing.assert_close(to_small(flat), torch.full((2, 5, 3, 32, 32), -0.5))
    with pytest.raises(UserError, match="aspect ratio"):
        shared_view([small, Preprocess((32, 64))])
    with pytest.raises(UserError, match="at least one"):
        shared_view([])
