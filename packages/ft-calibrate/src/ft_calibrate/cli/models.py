"""Verbs around models: extract, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from vfm_core.cli import (
    BatchSizeOpt,
    DataOpt,
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    QuietOpt,
    WorkersOpt,
    examples,
    print_json,
    resolve_device,
    resolve_dtype,
)
from vfm_core.errors import UserError

from ft_calibrate.cli import app

ModelOpt = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="timm:NAME, torchvision:NAME, hf:ORG/NAME, open_clip:NAME@TAG (with --classes), dir:PATH, tiny:NAME, or a "
        "folder made by ft-calibrate train.",
    ),
]
ExportModelOpt = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="PATH",
        help="Checkpoint: .safetensors, .pth, .bin, .onnx, a folder of timm, transformers or ft-calibrate train, or a "
        "model spec.",
    ),
]
SourceOpt = Annotated[
    Path | None,
    typer.Option("--source-ckpt", metavar="FILE", help="State dict to load into the model instead of its own weights."),
]
HeadOpt = Annotated[
    str | None, typer.Option("--head", metavar="NAME", help="Layer that makes the logits, such as fc; found by itself.")
]
ClassesOpt = Annotated[
    Path | None,
    typer.Option("--classes", metavar="FILE", help="Class names in the order of the logits: one per line, or JSON."),
]
TemplateOpt = Annotated[
    list[str] | None,
    typer.Option("--template", help="Prompt with {} for the class (image-text models); may be repeated."),
]
OfflineOpt = Annotated[bool, typer.Option("--offline", help="Never use the network; weights come from the cache.")]
ReplaceOpt = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@app.command(
    epilog=examples(
        "ft-calibrate extract --model tiny:glyph-cnn --data tinyworld:glyphs?domain=target --out logits.npz",
        "ft-calibrate extract --model timm:resnet50 --source-ckpt source.pth --data folder:photos@test --out test.npz",
        "ft-calibrate extract --model open_clip:ViT-B-32@openai --classes names.txt --data photos/ --out shards/",
        "ft-calibrate extract --model runs/ft --data csv:birds.csv --out birds.parquet --no-features --workers 8",
    )
)
def extract(
    model: ModelOpt,
    data: DataOpt,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="NAME.npz or NAME.parquet, or a folder of shards (no suffix) for data beyond memory; again resumes.",
        ),
    ],
    split: Annotated[str | None, typer.Option("--split", help="Split of the data, such as test.")] = None,
    features: Annotated[
        bool, typer.Option("--features/--no-features", help="Store the head's inputs too, for report and NCM.")
    ] = True,
    format: Annotated[str | None, typer.Option("--format", help="Of shards in a folder: npz or parquet.")] = None,
    shard_rows: Annotated[int, typer.Option("--shard-rows", min=1, help="Images per shard.")] = 4096,
    autocast: Annotated[
        str | None, typer.Option("--autocast", metavar="DTYPE", help="Forward pass in bfloat16 or float16.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first unreadable image; by default: skipped.csv.")
    ] = False,
    source_ckpt: SourceOpt = None,
    head: HeadOpt = None,
    classes: ClassesOpt = None,
    template: TemplateOpt = None,
    offline: OfflineOpt = False,
    batch_size: BatchSizeOpt = 256,
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    overwrite: ReplaceOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Logits and features of a data set, in one pass; labels become logit columns by class name."""
    from vfm_core.data import open_dataset

    from ft_calibrate.classifier import load_classifier
    from ft_calibrate.cli.progress_bar import bar
    from ft_calibrate.extraction import extract as run

    place, dtype = resolve_device(device), None if autocast is None else resolve_dtype(autocast)
    dataset = open_dataset(data, split=split)
    classifier = load_classifier(
        model,
        source_ckpt=source_ckpt,
        head=head,
        classes=classes,
        device=place,
        template=template,
        offline=offline or None,
    )
    with bar("images", quiet) as tell:
        found = run(
            classifier,
            dataset,
            out,
            features=features,
            format=format,
            shard_rows=shard_rows,
            batch_size=batch_size,
            workers=workers,
            device=place,
            autocast=dtype,
            strict=strict,
            overwrite=overwrite,
            on_progress=tell,
        )
    if as_json:
        print_json({**vars(found), "classes": found.num_classes, "skipped": [list(pair) for pair in found.skipped]})
        return
    rest = "" if found.computed == found.shards else f", {found.shards - found.computed} of {found.shards} shards kept"
    lost = f", {len(found.skipped)} unreadable images skipped" if found.skipped else ""
    speed = f", {found.images_per_second:.0f} images/s" if found.computed else ""
    scale = (
        "" if found.logit_scale is None else f"; logits are cosines x {found.logit_scale:.4g}, gamma is in these units"
    )
    typer.echo(f"{found.rows} images x {found.num_classes} logits in {found.path}{rest}{lost}{speed}{scale}")


@app.command(
    epilog=examples(
        "ft-calibrate export --model model.safetensors --head fc --calibration gamma.json -o model_cal.safetensors",
        "ft-calibrate export --model my_vit/ --calibration gamma.json -o my_vit_calibrated/",
        "ft-calibrate export --model model.onnx --calibration gamma.json -o model_cal.onnx",
        "ft-calibrate export --model open_clip:ViT-B-32@openai --classes names.txt --calibration gamma.json "
        "-o head.safetensors",
        "ft-calibrate export --model model.pth --gamma 7.5 --absent 30,31,32 -o model_cal.pth",
    )
)
def export(
    model: ExportModelOpt,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="PATH", help="File of the same format, or a folder for a folder.")
    ],
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="JSON", help="From ft-calibrate fit or pcv.")
    ] = None,
    gamma: Annotated[float | None, typer.Option("--gamma", help="A number instead of a calibration file.")] = None,
    absent: Annotated[
        str | None,
        typer.Option("--absent", metavar="LIST", help="With --gamma: absent classes, a,b,c or a file of one per line."),
    ] = None,
    head: HeadOpt = None,
    classes: ClassesOpt = None,
    template: TemplateOpt = None,
    source_ckpt: SourceOpt = None,
    offline: OfflineOpt = False,
    overwrite: ReplaceOpt = False,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Fold a calibration into the head of a checkpoint: same logits as logits + gamma, no cost at inference."""
    from ft_calibrate.fold_files import export_file
    from ft_calibrate.model_sources import read_names

    if (calibration is None) == (gamma is None):
        remedy = "give --calibration FILE, or --gamma NUMBER with --absent LIST"
        raise UserError("one of --calibration and --gamma is needed", remedy=remedy)
    names = None
    if absent is not None:
        names = read_names(absent) if Path(absent).is_file() else [part.strip() for part in absent.split(",")]
    what: Path | float = calibration if calibration is not None else float(gamma or 0.0)
    record = export_file(
        model,
        what,
        out,
        absent=names,
        head=head,
        classes=classes,
        overwrite=overwrite,
        template=template,
        source_ckpt=source_ckpt,
        offline=offline or None,
    )
    if as_json:
        print_json(record)
    else:
        typer.echo(f"{record.path}: {record.line()}")
