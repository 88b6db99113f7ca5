"""meda-kv: shrink the KV cache of a vision-language model behind plain ``model.generate``.

"MEDA: Dynamic KV Cache Allocation for Efficient Multimodal Long-Context Inference" (arXiv 2502.17599) and its peers
under one exact budget. The public names below are loaded on first use (PEP 562), so that ``import meda_kv`` and every
``--help`` stay fast.

>>> from meda_kv import MedaCache
>>> cache = MedaCache(model, ratio=0.2)                                        # doctest: +SKIP
>>> model.generate(**inputs, past_key_values=cache, max_new_tokens=256)        # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meda_kv.attention import doctor, install, uninstall
    from meda_kv.bench import run_bench
    from meda_kv.cache import CompressedCache, MedaCache, cache_for
    from meda_kv.data import Sample, Task, open_task
    from meda_kv.demo import run_demo
    from meda_kv.evaluation import evaluate, load_results, recommend
    from meda_kv.generation import generate
    from meda_kv.methods import METHODS, PRESETS, Allocator, Merger, Method, Scorer, register_method, resolve_method
    from meda_kv.models import load_model
    from meda_kv.profiles import load_profile
    from meda_kv.prompts import Prompt, build_inputs

_HOME = {
    "METHODS": "methods",
    "PRESETS": "methods",
    "Allocator": "methods",
    "CompressedCache": "cache",
    "MedaCache": "cache",
    "Merger": "methods",
    "Method": "methods",
    "Prompt": "prompts",
    "Sample": "data",
    "Scorer": "methods",
    "Task": "data",
    "build_inputs": "prompts",
    "cache_for": "cache",
    "doctor": "attention",
    "evaluate": "evaluation",
    "generate": "generation",
    "install": "attention",
    "load_model": "models",
    "load_profile": "profiles",
    "load_results": "evaluation",
    "open_task": "data",
    "recommend": "evaluation",
    "register_method": "methods",
    "resolve_method": "methods",
    "run_bench": "bench",
    "run_demo": "demo",
    "uninstall": "attention",
}

__all__ = [
    "METHODS",
    "PRESETS",
    "Allocator",
    "CompressedCache",
    "MedaCache",
    "Merger",
    "Method",
    "Prompt",
    "Sample",
    "Scorer",
    "Task",
    "build_inputs",
    "cache_for",
    "doctor",
    "evaluate",
    "generate",
    "install",
    "load_model",
    "load_profile",
    "load_results",
    "open_task",
    "recommend",
    "register_method",
    "resolve_method",
    "run_bench",
    "run_demo",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("meda-kv")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
