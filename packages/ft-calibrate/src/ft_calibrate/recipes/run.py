"""A finished training: the model, how it came about, and the folder that holds both.

A run folder is a `vfm_core.runs.RunDir` with two more files: ``model.safetensors``, the weights, and
``ft_calibrate.json``, which says what they are the weights of: recipe, settings, classes, seen classes, head, history,
and the spec of the source model. The second is written last: where it is, the run is complete.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vfm_core.errors import UserError
from vfm_core.files import atomic_write, write_json
from vfm_core.preprocess import Preprocess

from ft_calibrate.classifier import Classifier, find_head, load_classifier
from ft_calibrate.recipes.averaging import SourceEnsemble
from ft_calibrate.recipes.heads import cosine_head_from

__all__ = ["RUN_FILE", "WEIGHTS_FILE", "Run", "Structure", "load_run", "replace_head"]

RUN_FILE, WEIGHTS_FILE = "ft_calibrate.json", "model.safetensors"
_VERSION = 1


@dataclass(frozen=True)
class Structure:
    """How the trained model differs in structure from its source.

    Attributes
    ----------
    cosine_head : bool
        Its head is a `CosineHead`.
    ensemble : {"softmax", "logit"} or None
        It is a `SourceEnsemble`.
    """

    cosine_head: bool = False
    ensemble: str | None = None

    def build(self, source: nn.Module, head_name: str) -> nn.Module:
        """Make a model of this structure from a copy of the source; the weights are to be loaded into it."""
        model = copy.deepcopy(source)
        if self.cosine_head:
            replace_head(model, head_name, cosine_head_from(model.get_submodule(head_name), 1.0))
        return SourceEnsemble(copy.deepcopy(source), model, self.ensemble) if self.ensemble else model

    def head_name(self, name: str) -> str:
        """Dotted name of the head in such a model, given that in the source."""
        return (f"tuned.{name}" if name else "tuned") if self.ensemble else name


def replace_head(model: nn.Module, name: str, head: nn.Module) -> None:
    """Put another head in the place of a model's head.

    Raises
    ------
    UserError
        The model is itself the head.
    """
    if not name:
        raise UserError("a model that is its own head cannot get another", remedy="wrap it in nn.Sequential")
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, head)


@dataclass(eq=False)
class Run:
    """What `fine_tune` returns.

    Attributes
    ----------
    model : nn.Module
        Gives K logits; in eval mode.
    recipe : str
        Canonical name.
    history : list of dict
        One record per epoch; the first is epoch 0, before training. ``stage`` says which part of the recipe.
    settings : dict
        Everything that decided the result.
    classes : list of str
        Names of the K columns.
    seen : list of str
        Names of the seen classes.
    head_name : str
        Dotted name of the head in ``model``.
    out : Path or None
        The run folder.
    preprocess : Preprocess or None
        From a picture to the model's input.
    source : dict
        How to load the source model again: arguments of `load_classifier`; empty for a module of one's own.
    structure : Structure
        How the model differs from the source.
    """

    model: nn.Module
    recipe: str
    history: list[dict[str, Any]]
    settings: dict[str, Any]
    classes: list[str]
    seen: list[str]
    head_name: str
    out: Path | None = None
    preprocess: Preprocess | None = None
    source: dict[str, Any] = field(default_factory=dict)
    structure: Structure = field(default_factory=Structure)

    @property
    def classifier(self) -> Classifier:
        """The model with its head, preprocessing and class names."""
        spec = str(self.out) if self.out is not None else f"{self.source.get('spec', 'model')} after {self.recipe}"
        return Classifier(self.model, self.head_name, self.preprocess, list(self.classes), spec)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields: all but the model."""
        return {
            "version": _VERSION,
            "recipe": self.recipe,
            "settings": self.settings,
            "classes": self.classes,
            "seen": self.seen,
            "head": self.head_name,
            "structure": self.structure,
            "preprocess": None if self.preprocess is None else self.preprocess.to_dict(),
            "source": self.source,
            "history": self.history,
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` and ``ft_calibrate.json`` into a folder, each whole or not at all.

        Raises
        ------
        UserError
            The folder cannot be written or is full.
        """
        from safetensors.torch import save_file
        from vfm_core.runs import writable_folder, writing

        path = writable_folder(folder)
        # Clones: safetensors refuses tensors that share memory, such as tied weights.
        state = {k: v.detach().cpu().clone().contiguous() for k, v in self.model.state_dict().items()}
        with writing(path):
            with atomic_write(path / WEIGHTS_FILE) as draft:
                save_file(state, draft)
                draft.chmod(0o644)  # safetensors makes files that only their owner can read
            write_json(path / RUN_FILE, self.to_dict())
        return path


def read_run_file(folder: Path) -> dict[str, Any]:
    """Read ``ft_calibrate.json``.

    Raises
    ------
    UserError
        Absent (the run is unfinished), damaged, or of another version.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        remedy = "run the same command again to finish it" if (folder / "config.json").exists() else "check the path"
        raise UserError("no finished training here", where=folder, given=f"no {RUN_FILE}", remedy=remedy)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["version"] != _VERSION:
            raise UserError("run of another version", where=path, given=record["version"], remedy="train again")
        return {
            k: record[k] for k in ("recipe", "settings", "classes", "seen", "head", "structure", "source", "history")
        } | {"preprocess": record.get("preprocess")}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        given = f"{type(error).__name__}: {error}"
        raise UserError("unreadable run", where=path, given=given, remedy="train again with --overwrite") from error


def load_run(
    folder: str | os.PathLike[str],
    model: nn.Module | Classifier | None = None,
    *,
    device: str | torch.device = "cpu",
) -> Run:
    """Read a finished training.

    Parameters
    ----------
    folder : path
        The run folder.
    model : nn.Module or Classifier, optional
        The source model (its weights do not matter), for models that no spec names; it is not changed.
    device : str or torch.device
        Where the model goes.

    Returns
    -------
    Run

    Raises
    ------
    UserError
        An unfinished or damaged run, weights that do not fit, or a source model that cannot be loaded.
    """
    path = Path(folder)
    record = read_run_file(path)
    structure = Structure(**record["structure"])
    base = _source_model(record, path, model, structure)
    run = Run(
        structure.build(base.model, base.head_name).to(device),
        record["recipe"],
        record["history"],
        record["settings"],
        record["classes"],
        record["seen"],
        record["head"],
        path,
        base.preprocess if record["preprocess"] is None else Preprocess.from_dict(record["preprocess"]),
        record["source"],
        structure,
    )
    put_run_weights(run.model, path)
    run.model.eval()
    find_head(run.model, len(run.classes), run.head_name)
    return run


def put_run_weights(model: nn.Module, folder: Path) -> None:
    """Load ``model.safetensors`` into a model of the right structure.

    Raises
    ------
    UserError
        Damaged weights, or weights of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        remedy = "give the source model of this run, or train again with --overwrite"
        reason = " ".join(str(error).split())[:200]
        raise UserError("cannot load the run's weights", where=path, given=reason, remedy=remedy) from error


def _source_model(
    record: dict[str, Any], folder: Path, model: nn.Module | Classifier | None, structure: Structure
) -> Classifier:
    if isinstance(model, Classifier):
        return model
    source = dict(record["source"])
    head = record["head"].removeprefix("tuned").removeprefix(".") if structure.ensemble else record["head"]
    if model is not None:
        return Classifier(model, find_head(model, len(record["classes"]), head)[0], None, None)
    if not source.get("spec"):
        remedy = "call load_run(folder, model) with a model of the same architecture"
        raise UserError("the run was made from a module without a spec", where=folder, remedy=remedy)
    if structure == Structure() and str(source["spec"]).split(":")[0] in ("timm", "torchvision"):
        source["source_ckpt"] = folder / WEIGHTS_FILE  # the architecture is enough: the original weights may be away
    return load_classifier(source.pop("spec"), **source)
