from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from meda_kv.evaluation.results import Results, interval, load_results, mean_of_tasks, paired
from vfm_core.errors import UserError
from vfm_core.metrics import paired_difference, wilson_interval


def made(
    sample: Any,
    method: Any = "full",
    ratio: Any = 1.0,
    score: Any = 1.0,
    task: Any = "t",
    seed: Any = 0,
    level: Any = "Few",
    group: Any = "g",
    **more: Any,
) -> Any:
    arm = f"{method}@{ratio:g}"
    scores = score if isinstance(score, dict) else {"all": score}
    return {
        "unit": f"{task}/{sample}|{arm}|{seed}",
        "sample_id": str(sample),
        "task": task,
        "group": group,
        "level": level,
        "method": method,
        "ratio": ratio,
        "arm": arm,
        "seed": seed,
        "scores": scores,
        "tokens": 2,
        "tokens_after": 2,
        "kv_bytes": 100.0 * ratio,
        "kv_bytes_full": 100.0,
        "seconds": 0.1,
        "compress_seconds": 0.01,
        **more,
    }


def test_rows_are_means_with_wilsons_intervals_and_paired_differences() -> None:
    rng = np.random.default_rng(0)
    full, other = rng.integers(0, 2, 40).astype(float), rng.integers(0, 2, 40).astype(float)
    records = [made(i, score=s) for i, s in enumerate(full)] + [made(i, "h2o", 0.2, s) for i, s in enumerate(other)]
    base, row = Results(tuple(records)).rows()
    assert (base.arm, base.difference, base.n) == ("full@1", None, 40)
    assert base.score == pytest.approx(wilson_interval(int(full.sum()), 40))
    assert row.score == pytest.approx(wilson_interval(int(other.sum()), 40))
    assert row.difference == paired_difference(other - full, np.zeros(40))
    assert row.bytes_ratio == pytest.approx(0.2) and row.seed_std is None and row.tasks == 1


def test_differences_use_common_samples_only() -> None:
    records = [made("a", score=1.0), made("b", score=0.0), made("b", "h2o", 0.2, 0.5), made("c", "h2o", 0.2, 1.0)]
    row = Results(tuple(records)).rows()[1]
    assert row.difference is not None and row.difference.difference == 0.5 and row.n == 2


def test_a_group_is_the_mean_of_its_tasks_not_of_its_samples() -> None:
    records = [made(i, task="big", score=1.0) for i in range(30)] + [made(i, task="small", score=0.0) for i in range(3)]
    results = Results(tuple(records))
    assert results.rows("group")[0].score.mean == 0.5
    assert [row.score.mean for row in results.rows("task")] == [1.0, 0.0]
    assert results.rows("group")[0].tasks == 2 and results.rows("all")[0].n == 33
    assert mean_of_tasks([("a", 1), ("a", 0), ("b", 1)]) == 0.75


def test_stratified_interval_of_equal_tasks_agrees_with_theory() -> None:
    rng = np.random.default_rng(1)
    values = {t: {str(i): float(v) for i, v in enumerate(rng.beta(2, 2, 400))} for t in "ab"}
    found = interval(values)
    spread = 1.96 * np.sqrt(sum(np.var(list(v.values())) / 400 for v in values.values())) / 2
    assert found.high - found.low == pytest.approx(2 * spread, rel=0.1)
    zero = {t: dict.fromkeys(v, 0.0) for t, v in values.items()}
    difference = paired(values, zero)
    assert difference.difference == pytest.approx(found.mean)
    assert difference.low == pytest.approx(found.low, abs=0.005)


def test_intervals_of_all_arms_follow_one_rule() -> None:
    """The arm that is always right has the narrower interval, also where scores are shares of several questions."""
    shares = np.ones(24)
    shares[[3, 9, 15]] = 7 / 8
    half = np.array([0.25, 0.5, 0.75] * 8)
    records = [made(i) for i in range(24)] + [made(i, "meda", 0.5, s) for i, s in enumerate(shares)]
    records += [made(i, "h2o", 0.5, s) for i, s in enumerate(half)]
    full, meda, h2o = (row.score for row in Results(tuple(records)).rows())
    assert full.high - full.low < meda.high - meda.low < h2o.high - h2o.low
    assert wilson_interval(24, 24).low < full.low < 1.0 and meda.low < full.low and full.high == 1.0


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    for draw, truth in ((lambda: rng.binomial(1, 0.9, 30), 0.9), (lambda: rng.binomial(8, 0.9, 30) / 8, 0.9)):
        found = [interval({"t": {str(i): float(v) for i, v in enumerate(draw())}}) for _ in range(400)]
        assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.92


def test_all_right_has_wilsons_interval_since_a_bootstrap_has_no_width() -> None:
    found = Results(tuple(made(i) for i in range(50))).rows()[0].score
    assert found.mean == 1.0 and found.low == pytest.approx(wilson_interval(50, 50).low)
    part = Results(tuple(made(i, score=0.25) for i in range(5))).rows()[0].score
    assert part.low < part.mean == 0.25 < part.high  # five equal scores are no proof of a constant


def test_seeds_are_averaged_within_a_sample() -> None:
    records = [made("a", "random", 0.2, 1.0, seed=0), made("a", "random", 0.2, 0.0, seed=1)]
    records += [made("b", "random", 0.2, 1.0, seed=0), made("b", "random", 0.2, 1.0, seed=1)]
    row = Results(tuple(records)).rows()[0]
    assert (row.n, row.seeds, row.score.mean) == (2, 2, 0.75)
    assert row.seed_std == pytest.approx(np.std([1.0, 0.5], ddof=1))


def test_levels_and_kinds_are_told_apart_in_order() -> None:
    probe = {"all": 0.5, "asked": 1.0, "other": 0.0}
    records = [made(1, level="Many", score=probe), made(2, level="Few", score=probe)]
    results = Results(tuple(records))
    assert results.names("level") == ["Few", "Many"] and results.kinds == ["all", "asked", "other"]
    assert [(r.name, r.kind, r.score.mean) for r in results.rows("level")][:3] == [
        ("Few", "all", 0.5),
        ("Few", "asked", 1.0),
        ("Few", "other", 0.0),
    ]
    with pytest.raises(UserError, match="division"):
        results.rows("colour")


def test_arms_follow_the_grid() -> None:
    records = [made(1, "b", 0.1), made(1, "a", 0.1), made(1, "b", 0.5), made(1), made(1, "a", 0.5)]
    found = Results(tuple(records), config={"methods": ["full", "a", "b"]}).arms
    assert found == ["full@1", "a@0.5", "a@0.1", "b@0.5", "b@0.1"]
    assert Results(tuple(records)).arms == ["full@1", "b@0.5", "b@0.1", "a@0.5", "a@0.1"]


def test_compare_of_arms_without_common_samples_is_nothing() -> None:
    results = Results((made("a"), made("b", "h2o", 0.2)))
    assert np.isnan(results.compare("full@1", "h2o@0.2").difference)


def test_load_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        load_results(tmp_path)
