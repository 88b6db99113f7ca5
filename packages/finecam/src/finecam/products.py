"""What one explained image leaves behind: arrays, a panel, the gallery's layers, and its line in ``results.jsonl``.

Everything is written beside its final name and renamed, so a killed run leaves whole files or none. Arrays are plain
(no pickles) and span the original picture; cells the model never saw are NaN.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from vfm_core.files import TEMPORARY, atomic_write

from finecam import render
from finecam.families import FAMILIES

if TYPE_CHECKING:
    from vfm_core.runs import RunDir

    from finecam.render import Array, Box

log = logging.getLogger(__name__)

NO_EVIDENCE = (
    "empty_map: no evidence for the target reaches this layer; use the last block's first norm layer, or a layer "
    "before the pooling that the classifier reads"
)
OUTWEIGHED = (
    "empty_map: everywhere the references weigh as much as the target, so nothing is left of the contrast; use a "
    "smaller gamma, or other references"
)
LAYER_SIDE = 96  # longest side of a gallery heat layer; the browser scales it smoothly


@dataclass(frozen=True)
class Style:
    """How results are drawn and stored.

    Parameters
    ----------
    map_size
        ``"grid"``: cells of the model's own grid over the whole picture; ``"original"``: one cell per pixel; or the
        number of cells along the longer side.
    colormap, opacity
        See `finecam.render.overlay`.
    side
        Longest side of stored pictures in pixels; pictures are never enlarged.
    panels
        Write one panel (image | reference | plain | finer) per image.
    """

    map_size: str | int = "grid"
    colormap: str = "turbo"
    opacity: float = 0.75
    side: int = 512
    panels: bool = True

    def cells(self, grid: tuple[int, int], box: Box, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the stored map of a picture of `size` (width, height)."""
        if self.map_size == "grid":
            return render.cells_on_original(grid, box, size)
        if self.map_size == "original":
            return size[1], size[0]
        scale = int(self.map_size) / max(size)
        return max(1, round(size[1] * scale)), max(1, round(size[0] * scale))


@dataclass
class Explained:
    """The explanation of one image, still on the model's grid.

    Parameters
    ----------
    image
        Its id, a relative path for images from a folder.
    size
        (width, height) of the original picture.
    box
        What the model's input covers, in original pixels.
    picture
        The picture, scaled to the style's side.
    maps
        (gammas, h, w), not negative, plain map first.
    gammas
        Their strengths.
    target, prediction
        Class ids.
    references, weights
        Class ids and their weights a_t.
    probabilities
        (C,) softmax of the logits.
    gaps
        y^c - y^d for each reference.
    empty
        Whether the map of each strength is zero everywhere.
    note
        What differs from the other images of the run, for the record.
    """

    image: str
    size: tuple[int, int]
    box: Box
    picture: Image.Image
    maps: Array
    gammas: tuple[float, ...]
    target: int
    prediction: int
    references: tuple[int, ...]
    weights: tuple[float, ...]
    probabilities: NDArray[np.float32]
    gaps: tuple[float, ...]
    empty: tuple[bool, ...]
    label: str | None = None
    example: tuple[Image.Image, str] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str | None = None


def relative_name(image: str) -> str:
    """A path below the run folder for an image id: its own relative path, made harmless where it would climb out."""
    parts = PurePosixPath(image.replace("\\", "/")).parts
    if parts and not image.startswith("/") and ":" not in parts[0] and ".." not in parts:
        return "/".join(parts)
    name = parts[-1] if parts and parts[-1] not in ("..", "/") else "image"
    return f"elsewhere/{hashlib.sha256(image.encode()).hexdigest()[:12]}/{name.replace(':', '_')}"


