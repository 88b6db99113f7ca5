"""What the embedded study claims, as inequalities with paired intervals, and what it does not reproduce.

A claim compares two arms on the same albums of all networks: score of the left arm minus score of the right arm minus a
margin. It holds when the whole 95 % interval of that difference (paired bootstrap over albums) is above zero; the value
of every network is shown beside it, so that a mean carried by one of them is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vfm_core.metrics import Interval

from meda_kv.evaluation import Results

FULL = "full@1"


@dataclass(frozen=True)
class Claim:
    """One inequality: ``left >= right + margin``.

    Parameters
    ----------
    name : str
        In words.
    source : str
        MEDA (arXiv 2502.17599), another paper, a property of any working engine ("sanity"), or ours.
    part : str
        Of `meda_kv.study.PARTS`.
    left, right : str
        Arms as ``method@ratio``; ``right`` may be empty for a bound on ``left`` alone.
    margin : float
        In score.
    kind : str
        ``"all"`` questions, the ``"asked"`` one, or the ``"other"`` ones.
    expected : bool
        False: it does not show here, or not on every network. Reported, never asserted.
    why : str
        For claims that are not expected: the reason, as far as we know it.
    """

    name: str
    source: str
    part: str
    left: str
    right: str = ""
    margin: float = 0.0
    kind: str = "all"
    expected: bool = True
    why: str = ""

    @property
    def arms(self) -> set[str]:
        """Arms that must have been run."""
        return {arm for arm in (self.left, self.right) if arm}


@dataclass(frozen=True)
class Check:
    """A claim as measured.

    Attributes
    ----------
    claim : Claim
    difference : Interval
        Left minus right minus margin, with its interval over albums.
    by_seed : tuple of float
        The same for every network.
    n : int
        Albums.
    """

    claim: Claim
    difference: Interval
    by_seed: tuple[float, ...]
    n: int

    @property
    def holds(self) -> bool:
        """Whether the whole interval is above zero (at zero or above where both arms are always right)."""
        low = self.difference.low
        return low > 0 or (low >= 0 and self.claim.margin < 0)

    def to_dict(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "claim": self.claim.name,
            "source": self.claim.source,
            "part": self.claim.part,
            "questions": self.claim.kind,
            "holds": self.holds,
            "expected": self.claim.expected,
            "difference": list(self.difference),
            "by_seed": list(self.by_seed),
            "albums": self.n,
            "why_not": self.claim.why,
        }


def check(results: Mapping[str, Results], seeds: Sequence[int]) -> list[Check]:
    """Evaluate every claim whose part and arms were run, on all networks together and on each."""
    found = []
    for claim in CLAIMS:
        one = results.get(claim.part)
        if one is None or not claim.arms <= set(one.arms):
            continue
        alone = [one.select(lambda record, seed=seed: record["seed"] == seed) for seed in seeds]  # type: ignore[misc]
        found.append(
            Check(
                claim,
                _margin(one, claim),
                tuple(_margin(part, claim).mean for part in alone),
                sum(len(samples) for samples in one.values(claim.left, claim.kind).values()),
            )
        )
    return found


def _margin(results: Results, claim: Claim) -> Interval:
    if claim.right:
        found = results.compare(claim.left, claim.right, claim.kind)
        mean, low, high = found.difference, found.low, found.high
    else:
        row = next(row for row in results.rows(by="all", kinds=[claim.kind]) if row.arm == claim.left)
        mean, low, high = row.score
    return Interval(mean - claim.margin, low - claim.margin, high - claim.margin)


def _table5(part: str, ratio: float, *, alloc: str = "", merge: str = "") -> list[Claim]:
    """Directions of MEDA's ablation (its Table 5) at one ratio; a reason says that one is not expected to show."""
    return [
        Claim(
            f"{words} at {ratio:g}",
            "MEDA Table 5",
            part,
            f"meda@{ratio:g}",
            f"{without}@{ratio:g}",
            expected=not why,
            why=why,
        )
        for words, without, why in (
            ("entropy budgets help: meda above meda with equal budgets", "meda-no-alloc", alloc),
            ("merging helps: meda above meda without merging", "meda-no-merge", merge),
        )
    ]


def _quota(words: str, part: str, kind: str, ratio: float, margin: float = 0.0, why: str = "") -> Claim:
    told = "above uniform snapkv" if not margin else f"at least uniform snapkv, less {-margin:g},"
    return Claim(
        f"{words}: quota {told} at {ratio:g}",
        "ours",
        part,
        f"quota@{ratio:g}",
        f"snapkv@{ratio:g}",
        margin,
        kind,
        not why,
        why,
    )


