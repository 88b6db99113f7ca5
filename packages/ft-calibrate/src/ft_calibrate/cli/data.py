"""Verbs about data: data (what a spec holds), split (seen and absent classes)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from vfm_core.cli import (
    BatchSizeOpt,
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    QuietOpt,
    SeedOpt,
    WorkersOpt,
    examples,
    print_json,
    print_table,
    progress,
    resolve_device,
)
from vfm_core.errors import UserError

from ft_calibrate.cli import app

if TYPE_CHECKING:
    from ft_calibrate.splits import Split

SPLIT_NAMES = ("train", "train_mini", "val", "test", "id_val", "id_test", "extra")


# ----------------------------------------------------------------------------------------------------------------- data
@app.command(
    "data",
    epilog=examples(
        "ft-calibrate data",
        "ft-calibrate data office-home:OfficeHome?domain=Cl --seen ar-30",
        "ft-calibrate data imagenet-r:imagenet-r@test --per-class --json",
    ),
)
def describe_data(
    spec: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Data spec; without it formats are listed.")
    ] = None,
    seen: Annotated[
        str | None,
        typer.Option("--seen", metavar="SPLIT", help="Also count seen and absent: a file, ar-30, or a,b,c."),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="One line per class.")] = False,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Say what a data spec holds (classes, counts, splits), or list the formats."""
    if spec is None:
        from ft_calibrate.readers.catalogue import available

        rows = [{"spec": f.pattern, "data": f.title, "splits": f.splits} for f in available()]
        if as_json:
            print_json(rows)
        else:
            print_table(rows, "Data that can be named by a spec")
        return
    from ft_calibrate.describe_data import describe

    found = describe(spec, seen)
    if as_json:
        print_json(found)
        return
    print_table(found["splits"], f"{found['name']}: {len(found['classes'])} classes")
    if found.get("groups"):
        print_table(found["groups"], f"split {found['split']}")
    if per_class:
        print_table(found["per_class"], "Per class")


