"""Plots of an inspection: entropy and budget per layer, kept tokens over the prompt, attention maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from vfm_core.report import house_style

from meda_kv.inspection.collect import KINDS, Inspection

_TITLES = {
    "cross": "cross (paper):\nother modality, no mask",
    "cross-causal": "cross-causal (ours):\nother modality, past only",
    "self": "self (official code):\nall tokens, causal",
}
_TEXT, _VISUAL = "#5b5ea6", "#0b6e6e"
_SMALL = 10


def entropy_figure(found: Inspection) -> Any:
    """Entropy of every layer, one panel per kind with a scale of its own (the paper's Fig. 2 is the first)."""
    with house_style():
        figure, axes = _subplots(1, len(KINDS), (9.6, 3.1))
        for axis, kind in zip(axes.flat, KINDS, strict=True):
            values = np.array(found.entropy[kind], dtype=float)
            axis.set_title(_TITLES[kind], fontsize=_SMALL)
            axis.set_xlabel("layer")
            _whole_ticks(axis, found.layers)
            if np.isnan(values).all():
                axis.text(0.5, 0.5, "undefined: one modality only", ha="center", transform=axis.transAxes)
                continue
            axis.plot(found.layers, values, marker="o", markersize=4 if len(values) <= 40 else 2)
            low, high = np.nanmin(values), np.nanmax(values)
            axis.text(
                0.98, 0.03, f"spread {high - low:.2f} nats", ha="right", transform=axis.transAxes, fontsize=_SMALL
            )
            axis.margins(y=0.15)
        axes.flat[0].set_ylabel("entropy (nats)")
    return figure


def budgets_figure(found: Inspection) -> Any:
    """Tokens kept per layer, text and visual, against the same total spread evenly."""
    text = (found.kept & ~found.visual).sum(axis=2).mean(axis=1)
    seen = (found.kept & found.visual).sum(axis=2).mean(axis=1)
    with house_style():
        figure, axes = _subplots(1, 1, (8.0, 3.4))
        axis = axes[0, 0]
        places = np.array(found.layers)
        axis.bar(places, text, color=_TEXT, label="text")
        axis.bar(places, seen, bottom=text, color=_VISUAL, label="visual")
        width = 0.8
        for place, budget in zip(places, found.budgets, strict=True):
            label = "budget" if place == places[0] else None
            axis.plot([place - width / 2, place + width / 2], [budget, budget], color="#1f2328", lw=1.6, label=label)
        even = found.total / len(places)
        axis.axhline(even, color="#d1682b", ls="--", lw=1.2, label=f"uniform ({even:.0f})")
        axis.set_xlabel("layer")
        axis.set_ylabel(f"kept of {found.n} tokens")
        _whole_ticks(axis, found.layers)
        axis.set_title(f"{found.settings['method']} at ratio {found.settings['ratio']:g}: {found.total} tokens in all")
        axis.legend(ncols=4, fontsize=_SMALL, loc="upper left", bbox_to_anchor=(0, -0.18))
    return figure


def tokens_figure(found: Inspection) -> Any:
    """Which prompt tokens every layer kept: layers by positions, darkness is the share of KV heads."""
    from matplotlib.colors import LinearSegmentedColormap

    # Dropped tokens are nearly the page's colour: what was kept is the drawing.
    colours = LinearSegmentedColormap.from_list("kept", ["#eef0f2", "#8cc5bd", "#0b6e6e", "#06363c"])
    with house_style():
        height = max(2.8, min(9.0, 1.8 + 0.22 * len(found.layers)))
        figure, axes = _subplots(1, 1, (9.6, height))
        axis = axes[0, 0]
        drawn = axis.imshow(
            found.share, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest", extent=_extent(found)
        )
        _mark_images(axis, found)
        step = math.ceil(len(found.layers) / 16)
        axis.set_yticks(range(0, len(found.layers), step), [str(index) for index in found.layers[::step]])
        axis.set_xlabel("position in the prompt")
        axis.set_ylabel("layer")
        axis.grid(False)
        figure.colorbar(drawn, ax=axis, label="heads that kept it", pad=0.01)
    return figure


def _extent(found: Inspection) -> tuple[float, float, float, float]:
    return (-0.5, found.n - 0.5, len(found.layers) - 0.5, -0.5)


def _mark_images(axis: Any, found: Inspection) -> None:
    """A bracket above the tokens of every image."""
    top = axis.get_xaxis_transform()
    numbered = len(found.images) <= 24
    for i, image in enumerate(found.images):
        first, last = int(image.positions[0]), int(image.positions[-1])
        axis.plot([first, last], [1.02, 1.02], transform=top, color=_VISUAL, lw=2, clip_on=False)
        if numbered:
            axis.text((first + last) / 2, 1.04, str(i + 1), transform=top, ha="center", va="bottom", fontsize=_SMALL)


def attention_figure(found: Inspection) -> Any:
    """Attention maps of the chosen layers, averaged over heads and over neighbouring tokens (the paper's Fig. 2)."""
    from matplotlib.colors import LogNorm

    layers = sorted(found.maps)
    with house_style():
        figure, axes = _subplots(1, len(layers), (3.7 * len(layers) + 0.6, 3.9))
        for axis, index in zip(axes.flat, layers, strict=True):
            side = found.maps[index].shape[0]
            # Mass per key, so that the colours do not depend on the width of the bins.
            density = found.maps[index] * side / found.n
            seen = density[density > 0]
            norm = LogNorm(vmin=float(np.quantile(seen, 0.05)), vmax=float(seen.max()))
            drawn = axis.imshow(
                np.ma.masked_less_equal(density, 0),
                cmap="viridis",
                norm=norm,
                interpolation="nearest",
                extent=(-0.5, found.n - 0.5, found.n - 0.5, -0.5),
            )
            _mark_images(axis, found)
            axis.set_title(f"layer {index}", pad=26)
            axis.set_xlabel("key")
            axis.grid(False)
            # Plain numbers: powers of ten would start matplotlib's formula parser, which takes longer than the rest.
            bar = figure.colorbar(drawn, ax=axis, shrink=0.75, pad=0.02, format=lambda value, _: f"{value:g}")
            bar.ax.minorticks_off()
        axes.flat[0].set_ylabel("query")
    return figure


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure outside of pyplot (nothing to close, no display) and its axes as a 2-D array."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _whole_ticks(axis: Any, layers: tuple[int, ...]) -> None:
    step = max(1, math.ceil(len(layers) / 16))
    axis.set_xticks(list(layers)[::step])
