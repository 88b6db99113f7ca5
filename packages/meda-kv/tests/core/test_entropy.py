"""Attention entropy against loops written from the equations."""

import math

import pytest
import torch
from meda_kv.core import attention_entropy, cross_entropy_sums, official_entropy, scan_attention
from meda_kv.core.entropy import finish_cross
from vfm_core.errors import UserError

pytestmark = pytest.mark.parity
KINDS = ("cross", "cross-causal", "self")


def draw(seed=0, batch=2, heads=4, kv_heads=2, n=23, dim=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=g, dtype=dtype) * 1.5
    k = torch.randn(batch, kv_heads, n, dim, generator=g, dtype=dtype) * 1.5
    visual = torch.rand(batch, n, generator=g) < 0.6
    visual[:, 0], visual[:, 1] = False, True
    return q, k, visual


def loop_entropy(q, k, visual, kind, real, scale=None):
    """One row of the batch, from Eq. 4-6, one query at a time; q [H, n, D], k [Hkv, n, D]."""
    heads, n, dim = q.shape
    group = heads // k.shape[0]
    scale = dim**-0.5 if scale is None else scale

    def row(h, i, keys):
        logits = [float(q[h, i] @ k[h // group, j]) * scale for j in keys]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        return [w / sum(weights) for w in weights]

    def ent(p):
        return -sum(x * math.log(x) for x in p if x > 0)

    places = [i for i in range(n) if real[i]]
    if kind == "self":
        total = 0.0
        for i in places:
            keys = [j for j in places if j <= i]
            total += sum(ent(row(h, i, keys)) for h in range(heads)) / heads
        return total / len(places)
    value = 0.0
    for side in (False, True):
        rows = [i for i in places if bool(visual[i]) == side]
        others = [j for j in places if bool(visual[j]) != side]
        entropies = []
        for i in rows:
            keys = [j for j in others if kind == "cross" or j <= i]
            if keys:
                per_head = [row(h, i, keys) for h in range(heads)]
                entropies.append(ent([sum(column) / heads for column in zip(*per_head)]))
        value += sum(entropies) / len(entropies)
    return value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_entropy_equals_the_loops(kind, heads):
    q, k, visual = draw(heads=heads[0], kv_heads=heads[1])
    real = torch.ones_like(visual)
    wanted = [loop_entropy(q[b], k[b], visual[b], kind, real[b]) for b in range(2)]
    torch.testing.assert_close(attention_entropy(q, k, visual, kind), torch.tensor(wanted, dtype=torch.float64))
    single = attention_entropy(q.float(), k.float(), visual, kind)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 7, 23])
def test_entropy_does_not_depend_on_the_block(kind, block):
    q, k, visual = draw(1)
    torch.testing.assert_close(
        attention_entropy(q, k, visual, kind, block=block),
        attention_entropy(q, k, visual, kind),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_entropy_padding_is_no_query_and_no_key(kind, side):
    q, k, visual = draw(2)
    real = torch.ones_like(visual)
    real[0, (slice(0, 6) if side == "left" else slice(17, None))] = False
    got = attention_entropy(q, k, visual, kind, valid=real)
    wanted = [loop_entropy(q[b], k[b], visual[b], kind, real[b]) for b in range(2)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))
    bare = real[0].nonzero()[:, 0]
    alone = attention_entropy(q[:1, :, bare], k[:1, :, bare], visual[:1, bare], kind)
    torch.testing.assert_close(got[:1], alone)


def test_entropy_scale_and_ranges():
    q, k, visual = draw(3)
    real = torch.ones_like(visual)
    wanted = loop_entropy(q[0], k[0], visual[0], "cross", real[0], scale=0.1)
    assert float(attention_entropy(q, k, visual, "cross", scale=0.1)[0]) == pytest.approx(wanted, abs=1e-10)
    flat = attention_entropy(torch.zeros_like(q), k, visual, "cross")
    most = visual.sum(1).double().log() + (~visual).sum(1).double().log()
    torch.testing.assert_close(flat, most)


@pytest.mark.parametrize("kind", ["cross", "cross-causal"])
def test_entropy_of_one_modality_is_nan(kind):
    q, k, visual = draw(4)
    visual[1] = False
    value = attention_entropy(q, k, visual, kind)
    assert torch.isnan(value).tolist() == [False, True]
    assert bool(torch.isfinite(attention_entropy(q, k, visual, "self")).all())


@pytest.mark.parametrize("kind", ["cross-causal"])
def test_entropy_sums_add_up_over_chunks(kind):
    q, k, visual = draw(5)
    whole = attention_entropy(q, k, visual, kind)
    total = sum(
        cross_entropy_sums(
            q[:, :, a:b], k[:, :, :b], visual[:, a:b], visual[:, :b], causal=True, offset=a, visible=shown
        )
        for (a, b), shown in zip([(0, 5), (5, 6), (6, 23)], [None, None, None])
    )
    torch.testing.assert_close(finish_cross(total), whole)


@pytest.mark.parametrize("shown_heads", [1, 4])
def test_entropy_sums_follow_a_visibility_mask(shown_heads):
    q, k, visual = draw(6)
    causal = torch.ones(23, 23, dtype=torch.bool).tril().expand(2, shown_heads, -1, -1).clone()
    plain = cross_entropy_sums(q, k, visual, visual, causal=True)
    torch.testing.assert_close(cross_entropy_sums(q, k, visual, visual, causal=True, visible=causal), plain)
    causal[..., 4:9, 4:9] = True  # tokens of one image see each other
    wider = cross_entropy_sums(q, k, visual, visual, causal=True, visible=causal)
    assert not torch.equal(wider, plain)


def test_entropy_sums_with_slots_that_differ_between_heads():
    # After a compression heads may hold padding at different slots: put a hole at slot 3 of head 0 and 9 of head 1.
    q, k, visual = draw(7)
    holes = [[j for j in range(24) if j != hole] for hole in (3, 9)]
    wide, marks = torch.full((2, 2, 24, 8), 50.0, dtype=k.dtype), torch.zeros(2, 2, 24, dtype=torch.bool)
    real = torch.zeros(2, 2, 24, dtype=torch.bool)
    shown = torch.zeros(2, 4, 23, 24, dtype=torch.bool)
    for h, places in enumerate(holes):
        wide[:, h, places], marks[:, h, places], real[:, h, places] = k[:, h], visual, True
        for query_head in (2 * h, 2 * h + 1):
            shown[:, query_head, :, places] = torch.ones(23, 23, dtype=torch.bool).tril()
    plain = cross_entropy_sums(q, k, visual, visual, causal=True)
    got = cross_entropy_sums(q, wide, visual, marks, causal=True, valid=real, visible=shown)
    torch.testing.assert_close(got, plain)
    unmasked = cross_entropy_sums(q, k, visual, visual, causal=False)
    torch.testing.assert_close(cross_entropy_sums(q, wide, visual, marks, causal=False, valid=real), unmasked)
    late = cross_entropy_sums(q[:, :, -4:], k, visual[:, -4:], visual, causal=True, offset=19)
    got = cross_entropy_sums(q[:, :, -4:], wide, visual[:, -4:], marks, causal=True, valid=real, offset=20)
    torch.testing.assert_close(got, late)


def test_entropy_of_the_official_code():
    # sum over rows and keys of -p log p with p clamped at 1e-12, per head, mean over heads, divided by n
    q, k, _ = draw(8, kv_heads=4)
    logits = (q @ k.transpose(2, 3)) / 8**0.5
    logits = logits.masked_fill(torch.ones(23, 23, dtype=torch.bool).triu(1), -math.inf)
    p = logits.softmax(-1).clamp(min=1e-12)
    wanted = -(p * p.log()).sum((-2, -1)).mean(1) / 23
    torch.testing.assert_close(official_entropy(q, k), wanted, rtol=0, atol=1e-8)


def test_entropy_refuses_bad_input():
    q, k, visual = draw(9)
    for bad in ({"kind": "x"}, {"block": 0}):
        with pytest.raises(UserError):
            attention_entropy(q, k, visual, **bad)
    with pytest.raises(UserError, match="multiple"):
        attention_entropy(q[:, :3], k, visual)
    with pytest.raises(UserError, match="mask"):
        attention_entropy(q, k, visual, valid=torch.ones(2, 5, dtype=torch.bool))


@pytest.mark.parametrize("block", [None, 1, 7, 23])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scan_equals_softmax(block, softcap):
    q, k, _ = draw(10, heads=6)
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(3, 1)) * 0.3
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    wanted = logits.masked_fill(torch.ones(23, 23, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    parts = []
    for start, stop, probs in scan_attention(q, k, scale=0.3, softcap=softcap, block=block):
        assert probs.shape[2:] == (stop - start, stop)  # nothing beyond the diagonal is computed
        parts.append(torch.nn.functional.pad(probs.clone(), (0, 23 - stop)))
    torch.testing.assert_close(torch.cat(parts, 2), wanted)


def test_scan_continues_a_prompt():
    q, k, _ = draw(11)
    whole = torch.cat([torch.nn.functional.pad(p.clone(), (0, 23 - p.shape[3])) for _, _, p in scan_attention(q, k)], 2)
    late = [p.clone() for _, _, p in scan_attention(q[:, :, 9:], k, offset=9, block=30)]
    torch.testing.assert_close(late[0], whole[:, :, 9:])


@pytest.mark.parametrize("mask_heads", [1, 2, 4])
def test_scan_with_masks_gives_zero_to_rows_that_see_nothing(mask_heads):
    q, k, _ = draw(12)
    g = torch.Generator().manual_seed(0)
    shown = torch.rand(2, mask_heads, 23, 23, generator=g) < 0.3
    shown[:, :, 4] = False
    real = torch.rand(2, 2, 23, generator=g) < 0.8
    by_head = shown.expand(-1, 4, -1, -1) if mask_heads != 2 else shown.repeat_interleave(2, 1)
    allowed = by_head & real.repeat_interleave(2, 1)[:, :, None]
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) / 8**0.5
    wanted = logits.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
    for block in (1, 7, None):
        for start, stop, probs in scan_attention(q, k, visible=shown, valid=real, block=block):
            torch.testing.assert_close(probs, wanted[:, :, start:stop, : probs.shape[3]])
            assert not wanted[:, :, start:stop, probs.shape[3] :].any()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("side", ["left", "right", "hole", "heads"])
@pytest.mark.parametrize("offset", [0, 9])
def test_scan_of_padding_takes_the_short_way_to_the_same_result(softcap, side, offset):
    q, k, _ = draw(15)
    q = q[:, :, offset:]
    real = torch.ones(2, 2, 23, dtype=torch.bool)
    if side == "heads":
        real[0, 0, 4:8], real[0, 1, 10:14] = False, False
    else:
        real[0, :, {"left": slice(0, 11), "right": slice(15, None), "hole": slice(6, 9)}[side]] = False
    causal = torch.ones(23, 23, dtype=torch.bool).tril()[offset:]
    shown = (causal & real[:, :, None]).repeat_interleave(2, 1)
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) * 0.3
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    wanted = logits.masked_fill(~shown, -math.inf).softmax(-1).nan_to_num(0.0)
    k = torch.where(real[..., None], k, math.nan)  # keys of padding may be anything
    options = {"scale": 0.3, "softcap": softcap, "block": 7, "offset": offset}
    ways = [{"valid": real}]
    if side != "heads":
        ways += [{"visible": shown[:, :1]}, {"visible": causal.expand(2, 1, -1, -1), "valid": real}]
    for way in ways:
        for start, stop, probs in scan_attention(q, k, **way, **options):
            assert probs.shape[3] == min(23, offset + stop)
            torch.testing.assert_close(probs, wanted[:, :, start:stop, : probs.shape[3]])


