"""Train a linear head on a frozen backbone: the official recipe of Finer-CAM (arXiv 2501.11309) and a fast exact one.

The official training is Adam with learning rate 3e-4, batch 128, 20 epochs, random resized crops and flips, and keeps
the epoch of the best validation accuracy. The backbone is frozen, so its features are computed once and read from the
cache in every epoch; with `augment` the crops and flips are drawn anew and the backbone runs each time, as in the
original. ``recipe="exact"`` solves the regularised logistic regression on the cached features to convergence instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from vfm_core import metrics
from vfm_core.batches import image_batches, tensor_batches
from vfm_core.cache import cached_features
from vfm_core.errors import UserError, unknown_name
from vfm_core.files import atomic_write, write_json
from vfm_core.runs import writable_folder, writing
from vfm_core.train import TrainConfig, fit

from finecam.data import ImageDataset, open_dataset
from finecam.head_model import (
    CONFIG,
    FORMAT,
    POOLS,
    WEIGHTS,
    ConvBackbone,
    FittedHead,
    HeadModel,
    head_backbone,
    pool_features,
    stored_head,
)
from finecam.targets import ids_by_name

log = logging.getLogger(__name__)

RECIPES = ("official", "exact")
VALIDATION = ("val", "valid", "validation", "test")


@dataclass
class _Table:
    """Features (N, D) and labels (N,) of readable, labelled images, and how many were unreadable."""

    features: Tensor
    labels: Tensor
    skipped: int


def fit_head(
    data: str | os.PathLike[str] | ImageDataset,
    backbone: str,
    out: str | os.PathLike[str],
    *,
    val: str | os.PathLike[str] | ImageDataset | None = None,
    pool: str = "mean",
    recipe: str = "official",
    augment: bool = False,
    epochs: int = 20,
    lr: float = 3e-4,
    batch_size: int = 128,
    strength: float = 1.0,
    seed: int = 0,
    workers: int = 0,
    device: torch.device | str = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    on_epoch: Callable[[dict[str, float]], Any] | None = None,
    on_features: Callable[[int, int], None] | None = None,
    **loading: Any,
) -> FittedHead:
    """Train a linear classifier on a labelled data set and store it as a head folder.

    Parameters
    ----------
    data
        Labelled images: a data spec or an open data set. Of a folder with splits, ``train`` is used.
    backbone
        Spec of the frozen backbone.
    out
        Folder for ``config.json`` and ``head.safetensors``.
    val
        Validation images. By default the ``val`` (or ``test``) split beside the training split, else every tenth image
        of each class, held out.
    pool
        ``"mean"`` of the normalised patch tokens (the paper), ``"cls"``, or the model's ``"native"`` pooling.
    recipe
        ``"official"`` or ``"exact"``, see the module's head.
    augment
        Random resized crops and flips in every epoch (official recipe only): slower, as the backbone runs each time.
    epochs, lr, batch_size
        Of the official recipe.
    strength
        Inverse regularisation C of the exact recipe, on standardised features.
    seed
        Of the initial weights, the order and the crops.
    workers, device, cache_dir
        For the features.
    overwrite
        Replace a head that is there. Without it, the same settings find it done and other settings are refused.
    on_epoch, on_features
        Called with each epoch's record, and with (images done, images in all).
    **loading
        Further arguments of `head_backbone` (``pretrained``, ``dtype``, ``offline``).

    Raises
    ------
    UserError
        Unlabelled images, fewer than two classes, a class without an image, validation classes that training lacks,
        a head of other settings without `overwrite`, a folder that cannot be written.
    """
    out = Path(out)
    if recipe not in RECIPES:
        raise unknown_name("recipe", recipe, RECIPES)
    if pool not in POOLS:
        raise unknown_name("pool", pool, POOLS)
    if augment and recipe != "official":
        raise UserError("augmentation needs the official recipe", given=recipe, remedy="use --recipe official")
    train_set, val_set, source = _split(data, val)
    val_set = _check_classes(train_set, val_set)
    trunk = head_backbone(backbone, device=device, **loading)
    pool = "native" if isinstance(trunk, ConvBackbone) else pool
    asked: dict[str, Any] = {
        "backbone": backbone if loading.get("pretrained", True) else f"random:{backbone.removeprefix('random:')}",
        "backbone_fingerprint": trunk.fingerprint(),
        "pool": pool,
        "preprocess": trunk.preprocess.to_dict(),
        "classes": train_set.classes,
        "recipe": {"name": recipe, "augment": augment, "seed": seed}
        | ({"C": strength} if recipe == "exact" else {"epochs": epochs, "lr": lr, "batch_size": batch_size}),
        "data": source,
        "data_fingerprint": [None if part is None else part.fingerprint() for part in (train_set, val_set)],
    }
    if (out / CONFIG).exists() and not overwrite:
        return stored_head(out, asked)
    writable_folder(out)

    def table(dataset: ImageDataset) -> _Table:
        return _features(trunk, dataset, pool, device, batch_size, workers, cache_dir, on_features)

    held = table(val_set) if val_set is not None and len(val_set) else None
    known = table(train_set)
    head = _initial(known.features.shape[1], len(train_set.classes), seed)
    history: dict[str, Any] = {}
    if recipe == "exact":
        _solve(head, known, strength, seed)
    else:
        config = TrainConfig(
            epochs=epochs, lr=lr, optimizer="adam", schedule="constant", batch_size=batch_size, seed=seed
        )
        history = _train(head, trunk, train_set, known, held, pool, augment, config, workers, device, on_epoch)
    right = None if held is None else _right(head, held)
    accuracy = None if right is None else tuple(float(v) for v in metrics.bootstrap_interval(right, seed=seed))
    train_accuracy = float(_right(head, known).mean())
    skipped = known.skipped + (held.skipped if held else 0)
    numbers = {
        "train_accuracy": train_accuracy,
        "val_accuracy": accuracy,
        "val_images": 0 if right is None else len(right),
    }
    found = {"images": len(known.labels), "skipped": skipped, "metrics": numbers, "history": history}
    with writing(out):
        with atomic_write(out / WEIGHTS) as part:
            save_file({k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}, part)
        write_json(out / CONFIG, {"format": FORMAT, "version": 1, **asked, **found})
    return FittedHead(out, len(train_set.classes), len(known.labels), accuracy, train_accuracy, skipped)  # type: ignore[arg-type]


def _split(
    data: str | os.PathLike[str] | ImageDataset, val: str | os.PathLike[str] | ImageDataset | None
) -> tuple[ImageDataset, ImageDataset | None, dict[str, str]]:
    """Training and validation images, and where they came from."""
    text = data.name if isinstance(data, ImageDataset) else os.fspath(data)
    try:
        train_set = data if isinstance(data, ImageDataset) else open_dataset(text)
    except UserError as e:
        if "several splits" not in e.what:
            raise
        train_set = open_dataset(text, split="train")
        for split in VALIDATION if val is None else ():
            with contextlib.suppress(UserError):
                return train_set, open_dataset(text, split=split), {"train": f"{text}@train", "val": split}
    if val is not None:
        val_set = val if isinstance(val, ImageDataset) else open_dataset(val)
        return train_set, val_set, {"train": text, "val": val_set.name}
    held = []
    for c in range(len(train_set.classes)):
        held += np.flatnonzero(np.asarray(train_set.labels) == c)[9::10].tolist()
    rest = np.setdiff1d(np.arange(len(train_set)), held)
    return train_set.subset(rest), train_set.subset(sorted(held)), {"train": text, "val": "every tenth of each class"}


def _check_classes(train_set: ImageDataset, val_set: ImageDataset | None) -> ImageDataset | None:
    """Check that every class can be learned; return the validation images with the training's class ids."""
    labels = np.asarray(train_set.labels)
    if len(train_set.classes) < 2:
        given = f"{len(train_set.classes)} classes"
        remedy = "put the images into one folder per class"
        raise UserError("a head needs two classes", where=train_set.name, given=given, remedy=remedy)
    counts = np.bincount(labels[labels >= 0], minlength=len(train_set.classes))
    if (counts == 0).any():
        empty = [train_set.classes[i] for i in np.flatnonzero(counts == 0)]
        raise UserError("class without a training image", where=train_set.name, given=", ".join(empty[:5]))
    if val_set is None or list(val_set.classes) == list(train_set.classes):
        return val_set
    place = ids_by_name(val_set.classes, train_set.classes)
    if extra := sorted(val_set.classes[i] for i in {int(c) for c in val_set.labels if c >= 0} if place[i] is None):
        given = ", ".join(map(repr, extra[:5]))
        raise UserError("validation classes that training lacks", where=val_set.name, given=given)
    order = np.array([-1 if i is None else i for i in place])
    view = val_set.subset(range(len(val_set)))  # a view of our own: the caller's data set stays as it is
    view.labels, view.classes = np.where(view.labels >= 0, order[view.labels], -1), list(train_set.classes)
    return view


