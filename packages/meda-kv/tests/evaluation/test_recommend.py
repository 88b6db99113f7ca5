from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from meda_kv.evaluation.recommend import LEAST_SAMPLES, loss_interval, recommend, samples_needed
from meda_kv.evaluation.results import Results, Row
from vfm_core.errors import UserError
from vfm_core.metrics import Difference, Interval, wilson_interval


def answers(method: Any, ratio: Any, scores: Any, after: Any = 2, held: Any = None) -> Any:
    return [
        {
            "unit": f"t/{i}|{method}@{ratio:g}|0",
            "sample_id": str(i),
            "task": "t",
            "group": "",
            "level": "Few",
            "method": method,
            "ratio": ratio,
            "arm": f"{method}@{ratio:g}",
            "seed": 0,
            "scores": {"all": float(s)},
            "tokens": 2,
            "tokens_after": after,
            "kv_bytes": 100.0 * (ratio if held is None else held),
            "kv_bytes_full": 100.0,
            "seconds": 0.1,
            "compress_seconds": 0.01,
        }
        for i, s in enumerate(scores)
    ]


def one(records: Any, **options: Any) -> Any:
    (found,) = recommend(Results(tuple(records)), **options)
    return found


GOOD, BAD = np.ones(200), np.r_[np.ones(100), np.zeros(100)]


def test_the_least_ratio_within_the_tolerance_is_chosen() -> None:
    records = answers("full", 1.0, GOOD) + answers("a", 0.5, GOOD) + answers("a", 0.1, BAD) + answers("b", 0.2, GOOD)
    found = one(records)
    assert (found.verdict, found.method, found.ratio, found.n, found.arms) == ("use", "b", 0.2, 200, 3)
    assert found.loss is not None and found.loss.high <= 0.05 and found.bytes_ratio == pytest.approx(0.2)
    assert "b at ratio 0.2" in found.sentence() and "20.0%" in found.sentence() and "200 samples" in found.sentence()


def test_a_loss_that_is_only_small_on_average_is_not_enough() -> None:
    scores = np.ones(40)
    scores[0] = 0.0  # mean loss .025, but the interval reaches beyond .05
    records = answers("full", 1.0, np.ones(40)) + answers("a", 0.5, scores)
    found = one(records, tolerance=0.05)
    assert found.verdict == "keep-full" and "keep the full cache" in found.sentence()
    assert one(records, tolerance=0.2).verdict == "use"


def test_no_difference_on_few_samples_is_not_no_loss() -> None:
    records = answers("full", 1.0, np.ones(30)) + answers("a", 0.5, np.ones(30))
    assert one(records, tolerance=0.05).verdict == "keep-full"  # 0 of 30 may still be 11 of 100
    row = Row(
        *("t", "all", "a", 0.5, "a@0.5", 30, 1, 1, Interval(1, 1, 1), Difference(0.0, 0.0, 0.0, 1.0)),
        *(None, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    )
    loss = loss_interval(row)
    assert loss is not None and loss.high == pytest.approx(wilson_interval(0, 30).high)


@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.1, 0.3])
def test_the_number_of_samples_that_are_needed_is_the_least_that_does(tolerance: Any) -> None:
    n = samples_needed(tolerance)
    assert n >= LEAST_SAMPLES and wilson_interval(0, n).high <= tolerance
    assert n == LEAST_SAMPLES or wilson_interval(0, n - 1).high > tolerance
    for count, verdict in ((n - 1, "keep-full" if n > LEAST_SAMPLES else "too-few"), (n, "use")):
        found = one(answers("full", 1.0, np.ones(count)) + answers("a", 0.5, np.ones(count)), tolerance=tolerance)
        assert found.verdict == verdict
        assert verdict == "use" or (found.needed == n and f"{n}" in found.sentence())


def test_too_few_samples_are_told_with_the_number_that_is_needed() -> None:
    found = one(answers("full", 1.0, np.ones(5)) + answers("a", 0.5, np.ones(5)))
    assert found.verdict == "too-few" and found.needed == 73
    assert "from 5 samples; 20 are the least, and 73 are needed" in found.sentence()


