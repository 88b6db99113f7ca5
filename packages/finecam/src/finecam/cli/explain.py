"""Verbs around maps of images: explain, merge, layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from vfm_core.cli import (
    BatchSizeOpt,
    DebugOpt,
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    OutOpt,
    OverwriteOpt,
    QuietOpt,
    examples,
    print_json,
    print_table,
    resolve_device,
    resolve_dtype,
)
from vfm_core.errors import UserError

from finecam.cli import app
from finecam.cli.options import (
    ClassesOpt,
    GammaOpt,
    HeadBackboneOpt,
    LayerOpt,
    LimitOpt,
    MethodOpt,
    ModelOpt,
    OfflineOpt,
    RandomOpt,
    SplitOpt,
    ThreadsOpt,
    asked,
    bar,
    finish,
    loading,
    numbers,
)

QUESTION, DATA, PICTURES, RUN = "The question", "Data", "Pictures and arrays", "Run"  # sections of the help


@app.command(
    epilog=examples(
        "finecam explain photos/ --model timm:convnext_tiny.fb_in22k_ft_in1k --out cams/",
        'finecam explain photos/ --model head/ --target "Blue Grosbeak" --reference Grandala --out pair/',
        "finecam explain data/val --model head/ --target label --gammas 0.3,0.6,1,2 --out sweep/",
        'finecam explain photos/ --model open_clip:ViT-B-16@openai --text "red epaulets" --against bird --out text/',
        "finecam explain tinyworld:birds?split=val --model tiny:cnn --limit 32 --out demo/",
    )
)
def explain(
    ctx: typer.Context,
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder of images, or a data spec.")],
    model: ModelOpt,
    out: OutOpt,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="CLASS",
            help="predicted (default), label, or a class name or id.",
            rich_help_panel=QUESTION,
        ),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            "--reference", metavar="CLASS", help="Class to subtract; may be repeated.", rich_help_panel=QUESTION
        ),
    ] = None,
    references: Annotated[
        int,
        typer.Option(
            "--references",
            min=0,
            help="How many similar classes to subtract; 0 = plain maps.",
            rich_help_panel=QUESTION,
        ),
    ] = 3,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", help="Image-text models: what to look for, such as 'red epaulets'.", rich_help_panel=QUESTION
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", help="Image-text models: text to subtract; may be repeated.", rich_help_panel=QUESTION
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option("--template", help="Prompt with {} for the text; may be repeated.", rich_help_panel=QUESTION),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option("--scale", help="Factor on the cosines of an image-text model.", rich_help_panel=QUESTION),
    ] = None,
    gammas: GammaOpt = "0.6",
    method: MethodOpt = "gradcam",
    layer: LayerOpt = None,
    similarity: Annotated[
        str,
        typer.Option(
            "--similarity",
            help="Which classes are similar: logit, rank, weight or confusion.",
            rich_help_panel=QUESTION,
        ),
    ] = "logit",
    confusion: Annotated[
        Path | None,
        typer.Option(
            "--confusion", metavar="CSV", help="Confusion matrix for --similarity confusion.", rich_help_panel=QUESTION
        ),
    ] = None,
    weighting: Annotated[
        str,
        typer.Option(
            "--weighting",
            help="Weights of the references: mean, softmax or softmax_detached.",
            rich_help_panel=QUESTION,
        ),
    ] = "mean",
    aggregate: Annotated[
        str,
        typer.Option(
            "--aggregate", help="before_relu_mean, before_relu_max or after_relu_mean.", rich_help_panel=QUESTION
        ),
    ] = "before_relu_mean",
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Record the relative drop of every image.", rich_help_panel=QUESTION)
    ] = False,
    split: SplitOpt = None,
    limit: LimitOpt = None,
    classes: ClassesOpt = None,
    class_map: Annotated[
        Path | None,
        typer.Option(
            "--class-map", metavar="CSV", help="data class,model class rows, where names differ.", rich_help_panel=DATA
        ),
    ] = None,
    example_data: Annotated[
        str | None,
        typer.Option(
            "--examples", metavar="DATA", help="Labelled pictures to show the references by.", rich_help_panel=DATA
        ),
    ] = None,
    backbone: HeadBackboneOpt = None,
    keep_aspect: Annotated[
        bool,
        typer.Option(
            "--keep-aspect",
            help="Keep the aspect ratio; for models that take any input size.",
            rich_help_panel=PICTURES,
        ),
    ] = False,
    max_side: Annotated[
        int, typer.Option("--max-side", min=16, help="Longest side with --keep-aspect.", rich_help_panel=PICTURES)
    ] = 1000,
    map_size: Annotated[
        str,
        typer.Option(
            "--map-size",
            help="Stored arrays: grid, original, or cells along the longer side.",
            rich_help_panel=PICTURES,
        ),
    ] = "grid",
    colormap: Annotated[
        str,
        typer.Option(
            "--colormap", help="turbo, viridis, magma, inferno, plasma, cividis or jet.", rich_help_panel=PICTURES
        ),
    ] = "turbo",
    opacity: Annotated[
        float, typer.Option("--opacity", min=0.0, max=1.0, help="Of the strongest heat.", rich_help_panel=PICTURES)
    ] = 0.75,
    picture_side: Annotated[
        int, typer.Option("--picture-side", min=32, help="Longest side of stored pictures.", rich_help_panel=PICTURES)
    ] = 512,
    panels: Annotated[
        bool, typer.Option("--panels/--no-panels", help="One wide panel per image.", rich_help_panel=PICTURES)
    ] = True,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Every N-th image from the I-th on, I = 1 to N (1/4, 2/4, 3/4, 4/4); join with `finecam merge`.",
            rich_help_panel=RUN,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first image that fails.", rich_help_panel=RUN)
    ] = False,
    random_weights: RandomOpt = False,
    offline: OfflineOpt = False,
    batch_size: BatchSizeOpt = 16,
    workers: ThreadsOpt = 2,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = "float32",
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Explain images: what makes the class, and not the similar ones. Writes a gallery; run again to resume."""
    from finecam.explain import explain_folder
    from finecam.products import Style
    from finecam.render import colour_table
    from finecam.shards import launched_shard, merge, parse_shard, wait_for_all

    strengths = numbers(gammas, "--gammas")
    colour_table(colormap)
    if map_size not in ("grid", "original") and not (map_size.isdecimal() and int(map_size) > 0):
        raise UserError("not a map size", where="--map-size", given=repr(map_size), remedy="use grid, original or 224")
    if against and text is None:
        raise UserError("--against needs --text", remedy="name what to look for with --text")
    if text is not None and (target is not None or reference):
        raise UserError("two ways to name the target", given="--text with --target or --reference", remedy="use one")
    if similarity == "confusion" and confusion is None:
        raise UserError("--similarity confusion needs a matrix", remedy="give --confusion CSV")
    extra = loading(classes, backbone, random_weights, offline) | {"dtype": resolve_dtype(dtype)}
    chosen: int | tuple[str, ...] = tuple(reference) if reference else references
    if text is not None:
        extra |= {"texts": [text, *(against or ())]}
        target, chosen = text, tuple(against or ())
    extra |= {"templates": tuple(template or ()), "scale": scale}
    contrast = {
        "references": chosen or None,
        "similarity": similarity,
        "gammas": strengths,
        "weighting": weighting,
        "aggregate": aggregate,
    }
    # Only what was asked for: a method that depends on no class refuses these, and has no use for their defaults.
    contrast = {name: value for name, value in contrast.items() if asked(ctx, name)}
    if reference or text is not None:
        contrast["references"] = chosen or None
    launched = launched_shard() if shard is None else None
    where = resolve_device(device if launched is None or device != "auto" else _own_device(launched[2]))
    part = launched[:2] if launched else parse_shard(shard) if shard else None
    summary = explain_folder(
        data,
        model,
        out,
        split=split,
        class_map=class_map,
        examples=example_data,
        confusion=confusion,
        loading=extra,
        device=where,
        batch_size=batch_size,
        workers=workers,
        limit=limit,
        shard=part,
        overwrite=overwrite,
        strict=strict,
        progress=bar("explaining", quiet),
        method=method,
        layer=layer,
        target=target,
        metrics=("relative_drop",) if metrics else (),
        keep_aspect=keep_aspect,
        max_side=max_side,
        style=Style(map_size if not map_size.isdecimal() else int(map_size), colormap, opacity, picture_side, panels),
        **contrast,
    )
    index = summary.index
    if launched:
        wait_for_all()
        if launched[0] == 1:
            index = merge(out).index
    if as_json:
        print_json({**vars(summary), "index": index})
    else:
        typer.echo(summary.line())
        typer.echo(str(index) if index else f"shard done; join all with: finecam merge {out}")
    finish(summary.failed, (out if part is None else summary.records_in) / "errors.jsonl")


