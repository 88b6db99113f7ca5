"""Clocks, paired runs and peak memory.

A shared machine's speed drifts, so contenders take turns: every round runs each of them once, in rotating order, and a
ratio is the median over rounds of the ratio inside a round.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vfm_core.errors import unknown_name

__all__ = ["CLOCKS", "Clock", "Ratio", "Stopwatch", "make_clock", "paired", "paired_ratio", "peak_memory"]

CLOCKS = ("auto", "wall", "process", "cuda")


@dataclass(frozen=True)
class Clock:
    """Measures how long a call takes.

    Attributes
    ----------
    kind : str
        ``"wall"``; ``"process"``, the processor time of this process over all threads, which other programs on the
        machine disturb less (compare it with one thread only); ``"cuda"``, events on the current stream.
    """

    kind: str

    def seconds(self, call: Callable[[], Any]) -> float:
        """Run ``call`` once and return its seconds."""
        if self.kind == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end)) / 1000
        read = time.process_time if self.kind == "process" else time.perf_counter
        begin = read()
        call()
        return read() - begin


def make_clock(kind: str, device: torch.device | str) -> Clock:
    """Return the clock for a device.

    Parameters
    ----------
    kind : str
        One of `CLOCKS`; ``"auto"`` is events on CUDA and wall time elsewhere.
    device : torch.device or str
        Where the model runs.

    Raises
    ------
    UserError
        Unknown kind.
    """
    if kind not in CLOCKS:
        raise unknown_name("clock", kind, CLOCKS, where="--clock")
    on_gpu = torch.device(device).type == "cuda"
    # Work on a GPU goes on after a call has returned: only events see it.
    return Clock("cuda" if on_gpu else "wall" if kind in ("auto", "cuda") else kind)


class Stopwatch:
    """Adds up the time of all calls of one function inside a longer run.

    Parameters
    ----------
    clock : Clock
        How to time. CUDA events are only read at the end, so that the run is not slowed down by waiting.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does what ``call`` does and is timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.clock.kind != "cuda":
                box: list[Any] = []
                self._seconds += self.clock.seconds(lambda: box.append(call(*args, **kwargs)))
                return box[0]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            result = call(*args, **kwargs)
            end.record()
            self._events.append((start, end))
            return result

        return timed

    def seconds(self) -> float:
        """Seconds spent so far."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        return self._seconds


@dataclass(frozen=True)
class Ratio:
    """A ratio over paired rounds: the median, and the quartiles around it."""

    value: float
    low: float
    high: float

    def triple(self) -> list[float]:
        """``[value, low, high]``, for JSON."""
        return [self.value, self.low, self.high]


def paired(
    calls: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock, warmup: int = 1
) -> dict[str, list[float]]:
    """Time several calls in turns.

    Parameters
    ----------
    calls : mapping
        What to time, by name.
    rounds : int
        Counted rounds, >= 1; each runs every call once.
    clock : Clock
        How to time.
    warmup : int
        Rounds before that do not count.

    Returns
    -------
    dict
        Seconds of every call, one entry per counted round; entries of the same round belong together.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + warmup):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            spent = clock.seconds(calls[name])
            if turn >= warmup:
                seconds[name].append(spent)
    return seconds


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Median and quartiles of ``numerator[i] / denominator[i]``."""
    each = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    if len(each) == 1:
        return Ratio(each[0], each[0], each[0])
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(middle, low, high)


def peak_memory(call: Callable[[], Any], device: torch.device | str) -> int:
    """Bytes that torch held at most during a call, on top of what it held before.

    Parameters
    ----------
    call : callable
        Run once.
    device : torch.device or str
        On CUDA the allocator's own peak; on the CPU the sum of allocations and releases that torch's profiler records,
        which is exact and the same on every run, unlike the size of the process.

    Returns
    -------
    int
        Bytes.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler complains on stderr when there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = top = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            top = max(top, held)
    return top
