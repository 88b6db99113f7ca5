"""The layer of a compressed cache, against a plain DynamicLayer and against lists of tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.cache.layer import CompressedLayer
from meda_kv.methods.base import Observer
from transformers.cache_utils import DynamicLayer

ROWS, HEADS, DIM = 3, 2, 4


def tokens_of(count: int, seed: int, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, HEADS, count, DIM, generator=generator) for _ in range(2))  # type: ignore[return-value]


class WatchedSlots(Observer):
    slots = ("marks",)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 7)),
        st.tuples(st.just("crop"), st.integers(0, 5)),
        st.tuples(st.just("reorder"), st.permutations(range(ROWS))),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 5)),
        st.tuples(st.just("reset"), st.none()),
        st.tuples(st.just("offload"), st.none()),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, buffer_step=st.integers(1, 9))
def test_layer_without_compression_is_a_dynamic_layer(steps, buffer_step):
    ours, plain = CompressedLayer(buffer_step), DynamicLayer()
    rows = ROWS
    for number, (what, argument) in enumerate(steps):
        if what == "update":
            new = tokens_of(argument, number, rows)
            for mine, theirs in zip(ours.update(*new), plain.update(*new), strict=True):
                assert torch.equal(mine, theirs)
        elif what == "reset":
            ours.reset()
            plain.reset()
            rows = ROWS
        elif plain.get_seq_length() == 0:
            continue
        elif what == "crop":
            count = min(argument, plain.get_seq_length() - 1)
            ours.crop(-count)
            plain.crop(-count)
        elif what == "reorder":
            index = torch.arange(rows).flip(0) if rows != ROWS else torch.tensor(argument)
            ours.reorder_cache(index)
            plain.reorder_cache(index)
        elif what == "repeat" and rows <= 12:
            ours.batch_repeat_interleave(argument)
            plain.batch_repeat_interleave(argument)
            rows *= argument
        elif what == "select":
            index = torch.arange(rows)[: max(1, argument)]
            ours.batch_select_indices(index)
            plain.batch_select_indices(index)
            rows = len(index)
        elif what == "offload":
            ours.offload()
            ours.prefetch()
        assert ours.get_seq_length() == plain.get_seq_length() == ours.physical
        assert ours.get_mask_sizes(3) == plain.get_mask_sizes(3)
        if plain.get_seq_length():
            assert torch.equal(ours.keys, plain.keys)
            assert torch.equal(ours.values, plain.values)
            assert ours.valid is None
            assert torch.equal(ours.positions, torch.arange(ours.logical).expand(rows, HEADS, -1))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), buffer_step=st.integers(1, 6))
def test_layer_after_compression_is_the_list_of_kept_tokens(data, buffer_step):
    """Every slot carries its key, value, position, validity and its observer's mark through every operation."""
    layer, watcher = CompressedLayer(buffer_step), WatchedSlots()
    n = data.draw(st.integers(2, 9))
    layer.update(*tokens_of(n, 0))
    everything = tokens_of(200, 1)
    layer.reset()
    layer.update(everything[0][:, :, :n].clone(), everything[1][:, :, :n].clone())
    layer.state[watcher] = {"marks": torch.arange(float(n)).expand(ROWS, HEADS, n).clone(), "rows": torch.arange(ROWS)}
    counts = data.draw(st.lists(st.integers(1, n), min_size=ROWS, max_size=ROWS))
    keep = torch.full((ROWS, HEADS, max(counts)), -1)
    for row in range(ROWS):
        for head in range(HEADS):
            chosen = data.draw(st.permutations(range(n)))[: counts[row]]
            keep[row, head, : counts[row]] = torch.tensor(sorted(chosen))
    before = layer.keys.untyped_storage().data_ptr()
    layer.settle(keep)
    assert layer.keys.untyped_storage().data_ptr() != before
    row_of = torch.arange(ROWS)
    tail = 0
    for _ in range(data.draw(st.integers(0, 5))):
        what = data.draw(st.sampled_from(["update", "reorder", "repeat", "crop"]))
        if what == "update":
            q = data.draw(st.integers(1, 4))
            new = [part[row_of][:, :, n + tail : n + tail + q] for part in everything]
            layer.update(*new)
            tail += q
        elif what == "reorder":
            index = torch.tensor(
                data.draw(st.lists(st.integers(0, len(row_of) - 1), min_size=len(row_of), max_size=len(row_of)))
            )
            layer.reorder_cache(index)
            row_of = row_of[index]
        elif what == "repeat" and len(row_of) < 8:
            layer.batch_repeat_interleave(2)
            row_of = row_of.repeat_interleave(2)
        elif what == "crop":
            count = data.draw(st.integers(0, tail))
            layer.crop(-count)
            tail -= count
    assert layer.get_seq_length() == n + tail
    assert layer.get_mask_sizes(1) == (max(counts) + tail + 1, n - max(counts))
    after = torch.arange(n, n + tail).expand(len(row_of), HEADS, -1)
    expected = torch.cat([keep[row_of], after], dim=2)
    assert torch.equal(layer.positions, expected)
    real = expected >= 0
    valid = torch.ones_like(real) if layer.valid is None else layer.valid
    assert torch.equal(valid, real)
    for stored, source in ((layer.keys, everything[0]), (layer.values, everything[1])):
        wanted = source[row_of].gather(2, expected.clamp(min=0)[..., None].expand(-1, -1, -1, DIM))
        assert torch.equal(stored[real], wanted[real])
        assert not stored[~real].any()
    marks = layer.state[watcher]["marks"]
    assert torch.equal(marks, expected[..., : marks.shape[2]].clamp(min=0).float())
    assert torch.equal(layer.state[watcher]["rows"], row_of)