def test_keeping_the_full_cache_says_what_more_samples_could_show() -> None:
    scores = np.ones(100)
    scores[:3] = 0.0  # loses .03, shown to lose about .07 at most
    records = answers("full", 1.0, np.ones(100)) + answers("a", 0.5, scores) + answers("b", 0.2, np.zeros(100))
    found = one(records)
    assert found.verdict == "keep-full" and found.nearest == ("a", 0.5) and found.needed is not None
    assert "a at ratio 0.5 may be, which takes about" in found.sentence() and found.to_dict()["needed"] == found.needed
    times = -(-found.needed // 100)
    more = answers("full", 1.0, np.ones(100 * times)) + answers("a", 0.5, np.tile(scores, times))
    assert times > 2 and one(more).verdict == "use"
    hopeless = one(answers("full", 1.0, GOOD) + answers("a", 0.5, BAD))
    assert hopeless.needed is None and "samples to show" not in hopeless.sentence()


def test_never_a_claim_without_data() -> None:
    few = LEAST_SAMPLES - 1
    cases = {
        "too-few": answers("full", 1.0, np.ones(few)) + answers("a", 0.5, np.ones(few)),
        "untested": answers("full", 1.0, GOOD) + answers("a", 0.5, GOOD, after=0),
        "no-baseline": answers("a", 0.5, GOOD),
    }
    for verdict, records in cases.items():
        found = one(records)
        assert (found.verdict, found.method) == (verdict, None)
        assert "no recommendation" in found.sentence()
    with pytest.raises(UserError, match="nothing measured"):
        recommend(Results(()))


def test_only_the_full_cache_recommends_nothing() -> None:
    found = one(answers("full", 1.0, GOOD))
    assert found.verdict == "no-arms" and "only the full cache" in found.sentence()


def test_an_arm_that_holds_as_much_as_the_full_cache_is_no_saving() -> None:
    records = answers("full", 1.0, GOOD) + answers("a", 0.1, GOOD, held=1.0)
    assert one(records).verdict == "keep-full"


def test_leaders_name_what_cannot_be_told_apart() -> None:
    close = GOOD.copy()
    close[0] = 0.0
    records = answers("full", 1.0, GOOD) + answers("a", 0.2, GOOD) + answers("b", 0.2, close) + answers("c", 0.2, BAD)
    (leader,) = one(records).leaders
    assert (leader.method, leader.ratio, leader.ties) == ("a", 0.2, ("b",))
    assert "not told apart from b" in one(records).leader_sentence()


def test_equal_ratio_goes_to_the_better_score() -> None:
    worse = GOOD.copy()
    worse[:2] = 0.0
    records = answers("full", 1.0, GOOD) + answers("a", 0.2, worse) + answers("b", 0.2, GOOD)
    assert one(records).method == "b"


def test_dict_form_holds_the_sentence() -> None:
    records = answers("full", 1.0, GOOD) + answers("a", 0.2, GOOD)
    found = one(records)
    assert found.to_dict()["sentence"] == found.sentence() and found.to_dict()["leaders"][0]["method"] == "a"


@pytest.mark.parametrize("bad", [0.0, 1.0, -1.0, float("nan")])
def test_tolerance_out_of_range_is_refused(bad: Any) -> None:
    with pytest.raises(UserError, match="--tolerance"):
        recommend(Results(tuple(answers("full", 1.0, GOOD))), tolerance=bad)


def test_empty_answers_of_a_probe_are_not_told_to_use_a_probe() -> None:
    records = tuple(answers("full", 1.0, GOOD) + answers("a", 0.5, GOOD, after=0))
    (found,) = recommend(Results(records, config={"protocol": "asked"}))
    assert found.verdict == "untested"
    assert "answers are empty" in found.sentence() and "--protocol" not in found.sentence()
