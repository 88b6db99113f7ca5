"""Tables, pictures and words of the demo's report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from vfm_core.report import Report

from ft_calibrate import study
from ft_calibrate.figure_style import COLOURS, INK, PALE, figure, percent_axis, quiet, save_png
from ft_calibrate.figures_features import toy_figure
from ft_calibrate.toys import run_toys

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from vfm_core.runs import RunDir

    from ft_calibrate.study_claims import Check

Records = Sequence[Mapping[str, Any]]

_COLUMNS = {
    "yy": "Y/Y",
    "sy": "S/Y",
    "uy": "U/Y",
    "uu": "U/U",
    "ausuc": "AUSUC",
    "ncm_uu": "NCM U/U",
    "gamma_alg": "gamma_ALG",
    "alg_yy": "Y/Y + ALG",
    "overall_best": "Y/Y at gamma* (upper bound)",
}
_WORDS = {
    "source": "before fine-tuning",
    "ft": "fine-tuning",
    "lp": "linear probing",
    "oracle-ft": "fine-tuning on all classes (upper bound)",
}


def arm_rows(records: Records) -> list[dict[str, Any]]:
    """One row per arm: mean over seeds, as ``(mean, least, greatest)``."""
    names: dict[str, None] = {}
    for record in records:
        for part in record.values():
            names |= dict.fromkeys(part.get("arms", {}))
    return [{"arm": _WORDS.get(name, name), **_spread(_of(records, name), _COLUMNS)} for name in names]


def short_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The means of the main arms, for a terminal."""
    titles = ("Y/Y", "S/Y", "U/Y", "U/U", "AUSUC", "gamma_ALG", "Y/Y + ALG")
    wanted = {
        _WORDS.get(name, name) for name in ("source", "ft", "lp", "frozen-head", "lolsgd", "wise:0.5", "oracle-ft")
    }
    return [
        {"arm": row["arm"], **{title: round(row[title][0], 3) for title in titles}}
        for row in rows
        if row["arm"] in wanted
    ]


def _of(records: Records, name: str) -> list[Mapping[str, float]]:
    return [part["arms"][name] for record in records for part in record.values() if name in part.get("arms", {})]


