"""Samples to answer: MileBench folders, JSON lines of one's own, and the embedded picture albums."""

from __future__ import annotations

from meda_kv.data.paper_tables import PaperTable, paper_table
from meda_kv.data.samples import METRICS, Sample, Task, open_task

__all__ = ["METRICS", "PaperTable", "Sample", "Task", "open_task", "paper_table"]
