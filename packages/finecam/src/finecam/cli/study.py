"""Verbs that measure: demo, evaluate, bench, audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from vfm_core.cli import (
    BatchSizeOpt,
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    OutOpt,
    OverwriteOpt,
    QuietOpt,
    WorkersOpt,
    examples,
    print_json,
    print_table,
    resolve_device,
)
from vfm_core.errors import UserError, unknown_name

from finecam.cli import app
from finecam.cli.options import (
    ClassesOpt,
    HeadBackboneOpt,
    LayerOpt,
    LimitOpt,
    MethodOpt,
    ModelOpt,
    OfflineOpt,
    RandomOpt,
    bar,
    finish,
    loading,
    names,
    numbers,
)

FILLS = ("zero", "blur", "image_mean", "noisy_linear")
RULES = ("logit", "rank", "weight")


@app.command(epilog=examples("finecam demo", "finecam demo --seeds 1 --out demo/"))
def demo(
    out: OutOpt = Path("demo"),
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, max=3, help="Training runs of the tiny models to repeat on.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Every table of the papers; takes longer.")] = False,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Run the embedded study: both papers' claims on synthetic birds with known marks. No download."""
    from finecam.demo import run_demo

    done = run_demo(out, seeds=seeds, full=full, overwrite=overwrite, progress=bar("study", quiet))
    if as_json:
        print_json(done.to_dict())
        return
    print_table(done.finer, "Finer-CAM minus the plain method on the same birds: difference [95% interval]")
    print_table(done.prompt, "Prompt-CAM and other maps on one frozen transformer: mean [95% interval]")
    typer.echo(f"{done.seconds:.0f} s")
    typer.echo(str(done.report))


