"""How the cost of the curve grows with samples and classes, measured in a process that does nothing else.

Run as a module (``python -m ft_calibrate.bench_growth '{"samples": [...], ...}'``) it prints the rows as JSON. Logits
are made block by block and thrown away, as they would be read from a file: what is timed is `CurveAccumulator.add` and
``curve``, what is counted is the peak memory on top of the loaded libraries.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["growth"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def growth(
    samples: tuple[int, ...] = (10_000, 30_000, 100_000, 300_000, 1_000_000),
    classes: tuple[int, ...] = (10, 30, 100, 300, 1000),
    *,
    at_classes: int = 100,
    at_samples: int = 20_000,
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """Seconds and megabytes of the streamed curve over N and over K, each with the slope of log time over log size.

    Parameters
    ----------
    samples
        N at K = ``at_classes``.
    classes
        K at N = ``at_samples``.
    at_classes, at_samples
        What is held while the other grows.
    repeats
        Runs per size; the median counts.

    Returns
    -------
    list of dict
        One row per size: ``over``, ``samples``, ``classes``, ``seconds``, ``ns_per_score``, ``sort_share`` (share of
        the time spent in the final sort), ``peak_mb`` (None where the system does not tell), ``slope`` (of its series;
        1 is linear).
    """
    arguments = json.dumps({"samples": samples, "classes": classes, "k": at_classes, "n": at_samples, "r": repeats})
    command = [sys.executable, "-m", "ft_calibrate.bench_growth", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the growth measurement failed: {done.stderr.strip().splitlines()[-1:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return rows


def _measure(samples: list[int], classes: list[int], k: int, n: int, r: int) -> list[dict[str, Any]]:
    _one(1000, 10)  # loads and warms up
    rows: list[dict[str, Any]] = []
    for over, sizes in (("samples", samples), ("classes", classes)):
        if not sizes:
            continue
        series: list[dict[str, Any]] = []
        for size in sizes:
            rows_of, columns = (size, k) if over == "samples" else (n, size)
            runs = [_one(rows_of, columns) for _ in range(r)]
            seconds = statistics.median(run[0] for run in runs)
            series.append(
                {
                    "over": over,
                    "samples": rows_of,
                    "classes": columns,
                    "seconds": round(seconds, 5),
                    "ns_per_score": round(1e9 * seconds / (rows_of * columns), 3),
                    "sort_share": round(statistics.median(run[1] / run[0] for run in runs), 2),
                    "peak_mb": runs[-1][2],
                }
            )
        times = [row["seconds"] for row in series]
        slope = float(np.polyfit(np.log(sizes), np.log(np.maximum(times, 1e-9)), 1)[0]) if len(sizes) > 1 else None
        rows += [row | {"slope": None if slope is None else round(slope, 2)} for row in series]
    return rows


def _one(n: int, k: int, block: int = 10_000) -> tuple[float, float, float | None]:
    """Seconds in all, seconds of the final sort, and peak megabytes."""
    from ft_calibrate.curve import CurveAccumulator
    from ft_calibrate.groups import class_groups

    rng = np.random.default_rng(0)
    accumulator = CurveAccumulator(class_groups(k, range(0, k, 2)))
    adding = 0.0
    before = _restart_peak()
    for start in range(0, n, block):
        rows = min(block, n - start)
        z, y = rng.standard_normal((rows, k), dtype=np.float32), rng.integers(0, k, rows)
        begun = time.perf_counter()
        accumulator.add(z, y)
        adding += time.perf_counter() - begun
    begun = time.perf_counter()
    accumulator.curve()
    sorting = time.perf_counter() - begun
    peak = _peak()
    return adding + sorting, sorting, None if peak is None or before is None else round((peak - before) / 2**20, 1)


def _restart_peak() -> int | None:
    """Make peak memory count from now; returns what is in use, in bytes; None where the system does not allow it."""
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:  # no such file, or a container that does not let it be written
        return None
    return _peak()


def _peak() -> int | None:
    if not _STATUS.exists():
        return None
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(**json.loads(sys.argv[1]))) + "\n")
