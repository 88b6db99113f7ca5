"""Series over the epochs of a fine-tuning: logit scale (A3), margin (A5), head norms (A6), feature movement (A7).

FTC (arXiv 2409.16223) plots these four per epoch. `EpochLog` is a callable for the ``validate`` argument of
`ft_calibrate.recipes.fine_tune`: it looks at the model before training and after every epoch, changes nothing, and
returns a flat dict of floats that becomes part of the run's history. Averages at the end (``wise``, ``swa``, an
ensemble) are looked at once more, under the epoch of the last weights and a stage of their own; `series` leaves them
out.

Keys (of what the data define): ``logit_scale/<split>/<name>`` (names of `LOGIT_SCALE`),
``margin/test/{true,largest_other,margin}``,
``head_norm/{S,U}``, ``distance/<split>/<group>/<target>`` (16) and ``movement/<split>/<group>`` (6, from the second
look on), and ``accuracy/{Y/Y,S/Y,U/Y,S/S,U/U}``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError
from vfm_core.files import atomic_write

from ft_calibrate.analyses import ground_truth_margin, logit_scale
from ft_calibrate.analyses_features import class_mean_movement, class_means_of, feature_distances
from ft_calibrate.analyses_head import head_norms, head_weights
from ft_calibrate.groups import ClassGroups, class_groups

if TYPE_CHECKING:
    from torch import nn

    from ft_calibrate.classifier import Classifier
    from ft_calibrate.tables import LogitTable

log = logging.getLogger(__name__)

SERIES = ("logit_scale/", "margin/", "head_norm/", "distance/", "movement/", "accuracy/")
"""Beginnings of the keys of an `EpochLog`."""

Means = dict[str, NDArray[np.float64]]  # class means of each split


class EpochLog:
    """Record the analyses of every epoch; pass it as ``fine_tune(..., validate=EpochLog(...))``.

    Parameters
    ----------
    seen, absent
        As in `class_groups`, in terms of ``classes``, or `ClassGroups` as ``seen``.
    classes
        Names or number of the K columns; not needed with `ClassGroups`.
    test
        Labelled target test data of all classes: ``(images, labels)`` tensors or an `ImageDataset`.
    train
        Target training data of all classes, for the series of training samples; diagnosis only, because it uses labels
        of absent classes. May hold S alone: the series of U are then NaN. None leaves them out.
    remaining
        See `ClassGroups.moved`.
    classifier
        Where images need preprocessing, class names or a named head: a `Classifier` of the model that is trained. Its
        weights are not used.
    batch_size, workers, device, on_error
        As for `predict_table`; device None: the model's own.
    keep
        A ``.npz`` file for class means, so that the movement series of a resumed run goes on where it was interrupted.

    Attributes
    ----------
    records
        One dict per look, with ``epoch``.
    """

    def __init__(
        self,
        seen: Any,
        test: Any,
        *,
        classes: int | Sequence[str] | None = None,
        absent: Any = None,
        train: Any = None,
        remaining: str = "absent",
        classifier: Classifier | None = None,
        batch_size: int = 256,
        workers: int = 0,
        device: Any = None,
        on_error: Callable[[int, str, UserError], None] | None = None,
        keep: str | Path | None = None,
    ) -> None:
        if isinstance(seen, ClassGroups):
            self.groups = seen
        elif classes is None:
            raise UserError(
                "the classes are unknown", where="EpochLog", remedy="give classes, by names or their number"
            )
        else:
            self.groups = class_groups(classes, seen, absent)
        self.test, self.train, self.remaining, self.classifier = test, train, remaining, classifier
        self.batch_size, self.workers, self.device, self.on_error = batch_size, workers, device, on_error
        self.keep = None if keep is None else Path(keep)
        self.records: list[dict[str, Any]] = []
        self._looks: dict[str, Means] = {}  # "first", "previous" and "last"
        self._epoch = -1

    def __call__(
        self, model: nn.Module | Classifier, epoch: int | None = None, stage: str | None = None
    ) -> dict[str, float]:
        """Look at the model and return the flat dict; it is appended to `records` with its epoch and stage.

        Parameters
        ----------
        model
            A module whose forward gives K logits, or a `Classifier`. Its mode is restored.
        epoch
            Number of finished epochs; default: one more than the last look's, from 0.
        stage
            Part of the recipe that made the model; `fine_tune` gives both.
        """
        classifier = self._as_classifier(model)
        test = self._look(classifier, self.test)
        train = None if self.train is None else self._look(classifier, self.train)
        values = table_series(test, train, self.groups, self.remaining)
        norms = head_norms(head_weights(classifier), self.groups)
        values |= {f"head_norm/{group}": value for group, value in norms.items()}
        means = class_means_of(_split(train), _features(test), self.groups)
        previous = self._turn_to(means, epoch)
        if previous:
            moved = class_mean_movement(previous, means, self.groups)
            values |= {f"movement/{name}": value for name, value in moved.items()}
        values = {key: value for key, value in values.items() if value == value}  # what is undefined has no key
        self.records.append({"epoch": self._epoch, **({} if stage is None else {"stage": stage}), **values})
        return values

    def _look(self, classifier: Classifier, data: Any) -> LogitTable:
        from ft_calibrate.extraction import predict_table

        modes = [(module, module.training) for module in classifier.model.modules()]
        device = self.device
        if device is None:
            parameter = next(classifier.model.parameters(), None)
            device = "cpu" if parameter is None else parameter.device
        try:
            return predict_table(
                classifier,
                data,
                batch_size=self.batch_size,
                workers=self.workers,
                device=device,
                on_error=self.on_error,
                features=True,
            )
        finally:
            for module, training in modes:
                module.training = training

    def _turn_to(self, means: Means, epoch: int | None) -> Means | None:
        """Note this look's class means and return those of the look before.

        A killed run may repeat its last look, or start afresh beside an old file; both are known by equal means.
        """
        if not self.records:
            self._recall()
        looks = self._looks
        if not self.records and looks and _equal(means, looks["last"]):
            pass
        elif not looks or (not self.records and _equal(means, looks["first"])):
            looks, self._epoch = {"first": means, "previous": {}, "last": means}, 0
        else:
            looks = {"first": looks["first"], "previous": looks["last"], "last": means}
            self._epoch += 1
        self._looks = looks
        if epoch is not None:
            self._epoch = epoch
        if self.keep is not None:
            arrays = {f"{look}/{split}": a for look, of in looks.items() for split, a in of.items()}
            with atomic_write(self.keep) as temporary, temporary.open("wb") as file:
                np.savez(file, epoch=np.asarray(self._epoch), **arrays)  # type: ignore[arg-type]
        return looks["previous"] or None

    def _recall(self) -> None:
        if self.keep is None or not self.keep.exists():
            return
        looks: dict[str, Means] = {"first": {}, "previous": {}, "last": {}}
        try:
            with np.load(self.keep, allow_pickle=False) as kept:
                self._epoch = int(kept["epoch"])
                for name in kept.files:
                    look, found, split = name.partition("/")
                    if found:
                        looks[look][split] = kept[name]
        except (OSError, ValueError, KeyError) as e:
            log.warning("the class means of the last epoch cannot be read from %s: %s", self.keep, e)
            return
        self._looks = looks

    def _as_classifier(self, model: Any) -> Classifier:
        if hasattr(model, "features_and_logits"):
            return model
        if self.classifier is not None:
            return classifier_of(model, self.classifier)
        from ft_calibrate.classifier import load_classifier
        from ft_calibrate.recipes.averaging import SourceEnsemble

        parameter = next(model.parameters(), None)
        device = "cpu" if parameter is None else parameter.device
        if isinstance(model, SourceEnsemble):  # has two heads: the features are the tuned model's
            return classifier_of(model, load_classifier(model.tuned, device=device))
        return load_classifier(model, device=device)


def classifier_of(model: nn.Module, like: Classifier) -> Classifier:
    """A classifier of a model in training: its head has the name in ``like``, or that within an ensemble.

    Parameters
    ----------
    model
        Whose forward gives K logits.
    like
        Preprocessing, class names and head of the model before.
    """
    names = dict(model.named_modules(remove_duplicate=False))
    tuned = f"tuned.{like.head_name}" if like.head_name else "tuned"
    name = next((n for n in (tuned, like.head_name) if n in names), "")
    return dataclasses.replace(like, model=model, head_name=name, _fingerprint=None)


def without_series(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of a history without the series of an `EpochLog`."""
    return {key: value for key, value in record.items() if not key.startswith(SERIES)}


