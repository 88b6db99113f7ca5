"""A classifier with its head: find the head, run the model once for features and logits, load it from anywhere.

FTC (arXiv 2409.16223) reads two things off a classifier: its logits ``z_c = w_c . f(x) + b_c`` and the features f(x)
that the head sees. Both come from one forward pass here: a hook notes the head's input while the model computes its own
logits, which are passed on untouched. Finding the head by structure and name is ours, not from a paper.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

from ft_calibrate.fold_marks import folded_in, folded_in_spec
from ft_calibrate.head import base_layer, find_head, head_classes, head_features

__all__ = ["Classifier", "find_head", "load_classifier", "logits_of"]

log = logging.getLogger(__name__)

RUN_FILE = "ft_calibrate.json"  # marks a run folder of `ft-calibrate train`


# ---------------------------------------------------------------------- the classifier
def logits_of(output: Any) -> Tensor:
    """Logits (N, K) of whatever a model returns: a tensor, ``.logits``, ``["logits"]`` or the first of a tuple.

    Raises
    ------
    UserError
        Nothing of that form.
    """
    value = output
    if not isinstance(value, Tensor):
        if getattr(value, "logits", None) is not None:
            value = value.logits
        elif isinstance(value, Mapping) and "logits" in value:
            value = value["logits"]
        elif isinstance(value, tuple | list) and value:
            value = value[0]
    if not isinstance(value, Tensor) or value.ndim != 2:
        given = tuple(value.shape) if isinstance(value, Tensor) else type(output).__name__
        raise UserError("the model must return logits (N, K)", given=given, remedy="wrap it so that it does")
    return value


@dataclass(eq=False)
class Classifier:
    """A model with its head, its preprocessing and its class names.

    Attributes
    ----------
    model : torch.nn.Module
        Maps preprocessed images (N, 3, h, w) to logits (N, K).
    head_name : str
        Dotted name of the head in `model`.
    preprocess : Preprocess or None
        From a picture to the model's input; None for models that do not say.
    class_names : list of str or None
        K names in the order of the logits.
    spec : str
        Where it came from, for people.
    folded : str or None
        Which calibration its head holds already, in words: the logits include it. None where none is known of.
    """

    model: nn.Module
    head_name: str
    preprocess: Preprocess | None = None
    class_names: list[str] | None = None
    spec: str = ""
    _fingerprint: str | None = field(default=None, repr=False)
    folded: str | None = None

    def __post_init__(self) -> None:
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            given = f"{len(self.class_names)} names for {self.num_classes} logits"
            remedy = "give one name per logit, in their order"
            raise UserError("class names do not fit the model", where=self.spec or None, given=given, remedy=remedy)

    @property
    def head(self) -> nn.Module:
        """The layer that makes the logits."""
        return self.model.get_submodule(self.head_name)

    @property
    def num_classes(self) -> int:
        """K."""
        return head_classes(self.head)

    @property
    def feature_dim(self) -> int:
        """D."""
        return head_features(self.head)

    @property
    def logit_scale(self) -> float | None:
        """Factor on the cosines of a cosine or text head: gamma is in its units. None for plain heads."""
        for name in ("logit_scale", "scale"):
            value = getattr(base_layer(self.head), name, None)
            if isinstance(value, float | int) or (isinstance(value, Tensor) and value.numel() == 1):
                return float(value)
        return None

    @property
    def device(self) -> torch.device:
        """Device of the head."""
        return next((t.device for t in (*self.head.parameters(), *self.head.buffers())), torch.device("cpu"))

    def fingerprint(self) -> str:
        """32 hexadecimal digits over weights, buffers and structure; computed once, so ask after the last change."""
        if self._fingerprint is None:
            from vfm_core.backbones import fingerprint

            self._fingerprint = fingerprint(self.model, self.head_name)[:32]
        return self._fingerprint

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits in one forward pass.

        Runs in the model's current mode (eval or train) and under the caller's gradient mode; both results are part of
        the graph when there is one.

        Parameters
        ----------
        x : Tensor
            (N, 3, h, w), preprocessed, on the model's device.

        Returns
        -------
        features : Tensor, (N, D)
            What the head is given; of a 1x1 convolution over a grid its mean over the grid.
        logits : Tensor, (N, K)
            Exactly the model's own output.

        Raises
        ------
        UserError
            The head is not called exactly once in a forward pass, or features or logits have another shape.
        """
        with _inputs_of(self.head) as seen:
            logits = logits_of(self.model(x))
        if len(seen) != 1:
            given = f"{self.head_name or 'the model'} ran {len(seen)} times"
            remedy = "name the layer that makes the logits with --head"
            raise UserError(
                "the head must run once per forward pass", where=self.spec or None, given=given, remedy=remedy
            )
        features = seen[0].flatten(2).mean(2) if seen[0].ndim == 4 else seen[0]
        if features.ndim != 2 or len(features) != len(x) or len(logits) != len(x):
            given = f"features {tuple(seen[0].shape)}, logits {tuple(logits.shape)} of {len(x)} images"
            raise UserError("unexpected shapes around the head", where=self.head_name, given=given)
        return features, logits

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (N, K) of preprocessed images (N, 3, h, w)."""
        return logits_of(self.model(x))


@contextmanager
def _inputs_of(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the tensors that a layer is called with; the hook goes on any exit."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values())))

    handle = head.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# ---------------------------------------------------------------------- loading
def load_classifier(
    spec: str | os.PathLike[str] | nn.Module,
    *,
    source_ckpt: str | os.PathLike[str] | None = None,
    head: str | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    template: str | Sequence[str] | None = None,
    offline: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Classifier:
    """Load a classifier of any family.

    Parameters
    ----------
    spec : str, path or torch.nn.Module
        ``timm:NAME``, ``torchvision:NAME[@WEIGHTS]``, ``hf:ORG/NAME``, ``open_clip:NAME@TAG`` (with `classes`),
        ``dir:PATH``, ``tiny:NAME``, ``random:SPEC``, a run folder of ``ft-calibrate train``, or a model of one's own.
    source_ckpt : path, optional
        State dict (``.pth``, ``.pt``, ``.bin``, ``.safetensors``) that replaces the weights of `spec`, whose
        architecture is built without pretrained weights and with as many classes as the state dict has. Keys
        ``backbone.*`` and ``head.*``, as in the checkpoints of FTC's code, are renamed to timm's.
    head : str, optional
        Dotted name of the head where it is not found by itself.
    classes : path or sequence of str, optional
        Names of the logits, as a list or a ``.txt`` (one per line) or ``.json`` file. Image-text models need them.
    device : str or torch.device
        Where the model goes.
    template : str or sequence of str, optional
        Prompts with ``{}`` for the class name (image-text models); several are averaged. By default
        ``"a photo of a {}."`` for open_clip models and the bare name for tiny ones.
    offline, cache_dir
        As in ``vfm_core.load_native``.

    Returns
    -------
    Classifier
        In eval mode; a model of one's own keeps its mode and place. A checkpoint with a calibration folded in is
        loaded with a warning, and `Classifier.folded` says which.

    Raises
    ------
    UserError
        Weights that cannot be reached, a checkpoint that does not fit or holds pickled objects, class names that do
        not fit, an image-text model without classes, no head.
    """
    how: dict[str, Any] = {"offline": offline, "cache_dir": cache_dir}
    found = load_as_it_is(spec, source_ckpt, head, classes, device, template, **how)
    if found.folded is not None:
        log.warning(
            "%s: a calibration is folded in already (%s): its logits include gamma; take the original model to "
            "fit, fold, train or run pcv, or gamma counts twice",
            found.spec,
            found.folded,
        )
    return found


def load_as_it_is(
    spec: str | os.PathLike[str] | nn.Module,
    source_ckpt: str | os.PathLike[str] | None = None,
    head: str | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    template: str | Sequence[str] | None = None,
    **how: Any,
) -> Classifier:
    """As `load_classifier`, without a word about a calibration in the checkpoint."""
    from ft_calibrate import model_sources as sources

    names = sources.read_names(classes) if classes is not None else None
    if isinstance(spec, nn.Module):
        found = sources.from_module(spec, names, head, source_ckpt)
        found.folded = None if source_ckpt is None else folded_in(Path(source_ckpt).expanduser())
        return found
    text = os.fspath(spec)
    folder = Path(text.removeprefix("dir:")).expanduser()
    if (folder / RUN_FILE).is_file():
        found = _from_run(folder, names, head, device, source_ckpt)
        found.folded = folded_in(folder)
        return found
    how = {"offline": None, "cache_dir": None, **how}
    templates = (template,) if isinstance(template, str) else template
    found = sources.from_spec(text, names, head, source_ckpt, templates, how)
    found.folded = folded_in_spec(text) if source_ckpt is None else folded_in(Path(source_ckpt).expanduser())
    found.model.to(device).eval()
    return found


def _from_run(
    folder: Path, names: list[str] | None, head: str | None, device: str | torch.device, source_ckpt: Any
) -> Classifier:
    from ft_calibrate.recipes import load_run

    if source_ckpt is not None:
        remedy = "give the spec of the architecture beside --source-ckpt"
        raise UserError("a run folder has its own weights", where=folder, given=str(source_ckpt), remedy=remedy)
    found: Classifier = load_run(folder).classifier
    if head is not None:
        found.head_name = find_head(found.model, name=head)[0]
    if names is not None:
        found = Classifier(found.model, found.head_name, found.preprocess, names, found.spec)
    found.spec = found.spec or str(folder)
    found.model.to(device).eval()
    return found
