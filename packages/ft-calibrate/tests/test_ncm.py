"""Class means, neighbours and probes against loops and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ft_calibrate.metrics import accuracy_decomposition
from ft_calibrate.ncm import class_means, knn_scores, linear_probe_scores, ncm_scores
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from vfm_core.errors import UserError

K, D = 5, 7


def _features(n: int = 60, seed: int = 0, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """Classes 0, 1, 2 and 4; nothing of class 3, one sample of class 4."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    y[5] = 4
    centre = np.random.default_rng(99).normal(size=(K, D))
    return (centre[y] + rng.normal(0, 0.7, (n, D))).astype(dtype), y


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_means_and_scores_by_the_formula() -> None:
    f, y = _features()
    x, _ = _features(20, seed=1)
    mu = class_means(f, y, K)
    for c in (0, 1, 2, 4):
        np.testing.assert_allclose(mu[c], _unit(_unit(f[y == c]).mean(axis=0)), atol=1e-14)
    assert np.isnan(mu[3]).all()
    scores = ncm_scores(x, mu)
    np.testing.assert_allclose(scores[:, [0, 1, 2, 4]], _unit(x) @ mu[[0, 1, 2, 4]].T, atol=1e-14)
    assert (scores[:, 3] == -np.inf).all()
    np.testing.assert_allclose(ncm_scores(x, (f, y), K), scores, atol=1e-14)
    assert accuracy_decomposition(ncm_scores(f, mu), y, [0, 1])["Y/Y"] > 0.7


def test_euclidean_keeps_the_order() -> None:
    f, y = _features()
    mu = class_means(f, y, K)
    cosine, euclidean = ncm_scores(f, mu), ncm_scores(f, mu, metric="euclidean")
    there = [0, 1, 2, 4]
    distance = ((_unit(f)[:, None] - mu[None, there]) ** 2).sum(axis=2)
    np.testing.assert_allclose(euclidean[:, there], -distance, atol=1e-13)
    assert (np.argsort(euclidean, axis=1) == np.argsort(cosine, axis=1)).all()
    assert (euclidean[:, 3] == -np.inf).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_leave_one_out_is_exact(metric: str) -> None:
    f, y = _features()
    y[7] = -1  # no label: scored against everybody
    found = ncm_scores(f, (f, y), K, metric, leave_one_out=True)
    for i in range(len(f)):
        kept = np.arange(len(f)) != i
        expected = ncm_scores(f[i : i + 1], (f[kept], y[kept]), K, metric)[0]
        np.testing.assert_allclose(found[i], expected, atol=1e-12)
    assert found[5, 4] == -np.inf  # the only one of its class


def test_samples_without_label_are_left_out_of_the_means() -> None:
    f, y = _features()
    hidden = y.copy()
    hidden[10:20] = -1
    kept = hidden >= 0
    np.testing.assert_array_equal(class_means(f, hidden, K), class_means(f[kept], y[kept], K))


def test_float32_sums_are_float64_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    f, y = _features(400, dtype=np.float32)
    exact = class_means(f.astype(np.float64), y, K)
    mu = class_means(f, y, K)
    assert mu.dtype == np.float32
    np.testing.assert_array_equal(mu, exact.astype(np.float32))
    whole = [ncm_scores(f, (f, y), K, leave_one_out=True), knn_scores(f, f, y, K, 3)]
    monkeypatch.setattr("ft_calibrate.ncm._BLOCK", 64)
    np.testing.assert_allclose(ncm_scores(f, (f, y), K, leave_one_out=True), whole[0], atol=1e-6)
    np.testing.assert_allclose(knn_scores(f, f, y, K, 3), whole[1], atol=1e-5)


