"""What a look carries beside queries and keys: attention sinks and the block; and the scorer made of two others."""

import math
from dataclasses import replace

import pytest
import torch
from meda_kv.methods import AccumulatedScorer, EntropyMeter, MixedScorer, WindowScorer
from observed import N, looks, prompt, run, scores
from vfm_core.errors import UserError


@pytest.mark.parity
@pytest.mark.parametrize("queries", ["all", "text", "sample:40"])
@pytest.mark.parametrize("padded", [False, True])
def test_mixed_scorer_is_the_sum_of_both_normalised(queries, padded):
    q, k, visual = prompt(20)
    real = torch.ones_like(visual)
    real[0, :11] = not padded
    options = {"window": 6, "kernel": 3, "most": 1.0}
    got = scores(MixedScorer(**options, queries=queries, seed=4), looks(q, k, visual, real), block=7)
    wanted = torch.zeros(2, 2, N)
    for part in (WindowScorer(**options), AccumulatedScorer(queries, seed=4)):
        mine = scores(part, looks(q, k, visual, real), block=7)
        for b in range(2):
            for h in range(2):
                places = [j for j in range(N) if real[b, j]]
                total = sum(float(mine[b, h, j]) for j in places)
                for j in places:
                    wanted[b, h, j] += float(mine[b, h, j]) / total
    got = got.masked_fill(~real[:, None], 0.0)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert (got.sum(-1) - 2).abs().max() < 1e-4
    with pytest.raises(UserError, match="the window is there already"):
        MixedScorer(queries="window:8")


SINKS = torch.tensor([0.0, 1.5, -2.0, 4.0])


def loop_attention(q, k, sinks, scale):
    """Attention of one row, one head and query at a time, with one more logit that is dropped: [H, n, n]."""
    out = torch.zeros(q.shape[0], q.shape[1], q.shape[1], dtype=torch.float64)
    groups = q.shape[0] // k.shape[0]
    for h in range(q.shape[0]):
        for i in range(q.shape[1]):
            logits = [scale * float(q[h, i] @ k[h // groups, j]) for j in range(i + 1)] + [float(sinks[h])]
            weights = [math.exp(x - max(logits)) for x in logits]
            out[h, i, : i + 1] = torch.tensor(weights[:-1]) / sum(weights)
    return out


@pytest.mark.parity
@pytest.mark.parametrize("cuts", [(), (20,)])
@pytest.mark.parametrize("block", [None, 7])
@pytest.mark.parametrize("causal_mask", [False, True])
def test_attention_sinks_draw_their_share(cuts, block, causal_mask):
    q, k, visual = prompt(21, batch=1, n=24)
    attention = loop_attention(q[0].double(), k[0].double(), SINKS, 0.3)
    assert attention.sum(-1).max() < 1 - 1e-3
    seen = [replace(look, sinks=SINKS) for look in looks(q, k, visual, cuts=cuts, causal_mask=causal_mask)]
    every = attention.sum(1).view(2, 2, -1).mean(1)
    text = (attention * ~visual[0][:, None]).sum(1).view(2, 2, -1).mean(1)
    for scorer, wanted in ((AccumulatedScorer(), every), (AccumulatedScorer("text"), text)):
        torch.testing.assert_close(scores(scorer, seen, block)[0].double(), wanted, rtol=1e-5, atol=1e-5)
    window = attention[:, -6:].sum(1).view(2, 2, -1).mean(1)
    plain = WindowScorer(6, kernel=1, most=1.0)
    torch.testing.assert_close(scores(plain, seen)[0, :, :-6].double(), window[:, :-6], rtol=1e-5, atol=1e-5)
    entropy = -torch.special.xlogy(attention, attention).sum(-1).mean()
    for meter in (EntropyMeter("self"), EntropyMeter("self", sample=100)):
        got = meter.value(run(meter, seen, block)[0])[0]
        assert abs(float(got) - float(entropy)) < 1e-5
    # the cross-modal kinds are softmax over the other modality alone: the sink has no part in them
    for kind in ("cross", "cross-causal"):
        meter = EntropyMeter(kind)
        without = run(meter, list(looks(q, k, visual, cuts=cuts, causal_mask=causal_mask)), block)[0]
        assert torch.equal(meter.value(run(meter, seen, block)[0]), meter.value(without))


def test_sinks_are_one_per_query_head():
    q, k, visual = prompt(22)
    with pytest.raises(UserError, match="one per query head"):
        run(AccumulatedScorer(), [replace(look, sinks=SINKS[:2]) for look in looks(q, k, visual)])


def test_a_look_says_how_many_rows_to_compute_at_a_time(monkeypatch):
    q, k, visual = prompt(23)
    from meda_kv.core import entropy
    from meda_kv.core import scores as core_scores
    from meda_kv.methods import observing, tail

    asked = []
    for module in (entropy, core_scores, observing, tail):
        real = module.scan_attention
        monkeypatch.setattr(
            module, "scan_attention", lambda *a, real=real, **o: (asked.append(o["block"]), real(*a, **o))[1]
        )
    observers = [AccumulatedScorer(), AccumulatedScorer("text"), EntropyMeter(), EntropyMeter("self", sample=9)]
    window = WindowScorer(6)
    for observer in [*observers, window]:
        state, last = run(observer, [replace(look, block=5) for look in looks(q, k, visual)])
    window.scores(state, last.key, last.value, last.valid)
    assert asked == [5] * 6  # one each, two directions of the cross entropy, and the window when it is asked
