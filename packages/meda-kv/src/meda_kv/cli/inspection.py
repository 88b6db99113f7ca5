"""Verbs that look inside: inspect, profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from vfm_core.cli import (
    DebugOpt,
    DeviceOpt,
    JsonOpt,
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


@app.command(
    epilog=examples(
        'meda-kv inspect --model PATH --image a.jpg b.jpg --prompt "What changed?" --out inspect/',
        "meda-kv inspect --model tiny --data tinyworld:needle --method 'snapkv?window=16' --ratio 0.1 --out inspect/",
    )
)
def inspect(
    images: ImagesArg = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for pictures, JSON and report.")] = Path(
        "inspect"
    ),
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
            metavar="SPEC|FILE",
            help="Instead of --prompt: a sample of tinyworld:, jsonl:, milebench: or a file of JSON lines.",
        ),
    ] = None,
    root: RootOpt = None,
    index: Annotated[int, typer.Option("--index", min=0, help="Which sample of --data.")] = 0,
    method: MethodOpt = "meda",
    ratio: RatioOpt = 0.2,
    preset: PresetOpt = "paper",
    override: SetOpt = None,
    floor: FloorOpt = None,
    budgets: BudgetsOpt = None,
    ratios: Annotated[
        str,
        typer.Option("--ratios", metavar="R,R", help="Answers at these ratios too.", rich_help_panel=METHOD),
    ] = "0.6,0.4,0.2",
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="I,J", help="Attention maps of these; default 0, 1 and three quarters deep."),
    ] = None,
    max_new_tokens: TokensOpt = 64,
    chat: ChatOpt = None,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = None,
    attn: AttnOpt = None,
    device_map: DeviceMapOpt = None,
    seed: SeedOpt = 0,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Show what each layer sees and keeps: entropy, budgets, kept tokens over the images, attention, answers."""
    from meda_kv.evaluation.arms import split_method
    from meda_kv.generation import check_names
    from meda_kv.inspection import collect, write_inspection
    from meda_kv.inspection.writing import ANSWERS_NOTE, answers_table, budget_sentence, layers_table
    from meda_kv.models import load_model
    from meda_kv.profiles import load_profile

    name, written = split_method(method)
    options = {**settings(override, floor), **written}
    check_names(name, preset, options)
    if budgets is not None:
        load_profile(budgets)
        options["budgets"] = str(budgets)
    shares = [_number(part, float, "--ratios") for part in ratios.split(",") if part.strip()]
    chosen = None if layers is None else [_number(part, int, "--layers") for part in layers.split(",")]
    request = _request(gathered(image, images), video, frames, prompt, system, data, root, index)
    loaded, processor = load_model(model, device=device, dtype=dtype, attn=attn, device_map=device_map)
    with supported():
        found = collect(
            loaded,
            processor,
            request,
            method=name,
            ratio=ratio,
            preset=preset,
            text_ratios=shares,
            max_new_tokens=max_new_tokens,
            attention_layers=chosen,
            chat=chat,
            unmarked="first" if data is not None else "error",
            seed=seed,
            cache_options=options,
        )
    paths = write_inspection(found, out)
    if as_json:
        print_json({**found.to_dict(), "files": paths})
        return
    print_table(
        layers_table(found),
        title=f"{found.n} tokens, {found.visual_tokens} visual; {budget_sentence(found)}",
    )
    print_table(answers_table(found), title="answers")
    typer.echo(ANSWERS_NOTE)
    typer.echo(f"report: {paths['report']}")


