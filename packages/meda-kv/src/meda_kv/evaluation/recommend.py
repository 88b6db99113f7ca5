"""What the measured table recommends: per task the least memory within a tolerated loss, and the best at each ratio.

A recommendation is a statement about the samples that were answered, never about a method as such. An arm counts as
within the tolerance only when the *upper* end of the 95 % interval of its loss against the full cache is; where no
sample differs at all, the interval is Wilson's for 0 of n, since a bootstrap of equal values has no width. Nothing is
recommended from fewer than `LEAST_SAMPLES` samples, nor for answers of which no token was computed after compression.
Where more samples could change the verdict, the sentence says how many. The arm is picked on the samples that its
interval is from, without a correction for the choice; the sentence says that too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from vfm_core.errors import UserError
from vfm_core.metrics import Interval, wilson_interval

from meda_kv.evaluation.results import Results, Row, paired

LEAST_SAMPLES = 20
_Z = 1.959963984540054  # of the 95 % intervals

Verdict = Literal["use", "keep-full", "too-few", "untested", "no-baseline", "no-arms"]


@dataclass(frozen=True)
class Leader:
    """The best method at one ratio.

    Attributes
    ----------
    method, ratio, score
        What scored highest.
    ties
        Methods at this ratio whose paired difference to it has an interval that holds 0.
    """

    method: str
    ratio: float
    score: Interval
    ties: tuple[str, ...]


@dataclass(frozen=True)
class Recommendation:
    """What to do on a task, as measured.

    Attributes
    ----------
    task, kind
        Which scores: ``"all"`` questions, or of a probe those ``"asked"`` before compression, or the ``"other"`` ones.
    verdict
        ``"use"`` method and ratio; ``"keep-full"``: no arm is within the tolerance; ``"too-few"`` samples;
        ``"untested"``: no answer token was computed after compression; ``"no-baseline"``: the full cache was not run;
        ``"no-arms"``: nothing else was.
    tolerance, n, arms
        Tolerated loss; samples; arms that were compared with the full cache.
    method, ratio, loss, bytes_ratio
        Of ``"use"``: the arm, its expected loss against the full cache with its 95 % interval, and its measured bytes
        over the full ones.
    needed
        Where the samples are too few for a statement, how many would do. ``"too-few"``: for an arm of which no answer
        differs from the full cache's. ``"keep-full"``: estimated for the arm that needs the fewest, if the differences
        stay as they are; None when every arm loses more than tolerated on average.
    nearest
        Of ``"keep-full"``: the method and ratio that `needed` is about.
    leaders
        The best method at every ratio, greatest first.
    hint
        Of ``"untested"``: how these samples could be asked so that compression is tested.
    """

    task: str
    kind: str
    verdict: Verdict
    tolerance: float
    n: int
    arms: int
    method: str | None = None
    ratio: float | None = None
    loss: Interval | None = None
    bytes_ratio: float | None = None
    needed: int | None = None
    nearest: tuple[str, float] | None = None
    leaders: tuple[Leader, ...] = ()
    hint: str = ""

    def sentence(self) -> str:
        """The recommendation in words, with the numbers behind it."""
        of = "" if self.kind == "all" else f" ({self.kind} questions)"
        head = f"{self.task}{of}: "
        if self.verdict == "use":
            assert self.loss is not None and self.ratio is not None and self.bytes_ratio is not None
            loss = f"{_signed(self.loss.mean)} [{_signed(self.loss.low)}, {_signed(self.loss.high)}]"
            return (
                f"{head}{self.method} at ratio {self.ratio:g} holds {self.bytes_ratio:.1%} of the bytes and loses "
                f"{loss} against the full cache: the least ratio within a loss of {self.tolerance:g} "
                f"among {self.arms} arms on {self.n} samples.{self._picked()}"
            )
        if self.verdict == "keep-full":
            said = (
                f"{head}keep the full cache. On {self.n} samples none of the {self.arms} arms is shown to lose at most "
                f"{self.tolerance:g} (upper end of the 95 % interval)."
            )
            if self.needed is None or self.nearest is None:
                return said
            method, ratio = self.nearest
            return f"{said} {method} at ratio {ratio:g} may be, which takes about {self.needed} samples to show."
        if self.verdict == "untested":
            return (
                f"{head}no recommendation. 0 answer tokens were generated after compression, so the scores are those "
                f"of the full cache; {self.hint}."
            )
        if self.verdict == "no-baseline":
            return f"{head}no recommendation without the full cache to compare with."
        if self.verdict == "no-arms":
            return f"{head}no recommendation, only the full cache was run."
        return (
            f"{head}no recommendation from {self.n} samples; {LEAST_SAMPLES} are the least, and {self.needed} are "
            f"needed to show a loss of at most {self.tolerance:g} where no answer changes."
        )

    def _picked(self) -> str:
        if self.arms < 2:
            return ""
        return " The interval takes no account of that choice, which flatters the arm: confirm it on other samples."

    def leader_sentence(self) -> str:
        """The best method at every ratio in words; empty when nothing was compared."""
        said = []
        for leader in self.leaders:
            tie = f", not told apart from {', '.join(leader.ties)}" if leader.ties else ""
            score = f"{leader.score.mean:.3f} [{leader.score.low:.3f}, {leader.score.high:.3f}]"
            said.append(f"ratio {leader.ratio:g}: {leader.method} {score}{tie}")
        return "; ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """Fields and the sentence, for JSON."""
        return {
            **{name: getattr(self, name) for name in ("task", "kind", "verdict", "tolerance", "n", "arms")},
            **{name: getattr(self, name) for name in ("method", "ratio", "loss", "bytes_ratio", "needed", "nearest")},
            "leaders": [vars(leader) for leader in self.leaders],
            "sentence": self.sentence(),
        }


def recommend(results: Results, tolerance: float = 0.05, kinds: tuple[str, ...] | None = None) -> list[Recommendation]:
    """The measured recommendation of every task and kind of question.

    Parameters
    ----------
    results
        With the full cache among the arms.
    tolerance
        Greatest loss of the score that is acceptable, in (0, 1).
    kinds
        Default: all that the results tell apart.

    Returns
    -------
    list of Recommendation
        Task by task.

    Raises
    ------
    UserError
        Tolerance out of range, or nothing measured.
    """
    check_tolerance(tolerance)
    if not results.records:
        raise UserError("nothing measured", where="recommend", remedy="run `meda-kv eval` first")
    found = []
    for task in results.tasks:
        part = results.select(lambda record, task=task: record["task"] == task)  # type: ignore[misc]
        rows = part.rows("task", kinds)
        found += [
            _one(part, task, kind, [row for row in rows if row.kind == kind], tolerance)
            for kind in dict.fromkeys(row.kind for row in rows)
        ]
    return found


def how_to_test(results: Results, task: str) -> str:
    """How the samples of a task could be asked so that a compression shows: only what is possible with all of them."""
    if results.config.get("protocol", "generate") != "generate":
        return "the questions were asked on the compressed cache, but the answers are empty: look at them in pred.json"
    probes = [set(record.get("probes", ())) for record in results.records if record["task"] == task]
    possible = sorted(set.intersection(*probes)) if probes else []
    if "agnostic" in possible:
        return "ask on the compressed cache with --protocol asked or agnostic"
    if "asked" in possible:
        return "ask on the compressed cache with --protocol asked"
    return "ask for answers of several tokens, or give the samples questions of their own (key questions of JSON lines)"


def check_tolerance(tolerance: float) -> None:
    """Refuse a tolerance outside (0, 1)."""
    if not 0 < tolerance < 1:
        remedy = "use a number above 0 and below 1, such as 0.05"
        raise UserError("tolerance out of range", where="--tolerance", given=tolerance, remedy=remedy)


def loss_interval(row: Row) -> Interval | None:
    """Loss of an arm against the baseline (positive = worse) with its interval; ``None`` without a baseline.

    Where no sample differs the interval is Wilson's for 0 of n on both sides.
    """
    if row.difference is None or row.difference.difference != row.difference.difference:
        return None
    d = row.difference
    if d.low == d.high == 0:
        width = wilson_interval(0, row.n).high
        return Interval(0.0, -width, width)
    return Interval(-d.difference, -d.high, -d.low)


def samples_needed(tolerance: float) -> int:
    """Samples from which an arm that changes no answer is shown to lose at most `tolerance`, a number in (0, 1).

    The least n at which Wilson's 95 % interval for 0 of n ends at or below it: ``z^2 (1 - t) / t``, 73 for 0.05.
    """
    return max(LEAST_SAMPLES, math.ceil(_Z**2 * (1 - tolerance) / tolerance - 1e-9))


def _needed(row: Row, loss: Interval, tolerance: float) -> int | None:
    """Samples at which the interval of an arm would end at the tolerance, since its width falls with their root."""
    if row.difference is not None and row.difference.low == row.difference.high == 0:
        return samples_needed(tolerance)
    if loss.mean >= tolerance or row.n < 2:
        return None
    return max(row.n + 1, math.ceil(row.n * ((loss.high - loss.mean) / (tolerance - loss.mean)) ** 2))


def _one(results: Results, task: str, kind: str, rows: list[Row], tolerance: float) -> Recommendation:
    full = [row for row in rows if row.arm == results.baseline]
    arms = [row for row in rows if row.arm != results.baseline]
    n = min((row.n for row in rows), default=0)
    common: dict[str, Any] = {"task": task, "kind": kind, "tolerance": tolerance, "n": n, "arms": len(arms)}
    if not full:
        return Recommendation(verdict="no-baseline", **common)
    if not arms:
        return Recommendation(verdict="no-arms", **common)
    if not any(row.tokens_after > 0 for row in arms):
        return Recommendation(verdict="untested", hint=how_to_test(results, task), **common)
    if n < LEAST_SAMPLES:
        return Recommendation(verdict="too-few", needed=samples_needed(tolerance), **common)
    leaders = tuple(_leader(results, kind, [row for row in arms if row.ratio == ratio]) for ratio in _ratios(arms))
    # An arm that holds as many bytes as the full cache saves nothing, whatever its ratio says.
    saving = [(row, loss) for row in arms if row.bytes_ratio < 1 and (loss := loss_interval(row)) is not None]
    within = [(row, loss) for row, loss in saving if loss.high <= tolerance]
    if not within:
        counts = [(count, row) for row, loss in saving if (count := _needed(row, loss, tolerance)) is not None]
        if not counts:
            return Recommendation(verdict="keep-full", leaders=leaders, **common)
        count, row = min(counts, key=lambda pair: (pair[0], pair[1].ratio))
        nearest = (row.method, row.ratio)
        return Recommendation(verdict="keep-full", leaders=leaders, needed=count, nearest=nearest, **common)
    row, loss = min(within, key=lambda pair: (pair[0].ratio, -pair[0].score.mean, pair[0].bytes_ratio))
    return Recommendation(
        verdict="use",
        leaders=leaders,
        method=row.method,
        ratio=row.ratio,
        loss=loss,
        bytes_ratio=row.bytes_ratio,
        **common,
    )


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0 turns -0.0 into 0.0


def _ratios(rows: list[Row]) -> list[float]:
    return sorted({row.ratio for row in rows}, reverse=True)


def _leader(results: Results, kind: str, rows: list[Row]) -> Leader:
    best = max(rows, key=lambda row: row.score.mean)
    values = results.values(best.arm, kind)
    ties = []
    for row in rows:
        if row.arm != best.arm:
            difference = paired(values, results.values(row.arm, kind))
            if not difference.low > 0:
                ties.append(row.method)
    return Leader(best.method, best.ratio, best.score, tuple(ties))
