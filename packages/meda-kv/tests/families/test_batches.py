"""What a row gets does not depend on its neighbours, nor on its padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from meda_kv.cache import MedaCache
from torch import Tensor

OPTIONS: dict[str, Any] = {"floor": 3, "recent_share": 0.5, "temperature": 0.1}


def one_row(family: str, given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The row alone, without its padding."""
    rows, real = given["input_ids"].shape[0], given["attention_mask"][row].bool()
    alone = {}
    for name, value in given.items():
        if value.ndim == 2 and value.shape == given["input_ids"].shape:
            alone[name] = value[row : row + 1, real]
        else:
            share = value.shape[0] // rows
            alone[name] = value[row * share : (row + 1) * share]
    return alone


@pytest.mark.parametrize("merge", ["none", "average"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_batch_invariance(family: str, merge: str) -> None:
    model, inputs = zoo.tiny_vlm(family)
    given = inputs(batch=3, padded=True, images=2)
    n = given["input_ids"].shape[1]
    options = {**OPTIONS, "merge": merge}
    if family == "text":
        options["entropy"] = "self"
    together = MedaCache(model, ratio=0.5, **options)
    logits, tokens = zoo.generate(model, given, together, 3)
    kept = zoo.kept_positions(together, n)
    for row in (0, 2):
        alone = MedaCache(model, ratio=0.5, **options)
        wanted, chosen = zoo.generate(model, one_row(family, given, row), alone, 3)
        assert chosen[0].equal(tokens[row]) and (wanted[:, 0] - logits[:, row]).abs().max() <= 2e-6
        assert alone.budgets[:, 0].equal(together.budgets[:, row])
        padding = int((given["attention_mask"][row] == 0).sum())
        for index, mine in zoo.kept_positions(alone, n - padding).items():
            theirs = kept[index][row] - padding
            for head in range(2):
                assert mine[0, head][mine[0, head] >= 0].equal(theirs[head][theirs[head] >= 0])
        facts, together_facts = alone.summary(), together.summary(row)
        for name in ("budgets", "kept_text", "kept_visual", "prompt_tokens", "visual_tokens"):
            assert facts[name] == together_facts[name], name
        if facts["entropy"] is not None:
            torch.testing.assert_close(torch.tensor(facts["entropy"]), torch.tensor(together_facts["entropy"]))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_padding_that_survives_stays_masked(attn: str) -> None:
    """A row shorter than the largest budget leaves empty slots, which nobody may look at."""
    model, inputs = zoo.tiny_vlm("llava", attn=attn)
    given = inputs(batch=2, images=0, text=40)
    given["attention_mask"][1, :25] = 0
    given["input_ids"][1, :25] = zoo.PAD
    cache = MedaCache(model, ratio=0.9, floor=3, merge="none", entropy="self")
    logits, tokens = zoo.generate(model, given, cache, 3)
    assert cache.layers[0].valid is not None and not cache.layers[0].valid.all()
    kept = zoo.kept_positions(cache, 41)
    assert (logits - zoo.masked_reference(model, given, kept, tokens)).abs().max() <= 1e-6


def test_padding_disappears_where_every_row_has_enough_tokens() -> None:
    model, inputs = zoo.tiny_vlm("llava")
    given = inputs(batch=2, padded=True)
    cache = MedaCache(model, ratio=0.2, floor=3, merge="none", temperature=1e6)
    zoo.generate(model, given, cache, 2)
    for layer in cache.layers:
        rows = [int((layer.positions[row, 0] >= 0).sum()) for row in range(2)]
        assert (layer.valid is None) == (rows[0] == rows[1])


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_rows_with_and_without_pictures(family: str) -> None:
    """A batch of one prompt with a picture and one without: the second falls back to self-attention entropy."""
    model, inputs = zoo.tiny_vlm(family)
    first, second = inputs(images=1, text=8), inputs(images=0, text=8)
    width = first["input_ids"].shape[1]
    pad = width - second["input_ids"].shape[1]
    given = dict(first)
    for name, value in second.items():
        given[name] = torch.cat([first[name], torch.nn.functional.pad(value, (pad, 0))])
    cache = MedaCache(model, ratio=0.6, **OPTIONS)
    with pytest.warns(UserWarning, match="one modality only"):
        logits, _ = zoo.generate(model, given, cache, 3)
    alone = MedaCache(model, ratio=0.6, **OPTIONS)
    with pytest.warns(UserWarning, match="one modality only"):
        wanted, _ = zoo.generate(model, second, alone, 3)
    assert (wanted[:, 0] - logits[:, 1]).abs().max() <= 2e-6
    assert "cross" in cache.summary(0)["entropy_used"] and "self" in cache.summary(1)["entropy_used"]
