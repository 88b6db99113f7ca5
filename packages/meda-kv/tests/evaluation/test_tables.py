from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

from meda_kv.evaluation.results import Results, Row
from meda_kv.evaluation.tables import (
    CSV_COLUMNS,
    byte_rows,
    count_of,
    grid_rows,
    heading,
    markdown,
    mended_rows,
    title_of,
    write_csv,
)
from vfm_core.metrics import Difference, Interval


def row_of(method: Any, ratio: Any, score: Any, name: Any = "needle", kind: Any = "all", difference: Any = None) -> Any:
    interval = Interval(score, score - 0.1, score + 0.1)
    return Row(
        name=name,
        kind=kind,
        method=method,
        ratio=ratio,
        arm=f"{method}@{ratio:g}",
        n=40,
        tasks=1,
        seeds=1,
        score=interval,
        difference=difference,
        seed_std=None,
        kv_bytes=2048 * ratio,
        kv_bytes_full=2048.0,
        tokens=8.0,
        tokens_after=8.0,
        seconds=0.02,
        compress_seconds=0.001,
    )


ROWS = [
    row_of("full", 1.0, 0.9),
    row_of("meda", 0.5, 0.8, difference=Difference(-0.1, -0.2, -0.05, 0.01)),
    row_of("meda", 0.1, 0.5, difference=Difference(math.nan, math.nan, math.nan, math.nan)),
    row_of("a|b", 0.5, 0.7),
]


def test_grid_has_methods_down_and_ratios_across_with_the_full_cache_everywhere() -> None:
    grid = grid_rows(ROWS)
    assert [line["method"] for line in grid] == ["full", "meda", "a|b"]
    assert list(grid[0]) == ["method", "0.5", "0.1"]
    assert grid[0]["0.1"] == grid[0]["0.5"] == ROWS[0].score
    assert grid[1]["0.1"] == ROWS[2].score and grid[2]["0.1"] is None
    assert list(grid_rows(ROWS[:1])[0]) == ["method", "1"]


def test_csv_holds_every_cell_and_leaves_gaps_empty(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", {"task": ROWS, "level": ROWS[:1]})
    with (tmp_path / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == CSV_COLUMNS and len(lines) == 5
    assert float(lines[1]["difference_low"]) == -0.2 and float(lines[1]["score"]) == 0.8
    assert lines[0]["difference"] == "" and lines[2]["p"] == "" and lines[4]["division"] == "level"
    assert float(lines[1]["bytes_ratio"]) == 0.5


def test_markdown_has_a_grid_per_task_and_escapes_names() -> None:
    text = markdown(Results((), config={"task": "needle", "model": "tiny"}), {"task": ROWS}, ["needle: keep it."])
    assert "| method | 0.5 | 0.1 |" in text and "a\\|b" in text and "- needle: keep it." in text
    assert "## needle (40 samples)" in text
    assert "| 0.800 [0.700, 0.900] |" in text  # as the terminal has them


def test_headings_and_counts_read_as_english() -> None:
    parts = [heading(*words) for words in (("all", "all", "all"), ("group", "S-3", "asked"), ("level", "Few", "all"))]
    assert parts == ["all tasks", "group S-3, asked question", "Few images"]
    assert (count_of(ROWS), count_of([dataclasses.replace(ROWS[0], n=1)])) == ("40 samples", "1 sample")


def test_mended_scores_are_shown_where_they_differ(tmp_path: Path) -> None:
    rows = [dataclasses.replace(ROWS[0], mended=0.9), dataclasses.replace(ROWS[1], mended=0.75), ROWS[2]]
    (line,) = mended_rows(rows)
    assert (line["method"], line["MileBench's scorer"], line["mended"]) == ("meda", 0.8, 0.75)
    write_csv(tmp_path / "t.csv", {"task": rows})
    with (tmp_path / "t.csv").open() as file:
        assert [row["mended_score"] for row in csv.DictReader(file)] == ["0.9", "0.75", ""]
    assert "the mended one" in markdown(Results((), config={}), {"task": rows}, [])


def test_bytes_are_told_as_measured() -> None:
    line = byte_rows(ROWS)[1]
    assert line["KV KiB"] == 1.0 and line["of full"] == 0.5 and line["tokens after"] == 8.0


def test_titles_leave_out_the_kind_of_all() -> None:
    assert [title_of("x", kind) for kind in ("all", "asked", "other")] == [
        "x",
        "x, asked question",
        "x, other questions",
    ]
