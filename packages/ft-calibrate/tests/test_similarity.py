import numpy as np
import pytest
import torch
from ft_calibrate.ncm import class_means
from ft_calibrate.similarity import class_centres, group_similarity, similar_classes
from ft_calibrate.splits import make_split
from hypothesis import given, settings
from hypothesis import strategies as st
from vfm_core.errors import UserError


def clouds(k: int = 12, groups: int = 3, per_class: int = 8, seed: int = 0):
    """Features of classes that come in groups: class c belongs to group c % groups."""
    rng = np.random.default_rng(seed)
    centres = 4 * rng.normal(size=(groups, 16))
    means = centres[np.arange(k) % groups] + rng.normal(size=(k, 16))
    labels = np.repeat(np.arange(k), per_class)
    return means[labels] + 0.3 * rng.normal(size=(len(labels), 16)), labels


@pytest.mark.parametrize("clustering", ["agglomerative", "kmeans"])
def test_whole_groups_are_seen_where_they_fit(clustering):
    f, y = clouds()
    for n, expected in ((4, 1), (8, 2)):
        split = make_split(12, n, kind="similarity", features=f, labels=y, clustering=clustering, clusters=3)
        assert len({c % 3 for c in split.columns["seen"]}) == expected
        assert len(split.seen) == n


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 15), st.data())
def test_similarity_splits_have_the_exact_size(k, data):
    n = data.draw(st.integers(1, k - 1))
    f, y = clouds(k, 2, 2, data.draw(st.integers(0, 9)))
    clusters = data.draw(st.integers(2, k))
    chosen = similar_classes(class_centres(f, y, [str(i) for i in range(k)]), n, clusters=clusters)
    assert len(set(chosen.tolist())) == len(chosen) == n
    assert chosen.tolist() == sorted(chosen.tolist())


def test_similarity_splits_are_further_apart_than_random_ones():
    for seed in range(3):
        f, y = clouds(20, 4, 5, seed)
        centres = class_centres(f, y, [str(i) for i in range(20)])
        cosine = centres @ centres.T
        ours = group_similarity(cosine, similar_classes(centres, 7).tolist())
        others = [group_similarity(cosine, make_split(20, 7, seed=s).columns["seen"]) for s in range(30)]
        assert ours < min(others)


def test_features_may_be_tensors_or_class_means():
    f, y = clouds()
    one = make_split(12, 4, kind="similarity", features=torch.tensor(f), labels=torch.tensor(y), clusters=3)
    means = class_centres(f, y, [str(i) for i in range(12)])
    assert make_split(12, 4, kind="similarity", features=means, clusters=3).seen == one.seen
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1)
    unlabelled = np.concatenate([f, np.full((3, 16), 50.0)])
    again = class_centres(unlabelled, [*y, -1, -1, -1], [str(i) for i in range(12)])
    np.testing.assert_allclose(again, means)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"features": None}, "no features"),
        ({"features": np.ones((4, 3)), "labels": None}, "features of another shape"),
        ({"features": np.full((96, 16), np.nan)}, "features are not finite"),
        ({"labels": np.full(96, 99)}, "label beyond the classes"),
        ({"labels": np.repeat(np.arange(11), 9)[:96]}, "classes without features in split kind similarity: 11"),
        ({"clusters": 1}, "number of clusters out of range"),
        ({"clustering": "ward"}, "unknown clustering"),
    ],
)
def test_wrong_features_are_named(change, message):
    f, y = clouds()
    with pytest.raises(UserError) as error:
        make_split(12, 4, kind="similarity", **{"features": f, "labels": y, **change})
    assert message in str(error.value)


def test_centres_are_the_class_means_of_the_features_score():
    f, y = clouds()
    names = [str(i) for i in range(12)]
    centres = class_centres(f, np.where(np.arange(len(y)) == 3, -7, y), names)
    assert centres.dtype == np.float64
    np.testing.assert_array_equal(centres, class_means(f, np.where(np.arange(len(y)) == 3, -1, y), 12))
    by_hand = np.stack([(f[y == c] / np.linalg.norm(f[y == c], axis=1, keepdims=True)).mean(0) for c in range(1, 12)])
    np.testing.assert_allclose(centres[1:], by_hand / np.linalg.norm(by_hand, axis=1, keepdims=True), atol=1e-12)
