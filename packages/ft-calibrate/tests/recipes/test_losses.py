import math

import pytest
import torch
from ft_calibrate.recipes.losses import correlation_penalty, cross_entropy, distillation, squared_distance
from torch import nn

G = torch.Generator().manual_seed(0)
Z = torch.randn(7, 5, generator=G, dtype=torch.float64)
TEACHER = torch.randn(7, 5, generator=G, dtype=torch.float64)
Y = torch.tensor([0, 2, 4, 0, 2, 4, 0])


def test_cross_entropy_over_all_and_over_the_seen_columns():
    by_hand = -torch.stack([Z[i].softmax(0)[Y[i]].log() for i in range(7)]).mean()
    assert torch.allclose(cross_entropy(Z, Y), by_hand)
    seen = torch.tensor([0, 2, 4])
    by_hand = -torch.stack([Z[i, Y[i]] - Z[i, seen].logsumexp(0) for i in range(7)]).mean()
    assert torch.allclose(cross_entropy(Z, Y, seen), by_hand)


def test_seen_columns_leave_the_absent_logits_without_a_gradient():
    z = Z.clone().requires_grad_()
    cross_entropy(z, Y, torch.tensor([0, 2, 4])).backward()
    assert bool((z.grad[:, [1, 3]] == 0).all()) and bool((z.grad[:, [0, 2, 4]] != 0).all())
    z.grad = None
    cross_entropy(z, Y).backward()
    assert bool((z.grad[:, [1, 3]] > 0).all()), "over all classes the absent ones are pushed down"


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("columns", [None, [1, 3, 4]])
def test_distillation_is_the_scaled_divergence(temperature, columns):
    at = list(range(5)) if columns is None else columns
    p, q = (TEACHER[:, at] / temperature).softmax(1), (Z[:, at] / temperature).softmax(1)
    by_hand = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    got = distillation(Z, TEACHER, temperature, None if columns is None else torch.tensor(columns))
    assert torch.allclose(got, by_hand)
    assert float(distillation(TEACHER + 3, TEACHER, temperature)) == pytest.approx(0, abs=1e-12)


def test_distillation_over_absent_classes_does_not_hold_the_seen_ones_back():
    z = Z.clone().requires_grad_()
    distillation(z, TEACHER, 2.0, torch.tensor([1, 3])).backward()
    assert bool((z.grad[:, [0, 2, 4]] == 0).all()) and bool((z.grad[:, [1, 3]] != 0).all())


@pytest.mark.parametrize(("n", "d"), [(50, 6), (6, 50)])
def test_rank_penalty_is_the_norm_of_the_correlations(n, d):
    f = torch.randn(n, d, generator=G) @ torch.randn(d, d, generator=G)
    corr = torch.corrcoef(f.T.double())
    assert float(correlation_penalty(f, eps=0)) == pytest.approx(float(corr.square().sum() / d**2), rel=1e-3)


def test_rank_penalty_knows_its_ends():
    one = torch.randn(64, 1, generator=G) * torch.ones(1, 8)
    assert float(correlation_penalty(one)) == pytest.approx(1, abs=1e-3)
    apart = torch.linalg.qr(torch.randn(64, 9, generator=G) - 0)[0][:, 1:]
    apart = apart - apart.mean(0)
    assert float(correlation_penalty(torch.linalg.qr(apart)[0] * 8)) == pytest.approx(1 / 8, rel=0.05)
    assert float(correlation_penalty(torch.zeros(4, 3))) == 0
    assert float(correlation_penalty(torch.randn(1, 3, generator=G))) == 0


def test_rank_penalty_lowers_the_correlation():
    f = (torch.randn(32, 1, generator=G) + 0.3 * torch.randn(32, 6, generator=G)).requires_grad_()
    before = correlation_penalty(f)
    before.backward()
    assert float(correlation_penalty(f.detach() - 5 * f.grad)) < float(before)


def test_squared_distance():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    by_hand = sum(float((p - q).square().sum()) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert math.isclose(float(squared_distance(a.parameters(), b.parameters())), by_hand, rel_tol=1e-6)
    with pytest.raises(ValueError, match="zip"):
        squared_distance(a.parameters(), [torch.zeros(2, 3)])
