"""Figures on head weights and features: A4, A6, A7 and A8 of FTC (arXiv 2409.16223), and the toys (A10).

As in `figures`: a `Diagnosis` in, a matplotlib figure out, or None when the material is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ft_calibrate.epoch_log import series
from ft_calibrate.figure_style import COLOURS, INK, MARKERS, NAMES, PALE, errors, figure, footnote, quiet
from ft_calibrate.projection import project, sample_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ft_calibrate.diagnosis import Diagnosis
    from ft_calibrate.toys import ToyResult

TARGET_WORDS = {"own_class": "own class mean", "own_group": "own group mean", "other_group": "other group mean",
                "overall": "overall mean"}  # fmt: skip


def cosine_figure(diagnosis: Diagnosis) -> Figure | None:
    """A4: cosines between the changes of the head rows, sorted by group, and their means."""
    relationship = diagnosis.relationship
    if relationship is None:
        return None
    groups = diagnosis.inputs.groups
    parts = [(name, c) for name, c in (("S", groups.seen), ("U", groups.absent), ("R", groups.remaining)) if len(c)]
    order = np.concatenate([columns for _, columns in parts])
    with figure(8.6, 4.6) as fig:
        left, right = fig.subplots(1, 2, width_ratios=(1.6, 1))
        picture = left.imshow(relationship.cosine[np.ix_(order, order)], cmap="RdBu_r", vmin=-1, vmax=1,
                              interpolation="nearest")  # fmt: skip
        left.grid(False)
        edge = 0
        centres = []
        for _, columns in parts:
            centres.append(edge + (len(columns) - 1) / 2)
            edge += len(columns)
            if edge < len(order):
                left.axhline(edge - 0.5, color=INK, lw=1.5)
                left.axvline(edge - 0.5, color=INK, lw=1.5)
        words = [f"{NAMES[name]}\n{len(columns)} classes" for name, columns in parts]
        left.set_xticks(centres, words)
        left.set_yticks(centres, words, rotation=90, va="center")
        for ticks in (left.get_xticklabels(), left.get_yticklabels()):
            for label, (name, _) in zip(ticks, parts):
                label.set_color(COLOURS[name])
        left.tick_params(length=0)
        left.set_title("Cosine between changes of head rows")
        fig.colorbar(picture, ax=left, shrink=0.8)
        values = [relationship.within_S, relationship.within_U, relationship.between]
        right.bar(range(3), values, 0.6, color=[COLOURS["S"], COLOURS["U"], "#9aa0a6"])
        for x, value in enumerate(values):
            if value == value:
                right.text(x, max(value, 0) + 0.02, f"{value:.2f}", ha="center", color=INK)
        right.axhline(0, color=INK, lw=0.8)
        right.set_xticks(range(3), ["within S", "within U", "S with U"])
        low = min(0.0, float(np.nanmin(values)) if not np.isnan(values).all() else 0.0)
        right.set(ylim=(1.15 * low - (0.05 if low < 0 else 0), 1.1), ylabel="mean cosine of pairs",
                  title="Mean over pairs of classes")  # fmt: skip
        quiet(right)
    return fig


def norms_figure(diagnosis: Diagnosis) -> Figure | None:
    """A6: norms of the head rows before and after, one dot a class; per epoch where a log is given."""
    epochs, lines = series(diagnosis.epochs, "head_norm")
    weights = {m: w for m, w in (("before", diagnosis.inputs.head_before), ("after", diagnosis.inputs.head_after))
               if w is not None}  # fmt: skip
    if not weights and not epochs:
        return None
    groups = diagnosis.inputs.groups
    panels = bool(weights) + bool(epochs)
    with figure(4.8 * panels, 3.8) as fig:
        axes = list(np.atleast_1d(fig.subplots(1, panels, sharey=True)))
        if weights:
            ax = axes[0]
            rng = np.random.default_rng(0)
            rows = {row["group"]: row for row in diagnosis.tables["head_norms"]}
            for g, (group, columns) in enumerate((("S", groups.seen), ("U", groups.absent))):
                if not len(columns):
                    continue
                jitter = 0.05 * rng.uniform(-1, 1, len(columns))
                x = np.array([g - 0.2, g + 0.2][: len(weights)] if len(weights) == 2 else [float(g)])
                norms = np.stack([np.linalg.norm(w[columns], axis=1) for w in weights.values()])
                ax.plot(x[:, None] + jitter, norms, color=PALE[group], lw=0.6, zorder=1)
                ax.plot(x[:, None] + jitter, norms, ls="", color=PALE[group], marker=MARKERS[group], ms=3.5, zorder=2)
                means = [rows[group][model] for model in weights]
                ax.errorbar(x, [m[0] for m in means], yerr=errors(means), color=COLOURS[group], marker=MARKERS[group],
                            ms=8, capsize=4, lw=2, zorder=3, label=NAMES[group])  # fmt: skip
            ticks = [g + s for g in (0, 1) for s in ((-0.2, 0.2) if len(weights) == 2 else (0.0,))]
            ax.set_xticks(ticks, list(weights) * 2)
            ax.set(xlim=(-0.6, 1.6), title="Norms of head rows, mean and classes")
            ax.legend(fontsize=8)
            quiet(ax)
        if epochs:
            ax = axes[-1]
            for group in [g for g in ("S", "U") if g in lines]:
                ax.plot(epochs, lines[group], color=COLOURS[group], marker=MARKERS[group], ms=3.5, label=NAMES[group])
            ax.set(xlabel="epochs of fine-tuning", title="Mean norm per epoch")
            ax.legend(fontsize=8)
        axes[0].set_ylabel("L2 norm of w_c")
        if weights:
            footnote(fig, "Bars: 95 % intervals over classes.")
    return fig


def movement_figure(diagnosis: Diagnosis) -> Figure | None:
    """A7: distances of features to class, group and overall means, before -> after, or per epoch."""
    epochs, lines = series(diagnosis.epochs, "distance")
    if len(epochs) > 1:
        return _movement_epochs(diagnosis, epochs, lines)
    rows = diagnosis.tables.get("feature_movement")
    if not rows:
        return None
    moved = diagnosis.tables.get("class_mean_movement", [])
    splits = list(dict.fromkeys(row["split"] for row in rows))
    targets = list(TARGET_WORDS.values())
    with figure(9.6 if moved else 6.4, 4.6) as fig:
        axes = fig.subplots(1, 2 if moved else 1, squeeze=False, width_ratios=(2, 1) if moved else None).ravel()
        ax = axes[0]
        series_of = [(split, group) for split in splits for group in ("S", "U")]
        step = 0.76 / len(series_of)
        for i, (split, group) in enumerate(series_of):
            for t, target in enumerate(targets):
                row = next((r for r in rows if (r["split"], r["samples"], r["to"]) == (split, group, target)), None)
                if row is None:
                    continue
                y = t - 0.38 + (i + 0.5) * step
                style: dict[str, Any] = {"color": COLOURS[group], "marker": MARKERS[group], "ms": 6, "ls": ""}
                if "before" in row and "after" in row:
                    ax.plot([row["before"], row["after"]], [y, y], color=COLOURS[group], lw=1.2,
                            ls="-" if split == "test" else ":")  # fmt: skip
                if "before" in row:
                    ax.plot(row["before"], y, mfc="white", **style)
                if "after" in row:
                    ax.plot(row["after"], y, **style)
            ax.plot([], [], color=COLOURS[group], marker=MARKERS[group], ms=6, lw=1.2,
                    ls="-" if split == "test" else ":", label=f"{NAMES[group]}, {split} samples")  # fmt: skip
        ax.set_yticks(range(len(targets)), targets)
        ax.invert_yaxis()
        ax.set(xlabel="mean distance of normalised features", title="To which mean? before (open) -> after (filled)")
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.15), ncols=2)
        quiet(ax, "y")
        if moved:
            words = [f"{row['classes']}\n{row['split']}" for row in moved]
            colours = [COLOURS[row["classes"]] for row in moved]
            axes[1].bar(range(len(moved)), [row["movement of class means"] for row in moved], 0.6, color=colours)
            axes[1].set_xticks(range(len(moved)), words)
            axes[1].set(title="Movement of class means", ylabel="mean distance, before to after")
            quiet(axes[1])
    return fig


def _movement_epochs(diagnosis: Diagnosis, epochs: Sequence[float], lines: dict[str, list[float]]) -> Figure:
    steps, moved = series(diagnosis.epochs, "movement")
    with figure(10.5, 6.2) as fig:
        axes = fig.subplots(2, 3).ravel()
        panels = [(f"To {words}", epochs, lines, f"/{target}") for target, words in TARGET_WORDS.items()]
        panels.append(("Step of class means", steps, moved, ""))
        known: dict[str, Any] = {}
        for ax, (title, x, values, suffix) in zip(axes, panels):
            for split, style in (("train", ":"), ("test", "-")):
                for group in ("all", "S", "U"):
                    line = values.get(f"{split}/{group}{suffix}")
                    if line is not None and not np.isnan(line).all():
                        label = f"{NAMES[group]}, {split} samples"
                        drawn = ax.plot(x, line, color=COLOURS[group], ls=style, marker=MARKERS.get(group, "s"), ms=3.5,
                                        label=label)  # fmt: skip
                        known[label] = drawn[0]
            ax.set(title=title, xlabel="epochs of fine-tuning")
        for ax in axes[::3]:
            ax.set_ylabel("mean distance")
        axes[5].axis("off")
        axes[5].legend(handles=list(known.values()), loc="center left", fontsize=9)
        footnote(fig, "Normalised features; class and group means use labels of absent classes: diagnosis only.")
    return fig


def projection_figure(diagnosis: Diagnosis, method: str = "tsne") -> Figure | None:
    """A8: features of test samples in the plane, coloured by group, before and after."""
    models = [(m, t) for m, t in (("before", diagnosis.inputs.before), ("after", diagnosis.inputs.after))
              if t is not None and t.features is not None]  # fmt: skip
    settings, groups, labels = diagnosis.settings, diagnosis.inputs.groups, diagnosis.inputs.labels
    rows = sample_rows(labels, groups, settings.max_points, settings.seed)
    if not models or len(rows) < 3:
        return None
    separation = {row["model"]: row for row in diagnosis.tables.get("separation", [])}
    with figure(5 * len(models), 4.9) as fig:
        for ax, (model, table) in zip(np.atleast_1d(fig.subplots(1, len(models))), models):
            assert table.features is not None
            points = project(np.asarray(table.features)[rows], method, settings.seed)
            order = np.random.default_rng(settings.seed).permutation(len(rows))  # neither group is painted over
            of_u = np.isin(labels[rows], groups.absent)
            for piece in np.array_split(order, max(1, len(order) // 25)):
                for group, chosen in (("S", piece[~of_u[piece]]), ("U", piece[of_u[piece]])):
                    ax.scatter(*points[chosen].T, s=13, color=COLOURS[group], marker=MARKERS[group], alpha=0.75, lw=0)
            for group in ("S", "U"):
                ax.scatter([], [], s=26, color=COLOURS[group], marker=MARKERS[group], label=NAMES[group])
            value = separation.get(model, {}).get("silhouette_groups", np.nan)
            words = "" if np.isnan(value) else f", silhouette of S against U {value:+.2f}"
            ax.set(title=f"{model} fine-tuning{words}", xticks=[], yticks=[])
            ax.grid(False)
            ax.legend(fontsize=8, loc="best")
        name = "t-SNE" if method == "tsne" else "PCA"
        footnote(fig, f"{name} of normalised features of {len(rows)} test samples, seed {settings.seed}. "
                 "Silhouette near 0: the groups do not separate.")  # fmt: skip
    return fig


def toy_figure(result: ToyResult) -> Figure:
    """A10: the points of both domains, and the features before and after fine-tuning on two of four classes."""
    from ft_calibrate.toys import ABSENT, SEEN

    shades = {SEEN[0]: "#0b6e6e", SEEN[1]: "#4fa3a3", ABSENT[0]: "#d1682b", ABSENT[1]: "#e9a37c"}
    with figure(12.5, 4.6) as fig:
        axes = fig.subplots(1, 3)
        for c in range(4):
            rows = result.labels == c
            word = f"class {c}, {'seen' if c in SEEN else 'absent'}"
            axes[0].scatter(*result.source[rows].T, s=16, marker="s", facecolors="none", edgecolors=shades[c], lw=0.7)
            axes[0].scatter(*result.target[rows].T, s=16, marker="o", color=shades[c], lw=0, alpha=0.8, label=word)
            for ax, features in ((axes[1], result.features_before), (axes[2], result.features_after)):
                ax.scatter(*features[rows].T, s=14, color=shades[c], marker="o" if c in SEEN else "^", lw=0, alpha=0.8)
        axes[0].set_title("Input\nsource (squares), target (circles)")
        axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
        for ax, row, words in zip(axes[1:], result.rows, ("before", "after")):
            ax.set_title(f"Target features {words} fine-tuning\nU/Y {100 * row['U/Y']:.0f} %, "
                         f"U/U {100 * row['U/U']:.0f} %, NCM U/Y {100 * row['NCM U/Y']:.0f} %")  # fmt: skip
            ax.set(xticks=[], yticks=[])
        _same_limits(axes[0])
        footnote(fig, f"World {result.world}: classes {SEEN[0]} and {SEEN[1]} fine-tuned on target points.")
    return fig


def _same_limits(ax: Axes) -> None:
    ax.set_aspect("equal", adjustable="datalim")