def _own_device(local_rank: int) -> str:
    """Each launched process takes its own GPU where there are any."""
    import torch

    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


@app.command("merge", epilog=examples("finecam merge cams/"))
def merge_shards(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of all shards.")],
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Join the shards of a run (--shard I/N) into one run with one gallery."""
    from finecam.shards import merge

    merged = merge(out)
    if as_json:
        print_json(vars(merged))
    else:
        typer.echo(merged.line())
        typer.echo(str(merged.index))
    finish(merged.failed, out / "errors.jsonl")


@app.command(epilog=examples("finecam layers tiny:cnn", "finecam layers timm:resnet50 --random-weights --all"))
def layers(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Classifier spec.")],
    every: Annotated[bool, typer.Option("--all", help="Also layers whose output is no map.")] = False,
    classes: ClassesOpt = None,
    backbone: HeadBackboneOpt = None,
    random_weights: RandomOpt = False,
    offline: OfflineOpt = False,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """List the layers a map can be read from, with the shape of their maps; the default is marked."""
    import torch

    from finecam.classifiers import load_classifier
    from finecam.layers import find_layer, list_layers

    classifier = load_classifier(model, **loading(classes, backbone, random_weights, offline))
    x = torch.zeros(1, 3, *classifier.preprocess.size)
    default = find_layer(classifier.model, classifier.layer, x).name
    rows = [
        {
            "layer": row.name,
            "module": row.kind,
            "output": "x".join(map(str, row.shape)),
            "map (channels, rows, columns)": "" if row.map_shape is None else "x".join(map(str, row.map_shape)),
            "calls": row.calls,
            "default": "*" if row.name == default else "",
        }
        for row in list_layers(classifier.model, x)
        if every or row.map_shape is not None
    ]
    if as_json:
        print_json(rows)
    else:
        print_table(rows, f"{model}, input {classifier.preprocess.size[0]}x{classifier.preprocess.size[1]}")
