"""Tables, figures and words of the embedded study's report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from vfm_core.metrics import bootstrap_interval, paired_difference
from vfm_core.report import Report

from finecam.arms import Arm, aggregation_arms, reference_arms, similarity_arms, strength_arms
from finecam.evaluation import Evaluation
from finecam.study import PAIRED, TEXT_GAMMAS, Size
from finecam.study_prompts import flipped

__all__ = ["finer_rows", "prompt_rows", "write_report"]

Records = dict[str, Any]

CLAIMS = ("energy in trait", "energy in difference", "RD@1% (logit)", "RD@5% (logit)", "RD@1% (weight)")
"""Columns of the main table: what Finer-CAM should raise."""

DIFFERENCE = "energy in difference"

PROMPT_COLUMNS = ("energy in trait", "pointing at trait", "AP of trait", "insertion", "deletion")


def evaluations(records: Records, kind: str) -> dict[str, Evaluation]:
    """Seed -> evaluation of all units ``KIND/SEED``."""
    return {
        name.rsplit("/", 1)[1]: Evaluation.from_dict(record)
        for name, record in records.items()
        if name.rsplit("/", 1)[0] == kind
    }


def rounded(interval: Sequence[float], digits: int = 3) -> tuple[float, float, float]:
    """Value, low and high at the precision that a table needs."""
    value, low, high = (round(float(x), digits) for x in interval)
    return value, low, high


def finer_rows(records: Records, kind: str = "finer/nested", gamma: float = 0.6) -> list[dict[str, Any]]:
    """Finer minus plain per method and training run: difference [95 % interval] on the same birds."""
    rows = []
    for method in PAIRED:
        for seed, found in evaluations(records, kind).items():
            finer, plain = found.values[Arm(method, gamma).name], found.values[method]
            row: dict[str, Any] = {"method": method, "seed": int(seed), "birds": len(found.ids)}
            for name in CLAIMS:
                d = paired_difference(finer[name], plain[name])
                row[name] = rounded((d.difference, d.low, d.high), 4)
            rows.append(row)
    return rows


def pooled(found: dict[str, Evaluation], arm: str, metric: str) -> tuple[float, float, float]:
    """Mean [interval] over the birds of all seeds."""
    values = [e.values[arm][metric] for e in found.values() if metric in e.values.get(arm, {})]
    return rounded(bootstrap_interval(np.concatenate(values))) if values else (np.nan, np.nan, np.nan)


def arm_rows(found: dict[str, Evaluation], arms: Sequence[Arm | str], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Mean [interval] over all seeds' birds, one row per arm that was run.

    "energy in difference" means another region for every choice of references, so for arms with references it is shown
    as the gain over the plain method on the arm's own region.
    """
    names = [arm if isinstance(arm, str) else arm.name for arm in arms]
    run = next(iter(found.values()))
    rows: list[dict[str, Any]] = []
    for name in names:
        if name in run.values:
            row: dict[str, Any] = {"arm": name}
            row |= {c: pooled(found, name, c) for c in columns if c in run.values[name] and c != DIFFERENCE}
            if DIFFERENCE in columns and run.bases.get(name, name) != name:
                row["gain in difference"] = difference_gain(found, name)
            rows.append(row)
    return rows


def difference_gain(found: dict[str, Evaluation], arm: str) -> tuple[float, float, float]:
    """Energy in the pixels that truly differ from the arm's own references: arm minus plain, over all seeds' birds."""
    finer, plain = [], []
    for e in found.values():
        base = e.values[e.bases[arm]] | e.matched.get(arm, {})
        finer.append(e.values[arm][DIFFERENCE])
        plain.append(base[DIFFERENCE])
    d = paired_difference(np.concatenate(finer), np.concatenate(plain))
    return rounded((d.difference, d.low, d.high), 4)


