"""The experiments of the two papers, as a table: data, source model, splits, training, rows and claims to check.

FTC (arXiv 2409.16223): ImageNet-R, ImageNet-Sketch, Office-Home, VTAB, iWildCam. HT (arXiv 2311.01420): Office-Home,
VTAB and iWildCam too, FEMNIST, iNaturalist. Settings are those of the published code where ``settings_from`` says so;
the others are ours, because no public source that we could read records them; so are M, E, rho and T of LOLSGD, whose
local runs are as long as an epoch of fine-tuning (``steps_per_epoch``). Numbers of the papers are not in here:
they belong into ``reference_cells/NAME.json`` once a person has compared them with the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vfm_core.errors import UserError, unknown_name

__all__ = ["BEST_OF_HT", "EXPERIMENTS", "Case", "Check", "Experiment", "find_experiment"]

Key = tuple[str, str, str]
BEST_OF_HT = "the best of HT's"
"""As the recipe of a `Check`: whichever of HT's own recipes in the table has the greatest number."""


@dataclass(frozen=True)
class Check:
    """A claim as an inequality between two numbers of the table, each (recipe, calibration, column)."""

    claim: str
    left: Key
    relation: str
    right: Key

    def holds(self, left: float, right: float) -> bool:
        """Whether the claim is true of these numbers."""
        return left > right if self.relation == ">" else left < right


@dataclass(frozen=True)
class Case:
    """One target domain.

    Attributes
    ----------
    name : str
        For people and for the folder.
    train, test : str
        Data specs of the target domain.
    source : str or None
        Data spec of the source domain, where the source model is to be trained on it.
    split : str or None
        Name of a reference split; None draws half of the classes that the target's training data have.
    without : str or None
        Group (writer, camera) whose pictures are left out of the source domain.
    remaining : str
        What classes outside S and U do.
    """

    name: str
    train: str
    test: str
    source: str | None = None
    split: str | None = None
    without: str | None = None
    remaining: str = "absent"


@dataclass(frozen=True)
class Experiment:
    """One benchmark.

    Attributes
    ----------
    name, title, paper : str
        For people.
    model : str
        Spec of the source model, or of what it is trained from.
    cases : callable
        ``(root) -> list of Case``.
    training : mapping
        Settings of the fine-tuning.
    source_training : mapping
        Settings of the training on the source domain, where cases have one; the head is then a new one.
    settings_from : str
        Where these settings come from.
    recipes, calibrations : tuple of str
        Rows of the table.
    augment : bool
        Train with the published augmentation of Office-Home.
    image_size : int or None
        Pictures are squashed to this side, in training and test; None keeps the model's own preprocessing.
    checks : tuple of Check
        The paper's qualitative claims.
    """

    name: str
    title: str
    paper: str
    model: str
    cases: Callable[[Path], list[Case]]
    training: Mapping[str, Any]
    source_training: Mapping[str, Any] = field(default_factory=dict)
    settings_from: str = "the published code"
    recipes: tuple[str, ...] = ("ft", "lp", "frozen-head", "lolsgd", "lolsgd+rank")
    calibrations: tuple[str, ...] = ("none", "alg", "pcv", "ratio-pcv", "oracle")
    augment: bool = False
    image_size: int | None = None
    checks: tuple[Check, ...] = ()


# ---------------------------------------------------------------------------------------------------------------- cases
def _office_home(root: Path) -> list[Case]:
    pairs = [("Ar", t) for t in ("Cl", "Pr", "Rw")] + [("Rw", t) for t in ("Ar", "Cl", "Pr")]
    return [
        Case(
            f"{s}-{t}",
            f"office-home:{root}@train?domain={t}",
            f"office-home:{root}@test?domain={t}",
            f"office-home:{root}@all?domain={s}",
            f"office-home:{s}",
        )
        for s, t in pairs
    ]


def _imagenet(*names: str) -> Callable[[Path], list[Case]]:
    """The 800 columns of ImageNet that ImageNet-R lacks do not compete (the published code leaves them in)."""
    modes = {"imagenet-r": "exclude", "imagenet-sketch": "absent"}
    return lambda root: [
        Case(name, f"{name}:{root}@train", f"{name}:{root}@test", split=name, remaining=modes[name]) for name in names
    ]


