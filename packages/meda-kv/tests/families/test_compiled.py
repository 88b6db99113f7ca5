"""A compiled model: the compressed cache gives what it gives without compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from meda_kv.cache import CompressedCache


@pytest.mark.slow
def test_compiled_model_decodes_on_a_compressed_cache() -> None:
    model, inputs = zoo.tiny_vlm("text")
    given = inputs(batch=1, text=20)
    tokens = torch.tensor([9, 10, 11])

    def decode(step: Any) -> torch.Tensor:
        cache = CompressedCache(model, "h2o", 0.4, floor=3)
        with torch.no_grad():
            model(**given, past_key_values=cache)
            cache.compress()
            return torch.cat([step(token[None, None], past_key_values=cache).logits for token in tokens])

    wanted = decode(model)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    assert (decode(compiled) - wanted).abs().max() <= 1e-6
