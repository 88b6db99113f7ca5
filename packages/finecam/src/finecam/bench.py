"""How fast the maps are: our explainer beside grad-cam and torchcam, on the same model and images, in one process.

The floor of any method is one forward pass without gradients (`forward` in the tables); what a method adds to it is
its own. Ratios are medians of paired runs (each round runs every contender once, in rotating order), because a shared
machine's speed drifts. Peers are optional and left out with a message when absent.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vfm_core.errors import UserError
from vfm_core.files import atomic_write

from finecam.bench_contenders import PEERS, Contender, build_model, contender, missing, ours, peak_memory, release

log = logging.getLogger(__name__)

GAMMAS = (0.0, 0.3, 0.6, 1.0, 1.5, 2.0)
SECTIONS = ("speed", "strengths", "memory", "growth", "traits", "folder")


def run_bench(
    out: str | os.PathLike[str] | None = None,
    *,
    models: Sequence[str] = ("resnet50", "vit_small_patch16_224"),
    methods: Sequence[str] = ("gradcam", "layercam"),
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 3,
    device: str | torch.device = "cpu",
    quiet: bool = True,
    sections: Iterable[str] = SECTIONS,
    folder_images: int = 48,
) -> dict[str, Any]:
    """Run the benchmark.

    Parameters
    ----------
    out
        Folder for ``bench.json``; None writes nothing.
    models
        timm names; weights are random, which costs the same time as any.
    methods
        CAM families.
    batch_sizes
        Images per call.
    repeats
        Paired rounds after one round of warm-up.
    device
        Where the models run.
    quiet
        No progress bar on stderr.
    sections
        Which parts to run, of `SECTIONS`.
    folder_images
        Pictures of the end-to-end part.

    Returns
    -------
    dict
        JSON-ready: ``environment``, one list of rows per section, and ``skipped`` (what could not be compared, and
        why).

    Raises
    ------
    UserError
        Unknown model, method or section.
    """
    device, wanted = str(device), list(sections)
    for section in wanted:
        if section not in SECTIONS:
            raise UserError("unknown section", where="sections", given=section, remedy=f"use {', '.join(SECTIONS)}")
    if repeats < 1 or not models or not methods or not batch_sizes or min(batch_sizes) < 1:
        raise UserError("nothing to time", remedy="give models, methods, batch sizes and repeats of at least 1")
    result: dict[str, Any] = {"environment": _environment(device), "skipped": []}
    steps = list(_steps(wanted, models, methods, batch_sizes, repeats, device, folder_images, result["skipped"]))
    for section, step in _shown(steps, quiet):
        result.setdefault(section, []).extend(step())
    result["skipped"] = sorted(set(result["skipped"]))
    if out is not None:
        path = Path(out) / "bench.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def tables(result: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows) of every section of a result, for printing."""
    titles = {
        "speed": "one map per image: milliseconds per batch, ratio = theirs / ours",
        "strengths": f"{len(GAMMAS)} strengths of the same image",
        "memory": "peak memory of one call on top of model and input, MB",
        "growth": "how our cost grows",
        "traits": "greedy trait ranking against one forward pass per trial",
        "folder": "a folder of pictures from disk to gallery",
    }

    def cell(value: Any) -> Any:
        return ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value

    found = [
        (titles[name], [{key: cell(value) for key, value in row.items()} for row in result[name]])
        for name in SECTIONS
        if result.get(name)
    ]
    return found + ([("left out", [{"reason": reason} for reason in result["skipped"]])] if result["skipped"] else [])


def _environment(device: str) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
    }


def _steps(
    sections: Sequence[str],
    models: Sequence[str],
    methods: Sequence[str],
    batch_sizes: Sequence[int],
    repeats: int,
    device: str,
    folder_images: int,
    skipped: list[str],
) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """Independent pieces of work, in the order of the report."""
    for model in models:
        for method in methods:
            if "speed" in sections:
                for batch in batch_sizes:
                    yield "speed", partial(_speed, model, method, batch, repeats, device, skipped)
        if "strengths" in sections:
            yield "strengths", partial(_strengths, model, methods[0], repeats, device, skipped)
        if "memory" in sections:
            yield "memory", partial(_memory, model, methods[0], max(batch_sizes), device, skipped)
    if "growth" in sections:
        yield "growth", partial(_growth, models[-1], methods[0], max(batch_sizes), device)
    if "traits" in sections:
        yield "traits", partial(_traits, device)
    if "folder" in sections:
        for spec in ("tiny:cnn", f"timm:{models[0]}"):
            yield "folder", partial(_folder, spec, folder_images, device)