_LIST = "three quarters of meda's budget are the most recent tokens, and its budgets leave the last layers little"
SCORED = ("meda", "look-m", "h2o", "snapkv", "pyramidkv", "quota")

CLAIMS: tuple[Claim, ...] = (
    *(
        Claim(f"the full cache is right: at least {least:g}", "sanity", part, FULL, margin=least)
        for part, least in (("needle, asked", 0.95), ("gist, agnostic", 0.95), ("list, generate", 0.95))
    ),
    *(
        Claim(
            f"a larger budget does not hurt: {name} at 0.5 at least at 0.1, less 0.05",
            "sanity",
            "needle, asked",
            f"{name}@0.5",
            f"{name}@0.1",
            -0.05,
        )
        for name in SCORED
    ),
    Claim(
        "the asked question: snapkv at least h2o, less 0.05, at 0.2",
        "SnapKV",
        "needle, asked",
        "snapkv@0.2",
        "h2o@0.2",
        -0.05,
        "asked",
    ),
    Claim(
        "the asked question: snapkv above streaming by 0.3 at 0.2",
        "SnapKV",
        "needle, asked",
        "snapkv@0.2",
        "streaming@0.2",
        0.3,
        "asked",
    ),
    Claim(
        "other questions: pyramidkv at least snapkv, less 0.05, at 0.5",
        "PyramidKV",
        "needle, asked",
        "pyramidkv@0.5",
        "snapkv@0.5",
        -0.05,
        "other",
    ),
    Claim(
        "other questions: h2o above random by 0.2 at 0.2",
        "H2O",
        "needle, asked",
        "h2o@0.2",
        "random@0.2",
        0.2,
        "other",
        expected=False,
        why="random keeps some token of every picture, and in these networks most tokens of a picture know its digit; "
        "accumulated attention leaves whole pictures without a token",
    ),
    *_table5("needle, asked", 0.2),
    *_table5("gist, agnostic", 0.2),
    *_table5(
        "list, generate",
        0.5,
        alloc="entropy is highest in the first two layers here (last table) and takes budget from the last two; "
        "pyramidkv, which favours low layers too, also lists worse than snapkv at 0.2",
        merge="no difference: what listing needs is gone before merging can help",
    ),
    *(
        _quota(words, part, kind, ratio)
        for words, part, kind in (
            ("other questions", "needle, asked", "other"),
            ("no question known before", "needle, agnostic", "all"),
            ("list", "list, generate", "all"),
        )
        for ratio in (0.5, 0.2, 0.1)
    ),
    _quota("gist", "gist, agnostic", "all", 0.5, -0.05),
    _quota("gist", "gist, agnostic", "all", 0.2),
    _quota("gist", "gist, agnostic", "all", 0.1, why="on two networks only: few tokens per picture are left to vote"),
    _quota("the asked question", "needle, asked", "asked", 0.5, -0.05),
    _quota("the asked question", "needle, asked", "asked", 0.2, -0.05),
    _quota(
        "the asked question",
        "needle, asked",
        "asked",
        0.1,
        -0.05,
        why="about 0.03 below in the mean, with an interval that crosses the margin: of 14 tokens one picture gets "
        "one or two, the asked one no more than the others",
    ),
    *(
        Claim(
            f"equal bytes: meda above snapkv at {ratio:g}",
            "MEDA Table 1",
            part,
            f"meda@{ratio:g}",
            f"snapkv@{ratio:g}",
            expected=not why,
            why=why,
        )
        for part, ratio, why in (
            ("needle, asked", 0.2, ""),
            ("needle, asked", 0.1, ""),
            ("needle, agnostic", 0.2, ""),
            ("needle, agnostic", 0.1, ""),
            ("gist, agnostic", 0.2, "a few points above or equal, depending on the albums"),
            ("gist, agnostic", 0.1, ""),
            ("list, generate", 0.2, _LIST),
            ("list, generate", 0.1, _LIST),
        )
    ),
    Claim(
        "the asked question: meda at least snapkv, less 0.05, at 0.2",
        "MEDA Table 1",
        "needle, asked",
        "meda@0.2",
        "snapkv@0.2",
        -0.05,
        "asked",
        expected=False,
        why="snapkv looks with the question's own tokens and loses nothing; meda averages the asked picture's keys",
    ),
)
