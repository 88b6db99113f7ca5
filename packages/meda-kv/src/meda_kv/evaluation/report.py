"""The report of an evaluation: recommendation, score against ratio, tables, bytes and times as measured, failures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.report import Report, house_style

from meda_kv.evaluation.recommend import Recommendation
from meda_kv.evaluation.results import Results, Row
from meda_kv.evaluation.tables import byte_rows, cells_of, count_of, grid_rows, heading, mended_rows, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^v<>PXhp*d8"
_MOST_FAILURES = 200


def score_figure(rows: Sequence[Row], title: str = "") -> Figure:
    """Score against ratio, one line per method with its interval, the full cache as a level line.

    Parameters
    ----------
    rows
        Of one task and kind of question.
    title
        Above the axes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with house_style():
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        colours = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
        for row in rows:
            if row.method == "full":
                axes.axhline(row.score.mean, color="0.35", linestyle="--", linewidth=1.2, label="full")
                axes.axhspan(row.score.low, row.score.high, color="0.5", alpha=0.12, linewidth=0)
        methods = [m for m in dict.fromkeys(row.method for row in rows) if m != "full"]
        ratios = sorted({row.ratio for row in rows if row.method != "full"})
        for i, method in enumerate(methods):
            line = sorted((row for row in rows if row.method == method), key=lambda row: row.ratio)
            # Side by side, so that intervals at one ratio can be told apart.
            x = [row.ratio * (1 + 0.012 * (i - (len(methods) - 1) / 2)) for row in line]
            y = [row.score.mean for row in line]
            spread = [
                [max(0.0, row.score.mean - row.score.low) for row in line],
                [max(0.0, row.score.high - row.score.mean) for row in line],
            ]
            axes.errorbar(
                x,
                y,
                yerr=spread,
                label=method,
                color=colours[(2 * i) % 20 + (i >= 10)],
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=5,
                linewidth=1.4,
                elinewidth=0.8,
                capsize=2,
            )
        if ratios:
            axes.set_xscale("log")
            axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
            axes.set_xticks([], minor=True)
        axes.set_xlabel("ratio of the prompt's KV cache that is kept")
        axes.set_ylabel("score")
        if len(ratios) == 1:  # room beside the one tick, or the methods would stand at the ends of the axis
            axes.set_xlim(ratios[0] / 1.6, ratios[0] * 1.6)
        # Where every mean is 0 the axis would show nothing but the interval.
        axes.set_ylim(bottom=0, top=None if any(row.score.mean > 0 for row in rows) else 1)
        axes.set_title(title)
        columns = 3 if max((len(method) for method in methods), default=0) > 16 else 4
        figure.legend(fontsize="small", ncols=columns, loc="outside lower center", frameon=False)
    return figure


