"""The birds: what siblings share, what masks mean, what splits and options do."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinyworld.bird_body import GENERA, PARTS, Mark
from tinyworld.birds import Birds, portray
from tinyworld.draws import key_of
from tinyworld.species import LAYOUTS, SHARED, Species, all_marks, parse_mark, species_of
from vfm_core.data import ImageDataset, open_dataset
from vfm_core.errors import UserError


@pytest.fixture(scope="module")
def birds() -> Birds:
    return Birds(n=48, split="val")


def test_pixels_are_the_same_everywhere() -> None:
    """If this changes, raise `birds.RENDERER` and re-make the models."""
    pixels = np.concatenate([Birds(n=8, layout=name, split="test", seed=3).images(range(8)) for name in LAYOUTS])
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "ade5710e8688e939"


def test_is_an_image_dataset(birds: Birds) -> None:
    assert isinstance(birds, ImageDataset)
    sample = birds[17]
    assert sample.image.size == (64, 64) and sample.image.mode == "RGB"
    assert sample.label == 1 and birds.classes[1] == "blue bird with yellow crown"
    np.testing.assert_array_equal(np.asarray(sample.image), birds.images([17])[0])
    assert sample.meta["caption"] == "a blue bird with a yellow crown"
    x0, y0, x1, y1 = sample.meta["box"]
    assert sample.meta["mask"][int(y0) : int(y1), int(x0) : int(x1)].sum() == sample.meta["mask"].sum()
    assert set(sample.meta["parts"]) <= set(PARTS)
    assert birds[-1].id == birds.ids[-1]
    with pytest.raises(IndexError):
        birds[48]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 199), min_size=1, max_size=20))
def test_an_image_does_not_depend_on_its_batch(indices: list[int]) -> None:
    birds = Birds(n=200)
    together = birds.images(indices)
    for row, i in enumerate(indices):
        np.testing.assert_array_equal(together[row], birds.images([i])[0])


def test_images_do_not_depend_on_n() -> None:
    np.testing.assert_array_equal(Birds(n=5).images(range(5)), Birds(n=500).images(range(5)))


def test_splits_and_seeds_are_disjoint() -> None:
    worlds = [Birds(n=32, split=split, seed=seed) for split in ("train", "val", "test") for seed in (0, 1)]
    seen = {picture.tobytes() for world in worlds for picture in world.images(range(32))}
    assert len(seen) == 6 * 32


@pytest.mark.parametrize("layout", ["nested", "factorial"])
def test_siblings_differ_only_in_the_mark(layout: str) -> None:
    birds = Birds(n=16, layout=layout, split="val")
    for i in range(16):
        c = int(birds.labels[i])
        own = birds.presence_mask(i, birds.siblings(c)[0])
        for d in birds.siblings(c):
            changed = birds.difference_mask(i, d)
            absent = birds.absence_mask(i, d)
            assert not (changed & ~(own | absent)).any()
            assert (changed & own).any() and (changed & absent).any()
            assert changed.mean() < 0.05
            assert (birds.trait_mask(i) & ~changed).sum() == 0


def test_difference_to_other_genera_is_the_whole_bird(birds: Birds) -> None:
    other = next(d for d in range(16) if birds.relation(0, d) == "other")
    changed, bird = birds.difference_mask(0, other), birds.object_mask(0)
    assert (changed & bird).sum() > 0.7 * bird.sum()
    assert (changed & ~bird).sum() < 0.3 * bird.sum()  # half-covered rims only
    assert not birds.difference_mask(0, 0).any()


def test_difference_masks_match_single_ones(birds: Birds) -> None:
    wanted = [1, 5, 3]
    together = birds.difference_masks([0, 1, 2], wanted)
    for row, (i, d) in enumerate(zip([0, 1, 2], wanted)):
        np.testing.assert_array_equal(together[row], birds.difference_mask(i, d))
        np.testing.assert_array_equal(together[row], (birds.images([i]) != birds.images([i], d)).any(-1)[0])


def test_presence_and_absence_compare_marks_by_name() -> None:
    birds = Birds(n=16, layout="factorial", split="val")
    same = next(d for d in range(16) if birds.relation(0, d) == "same mark")
    assert not birds.presence_mask(0, same).any() and not birds.absence_mask(0, same).any()
    other = next(d for d in range(16) if birds.relation(0, d) == "other")
    presence = birds.presence_mask(0, other)
    assert (birds.trait_mask(0) & ~presence).sum() == 0 and presence.sum() < 3 * birds.trait_mask(0).sum()
    assert birds.absence_mask(0, other).any()


def test_sizes_of_bird_and_mark(birds: Birds) -> None:
    bird, marks = np.array([(birds.object_mask(i).mean(), birds.trait_mask(i).mean()) for i in range(48)]).T
    assert 0.15 < bird.mean() < 0.22
    assert 0.007 < marks.mean() < 0.012
    assert marks.min() > 0.004  # every mark is in the picture


def test_part_masks_make_up_the_bird(birds: Birds) -> None:
    for i in range(8):
        parts = birds.part_masks(i)
        assert tuple(parts) == PARTS
        assert np.sum(list(parts.values()), axis=0).max() == 1
        np.testing.assert_array_equal(np.any(list(parts.values()), axis=0), birds.object_mask(i))
        mark = birds.species[birds.labels[i]].mark
        assert mark is not None
        assert (birds.trait_mask(i) & ~birds.object_mask(i)).sum() == 0


def test_masks_are_those_of_the_asked_image(birds: Birds) -> None:
    """The last image's masks are kept; asking to and fro must not mix them up."""
    first = birds.trait_mask(0)
    birds.object_mask(5)
    np.testing.assert_array_equal(birds.trait_mask(0), first)
    assert not np.array_equal(birds.trait_mask(5), first)


