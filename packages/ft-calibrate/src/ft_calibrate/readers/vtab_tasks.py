"""The tasks of ``vtab:``: where torchvision expects each, how its classes are called in prompts, and the prompts.

Class names are changed from torchvision's only to read well in a sentence. Prompt templates are in the style of CLIP's
published ones (Radford et al. 2021): the words in front say what kind of picture it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vfm_core.errors import UserError, unknown_name

from ft_calibrate.class_names import plain_name

__all__ = ["TASKS", "Task", "find_task", "prompt_templates"]

_PHOTO = ("a photo of a {}.", "a photo of the {}.")


@dataclass(frozen=True)
class Task:
    """One task of VTAB, or a neighbour of it that torchvision has.

    Attributes
    ----------
    name : str
        What ``?task=`` says.
    templates : tuple of str
        Prompts, each with one ``{}`` for the class name.
    torchvision : str or None
        Class in ``torchvision.datasets``; None where it has none.
    home : str
        Path below the root that torchvision's layout has; what to put there is in ``holds``.
    holds : str
        The files or archive that belong there.
    splits : mapping
        Our split -> torchvision's ``split`` (or ``train``) argument; empty where the data have none.
    labels, files : str
        Attributes of the torchvision dataset: labels, and picture paths ("" where pictures are inside other files).
    classes : str or tuple of str
        Attribute with the class names, or the names.
    names : mapping
        Class name -> its words for prompts.
    first : int
        Label of the first class.
    aliases : tuple of str
        Other names, such as those of TensorFlow Datasets.
    """

    name: str
    templates: tuple[str, ...] = _PHOTO
    torchvision: str | None = None
    home: str = ""
    holds: str = ""
    splits: Mapping[str, str] = field(default_factory=dict)
    labels: str = "_labels"
    files: str = "_image_files"
    classes: str | tuple[str, ...] = "classes"
    names: Mapping[str, str] = field(default_factory=dict)
    first: int = 0
    aliases: tuple[str, ...] = ()

    def load(self, root: Path, split: str) -> Any:
        """Open the torchvision dataset of one of our splits (``""`` where there are none); never downloads."""
        import torchvision.datasets

        factory: Callable[..., Any] = getattr(torchvision.datasets, str(self.torchvision))
        if self.torchvision == "CIFAR100":
            return factory(str(root), train=split == "train", download=False)
        return factory(str(root), **({"split": self.splits[split]} if split else {}), download=False)

    def labels_of(self, data: Any) -> np.ndarray:
        """Labels 0 to K - 1 of a torchvision dataset, without decoding a picture."""
        if self.torchvision == "PCAM":
            table = data._base_folder / data._FILES[data._split]["targets"][0]
            with data.h5py.File(table) as file:
                return np.asarray(file["y"][:], dtype=np.int64).reshape(-1)
        return np.asarray(getattr(data, self.labels), dtype=np.int64).reshape(-1) - self.first

    def files_of(self, data: Any) -> list[Path] | None:
        """Picture files of a torchvision dataset, in order; None where pictures are inside other files."""
        if self.torchvision == "Caltech101":
            folder = Path(data.root) / "101_ObjectCategories"
            numbered = zip(data.y, data.index, strict=True)
            return [folder / data.categories[y] / f"image_{number:04d}.jpg" for y, number in numbered]
        if not self.files:
            return None
        found = getattr(data, self.files)
        return [Path(f[0] if isinstance(f, tuple) else f) for f in found]

    def class_names(self, data: Any) -> list[str]:
        """Class names of a torchvision dataset in words for prompts."""
        own = self.classes if isinstance(self.classes, tuple) else getattr(data, self.classes)
        return [self.names.get(name, str(name).replace("_", " ").replace("/", " ")) for name in own]


_EUROSAT = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings",
    "River": "river",
    "SeaLake": "lake or sea",
}
_CALTECH = {"Faces": "face", "Faces_easy": "centered face", "Leopards": "leopard", "Motorbikes": "motorbike"}
_CALTECH |= {"airplanes": "airplane", "car_side": "side of a car"}
_STANDARD = {"train": "train", "val": "val", "test": "test"}

_TASKS = (
    Task(
        "caltech101",
        torchvision="Caltech101",
        home="caltech101/101_ObjectCategories",
        holds="the class folders of 101_ObjectCategories.tar.gz, with BACKGROUND_Google",
        labels="y",
        classes="categories",
        names=_CALTECH,
    ),
    Task(
        "cifar100",
        torchvision="CIFAR100",
        home="cifar-100-python",
        holds="the files train, test and meta of cifar-100-python.tar.gz",
        splits={"train": "train", "test": "test"},
        labels="targets",
        files="",
        aliases=("cifar",),
    ),
    Task(
        "dtd",
        ("a photo of a {} texture.", "a photo of a {} pattern."),
        torchvision="DTD",
        home="dtd/dtd",
        holds="the folders images and labels of dtd-r1.0.1.tar.gz",
        splits=_STANDARD,
    ),
    Task(
        "flowers102",
        ("a photo of a {}, a type of flower.",),
        torchvision="Flowers102",
        home="flowers-102/jpg",
        holds="the pictures of 102flowers.tgz, and beside jpg the files imagelabels.mat and setid.mat",
        splits=_STANDARD,
        aliases=("oxford_flowers102", "flowers"),
    ),
    Task(
        "pets",
        ("a photo of a {}, a type of pet.",),
        torchvision="OxfordIIITPet",
        home="oxford-iiit-pet/annotations",
        holds="the folders images and annotations of the two archives",
        splits={"train": "trainval", "test": "test"},
        files="_images",
        aliases=("oxford_iiit_pet", "pet"),
    ),
    Task(
        "sun397",
        torchvision="SUN397",
        home="SUN397",
        holds="the content of SUN397.tar.gz, ClassName.txt and the folders a to z",
        aliases=("sun",),
    ),
    Task(
        "svhn",
        ('a photo of a street number: "{}".', 'a house number with the digit "{}".'),
        torchvision="SVHN",
        home="train_32x32.mat",
        holds="the file train_32x32.mat, and beside it test_32x32.mat",
        splits={"train": "train", "test": "test", "extra": "extra"},
        labels="labels",
        files="",
        classes=tuple("0123456789"),
        aliases=("svhn_cropped",),
    ),
    Task(
        "eurosat",
        ("a centered satellite photo of {}.",),
        torchvision="EuroSAT",
        home="eurosat/2750",
        holds="the class folders of EuroSAT.zip",
        labels="targets",
        files="samples",
        names=_EUROSAT,
    ),
    Task(
        "pcam",
        ("this is a photo of {}.",),
        torchvision="PCAM",
        home="pcam",
        holds="the unpacked files camelyonpatch_level_2_split_*_{x,y}.h5 (reading them needs h5py)",
        splits=_STANDARD,
        files="",
        classes=("lymph node", "lymph node containing metastatic tumor tissue"),
        aliases=("patch_camelyon",),
    ),
    Task(
        "clevr_count",
        ("a photo of {} objects.",),
        torchvision="CLEVRClassification",
        home="clevr/CLEVR_v1.0",
        holds="the folders images and scenes of CLEVR_v1.0.zip",
        splits={"train": "train", "test": "val"},
        classes=("3", "4", "5", "6", "7", "8", "9", "10"),
        first=3,
        aliases=("clevr", "clevr_count_all"),
    ),
    Task(
        "fgvc_aircraft",
        ("a photo of a {}, a type of aircraft.",),
        torchvision="FGVCAircraft",
        home="fgvc-aircraft-2013b",
        holds="the content of fgvc-aircraft-2013b.tar.gz",
        splits={"train": "train", "val": "val", "trainval": "trainval", "test": "test"},
        aliases=("aircraft",),
    ),
    Task("resisc45", ("satellite imagery of {}.", "an aerial photo of {}.")),
    Task("diabetic_retinopathy", ("a retinal image with {}.",), aliases=("retinopathy",)),
    Task("clevr_distance", ("{} shapes.",), aliases=("clevr_closest_object_distance",)),
    Task("dmlab", ("{}.",)),
    Task("dsprites_location", ("an object at {} of the width.",), aliases=("dsprites_label_x_position",)),
    Task("dsprites_orientation", ("an object rotated by {}.",), aliases=("dsprites_label_orientation",)),
    Task("smallnorb_azimuth", ("an object seen from an azimuth of {}.",), aliases=("smallnorb_label_azimuth",)),
    Task("smallnorb_elevation", ("an object seen from an elevation of {}.",), aliases=("smallnorb_label_elevation",)),
    Task("kitti_distance", ("{}.",), aliases=("kitti", "kitti_closest_vehicle_distance")),
)
TASKS = {task.name: task for task in _TASKS}
"""All tasks by name: the 19 of VTAB and FGVC-Aircraft."""


def find_task(name: str) -> Task:
    """Return a task by its name or an alias, however it is spelled.

    Raises
    ------
    UserError
        Unknown.
    """
    for task in _TASKS:
        if plain_name(name) in map(plain_name, (task.name, *task.aliases, task.torchvision or task.name)):
            return task
    raise unknown_name("task", name, TASKS, where="?task=")


def prompt_templates(task: str) -> tuple[str, ...]:
    """Return the prompts of a task, each with one ``{}`` where the class name goes.

    Raises
    ------
    UserError
        Unknown task.

    Examples
    --------
    >>> prompt_templates("pets")
    ('a photo of a {}, a type of pet.',)
    """
    return find_task(name=task).templates


def check_templates(templates: Sequence[str], where: str | Path) -> tuple[str, ...]:
    """Return the templates.

    Raises
    ------
    UserError
        None, or one without exactly one ``{}``.
    """
    if not templates:
        raise UserError("no prompt template", where=where, remedy="write one a line, such as: a photo of a {}.")
    for template in templates:
        if template.count("{}") != 1:
            raise UserError("a prompt template must hold {} once", where=where, given=repr(template))
    return tuple(templates)
