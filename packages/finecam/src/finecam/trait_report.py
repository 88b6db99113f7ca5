"""Pages of a trained Prompt-CAM: each image with its most important heads, and what two classes share.

The panels of Prompt-CAM (arXiv 2501.09333): the heads of the target class's prompt, ranked by greedy blurring; for a
misclassified image the predicted class's prompt beside them; one image seen by the prompts of two classes.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vfm_core.data import loader
from vfm_core.errors import UserError
from vfm_core.report import Report
from vfm_core.runs import RunDir

from finecam import render
from finecam.data import ImageDataset, open_dataset
from finecam.gallery import GalleryPage, write_gallery
from finecam.products import LAYER_SIDE, relative_name, store_maps, store_picture
from finecam.promptcam import PromptCAM
from finecam.promptcam_io import load
from finecam.targets import ids_by_name
from finecam.trait_tables import annotated_hits, hits_table, pruning_figure, pruning_rows, survival_of
from finecam.traits import Traits, shared_traits

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
CLASSES_SHOWN = 40
PER_CLASS = 2  # panels per class in the report; the gallery has them all


@dataclass
class TraitSummary:
    """What `explain_traits` or `compare_classes` did: images with a result, failures, the page, and a remark."""

    out: Path
    index: Path
    done: int
    failed: int
    note: str = ""

    def line(self) -> str:
        """One line for a person."""
        return f"{self.done} images, {self.failed} failed" + (f"; {self.note}" if self.note else "")


def _labels(dataset: ImageDataset, model: PromptCAM) -> list[int | None]:
    """Model class id of each image's label, None where it has none or the model does not know it."""
    known = ids_by_name(dataset.classes, model.class_names)
    return [None if label < 0 else known[int(label)] for label in dataset.labels]


