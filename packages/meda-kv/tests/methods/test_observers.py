"""Scorers and entropy meters: equal to the pure functions, over chunks, with padding, after crops and compressions."""

import math
from dataclasses import replace

import pytest
import torch
from meda_kv.core import accumulated_scores, attention_entropy, window_scores
from meda_kv.methods import (
    AccumulatedScorer,
    EntropyMeter,
    KeyNormScorer,
    MixedScorer,
    RandomScorer,
    RecencyScorer,
    Scorer,
    WindowScorer,
    grow,
    observe_all,
)
from meda_kv.methods.scorers import hash_uniform
from observed import N, looks, prompt, run, scores
from vfm_core.errors import UserError

ATTENTION = [
    AccumulatedScorer(),
    AccumulatedScorer(group="max"),
    AccumulatedScorer(group="sum"),
    AccumulatedScorer("text"),
    AccumulatedScorer("text", group="max"),
    AccumulatedScorer("window:9"),
    AccumulatedScorer(reduction="mean"),
    AccumulatedScorer("text", reduction="mean"),
    WindowScorer(window=6, kernel=3, most=1.0),
    WindowScorer(window=0.2, kernel=5, pool="max", group="max", most=1.0),
    RandomScorer(seed=3),
    MixedScorer(6, 3, most=1.0, queries="all"),
    MixedScorer(6, 3, most=1.0, queries="text", group="max"),
]


