"""``fine_tune``: adapt a classifier to data of some of its classes, by the name of a recipe.

FTC (arXiv 2409.16223) and HT (arXiv 2311.01420). Defaults are those of FTC's code: SGD with Nesterov momentum 0.9,
weight decay 5e-4, batches of 64 without the last smaller one, half a cosine per step, the backbone at a tenth of the
head's learning rate, BN in train mode, an evaluation before training and after every epoch. The K-way head is kept.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vfm_core.data import ImageDataset
from vfm_core.errors import UserError
from vfm_core.files import jsonable
from vfm_core.runs import RunDir, config_diff
from vfm_core.train import TrainConfig

from ft_calibrate.classifier import Classifier
from ft_calibrate.groups import ClassGroups, class_groups
from ft_calibrate.methods import warn_without_rows
from ft_calibrate.recipes.rows import Augment, ImageRows, Rows, TensorRows, checked_inputs, epoch_steps
from ft_calibrate.recipes.run import RUN_FILE, WEIGHTS_FILE, Run, Structure, put_run_weights, read_run_file
from ft_calibrate.recipes.spec import Recipe, parse_recipe
from ft_calibrate.recipes.training import Training, is_main
from ft_calibrate.target_data import TargetData, named, target_data

__all__ = ["fine_tune"]

Data = tuple[Tensor, Tensor] | ImageDataset


def fine_tune(
    model: nn.Module | Classifier,
    train: Data,
    seen: Any,
    recipe: str | Recipe = "ft",
    *,
    optimizer: str = "sgd",
    lr: float = 1e-3,
    backbone_lr_scale: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    epochs: int = 20,
    batch_size: int = 64,
    steps_per_epoch: int | None = None,
    grad_clip: float | None = None,
    augment: Augment | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    callbacks: Sequence[Callable[[nn.Module, dict[str, Any]], Any]] = (),
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    workers: int = 0,
    device: str | torch.device | None = None,
    mixed_precision: str = "no",
    all_data: Data | None = None,
    absent: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    executor: str = "local",
    local: int | None = None,
    on_error: Callable[[int, str, UserError], None] | None = None,
    source: Mapping[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Fine-tune a copy of a classifier; the given model is never changed.

    Parameters
    ----------
    model : nn.Module or Classifier
        theta_O, with a K-way head.
    train : (Tensor, Tensor) or ImageDataset
        Inputs (N, ...) as the model takes them and columns (N,); or pictures, whose classes are matched by name.
    seen : sequence
        S: class names, column numbers or a mask. Every label must be in S.
    recipe : str or Recipe
        See `recipe_names`: ``ft``, ``lp``, ``wise:0.5``, ``lolsgd+distill:T=2`` ...
    optimizer : str
        ``sgd`` (with Nesterov), ``adam``, ``adamw`` or another name of timm's.
    lr, backbone_lr_scale : float
        Peak learning rate of the head, and that of the rest as a share of it.
    momentum, weight_decay : float
        Of the optimiser.
    epochs, batch_size : int
        Fewer rows than a batch make one smaller batch.
    steps_per_epoch : int, optional
        Optimiser steps per epoch (and of a local run of LOLSGD), over repeated passes; by default one pass without a
        smaller last batch.
    grad_clip : float, optional
        Greatest norm of the gradient.
    augment, transform : callable, optional
        ``augment(picture, generator)``, for pictures; picture -> tensor (the classifier's own by default). With tensors
        ``transform`` is applied once to all inputs.
    validate : callable, optional
        ``validate(model) -> dict`` of numbers, on the model in eval mode, before training, after every epoch and after
        averages at the end. One with parameters ``epoch`` and ``stage`` is told those of its record.
    callbacks : sequence of callable
        ``callback(model, record)`` after each of these; a true return value ends the stage.
    seed : int
        Of order, augmentation, dropout and left-out classes.
    out : path, optional
        Run folder: state after every epoch, ``model.safetensors`` and ``ft_calibrate.json``. The same call again goes
        on where it ended, or reads the finished run.
    resume, overwrite : bool
        False refuses a folder that holds a run; ``overwrite`` forgets it.
    workers, device, mixed_precision
        Decoding processes; by default the model's own device; ``no``, ``bf16`` or ``fp16``.
    all_data : like ``train``, optional
        Target data of all classes, for ``oracle-ft``; ``train`` by default.
    absent : sequence, optional
        U; by default every class that is not in S.
    cache_dir : path, optional
        Of cached features (pictures); by default the shared cache.
    executor : str
        ``local`` or ``local:N``: processes for the local runs of LOLSGD; the result is the same.
    local : int, optional
        LOLSGD as separate jobs: compute local run m only and share the others' through ``out``.
    on_error : callable, optional
        ``on_error(index, id, error)`` for unreadable pictures, which are left out; otherwise the first one raises.
    source : mapping, optional
        Arguments of `load_classifier` that give the source model again, for `load_run`.
    **options
        Of the recipe's parts, such as ``M=2``; ``distill__T=2`` where several parts have the name.

    Returns
    -------
    Run

    Raises
    ------
    UserError
        Unknown recipe or option, settings out of range, labels outside S, a run folder of other settings (with their
        differences), inputs that the model does not take or that are not finite, a loss that is not finite.

    Examples
    --------
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.randn(8, 4), torch.tensor([0, 1] * 4)
    >>> run = fine_tune(net, (x, y), seen=[0, 1], epochs=1)
    >>> [record["epoch"] for record in run.history]
    [0, 1]
    """
    parsed = parse_recipe(recipe, options)
    start = named(model, train)
    names = start.class_names or []
    groups = class_groups(names, seen, absent)
    oracle = parsed.scheme == "oracle-ft"
    data = target_data(all_data if oracle and all_data is not None else train, names, "training data")
    _check_labels(data, groups, oracle)
    if not oracle:
        warn_without_rows(groups, data.columns)
    if local is not None and ("lolsgd" not in parsed or out is None or not 0 <= local < parsed["lolsgd"]["M"]):
        remedy = "use it with the recipe lolsgd, a run folder, and a number from 0 to M - 1"
        raise UserError("a local run that there is not", where="--local", given=local, remedy=remedy)
    config = TrainConfig(
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=optimizer == "sgd" and momentum > 0,
        batch_size=batch_size,
        grad_clip=grad_clip,
        mixed_precision=mixed_precision,  # type: ignore[arg-type]
        seed=seed,
    )
    if not 0 <= backbone_lr_scale < float("inf"):
        raise UserError("backbone_lr_scale out of range", given=backbone_lr_scale, remedy="give 0 or more")
    if steps_per_epoch is not None and steps_per_epoch < 1:
        raise UserError("steps_per_epoch out of range", given=steps_per_epoch, remedy="give 1 or more")
    resolved = _resolved(parsed, len(data), config, steps_per_epoch)
    settings = {
        "recipe": parsed.text,
        "parts": resolved.parts,
        "seen": groups.names(groups.seen),
        "absent": groups.names(groups.absent),
        **{k: getattr(config, k) for k in ("optimizer", "lr", "momentum", "nesterov", "weight_decay", "grad_clip")},
        "backbone_lr_scale": backbone_lr_scale,
        "epochs": epochs,
        "batch_size": batch_size,
        "steps_per_epoch": steps_per_epoch,
        "schedule": config.schedule,
        "mixed_precision": mixed_precision,
        "augment": _named(augment),
        "transform": _named(transform),
        "seed": seed,
        "rows": len(data),
        "data": data.fingerprint(),
        "source": start.fingerprint(),
    }
    how = dict(source) if source is not None else _reload(start)
    folder = Path(out) if out is not None else None
    main = is_main(local)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        run_dir = None
        if folder is not None and main:
            if not resume and not overwrite and (folder / "config.json").exists():
                remedy = "pass resume=True or overwrite=True, or choose another folder"
                raise UserError("a run is there", where=folder, remedy=remedy)
            run_dir = stack.enter_context(RunDir(folder, settings, overwrite=overwrite))
            if overwrite:
                _forget(folder)
        if folder is not None and not main:
            _same_settings(folder, settings)
        if folder is not None and (folder / RUN_FILE).exists():
            return _finished(folder, start, device)
        copied = _copy(start, device)
        labels = torch.from_numpy(np.ascontiguousarray(data.columns))
        columns = np.unique(data.columns) if oracle else groups.seen
        training = Training(
            start=copied,
            rows=_rows(copied, data, labels, transform, augment, workers, on_error),
            recipe=resolved,
            config=config,
            seen=torch.as_tensor(columns, dtype=torch.int64),
            absent=torch.as_tensor(groups.absent, dtype=torch.int64),
            backbone_scale=backbone_lr_scale,
            steps=steps_per_epoch,
            validate=validate,
            callbacks=callbacks,
            folder=run_dir,
            state=None if folder is None else folder / "state",
            cache_dir=Path(cache_dir) if cache_dir is not None else None,
            executor=executor,
            local=local,
            world=_world(),
            key=hashlib.sha256(json.dumps(jsonable(settings), sort_keys=True).encode()).hexdigest()[:12],
        )
        if "distill-absent" in parsed and len(groups.absent) < 2:
            given = f"{len(groups.absent)} absent classes"
            raise UserError("distill-absent needs two absent classes", given=given, remedy="use distill")
        trained = training.run()
        run = Run(
            trained,
            parsed.text,
            training.history,
            settings,
            list(names),
            groups.names(groups.seen),
            training.structure.head_name(copied.head_name),
            folder,
            start.preprocess,
            how,
            training.structure,
        )
        if folder is not None and main:
            run.save(folder)
            shutil.rmtree(folder / "state", ignore_errors=True)
    return run


