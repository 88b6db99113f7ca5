from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from meda_kv.benchmark.timing import Clock, Stopwatch, make_clock, paired, paired_ratio, peak_memory
from vfm_core.errors import UserError


class ScriptedClock(Clock):
    """A clock whose readings are what the calls return."""

    def seconds(self, call: Any) -> float:
        return float(call())


def test_paired_rotates_and_drops_the_warm_up() -> None:
    order: list[str] = []
    spent = {"a": iter([100.0, 1.0, 2.0, 3.0]), "b": iter([100.0, 2.0, 6.0, 3.0])}

    def call(name: str) -> Any:
        def run() -> float:
            order.append(name)
            return next(spent[name])

        return run

    seconds = paired({"a": call("a"), "b": call("b")}, rounds=3, clock=ScriptedClock("wall"))
    assert seconds == {"a": [1.0, 2.0, 3.0], "b": [2.0, 6.0, 3.0]}
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_paired_ratio_is_the_median_inside_rounds() -> None:
    # The machine slowed down threefold in the second round: the ratio of medians would be 2.5, inside rounds it is 2.
    ratio = paired_ratio([2.0, 6.0, 2.5, 4.0, 10.0], [1.0, 3.0, 1.0, 2.0, 5.0])
    assert ratio.value == 2.0 and ratio.low == 2.0 and ratio.high == 2.0
    assert paired_ratio([3.0], [2.0]).triple() == [1.5, 1.5, 1.5]
    spread = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert spread.triple() == [3.0, 2.0, 4.0]


def test_wall_time_passes_while_sleeping_and_process_time_does_not() -> None:
    assert Clock("wall").seconds(lambda: time.sleep(0.05)) >= 0.05
    assert Clock("process").seconds(lambda: time.sleep(0.05)) < 0.05
    x = torch.ones(200, 200)
    assert Clock("process").seconds(lambda: [x @ x for _ in range(60)]) > 1e-4


def test_stopwatch_sees_its_own_function_only() -> None:
    x = torch.ones(300, 300)
    watch = Stopwatch(Clock("process"))
    inner = watch.around(lambda n: [x @ x for _ in range(n)])
    total = Clock("process").seconds(lambda: (inner(20), [x @ x for _ in range(100)]))
    assert 0 < watch.seconds() < total
    assert len(inner(3)) == 3


def test_unknown_clock_is_named() -> None:
    with pytest.raises(UserError, match="unknown clock in --clock: 'proces'; did you mean process"):
        make_clock("proces", "cpu")
    assert make_clock("auto", "cpu").kind == "wall"
    assert make_clock("cuda", "cpu").kind == "wall"
    assert make_clock("process", "cuda:0").kind == "cuda"


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second * 2
        del second, third
        return torch.zeros(10)

    assert peak_memory(work, "cpu") == pytest.approx(8000, abs=64)  # two vectors at once, and the numbers 1 and 2


class FakeCuda:
    """Stands for torch.cuda: every recorded event is one second after the one before."""

    def __init__(self) -> None:
        self.now = 0.0
        self.held = 1000
        self.top = 5000
        self.waits = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = -1.0

            def record(self) -> None:
                outer.now += 1.0
                self.at = outer.now

            def elapsed_time(self, end: Event) -> float:
                assert outer.waits > 0, "events were read without waiting for the device"
                return 1000 * (end.at - self.at)

        def wait(device: Any = None) -> None:
            self.waits += 1

        def restart(device: Any) -> None:
            self.top = self.held

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", wait)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.top)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", restart)


def test_cuda_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)
    clock = make_clock("auto", "cuda")
    assert clock.seconds(lambda: None) == 1.0
    assert fake.waits == 2
    watch = Stopwatch(clock)
    call = watch.around(lambda x: x + 1)
    assert call(1) == 2 and call(5) == 6
    assert fake.waits == 2, "a stopwatch must not wait inside the run"
    assert watch.seconds() == 2.0
    assert watch.seconds() == 2.0


def test_cuda_peak_is_the_allocators_on_top_of_what_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)

    def work() -> None:
        fake.top = max(fake.top, fake.held + 700)

    assert peak_memory(work, "cuda") == 700
