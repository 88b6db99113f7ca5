import copy
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from accelerate import Accelerator
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


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "constant"])
def test_it_learns_with_every_optimizer_and_schedule(optimizer, schedule):
    config = TrainConfig(epochs=12, lr=0.05, optimizer=optimizer, schedule=schedule, batch_size=8, warmup_epochs=1)
    _, history = train(config=config, validate=accuracy)
    assert history.losses[-1] < 0.8 * history.losses[0]
    assert history.records[-1]["accuracy"] > 0.7
    assert [r["epoch"] for r in history.records] == list(range(1, 13))
    assert set(history.records[0]) == {"epoch", "loss", "lr", "seconds", "accuracy"}
    assert history.to_dict()["records"] == history.records and history.best_epoch is None


def test_frozen_parts_stay_as_they_are_and_modes_return():
    model = net()
    model.eval()
    model.head[3].train()
    before = copy.deepcopy(model.backbone)
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    seen = []
    model.register_forward_hook(lambda *_: seen.append((model.head.training, model.backbone.training)))
    train(model)
    assert same(model.backbone, before), "weights and running statistics of the frozen part"
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert set(seen) == {(True, False)}
    assert "forward" not in vars(model) and len(model._forward_hooks) == 1


def test_modes_and_random_state_return_after_an_error():
    model = net().eval()
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        train(model, on_epoch=lambda record: 1 / 0)
    assert not any(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_seed_decides_and_global_random_state_neither_matters_nor_moves():
    one = train()[1].losses
    torch.rand(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the state under test
    assert train()[1].losses == one
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert train(config=TrainConfig(epochs=4, lr=0.05, batch_size=8, seed=1))[1].losses != one


def test_validate_runs_in_eval_mode_without_gradients_and_does_not_change_the_run():
    def validate(model):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        torch.rand(5)
        return {"x": torch.tensor(2.0)}

    _, history = train(validate=validate)
    assert history.records[0]["x"] == 2.0
    assert history.losses == train()[1].losses


def test_nothing_to_train():
    with pytest.raises(UserError, match="nothing to train"):
        train(net().requires_grad_(False))


def test_no_batches():
    with pytest.raises(UserError, match="no batch to train on"):
        train(batches=lambda epoch, generator: iter(()))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_accumulated_batches_equal_one_large_batch(optimizer):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    settings = {"epochs": 3, "lr": 0.1, "optimizer": optimizer, "grad_clip": 0.5}
    large, history = train(copy.deepcopy(model), TrainConfig(batch_size=20, **settings))  # 20, 20, 8 rows
    small, other = train(copy.deepcopy(model), TrainConfig(batch_size=5, grad_accum=4, **settings))  # last 5 and 3 rows
    assert same(large, small, rtol=1e-4, atol=1e-5)
    assert np.allclose(history.losses, other.losses, rtol=1e-5)
    assert [r["lr"] for r in history.records] == [r["lr"] for r in other.records]


def test_clipping_bounds_the_step():
    model = nn.Linear(6, 3)
    before = copy.deepcopy(model)
    config = TrainConfig(
        epochs=1, lr=1.0, optimizer="sgd", momentum=0, schedule="constant", grad_clip=1e-3, batch_size=48
    )
    train(model, config)
    moved = math.sqrt(
        sum(float((a - b).detach().pow(2).sum()) for a, b in zip(model.parameters(), before.parameters()))
    )
    assert moved == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_torchs(nesterov):
    config = TrainConfig(
        epochs=2, lr=0.05, optimizer="sgd", momentum=0.9, nesterov=nesterov, schedule="constant", batch_size=48
    )
    model = nn.Linear(6, 3)
    mine = copy.deepcopy(model)
    fit(model, lambda epoch, generator: [(X, Y)] * 3, nn.functional.cross_entropy, config)
    optimizer = torch.optim.SGD(mine.parameters(), 0.05, momentum=0.9, nesterov=nesterov)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(mine(X), Y).backward()
        optimizer.step()
    assert same(model, mine)


@pytest.mark.parametrize("optimizer", ["adabelief", "adadelta", "adagrad", "rmsprop", "lamb", "sgdw"])
def test_rules_of_timm_learn_and_groups_keep_their_own_rates(optimizer):
    lr = 1.0 if optimizer == "adadelta" else 0.02  # it scales its steps by itself
    config = TrainConfig(epochs=6, lr=lr, optimizer=optimizer, batch_size=8, schedule="constant", weight_decay=1e-4)
    model = net()
    before = copy.deepcopy(model)
    groups = [{"params": model.head[0].parameters(), "lr": 0.0}, {"params": model.head[4].parameters()}]
    _, history = train(model, config, param_groups=groups)
    assert same(model.head[0], before.head[0]) and not same(model.head[4], before.head[4])
    assert history.losses[-1] < history.losses[0]


def test_a_run_with_a_rule_of_timm_resumes_exactly(tmp_path):
    config = TrainConfig(epochs=4, lr=0.02, optimizer="rmsprop", batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        train(
            config=config,
            out=tmp_path,
            on_epoch=lambda r: (_ for _ in ()).throw(KeyboardInterrupt) if r["epoch"] == 2 else None,
        )
    assert same(train(config=config, out=tmp_path, resume=True)[0], train(config=config)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adabelieve"}, "unknown optimizer in training settings: 'adabelieve'; did you mean adabelief"),
        ({"optimizer": "lookahead"}, "unknown optimizer"),
        ({"nesterov": True}, "nesterov needs sgd with momentum"),
        ({"nesterov": True, "optimizer": "sgd", "momentum": 0.0}, "use optimizer='sgd' with momentum above 0"),
    ],
)
def test_rules_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


def test_a_rule_that_needs_what_is_not_here():
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(UserError, match="optimizer bnbadam cannot be made"):
        train(config=TrainConfig(optimizer="bnbadam"))


def test_groups_keep_their_own_learning_rate():
    model = net()
    heads = [{"params": model.head[0].parameters(), "lr": 0.0}, {"params": model.head[4].parameters()}]
    before = copy.deepcopy(model)
    train(model, param_groups=heads)
    assert same(model.head[0], before.head[0]) and not same(model.head[4], before.head[4])


def test_best_epoch_is_kept_also_across_a_resume(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.9}
    weights = {}

    def validate_from(start):
        count = iter(range(start, 5))

        def validate(model):
            epoch = next(count)
            weights[epoch] = copy.deepcopy(model.head[4].weight)
            return {"score": scores[epoch]}

        return validate

    model, history = train(validate=validate_from(1), keep_best="score")
    assert history.best_epoch == 2 and torch.equal(model.head[4].weight, weights[2])
    with pytest.raises(KeyboardInterrupt):
        train(
            out=tmp_path,
            validate=validate_from(1),
            keep_best="score",
            on_epoch=lambda r: (_ for _ in ()).throw(KeyboardInterrupt) if r["epoch"] == 3 else None,
        )
    again, other = train(out=tmp_path, resume=True, validate=validate_from(4), keep_best="score")
    assert other.best_epoch == 2 and torch.equal(again.head[4].weight, weights[2])
    with pytest.raises(UserError, match="did you mean score"):
        train(validate=validate_from(1), keep_best="scor")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, bad):
    calls = []

    def loss_fn(outputs, targets):
        calls.append(1)
        loss = nn.functional.cross_entropy(outputs, targets)
        return loss * bad if len(calls) == 15 else loss  # epoch 3 of 6 steps each, step 3

    model = net()
    good = {}
    with pytest.raises(
        UserError, match=r"loss is not finite in epoch 3, step 3.*lower the learning rate.*after epoch 2"
    ):
        fit(
            model,
            rows(),
            loss_fn,
            CONFIG,
            out=tmp_path,
            on_epoch=lambda r: good.update(model=copy.deepcopy(model)) and None,
        )
    assert same(model, good["model"])
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 2
    again, history = train(out=tmp_path, resume=True)
    assert same(again, train()[0]) and len(history.records) == 4


def test_weights_that_are_not_finite_are_not_stored(tmp_path):
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    def loss_fn(outputs, targets):
        return nn.functional.cross_entropy(Explode.apply(outputs), targets)

    config = TrainConfig(epochs=2, lr=0.1, optimizer="sgd", batch_size=48)
    with pytest.raises(UserError, match="weights are not finite in epoch 1"):
        fit(net(), rows(48), loss_fn, config, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_bf16_follows_fp32_in_one_process_and_losses_are_fp32():
    seen = []

    def loss_fn(outputs, targets):
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, targets)

    mine = Accelerator(cpu=True)
    for precision in ("no", "bf16", "no"):
        config = TrainConfig(epochs=1, lr=0.05, batch_size=8, mixed_precision=precision)
        model = net()
        dtypes = []
        model.head[4].register_forward_hook(lambda m, i, o, dtypes=dtypes: dtypes.append(o.dtype))
        fit(model, rows(), loss_fn, config)
        assert set(dtypes) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert set(seen) == {torch.float32}
    assert mine.mixed_precision == "no", "the caller's own accelerator is as before"


def test_fp16_on_the_cpu_is_refused():
    with pytest.raises(UserError, match="fp16 training needs a GPU"):
        train(config=TrainConfig(epochs=1, lr=0.1, mixed_precision="fp16"))


SCRIPT = textwrap.dedent("""
    import sys
    import torch
    from vfm_core.train import TrainConfig, fit, tensor_batches

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(52, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    config = TrainConfig(epochs=3, lr=0.05, batch_size=4, grad_accum=int(sys.argv[2]))
    epochs = []
    history = fit(model, tensor_batches(x[:48], y[:48], batch_size=4), torch.nn.functional.cross_entropy, config,
                  out=sys.argv[1] + "/run", on_epoch=lambda r: epochs.append(r["epoch"]))
    import os
    torch.save([history.losses, epochs, dict(model.state_dict())], sys.argv[1] + f"/{os.environ.get('RANK', 'one')}.pt")
""")


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_rows(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    subprocess.run([sys.executable, script, one, "2"], check=True, timeout=300)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, two, "1"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    expected, _, alone = torch.load(one / "one.pt")
    for rank, epochs in ((0, [1, 2, 3]), (1, [])):
        losses, seen, weights = torch.load(two / f"{rank}.pt")
        assert seen == epochs, "only the main process tells"
        assert np.allclose(losses, expected, rtol=1e-5)
        assert all(torch.allclose(weights[k], alone[k], atol=1e-6) for k in alone)
