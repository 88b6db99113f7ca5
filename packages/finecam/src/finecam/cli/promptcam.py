"""Verbs of Prompt-CAM: promptcam train, traits, compare and taxonomy; quiz export and score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from vfm_core.cli import (
    BackboneOpt,
    BatchSizeOpt,
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    OutOpt,
    OverwriteOpt,
    QuietOpt,
    SeedOpt,
    WorkersOpt,
    examples,
    print_json,
    print_table,
    resolve_device,
)
from vfm_core.errors import UserError, unknown_name

from finecam.cli import app
from finecam.cli.options import LimitOpt, OfflineOpt, RandomOpt, SplitOpt, asked, bar, finish

group = typer.Typer(no_args_is_help=True, help="Train and read interpretable class prompts (Prompt-CAM).")
app.add_typer(group, name="promptcam")
quiz = typer.Typer(no_args_is_help=True, help="The blinded trait-recognition study: make it, score it.")
app.add_typer(quiz, name="quiz")

FolderArg = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of promptcam train, or an official .pt file.")]
NamesOpt = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        metavar="FILE|FOLDER",
        help="Official .pt files: class names in order (.txt, .json), or the folder of class folders trained on.",
    ),
]
HeadsOpt = Annotated[
    int | None,
    typer.Option("--heads", min=1, help="Official .pt files: attention heads; width / 64 by default."),
]
ValOpt = Annotated[str | None, typer.Option("--val", metavar="DATA", help="Validation images.")]
ImagesArg = Annotated[str, typer.Argument(metavar="DATA", help="Folder of images, or a data spec.")]


@group.command(
    epilog=examples(
        "finecam promptcam train data/ --backbone timm:vit_base_patch16_224.dino --out pc/",
        "finecam promptcam train tinyworld:birds?split=train --val tinyworld:birds?split=val --backbone tiny:vit "
        "--prompt-layers 1 --epochs 30 --out pc/",
        "finecam promptcam train cub:CUB_200_2011@train --backbone timm:vit_base_patch16_224.dino --recipe dino/cub "
        "--out pc/",
    )
)
def train(
    ctx: typer.Context,
    data: ImagesArg,
    backbone: BackboneOpt,
    out: OutOpt,
    val: ValOpt = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME",
            help="Published settings, such as dino/cub: rate, epochs, drop-out, views; other options given win.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1)] = 100,
    warmup: Annotated[
        float | None, typer.Option("--warmup", min=0.0, help="Warm-up epochs; 20, at most a fifth, by default.")
    ] = None,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 5e-3,
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd, adamw or adam.")] = "sgd",
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0)] = 1e-3,
    dropout: Annotated[float, typer.Option("--dropout", min=0.0, max=0.99, help="Of prompts, in training.")] = 0.1,
    schedule: Annotated[str, typer.Option("--schedule", help="cosine, onecycle or constant.")] = "cosine",
    entry_layer: Annotated[
        int | None, typer.Option("--entry-layer", help="Layer where class prompts enter; 1 = shallow, default deep.")
    ] = None,
    prompt_layers: Annotated[
        int | None,
        typer.Option("--prompt-layers", help="Prompts in the last so many layers only; 1 trains in seconds."),
    ] = None,
    agnostic_prompts: Annotated[
        int | None,
        typer.Option("--agnostic-prompts", min=0, help="Class-agnostic prompts per layer; one per class by default."),
    ] = None,
    augment: Annotated[str, typer.Option("--augment", help="none or paper.")] = "none",
    keep_best: Annotated[
        bool, typer.Option("--keep-best", help="Keep the epoch of the best accuracy on --val, not the last.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute blocks in the backward pass to save memory.")
    ] = False,
    mixed_precision: Annotated[str, typer.Option("--mixed-precision", help="no, bf16 or fp16.")] = "no",
    split: SplitOpt = None,
    batch_size: BatchSizeOpt = 16,
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    seed: SeedOpt = 42,
    random_weights: RandomOpt = False,
    offline: OfflineOpt = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last finished epoch: what the same command does anyway.")
    ] = False,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Train one prompt per class on a frozen vision transformer."""
    from vfm_core.backbones import load_backbone

    from finecam.data import open_dataset
    from finecam.promptcam_train import RECIPES, train_promptcam

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other", remedy="give one of them")
    if keep_best and not val:
        raise UserError("--keep-best needs --val", remedy="name the images that decide which epoch is best")
    options: dict[str, Any] = {"epochs": epochs, "lr": lr, "dropout": dropout, "augment": augment}
    if recipe is not None:
        if recipe not in RECIPES:
            raise unknown_name("recipe", recipe, RECIPES, where="--recipe")
        published = RECIPES[recipe]
        settings = {"epochs": published.epochs, "lr": published.lr, "dropout": published.dropout, "augment": "paper"}
        options |= {name: value for name, value in settings.items() if not asked(ctx, name)}
    if options["augment"] not in ("none", "paper"):
        raise unknown_name("view", options["augment"], ("none", "paper"), where="--augment")
    trunk = load_backbone(
        backbone, pretrained=not random_weights, device=resolve_device(device), offline=offline or None
    )
    skipped: list[str] = []
    trained: list[int] = []

    def tell(record: dict[str, float]) -> None:
        trained.append(int(record["epoch"]))
        if not quiet:
            _epoch(record)

    options |= {"optimizer": optimizer, "schedule": schedule, "mixed_precision": mixed_precision}
    model = train_promptcam(
        open_dataset(data, split=split),
        trunk,
        val=open_dataset(val) if val else None,
        warmup=warmup,
        weight_decay=weight_decay,
        entry_layer=entry_layer,
        prompt_layers=prompt_layers,
        agnostic_prompts=agnostic_prompts,
        keep_best=keep_best,
        checkpointing=checkpointing,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        out=out,
        resume=True,
        overwrite=overwrite,
        on_epoch=tell,
        on_error=lambda i, image, error: skipped.append(image),
        **options,
    )
    if as_json:
        print_json({"out": out, "classes": model.class_names, "metrics": model.metrics, "skipped": skipped})
    else:
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in model.metrics.items())
        typer.echo("" if trained else "finished already: ", nl=False)
        typer.echo(f"{model.num_classes} classes, {numbers}" + (f", {len(set(skipped))} unreadable" if skipped else ""))
        typer.echo(f"look at it with: finecam promptcam traits {out} IMAGES --out traits/")