def test_scan_keeps_nan_visible_and_leaves_grad_mode_alone():
    q, k, _ = draw(13)
    k[0, 1, 5] = math.nan
    for _, _, probs in scan_attention(q.requires_grad_(), k, block=23):
        assert torch.is_grad_enabled() and not probs.requires_grad
        assert torch.isnan(probs[0, 2:, 5:]).all() and not torch.isnan(probs[0, :2]).any()
    real = torch.ones(2, 23, dtype=torch.bool)
    real[0, 5] = False  # a NaN in padding is nobody's business
    assert not any(bool(torch.isnan(p).any()) for _, _, p in scan_attention(q, k.nan_to_num(0.0), valid=real))


def test_scan_halves_the_block_twice_when_memory_runs_out(monkeypatch, caplog):
    q, k, _ = draw(14)
    plain = [p.clone() for _, _, p in scan_attention(q, k, block=5)]
    real_bmm, limit = torch.bmm, [5 * 2]

    def small(a, b, *, out):
        if a.shape[1] > limit[0]:
            raise torch.OutOfMemoryError("out of memory")
        return real_bmm(a, b, out=out)

    monkeypatch.setattr(torch, "bmm", small)
    blocks = [(stop - start, p.clone()) for start, stop, p in scan_attention(q, k, block=20)]
    assert [size for size, _ in blocks] == [5, 5, 5, 5, 3]
    for (_, got), wanted in zip(blocks, plain, strict=True):
        torch.testing.assert_close(got, wanted)
    assert "trying 5" in caplog.text
    limit[0] = 1
    with pytest.raises(RuntimeError, match="set block=2 or less"):
        list(scan_attention(q, k, block=20))
