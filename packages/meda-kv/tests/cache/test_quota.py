"""The quota of the pictures in a cache: exact eviction, padding, rows, a second compression, shared slots."""

from __future__ import annotations

import pytest
import torch
from meda_kv.cache import CompressedCache
from meda_kv.core import token_blocks
from zoo import generate, kept_positions, masked_reference, tiny_vlm


@pytest.fixture(scope="module")
def llava():
    return tiny_vlm("llava")


def of_pictures(cache, layer, row, head, count):
    """Kept slots of every picture of one row."""
    blocks = token_blocks(cache.tokens.visual, cache.tokens.valid, cache.method.quota_block)[row]
    kept = cache.kept(layer, row)[head]
    found = blocks[kept[kept >= 0]]
    return torch.bincount(found[found >= 0], minlength=count).tolist()


@pytest.mark.parametrize("method", ["quota", "snapkv-quota"])
@pytest.mark.parametrize("per_head", [True, False])
def test_every_picture_keeps_its_share_also_the_second_time(llava, method, per_head):
    model, inputs = llava
    x = inputs(batch=2, images=4, padded=True)
    cache = CompressedCache(model, method, 0.5, floor=4, per_head=per_head)
    logits, tokens = generate(model, x, cache)
    kept = kept_positions(cache, x["input_ids"].shape[1])
    assert (logits - masked_reference(model, x, kept, tokens)).abs().max() < 2e-6
    for ratio in (None, 0.25):
        if ratio is not None:
            cache.compress(ratio)
        for row in range(2):
            for layer in range(3):
                shared = [of_pictures(cache, layer, row, head, 4) for head in range(2)]
                budget = int(cache.budgets[layer, row])
                least = int((budget - cache.method.recent_count(cache.summary(row)["prompt_tokens"])) * 0.9) // 4
                assert least >= 3 and all(count >= least for head in shared for count in head)
                if not per_head:
                    assert torch.equal(*cache.kept(layer, row))
    without = CompressedCache(model, method, 0.25, floor=4, quota=0.0)
    generate(model, x, without, 2)
    fewest = min(min(of_pictures(without, layer, 0, head, 4)) for layer in range(3) for head in range(2))
    assert fewest < 3  # the pictures do starve without it


def test_rows_with_a_quota_do_not_depend_on_their_batch_mates(llava):
    model, inputs = llava
    x = inputs(batch=3, images=3, padded=True)
    together = CompressedCache(model, "quota", 0.4, floor=4, quota_block=5)
    generate(model, x, together, 2)
    for row in range(3):
        real = x["attention_mask"][row].bool()
        one = {
            "input_ids": x["input_ids"][row : row + 1, real],
            "attention_mask": x["attention_mask"][row : row + 1, real],
            "pixel_values": x["pixel_values"][3 * row : 3 * row + 3],
        }
        alone = CompressedCache(model, "quota", 0.4, floor=4, quota_block=5)
        generate(model, one, alone, 2)
        for layer in range(3):
            assert torch.equal(alone.kept(layer) + int((~real).sum()), together.kept(layer, row))
