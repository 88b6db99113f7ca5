"""How fast the curve and the extraction are, beside the published algorithm, scikit-learn and a plain timm loop.

The floor of a curve is one pass over the (N, K) scores: a maximum per group; what the method adds is one sort. Times of
the two sides are taken in turn on the same input, in one process (paired runs, medians), because a shared machine's
speed drifts; a faster wrong answer is no result, so every section also says how far the two answers are apart. The
published algorithm is the one of `ft_calibrate.reference`, written by us from its behaviour: the original needs an
environment of its own.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError, unknown_name
from vfm_core.files import atomic_write

from ft_calibrate.curve import Curve, seen_unseen_curve
from ft_calibrate.reference import published_ausuc, published_curve

__all__ = ["SECTIONS", "run_bench", "tables"]

log = logging.getLogger(__name__)

SECTIONS = ("curve", "growth", "sweep", "extract")
_TITLES = {
    "curve": "seen-unseen curve against the published algorithm, ratio = theirs / ours",
    "growth": "how the cost of the streamed curve grows",
    "sweep": "the curve against a scikit-learn loop over a grid of gammas, ratio = theirs / ours",
    "extract": "features and logits in one pass against a plain loop with two, ratio = theirs / ours",
}
_LARGE = 200_000  # scores; above, the published algorithm runs once
_EXTRAPOLATED = 2000  # samples; above, the published algorithm's time is extrapolated


def run_bench(
    out: str | os.PathLike[str] | None = None,
    sections: Iterable[str] = SECTIONS,
    quick: bool = False,
    *,
    samples: Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
    model: str | None = None,
    images: int | None = None,
    repeats: int = 3,
    device: str = "cpu",
    seed: int = 0,
    quiet: bool = True,
) -> dict[str, Any]:
    """Run the benchmark.

    Parameters
    ----------
    out
        Folder for ``bench.json`` and ``report.html``; None writes nothing.
    sections
        Which parts to run, of `SECTIONS`.
    quick
        Small sizes: seconds instead of minutes, for a look and for tests.
    samples, classes
        N and K of the section ``curve``; default 1,000 and 10,000, and 12, 100 and 1000. Above 2,000 samples the
        published algorithm is extrapolated by N^2 from 1,000, and the row says so.
    model, images
        timm model (random weights, which cost the same time as any) and number of pictures of ``extract``.
    repeats
        Paired rounds after one round of warm-up (one round alone where the published algorithm takes minutes).
    device
        Where the model of ``extract`` runs.
    seed
        Of the made-up scores.
    quiet
        No progress bar on stderr.

    Returns
    -------
    dict
        JSON-ready: ``environment``, one list of rows per section, and ``skipped`` (what could not be compared, and
        why).

    Raises
    ------
    UserError
        Unknown section or model, or nothing to time.
    """
    wanted = list(sections)
    for section in wanted:
        if section not in SECTIONS:
            raise unknown_name("section", section, SECTIONS, "sections")
    ns = tuple(samples or ((200,) if quick else (1000, 10_000)))
    ks = tuple(classes or ((12,) if quick else (12, 100, 1000)))
    if repeats < 1 or min(ns) < 20 or min(ks) < 2 or (images is not None and images < 1):
        raise UserError(
            "nothing to time",
            given=f"{repeats} repeats, {min(ns)} samples, {min(ks)} classes",
            remedy="give at least 1 repeat, 20 samples, 2 classes and 1 picture",
        )
    result: dict[str, Any] = {"environment": _environment(device), "skipped": []}
    steps: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = []
    if "curve" in wanted:
        steps += [("curve", partial(_curve, ns, k, repeats, seed)) for k in ks]
    if "growth" in wanted:
        steps.append(("growth", lambda: _growth(quick, repeats)))
    if "sweep" in wanted:
        steps.append(("sweep", lambda: _sweep(300 if quick else 2000, 50 if quick else 1000, repeats, seed)))
    if "extract" in wanted:
        name = model or ("test_resnet" if quick else "resnet50")
        count = images or (16 if quick else 64)
        steps.append(("extract", lambda: _extract(name, count, repeats, device, result["skipped"])))
    for section, step in _shown(steps, quiet):
        result.setdefault(section, []).extend(step())
    if out is not None:
        _write(Path(out), result)
    return result


def tables(result: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows) of every section of a result, for printing."""
    found = [(_TITLES[name], result[name]) for name in SECTIONS if result.get(name)]
    return found + ([("left out", [{"reason": reason} for reason in result["skipped"]])] if result["skipped"] else [])


def _environment(device: str) -> dict[str, Any]:
    import torch

    return {
        "numpy": np.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
    }


