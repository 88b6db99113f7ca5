import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import vfm_core.checkpoints
from torch import nn
from vfm_core.errors import UserError
from vfm_core.train import TrainConfig, fit, tensor_batches

SEED = torch.Generator().manual_seed(0)
X = torch.randn(48, 6, generator=SEED)
Y = (X @ torch.randn(6, 3, generator=SEED)).argmax(1)
CONFIG = TrainConfig(epochs=4, lr=0.05, batch_size=8)


class Net(nn.Module):
    """A frozen backbone with batch statistics and dropout, and a head with the same."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.backbone.requires_grad_(False)

    def forward(self, x):
        return self.head(self.backbone(x))


def net():
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(1)
        return Net()


def rows(batch_size=8, **options):
    return tensor_batches(X, Y, batch_size=batch_size, **options)


def train(model=None, config=CONFIG, batches=None, **options):
    model = net() if model is None else model
    return model, fit(model, batches or rows(config.batch_size), nn.functional.cross_entropy, config, **options)


def same(a, b, **tolerance):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], **(tolerance or {"rtol": 0, "atol": 0})) for k in a)


def accuracy(model):
    return {"accuracy": float((model(X).argmax(1) == Y).float().mean())}


def interrupted(out, config, *, after, model=None, **options):
    """Train, be interrupted in the middle of the epoch after ``after``, and resume with a new model and optimiser."""

    def source(epoch, generator):
        for i, batch in enumerate(rows(config.batch_size)(epoch, generator)):
            if epoch == after and i == 2:
                raise KeyboardInterrupt
            yield batch

    first = net() if model is None else copy.deepcopy(model)
    counted = type("Counted", (), {"__len__": lambda s: 48 // config.batch_size, "__iter__": lambda s: iter(s.it)})

    def sized(epoch, generator):
        batches = counted()
        batches.it = source(epoch, generator)
        return batches

    with pytest.raises(KeyboardInterrupt):
        train(first, config, sized, out=out, **options)
    again = net() if model is None else copy.deepcopy(model)
    with torch.no_grad():
        for p in again.head.parameters():
            p.add_(1.0)  # whatever it starts from must not matter
    return train(again, config, out=out, resume=True, **options)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "constant"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("after", [1, 3])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, schedule, optimizer, after):
    config = TrainConfig(
        epochs=4, lr=0.05, optimizer=optimizer, schedule=schedule, warmup_epochs=1, grad_accum=2, batch_size=8
    )
    whole, history = train(config=config, validate=accuracy)
    pieces, other = interrupted(tmp_path, config, after=after, validate=accuracy)
    assert other.losses == history.losses
    for key in ("lr", "accuracy"):
        assert [r[key] for r in other.records] == [r[key] for r in history.records]
    assert same(whole, pieces)


def test_interrupted_before_the_first_checkpoint_starts_over(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(batches=lambda e, g: (_ for _ in ()).throw(KeyboardInterrupt), out=tmp_path)
    assert train(out=tmp_path, resume=True)[1].losses == train()[1].losses


def test_resume_of_a_finished_run_only_loads(tmp_path):
    whole, history = train(out=tmp_path)
    again, other = train(batches=lambda e, g: pytest.fail("nothing is left to do"), out=tmp_path, resume=True)
    assert same(whole, again) and other.records == history.records
    assert other.checkpoint == tmp_path / "checkpoint.pt"


def test_checkpoint_holds_only_what_was_trained(tmp_path):
    train(out=tmp_path)
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert stored["weights"] and all(name.startswith("head.") for name in stored["weights"])
    assert "head.1.running_mean" in stored["weights"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_data_loader_with_its_own_generator_resumes(tmp_path):
    data = torch.utils.data.TensorDataset(X, Y)

    def batches():
        return torch.utils.data.DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(5))

    whole, history = train(batches=batches())
    with pytest.raises(KeyboardInterrupt):
        train(batches=batches(), out=tmp_path, on_epoch=lambda r: (_ for _ in ()).throw(KeyboardInterrupt))
    again, other = train(batches=batches(), out=tmp_path, resume=True)
    assert other.losses == history.losses and same(whole, again)
    assert len(set(history.losses)) == 4


def test_data_loader_without_a_generator_is_reproducible_and_leaves_global_state():
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 8, shuffle=True)
    before = torch.get_rng_state()
    assert train(batches=data)[1].losses == train(batches=data)[1].losses
    assert torch.equal(torch.get_rng_state(), before)


def test_stopping_early_is_remembered(tmp_path):
    seen = []

    def stop(record):
        seen.append(record["epoch"])
        return record["epoch"] == 2

    assert len(train(out=tmp_path, on_epoch=stop)[1].records) == 2
    assert len(train(out=tmp_path, resume=True, on_epoch=stop)[1].records) == 2
    assert seen == [1, 2]


def test_existing_checkpoint_is_not_overwritten_silently(tmp_path):
    train(out=tmp_path)
    with pytest.raises(UserError, match=r"a checkpoint is there.*resume=True"):
        train(out=tmp_path)


def test_changed_settings_are_named(tmp_path):
    train(out=tmp_path)
    with pytest.raises(UserError, match=r"settings differ.*lr 0\.05 -> 0\.1, seed 0 -> 3"):
        train(config=TrainConfig(epochs=4, lr=0.1, batch_size=8, seed=3), out=tmp_path, resume=True)


def test_another_model_is_refused_and_left_alone(tmp_path):
    train(out=tmp_path)
    other = nn.Linear(6, 3)
    before = copy.deepcopy(other)
    with pytest.raises(UserError, match="weights of another model"):
        train(other, out=tmp_path, resume=True)
    wider = net()
    wider.head[4] = nn.Linear(16, 4)
    with pytest.raises(UserError, match=r"head\.4\.bias is \(3,\) there and \(4,\) here"):
        train(wider, out=tmp_path, resume=True)
    assert same(other, before)


@pytest.mark.parametrize("damage", ["truncate", "garbage", "other file"])
def test_damaged_checkpoint_is_named(tmp_path, damage):
    train(out=tmp_path)
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes({"truncate": content[: len(content) // 2], "garbage": b"xyz"}.get(damage, b""))
    if damage == "other file":
        torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"not a readable checkpoint.*checkpoint\.pt"):
        train(out=tmp_path, resume=True)


def test_nan_weights_are_named(tmp_path):
    train(out=tmp_path)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    content["weights"]["head.4.bias"][1] = float("nan")
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"weights are NaN in .*checkpoint\.pt: head\.4\.bias"):
        train(out=tmp_path, resume=True)


def test_unwritable_folder_is_refused_before_the_first_epoch(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        train(batches=lambda e, g: pytest.fail("trained"), out=tmp_path / "file" / "run")


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    original = torch.save

    def save(content, path):
        if content["epoch"] == 3:
            Path(path).write_bytes(b"half a")
            raise OSError(28, "No space left on device")
        original(content, path)

    monkeypatch.setattr(vfm_core.checkpoints.torch, "save", save)
    with pytest.raises(UserError, match=r"cannot write the checkpoint.*No space left"):
        train(out=tmp_path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert train(out=tmp_path, resume=True)[1].losses == train()[1].losses


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_on_a_gpu_interrupted_and_resumed_equals_uninterrupted(tmp_path, precision):
    config = TrainConfig(epochs=4, lr=0.05, batch_size=8, mixed_precision=precision)
    cpu_state, gpu_state = torch.get_rng_state(), torch.cuda.get_rng_state()
    _, history = train(net().cuda(), config)
    _, other = interrupted(tmp_path, config, after=2, model=net().cuda())
    assert np.allclose(other.losses, history.losses, rtol=1e-5)
    assert torch.equal(torch.get_rng_state(), cpu_state) and torch.equal(torch.cuda.get_rng_state(), gpu_state)
