"""Attention sinks (gpt-oss): what a cache scores is the attention that the model computes."""

from __future__ import annotations

import pytest
import torch
from meda_kv.cache import CompressedCache


@pytest.fixture(scope="module")
def oss():
    import transformers as hf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.GptOssConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.15,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            sliding_window=12,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
        model = hf.GptOssForCausalLM(config).float().eval()
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks, 3.0, 1.0)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("options", [{}, {"block": 7}, {"score_queries": "text"}, {"score_queries": "window:50"}])
def test_scores_are_the_models_own_attention(oss, options):
    ids = torch.randint(8, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    cache = CompressedCache(oss, "h2o", 0.4, floor=3, **options)
    with torch.no_grad():
        attention = oss(ids, past_key_values=cache, output_attentions=True).attentions
    (index,) = cache.facts.full_layers
    layer = cache.layers[index]
    scorer = cache.method.scorer
    found = scorer.scores(layer.state[scorer], layer.keys, layer.values, None)
    wanted = attention[index].sum(2).view(1, 2, 2, -1).mean(2)
    assert 5 < float(wanted.sum()) < 2 * 35  # the sinks draw a good part
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_entropy_is_that_of_the_models_own_attention(oss):
    ids = torch.randint(8, 96, (1, 40), generator=torch.Generator().manual_seed(2))
    cache = CompressedCache(oss, "meda", 0.4, floor=3, entropy="self", merge="none")
    with torch.no_grad():
        attention = oss(ids, past_key_values=cache, output_attentions=True).attentions
    cache.compress()
    a = attention[cache.facts.full_layers[0]][0].double()
    wanted = -torch.special.xlogy(a, a).sum(-1).mean()
    assert abs(float(cache.entropies[0, 0]) - float(wanted)) < 1e-4
