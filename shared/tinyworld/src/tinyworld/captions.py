"""Captions of birds with their truth: which sentences hold for which picture (training data of ``tiny:clip``).

A caption states a genus, a mark's colour, a mark's position, any combination of them, or that there is no bird. For
every pair of a picture and a caption the world knows whether it holds, so that "a bird" is a positive for all birds
instead of a false negative for all but one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyworld.bird_body import COLOURS, GENERA, SLOTS, Mark
from tinyworld.draws import Draws
from tinyworld.species import Species

_GENERA, _COLOURS, _SLOTS = list(GENERA), list(COLOURS), list(SLOTS)
_OPENINGS = ("", "", "", "a photo of ", "a picture of ", "this is ")


@dataclass(frozen=True)
class Caption:
    """A statement: absent parts are not said. `bird` False = "no bird here"; `plain` = "without marks"."""

    text: str
    genus: str | None = None
    colour: str | None = None
    slot: str | None = None
    bird: bool = True
    plain: bool = False


def holds(captions: Sequence[Caption], scenes: Sequence[Species | None]) -> np.ndarray:
    """Truth of every caption for every scene (None = no bird), float32 of shape (scenes, captions)."""
    worn = np.zeros((len(scenes), len(_COLOURS), len(_SLOTS)), dtype=bool)
    genus = np.full(len(scenes), -1)
    for row, one in enumerate(scenes):
        if one is not None:
            genus[row] = _GENERA.index(one.genus)
            for mark in one.marks:
                worn[row, _COLOURS.index(mark.colour), _SLOTS.index(mark.slot)] = True
    truth = np.zeros((len(scenes), len(captions)), dtype=np.float32)
    for column, said in enumerate(captions):
        fits = (genus >= 0) == said.bird
        if said.genus:
            fits &= genus == _GENERA.index(said.genus)
        if said.colour or said.slot:
            colours = slice(None) if said.colour is None else [_COLOURS.index(said.colour)]
            slots = slice(None) if said.slot is None else [_SLOTS.index(said.slot)]
            fits &= worn[:, colours][:, :, slots].any(axis=(1, 2))
        if said.plain:
            fits &= ~worn.any(axis=(1, 2))
        truth[:, column] = fits
    return truth


def describe(draws: Draws, scenes: Sequence[Species | None]) -> list[Caption]:
    """One true caption per scene, of random detail and wording."""
    detail, opening = draws.uniform("detail"), draws.integers("opening", len(_OPENINGS))[:, 0]
    article = draws.coin("article", 0.7)
    found = []
    for row, one in enumerate(scenes):
        said = _say(one, detail[row], bool(article[row]) or opening[row] > 2)
        text = _OPENINGS[opening[row]] + said.text
        found.append(Caption(text, said.genus, said.colour, said.slot, said.bird, said.plain))
    return found


def _say(one: Species | None, detail: float, article: bool) -> Caption:
    """The wording for one scene; `detail` in [0, 1) chooses what is said."""
    a = (lambda words: f"{'an' if words[0] in 'aeiou' else 'a'} {words}") if article else (lambda words: words)
    if one is None:
        return Caption(a("empty branch") if detail < 0.7 else "no bird", bird=False)
    if detail < 0.12:
        return Caption(a("bird"))
    if detail < 0.27:
        return Caption(a(f"{one.genus} bird"), genus=one.genus)
    if one.mark is None:
        return Caption(a(f"plain {one.genus} bird"), genus=one.genus, plain=True)
    mark: Mark = one.marks[int(detail * 1e6) % len(one.marks)]
    if detail < 0.37:
        return Caption(a(mark.slot), slot=mark.slot)
    if detail < 0.57:
        return Caption(a(str(mark)), colour=mark.colour, slot=mark.slot)
    if detail < 0.72:
        return Caption(a(f"bird with {a(str(mark))}"), colour=mark.colour, slot=mark.slot)
    return Caption(a(f"{one.genus} bird with {a(str(mark))}"), one.genus, mark.colour, mark.slot)
