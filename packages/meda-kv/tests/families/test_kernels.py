"""The whole way with flash and flex attention, their kernels replaced by plain ones that know only what they know."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import zoo
from meda_kv.attention import base_attention
from meda_kv.cache import MedaCache
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, masking_utils
from transformers.integrations import flash_attention

OPTIONS: dict[str, Any] = {"merge": "none", "floor": 3, "recent_share": 0.5}


def causal(queries: int, slots: int) -> Tensor:
    """Aligned at the last query and slot, as flash kernels align it."""
    return torch.ones(queries, slots, dtype=torch.bool).tril(slots - queries)


def flash_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Causal attention with padding at the sides: all that flash attention can leave out. Tensors are [B, n, H, D]."""
    assert base_attention(kwargs["attn_implementation"]) == kwargs["attn_implementation"]
    seen = causal(query.shape[1], key.shape[1])
    if mask is not None:
        assert mask.shape == key.shape[:2]
        seen = seen & mask[:, None, None].bool()
    q, k, v = (one.transpose(1, 2) for one in (query, key, value))
    scale = kwargs["softmax_scale"]
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).transpose(1, 2)


def flex_kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Attention under a block mask; without one everything is seen."""
    seen = None
    if mask is not None:
        heads = mask.kv_num_blocks.shape[1]
        seen = create_mask(mask.mask_mod, query.shape[0], heads, query.shape[2], key.shape[2], device="cpu")
    scale = kwargs["scaling"]
    output = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture(params=["flash_attention_2", "flash_attention_3", "flex_attention"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An attention implementation whose kernel is replaced."""
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash_kernel)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flex_attention", flex_kernel)
    uncompiled = functools.partial(create_block_mask)
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda *a, _compile=False, **k: uncompiled(*a, **k))
    return str(request.param)


def made(family: str, kernel: str) -> tuple[Any, Any]:
    model, inputs = zoo.tiny_vlm(family)
    model.config.get_text_config()._attn_implementation_internal = kernel
    return model, inputs


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "text"])
def test_rows_of_equal_length(family: str, kernel: str) -> None:
    model, inputs = made(family, kernel)
    given = inputs(batch=2)
    # One budget for both rows, so that no slot is empty.
    cache = MedaCache(model, ratio=0.4, budgets="uniform", **OPTIONS)
    first, tokens = zoo.generate(model, given, cache, 3)
    kept = zoo.kept_positions(cache, given["input_ids"].shape[1])
    reference = zoo.masked_reference(model, given, kept, tokens)
    assert (first - reference).abs().max() <= 1e-6
    turn = {"input_ids": torch.tensor([[20, 21, 22]] * 2)}
    ids = torch.cat([given["input_ids"], tokens, turn["input_ids"]], 1)
    second, again = zoo.generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache, 2)
    both = zoo.masked_reference(model, given, kept, tokens, turn=turn, turn_steps=again)
    assert (torch.cat([first, second]) - both).abs().max() <= 1e-6


def test_padded_rows(kernel: str) -> None:
    model, inputs = made("llava", kernel)
    given = inputs(batch=2, padded=True)
    full, _ = zoo.generate(model, given, MedaCache(model, ratio=1.0), 3)
    plain, _ = zoo.tiny_vlm("llava")
    wanted, _ = zoo.generate(plain, given, zoo.plain_cache(plain), 3)
    assert (full - wanted).abs().max() <= 1e-6
    cache = MedaCache(model, ratio=0.4, **OPTIONS)
    if "flash" in kernel:
        with pytest.raises(RuntimeError, match=rf"{kernel} cannot leave out single slots .* use the sdpa attention"):
            zoo.generate(model, given, cache, 3)
        return
    ours, tokens = zoo.generate(model, given, cache, 3)
    kept = zoo.kept_positions(cache, given["input_ids"].shape[1])
    assert (ours - zoo.masked_reference(model, given, kept, tokens)).abs().max() <= 1e-6
