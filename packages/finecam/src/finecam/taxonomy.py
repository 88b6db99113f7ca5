"""Prompt-CAM along the taxonomy: from order to species (arXiv 2501.09333, section 4).

What tells two orders apart differs from what tells two species of a genus apart. Leaves are relabelled by the group
they belong to, and one prompt set is trained per level of the tree (all orders, all families, ...) or, as in a printed
identification key, one per inner node (the children of that node only). The same image, shown to one set after the
other, gives the traits from coarse to fine.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from vfm_core.data import ImageDataset, Sample, Subset
from vfm_core.errors import UserError, unknown_name
from vfm_core.files import write_json

from finecam.promptcam import PromptCAM

if TYPE_CHECKING:
    from vfm_core.backbones import Backbone

__all__ = ["RANKS", "LevelView", "Regrouped", "Taxonomy", "TaxonomyKeys", "train_taxonomy"]

RANKS = ("kingdom", "phylum", "class", "order", "family", "subfamily", "genus", "species")
INDEX = "taxonomy.json"
Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Taxonomy:
    """A tree over the classes of a dataset.

    Attributes
    ----------
    levels : tuple of str
        From broad to fine; the last one is ``species``, whose names are the dataset's classes.
    lineages : mapping of str to tuple of str
        Species -> its group at every level, itself last.

    Raises
    ------
    UserError
        When a group has two parents.
    """

    levels: tuple[str, ...]
    lineages: Mapping[str, Path_]

    def __post_init__(self) -> None:
        parents: dict[tuple[int, str], str] = {}
        for lineage in self.lineages.values():
            for depth in range(1, len(self.levels)):
                parent = parents.setdefault((depth, lineage[depth]), lineage[depth - 1])
                if parent != lineage[depth - 1]:
                    raise UserError(
                        f"{self.levels[depth]} {lineage[depth]} has two parents",
                        where="taxonomy",
                        given=f"{parent} and {lineage[depth - 1]}",
                        remedy="use one name per group",
                    )

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, str]], where: str | Path = "taxonomy") -> Taxonomy:
        """Build from one mapping per species, such as ``{"species": ..., "genus": ..., "family": ...}``.

        Raises
        ------
        UserError
            For a missing species, an empty cell, or a species listed twice.
        """
        columns = set(rows[0]) if rows else set()
        levels = tuple(rank for rank in RANKS if rank in columns)
        if "species" not in levels or len(levels) < 2:
            raise UserError(
                "a taxonomy needs a column species and at least one rank above it",
                where=where,
                given=", ".join(sorted(columns)) or "no rows",
                remedy=f"known ranks: {', '.join(RANKS)}",
            )
        lineages: dict[str, Path_] = {}
        for line, row in enumerate(rows, start=2):
            lineage = tuple((row.get(rank) or "").strip() for rank in levels)
            if "" in lineage:
                raise UserError(f"{levels[lineage.index('')]} is empty", where=f"{where}, line {line}")
            if lineage[-1] in lineages:
                raise UserError("species listed twice", where=f"{where}, line {line}", given=lineage[-1])
            lineages[lineage[-1]] = lineage
        return cls(levels, lineages)

    @classmethod
    def read(cls, path: str | Path) -> Taxonomy:
        """Read a CSV with a header such as ``species,genus,family,order``; other columns are ignored.

        Raises
        ------
        UserError
            For a missing file, see also :meth:`from_rows`.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError("taxonomy not found", given=path, remedy="give a CSV with species,genus,family,order")
        with path.open(newline="", encoding="utf-8-sig") as file:
            return cls.from_rows(list(csv.DictReader(file)), path)

    def lineage(self, species: str) -> Path_:
        """Groups of one species from broad to fine.

        Raises
        ------
        UserError
            Unknown species, with the closest names.
        """
        if species not in self.lineages:
            raise unknown_name("species", species, self.lineages, where="taxonomy")
        return self.lineages[species]

    def units(self, classes: Sequence[str], per: Literal["level", "node"] = "level") -> dict[Path_, list[str | None]]:
        """What to train: per unit, the group of each class, or None where the class does not belong to the unit.

        Parameters
        ----------
        classes : sequence of str
            The dataset's species.
        per : {"level", "node"}
            One unit per level, named ``(level,)``, or one per inner node, named by its path from the root ``()``.

        Returns
        -------
        dict
            Units with at least two groups, from broad to fine.
        """
        lineages = [self.lineage(name) for name in classes]
        found: dict[Path_, list[str | None]] = {}
        for depth, level in enumerate(self.levels):
            if per == "level":
                found[(level,)] = [lineage[depth] for lineage in lineages]
                continue
            for node in dict.fromkeys(lineage[:depth] for lineage in lineages):
                found[node] = [one[depth] if one[:depth] == node else None for one in lineages]
        return {name: groups for name, groups in found.items() if len(set(groups) - {None}) > 1}


