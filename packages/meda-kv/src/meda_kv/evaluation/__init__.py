"""Compare methods at equal memory: the grid of arms, the loop, the tables, and what they recommend."""

from __future__ import annotations

from meda_kv.evaluation.arms import Arm, grid
from meda_kv.evaluation.engine import evaluate
from meda_kv.evaluation.outputs import write_outputs
from meda_kv.evaluation.recommend import Leader, Recommendation, recommend
from meda_kv.evaluation.results import Results, Row, load_results
from meda_kv.evaluation.shards import merge_runs, parse_shard, take_shard

__all__ = [
    "Arm",
    "Leader",
    "Recommendation",
    "Results",
    "Row",
    "evaluate",
    "grid",
    "load_results",
    "merge_runs",
    "parse_shard",
    "recommend",
    "take_shard",
    "write_outputs",
]
