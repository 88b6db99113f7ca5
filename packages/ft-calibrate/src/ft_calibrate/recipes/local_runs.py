"""The M local runs of LOLSGD apart from each other: as processes of one machine, or as jobs that share a folder.

Ours. Both give the same weights as one process, bit for bit: every local run depends on (seed, round, m) alone, and the
states are added in the order of m.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vfm_core.errors import UserError
from vfm_core.executors import end_with_parent
from vfm_core.files import atomic_write

from ft_calibrate.recipes.lolsgd import LocalWork, local_run

__all__ = ["Jobs", "Processes"]

log = logging.getLogger(__name__)

_POLL_S = 0.2
_TELL_S = 60.0
_LEAVE_S = 60.0
_LOSS = "loss of the local run"
_work: LocalWork | None = None  # of a worker process


def _packed(state: Mapping[str, Tensor], loss: float) -> bytes:
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    return save({**tensors, _LOSS: torch.tensor(loss, dtype=torch.float64)})


def _unpacked(data: bytes, device: torch.device) -> tuple[dict[str, Tensor], float]:
    from safetensors.torch import load

    state = {k: v.to(device) for k, v in load(data).items()}
    return state, float(state.pop(_LOSS))


# ---------------------------------------------------------------------- processes
class Processes:
    """Several processes of this machine, started once; with several GPUs local run m takes the m-th.

    Parameters
    ----------
    processes : int
        How many; more than M are not started.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def states(
        self, work: LocalWork, t: int, theta: Mapping[str, Tensor]
    ) -> Iterator[tuple[Mapping[str, Tensor], float]]:
        """See `LocalRuns`."""
        if self._pool is None:
            self._pool = self._start(work)
        device = next(iter(theta.values())).device
        start = _packed(theta, 0.0)
        try:
            for data in self._pool.map(_work_on, [(t, m, str(device), start) for m in range(work.M)]):
                yield _unpacked(data, device)
        except BrokenProcessPool as error:
            remedy = "run the same command again: it goes on after the last round (less memory: fewer processes)"
            raise UserError("a process of the local runs died", where=f"round {t + 1}", remedy=remedy) from error

    def _start(self, work: LocalWork) -> ProcessPoolExecutor:
        try:
            data = pickle.dumps(copy.deepcopy(work.student).cpu())
            rest = pickle.dumps(work.rows), pickle.dumps((work.extra, work.loss))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            remedy = "define the model's class in a module, or use the executor 'local'"
            raise UserError("the model cannot be sent to other processes", given=error, remedy=remedy) from error
        numbers = {k: getattr(work, k) for k in ("config", "backbone_scale", "seen", "M", "E", "rho", "T", "world")}
        return ProcessPoolExecutor(
            min(self.processes, work.M),
            mp_context=multiprocessing.get_context("spawn"),  # a fork would share CUDA and the threads' locks
            initializer=_start_worker,
            initargs=(data, *rest, numbers, torch.get_num_threads(), os.getpid()),
        )

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _start_worker(student: bytes, rows: bytes, rest: bytes, numbers: dict[str, Any], threads: int, parent: int) -> None:
    global _work
    torch.set_num_threads(threads)  # as the parent: the order of additions, and the last digits, depend on it
    extra, loss = pickle.loads(rest)
    _work = LocalWork(student=pickle.loads(student), rows=pickle.loads(rows), extra=extra, loss=loss, **numbers)
    end_with_parent(parent)


def _work_on(job: tuple[int, int, str, bytes]) -> bytes:
    t, m, device, start = job
    assert _work is not None
    if device.startswith("cuda"):
        device = f"cuda:{m % torch.cuda.device_count()}"
    _work.student.to(device)
    theta, _ = _unpacked(start, torch.device(device))
    return _packed(*local_run(_work, t, m, theta))


# ---------------------------------------------------------------------- jobs
class Jobs:
    """One job per local run, on any machine that sees the folder (Slurm arrays, Ray tasks).

    Every job computes its own local run of each round, waits for the others' and averages them all. A job that is
    killed and started again goes on; the others wait for it.

    Parameters
    ----------
    folder : Path
        Shared by the jobs of one training.
    mine : int
        m, 0..M-1. Job 0 also keeps the run folder and clears old rounds away.
    give_up_s : float, optional
        Raise after waiting this long for another job; by default waiting has no end.
    """

    def __init__(self, folder: Path, mine: int, give_up_s: float | None = None) -> None:
        self.folder, self.mine, self.give_up_s = folder, mine, give_up_s

    def file(self, t: int, m: int) -> Path:
        """Where local run m of round t is put."""
        return self.folder / f"round-{t:05d}-local-{m:03d}.safetensors"

    def states(
        self, work: LocalWork, t: int, theta: Mapping[str, Tensor]
    ) -> Iterator[tuple[Mapping[str, Tensor], float]]:
        """See `LocalRuns`."""
        own = self.file(t, self.mine)
        if not own.exists():
            state, loss = local_run(work, t, self.mine, theta)
            with atomic_write(own) as draft:
                draft.write_bytes(_packed(state, loss))
        self._wait([self.file(t, m) for m in range(work.M)])
        device = next(iter(theta.values())).device
        for m in range(work.M):
            yield _unpacked(self.file(t, m).read_bytes(), device)
        if self.mine == 0:  # everybody has written round t, so nobody reads round t - 1 any more
            for m in range(work.M):
                self.file(t - 1, m).unlink(missing_ok=True)
        if t + 1 == work.T:
            self._leave(work.M)

    def _leave(self, number: int) -> None:
        """Say that the last round was read; job 0, which will clear the folder, waits a while for the others."""
        if self.mine:
            with atomic_write(self.folder / f"read-{self.mine}") as draft:
                draft.write_bytes(b"")
            return
        until = time.monotonic() + _LEAVE_S
        while time.monotonic() < until and not all((self.folder / f"read-{m}").exists() for m in range(1, number)):
            time.sleep(_POLL_S)

    def _wait(self, files: list[Path]) -> None:
        began = told = time.monotonic()
        while missing := [f.name for f in files if not f.exists()]:
            now = time.monotonic()
            if self.give_up_s is not None and now - began > self.give_up_s:
                remedy = "start that job with --local M and the same settings, then this one again"
                raise UserError("another local run is missing", where=self.folder, given=missing[0], remedy=remedy)
            if now - told > _TELL_S:
                log.warning("waiting for %s in %s", ", ".join(missing), self.folder)
                told = now
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Nothing is held: the files stay until the run is finished."""
