"""What an explanation is: maps, the question they answer, and how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class CAMResult:
    """Maps of a batch and the question that they answer.

    Attributes
    ----------
    maps : Tensor
        (B, H, W) float32, or (B, gammas, H, W) of a sweep.
    target : Tensor
        (B,) class ids c.
    references : Tensor
        (B, T) class ids d_t, most similar first; T = 0 for plain maps.
    weights : Tensor
        (B, T) coefficients a_t of ``y^c - gamma sum_t a_t y^{d_t}``.
    logits : Tensor
        (B, C) float32.
    layer, method, similarity, weighting, aggregate : str
        How the maps were made; several layers are joined by commas; the similarity of given references is "explicit",
        without references "none".
    gamma : float or tuple of float
        Strength, or the strengths of a sweep.
    empty : Tensor
        (B,) or (B, gammas) bool: the map is zero everywhere.
    class_names : list of str or None
        Names by id.
    advice : str or None
        What to do about a layer that the target has no gradient at.
    """

    maps: Tensor
    target: Tensor
    references: Tensor
    weights: Tensor
    logits: Tensor
    layer: str
    method: str
    gamma: float | tuple[float, ...]
    similarity: str
    weighting: str
    aggregate: str
    empty: Tensor
    class_names: list[str] | None = None
    advice: str | None = None

    def __len__(self) -> int:
        return len(self.target)

    def name(self, class_id: int | Tensor) -> str:
        """Name of a class, or ``class 7`` where names are unknown."""
        return self.class_names[int(class_id)] if self.class_names is not None else f"class {int(class_id)}"

    def to_dict(self) -> list[dict[str, Any]]:
        """One JSON-ready record per image, without maps and logits."""
        probabilities = self.logits.softmax(1)
        records = []
        for i in range(len(self)):

            def entry(c: Tensor, i: int = i) -> dict[str, Any]:
                return {"id": int(c), "name": self.name(c), "prob": float(probabilities[i, int(c)])}

            pairs = zip(self.references[i], self.weights[i].tolist())
            records.append(
                {
                    "target": entry(self.target[i]),
                    "prediction": entry(self.logits[i].argmax()),
                    "references": [entry(d) | {"weight": weight} for d, weight in pairs],
                    "method": self.method,
                    "layer": self.layer,
                    "gamma": self.gamma,
                    "similarity": self.similarity,
                    "weighting": self.weighting,
                    "aggregate": self.aggregate,
                    "empty": self.empty[i].tolist(),
                }
            )
        return records

    # --- pictures, drawn by finecam.render ---------------------------------------------------

    def overlay(self, i: int = 0, image: Image.Image | None = None, colormap: str = "turbo") -> Image.Image:
        """Map `i` over a picture, or over grey; the maps of a sweep side by side."""
        from finecam.render import result_overlay

        return result_overlay(self, i, image, colormap)

    def top_region(self, i: int = 0, q: float = 0.05) -> tuple[float, float, float, float] | None:
        """Box (x0, y0, x1, y1), in pixels of the map, of the strongest fraction `q` around the peak; None if flat."""
        from finecam.render import result_top_region

        return result_top_region(self, i, q)

    def show(self, images: Sequence[Image.Image] | None = None) -> Any:
        """Display the maps in a notebook, or in the system's picture viewer."""
        from finecam.render import show_result

        return show_result(self, images)

    def _repr_html_(self) -> str:
        from finecam.render import result_html

        return result_html(self)