def _vtab(root: Path) -> list[Case]:
    from vfm_core.data import open_dataset

    from ft_calibrate.readers.vtab_tasks import TASKS

    cases = []
    for task in TASKS:
        spec = f"vtab:{root}@{{}}?task={task}"
        try:
            open_dataset(spec.format("test"))
        except UserError:  # tasks that are not there are left out; none at all is an error below
            continue
        cases.append(Case(task, spec.format("train"), spec.format("test")))
    if not cases:
        raise UserError("no task of VTAB found", where=root, remedy="see the reader's text on vtab: for the layout")
    return cases


def _iwildcam(root: Path) -> list[Case]:
    held_out = f"iwildcam:{root}@test"  # its cameras are not in the train split
    return [
        Case(
            f"location-{group}",
            f"iwildcam:{root}@train?location={group}&by=class",
            f"iwildcam:{root}@test?location={group}&by=class",
            f"iwildcam:{root}@train",
        )
        for group in _richest(held_out, 3)
    ]


def _femnist(root: Path) -> list[Case]:
    return [
        Case(
            f"writer-{group}",
            f"femnist:{root}@train?writer={group}",
            f"femnist:{root}@test?writer={group}",
            f"femnist:{root}@train",
            without=group,
        )
        for group in _richest(f"femnist:{root}@train", 5)
    ]


def _inat(root: Path) -> list[Case]:
    spec = f"inat:{root}@{{}}?supercategory=Fungi"
    return [Case("fungi", spec.format("train"), spec.format("val"))]


def _richest(spec: str, number: int) -> list[str]:
    """The groups (cameras, writers) with the most classes, then the most pictures (our choice: none is recorded)."""
    from vfm_core.data import open_dataset

    data = open_dataset(spec)
    classes: dict[str, set[int]] = {}
    pictures: dict[str, int] = {}
    for i, label in enumerate(data.labels):
        group = str(data.meta_of(i).get("group"))
        classes.setdefault(group, set()).add(int(label))
        pictures[group] = pictures.get(group, 0) + 1
    order = sorted(classes, key=lambda g: (-len(classes[g]), -pictures[g], g))
    return [g for g in order if len(classes[g]) >= 4][:number] or order[:1]


# --------------------------------------------------------------------------------------------------------------- claims
def _source(column: str) -> Key:
    return ("source", "none", column)


def _ft(column: str, calibration: str = "none", recipe: str = "ft") -> Key:
    return (recipe, calibration, column)


COLLAPSE = (
    Check("fine-tuning lowers the head's accuracy on absent classes", _ft("U/Y"), "<", _source("U/Y")),
    Check("ALG raises the overall accuracy of the fine-tuned model", _ft("Y/Y", "alg"), ">", _ft("Y/Y")),
    Check("ALG raises the accuracy on absent classes", _ft("U/Y", "alg"), ">", _ft("U/Y")),
)
FEATURES = (
    Check("features for absent classes improve (NCM)", _ft("NCM U/Y"), ">", _source("NCM U/Y")),
    Check("the order among absent classes improves", _ft("U/U"), ">", _source("U/U")),
    Check("fine-tuning, calibrated, beats HT's best (AUSUC)", _ft("AUSUC"), ">", _ft("AUSUC", recipe=BEST_OF_HT)),
    Check("fine-tuning beats the frozen classifier (AUSUC)", _ft("AUSUC"), ">", _ft("AUSUC", recipe="frozen-head")),
    Check("fine-tuning beats linear probing (AUSUC)", _ft("AUSUC"), ">", _ft("AUSUC", recipe="lp")),
    Check("fine-tuning beats the frozen classifier (NCM)", _ft("NCM U/Y"), ">", _ft("NCM U/Y", recipe="frozen-head")),
    Check("fine-tuning beats linear probing (NCM)", _ft("NCM U/Y"), ">", _ft("NCM U/Y", recipe="lp")),
)
FAILURE = (
    COLLAPSE[0],
    Check("features for absent classes are damaged (NCM)", _ft("NCM U/Y"), "<", _source("NCM U/Y")),
    Check("AUSUC falls", _ft("AUSUC"), "<", _source("AUSUC")),
)
TRANSFER = (
    COLLAPSE[0],
    Check("fine-tuning raises the accuracy on seen classes", _ft("S/Y"), ">", _source("S/Y")),
    Check("LOLSGD keeps more of the missing classes", _ft("U/Y", recipe="lolsgd"), ">", _ft("U/Y")),
)
HT_RECIPES = (
    "ft",
    "lp",
    "frozen-head",
    "distill",
    "rank",
    "swa",
    "lolsgd",
    "lolsgd+distill",
    "lolsgd+rank",
    "wise:0.5",
    "source-ensemble",
)

