"""Accumulated and window scores against loops written from the equations and the official formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.core import accumulated_scores, pool_scores, sample_rows, window_scores
from meda_kv.core.scores import parse_queries
from vfm_core.errors import UserError


def draw(seed=0, batch=2, heads=4, kv_heads=2, n=21, dim=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=g, dtype=dtype) * 1.5
    k = torch.randn(batch, kv_heads, n, dim, generator=g, dtype=dtype) * 1.5
    return q, k, torch.rand(batch, n, generator=g) < 0.6


def loop_scores(q, k, rows, real, group):
    """Column sums of one batch row over the given query rows, one softmax at a time: [Hkv, n]."""
    heads, n, dim = q.shape
    size = heads // k.shape[0]
    sums = torch.zeros(heads, n, dtype=torch.float64)
    for h in range(heads):
        for i in rows:
            keys = [j for j in range(i + 1) if real[j]]
            logits = [float(q[h, i] @ k[h // size, j]) / dim**0.5 for j in keys]
            weights = [math.exp(x - max(logits)) for x in logits]
            for j, w in zip(keys, weights):
                sums[h, j] += w / sum(weights)
    grouped = sums.view(k.shape[0], size, n)
    return {"mean": grouped.mean(1), "max": grouped.amax(1), "sum": grouped.sum(1)}[group]


@pytest.mark.parity
@pytest.mark.parametrize("group", ["mean", "max", "sum"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("queries", ["all", "text", "window:5"])
def test_accumulated_scores_equal_the_loops(group, heads, queries):
    q, k, visual = draw(heads=heads[0], kv_heads=heads[1], n=13)
    chosen = {
        "all": lambda b: range(13),
        "text": lambda b: [i for i in range(13) if not visual[b, i]],
        "window:5": lambda b: range(8, 13),
    }[queries]
    wanted = torch.stack([loop_scores(q[b], k[b], chosen(b), [True] * 13, group) for b in range(2)])
    torch.testing.assert_close(accumulated_scores(q, k, queries, group, visual=visual), wanted)
    single = accumulated_scores(q.float(), k.float(), queries, group, visual=visual)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("queries", ["all", "text", "window:5"])
@pytest.mark.parametrize("side", ["left", "right", "hole"])
def test_accumulated_scores_ignore_padding(queries, side):
    q, k, visual = draw(1, n=13)
    real = torch.ones(2, 13, dtype=torch.bool)
    real[0, {"left": slice(0, 4), "right": slice(9, None), "hole": slice(5, 7)}[side]] = False
    places = [[i for i in range(13) if real[b, i]] for b in range(2)]
    rows = {
        "all": places,
        "text": [[i for i in places[b] if not visual[b, i]] for b in range(2)],
        "window:5": [p[-5:] for p in places],
    }[queries]
    wanted = torch.stack([loop_scores(q[b], k[b], rows[b], real[b], "mean") for b in range(2)])
    got = accumulated_scores(q, k, queries, valid=real, visual=visual)
    torch.testing.assert_close(got, wanted)
    assert not got.masked_select(~real[:, None].expand_as(got)).any()
    bare = torch.tensor(places[0])
    alone = accumulated_scores(q[:1][:, :, bare], k[:1][:, :, bare], queries, visual=visual[:1, bare])
    torch.testing.assert_close(got[:1][:, :, bare], alone)


@pytest.mark.parity
@pytest.mark.parametrize("block", [1, 7, 21])
@pytest.mark.parametrize("queries", ["all", "text", "window:9", "sample:33"])
def test_accumulated_scores_do_not_depend_on_the_block(block, queries):
    q, k, visual = draw(2, n=21 if queries != "sample:33" else 60)
    plain = accumulated_scores(q, k, queries, visual=visual)
    torch.testing.assert_close(
        accumulated_scores(q, k, queries, visual=visual, block=block), plain, rtol=1e-12, atol=1e-12
    )


def test_accumulated_scores_add_up_over_chunks():
    q, k, _ = draw(3)
    parts = [accumulated_scores(q[:, :, a:b], k[:, :, :b], offset=a) for a, b in ((0, 8), (8, 9), (9, 21))]
    total = sum(F.pad(p, (0, 21 - p.shape[2])) for p in parts)
    torch.testing.assert_close(total, accumulated_scores(q, k))
    torch.testing.assert_close(total.sum(-1), torch.full((2, 2), 21.0, dtype=torch.float64))


def test_accumulated_scores_follow_a_mask():
    q, k, _ = draw(4)
    causal = torch.ones(21, 21, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    torch.testing.assert_close(accumulated_scores(q, k, visible=causal), accumulated_scores(q, k))
    causal[:, :, 3:9, 3:9] = True
    torch.testing.assert_close(
        accumulated_scores(q, k, "window:15", visible=causal),
        accumulated_scores(q[:, :, 6:], k, visible=causal[:, :, 6:]),
    )


def test_scores_take_the_models_precision():
    q, k, _ = draw(5)
    half = accumulated_scores(q.bfloat16(), k.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, accumulated_scores(q.bfloat16().float(), k.bfloat16().float()))


@pytest.mark.parity
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize(("window", "kernel"), [(4, 5), (7, 3), (1, 1)])
def test_window_scores_equal_the_official_snapkv(pool, window, kernel):
    # FasterDecoding/SnapKV: softmax of the last W rows over all keys, summed over rows, prefix pooled
    q, k, _ = draw(6, heads=4, kv_heads=4)
    logits = q[:, :, -window:] @ k.transpose(2, 3) / 8**0.5
    logits[..., -window:] += torch.full((window, window), -math.inf, dtype=torch.float64).triu(1)
    sums = logits.softmax(-1)[..., :-window].sum(-2)
    function = F.avg_pool1d if pool == "avg" else F.max_pool1d
    wanted = function(sums, kernel_size=kernel, padding=kernel // 2, stride=1)
    got = window_scores(q, k, window, kernel, pool)
    torch.testing.assert_close(got[..., :-window], wanted)
    torch.testing.assert_close(got[..., -window:], wanted.amax(-1, keepdim=True).expand(-1, -1, window))


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("group", ["mean", "max", "sum"])
def test_window_scores_do_not_see_padding(pool, group):
    q, k, _ = draw(7)
    real = torch.ones(2, 21, dtype=torch.bool)
    real[0, :5] = False
    real[0, 11:13] = False  # padding inside, as after a compression
    got = window_scores(q, k, 4, 5, pool, group, valid=real)
    bare = real[0].nonzero()[:, 0]
    alone = window_scores(q[:1][:, :, bare], k[:1][:, :, bare], 4, 5, pool, group)
    # positions of the bare row are contiguous, which plain causality over slots already gives
    torch.testing.assert_close(got[:1][:, :, bare], alone)
    assert not got[0][:, ~real[0]].any()
    torch.testing.assert_close(got[1:], window_scores(q[1:], k[1:], 4, 5, pool, group))


def test_window_longer_than_the_prompt():
    q, k, _ = draw(8)
    assert bool(torch.isfinite(window_scores(q, k, 99)).all())


def test_pooling_equals_torch_and_skips_holes():
    x = torch.rand(1, 2, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool_scores(x, 3), F.avg_pool1d(x, 3, 1, 1))
    real = torch.tensor([True, False, True, True, False, True, True, True, False]).expand(1, 2, -1)
    packed = F.max_pool1d(x[..., [0, 2, 3, 5, 6, 7]], 3, 1, 1)
    torch.testing.assert_close(pool_scores(x, 3, "max", real)[..., [0, 2, 3, 5, 6, 7]], packed)


def test_sampled_scores_are_unbiased():
    q, k, _ = draw(9, batch=1, heads=2, kv_heads=1, n=80, dim=4)
    exact = accumulated_scores(q, k)
    draws = torch.stack(
        [accumulated_scores(q, k, "sample:44", generator=torch.Generator().manual_seed(s)) for s in range(300)]
    )
    mean, error = draws.mean(0), draws.std(0) / 300**0.5
    assert bool(((mean - exact).abs() <= 5 * error + 1e-9).all())
    torch.testing.assert_close(draws.sum(-1), torch.full_like(draws.sum(-1), 80.0))
    assert torch.equal(draws[0], accumulated_scores(q, k, "sample:44"))  # seed 0 is the default
    torch.testing.assert_close(accumulated_scores(q, k, "sample:80"), exact)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.integers(33, 90), st.integers(0, 99))
def test_sample_rows_are_strata(counts, size, seed):
    rows, weights = sample_rows(torch.tensor(counts), size, torch.Generator().manual_seed(seed))
    assert rows.shape == weights.shape == (len(counts), size)
    for n, r, w in zip(counts, rows, weights):
        kept = r[r >= 0].tolist()
        assert kept == sorted(set(kept)) and len(kept) == min(n, size) and all(i < n for i in kept)
        assert kept[-32:] == list(range(max(0, n - 32), n))  # the last 32 are always in
        assert float(w.sum()) == n and not w[r < 0].any()
    alone, _ = sample_rows(torch.tensor(counts[:1]), size, torch.Generator().manual_seed(seed))
    assert torch.equal(alone[0], rows[0])  # no row depends on its batch mates


@pytest.mark.parametrize(
    "bad", ["", "every", "window", "window:0", "window:-3", "sample:32", "all:3", "text:", "sample:x"]
)
def test_unknown_queries_are_refused(bad):
    with pytest.raises(UserError, match="queries"):
        parse_queries(bad)


def test_scores_refuse_bad_input():
    q, k, visual = draw(10)
    with pytest.raises(UserError, match="visual"):
        accumulated_scores(q, k, "text")
    with pytest.raises(UserError, match="group"):
        accumulated_scores(q, k, group="median")
    for bad in ({"window": 0}, {"kernel": 4}, {"kernel": 0}, {"pool": "min"}):
        with pytest.raises(UserError):
            window_scores(q, k, **bad)
    assert visual.shape == (2, 21)


def test_the_order_of_the_arguments_is_fixed():
    q, k, visual = draw(30)
    real = torch.ones_like(visual)
    real[0, :4] = False
    named = accumulated_scores(q[:, :, 6:], k, queries="all", group="sum", valid=real, scale=0.2, block=5, offset=6)
    assert torch.equal(accumulated_scores(q[:, :, 6:], k, "all", "sum", real, 0.2, 5, 6), named)
