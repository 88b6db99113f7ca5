"""Ranking and localisation metrics: closed forms, properties, empty maps, parity with scikit-learn and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from finecam.metrics import (
    agreement,
    average_precision,
    box_mask,
    energy_in,
    half_cell,
    iou_at,
    is_empty,
    pearson,
    pointing,
    top_iou,
    top_mask,
)
from finecam.ranking import pixel_count, pixel_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

# Few distinct values make ties common.
shapes = st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(2, 6))
tied_maps = shapes.flatmap(lambda s: arrays(np.float32, s, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])))
masks = shapes.flatmap(lambda s: st.tuples(arrays(np.float32, s, elements=st.floats(0, 1, width=32)), arrays(bool, s)))


@settings(max_examples=80, deadline=None)
@given(tied_maps)
def test_ranks_are_by_value_then_by_pixel_index(values: np.ndarray) -> None:
    ranks = pixel_ranks(torch.from_numpy(values))
    for one, rank in zip(values, ranks):
        expected = sorted(range(one.size), key=lambda i: (-one.ravel()[i], i))
        assert rank.flatten().argsort().tolist() == expected


@settings(max_examples=50, deadline=None)
@given(tied_maps, st.floats(0, 1))
def test_top_mask_has_its_size_and_holds_the_largest(values: np.ndarray, q: float) -> None:
    maps = torch.from_numpy(values)
    top = top_mask(maps, q)
    assert (top.flatten(1).sum(1) == pixel_count(q, maps[0].numel())).all()
    for one, chosen in zip(maps, top):
        if chosen.any() and not chosen.all():
            assert one[chosen].min() >= one[~chosen].max()


def test_pixel_count() -> None:
    assert [pixel_count(q, 4096) for q in (0, 1e-9, 0.01, 0.05, 0.1, 1)] == [0, 1, 41, 205, 410, 4096]
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            pixel_count(q, 10)


def test_is_empty() -> None:
    maps = torch.stack([torch.zeros(2, 2), torch.ones(2, 2), torch.eye(2), torch.eye(2), torch.eye(2)])
    maps[3, 0, 1] = math.nan
    maps[4, 0, 1] = math.inf
    assert is_empty(maps).tolist() == [True, True, False, True, True]
    with pytest.raises(ValueError, match="maps must be"):
        is_empty(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="maps must be"):
        is_empty(torch.zeros(1, 2, 2, dtype=torch.long))


def test_energy_by_hand() -> None:
    maps = torch.tensor([[[1.0, 2.0], [3.0, -4.0]]])
    region = torch.tensor([[[True, False], [True, True]]])
    assert energy_in(maps, region).item() == pytest.approx(4 / 6)  # negative values count as zero


@settings(max_examples=60, deadline=None)
@given(masks)
def test_energy_inside_and_outside_sum_to_one(pair: tuple[np.ndarray, np.ndarray]) -> None:
    maps, region = torch.from_numpy(pair[0]), torch.from_numpy(pair[1])
    inside, outside = energy_in(maps, region), energy_in(maps, ~region)
    for i in range(len(maps)):
        if is_empty(maps)[i]:
            assert inside[i].isnan() and outside[i].isnan()
        elif not region[i].any():
            assert inside[i].isnan() and outside[i] == 1
        elif not region[i].all():
            assert inside[i] + outside[i] == pytest.approx(1, abs=1e-6)


def test_energy_and_pointing_are_nan_for_constant_maps() -> None:
    region = torch.zeros(3, 4, 4, dtype=torch.bool)
    region[:, 0, 0] = True  # where the argmax of a constant map would point
    maps = torch.stack([torch.zeros(4, 4), torch.full((4, 4), 0.3), torch.full((4, 4), math.nan)])
    for metric in (energy_in, pointing, iou_at, average_precision):
        assert metric(maps, region).isnan().all()
    grid = torch.full((3, 3, 3), 0.1)  # constant before it is resized, whatever rounding does after
    assert pointing(grid, torch.ones(3, 7, 7, dtype=torch.bool)).isnan().all()


def test_nothing_to_find_is_nan() -> None:
    maps = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    empty = torch.zeros(1, 4, 4, dtype=torch.bool)
    for metric in (energy_in, pointing, iou_at, average_precision):
        assert metric(maps, empty).isnan().all()


def test_box_mask_uses_pixel_centres() -> None:
    mask = box_mask(torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.6, 0.4, 1.6, 9.0], [-5.0, -5.0, 0.4, 9.0]]), (3, 4))
    assert mask[0].int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert mask[1].int().tolist() == [[0, 1, 0, 0]] * 3
    assert not mask[2].any()
    with pytest.raises(ValueError, match="boxes"):
        box_mask(torch.zeros(4), (3, 3))


def test_boxes_and_masks_give_the_same() -> None:
    maps = torch.rand(2, 8, 10, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[1.0, 2.0, 5.0, 6.0], [0.0, 0.0, 10.0, 8.0]])
    assert torch.equal(energy_in(maps, boxes), energy_in(maps, box_mask(boxes, (8, 10))))
    assert energy_in(maps, boxes)[1] == 1


def test_pointing_radius_is_euclidean() -> None:
    maps = torch.zeros(1, 9, 9)
    maps[0, 4, 4] = 1
    region = torch.zeros(1, 9, 9, dtype=torch.bool)
    region[0, 1, 0] = True  # three up, four left: distance 5
    assert [pointing(maps, region, r).item() for r in (0, 4.9, 5, 6)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="radius"):
        pointing(maps, region, -1)


def test_pointing_takes_the_first_of_equal_peaks() -> None:
    maps = torch.zeros(1, 3, 3)
    maps[0, 0, 2] = maps[0, 2, 0] = 1
    region = torch.zeros(1, 3, 3, dtype=torch.bool)
    region[0, 0, 2] = True
    assert pointing(maps, region).item() == 1
    assert pointing(maps, region.flip(1, 2)).item() == 0


def test_half_cell() -> None:
    assert half_cell((16, 16), (64, 64)) == 2
    assert half_cell((7, 14), (224, 224)) == 16


def test_maps_are_resized_to_the_region() -> None:
    maps = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    region = torch.zeros(1, 8, 8, dtype=torch.bool)
    region[0, :4, 4:] = True
    resized = torch.nn.functional.interpolate(maps[None], (8, 8), mode="bilinear", align_corners=False)[0]
    expected = (resized * region).sum() / resized.sum()
    assert energy_in(maps, region).item() == pytest.approx(expected.item(), rel=1e-5)
    assert pointing(maps, region).item() == 1


def test_iou_by_hand() -> None:
    maps = torch.arange(16.0).view(1, 4, 4)
    region = torch.zeros(1, 4, 4, dtype=torch.bool)
    region[0, 3, 2:] = True  # the two highest pixels
    assert iou_at(maps, region, q=2 / 16).item() == 1
    assert iou_at(maps, region, q=4 / 16).item() == pytest.approx(2 / 4)
    assert iou_at(-maps, region, q=2 / 16).item() == 0


@pytest.mark.parity
def test_average_precision_equals_scikit_learn_and_knows_chance() -> None:
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 40, 40, generator=generator)
    region = torch.rand(3, 40, 40, generator=generator) < 0.2
    expected = [average_precision_score(r.flatten(), m.flatten()) for m, r in zip(maps, region)]
    assert average_precision(maps, region).tolist() == pytest.approx(expected)
    assert average_precision(maps, region).mean().item() == pytest.approx(0.2, abs=0.03)
    assert average_precision(region.float() + 0.01 * maps, region).tolist() == [1, 1, 1]


@pytest.mark.parity
def test_pearson_equals_scipy() -> None:
    from scipy.stats import pearsonr

    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(4, 6, 7, generator=generator), torch.rand(4, 6, 7, generator=generator)
    expected = [pearsonr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b)]
    assert pearson(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert pearson(a, 3 - 2 * a).tolist() == pytest.approx([-1] * 4)


@settings(max_examples=40, deadline=None)
@given(tied_maps, st.sampled_from([0.1, 0.25, 0.5]), st.integers(0, 2**31))
def test_agreement_is_symmetric_and_one_with_itself(values: np.ndarray, q: float, seed: int) -> None:
    a = torch.from_numpy(values)
    b = torch.rand(a.shape, generator=torch.Generator().manual_seed(seed))
    forth, back, same = agreement(a, b, q), agreement(b, a, q), agreement(a, a, q)
    for x, y in zip(forth, back):
        torch.testing.assert_close(x, y, equal_nan=True)
    full = ~is_empty(a)
    assert torch.equal(forth.iou.isnan(), ~full) and torch.equal(forth.pearson.isnan(), ~full)
    assert (same.iou[full] == 1).all() and torch.allclose(same.pearson[full], torch.ones(()))


def test_agreement_of_maps_of_different_size() -> None:
    a = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(0))
    small = torch.nn.functional.interpolate(a[None], (6, 6), mode="area")[0]
    assert (pearson(a, small) > 0.3).all() and (top_iou(a, small, 0.3) > 0.2).all()
    with pytest.raises(ValueError, match="one length"):
        pearson(a, small[:1])


def test_half_precision_and_gradients_are_taken() -> None:
    maps = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    region = torch.zeros(2, 8, 8, dtype=torch.bool)
    region[:, :4] = True
    for kind in (torch.float16, torch.bfloat16):
        low = maps.to(kind).requires_grad_()
        for metric in (energy_in, pointing, iou_at, average_precision):
            assert metric(low, region).dtype == torch.float32
    assert energy_in(maps.double(), region).dtype == torch.float64


def test_regions_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="B = 2"):
        energy_in(torch.rand(2, 4, 4), torch.ones(3, 4, 4, dtype=torch.bool))