def test_tensors_in_tensors_out() -> None:
    f, y = _features(dtype=np.float32)
    g, t = torch.from_numpy(f), torch.from_numpy(y)
    for array, tensor in (
        (class_means(f, y, K), class_means(g, t, K)),
        (ncm_scores(f, (f, y), K), ncm_scores(g, (g, t), K)),
        (knn_scores(f, f, y, K), knn_scores(g, g, t, K)),
        (linear_probe_scores(f, f, y, K), linear_probe_scores(g, g, t, K)),
        (ncm_scores(f, class_means(f, y, K)), ncm_scores(g.requires_grad_(), class_means(g, t, K))),
    ):
        assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor) and not tensor.requires_grad
        np.testing.assert_array_equal(array, tensor.numpy())
    np.testing.assert_allclose(ncm_scores(f.tolist(), (f.tolist(), y.tolist()), K), ncm_scores(f, (f, y), K), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    f, y = _features(dtype=np.float32)
    g, t = torch.from_numpy(f).cuda(), torch.from_numpy(y).cuda()
    found = ncm_scores(g, (g, t), K, leave_one_out=True)
    assert found.is_cuda
    np.testing.assert_allclose(found.cpu().numpy(), ncm_scores(f, (f, y), K, leave_one_out=True), atol=1e-5)
    np.testing.assert_allclose(knn_scores(g, g, t, K).cpu().numpy(), knn_scores(f, f, y, K), atol=1e-5)
    assert linear_probe_scores(g, g, t, K).is_cuda


@pytest.mark.parity
@pytest.mark.parametrize("k", [1, 4, 500])
def test_neighbours_equal_scikit_learn(k: int) -> None:
    f, y = _features()
    x, _ = _features(30, seed=2)
    peer = KNeighborsClassifier(min(k, len(f))).fit(_unit(f), y)
    votes = np.zeros((30, K))
    votes[:, peer.classes_] = peer.predict_proba(_unit(x))
    found = knn_scores(x, f, y, K, k)
    assert (found[:, 3] == -np.inf).all()
    there = [0, 1, 2, 4]
    # Whole votes to the nearer half of a vote: the order of unequal shares is scikit-learn's.
    np.testing.assert_allclose(found[:, there], votes[:, there], atol=0.5 / min(k, len(f)))
    clear = np.sort(votes, axis=1)[:, -1] > np.sort(votes, axis=1)[:, -2]
    assert (found.argmax(axis=1) == votes.argmax(axis=1))[clear].all() and clear.sum() > 10


def test_equal_votes_go_to_the_nearer_class() -> None:
    reference = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert knn_scores([[1.0, 0.9]], reference, [1, 0], 2, k=2).argmax() == 1
    assert knn_scores([[0.9, 1.0]], reference, [1, 0], 2, k=2).argmax() == 0


def test_neighbours_leave_one_out_and_temperature() -> None:
    f, y = _features()
    y[3] = -1
    assert knn_scores(f, f, y, K, 1)[y >= 0][np.arange(59), y[y >= 0]].min() == pytest.approx(1)  # it finds itself
    found = knn_scores(f, f, y, K, 3, leave_one_out=True)
    warm = knn_scores(f, f, y, K, 3, temperature=0.1, leave_one_out=True)
    for i in range(len(f)):
        kept = (np.arange(len(f)) != i) & (y >= 0)
        there = np.unique(y[kept])
        np.testing.assert_allclose(found[i, there], knn_scores(f[i : i + 1], f[kept], y[kept], K, 3)[0, there])
        cosine = _unit(f[kept]) @ _unit(f[i])
        near = np.argsort(-cosine)[:3]
        weight = np.exp(cosine[near] / 0.1)
        expected = np.bincount(y[kept][near], weights=weight, minlength=K) / weight.sum()
        np.testing.assert_allclose(warm[i, there], expected[there], atol=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("scale", ["standard", "normalise"])
def test_probe_equals_scikit_learn(scale: str) -> None:
    f, y = _features()
    x, _ = _features(30, seed=2)
    mean, spread = (f.mean(axis=0), f.std(axis=0)) if scale == "standard" else (0, 1)
    a, b = ((f - mean) / spread, (x - mean) / spread) if scale == "standard" else (_unit(f), _unit(x))
    peer = LogisticRegression(C=0.5, max_iter=500).fit(a, y)
    found = linear_probe_scores(x, f, y, K, c=0.5, scale=scale)
    np.testing.assert_allclose(found[:, peer.classes_], peer.decision_function(b), atol=1e-3)
    assert (found[:, 3] == -np.inf).all()


def test_probe_of_two_classes_and_of_one() -> None:
    f, y = _features()
    two = np.isin(y, [0, 2])
    found = linear_probe_scores(f, f[two], y[two], K)
    peer = LogisticRegression(max_iter=500).fit(f[two], y[two])
    assert ((found[:, 2] > found[:, 0]) == (peer.predict(f) == 2)).mean() > 0.9
    assert (found[:, [1, 3, 4]] == -np.inf).all()
    one = linear_probe_scores(f, f[y == 1], y[y == 1], K)
    assert (one.argmax(axis=1) == 1).all()
    constant = f.copy()
    constant[:, 0] = 3.0  # a feature without spread must not divide by zero
    assert np.isfinite(linear_probe_scores(constant, constant, y, K)[:, [0, 1, 2, 4]]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, y: ncm_scores(f, (f, y), K, "manhattan"), "unknown metric"),
        (lambda f, y: ncm_scores(f, (f, y)), "number of classes is needed"),
        (lambda f, y: ncm_scores(f, class_means(f, y, K), leave_one_out=True), "not their means"),
        (lambda f, y: ncm_scores(f[:3], (f, y), K, leave_one_out=True), "same samples"),
        (lambda f, y: ncm_scores(f, class_means(f, y, K), 9), "class means must be"),
        (lambda f, y: ncm_scores(f[:, :3], class_means(f, y, K)), "one length: 3 and 7"),
        (lambda f, y: class_means(f, y[:4], K), "one column number per sample"),
        (lambda f, y: class_means(f, y, 3), "labels must lie in -1..2"),
        (lambda f, y: class_means(f[0], y, K), "matrix"),
        (lambda f, y: class_means(np.full((60, 2), "a"), y, K), "numbers"),
        (lambda f, y: class_means(np.where(f == f[4, 0], np.nan, f), y, K), "finite in row 4"),
        (lambda f, y: knn_scores(f, f, y, K, 0), "must be positive"),
        (lambda f, y: knn_scores(f, f, y, K, 3, temperature=0.0), "must be positive"),
        (lambda f, y: knn_scores(f, f, np.full(60, -1), K), "no labelled reference"),
        (lambda f, y: knn_scores(f, f[:, :2], y, K), "one length"),
        (lambda f, y: knn_scores(f[:2], f, y, K, leave_one_out=True), "same samples"),
        (lambda f, y: linear_probe_scores(f, f, y, K, scale="none"), "unknown scale"),
        (lambda f, y: linear_probe_scores(f, f, np.full(60, -1), K), "no labelled reference"),
        (lambda f, y: linear_probe_scores(f[:, :2], f, y, K), "one length"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(*_features())  # type: ignore[operator]
