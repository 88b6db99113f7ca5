import copy

import pytest
import torch
from ft_calibrate.recipes.averaging import (
    IterateAverage,
    RunningMean,
    SourceEnsemble,
    average_weights,
    interpolate,
    interpolate_states,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from vfm_core.errors import UserError


def state(seed, counter=3):
    g = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(3, 2, generator=g),
        "bn.running_mean": torch.randn(3, generator=g),
        "half": torch.randn(2, generator=g).half(),
        "bn.num_batches_tracked": torch.tensor(counter),
    }


def moved(net, seed):
    other = copy.deepcopy(net)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in other.state_dict().values():
            t.add_(torch.randn(t.shape, generator=g).abs() if t.is_floating_point() else 2)
    return other


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_mean_of_weights_and_statistics_with_counters_copied():
    a, b, c = state(0, 3), state(1, 9), state(2, 27)
    mean = average_weights([a, b, c])
    for k in ("w", "bn.running_mean"):
        assert torch.allclose(mean[k], (a[k] + b[k] + c[k]) / 3, atol=1e-6)
    assert mean["bn.num_batches_tracked"] == 3 and mean["half"].dtype == torch.float16
    assert same(average_weights([a]), a), "the mean of one is itself, exactly"
    assert same(average_weights(iter([a, b]), [1, 0]), a)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_shares_that_sum_to_one(shares):
    shares = [s / sum(shares) for s in shares]
    states = [state(i) for i in range(len(shares))]
    mean = average_weights(states, shares)
    assert torch.allclose(mean["w"], sum(s * x["w"] for s, x in zip(shares, states, strict=True)), atol=1e-5)


@pytest.mark.parametrize("shares", [[0.5, 0.4], [0.7, 0.7], [1.5, -0.5], [float("nan"), 1.0]])
def test_other_shares_are_refused(shares):
    with pytest.raises(UserError, match="averaging weight"):
        average_weights([state(0), state(1)], shares)


def test_nothing_to_average_and_states_that_differ():
    with pytest.raises(UserError, match="sum to 1"):
        average_weights([])
    with pytest.raises(UserError, match="sum to 1"):
        RunningMean().result()
    with pytest.raises(UserError, match=r"different models.*half"):
        average_weights([state(0), {k: v for k, v in state(1).items() if k != "half"}])
    with pytest.raises(UserError, match=r"different models.*w"):
        average_weights([state(0), {**state(1), "w": torch.zeros(2, 2)}])


def test_a_running_mean_holds_one_sum():
    mean = RunningMean()
    for i in range(8):
        mean.add(state(i), 1 / 8)
    held = [t for t in (*mean._sum.values(), *mean._like.values()) if not t.is_meta]
    assert sum(t.numel() for t in held) == sum(t.numel() for t in state(0).values())


def test_interpolation_is_exact_at_its_ends(net):
    other = moved(net, 1)
    assert same(interpolate(net, other, 0).state_dict(), net.state_dict())
    assert same(interpolate(net, other, 1).state_dict(), other.state_dict())
    half = interpolate(net, other, 0.25).state_dict()
    a, b = net.state_dict(), other.state_dict()
    assert torch.allclose(half["body.1.running_var"], 0.75 * a["body.1.running_var"] + 0.25 * b["body.1.running_var"])
    assert half["body.1.num_batches_tracked"] == b["body.1.num_batches_tracked"]
    half["fc.weight"].zero_()
    assert same(net.state_dict(), a) and same(other.state_dict(), b), "both models are as before"


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_interpolation_out_of_range(net, alpha):
    with pytest.raises(UserError, match="interpolation out of range"):
        interpolate_states(net.state_dict(), net.state_dict(), alpha)


def test_interpolation_of_different_models(net):
    with pytest.raises(UserError, match="different models"):
        interpolate(net, nn.Linear(24, 6), 0.5)


def walk(net, steps):
    """Weights after each step of a random walk."""
    g = torch.Generator().manual_seed(5)
    for _ in range(steps):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=g))
        yield net


def test_swa_equals_torch():
    net = nn.Linear(3, 2)
    average, peer = IterateAverage(net, "swa", start=0.5, epochs=6), AveragedModel(net)
    for epoch, model in enumerate(walk(net, 6), 1):
        average.after_epoch(model)
        if epoch > 3:
            peer.update_parameters(model)
    average.put_into(net)
    assert torch.allclose(net.weight, peer.module.weight, atol=1e-6) and int(average.averaged) == 3


def test_ema_is_taken_after_every_step_and_equals_torch_once_warm():
    net = nn.Linear(3, 2)
    average, peer = IterateAverage(net, "ema", decay=0.0), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.0))
    count = 0
    for epoch in range(2):
        for _ in range(3):
            average.before_step(net)
            next(walk(net, 1))
            peer.update_parameters(net)
            count += 1
        average.after_epoch(net)
        assert int(average.averaged) == count, epoch
    average.put_into(net)
    assert torch.allclose(net.weight, peer.module.weight)


def test_ema_warms_up():
    net = nn.Linear(1, 1, bias=False)
    average = IterateAverage(net, "ema", decay=0.99)
    values = []
    for model in walk(net, 40):
        average.after_epoch(model)
        values.append(model.weight.item())
    mean = values[0]
    for n, value in enumerate(values[1:], 1):
        decay = min(0.99, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * value
    average.put_into(net)
    assert net.weight.item() == pytest.approx(mean, rel=1e-4)


def test_an_average_travels_with_the_state_dict():
    net = nn.Linear(3, 2)
    one = IterateAverage(net, "ema")
    for model in walk(net, 3):
        one.after_epoch(model)
    two = IterateAverage(net, "ema")
    two.load_state_dict(one.state_dict())
    for model in walk(net, 2):
        one.after_epoch(model)
        two.after_epoch(model)
    assert same(one.state_dict(), two.state_dict())


def test_an_average_without_iterates_changes_nothing():
    net = nn.Linear(3, 2)
    average = IterateAverage(net, "swa", start=0.5, epochs=4)
    before = net.weight.clone()
    next(walk(net, 1))
    now = net.weight.clone()
    average.put_into(net)
    assert torch.equal(net.weight, now) and not torch.equal(now, before)


def test_ensembles(net, rows):
    other = moved(net, 2).eval()
    x = rows[0]
    with torch.no_grad():
        a, b = net(x), other(x)
        soft, plain = SourceEnsemble(net, other)(x), SourceEnsemble(net, other, "logit")(x)
    assert torch.allclose(soft.exp(), (a.softmax(1) + b.softmax(1)) / 2, atol=1e-6)
    assert torch.allclose(plain, (a + b) / 2)
