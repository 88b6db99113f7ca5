"""Verbs that answer prompts and list what there is: generate, methods, doctor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from vfm_core.cli import (
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    OverwriteOpt,
    QuietOpt,
    SeedOpt,
    examples,
    print_json,
    print_table,
    progress,
)
from vfm_core.errors import UserError

from meda_kv.cli import app
from meda_kv.cli.options import (
    METHOD,
    RUN,
    AttnOpt,
    BudgetsOpt,
    ChatOpt,
    DeviceMapOpt,
    DtypeOpt,
    FloorOpt,
    FramesOpt,
    ImageOpt,
    ImagesArg,
    MethodOpt,
    ModelOpt,
    PresetOpt,
    PromptOpt,
    RatioOpt,
    RootOpt,
    SetOpt,
    SystemOpt,
    TokensOpt,
    VideoOpt,
    gathered,
    settings,
    supported,
)

__all__ = [  # other verbs import the shared options from here too
    "METHOD",
    "RUN",
    "AttnOpt",
    "BudgetsOpt",
    "ChatOpt",
    "DeviceMapOpt",
    "DtypeOpt",
    "FloorOpt",
    "FramesOpt",
    "ImageOpt",
    "ImagesArg",
    "MethodOpt",
    "ModelOpt",
    "PresetOpt",
    "PromptOpt",
    "RatioOpt",
    "RootOpt",
    "SetOpt",
    "SystemOpt",
    "TokensOpt",
    "VideoOpt",
    "gathered",
    "settings",
    "summary_row",
    "supported",
]


@app.command(
    epilog=examples(
        'meda-kv generate --model Qwen/Qwen2.5-VL-3B-Instruct --image a.jpg b.jpg --prompt "What changed?"',
        "meda-kv generate --model PATH --data prompts.jsonl --method snapkv --ratio 0.1 --out runs/answers",
        "meda-kv generate --model tiny --image red.png blue.png --prompt 'Q red' --method 'meda?merge=none' --floor 4",
    )
)
def generate(
    images: ImagesArg = None,
    model: ModelOpt = "tiny",
    image: ImageOpt = None,
    video: VideoOpt = None,
    frames: FramesOpt = 8,
    prompt: PromptOpt = None,
    system: SystemOpt = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE|SPEC",
            help="Many prompts: JSON lines with id, images or video, prompt; or milebench:NAME, tinyworld:NAME.",
        ),
    ] = None,
    root: RootOpt = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many rows of --data.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="With --data: run folder; the same command resumes it.")
    ] = None,
    method: MethodOpt = "meda",
    ratio: RatioOpt = 0.2,
    preset: PresetOpt = "paper",
    override: SetOpt = None,
    floor: FloorOpt = None,
    budgets: BudgetsOpt = None,
    max_new_tokens: TokensOpt = 256,
    chat: ChatOpt = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts per forward.")] = 1,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = None,
    attn: AttnOpt = None,
    device_map: DeviceMapOpt = None,
    seed: SeedOpt = 0,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Answer a prompt, or a file of them, on a compressed cache."""
    files = gathered(image, images)
    if prompt is None and data is None:
        raise UserError("nothing to answer", remedy="give --prompt TEXT or --data FILE")
    if prompt is not None and data is not None:
        remedy = "give one of them"
        raise UserError("one prompt or a file of them?", given="--prompt and --data", remedy=remedy)
    if root is not None and data is None:
        raise UserError("--root goes with --data", where="--root", given=root, remedy="drop it")
    if data is not None and (out is None or files or video is not None or system is not None):
        if out is None:
            raise UserError("no folder for the answers", where="--out", remedy="give --out DIR with --data")
        raise UserError(
            "--image, --video and --system go with --prompt", where="--data", given=data, remedy="drop them"
        )
    if files and video is not None:
        raise UserError("images or a video?", given="--image and --video", remedy="give one of them")
    options: dict[str, Any] = {
        "preset": preset,
        "max_new_tokens": max_new_tokens,
        "chat": chat,
        "seed": seed,
        "cache_options": settings(override, floor),
    }
    if data is not None:
        assert out is not None
        rows = _rows(data, root, limit)
        loaded, processor = _loaded(model, device, dtype, attn, device_map, method, budgets, options)
        code = _many(
            loaded, processor, rows, out, method, ratio, frames, overwrite, batch_size, as_json, quiet, options
        )
    else:
        from meda_kv.prompts import Prompt, load_frames, load_images

        pictures = load_images(files, "--image") if video is None else load_frames(video, frames, "--video")
        request = Prompt(prompt or "", pictures, system)
        loaded, processor = _loaded(model, device, dtype, attn, device_map, method, budgets, options)
        code = _one(loaded, processor, request, method, ratio, as_json, options)
    if code:
        raise typer.Exit(code)