def _spread(values: Sequence[Mapping[str, float]], columns: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for key, title in columns.items():
        numbers = [float(one[key]) for one in values]
        found[title] = (float(np.mean(numbers)), min(numbers), max(numbers))
    return found


def gamma_rows(records: Records) -> list[dict[str, Any]]:
    """How each gamma was chosen, and the accuracies it gives on the test pictures."""
    origin = {
        "alg": ("fine-tuning data", "no"),
        "pcv": ("pseudo models", "no"),
        "ratio-pcv": ("pseudo models", "no"),
        "oracle": ("test labels (upper bound)", "yes"),
    }
    columns = {"gamma": "gamma", "overall": "Y/Y", "seen": "S/Y", "unseen": "U/Y", "harmonic": "H"}
    rows = []
    for name, (chosen_on, absent) in origin.items():
        values = [record["repair"]["gammas"][name] for record in records]
        rows.append(
            {"gamma by": name, **_spread(values, columns), "chosen on": chosen_on, "uses absent labels": absent}
        )
    return rows


def claim_rows(checks: Sequence[Check], expected: bool) -> list[dict[str, Any]]:
    """The claims with their margins per seed."""
    rows = []
    for one in checks:
        if one.claim.expected is not expected:
            continue
        row: dict[str, Any] = {
            "claim": one.claim.name,
            "source": one.claim.source,
            "holds": "yes" if one.holds else "no",
            "margin": one.mean,
            "per seed": ", ".join(f"{m:+.3f}" for m in one.margins),
        }
        rows.append(row)
    return rows


def harm_rows(records: Records) -> list[dict[str, Any]]:
    """What no gamma repairs."""
    rows = []
    names = ("own shift", "own shift, harsh")
    for name in names:
        for arm in ("source", "ft"):
            values = [record["settings"]["harm"][name][arm] for record in records]
            columns = {"sy": "S/Y", "uy": "U/Y", "uu": "U/U", "ncm_uu": "NCM U/U", "alg_uy": "U/Y + ALG"}
            verdicts = "" if arm == "source" else _counted(r["settings"]["harm"][name]["verdict"] for r in records)
            rows.append({"case": name, "model": _WORDS[arm], **_spread(values, columns), "verdict (seeds)": verdicts})
    return rows


def _counted(words: Iterable[str]) -> str:
    return ", ".join(f"{word} ({count})" for word, count in Counter(words).items())


def photo_rows(records: Records) -> list[dict[str, Any]]:
    """Collapse and repair on photos."""
    columns = {**_COLUMNS, "alg_sy": "S/Y + ALG", "alg_uy": "U/Y + ALG"}
    return [
        {"arm": _WORDS[name], **_spread([record["arms"][name] for record in records], columns)}
        for name in ("source", "ft")
    ]


def write_report(
    run: RunDir, size: study.StudySize, records: Records, checks: Sequence[Check], diagnosis: Any, photos: Records
) -> None:
    """Write ``report.html`` and the pictures in ``figures/``."""
    idea, glyphs = idea_figure(records, diagnosis), glyph_figure(size.seeds[0])
    arms = arms_figure(records)
    for name, fig in (("idea", idea), ("glyphs", glyphs), ("arms", arms)):
        save_png(fig, run.figure(f"{name}.png"))
    seeds = ", ".join(map(str, size.seeds))
    report = Report(
        "Fine-tuned on half of the classes",
        f"A small network, 20 glyph classes, 10 of them fine-tuned in a new domain; seeds {seeds}. "
        "Values are means over seeds with the least and the greatest.",
    )
    report.heading("What happens, and what repairs it").figure(
        idea, "One scalar added to the logits of the absent classes brings most of them back."
    )
    report.text(
        f"**{diagnosis.sentence}** (seed {size.seeds[0]}; the whole diagnosis is in `diagnosis/report.html`.) "
        "Acc A/B is the accuracy on samples of the classes A when the prediction may be any class of B; Y all, S seen, "
        "U absent classes. AUSUC is the area under the seen-unseen curve. NCM classifies by the nearest class mean of "
        "the features; its class means use labels of all classes, for diagnosis only."
    )
    report.heading("How gamma is chosen").table(gamma_rows(records), highlight={"Y/Y": "max"}).text(
        "ALG is the average gap between the logits of seen and absent classes on the fine-tuning data. PCV fine-tunes "
        "pseudo models on half of the seen classes and finds the best gamma for the other half; ratio-PCV (ours) "
        "scales ALG by what the pseudo models needed relative to their own ALG. The oracle is the best gamma on the "
        "labelled test pictures: an upper bound, not deployable."
    )
    report.heading("All arms").figure(arms).table(arm_rows(records), highlight={"AUSUC": "max", "Y/Y": "max"})
    report.heading("Claims, as inequalities").table(claim_rows(checks, True))
    report.text(
        "A claim holds when its mean margin over the seeds is positive; every seed is shown. The source says whose "
        "finding it is; where a claim names a threshold, the threshold is ours."
    )
    report.heading("Not claimed at this scale").table(claim_rows(checks, False)).text(
        "\n".join(f"- *{one.claim.name}*: {one.claim.why}." for one in checks if not one.claim.expected)
    )
    report.heading("When the absent classes shift another way").text(
        "The absent classes are turned and sheared the other way in the target domain, so that what is learned from "
        "the seen ones does not carry over. In the harsh case three classes are fine-tuned for 60 epochs with a "
        "learning rate of 0.2 in head and backbone. The tables are of samples of the seen and the absent classes only."
    ).table(harm_rows(records))
    if photos:
        report.heading("On photos").text(
            "Source domain: the photos in grey at half resolution, all classes. Target domain: the photos as they are, "
            f"half of the classes fine-tuned. Seen classes per seed: {'; '.join(', '.join(r['seen']) for r in photos)}."
        ).table(photo_rows(photos))
    report.heading("Why it can work: two toy worlds").text(
        "Four classes in the plane; squares are the source domain, circles the target domain, shifted alike for "
        "all classes. Two classes are fine-tuned. The features of the absent ones get better too (NCM U/Y)."
    )
    for toy in run_toys(size.seeds[0]):
        report.figure(toy_figure(toy)).table(toy.rows, caption=f"World {toy.world}: accuracies on target points.")
    report.heading("The data").figure(
        glyphs, "Six classes in the source (top) and the target domain (bottom), three each."
    )
    report.write(run.report_path)


# ---------------------------------------------------------------------- pictures
def idea_figure(records: Records, diagnosis: Any) -> Figure:
    """Left: accuracy on seen and absent classes before, after, and after with gamma. Right: the curve of one seed."""
    with figure(10.0, 3.9) as fig:
        bars, plane = fig.subplots(1, 2, width_ratios=(1.2, 1.0))
        _bars(bars, records)
        _plane(plane, records, diagnosis)
    return fig


def _bars(ax: Axes, records: Records) -> None:
    repair = [record["repair"] for record in records]
    steps = (
        ("before", [(r["arms"]["source"]["sy"], r["arms"]["source"]["uy"]) for r in repair]),
        ("fine-tuned\non S", [(r["arms"]["ft"]["sy"], r["arms"]["ft"]["uy"]) for r in repair]),
        ("+ gamma\n(ALG)", [(r["gammas"]["alg"]["seen"], r["gammas"]["alg"]["unseen"]) for r in repair]),
        (
            "+ gamma\n(ratio-PCV)",
            [(r["gammas"]["ratio-pcv"]["seen"], r["gammas"]["ratio-pcv"]["unseen"]) for r in repair],
        ),
    )
    for x, (_, pairs) in enumerate(steps):
        for offset, group, column in ((-0.2, "S", 0), (0.2, "U", 1)):
            values = [pair[column] for pair in pairs]
            mean = float(np.mean(values))
            ax.bar(x + offset, mean, 0.36, color=COLOURS[group], label=_group_label(group) if x == 0 else None)
            ax.plot([x + offset] * len(values), values, "o", ms=3, color="white", mec=INK, mew=0.7)
            ax.text(x + offset, max(values) + 0.02, f"{100 * mean:.0f}", ha="center", va="bottom", fontsize=9)
    ax.set_xticks(range(len(steps)), [name for name, _ in steps])
    ax.set_ylim(0, 1.12)
    ax.set_ylabel("accuracy among all classes")
    percent_axis(ax.yaxis)
    quiet(ax)
    ax.legend(loc="upper center", ncols=2, frameon=False, bbox_to_anchor=(0.5, 1.13))


def _group_label(group: str) -> str:
    return {"S": "seen classes (S)", "U": "absent classes (U)"}[group]


def _plane(ax: Axes, records: Records, diagnosis: Any) -> None:
    for name, colour, label in (("before", PALE["all"], "before"), ("after", INK, "fine-tuned")):
        curve = diagnosis.curves[name]
        ax.plot(curve.seen, curve.unseen, color=colour, lw=2, label=f"{label} (AUSUC {curve.ausuc:.2f})")
    curve = diagnosis.curves["after"]
    gammas = records[0]["repair"]["gammas"]
    for name, gamma, marker in (
        ("gamma = 0", 0.0, "o"),
        (f"ALG, {gammas['alg']['gamma']:.1f}", gammas["alg"]["gamma"], "s"),
        (f"ratio-PCV, {gammas['ratio-pcv']['gamma']:.1f}", gammas["ratio-pcv"]["gamma"], "D"),
        (f"gamma*, {gammas['oracle']['gamma']:.1f} (upper bound)", gammas["oracle"]["gamma"], "*"),
    ):
        point = curve.at(gamma)
        size = 13 if marker == "*" else 8
        ax.plot(point.seen, point.unseen, marker, ms=size, color=COLOURS["U"], mec="white", label=name, ls="none")
    ax.set_xlabel("accuracy on seen classes")
    ax.set_ylabel("accuracy on absent classes")
    percent_axis(ax.xaxis)
    percent_axis(ax.yaxis)
    ax.set_xlim(0, 1.03)
    ax.set_ylim(-0.03, 1.0)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)


