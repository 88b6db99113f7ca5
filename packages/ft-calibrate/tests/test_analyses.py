"""A1 to A7 on arrays: against plain loops, and on inputs whose answer is known by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ft_calibrate.analyses import (
    accuracy_gain,
    ground_truth_margin,
    group_decision,
    logit_scale,
    logit_scale_per_sample,
    mean_interval,
    paired_change,
)
from ft_calibrate.analyses_features import (
    DISTANCES,
    MOVEMENTS,
    class_mean_movement,
    feature_distances,
    feature_movement,
    unit_class_means,
)
from ft_calibrate.analyses_head import class_relationship, head_norms, head_weights
from ft_calibrate.groups import class_groups
from torch import nn
from vfm_core.errors import UserError

GROUPS = class_groups(7, [0, 2, 4], [1, 3, 5])  # column 6 is a remaining class


def random_logits(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (n, 7)).astype(np.float32), rng.integers(0, 6, n)


def test_paired_change_is_the_bootstrap_of_resampled_pairs() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.random(200) < 0.7).astype(float), (rng.random(200) < 0.5).astype(float)
    ours = paired_change(a, b, 4000)
    d = a - b
    draws = d[rng.integers(0, 200, (4000, 200))].mean(1)
    assert ours.change == pytest.approx(d.mean())
    assert ours.se == pytest.approx(draws.std(ddof=1), rel=0.06)
    assert ours.se == pytest.approx(d.std() / np.sqrt(200), rel=0.06)
    assert (ours.low, ours.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.01)


def test_many_distinct_values_take_the_limit_of_the_bootstrap() -> None:
    d = np.random.default_rng(0).gamma(2.0, size=300)
    ours = paired_change(d, np.zeros(300), 10)  # the limit needs no resamples
    draws = d[np.random.default_rng(1).integers(0, 300, (4000, 300))].mean(1)
    assert ours.se == pytest.approx(draws.std(), rel=0.05)
    assert (ours.low, ours.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), rel=0.01)


def test_paired_change_is_stratified_to_the_group_and_repeatable() -> None:
    a = np.array([1, 0, np.nan, 1.0])
    b = np.array([0, 0, np.nan, np.nan])
    first = paired_change(a, b, 500, seed=3)
    assert first.n == 2 and first.change == 0.5
    assert first == paired_change([1, 0], [0, 0], 500, seed=3)
    assert first != paired_change(a, b, 500, seed=4)
    empty = paired_change([np.nan], [1.0])
    assert empty.n == 0 and np.isnan(empty.se)
    with pytest.raises(ValueError, match="one length"):
        paired_change([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least 2"):
        paired_change([1.0], [1.0], 1)


def test_accuracy_gain_has_a_row_per_classifier_and_group() -> None:
    before = {"S/Y": np.array([1, 0, np.nan]), "U/Y": np.array([np.nan, np.nan, 1.0])}
    after = {"S/Y": np.array([1, 1, np.nan]), "U/Y": np.array([np.nan, np.nan, 0.0])}
    rows = accuracy_gain((before, after), (after, after))
    assert [(r["classifier"], r["group"]) for r in rows] == [("NN", "S"), ("NN", "U"), ("NCM", "S"), ("NCM", "U")]
    assert rows[0]["change"][0] == 0.5 and rows[1]["change"][0] == -1.0 and rows[2]["change"][0] == 0.0
    assert [r["classifier"] for r in accuracy_gain((before, after), None)] == ["NN", "NN"]


def test_group_decision_counts_both_sides() -> None:
    margin = [2.0, -1.0, 0.5, 0.0, 9.0]  # the last sample is of a remaining class
    found = group_decision(margin, [0, 2, 1, 3, 6], GROUPS, gamma=1.0)
    assert found == {"accuracy": 0.75, "balanced": 0.75, "seen_kept": 0.5, "absent_found": 1.0}
    at_zero = group_decision(margin, [0, 2, 1, 3, 6], GROUPS)  # gamma = d is not larger: the sample stays seen
    assert at_zero["absent_found"] == 0.0


@pytest.mark.parametrize("remaining", ["absent", "keep", "exclude"])
def test_logit_scale_equals_a_loop(remaining: str) -> None:
    z, y = random_logits()
    ours = logit_scale_per_sample(z, y, GROUPS, remaining)
    seen = [0, 2, 4]
    moved = [1, 3, 5, 6] if remaining == "absent" else [1, 3, 5]
    every = list(range(7)) if remaining != "exclude" else list(range(6))
    for i, (row, label) in enumerate(zip(z.astype(float), y)):
        e = np.exp(row[every] - row[every].max())
        assert ours["non_gt_S"][i] == pytest.approx(np.mean([row[c] for c in seen if c != label]))
        assert ours["non_gt_U"][i] == pytest.approx(np.mean([row[c] for c in moved if c != label]))
        assert ours["max_S"][i] == row[seen].max() and ours["max_U"][i] == row[moved].max()
        assert ours["softmax_S"][i] == pytest.approx(e[seen].sum() / e.sum())


def test_logit_scale_means_masks_and_tensors() -> None:
    z, y = random_logits()
    assert logit_scale(torch.as_tensor(z), torch.as_tensor(y), GROUPS) == logit_scale(z, y, GROUPS)
    only_u = logit_scale(z, y, GROUPS, rows="U")
    assert only_u["max_U"] == pytest.approx(logit_scale_per_sample(z, y, GROUPS)["max_U"][np.isin(y, [1, 3, 5])].mean())
    masked = z.copy()
    masked[:, 5] = -np.inf  # a masked class: no mean may become -inf
    y = np.where(y == 5, 1, y)
    values = logit_scale(masked, y, GROUPS)
    assert all(np.isfinite(v) for v in values.values())
    alone = logit_scale(z[:, :2], np.minimum(y, 1), class_groups(2, [0]), rows="S")
    assert np.isnan(alone["non_gt_S"])  # the only seen class is the true one
    with pytest.raises(UserError, match="do not fit"):
        logit_scale(z, y[:-1], GROUPS)


def test_margin_equals_a_loop() -> None:
    z, y = random_logits()
    rows = [i for i in range(len(y)) if y[i] in (1, 3, 5)]
    true = np.mean([z[i, y[i]] for i in rows])
    other = np.mean([max(z[i, c] for c in (1, 3, 5, 6) if c != y[i]) for i in rows])
    ours = ground_truth_margin(z, y, GROUPS)
    assert ours["true"] == pytest.approx(true) and ours["largest_other"] == pytest.approx(other)
    assert ours["margin"] == pytest.approx(true - other)
    assert np.isnan(ground_truth_margin(z, np.zeros(len(y), int), GROUPS)["margin"])


def test_class_relationship_finds_a_group_that_moves_together() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=(7, 16))
    delta = rng.normal(size=(7, 16)) * 0.1
    delta[[1, 3, 5]] = -np.ones(16) + rng.normal(size=(3, 16)) * 0.1
    delta[6] = 0  # did not move: no direction, and not part of any mean
    found = class_relationship(before, before + delta, GROUPS)
    assert found.within_U > 0.95 and abs(found.within_S) < 0.6 and np.isnan(found.cosine[6, 0])
    pairs = [(a, b) for a in (0, 2, 4) for b in (1, 3, 5)]
    cosine = [delta[a] @ delta[b] / np.linalg.norm(delta[a]) / np.linalg.norm(delta[b]) for a, b in pairs]
    assert found.between == pytest.approx(np.mean(cosine))
    with pytest.raises(UserError, match="different shapes"):
        class_relationship(before, before[:, :8], GROUPS)
    with pytest.raises(UserError, match="do not fit"):
        head_norms(before[:3], GROUPS)


def test_head_weights_of_every_kind_of_head() -> None:
    weight = torch.arange(14.0).reshape(7, 2)
    linear, conv = nn.Linear(2, 7), nn.Conv2d(2, 7, 1)
    linear.weight = nn.Parameter(weight)
    conv.weight = nn.Parameter(weight[:, :, None, None])
    for source in (weight, weight.numpy(), linear, conv, (weight, torch.zeros(7)), weight.tolist()):
        np.testing.assert_array_equal(head_weights(source), weight.numpy())
    norms = head_norms(linear, GROUPS)
    assert norms["S"] == pytest.approx(np.linalg.norm(weight.numpy()[[0, 2, 4]], axis=1).mean())
    with pytest.raises(UserError, match="matrix"):
        head_weights(np.zeros(3))
    with pytest.raises(UserError, match="no head weights"):
        head_weights(object())


def _features(n: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 6, n)
    return rng.normal(size=(6, 5))[y] + rng.normal(size=(n, 5)), y


def test_feature_distances_are_the_sixteen_published_series() -> None:
    train, test = _features(seed=1), _features(seed=2)
    ours = feature_distances(train, test, GROUPS)
    assert len(DISTANCES) == 16 and list(ours) == list(DISTANCES) and len(MOVEMENTS) == 6
    unit = {name: f / np.linalg.norm(f, axis=1, keepdims=True) for name, (f, _) in (("train", train), ("test", test))}
    for split, (_, y) in (("train", train), ("test", test)):
        f = unit[split]
        for group, members, others in (("S", (0, 2, 4), (1, 3, 5)), ("U", (1, 3, 5), (0, 2, 4))):
            mine, theirs = np.isin(y, members), np.isin(y, others)
            means = {c: f[y == c].mean(0) / np.linalg.norm(f[y == c].mean(0)) for c in members}
            expected = {
                "own_class": [np.linalg.norm(f[i] - means[y[i]]) for i in np.flatnonzero(mine)],
                "own_group": np.linalg.norm(f[mine] - f[mine].mean(0), axis=1),
                "other_group": np.linalg.norm(f[mine] - f[theirs].mean(0), axis=1),
                "overall": np.linalg.norm(f[mine] - unit["train"].mean(0), axis=1),  # of the training data, for both
            }
            for target, values in expected.items():
                assert ours[f"{split}/{group}/{target}"] == pytest.approx(np.mean(values))


def test_feature_distances_without_training_data_use_the_test_mean() -> None:
    f, y = _features()
    ours = feature_distances(None, (f, y), GROUPS)
    unit = f / np.linalg.norm(f, axis=1, keepdims=True)
    seen = unit[np.isin(y, [0, 2, 4])]
    assert ours["test/S/overall"] == pytest.approx(np.linalg.norm(seen - unit.mean(0), axis=1).mean())
    assert np.isnan(ours["train/S/overall"])


def test_movement_of_class_means() -> None:
    f, y = _features()
    before = {"test": unit_class_means(f, y, 7)}
    assert np.isnan(before["test"][6]).all()  # no sample of the remaining class
    after = {"test": before["test"].copy()}
    after["test"][[1, 3, 5]] *= -1  # unit vectors to their opposites
    moved = class_mean_movement(before, after, GROUPS)
    assert moved["test/S"] == 0.0 and moved["test/U"] == pytest.approx(2.0) and moved["test/all"] == pytest.approx(1.0)
    assert np.isnan(moved["train/U"])
    distances, movements = feature_movement([(None, (f, y)), (None, (f, y)), (None, (-f, y))], GROUPS)
    assert len(distances) == 3 and [m["test/U"] for m in movements] == pytest.approx([0.0, 2.0])


def test_mean_interval_covers_the_mean() -> None:
    value, low, high = mean_interval([0, 1, 1, np.nan, 1])
    assert value == 0.75 and low <= value <= high
