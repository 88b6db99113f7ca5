"""The series of a fine-tuning: the same numbers as the functions, an untouched model, and a resumed run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ft_calibrate.analyses_features import DISTANCES, MOVEMENTS
from ft_calibrate.epoch_log import EpochLog, series
from torch import Tensor, nn
from vfm_core.errors import UserError

SEEN = [0, 1]


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.fc = nn.Linear(8, 4)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.rand(p.shape, generator=generator) - 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


def data(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 2, 2, generator=generator), torch.arange(n) % 4


def step(model: nn.Module, amount: float) -> None:
    """Stand-in for an epoch of training."""
    with torch.no_grad():
        model.get_parameter("body.1.weight").add_(amount * torch.linspace(-1, 1, 96).reshape(8, 12))


def test_a_look_leaves_the_model_alone_and_records_every_series() -> None:
    model = Net().train()
    model.body[2].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    log = EpochLog(SEEN, data(), classes=4, train=data(seed=1))
    first = log(model)
    assert model.training and not model.body[2].training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    step(model, 0.2)
    second = log(model)
    assert [r["epoch"] for r in log.records] == [0, 1]
    assert not any(k.startswith("movement") for k in first)
    assert {k.removeprefix("movement/") for k in second if k.startswith("movement/")} == set(MOVEMENTS)
    assert {k.removeprefix("distance/") for k in second if k.startswith("distance/")} == set(DISTANCES)
    assert all(isinstance(v, float) and math.isfinite(v) for v in second.values())
    weight = model.fc.weight.detach().numpy()
    assert second["head_norm/U"] == pytest.approx(np.linalg.norm(weight[2:], axis=1).mean(), rel=1e-6)
    with torch.no_grad():
        z = model.eval()(data()[0]).numpy()
    assert second["logit_scale/test/max_U"] == pytest.approx(z[:, 2:].max(1).mean(), rel=1e-5)


def test_train_data_of_the_seen_classes_only_leave_absent_series_open() -> None:
    x, y = data(seed=1)
    values = EpochLog(SEEN, data(), classes=4, train=(x[y < 2], y[y < 2]))(Net())
    assert "distance/train/U/own_class" not in values and math.isfinite(values["distance/train/S/own_class"])
    with pytest.raises(UserError, match="classes are unknown"):
        EpochLog(SEEN, data())


def run(log: EpochLog, epochs: range, amounts: list[float]) -> list[dict[str, float]]:
    model = Net()
    for amount in amounts[: epochs.start]:
        step(model, amount)
    found = []
    for e in epochs:
        if e:
            step(model, amounts[e])
        found.append(log(model))
    return found


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a == pytest.approx(b)


def test_a_resumed_run_goes_on_with_its_series(tmp_path: Path) -> None:
    amounts = [0.0, 0.3, 0.2, 0.1]
    whole = run(EpochLog(SEEN, data(), classes=4), range(4), amounts)

    def log() -> EpochLog:
        return EpochLog(SEEN, data(), classes=4, keep=tmp_path / "means.npz")

    run(log(), range(2), amounts)
    resumed = log()
    assert_same(run(resumed, range(2, 4), amounts), whole[2:])
    assert [r["epoch"] for r in resumed.records] == [2, 3]
    again = log()  # killed after the look, before the epoch was saved: epoch 3 is looked at once more
    assert_same(run(again, range(3, 4), amounts), whole[3:])
    fresh = log()  # a new run beside the old file
    assert_same(run(fresh, range(2), amounts), whole[:2])
    assert [r["epoch"] for r in fresh.records] == [0, 1]
    (tmp_path / "means.npz").write_bytes(b"torn")
    assert_same(run(log(), range(1), amounts), whole[:1])


def test_series_reads_logs_and_histories() -> None:
    history: list[dict[str, Any]] = [
        {"epoch": 0, "loss": 1.0, "head_norm/S": 1.0, "head_norm/U": 2.0},
        {"epoch": 1, "validate": {"head_norm/S": 3.0, "head_norm/U": None}},
        {"stage": "ft", "loss": 0.5},
    ]
    epochs, lines = series(history, "head_norm")
    assert epochs == [0.0, 1.0] and lines["S"] == [1.0, 3.0] and lines["U"][0] == 2.0 and math.isnan(lines["U"][1])
    assert series([], "margin/test") == ([], {})


def test_fine_tune_takes_it_as_validate() -> None:
    from ft_calibrate.recipes.finetune import fine_tune

    x, y = data()
    log = EpochLog(SEEN, data(seed=2), classes=4)
    done = fine_tune(Net(), (x[y < 2], y[y < 2]), SEEN, "ft", lr=0.05, epochs=2, batch_size=10, validate=log)
    epochs, lines = series(done.history, "head_norm")
    assert epochs == [0.0, 1.0, 2.0] and len(set(lines["S"])) == 3
    assert series(log.records, "head_norm")[1] == lines


@pytest.mark.parametrize("recipe", ["source-ensemble", "wise", "lora", "cosine-head+swa", "lolsgd+source-ensemble"])
@pytest.mark.parametrize("given", [False, True])
def test_every_recipe_can_be_watched(recipe: str, given: bool) -> None:
    from ft_calibrate.classifier import load_classifier
    from ft_calibrate.recipes.finetune import fine_tune

    x, y = data()
    net = Net().eval()
    log = EpochLog(SEEN, data(seed=2), classes=4, classifier=load_classifier(net) if given else None)
    done = fine_tune(net, (x[y < 2], y[y < 2]), SEEN, recipe, lr=0.05, epochs=2, batch_size=10, validate=log)
    assert [(r["epoch"], r["stage"]) for r in log.records] == [(r["epoch"], r["stage"]) for r in done.history]
    last = log.records[-1]
    with torch.no_grad():
        right = done.model(data(seed=2)[0]).argmax(1) == data(seed=2)[1]
    assert last["accuracy/Y/Y"] == pytest.approx(float(right.float().mean()))
    for records in (log.records, done.history):
        epochs, lines = series(records, "head_norm")
        assert epochs == [0.0, 1.0, 2.0] and lines["S"] == [r["head_norm/S"] for r in done.history[:3]]


def test_unreadable_pictures_are_told() -> None:
    from ft_calibrate.classifier import load_classifier
    from tinyworld.glyphs import Glyphs

    class Torn(Glyphs):
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise UserError("torn")
            return super().__getitem__(index)

    start = load_classifier("tiny:glyph-cnn")
    told: list[int] = []
    log = EpochLog(
        [0, 1], Torn(n=2), classes=20, classifier=start, on_error=lambda index, name, error: told.append(index)
    )
    assert 0 <= log(start.model)["accuracy/Y/Y"] <= 1 and told == [3]
