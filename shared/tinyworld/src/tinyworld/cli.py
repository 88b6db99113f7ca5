"""The command ``tinyworld``: look at the world, list, read and re-make its models, time its renderer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from vfm_core.cli import DebugOpt, JsonOpt, QuietOpt, SeedOpt, examples, make_app, print_json, print_table, run_app

app = make_app(
    "tinyworld", "A small procedural world with complete ground truth, and tiny models that know it.", "tinyworld"
)


@app.command("list", epilog=examples("tinyworld list", "tinyworld list --json"))
def list_models(as_json: JsonOpt = False, debug: DebugOpt = False) -> None:
    """List the data sets and the shipped models with their measured quality."""
    from tinyworld.catalogue import ALBUM_OPTIONS, DATA, LANGUAGE_MODELS, MODELS, card_path, read_card

    data = [{"data": f"tinyworld:{name}", "options": ", ".join(kinds)} for name, kinds in DATA.items()]
    data.append({"data": "tinyworld.make_albums", "options": ", ".join(ALBUM_OPTIONS)})
    found: list[dict[str, Any]] = []
    for model in (MODELS | LANGUAGE_MODELS).values():
        cards = [read_card(stem) for stem in model.files() if card_path(stem).is_file()]
        best = [next(iter(card["measured"].values())) for card in cards]
        found.append(
            {
                "model": f"tiny:{model.name}",
                "what": model.summary,
                "seeds": ", ".join(map(str, model.seeds)),
                "layouts": ", ".join(model.layouts),
                "parameters": cards[0]["parameters"] if cards else None,
                "accuracy": " to ".join(sorted({f"{min(best):.3f}", f"{max(best):.3f}"})) if best else None,
            }
        )
    if as_json:
        print_json({"data": data, "models": found})
        return
    print_table(data, "Data")
    print_table(found, "Models")


@app.command(epilog=examples("tinyworld card cnn-nested-0", "tinyworld card vit-0 --json"))
def card(
    name: Annotated[str, typer.Argument(help="File stem as in `tinyworld list`: cnn-nested-0, vit-1, clip-0 ...")],
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Print a model card: recipe, measured quality, hash."""
    from tinyworld.catalogue import LANGUAGE_MODELS, MODELS, any_entry, read_card

    if name in MODELS or name in LANGUAGE_MODELS:
        name = any_entry(name).files()[0]
    content = read_card(name)
    if as_json:
        print_json(content)
        return
    for key, value in content.items():
        typer.echo(f"{key.replace('_', ' ')}: {_text(value)}")


@app.command(epilog=examples("tinyworld train cnn --seed 3 --out mine/", "tinyworld train vit --ship"))
def train(
    name: Annotated[str, typer.Argument(help="cnn, vit, vit-fair, vit-reg, glyph-cnn, clip or vlm.")],
    seed: SeedOpt = 0,
    layout: Annotated[
        str | None, typer.Option("--layout", help="nested (default) or factorial, for models with a file each.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where weights and card go.")] = Path("tiny-models"),
    ship: Annotated[bool, typer.Option("--ship", help="Replace the shipped weights and card instead.")] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Re-make a model from its recipe (one to three CPU minutes)."""
    import sys

    from tinyworld.catalogue import any_entry

    entry = any_entry(name)
    layout = entry.check_layout(layout or entry.layouts[0])
    from tinyworld.recipes import make

    def report(epoch: int, loss: float) -> None:
        if not quiet:
            typer.echo(f"epoch {epoch + 1}: loss {loss:.4f}", err=True)

    if not quiet:
        typer.echo(f"training tiny:{name}, seed {seed}, one thread", err=True)
    content = make(name, seed, layout, None if ship else out, report)
    if as_json:
        print_json(content)
        return
    print_table([{"measured": key, "value": value} for key, value in content["measured"].items()])
    where = "the package" if ship else str(out / f"{entry.file(seed, layout)}.safetensors")
    sys.stdout.write(f"wrote {where}\n")


@app.command(
    epilog=examples("tinyworld show birds.png", 'tinyworld show "?layout=factorial&shared_marks=2" --out b.png')
)
def show(
    options: Annotated[str, typer.Argument(help="Options of tinyworld:birds, e.g. '?layout=factorial&size=96'.")] = "",
    out: Annotated[Path, typer.Option("--out", metavar="PNG", help="Picture to write.")] = Path("birds.png"),
    n: Annotated[int, typer.Option("--n", min=1, max=400, help="Number of birds.")] = 16,
    columns: Annotated[int, typer.Option("--columns", min=1, max=40, help="Birds per row.")] = 4,
    masks: Annotated[bool, typer.Option("--masks/--no-masks", help="Show the ground truth beside each bird.")] = True,
    debug: DebugOpt = False,
) -> None:
    """Draw a contact sheet of birds with their ground truth."""
    import sys

    from vfm_core.errors import UserError
    from vfm_core.specs import parse_spec

    from tinyworld.birds import Birds
    from tinyworld.datasets import open_tinyworld
    from tinyworld.sheet import contact_sheet

    birds = open_tinyworld(
        parse_spec("tinyworld:birds" + (options if not options or options[0] == "?" else f"?{options}"))
    )
    assert isinstance(birds, Birds)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError("not a picture name", where="--out", given=out, remedy="end it in .png")
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(birds, n, columns, masks).save(out)
    sys.stdout.write(f"wrote {out}\n")


@app.command(epilog=examples("tinyworld bench", "tinyworld bench --json > speed.json"))
def bench(
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed calls per row (median).")] = 3,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Time the renderer on one core."""
    from tinyworld.bench import TARGET
    from tinyworld.bench import bench as measure

    rows = measure(repeats)
    if as_json:
        print_json({"target at 48 px": TARGET, "rows": rows})
    else:
        print_table(rows, f"Renderer, one core (aim: {TARGET:.0f} images/s at 48 px)")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"\n  {key}: {one}" for key, one in value.items())
    return str(value)


def main() -> None:
    """Entry point."""
    run_app(app)
