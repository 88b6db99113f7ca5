"""LOLSGD, leave-out local SGD, of HT (arXiv 2311.01420).

The gradient on partial target data has a part that all classes share, the change of domain, and a part that pushes the
missing classes down. Local models that each lack other classes agree on the first and disagree on the second; their
average keeps the first::

    for round t = 1..T:                       lr_t: cosine over the rounds
      for m = 1..M:                           S_m = S without a random share rho, D_m = {(x, y) in D_tr : y in S_m}
          theta_m = theta; E steps on D_m, cross-entropy over all K, fresh momentum
      theta = mean_m theta_m                  floating-point tensors, BN statistics included; integer buffers copied

The published sources do not record M, E, rho and T: the defaults (4, the steps of one epoch, 0.3, the epochs) are ours,
after HT's local runs of about an epoch. In the embedded study that is E = 7. Ours are also the ways to run the M local
runs apart: as processes of one machine (`Processes`), or as jobs that share a folder (`Jobs`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from vfm_core.checkpoints import Checkpoint, load_checkpoint, put_weights, save_checkpoint, trained_weights
from vfm_core.errors import UserError
from vfm_core.isolation import stream
from vfm_core.train import TrainConfig, fit

from ft_calibrate.recipes.averaging import IterateAverage, RunningMean
from ft_calibrate.recipes.rows import Rows
from ft_calibrate.recipes.student import Loss, Student, parameter_groups

__all__ = ["LocalRuns", "LocalWork", "Serial", "left_in", "local_run", "local_seed", "lolsgd", "round_lr", "run_rounds"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LocalWork:
    """What the local runs share; can be sent to another process.

    Attributes
    ----------
    student : Student
        Its trainable tensors are replaced by theta at the start of each local run.
    rows, extra : Rows, Tensor or None
        D_tr, and the second input of its rows (z_source) where the recipe has one.
    loss : Loss
    config : TrainConfig
        Its ``lr`` is the peak of the head's.
    backbone_scale : float
        Learning rate of the backbone as a share of the head's.
    seen : Tensor of int64
        Columns S.
    M, E, T : int
        Local runs per round, steps of each, rounds.
    rho : float
        Share of S that a local run leaves out.
    world : int
        Processes that share every batch list (``accelerate launch``).
    """

    student: Student
    rows: Rows
    extra: Tensor | None
    loss: Loss
    config: TrainConfig
    backbone_scale: float
    seen: Tensor
    M: int
    E: int
    rho: float
    T: int
    world: int = 1


def round_lr(lr: float, t: int, rounds: int) -> float:
    """lr_t of round t = 0..T-1: half a cosine from ``lr`` towards 0."""
    return lr * 0.5 * (1 + math.cos(math.pi * t / rounds))


def local_seed(seed: int, t: int, m: int) -> int:
    """Seed of local run m in round t: of its batches and its dropout."""
    return stream(seed, "local run", t, m) % 2**31


def left_in(seen: Tensor, rho: float, seed: int, t: int, m: int) -> Tensor:
    """S_m: the seen columns without a random share rho of them, sorted; one class at least stays.

    With rho above 0 and two classes or more, at least one is left out.
    """
    out = min(max(round(rho * len(seen)), int(rho > 0)), len(seen) - 1)
    generator = torch.Generator().manual_seed(stream(seed, "leave out", t, m))
    order = torch.randperm(len(seen), generator=generator)
    return seen[order[out:]].sort().values


def local_run(work: LocalWork, t: int, m: int, theta: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Run E steps from theta on D_m, with fresh momentum.

    Returns
    -------
    theta_m : dict of Tensor
        The student's own tensors: copy or add them up before the next local run.
    loss : float
        Mean over its rows.

    Raises
    ------
    UserError
        A loss that is not finite.
    """
    student, config = work.student, work.config
    put_weights(student.model, theta, f"round {t + 1}")
    stays = left_in(work.seen, work.rho, config.seed, t, m)
    keep = torch.isin(work.rows.labels.cpu(), stays).nonzero().flatten()
    if len(keep) == 0:  # the classes left in have no rows: take them all rather than none
        keep = torch.arange(len(work.rows))
    source = work.rows.source(config.batch_size, work.E * work.world, extra=work.extra, keep=keep)
    lr = round_lr(config.lr, t, work.T)
    local = replace(config, epochs=1, lr=lr, schedule="constant", seed=local_seed(config.seed, t, m))
    groups = parameter_groups(student.model, student.head, lr, work.backbone_scale)
    try:
        with student.attached():
            history = fit(student, source, work.loss, local, param_groups=groups)
    except UserError as error:
        where = f"round {t + 1}, local run {m + 1}, {error.where}"
        raise UserError(error.what, where=where, given=error.given, remedy=error.remedy) from error
    return trained_weights(student.model), history.losses[0]


