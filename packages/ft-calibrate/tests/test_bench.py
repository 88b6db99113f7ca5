"""The bench compares equal answers, writes what it found, and says what it extrapolated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ft_calibrate import bench, bench_growth
from ft_calibrate.bench import SECTIONS, run_bench, tables
from ft_calibrate.bench_growth import growth
from ft_calibrate.reference import published_curve
from vfm_core.errors import UserError


def test_curve_and_sweep_give_equal_answers(tmp_path: Path) -> None:
    result = run_bench(tmp_path, ["curve", "sweep"], quick=True, samples=[60, 120], classes=[5, 12], repeats=1)
    assert json.loads((tmp_path / "bench.json").read_text(encoding="utf-8")) == result
    assert [(row["samples"], row["classes"]) for row in result["curve"]] == [(60, 5), (120, 5), (60, 12), (120, 12)]
    for row in result["curve"]:
        assert row["largest_difference"] == 0, "a faster wrong curve is no result"
        assert row["ausuc_difference"] < 0.05 and row["published"] == "measured, 1 round" and row["ratio"] > 1
        assert row["points_compared"] >= row["samples"] - 1
    (sweep,) = result["sweep"]
    assert sweep["largest_difference"] < 0.02 and sweep["ratio"] > 5 and sweep["gammas"] == 50
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "published algorithm" in html and "scikit-learn" in html
    assert [title for title, _ in tables(result)] == [bench._TITLES["curve"], bench._TITLES["sweep"]]


def test_the_published_algorithm_runs_once_where_it_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: object, **options: object) -> object:
        calls.append(options)
        return published_curve(*arguments, **options)

    monkeypatch.setattr(bench, "published_curve", counted)
    monkeypatch.setattr(bench, "_LARGE", 100)
    (row,) = run_bench(sections=["curve"], samples=[60], classes=[5], repeats=3)["curve"]
    assert len(calls) == 1 and row["published"] == "measured, 1 round" and row["largest_difference"] == 0


def test_memory_is_none_where_the_system_does_not_let_it_be_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_growth, "_RESET", tmp_path)  # there, and not to be written: an OSError
    assert bench_growth._restart_peak() is None
    assert bench_growth._one(100, 4)[2] is None


def test_large_problems_are_extrapolated_and_say_so() -> None:
    row = run_bench(sections=["curve"], samples=[200, 10_000], classes=[8], repeats=1)["curve"][1]
    assert row["published"] == "extrapolated by N^2 from N = 200"
    assert row["ausuc_difference"] is None and row["points_compared"] == 20 and row["largest_difference"] == 0


@pytest.mark.parity
def test_a_hundred_times_faster_than_published_at_a_thousand_samples() -> None:
    (row,) = run_bench(sections=["curve"], samples=[1000], classes=[12], repeats=1)["curve"]
    assert row["ratio"] >= 100 and row["largest_difference"] == 0


def test_growth_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    rows = growth((2000, 100_000), (), at_classes=20, repeats=1)
    assert [row["samples"] for row in rows] == [2000, 100_000] and {row["over"] for row in rows} == {"samples"}
    assert 0.3 < rows[0]["slope"] < 1.8  # quadratic would be 2
    if rows[1]["peak_mb"] is not None:  # 100,000 x 20 scores would be 8 MB; 17 bytes per sample and a sort are kept
        assert rows[1]["peak_mb"] < 40
    with pytest.raises(RuntimeError, match="growth measurement failed"):
        growth((0, -5), (), at_classes=-1, repeats=1)
    figure = bench._growth_figure(
        [{**row, "over": over, "classes": 7} for row in rows for over in ("samples", "classes")]
    )
    assert len(figure.axes) == 2


@pytest.mark.slow
def test_a_million_samples_of_a_hundred_classes_stay_small_and_linear() -> None:
    rows = growth((10_000, 100_000, 1_000_000), (), at_classes=100, repeats=1)
    assert 0.5 < rows[0]["slope"] < 1.5
    if rows[-1]["peak_mb"] is not None:
        assert rows[-1]["peak_mb"] < 512  # the scores alone would be 400 MB


def test_extraction_in_one_pass_equals_two(tmp_path: Path) -> None:
    (row,) = run_bench(tmp_path, ["extract"], quick=True, images=8, repeats=1)["extract"]
    assert row["largest_difference"] < 1e-4 and row["model"] == "test_resnet" and row["images"] == 8
    assert row["ours_images_per_s"] > 0 and row["ratio"] > 0


def test_absent_timm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    result = run_bench(sections=["extract"], quick=True)
    assert result["extract"] == [] and result["skipped"] == ["timm is not installed (pip install timm)"]
    assert tables(result) == [("left out", [{"reason": "timm is not installed (pip install timm)"}])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sections": ["speed"]}, "unknown section in sections: 'speed'; did you mean sweep"),
        ({"repeats": 0}, "nothing to time: 0 repeats"),
        ({"samples": [3]}, "nothing to time"),
        ({"images": 0}, "nothing to time"),
        ({"sections": ["extract"], "model": "resnet5O"}, "did you mean resnet50"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_bench(quick=True, **arguments)  # type: ignore[arg-type]


def test_sections_are_public() -> None:
    assert SECTIONS == ("curve", "growth", "sweep", "extract")
