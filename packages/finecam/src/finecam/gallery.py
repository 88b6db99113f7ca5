"""The static gallery of a run: one page, relative links, no network, readable on a phone and with the keyboard.

`index.html` holds the page, `gallery/data.js` the records (a script, because a page opened from disk may not fetch
files), `gallery/` the pictures. Heat maps are small see-through layers that the browser scales over the picture, so a
sweep over gamma costs a few kilobytes per strength, and the reader can slide between picture, plain and finer maps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from vfm_core.files import atomic_write

from finecam.render import colour_table

DATA_FILE = "gallery/data.js"


@dataclass(frozen=True)
class GalleryPage:
    """What stands on the page around the pictures.

    Parameters
    ----------
    title, subtitle
        Heading and the line below it.
    views
        Steps of the slider: the bare picture, then one name per heat layer, in the order of the records' layers.
    start
        Step that is shown first.
    colormap
        Colour map of the layers, for the legend.
    links
        (text, relative address) of the run's other files.
    footer
        Last line of the page.
    """

    title: str
    subtitle: str = ""
    views: Sequence[str] = ("image", "plain")
    start: int = 1
    colormap: str = "turbo"
    links: Sequence[tuple[str, str]] = field(default=())
    footer: str = ""


def contrast_views(gammas: Sequence[float]) -> list[str]:
    """Steps of the slider for maps at several strengths: picture, plain, finer, and the difference where there is one.

    >>> contrast_views((0, 0.6))
    ['image', 'plain', 'finer γ 0.6', 'difference']
    """
    names = ["image", *("plain" if g == 0 else f"finer γ {g:g}" for g in gammas)]
    return names + (["difference"] if len(gammas) > 1 else [])


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("finecam", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("index.html.j2")


def _card(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a result record the page needs, with addresses made safe for any file name."""
    pictures = record["pictures"]
    label = record.get("label")
    prediction = record.get("prediction")
    return {
        "path": record["image"],
        "size": record["size"],
        "image": quote(pictures["image"]),
        # Step 0 of the slider is the bare picture: it has no layer.
        "layers": [None, *(quote(p) for p in pictures["layers"])],
        "example": quote(pictures["example"]) if pictures.get("example") else None,
        "panel": quote(record["overlay"]) if record.get("overlay") else None,
        "map": quote(record["map"]),
        "target": _class(record["target"]),
        "references": [_class(r) for r in record.get("references", [])],
        "prediction": _class(prediction) if prediction else None,
        "label": label,
        "correct": None if label is None or prediction is None else label == prediction["name"],
        "peak": record.get("peak"),
        "metrics": record.get("metrics") or {},
        "empty": bool(record.get("empty")),
        "warning": record.get("warning"),
    }


def _class(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": entry["name"], "prob": entry.get("prob")}


def write_gallery(
    out: Path | str, records: Iterable[Mapping[str, Any]], errors: Iterable[Mapping[str, Any]], page: GalleryPage
) -> Path:
    """Write `index.html` and its data for the result records of a run.

    Parameters
    ----------
    out
        The run folder; all pictures named in the records lie below it.
    records
        Result records (`results.jsonl` of `explain`), with paths relative to `out`.
    errors
        Records with ``image`` and ``error``, shown as cards of their own.
    page
        Title, strengths and links.

    Returns
    -------
    Path
        The page.
    """
    out = Path(out)
    cards = [_card(r) for r in records]
    cards += [{"path": str(e["image"]), "error": str(e["error"])} for e in errors]
    cards.sort(key=lambda c: c["path"])
    data = json.dumps(
        {"views": list(page.views), "start": page.start, "records": cards}, ensure_ascii=False, allow_nan=False
    )
    # U+2028 and U+2029 end a line inside a script in older browsers.
    data = data.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    with atomic_write(out / DATA_FILE) as part:
        part.write_text(f"window.FINECAM = {data};\n", encoding="utf-8")
    table = colour_table(page.colormap)
    scale = ", ".join("#{:02x}{:02x}{:02x}".format(*table[i]) for i in range(0, 256, 51))
    html = _template().render(
        title=page.title,
        subtitle=page.subtitle,
        links=[(text, quote(link)) for text, link in page.links],
        footer=page.footer,
        scale=scale,
        difference="difference" in page.views,
    )
    with atomic_write(out / "index.html") as part:
        part.write_text(html, encoding="utf-8")
    return out / "index.html"
