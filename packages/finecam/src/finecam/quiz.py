"""Trait recognition: the blinded human study of Prompt-CAM (arXiv 2501.09333, section 4), and an automatic stand-in.

The study shows a person a trait in words and a heat map, and asks whether the map points at the trait; the rate of
"yes" is compared between methods. :func:`export_quiz` writes one self-contained page on which neither method nor order
gives anything away, plus the key; :func:`score_quiz` turns answers into rates with Wilson intervals. Where traits or
parts are annotated, :func:`trait_hits` asks the same of the maps without a person.
"""

from __future__ import annotations

import csv
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from vfm_core.errors import UserError
from vfm_core.files import atomic_write

__all__ = ["KEY", "PAGE", "QuizItem", "cells_of", "export_quiz", "score_quiz", "trait_hits"]

PAGE, KEY = "quiz.html", "key.csv"
_ANSWERS = {"yes": 1, "no": 0}


@dataclass(frozen=True)
class QuizItem:
    """One question.

    Parameters
    ----------
    image : PIL.Image.Image
        The photograph.
    map : ndarray
        (h, w) heat map over the whole photograph, any range; shown min-max scaled.
    trait : str
        The trait in words, such as "red wing patch".
    method : str
        Who made the map. Stays in the key.
    id : str
        What the image is; stays in the key as well.
    """

    image: Image.Image
    map: NDArray[np.floating]
    trait: str
    method: str
    id: str = ""


def export_quiz(items: Sequence[QuizItem], out: str | Path, *, seed: int = 0, title: str = "Trait quiz") -> Path:
    """Write the quiz page and its key.

    Parameters
    ----------
    items : sequence of QuizItem
        All questions of all methods.
    out : str or Path
        Folder; ``quiz.html`` goes to the participants, ``key.csv`` stays with you.
    seed : int
        Of the order and of the question codes.
    title : str
        Heading of the page.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    UserError
        Without items, or for a map that is not 2-D and finite.
    """
    from finecam.render import data_uri, minmax, overlay

    if not items:
        raise UserError("a quiz needs at least one question", where="items", given="none")
    order = np.random.default_rng(seed).permutation(len(items))
    questions, key = [], []
    for place, index in enumerate(order.tolist()):
        item = items[index]
        values = np.asarray(item.map, np.float32)
        if values.ndim != 2 or not np.isfinite(values).all():
            raise UserError("map must be 2-D and finite", where=f"item {index} ({item.method})", given=values.shape)
        code = hashlib.sha256(f"{seed}:{place}".encode()).hexdigest()[:8]
        picture = item.image.convert("RGB")
        shown = overlay(picture, minmax(values))
        questions.append({"code": code, "trait": item.trait, "image": data_uri(picture), "map": data_uri(shown)})
        key.append({"question": code, "method": item.method, "image": item.id, "trait": item.trait})
    out = Path(out)
    with atomic_write(out / PAGE) as temporary:
        temporary.write_text(_page(questions, title), encoding="utf-8")
    with atomic_write(out / KEY) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "method", "image", "trait"])
        writer.writeheader()
        writer.writerows(key)
    return out / PAGE


def score_quiz(answers: str | Path | Iterable[str | Path], key: str | Path) -> list[dict[str, Any]]:
    """Rate of "yes" per method.

    Parameters
    ----------
    answers : path or paths
        CSV files as the page saves them: ``participant,question,answer`` with answers yes, no or empty (skipped).
    key : path
        ``key.csv`` of the same quiz.

    Returns
    -------
    list of dict
        Per method, best first: ``method``, ``n`` answers, ``recognised``, ``rate`` in [0, 1], and the 95% Wilson
        interval ``low``, ``high``. Answers of one participant are not independent, so that the interval is a lower
        bound on the uncertainty.

    Raises
    ------
    UserError
        For questions that are not in the key, other answers than yes or no, or a question answered twice by the same
        participant.
    """
    from vfm_core.metrics import wilson_interval

    methods = {row["question"]: row["method"] for row in _rows(Path(key), ("question", "method"))}
    given: dict[tuple[str, str], int] = {}
    for path in [answers] if isinstance(answers, str | Path) else answers:
        for line, row in enumerate(_rows(Path(path), ("participant", "question", "answer")), start=2):
            answer, who = row["answer"].strip().lower(), (row["participant"], row["question"])
            if not answer:
                continue
            where = f"{path}, line {line}"
            if row["question"] not in methods:
                raise UserError(
                    "question is not in the key", where=where, given=row["question"], remedy="give this quiz's key.csv"
                )
            if answer not in _ANSWERS:
                raise UserError("answer must be yes or no", where=where, given=row["answer"])
            if who in given:
                raise UserError("question answered twice by one participant", where=where, given=" ".join(who))
            given[who] = _ANSWERS[answer]
    table = []
    for method in sorted(set(methods.values())):
        votes = [vote for (_, question), vote in given.items() if methods[question] == method]
        if votes:
            rate, low, high = wilson_interval(sum(votes), len(votes))
            table.append(
                {"method": method, "n": len(votes), "recognised": sum(votes), "rate": rate, "low": low, "high": high}
            )
    return sorted(table, key=lambda row: -row["rate"])


