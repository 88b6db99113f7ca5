"""Records of an evaluation and what they add up to: means per task, group and image count, intervals, differences.

A record is one sample under one arm. Records of several seeds are averaged within a sample first, so that n counts
samples and never repetitions. A group's score is the mean of its tasks' scores (as MileBench has it), whatever their
sizes. Intervals of scores are Wilson's (see `interval`), of all arms by the same rule; differences to the baseline are
paired by sample, with bootstrap intervals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError, unknown_name
from vfm_core.metrics import Difference, Interval, bootstrap_interval, paired_difference
from vfm_core.runs import RunDir

KINDS = ("all", "asked", "other")
SAMPLES_FILE = "samples.json"
LEVELS = ("Few", "Medium", "Many")
Values = dict[str, dict[str, float]]  # task -> sample -> score


@dataclass(frozen=True)
class Row:
    """One arm on one task, group, image-count level or on everything.

    Attributes
    ----------
    name
        Task, group or level; ``"all"`` for everything.
    kind
        ``"all"`` questions, or of a probe the ``"asked"`` one (read before compression) or the ``"other"`` ones.
    method, ratio, arm
        What ran.
    n, tasks, seeds
        Samples, tasks and seeds behind the score.
    score
        Mean in [0, 1] with its 95 % interval.
    difference
        Score minus that of the baseline arm on the same samples; ``None`` for the baseline itself or without one.
    seed_std
        Standard deviation of the mean over seeds; ``None`` for a single seed.
    kv_bytes, kv_bytes_full
        Mean bytes per sample that the compressed and the full prompt cache hold, measured on the tensors.
    tokens, tokens_after
        Mean answer tokens per sample, and those of them that were computed on the compressed cache.
    seconds, compress_seconds
        Mean wall time per sample after the prompt was read (compression and answers), and of compression alone.
    mended
        Where MileBench's scorer gave the score: the mean with its slips mended (see `meda_kv.metrics`), else ``None``.
    """

    name: str
    kind: str
    method: str
    ratio: float
    arm: str
    n: int
    tasks: int
    seeds: int
    score: Interval
    difference: Difference | None
    seed_std: float | None
    kv_bytes: float
    kv_bytes_full: float
    tokens: float
    tokens_after: float
    seconds: float
    compress_seconds: float
    mended: float | None = None

    @property
    def bytes_ratio(self) -> float:
        """Measured bytes over those of the full cache."""
        return self.kv_bytes / self.kv_bytes_full if self.kv_bytes_full else float("nan")


@dataclass(frozen=True)
class Results:
    """All records of one or several runs.

    Parameters
    ----------
    records, errors
        As in ``results.jsonl`` and the standing ones of ``errors.jsonl``.
    config
        Configuration of the run.
    baseline
        Key of the arm that differences are taken to.
    """

    records: tuple[dict[str, Any], ...]
    errors: tuple[dict[str, Any], ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    baseline: str = "full@1"

    @property
    def arms(self) -> list[str]:
        """Keys of the arms: the baseline first, then in the order of the grid (methods, ratios downwards)."""
        found = {record["arm"]: record for record in self.records}
        methods = [str(name) for name in self.config.get("methods", [])]
        rank = {name: i for i, name in enumerate(methods)}
        order = {name: i for i, name in enumerate(dict.fromkeys(r["method"] for r in self.records))}

        def place(arm: str) -> tuple[bool, int, float]:
            method = found[arm]["method"]
            return arm != self.baseline, rank.get(method, len(rank) + order[method]), -found[arm]["ratio"]

        return sorted(found, key=place)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order of appearance."""
        return list(dict.fromkeys(record["task"] for record in self.records))

    @property
    def kinds(self) -> list[str]:
        """``all``, and ``asked`` and ``other`` where the records tell them apart."""
        there = {kind for record in self.records for kind in record["scores"]}
        return [kind for kind in KINDS if kind in there]

    def names(self, by: str) -> list[str]:
        """Values of ``task``, ``group`` or ``level`` among the records; ``["all"]`` for ``all``."""
        if by == "all":
            return ["all"]
        if by not in ("task", "group", "level"):
            raise unknown_name("division", by, ("task", "group", "level", "all"))
        found = list(dict.fromkeys(str(r[by]) for r in self.records if r.get(by) not in (None, "")))
        return [level for level in LEVELS if level in found] if by == "level" else found

    def select(self, keep: Callable[[dict[str, Any]], bool]) -> Results:
        """The results of the records that `keep` accepts."""
        return Results(tuple(r for r in self.records if keep(r)), self.errors, self.config, self.baseline)

    def values(self, arm: str, kind: str = "all", by: str = "all", name: str = "all") -> Values:
        """Scores of an arm by task and sample, averaged over seeds."""
        found: dict[str, dict[str, list[float]]] = {}
        for record in self.records:
            if record["arm"] == arm and kind in record["scores"] and (by == "all" or str(record.get(by)) == name):
                score = record["scores"][kind]
                if score is not None:
                    found.setdefault(record["task"], {}).setdefault(record["sample_id"], []).append(float(score))
        return {task: {s: sum(v) / len(v) for s, v in samples.items()} for task, samples in found.items()}

    def rows(self, by: str = "task", kinds: Sequence[str] | None = None, draws: int = 2000) -> list[Row]:
        """One row per name, kind and arm.

        Parameters
        ----------
        by
            ``"task"``, ``"group"``, ``"level"`` or ``"all"``.
        kinds
            Subset of `kinds`; default all of them.
        draws
            Bootstrap samples.
        """
        found = []
        for name in self.names(by):
            for kind in self.kinds if kinds is None else kinds:
                by_arm = {arm: self.values(arm, kind, by, name) for arm in self.arms}
                base = by_arm.get(self.baseline, {})
                spread = spreads(by_arm.values())
                for arm, values in by_arm.items():
                    if values:
                        found.append(self._row(arm, by, name, kind, values, base, spread, draws))
        return found

    def compare(self, a: str, b: str, kind: str = "all", by: str = "all", name: str = "all") -> Difference:
        """Paired difference of arm `a` minus arm `b` over the samples that both have; all NaN without any."""
        return paired(self.values(a, kind, by, name), self.values(b, kind, by, name))

    def _row(
        self,
        arm: str,
        by: str,
        name: str,
        kind: str,
        values: Values,
        base: Values,
        spread: dict[str, float],
        draws: int,
    ) -> Row:
        records = [r for r in self.records if r["arm"] == arm and (by == "all" or str(r.get(by)) == name)]
        records = [r for r in records if r["scores"].get(kind) is not None]
        seeds = sorted({r["seed"] for r in records})
        per_seed = [mean_of_tasks((r["task"], r["scores"][kind]) for r in records if r["seed"] == s) for s in seeds]

        mended = [(r["task"], r["mended_scores"][kind]) for r in records if kind in r.get("mended_scores", {})]

        def mean(key: str) -> float:
            return float(np.mean([r[key] for r in records]))

        return Row(
            name,
            kind,
            records[0]["method"],
            records[0]["ratio"],
            arm,
            sum(map(len, values.values())),
            len(values),
            len(seeds),
            interval(values, spread),
            paired(values, base, draws) if base and arm != self.baseline else None,
            float(np.std(per_seed, ddof=1)) if len(seeds) > 1 else None,
            kv_bytes=mean("kv_bytes"),
            kv_bytes_full=mean("kv_bytes_full"),
            tokens=mean("tokens"),
            tokens_after=mean("tokens_after"),
            seconds=mean("seconds"),
            compress_seconds=mean("compress_seconds"),
            mended=mean_of_tasks(mended) if len(mended) == len(records) else None,
        )


