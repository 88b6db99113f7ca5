"""Merging against loops written from the equations, and against torch's scatter_reduce as in the official code."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.core import keep_mask, merge, merge_by_score, select
from meda_kv.core.merging import dropped_slots, nearest_kept
from vfm_core.errors import UserError


def draw(seed=0, batch=2, heads=2, slots=20, dim=6, kept=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, heads, slots, dim, generator=g, dtype=dtype)
    v = torch.randn(batch, heads, slots, dim, generator=g, dtype=dtype)
    scores = torch.rand(batch, heads, slots, generator=g, dtype=torch.float64)
    return k, v, scores, select(scores, kept, 0.3)


def loop_assign(k, keep, real):
    """One head: for every dropped slot the kept one of the most similar key, and the similarity."""
    out = {}
    for i in range(len(k)):
        if real[i] and i not in keep:
            sims = [float(k[i] @ k[j] / (k[i].norm() * k[j].norm())) for j in keep]
            best = max(range(len(keep)), key=lambda a: sims[a])
            out[i] = (keep[best], sims[best])
    return out


def loop_merge(x, keep, pairs, how):
    rows = []
    for j in keep:
        members = [(i, u) for i, (to, u) in pairs.items() if to == j]
        total = x[j].clone()
        for i, u in members:
            total += {"average": x[i], "pivot": (x[i] + x[j]) / 2, "weighted": u * x[i]}[how]
        rows.append(total / (len(members) + 1))
    return torch.stack(rows)


def gated(pairs, gate):
    """Pairs of every head of one batch row that pass the gate."""
    if gate == "none":
        return pairs
    if gate == "mean":
        every = [u for head in pairs for _, u in head.values()]
        ranked = [list(head.items()) for head in pairs]
        passing = [
            sum(head[r][1][1] for head in ranked) / len(ranked) >= sum(every) / len(every)
            for r in range(len(ranked[0]))
        ]
        return [{i: p for (i, p), yes in zip(head, passing) if yes} for head in ranked]
    return [{i: (j, u) for i, (j, u) in head.items() if u >= gate} for head in pairs]


@pytest.mark.parity
@pytest.mark.parametrize("how", ["average", "pivot", "weighted"])
@pytest.mark.parametrize("gate", ["none", "mean", 0.2])
@pytest.mark.parametrize("merge_keys", [True, False])
def test_merge_equals_the_loops(how, gate, merge_keys):
    k, v, _, keep = draw(1)
    got_k, got_v = merge(k, v, keep, how, gate, merge_keys)
    for b in range(2):
        pairs = [loop_assign(k[b, h], keep[b, h].tolist(), [True] * 20) for h in range(2)]
        for h, mine in enumerate(gated(pairs, gate)):
            kept = keep[b, h].tolist()
            torch.testing.assert_close(got_v[b, h], loop_merge(v[b, h], kept, mine, how))
            wanted = loop_merge(k[b, h], kept, mine, how) if merge_keys else k[b, h, kept]
            torch.testing.assert_close(got_k[b, h], wanted)
    single = merge(k.float(), v.float(), keep, how, gate, merge_keys)
    torch.testing.assert_close(single[0].double(), got_k, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single[1].double(), got_v, rtol=1e-5, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("how", ["average", "pivot", "weighted"])
def test_merge_equals_the_official_scatter_reduce(how):
    # the official code: cosine, argmax, scatter_reduce(mean, include_self); gate by head-averaged similarity
    k, v, _, keep = draw(2, batch=1)
    mask = keep_mask(keep, 20)
    pruned_k, pruned_v = (x[~mask].view(1, 2, -1, 6) for x in (k, v))
    kept_k, kept_v = (x[mask].view(1, 2, -1, 6) for x in (k, v))
    unit = torch.nn.functional.normalize
    best, index = (unit(pruned_k, dim=-1) @ unit(kept_k, dim=-1).transpose(2, 3)).max(-1)
    chosen = torch.arange(pruned_k.shape[2])
    if how != "pivot":
        chosen = (best.mean(1) >= best.mean())[0].nonzero()[:, 0]
    to = index[..., chosen, None].expand(-1, -1, -1, 6)
    for name, kept, pruned in (("k", kept_k, pruned_k), ("v", kept_v, pruned_v)):
        source = pruned[:, :, chosen]
        if how == "pivot":
            source = (source + kept.gather(2, to)) / 2
        elif how == "weighted":
            source = source * best[..., chosen, None]
        wanted = kept.scatter_reduce(2, to, source, "mean", include_self=True)
        got = merge(k, v, keep, how, "none" if how == "pivot" else "mean")
        torch.testing.assert_close(got["kv".index(name)], wanted)


@pytest.mark.parametrize("block", [1, 7, 20])
@pytest.mark.parametrize("how", ["average", "pivot", "weighted"])
def test_merge_does_not_depend_on_the_block(block, how):
    k, v, _, keep = draw(3)
    for got, wanted in zip(merge(k, v, keep, how, block=block), merge(k, v, keep, how)):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("how", ["average", "pivot", "weighted"])
@pytest.mark.parametrize("gate", ["none", "mean"])
def test_merge_ignores_padding(how, gate):
    k, v, scores, _ = draw(4)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, :6] = False
    k[0, :, :6], v[0, :, :6] = 1e3, math.nan
    keep = select(scores, torch.tensor([5, 9]), 0.3, valid=real)
    got_k, got_v = merge(k, v, keep, how, gate, valid=real)
    assert not got_k[0, :, 5:].any() and not got_v[0, :, 5:].any()
    alone = merge(k[:1, :, 6:], v[:1, :, 6:], keep[:1, :, :5] - 6, how, gate)
    torch.testing.assert_close(got_k[:1, :, :5], alone[0])
    torch.testing.assert_close(got_v[:1, :, :5], alone[1])
    other = merge(k[1:], v[1:], keep[1:], how, gate)
    torch.testing.assert_close(got_v[1:], other[1])


@pytest.mark.parametrize("how", ["none", "average", "pivot", "weighted"])
def test_merge_of_nothing_dropped_copies(how):
    k, v, _, _ = draw(5)
    keep = torch.arange(20).expand(2, 2, -1)
    got_k, got_v = merge(k, v, keep, how)
    assert torch.equal(got_k, k) and torch.equal(got_v, v) and got_k.data_ptr() != k.data_ptr()


def test_merge_none_is_a_gather_in_new_storage():
    k, v, _, keep = draw(6)
    got_k, got_v = merge(k, v, keep, "none")
    assert torch.equal(got_k[1, 0], k[1, 0, keep[1, 0]]) and torch.equal(got_v[1, 0], v[1, 0, keep[1, 0]])
    assert got_k.untyped_storage().nbytes() == 2 * 2 * 7 * 6 * 8


@pytest.mark.parity
@pytest.mark.parametrize("kept", [255, 256, 300, 383])
@pytest.mark.parametrize("block", [7, 4096])
def test_nearest_of_many_kept_is_the_first_best(kept, block):
    # searched in strips of 64: every length of the last one, ties (equal keys), rows that keep fewer, zero keys
    k, _, scores, _ = draw(11, slots=500, dim=4)
    k = k.round()
    keep = select(scores, torch.tensor([kept - 70, kept]), 0.3)
    dropped = dropped_slots(keep, 500, None)
    index, similarity = nearest_kept(k, keep, dropped, block)
    unit = torch.nn.functional.normalize(k, dim=-1)
    for b in range(2):
        for h in range(2):
            there, gone = keep[b, h][keep[b, h] >= 0], dropped[b, h][dropped[b, h] >= 0]
            alike = unit[b, h, gone] @ unit[b, h, there].T
            torch.testing.assert_close(similarity[b, h, : len(gone)], alike.amax(1))
            assert bool((alike.amax(1) - alike.gather(1, index[b, h, : len(gone), None])[:, 0] < 1e-12).all())
            assert bool((index[b, h] < len(there)).all())
    zero = torch.zeros_like(k)
    assert not nearest_kept(zero, keep, dropped, block)[0].any()  # all equal: the first


def test_merge_keeps_the_dtype_and_sums_in_float32():
    k = torch.ones(1, 1, 3000, 4, dtype=torch.bfloat16)
    got_k, got_v = merge(k, k * 3, torch.tensor([[[5]]]), "average")
    assert got_k.dtype == torch.bfloat16 and got_v.dtype == torch.bfloat16
    assert float(got_k.max()) == 1.0 and float(got_v.min()) == 3.0  # a running bfloat16 sum would stall at 256


def test_merge_of_zero_keys_is_finite():
    k = torch.zeros(1, 1, 6, 4)
    got_k, got_v = merge(k, k + 1, torch.tensor([[[1, 4]]]), "weighted")
    assert bool(torch.isfinite(got_k).all()) and bool(torch.isfinite(got_v).all())


@pytest.mark.parity
def test_merge_by_score_equals_the_loop():
    k, v, scores, keep = draw(7)
    got_k, got_v = merge_by_score(k, v, keep, scores)
    assert torch.equal(got_k, merge(k, v, keep, "none")[0])
    for b in range(2):
        for h in range(2):
            pairs = loop_assign(k[b, h], keep[b, h].tolist(), [True] * 20)
            for at, j in enumerate(keep[b, h].tolist()):
                members = [j] + [i for i, (to, _) in pairs.items() if to == j]
                weights = scores[b, h, members]
                torch.testing.assert_close(
                    got_v[b, h, at], (weights[:, None] * v[b, h, members]).sum(0) / weights.sum()
                )


def test_merge_by_score_leaves_a_slot_without_score_alone():
    k, v, scores, keep = draw(8)
    got = merge_by_score(k, v, keep, torch.zeros_like(scores))
    torch.testing.assert_close(got[1], merge(k, v, keep, "none")[1])


def test_merge_by_score_ignores_padding():
    k, v, scores, _ = draw(9)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, :6] = False
    keep = select(scores, torch.tensor([5, 9]), 0.3, valid=real)
    got = merge_by_score(k, v, keep, scores, valid=real)
    alone = merge_by_score(k[:1, :, 6:], v[:1, :, 6:], keep[:1, :, :5] - 6, scores[:1, :, 6:])
    torch.testing.assert_close(got[1][:1, :, :5], alone[1])
    assert not got[1][0, :, 5:].any()


def test_merge_refuses_bad_input():
    k, v, scores, keep = draw(10)
    for bad in ({"how": "sum"}, {"gate": "median"}, {"gate": 1.5}, {"gate": math.nan}, {"block": 0}):
        with pytest.raises(UserError):
            merge(k, v, keep, **{"how": "average", **bad})
    with pytest.raises(UserError, match="fit together"):
        merge(k, v[:, :, :4], keep)
    with pytest.raises(UserError, match="fit together"):
        merge_by_score(k, v, keep[0], scores)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_merge_average_keeps_the_total_of_every_head(data):
    # sum over kept of (members + 1) * merged value is the sum over everything real: nothing is lost
    slots, seed = data.draw(st.integers(2, 40)), data.draw(st.integers(0, 999))
    k, v, scores, keep = draw(seed, slots=slots, kept=data.draw(st.integers(1, slots)))
    ones = torch.ones_like(v)
    _, value = merge(k, v, keep, "average")
    _, scaled = merge(k, torch.cat([v, ones], -1)[..., : v.shape[-1] + 1], keep, "weighted", gate=1.0)
    assert scaled.shape[-1] == v.shape[-1] + 1  # values may be wider than keys
    low, high = v.amin(2, keepdim=True), v.amax(2, keepdim=True)
    assert bool(((value >= low - 1e-9) & (value <= high + 1e-9)).all())  # averages stay within the values
    _, constant = merge(k, ones, keep, "average")
    torch.testing.assert_close(constant, torch.ones_like(constant))
    _, by_score = merge_by_score(k, v, keep, scores)
    assert bool(((by_score >= low - 1e-9) & (by_score <= high + 1e-9)).all())


def test_merge_averages_by_default_as_the_paper_does():
    k, v, _, keep = draw(12)
    for got, wanted in zip(merge(k, v, keep), merge(k, v, keep, "average"), strict=True):
        assert torch.equal(got, wanted)