def trait_hits(
    maps: NDArray[np.floating], parts: Mapping[str, NDArray[np.bool_]], box: Sequence[float] | None = None
) -> dict[str, bool]:
    """Whether some head's strongest cell touches each annotated trait or part.

    Parameters
    ----------
    maps : ndarray
        (k, h, w) raw attention of the k heads shown.
    parts : mapping of str to ndarray
        Masks (H, W) on the original image; empty masks (part not visible) are left out of the result.
    box : sequence of float, optional
        x0, y0, x1, y1 that the maps cover, in pixels of the masks; the whole mask by default.

    Returns
    -------
    dict of str to bool
        The mean of the values is the fraction of visible traits hit by some of the heads.

    Examples
    --------
    >>> maps = np.zeros((1, 2, 2)); maps[0, 0, 1] = 1
    >>> wing = np.zeros((4, 4), bool); wing[1, 2] = True
    >>> trait_hits(maps, {"wing": wing, "tail": ~wing[::-1, ::-1] & False, "beak": np.eye(4, dtype=bool)})
    {'wing': True, 'beak': False}
    """
    maps = np.asarray(maps)
    if maps.ndim != 3:
        raise UserError("maps must be (heads, h, w)", where="maps", given=maps.shape)
    hits = {}
    for name, mask in parts.items():
        if np.asarray(mask).any():
            cells = cells_of(mask, (maps.shape[1], maps.shape[2]), box)
            hits[name] = any(int(one.argmax()) in cells for one in maps)
    return hits


def cells_of(mask: NDArray[np.bool_], grid: tuple[int, int], box: Sequence[float] | None = None) -> set[int]:
    """Cells of a map, counted row by row, that a mask (H, W) touches; `grid` is (h, w), `box` as in `trait_hits`."""
    x0, y0, x1, y1 = (0.0, 0.0, mask.shape[1], mask.shape[0]) if box is None else box
    ys, xs = np.nonzero(mask)
    rows = np.floor((ys + 0.5 - y0) / (y1 - y0) * grid[0]).astype(int)
    columns = np.floor((xs + 0.5 - x0) / (x1 - x0) * grid[1]).astype(int)
    inside = (rows >= 0) & (rows < grid[0]) & (columns >= 0) & (columns < grid[1])
    return set((rows[inside] * grid[1] + columns[inside]).tolist())


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError("file not found", given=path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in columns if name not in (reader.fieldnames or [])]:
            raise UserError("columns are missing", where=path, given=", ".join(missing))
        return [{name: row[name] or "" for name in columns} for row in reader]


_STYLE = """
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}
body{max-width:46rem;margin:2rem auto;padding:0 1rem}
fieldset{border:1px solid #8886;border-radius:.5rem;margin:1rem 0;padding:1rem}
legend{font-weight:600}
.pair{display:flex;gap:.5rem;flex-wrap:wrap}
.pair img{width:calc(50% - .25rem);min-width:9rem;image-rendering:auto;border-radius:.25rem}
label{display:inline-block;padding:.6rem 1rem .6rem 0}
button{font:inherit;padding:.6rem 1.2rem}
"""

_SCRIPT = """
const form = document.getElementById("quiz"), count = document.getElementById("count");
const quote = (text) => '"' + String(text).replaceAll('"', '""') + '"';
function update() {
  count.textContent = form.querySelectorAll("fieldset input:checked").length;
}
form.addEventListener("change", update);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const who = form.elements.participant.value;
  const lines = [["participant", "question", "answer"]];
  for (const set of form.querySelectorAll("fieldset")) {
    const chosen = set.querySelector("input:checked");
    lines.push([who, set.dataset.question, chosen ? chosen.value : ""]);
  }
  const text = lines.map((line) => line.map(quote).join(",")).join("\\n") + "\\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = "answers-" + who.replace(/[^\\w-]+/g, "_") + ".csv";
  link.click();
});
update();
"""


def _page(questions: Sequence[Mapping[str, str]], title: str) -> str:
    sets = []
    for number, question in enumerate(questions, start=1):
        trait, code = html.escape(question["trait"]), question["code"]
        sets.append(
            f'<fieldset data-question="{code}"><legend>{number}. {trait}</legend><div class="pair">'
            f'<img src="{question["image"]}" alt="photograph"><img src="{question["map"]}" alt="heat map"></div>'
            f"<p>Does the bright area of the heat map show this trait?</p>"
            f'<label><input type="radio" name="{code}" value="yes"> yes</label>'
            f'<label><input type="radio" name="{code}" value="no"> no</label></fieldset>'
        )
    heading = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{heading}</title><style>{_STYLE}</style></head><body><h1>{heading}</h1>"
        "<p>Each question shows a photograph, the same photograph with a heat map, and a trait in words.</p>"
        '<form id="quiz"><label>Your name or code <input name="participant" required></label>'
        f'{"".join(sets)}<p><span id="count"></span> of {len(questions)} answered</p>'
        f"<button>Save answers</button></form><script>{_SCRIPT}</script></body></html>\n"
    )
