"""Another implementation in another Python: start it, hand it the task, read its rows."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from meda_kv.benchmark.subjects import Subject

__all__ = ["SCRIPT", "kvpress_rows"]

SCRIPT = Path(__file__).with_name("kvpress_peer.py")


def kvpress_rows(
    python: str | os.PathLike[str],
    subject: Subject,
    context: int,
    ratios: Sequence[float],
    *,
    rounds: int = 3,
    steps: int = 8,
    seed: int = 0,
    timeout_s: float = 600.0,
) -> tuple[list[dict[str, Any]], str | None]:
    """Measure SnapKV of kvpress on the same shape of model.

    Parameters
    ----------
    python : path
        Interpreter of an environment with kvpress; see ``kvpress_peer.py``.
    subject : Subject
        A built-in model: the other Python must be able to build it.
    context : int
        Tokens, really read.
    ratios : sequence of float
        Shares to keep; 1 is the peer's own full cache.
    rounds, steps, seed
        As in the other measurements.
    timeout_s : float
        When to give up.

    Returns
    -------
    rows : list of dict
        Empty when it could not be measured.
    reason : str or None
        Why not.
    """
    if subject.recipe is None:
        return [], f"kvpress is measured on the built-in models only, not on {subject.name}"
    task = {
        "shape": subject.recipe,
        "context": context,
        "ratios": sorted({1.0, *ratios}, reverse=True),
        "rounds": rounds,
        "steps": steps,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": str(subject.device),
        "seed": seed,
    }
    env = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))
    try:
        done = subprocess.run(
            [str(python), str(SCRIPT)],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            env=env,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        return [], f"no Python at {python}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"kvpress could not be measured: {error}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [], f"kvpress failed in {python}: {last}"
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return [], f"kvpress in {python} gave no result"
    if "skipped" in answer:
        return [], str(answer["skipped"])
    versions = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
    return [row | {"model": subject.name, "peer": versions} for row in answer["rows"]], None
