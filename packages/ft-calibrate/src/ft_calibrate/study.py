"""The embedded study: what fine-tuning on half of the classes breaks, and what repairs it, on glyphs in two domains.

A small network trained on solid glyphs (20 classes) is fine-tuned on outlined, turned and sheared ones of ten classes
only, as in "Fine-Tuning is Fine, if Calibrated" (arXiv 2409.16223), with the remedies of "Holistic Transfer" (arXiv
2311.01420) beside it. Everything is measured on target pictures of all 20 classes that no run has seen. A unit of work
is one seed (other glyphs, other network, other seen classes) and one part; units are independent of each other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from ft_calibrate.classifier import Classifier
    from ft_calibrate.curve import Curve
    from ft_calibrate.tables import LogitTable

VERSION = 1
CLASSES = 20
SEEN = 10
MODEL_SEEDS = (0, 1, 2, 3, 4)
"""Seeds that ``tiny:glyph-cnn`` is shipped for."""

PARTS = ("repair", "remedies", "settings")

REMEDIES = ("lolsgd", "distill", "distill-absent", "rank", "lolsgd+distill", "cosine-head", "seen-loss")
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd, lr 0.01": {"lr": 0.01},
    "sgd, lr 0.2": {"lr": 0.2},
    "adam, lr 1e-4": {"optimizer": "adam", "lr": 1e-4, "backbone_lr_scale": 1.0},
    "adam, lr 1e-3": {"optimizer": "adam", "lr": 1e-3, "backbone_lr_scale": 1.0},
    "adam, lr 1e-2": {"optimizer": "adam", "lr": 1e-2, "backbone_lr_scale": 1.0},
}
HARSH = {"epochs": 60, "lr": 0.2, "backbone_lr_scale": 1.0}
HARSH_SEEN = 3


@dataclass(frozen=True)
class StudySize:
    """How much of the study to run.

    Parameters
    ----------
    seeds : tuple of int
        Of `MODEL_SEEDS`.
    per_class : int
        Target pictures per class, for training and for the test.
    epochs, lr : int, float
        Of every fine-tuning; the backbone learns at a tenth of ``lr``.
    folds : int
        Of pseudo cross-validation.
    parts : tuple of str
        Of `PARTS`.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    per_class: int = 50
    epochs: int = 20
    lr: float = 0.05
    folds: int = 3
    parts: tuple[str, ...] = PARTS

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def units(self) -> list[tuple[int, str]]:
        """Seed and part of every unit, the slowest parts first."""
        return [(seed, part) for part in self.parts for seed in self.seeds]


@dataclass
class Setting:
    """One seed's model and data.

    Attributes
    ----------
    model : Classifier
        Before fine-tuning.
    seen : list of int
        Columns of the seen classes.
    train, oracle, test : tuple of Tensor
        Target pictures and labels: of the seen classes, of all classes, and unseen ones of all classes.
    training : dict
        Arguments of `fine_tune`.
    """

    model: Classifier
    seen: list[int]
    train: tuple[Tensor, Tensor]
    oracle: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def absent(self) -> list[int]:
        """Columns of the absent classes."""
        present = np.union1d(self.seen, self.test[1].numpy())
        return [int(c) for c in present if c not in self.seen]

    def table(self, model: Any, data: tuple[Tensor, Tensor]) -> LogitTable:
        """Logits and features of some of the data."""
        from ft_calibrate.extraction import predict_table

        return predict_table(_classifier(model), data, features=True)