class Regrouped(Subset):
    """The pictures of some classes, labelled by the group that their class belongs to.

    Parameters
    ----------
    dataset : ImageDataset
        With species as classes.
    groups : sequence of str or None
        Group of each class; pictures of classes without one are left out.
    """

    def __init__(self, dataset: ImageDataset, groups: Sequence[str | None]) -> None:
        names = sorted({group for group in groups if group is not None})
        group_of = np.array([-1 if group is None else names.index(group) for group in groups], dtype=np.int64)
        labels = np.where(dataset.labels >= 0, group_of[dataset.labels], -1)
        super().__init__(dataset, np.nonzero(labels >= 0)[0])
        self.labels, self.classes = labels[self.indices], names
        self.feature_source = dataset  # the pictures are the whole's, and so are their cached features

    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), label=int(self.labels[index]))

    def identity(self) -> bytes:
        """Return what the subset covers, and the new labels."""
        return super().identity() + self.labels.tobytes() + "\n".join(self.classes).encode()


@dataclass(frozen=True)
class LevelView:
    """What one level says about a batch of B images.

    Attributes
    ----------
    level : str
    groups : list of str
        B predicted groups (or the true ones, where a target was given).
    probability : Tensor
        (B,) of that group; 1 where a node has one child only.
    maps : Tensor
        (B, h, w) mean-head attention of that group's prompt; NaN where there is nothing to tell apart.
    """

    level: str
    groups: list[str]
    probability: Tensor
    maps: Tensor