def _rows(data: str, root: Path | None, limit: int | None) -> Any:
    """Prompts of a file (answers may be missing there) or of a task."""
    from meda_kv.data import open_task
    from meda_kv.data.jsonl import read_jsonl
    from meda_kv.data.samples import FAMILIES

    family, colon, path = data.partition(":")
    if colon and family in FAMILIES and family != "jsonl":
        return open_task(data, root, limit).samples
    return read_jsonl(path if colon and family == "jsonl" else data, root=root, limit=limit, answers=False).samples


def _loaded(
    model: str,
    device: str,
    dtype: str | None,
    attn: str | None,
    device_map: str | None,
    method: str,
    budgets: Path | None,
    options: dict[str, Any],
) -> tuple[Any, Any]:
    """Check the names first, which is quick, then load; a profile is checked against the model."""
    from meda_kv.generation import check_names
    from meda_kv.models import load_model
    from meda_kv.profiles import load_profile

    check_names(method, options["preset"], options["cache_options"])
    if budgets is not None:
        load_profile(budgets)
    loaded, processor = load_model(model, device=device, dtype=dtype, attn=attn, device_map=device_map)
    if budgets is not None:
        load_profile(budgets, loaded)
        options["budgets"] = str(budgets)
    return loaded, processor


def _one(
    model: Any, processor: Any, request: Any, method: str, ratio: float, as_json: bool, options: dict[str, Any]
) -> int:
    from meda_kv.generation import generate as answer

    with supported():
        result = answer(model, processor, [request], method, ratio, unmarked="error", **options)[0]
    if as_json:
        print_json(result)
        return 0
    typer.echo(result.text or "(nothing)")
    row = summary_row(result.summary, result.seconds, result.tokens)
    note = row.pop("note")
    print_table([row])
    if note:
        typer.echo(f"note: {note}")
    return 0


def summary_row(summary: dict[str, Any], seconds: float, tokens: int) -> dict[str, Any]:
    """One line about an answer, for a table."""
    from meda_kv.inspection.writing import size

    return {
        "method": summary["method"],
        "kept of prompt": f"{summary['ratio_actual']:.1%} of {summary['prompt_tokens']}",
        "visual tokens": summary["visual_tokens"],
        "KV in use": size(summary["bytes_in_use"]),
        "allocated": size(summary["bytes"]),
        "full cache": size(summary["bytes_full"]),
        "compress s": summary["compress_seconds"],
        "new tokens": tokens,
        "s": seconds,
        "note": summary.get("note") or "",
    }