def mean_of_tasks(pairs: Iterable[tuple[str, float]]) -> float:
    """Mean over tasks of the mean score of each; `pairs` are (task, score)."""
    by_task: dict[str, list[float]] = {}
    for task, score in pairs:
        by_task.setdefault(task, []).append(float(score))
    return float(np.mean([np.mean(scores) for scores in by_task.values()]))


def spreads(arms: Iterable[Values]) -> dict[str, float]:
    """Variance of the scores of each task over that of right-or-wrong scores of the same mean, pooled over arms.

    1 for scores that are 0 or 1, less for shares (ROUGE-L, or several questions per sample), and 1 where every mean is
    0 or 1, which says nothing about it. Right-or-wrong scores count as much as four samples, since few samples say
    little about their variance.
    """
    seen: dict[str, list[float]] = {}
    for arm in arms:
        for task, samples in arm.items():
            scores = np.array(list(samples.values()))
            mean = scores.mean()
            found = seen.setdefault(task, [0.0, 0.0, 0.0])
            found[0] += float(((scores - mean) ** 2).sum())
            found[1] += float(len(scores) * mean * (1 - mean))
            found[2] += len(scores)
    return {
        task: min(1.0, (own + 4 * most / n) / (most + 4 * most / n)) if most > 1e-12 else 1.0
        for task, (own, most, n) in seen.items()
    }


