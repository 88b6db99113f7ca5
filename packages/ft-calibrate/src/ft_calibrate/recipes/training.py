"""One training by a recipe: what is prepared, the stages, and the averages at the end.

FTC (arXiv 2409.16223) and HT (arXiv 2311.01420) say what the recipes are; that everything frozen is computed once
(features for ``lp``, z_source for distillation without augmentation) is ours, and does not change the result.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from vfm_core.errors import UserError
from vfm_core.executors import Local, make_executor
from vfm_core.isolation import forked_rng, seed_device, stream
from vfm_core.runs import RunDir
from vfm_core.train import TrainConfig, fit

from ft_calibrate.classifier import Classifier
from ft_calibrate.recipes.averaging import IterateAverage, SourceEnsemble, interpolate_states
from ft_calibrate.recipes.heads import cosine_head_from
from ft_calibrate.recipes.lolsgd import LocalRuns, LocalWork, Serial, run_rounds
from ft_calibrate.recipes.peft_arms import add_lora, merge_lora
from ft_calibrate.recipes.rows import ImageRows, Rows, TensorRows, into_memory
from ft_calibrate.recipes.run import Structure, replace_head
from ft_calibrate.recipes.source_pass import features_hold, first_rows, source_pass
from ft_calibrate.recipes.spec import Recipe
from ft_calibrate.recipes.student import Loss, Student, choose_trainable, parameter_groups

__all__ = ["Training", "is_main"]

log = logging.getLogger(__name__)

_SCALE_ROWS = 512  # enough to measure a mean norm


@dataclass(eq=False)
class Training:
    """A training in progress; `run` does it.

    Attributes
    ----------
    start : Classifier
        A private copy of the source model on the device, in eval mode; it is trained in place.
    rows : Rows
        What to train on.
    recipe : Recipe
        With M, E, rho and T of LOLSGD filled in.
    config : TrainConfig
        Of the main stage; ``lr`` is the head's.
    seen, absent : Tensor of int64
        Columns S and U.
    backbone_scale : float
        Learning rate of the backbone as a share of the head's.
    steps : int or None
        Steps per epoch; None for one pass.
    validate : callable or None
        ``validate(model) -> dict``, or ``validate(model, epoch=, stage=)``.
    callbacks : sequence of callable
        ``callback(model, record)``; a true return value ends the stage.
    folder : RunDir or None
        Gets a record per epoch (main process only).
    state : Path or None
        Folder of checkpoints.
    cache_dir : Path or None
        Of cached features.
    executor : str
        For the local runs of LOLSGD.
    local : int or None
        Compute only this local run, beside other jobs.
    world : int
        Processes of ``accelerate launch``.
    key : str
        Stands for the settings: jobs of other settings do not meet.
    history : list of dict
        What `run` collects.
    """

    start: Classifier
    rows: Rows
    recipe: Recipe
    config: TrainConfig
    seen: Tensor
    absent: Tensor
    backbone_scale: float = 0.1
    steps: int | None = None
    validate: Callable[..., Mapping[str, float]] | None = None
    callbacks: Sequence[Callable[[nn.Module, dict[str, Any]], Any]] = ()
    folder: RunDir | None = None
    state: Path | None = None
    cache_dir: Path | None = None
    executor: str = "local"
    local: int | None = None
    world: int = 1
    key: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model: nn.Module = self.start.model
        self.structure = Structure()
        self.frozen: tuple[Tensor, Tensor] | None = None  # features and z_source of every row; NaN: unreadable
        self.features_hold = False  # the logits are the head's, applied to the features
        self.teacher: nn.Module | None = None  # the source model, where z_source cannot be computed once
        self.original: nn.Module | None = None  # the source model, for the ensemble
        self.start_state: dict[str, Tensor] = {}  # theta_O, for wise
        self.origin: dict[str, Tensor] | None = None  # theta_O, for l2sp

    @property
    def head(self) -> nn.Module:
        """The head of the model as it is now."""
        return self.model.get_submodule(self.start.head_name)

    @property
    def distills(self) -> bool:
        """Whether a loss looks at the source model's logits."""
        return bool({"distill", "distill-absent"} & set(self.recipe.parts))

    def run(self) -> nn.Module:
        """Train, average, and return the result in eval mode."""
        self._prepare()
        self._first_record()
        main, first = self.recipe.scheme, 0
        if main == "lp-ft":
            o = self.recipe["lp-ft"]
            epochs, lr = o["lp_epochs"] or self.config.epochs, o["lp_lr"] or self.config.lr
            choose_trainable(self.model, self.head, "lp")
            first = self._fit("lp", dataclasses.replace(self.config, epochs=epochs, lr=lr), None, 0)
            main = "ft"
        lora = self._add_lora() if main == "lora" else None
        choose_trainable(self.model, self.head, main)
        trained = self.head if self._on_features(main) else self.model
        average: IterateAverage | None = None
        for kind, o in self.recipe.of_kind("iterates").items():
            average = IterateAverage(trained, kind, epochs=self._rounds(), **o)
        if "lolsgd" in self.recipe:
            self._rounds_of_local_runs(main, average, first)
        else:
            self._fit(main, self.config, average, first)
        if average is not None:
            average.put_into(trained)
            self._estimate_statistics(main)
        if lora is not None:
            self.model = merge_lora(lora)
        self._after()
        names = [*self.recipe.of_kind("iterates"), *self.recipe.of_kind("after")]
        if names:
            last, stage = int(self.history[-1]["epoch"]), "+".join(names)
            self._record({"epoch": last, "stage": stage, **self._numbers(last, stage)})
        return self.model.eval().requires_grad_(True)

    # ---------------------------------------------------------------------------------------------------- preparation
    def _prepare(self) -> None:
        """Compute what stays, keep what is needed of the source model, and change the structure."""
        recipe = self.recipe
        augments = isinstance(self.rows, ImageRows) and self.rows.augment is not None
        on_features = recipe.scheme in ("lp", "lp-ft")
        if isinstance(self.rows, ImageRows):
            if recipe.scheme == "lp" and augments:
                log.warning("lp trains on cached features: the augmentation is not used")
                self.rows, augments = dataclasses.replace(self.rows, augment=None), False
            elif recipe.scheme != "lp":
                self.rows = into_memory(self.rows)
        if on_features or (self.distills and not augments):
            self.frozen = self._source_pass(self.rows)
            self.features_hold = on_features and features_hold(self.start, *self.frozen)
        if recipe.scheme == "lp-ft" and augments and self.features_hold:
            log.warning("lp-ft trains its first stage on cached features: the augmentation is not used there")
        if self.distills and augments:
            self.teacher = copy.deepcopy(self.model).eval()
        if "source-ensemble" in recipe:
            self.original = copy.deepcopy(self.model)
        if "cosine-head" in recipe:
            self._make_cosine_head(recipe["cosine-head"]["scale"])
        if "wise" in recipe:
            self.start_state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        if "l2sp" in recipe:
            self.origin = {k: p.detach().clone() for k, p in self.model.named_parameters()}

    def _source_pass(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return source_pass(self.start, rows, max(self.config.batch_size, 64), self.cache_dir)

    @torch.no_grad()
    def _make_cosine_head(self, scale: float | None) -> None:
        head = self.head
        if scale is None:
            features, logits = self.frozen or self._source_pass(first_rows(self.rows, _SCALE_ROWS))
            f = features[~torch.isnan(logits[:, 0])][:_SCALE_ROWS].float()
            weight = getattr(head, "weight", f)
            scale = float(weight.float().flatten(1).norm(dim=1).mean() * f.norm(dim=1).mean())
        replace_head(self.model, self.start.head_name, cosine_head_from(head, scale))
        self.structure = dataclasses.replace(self.structure, cosine_head=True)

    def _add_lora(self) -> Any:
        return add_lora(self.model, self.head, self.recipe["lora"], stream(self.config.seed, "lora") % 2**31)

    # --------------------------------------------------------------------------------------------------------- stages
    def _on_features(self, scheme: str) -> bool:
        return scheme == "lp" and self.features_hold

    def _rounds(self) -> int:
        return self.recipe["lolsgd"]["T"] if "lolsgd" in self.recipe else self.config.epochs

    def _student(self, scheme: str, average: IterateAverage | None) -> tuple[Student, Rows, Tensor | None]:
        """What is trained in a stage, on what."""
        rows, extra = self.rows, self.frozen[1] if self.frozen is not None and self.distills else None
        on_features = self._on_features(scheme)
        model, prefix = self.model, ""
        if on_features:
            assert self.frozen is not None
            good = ~torch.isnan(self.frozen[1][:, 0])
            rows = TensorRows(self.frozen[0][good], self.rows.labels[good.to(self.rows.labels.device)])
            extra = extra[good] if extra is not None else None
            model, prefix = self.head, f"{self.start.head_name}." if self.start.head_name else ""
        elif self.teacher is not None:
            extra = None
        origin = None
        if self.origin is not None:
            origin = [self.origin[prefix + name] for name, p in model.named_parameters() if p.requires_grad]
        student = Student(
            model,
            self.head,
            self.recipe,
            features_in=on_features,
            teacher=None if on_features else self.teacher,
            average=average,
            origin=origin,
            backbone_stays=scheme == "lp",
        )
        return student, rows, extra

    def _loss(self) -> Loss:
        return Loss(self.recipe, self.seen if "seen-loss" in self.recipe else None, self.absent)

    def _fit(self, scheme: str, config: TrainConfig, average: IterateAverage | None, first: int) -> int:
        """Train a stage and return the number of epochs done in all."""
        student, rows, extra = self._student(scheme, average)
        steps = None if self.steps is None else self.steps * self.world
        make = rows.source(config.batch_size, steps, extra=extra)
        now = first

        def batches(epoch: int, generator: torch.Generator) -> Any:
            nonlocal now
            now = first + epoch + 1
            return make(epoch, generator)

        def numbers(model: nn.Module) -> dict[str, float]:
            if average is not None:
                average.after_epoch(student.model)
            return self._numbers(now, scheme)

        with student.attached():
            history = fit(
                student,
                batches,
                self._loss(),
                config,
                out=None if self.state is None else self.state / scheme,
                resume=True,
                validate=numbers,
                on_epoch=lambda record: self._told(scheme, first, record),
                param_groups=parameter_groups(student.model, self.head, config.lr, self.backbone_scale),
            )
        for record in history.records:
            self._record(_placed(scheme, first, record))
        return int(self.history[-1]["epoch"])

    def _rounds_of_local_runs(self, scheme: str, average: IterateAverage | None, first: int) -> None:
        student, rows, extra = self._student(scheme, None)
        scale, options = self.backbone_scale, self.recipe["lolsgd"]
        work = LocalWork(student, rows, extra, self._loss(), self.config, scale, self.seen, world=self.world, **options)
        runs = self._runs()
        try:
            records = run_rounds(
                work,
                runs,
                average=average,
                validate=lambda rounds: self._numbers(first + rounds, "lolsgd"),
                on_round=lambda record: self._told("lolsgd", first, record),
                checkpoint=None if self.state is None else self.state / "lolsgd" / "checkpoint.pt",
                writes=is_main(self.local),
            )
        finally:
            runs.close()
        for record in records:
            self._record(_placed("lolsgd", first, record))

    def _runs(self) -> LocalRuns:
        from ft_calibrate.recipes.local_runs import Jobs, Processes

        if self.local is not None:
            assert self.state is not None
            return Jobs(self.state / f"rounds-{self.key}", self.local)
        executor = make_executor(self.executor)
        if not isinstance(executor, Local):
            remedy = "use local:N, or one job per local run (--local M)"
            raise UserError("LOLSGD runs on one machine here", where="--executor", given=self.executor, remedy=remedy)
        return Processes(executor.processes) if executor.processes > 1 else Serial()

    # --------------------------------------------------------------------------------------------------------- the end
    def _estimate_statistics(self, scheme: str) -> None:
        """Estimate BN statistics of averaged weights on the training rows (``torch.optim.swa_utils.update_bn``)."""
        if scheme == "lp" or {"bn-frozen", "bit-fit", "lora"} & set(self.recipe.parts):
            return
        seed = stream(self.config.seed, "statistics")
        batches = self.rows.source(self.config.batch_size)(0, torch.Generator().manual_seed(seed))
        device = self.start.device
        with forked_rng(device):
            seed_device(device, seed)
            update_bn(batches, self.model, device)

    @torch.no_grad()
    def _after(self) -> None:
        """Averages with the source model: weights first, then predictions."""
        if "wise" in self.recipe:
            state = interpolate_states(self.start_state, self.model.state_dict(), self.recipe["wise"]["a"])
            self.model.load_state_dict(state)
        if "source-ensemble" in self.recipe:
            mean = self.recipe["source-ensemble"]["mean"]
            assert self.original is not None
            self.model = SourceEnsemble(self.original, self.model, mean)
            self.structure = dataclasses.replace(self.structure, ensemble=mean)

    # -------------------------------------------------------------------------------------------------------- records
    @torch.no_grad()
    def _numbers(self, epoch: int, stage: str) -> dict[str, float]:
        if self.validate is None:
            return {}
        self.model.eval()
        place = {"epoch": epoch, "stage": stage} if _takes_place(self.validate) else {}
        return {k: float(v) for k, v in self.validate(self.model, **place).items()}

    def _first_record(self) -> None:
        kept = self.folder.records() if self.folder is not None else []
        for record in kept:
            if record["unit"] == "start 0":
                self.history.append({k: math.nan if v is None else v for k, v in record.items() if k != "unit"})
                return
        record = {"epoch": 0, "stage": "start", **self._numbers(0, "start")}
        self._record(record)
        for callback in self.callbacks:
            callback(self.model, record)

    def _told(self, stage: str, first: int, record: dict[str, Any]) -> bool:
        placed = _placed(stage, first, record)
        self._store(placed)
        stops = [bool(callback(self.model, placed)) for callback in self.callbacks]
        return any(stops)

    def _record(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        self._store(record)

    def _store(self, record: dict[str, Any]) -> None:
        unit = f"{record['stage']} {record['epoch']}"
        if self.folder is not None and unit not in self.folder.done:
            self.folder.append({"unit": unit, **record})


def is_main(local: int | None = None) -> bool:
    """Whether this process writes the run folder: the first of ``accelerate launch``, and of the local runs."""
    return int(os.environ.get("RANK", "0")) == 0 and local in (None, 0)


def _takes_place(validate: Callable[..., Any]) -> bool:
    try:
        return {"epoch", "stage"} <= set(inspect.signature(validate).parameters)
    except (TypeError, ValueError):  # a builtin
        return False


def _placed(stage: str, first: int, record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "epoch": first + int(record["epoch"]), "stage": stage}
