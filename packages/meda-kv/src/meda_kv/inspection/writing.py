"""The folder of an inspection: layers.json, the pictures, the kept positions, and a report that holds them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from vfm_core.files import atomic_write, write_json
from vfm_core.report import Report
from vfm_core.runs import writable_folder, writing

from meda_kv.inspection import figures, sheets
from meda_kv.inspection.collect import Inspection

MOST_IMAGES = 24
"""Pictures of kept tokens that are drawn; of more images the numbers are in ``layers.json`` and ``kept.npz``."""


def write_inspection(found: Inspection, out: str | Path) -> dict[str, Path]:
    """Write what was found.

    Parameters
    ----------
    found : Inspection
        Of `meda_kv.inspection.collect`.
    out : str or Path
        Folder; files of the same names in it are replaced.

    Returns
    -------
    dict of str to Path
        ``layers`` (JSON), ``kept`` (npz: bool ``kept [L, Hkv, n]``, ``visual [n]``, ``layers [L]``), ``entropy``,
        ``budgets``, ``tokens``, ``attention``, ``kept_1`` ... (PNG) and ``report`` (HTML).

    Raises
    ------
    UserError
        The folder cannot be written.
    """
    folder = writable_folder(out)
    with writing(folder):
        return _write(found, folder)


def _write(found: Inspection, folder: Path) -> dict[str, Path]:
    paths = {"layers": folder / "layers.json", "kept": folder / "kept.npz"}
    write_json(paths["layers"], found.to_dict())
    with atomic_write(paths["kept"]) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, kept=found.kept, visual=found.visual, layers=np.array(found.layers))
    for old in (*folder.glob("kept_*.png"), *folder.glob("looked_*.png")):
        old.unlink()
    paths["entropy"] = _save(figures.entropy_figure(found), folder / "entropy.png")
    paths["budgets"] = _save(figures.budgets_figure(found), folder / "budgets.png")
    paths["tokens"] = _save(figures.tokens_figure(found), folder / "tokens.png")
    if found.maps:
        paths["attention"] = _save(figures.attention_figure(found), folder / "attention.png")
    for i in range(min(len(found.images), MOST_IMAGES)):
        paths[f"kept_{i + 1}"] = _save(sheets.kept_sheet(found, i), folder / f"kept_{i + 1}.png")
        looked = sheets.looked_sheet(found, i)
        if looked is not None:
            paths[f"looked_{i + 1}"] = _save(looked, folder / f"looked_{i + 1}.png")
    paths["report"] = _report(found, paths).write(folder / "report.html")
    return paths


def _save(picture: Any, path: Path) -> Path:
    with atomic_write(path) as temporary:
        if hasattr(picture, "savefig"):
            picture.savefig(temporary, format="png", dpi=150)
        else:
            picture.save(temporary, format="PNG")
    return path


ANSWERS_NOTE = (
    "The first token of every answer comes from the full cache. KV in use: keys and values of what was kept of the "
    "prompt, and of the answer; allocated: with the buffer's room for further tokens."
)


def budget_sentence(found: Inspection) -> str:
    """What the budgets sum to, against the request, and why nothing was dropped where that is so."""
    told = f"budgets sum to {sum(found.budgets)} of {found.n * len(found.layers)} tokens over all layers"
    if sum(found.budgets) != found.asked:
        told += f" ({found.asked} asked for)"
    note = found.summary.get("note")
    return f"{told}; {note}" if note else told


def answers_table(found: Inspection) -> list[dict[str, Any]]:
    """Answers at falling ratios, as rows of a table (the paper's Fig. 5)."""
    return [
        {
            "method": row["method"],
            "ratio": row["ratio"],
            "kept": row["ratio_actual"],
            "KV in use": size(row["bytes_in_use"]),
            "allocated": size(row["bytes"]),
            "answer": row["text"] or "(nothing)",
        }
        for row in found.texts
    ]


def layers_table(found: Inspection) -> list[dict[str, Any]]:
    """One row per layer."""
    return [
        {
            "layer": row["layer"],
            "cross": row["entropy_cross"],
            "cross-causal": row["entropy_cross_causal"],
            "self": row["entropy_self"],
            "budget": row["budget"],
            "kept text": row["kept_text"],
            "kept visual": row["kept_visual"],
        }
        for row in found.to_dict()["layers"]
    ]


def size(count: int) -> str:
    """Bytes for people, such as ``1.5 MB`` (powers of 1000)."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def _report(found: Inspection, paths: dict[str, Path]) -> Report:
    method, ratio = found.settings["method"], found.settings["ratio"]
    model = found.model["name"] or found.model["class"]
    report = Report("What the cache keeps", f"{model}: {method} at ratio {ratio:g}")
    report.text(
        f"The prompt has **{found.n} tokens, {found.visual_tokens} of them visual**, read by {len(found.layers)} "
        f"layers with {found.kept.shape[1]} KV heads each. `{method}` at ratio {ratio:g}: the {budget_sentence(found)}."
    )
    report.heading("Layers")
    used = found.summary.get("entropy_used")
    report.figure(paths["entropy"], "Entropy per layer. " + (f"The budgets follow {used}." if used else ""))
    report.figure(paths["budgets"], "Kept tokens per layer, mean over KV heads.")
    report.table(layers_table(found), caption="Entropies in nats; kept tokens are means over KV heads.")
    report.heading("Kept tokens")
    report.figure(paths["tokens"], "Every layer over the whole prompt. Brackets mark the images.")
    shown = [i for i in range(len(found.images)) if f"kept_{i + 1}" in paths]
    notes = list(dict.fromkeys(found.images[i].note for i in shown))
    if shown:
        report.gallery(
            [(sheets.key_sheet("kept"), "")]
            + [(paths[f"kept_{i + 1}"], f"Image {i + 1}" + _of(found.images[i].note, notes)) for i in shown],
            "What each layer kept of each image; the percentage is the share of the image's tokens that the layer "
            "holds, mean over heads." + (f" All images: {notes[0]}." if len(notes) == 1 else ""),
        )
    if len(shown) < len(found.images):
        report.text(f"Images {len(shown) + 1} to {len(found.images)} are in `layers.json` and `kept.npz`.")
    if "attention" in paths:
        report.heading("Attention")
        report.figure(
            paths["attention"],
            "Attention per layer, mean over heads and over bins of neighbouring tokens, on a logarithmic scale.",
        )
        looked = [i for i in shown if f"looked_{i + 1}" in paths]
        if looked:
            report.gallery(
                [(sheets.key_sheet("looked"), "")] + [(paths[f"looked_{i + 1}"], f"Image {i + 1}") for i in looked],
                "Where the text tokens look. The percentage is the share of their attention that this image gets; most "
                "is what its brightest token gets. Every panel has its own scale, from none to that most.",
            )
    report.heading("Answers")
    report.table(answers_table(found), caption=ANSWERS_NOTE)
    return report


def _of(note: str, notes: list[str]) -> str:
    """The kind of grid, where it is not the same for all images."""
    return f": {note}" if len(notes) > 1 else ""