def test_buffer_is_copied_once_per_step_of_tokens():
    layer = CompressedLayer(buffer_step=64)
    layer.update(*tokens_of(256, 0))
    assert layer.copies == 0  # the prompt is adopted, not copied
    seen = set()
    for number in range(256):
        layer.update(*tokens_of(1, number))
        seen.add(layer.keys.untyped_storage().data_ptr())
    assert layer.copies == 256 // 64
    assert layer.physical == layer.logical == 512
    assert len(seen) <= 4


def test_adopted_prompt_keeps_nothing_else_alive():
    whole = torch.randn(1, HEADS, 40, DIM)
    layer = CompressedLayer(buffer_step=1)
    layer.update(whole[:, :, :10], whole[:, :, 10:20])  # parts of a larger storage, as from a joint projection
    assert sum(t.untyped_storage().nbytes() for t in layer.tensors()) == 2 * HEADS * 10 * DIM * 4
    whole.zero_()
    assert layer.keys.abs().sum() > 0


def test_settled_layer_lets_go_of_the_full_storage():
    layer = CompressedLayer(buffer_step=4)
    layer.update(*tokens_of(1000, 0))
    layer.settle(torch.arange(10).expand(ROWS, HEADS, 10))
    for tensor in (layer.keys, layer.values):
        assert tensor.untyped_storage().nbytes() == ROWS * HEADS * (10 + 4) * DIM * 4


def test_crop_into_the_settled_slots_is_refused():
    layer = CompressedLayer()
    layer.update(*tokens_of(8, 0))
    layer.settle(torch.arange(4).expand(ROWS, HEADS, 4))
    layer.update(*tokens_of(2, 1))
    with pytest.raises(RuntimeError, match="only 2 were read since"):
        layer.crop(-3)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(3)
    layer.crop(-2)
    assert (layer.physical, layer.logical) == (4, 8)


def test_lent_layer_copies_before_either_writes():
    layer = CompressedLayer(buffer_step=8)
    layer.update(*tokens_of(3, 0))
    layer.update(*tokens_of(1, 1))
    twin = layer.lend()
    first, second = tokens_of(1, 2), tokens_of(1, 3)
    layer.update(*first)
    twin.update(*second)
    assert torch.equal(layer.keys[:, :, 4:], first[0])
    assert torch.equal(twin.keys[:, :, 4:], second[0])
    assert torch.equal(layer.keys[:, :, :4], twin.keys[:, :, :4])


def test_tensors_made_in_inference_mode_can_grow_outside_of_it():
    layer = CompressedLayer(buffer_step=8)
    with torch.inference_mode():
        layer.update(*tokens_of(3, 0))
        layer.update(*tokens_of(1, 1))
        layer.settle(torch.tensor([0, 2]).expand(ROWS, HEADS, 2))
        layer.incoming_valid = torch.tensor([[True], [False], [True]])
        layer.update(*tokens_of(1, 2))
    layer.update(*tokens_of(1, 3))
    with torch.inference_mode():
        layer.update(*tokens_of(1, 4))
    assert layer.positions[0, 0].tolist() == [0, 2, 4, 5, 6]
    assert layer.valid[:, 0].tolist() == [[True] * 5, [True, True, False, True, True], [True] * 5]


def test_stored_tensors_are_outside_the_graph():
    layer = CompressedLayer()
    key, value = (part.requires_grad_() for part in tokens_of(2, 0))
    layer.update(key * 2, value * 2)
    assert not layer.keys.requires_grad


def test_unequal_key_and_value_widths():
    layer = CompressedLayer(buffer_step=2)
    for number in range(3):
        layer.update(torch.full((1, 1, 2, 6), float(number)), torch.full((1, 1, 2, 3), float(number)))
    layer.settle(torch.tensor([[[1, 4]]]))
    assert layer.keys.shape == (1, 1, 2, 6)
    assert layer.values[0, 0, :, 0].tolist() == [0.0, 2.0]