@app.command(
    epilog=examples(
        "finecam evaluate tinyworld:birds?split=val --model tiny:cnn --methods gradcam,layercam --gammas 0,0.6,1 "
        "--out eval/",
        "finecam evaluate cub:CUB_200_2011@test --model head/ --methods gradcam --out eval/",
        "finecam evaluate tinyworld:birds --model tiny:cnn --methods gradcam --ablation references --out eval/",
    )
)
def evaluate(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Labelled images, best with masks, parts or boxes.")],
    model: ModelOpt,
    out: OutOpt,
    methods: Annotated[
        str, typer.Option("--methods", metavar="LIST", help="CAM families, by commas.")
    ] = "gradcam,layercam",
    gammas: Annotated[
        str, typer.Option("--gammas", metavar="LIST", help="Strengths; 0 is the plain method.")
    ] = "0,0.6,1",
    fractions: Annotated[
        str, typer.Option("--fractions", metavar="LIST", help="Shares of the pixels that relative drop removes.")
    ] = "0.01,0.05,0.1",
    curve_steps: Annotated[
        int, typer.Option("--curve-steps", min=0, help="Steps of deletion and insertion curves; 0 leaves them out.")
    ] = 50,
    fill: Annotated[str, typer.Option("--fill", help=f"What removed pixels become: {', '.join(FILLS)}.")] = "zero",
    references: Annotated[int, typer.Option("--references", min=1, help="Similar classes to subtract.")] = 3,
    similarity: Annotated[
        str, typer.Option("--similarity", help=f"How similar classes are chosen: {', '.join(RULES)}.")
    ] = "logit",
    weighting: Annotated[
        str, typer.Option("--weighting", help="Of several references: mean, softmax, softmax_detached.")
    ] = "mean",
    aggregate: Annotated[
        str,
        typer.Option(
            "--aggregate", help="before_relu_mean, before_relu_max, after_relu_mean; map_subtraction to compare with."
        ),
    ] = "before_relu_mean",
    ablation: Annotated[
        str | None,
        typer.Option(
            "--ablation",
            metavar="SET",
            help="Arms of a table of the paper: references, aggregation, similarity, strength.",
        ),
    ] = None,
    extras: Annotated[
        str,
        typer.Option(
            "--metrics",
            metavar="LIST",
            help="Also: absolute_drop, max_relative_drop, curve_area, iou, average_drop, increase_in_confidence, road.",
        ),
    ] = "",
    sanity: Annotated[
        int, typer.Option("--sanity", min=0, metavar="N", help="Destroy the model stage by stage on N images.")
    ] = 0,
    all_images: Annotated[bool, typer.Option("--all-images", help="Also images the model gets wrong.")] = False,
    layer: LayerOpt = None,
    classes: ClassesOpt = None,
    backbone: HeadBackboneOpt = None,
    random_weights: RandomOpt = False,
    offline: OfflineOpt = False,
    limit: LimitOpt = None,
    batch_size: BatchSizeOpt = 32,
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Score CAM methods and strengths on labelled images; every method on the same images and classes."""
    from finecam.classifiers import load_classifier
    from finecam.evaluation import Scoring
    from finecam.evaluation_run import run_evaluation

    if fill not in FILLS:
        raise unknown_name("fill", fill, FILLS, where="--fill")
    if similarity not in RULES:
        raise unknown_name("similarity", similarity, RULES, where="--similarity")
    settings = {"references": references, "similarity": similarity, "weighting": weighting, "aggregate": aggregate}
    if ablation is not None and tuple(settings.values()) != (3, "logit", "mean", "before_relu_mean"):
        raise UserError(
            "an ablation sets its own references, similarity, weighting and aggregate",
            where="--ablation",
            given=ablation,
            remedy="leave those options out",
        )
    where = resolve_device(device)
    classifier = load_classifier(model, device=where, **loading(classes, backbone, random_weights, offline))
    scoring = Scoring(
        fractions=numbers(fractions, "--fractions"),
        curve_steps=curve_steps,
        fill=fill,  # type: ignore[arg-type]
        references=references,
        extras=names(extras),
    )
    done = run_evaluation(
        data,
        classifier,
        out,
        methods=names(methods),
        gammas=numbers(gammas, "--gammas"),
        scoring=scoring,
        settings=settings,
        ablation=ablation,
        sanity=sanity,
        layer=layer,
        correct_only=not all_images,
        limit=limit,
        batch_size=batch_size,
        workers=workers,
        device=where,
        overwrite=overwrite,
        progress=bar("methods", quiet),
    )
    if as_json:
        print_json(done.to_dict())
    else:
        print_table(done.by_metric(), f"{len(done.ids)} images, accuracy {done.accuracy:.1%}; intervals in the report")
        if done.sanity:
            print_table(done.sanity, "Rank correlation with the original maps")
        for line in done.related():
            typer.echo(line)
        typer.echo(str(done.report))
    finish(len(done.skipped), out / "errors.jsonl")


@app.command(
    epilog=examples(
        "finecam bench --out bench/", "finecam bench --models resnet18 --batch-sizes 1 --sections speed --out bench/"
    )
)
def bench(
    out: OutOpt = Path("bench"),
    models: Annotated[
        str, typer.Option("--models", metavar="LIST", help="timm models, by commas.")
    ] = "resnet50,vit_small_patch16_224",
    methods: Annotated[str, typer.Option("--methods", metavar="LIST", help="CAM families.")] = "gradcam,layercam",
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", metavar="LIST", help="Images per call.")] = "1,8",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Paired runs; the median counts.")] = 3,
    sections: Annotated[
        str, typer.Option("--sections", metavar="LIST", help="What to time.")
    ] = "speed,strengths,memory,growth,traits,folder",
    device: DeviceOpt = "auto",
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Time our maps against grad-cam and torchcam on the same models and images, in one process."""
    from finecam.bench import run_bench, tables

    sizes = numbers(batch_sizes, "--batch-sizes")
    if any(size != int(size) or size < 1 for size in sizes):
        raise UserError("batch sizes are whole numbers", where="--batch-sizes", given=batch_sizes, remedy="write 1,8")
    result = run_bench(
        out,
        models=names(models),
        methods=names(methods),
        batch_sizes=tuple(int(size) for size in sizes),
        repeats=repeats,
        device=str(resolve_device(device)),
        quiet=quiet or as_json,
        sections=names(sections),
    )
    if as_json:
        print_json(result)
        return
    for heading, rows in tables(result):
        print_table(rows, heading)
    typer.echo(str(out / "bench.json"))


@app.command(
    epilog=examples(
        "finecam audit photos/ --model head/ --clip open_clip:ViT-B-16@openai --attributes attrs.csv --out audit/"
    )
)
def audit(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder of images, or a data spec.")],
    model: ModelOpt,
    clip: Annotated[str, typer.Option("--clip", metavar="SPEC", help="Image-text model, such as open_clip:NAME@TAG.")],
    attributes: Annotated[Path, typer.Option("--attributes", metavar="CSV", help="Columns class,attribute[,generic].")],
    out: OutOpt,
    generic: Annotated[str, typer.Option("--generic", help="Word that is subtracted from each attribute.")] = "bird",
    template: Annotated[
        list[str] | None, typer.Option("--template", help="Prompt with {} for the text; may be repeated.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="CLASS", help="label (default where known), predicted, or a class."),
    ] = None,
    references: Annotated[int, typer.Option("--references", min=1, help="Similar classes to subtract.")] = 3,
    gamma: Annotated[float, typer.Option("--gamma", help="Strength of both contrasts.")] = 0.6,
    method: MethodOpt = "gradcam",
    layer: LayerOpt = None,
    clip_layer: Annotated[
        str | None, typer.Option("--clip-layer", metavar="NAME", help="Of the image-text model.")
    ] = None,
    classes: ClassesOpt = None,
    backbone: HeadBackboneOpt = None,
    random_weights: RandomOpt = False,
    offline: OfflineOpt = False,
    limit: LimitOpt = None,
    batch_size: BatchSizeOpt = 16,
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Does the classifier look where its classes' described marks are? Compares its maps with an image-text model's."""
    from finecam.audit_run import audit as run_audit

    done = run_audit(
        data,
        model,
        clip,
        attributes,
        out,
        generic=generic,
        templates=tuple(template or ()),
        target=target,
        references=references,
        gamma=gamma,
        method=method,
        layer=layer,
        clip_layer=clip_layer,
        loading=loading(classes, backbone, random_weights, offline),
        clip_loading=loading(None, None, random_weights, offline),
        device=resolve_device(device),
        batch_size=batch_size,
        workers=workers,
        limit=limit,
        overwrite=overwrite,
        progress=bar("auditing", quiet),
    )
    if as_json:
        print_json(vars(done))
    else:
        print_table(done.rows, f"{done.done} images compared, {done.skipped} of classes without attributes")
        typer.echo(str(done.report))
    finish(done.failed, out / "errors.jsonl")
