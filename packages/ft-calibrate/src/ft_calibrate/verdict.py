"""The verdict on a fine-tuned classifier: logit scale, order damaged, features damaged, both, or nothing wrong.

The rule is ours; the quantities are those of FTC (arXiv 2409.16223). Over the test samples of the absent classes U:

- ``collapse = Acc_{U/Y}(before) - Acc_{U/Y}(after)``;
- ``dF = NCM Acc_{U/U}(after) - NCM Acc_{U/U}(before)``, or ``Acc_{U/U}`` of the head when no features are given;
- ``shortfall = Acc_{U/Y}(before) - Acc_{U/Y}(after, at gamma_ALG)``.

SE is the standard error of each difference over paired bootstrap resamples of U's own samples. Then

1. collapse < 2 SE (or no fall at all): nothing wrong;
2. dF >= -2 SE: logit scale (and "features improved" if dF > 2 SE); unless the head's own ``Acc_{U/U}`` fell by more
   than 2 SE and shortfall > 2 SE: order damaged. The features still tell the absent classes apart, but the head no
   longer does, which no scalar repairs;
3. dF < -2 SE and shortfall > 2 SE: features damaged;
4. dF < -2 SE and gamma restores: both.

Without the model before fine-tuning, or without labelled samples of U, damage cannot be judged; nor where that model
was not above chance on U (by 2 SE), so that there was nothing to lose. Where nothing is wrong and gamma raises the
accuracy on all classes by more than 2 SE, the verdict says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ft_calibrate.analyses import Change, paired_change

Outcome = Literal["nothing wrong", "logit scale", "order damaged", "features damaged", "both", "cannot be judged"]
Evidence = Literal["ncm", "head", "none"]

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

# How a gamma of the verdict is described; only the first two are known without labels of the test data.
GAMMA_SOURCES = {
    "alg": "gamma_ALG of the fine-tuning data",
    "given": "the calibration file",
    "alg-test": "the average logit gap of the test data, which uses test labels and is not deployable",
    "oracle": "gamma*, an upper bound that uses test labels and is not deployable",
}


@dataclass(frozen=True)
class Verdict:
    """What is wrong, the differences that say so, and one sentence for a person.

    Attributes
    ----------
    outcome
        One of `OUTCOMES`.
    features_improved
        Whether dF > 2 SE (only with outcome "logit scale").
    evidence
        What dF rests on: "ncm" (features), "head" (accuracy of the head among U) or "none".
    collapse, feature_change, shortfall, order_change
        The differences of the rule, the last that of the head's U/U (after - before); None where unknown.
    gamma, gamma_source
        The scalar of the shortfall and where it comes from (key of `GAMMA_SOURCES`).
    sentence
        One sentence.
    next_steps
        What to do, one sentence each.
    """

    outcome: Outcome
    features_improved: bool
    evidence: Evidence
    collapse: Change | None
    feature_change: Change | None
    shortfall: Change | None
    gamma: float | None
    gamma_source: str | None
    sentence: str
    next_steps: tuple[str, ...]
    order_change: Change | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        differences = {
            name: None if value is None else value._asdict()
            for name, value in (
                ("collapse", self.collapse),
                ("feature_change", self.feature_change),
                ("shortfall", self.shortfall),
                ("order_change", self.order_change),
            )
        }
        return {
            "outcome": self.outcome,
            "features_improved": self.features_improved,
            "evidence": self.evidence,
            **differences,
            "gamma": self.gamma,
            "gamma_source": self.gamma_source,
            "sentence": self.sentence,
            "next_steps": list(self.next_steps),
        }


def fell(change: Change) -> bool:
    """Whether a difference is at least 2 SE above zero, and above zero at all (identical models have SE 0)."""
    return change.change > 0 and change.change >= 2 * change.se


def outcome_of(
    collapse: Change, feature_change: Change, shortfall: Change, order_change: Change | None = None
) -> tuple[Outcome, bool]:
    """The rule itself: outcome, and whether the features improved.

    Parameters
    ----------
    collapse, feature_change, shortfall, order_change
        As in the module's text; signs: before - after, after - before, before - after, after - before.
    """
    if not fell(collapse):
        return "nothing wrong", False
    if feature_change.change >= -2 * feature_change.se:
        improved = feature_change.change > 2 * feature_change.se
        lost_order = order_change is not None and order_change.change < -2 * order_change.se
        if lost_order and shortfall.change > 2 * shortfall.se:
            return "order damaged", improved
        return "logit scale", improved
    if shortfall.change > 2 * shortfall.se:
        return "features damaged", False
    return "both", False


def judge(
    before: Any,
    after: Any,
    calibrated: Any,
    features_before: Any,
    features_after: Any,
    *,
    evidence: Evidence,
    gamma: float,
    gamma_source: str,
    order_before: Any = None,
    order_after: Any = None,
    chance: float | None = None,
    overall_after: Any = None,
    overall_calibrated: Any = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Verdict:
    """Judge from right (1) and wrong (0) per test sample; NaN marks samples outside U, which are left out.

    Parameters
    ----------
    before, after, calibrated
        (N,) rightness in U/Y of the model before, after, and after with ``gamma`` added to the absent logits.
    features_before, features_after
        (N,) rightness in U/U, of nearest class means (``evidence="ncm"``) or of the head (``"head"``).
    gamma, gamma_source
        The gamma of ``calibrated`` and its origin, a key of `GAMMA_SOURCES`.
    order_before, order_after
        (N,) rightness in U/U of the head, where ``features_*`` are of class means.
    chance
        Share of U/Y that guessing among the competing classes gets, in (0, 1].
    overall_after, overall_calibrated
        (N,) rightness in Y/Y without and with ``gamma``: whether gamma helps although nothing is wrong.
    n_bootstrap, seed
        Paired resamples.
    """
    collapse = paired_change(before, after, n_bootstrap, seed)
    change = paired_change(features_after, features_before, n_bootstrap, seed)
    shortfall = paired_change(before, calibrated, n_bootstrap, seed)
    if collapse.n == 0 or change.n == 0:
        return cannot_judge("the test data hold no labelled sample of an absent class", evidence="none")
    old = paired_change(before, [0.0] * len(before), 2).change
    if chance is not None and old <= chance + 2 * math.sqrt(chance * (1 - chance) / collapse.n):
        reason = (
            f"the model before fine-tuning was right on {_percent(old)} of the absent samples, which is not above "
            f"chance ({_percent(chance)}), so there was nothing to lose"
        )
        check = "Check --before: it must be the source model, with a head that knows the absent classes."
        judged = cannot_judge(reason, evidence=evidence, gamma=gamma, gamma_source=gamma_source, steps=(check,))
        return replace(judged, collapse=collapse, feature_change=change, shortfall=shortfall)
    order = None if order_before is None else paired_change(order_after, order_before, n_bootstrap, seed)
    outcome, improved = outcome_of(collapse, change, shortfall, order)
    new, repaired = old - collapse.change, old - shortfall.change
    sentence = _sentence(outcome, improved, evidence, old, new, repaired, change, gamma, gamma_source, order)
    steps = next_steps(outcome, gamma_source)
    if outcome == "nothing wrong" and overall_after is not None:
        gain = paired_change(overall_calibrated, overall_after, n_bootstrap, seed)
        if gain.change > 2 * gain.se:
            helps = f"gamma = {gamma:.3g} ({GAMMA_SOURCES[gamma_source]}) raises the accuracy on all classes by"
            sentence = f"{sentence[:-1]}; yet {helps} {_points(gain)}."
            steps = next_steps("logit scale", gamma_source)
    return Verdict(
        outcome, improved, evidence, collapse, change, shortfall, gamma, gamma_source, sentence, steps, order
    )


def cannot_judge(
    reason: str,
    *,
    evidence: Evidence = "none",
    ausuc: float | None = None,
    acc_uu: float | None = None,
    gamma: float | None = None,
    gamma_source: str | None = None,
    steps: tuple[str, ...] | None = None,
) -> Verdict:
    """The verdict without a comparison: what can be said, and that damage cannot be judged. ``steps``: what to do."""
    known = []
    if ausuc is not None and ausuc == ausuc:
        known.append(f"AUSUC {ausuc:.3f}")
    if acc_uu is not None and acc_uu == acc_uu:
        known.append(f"accuracy among the absent classes {_percent(acc_uu)}")
    if gamma is not None and gamma_source is not None:
        known.append(f"gamma = {gamma:.3g} ({GAMMA_SOURCES[gamma_source]})")
    sentence = f"Damage cannot be judged: {reason}" + (f"; known: {', '.join(known)}" if known else "") + "."
    steps = next_steps("cannot be judged", gamma_source) if steps is None else steps
    return Verdict("cannot be judged", False, evidence, None, None, None, gamma, gamma_source, sentence, steps)


def next_steps(outcome: Outcome, gamma_source: str | None) -> tuple[str, ...]:
    """What to do after an outcome, one sentence each."""
    fit = "Fit gamma on logits of the fine-tuning data: ft-calibrate fit train.npz --seen-from-labels --method alg."
    calibrate = (
        "Keep this gamma: ft-calibrate fit --method alg writes it to a file."
        if gamma_source == "alg"
        else "Apply the calibration file: ft-calibrate apply."
        if gamma_source == "given"
        else fit,
        "Fold it into the checkpoint, at no cost in use: ft-calibrate export.",
    )
    retrain = (
        "Retrain with less harm: ft-calibrate compare --recipes ft,frozen-head,lolsgd+distill,wise:0.5, and try a "
        "smaller learning rate."
    )
    if outcome == "nothing wrong":
        return ("No repair is needed.",)
    if outcome == "logit scale":
        return (*calibrate, "To pick gamma more sharply without labels of absent classes: ft-calibrate pcv.")
    if outcome == "order damaged":
        labelled = "With a few labelled samples of the absent classes, classify by class means: the features hold them."
        return (retrain, labelled, *calibrate)
    if outcome == "features damaged":
        return (retrain, "Collect samples of the absent classes; calibration recovers only what the features hold.")
    if outcome == "both":
        return (*calibrate, retrain)
    ask = "Give logits of the same samples from the model before fine-tuning (--before)."
    return (ask, *calibrate) if gamma_source in ("alg", "given") else (ask, fit)


def _sentence(
    outcome: Outcome, improved: bool, evidence: Evidence, old: float, new: float, repaired: float, change: Change,
    gamma: float, gamma_source: str, order: Change | None = None,
) -> str:  # fmt: skip
    fall = f"accuracy on absent classes went from {_percent(old)} to {_percent(new)}"
    what = "their features" if evidence == "ncm" else "their order among themselves"
    by = f"by {_points(change)}"
    tail = "" if evidence == "ncm" else " (head-only evidence: no features were given)"
    repair = f"{_percent(repaired)} at gamma = {gamma:.3g} ({GAMMA_SOURCES[gamma_source]})"
    if outcome == "nothing wrong":
        return f"Nothing wrong: {fall}, not a fall beyond chance{tail}."
    if outcome == "logit scale":
        state = f"improved {by}" if improved else f"are intact ({_points(change, signed=True)})"
        if evidence == "head" and not improved:
            state = f"is intact ({_points(change, signed=True)})"
        return f"Logit scale: {fall}, while {what} {state}{tail}; calibrate: it is {repair}."
    if outcome == "order damaged" and order is not None:
        state = f"improved {by}" if improved else f"are intact ({_points(change, signed=True)})"
        return (
            f"Order damaged: {fall}; {what} {state}, but the head tells the absent classes apart worse by "
            f"{_points(order)}, and calibration restores only part: {repair}; retrain with less harm."
        )
    worse = f"{what} got worse {by}{tail}"
    if outcome == "features damaged":
        return f"Features damaged: {fall}, {worse}, and calibration does not restore it: {repair}; retrain."
    return f"Both: {fall} and {worse}, yet calibration restores the accuracy from before fine-tuning: {repair}."


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(change: Change, signed: bool = False) -> str:
    value = 100 * change.change
    number = f"{value:+.1f}" if signed else f"{abs(value):.1f}"
    return f"{number} ± {100 * change.se:.1f} points"
