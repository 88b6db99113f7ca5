"""Where independent units of work run: in this process, in several processes of this machine, or on a Ray cluster.

A unit is anything picklable that can be computed alone and again; the caller keeps the record
of what is finished, so a lost worker costs one unit. All executors give the same results: a worker process uses as many
threads as its parent, because the order of additions, and with it the last digits, depends on their number.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

from vfm_core.errors import UserError

__all__ = ["Executor", "Local", "Outcome", "RayCluster", "end_with_parent", "make_executor"]

Work = Callable[[Any, Any], Any]
_PARENT_POLL_S = 1.0
_context: Any = None  # of a worker process: what its units share, sent once


@dataclass(frozen=True)
class Outcome:
    """What became of a unit: its position in the list, and its value or the reason why there is none."""

    index: int
    value: Any = None
    error: UserError | None = None


class Executor(Protocol):
    """Runs ``work(context, unit)`` for every unit, in any order, and yields each outcome as it comes."""

    def run(self, work: Work, context: Any, units: Sequence[Any]) -> Iterator[Outcome]:
        """Yield one `Outcome` per unit. A `UserError` ends its unit only; any other exception ends the run."""
        ...


def _attempt(work: Work, context: Any, index: int, unit: Any) -> Outcome:
    try:
        return Outcome(index, work(context, unit))
    except UserError as error:
        return Outcome(index, error=error)


@dataclass(frozen=True)
class Local:
    """Processes of this machine.

    Parameters
    ----------
    processes : int
        1 works in the calling process; more start that many fresh ones, which end with their parent.
    """

    processes: int = 1

    def run(self, work: Work, context: Any, units: Sequence[Any]) -> Iterator[Outcome]:
        """Yield outcomes; with one process in the order of the units."""
        if self.processes == 1 or len(units) < 2:
            for index, unit in enumerate(units):
                yield _attempt(work, context, index, unit)
            return
        import torch

        pool = ProcessPoolExecutor(
            min(self.processes, len(units)),
            mp_context=multiprocessing.get_context("spawn"),  # a fork would share CUDA and the threads' locks
            initializer=_start_worker,
            initargs=(context, torch.get_num_threads(), os.getpid()),
        )
        try:
            futures = [pool.submit(_attempt_here, work, index, unit) for index, unit in enumerate(units)]
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(context: Any, threads: int, parent: int) -> None:
    import torch

    global _context
    _context = context
    torch.set_num_threads(threads)
    end_with_parent(parent)


def end_with_parent(parent: int) -> None:
    """Make this worker leave when its parent process is gone: after a ``kill -9`` nobody else would tell it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _attempt_here(work: Work, index: int, unit: Any) -> Outcome:
    return _attempt(work, _context, index, unit)


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster: the one that ``RAY_ADDRESS`` names, else one on this machine.

    Units see the caller's files only where the cluster shares its file system: the run folder must lie on it.
    """

    def run(self, work: Work, context: Any, units: Sequence[Any]) -> Iterator[Outcome]:
        """Yield outcomes as the cluster finishes them; a lost worker's unit is tried again by Ray."""
        ray = _ray()
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        shared = ray.put(context)
        remote = ray.remote(_attempt)
        pending = [remote.remote(work, shared, index, unit) for index, unit in enumerate(units)]
        while pending:
            finished, pending = ray.wait(pending, num_returns=1)
            for reference in finished:
                yield ray.get(reference)


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as e:
        remedy = 'pip install "ray>=2.40", or use --executor local:N'
        raise UserError("Ray is not installed", where="--executor", given="ray", remedy=remedy) from e


def make_executor(text: str) -> Executor:
    """Turn ``local``, ``local:N`` or ``ray`` into an executor.

    Parameters
    ----------
    text : str
        ``local`` is ``local:1``.

    Raises
    ------
    UserError
        Another word, fewer than one process, or Ray not installed.

    Examples
    --------
    >>> make_executor("local:4")
    Local(processes=4)
    """
    if text == "ray":
        _ray()
        return RayCluster()
    kind, _, number = text.partition(":")
    if kind == "local" and (not number or (number.isdecimal() and int(number) >= 1)):
        return Local(int(number or 1))
    raise UserError("unknown executor", where="--executor", given=repr(text), remedy="use local, local:N or ray")
