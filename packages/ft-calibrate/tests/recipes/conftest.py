"""A small network with BatchNorm and a task of six classes, three of which have training rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

SEEN = [0, 1, 2]


def make_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        body = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        net = nn.Sequential(OrderedDict(body=body, flat=nn.Flatten(), fc=nn.Linear(24, 6)))
        net.train()
        for _ in range(3):  # statistics that are not the initial ones
            net(torch.randn(16, 1, 6, 6))
    return net.eval()


def make_rows(n: int = 44, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    patterns = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    return patterns[y] + 0.5 * torch.randn(n, 1, 6, 6, generator=generator), y


@pytest.fixture
def net() -> nn.Sequential:
    return make_net()


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    return make_rows()


@pytest.fixture
def everything() -> tuple[Tensor, Tensor]:
    return make_rows(classes=6)


@pytest.fixture
def accuracy(rows: tuple[Tensor, Tensor]) -> Callable[[nn.Module], dict[str, float]]:
    x, y = rows
    return lambda model: {"accuracy": float((model(x).argmax(1) == y).float().mean())}
