"""``preset="official-code"`` through generate, against loops written from what the official code computes."""

from __future__ import annotations

import math

import pytest
import torch
from meda_kv.cache import CompressedCache
from zoo import generate, tiny_vlm

RATIO = 0.2


def attention(look):
    """Ordinary causal attention of one forward, float64 ``[H, q, n]``."""
    q, k = look.query[0].double(), look.key[0].double()
    logits = q @ k.transpose(1, 2) * look.scale
    later = torch.ones(logits.shape[1:], dtype=torch.bool).triu(look.key.shape[2] - look.query.shape[2] + 1)
    return logits.masked_fill(later, -math.inf).softmax(-1)


def official_slots(scores, visual, alpha):
    """Slots of one head: all text, the recent window widened to text + 100, and the best of the rest, text first."""
    n = len(scores)
    important = recent = int(n * alpha / 2)
    text = n - sum(visual)
    if recent < text:
        recent = text + 100
    early = range(max(0, n - recent))
    best = sorted(early, key=lambda j: (visual[j], -scores[j], j))[:important]
    return sorted({j for j in range(n) if not visual[j] or j >= n - recent} | set(best))


def merged_layer(key, value, kept):
    """Average merge of every head ``[H, n, D]``; dropped tokens pass together, by their mean similarity over heads."""
    heads, n, _ = key.shape
    unit = torch.nn.functional.normalize(key, dim=-1)
    pairs = []
    for h in range(heads):
        gone = [j for j in range(n) if j not in set(kept[h])]
        alike = unit[h, gone] @ unit[h, kept[h]].T
        pairs.append((gone, alike.argmax(1).tolist(), alike.amax(1)))
    similar = torch.stack([best for _, _, best in pairs])
    passing = (similar.mean(0) >= similar.mean()).tolist()
    assert 0 < sum(passing) < len(passing)
    out = []
    for x in (key, value):
        rows = []
        for h, (gone, to, _) in enumerate(pairs):
            total, count = x[h, kept[h]].clone(), torch.ones(len(kept[h]), 1, dtype=x.dtype)
            for i, j, yes in zip(gone, to, passing, strict=True):
                if yes:
                    total[j] += x[h, i]
                    count[j] += 1
            rows.append(total / count)
        out.append(torch.stack(rows))
    return out


@pytest.mark.parity
@pytest.mark.parametrize("method", ["meda", "meda-no-merge"])
def test_official_preset_through_generate(method):
    model, inputs = tiny_vlm("llava", num_key_value_heads=4)  # their model has no shared KV heads
    x = inputs(images=14)
    cache = CompressedCache(model, method, RATIO, preset="official-code")
    seen = {}
    after = cache.after_attention

    def watched(layer_idx, look):
        seen.setdefault(layer_idx, []).append(look)
        after(layer_idx, look)

    cache.after_attention = watched
    generate(model, x, cache, 2)
    assert {layer: [look.query.shape[2] for look in found] for layer, found in seen.items()} == {
        layer: [293, 1] for layer in range(3)
    }
    entropies, scores = [], []
    for layer in range(3):
        prompt, step = (attention(look) for look in seen[layer])
        entropies.append(-(prompt * prompt.clamp(min=1e-12).log()).sum(-1).mean())
        total = step[:, 0].clone()
        total[:, :293] += prompt.sum(1)
        scores.append(total)
    torch.testing.assert_close(cache.entropies[:, 0].double(), torch.stack(entropies), rtol=0, atol=1e-5)
    alphas = (torch.stack(entropies).softmax(0) * 3 * RATIO).clamp(0.01, 1.0).tolist()
    n = 294  # the first generated token is there already
    visual = seen[0][1].visual[0, 0].tolist()
    assert sum(visual) == 14 * 16
    for layer in range(3):
        look = seen[layer][1]
        kept = [official_slots(scores[layer][h].tolist(), visual, alphas[layer]) for h in range(4)]
        assert cache.kept(layer).tolist() == kept and len(kept[0]) < n
        assert int(cache.budgets[layer, 0]) == 2 * int(n * alphas[layer] / 2)
        key, value = look.key[0].double(), look.value[0].double()
        if method == "meda":
            key, value = merged_layer(key, value, kept)
        else:
            key, value = (torch.stack([t[h, kept[h]] for h in range(4)]) for t in (key, value))
        torch.testing.assert_close(cache.layers[layer].keys[0].double(), key, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cache.layers[layer].values[0].double(), value, rtol=1e-5, atol=1e-5)
    assert cache.summary()["overshoot"] > 100
