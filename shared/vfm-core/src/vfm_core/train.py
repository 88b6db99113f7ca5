"""One small training loop on accelerate, for heads, prompts, stitch layers, adapters and tiny models alike.

Only parameters with ``requires_grad`` are trained, stored and restored; frozen submodules stay in eval mode. Every
epoch draws its order and its dropout from streams derived from (seed, epoch), so a resumed run repeats the
uninterrupted one exactly and the caller's random state is never touched. Several processes
(``accelerate launch``) share the batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32, find_batch_size, send_to_device
from torch import Tensor, nn

from vfm_core.batches import Batches, image_batches, tensor_batches
from vfm_core.checkpoints import (
    Checkpoint,
    load_checkpoint,
    put_weights,
    save_checkpoint,
    trained_weights,
)
from vfm_core.errors import UserError, unknown_name
from vfm_core.isolation import forked_rng, lent_accelerator, modes_kept, seed_device, stream, train_mode
from vfm_core.runs import writable_folder
from vfm_core.schedules import make_optimizer, make_scheduler
from vfm_core.train_config import TrainConfig

__all__ = ["History", "TrainConfig", "fit", "image_batches", "tensor_batches"]


@dataclass
class History:
    """What happened: one record per epoch.

    Attributes
    ----------
    records : list of dict
        ``epoch`` (from 1), ``loss`` (mean over rows), ``lr`` (at the end), ``seconds`` and what ``validate`` gave.
    best_epoch : int or None
        The epoch whose weights the model holds, with ``keep_best``.
    checkpoint : Path or None
        The last checkpoint.
    """

    records: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    checkpoint: Path | None = None

    @property
    def losses(self) -> list[float]:
        """The training loss per epoch."""
        return [r["loss"] for r in self.records]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields."""
        return {
            "records": self.records,
            "best_epoch": self.best_epoch,
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
        }


Source = Callable[[int, torch.Generator], Iterable[Any]] | Iterable[Any]


