"""The short way through attention against the reference scan, on random shapes, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.core import accumulated_scores, attention_entropy, cross_entropy_sums, scan_attention
from meda_kv.core import entropy as entropy_module
from meda_kv.core import scores as scores_module
from meda_kv.core.blocks import drop_plain_mask, take
from meda_kv.core.entropy import self_entropy_rows, self_entropy_sums
from meda_kv.core.scores import picked_sums
from meda_kv.core.tiles import causal_sums, tile_mean_entropy, tile_sums
from vfm_core.errors import UserError


def prompt(seed=0, batch=2, heads=4, kv_heads=2, n=90, dim=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, h, n, dim, generator=g, dtype=dtype) * 1.5 for h in (heads, kv_heads))
    return q, k, torch.rand(batch, n, generator=g) < 0.6


@st.composite
def cases(draw):
    """Queries, keys, how far each row sees, weights, real slots and the size of a tile."""
    batch, kv_heads, groups = (draw(st.integers(1, 3)) for _ in range(3))
    slots, count, dim = draw(st.integers(1, 90)), draw(st.integers(1, 90)), draw(st.sampled_from([1, 4, 7]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    q = torch.randn(batch, kv_heads * groups, count, dim, generator=g, dtype=torch.float64) * 2
    k = torch.randn(batch, kv_heads, slots, dim, generator=g, dtype=torch.float64) * 2
    reach = torch.randint(-1, slots, (batch, count), generator=g)
    if draw(st.booleans()):
        reach = reach.sort(1).values
    weights = torch.rand(batch, count, generator=g) * (torch.rand(batch, count, generator=g) < 0.8)
    valid = None
    if draw(st.booleans()):
        valid = torch.rand(batch, kv_heads, slots, generator=g) < draw(st.sampled_from([0.0, 0.5, 0.95]))
        k = torch.where(valid[..., None], k, math.nan)
    return q, k, reach, weights, valid, draw(st.sampled_from([1, 2**10, 2**14, 2**21]))


def reference(q, k, reach, valid):
    """The probabilities ``[B, H, R, S]`` of the scan."""
    whole = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
    k = k if valid is None else torch.where(valid[..., None], k, 0)
    for start, stop, probs in scan_attention(q, k, reach=reach, valid=valid, scale=0.4):
        whole[:, :, start:stop, : probs.shape[3]] = probs
    return whole


@pytest.mark.parity
@settings(max_examples=150, deadline=None)
@given(cases())
def test_tiles_equal_the_scan(case):
    q, k, reach, weights, valid, limit = case
    probs = reference(q, k, reach, valid)
    got = tile_sums(q, k, reach, weights, valid=valid, scale=0.4, entropy=True, limit=limit)
    torch.testing.assert_close(got.columns, (probs * weights[:, None, :, None]).sum(2), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.entropy, self_entropy_rows(probs, weights), rtol=1e-9, atol=1e-9)
    if valid is not None:
        assert not got.columns.unflatten(1, (k.shape[1], -1)).masked_select(~valid[:, :, None]).any()
    single = tile_sums(q.float(), k.float(), reach, weights, valid=valid, scale=0.4, entropy=True, limit=limit)
    assert single.columns.dtype == single.entropy.dtype == torch.float32
    torch.testing.assert_close(single.columns.double(), got.columns, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.entropy.double(), got.entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parity
@settings(max_examples=150, deadline=None)
@given(cases())
def test_tiles_of_averaged_attention_equal_the_scan(case):
    q, k, reach, weights, valid, limit = case
    average = reference(q, k, reach, valid).mean(1)
    counted = (weights * (average.sum(-1) > 0)).sum(1).double()
    wanted = torch.stack([self_entropy_rows(average[:, None], weights), counted], 1)
    got = tile_mean_entropy(q, k, reach, weights, valid=valid, scale=0.4, limit=limit)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def test_tiles_send_wide_logits_the_long_way():
    # the last key, which logits are taken relative to, is 200 below the first: exp of the difference overflows
    q, k, visual = prompt(1, batch=1, dtype=torch.float32)
    q[:, :, :, 0], k[:, :, :, 0], k[:, :, 0, 0] = 20.0, 0.0, 30.0
    reach = torch.arange(90)[None]
    assert tile_sums(q, k, reach) is None
    assert tile_mean_entropy(q, k, reach, torch.ones(1, 90)) is None
    for queries in ("all", "sample:70"):
        torch.testing.assert_close(accumulated_scores(q, k, queries), accumulated_scores(q, k, queries, block=90))
    for kind in ("cross", "cross-causal", "self"):
        got = attention_entropy(q, k, visual, kind)
        torch.testing.assert_close(got, attention_entropy(q, k, visual, kind, block=90))


def test_tiles_keep_nan_visible_and_ignore_it_in_rows_without_weight():
    q, k, _ = prompt(2)
    reach, weights = torch.arange(90).expand(2, -1), torch.ones(2, 90)
    plain = tile_sums(q, k, reach, weights * (torch.arange(90) != 7)).columns
    q[0, 1, 7] = math.nan
    weights[:, 7] = 0
    torch.testing.assert_close(tile_sums(q, k, reach, weights).columns, plain)
    k[1, 0, 3] = math.inf
    assert tile_sums(q, k, reach, weights) is None
    assert bool(torch.isnan(accumulated_scores(q, k)[1, 0]).any())


def test_tiles_leave_gradients_and_input_alone():
    q, k, _ = prompt(3)
    before = q.clone(), k.clone()
    got = tile_sums(q.requires_grad_(), k.requires_grad_(), torch.arange(90).expand(2, -1), entropy=True)
    assert not got.columns.requires_grad and not got.entropy.requires_grad and torch.is_grad_enabled()
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


@pytest.mark.parity
@pytest.mark.parametrize("queries", ["all", "text", "sample:70"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("way", ["valid", "mask"])
def test_scores_go_the_short_way(queries, side, way, monkeypatch):
    q, k, visual = prompt(4, n=120)
    visual[:, ::3] = False
    real = torch.ones(2, 120, dtype=torch.bool)
    if side:
        real[0, slice(0, 21) if side == "left" else slice(99, None)] = False
    mask = torch.ones(120, 120, dtype=torch.bool).tril() & real[:, None, None]
    options = {"visual": visual, "valid": real, "visible": mask if way == "mask" else None}
    wanted = accumulated_scores(q, k, queries, block=120, **options)

    def never(*args, **kwargs):
        raise AssertionError("the long way")

    monkeypatch.setattr(scores_module, "scan_attention", never)
    torch.testing.assert_close(accumulated_scores(q, k, queries, **options), wanted)
    mask[:, :, 30:40, 30:40] = True  # a mask that says more is nothing for tiles
    with pytest.raises(AssertionError, match="long way"):
        accumulated_scores(q, k, queries, **{**options, "visible": mask})


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["cross", "cross-causal", "self"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("rows", [None, 66])
def test_entropies_go_the_short_way(kind, side, rows, monkeypatch):
    q, k, visual = prompt(5, n=200)
    real = torch.ones(2, 200, dtype=torch.bool)
    real[0, :41] = side is None
    wanted = attention_entropy(q, k, visual, kind, valid=real, block=200, rows=rows)

    def never(*args, **kwargs):
        raise AssertionError("the long way")

    monkeypatch.setattr(entropy_module, "_SMALL", 0)
    monkeypatch.setattr(entropy_module, "scan_attention", never)
    torch.testing.assert_close(attention_entropy(q, k, visual, kind, valid=real, rows=rows), wanted)


def test_causal_sums_continue_a_prompt_and_refuse_what_they_do_not_serve():
    q, k, _ = prompt(6, n=150)
    whole = causal_sums(q, k, None, entropy=True)
    parts = [causal_sums(q[:, :, a:b], k[:, :, :b], None, offset=a, entropy=True) for a, b in ((0, 70), (70, 150))]
    early = torch.nn.functional.pad(parts[0].columns, (0, 80))
    torch.testing.assert_close(early + parts[1].columns, whole.columns)
    torch.testing.assert_close(parts[0].entropy + parts[1].entropy, whole.entropy)
    assert causal_sums(q, k, None, softcap=2.0) is None
    assert causal_sums(q[:, :, -5:], k, None, offset=145) is None  # too few rows to lay out the keys for
    assert causal_sums(q, k, None, visible=torch.ones(2, 1, 150, 150, dtype=torch.bool)) is None


def test_plain_masks_are_recognised_for_picked_rows():
    reach = torch.tensor([[2, 5, -1], [0, 3, 7]])
    columns = torch.ones(2, 8, dtype=torch.bool)
    columns[0, 1] = False
    mask = ((torch.arange(8) <= reach[..., None]) & columns[:, None])[:, None]
    mask[0, 0, 2] = True  # a row that does not matter may hold anything
    k = torch.zeros(2, 1, 8, 4)
    shown, valid = drop_plain_mask(mask, None, reach, k)
    assert shown is None and valid.tolist() == [[True, False, True, True, True, True, False, False], [True] * 8]
    _, both = drop_plain_mask(mask, torch.arange(8).expand(2, -1) != 4, reach, k)
    assert both[:, 0, 4].tolist() == [False, False] and both[1, 0].sum() == 7
    mask[1, 0, 1, 4] = True
    assert drop_plain_mask(mask, None, reach, k)[0] is mask
    assert drop_plain_mask(mask.expand(-1, 2, -1, -1), None, reach, k)[0] is not None


@pytest.mark.parametrize("shared", [True, False])
def test_take_equals_gather(shared):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, 4, generator=g)
    index = torch.randint(-1, 9, (2, 1 if shared else 3, 5), generator=g)
    wanted = x.gather(2, index.clamp(min=0).expand(-1, 3, -1)[..., None].expand(-1, -1, -1, 4))
    assert torch.equal(take(x, index), wanted)


@pytest.mark.parametrize("kind", ["cross", "self"])
def test_sampled_entropies_are_unbiased_and_fixed(kind, monkeypatch):
    q, k, visual = prompt(7, batch=1, n=120)
    exact = attention_entropy(q, k, visual, kind)
    once = attention_entropy(q, k, visual, kind, rows=12)
    assert torch.equal(once, attention_entropy(q, k, visual, kind, rows=12)) and not torch.equal(once, exact)
    assert torch.equal(attention_entropy(q, k, visual, kind, rows=120), attention_entropy(q, k, visual, kind))
    real_sample, seeds = entropy_module.sample_rows, iter(range(400))
    monkeypatch.setattr(
        entropy_module,
        "sample_rows",
        lambda count, size, always: real_sample(count, size, torch.Generator().manual_seed(next(seeds)), always),
    )
    draws = torch.stack([attention_entropy(q, k, visual, kind, rows=12) for _ in range(200)])
    assert abs(float(draws.mean() - exact)) < 5 * float(draws.std()) / 200**0.5
    assert float((draws - exact).abs().max()) < 0.5


def test_sampled_rows_do_not_depend_on_batch_mates():
    q, k, visual = prompt(8, n=120)
    real = torch.ones(2, 120, dtype=torch.bool)
    real[0, :31] = False
    for kind in ("cross", "cross-causal", "self"):
        got = attention_entropy(q, k, visual, kind, valid=real, rows=9)
        alone = attention_entropy(q[:1, :, 31:], k[:1, :, 31:], visual[:1, 31:], kind, rows=9)
        torch.testing.assert_close(got[:1], alone)


def test_sampled_sums_follow_a_mask():
    q, k, visual = prompt(9)
    causal = torch.ones(90, 90, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    for rows in (10, 80):
        plain = self_entropy_sums(q, k, rows)
        torch.testing.assert_close(self_entropy_sums(q, k, rows, visible=causal), plain)
        cross = cross_entropy_sums(q, k, visual, visual, causal=True, rows=rows)
        torch.testing.assert_close(
            cross_entropy_sums(q, k, visual, visual, causal=True, visible=causal, rows=rows), cross
        )
    causal[..., 20:60, 20:60] = True
    assert float((self_entropy_sums(q, k, 80, visible=causal) - plain)[:, 0].abs().min()) > 0.1
    assert self_entropy_sums(q, k, 10)[:, 1].tolist() == [90.0, 90.0]


@pytest.mark.parametrize("rows", [0, -3, True, 2.5])
def test_bad_samples_are_refused(rows):
    q, k, visual = prompt(10, n=10)
    for kind in ("cross", "self"):
        with pytest.raises(UserError, match="at least one row"):
            attention_entropy(q, k, visual, kind, rows=rows)


def test_picked_sums_of_nothing():
    q, k, _ = prompt(11, n=10)
    none = torch.zeros(2, 0, dtype=torch.long)
    assert not picked_sums(q, k, none, none.float()).any()
