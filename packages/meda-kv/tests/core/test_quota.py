"""The quota of the pictures against loops written from its description."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.core import dealt_in_turns, select, token_blocks
from vfm_core.errors import UserError


def loop_blocks(visual, real, longest):
    """Blocks of one row: runs of visual tokens (of text, without any), cut into pieces."""
    n = len(visual)
    inside = [bool(v and r) for v, r in zip(visual, real)]
    if not any(inside):
        inside = [bool(r) for r in real]
    found, block, length = [-1] * n, -1, 0
    for i in range(n):
        if not inside[i]:
            length = 0
            continue
        if length % longest == 0:
            block += 1
        found[i], length = block, length + 1
    return found


def loop_deal(scores, blocks, count, eligible):
    """Slots that one head chooses: turn by turn, within a turn the best first, the earlier of equals."""
    hands = {}
    for slot, block in enumerate(blocks):
        if eligible[slot] and block >= 0:
            hands.setdefault(block, []).append(slot)
    order = []
    for hand in hands.values():
        hand.sort(key=lambda slot: (-scores[slot], slot))
        order += [(turn, -scores[slot], slot) for turn, slot in enumerate(hand)]
    return {slot for _, _, slot in sorted(order)[:count]}


def draw(data, most=40):
    batch, heads, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, most))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scores = torch.randint(0, 6, (batch, heads, n), generator=g).float()  # many ties
    real = torch.rand(batch, n, generator=g) < data.draw(st.sampled_from([0.0, 0.6, 1.0]))
    visual = torch.rand(batch, n, generator=g) < data.draw(st.sampled_from([0.0, 0.8, 1.0]))
    return scores, real, visual, g


@pytest.mark.parity
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_blocks_equal_the_loop(data):
    _, real, visual, _ = draw(data)
    longest = data.draw(st.integers(1, 12))
    wanted = [loop_blocks(v, r, longest) for v, r in zip(visual.tolist(), real.tolist())]
    assert token_blocks(visual, real, longest).tolist() == wanted


def test_blocks_by_hand():
    visual = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0], [0] * 8]).bool()
    assert token_blocks(visual, longest=2).tolist() == [[-1, 0, 0, 1, -1, 2, 2, -1], [0, 0, 1, 1, 2, 2, 3, 3]]
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]).bool().expand(2, -1)
    assert token_blocks(visual, real, 2).tolist() == [[-1, -1, 0, 0, -1, 1, 1, -1], [-1, -1, 0, 0, 1, 1, 2, 2]]


@pytest.mark.parity
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_turns_equal_the_loop(data):
    scores, real, visual, g = draw(data)
    blocks = token_blocks(visual, real, data.draw(st.integers(1, 9)))[:, None].expand_as(scores)
    eligible = real[:, None] & (torch.rand(scores.shape, generator=g) < 0.8)
    count = torch.randint(0, scores.shape[2] + 2, scores.shape[:2], generator=g)
    got = dealt_in_turns(scores, blocks, count, eligible)
    for b in range(len(scores)):
        for h in range(scores.shape[1]):
            wanted = loop_deal(*(x[b, h].tolist() for x in (scores, blocks, count, eligible)))
            assert set(got[b, h].nonzero()[:, 0].tolist()) == wanted


def loop_select(scores, budget, share, sink, real, visual, blocks, quota, prior):
    """One head: sink and recent slots, then the turns, then the best of the rest with text first."""
    places = [j for j in range(len(scores)) if real[j]]
    wanted = min(budget, len(places))
    kept = set(places[: min(sink, wanted)])
    newest = min(round(wanted * share), wanted - len(kept))
    important = wanted - len(kept) - newest
    kept |= set(places[len(places) - newest :])
    spare = [j in places and j not in kept for j in range(len(scores))]
    kept |= loop_deal(scores, blocks, int(important * quota), spare)
    rest = sorted((j for j in places if j not in kept), key=lambda j: (prior and visual[j], -scores[j], j))
    return sorted(kept | set(rest[: wanted - len(kept)]))


@pytest.mark.parity
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_select_with_a_quota_equals_the_loop(data):
    scores, real, visual, g = draw(data)
    blocks = token_blocks(visual, real, data.draw(st.integers(1, 9)))[:, None].expand_as(scores)
    budgets = torch.randint(0, scores.shape[2] + 3, (len(scores),), generator=g)
    share, sink = data.draw(st.sampled_from([0.0, 0.25, 0.5])), data.draw(st.integers(0, 3))
    quota, prior = data.draw(st.sampled_from([0.0, 0.5, 1.0])), data.draw(st.sampled_from(["bias", "off"]))
    got = select(scores, budgets, share, visual, prior, sink, real, blocks=blocks, quota=quota)
    for b in range(len(scores)):
        for h in range(scores.shape[1]):
            wanted = loop_select(
                scores[b, h].tolist(),
                int(budgets[b]),
                share,
                sink,
                real[b].tolist(),
                visual[b].tolist(),
                blocks[b, h].tolist(),
                quota,
                prior == "bias",
            )
            assert [j for j in got[b, h].tolist() if j >= 0] == wanted


def test_quota_gives_every_picture_its_slots():
    # three pictures of 20 tokens; the scores like the first one only
    visual = torch.tensor([[False, *([True] * 20)] * 3])
    scores = torch.arange(63.0).flip(0).expand(1, 2, -1)
    blocks = token_blocks(visual)[:, None].expand_as(scores)
    per_picture = {}
    for quota in (0.0, 0.9):
        keep = select(scores, 20, 0.0, visual, "off", blocks=blocks, quota=quota)
        per_picture[quota] = torch.bincount(blocks[0, 0][keep[0, 0]].clamp(min=0), minlength=3).tolist()
    assert per_picture == {0.0: [20, 0, 0], 0.9: [8, 6, 6]}


def test_quota_of_a_second_selection_counts_what_is_left():
    """After one selection heads hold different slots; the turns go over what each of them still has."""
    g = torch.Generator().manual_seed(3)
    visual = torch.tensor([[False, *([True] * 12)] * 4])
    scores = torch.rand(1, 2, visual.shape[1], generator=g)
    blocks = token_blocks(visual, longest=6)[:, None].expand_as(scores)
    first = select(scores, 24, 0.0, visual, "off", blocks=blocks, quota=1.0)
    assert not torch.equal(first[0, 0], first[0, 1])
    left = [x.gather(2, first) for x in (scores, blocks)]
    second = select(left[0], 12, 0.0, None, "off", blocks=left[1], quota=1.0)
    for h in range(2):
        held = left[1][0, h][second[0, h]]
        assert sorted(held.tolist()) == sorted(loop_blocks_of(left, h))


def loop_blocks_of(left, head):
    """Blocks of the 12 slots that the loop would choose for one head."""
    scores, blocks = (x[0, head].tolist() for x in left)
    return [blocks[slot] for slot in loop_deal(scores, blocks, 12, [True] * len(scores))]


def test_select_refuses_a_quota_out_of_range():
    with pytest.raises(UserError, match="quota"):
        select(torch.rand(1, 1, 5), 2, quota=1.5, blocks=torch.zeros(1, 1, 5, dtype=torch.long))