def fit(
    model: nn.Module,
    train_batches: Source,
    loss_fn: Callable[[Any, Any], Tensor],
    config: TrainConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    on_epoch: Callable[[dict[str, float]], bool | None] | None = None,
    keep_best: str | None = None,
    param_groups: list[dict[str, Any]] | None = None,
) -> History:
    """Train the parameters of ``model`` that require a gradient, in place.

    Parameters
    ----------
    model : nn.Module
        Trained on the device that it is on (under ``accelerate launch`` on that of each process).
    train_batches : callable or iterable
        ``(epoch, generator) -> iterable`` of batches ``(inputs..., targets)``, or a ``DataLoader``. The generator's
        state depends on seed and epoch alone; draw every random number from it. A length gives a schedule by steps.
    loss_fn : callable
        ``loss_fn(outputs, targets)`` -> scalar, the mean over rows; outputs come in float32.
    config : TrainConfig
        Settings.
    out : path, optional
        Folder for ``checkpoint.pt``, written atomically after every epoch.
    resume : bool
        Continue from that checkpoint where there is one.
    validate : callable, optional
        ``validate(model)`` -> numbers for the record; called after each epoch in eval mode, without gradients.
    on_epoch : callable, optional
        ``on_epoch(record)``, in the main process, after the checkpoint; a true return value stops the training.
    keep_best : str, optional
        A number of ``validate``, larger is better: at the end the model gets the weights of its best epoch.
    param_groups : list of dict, optional
        As for torch optimisers, to give parts of the model their own ``lr`` or ``weight_decay``.

    Returns
    -------
    History

    Raises
    ------
    UserError
        Nothing to train; a loss that is not finite (the last good checkpoint stays, and its weights are put back); a
        checkpoint there without ``resume``, or one of another model or other settings; a folder that cannot be written.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise UserError("nothing to train", given=type(model).__name__, remedy="set requires_grad on some parameters")
    path = Path(out) / "checkpoint.pt" if out is not None else None
    if path is not None and path.exists() and not resume:
        raise UserError("a checkpoint is there", where=path, remedy="pass resume=True, or choose another folder")
    if path is not None:
        writable_folder(path.parent)
    with (
        lent_accelerator(config, next(iter(trainable.values())).device) as accelerator,
        modes_kept(model),
        forked_rng(accelerator.device),
    ):
        loop = _Loop(
            model, loss_fn, config, accelerator, param_groups or [{"params": list(trainable.values())}], path, keep_best
        )
        return loop.run(train_batches, validate, on_epoch)


class _Loop:
    """The state of one call of :func:`fit`."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        config: TrainConfig,
        accelerator: Accelerator,
        parameters: list[dict[str, Any]],
        path: Path | None,
        keep_best: str | None,
    ) -> None:
        self.model, self.loss_fn, self.config, self.accelerator = model, loss_fn, config, accelerator
        self.path, self.keep_best = path, keep_best
        self.distributed = accelerator.num_processes > 1
        self.device = accelerator.device if self.distributed else next(model.parameters()).device
        if self.distributed:
            model.to(self.device)
        self.torch_optimizer = make_optimizer(parameters, config)
        self.optimizer = accelerator.prepare_optimizer(self.torch_optimizer, device_placement=False)
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self.saved: Checkpoint | None = None
        self.own_generator: torch.Generator | None = None
        self.history = History(checkpoint=path)
        self.best: tuple[float, int, dict[str, Tensor]] | None = None

    def run(
        self,
        train_batches: Source,
        validate: Callable[[nn.Module], Mapping[str, float]] | None,
        on_epoch: Callable[[dict[str, float]], bool | None] | None,
    ) -> History:
        start, finished = self._restore()
        source = self._source(train_batches)
        engine = self._engine()
        try:
            for epoch in () if finished else range(start, self.config.epochs):
                record = self._epoch(engine, source, epoch)
                if validate is not None:
                    self.model.eval()
                    with torch.no_grad():
                        record |= {k: float(v) for k, v in validate(self.model).items()}
                self._remember(record)
                last = epoch + 1 == self.config.epochs
                self._save(epoch + 1, finished=last)
                stop = self._tell(on_epoch, record)
                if stop and not last:
                    self._save(epoch + 1, finished=True)
                if stop:
                    break
        finally:
            self.torch_optimizer.zero_grad(set_to_none=True)
            self._release(engine)
        if self.best is not None:
            self.history.best_epoch = self.best[1]
            put_weights(self.model, self.best[2], self.path or "the best epoch")
        return self.history

    # ------------------------------------------------------------------------------------------------------- one epoch
    def _epoch(self, engine: nn.Module, source: Callable[[int], Iterable[Any]], epoch: int) -> dict[str, float]:
        began = time.perf_counter()
        seed_device(self.device, stream(self.config.seed, "dropout", epoch, self.accelerator.process_index))
        batches = source(epoch)
        steps = math.ceil(len(batches) / self.config.grad_accum) if isinstance(batches, Sized) else None
        if self.scheduler is None:
            self.scheduler = make_scheduler(self.torch_optimizer, self.config, steps)
            if self.saved is not None:  # the optimiser after the schedule, whose making overwrites the learning rate
                self.scheduler.load_state_dict(self.saved.scheduler)
                self.torch_optimizer.load_state_dict(self.saved.optimizer)
        train_mode(self.model)
        total, rows = torch.zeros((), dtype=torch.float64), 0
        for step, group in enumerate(_groups(batches, self.config.grad_accum)):
            loss, count = self._step(engine, group, f"epoch {epoch + 1}, step {step + 1}")
            total, rows = total + loss * count, rows + count
            if steps is not None:
                self._advance()
        if rows == 0:
            raise UserError("no batch to train on", where=f"epoch {epoch + 1}")
        if steps is None:
            self._advance()
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters() if p.requires_grad):
            raise self._diverged("weights are", f"epoch {epoch + 1}", "nan or inf")
        lr = float(self.torch_optimizer.param_groups[0]["lr"])
        return {
            "epoch": epoch + 1,
            "loss": float(total) / rows,
            "lr": lr,
            "seconds": time.perf_counter() - began,
        }

    def _step(self, engine: nn.Module, group: list[Any], where: str) -> tuple[float, int]:
        group = [send_to_device(batch, self.device, non_blocking=True) for batch in group]
        counts = [find_batch_size(batch) or 1 for batch in group]
        losses = []
        for i, batch in enumerate(group):
            waits = i + 1 < len(group)  # processes exchange gradients once per step
            with self.accelerator.no_sync(engine) if waits else contextlib.nullcontext():
                with self.accelerator.autocast():
                    outputs = engine(*batch[:-1])
                loss = self.loss_fn(convert_to_fp32(outputs), batch[-1]) * (counts[i] / sum(counts))
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        mean = torch.stack(losses).sum()
        if self.distributed:
            mean = self.accelerator.reduce(mean, "mean")
        value = float(mean)
        if not math.isfinite(value):
            raise self._diverged("loss is", where, value)
        if self.config.grad_clip is not None:
            every = [p for g in self.torch_optimizer.param_groups for p in g["params"]]
            self.accelerator.clip_grad_norm_(every, self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value, sum(counts)

    def _advance(self) -> None:
        scheduler = self.scheduler
        assert scheduler is not None
        at_end = isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR) and (
            scheduler.last_epoch + 1 >= scheduler.total_steps
        )
        if not self.optimizer.step_was_skipped and not at_end:
            scheduler.step()

    def _diverged(self, what: str, where: str, given: object) -> UserError:
        remedy = "lower the learning rate, clip the gradient (grad_clip) or train with mixed_precision='no'"
        if self.path is not None and self.path.exists():
            kept = load_checkpoint(self.path)
            put_weights(self.model, kept.weights, self.path)
            remedy += f"; the weights after epoch {kept.epoch} are kept in {self.path}"
        return UserError(f"{what} not finite", where=where, given=given, remedy=remedy)

    # --------------------------------------------------------------------------------------------------- around epochs
    def _source(self, train_batches: Source) -> Callable[[int], Iterable[Any]]:
        if isinstance(train_batches, torch.utils.data.DataLoader):
            generator = train_batches.generator
            if generator is not None and self.saved is not None and self.saved.order is not None:
                generator.set_state(self.saved.order)
            self.own_generator = generator
            loader = self.accelerator.prepare_data_loader(train_batches) if self.distributed else train_batches
            return lambda epoch: loader
        world, rank = self.accelerator.num_processes, self.accelerator.process_index

        def source(epoch: int) -> Iterable[Any]:
            generator = torch.Generator().manual_seed(stream(self.config.seed, "order", epoch))
            batches = train_batches(epoch, generator) if callable(train_batches) else train_batches
            return _share(batches, rank, world) if world > 1 else batches

        return source

    def _engine(self) -> nn.Module:
        if not self.distributed:
            return self.model  # accelerate would patch forward, and leave the patch behind
        train_mode(self.model)
        return self.accelerator.prepare_model(self.model)

    def _release(self, engine: nn.Module) -> None:
        if engine is not self.model:
            self.accelerator.unwrap_model(engine, keep_fp32_wrapper=False)
            for name in ("forward", "_is_accelerate_prepared"):
                self.model.__dict__.pop(name, None)

    def _tell(self, on_epoch: Callable[[dict[str, float]], bool | None] | None, record: dict[str, float]) -> bool:
        stop = bool(on_epoch(record)) if on_epoch is not None and self.accelerator.is_main_process else False
        if not self.distributed:
            return stop
        if stop:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def _remember(self, record: dict[str, float]) -> None:
        self.history.records.append(record)
        if self.keep_best is None:
            return
        if self.keep_best not in record:
            raise unknown_name("number to keep the best by", self.keep_best, record, where="validate")
        value = record[self.keep_best]
        if self.best is None or value > self.best[0]:
            self.best = (value, int(record["epoch"]), {k: v.clone() for k, v in trained_weights(self.model).items()})

    def _save(self, epoch: int, *, finished: bool) -> None:
        if self.path is not None and self.accelerator.is_main_process:
            assert self.scheduler is not None
            scaler = self.accelerator.scaler
            save_checkpoint(
                self.path,
                Checkpoint(
                    config=dataclasses.asdict(self.config),
                    epoch=epoch,
                    finished=finished,
                    weights=trained_weights(self.model),
                    optimizer=self.torch_optimizer.state_dict(),
                    scheduler=self.scheduler.state_dict(),
                    scaler=scaler.state_dict() if scaler is not None else None,
                    records=self.history.records,
                    best=self.best,
                    order=self.own_generator.get_state() if self.own_generator is not None else None,
                ),
            )
        self.accelerator.wait_for_everyone()

    def _restore(self) -> tuple[int, bool]:
        if self.path is None or not self.path.exists():
            return 0, False
        saved = load_checkpoint(self.path, expected=dataclasses.asdict(self.config))
        put_weights(self.model, saved.weights, self.path)
        if saved.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.scaler)
        self.history.records, self.best, self.saved = saved.records, saved.best, saved
        return saved.epoch, saved.finished


def _share(batches: Iterable[Any], rank: int, world: int) -> Iterable[Any]:
    """Take every ``world``-th batch, the same number in each process: none must wait for the others in vain."""

    def make() -> Iterator[Any]:
        return (group[rank] for group in _groups(batches, world) if len(group) == world)

    return Batches(len(batches) // world, make) if isinstance(batches, Sized) else make()


def _groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    stream = iter(batches)
    while group := list(itertools.islice(stream, size)):
        yield group