def _number(text: str, kind: Any, where: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise UserError("not a number", where=where, given=repr(text), remedy="separate numbers by commas") from error


def _request(
    files: list[Path],
    video: Path | None,
    frames: int,
    prompt: str | None,
    system: str | None,
    data: str | None,
    root: Path | None,
    index: int,
) -> Any:
    from meda_kv.prompts import Prompt, load_frames, load_images

    if (prompt is None) == (data is None):
        if data is None:
            raise UserError("nothing to look at", remedy="give --prompt TEXT, or --data SPEC")
        raise UserError("a prompt or a sample?", given="--prompt and --data", remedy="give one of them")
    if data is None:
        if files and video is not None:
            raise UserError("images or a video?", given="--image and --video", remedy="give one of them")
        pictures = load_images(files, "--image") if video is None else load_frames(video, frames, "--video")
        return Prompt(prompt or "", pictures, system)
    if files or video is not None or system is not None:
        raise UserError(
            "--image, --video and --system go with --prompt", where="--data", given=data, remedy="drop them"
        )
    from meda_kv.data import open_task
    from meda_kv.generation import read_prompt

    samples = open_task(_spec(data), root, limit=index + 1).samples
    if index >= len(samples):
        remedy = f"use 0 to {len(samples) - 1}"
        raise UserError("no such sample", where="--index", given=index, remedy=remedy)
    return read_prompt(samples[index], frames)


@app.command(
    epilog=examples(
        "meda-kv profile --model PATH --data photos/ -n 32 --out profile.json",
        "meda-kv profile --model tiny --data tinyworld:needle?n=32 --out profile.json",
        "meda-kv generate --model PATH --budgets profile.json --image a.jpg --prompt ...   # bounded peak memory",
    )
)
def profile(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="DIR|SPEC|FILE",
            help="Folder of images, samples of tinyworld:, jsonl:, milebench: or a file of JSON lines.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the profile.")] = Path(
        "profile.json"
    ),
    model: ModelOpt = "tiny",
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="At most so many prompts.")] = 32,
    root: RootOpt = None,
    frames: FramesOpt = 8,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="What is asked about the images of a folder.")
    ] = "Describe the image.",
    entropy: Annotated[
        str, typer.Option("--entropy", metavar="KIND", help="cross, cross-causal or self.", rich_help_panel=METHOD)
    ] = "cross",
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=1e-3, help="Of the softmax over layers.", rich_help_panel=METHOD),
    ] = 1.0,
    chat: ChatOpt = None,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = None,
    attn: AttnOpt = None,
    device_map: DeviceMapOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Measure each layer's share of the cache once, so that later prompts are compressed while they are read."""
    from meda_kv.inspection.collect import KINDS, entropies
    from meda_kv.models import load_model
    from meda_kv.profiles import make_profile

    if entropy not in KINDS:
        from vfm_core.errors import unknown_name

        raise unknown_name("entropy", entropy, KINDS, where="--entropy")
    if out.is_dir():
        raise UserError("a folder, not a file", where="--out", given=out, remedy=f"use {out / 'profile.json'}")
    requests = _requests(data, root, samples, prompt)
    loaded, processor = load_model(model, device=device, dtype=dtype, attn=attn, device_map=device_map)
    rows, failed = [], []
    with supported():
        for name, read in progress(requests, "reading", len(requests), quiet):
            try:
                rows.append(entropies(loaded, processor, read(frames), chat=chat)[entropy])
            except UserError as error:
                failed.append({"id": name, "error": str(error)})
    if not rows:
        raise UserError("no sample could be read", where=data, given=failed[0]["error"] if failed else None)
    recorded = {"data": data, "chat": chat, "prompt": prompt if Path(data).is_dir() else None}
    made = make_profile(loaded, rows, entropy=entropy, temperature=temperature, settings=recorded)
    made.save(out)
    if as_json:
        print_json({**made.to_dict(), "path": out, "failed": failed})
    else:
        print_table(
            [
                {"layer": layer, "share": alpha, "spread": spread}
                for layer, alpha, spread in zip(made.layers, made.alphas, made.spread, strict=True)
            ],
            title=f"{len(rows)} prompts, {entropy} entropy, shares of mean 1: {out}",
        )
    for failure in failed:
        typer.echo(f"failed: {failure['id']}: {failure['error']}", err=True)
    if failed:
        raise typer.Exit(1)


def _requests(data: str, root: Path | None, count: int, prompt: str) -> list[tuple[str, Any]]:
    """Names of the samples and how to read each, so that one bad file stops nothing."""
    from vfm_core.images import is_image_file

    from meda_kv.prompts import Prompt, load_images

    folder = Path(data).expanduser()
    if folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file() and is_image_file(file))[:count]
        if not files:
            remedy = "give a folder of pictures, or a spec such as jsonl:FILE"
            raise UserError("no image in the folder", where="--data", given=data, remedy=remedy)
        return [
            (str(file.relative_to(folder)), lambda frames, file=file: Prompt(prompt, load_images([file])))
            for file in files
        ]
    from meda_kv.data import open_task
    from meda_kv.generation import read_prompt

    chosen = open_task(_spec(data), root, limit=count).samples[:count]
    return [(sample.id, lambda frames, sample=sample: read_prompt(sample, frames)) for sample in chosen]


def _spec(data: str) -> str:
    """A file is one of JSON lines; anything else says itself what it is."""
    return f"jsonl:{data}" if Path(data).expanduser().is_file() else data