def interval(values: Values, spread: dict[str, float] | None = None, level: float = 0.95) -> Interval:
    """Mean over tasks of their means, with Wilson's interval for bounded scores.

    A task's interval is Wilson's score interval for a proportion, of ``n / spread`` samples: exactly that for scores of
    0 or 1, narrower for shares, and of the same rule at 0, at 1 and between, so that the intervals of two arms can be
    compared. Those of several tasks are combined by the square-and-add rule (Newcombe, 1998).

    Parameters
    ----------
    values
        Scores in [0, 1] by task and sample.
    spread
        See `spreads`; by default that of the values alone.
    level
        Confidence, in (0, 1).
    """
    spread = spreads([values]) if spread is None else spread
    z = NormalDist().inv_cdf((1 + level) / 2)
    means, below, above = [], 0.0, 0.0
    for task, samples in values.items():
        if not samples:
            continue
        mean, n = float(np.mean(list(samples.values()))), len(samples) / spread[task]
        middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
        width = z / (1 + z * z / n) * float(np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)))
        means.append(mean)
        below += (mean - max(0.0, middle - width)) ** 2
        above += (min(1.0, middle + width) - mean) ** 2
    if not means:
        return Interval(np.nan, np.nan, np.nan)
    mean = float(np.mean(means))
    return Interval(mean, mean - float(np.sqrt(below)) / len(means), mean + float(np.sqrt(above)) / len(means))


def paired(a: Values, b: Values, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Difference:
    """Mean over tasks of the mean difference a - b over common samples, its interval and sign-flip p-value.

    With several tasks each sample weighs as its task's size demands (every task counts the same), and p is that of
    the weighted differences.
    """
    pairs = []
    for task in a:
        common = [sample for sample in a[task] if sample in b.get(task, {})]
        if common:
            pairs.append(np.array([a[task][s] - b[task][s] for s in common]))
    if not pairs:
        return Difference(np.nan, np.nan, np.nan, np.nan)
    total = sum(map(len, pairs))
    weighted = np.concatenate([d * total / (len(pairs) * len(d)) for d in pairs])
    test = paired_difference(weighted, np.zeros(total), draws, level, seed)
    if len(pairs) == 1:
        return test
    mean, low, high = _stratified(pairs, draws, level, seed)
    return Difference(mean, low, high, test.p)


def _stratified(arrays: list[NDArray[np.float64]], draws: int, level: float, seed: int) -> Interval:
    if len(arrays) <= 1:
        return bootstrap_interval(arrays[0] if arrays else np.zeros(0), draws, level, seed)
    means = np.zeros(draws)
    for i, array in enumerate(arrays):
        rng = np.random.default_rng([seed, i])
        rows = max(1, 2**20 // len(array))
        for start in range(0, draws, rows):
            stop = min(draws, start + rows)
            means[start:stop] += array[rng.integers(0, len(array), (stop - start, len(array)))].mean(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means / len(arrays), [tail, 1 - tail])
    return Interval(float(np.mean([array.mean() for array in arrays])), float(low), float(high))


def load_results(folders: str | Path | Sequence[str | Path], baseline: str = "full@1") -> Results:
    """Read one or several run folders of `evaluate`; several are pooled (such as seeds or shards).

    Raises
    ------
    UserError
        A folder without a run.
    """
    paths = [Path(folders)] if isinstance(folders, str | Path) else [Path(folder) for folder in folders]
    records: dict[str, dict[str, Any]] = {}
    errors: dict[str, dict[str, Any]] = {}
    config: dict[str, Any] = {}
    for path in paths:
        try:
            found = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError as e:
            raise UserError("no run in the folder", where=path, remedy="name a folder of `meda-kv eval`") from e
        config = config or found
        run = RunDir(path, found)
        records |= {record["unit"]: record for record in run.records()}
        errors |= {error["unit"]: error for error in run.errors()}
    standing = tuple(error for unit, error in errors.items() if unit not in records)
    return Results(tuple(records.values()), standing, config, baseline)


def read_samples(folder: str | Path) -> dict[str, dict[str, Any]]:
    """What a run asked, by ``task/id``; empty when the folder does not tell.

    Raises
    ------
    UserError
        The file is damaged.
    """
    path = Path(folder) / SAMPLES_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise UserError("damaged file", where=path, given=e, remedy="remove it and run the evaluation again") from e