def _many(
    model: Any,
    processor: Any,
    samples: Any,
    out: Path,
    method: str,
    ratio: float,
    frames: int,
    overwrite: bool,
    batch_size: int,
    as_json: bool,
    quiet: bool,
    options: dict[str, Any],
) -> int:
    """Answer a file and list what failed; status 1 when something did."""
    from meda_kv.generation import generate_file

    with supported():
        run = generate_file(
            model,
            processor,
            samples,
            out,
            method,
            ratio,
            frames=frames,
            overwrite=overwrite,
            batch_size=batch_size,
            bar=lambda batches, total: progress(batches, "answering", total, quiet),
            unmarked="error",
            **options,
        )
    if as_json:
        print_json({"path": run.path, "answers": run.records, "failed": run.failed})
    else:
        print_table(
            [
                {"id": record["id"], **summary_row(record["summary"], record["seconds"], record["tokens"])}
                for record in run.records[:20]
            ],
            title=f"{len(run.records)} of {len(samples)} answered: {run.path}",
        )
    for failure in run.failed:
        typer.echo(f"failed: {failure['id']}: {failure['error']}", err=True)
    return 1 if run.failed else 0


@app.command(epilog=examples("meda-kv methods", "meda-kv methods --preset official-code --json"))
def methods(preset: PresetOpt = "paper", as_json: JsonOpt = False, debug: DebugOpt = False) -> None:
    """List the arms with their parts, defaults and sources, in the words that --set takes: --set merge=none."""
    from meda_kv.methods import METHODS, resolve_method

    chosen = [resolve_method(name, preset=preset) for name in METHODS]
    if as_json:
        print_json([{**_method_row(method), "settings": dataclasses.asdict(method)} for method in chosen])
        return
    rows = [_method_row(method) for method in chosen]
    print_table(
        [{key: value for key, value in row.items() if key not in ("summary", "source")} for row in rows],
        title=f"methods, preset {preset}",
    )
    print_table([{key: row[key] for key in ("method", "summary", "source")} for row in rows])


def _method_row(method: Any) -> dict[str, Any]:
    """One arm, in the words that ``--set`` and ``name?option=value`` take; what comes first is not an option's word."""
    from meda_kv.methods.registry import BUDGETS

    scorer, allocator, merger = method.scorer, method.allocator, method.merger
    budgets = next((word for word, part in BUDGETS.items() if type(part) is type(allocator)), "all")
    how = "none" if merger is None else getattr(merger, "how", "weighted-by-score")
    scores = "everything" if scorer is None else type(scorer).__name__.removesuffix("Scorer").lower()
    return {
        "method": method.name,
        "scores": _with_options(scores, scorer),
        "budgets": _with_options(budgets, allocator),
        "merge": _with_options(how, merger),
        "recent_share": "" if method.recent is not None or scorer is None else method.recent_share,
        "recent": "" if method.recent is None else method.recent,
        "sink": method.sink,
        "text_prior": method.text_prior,
        "compress_at": method.compress_at,
        "summary": method.summary,
        "source": method.source,
    }


def _with_options(word: str, part: Any) -> str:
    """A part's word, and those of its options that are not as its class has them, as a user would write them."""
    if part is None:
        return word
    words = {"queries": "score_queries", "kind": "entropy", "block": "merge_block"}
    changed = [f.name for f in dataclasses.fields(part) if f.name != "how" and f.default != getattr(part, f.name)]
    shown = [f"{words.get(name, name)}={_setting(getattr(part, name))}" for name in changed]
    return f"{word} ({', '.join(shown)})" if shown else word


def _setting(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@app.command(epilog=examples("meda-kv doctor", "meda-kv doctor --device cuda --json"))
def doctor(device: DeviceOpt = "auto", as_json: JsonOpt = False, debug: DebugOpt = False) -> None:
    """Print versions and attention implementations, and try the cache against masked attention on a tiny model."""
    from vfm_core.cli import resolve_device

    from meda_kv.attention import doctor as examine

    report = examine(resolve_device(device))
    if as_json:
        print_json(report.to_dict())
    else:
        print_table([{"package": name, "version": found or "absent"} for name, found in report.versions.items()])
        print_table(
            [{"attention": name, "wrapper": f"meda_{name}"} for name in report.attention],
            title=f"attention implementations on {', '.join(report.devices)}",
        )
        print_table(
            [{"check": c.name, "result": "ok" if c.ok else "FAILED", "detail": c.detail} for c in report.checks]
        )
    if not report.ok:
        raise typer.Exit(1)