# ---------------------------------------------------------------------------------------------------------------- table
_SGD: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 1e-3,
    "backbone_lr_scale": 0.1,
    "momentum": 0.9,
    "batch_size": 64,
    "steps_per_epoch": 500,
}
_OFFICE = {**_SGD, "weight_decay": 5e-4, "epochs": 20}
_IMAGENET = {**_SGD, "weight_decay": 1e-4, "epochs": 50}
_CLIP = {**_SGD, "lr": 1e-4, "weight_decay": 1e-4, "epochs": 20, "steps_per_epoch": None}
_CAMERA = {**_SGD, "weight_decay": 5e-4, "epochs": 20, "steps_per_epoch": None}
_OURS = "ours: not recorded in a public source"
_FTC, _HT = "FTC (arXiv 2409.16223)", "HT (arXiv 2311.01420)"

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        Experiment(
            "office-home",
            "Office-Home, six pairs of domains, 30 seen and 35 absent classes",
            _FTC,
            "timm:resnet50.tv_in1k",
            _office_home,
            _OFFICE,
            _OFFICE,
            augment=True,
            image_size=224,
            checks=COLLAPSE + FEATURES,
        ),
        Experiment(
            "imagenet-r",
            "ImageNet-R, 100 seen and 100 absent classes; the other 800 columns do not compete",
            _FTC,
            "timm:resnet50.tv_in1k",
            _imagenet("imagenet-r"),
            _IMAGENET,
            checks=COLLAPSE + FEATURES,
        ),
        Experiment(
            "imagenet-sketch",
            "ImageNet-Sketch, 500 seen and 500 absent classes",
            _FTC,
            "timm:resnet50.tv_in1k",
            _imagenet("imagenet-sketch"),
            _IMAGENET,
            checks=COLLAPSE + FEATURES,
        ),
        Experiment(
            "imagenet-rs",
            "ImageNet-R and ImageNet-Sketch, and their mean",
            _FTC,
            "timm:resnet50.tv_in1k",
            _imagenet("imagenet-r", "imagenet-sketch"),
            _IMAGENET,
            checks=COLLAPSE + FEATURES,
        ),
        Experiment(
            "vtab",
            "VTAB tasks, CLIP ViT-B/32 with a head of class prompts, half of the classes seen",
            _FTC,
            "open_clip:ViT-B-32@openai",
            _vtab,
            _CLIP,
            settings_from=_OURS,
            checks=COLLAPSE + FEATURES,
        ),
        Experiment(
            "iwildcam",
            "iWildCam, one camera as target domain, half of its classes seen: where features get worse",
            _FTC,
            "timm:resnet50.tv_in1k",
            _iwildcam,
            _CAMERA,
            _CAMERA,
            settings_from=_OURS,
            checks=FAILURE,
        ),
        Experiment(
            "femnist",
            "FEMNIST, one writer as target domain, half of the characters seen",
            _HT,
            "random:timm:resnet18",
            _femnist,
            {**_CAMERA, "batch_size": 32},
            {**_CAMERA, "lr": 1e-1, "backbone_lr_scale": 1.0},
            settings_from=_OURS,
            recipes=HT_RECIPES,
            image_size=32,
            checks=TRANSFER,
        ),
        Experiment(
            "inat",
            "iNaturalist 2021 Fungi, CLIP ViT-B/32 with a head of class prompts, half of the species seen",
            _HT,
            "open_clip:ViT-B-32@openai",
            _inat,
            _CLIP,
            settings_from=_OURS,
            recipes=HT_RECIPES,
            checks=TRANSFER,
        ),
    )
}
"""What ``ft-calibrate reproduce`` knows."""


def find_experiment(name: str) -> Experiment:
    """Return an experiment by name.

    Raises
    ------
    UserError
        Unknown name.
    """
    if name not in EXPERIMENTS:
        raise unknown_name("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]