def _shown(steps: list[Any], quiet: bool) -> Iterable[Any]:
    if quiet:
        return steps
    from vfm_core.cli import progress

    shown: Iterable[Any] = progress(steps, "bench", total=len(steps))
    return shown


# --- speed -----------------------------------------------------------------------------------


def _sides(model: Any, layer: str, method: str, reshape: Any, skipped: list[str]) -> list[Contender]:
    sides = [ours(model, layer, method)]
    if reshape is None:
        sides.append(ours(model, layer, method, channels_last=True))
    for peer in PEERS:
        reason = missing(peer, method)
        if reason is None:
            sides.append(contender(peer, model, layer, method, reshape))
        else:
            skipped.append(reason)
            log.info("%s", reason)
    return sides


def _paired(calls: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call per round, each round in another order; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            calls[name]()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _ratio(theirs: list[float], our: list[float]) -> float:
    return statistics.median(b / a for a, b in zip(our, theirs))


def _speed(name: str, method: str, batch: int, repeats: int, device: str, skipped: list[str]) -> list[dict[str, Any]]:
    model, layer, size, reshape = build_model(name, device)
    x = _noise(batch, size, device)
    sides = _sides(model, layer, method, reshape, skipped)

    def forward() -> None:
        with torch.inference_mode():
            model(x)

    calls: dict[str, Callable[[], Any]] = {"forward": forward}
    calls |= {side.name: partial(side.run, x, 0.6) for side in sides}
    seconds = _paired(calls, repeats, device)
    rows: list[dict[str, Any]] = []
    for label in calls:
        row = {
            "model": name,
            "layer": layer,
            "method": method,
            "batch": batch,
            "contender": label,
            "ms": round(1000 * statistics.median(seconds[label]), 1),
            "images_per_s": round(batch / statistics.median(seconds[label]), 2),
            "ratio": round(_ratio(seconds[label], seconds["finecam"]), 2),
            "max_difference": None,
        }
        rows.append(row)
    for side, row in zip(sides[1:], rows[2:]):
        mine = ours(model, layer, method, side.weighting).run(x, 0.6).cpu()
        row["max_difference"] = float((side.run(x, 0.6).detach().cpu() - mine).abs().max())
    release(model)
    return rows


def _strengths(name: str, method: str, repeats: int, device: str, skipped: list[str]) -> list[dict[str, Any]]:
    model, layer, size, reshape = build_model(name, device)
    x = _noise(1, size, device)
    sides = [side for side in _sides(model, layer, method, reshape, skipped) if side.name != "finecam, channels last"]
    calls: dict[str, Callable[[], Any]] = {side.name: partial(side.sweep, x, GAMMAS) for side in sides}
    torch_side = next((side for side in sides if side.name == "torchcam"), None)
    if torch_side is not None:  # also without keeping the graph, which its manual does not mention
        run = torch_side.run
        calls["torchcam, one call each"] = lambda: [run(x, gamma) for gamma in GAMMAS]
    seconds = _paired(calls, repeats, device)
    release(model)
    return [
        {
            "model": name,
            "method": method,
            "strengths": len(GAMMAS),
            "contender": label,
            "ms": round(1000 * statistics.median(times), 1),
            "ratio": round(_ratio(times, seconds["finecam"]), 2),
        }
        for label, times in seconds.items()
    ]


def _memory(name: str, method: str, batch: int, device: str, skipped: list[str]) -> list[dict[str, Any]]:
    row: dict[str, Any] = {"model": name, "method": method, "batch": batch}
    row["finecam"] = round(peak_memory("finecam", name, method, batch, device), 1)
    for peer in PEERS:
        reason = missing(peer, method)
        if reason is None:
            row[peer] = round(peak_memory(peer, name, method, batch, device), 1)
        else:
            skipped.append(reason)
    return [row]


def _growth(name: str, method: str, largest: int, device: str) -> list[dict[str, Any]]:
    """Cost over images and over strengths, with the slope of a straight line through the times."""
    model, layer, size, _ = build_model(name, device)
    side = ours(model, layer, method)
    batches = sorted({1, 2, 4, largest})
    strengths = (1, 2, 6, 21)
    x = _noise(largest, size, device)
    by_batch: dict[str, Callable[[], Any]] = {str(b): partial(side.run, x[:b], 0.6) for b in batches}
    by_strength: dict[str, Callable[[], Any]] = {
        str(n): partial(side.sweep, x[:1], np.linspace(0, 2, n).tolist()) for n in strengths
    }
    rows = []
    for what, calls in (("images", by_batch), ("strengths", by_strength)):
        seconds = {int(n): statistics.median(times) for n, times in _paired(calls, 2, device).items()}
        slope, intercept = np.polyfit(list(seconds), list(seconds.values()), 1)
        rows.append(
            {
                "model": name,
                "over": what,
                "ms": {n: round(1000 * s, 1) for n, s in seconds.items()},
                "ms_per_extra": round(1000 * float(slope), 2),
                "ms_fixed": round(1000 * float(intercept), 1),
            }
        )
    return rows


def _noise(batch: int, size: tuple[int, int], device: str) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)


