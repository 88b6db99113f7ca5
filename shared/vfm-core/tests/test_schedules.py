import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vfm_core.errors import UserError
from vfm_core.schedules import learning_rate_factor
from vfm_core.train import TrainConfig, fit, tensor_batches

SEED = torch.Generator().manual_seed(0)
X = torch.randn(48, 6, generator=SEED)
Y = (X @ torch.randn(6, 3, generator=SEED)).argmax(1)


def rows(batch_size):
    return tensor_batches(X, Y, batch_size=batch_size)


def rates(config, batches=None):
    model = nn.Linear(6, 3)
    seen = []
    optimizers = []
    original = torch.optim.SGD.step

    def step(self, *args, **options):
        optimizers.append(self)
        seen.append(self.param_groups[0]["lr"])
        return original(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        fit(model, batches or rows(config.batch_size), nn.functional.cross_entropy, config)
    return seen


def test_cosine_with_warmup_by_steps():
    config = TrainConfig(epochs=5, lr=1.0, optimizer="sgd", warmup_epochs=2, lr_min=0.1, batch_size=12)
    seen = rates(config)
    assert len(seen) == 20
    assert np.allclose(seen[:8], np.arange(1, 9) / 8)
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 12)) for i in range(12)]
    assert np.allclose(seen[8:], expected)


def test_constant_with_warmup_and_schedule_without_a_known_length():
    config = TrainConfig(epochs=4, lr=1.0, optimizer="sgd", schedule="constant", warmup_epochs=1, batch_size=12)
    assert np.allclose(rates(config), [0.25, 0.5, 0.75, 1] + [1] * 12)
    cosine = TrainConfig(epochs=4, lr=1.0, optimizer="sgd", batch_size=12)
    source = rows(12)
    seen = rates(cosine, lambda epoch, generator: iter(source(epoch, generator)))
    assert np.allclose(seen, np.repeat([0.5 * (1 + math.cos(math.pi * e / 4)) for e in range(4)], 4))


def test_onecycle_is_torchs():
    config = TrainConfig(epochs=3, lr=0.5, optimizer="sgd", schedule="onecycle", batch_size=12)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=12)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 12:
            scheduler.step()
    assert np.allclose(rates(config), expected)
    with pytest.raises(UserError, match="onecycle needs to know"):
        rates(config, lambda epoch, generator: iter(rows(12)(epoch, generator)))


@settings(deadline=None)
@given(
    epochs=st.integers(1, 50),
    warmup=st.floats(0, 0.99),
    low=st.floats(0, 1),
    at=st.floats(0, 1.2),
    schedule=st.sampled_from(["cosine", "constant"]),
)
def test_learning_rate_stays_between_its_bounds(epochs, warmup, low, at, schedule):
    config = TrainConfig(epochs=epochs, lr=0.3, warmup_epochs=warmup * epochs, lr_min=0.3 * low, schedule=schedule)
    factor = learning_rate_factor(config, at * epochs, 0.01)
    assert 0 < factor <= 1 + 1e-12 or (config.lr_min == 0 and factor == pytest.approx(0, abs=1e-9))
    if at >= warmup + 1e-9:
        assert factor >= low - 1e-12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("lr", 0.0),
        ("lr", math.inf),
        ("lr", math.nan),
        ("weight_decay", -1.0),
        ("momentum", 1.0),
        ("warmup_epochs", 20),
        ("lr_min", 1.0),
        ("batch_size", 0),
        ("grad_clip", 0.0),
        ("grad_accum", 0),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(UserError, match=f"{field} out of range in training settings: {value}"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "near"),
    [("optimizer", "adamW2", "adamw"), ("schedule", "cos", "cosine"), ("mixed_precision", "bf", "bf16")],
)
def test_unknown_names_get_suggestions(field, value, near):
    with pytest.raises(UserError, match=f"unknown {field} in training settings: '{value}'; did you mean.*{near}"):
        TrainConfig(**{field: value})
