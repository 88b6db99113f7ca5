"""Verbs that train: fit-head."""

from __future__ import annotations

from typing import Annotated

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
    resolve_device,
)

from finecam.cli import app
from finecam.cli.options import OfflineOpt, RandomOpt


@app.command(
    "fit-head",
    epilog=examples(
        "finecam fit-head data/ --backbone timm:vit_base_patch14_dinov2.lvd142m?img_size=224 --out head/",
        "finecam fit-head data/ --backbone open_clip:hf-hub:imageomics/bioclip --recipe exact --out head/",
        "finecam fit-head tinyworld:birds?split=train --backbone tiny:vit --val tinyworld:birds?split=val --out head/",
    ),
)
def fit_head(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Labelled images: a folder per class, or a data spec.")],
    backbone: BackboneOpt,
    out: OutOpt,
    val: Annotated[
        str | None, typer.Option("--val", metavar="DATA", help="Validation images; by default held out of DATA.")
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="official (Adam, 20 epochs) or exact (logistic regression, faster).")
    ] = "official",
    pool: Annotated[str, typer.Option("--pool", help="mean of the patch tokens (the paper), cls or native.")] = "mean",
    augment: Annotated[
        bool, typer.Option("--augment", help="Random crops and flips in every epoch, as the official code; slower.")
    ] = False,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Of the official recipe.")] = 20,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of the official recipe.")] = 3e-4,
    strength: Annotated[float, typer.Option("--strength", help="C of the exact recipe: larger fits closer.")] = 1.0,
    batch_size: BatchSizeOpt = 128,
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    seed: SeedOpt = 0,
    random_weights: RandomOpt = False,
    offline: OfflineOpt = False,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Train a linear classifier on a frozen backbone; the result is a model for explain, evaluate and audit."""
    from finecam import head

    def tell(done: int, total: int) -> None:
        if not quiet:
            typer.echo(f"\rfeatures {done}/{total}" + ("\n" if done >= total else ""), nl=False, err=True)

    fitted = head.fit_head(
        data,
        backbone,
        out,
        val=val,
        pool=pool,
        recipe=recipe,
        augment=augment,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        strength=strength,
        seed=seed,
        workers=workers,
        device=resolve_device(device),
        overwrite=overwrite,
        on_features=tell,
        pretrained=not random_weights,
        offline=offline or None,
    )
    if as_json:
        print_json(vars(fitted))
    else:
        typer.echo(fitted.line())
        typer.echo(f"explain with: finecam explain IMAGES --model {out} --out cams/")
