"""The end of a run: a table per class, one Parquet file of all scalars, the gallery and the report."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vfm_core.files import atomic_write, write_json

from finecam.gallery import GalleryPage, contrast_views, write_gallery

Record = Mapping[str, Any]
PANELS_IN_REPORT = 12


def class_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per target class: counts, how often it was predicted right, certainty, usual references, mean metrics."""
    by_class: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_class[record["target"]["name"]].append(record)
    metrics = sorted({key for record in records for key in record.get("metrics") or {}})
    rows = []
    for name, group in sorted(by_class.items()):
        labelled = [r for r in group if r.get("label") is not None]
        references = Counter(d["name"] for r in group for d in r["references"])
        row: dict[str, Any] = {
            "class": name,
            "images": len(group),
            "labelled": len(labelled),
            "predicted right": _mean([r["label"] == r["prediction"]["name"] for r in labelled]),
            "mean probability": _mean([r["target"]["prob"] for r in group]),
            "usual references": ", ".join(d for d, _ in references.most_common(3)),
            "empty maps": sum(bool(r["empty"]) for r in group),
        }
        for key in metrics:
            row[key] = _mean([r["metrics"][key] for r in group if (r.get("metrics") or {}).get(key) is not None])
        rows.append(row)
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, atomically; nothing is written as an empty cell."""
    stream = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if v is None else round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    with atomic_write(path) as part:
        part.write_text(stream.getvalue(), encoding="utf-8")


def write_parquet(path: Path, records: Sequence[Record]) -> None:
    """Write one flat row per image, for tools that read columns: ids, names, probabilities, peak, box, metrics."""
    import pyarrow
    from pyarrow import parquet

    rows = []
    for r in records:
        peak, box = r.get("peak") or (None, None), r.get("top5pct_box") or (None,) * 4
        row = {
            "image": r["image"],
            "width": r["size"][0],
            "height": r["size"][1],
            "label": r.get("label"),
            **{f"{what}_{key}": r[what][key] for what in ("target", "prediction") for key in ("id", "name", "prob")},
            "references": [d["name"] for d in r["references"]],
            "gamma": r["gamma"],
            "peak_x": peak[0],
            "peak_y": peak[1],
            **dict(zip(("x0", "y0", "x1", "y1"), box)),
            "empty": bool(r["empty"]),
            "map": r["map"],
            **(r.get("metrics") or {}),
        }
        rows.append(row)
    with atomic_write(path) as part:
        parquet.write_table(pyarrow.Table.from_pylist(rows), part)


def log_run(path: Path, entry: Mapping[str, Any]) -> None:
    """Add one start's counts, seconds and machine to a JSON list; resuming adds another entry."""
    before: list[Any] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged log must not cost the run
        before = list(json.loads(path.read_text(encoding="utf-8"))["runs"])
    write_json(path, {"runs": [*before, dict(entry)]})


def headline(records: Sequence[Record], errors: Sequence[Record], config: Mapping[str, Any]) -> str:
    """What was done, in one line."""
    gammas = ", ".join(f"{g:g}" for g in (records[0]["gammas"][1:] if records else config.get("gammas", ())))
    parts = [
        f"{len(records)} image{'s' * (len(records) != 1)}" + (f", {len(errors)} failed" if errors else ""),
        str(config.get("model", "")),
        f"{config.get('method', '')} at {config.get('layer', '')}",
        f"gamma {gammas}" if gammas else "plain maps" if "gammas" in config else "maps of no class",
    ]
    return " · ".join(part for part in parts if part)


def write_index(out: Path, records: Sequence[Record], errors: Sequence[Record], config: Mapping[str, Any]) -> Path:
    """Write ``summary.csv``, ``results.parquet``, ``index.html`` and ``report.html`` of a run; return the page.

    Parameters
    ----------
    out
        The run folder.
    records, errors
        Lines of ``results.jsonl`` and the standing errors.
    config
        The run's configuration.
    """
    from importlib.metadata import version

    from vfm_core.report import Report

    from finecam.render import title

    records = sorted(records, key=lambda r: str(r["image"]))
    rows = class_table(records)
    write_table(out / "summary.csv", rows)
    write_parquet(out / "results.parquet", records)
    style = config.get("style", {})
    line = headline(records, errors, config)
    report = Report("finecam explain", line)
    if rows:
        report.heading("Per class")
        report.table(rows)
    shown = [r for r in records if r["overlay"] and (out / r["overlay"]).is_file()][:PANELS_IN_REPORT]
    if shown:
        report.heading("Panels")
        pairs = []
        for r in shown:
            names = [d["name"] for d in r["references"]]
            pairs.append((out / r["overlay"], f"{r['image']}: {title(r['target']['name'], names, *r['gammas'])}"))
        report.gallery(pairs)
    if errors:
        report.heading("Failed images")
        report.table([{"image": e["image"], "reason": e["error"]} for e in errors])
    report.write(out / "report.html")
    page = GalleryPage(
        title="Why A and not B" if "gammas" in config else "Where the model looks",
        subtitle=line,
        views=contrast_views(records[0]["gammas"] if records else (0.0,)) if "gammas" in config else ["image", "map"],
        start=2 if records and len(records[0]["gammas"]) > 1 else 1,
        colormap=style.get("colormap", "turbo"),
        links=[
            ("report", "report.html"),
            ("table per class", "summary.csv"),
            ("all records", "results.jsonl"),
            ("as Parquet", "results.parquet"),
            ("options", "config.json"),
            *([("errors", "errors.jsonl")] if errors else []),
        ],
        footer=f"finecam {version('finecam')}",
    )
    return write_gallery(out, records, errors, page)
