"""The four forms of masks, there and back."""

from __future__ import annotations

import pytest
import torch
from meda_kv.attention import read_mask, write_mask


def visible(heads: int = 1, queries: int = 3, slots: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(heads)
    random = torch.rand(2, heads, queries, slots, generator=generator) > 0.4
    random[..., 0] = True
    return random


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("base", ["sdpa", "eager", "flex_attention"])
def test_write_then_read(base: str, heads: int) -> None:
    wanted = visible(heads)
    mask = write_mask(wanted, base=base, dtype=torch.float16)
    assert read_mask(mask, batch=2, queries=3, slots=7).equal(wanted)


def test_forms() -> None:
    wanted = visible()
    additive = write_mask(wanted, base="eager", dtype=torch.bfloat16)
    assert additive.dtype == torch.bfloat16
    assert additive.unique().tolist() == [torch.finfo(torch.bfloat16).min, 0.0]
    assert write_mask(wanted, base="sdpa", dtype=torch.float32) is wanted
    assert write_mask(None, base="eager", dtype=torch.float32) is None
    assert read_mask(None, batch=1, queries=1, slots=1) is None
    assert read_mask(torch.ones(2, 9), batch=2, queries=3, slots=9) is None
    assert read_mask(torch.ones(1, 1, 2, 9, dtype=torch.bool), batch=1, queries=2, slots=5).shape == (1, 1, 2, 5)
    with pytest.raises(TypeError, match="dict"):
        read_mask({}, batch=1, queries=1, slots=1)


def test_a_mask_that_carries_a_bias_is_refused() -> None:
    for number in (-3.0, 0.5, -1e-3):
        mask = write_mask(visible(), base="eager", dtype=torch.float32)
        mask[1, 0, 2, 0] = number
        with pytest.raises(TypeError, match="unsupported: the model adds a bias"):
            read_mask(mask, batch=2, queries=3, slots=7)
    wanted = visible()
    infinite = torch.where(wanted, 0.0, -torch.inf)
    assert read_mask(infinite, batch=2, queries=3, slots=7).equal(wanted)


@pytest.mark.parametrize("base", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_flash_takes_only_the_causal_mask(base: str) -> None:
    causal = torch.ones(2, 1, 3, 7, dtype=torch.bool).tril(4)
    assert write_mask(causal, base=base, dtype=torch.float16) is None
    holed = causal.clone()
    holed[1, :, :, 2] = False
    with pytest.raises(RuntimeError, match=r"use the sdpa attention .*prompts of equal length"):
        write_mask(holed, base=base, dtype=torch.float16)
