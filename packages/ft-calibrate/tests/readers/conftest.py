from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Writer = Callable[..., Path]


@pytest.fixture
def picture() -> Writer:
    """Write a small picture whose colour is its number, so that a mix-up of files shows."""

    def write(path: Path, number: int = 0, size: tuple[int, int] = (8, 6)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((size[1], size[0], 3), number % 256, dtype=np.uint8)
        Image.fromarray(pixels).save(path, **({"quality": 100} if path.suffix.lower() != ".png" else {}))
        return path

    return write