@pytest.mark.parity
@pytest.mark.parametrize("group", ["mean", "max", "sum"])
@pytest.mark.parametrize("queries", ["all", "text", "window:9"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_accumulated_scorer_equals_the_function(group, queries, side):
    q, k, visual = prompt(1)
    real = torch.ones_like(visual)
    if side:
        real[0, slice(0, 11) if side == "left" else slice(39, None)] = False
    wanted = accumulated_scores(q, k, queries, group, valid=real, visual=visual, scale=0.3)
    got = scores(AccumulatedScorer(queries, group), looks(q, k, visual, real), block=7)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("padded", [False, True])
def test_window_scorer_equals_the_function(pool, padded):
    q, k, visual = prompt(2)
    real = torch.ones_like(visual)
    real[0, :11] = not padded
    got = scores(WindowScorer(6, 5, pool, most=1.0), looks(q, k, visual, real))
    wanted = window_scores(q, k, 6, 5, pool, valid=real, scale=0.3)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("observer", ATTENTION, ids=repr)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cuts", [(13,), (20, 21, 22, 40), (N - 1,), (N - 3,)])
def test_scorers_do_not_see_how_a_prompt_was_cut(observer, padded, cuts):
    q, k, visual = prompt(3)
    real = torch.ones_like(visual)
    real[0, :11] = not padded
    whole = scores(observer, looks(q, k, visual, real))
    torch.testing.assert_close(scores(observer, looks(q, k, visual, real, cuts)), whole, rtol=1e-5, atol=1e-5)
    masked = scores(observer, looks(q, k, visual, real, cuts, causal_mask=True))
    torch.testing.assert_close(masked, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("observer", [*ATTENTION, AccumulatedScorer("sample:40")], ids=repr)
def test_scorers_do_not_depend_on_batch_mates(observer):
    q, k, visual = prompt(4)
    real = torch.ones_like(visual)
    real[0, :6] = False
    got = scores(observer, looks(q, k, visual, real))
    alone = scores(observer, looks(q[:1, :, 6:], k[:1, :, 6:], visual[:1, 6:]))
    torch.testing.assert_close(got[:1, :, 6:], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1:], scores(observer, looks(q[1:], k[1:], visual[1:])), rtol=1e-5, atol=1e-5)


def test_softcap_reaches_every_scorer():
    q, k, visual = prompt(5)
    for observer in (AccumulatedScorer(), AccumulatedScorer("text"), WindowScorer(6, most=1.0)):
        capped = scores(observer, looks(q, k, visual, softcap=1.0))
        assert not torch.allclose(capped, scores(observer, looks(q, k, visual)))


def test_mean_scores_divide_by_the_queries_that_could_look():
    q, k, visual = prompt(6)
    sums = scores(AccumulatedScorer(), looks(q, k, visual))
    mean = scores(AccumulatedScorer(reduction="mean"), looks(q, k, visual))
    torch.testing.assert_close(mean, sums / torch.arange(N, 0, -1))
    every = scores(AccumulatedScorer(reduction="mean-all"), looks(q, k, visual))
    torch.testing.assert_close(every, sums / N)
    text = scores(AccumulatedScorer("text", reduction="mean"), looks(q, k, visual))
    count = (~visual).float().flip(1).cumsum(1).flip(1).clamp(min=1)[:, None]
    torch.testing.assert_close(text, scores(AccumulatedScorer("text"), looks(q, k, visual)) / count)


def test_sampled_scorer_approximates_the_sums():
    q, k, visual = prompt(7, n=120)
    exact = scores(AccumulatedScorer(), looks(q, k, visual))
    draws = [scores(AccumulatedScorer("sample:60", seed=s), looks(q, k, visual)) for s in range(40)]
    torch.testing.assert_close(draws[0].sum(-1), exact.sum(-1))
    error = (torch.stack(draws).mean(0) - exact).abs().mean()
    assert float(error) < float((draws[0] - exact).abs().mean()) / 2  # errors of different seeds average out


def test_window_follows_crop_and_further_reading():
    # read 50, crop the last 5, read 5 others: as if the others had been read in the first place
    q, k, visual = prompt(8)
    scorer = WindowScorer(6, 3, most=1.0)
    other_q, other_k, _ = prompt(9)
    new_q, new_k = (torch.cat([a[:, :, :45], b[:, :, 45:]], 2) for a, b in ((q, other_q), (k, other_k)))
    state, _ = run(scorer, looks(q, k, visual))
    state["order"] = state["order"][:, :, :45]  # what a crop does to slot tensors
    last = list(looks(new_q, new_k, visual, cuts=(45,)))[-1]
    observe_all([scorer], [state], last)
    # of the six queries remembered before, the five cropped ones are forgotten and the sixth still counts
    wanted = window_scores(new_q, new_k, 6, 3, scale=0.3)
    torch.testing.assert_close(scorer.scores(state, last.key, last.value, None), wanted, rtol=1e-5, atol=1e-6)
    share = replace(scorer, window=0.12)
    torch.testing.assert_close(share.scores(state, last.key, last.value, None), wanted, rtol=1e-5, atol=1e-6)


def test_window_after_a_compression_looks_at_what_was_kept():
    q, k, visual = prompt(10)
    scorer = WindowScorer(6, 1, most=1.0)
    state, _ = run(scorer, looks(q, k, visual))
    keep = torch.stack([torch.tensor([0, 3, 7, 20, *range(44, 50)]), torch.tensor([1, 2, 9, 30, *range(44, 50)])])
    keep = keep.expand(2, 2, -1)
    state["order"] = state["order"].gather(2, keep)
    kept = k.gather(2, keep[..., None].expand(-1, -1, -1, 8))
    got = scorer.scores(state, kept, kept, None)
    logits = torch.einsum("bhid,bhjd->bhij", q[:, :, -6:], kept.repeat_interleave(2, 1)) * 0.3
    future = keep.repeat_interleave(2, 1)[:, :, None] > torch.arange(44, 50)[:, None]
    sums = logits.masked_fill(future, -math.inf).softmax(-1).sum(2).view(2, 2, 2, 10).mean(2)
    torch.testing.assert_close(got[..., :4], sums[..., :4])


def test_window_gives_tokens_that_nobody_looked_at_nothing():
    # three generated tokens that were not observed stand after the window: they are in no query's past
    q, k, visual = prompt(11)
    scorer = WindowScorer(6, 1, most=1.0)
    state, _ = run(scorer, looks(q[:, :, :47], k[:, :, :47], visual[:, :47]))
    got = scorer.scores(state, k, k, None)
    torch.testing.assert_close(got[..., :41], window_scores(q[:, :, :47], k[:, :, :47], 6, 1, scale=0.3)[..., :41])
    assert not got[..., 47:].any()


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["cross", "cross-causal", "self"])
@pytest.mark.parametrize("padded", [False, True])
def test_meter_equals_the_function(kind, padded):
    q, k, visual = prompt(12)
    real = torch.ones_like(visual)
    real[0, :11] = not padded
    wanted = attention_entropy(q, k, visual, kind, valid=real, scale=0.3)
    meter = EntropyMeter(kind)
    state, _ = run(meter, looks(q, k, visual, real), block=7)
    assert meter.value(state).dtype == torch.float32
    torch.testing.assert_close(meter.value(state), wanted, rtol=0, atol=1e-5)
    assert not state["chunked"].any()


@pytest.mark.parametrize(
    "meter", [EntropyMeter("cross-causal"), EntropyMeter("self"), EntropyMeter("cross", keep_queries=True)]
)
@pytest.mark.parametrize("cuts", [(13,), (20, 21, 40)])
def test_meter_is_exact_over_chunks(meter, cuts):
    q, k, visual = prompt(13)
    wanted = attention_entropy(q, k, visual, meter.kind, scale=0.3)
    state, _ = run(meter, looks(q, k, visual, cuts=cuts))
    torch.testing.assert_close(meter.value(state), wanted, rtol=0, atol=1e-5)
    assert not state["chunked"].any()
    masked, _ = run(meter, looks(q, k, visual, cuts=cuts, causal_mask=True))
    torch.testing.assert_close(meter.value(masked), wanted, rtol=0, atol=1e-5)


def test_cross_meter_says_that_a_prompt_came_in_chunks():
    q, k, visual = prompt(14)
    meter = EntropyMeter("cross")
    state, _ = run(meter, looks(q, k, visual, cuts=(20,)))
    assert bool(state["chunked"].all())
    whole = attention_entropy(q, k, visual, "cross", scale=0.3)
    assert not torch.allclose(meter.value(state), whole, atol=1e-4)
    first = attention_entropy(q[:, :, :20], k[:, :, :20], visual[:, :20], "cross", scale=0.3)
    early, _ = run(meter, list(looks(q, k, visual, cuts=(20,)))[:1])
    torch.testing.assert_close(meter.value(early), first, rtol=0, atol=1e-5)


def test_meter_of_one_modality():
    q, k, visual = prompt(15)
    visual[1] = True
    for kind, wanted in (("cross", [False, True]), ("cross-causal", [False, True]), ("self", [False, False])):
        state, _ = run(EntropyMeter(kind), looks(q, k, visual))
        assert torch.isnan(EntropyMeter(kind).value(state)).tolist() == wanted


def test_one_softmax_pass_serves_all_observers(monkeypatch):
    q, k, visual = prompt(16)
    observers = [
        AccumulatedScorer(),
        AccumulatedScorer(group="max"),
        EntropyMeter("self"),
        WindowScorer(6),
        EntropyMeter(),
    ]
    states = [{} for _ in observers]
    calls = []
    from meda_kv.methods import observing

    real_scan = observing.scan_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return real_scan(*args, **kwargs)

    monkeypatch.setattr(observing, "scan_attention", counted)
    (look,) = looks(q, k, visual)
    observe_all(observers, states, look, block=7)
    assert len(calls) == 1
    torch.testing.assert_close(states[0]["sums"], accumulated_scores(q, k, scale=0.3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        observers[2].value(states[2]), attention_entropy(q, k, visual, "self", scale=0.3), rtol=0, atol=1e-5
    )
    observe_all(observers[3:], states[3:], look)
    assert len(calls) == 1  # nobody wanted the attention


def test_state_is_shared_safely_between_copies():
    # a fork copies the dictionary, not the tensors: reading on must leave the other copy as it was
    q, k, visual = prompt(17)
    for observer in [*ATTENTION, EntropyMeter("self"), EntropyMeter("cross-causal")]:
        first, second = looks(q, k, visual, cuts=(30,))
        state = {}
        observe_all([observer], [state], first)
        before = {name: tensor.clone() for name, tensor in state.items()}
        kept = dict(state)
        observe_all([observer], [state], second)
        assert all(torch.equal(kept[name], before[name]) for name in before), observer


def test_simple_scorers():
    q, k, visual = prompt(18)
    (look,) = looks(q, k, visual)
    torch.testing.assert_close(KeyNormScorer().scores({}, k, k, None), -k.norm(dim=-1))
    assert RecencyScorer().scores({}, k, k, None)[1, 1].tolist() == list(range(N))
    first, second = (scores(RandomScorer(seed=s), [look]) for s in (0, 1))
    assert not torch.equal(first, second) and not torch.equal(first[:, 0], first[:, 1])
    assert float(first.min()) >= 0.0 and float(first.max()) < 1.0


def test_hash_is_uniform():
    x = hash_uniform(torch.arange(20000)[None], torch.arange(2)[:, None], layer=5, seed=2**40)
    assert abs(float(x.mean()) - 0.5) < 0.01 and abs(float(x.var()) - 1 / 12) < 0.005
    assert abs(float(torch.corrcoef(x)[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([x[0, 1:], x[0, :-1]]))[0, 1])) < 0.03


def test_equal_settings_are_one_observer():
    assert AccumulatedScorer() == AccumulatedScorer() and hash(WindowScorer()) == hash(WindowScorer())
    assert EntropyMeter("self") != EntropyMeter("cross")
    assert replace(AccumulatedScorer(), queries="text").attention is False
    assert AccumulatedScorer().attention and EntropyMeter("self").attention and not EntropyMeter("cross").attention


@pytest.mark.parametrize(
    "make",
    [
        lambda: AccumulatedScorer("some"),
        lambda: AccumulatedScorer(group="median"),
        lambda: AccumulatedScorer(reduction="max"),
        lambda: AccumulatedScorer("sample:99", reduction="mean"),
        lambda: WindowScorer(window=0),
        lambda: WindowScorer(window=1.5),
        lambda: WindowScorer(window=True),
        lambda: WindowScorer(kernel=2),
        lambda: WindowScorer(pool="min"),
        lambda: WindowScorer(most=0.0),
        lambda: WindowScorer(group="x"),
        lambda: EntropyMeter("all"),
        lambda: EntropyMeter("cross", sample=0),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(UserError):
        make()


def test_misuse_is_named():
    q, k, visual = prompt(19)
    with pytest.raises(RuntimeError, match="not read through this cache"):
        AccumulatedScorer().scores({}, k, k, None)
    with pytest.raises(RuntimeError, match="not read through this cache"):
        WindowScorer().scores({}, k, k, None)
    with pytest.raises(NotImplementedError, match="Scorer must define scores"):
        Scorer().scores({}, k, k, None)
    state, _ = run(AccumulatedScorer(), looks(q, k, visual))
    with pytest.raises(RuntimeError, match=r"cache\.reset"):
        grow(state, "sums", k[:, :, :5])
