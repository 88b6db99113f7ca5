from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from meda_kv.evaluation.outputs import divisions
from meda_kv.evaluation.recommend import recommend
from meda_kv.evaluation.report import build_report, failure_rows, protocol_note, score_figure
from meda_kv.evaluation.results import Results


def some_results(n: Any = 30) -> Any:
    rng = np.random.default_rng(3)
    records = [
        {
            "unit": f"{task}/{i}|{method}@{ratio:g}|0",
            "sample_id": str(i),
            "task": task,
            "group": "g",
            "level": "Few" if i % 2 else "Many",
            "method": method,
            "ratio": ratio,
            "arm": f"{method}@{ratio:g}",
            "seed": 0,
            "scores": {"all": float(rng.random() < ratio), "asked": 1.0, "other": 0.5},
            "tokens": 3,
            "tokens_after": 3,
            "kv_bytes": 1000.0 * ratio,
            "kv_bytes_full": 1000.0,
            "seconds": 0.1,
            "compress_seconds": 0.01,
        }
        for task in ("needle", "<script>")
        for method, ratio in (("full", 1.0), ("snapkv?window=8", 0.5), ("snapkv?window=8", 0.2), ("h2o", 0.2))
        for i in range(n)
    ]
    errors = (
        {"unit": "u1", "task": "needle", "sample_id": "99", "arm": "full@1", "error": "corrupt picture in 99.png"},
        {"unit": "u2", "task": "needle", "sample_id": "99", "arm": "h2o@0.2", "error": "corrupt picture in 99.png"},
    )
    return Results(tuple(records), errors, {"model": "tiny", "task": "needle", "protocol": "asked", "seed": 0})


def test_report_shows_recommendation_tables_bytes_and_failures(tmp_path: Path) -> None:
    results = some_results()
    report = build_report(results, divisions(results), recommend(results), missing=["2/4"])
    text = report.write(tmp_path / "report.html", markdown=True).read_text()
    for wanted in ("Recommendation", "Score against ratio", "as measured", "corrupt picture in 99.png", "2/4"):
        assert wanted in text
    assert "<script>:" not in text and "KV KiB" in text and "Number of images" in text
    assert text.count("data:image") >= 6  # two tasks, three kinds of question
    written = (tmp_path / "report.md").read_text()
    assert "keep the full cache" in written and "| snapkv?window=8 |" in written


def test_figure_has_a_line_per_method_and_the_full_cache_as_a_level() -> None:
    results = some_results(8)
    rows = [row for row in results.rows("task", ["all"]) if row.name == "needle"]
    figure = score_figure(rows, "needle")
    (axes,), (legend,) = figure.axes, figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert sorted(labels) == ["full", "h2o", "snapkv?window=8"]
    assert [float(tick.get_text()) for tick in axes.get_xticklabels() if tick.get_text()] == [0.2, 0.5]


def test_failures_are_told_once_per_reason() -> None:
    results = some_results(2)
    (row,) = failure_rows(results)
    assert row == {
        "task": "needle",
        "sample_id": "99",
        "arms": "full@1, h2o@0.2",
        "error": "corrupt picture in 99.png",
    }
    more = tuple({**results.errors[0], "sample_id": str(i), "arm": f"a{j}"} for i in range(3) for j in range(4))
    (row,) = failure_rows(Results((), more))
    assert (row["sample_id"], row["arms"]) == ("0 and 2 more", "4 arms")


def test_every_protocol_says_what_it_tests() -> None:
    assert "first answer token comes from the full cache" in protocol_note("generate")
    assert "could not know" in protocol_note("asked") and "only the context" in protocol_note("agnostic")
