"""Albums: the answers are true of the pictures, and the streams are what they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinyworld import make_albums
from tinyworld.albums import COLOURS, PALETTE, PATCH, SIDE, TASKS, VOCABULARY, Album
from vfm_core.errors import UserError


def patch_of(album: Album, picture: int, patch: int) -> np.ndarray:
    row, column = divmod(patch, SIDE // PATCH)
    return album.images[picture][row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].astype(int)


@settings(max_examples=40, deadline=None)
@given(
    task=st.sampled_from(TASKS),
    images=st.integers(1, 64),
    needles=st.integers(1, 8),
    words=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_answers_follow_from_the_ground_truth(task: str, images: int, needles: int, words: int, seed: int) -> None:
    count = None if task == "gist" else min(needles, images)
    for album in make_albums(task, 3, images, seed=seed, needles=count, words=words):
        assert album.images.shape == (images, 32, 32, 3) and album.images.dtype == np.uint8
        assert len(album.colours) == len(album.digits) == len(album.patches) == images
        text = f"{album.prompt()} {album.questions[0][1]}".split()
        assert set(text) <= set(VOCABULARY) and text.count("<image>") == text.count("<sep>") == images
        assert len(album.context.split()) == 1 + images * (2 + words)
        shown = [i for i in range(images) if album.digits[i] >= 0]
        if task == "gist":
            (question, answer), *more = album.questions
            assert question == "G" and not more and 2 * album.colours.count(answer) > images
            continue
        assert len(shown) == count and len({album.colours[i] for i in shown}) == count
        for i in set(range(images)) - set(shown):
            assert album.colours[i] == "grey" and album.patches[i] == -1
        if task == "list":
            assert album.questions == (("L", " ".join(str(album.digits[i]) for i in shown)),)
            assert len(set(album.digits[shown])) == count
        else:
            wanted = {(f"Q {album.colours[i]}", str(album.digits[i])) for i in shown}
            assert set(album.questions) == wanted and len(album.questions) == count


def test_pictures_show_what_is_said() -> None:
    glyphs: dict[int, set[bytes]] = {digit: set() for digit in range(10)}
    for album in make_albums("needle", 60, 9):
        for i, colour in enumerate(album.colours):
            rest = np.delete(np.arange(16), album.patches[i]) if album.digits[i] >= 0 else np.arange(16)
            spread = [np.abs(patch_of(album, i, int(k)).mean((0, 1)) - PALETTE[colour]).max() for k in rest]
            assert max(spread) < 28, colour
            if album.digits[i] >= 0:
                ink = np.abs(patch_of(album, i, album.patches[i]) - PALETTE[colour]).max(-1) > 85
                glyphs[album.digits[i]].add(ink.tobytes())
    assert [len(found) for found in glyphs.values()] == [1] * 10  # a digit always looks the same, under any light
    assert len(set().union(*glyphs.values())) == 10


@pytest.mark.parametrize("task", TASKS)
def test_albums_depend_on_their_index_alone(task: str) -> None:
    many, few = make_albums(task, 6, 5, words=1), make_albums(task, 2, 5, words=1, start=3)
    for a, b in zip(many[3:5], few):
        assert (a.id, a.context, a.questions) == (b.id, b.context, b.questions)
        np.testing.assert_array_equal(a.images, b.images)
    streams = [make_albums(task, 6, 5, split, seed) for split in ("train", "val", "test") for seed in (0, 1)]
    albums = [album for stream in streams for album in stream]
    assert len({album.id for album in albums}) == len({album.images.tobytes() for album in albums}) == 36


def test_depth_says_which_picture_is_asked_first() -> None:
    for depth in (0, 20, 63):
        for album in make_albums("needle", 4, 64, depth=depth):
            assert album.questions[0] == (f"Q {album.colours[depth]}", str(album.digits[depth]))
            assert len(album.questions) == 8


def test_draws_are_balanced() -> None:
    albums = make_albums("needle", 400)
    digits, patches = np.stack([a.digits for a in albums]), np.stack([a.patches for a in albums])
    assert np.bincount(digits.ravel()).min() > 260 and np.bincount(patches.ravel()).min() > 150
    answers = [a.questions[0][1] for a in make_albums("gist", 400)]
    assert {answers.count(colour) > 30 for colour in COLOURS} == {True}


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"task": "needel"}, "did you mean needle"),
        ({"split": "tset"}, "did you mean test"),
        ({"images": 65}, "images out of range.*65; give 1 to 64"),
        ({"n": 0}, "n out of range.*0; give 1 to"),
        ({"needles": 9}, "give 1 to 8"),
        ({"images": 3, "needles": 4}, "give 1 to 3"),
        ({"depth": 8}, "give 0 to 7"),
        ({"words": -1}, "words out of range"),
        ({"task": "list", "depth": 1}, "depth has no meaning"),
        ({"task": "gist", "needles": 2}, "needles has no meaning"),
    ],
)
def test_bad_settings(change: dict[str, Any], hint: str) -> None:
    arguments: dict[str, Any] = {"task": "needle", "n": 2} | change
    with pytest.raises(UserError, match=hint):
        make_albums(**arguments)
