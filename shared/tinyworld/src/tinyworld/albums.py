"""Albums: several small pictures in one prompt, with questions whose answers are known.

Every picture is one colour and carries one digit on one of its 16 patches. Three tasks ask for different things of the
same pictures: ``needle`` for one digit (one token of one picture matters), ``gist`` for the commonest colour (many
tokens say the same), ``list`` for all digits in order (an answer of many tokens). The prompt texts use the words of
`VOCABULARY` only, one token each; ``<image>`` stands for a picture and becomes 16 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from vfm_core.errors import UserError, unknown_name

from tinyworld.draws import Draws, key_of

TASKS = ("needle", "gist", "list")
SPLITS = ("train", "val", "test")
SIDE, PATCH = 32, 8
PATCHES = (SIDE // PATCH) ** 2
MOST_IMAGES = 64

PALETTE = {
    "black": (28, 28, 34),
    "red": (214, 45, 48),
    "green": (40, 168, 72),
    "blue": (38, 78, 208),
    "yellow": (240, 208, 40),
    "magenta": (206, 58, 188),
    "cyan": (44, 196, 212),
    "white": (234, 234, 228),
    "grey": (130, 130, 130),
}
"""Background colours; "grey" is kept for pictures without a digit."""

COLOURS = tuple(PALETTE)[:8]
DIGITS = tuple("0123456789")
WORDS = ("the", "and", "then", "here", "now", "see", "next", "more")
"""Text that means nothing, for distraction."""

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<sep>")
VOCABULARY = (*SPECIAL, "Q", "G", "L", *PALETTE, *DIGITS, *WORDS)

_LIGHT_INK = ("black", "red", "green", "blue", "magenta")
_FONT = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


def _glyphs() -> np.ndarray:
    """Digits in the middle of a patch, float32 (11, 8, 8); the last is empty."""
    glyphs = np.zeros((11, PATCH, PATCH), np.float32)
    for digit, rows in enumerate(_FONT):
        glyphs[digit, :7, 1:6] = [[int(bit) for bit in row] for row in rows.split()]
    return glyphs


@dataclass(frozen=True, eq=False)
class Album:
    """Pictures, the text around them, and questions with their answers.

    Attributes
    ----------
    id : str
        Unique over tasks, splits, seeds and settings.
    images : ndarray of uint8, shape (N, 32, 32, 3)
    context : str
        Text with one ``<image>`` per picture: ``"<bos> <sep> <image> <sep> <image> ..."``.
    questions : tuple of (str, str)
        What follows the context, and the answer to it, without the end token.
    colours : tuple of str
        Background of every picture; "grey" for one without a digit.
    digits : ndarray of int64, shape (N,)
        -1 where there is none.
    patches : ndarray of int64, shape (N,)
        Which of the 4x4 patches carries the digit, row by row; -1 where there is none.
    """

    id: str
    images: np.ndarray
    context: str
    questions: tuple[tuple[str, str], ...]
    colours: tuple[str, ...]
    digits: np.ndarray
    patches: np.ndarray

    def prompt(self, question: int = 0) -> str:
        """Context and one question, as a processor takes it."""
        return f"{self.context} {self.questions[question][0]}"


def make_albums(
    task: str,
    n: int,
    images: int = 8,
    split: str = "test",
    seed: int = 0,
    *,
    depth: int | None = None,
    needles: int | None = None,
    words: int = 0,
    start: int = 0,
) -> list[Album]:
    """Albums of one task; album i depends on the task, the settings, the split, the seed and i alone.

    Parameters
    ----------
    task : {"needle", "gist", "list"}
        needle: colours are unique; ``("Q red", "7")`` for every picture with a digit, in random order.
        gist: colours repeat; ``("G", "blue")``, the colour of more than half of the pictures.
        list: colours and digits are unique; ``("L", "7 3 0 ...")``, all digits in the order of the pictures.
    n : int
        How many.
    images : int
        Pictures per album, 1 to 64.
    split : {"train", "val", "test"}
        Splits are unrelated streams.
    seed : int
        Of the stream.
    depth : int, optional
        For needle: which picture (from 0) the first question is about.
    needles : int, optional
        For needle and list: how many pictures carry a digit, at most 8; the others are grey. By default as many as
        possible.
    words : int
        Words without meaning before every picture.
    start : int
        Index of the first album.

    Returns
    -------
    list of Album

    Raises
    ------
    UserError
        An unknown task or split, a setting out of range or without meaning for the task.
    """
    for kind, name, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if name not in known:
            raise unknown_name(kind, name, known, where="make_albums")
    most = min(images, len(COLOURS))
    count = most if needles is None else needles
    ranges = {"n": (n, 1, 10**6), "images": (images, 1, MOST_IMAGES), "words": (words, 0, 1000)}
    ranges |= {"start": (start, 0, 2**40), "needles": (count, 1, most), "depth": (depth or 0, 0, images - 1)}
    for what, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise UserError(f"{what} out of range", where="make_albums", given=value, remedy=f"give {low} to {high}")
    if (depth is not None and task != "needle") or (needles is not None and task == "gist"):
        knob = "depth" if depth is not None and task != "needle" else "needles"
        raise UserError(f"{knob} has no meaning for this task", where="make_albums", given=task, remedy="drop it")
    draws = Draws(key_of("albums", task, split, seed), np.arange(start, start + n))
    colours, digits = _gist(draws, images) if task == "gist" else _needles(draws, images, count, depth, task == "list")
    bare = digits < 0
    patches = np.where(bare, -1, draws.integers("patch", PATCHES, images))
    pixels = _pictures(key_of("album pictures", task, split, seed), start, colours, digits, patches)
    said = draws.integers("words", len(WORDS), images * words).reshape(n, images, words)
    order = np.argsort(draws.uniforms("question order", images), axis=1, kind="stable")
    names = np.array(tuple(PALETTE))
    settings = f"{images}-{count if task != 'gist' else images}-{words}" + ("" if depth is None else f"-{depth}")
    return [
        Album(
            f"{task}-{split}-{seed}-{settings}-{start + i:06d}",
            pixels[i],
            _context(said[i]),
            _questions(task, names[colours[i]], digits[i], order[i], depth),
            tuple(names[colours[i]].tolist()),
            digits[i],
            patches[i],
        )
        for i in range(n)
    ]


def _pictures(key: int, start: int, colours: np.ndarray, digits: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """All pictures (n, images, 32, 32, 3), painted a few thousand at a time to bound the memory."""
    n, images = colours.shape
    numbers = (np.arange(start, start + n)[:, None] * MOST_IMAGES + np.arange(images)).ravel()
    what = (colours.ravel(), digits.ravel(), patches.ravel())
    pixels = np.empty((n * images, SIDE, SIDE, 3), np.uint8)
    for first in range(0, len(pixels), 2048):
        part = slice(first, first + 2048)
        pixels[part] = paint(Draws(key, numbers[part]), *(one[part] for one in what))
    return pixels.reshape(n, images, SIDE, SIDE, 3)


def _needles(draws: Draws, images: int, count: int, depth: int | None, distinct: bool) -> tuple[np.ndarray, np.ndarray]:
    """Colours and digits (n, images): `count` pictures of unique colours with a digit, the others grey without."""
    rows = np.arange(draws.n)[:, None]
    rank = draws.uniforms("which pictures", images)
    if depth is not None:
        rank[:, depth] = -1
    chosen = np.sort(np.argsort(rank, axis=1, kind="stable")[:, :count], axis=1)
    colours = np.full((draws.n, images), len(COLOURS))
    digits = np.full((draws.n, images), -1)
    colours[rows, chosen] = np.argsort(draws.uniforms("colours", len(COLOURS)), axis=1, kind="stable")[:, :count]
    if distinct:
        digits[rows, chosen] = np.argsort(draws.uniforms("digits", 10), axis=1, kind="stable")[:, :count]
    else:
        digits[rows, chosen] = draws.integers("digits", 10, count)
    return colours, digits


def _gist(draws: Draws, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Colours and digits (n, images): more than half of the pictures share a colour, the others are any other."""
    winner = draws.integers("winner", len(COLOURS))
    others = (winner + 1 + draws.integers("others", len(COLOURS) - 1, images)) % len(COLOURS)
    extra = (draws.uniform("extra") * (1 + images // 8)).astype(np.int64)
    times = np.minimum(images // 2 + 1 + extra, images)
    place = np.argsort(draws.uniforms("places", images), axis=1, kind="stable")
    return np.where(place < times[:, None], winner, others), draws.integers("digits", 10, images)


def _context(said: np.ndarray) -> str:
    return "<bos> " + " ".join(" ".join([*(WORDS[w] for w in words), "<sep> <image>"]) for words in said)


def _questions(
    task: str, colours: np.ndarray, digits: np.ndarray, order: np.ndarray, depth: int | None
) -> tuple[tuple[str, str], ...]:
    if task == "gist":
        names, counts = np.unique(colours, return_counts=True)
        return (("G", str(names[counts.argmax()])),)
    if task == "list":
        return (("L", " ".join(str(digit) for digit in digits if digit >= 0)),)
    asked = [int(i) for i in order if digits[i] >= 0]
    asked.sort(key=lambda i: i != depth)
    return tuple((f"Q {colours[i]}", str(digits[i])) for i in asked)


def paint(draws: Draws, colours: np.ndarray, digits: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """Pictures of one colour with one digit: a soft slant of light and grain on the paper, ink in a digit's shape.

    Parameters
    ----------
    draws : Draws
        One row per picture.
    colours : ndarray of int, shape (n,)
        Index into `PALETTE`.
    digits, patches : ndarray of int, shape (n,)
        -1 for a picture without a digit.

    Returns
    -------
    ndarray of uint8, shape (n, 32, 32, 3)
    """
    n = len(colours)
    palette = np.array(tuple(PALETTE.values()), np.float32)
    ink = np.array([244.0 if name in _LIGHT_INK else 20.0 for name in PALETTE], np.float32)
    stamps = np.zeros((n, PATCHES, PATCH, PATCH), np.float32)
    stamps[np.arange(n), patches] = _glyphs()[digits]  # index -1 is the empty glyph
    grid = SIDE // PATCH
    mask = stamps.reshape(n, grid, grid, PATCH, PATCH).swapaxes(2, 3).reshape(n, SIDE, SIDE)
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    slant = draws.uniforms("light", 2, -12, 12).astype(np.float32)
    shade = slant[:, :1, None] * ramp[None, :, None] + slant[:, 1:, None] * ramp[None, None, :]
    shade = shade + np.float32(24) * draws.grain("grain", (SIDE, SIDE))
    paper = palette[colours][:, None, None, :] * np.ones((1, SIDE, SIDE, 1), np.float32)
    pixels = paper + mask[..., None] * (ink[colours][:, None, None, None] - paper) + shade[..., None]
    painted: np.ndarray = np.clip(np.round(pixels), 0, 255).astype(np.uint8)
    return painted