# --- Prompt-CAM and whole folders --------------------------------------------------------------


def _traits(device: str) -> list[dict[str, Any]]:
    """Greedy ranking of 12 heads: 78 trials."""
    import timm
    from vfm_core.backbones import wrap

    from finecam.promptcam import PromptCAM
    from finecam.trait_bench import bench_greedy

    vit = timm.create_model("vit_small_patch16_224", pretrained=False, num_heads=12, num_classes=0)
    model = PromptCAM(wrap(vit), num_classes=20).to(device)
    found = bench_greedy(model, _noise(1, (224, 224), device), repeats=1)
    return [{key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}]


def _folder(spec: str, count: int, device: str) -> list[dict[str, Any]]:
    """Images per second of a run from JPEG files to the gallery, and the CPU seconds of its stages."""
    from finecam.classifiers import load_classifier
    from finecam.explain import explain_folder

    classifier = load_classifier(spec, random_weights=not spec.startswith("tiny:"), device=device)
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch) / "photos"
        _write_photos(photos, count)
        with _stages() as seconds:
            done = explain_folder(photos, classifier, Path(scratch) / "out", device=device)
    row = {"model": spec, "images": done.done, "images_per_s": round(done.done / done.seconds, 1)}
    return [row | {f"{stage}_ms": round(1000 * s / max(1, done.done), 1) for stage, s in seconds.items()}]


def _write_photos(folder: Path, count: int) -> None:
    from PIL import Image
    from tinyworld.birds import Birds

    folder.mkdir()
    for i, pixels in enumerate(Birds(n=count, size=96).images(range(count))):
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.jpg", quality=90)


@contextmanager
def _stages() -> Iterator[dict[str, float]]:
    """Count the CPU seconds of decoding, explaining, drawing and file writing while the context lasts."""
    from finecam import products, streaming

    seconds = {"decode": 0.0, "explain": 0.0, "draw": 0.0, "write": 0.0}
    places: list[tuple[Any, str, str]] = [
        (streaming.Worker, "decode", "decode"),
        (streaming.Worker, "explain", "explain"),
        (streaming, "store", "draw"),
        (products, "store_maps", "write"),
        (products, "store_picture", "write"),
    ]
    originals = [getattr(owner, name) for owner, name, _ in places]

    def timed(original: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[stage] += time.thread_time() - start

        return call

    for (owner, name, stage), original in zip(places, originals):
        setattr(owner, name, timed(original, stage))
    try:
        yield seconds
    finally:
        for (owner, name, _), original in zip(places, originals):
            setattr(owner, name, original)
        seconds["draw"] -= seconds["write"]  # storing draws and writes
