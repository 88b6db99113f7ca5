import math

import pytest
import torch
from ft_calibrate.classifier import load_classifier
from ft_calibrate.recipes import fine_tune
from ft_calibrate.recipes.local_runs import Jobs, Processes
from ft_calibrate.recipes.lolsgd import left_in, local_seed, lolsgd, round_lr
from ft_calibrate.recipes.rows import TensorRows
from ft_calibrate.recipes.student import parameter_groups
from torch import nn
from vfm_core.errors import UserError
from vfm_core.isolation import stream

SEEN = [0, 1, 2]
OPTIONS = {"lr": 0.05, "batch_size": 16, "epochs": 3}


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_one_local_run_without_leaving_out_is_restarted_sgd(net, rows):
    """Fresh momentum in every round, the learning rate on half a cosine, and nothing else."""
    run = lolsgd(net, rows, SEEN, M=1, E=5, rho=0.0, **OPTIONS)
    mine = fine_tune(net, rows, SEEN, "wise:0", epochs=1).model  # a copy of the source
    for t in range(3):
        lr = 0.05 * 0.5 * (1 + math.cos(math.pi * t / 3))
        groups = parameter_groups(mine, mine.fc, lr, 0.1)
        optimizer = torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        order = torch.Generator().manual_seed(stream(local_seed(0, t, 0), "order", 0))
        mine.train()
        for x, y in TensorRows(*rows).source(16, 5)(0, order):
            optimizer.zero_grad()
            nn.functional.cross_entropy(mine(x), y).backward()
            optimizer.step()
    assert same(weights(run.model), weights(mine))
    assert [r["lr"] for r in run.history[1:]] == pytest.approx([round_lr(0.05, t, 3) for t in range(3)])


def test_a_round_is_the_mean_of_its_local_runs_statistics_included(net, rows):
    """M = 2 from the states of two trainings with one local run each, which start from the same weights."""
    from ft_calibrate.recipes import lolsgd as module
    from ft_calibrate.recipes.averaging import average_weights

    states = []
    original = module.local_run

    def noting(work, t, m, theta):
        state, loss = original(work, t, m, theta)
        states.append({k: v.clone() for k, v in state.items()})
        return state, loss

    module.local_run = noting
    try:
        run = lolsgd(net, rows, SEEN, M=2, E=3, T=1, **OPTIONS)
    finally:
        module.local_run = original
    assert len(states) == 2 and not same(*states)
    mean = average_weights(states)
    assert all(torch.equal(run.model.state_dict()[k], v) for k, v in mean.items())
    assert "body.1.running_var" in mean and int(run.model.state_dict()["body.1.num_batches_tracked"]) == 6


def test_left_out_classes():
    seen = torch.tensor([2, 5, 7, 11, 13, 17, 19, 23, 29, 31])
    kept = [left_in(seen, 0.3, 0, t, m) for t in range(4) for m in range(4)]
    assert all(len(k) == 7 and set(k.tolist()) < set(seen.tolist()) and bool((k.diff() > 0).all()) for k in kept)
    assert len({tuple(k.tolist()) for k in kept}) > 8
    assert torch.equal(left_in(seen, 0.3, 0, 1, 2), left_in(seen, 0.3, 0, 1, 2))
    assert torch.equal(left_in(seen, 0.0, 0, 0, 0), seen)
    assert len(left_in(seen, 1.0, 0, 0, 0)) == 1 and len(left_in(seen, 0.01, 0, 0, 0)) == 9
    assert left_in(torch.tensor([4]), 0.5, 0, 0, 0).tolist() == [4]


def test_local_runs_train_on_the_classes_left_in_only(net, rows, monkeypatch):
    from ft_calibrate.recipes import lolsgd as module

    labels = []
    original = module.fit

    def noting(student, source, *args, **options):
        batches = list(source(0, torch.Generator().manual_seed(0)))
        labels.append(set(torch.cat([b[-1] for b in batches]).tolist()))
        return original(student, source, *args, **options)

    monkeypatch.setattr(module, "fit", noting)
    lolsgd(net, rows, SEEN, M=3, E=4, rho=0.4, T=2, **OPTIONS)
    expected = [set(left_in(torch.tensor(SEEN), 0.4, 0, t, m).tolist()) for t in range(2) for m in range(3)]
    assert labels == expected and all(len(s) == 2 for s in labels)


