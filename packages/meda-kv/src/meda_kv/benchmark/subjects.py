"""What is measured: a model, and prompts of an exact length for it.

The prompt is made of random ordinary words; a stretch in its middle is declared visual. Cost depends on shapes only, so
this serves every family alike, text-only ones too; the vision tower is not part of what is timed.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vfm_core.cli import resolve_device, resolve_dtype
from vfm_core.errors import UserError, unknown_name

__all__ = ["BENCH_MODELS", "Prompt", "Subject", "bench_prompt", "load_subject"]

BENCH_MODELS: dict[str, dict[str, int]] = {
    "bench:mha": {"hidden": 256, "intermediate": 688, "layers": 8, "heads": 8, "kv_heads": 8, "head_dim": 32},
    "bench:gqa": {"hidden": 256, "intermediate": 688, "layers": 8, "heads": 8, "kv_heads": 2, "head_dim": 32},
    "bench:wide": {"hidden": 256, "intermediate": 256, "layers": 4, "heads": 16, "kv_heads": 16, "head_dim": 64},
}
"""Random Llamas: a small one with keys for every query head, the same with grouped queries, and one whose cache
outweighs everything else."""


@dataclass(frozen=True)
class Subject:
    """A model under measurement.

    Attributes
    ----------
    name : str
        Its spec.
    model : transformers.PreTrainedModel
        In eval mode.
    device : torch.device
        Of its input.
    recipe : dict or None
        Shape of a built-in random model, from which another program can build the same; None for others.
    words : Tensor
        long, ids of ordinary words: no placeholder, start, end or padding token.
    keeps_logits : bool
        Whether the forward can be told to make only the last token's logits.
    """

    name: str
    model: Any
    device: torch.device
    recipe: dict[str, int] | None
    words: Tensor = field(repr=False)
    keeps_logits: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the cache."""
        return self.model.dtype

    def read(self, ids: Tensor, cache: Any) -> None:
        """Run one forward over ``ids [B, q]`` into ``cache``; only the last token's logits are made."""
        options = {"logits_to_keep": 1} if self.keeps_logits else {}
        with torch.inference_mode():
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, **options)

    def decode(self, cache: Any, steps: int) -> None:
        """Read ``steps`` tokens one by one, as generation does."""
        token = self.words[:1, None].to(self.device)
        with torch.inference_mode():
            for _ in range(steps):
                self.model(input_ids=token, past_key_values=cache, use_cache=True)


@dataclass(frozen=True)
class Prompt:
    """``ids`` long ``[1, n]`` and ``visual`` bool ``[1, n]``."""

    ids: Tensor
    visual: Tensor


def load_subject(
    spec: str,
    *,
    device: str = "auto",
    dtype: str | None = None,
    attn: str | None = None,
    device_map: str | None = None,
    seed: int = 0,
) -> Subject:
    """Load the model of a spec.

    Parameters
    ----------
    spec : str
        A name of `BENCH_MODELS`, or what `meda_kv.models.load_model` takes.
    device, dtype, attn, device_map : str
        As for `meda_kv.models.load_model`. Built-in models default to float32 on the CPU and bfloat16 on CUDA.
    seed : int
        Of the random weights.

    Raises
    ------
    UserError
        Unknown built-in model, or one that is to be spread over devices; else as `meda_kv.models.load_model`.
    """
    target = resolve_device(device)
    if not spec.startswith("bench:"):
        from meda_kv.models import load_model

        model, _ = load_model(spec, device=target, dtype=dtype, attn=attn, device_map=device_map)
        return _subject(spec, model, torch.device(model.device), None)
    if spec not in BENCH_MODELS:
        raise unknown_name("built-in model", spec, BENCH_MODELS, where="--model")
    if device_map is not None:
        remedy = "leave it out: built-in models fit on one device"
        raise UserError("nothing to spread", where="--device-map", given=device_map, remedy=remedy)
    wanted = resolve_dtype(dtype or ("bfloat16" if target.type == "cuda" else "float32"))
    model = build_llama(BENCH_MODELS[spec], seed, attn or "sdpa").to(device=target, dtype=wanted)
    return _subject(spec, model, target, BENCH_MODELS[spec])


def _subject(spec: str, model: Any, device: torch.device, recipe: dict[str, int] | None) -> Subject:
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    return Subject(spec, model, device, recipe, torch.tensor(_plain_ids(model)), keeps)


def build_llama(shape: dict[str, int], seed: int, attn: str) -> Any:
    """Build a random Llama in eval mode; the global generator is left as it was."""
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
        attn_implementation=attn,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def bench_prompt(subject: Subject, n: int, visual_share: float = 0.94, seed: int = 0) -> Prompt:
    """Make a prompt of exactly ``n`` tokens.

    Parameters
    ----------
    subject : Subject
        For its vocabulary and device.
    n : int
        Tokens, >= 4.
    visual_share : float
        Share declared visual, in [0, 1): a stretch with text before and after it.
    seed : int
        Of the words.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = subject.words[torch.randint(len(subject.words), (1, n), generator=generator)]
    visual = torch.zeros(1, n, dtype=torch.bool)
    count = min(int(n * visual_share), n - 2)
    start = (n - count) // 2
    visual[:, start : start + count] = True
    return Prompt(ids.to(subject.device), visual.to(subject.device))


def _plain_ids(model: Any) -> list[int]:
    """Up to 1,000 ids without a meaning of their own."""
    configs = (model.config, model.config.get_text_config(decoder=True), getattr(model, "generation_config", None))
    special: set[int] = set()
    for config in configs:
        for name, value in (config.to_dict() if config is not None else {}).items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    return [i for i in range(vocabulary) if i not in special][:1000]