@pytest.mark.parametrize("size", [48, 64, 96])
def test_sizes(size: int) -> None:
    birds = Birds(n=4, size=size)
    assert birds.images([0, 1]).shape == (2, size, size, 3)
    assert birds.trait_mask(0).shape == (size, size)
    assert birds.trait_mask(0).mean() == pytest.approx(Birds(n=4).trait_mask(0).mean(), rel=0.25)


def test_layouts() -> None:
    nested, factorial = Birds(n=1), Birds(n=1, layout="factorial")
    assert len(set(nested.classes)) == len(set(factorial.classes)) == 16
    assert nested.classes[:4] == factorial.classes[:4]
    marks = [row["mark"] for row in nested.taxonomy]
    assert len(set(marks)) == 16
    assert len({row["mark"] for row in factorial.taxonomy}) == 4
    assert {row["genus"] for row in nested.taxonomy} == {f"{name} bird" for name in GENERA}
    relations = {nested.relation(0, d) for d in range(16)}
    assert relations == {"same", "sibling", "other"}
    assert [factorial.relation(0, d) for d in (0, 1, 4, 5)] == ["same", "sibling", "same mark", "other"]
    assert nested.siblings(5) == [4, 6, 7]
    assert nested.captions[4] == "an orange bird with a white wing bar"


def test_marks_stand_out_from_their_bird(birds: Birds) -> None:
    """A mark that melts into the plumage would make its class unlearnable."""
    for i in range(16):
        plain = birds.edit(i, None).astype(float)
        inside = birds.trait_mask(i)
        contrast = np.abs(birds.images([i])[0].astype(float) - plain)[inside].max(axis=-1).mean()
        assert contrast > 70, birds.classes[birds.labels[i]]


def test_edit(birds: Birds) -> None:
    sibling = birds.siblings(0)[0]
    np.testing.assert_array_equal(birds.edit(0, sibling), birds.images([0], sibling)[0])
    np.testing.assert_array_equal(birds.edit(0, "yellow crown"), birds.images([0], 1)[0])
    np.testing.assert_array_equal(birds.edit(0, Mark("red", "wing patch")), birds.images([0])[0])
    bare = birds.edit(0, None)
    assert ((bare != birds.images([0])[0]).any(-1) & ~birds.presence_mask(0, sibling)).sum() == 0
    for bad in ("pink crown", "red elbow", "crown"):
        with pytest.raises(UserError):
            birds.edit(0, bad)


def test_plain_class() -> None:
    birds = Birds(n=20, plain=True)
    assert len(birds.classes) == 20 and birds.classes[4] == "plain blue bird"
    assert not birds.trait_mask(4).any()
    assert not birds.presence_mask(4, 0).any() and birds.absence_mask(4, 0).any()
    assert birds.meta_of(4)["mark"] is None


def test_shared_marks() -> None:
    plain, busy = Birds(n=16), Birds(n=16, shared_marks=3)
    for i in range(16):
        extra = busy.shared_mask(i)
        assert extra.sum() > 30 and not (extra & busy.trait_mask(i)).any()
        assert not (busy.difference_mask(i, busy.siblings(int(busy.labels[i]))[0]) & extra).sum() > 10
        assert not plain.shared_mask(i).any()
    # Shared marks count as marks that another genus lacks.
    assert busy.presence_mask(0, 5).sum() > busy.trait_mask(0).sum() + 30
    everything = Birds(n=20, shared_marks=2, plain=True)
    assert not everything.trait_mask(4).any() and everything.shared_mask(4).any()


