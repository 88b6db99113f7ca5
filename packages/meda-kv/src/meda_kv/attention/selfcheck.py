"""``meda-kv doctor``: what is installed, and a check of the whole machinery on a random model."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from meda_kv.attention.interface import available_attention

__all__ = ["Check", "DoctorReport", "doctor"]

_PACKAGES = ("meda-kv", "torch", "transformers", "accelerate", "flash-attn", "kernels")


@dataclass(frozen=True)
class Check:
    """One thing that was tried: its name, whether it came out right, and a line about it."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class DoctorReport:
    """Result of :func:`doctor`.

    Attributes
    ----------
    versions : dict
        Version by package; None when it is absent.
    attention : tuple of str
        Attention implementations that can be used here.
    devices : tuple of str
        Devices that torch sees.
    checks : tuple of Check
    """

    versions: dict[str, str | None]
    attention: tuple[str, ...]
    devices: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check came out right."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return {**asdict(self), "ok": self.ok}


def doctor(device: str | torch.device = "cpu") -> DoctorReport:
    """Look around and try the cache on a tiny random language model.

    Parameters
    ----------
    device : str or torch.device
        Where the checks compute.

    Returns
    -------
    DoctorReport
        Two checks for every implementation among ``sdpa`` and ``eager``: at ratio 1 the logits are those of the
        ordinary cache, and at ratio 0.4 they are those of the full cache with the evicted keys masked.
    """
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    checks: list[Check] = []
    for attention in ("sdpa", "eager"):
        for name, run in (("ratio 1", _check_full), ("ratio 0.4", _check_masked)):
            label = f"{attention}, {name}"
            try:
                error, tolerance, against = run(attention, device)
            except Exception as problem:
                checks.append(Check(label, False, f"{type(problem).__name__}: {problem}"))
                continue
            checks.append(Check(label, error <= tolerance, f"largest logit difference to {against}: {error:.1e}"))
    return DoctorReport(
        versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        attention=available_attention(),
        devices=tuple(devices),
        checks=tuple(checks),
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _tiny(attention: str, device: str | torch.device) -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation=attention,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float().eval().to(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 64, (2, 40), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :6], ids[1, :6] = 0, 0
    return model, {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _generate(model: Any, inputs: dict[str, torch.Tensor], cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
    result = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(result.logits), result.sequences[:, inputs["input_ids"].shape[1] :]


def _check_full(attention: str, device: str | torch.device) -> tuple[float, float, str]:
    from transformers import DynamicCache

    from meda_kv.cache import MedaCache

    model, inputs = _tiny(attention, device)
    plain, _ = _generate(model, inputs, DynamicCache(config=model.config))
    ours, _ = _generate(model, inputs, MedaCache(model, ratio=1.0))
    return float((ours - plain).abs().max()), 0.0, "the ordinary cache"


def _check_masked(attention: str, device: str | torch.device) -> tuple[float, float, str]:
    from meda_kv.attention.reference import masked_generate
    from meda_kv.cache import MedaCache

    model, inputs = _tiny(attention, device)
    cache = MedaCache(model, ratio=0.4, merge="none", floor=4, entropy="self")
    ours, tokens = _generate(model, inputs, cache)
    prompt = inputs["input_ids"].shape[1]
    kept = [torch.where(layer.positions < prompt, layer.positions, -1) for layer in cache.layers]
    reference, _ = masked_generate(model, inputs, kept, tokens)
    return float((ours - reference).abs().max()), 1e-4, "masked attention"