@pytest.mark.parametrize(
    ("recipe", "steps", "expected"), [("", None, 5), ("", 3, 3), (":E=7", 3, 7), (":E=7", None, 7)]
)
def test_a_local_run_is_as_long_as_an_epoch_unless_named(recipe, steps, expected, net, rows):
    options = {**OPTIONS, "batch_size": 8, "epochs": 2, "steps_per_epoch": steps}
    run = fine_tune(net, rows, SEEN, f"lolsgd{recipe}", **options)
    assert run.settings["parts"]["lolsgd"]["E"] == expected and run.recipe == f"lolsgd{recipe}"
    counter = "body.1.num_batches_tracked"
    assert int(run.model.state_dict()[counter] - net.state_dict()[counter]) == 2 * expected
    assert same(weights(run.model), weights(lolsgd(net, rows, SEEN, E=expected, **options).model))


def test_settings_are_logged(net, rows):
    run = lolsgd(net, rows, SEEN, **OPTIONS)
    one_pass = len(rows[1]) // OPTIONS["batch_size"]
    assert run.settings["parts"]["lolsgd"] == {"M": 4, "E": one_pass, "rho": 0.3, "T": 3} and run.recipe == "lolsgd"
    assert len(run.history) == 4
    run = lolsgd(net, rows, SEEN, T=2, E=1, recipe="distill:T=3", **OPTIONS)
    assert run.recipe == "lolsgd:E=1,T=2+distill:T=3" and len(run.history) == 3


def one_process(self, processes):
    """One is as good as two to see what crosses the border, and starts in half the time."""
    assert processes == 2
    self.processes, self._pool = 1, None


@pytest.mark.slow
def test_processes_give_the_same_weights(monkeypatch):
    monkeypatch.setattr(Processes, "__init__", one_process)
    start = load_classifier("tiny:glyph-cnn")  # its class is in a module, as a process that starts afresh needs it
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 3, 16, 16, generator=generator), torch.arange(30) % 3
    options = {"epochs": 2, "M": 2, "E": 2, "batch_size": 8, "lr": 0.05}
    serial = fine_tune(start, rows, SEEN, "lolsgd+distill", **options)
    parallel = fine_tune(start, rows, SEEN, "lolsgd+distill", executor="local:2", **options)
    assert same(weights(serial.model), weights(parallel.model))
    assert [r["loss"] for r in serial.history[1:]] == [r["loss"] for r in parallel.history[1:]]
    assert serial.settings == parallel.settings


def test_a_model_that_cannot_be_sent_is_told(net, rows):
    net.extra = lambda x: x
    with pytest.raises(UserError, match=r"cannot be sent to other processes.*in a module"):
        fine_tune(net, rows, SEEN, "lolsgd", executor="local:2", **OPTIONS)


def test_a_job_of_other_settings_is_refused_and_a_missing_one_named(net, rows, tmp_path):
    fine_tune(net, rows, SEEN, "lolsgd:M=2", out=tmp_path, **OPTIONS)
    with pytest.raises(UserError, match=r"another job has other settings.*lr = 0.05 -> 0.1"):
        fine_tune(net, rows, SEEN, "lolsgd:M=2", out=tmp_path, local=1, **{**OPTIONS, "lr": 0.1})
    with pytest.raises(UserError, match=r"another local run is missing.*round-00000-local-001"):
        Jobs(tmp_path, 0, give_up_s=0.0)._wait([tmp_path / "round-00000-local-001.safetensors"])
    for wrong in (-1, 2):
        with pytest.raises(UserError, match="a local run that there is not"):
            fine_tune(net, rows, SEEN, "lolsgd:M=2", out=tmp_path, local=wrong, **OPTIONS)
