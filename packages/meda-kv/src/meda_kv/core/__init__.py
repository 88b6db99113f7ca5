"""The mathematics: pure functions on tensors, no model and no cache."""

from meda_kv.core.blocks import (
    MAX_BLOCK_BYTES,
    block_rows,
    group_heads,
    scan_attention,
)
from meda_kv.core.budgets import (
    allocate,
    mass,
    pyramid,
    pyramid_line,
    total_budget,
    uniform,
    water_fill,
    weighted,
)
from meda_kv.core.entropy import attention_entropy, cross_entropy_sums, self_entropy_rows
from meda_kv.core.merging import merge, merge_by_score
from meda_kv.core.official import (
    official_alphas,
    official_budgets,
    official_entropy,
    official_keep,
)
from meda_kv.core.quota import dealt_in_turns, token_blocks
from meda_kv.core.scores import accumulated_scores, pool_scores, sample_rows, window_scores
from meda_kv.core.selection import keep_mask, select

__all__ = [
    "MAX_BLOCK_BYTES",
    "accumulated_scores",
    "allocate",
    "attention_entropy",
    "block_rows",
    "cross_entropy_sums",
    "dealt_in_turns",
    "group_heads",
    "keep_mask",
    "mass",
    "merge",
    "merge_by_score",
    "official_alphas",
    "official_budgets",
    "official_entropy",
    "official_keep",
    "pool_scores",
    "pyramid",
    "pyramid_line",
    "sample_rows",
    "scan_attention",
    "select",
    "self_entropy_rows",
    "token_blocks",
    "total_budget",
    "uniform",
    "water_fill",
    "weighted",
    "window_scores",
]
