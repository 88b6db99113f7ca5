"""Figures on accuracies and logits: the seen-unseen curve, A1, A2, A3 and A5 of FTC (arXiv 2409.16223).

Every function takes a `Diagnosis` and returns a matplotlib figure, or None when the diagnosis lacks the material. Bars
and points carry 95 % intervals. Figures on weights and features are in `figures_features`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ft_calibrate.analyses import rows_of
from ft_calibrate.epoch_log import series
from ft_calibrate.figure_style import (
    COLOURS,
    INK,
    MARKERS,
    NAMES,
    PALE,
    errors,
    figure,
    footnote,
    percent_axis,
    quiet,
    wilson_band,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ft_calibrate.curve import Curve
    from ft_calibrate.diagnosis import Diagnosis

# Gammas that figures point at: key in Diagnosis.gammas, marker, label.
SHOWN = (
    ("alg", "D", "gamma_ALG"),
    ("given", "P", "calibration file"),
    ("alg-test", "D", "gap on test labels"),
    ("oracle", "*", "gamma* (upper bound)"),
)


def curve_figure(diagnosis: Diagnosis) -> Figure | None:
    """Seen-unseen curve with the points of each gamma, and accuracies as gamma grows."""
    curve = diagnosis.curves["after"]
    if curve.n_seen == 0 or curve.n_unseen == 0:
        return None
    with figure(10, 4.6) as fig:
        left, right = fig.subplots(1, 2, width_ratios=(1, 1.15))
        if "before" in diagnosis.curves:
            before = diagnosis.curves["before"]
            left.plot(before.seen, before.unseen, color="#9aa0a6", ls="--", lw=1.6,
                      label=f"before, AUSUC {before.ausuc:.3f}")  # fmt: skip
            _point(left, before, 0.0, "o", "#9aa0a6", None)
        left.plot(curve.seen, curve.unseen, color=INK, label=f"after, AUSUC {curve.ausuc:.3f}")
        _point(left, curve, 0.0, "o", INK, "no calibration")
        low, high = _gamma_range(diagnosis)
        for key, marker, label in SHOWN:
            if key in diagnosis.gammas:
                gamma = diagnosis.gammas[key].value
                _point(left, curve, gamma, marker, "#8c2d4f" if marker == "*" else "#5b5ea6", f"{label} = {gamma:.3g}")
        left.set(xlabel="accuracy on seen classes, S/Y", ylabel="accuracy on absent classes, U/Y",
                 xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), title="Seen-unseen curve")  # fmt: skip
        percent_axis(left.xaxis)
        percent_axis(left.yaxis)
        left.set_aspect("equal")
        left.legend(loc="best", fontsize=8)

        inside = (curve.gamma > low) & (curve.gamma < high)
        x = np.concatenate([[low], curve.gamma[inside], [high]])  # the lines reach both ends of the axis
        points = [curve.at(float(gamma)) for gamma in x]
        for group, values, n in (("S", [p.seen for p in points], curve.n_seen),
                                 ("U", [p.unseen for p in points], curve.n_unseen)):  # fmt: skip
            right.plot(x, values, color=COLOURS[group], label=f"{NAMES[group]}, n = {n}")
            right.fill_between(x, *wilson_band(values, n), color=COLOURS[group], alpha=0.15, lw=0)
        right.plot(x, [p.overall for p in points], color=INK, lw=1.3, ls=":", label="all test samples")
        _gamma_lines(right, diagnosis)
        right.set(xlabel="gamma, added to the logits of absent classes", ylabel="accuracy among all classes",
                  xlim=(low, high), ylim=(-0.03, 1.12), title="Accuracy as gamma grows")  # fmt: skip
        percent_axis(right.yaxis)
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8)
        footnote(fig, "Crosses and bands: 95 % intervals. gamma* is chosen on test labels: not deployable.")
    return fig


def nn_vs_ncm_figure(diagnosis: Diagnosis) -> Figure | None:
    """A1: accuracy of S and U before and after, with the head and with class means."""
    rows = diagnosis.tables.get("nn_vs_ncm")
    if not rows:
        return None
    classifiers = list(dict.fromkeys(row["classifier"] for row in rows))
    titles = {"NN": "The model's own head", "NCM": "Nearest class mean of its features"}
    with figure(4.4 * len(classifiers), 4) as fig:
        axes = np.atleast_1d(fig.subplots(1, len(classifiers), sharey=True))
        for ax, classifier in zip(axes, classifiers):
            for x, row in enumerate(r for r in rows if r["classifier"] == classifier):
                _pair_of_bars(ax, x, row["group"], row["before"], row["after"])
                change, low, high = row["change"]
                top = max(row["before"][2], row["after"][2])
                if change == change:
                    ax.text(x, top + 0.03, f"{100 * change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", ha="center",
                            fontsize=8.5, color=INK)  # fmt: skip
            ax.set_xticks([0, 1], [NAMES["S"], NAMES["U"]])
            ax.set(title=titles[classifier], ylim=(0, 1.14), xlim=(-0.6, 1.6))
            quiet(ax)
        axes[0].set_ylabel("accuracy among all classes")
        percent_axis(axes[0].yaxis)
        _before_after_legend(fig)
        if "NCM" in classifiers:
            footnote(fig, "Change in points [95 %, paired]. Class means use labels of absent classes: diagnosis only.")
    return fig


def absent_figure(diagnosis: Diagnosis) -> Figure | None:
    """A2: accuracy among the absent classes, and telling absent samples from seen ones at each gamma."""
    rows = diagnosis.tables["absent_among_absent"]
    if all(row["U/U"][0] != row["U/U"][0] for row in rows):
        return None
    first = {row["model"]: row for row in rows if row["gamma"] == 0.0}
    decisions = [("before", first["before"])] if "before" in first else []
    decisions += [("after", first["after"])]
    decisions += [(f"after +\n{label.split(' (')[0]}", row) for key, _, label in SHOWN if key in diagnosis.gammas
                  for row in rows if row["gamma from"] == diagnosis.gammas[key].name]  # fmt: skip
    with figure(9, 3.8) as fig:
        left, right = fig.subplots(1, 2, width_ratios=(1, 1.9))
        for x, (model, row) in enumerate(first.items()):
            colour = PALE["U"] if model == "before" else COLOURS["U"]
            left.bar(x, row["U/U"][0], 0.62, color=colour, yerr=errors([row["U/U"]]), ecolor=INK, capsize=4)
        left.set_xticks(range(len(first)), list(first))
        left.set(title="Absent samples among U only", ylabel="accuracy U/U", ylim=(0, 1.05), xlim=(-0.7, 1.7))
        places = np.arange(len(decisions))
        for shift, key, group in ((-0.19, "S or U: seen_kept", "S"), (0.19, "S or U: absent_found", "U")):
            values = [row[key] for _, row in decisions]
            n = {"S": diagnosis.curves["after"].n_seen, "U": diagnosis.curves["after"].n_unseen}[group]
            low, high = wilson_band(values, max(n, 1))
            bars = errors(list(zip(values, low.tolist(), high.tolist())))
            label = {"S": "seen samples given a seen class", "U": "absent samples given an absent class"}[group]
            right.bar(places + shift, values, 0.36, color=COLOURS[group], yerr=bars, ecolor=INK, capsize=3, label=label)
        right.set_xticks(places, [name for name, _ in decisions])
        right.set(title="Seen or absent, whatever the class", ylim=(0, 1.05), ylabel="share of the group's samples")
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)
        for ax in (left, right):
            percent_axis(ax.yaxis)
            quiet(ax)
    return fig


def logit_gap_figure(diagnosis: Diagnosis) -> Figure | None:
    """A3: where S and U samples lie on the margin max S - max U; scale of the logits and softmax mass on S."""
    models: list[str] = [name for name in ("before", "after") if name in diagnosis.margins]
    if not any(np.isfinite(d).any() for d in diagnosis.margins.values()):
        return None  # no seen or no absent column
    epochs, lines = series(diagnosis.epochs, "logit_scale/test")
    with figure(*(13, 5.6) if epochs else (11, 2.4 + 1.6 * len(models))) as fig:
        grid = fig.add_gridspec(len(models), 3 if epochs else 2, width_ratios=(1.5, 1, 1.1) if epochs else (1.6, 1))
        finite = np.concatenate([d[np.isfinite(d)] for d in diagnosis.margins.values()])
        ends = np.quantile(finite, [0.002, 0.998])
        bins: Any = np.linspace(float(ends[0]), float(ends[1]), 60)
        shared: Axes | None = None
        for i, model in enumerate(models):
            shared = ax = fig.add_subplot(grid[i, 0], sharex=shared)
            masks = rows_of(diagnosis.inputs.labels, diagnosis.inputs.groups)
            for group in ("S", "U"):
                values = diagnosis.margins[model][masks[group]]
                if ((values >= ends[0]) & (values <= ends[1])).any():
                    ax.hist(values, bins, density=True, color=COLOURS[group], alpha=0.35, label=NAMES[group])
                    ax.hist(values, bins, density=True, color=COLOURS[group], histtype="step", lw=1.4)
            ax.set(ylabel="density", title=f"{model} fine-tuning")
            ax.set_yticks([])
            if model == "after":
                _gamma_lines(ax, diagnosis)
                ax.set_ylim(0, ax.get_ylim()[1] * 1.18)
                ax.set_xlabel("largest seen - largest absent logit; called absent where gamma is larger")
            else:
                ax.axvline(0, color=INK, lw=1, ls=":")
            ax.legend(loc="upper left", fontsize=8)
        _scale_panel(fig.add_subplot(grid[:, 1]), diagnosis, models)
        if epochs:
            column = grid[:, 2].subgridspec(2, 1, height_ratios=(1, 1.7))
            ax = fig.add_subplot(column[0])
            ax.plot(epochs, lines.get("softmax_S", [np.nan] * len(epochs)), color=COLOURS["S"], marker=MARKERS["S"],
                    ms=3.5)  # fmt: skip
            ax.set(title="Softmax mass on S per epoch", ylabel="mean over samples", ylim=(-0.03, 1.05))
            percent_axis(ax.yaxis)
            ax = fig.add_subplot(column[1], sharex=ax)
            for group in ("S", "U"):
                for kind, style in (("non_gt", "-"), ("max", "--")):
                    if f"{kind}_{group}" not in lines:
                        continue
                    name = "wrong classes, mean" if kind == "non_gt" else "largest"
                    ax.plot(epochs, lines[f"{kind}_{group}"], color=COLOURS[group], ls=style, marker=MARKERS[group],
                            ms=3.5, label=f"{name}, {NAMES[group]}")  # fmt: skip
            ax.set(title="Logits per epoch", xlabel="epochs of fine-tuning", ylabel="logit")
            ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1, handlelength=3.5)
    return fig


def margin_figure(diagnosis: Diagnosis) -> Figure | None:
    """A5: the true class against the largest other absent class, over absent test samples."""
    rows = diagnosis.tables["margin"]
    if all(row["margin"][0] != row["margin"][0] for row in rows):
        return None
    epochs, lines = series(diagnosis.epochs, "margin/test")
    colours = {"true class": COLOURS["U"], "largest other absent": "#6b7280"}
    with figure(9 if epochs else 5.2, 3.6) as fig:
        axes = fig.subplots(1, 2 if epochs else 1, squeeze=False, sharey=True).ravel()
        for key, shift in (("true class", -0.07), ("largest other absent", 0.07)):
            values = [row[key] for row in rows]
            x = np.arange(len(rows)) + shift
            axes[0].errorbar(x, [v[0] for v in values], yerr=errors(values), color=colours[key], marker="^" if shift < 0
                             else "o", capsize=4, label=key)  # fmt: skip
        axes[0].set_xticks(range(len(rows)), [row["model"] for row in rows])
        axes[0].set(xlim=(-0.5, len(rows) - 0.5), ylabel="mean logit of absent test samples",
                    title="The true class against the other absent ones")  # fmt: skip
        axes[0].legend(fontsize=8)
        quiet(axes[0])
        if epochs:
            for key, name in (("true", "true class"), ("largest_other", "largest other absent")):
                if key not in lines:
                    continue
                axes[1].plot(epochs, lines[key], color=colours[name], marker="^" if key == "true" else "o", ms=3.5)
            axes[1].set(title="Per epoch", xlabel="epochs of fine-tuning")
    return fig


# ---------------------------------------------------------------------------------------------------- parts


def _point(ax: Axes, curve: Curve, gamma: float, marker: str, colour: str, label: str | None) -> None:
    at = curve.at(gamma)
    spans = [_interval(at.seen, curve.n_seen), _interval(at.unseen, curve.n_unseen)]
    ax.errorbar(at.seen, at.unseen, xerr=errors([spans[0]]), yerr=errors([spans[1]]), color=colour, marker=marker,
                ms=11 if marker == "*" else 6, lw=0, elinewidth=1, label=label, zorder=4)  # fmt: skip


def _interval(share: float, n: int) -> tuple[float, float, float]:
    low, high = wilson_band(share, n)
    return share, float(low), float(high)


def _gamma_range(diagnosis: Diagnosis) -> tuple[float, float]:
    """The part of the gamma axis where something happens: 1 % to 99 % of the margins, and every shown gamma."""
    d = diagnosis.margins["after"]
    d = d[np.isfinite(d)]
    values = [0.0, *(diagnosis.gammas[k].value for k, _, _ in SHOWN if k in diagnosis.gammas)]
    values += list(np.quantile(d, [0.01, 0.99])) if len(d) else [-1.0, 1.0]
    pad = 0.05 * (max(values) - min(values) or 1.0)
    return min(values) - pad, max(values) + pad


def _gamma_lines(ax: Axes, diagnosis: Diagnosis) -> None:
    """Vertical lines at gamma = 0, gamma_ALG and gamma*, with labels on alternating sides so that they stay legible."""
    ax.axvline(0, color=INK, lw=1, ls=":")
    found = [(diagnosis.gammas[k].value, label.split(" (")[0], "#8c2d4f" if k == "oracle" else "#5b5ea6")
             for k, _, label in SHOWN if k in diagnosis.gammas]  # fmt: skip
    found.sort()
    for i, (gamma, label, colour) in enumerate(found):
        ax.axvline(gamma, color=colour, lw=1.2, ls="--")
        side = "right" if i == 0 and len(found) > 1 else "left"
        ax.annotate(label, (gamma, 0.985), xycoords=("data", "axes fraction"), xytext=(-4 if side == "right" else 4, 0),
                    textcoords="offset points", ha=side, va="top", fontsize=8, color=colour)  # fmt: skip


def _pair_of_bars(ax: Axes, x: float, group: str, before: Any, after: Any) -> None:
    for shift, value, colour in ((-0.2, before, PALE[group]), (0.2, after, COLOURS[group])):
        ax.bar(x + shift, value[0], 0.36, color=colour, yerr=errors([value]), ecolor=INK, capsize=4)


def _before_after_legend(fig: Figure) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color="#c4c7cc", label="before (pale)"), Patch(color="#5f6368", label="after (full)")]
    fig.legend(handles=patches, loc="outside upper right", ncols=2, fontsize=8)


def _scale_panel(ax: Axes, diagnosis: Diagnosis, models: list[str]) -> None:
    """Means with intervals of the wrong classes' logits and of the largest logits, before -> after."""
    rows = {r["model"]: r for r in diagnosis.tables["logit_scale"] if r["split"] == "test" and r["samples"] == "all"}
    kinds = (("non_gt", "mean logit of\nwrong classes"), ("max", "largest logit"))
    places = [0.0, 1.0]
    for group, shift in (("S", -0.16), ("U", 0.16)):
        for place, (kind, _) in zip(places, kinds):
            for model, nudge in zip(models, (-0.07, 0.07) if len(models) == 2 else (0.0,)):
                value = rows[model][f"{kind}_{group}"]
                face = "white" if model == "before" else COLOURS[group]
                ax.errorbar(place + shift + nudge, value[0], yerr=errors([value]), color=COLOURS[group], mfc=face,
                            marker=MARKERS[group], ms=7, capsize=3, lw=0, elinewidth=1.2,
                            label=f"{NAMES[group]}, {model}" if kind == "max" else None)  # fmt: skip
            if len(models) == 2:
                ends = [rows[m][f"{kind}_{group}"][0] for m in models]
                ax.annotate("", (place + shift + 0.07, ends[1]), (place + shift - 0.07, ends[0]),
                            arrowprops={"arrowstyle": "-", "color": COLOURS[group], "lw": 1})  # fmt: skip
    ax.set_xticks(places, [label for _, label in kinds])
    ax.set(xlim=(-0.5, 1.5), title="Logit scale over all test samples", ylabel="logit")
    ax.legend(fontsize=8, loc="best")
    quiet(ax)
