"""Which birds exist: genera, species, marks and the two layouts (the taxonomy of the bird world).

- ``nested``: every genus has its own four marks, so that the most similar classes are the siblings by any rule.
- ``factorial``: the same four marks in every genus, so that similar may also mean "same mark, other body".
"""

from __future__ import annotations

from dataclasses import dataclass

from vfm_core.errors import UserError, unknown_name

from tinyworld.bird_body import COLOURS, GENERA, SLOTS, Mark


def _marks(*names: str) -> tuple[Mark, ...]:
    return tuple(Mark(*name.split(" ", 1)) for name in names)


_FACTORIAL = _marks("red wing patch", "yellow crown", "white tail tip", "black breast spot")

LAYOUTS: dict[str, dict[str, tuple[Mark, ...]]] = {
    "nested": {
        "blue": _FACTORIAL,
        "orange": _marks("white wing bar", "black crown", "green tail tip", "blue collar"),
        "green": _marks("red cheek spot", "white crown", "yellow rump", "black collar"),
        "purple": _marks("yellow breast spot", "green wing bar", "red tail tip", "white cheek spot"),
    },
    "factorial": dict.fromkeys(GENERA, _FACTORIAL),
}
"""Layout -> genus -> its species' marks."""

SHARED: dict[str, dict[str, tuple[Mark, ...]]] = {
    "nested": {
        "blue": _marks("white cheek spot", "yellow flank stripe", "black rump"),
        "orange": _marks("yellow cheek spot", "blue rump", "black breast spot"),
        "green": _marks("blue wing bar", "white breast spot", "red tail tip"),
        "purple": _marks("yellow crown", "white flank stripe", "black rump"),
    },
    "factorial": {
        "blue": _marks("white cheek spot", "yellow flank stripe", "black rump"),
        "orange": _marks("green cheek spot", "white rump", "black flank stripe"),
        "green": _marks("red collar", "white flank stripe", "blue rump"),
        "purple": _marks("green cheek spot", "yellow rump", "white flank stripe"),
    },
}
"""Layout -> genus -> marks that all its species wear when ``shared_marks`` asks for them: traits that tell nothing."""


@dataclass(frozen=True)
class Species:
    """One class: its genus, the mark that tells it from its siblings (None = plain), and the genus's shared marks."""

    genus: str
    mark: Mark | None
    shared: tuple[Mark, ...] = ()

    def __str__(self) -> str:
        return f"{self.genus} bird with {self.mark}" if self.mark else f"plain {self.genus} bird"

    @property
    def marks(self) -> tuple[Mark, ...]:
        """All marks, the species' own first."""
        return (self.mark, *self.shared) if self.mark else self.shared

    @property
    def caption(self) -> str:
        """A sentence, e.g. "a blue bird with a red wing patch"."""
        article = "an" if self.genus[0] in "aeiou" else "a"
        return f"{article} {self.genus} bird with {self.mark.phrase}" if self.mark else f"a plain {self.genus} bird"


def species_of(layout: str = "nested", shared_marks: int = 0, plain: bool = False) -> list[Species]:
    """All species of a layout, genus by genus.

    Parameters
    ----------
    layout : {"nested", "factorial"}
        See the module docstring.
    shared_marks : int
        Number of distractor marks that all species of a genus share, 0 to 3.
    plain : bool
        Add one species without a mark to every genus.

    Raises
    ------
    UserError
        Unknown layout, or a number of shared marks outside 0..3.
    """
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    if not 0 <= shared_marks <= 3:
        raise UserError("shared_marks out of range", given=shared_marks, remedy="give a number from 0 to 3")
    found = []
    for genus, marks in LAYOUTS[layout].items():
        shared = SHARED[layout][genus][:shared_marks]
        found += [Species(genus, mark, shared) for mark in ((*marks, None) if plain else marks)]
    return found


def parse_mark(text: str) -> Mark:
    """The mark with a name such as "red wing patch": any colour of `COLOURS` on any slot of `SLOTS`.

    Raises
    ------
    UserError
        Not a colour followed by a slot.
    """
    colour, _, slot = text.strip().partition(" ")
    if colour not in COLOURS:
        raise unknown_name("mark colour", colour, COLOURS)
    if slot not in SLOTS:
        raise unknown_name("mark position", slot, SLOTS)
    return Mark(colour, slot)


def all_marks() -> list[Mark]:
    """The sixteen marks of the nested layout, which include the four of the factorial one."""
    return [mark for marks in LAYOUTS["nested"].values() for mark in marks]
