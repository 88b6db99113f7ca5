"""How a compressed cache meets a transformers model: attention wrappers, forward hooks, token kinds, model checks.

Nothing here belongs to one model family. The wrapper stands at the attention interface of transformers, where queries
and keys are already rotated and normalised, so LLaVA, Qwen-VL, InternVL, Idefics, Gemma and text-only models run
through the same lines.
"""

from meda_kv.attention.hooks import install, installed, is_installed, running_cache, uninstall
from meda_kv.attention.interface import PREFIX, available_attention, base_attention
from meda_kv.attention.masks import read_mask, write_mask
from meda_kv.attention.selfcheck import Check, DoctorReport, doctor
from meda_kv.attention.support import ModelFacts, check_cache_kind, check_model
from meda_kv.attention.tokens import TokenFacts, token_facts, visual_token_ids

__all__ = [
    "PREFIX",
    "Check",
    "DoctorReport",
    "ModelFacts",
    "TokenFacts",
    "available_attention",
    "base_attention",
    "check_cache_kind",
    "check_model",
    "doctor",
    "install",
    "installed",
    "is_installed",
    "read_mask",
    "running_cache",
    "token_facts",
    "uninstall",
    "visual_token_ids",
    "write_mask",
]