def arms_figure(records: Records) -> Figure:
    """AUSUC of every arm with its seeds, best at the top."""
    rows = sorted(
        ((float(np.mean(v)), name, v) for name in _arm_names(records) if (v := _values(records, name, "ausuc"))),
    )
    with figure(8.0, 0.28 * len(rows) + 0.9) as fig:
        ax = fig.subplots()
        for y, (mean, name, values) in enumerate(rows):
            bound = name == "oracle-ft"
            colour = COLOURS["S"] if name == "ft" else PALE["all"] if bound else PALE["S"]
            ax.barh(y, mean, color=colour)
            ax.plot(values, [y] * len(values), "o", ms=3.5, color="white", mec=INK, mew=0.8)
        ax.set_yticks(range(len(rows)), [_WORDS.get(name, name) for _, name, _ in rows])
        ax.set_xlabel("AUSUC (bars: mean; dots: seeds)")
        ax.set_xlim(0, 1)
        quiet(ax, "y")
    return fig


def _arm_names(records: Records) -> list[str]:
    return list(dict.fromkeys(name for record in records for part in record.values() for name in part.get("arms", {})))


def _values(records: Records, name: str, key: str) -> list[float]:
    return [float(one[key]) for one in _of(records, name)]


def glyph_figure(seed: int) -> Figure:
    """Pictures of six classes in both domains."""
    from tinyworld import Glyphs

    with figure(9.0, 1.3) as fig:
        axes = fig.subplots(2, 18)
        for row, domain in enumerate(("source", "target")):
            glyphs = Glyphs(3, domain, "test", seed)
            rows = [c + 20 * k for c in range(6) for k in range(3)]
            for ax, picture in zip(axes[row], glyphs.images(rows)):
                ax.imshow(picture, interpolation="nearest")
                ax.set_axis_off()
    return fig