def build_report(
    results: Results,
    parts: dict[str, list[Row]],
    recommendations: Sequence[Recommendation],
    missing: Sequence[str] = (),
) -> Report:
    """Assemble the report.

    Parameters
    ----------
    results
        All records.
    parts
        Rows by division: ``task``, and ``group`` and ``level`` where they say more than the tasks.
    recommendations
        Shown first.
    missing
        Shards that are not there yet.
    """
    config = results.config
    report = Report(
        "KV-cache compression: what it costs on these answers",
        f"{config.get('model', '?')} on {config.get('task', '?')}, protocol {config.get('protocol', '?')}, "
        f"preset {config.get('preset', '?')}, seed {config.get('seed', 0)}",
    )
    report.heading("Recommendation")
    if missing:
        report.text(f"Shards not merged yet: {', '.join(missing)}. All numbers are of the others.")
    for item in recommendations:
        leaders = item.leader_sentence()
        report.text(
            f"**{_plain(item.sentence())}**" + (f"\n\nBest at every ratio: {_plain(leaders)}." if leaders else "")
        )
    report.text(protocol_note(str(config.get("protocol", ""))))
    report.heading("Score against ratio")
    for name, kind, rows in cells_of(parts.get("task", [])):
        title = title_of(name, kind)
        report.figure(score_figure(rows, title), caption=f"{title}: mean score and 95 % interval over samples")
    for division, rows in parts.items():
        report.heading(
            {"task": "Tasks", "group": "Groups of tasks", "level": "Number of images", "all": "All tasks"}.get(
                division, division
            )
        )
        for name, kind, part in cells_of(rows):
            grid = grid_rows(part)
            caption = f"{heading(division, name, kind)}: mean score [95 % interval], {count_of(part)}"
            report.table(grid, caption=caption, highlight=[c for c in grid[0] if c != "method"])
            differences = _difference_rows(part)
            if differences and division == "task":
                report.table(differences, caption=f"{title_of(name, kind)}: difference to the full cache, paired")
    differ = mended_rows(parts.get("task", []))
    if differ:
        report.heading("MileBench's scorer and the mended one")
        report.text(
            "The scores above are those of MileBench's own scorer, to compare with published ones. It takes an empty "
            "answer for C, the first letter of a two-letter key, and never finds an option with a special character or "
            "a needle of several words; with these mended:"
        )
        report.table(differ)
    report.heading("Bytes and time, as measured")
    report.text(
        "Bytes are those of the key and value tensors per sample right after compression, without answer tokens. Times "
        "are wall time per sample; one reading of the prompt serves all arms and is not part of them."
    )
    for name, rows in _first_kind(parts.get("task", [])).items():
        report.table(byte_rows(rows), caption=name)
    if results.errors:
        report.heading("Failed samples")
        count = len({(error["task"], error["sample_id"]) for error in results.errors})
        caption = f"{count} samples; errors.jsonl names them all, and the same command tries them again"
        report.table(failure_rows(results)[:_MOST_FAILURES], caption=caption)
    return report


def failure_rows(results: Results) -> list[dict[str, Any]]:
    """One row per reason: ``task``, ``sample_id`` (one, or how many), ``arms`` and ``error``."""
    by_sample: dict[tuple[str, str, str], list[str]] = {}
    for error in results.errors:
        by_sample.setdefault((error["task"], error["error"], error["sample_id"]), []).append(error["arm"])
    by_reason: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (task, text, sample), arms in by_sample.items():
        by_reason.setdefault((task, text, tuple(arms)), []).append(sample)
    return [
        {
            "task": task,
            "sample_id": samples[0] if len(samples) == 1 else f"{samples[0]} and {len(samples) - 1} more",
            "arms": ", ".join(arms) if len(arms) <= 3 else f"{len(arms)} arms",
            "error": text,
        }
        for (task, text, arms), samples in by_reason.items()
    ]


def protocol_note(protocol: str) -> str:
    """What the protocol does and does not test, in Markdown."""
    notes = {
        "generate": "Protocol *generate*: the first answer token comes from the full cache, compression is visible "
        "from the second on. The column *tokens after* counts the answer tokens that were computed on what is left.",
        "asked": "Protocol *asked*: context and first question are read and compressed, then every question is put to "
        "what is left; *asked* is the first one, *other* are those that compression could not know of. A prompt "
        "without a list of questions is asked its own again, the text after its last picture.",
        "agnostic": "Protocol *agnostic*: only the context is read before compression, then every question is put to "
        "what is left. Of a prompt without a list of questions, the text after its last picture is held back.",
    }
    return notes.get(protocol, f"Protocol {protocol}.")


def write_report(path: str | Path, report: Report, markdown: bool = False) -> Path:
    """Write the HTML file, and its Markdown twin on request."""
    return report.write(path, markdown=markdown)


def _difference_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        if row.difference is not None:
            d = row.difference
            line: dict[str, Any] = {"method": row.method, "ratio": row.ratio}
            line |= {"difference": (d.difference, d.low, d.high), "p": d.p}
            found.append(line | ({} if row.seed_std is None else {"std over seeds": row.seed_std}))
    return found


def _first_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.kind == rows[0].kind:
            found.setdefault(row.name, []).append(row)
    return found


def _plain(text: str) -> str:
    """Text whose characters mean nothing in Markdown."""
    return "".join("\\" + c if c in "\\`*_{}[]<>#|" else c for c in text)
