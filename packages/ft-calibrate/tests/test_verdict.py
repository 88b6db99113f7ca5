"""The rule of the verdict: every outcome, its borders, and the words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ft_calibrate.analyses import Change
from ft_calibrate.verdict import OUTCOMES, cannot_judge, judge, outcome_of

SE = 0.01


def change(value: float) -> Change:
    return Change(value, SE, value - 2 * SE, value + 2 * SE, 400)


@pytest.mark.parametrize(
    ("collapse", "features", "shortfall", "expected"),
    [
        (0.019, -0.5, 0.5, ("nothing wrong", False)),  # below 2 SE: whatever the features did
        (0.021, -0.019, 0.5, ("logit scale", False)),
        (0.021, 0.019, 0.5, ("logit scale", False)),
        (0.4, 0.021, 0.5, ("logit scale", True)),
        (0.4, -0.02, 0.5, ("logit scale", False)),  # dF >= -2 SE
        (0.4, -0.021, 0.021, ("features damaged", False)),
        (0.4, -0.021, 0.019, ("both", False)),
        (0.4, -0.3, -0.2, ("both", False)),
        (-0.4, -0.3, 0.2, ("nothing wrong", False)),
    ],
)
def test_rule(collapse: float, features: float, shortfall: float, expected: tuple[str, bool]) -> None:
    assert outcome_of(change(collapse), change(features), change(shortfall)) == expected


@pytest.mark.parametrize(
    ("features", "shortfall", "order", "expected"),
    [
        (0.1, 0.3, -0.021, ("order damaged", True)),
        (0.0, 0.021, -0.2, ("order damaged", False)),
        (0.1, 0.3, -0.02, ("logit scale", True)),  # the head's order fell by chance only
        (0.1, 0.02, -0.2, ("logit scale", True)),  # and gamma restores all the same
        (-0.03, 0.3, -0.2, ("features damaged", False)),
    ],
)
def test_order_of_the_head(features: float, shortfall: float, order: float, expected: tuple[str, bool]) -> None:
    assert outcome_of(change(0.4), change(features), change(shortfall), change(order)) == expected


def test_identical_models_have_no_spread_and_nothing_is_wrong() -> None:
    zero = Change(0.0, 0.0, 0.0, 0.0, 100)
    assert outcome_of(zero, zero, zero) == ("nothing wrong", False)
    total = Change(1.0, 0.0, 1.0, 1.0, 100)  # every sample fell: no spread either, and yet a fall
    assert outcome_of(total, zero, zero)[0] == "logit scale"


def _judge(before: float, after: float, calibrated: float, f_before: float, f_after: float, **how: Any) -> Any:
    """Judge 400 absent samples with these shares right, and 100 seen samples that must not count."""

    def right(share: float) -> np.ndarray:
        return np.concatenate([np.full(100, np.nan), np.arange(400) < 400 * share]).astype(float)

    given: dict[str, Any] = {"evidence": "ncm", "gamma": 5.0, "gamma_source": "alg"} | how
    return judge(right(before), right(after), right(calibrated), right(f_before), right(f_after), **given)


@pytest.mark.parametrize(
    ("shares", "outcome", "words"),
    [
        ((0.5, 0.5, 0.5, 0.7, 0.7), "nothing wrong", ["Nothing wrong", "50.0 % to 50.0 %"]),
        ((0.5, 0.0, 0.5, 0.7, 0.9), "logit scale", ["50.0 % to 0.0 %", "improved by 20.0", "gamma = 5", "gamma_ALG"]),
        ((0.5, 0.0, 0.5, 0.7, 0.7), "logit scale", ["are intact", "calibrate"]),
        ((0.5, 0.0, 0.2, 0.7, 0.4), "features damaged", ["got worse by 30.0", "20.0 %", "retrain"]),
        ((0.5, 0.0, 0.5, 0.7, 0.4), "both", ["yet calibration restores"]),
    ],
)
def test_sentences(shares: tuple[float, ...], outcome: str, words: list[str]) -> None:
    verdict = _judge(*shares)
    assert verdict.outcome == outcome and outcome in OUTCOMES
    assert all(word in verdict.sentence for word in words), verdict.sentence
    assert verdict.sentence.endswith(".") and "\n" not in verdict.sentence and verdict.next_steps
    assert verdict.collapse.n == 400  # stratified to the absent samples


def test_a_damaged_order_is_said_with_both_figures() -> None:
    nan = np.full(100, np.nan)
    before, after = (np.concatenate([nan, np.arange(400) < 400 * share]).astype(float) for share in (0.6, 0.35))
    verdict = _judge(0.5, 0.0, 0.1, 0.7, 0.9, order_before=before, order_after=after)
    assert verdict.outcome == "order damaged" and verdict.features_improved
    for words in ("improved by 20.0", "worse by 25.0", "only part: 10.0 %", "retrain"):
        assert words in verdict.sentence, verdict.sentence
    assert verdict.to_dict()["order_change"]["change"] == pytest.approx(-0.25)


def test_head_only_evidence_is_said() -> None:
    for shares in ((0.5, 0.0, 0.5, 0.7, 0.7), (0.5, 0.0, 0.2, 0.7, 0.4), (0.5, 0.5, 0.5, 0.7, 0.7)):
        assert "head-only evidence" in _judge(*shares, evidence="head").sentence
        assert "head-only" not in _judge(*shares).sentence


def test_a_gamma_that_needed_test_labels_is_marked() -> None:
    for source in ("alg-test", "oracle"):
        verdict = _judge(0.5, 0.0, 0.5, 0.7, 0.9, gamma_source=source)
        assert "test labels" in verdict.sentence and "not deployable" in verdict.sentence
        assert any("ft-calibrate fit" in step for step in verdict.next_steps)


def test_advice_fits_the_outcome() -> None:
    steps = {outcome: " ".join(_judge(*shares).next_steps) for outcome, shares in {
        "logit scale": (0.5, 0.0, 0.5, 0.7, 0.9), "features damaged": (0.5, 0.0, 0.2, 0.7, 0.4),
        "both": (0.5, 0.0, 0.5, 0.7, 0.4),
    }.items()}  # fmt: skip
    assert "export" in steps["logit scale"] and "--recipes" not in steps["logit scale"]
    assert "--recipes" in steps["features damaged"] and "export" not in steps["features damaged"]
    assert "export" in steps["both"] and "--recipes" in steps["both"]


def test_without_before_or_absent_samples_nothing_is_judged() -> None:
    verdict = cannot_judge("no model before", ausuc=0.5, acc_uu=0.75, gamma=3.0, gamma_source="alg")
    assert verdict.outcome == "cannot be judged"
    assert all(word in verdict.sentence for word in ("cannot be judged", "AUSUC 0.500", "75.0 %", "gamma = 3"))
    nan = np.full(5, np.nan)
    empty = judge(nan, nan, nan, nan, nan, evidence="ncm", gamma=1.0, gamma_source="alg")
    assert empty.outcome == "cannot be judged" and "no labelled sample" in empty.sentence


@pytest.mark.parametrize(("before", "judged"), [(0.0, False), (0.05, False), (0.0675, False), (0.075, True)])
def test_a_source_at_chance_had_nothing_to_lose(before: float, judged: bool) -> None:
    verdict = _judge(before, 0.0, 0.0, 0.5, 0.5, chance=0.05)  # 2 SE of 400 samples at chance: 2.2 points
    assert (verdict.outcome != "cannot be judged") == judged
    if not judged:
        assert "not above chance (5.0 %)" in verdict.sentence and "--before" in verdict.next_steps[0]


def test_nothing_wrong_but_gamma_helps() -> None:
    def overall(share: float) -> np.ndarray:
        return (np.arange(500) < 500 * share).astype(float)

    shares = (0.5, 0.5, 0.8, 0.7, 0.7)
    helped = _judge(*shares, overall_after=overall(0.5), overall_calibrated=overall(0.8))
    assert helped.outcome == "nothing wrong" and "yet gamma = 5" in helped.sentence and "30.0" in helped.sentence
    assert "No repair" not in " ".join(helped.next_steps) and "export" in " ".join(helped.next_steps)
    for calibrated in (0.5, 0.502, 0.2):
        plain = _judge(*shares, overall_after=overall(0.5), overall_calibrated=overall(calibrated))
        assert plain.next_steps == ("No repair is needed.",) and "yet" not in plain.sentence


def test_a_known_gamma_is_not_to_be_fitted_again() -> None:
    for source in ("alg", "given"):
        steps = " ".join(cannot_judge("x", gamma=3.0, gamma_source=source).next_steps)
        assert "Fit gamma" not in steps and "--before" in steps and "export" in steps
    assert "Fit gamma" in " ".join(cannot_judge("x").next_steps)


def test_to_dict_is_complete() -> None:
    found = _judge(0.5, 0.0, 0.5, 0.7, 0.9).to_dict()
    assert found["collapse"]["change"] == 0.5 and found["features_improved"] and found["gamma_source"] == "alg"
    assert cannot_judge("x").to_dict()["collapse"] is None