# ---------------------------------------------------------------------------------------------------------------- split
@app.command(
    "split",
    epilog=examples(
        "ft-calibrate split ar-30 --out splits.json",
        "ft-calibrate split random --data tinyworld:glyphs --n-seen 10 --seed 1 --out splits.json",
        "ft-calibrate split similarity --features features.npz --share 0.5 --out splits.json",
        "ft-calibrate split seen.txt --classes all.txt --out splits.json",
        "ft-calibrate split rw-30 --sweep 0.2,0.5,1 --out sweep.json",
    ),
)
def split(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="random, similarity, a reference split (ar-30, rw-30, imagenet-r, imagenet-sketch), or a file of seen "
            "classes (.txt or .json).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="JSON file, as --seen takes it.")],
    data: Annotated[str | None, typer.Option("--data", metavar="SPEC", help="Data whose classes to split.")] = None,
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="FILE|K", help="Class list, a name a line or JSON; or a number of classes."),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option("--features", metavar="FILE", help="Scores with labels and features: classes, and similarity."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="SPEC", help="Makes the features of --data, for similarity.")
    ] = None,
    n_seen: Annotated[int | None, typer.Option("--n-seen", min=1, help="Number of seen classes.")] = None,
    share: Annotated[float | None, typer.Option("--share", help="The same as a share of the classes, 0 to 1.")] = None,
    clustering: Annotated[str, typer.Option("--clustering", help="agglomerative or kmeans.")] = "agglomerative",
    clusters: Annotated[int | None, typer.Option("--clusters", help="Number of clusters; default: root of K.")] = None,
    sweep: Annotated[
        str | None, typer.Option("--sweep", metavar="LIST", help="Shares of the seen classes: one file each.")
    ] = None,
    dropped: Annotated[
        str, typer.Option("--dropped", help="Classes that a sweep drops become absent or remaining.")
    ] = "absent",
    folds: Annotated[int, typer.Option("--folds", min=0, help="Show so many pseudo splits of the seen classes.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it holds something else.")] = False,
    batch_size: BatchSizeOpt = 64,
    workers: WorkersOpt = 0,
    device: DeviceOpt = "auto",
    seed: SeedOpt = 0,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Choose seen and absent classes and write them to a file."""
    from ft_calibrate.splits import is_official, make_split, official_split, pseudo_splits, read_split, seen_sweep

    names = _class_list(data, classes, features)
    if kind in ("random", "similarity"):
        if names is None:
            remedy = "give --data, --classes or --features"
            raise UserError("no list of all classes", where=f"split {kind}", remedy=remedy)
        f, y = (None, None)
        if kind == "similarity":
            f, y = _features(data, features, model, names, batch_size, workers, str(resolve_device(device)), quiet)
        made = make_split(names, n_seen, share, kind, seed, f, y, clustering=clustering, clusters=clusters)
    else:
        if share is not None:
            raise UserError("a share applies to random and similarity", where="--share", given=share, remedy="drop it")
        if is_official(kind):
            made = official_split(kind, n_seen)
            made = made if names is None else made.for_classes(names)
        elif n_seen is not None:
            raise UserError("the file says which classes are seen", where="--n-seen", given=n_seen, remedy="drop it")
        elif not Path(kind).is_file():
            remedy = "use random, similarity, ar-30, rw-30, imagenet-r, imagenet-sketch, or give a file"
            raise UserError("unknown kind of split", where="KIND", given=repr(kind), remedy=remedy)
        else:
            made = read_split(kind, names)
    steps = seen_sweep(made, _shares(sweep), dropped) if sweep is not None else [made]
    paths = [out] if sweep is None else [_step_path(out, text) for text in sweep.split(",")]
    for step, path in zip(steps, paths, strict=True):
        _write(step, path, overwrite)
    pseudo = pseudo_splits(made.seen, folds, seed) if folds else []
    if as_json:
        shown: list[Any] = [{"path": path, **step.to_dict()} for step, path in zip(steps, paths, strict=True)]
        result = shown[0] if sweep is None else {"sweep": shown}
        print_json(result | {"pseudo": [{"seen": s, "absent": a} for s, a in pseudo]} if pseudo else result)
        return
    rows = [
        {
            "file": str(path),
            "seen": len(s.seen),
            "absent": len(s.absent),
            "remaining": len(s.remaining),
            "split": s.name,
        }
        for s, path in zip(steps, paths, strict=True)
    ]
    print_table(rows, f"{len(made.classes)} classes")
    if pseudo:
        parts = [
            {"fold": r, "pseudo-seen": ", ".join(s), "pseudo-absent": ", ".join(a)} for r, (s, a) in enumerate(pseudo)
        ]
        print_table(parts, "Pseudo splits of the seen classes")


def _class_list(data: str | None, classes: str | None, features: Path | None) -> list[str] | None:
    """Names of all classes, from the one source that was given."""
    if data is not None and classes is not None:
        raise UserError("two sources of classes", given=f"--data {data}, --classes {classes}", remedy="drop one")
    if classes is not None:
        if classes.isdecimal():
            return [str(i) for i in range(int(classes))]
        from ft_calibrate.model_sources import read_names

        return list(read_names(Path(classes)))
    if data is not None:
        from ft_calibrate.describe_data import open_any_split

        return open_any_split(data).classes
    if features is not None:
        from ft_calibrate.tables import open_table

        return list(open_table(features).classes)
    return None


def _features(
    data: str | None,
    features: Path | None,
    model: str | None,
    names: list[str],
    batch_size: int,
    workers: int,
    device: str,
    quiet: bool,
) -> tuple[Any, Any]:
    """Features and labels for a similarity split."""
    if features is not None:
        from ft_calibrate.tables import read_table

        table = read_table(features, classes=names)
        if table.features is None or table.labels is None:
            missing = "features" if table.features is None else "labels"
            remedy = "extract them: ft-calibrate extract --features"
            raise UserError(f"no {missing}", where=features, remedy=remedy)
        return table.features, table.labels
    if data is None or model is None:
        remedy = "give --features FILE, or --data with --model"
        raise UserError("no features", where="split similarity", remedy=remedy)
    return _model_features(data, model, batch_size, workers, device, quiet)


def _model_features(data: str, model: str, batch_size: int, workers: int, device: str, quiet: bool) -> tuple[Any, Any]:
    import numpy as np

    from ft_calibrate.classifier import load_classifier
    from ft_calibrate.describe_data import open_any_split
    from ft_calibrate.predict import stream

    dataset = open_any_split(data)
    classifier = load_classifier(model, device=device)
    parts = stream(classifier, dataset, None, batch_size, workers, device, None, True, None)
    number = -(-len(dataset) // batch_size)
    found = [(rows, f) for rows, f, _ in progress(parts, "features", total=number, quiet=quiet)]
    rows = np.concatenate([part[0] for part in found])
    return np.concatenate([part[1] for part in found]), np.asarray(dataset.labels)[rows]


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError("not a list of numbers", where="--sweep", given=repr(text), remedy="write 0.2,0.5,1") from None


def _step_path(out: Path, share: str) -> Path:
    return out.with_name(f"{out.stem}-{share.strip()}{out.suffix or '.json'}")


def _write(split: Split, path: Path, overwrite: bool) -> None:
    from ft_calibrate.splits import read_split, write_split

    if path.is_file() and not overwrite:
        try:
            same = read_split(path).to_dict() == split.to_dict()
        except UserError:
            same = False
        if not same:
            remedy = "choose another --out or add --overwrite"
            raise UserError("the file holds another split", where="--out", given=str(path), remedy=remedy)
    if path.is_dir():
        raise UserError("a folder where a file was expected", where="--out", given=str(path), remedy="name the file")
    write_split(split, path)
