"""What decides the maps of a run: a run folder is bound to these, so that its images can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.errors import UserError

from finecam.families import FAMILIES
from finecam.products import Style

if TYPE_CHECKING:
    from vfm_core.data import ImageDataset

METRICS = ("relative_drop",)
CONTRAST = ("references", "similarity", "gammas", "weighting", "aggregate")  # fields that mean nothing without a class


def refuse_contrast(method: str, given: Iterable[str]) -> None:
    """Refuse what asks for a contrast where the method's map depends on no class.

    Parameters
    ----------
    method
        CAM family; an unknown one is left to whoever looks it up.
    given
        Names of the options that were given.

    Raises
    ------
    UserError
        Naming the options.
    """
    if method in FAMILIES and not FAMILIES[method].asks and (names := ", ".join(given)):
        raise UserError(
            f"{method} depends on no class, so nothing can be subtracted from its map",
            given=names,
            remedy=f"drop {names}, or use a method such as gradcam",
        )


def keep_apart(dataset: ImageDataset, out: Path) -> None:
    """Refuse an `out` that is the data folder, or one of its folders with images: results would be read as data."""
    if not dataset.files or dataset.sources:  # a table lists its images: whatever lies beside them is not read
        return
    parts = Path(dataset.ids[0]).parts
    first = Path(dataset.files[0])
    if first.parts[-len(parts) :] != parts:
        return
    root, target = first.parents[len(parts) - 1].resolve(), out.expanduser().resolve()
    if not target.is_relative_to(root):
        return
    inside = target.relative_to(root).as_posix()
    if inside == "." or any(image.startswith(f"{inside}/") for image in dataset.ids):
        raise UserError(
            "results cannot go among the images",
            where="--out",
            given=str(out),
            remedy="give them a folder of their own",
        )


@dataclass(frozen=True)
class ExplainOptions:
    """Everything that decides the maps (Finer-CAM, arXiv 2501.11309); a run folder is bound to it.

    A method whose map depends on no class (eigencam, randomcam, rollout, cls_attention) has one map per image, and the
    fields of the contrast say nothing.

    Parameters
    ----------
    method, layer
        CAM family and the layer's dotted name (None: the model's default).
    target
        ``None`` or ``"predicted"``, ``"label"``, or a class name or id.
    references
        Number T of similar classes, a tuple of names or ids, or None for plain maps.
    similarity, weighting, aggregate
        As in `Explainer`.
    gammas
        Strengths, one map each besides the plain one.
    metrics
        Names of the per-image metrics to record; ``relative_drop`` is known.
    keep_aspect
        Keep each picture's aspect ratio instead of cropping: longer side at most `max_side`, both sides rounded up to
        a multiple of the patch. For models that take any size.
    style
        How results are drawn and stored.
    """

    method: str = "gradcam"
    layer: str | None = None
    target: str | int | None = None
    references: int | tuple[str | int, ...] | None = 3
    similarity: str = "logit"
    gammas: tuple[float, ...] = (0.6,)
    weighting: str = "mean"
    aggregate: str = "before_relu_mean"
    metrics: tuple[str, ...] = ()
    keep_aspect: bool = False
    max_side: int = 1000
    style: Style = field(default_factory=Style)

    def __post_init__(self) -> None:
        for gamma in self.gammas:
            if not 0 <= gamma < float("inf"):
                raise UserError("gamma must be finite and not negative", where="gammas", given=gamma)
        if len(set(self.gammas)) < len(self.gammas):
            raise UserError("gamma given twice", where="gammas", given=", ".join(f"{g:g}" for g in self.gammas))
        if isinstance(self.references, tuple) and self.references:
            refuse_contrast(self.method, ["references"])
        unknown = set(self.metrics) - {"relative_drop"}
        if unknown:
            raise UserError("unknown metric", given=", ".join(sorted(unknown)), remedy="known: relative_drop")

    @property
    def asks(self) -> bool:
        """Whether the method's map depends on the class; True for an unknown method, which is refused elsewhere."""
        return self.method not in FAMILIES or FAMILIES[self.method].asks

    @property
    def strengths(self) -> tuple[float, ...]:
        """0 (the plain map) and then every other strength, in the order given."""
        return (0.0, *(float(g) for g in self.gammas if g != 0)) if self.references and self.asks else (0.0,)

    def config(self) -> dict[str, Any]:
        """The fields as a run folder records them: those of the contrast only where there is one to make."""
        return {name: value for name, value in asdict(self).items() if self.asks or name not in CONTRAST}
