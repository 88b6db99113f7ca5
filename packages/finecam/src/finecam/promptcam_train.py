"""Train Prompt-CAM: cross-entropy on the class scores, everything but prompts and scoring vector frozen (2501.09333).

The defaults are the recipe of the paper's code: SGD with momentum 0.9 and weight decay 1e-3, batches of 16, cosine
schedule with 20 warm-up epochs. One difference: the code also runs stochastic depth (0.1) inside the frozen DINO blocks
while training; here the backbone is deterministic.

With prompts in the last L layers only, the tokens that enter the first of them depend on the image alone. They are
computed once, kept in a memory-mapped cache, and training never touches the blocks below again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from vfm_core.cache import cached_features
from vfm_core.data import ImageDataset, loader
from vfm_core.errors import UserError
from vfm_core.files import jsonable, write_json
from vfm_core.preprocess import Preprocess
from vfm_core.runs import config_diff, writable_folder, writing
from vfm_core.train import TrainConfig, fit, image_batches, tensor_batches

from finecam.promptcam import PromptCAM
from finecam.promptcam_io import CONFIG, WEIGHTS
from finecam.promptcam_recipe import RECIPES, Recipe, paper_augment, paper_preprocess
from finecam.targets import ids_by_name

if TYPE_CHECKING:
    from vfm_core.backbones import Backbone
    from vfm_core.loading import OnError

__all__ = ["RECIPES", "Recipe", "evaluate_accuracy", "paper_augment", "paper_preprocess", "train_promptcam"]

logger = logging.getLogger(__name__)

RUN, CHECKPOINT = "training.json", "checkpoint.pt"
_VARIANT = ("entry_layer", "prompt_layers", "agnostic_prompts", "prompt_self_attention", "dropout")


def train_promptcam(
    dataset: ImageDataset,
    backbone: Backbone,
    *,
    val: ImageDataset | None = None,
    epochs: int = 100,
    lr: float = 5e-3,
    optimizer: Literal["sgd", "adamw", "adam"] = "sgd",
    batch_size: int = 16,
    warmup: float | None = None,
    weight_decay: float = 1e-3,
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine",
    lr_min: float = 1e-6,
    grad_clip: float | None = None,
    grad_accum: int = 1,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    seed: int = 42,
    entry_layer: int | None = None,
    prompt_layers: int | None = None,
    agnostic_prompts: int | None = None,
    prompt_self_attention: bool = True,
    dropout: float = 0.1,
    class_chunk: int | None = None,
    checkpointing: bool = False,
    transform: Preprocess | None = None,
    augment: Literal["none", "paper"] | Callable[[Image.Image, torch.Generator], Image.Image] = "none",
    cache: Literal["auto"] | bool = "auto",
    cache_dir: str | Path | None = None,
    cache_dtype: torch.dtype = torch.float16,
    workers: int = 0,
    keep_best: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_epoch: Callable[[dict[str, float]], bool | None] | None = None,
    on_error: OnError | None = None,
) -> PromptCAM:
    """Train prompts and scoring vector on a labelled dataset.

    Parameters
    ----------
    dataset : ImageDataset
        Every class needs at least one picture.
    backbone : Backbone
        Frozen.
    val : ImageDataset, optional
        Held-out pictures of the same classes (by name); gives ``accuracy`` per epoch.
    epochs, lr, optimizer, batch_size, weight_decay, schedule, lr_min, grad_clip, grad_accum, mixed_precision, seed
        As in :class:`vfm_core.train.TrainConfig`; defaults of the paper's code. ``seed`` also sets the initial prompts.
    warmup : float, optional
        Warm-up epochs; default 20, but at most a fifth of ``epochs``.
    entry_layer, prompt_layers, agnostic_prompts, prompt_self_attention, dropout, class_chunk, checkpointing
        The variant, see :class:`~finecam.promptcam.PromptCAM`.
    transform : Preprocess, optional
        Default the backbone's own; :func:`paper_preprocess` with ``augment="paper"``.
    augment : {"none", "paper"} or callable
        Training view; :func:`paper_augment` or your own ``(picture, generator) -> picture``.
    cache : "auto" or bool
        Train from cached tokens: possible with ``prompt_layers`` below the depth and without augmentation.
    cache_dir, cache_dtype
        Where and how precisely they are stored.
    workers : int
        Decoding processes.
    keep_best : bool
        Return the epoch with the best ``accuracy`` on ``val`` instead of the last one. That accuracy is then
        optimistic: report another split.
    out : path, optional
        Folder for the result (see :func:`finecam.promptcam_io.save`) and the checkpoint of every epoch.
    resume : bool
        Continue from the checkpoint in ``out``, where there is one; a finished run is read, not trained again.
    overwrite : bool
        Forget the run in ``out`` and train from the start.
    on_epoch : callable, optional
        ``on_epoch(record)`` after each epoch; a true return value stops.
    on_error : callable, optional
        ``on_error(index, id, error)`` for each unreadable picture, which is then left out. Without it the first one
        raises.

    Returns
    -------
    PromptCAM
        In evaluation mode; ``metrics`` holds the last or best epoch's numbers, ``history`` the
        :class:`vfm_core.train.History`.

    Raises
    ------
    UserError
        A class without pictures, a class of ``val`` that is not in ``dataset``, pictures without labels, a cache that
        is impossible, another run in ``out`` or a folder that cannot be written, or a loss that is not finite (the last
        good checkpoint stays).
    """
    _check_classes(dataset)
    epochs_up = min(20.0, epochs / 5) if warmup is None else warmup
    config = TrainConfig(
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        weight_decay=weight_decay,
        momentum=0.9,
        warmup_epochs=epochs_up,
        lr_min=min(lr_min, lr),
        schedule=schedule,
        batch_size=batch_size,
        grad_clip=grad_clip,
        grad_accum=grad_accum,
        mixed_precision=mixed_precision,
        seed=seed,
    )
    model = PromptCAM(
        backbone,
        len(dataset.classes),
        entry_layer=entry_layer,
        prompt_layers=prompt_layers,
        agnostic_prompts=agnostic_prompts,
        prompt_self_attention=prompt_self_attention,
        dropout=dropout,
        class_names=dataset.classes,
        class_chunk=class_chunk,
        checkpointing=checkpointing,
        generator=torch.Generator().manual_seed(seed),
    )
    change = paper_augment(backbone.image_size) if augment == "paper" else None if augment == "none" else augment
    model.preprocess = transform or (paper_preprocess(backbone.image_size) if augment == "paper" else model.preprocess)
    cached = _use_cache(model, cache, change is not None)
    view = _View(model, cached, cache_dir, cache_dtype, workers, on_error)
    if out is not None:
        facts: dict[str, Any] = {
            "backbone": backbone.fingerprint(),
            "data": dataset.fingerprint(),
            "validation data": None if val is None else val.fingerprint(),
            "classes": model.class_names,
            "preprocess": model.preprocess.to_dict(),
            "variant": {name: getattr(model, name) for name in _VARIANT},
            "augmentation": augment if isinstance(augment, str) else "own",
            "settings": dataclasses.asdict(config) | {"keep_best": keep_best},
        }
        _same_run(Path(out), facts, resume, overwrite)

    if cached:
        tokens, index = view.tokens(dataset)
        batches = tensor_batches(
            tokens, torch.as_tensor(dataset.labels)[index], batch_size=batch_size, dtype=view.dtype
        )
    else:
        batches = image_batches(
            dataset, model.preprocess, batch_size, workers=workers, augment=change, on_error=on_error
        )
    validate = None
    if val is not None:
        labels = _labels_by_name(dataset, val)
        validate = lambda _: {"accuracy": view.accuracy(val, labels, max(batch_size, 64))}  # noqa: E731
    history = fit(
        model,
        batches,
        nn.functional.cross_entropy,
        config,
        out=out,
        resume=resume,
        validate=validate,
        on_epoch=on_epoch,
        keep_best="accuracy" if keep_best and val is not None else None,
    )
    model.history = history
    record = history.records[-1 if history.best_epoch is None else history.best_epoch - 1]
    model.metrics = {"epoch": int(record["epoch"]), "loss": record["loss"]}
    model.metrics |= {"accuracy": record["accuracy"]} if "accuracy" in record else {}
    if out is not None:
        with writing(out):
            model.save(out)
    return model.eval()


@torch.no_grad()
def evaluate_accuracy(model: PromptCAM, dataset: ImageDataset, *, batch_size: int = 64, workers: int = 0) -> float:
    """Top-1 accuracy in [0, 1] on a dataset whose classes are among the model's.

    Raises
    ------
    UserError
        For a class that the model does not know.
    """
    labels = torch.as_tensor(dataset.labels)
    ids = torch.cat([model.class_ids([name]) for name in dataset.classes])
    view = _View(model, False, None, torch.float16, workers, None)
    return view.accuracy(dataset, torch.where(labels < 0, labels, ids[labels]), batch_size)


class _View:
    """How pictures reach the model: decoded and embedded each time, or as cached tokens."""

    def __init__(
        self,
        model: PromptCAM,
        cached: bool,
        cache_dir: str | Path | None,
        cache_dtype: torch.dtype,
        workers: int,
        on_error: OnError | None,
    ) -> None:
        self.model, self.cached, self.workers, self.on_error = model, cached, workers, on_error
        self.cache_dir, self.cache_dtype = cache_dir, cache_dtype
        self.known: dict[int, tuple[Tensor, Tensor]] = {}
        weight = next(model.backbone.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def tokens(self, dataset: ImageDataset) -> tuple[Tensor, Tensor]:
        """Cached tokens (n, p + M, D) of the readable pictures, and their positions (n,) in ``dataset``."""
        if id(dataset) in self.known:
            return self.known[id(dataset)]
        source = getattr(dataset, "feature_source", dataset)
        rows = np.arange(len(dataset)) if source is dataset else np.asarray(dataset.indices)  # type: ignore[attr-defined]
        unreadable: set[int] = set()

        def note(index: int, name: str, error: UserError) -> None:
            unreadable.add(index)
            if self.on_error is not None:
                self.on_error(index, name, error)

        tokens = cached_features(
            self.model.backbone,
            source,
            lambda x: self.model.frozen_tokens(x).x,
            f"promptcam tokens@{self.model.frozen_depth}",
            transform=self.model.preprocess,
            cache_dir=self.cache_dir,
            workers=self.workers,
            dtype=self.cache_dtype,
            device=self.device,
            on_error=None if self.on_error is None else note,
        )
        kept = np.array([row not in unreadable for row in rows.tolist()], dtype=bool)
        if len(rows) != len(tokens) or not kept.all():  # else no copy: rows stay on disk until they are needed
            tokens = tokens[torch.as_tensor(rows[kept])]
        self.known[id(dataset)] = tokens, torch.as_tensor(np.nonzero(kept)[0])
        return self.known[id(dataset)]

    def batches(self, dataset: ImageDataset, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Model inputs and their positions in ``dataset``, in order."""
        if self.cached:
            tokens, index = self.tokens(dataset)
            for part, who in zip(tokens.split(batch_size), index.split(batch_size)):
                yield part.to(self.device, self.dtype), who
            return
        stream = loader(
            dataset,
            self.model.preprocess,
            batch_size,
            self.workers,
            self.device,
            samples=False,
            on_error=self.on_error,
        )
        for index, x, _ in stream:
            yield x, index

    def accuracy(self, dataset: ImageDataset, labels: Tensor, batch_size: int) -> float:
        hits = total = 0
        with self.model.evaluating():
            for x, index in self.batches(dataset, batch_size):
                wanted = labels[index]
                hits += int((self.model(x).argmax(dim=1).cpu() == wanted)[wanted >= 0].sum())
                total += int((wanted >= 0).sum())
        if not total:
            raise UserError("no labelled picture to evaluate on", where=dataset.name)
        return hits / total