def _check_labels(data: TargetData, groups: ClassGroups, oracle: bool) -> None:
    if len(data) == 0:
        raise UserError("no row to train on", remedy="check the data and the seen classes")
    unknown = int((data.columns < 0).sum())
    if unknown:
        raise UserError("training needs labels", given=f"{unknown} rows without", remedy="leave these rows out")
    outside = np.setdiff1d(data.columns, groups.seen)
    if len(outside) and not oracle:
        named = groups.names(outside)
        given = ", ".join(named[:8]) + (f", ... ({len(named)} in all)" if len(named) > 8 else "")
        remedy = "leave their rows out, add them to seen, or use oracle-ft (an upper bound)"
        raise UserError("labels that are not among the seen classes", where="training data", given=given, remedy=remedy)


def _resolved(recipe: Recipe, rows: int, config: TrainConfig, steps: int | None) -> Recipe:
    """The recipe with what follows from the training: rounds and steps of LOLSGD."""
    parts = {name: dict(values) for name, values in recipe.parts.items()}
    if "lolsgd" in parts:
        of_epoch = steps or max(1, epoch_steps(rows, config.batch_size, None) // _world())
        parts["lolsgd"]["T"] = parts["lolsgd"]["T"] or config.epochs
        parts["lolsgd"]["E"] = parts["lolsgd"]["E"] or of_epoch
    return Recipe(parts)


def _world() -> int:
    """Processes of ``accelerate launch``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rows(
    copied: Classifier,
    data: TargetData,
    labels: Tensor,
    transform: Any,
    augment: Augment | None,
    workers: int,
    on_error: Callable[[int, str, UserError], None] | None,
) -> Rows:
    if isinstance(data.rows, ImageDataset):
        transform = transform or copied.preprocess
        if transform is None:
            remedy = "give transform=, from a picture to what the model takes"
            raise UserError("the model does not say how to prepare pictures", where="training data", remedy=remedy)
        return ImageRows(data.rows, labels, transform, augment, workers, on_error)
    if augment is not None:
        raise UserError("augmentation needs pictures", given="tensors", remedy="train on an ImageDataset")
    x = data.rows[0]
    return TensorRows(checked_inputs(copied.model, x if transform is None else transform(x)), labels)


def _copy(start: Classifier, device: str | torch.device | None) -> Classifier:
    """A private copy on the device, in eval mode, without the gradients of the original."""
    model = copy.deepcopy(start.model)
    if device is None:
        device = start.device
    if _world() > 1 and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    model.to(device).eval().zero_grad(set_to_none=True)
    return Classifier(model, start.head_name, start.preprocess, start.class_names, start.spec)


def _reload(start: Classifier) -> dict[str, Any]:
    """How to load the source again, where its spec is one."""
    family = start.spec.partition(":")[0]
    plain = ":" in start.spec and " " not in start.spec and family != "open_clip"
    return {"spec": start.spec} if plain or (Path(start.spec) / RUN_FILE).is_file() else {}


def _named(function: Any) -> str | None:
    """A stable name of a function or callable object."""
    if function is None:
        return None
    if hasattr(function, "__qualname__"):
        return f"{function.__module__}.{function.__qualname__}"
    shown = repr(function)
    return f"{type(function).__module__}.{type(function).__qualname__}" if " at 0x" in shown else shown


def _same_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """For the processes that do not open the run folder: compare with what the first one wrote, if it has."""
    path = folder / "config.json"
    if path.exists():
        diff = config_diff(json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(jsonable(settings))))
        if diff:
            remedy = "give all jobs the same settings"
            raise UserError("another job has other settings", where=path, given=", ".join(diff[:8]), remedy=remedy)


def _forget(folder: Path) -> None:
    for name in (RUN_FILE, WEIGHTS_FILE):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "state", ignore_errors=True)


def _finished(folder: Path, start: Classifier, device: str | torch.device | None) -> Run:
    """Read a run that is complete, around a copy of the same source model."""
    record = read_run_file(folder)
    structure = Structure(**record["structure"])
    model = structure.build(_copy(start, device).model, start.head_name)
    put_run_weights(model, folder)
    return Run(
        model.eval(),
        record["recipe"],
        record["history"],
        record["settings"],
        record["classes"],
        record["seen"],
        record["head"],
        folder,
        start.preprocess,
        record["source"],
        structure,
    )