def explain_traits(
    model: str | os.PathLike[str] | PromptCAM,
    data: str | os.PathLike[str] | ImageDataset,
    out: str | os.PathLike[str],
    *,
    top: int = 4,
    target: str | int | None = None,
    batch_size: int = 16,
    workers: int = 0,
    limit: int | None = None,
    class_names: Sequence[str] | str | Path | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TraitSummary:
    """Show the `top` most important heads of the target class on every image.

    Parameters
    ----------
    model
        A folder of `train_promptcam`, an official checkpoint, or a `PromptCAM`.
    data
        Images.
    out
        Run folder; the same call again finishes what is missing.
    top
        Heads shown, at most all of the model's.
    target
        None or ``"predicted"``, ``"label"``, or a class name or id.
    class_names, heads
        Of an official checkpoint, which holds neither (see `finecam.promptcam_io.load_official`).
    batch_size, workers, limit, device, overwrite, progress
        As in `explain_folder`.

    Raises
    ------
    UserError
        Unknown class, labels that the model does not know (with ``"label"``), unreadable model folder.
    """
    if not isinstance(model, PromptCAM):
        model = load(os.fspath(model), class_names=class_names, heads=heads, device=device)
    available = model.backbone.num_heads
    note = f"the model has {available} heads: all are shown, not {top}" if top > available else ""
    top = min(top, available)  # the gallery's views are named by rank: more names than maps would shift them
    dataset = data if isinstance(data, ImageDataset) else open_dataset(data)
    labels = _labels(dataset, model)
    chosen = None if target in (None, "predicted", "label") else int(model.class_ids([target])[0])
    if target == "label":
        unknown = {dataset.classes[int(c)] for c, own in zip(dataset.labels, labels) if own is None and c >= 0}
        if unknown or not dataset.classes:
            given = ", ".join(sorted(unknown)[:5]) or "no labels"
            raise UserError(
                "labels the model does not know", where=dataset.name, given=given, remedy="use --target predicted"
            )
    config = {
        "data": dataset.name,
        "model": str(model.backbone.spec),
        "classes": model.class_names,
        "weights": _digest(model),
        "top": top,
        "target": target if chosen is None else chosen,
    }
    out = Path(out)
    with RunDir(out, config, overwrite=overwrite, key="image") as run:
        order = [i for i in range(len(dataset))[:limit] if dataset.ids[i] not in run.done]

        def failed(i: int, image: str, error: UserError) -> None:
            run.append_error({"image": image, "error": str(error)})

        stream: Iterable[Any] = loader(
            dataset, model.preprocess, batch_size, workers, device, indices=order, on_error=failed
        )
        for positions, x, samples in progress(stream, -(-len(order) // batch_size)) if progress else stream:
            own = [labels[int(i)] for i in positions]
            if target == "label":
                wanted: Any = torch.tensor([-1 if c is None else c for c in own], device=x.device)
            else:
                wanted = chosen
            traits = model.traits(x, wanted, top=top)
            for i, sample in enumerate(samples):
                run.append(_store(model, traits, i, sample, own[i], out))
        records, errors = run.records(), run.errors()
        index = _pages(out, records, errors, top, model)
    return TraitSummary(out, index, len(records), len(errors), note)


def _digest(model: PromptCAM) -> str:
    from vfm_core.backbones import fingerprint

    return fingerprint(model)[:32]


def _store(model: PromptCAM, traits: Traits, i: int, sample: Any, label: int | None, out: Path) -> dict[str, Any]:
    """Write one image's arrays, panel and gallery layers; return its record."""
    rel, size = relative_name(sample.id), sample.image.size
    box = model.preprocess.box(size)
    heads = traits.heads[i].tolist()
    raw = torch.cat([traits.maps[i], traits.mean_map()[i][None]]).float().cpu().numpy()
    names = [f"head {h + 1}" for h in heads] + ["mean of these"]
    cells = render.cells_on_original((raw.shape[1], raw.shape[2]), box, size)
    arrays = {
        "traits": render.to_original(raw[:-1], box, size, cells).astype(np.float16),
        "mean": render.to_original(raw[-1], box, size, cells).astype(np.float16),
        "heads": np.asarray(heads, np.int32),
        "box": np.asarray(box, np.float32),
        "size": np.asarray(size, np.int32),
    }
    store_maps(out / "maps" / f"{rel}.npz", arrays)
    picture = sample.image.resize(render.fit_within(size, 512), reducing_gap=2.0)
    shape = (picture.height, picture.width)
    scaled = render.minmax(raw)
    tiles = [(picture, "image")]
    for name, values, peak in zip(names, scaled, raw.max((1, 2))):
        # Every map is scaled to its own maximum: the raw peak tells a sharp head from a flat one.
        tiles.append(
            (render.overlay(picture, render.to_original(values, box, size, shape)), f"{name}, peak {peak:.2f}")
        )
    target, prediction = int(traits.target[i]), int(traits.prediction[i])
    if prediction != target:
        other = render.minmax(traits.predicted_attention[i].mean(0).float().cpu().numpy())
        caption = f"predicted: {model.class_names[prediction]}"
        tiles.append((render.overlay(picture, render.to_original(other, box, size, shape)), caption))
    store_picture(out / "overlays" / f"{rel}.webp", render.panel(tiles, model.class_names[target]))
    layers = []
    scale = LAYER_SIDE / max(size)
    fine = render.to_original(scaled, box, size, (max(1, round(size[1] * scale)), max(1, round(size[0] * scale))))
    store_picture(out / "gallery" / f"{rel}.webp", picture)
    for k, values in enumerate(fine):
        layers.append(f"gallery/{rel}.h{k}.webp")
        store_picture(out / layers[-1], render.heat_layer(values), None)
    probabilities = traits.logits[i].softmax(-1)

    def entry(c: int) -> dict[str, Any]:
        return {"id": c, "name": model.class_names[c], "prob": float(probabilities[c])}

    return {
        "image": sample.id,
        "size": list(size),
        "label": None if label is None else model.class_names[label],
        "target": entry(target),
        "prediction": entry(prediction),
        "heads": [h + 1 for h in heads],
        "peaks": [float(p) for p in raw[:-1].max((1, 2))],
        "sufficient": int(traits.sufficient[i]),
        "survival": survival_of(traits, i),
        "hits": annotated_hits(raw[:-1], sample.meta, box),
        "map": f"maps/{rel}.npz",
        "overlay": f"overlays/{rel}.webp",
        "pictures": {"image": f"gallery/{rel}.webp", "layers": layers, "example": None},
        "peak": render.peak(render.to_original(scaled[-1], box, size, cells), size),
        "empty": False,
    }


def _pages(
    out: Path, records: Sequence[dict[str, Any]], errors: Sequence[dict[str, Any]], top: int, model: PromptCAM
) -> Path:
    from importlib.metadata import version

    by_class: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r["image"]):
        by_class[record["target"]["name"]].append(record)
    line = f"{len(records)} images, {model.num_classes} classes, {model.backbone.spec}"
    report = Report("finecam promptcam traits", line)
    report.heading("Per class")
    rows = []
    for name, group in sorted(by_class.items()):
        right = [r["prediction"]["name"] == r["target"]["name"] for r in group]
        rows.append(
            {
                "class": name,
                "images": len(group),
                "predicted as this class": sum(right) / len(right),
                "heads that suffice (mean)": sum(r["sufficient"] for r in group) / len(group),
            }
        )
    if rows:
        report.table(rows)
        _numbers(report, records, top)
        report.heading("Panels")
        if len(by_class) > CLASSES_SHOWN:
            report.text(f"Panels of the first {CLASSES_SHOWN} classes follow; index.html has all images.")
        for name, group in sorted(by_class.items())[:CLASSES_SHOWN]:
            report.heading(name, level=3)
            shown = sorted(group, key=lambda r: -r["target"]["prob"])[:PER_CLASS]
            report.gallery([(out / r["overlay"], r["image"]) for r in shown])
    if errors:
        report.heading("Failed images")
        report.table([{"image": e["image"], "reason": e["error"]} for e in errors])
    report.write(out / "report.html")
    ranks = ["most important head", *(f"head no. {k}" for k in range(2, top + 1))]
    page = GalleryPage(
        title="Traits by head",
        subtitle=line,
        views=["image", *ranks, "mean of these"],
        links=[("report", "report.html"), ("all records", "results.jsonl"), ("options", "config.json")],
        footer=f"finecam {version('finecam')}",
    )
    return write_gallery(out, records, errors, page)


def _numbers(report: Report, records: Sequence[dict[str, Any]], top: int) -> None:
    """Pruning curve and, where traits or parts are annotated, how many the heads find."""
    curve = pruning_rows(records)
    report.heading("Blurring one head after the other")
    if not curve:
        report.text("No image is classified as its target, so there is no decision to take apart.")
    else:
        report.text(
            f"Mean over the {curve[0]['images']} images classified as their target. The head that matters least is "
            "blurred first (greedy); the decision that survives with few heads rests on few traits."
        )
        report.figure(pruning_figure(curve), "Target class against heads kept", "pruning curve")
        report.table(curve)
    if hits := hits_table(records):
        report.heading("Annotated traits and parts")
        report.text(
            f"A trait is found when the strongest cell of at least one of the {top} heads shown touches its mask. "
            "By chance: the same for that many cells drawn at random from the map."
        )
        report.table(hits)


def compare_classes(
    model: str | os.PathLike[str] | PromptCAM,
    data: str | os.PathLike[str] | ImageDataset,
    first: str | int,
    second: str | int,
    out: str | os.PathLike[str],
    *,
    batch_size: int = 16,
    workers: int = 0,
    limit: int | None = None,
    class_names: Sequence[str] | str | Path | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TraitSummary:
    """Show every image to the prompts of two classes: heads that look at the same place are traits the two share.

    Parameters
    ----------
    first, second
        Names or ids of the two classes.
    model, data, out, batch_size, workers, limit, class_names, heads, device, overwrite, progress
        As in `explain_traits`.

    Raises
    ------
    UserError
        Unknown or equal classes.
    """
    if not isinstance(model, PromptCAM):
        model = load(os.fspath(model), class_names=class_names, heads=heads, device=device)
    dataset = data if isinstance(data, ImageDataset) else open_dataset(data)
    names = [model.class_names[int(c)] for c in model.class_ids([first, second])]
    if names[0] == names[1]:  # before the folder notes what was asked for
        raise UserError("need two different classes", given=names[0], remedy="name another second class")
    config = {"data": dataset.name, "model": str(model.backbone.spec), "weights": _digest(model), "classes": names}
    out = Path(out)
    with RunDir(out, config, overwrite=overwrite, key="image") as run:
        order = [i for i in range(len(dataset))[:limit] if dataset.ids[i] not in run.done]

        def failed(i: int, image: str, error: UserError) -> None:
            run.append_error({"image": image, "error": str(error)})

        stream: Iterable[Any] = loader(
            dataset, model.preprocess, batch_size, workers, device, indices=order, on_error=failed
        )
        for _, x, samples in progress(stream, -(-len(order) // batch_size)) if progress else stream:
            shared = shared_traits(model, x, names[0], names[1])
            for i, sample in enumerate(samples):
                run.append(_compared(model, shared.cosine[i], shared.first[i], shared.second[i], names, sample, out))
        records, errors = run.records(), run.errors()
        cosines = np.array([r["cosine"] for r in records]).reshape(len(records), -1)
        report = Report("finecam promptcam compare", f"{names[0]} and {names[1]}, {len(records)} images")
        report.heading("Heads, most shared first")
        report.text("Cosine of the two prompts' attention on the same image, mean over images: 1 = the same place.")
        if len(records):
            order_of_heads = cosines.mean(0).argsort()[::-1]
            report.table([{"head": int(h) + 1, "cosine": float(cosines[:, h].mean())} for h in order_of_heads])
            report.heading("Images")
            report.gallery([(out / r["overlay"], r["image"]) for r in records[:24]])
        if errors:
            report.heading("Failed images")
            report.table([{"image": e["image"], "reason": e["error"]} for e in errors])
        index = report.write(run.report_path)
    return TraitSummary(out, index, len(records), len(errors))


def _compared(
    model: PromptCAM, cosine: Tensor, first: Tensor, second: Tensor, names: Sequence[str], sample: Any, out: Path
) -> dict[str, Any]:
    """Panel of one image: the head the two classes share most and the one they share least, for both."""
    size, rel = sample.image.size, relative_name(sample.id)
    box = model.preprocess.box(size)
    picture = sample.image.resize(render.fit_within(size, 512), reducing_gap=2.0)
    tiles = [(picture, "image")]
    for what, h in (("shared", int(cosine.argmax())), ("own", int(cosine.argmin()))):
        for name, maps in zip(names, (first, second)):
            values = render.minmax(maps[h].float().cpu().numpy())
            placed = render.to_original(values, box, size, (picture.height, picture.width))
            tiles.append((render.overlay(picture, placed), f"{what}, head {h + 1}: {name}"))
    store_picture(out / "overlays" / f"{rel}.webp", render.panel(tiles, f"{names[0]} and {names[1]}"))
    return {"image": sample.id, "cosine": cosine.tolist(), "overlay": f"overlays/{rel}.webp"}
