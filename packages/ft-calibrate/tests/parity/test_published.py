"""Our closed forms against the published algorithms, written anew from what they do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ft_calibrate.curve import CurveAccumulator, seen_unseen_curve
from ft_calibrate.gap import average_logit_gap
from ft_calibrate.groups import class_groups
from ft_calibrate.metrics import accuracy_decomposition
from ft_calibrate.ncm import ncm_scores
from ft_calibrate.reference import published_ausuc, published_curve
from torch import Tensor
from vfm_core.metrics import as_array

pytestmark = pytest.mark.parity


def published_logit_gap(logits: Any, labels: Any, seen: Any, absent: Any) -> float:
    """Mean logit of the wrong seen classes minus mean logit of the absent ones, on whatever data it is given.

    On test data it uses test labels, and for samples of absent classes no seen class is dropped.
    """
    scores = torch.as_tensor(logits).double()
    s, u = [int(c) for c in as_array(seen)], [int(c) for c in as_array(absent)]
    wrong, other = [], []
    for row, label in zip(scores, as_array(labels)):
        wrong.append(float(row[[c for c in s if c != label]].mean()))
        other.append(float(row[u].mean()))
    return float(np.mean(wrong) - np.mean(other))


def published_ncm_scores(features: Any, reference: Any, reference_labels: Any, num_classes: int) -> Tensor:
    """Cosine of features (N, D) to the class means of the reference (M, D); NaN for a class without samples."""
    x, r = torch.as_tensor(features), torch.as_tensor(reference)
    y = torch.as_tensor(reference_labels)
    units = torch.nn.functional.normalize(r, dim=1)
    rows = [
        units[y == c].mean(dim=0) if bool((y == c).any()) else torch.full_like(units[0], -torch.inf)
        for c in range(num_classes)
    ]
    means = torch.nn.functional.normalize(torch.stack(rows), dim=1)  # -inf / inf: NaN
    return torch.nn.functional.normalize(x, dim=1) @ means.T


def published_accuracy(scores: Any, labels: Any, group: Any, columns: Any, k: int = 1) -> float:
    """Top-k accuracy of the samples whose label is in ``group`` with all but ``columns`` masked by -inf."""
    masked = torch.as_tensor(scores).clone()
    y = torch.as_tensor(labels)
    outside = torch.ones(masked.shape[1], dtype=torch.bool)
    outside[torch.as_tensor(columns)] = False
    masked[:, outside] = -torch.inf
    masked[torch.isnan(masked)] = -torch.inf
    rows = torch.isin(y, torch.as_tensor(group))
    best = masked[rows].argsort(dim=1, descending=True)[:, :k]
    return float((best == y[rows, None]).any(dim=1).double().mean())


def _problem(seed: int, n: int = 160, k: int = 12) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (n, k)).astype(np.float32)
    order = rng.permutation(k).tolist()
    seen, absent = sorted(order[: k // 2]), sorted(order[k // 2 :])
    y = rng.integers(0, k, n)
    z[np.arange(n), y] += 1.5
    z[:, seen] += 2.0  # the bias that fine-tuning leaves
    if seed % 3 == 0:
        np.round(z * 4, out=z)  # ties
        z /= 4
    return z, y, seen, absent


@pytest.mark.parametrize("seed", range(8))
def test_every_published_point_is_on_our_curve(seed: int) -> None:
    z, y, seen, absent = _problem(seed)
    curve = seen_unseen_curve(z, y, seen)
    points = published_curve(z, y, seen, absent)
    for overall, acc_seen, acc_unseen, gamma in points:
        i = int(np.argmin(np.abs(curve.gamma - gamma)))
        assert curve.gamma[i] == pytest.approx(gamma, abs=1e-9)
        assert (curve.seen[i], curve.unseen[i]) == (acc_seen, acc_unseen)
        assert curve.overall[i] == pytest.approx(overall, abs=1e-15)
    # It has all our points but the interval that holds gamma = 0, where there is one.
    assert len(curve) - len(points) == (0 if 0.0 in curve.breaks else 1)
    assert abs(curve.ausuc - published_ausuc(points)) <= 2 / min(curve.n_seen, curve.n_unseen)


def test_published_curve_where_one_side_is_empty() -> None:
    z, y, seen, absent = _problem(1)
    z[:, absent] += 100  # every sample is predicted as absent: all margins are negative
    curve, points = seen_unseen_curve(z, y, seen), published_curve(z, y, seen, absent)
    assert points[0, 3] == 0  # the search upwards finds nothing and scores gamma = 0
    for _, acc_seen, acc_unseen, gamma in points:
        found = curve.at(gamma)
        assert (found.seen, found.unseen) == (acc_seen, acc_unseen)
    assert abs(curve.ausuc - published_ausuc(points)) <= 2 / min(curve.n_seen, curve.n_unseen)


def test_published_curve_keeps_remaining_classes_in_the_competition() -> None:
    z, y, seen, absent = _problem(2)
    z[:, absent[-2:]] -= 3
    groups = class_groups(12, seen, absent[:-2])
    every = CurveAccumulator(groups, "keep").add(z, y).curve()
    for _, acc_seen, acc_unseen, gamma in published_curve(z, y, groups.seen, groups.absent):
        found = every.at(gamma)
        assert (found.seen, found.unseen) == (acc_seen, acc_unseen)
    kept = ~np.isin(y, groups.remaining)  # it counts every sample in the overall accuracy, we those of S and U
    for overall, _, _, gamma in published_curve(z[kept], y[kept], groups.seen, groups.absent):
        assert every.at(gamma).overall == pytest.approx(overall, abs=1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_logit_gap(seed: int) -> None:
    z, y, seen, absent = _problem(seed)
    assert average_logit_gap(z, y, seen) == pytest.approx(published_logit_gap(z, y, seen, absent), abs=1e-9)
    train = np.isin(y, seen)  # the paper's case: labels in S only
    expected = published_logit_gap(z[train], y[train], seen, absent)
    assert average_logit_gap(z[train], y[train], seen) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_class_mean(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    f, r = (torch.randn(n, 16, generator=generator, dtype=dtype) for n in (90, 70))
    y, t = (torch.randint(0, 9, (n,), generator=generator) for n in (90, 70))
    t[t == 4] = 5  # a class without reference samples
    theirs = published_ncm_scores(f, r, t, 9)
    ours = ncm_scores(f, (r, t), 9)
    there = [c for c in range(9) if c != 4]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(ours[:, there], theirs[:, there], atol=tolerance, rtol=0)
    assert bool(theirs[:, 4].isnan().all()) and bool((ours[:, 4] == -torch.inf).all())
    found = accuracy_decomposition(ours, y, [0, 1, 2, 3])
    everything = list(range(9))
    for key, group, columns in (
        ("Y/Y", everything, everything),
        ("S/Y", [0, 1, 2, 3], everything),
        ("U/Y", [4, 5, 6, 7, 8], everything),
        ("S/S", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("U/U", [4, 5, 6, 7, 8], [4, 5, 6, 7, 8]),
    ):
        assert found[key] == pytest.approx(published_accuracy(theirs, y, group, columns), abs=1e-12)


@pytest.mark.parametrize("k", [1, 5])
def test_accuracies_with_nan_and_remaining_classes(k: int) -> None:
    z, y, seen, absent = _problem(5)
    z[::7, 3] = np.nan
    rest = absent[-2:]
    found = accuracy_decomposition(z, y, seen, absent[:-2])
    suffix = "" if k == 1 else "@5"
    everything = list(range(12))
    cases = (
        ("Y/Y", everything, everything),
        ("S/Y", seen, everything),
        ("U/Y", absent[:-2], everything),
        ("R/Y", rest, everything),
        ("S/S", seen, seen),
        ("U/U", absent[:-2], absent[:-2]),
    )
    for key, group, columns in cases:
        assert found[key + suffix] == pytest.approx(published_accuracy(z, y, group, columns, k), abs=1e-12)