def _epoch(record: dict[str, float]) -> None:
    """One line per epoch on stderr."""
    shown = "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k in ("epoch", "loss", "accuracy"))
    typer.echo(shown, err=True)


@group.command(
    epilog=examples(
        "finecam promptcam traits pc/ photos/ --top 4 --out traits/",
        "finecam promptcam traits model.pt photos/ --classes CUB/train --heads 12 --out traits/",
    )
)
def traits(
    model: FolderArg,
    data: ImagesArg,
    out: OutOpt,
    top: Annotated[int, typer.Option("--top", min=1, help="Heads shown per image.")] = 4,
    target: Annotated[
        str | None, typer.Option("--target", metavar="CLASS", help="predicted (default), label, or a class.")
    ] = None,
    classes: NamesOpt = None,
    heads: HeadsOpt = None,
    split: SplitOpt = None,
    limit: LimitOpt = None,
    batch_size: BatchSizeOpt = 16,
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Show the most important heads of each image's class: its traits."""
    from finecam.data import open_dataset
    from finecam.trait_report import explain_traits

    done = explain_traits(
        model,
        open_dataset(data, split=split),
        out,
        top=top,
        target=target,
        batch_size=batch_size,
        workers=workers,
        limit=limit,
        class_names=classes,
        heads=heads,
        device=resolve_device(device),
        overwrite=overwrite,
        progress=bar("ranking heads", quiet),
    )
    _tell(done, as_json)


@group.command(epilog=examples('finecam promptcam compare pc/ photos/ "Scott Oriole" "Baltimore Oriole" --out shared/'))
def compare(
    model: FolderArg,
    data: ImagesArg,
    first: Annotated[str, typer.Argument(metavar="CLASS", help="A class.")],
    second: Annotated[str, typer.Argument(metavar="CLASS", help="Another class.")],
    out: OutOpt,
    classes: NamesOpt = None,
    heads: HeadsOpt = None,
    split: SplitOpt = None,
    limit: LimitOpt = None,
    batch_size: BatchSizeOpt = 16,
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Show the same images to the prompts of two classes: which traits the two share."""
    from finecam.data import open_dataset
    from finecam.trait_report import compare_classes

    done = compare_classes(
        model,
        open_dataset(data, split=split),
        first,
        second,
        out,
        batch_size=batch_size,
        workers=workers,
        limit=limit,
        class_names=classes,
        heads=heads,
        device=resolve_device(device),
        overwrite=overwrite,
        progress=bar("comparing", quiet),
    )
    _tell(done, as_json)


@group.command(
    epilog=examples(
        "finecam promptcam taxonomy data/train --levels species.csv --backbone timm:vit_base_patch16_224.dino "
        "--out keys/"
    )
)
def taxonomy(
    data: ImagesArg,
    levels: Annotated[
        Path, typer.Option("--levels", metavar="CSV", help="Columns species and any of genus, family, order, ...")
    ],
    backbone: BackboneOpt,
    out: OutOpt,
    val: ValOpt = None,
    per: Annotated[
        str, typer.Option("--per", help="One prompt set per level, or per inner node of the tree: level, node.")
    ] = "level",
    epochs: Annotated[int, typer.Option("--epochs", min=1)] = 100,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 5e-3,
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd, adamw or adam.")] = "sgd",
    prompt_layers: Annotated[
        int, typer.Option("--prompt-layers", min=1, help="Prompts in the last so many layers; 1 trains in seconds.")
    ] = 1,
    images: Annotated[int, typer.Option("--images", min=1, help="Images shown on the page.")] = 24,
    split: SplitOpt = None,
    batch_size: BatchSizeOpt = 16,
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    seed: SeedOpt = 42,
    random_weights: RandomOpt = False,
    offline: OfflineOpt = False,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Train prompts for every level of a taxonomy and show the same image from order to species."""
    from vfm_core.backbones import load_backbone

    from finecam.data import open_dataset
    from finecam.taxonomy import INDEX, Taxonomy, train_taxonomy
    from finecam.taxonomy_report import write_walk

    if per not in ("level", "node"):
        raise unknown_name("unit", per, ("level", "node"), where="--per")
    if (out / INDEX).exists() and not overwrite:
        raise UserError("taxonomy keys are there already", where=out, remedy="use --overwrite, or another --out")
    tree, dataset = Taxonomy.read(levels), open_dataset(data, split=split)
    held_out, where = open_dataset(val) if val else None, resolve_device(device)
    trunk = load_backbone(backbone, pretrained=not random_weights, device=where, offline=offline or None)
    skipped: set[str] = set()
    options: dict[str, Any] = {"optimizer": optimizer, "epochs": epochs, "lr": lr, "prompt_layers": prompt_layers}
    keys = train_taxonomy(
        dataset,
        trunk,
        tree,
        per=per,  # type: ignore[arg-type]
        val=held_out,
        out=out,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        on_epoch=None if quiet else _epoch,
        on_error=lambda i, image, error: skipped.add(image),
        **options,
    )
    shown = dataset if held_out is None else held_out
    page = write_walk(keys, shown, out, images=images, batch_size=batch_size, workers=workers, device=where)
    rows = [
        {"prompts of": " > ".join(unit) or "the root", "groups": model.num_classes, **model.metrics}
        for unit, model in keys.models.items()
    ]
    if as_json:
        print_json({"out": out, "index": page, "units": rows, "skipped": sorted(skipped)})
    else:
        print_table(rows, f"{len(rows)} prompt sets" + (f", {len(skipped)} unreadable images" if skipped else ""))
        typer.echo(str(page))


def _tell(done: Any, as_json: bool) -> None:
    if as_json:
        print_json(vars(done))
    else:
        typer.echo(done.line())
        typer.echo(str(done.index))
    finish(done.failed, done.out / "errors.jsonl")


@quiz.command(
    epilog=examples("finecam quiz export cams/ traits/ --traits traits.csv --out quiz/"),
)
def export(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of explain or promptcam traits.")],
    traits_file: Annotated[
        Path, typer.Option("--traits", metavar="CSV", help="Columns image,trait: the mark to look for, in words.")
    ],
    out: OutOpt,
    data: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Original images; stored pictures by default.")
    ] = None,
    seed: SeedOpt = 0,
    debug: DebugOpt = False,
) -> None:
    """Make a blinded quiz page: a trait in words, a heat map, yes or no."""
    from finecam.quiz import export_quiz
    from finecam.quiz_items import items_of_runs

    items = items_of_runs(runs, traits_file, data)
    page = export_quiz(items, out, seed=seed)
    typer.echo(f"{len(items)} questions; keep key.csv to yourself")
    typer.echo(str(page))


@quiz.command(epilog=examples("finecam quiz score answers-1.csv answers-2.csv --key quiz/key.csv"))
def score(
    answers: Annotated[list[Path], typer.Argument(metavar="CSV...", help="Answer files saved by the page.")],
    key: Annotated[Path, typer.Option("--key", metavar="CSV", help="key.csv of the quiz.")],
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Rate of recognised traits per method, with 95% Wilson intervals."""
    from finecam.quiz import score_quiz

    rows = score_quiz(answers, key)
    if as_json:
        print_json(rows)
    else:
        print_table(rows, "traits recognised")
