"""Selection against a loop, the official formulas, and properties over random cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.core import keep_mask, official_keep, select
from vfm_core.errors import UserError


def draw(seed=0, batch=2, heads=2, slots=30):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, heads, slots, generator=g), torch.rand(batch, slots, generator=g) < 0.6


def loop_select(scores, budget, share, visual, prior, sink, real, recent):
    """One head, from Eq. 8-10: sinks, the last M, then the best of the rest; text first where asked."""
    places = [j for j in range(len(scores)) if real[j]]
    budget = min(budget, len(places))
    kept = set(places[: min(sink, budget)])
    newest = round(budget * share) if recent is None else recent
    newest = min(newest, budget - len(kept))
    kept |= set(places[len(places) - newest :])
    biased = {j: float(scores[j]) for j in places}
    if prior == "bias" and visual is not None:
        top = max(biased.values())
        biased = {j: s if visual[j] else s + top for j, s in biased.items()}
    for j in sorted((j for j in places if j not in kept), key=lambda j: -biased[j]):
        if len(kept) < budget:
            kept.add(j)
    return sorted(kept)


@pytest.mark.parity
@pytest.mark.parametrize("prior", ["bias", "off"])
@pytest.mark.parametrize(
    ("share", "recent", "sink"), [(0.75, None, 0), (0.5, None, 4), (0.0, 6, 0), (1.0, None, 4), (0.0, None, 0)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_select_equals_the_loop(prior, share, recent, sink, padded):
    scores, visual = draw(1)
    real = torch.ones(2, 30, dtype=torch.bool)
    if padded:
        real[0, :7] = False
        real[1, 12:15] = False
    budgets = torch.tensor([11, 17])
    got = select(scores, budgets, share, visual, prior, sink, real, recent)
    assert got.shape == (2, 2, 17) and got.dtype == torch.long
    for b in range(2):
        for h in range(2):
            wanted = loop_select(scores[b, h], int(budgets[b]), share, visual[b], prior, sink, real[b], recent)
            assert got[b, h].tolist() == wanted + [-1] * (17 - len(wanted))


@pytest.mark.parity
def test_select_h2o_as_in_its_code():
    # recent = int(r n), heavy = int(r n): top of the scores before the recent ones
    scores, _ = draw(2)
    heavy = scores[..., :-5].topk(5).indices
    wanted = torch.cat([heavy, torch.arange(25, 30).expand(2, 2, -1)], -1).sort().values
    assert torch.equal(select(scores, 10, 0.5), wanted)


@pytest.mark.parity
def test_select_snapkv_as_in_its_code():
    scores, _ = draw(3)
    wanted = torch.cat([scores[..., :-8].topk(7).indices.sort().values, torch.arange(22, 30).expand(2, 2, -1)], -1)
    assert torch.equal(select(scores, 15, 0.0, recent=8), wanted)


@pytest.mark.parity
def test_select_streaming_keeps_the_first_and_the_last():
    scores, _ = draw(4)
    wanted = torch.tensor([0, 1, 2, 3, *range(22, 30)]).expand(2, 2, -1)
    assert torch.equal(select(scores, 12, 1.0, sink=4), wanted)


@pytest.mark.parity
@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("images", [0.3, 0.7, 0.95])
def test_select_official_equals_the_official_class(alpha, images):
    g = torch.Generator().manual_seed(int(alpha * 100))
    scores = torch.rand(1, 3, 400, generator=g) * 9
    visual = torch.rand(400, generator=g) < images
    wanted = official_keep(scores[0], visual, alpha)
    budget = 2 * int(400 * alpha / 2)
    got = select(scores, budget, 0.5, visual[None], "official")
    assert torch.equal(keep_mask(got, 400)[0], wanted)
    assert int((got[0, 0] >= 0).sum()) >= budget  # more than was asked for


@pytest.mark.parity
def test_official_keep_by_hand():
    # text at 0, 5, 9; alpha 0.4 of 10: two important, two recent; widened to 3 text tokens (extra 0)
    visual = torch.tensor([0, 1, 1, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    scores = torch.tensor([[0.1, 5.0, 9.0, 4.0, 7.0, 0.2, 1.0, 1.0, 1.0, 0.3]])
    kept = official_keep(scores, visual, 0.4, extra=0)[0].nonzero()[:, 0].tolist()
    assert kept == [0, 5, 7, 8, 9]  # both important places go to text before any image token
    kept = official_keep(scores, visual, 0.8, extra=0)[0].nonzero()[:, 0].tolist()
    assert kept == [0, 2, 4, 5, 6, 7, 8, 9]
    assert bool(official_keep(scores, visual, 0.4).all())  # text length + 100 is everything here


@pytest.mark.parity
@pytest.mark.parametrize(("important", "recent"), [(4, 4), (12, 3), (2, 15)])
def test_select_keep_all_equals_the_look_m_classes(important, recent):
    # LOOK-M: image scores far below text, recent ones masked, top of the scores before them; kept is what is >= 0 then
    scores, visual = draw(9, batch=1)
    biased = scores[0].double() - 65516.0 * visual[0]
    biased[:, -recent:] -= 65516.0
    top = biased[:, :-recent].topk(important).indices
    biased = biased.scatter(1, top, 0.0)
    biased[:, -recent:] = 0.0
    got = select(scores, important + recent, 0.0, visual, "keep-all", recent=recent)
    assert torch.equal(keep_mask(got, 30)[0], biased >= 0)


def test_select_keep_all_exceeds_the_budget_by_the_text():
    scores, visual = draw(5)
    got = select(scores, 8, 0.5, visual, "keep-all")
    text = (~visual).sum(1)
    assert bool((text > 8).any())
    for b in range(2):
        for h in range(2):
            kept = set(got[b, h][got[b, h] >= 0].tolist())
            assert set((~visual[b]).nonzero()[:, 0].tolist()) | set(range(26, 30)) <= kept
            early = int((~visual[b, :26]).sum())
            assert len(kept) == 4 + max(4, early)


def test_select_text_prior_is_exact_where_a_sum_would_round():
    # differences of 1e-9 vanish in float32 when max = 1e4 is added
    scores = torch.tensor([[[1e-9, 3e-9, 2e-9, 1e4, 5.0]]])
    visual = torch.tensor([[False, False, False, True, True]])
    assert select(scores, 2, 0.0, visual)[0, 0].tolist() == [1, 2]
    assert select(scores, 4, 0.0, visual)[0, 0].tolist() == [0, 1, 2, 3]


def test_select_shared_by_the_layer():
    scores, visual = draw(6)
    got = select(scores, 9, 0.25, visual, per_head=False)
    assert torch.equal(got[:, 0], got[:, 1])
    mean = scores.mean(1, keepdim=True)
    assert torch.equal(got[:, :1], select(mean, 9, 0.25, visual))


def test_select_ties_keep_the_earlier_slot():
    assert select(torch.ones(1, 1, 9), 3, 0.0)[0, 0].tolist() == [0, 1, 2]


def test_select_names_the_head_of_a_nan():
    scores, _ = draw(7)
    scores[1, 0, 3] = math.nan
    with pytest.raises(RuntimeError, match="row 1, KV head 0"):
        select(scores, 4)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1, 3] = False
    assert 3 not in select(scores, 4, valid=real)[1, 0].tolist()
    scores[0, 1, 2] = math.inf
    with pytest.raises(RuntimeError, match="row 0, KV head 1"):
        select(scores, 4)


@pytest.mark.parametrize(
    "bad",
    [
        {"recent_share": 1.5},
        {"recent_share": -0.1},
        {"text_prior": "on"},
        {"sink": -1},
        {"budget": -1},
        {"budget": torch.tensor([1, 2, 3])},
        {"valid": torch.ones(2, 7, dtype=torch.bool)},
    ],
)
def test_select_refuses_bad_input(bad):
    scores, visual = draw(8)
    with pytest.raises(UserError):
        select(**{"scores": scores, "budget": 5, "visual": visual, **bad})
    with pytest.raises(UserError, match="scores"):
        select(scores[0], 5)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_select_properties(data):
    batch, heads, slots = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scores = torch.randint(0, 6, (batch, heads, slots), generator=g).float()  # many ties
    real = torch.rand(batch, slots, generator=g) < data.draw(st.sampled_from([0.5, 1.0]))
    visual = torch.rand(batch, slots, generator=g) < 0.5
    budgets = torch.randint(0, slots + 3, (batch,), generator=g)
    options = {
        "recent_share": data.draw(st.floats(0, 1)),
        "text_prior": data.draw(st.sampled_from(["bias", "keep-all", "off"])),
        "sink": data.draw(st.integers(0, 5)),
        "per_head": data.draw(st.booleans()),
    }
    got = select(scores, budgets, visual=visual, valid=real, **options)
    for b in range(batch):
        count, text = int(real[b].sum()), set((real[b] & ~visual[b]).nonzero()[:, 0].tolist())
        wanted = min(int(budgets[b]), count)
        for h in range(heads):
            row = got[b, h].tolist()
            kept = [j for j in row if j >= 0]
            assert row == kept + [-1] * (len(row) - len(kept)) and kept == sorted(set(kept))
            assert all(real[b, j] for j in kept)
            assert len(kept) == wanted or (options["text_prior"] == "keep-all" and len(kept) >= wanted)
            if options["text_prior"] == "keep-all":
                assert text <= set(kept)
            places = real[b].nonzero()[:, 0].tolist()
            assert set(places[: min(options["sink"], wanted)]) <= set(kept)
            if options["text_prior"] == "bias" and wanted:
                newest = min(round(wanted * options["recent_share"]), wanted - min(options["sink"], wanted))
                chosen = set(kept) - set(places[len(places) - newest :]) - set(places[: options["sink"]])
                # a visual token is only chosen when no text token is left out
                assert not any(visual[b, j] for j in chosen) or text <= set(kept)
        alone = select(
            scores[b : b + 1][..., real[b]], budgets[b : b + 1], visual=visual[b : b + 1, real[b]], **options
        )
        back = real[b].nonzero()[:, 0]
        for h in range(heads):  # no row depends on its batch mates or on padding
            mine = alone[0, h][alone[0, h] >= 0]
            assert back[mine].tolist() == [j for j in got[b, h].tolist() if j >= 0]


def test_keep_mask_reads_padding_as_nothing():
    keep = torch.tensor([[[0, 2, -1], [1, 3, 4]]])
    assert keep_mask(keep, 5).int().tolist() == [[[1, 0, 1, 0, 0], [0, 1, 0, 1, 1]]]