class LocalRuns(Protocol):
    """Where the M local runs of a round are computed."""

    def states(
        self, work: LocalWork, t: int, theta: Mapping[str, Tensor]
    ) -> Iterator[tuple[Mapping[str, Tensor], float]]:
        """Yield (theta_m, loss) for m = 0..M-1, in this order: the sum must not depend on who was first."""
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


class Serial:
    """One after the other, in this process."""

    def states(
        self, work: LocalWork, t: int, theta: Mapping[str, Tensor]
    ) -> Iterator[tuple[Mapping[str, Tensor], float]]:
        """See `LocalRuns`."""
        for m in range(work.M):
            yield local_run(work, t, m, theta)

    def close(self) -> None:
        """Nothing is held."""


def run_rounds(
    work: LocalWork,
    runs: LocalRuns,
    *,
    average: IterateAverage | None = None,
    validate: Callable[[int], Mapping[str, float]] | None = None,
    on_round: Callable[[dict[str, Any]], bool] | None = None,
    checkpoint: Path | None = None,
    writes: bool = True,
) -> list[dict[str, Any]]:
    """Run the rounds; ``work.student.model`` holds theta at the end.

    Parameters
    ----------
    work : LocalWork
        The task.
    runs : LocalRuns
        Where local runs are computed.
    average : IterateAverage, optional
        Gets theta after every round.
    validate : callable, optional
        ``validate(rounds done)`` -> numbers for the record of a round.
    on_round : callable, optional
        Told of each record, after the checkpoint; a true return value ends the training.
    checkpoint : Path, optional
        File for the state after each round; one that is there is continued.
    writes : bool
        Whether this process writes it.

    Returns
    -------
    list of dict
        One record per round: ``epoch`` (from 1), ``loss``, ``lr``, ``seconds`` and what ``validate`` gave.

    Raises
    ------
    UserError
        A loss that is not finite; a checkpoint of other settings or of another model.
    """
    model = work.student.model
    settings = {**dataclasses.asdict(work.config), "M": work.M, "E": work.E, "rho": work.rho, "T": work.T}
    records: list[dict[str, Any]] = []
    start = 0
    if checkpoint is not None and checkpoint.exists():
        saved = load_checkpoint(checkpoint, expected=settings)
        put_weights(model, {k[6:]: v for k, v in saved.weights.items() if k.startswith("model.")}, checkpoint)
        if average is not None:
            put_weights(average, {k[8:]: v for k, v in saved.weights.items() if k.startswith("average.")}, checkpoint)
        records, start = saved.records, work.T if saved.finished else saved.epoch
    for t in range(start, work.T):
        began = time.perf_counter()
        theta = {k: v.clone() for k, v in trained_weights(model).items()}
        mean, losses = RunningMean(), []
        for state, loss in runs.states(work, t, theta):
            mean.add(state, 1 / work.M)
            losses.append(loss)
        put_weights(model, mean.result(), f"round {t + 1}")
        if average is not None:
            average.after_epoch(model)
        record: dict[str, Any] = {
            "epoch": t + 1,
            "loss": sum(losses) / len(losses),
            "lr": round_lr(work.config.lr, t, work.T),
            "seconds": time.perf_counter() - began,
            **(validate(t + 1) if validate is not None else {}),
        }
        records.append(record)

        def save(finished: bool, t: int = t) -> None:
            if checkpoint is not None and writes:
                weights = {f"model.{k}": v for k, v in trained_weights(model).items()}
                if average is not None:
                    weights |= {f"average.{k}": v for k, v in trained_weights(average).items()}
                done = Checkpoint(settings, t + 1, finished, weights, {}, {}, None, records, None, None)
                save_checkpoint(checkpoint, done)

        save(t + 1 == work.T)
        if on_round is not None and on_round(record) and t + 1 < work.T:
            save(True)
            break
    return records


def lolsgd(
    model: Any,
    train: Any,
    seen: Any,
    *,
    M: int = 4,
    E: int | None = None,
    rho: float = 0.3,
    T: int | None = None,
    **training: Any,
) -> Any:
    """Fine-tune by LOLSGD: `fine_tune` with the recipe ``lolsgd``.

    Parameters
    ----------
    model, train, seen, **training
        As for `fine_tune`; ``recipe="distill"`` or so adds to it.
    M : int
        Local runs per round.
    E : int, optional
        Steps of each; by default those of an epoch: ``steps_per_epoch``, or one pass over all training rows.
    rho : float
        Share of the seen classes that each local run leaves out, 0..1.
    T : int, optional
        Rounds; the epochs by default.

    Returns
    -------
    Run
    """
    from ft_calibrate.recipes.finetune import fine_tune

    more = training.pop("recipe", None)
    options: dict[str, Any] = {"lolsgd__M": M, "lolsgd__rho": rho}
    options |= {f"lolsgd__{k}": v for k, v in (("E", E), ("T", T)) if v is not None}
    return fine_tune(model, train, seen, f"lolsgd+{more}" if more else "lolsgd", **options, **training)
