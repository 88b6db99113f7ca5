"""Collapse and repair on real photos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ft_calibrate.photos import PhotoSize, degraded, load_photos, photo_seed
from PIL import Image
from vfm_core.errors import UserError

PHOTOS = Path(__file__).parents[3].parent / "shared" / "data" / "cifar10-mini"


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    if not PHOTOS.is_dir():
        pytest.skip(f"no photos in {PHOTOS}")
    size = PhotoSize()
    return [photo_seed(f"folder:{PHOTOS}", seed, size) for seed in size.seeds]


def _mean(records: list[dict[str, Any]], arm: str, key: str) -> float:
    return float(np.mean([record["arms"][arm][key] for record in records]))


@pytest.mark.finding
@pytest.mark.slow
def test_collapse_and_repair_on_photos(records: list[dict[str, Any]]) -> None:
    """Three seeds: other networks, other seen classes."""
    assert len({tuple(record["seen"]) for record in records}) == 3
    assert _mean(records, "ft", "uy") <= 0.1 * _mean(records, "source", "uy")
    assert _mean(records, "ft", "uu") > _mean(records, "source", "uu")
    assert _mean(records, "ft", "ausuc") > 1.1 * _mean(records, "source", "ausuc")
    assert _mean(records, "ft", "gamma_alg") > 1
    assert _mean(records, "ft", "alg_yy") > _mean(records, "ft", "yy") + 0.1
    assert _mean(records, "ft", "alg_yy") > _mean(records, "source", "yy")


def test_degraded_is_grey_and_coarse() -> None:
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = degraded(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out[:, 0], out[:, 1])
    assert out.var() < 0.5 * x.mean(1).var()


def test_a_folder_without_splits_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    with pytest.raises(UserError):
        load_photos(f"folder:{tmp_path}")