def _shown(steps: list[Any], quiet: bool) -> Iterable[Any]:
    if quiet:
        return steps
    from vfm_core.cli import progress

    shown: Iterable[Any] = progress(steps, "bench", total=len(steps))
    return shown


class _Pair(NamedTuple):
    """Median seconds of both sides, the median of the rounds' ratios theirs / ours, and the last round's results."""

    ours_s: float
    theirs_s: float
    ratio: float
    ours: Any
    theirs: Any


def _paired(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int, warm_up: bool = True) -> _Pair:
    seconds: tuple[list[float], list[float]] = ([], [])
    results: list[Any] = [None, None]
    for turn in range(repeats + warm_up):
        for side in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            results[side] = (ours, theirs)[side]()
            if turn or not warm_up:
                seconds[side].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(*seconds))
    return _Pair(statistics.median(seconds[0]), statistics.median(seconds[1]), ratio, *results)


def _scores(n: int, k: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64], list[int]]:
    """Logits as after fine-tuning: the true class stands out, and seen classes (half of them) are lifted."""
    rng = np.random.default_rng([seed, n, k])
    z, y = rng.standard_normal((n, k), dtype=np.float32), rng.integers(0, k, n)
    z[np.arange(n), y] += 2
    seen = list(range(0, k, 2))
    z[:, seen] += 2
    return z, y, seen


# --- sections ----------------------------------------------------------------------------------


def _curve(ns: Sequence[int], k: int, repeats: int, seed: int) -> list[dict[str, Any]]:
    rows = [_measured(n, k, repeats, seed) for n in sorted(ns) if n <= _EXTRAPOLATED]
    large = [n for n in sorted(ns) if n > _EXTRAPOLATED]
    if large:
        base = rows[-1] if rows else _measured(1000, k, 1, seed)
        rows += [_extrapolated(n, k, repeats, seed, base) for n in large]
    return rows


def _measured(n: int, k: int, repeats: int, seed: int) -> dict[str, Any]:
    z, y, seen = _scores(n, k, seed)
    absent = [c for c in range(k) if c not in seen]
    seen_unseen_curve(z, y, seen)
    rounds = repeats if k * n <= _LARGE else 1  # a minute of theirs needs no second opinion

    def theirs() -> tuple[NDArray[np.float64], float]:
        points = published_curve(z, y, seen, absent)
        return points, published_ausuc(points)

    pair = _paired(lambda: seen_unseen_curve(z, y, seen), theirs, rounds, warm_up=rounds > 1)
    points, area = pair.theirs
    how = f"measured, {rounds} round{'s' if rounds > 1 else ''}"
    row = _curve_row(n, k, pair.ours_s, pair.theirs_s, pair.ratio, how, pair.ours, points)
    return row | {"ausuc_difference": abs(pair.ours.ausuc - area)}


def _extrapolated(n: int, k: int, repeats: int, seed: int, base: dict[str, Any]) -> dict[str, Any]:
    z, y, seen = _scores(n, k, seed)
    absent = [c for c in range(k) if c not in seen]
    pair = _paired(lambda: seen_unseen_curve(z, y, seen), lambda: None, repeats)
    theirs = base["published_s"] * (n / base["samples"]) ** 2
    points = published_curve(z, y, seen, absent, most=20)
    how = f"extrapolated by N^2 from N = {base['samples']}"
    row = _curve_row(n, k, pair.ours_s, theirs, theirs / pair.ours_s, how, pair.ours, points)
    return row | {"ausuc_difference": None}


def _curve_row(
    n: int, k: int, ours: float, theirs: float, ratio: float, how: str, curve: Curve, points: NDArray[np.float64]
) -> dict[str, Any]:
    found = [curve.at(float(gamma)) for gamma in points[:, 3]]
    worst = np.abs(np.array([[at.seen, at.unseen] for at in found]) - points[:, 1:3]).max()
    return {
        "samples": n,
        "classes": k,
        "ours_ms": round(1000 * ours, 3),
        "published_s": round(theirs, 4),
        "ratio": round(ratio),
        "published": how,
        "points_compared": len(points),
        "largest_difference": float(worst),
        "ausuc": round(curve.ausuc, 6),
    }


def _growth(quick: bool, repeats: int) -> list[dict[str, Any]]:
    from ft_calibrate.bench_growth import growth

    return (
        growth((1000, 4000), (10, 40), at_classes=20, at_samples=2000, repeats=1) if quick else growth(repeats=repeats)
    )


