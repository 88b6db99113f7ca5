"""The table method x ratio x task as CSV (one line per cell, everything) and as Markdown (one grid per task)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vfm_core.files import atomic_write
from vfm_core.metrics import Interval

from meda_kv.evaluation.results import Results, Row

CSV_COLUMNS = (
    "division",
    "name",
    "kind",
    "method",
    "ratio",
    "n",
    "seeds",
    "score",
    "low",
    "high",
    "mended_score",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "seed_std",
    "kv_bytes",
    "kv_bytes_full",
    "bytes_ratio",
    "tokens",
    "tokens_after",
    "seconds",
    "compress_seconds",
)


def csv_rows(rows: Sequence[Row], division: str) -> list[dict[str, Any]]:
    """Rows as flat dicts with `CSV_COLUMNS`."""
    found = []
    for row in rows:
        flat = {name: getattr(row, name, None) for name in CSV_COLUMNS}
        flat |= {"division": division, "score": row.score.mean, "low": row.score.low, "high": row.score.high}
        flat["mended_score"] = row.mended
        if row.difference is not None:
            d = row.difference
            flat |= {"difference": d.difference, "difference_low": d.low, "difference_high": d.high, "p": d.p}
        found.append(flat)
    return found


def write_csv(path: str | Path, parts: dict[str, list[Row]]) -> None:
    """Write ``table.csv``: one line per division (task, group, level), name, kind of question and arm.

    Parameters
    ----------
    path
        Written atomically.
    parts
        Rows by division.
    """
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        for division, rows in parts.items():
            for flat in csv_rows(rows, division):
                writer.writerow({k: "" if v is None or v != v else v for k, v in flat.items()})


def grid_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Methods down, ratios across: ``{"method", "0.5": (mean, low, high), ...}`` of rows of one name and kind.

    The full cache is the first row, with its score under every ratio that was run.
    """
    ratios = sorted({row.ratio for row in rows if row.method != "full"}, reverse=True) or [1.0]
    found: list[dict[str, Any]] = []
    for method in dict.fromkeys(row.method for row in rows):
        cells: dict[float, Interval] = {row.ratio: row.score for row in rows if row.method == method}
        line: dict[str, Any] = {"method": method}
        for ratio in ratios:
            score = cells.get(1.0) if method == "full" else cells.get(ratio)
            line[f"{ratio:g}"] = tuple(score) if score is not None else None
        found.append(line)
    return found


def byte_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per arm: ratio asked for, bytes per sample as measured, their share of the full ones, times."""
    return [
        {
            "method": row.method,
            "ratio": row.ratio,
            "KV KiB": row.kv_bytes / 1024,
            "of full": row.bytes_ratio,
            "compress ms": 1e3 * row.compress_seconds,
            "answer ms": 1e3 * row.seconds,
            "tokens": row.tokens,
            "tokens after": row.tokens_after,
        }
        for row in rows
    ]


def mended_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows whose MileBench score and mended score differ, with both; none where the scorers agree."""
    return [
        {
            "task": title_of(row.name, row.kind),
            "method": row.method,
            "ratio": row.ratio,
            "MileBench's scorer": row.score.mean,
            "mended": row.mended,
        }
        for row in rows
        if row.mended is not None and abs(row.mended - row.score.mean) > 1e-12
    ]


def heading(division: str, name: str, kind: str) -> str:
    """Title of a part of the tables: ``"needle"``, ``"group S-3"``, ``"all tasks"``, ``"Few images"``."""
    named = {"task": name, "all": "all tasks", "level": f"{name} images"}.get(division, f"{division} {name}")
    return title_of(named, kind)


def count_of(rows: Sequence[Row]) -> str:
    """``"1 sample"``, ``"40 samples"``: the least number behind any of the rows."""
    n = min(row.n for row in rows)
    return f"{n} sample{'' if n == 1 else 's'}"


def title_of(name: str, kind: str) -> str:
    """``"needle, asked questions"``; the kind is left out for all questions."""
    return name if kind == "all" else f"{name}, {kind} question{'s' if kind == 'other' else ''}"


def cells_of(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Rows parted into (name, kind, rows)."""
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        parts.setdefault((row.name, row.kind), []).append(row)
    return [(name, kind, part) for (name, kind), part in parts.items()]


def markdown(results: Results, parts: dict[str, list[Row]], sentences: Sequence[str]) -> str:
    """``table.md``: a grid per task and kind, groups and levels below, then the recommendations."""
    config = results.config
    lines = [
        f"# {config.get('task', 'evaluation')}: method x ratio",
        "",
        f"Model {config.get('model', '?')}, protocol {config.get('protocol', '?')}, preset "
        f"{config.get('preset', '?')}; mean score [95 % interval].",
    ]
    for division, rows in parts.items():
        for name, kind, part in cells_of(rows):
            grid = grid_rows(part)
            columns = list(grid[0])
            head = f"{heading(division, name, kind)} ({count_of(part)})"
            lines += ["", f"## {head}", "", "| " + " | ".join(_escape(c) for c in columns) + " |"]
            lines.append("| --- |" + " ---: |" * (len(columns) - 1))
            lines += ["| " + " | ".join(_escape(_cell(line[c])) for c in columns) + " |" for line in grid]
    differ = mended_rows(parts.get("task", []))
    if differ:
        columns = list(differ[0])
        lines += ["", "## MileBench's scorer and the mended one", "", "| " + " | ".join(columns) + " |"]
        lines.append("| --- | --- |" + " ---: |" * (len(columns) - 2))
        lines += ["| " + " | ".join(_escape(_cell(line[c])) for c in columns) + " |" for line in differ]
    if sentences:
        lines += ["", "## Recommendation", "", *(f"- {sentence}" for sentence in sentences)]
    return "\n".join(lines) + "\n"


def write_markdown(path: str | Path, text: str) -> None:
    """Write text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _cell(value: Any) -> str:
    """Scores with three decimals, as the terminal has them; ratios and names as they are."""
    if isinstance(value, tuple):
        return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