class TaxonomyKeys:
    """Prompt sets along a tree.

    Parameters
    ----------
    taxonomy : Taxonomy
        The tree.
    models : mapping
        Unit name (see :meth:`Taxonomy.units`) -> PromptCAM.
    per : {"level", "node"}
        What a unit is.
    """

    def __init__(self, taxonomy: Taxonomy, models: Mapping[Path_, PromptCAM], per: Literal["level", "node"]) -> None:
        self.taxonomy, self.models, self.per = taxonomy, dict(models), per

    @torch.no_grad()
    def walk(self, x: Tensor, species: Sequence[str] | None = None) -> list[LevelView]:
        """Show the same images to every level, from broad to fine.

        Parameters
        ----------
        x : Tensor
            (B, 3, H, W).
        species : sequence of str, optional
            B true species: their lineage is shown instead of the predictions.

        Returns
        -------
        list of LevelView
            One per level of the taxonomy.
        """
        truth = None if species is None else [self.taxonomy.lineage(name) for name in species]
        depths = {model.frozen_depth for model in self.models.values()}
        same = len(depths) == 1 and len({id(model.backbone) for model in self.models.values()}) == 1
        first = next(iter(self.models.values()))
        given: Any = first.frozen_tokens(x) if same else x  # one pass through the frozen blocks serves every level
        paths: list[Path_] = [() for _ in range(len(x))]
        views = []
        for depth, level in enumerate(self.taxonomy.levels):
            probability, shown = torch.ones(len(x)), None
            groups = [""] * len(x)
            for unit in dict.fromkeys(paths if self.per == "node" else [(level,)]):
                who = [i for i, path in enumerate(paths) if self.per == "level" or path == unit]
                model = self.models.get(unit)
                if model is None:
                    only = self._children(unit, depth)
                    for i in who:
                        groups[i] = only[0] if truth is None else truth[i][depth]
                    continue
                index = torch.tensor(who)
                part = replace(given, x=given.x[index]) if same else x[index]
                logits = model(part).float()
                wanted = (
                    logits.argmax(dim=1)
                    if truth is None
                    else model.class_ids([truth[i][depth] for i in who]).to(logits.device)
                )
                maps = model.maps(part, wanted[:, None])[:, 0].mean(dim=1).float().cpu()
                shown = maps.new_full((len(x), *maps.shape[1:]), float("nan")) if shown is None else shown
                shown[index] = maps
                probability[index] = logits.softmax(dim=1).gather(1, wanted[:, None])[:, 0].cpu()
                for i, group in zip(who, wanted.tolist()):
                    groups[i] = model.class_names[group]
            grid = first.backbone.grid_size
            shown = torch.full((len(x), *grid), float("nan")) if shown is None else shown
            views.append(LevelView(level, groups, probability, shown))
            paths = [(*path, group) for path, group in zip(paths, groups)]
        return views

    def _children(self, unit: Path_, depth: int) -> list[str]:
        if self.per == "level":
            return sorted({lineage[depth] for lineage in self.taxonomy.lineages.values()})
        return sorted({one[depth] for one in self.taxonomy.lineages.values() if one[:depth] == unit})

    def save(self, directory: str | Path) -> Path:
        """Write one Prompt-CAM folder per unit and an index."""
        directory = Path(directory)
        folders = {}
        for number, (unit, model) in enumerate(self.models.items()):
            folders[f"{number:04d}"] = list(unit)
            model.save(directory / f"{number:04d}")
        lineages = [list(lineage) for lineage in self.taxonomy.lineages.values()]
        index = {"levels": list(self.taxonomy.levels), "per": self.per, "units": folders, "lineages": lineages}
        write_json(directory / INDEX, index)
        return directory

    @classmethod
    def load(cls, directory: str | Path, *, backbone: Backbone | None = None) -> TaxonomyKeys:
        """Read what :meth:`save` wrote; the backbone is loaded once.

        Raises
        ------
        UserError
            For a folder without an index, and as :func:`finecam.promptcam_io.load`.
        """
        directory = Path(directory)
        if not (directory / INDEX).is_file():
            raise UserError("no taxonomy keys here", where=directory, given=f"{INDEX} is missing")
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        taxonomy = Taxonomy(tuple(index["levels"]), {row[-1]: tuple(row) for row in index["lineages"]})
        models: dict[Path_, PromptCAM] = {}
        for folder, unit in index["units"].items():
            models[tuple(unit)] = PromptCAM.load(directory / folder, backbone=backbone)
            backbone = models[tuple(unit)].backbone
        return cls(taxonomy, models, index["per"])


def train_taxonomy(
    dataset: ImageDataset,
    backbone: Backbone,
    taxonomy: Taxonomy,
    *,
    per: Literal["level", "node"] = "level",
    val: ImageDataset | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> TaxonomyKeys:
    """Train one prompt set per level or per inner node.

    Parameters
    ----------
    dataset : ImageDataset
        Classes are species of the taxonomy.
    backbone : Backbone
        Frozen, shared by all units.
    taxonomy : Taxonomy
    per : {"level", "node"}
        See :meth:`Taxonomy.units`.
    val : ImageDataset, optional
        Same classes as ``dataset``; gives the accuracies in the models' ``metrics``.
    out : path, optional
        Where the result is saved.
    **options
        For :func:`finecam.promptcam_train.train_promptcam`. With ``prompt_layers`` below the depth the cached features
        are computed once for all units.

    Returns
    -------
    TaxonomyKeys

    Raises
    ------
    UserError
        For classes that the taxonomy lacks, or when no level has two groups.
    """
    from finecam.promptcam_train import train_promptcam

    units = taxonomy.units(dataset.classes, per)
    if not units:
        raise UserError("nothing to tell apart", where="taxonomy", given=f"{len(dataset.classes)} classes")
    models = {}
    for unit, groups in units.items():
        held_out = None if val is None else Regrouped(val, _same_classes(dataset, val, groups))
        models[unit] = train_promptcam(Regrouped(dataset, groups), backbone, val=held_out, **options)
    kept = {name: taxonomy.lineage(name) for name in dataset.classes}
    keys = TaxonomyKeys(Taxonomy(taxonomy.levels, kept), models, per)
    if out is not None:
        keys.save(out)
    return keys


def _same_classes(dataset: ImageDataset, val: ImageDataset, groups: Sequence[str | None]) -> list[str | None]:
    of = dict(zip(dataset.classes, groups))
    for name in val.classes:
        if name not in of:
            raise unknown_name("class of the validation data", name, of, where=val.name)
    return [of[name] for name in val.classes]