def _sweep(n: int, gammas: int, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Overall, seen and absent accuracy on a grid: a scikit-learn user predicts once and scores thrice per gamma."""
    from sklearn.metrics import accuracy_score

    k = 100
    z, y, seen = _scores(n, k, seed)
    absent = np.setdiff1d(np.arange(k), seen)
    of_seen = np.isin(y, seen)
    grid = np.linspace(-4, 8, gammas)

    def ours() -> NDArray[np.float64]:
        curve = seen_unseen_curve(z, y, seen)
        i = np.searchsorted(curve.breaks, grid, side="left")
        return np.stack([curve.overall[i], curve.seen[i], curve.unseen[i]], axis=1)

    def theirs() -> NDArray[np.float64]:
        found = []
        for gamma in grid:
            moved = z.copy()
            moved[:, absent] += np.float32(gamma)
            best = moved.argmax(axis=1)
            groups = (slice(None), of_seen, ~of_seen)
            found.append([accuracy_score(y[rows], best[rows]) for rows in groups])
        return np.array(found)

    pair = _paired(ours, theirs, repeats, warm_up=False)
    # float32 sums may put a margin on the other side of a grid point: that moves an accuracy by one sample.
    worst = float(np.abs(pair.ours - pair.theirs).max())
    row: dict[str, Any] = {"samples": n, "classes": k, "gammas": gammas}
    row |= {"ours_ms": round(1000 * pair.ours_s, 3), "scikit_learn_s": round(pair.theirs_s, 4)}
    return [row | {"ratio": round(pair.ratio), "largest_difference": worst}]


def _extract(name: str, count: int, repeats: int, device: str, skipped: list[str]) -> list[dict[str, Any]]:
    """Images per second of `predict_table` (features and logits in one pass) and of two plain passes."""
    if find_spec("timm") is None:
        skipped.append("timm is not installed (pip install timm)")
        return []
    import timm
    import torch

    from ft_calibrate.classifier import load_classifier
    from ft_calibrate.extraction import predict_table

    if name not in timm.list_models():
        raise unknown_name("timm model", name, timm.list_models(), "model")
    model: Any = timm.create_model(name, pretrained=False, num_classes=100).eval().to(device)
    _, height, width = model.pretrained_cfg["input_size"]
    x = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(count, dtype=torch.long)
    classifier = load_classifier(model)
    batch = min(32, count)

    def ours() -> Any:
        return predict_table(classifier, (x, y), batch_size=batch, device=device)

    def theirs() -> tuple[Any, Any]:
        def features_of(part: Any) -> Any:
            return model.forward_head(model.forward_features(part.to(device)), pre_logits=True).cpu()

        with torch.inference_mode():
            features = [features_of(part) for part in x.split(batch)]
            logits = [model(part.to(device)).cpu() for part in x.split(batch)]
        return torch.cat(features).numpy(), torch.cat(logits).numpy()

    pair = _paired(ours, theirs, repeats)
    table, (features, logits) = pair.ours, pair.theirs
    row: dict[str, Any] = {
        "model": name,
        "images": count,
        "pixels": f"{height} x {width}",
        "batch": batch,
        "device": device,
    }
    row |= {
        "ours_images_per_s": round(count / pair.ours_s, 1),
        "two_passes_images_per_s": round(count / pair.theirs_s, 1),
    }
    largest = max(float(np.abs(table.features - features).max()), float(np.abs(table.logits - logits).max()))
    return [row | {"ratio": round(pair.ratio, 2), "largest_difference": largest}]


# --- output ------------------------------------------------------------------------------------


def _write(folder: Path, result: dict[str, Any]) -> None:
    from vfm_core.report import Report

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "bench.json") as part:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    where = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    report = Report("ft-calibrate: bench", where)
    for title, rows in tables(result):
        report.heading(title[0].upper() + title[1:]).table(rows)
        if rows and "over" in rows[0]:
            report.figure(_growth_figure(rows), "Time of the streamed curve; dotted: linear", "time over size")
    report.write(folder / "report.html")


def _growth_figure(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure
    from vfm_core.report import house_style

    with house_style():
        figure = Figure(figsize=(7, 3))
        for axes, over in zip(figure.subplots(1, 2, sharey=True), ("samples", "classes")):
            series = [row for row in rows if row["over"] == over]
            sizes, seconds = [row[over] for row in series], [row["seconds"] for row in series]
            axes.loglog(sizes, seconds, marker="o", label=f"slope {series[0]['slope']}")
            axes.loglog(sizes, [seconds[-1] * size / sizes[-1] for size in sizes], linestyle=":", color="grey")
            axes.set(xlabel=over, ylabel="seconds" if over == "samples" else "")
            axes.legend()
    return figure