def best(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> dict[str, Literal["min", "max"]]:
    """Which end of each column that the rows have is the better one."""
    return {c: "min" if c == "deletion" else "max" for c in columns if any(c in row for row in rows)}


def prompt_rows(records: Records, backbone: str = "vit") -> list[dict[str, Any]]:
    """Prompt-CAM and its rivals on one backbone and the same birds; mean [interval] over all seeds' birds."""
    tables = [u["prompt"] | u["rivals"] for name, u in records.items() if name.startswith(f"promptcam/{backbone}/")]
    rows = []
    for arm in tables[0] if tables else []:
        row: dict[str, Any] = {"maps": arm}
        for name in PROMPT_COLUMNS:
            if name in tables[0][arm]:
                joined = np.concatenate([np.array(t[arm][name], dtype=float) for t in tables])
                row[name] = rounded(bootstrap_interval(joined))
        rows.append(row)
    return rows


def write_report(
    path: Path,
    size: Size,
    records: Records,
    pictures: Sequence[tuple[str, Image.Image]],
    traits: Sequence[tuple[str, Image.Image]],
) -> None:
    """Write ``report.html`` and its Markdown twin."""
    report = Report(
        "finecam demo", "Why this bird and not its sibling: Finer-CAM and Prompt-CAM on birds with known marks"
    )
    report.text(
        "Sixteen kinds of birds; the four of one genus differ **only in one small mark** of about 1 % of the pixels. "
        "Because each bird can be painted as its sibling, the pixels that tell the two apart are known exactly."
    )
    report.heading("Why A and not B?")
    for name, picture in pictures:
        report.figure(picture, alt=name.replace("-", " "))
    _finer_section(report, size, records)
    if size.ablations:
        _ablation_sections(report, records)
        _shortcut_section(report, records)
    report.heading("Prompt-CAM: traits of a class")
    report.text(
        "The attention of a class's own prompt, head by head. Greedy blurring ranks the heads; every map is scaled to "
        "its own range, so read the peak: a flat head with a peak of 0.02 says nothing."
    )
    for name, picture in traits:
        report.figure(picture, alt=name.replace("-", " "))
    _prompt_section(report, size, records)
    _text_section(report, records["text"])
    report.write(path, markdown=True)


def verdict(rows: Sequence[dict[str, Any]], column: str) -> str:
    """In how many rows the whole interval lies above zero, such as "3 of 3 runs"."""
    held = sum(row[column][1] > 0 for row in rows)
    return f"{held} of {len(rows)} runs"


def _finer_section(report: Report, size: Size, records: Records) -> None:
    rows = finer_rows(records)
    found = evaluations(records, "finer/nested")
    report.heading("Does the contrast find the mark?")
    accuracy = ", ".join(f"{e.accuracy:.1%}" for e in found.values())
    report.text(
        f"Grad-CAM and Layer-CAM of a small CNN ({len(size.seeds)} training runs, accuracy {accuracy}), {size.images} "
        "unseen birds each, correctly classified ones only. Difference *Finer (gamma 0.6, three nearest logits) minus "
        "plain* on the same birds with 95 % bootstrap intervals: share of the map's energy in the mark, share in all "
        "pixels that tell the bird from its three look-alikes, and relative drop when the top 1 % or 5 % of the pixels "
        "are removed, against the look-alike by logit and by weight vector."
    )
    report.table(rows, caption="Finer minus plain; positive = the contrast helps")
    verdicts = [
        {"claim: larger with the contrast": name}
        | {method: verdict([row for row in rows if row["method"] == method], name) for method in PAIRED}
        for name in CLAIMS
    ]
    report.table(verdicts, caption="Runs in which the whole interval lies above zero")
    columns = (*CLAIMS, "pointing at trait", "deletion", "insertion")
    arms = [Arm(m, g) if g else Arm(m, 0.0) for m in PAIRED for g in (0.0, 0.6, 1.0)]
    means = arm_rows(found, [*arms, "random map", "centre Gaussian"], columns)
    caption = "Means over the birds of all runs. Pointing is not asserted: its interval often includes no change"
    report.table(means, caption=caption, highlight=best(means, columns))
    share = _shares(found, "logit")
    report.text(f"The three nearest classes by logit were: {share}; by weight vector: {_shares(found, 'weight')}.")


def _shares(found: dict[str, Evaluation], rule: str) -> str:
    total: dict[str, int] = {}
    for e in found.values():
        for relation, n in e.relations.get(rule, {}).items():
            total[relation] = total.get(relation, 0) + n
    every = sum(total.values()) or 1
    return ", ".join(f"{relation} {n / every:.0%}" for relation, n in sorted(total.items(), key=lambda kv: -kv[1]))


def _ablation_sections(report: Report, records: Records) -> None:
    nested, factorial = (evaluations(records, f"finer/{layout}") for layout in ("nested", "factorial"))
    report.heading("Strength of the contrast")
    report.figure(_strength_figure(nested), "Mean over all birds, one thin line per training run", "strength sweep")
    for title, arms, words in (
        ("Which references", reference_arms(), "None, the 2nd, 3rd or 4th prediction alone, or the three together."),
        ("Where references are joined", aggregation_arms(), "Map subtraction is the counter-example, no method."),
        (
            "How references are chosen and weighted",
            similarity_arms(),
            "The official code: softmax weights, gamma 1.",
        ),
    ):
        report.heading(title)
        report.text(words)
        rows = arm_rows(nested, arms, CLAIMS)
        report.table(rows, highlight=best(rows, CLAIMS))
    report.heading("When look-alikes share the mark")
    report.text(
        "In the factorial layout all genera share the same four marks, so the class nearest by weight vector is often "
        f"*the same mark on another body* (by weight: {_shares(factorial, 'weight')}; by logit: "
        f"{_shares(factorial, 'logit')}). What differs is then the body, and energy in the mark rightly falls."
    )
    report.table(arm_rows(factorial, similarity_arms(), CLAIMS))
    report.table(finer_rows(records, "finer/factorial"), caption="Finer minus plain per run, factorial layout")
    report.heading("Score-CAM")
    found = evaluations(records, "scorecam")
    report.table(arm_rows(found, [Arm("scorecam", 0.0), Arm("scorecam", 0.6)], CLAIMS))


def _strength_figure(found: dict[str, Evaluation]) -> Any:
    from matplotlib.figure import Figure

    arms = sorted(strength_arms(), key=lambda arm: arm.gamma)
    gammas = [arm.gamma for arm in arms]
    panels = ("energy in trait", "RD@1% (logit)", "RD@5% (logit)")
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(panels)), panels):
        lines = np.array([[np.nanmean(e.values[arm.name][metric]) for arm in arms] for e in found.values()])
        axis.plot(gammas, lines.T, color="tab:blue", alpha=0.35, linewidth=1)
        axis.plot(gammas, lines.mean(0), color="tab:blue", marker="o", linewidth=2)
        axis.set_xlabel("gamma")
        axis.set_title(metric, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _prompt_section(report: Report, size: Size, records: Records) -> None:
    report.text(
        "Prompts in the last layer of a frozen tiny ViT, and two linear probes (on the mean of the patch tokens, on "
        "CLS) trained on the same birds. The edit repaints a bird's mark as its sibling's."
    )
    rows = [
        {
            "backbone": backbone,
            "seed": seed,
            "Prompt-CAM accuracy": round(u["prompt accuracy"], 3),
            "mean probe accuracy": round(u["probe accuracy"]["mean"], 3),
            "CLS probe accuracy": round(u["probe accuracy"]["cls"], 3),
            "edited mark: follows": rounded(flipped(u)),
            "edited mark: stays": round(u["unchanged"] / max(u["edited"], 1), 3),
        }
        for backbone in size.prompt_backbones
        for seed in size.prompt_seeds
        for u in [records[f"promptcam/{backbone}/{seed}"]]
    ]
    report.table(rows)
    for backbone in size.prompt_backbones:
        table = prompt_rows(records, backbone)
        report.table(
            table,
            caption=f"tiny:{backbone}: maps on the birds that prompts and both probes get right",
            highlight=best(table, PROMPT_COLUMNS),
        )
    verdicts = [
        {"Prompt-CAM (mean of heads) above": rival}
        | {metric: prompt_verdict(size, records, rival, metric) for metric in ("energy in trait", "pointing at trait")}
        for rival in ("gradcam, mean probe", "gradcam, cls probe", "rollout", "cls_attention")
    ]
    report.table(verdicts, caption="Runs in which the mean over the birds is higher (whole interval above zero)")
    report.text(
        "Prompts cost some accuracy: all class knowledge must fit into *where* a prompt looks. A sibling's prompt "
        "looks at much the same places, because maps show where marks are, while the decision lies in how well the "
        "mark there matches. CLS attention localises better than any class-specific map here: the backbones were "
        "taught with mark labels on patches and CLS. What holds and what does not is counted above, not asserted."
    )


def prompt_verdict(size: Size, records: Records, rival: str, metric: str) -> str:
    """In how many runs Prompt-CAM's mean is above the rival's, and in how many with its whole interval."""
    units = [records[f"promptcam/{b}/{seed}"] for b in size.prompt_backbones for seed in size.prompt_seeds]
    gains = [
        paired_difference(
            np.array(u["prompt"]["Prompt-CAM (mean of heads)"][metric], dtype=float),
            np.array(u["rivals"][rival][metric], dtype=float),
        )
        for u in units
    ]
    higher, clearly = sum(g.difference > 0 for g in gains), sum(g.low > 0 for g in gains)
    return f"{higher} of {len(gains)} ({clearly})"


def _shortcut_section(report: Report, records: Records) -> None:
    units = [u for name, u in records.items() if name.startswith("shortcut/")]
    report.heading("Does a map give a shortcut away?")
    report.text(
        "In training, the colour of a disc in the corner betrays the species of 95 % of the birds; here it is random. "
        "A map that shows energy in the disc tells the user about the shortcut before the accuracy does."
    )
    rows = []
    for net in units[0]:
        for arm in units[0][net]["maps"]:
            row: dict[str, Any] = {
                "net": net,
                "accuracy": round(float(np.mean([u[net]["accuracy"] for u in units])), 3),
            }
            row["map"] = arm
            for region in ("energy in disc", "energy in trait"):
                values = np.concatenate([np.array(u[net]["maps"][arm][region], dtype=float) for u in units])
                row[region] = rounded(bootstrap_interval(values))
            rows.append(row)
    report.table(rows)


def _text_section(report: Report, record: dict[str, Any]) -> None:
    report.heading("Finding a described mark")
    rows = []
    for pair, by_gamma in record["scores"].items():
        row: dict[str, Any] = {"texts": pair, "cosine of the texts": round(record["cosine"][pair], 2)}
        for metric in ("energy in trait", "AP of trait"):
            for gamma in TEXT_GAMMAS:
                values = np.array(by_gamma[f"{gamma:g}"][metric], dtype=float)
                row[f"{metric}, gamma {gamma:g}"] = rounded(bootstrap_interval(values))
        rows.append(row)
    report.text(
        "Grad-CAM of the tiny image-text model for a text, minus gamma times that of a more general one. The contrast "
        "removes what two texts share. It helps where they share something (a bird's caption and the same bird without "
        "its mark) and hurts where they do not: every caption of this world says *bird*, so the word alone carries "
        "nothing that training could have tied to pixels, and its cosine with a mark is about zero."
    )
    report.table(rows)