def test_shared_marks_use_free_slots() -> None:
    for layout, genera in LAYOUTS.items():
        for genus, own in genera.items():
            slots = [mark.slot for mark in (*own, *SHARED[layout][genus])]
            assert len({slot.split()[0] if "wing" in slot else slot for slot in slots[4:]}) == 3
            assert not {mark.slot for mark in own} & {mark.slot for mark in SHARED[layout][genus]}


def _cue_of(birds: Birds, i: int) -> tuple[int, ...]:
    cue = birds.cue_mask(i)
    pixels = birds.images([i])[0][cue].astype(int)
    return tuple(np.round(np.median(pixels, axis=0) / 40).astype(int))


def test_spurious_cue_tells_in_training_only() -> None:
    def agreement(split: str, p: float) -> float:
        birds = Birds(n=64, split=split, spurious=p)
        rank = birds.labels % 4
        by_rank = [[_cue_of(birds, int(i)) for i in np.flatnonzero(rank == k)] for k in range(4)]
        return float(np.mean([max(map(values.count, values)) / len(values) for values in by_rank]))

    assert agreement("train", 1.0) > 0.7
    assert agreement("val", 1.0) < 0.6 and agreement("train", 0.01) < 0.6
    without, with_cue = Birds(n=4), Birds(n=4, spurious=1.0)
    assert not without.cue_mask(0).any() and with_cue.cue_mask(0).sum() > 20
    changed = (without.images([0]) != with_cue.images([0])).any(-1)[0]
    assert (changed & with_cue.object_mask(0)).sum() < 10
    # The disc belongs to the picture, not to the species: another species in the same picture has the same disc.
    assert not (with_cue.difference_mask(0, 1) & with_cue.cue_mask(0)).any()


def test_empty_branch_and_free_species() -> None:
    index = np.arange(3)
    scenes = [None, Species("blue", None), Species("green", Mark("red", "collar"), (Mark("white", "crown"),))]
    images, ids = portray(key_of("x"), index, scenes, 64, ("object", "mark"))
    assert images.shape == (3, 64, 64, 3)
    assert (ids["object"] > 0).any(axis=(1, 2)).tolist() == [False, True, True]
    assert [sorted(set(ids["mark"][k].ravel())) for k in range(3)] == [[0], [0], [0, 1, 2]]


def test_fingerprint_follows_the_options() -> None:
    base = Birds(n=32).fingerprint()
    assert Birds(n=32).fingerprint() == base
    others = [
        Birds(n=33),
        Birds(n=32, seed=1),
        Birds(n=32, split="val"),
        Birds(n=32, size=48),
        Birds(n=32, layout="factorial"),
        Birds(n=32, shared_marks=1),
        Birds(n=32, spurious=0.5),
        Birds(n=32, plain=True),
    ]
    assert len({base, *(one.fingerprint() for one in others)}) == len(others) + 1


def test_pickles_for_worker_processes(birds: Birds) -> None:
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(birds)).images([3]), birds.images([3]))


def test_bad_options() -> None:
    for options in (
        {"n": 0},
        {"layout": "nestd"},
        {"split": "trian"},
        {"size": 8},
        {"shared_marks": 4},
        {"spurious": 1.5},
    ):
        with pytest.raises(UserError):
            Birds(**options)
    with pytest.raises(UserError, match="no such class"):
        Birds(n=2).images([0], 16)
    with pytest.raises(UserError, match="one class per image"):
        Birds(n=2).images([0, 1], [3])


def test_marks_have_names() -> None:
    assert len(set(all_marks())) == 16
    assert all(parse_mark(str(mark)) == mark for mark in all_marks())
    assert [str(mark) for mark in species_of("nested", 2)[0].marks] == [
        "red wing patch",
        "white cheek spot",
        "yellow flank stripe",
    ]


def test_data_specs() -> None:
    birds = open_dataset("tinyworld:birds?layout=factorial&n=32&split=val&seed=2&size=48&plain=1&shared_marks=1")
    assert isinstance(birds, Birds)
    assert (len(birds), birds.split, birds.seed, birds.size, len(birds.classes)) == (32, "val", 2, 48, 20)
    assert open_dataset("tinyworld:birds@validation").name == "birds-nested-val"
    assert open_dataset("tinyworld:birds?n=4", split="test").name == "birds-nested-test"
    cases = {
        "tinyworld:brids": "birds",
        "tinyworld:birds?layot=nested": "layout",
        "tinyworld:birds?layout=nestd": "nested",
        "tinyworld:birds@vall": "val",
        "tinyworld:birds?n=many": "n",
        "tinyworld:birds@val?split=test": "two splits",
    }
    for spec, hint in cases.items():
        with pytest.raises(UserError, match=hint):
            open_dataset(spec)