def _use_cache(model: PromptCAM, cache: Literal["auto"] | bool, augmented: bool) -> bool:
    possible = model.frozen_depth > 0 and not augmented
    if cache is True and not possible:
        reason = "training pictures are augmented" if augmented else "prompts enter at the first layer"
        raise UserError(
            "tokens cannot be cached",
            where="cache",
            given=reason,
            remedy="use augment='none'" if augmented else f"use prompt_layers below {model.backbone.depth}",
        )
    return possible and bool(cache)


def _check_classes(dataset: ImageDataset) -> None:
    labels = np.asarray(dataset.labels)
    if not dataset.classes or (labels < 0).any():
        given = "no classes" if not dataset.classes else dataset.ids[int(np.argmax(labels < 0))]
        raise UserError("training needs labelled pictures", where=dataset.name, given=given)
    counts = np.bincount(labels, minlength=len(dataset.classes))
    if (counts == 0).any():
        empty = [dataset.classes[i] for i in np.nonzero(counts == 0)[0]]
        raise UserError(
            "class without training pictures",
            where=dataset.name,
            given=", ".join(empty[:5]),
            remedy="add pictures or remove the class",
        )


def _labels_by_name(dataset: ImageDataset, val: ImageDataset) -> Tensor:
    """Labels of ``val`` as ids of ``dataset``'s classes, which may be listed in another order."""
    labels = np.asarray(val.labels)
    place = ids_by_name(val.classes, dataset.classes)
    if unknown := sorted(val.classes[i] for i in np.unique(labels[labels >= 0]) if place[i] is None):
        raise UserError(
            "class of the validation data is not in the training data",
            where=val.name,
            given=", ".join(unknown[:5]),
            remedy="train on it as well, or leave it out",
        )
    ids = np.array([-1 if i is None else i for i in place] + [-1], dtype=np.int64)
    return torch.as_tensor(ids[labels])


def _same_run(out: Path, facts: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Note what this run trains on; refuse to resume another one."""
    file = writable_folder(out) / RUN
    with writing(out):
        if overwrite:
            for name in (CHECKPOINT, CONFIG, WEIGHTS):
                (out / name).unlink(missing_ok=True)
        if not (out / CHECKPOINT).exists():
            write_json(file, facts)
            return
    if not resume or not file.is_file():  # without resume, fit refuses anyway
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, value in facts.items():
        if name in before and before[name] != jsonable(value):
            diff = config_diff({name: before[name]}, jsonable({name: value}))
            raise UserError(
                f"cannot resume: the {name} changed",
                where=file,
                given=", ".join(diff),
                remedy="use --overwrite to train from the start, another --out, or the earlier setting",
            )