def table_series(
    test: LogitTable, train: LogitTable | None, groups: ClassGroups, remaining: str = "absent"
) -> dict[str, float]:
    """The values of one model that need no second one: logit scale, margin, accuracy, and distances with features.

    Parameters
    ----------
    test, train
        Labelled tables of one model; ``train`` may be None. Distances are left out when the test has no features.
    """
    from ft_calibrate.metrics import accuracy_decomposition

    values: dict[str, float] = {}
    for split, table in (("test", test), ("train", train)):
        if table is not None and table.labels is not None:
            scale = logit_scale(table.logits, table.labels, groups, remaining)
            values |= {f"logit_scale/{split}/{name}": value for name, value in scale.items()}
    margin = ground_truth_margin(test.logits, test.labels, groups, remaining)
    values |= {f"margin/test/{name}": value for name, value in margin.items()}
    accuracy = accuracy_decomposition(test.logits, test.labels, groups, topk=(1,), remaining=remaining)
    values |= {f"accuracy/{name}": accuracy[name] for name in ("Y/Y", "S/Y", "U/Y", "S/S", "U/U")}
    if test.features is not None:
        distances = feature_distances(_split(train), _features(test), groups)
        values |= {f"distance/{name}": value for name, value in distances.items()}
    return values


def series(records: Iterable[Mapping[str, Any]], prefix: str) -> tuple[list[float], dict[str, list[float]]]:
    """Epochs and, for each key that starts with ``prefix`` + "/", its values; NaN where an epoch lacks it.

    Parameters
    ----------
    records
        `EpochLog.records` or the history of a run; nested dicts are looked into once. Records without such a key are
        left out, and so are further ones of the same epoch: averages at the end of a training.
    prefix
        Such as ``"head_norm"`` or ``"logit_scale/test"``.
    """
    flat = [_flat(record) for record in records]
    rows = [(float(r.get("epoch", i)), r) for i, r in enumerate(flat) if any(k.startswith(prefix + "/") for k in r)]
    rows = [row for i, row in enumerate(rows) if row[0] not in {epoch for epoch, _ in rows[:i]}]
    names = list(dict.fromkeys(k for _, r in rows for k in r if k.startswith(prefix + "/")))
    nan = float("nan")
    lines = {k[len(prefix) + 1 :]: [nan if (v := r.get(k)) is None else float(v) for _, r in rows] for k in names}
    return [epoch for epoch, _ in rows], lines


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(record)
    for value in record.values():
        if isinstance(value, Mapping):
            flat |= value
    return flat


def _features(table: LogitTable) -> tuple[Any, Any]:
    if table.features is None or table.labels is None:
        raise UserError("features and labels are needed", where=table.path, remedy="extract them with --features")
    return table.features, table.labels


def _split(table: LogitTable | None) -> tuple[Any, Any] | None:
    if table is None or table.features is None or table.labels is None:
        return None
    return table.features, table.labels


def _equal(a: Means, b: Means) -> bool:
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and np.allclose(a[k], b[k], rtol=0, atol=1e-9, equal_nan=True) for k in a
    )