def store_picture(path: Path, picture: Image.Image, quality: int | None = 82) -> None:
    """Write a WebP picture, lossless without `quality`.

    Whole or absent also after a kill, but not forced to the disk as arrays and records are: a power cut may cost
    pictures, and forcing five small files per image would take longer than drawing them.
    """
    options: dict[str, Any] = {"quality": quality, "method": 1}
    if quality is None:  # small layers: the least effort is as small as the most
        options = {"quality": 0, "method": 0, "lossless": True}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        picture.save(part, "WEBP", **options)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def store_maps(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a compressed ``.npz`` of plain arrays."""
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **arrays)
    with atomic_write(path) as part:
        part.write_bytes(stream.getvalue())


def store(
    out: Path, done: Explained, names: Sequence[str] | None, style: Style, meta: Mapping[str, Any]
) -> dict[str, Any]:
    """Write all files of one image and return its record.

    Parameters
    ----------
    out
        The run folder.
    done
        The explanation.
    names
        Class names.
    style
        How to draw and store.
    meta
        Fields of the run that stand in every record (method, layer, weighting, similarity).

    Returns
    -------
    dict
        The line for ``results.jsonl``; paths are relative to `out`.
    """
    rel = relative_name(done.image)
    grid = (done.maps.shape[-2], done.maps.shape[-1])
    scaled = render.minmax(done.maps)
    placed = render.to_original(scaled, done.box, done.size, style.cells(grid, done.box, done.size))
    main = 1 if len(done.gammas) > 1 else 0
    asks = FAMILIES[meta["method"]].asks  # else one map, which is neither plain nor finer and has no strength

    arrays: dict[str, Any] = {"plain": placed[0].astype(np.float16)}
    if main:
        arrays["finer"] = placed[main].astype(np.float16)
    if len(done.gammas) > 2:
        arrays["sweep"] = placed.astype(np.float16)
    arrays |= {
        "gammas": np.asarray(done.gammas, np.float32),
        # Each map is scaled to [0, 1]; its raw extremes tell a strong map from a weak one.
        "ranges": np.stack([done.maps.min((1, 2)), done.maps.max((1, 2))], 1).astype(np.float32),
        "box": np.asarray(done.box, np.float32),
        "size": np.asarray(done.size, np.int32),
    }
    store_maps(out / "maps" / f"{rel}.npz", arrays)

    pictures = _store_gallery(out, rel, done, scaled, style)
    heading = render.title(_name(names, done.target), [_name(names, d) for d in done.references], *done.gammas)
    heading = heading if asks else meta["method"]
    if style.panels:
        store_picture(out / "overlays" / f"{rel}.webp", _panel(done, scaled, heading, style, names, asks))
    region = render.top_region(placed[main], done.size)
    record: dict[str, Any] = {
        "image": done.image,
        "size": list(done.size),
        "label": done.label,
        "target": _class(names, done.target, done.probabilities),
        "prediction": _class(names, done.prediction, done.probabilities),
        "references": [
            _class(names, d, done.probabilities) | {"weight": round(a, 5), "gap": round(gap, 5)}
            for d, a, gap in zip(done.references, done.weights, done.gaps)
        ],
        **meta,
        "gamma": done.gammas[main] if asks else None,
        "gammas": list(done.gammas) if asks else [],
        "map": f"maps/{rel}.npz",
        "overlay": f"overlays/{rel}.webp" if style.panels else None,
        "pictures": pictures,
        "peak": render.peak(placed[main], done.size),
        "top5pct_box": region,
        "metrics": {key: round(value, 5) for key, value in done.metrics.items()},
        "empty": [gamma for gamma, zero in zip(done.gammas, done.empty) if zero],  # strengths with an all-zero map
    }
    if record["empty"]:
        record["warning"] = NO_EVIDENCE if done.empty[0] else OUTWEIGHED
    if done.note:
        record["note"] = done.note
    return record


def forget_lost(run: RunDir, out: Path, images: set[str]) -> None:
    """Take images whose stored map is gone out of the finished ones, so that they are explained again."""
    records = run.records()
    lost = {r["image"] for r in records if r["image"] in images and not (out / r["map"]).is_file()}
    if lost:
        log.warning("%d finished image%s without its map: explained again", len(lost), "s" * (len(lost) != 1))
        kept = [json.dumps(r, ensure_ascii=False) + "\n" for r in records if r["image"] not in lost]
        with atomic_write(run.path / "results.jsonl") as part:
            part.write_text("".join(kept), encoding="utf-8")
        run.done -= lost


def _name(names: Sequence[str] | None, c: int) -> str:
    return names[c] if names is not None else f"class {c}"


def _class(names: Sequence[str] | None, c: int, probabilities: NDArray[np.float32]) -> dict[str, Any]:
    # Five digits: the rest changes with the batch an image happens to be in.
    return {"id": c, "name": _name(names, c), "prob": round(float(probabilities[c]), 5)}


def _store_gallery(out: Path, rel: str, done: Explained, scaled: Array, style: Style) -> dict[str, Any]:
    base = f"gallery/{rel}"
    store_picture(out / f"{base}.webp", done.picture)
    scale = LAYER_SIDE / max(done.size)
    shape = (max(1, round(done.size[1] * scale)), max(1, round(done.size[0] * scale)))
    fine = render.to_original(scaled, done.box, done.size, shape)
    layers = []
    for gamma, values in zip(done.gammas, fine):
        layers.append(f"{base}.g{gamma:g}.webp")
        store_picture(out / layers[-1], render.heat_layer(values, style.colormap, style.opacity), None)
    if len(done.gammas) > 1:
        layers.append(f"{base}.difference.webp")
        store_picture(out / layers[-1], render.difference_layer(fine[0], fine[1]), None)
    return {"image": f"{base}.webp", "layers": layers, "example": done.example[1] if done.example else None}


def _panel(
    done: Explained, scaled: Array, heading: str, style: Style, names: Sequence[str] | None, asks: bool
) -> Image.Image:
    """Image | picture of the first reference | plain | finer, the order of the official panels."""
    height = min(max(done.picture.height, 160), 256)
    picture = done.picture.resize((max(1, round(done.picture.width * height / done.picture.height)), height))
    tiles = [(picture, "image")]
    if done.example is not None and done.references:
        tiles.append((done.example[0], f"reference: {_name(names, done.references[0])}"))
    placed = render.to_original(scaled, done.box, done.size, (picture.height, picture.width))
    for gamma, values in zip(done.gammas, placed):
        caption = f"finer, gamma {gamma:g}" if gamma else "plain" if asks else "map"
        tiles.append((render.overlay(picture, values, style.colormap, style.opacity), caption))
    return render.panel(tiles, heading, style.colormap, height=height)