def setting(seed: int, size: StudySize, *, own_shift: bool = False, seen: int = SEEN) -> Setting:
    """Model and data of one seed.

    Parameters
    ----------
    seed : int
        One of `MODEL_SEEDS`; of the glyphs, the network and the choice of seen classes.
    size : StudySize
        Pictures per class and training settings.
    own_shift : bool
        The absent classes change in another way from source to target than the seen ones, which are then the first
        `seen` classes, and the absent ones the last ten.
    seen : int
        Number of seen classes.
    """
    from ft_calibrate.classifier import load_classifier

    oracle = glyph_tensors(seed, "train", size.per_class, own_shift)
    test = glyph_tensors(seed, "test", size.per_class, own_shift)
    if own_shift:
        chosen = list(range(seen))
        rows = np.isin(test[1].numpy(), [*chosen, *range(CLASSES // 2, CLASSES)])
        test = test[0][rows], test[1][rows]
    else:
        chosen = sorted(np.random.default_rng([seed, 1]).permutation(CLASSES)[:seen].tolist())
    rows = np.isin(oracle[1].numpy(), chosen)
    training = {"epochs": size.epochs, "lr": size.lr, "seed": seed}
    model = load_classifier(f"tiny:glyph-cnn?seed={seed}")
    return Setting(model, chosen, (oracle[0][rows], oracle[1][rows]), oracle, test, training)


def glyph_tensors(seed: int, split: str, per_class: int, own_shift: bool = False) -> tuple[Tensor, Tensor]:
    """Target pictures as the network reads them, (N, 3, 16, 16) in [-1, 1], and labels (N,)."""
    import torch
    from tinyworld import Glyphs

    glyphs = Glyphs(per_class, "target", split, seed, own_shift=own_shift)
    pixels = torch.from_numpy(glyphs.images(range(len(glyphs)))).permute(0, 3, 1, 2)
    return (pixels.float() / 127.5 - 1).contiguous(), torch.from_numpy(glyphs.labels)


def run_unit(size: StudySize, unit: tuple[int, str]) -> dict[str, Any]:
    """One seed, one part: rows of numbers, as JSON values."""
    seed, part = unit
    work = {"repair": _repair, "remedies": _remedies, "settings": _settings}
    return work[part](seed, size)


# ---------------------------------------------------------------------- parts
def _repair(seed: int, size: StudySize) -> dict[str, Any]:
    """Before, after, every gamma, and the arms that cost little."""
    from ft_calibrate.classifier import Classifier
    from ft_calibrate.gap import average_logit_gap
    from ft_calibrate.pcv_run import pcv_by_retraining
    from ft_calibrate.recipes import SourceEnsemble, fine_tune, interpolate

    one = setting(seed, size)
    source = measured(one, one.model)
    ft = fine_tune(one.model, one.train, one.seen, "ft", **one.training)
    after = measured(one, ft)
    alg = average_logit_gap(one.table(ft, one.train).logits, one.train[1], one.seen)
    pcv = pcv_by_retraining(one.model, one.train, one.seen, "ft", folds=size.folds, gamma_alg=alg, **one.training)
    assert pcv.ratio is not None  # gamma_alg was given
    arms = {"source": source, "ft": after}
    for name in ("lp", "frozen-head", "lp-ft"):
        arms[name] = measured(one, fine_tune(one.model, one.train, one.seen, name, **one.training))
    for alpha in (0.3, 0.5, 0.7):
        mixed = interpolate(one.model.model, ft.model, alpha)
        arms[f"wise:{alpha}"] = measured(one, mixed)
    both = Classifier(SourceEnsemble(one.model.model, ft.model), f"tuned.{ft.head_name}", None, ft.classes)
    arms["source-ensemble"] = measured(one, both)
    upper = fine_tune(one.model, one.oracle, one.seen, "oracle-ft", **one.training)
    arms["oracle-ft"] = measured(one, upper)
    gammas = {
        "alg": alg,
        "pcv": pcv.pcv.gamma,
        "ratio-pcv": pcv.ratio.gamma,
        "oracle": after["gamma_best"],
    }
    test = one.table(ft, one.test)
    curve = _curve(one, test)
    return {
        "arms": arms,
        "gammas": {name: {"gamma": g, **curve.at(g).to_dict()} for name, g in gammas.items()},
        "folds": {"pcv": list(pcv.pcv.per_fold), "ratio": list(pcv.ratio.multipliers)},
        "heads": _head_change(one, ft),
        "verdict": verdict_of(one, ft),
    }


def _remedies(seed: int, size: StudySize) -> dict[str, Any]:
    """Recipes that hurt less."""
    from ft_calibrate.recipes import fine_tune

    one = setting(seed, size)
    return {
        "arms": {
            name: measured(one, fine_tune(one.model, one.train, one.seen, name, **one.training)) for name in REMEDIES
        }
    }


def _settings(seed: int, size: StudySize) -> dict[str, Any]:
    """Optimisers and learning rates; and the two ways to do harm that no gamma repairs."""
    from ft_calibrate.recipes import fine_tune

    one = setting(seed, size)
    arms = {
        name: measured(one, fine_tune(one.model, one.train, one.seen, "ft", **{**one.training, **options}))
        for name, options in SETTINGS.items()
    }
    harm = {}
    for name, seen, options in (("own shift", CLASSES // 2, {}), ("own shift, harsh", HARSH_SEEN, HARSH)):
        other = setting(seed, size, own_shift=True, seen=seen)
        run = fine_tune(other.model, other.train, other.seen, "ft", **{**other.training, **options})
        harm[name] = {
            "source": measured(other, other.model),
            "ft": measured(other, run),
            "verdict": verdict_of(other, run),
        }
    return {"arms": arms, "harm": harm}


# ---------------------------------------------------------------------- numbers
def measured(one: Setting, model: Any) -> dict[str, float]:
    """Accuracies, area and gammas of a model on the test pictures, as fractions and logit units.

    ``ncm_*`` are nearest-class-mean accuracies with class means from labelled target pictures of all classes, which is
    for diagnosis only; ``gamma_best`` and ``overall_best`` use the test labels (upper bound).
    """
    from ft_calibrate.gap import average_logit_gap
    from ft_calibrate.metrics import accuracy_decomposition
    from ft_calibrate.ncm import ncm_scores

    test, train, reference = (one.table(model, data) for data in (one.test, one.train, one.oracle))
    names = {"Y/Y": "yy", "S/Y": "sy", "U/Y": "uy", "S/S": "ss", "U/U": "uu"}
    options: dict[str, Any] = {"absent": one.absent, "topk": (1,), "remaining": "exclude"}
    raw = accuracy_decomposition(test.logits, test.labels, one.seen, **options)
    near = ncm_scores(test.features, (reference.features, reference.labels), test.logits.shape[1])
    means = accuracy_decomposition(near, test.labels, one.seen, **options)
    curve = _curve(one, test)
    best = curve.best("overall")
    alg = average_logit_gap(train.logits, train.labels, one.seen, one.absent, remaining="exclude")
    at_alg = curve.at(alg)
    return {
        **{short: raw[key] for key, short in names.items()},
        "ausuc": curve.ausuc,
        "ncm_uu": means["U/U"],
        "ncm_uy": means["U/Y"],
        "gamma_alg": alg,
        "alg_yy": at_alg.overall,
        "alg_sy": at_alg.seen,
        "alg_uy": at_alg.unseen,
        "gamma_best": best.gamma,
        "overall_best": best.value,
    }


def _curve(one: Setting, table: LogitTable) -> Curve:
    from ft_calibrate.curve import seen_unseen_curve

    return seen_unseen_curve(table.logits, table.labels, one.seen, one.absent, remaining="exclude")


def verdict_of(one: Setting, run: Any) -> str:
    """What `diagnose` says of a run."""
    return diagnosis_of(one, run).verdict


def diagnosis_of(one: Setting, run: Any, epochs: Any = None) -> Any:
    """The whole diagnosis of a run."""
    from ft_calibrate.diagnosis import diagnose

    return diagnose(
        one.table(run, one.test),
        one.seen,
        before=one.table(one.model, one.test),
        reference=one.table(run, one.oracle),
        reference_before=one.table(one.model, one.oracle),
        train=one.table(run, one.train),
        absent=one.absent,
        head_before=one.model,
        head_after=_classifier(run),
        epochs=epochs,
        remaining="exclude",
    )


def _head_change(one: Setting, model: Any) -> dict[str, float]:
    from ft_calibrate.analyses_head import class_relationship, head_norms, head_weights
    from ft_calibrate.groups import class_groups

    groups = class_groups(CLASSES, one.seen, one.absent)
    before, after = head_weights(one.model), head_weights(_classifier(model))
    change = class_relationship(before, after, groups)
    old, new = head_norms(before, groups), head_norms(after, groups)
    return {
        "cos_U": change.within_U,
        "cos_S": change.within_S,
        "norm_gain_S": new["S"] - old["S"],
        "norm_gain_U": new["U"] - old["U"],
    }


def _classifier(model: Any) -> Classifier:
    """A classifier, that of a run, or one made of a module."""
    from ft_calibrate.classifier import Classifier, load_classifier

    if isinstance(model, Classifier):
        return model
    return getattr(model, "classifier", None) or load_classifier(model)


def folder_of(out: str | Path, seed: int) -> Path:
    """Where the demo keeps logit tables of a seed."""
    return Path(out) / "logits" / f"seed-{seed}"
