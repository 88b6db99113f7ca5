"""What all figures of a diagnosis share: the colours of S and U, how before and after differ, saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.files import atomic_write
from vfm_core.report import house_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Teal and orange differ in lightness and hue for every common kind of colour vision; shape and text repeat the group.
COLOURS = {"S": "#0b6e6e", "U": "#d1682b", "R": "#6b7280", "all": "#3c4043"}
PALE = {"S": "#a9d0d0", "U": "#f1c9b0", "R": "#d5d8dc", "all": "#c4c7cc"}
NAMES = {"S": "seen (S)", "U": "absent (U)", "R": "remaining (R)", "all": "all classes"}
MARKERS = {"S": "o", "U": "^", "R": "s"}
INK = "#3c4043"
DPI = 160


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """A figure in the house style, without pyplot's global state."""
    from matplotlib.figure import Figure

    with house_style():
        yield Figure(figsize=(width, height), layout="constrained")


def save_png(fig: Figure, path: str | Path) -> Path:
    """Write the figure as PNG, atomically, the same bytes for the same figure."""
    path = Path(path)
    with house_style(), atomic_write(path) as temporary:
        fig.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    return path


def errors(intervals: list[tuple[float, float, float]]) -> NDArray[np.float64]:
    """(2, n) lengths of error bars for ``(value, low, high)``; no bar where a value is NaN."""
    below = [max(v - low, 0.0) if v == v else 0.0 for v, low, _ in intervals]
    above = [max(high - v, 0.0) if v == v else 0.0 for v, _, high in intervals]
    return np.array([below, above])


def wilson_band(share: Any, n: int, z: float = 1.96) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the 95 % Wilson interval of each share (M,) of n samples."""
    p = np.asarray(share, np.float64)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def percent_axis(axis: Any) -> None:
    """Show shares in [0, 1] as per cent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def footnote(fig: Figure, text: str) -> None:
    """A grey line under the figure."""
    fig.supxlabel(text, fontsize=8, color="#5f6368", x=0.01, ha="left")


def quiet(ax: Axes, axis: str = "x") -> None:
    """No grid lines along one axis, where they only repeat the categories."""
    ax.grid(False, axis=axis)  # type: ignore[arg-type]
    ax.tick_params(axis=axis, length=0)  # type: ignore[arg-type]
