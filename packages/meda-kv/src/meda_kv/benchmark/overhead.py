"""What compression costs on top of reading the prompt: watching the attention, and the compression itself."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch

from meda_kv.benchmark.caches import Arm, our_cache, prompt_share
from meda_kv.benchmark.subjects import Prompt, Subject
from meda_kv.benchmark.timing import Clock, Stopwatch, paired_ratio

__all__ = ["measure_overhead"]


def measure_overhead(
    subject: Subject, prompt: Prompt, arm: Arm, ratio: float, *, clock: Clock, rounds: int = 3, patience_s: float = 10.0
) -> dict[str, Any]:
    """Time reading and compressing, the parts apart, in the same run.

    The observers' share is timed inside the forward, so that it and the reading that it is compared with meet the same
    machine; nothing is subtracted between runs.

    Parameters
    ----------
    subject, prompt
        What is read.
    arm, ratio
        What is done to the cache.
    clock : Clock
        How to time.
    rounds : int
        Readings, >= 1.
    patience_s : float
        No further reading is begun after so many seconds.

    Returns
    -------
    dict
        ``prefill_s`` (reading alone), ``watch_s`` (scores and entropies while reading), ``compress_s`` (budgets,
        selection, merging, storing), ``overhead_s`` (the last two together), ``overhead`` (overhead_s over prefill_s as
        ``[median, lower quartile, upper quartile]``), and the bytes of the compressed cache.
    """
    reading: list[float] = []
    watching: list[float] = []
    settling: list[float] = []
    begun = time.perf_counter()
    while len(reading) < rounds and (not reading or time.perf_counter() - begun < patience_s):
        cache = our_cache(subject, arm, ratio, prompt)
        watch = Stopwatch(clock)
        cache.after_attention = watch.around(cache.after_attention)
        total = clock.seconds(partial(subject.read, prompt.ids, cache))
        with torch.inference_mode():
            settling.append(clock.seconds(cache.compress))
        watching.append(watch.seconds())
        reading.append(max(total - watching[-1], 1e-9))
    n = int(prompt.ids.shape[1])
    full = int(cache.nbytes_full())
    spent = [a + b for a, b in zip(watching, settling, strict=True)]
    return {
        "model": subject.name,
        "context": n,
        "method": arm.label,
        "ratio": ratio,
        "prefill_s": statistics.median(reading),
        "watch_s": statistics.median(watching),
        "compress_s": statistics.median(settling),
        "overhead_s": statistics.median(spent),
        "overhead": paired_ratio(spent, reading).triple(),
        "overhead_rounds": len(reading),
        "kv_bytes": int(cache.nbytes()),
        "kv_bytes_full": full,
        "kv_share": cache.nbytes() / full,
        "prompt_share": prompt_share(cache, n),
    }
