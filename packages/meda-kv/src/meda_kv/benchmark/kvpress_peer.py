"""SnapKV of kvpress on a random Llama: a script for another Python, since kvpress needs an older transformers.

It imports nothing of ours. Standard input holds ``{"shape", "context", "ratios", "rounds", "steps", "dtype", "device",
"seed"}``, standard output one JSON object: ``{"rows": [...], "versions": {...}}``, or ``{"skipped": reason}`` when
kvpress is not installed there. Make such a Python with, for example::

    python3 -m venv peer && peer/bin/pip install kvpress
    meda-kv bench --peer-python peer/bin/python
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any


def build(torch: Any, shape: dict[str, int], seed: int, dtype: str, device: str) -> Any:
    """Build the same random Llama as the bench does in its own Python."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        vocab_size=256,
        max_position_embeddings=1 << 20,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(device=device, dtype=getattr(torch, dtype)).eval()


def stored(cache: Any) -> int:
    """Bytes of keys and values in a cache, in any of the layouts that transformers has had."""
    layers = getattr(cache, "layers", None)
    if layers is not None:
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    else:
        tensors = [*cache.key_cache, *cache.value_cache]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Read, compress and decode; SnapKV at every ratio, and everything kept."""
    import torch
    import transformers

    try:
        import kvpress
    except ImportError as error:
        return {"skipped": f"kvpress is not installed in this Python ({error})"}
    device, n, steps = task["device"], task["context"], task["steps"]
    model = build(torch, task["shape"], task["seed"], task["dtype"], device)
    generator = torch.Generator().manual_seed(task["seed"])
    ids = torch.randint(256, (1, n), generator=generator).to(device)

    def clock() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def read(ratio: float) -> tuple[float, Any]:
        cache = transformers.DynamicCache()
        begin = clock()
        if ratio < 1:
            with kvpress.SnapKVPress(compression_ratio=1 - ratio)(model):
                model(input_ids=ids, past_key_values=cache, use_cache=True)
        else:
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        return clock() - begin, cache

    def decode(cache: Any, turn: int) -> float:
        begin = clock()
        for step in range(steps):
            place = torch.tensor([[n + turn * steps + step]], device=device)
            model(input_ids=ids[:, :1], past_key_values=cache, position_ids=place, use_cache=True)
        return (clock() - begin) / steps

    rows = []
    with torch.inference_mode():
        caches, seconds = {}, {}
        for ratio in task["ratios"]:
            seconds[ratio], caches[ratio] = read(ratio)
        sizes = {ratio: stored(cache) for ratio, cache in caches.items()}
        spent: dict[float, list[float]] = {ratio: [] for ratio in caches}
        for turn in range(task["rounds"] + 1):
            for ratio, cache in caches.items():
                took = decode(cache, turn)
                if turn:
                    spent[ratio].append(took)
        for ratio, cache in caches.items():
            row = {"method": "kvpress snapkv" if ratio < 1 else "kvpress none", "ratio": ratio, "context": n}
            row |= {"prefill_s": seconds[ratio], "decode_ms_per_token": 1000 * statistics.median(spent[ratio])}
            row |= {"kv_bytes": sizes[ratio], "kv_bytes_end": stored(cache), "kv": "read"}
            row |= {"kv_bytes_full": sizes[1.0], "generated": steps * (task["rounds"] + 1)}
            rows.append(row)
    names = {"torch": torch, "transformers": transformers, "kvpress": kvpress}
    return {"rows": rows, "versions": {name: getattr(m, "__version__", "unknown") for name, m in names.items()}}


if __name__ == "__main__":
    json.dump(measure(json.load(sys.stdin)), sys.stdout)