def _features(
    trunk: Any,
    dataset: ImageDataset,
    pool: str,
    device: torch.device | str,
    batch_size: int,
    workers: int,
    cache_dir: str | os.PathLike[str] | None,
    on_features: Callable[[int, int], None] | None,
) -> _Table:
    bad: set[int] = set()

    def skip(i: int, image: str, error: UserError) -> None:
        if i not in bad:
            log.warning("left out: %s", error)
        bad.add(i)

    features = cached_features(
        trunk,
        dataset,
        lambda x: pool_features(trunk, x, pool).float(),
        f"head-{pool}",
        transform=trunk.preprocess,
        cache_dir=cache_dir,
        batch_size=batch_size,
        workers=workers,
        dtype=torch.float32,
        device=device,
        on_error=skip,
        on_progress=on_features,
    )
    labels = torch.as_tensor(np.asarray(dataset.labels))
    usable = torch.tensor([i not in bad and int(labels[i]) >= 0 for i in range(len(labels))], dtype=torch.bool)
    if not usable.any():
        raise UserError("no readable, labelled image", where=dataset.name, remedy="check the files")
    return _Table(features[usable], labels[usable], len(bad))


def _initial(width: int, classes: int, seed: int) -> nn.Linear:
    """A linear layer with torch's initial weights, from a generator of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Linear(width, classes)


def _right(head: nn.Linear, table: _Table) -> np.ndarray:
    with torch.inference_mode():
        weight = head.weight
        logits = torch.cat([head(rows.to(weight.device)).cpu() for rows in table.features.split(4096)])
    return (logits.argmax(1) == table.labels).numpy().astype(np.float64)


def _solve(head: nn.Linear, known: _Table, strength: float, seed: int) -> None:
    """Regularised logistic regression to convergence, on standardised features; the scaling folds into the weights."""
    from sklearn.linear_model import LogisticRegression

    x = known.features.double().numpy()
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-8)
    solver = LogisticRegression(C=strength, max_iter=2000, random_state=seed).fit(
        (x - mean) / scale, known.labels.numpy()
    )
    weight, bias = solver.coef_, solver.intercept_
    if len(weight) == 1:  # two classes share one row in scikit-learn
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scale
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias - weight @ mean))


def _train(
    head: nn.Linear,
    trunk: Any,
    train_set: ImageDataset,
    known: _Table,
    held: _Table | None,
    pool: str,
    augment: bool,
    config: TrainConfig,
    workers: int,
    device: torch.device | str,
    on_epoch: Callable[[dict[str, float]], Any] | None,
) -> dict[str, Any]:
    judged = held or known

    def validate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": float(_right(head, judged).mean())}

    if augment:
        readable = train_set.subset([i for i in range(len(train_set)) if int(train_set.labels[i]) >= 0])
        crop = RandomResizedCrop(trunk.preprocess.size)
        batches: Any = image_batches(
            readable,
            replace(trunk.preprocess, resize="none", crop_pct=1.0),  # the view has the input's size already
            config.batch_size,
            workers=workers,
            augment=crop,
            on_error=lambda i, image, error: None,
        )
        model: nn.Module = HeadModel(trunk, head, pool).to(device)
    else:
        batches = tensor_batches(known.features, known.labels, batch_size=config.batch_size)
        model = head
    history = fit(
        model,
        batches,
        nn.functional.cross_entropy,
        config,
        validate=validate,
        keep_best="accuracy",
        on_epoch=None if on_epoch is None else lambda record: on_epoch(record) and None,
    )
    head.cpu()
    return history.to_dict()


@dataclass(frozen=True)
class RandomResizedCrop:
    """The official training view: a random part (8 to 100 % of the area, aspect 3/4 to 4/3), scaled, flipped or not.

    Parameters
    ----------
    size
        (height, width) of the result.
    """

    size: tuple[int, int]

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Draw one view of `image`; all randomness comes from `generator`."""
        width, height = image.size
        draw = torch.rand(43, generator=generator).tolist()
        box = (0, 0, width, height)
        for i in range(10):  # as in torchvision: ten tries, then the whole picture
            area = width * height * (0.08 + 0.92 * draw[4 * i])
            ratio = float(np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * draw[4 * i + 1]))
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                left, top = int(draw[4 * i + 2] * (width - w + 1)), int(draw[4 * i + 3] * (height - h + 1))
                box = (left, top, left + w, top + h)
                break
        view = image.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC, box=box)
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw[42] < 0.5 else view
