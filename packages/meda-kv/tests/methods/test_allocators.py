"""Allocators and mergers as a cache uses them: exact totals per row, rows apart from each other, clear refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.core import accumulated_scores, merge, merge_by_score, official_alphas, select, uniform
from meda_kv.methods import (
    Allocator,
    EntropyAllocator,
    KeyMerger,
    LayerStats,
    ManualAllocator,
    MassAllocator,
    Merger,
    OfficialAllocator,
    ProfileAllocator,
    PyramidAllocator,
    ScoreMerger,
    UniformAllocator,
    mass_curve,
)
from vfm_core.errors import UserError

EXACT = [
    EntropyAllocator(),
    EntropyAllocator("self", temperature=0.2, cap=0.6),
    UniformAllocator(),
    PyramidAllocator(),
    PyramidAllocator(window=8, beta=2.0, most=1.0),
    ProfileAllocator((0.1, 2.0, 1.0, 0.9)),
    MassAllocator(),
]


def stats(lengths=(200, 137), layers=4, seed=0, available=None):
    g = torch.Generator().manual_seed(seed)
    n = torch.tensor(lengths)
    slots = int(n.max())
    real = torch.arange(slots) >= slots - n[:, None]  # left padding
    return LayerStats(
        n=n,
        available=n.expand(layers, -1).clone() if available is None else available,
        entropy=torch.rand(layers, len(lengths), generator=g) * 4,
        scores=[torch.rand(len(lengths), 2, slots, generator=g).pow(1 + 3 * i) for i in range(layers)],
        valid=[real[:, None].expand(-1, 2, -1)] * layers,
    )


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(EXACT),
    st.floats(0.02, 1.0),
    st.lists(st.integers(1, 400), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_allocate_totals_are_exact_for_every_allocator(allocator, ratio, lengths, seed):
    given_stats = stats(tuple(lengths), seed=seed)
    if any(n > 16 and min(16, n) * 4 > round(ratio * 4 * n) for n in lengths):
        with pytest.raises(UserError, match="smallest legal ratio"):
            allocator.budgets(given_stats, ratio, 16)
        return
    budgets = allocator.budgets(given_stats, ratio, 16)
    assert budgets.dtype == torch.long and budgets.shape == (4, len(lengths))
    for b, n in enumerate(lengths):
        mine = budgets[:, b]
        if n <= 16:
            assert mine.tolist() == [n] * 4  # shorter than the floor: left whole
            continue
        assert int(mine.sum()) == round(ratio * 4 * n)
        assert int(mine.min()) >= 16 and int(mine.max()) <= n


@pytest.mark.parametrize("allocator", EXACT, ids=lambda a: type(a).__name__)
def test_allocate_rows_do_not_depend_on_batch_mates(allocator):
    both = allocator.budgets(stats(), 0.3, 16)
    for b in range(2):
        whole = stats()
        alone = LayerStats(
            n=whole.n[b : b + 1],
            available=whole.available[:, b : b + 1],
            entropy=whole.entropy[:, b : b + 1],
            scores=[s[b : b + 1] for s in whole.scores],
            valid=[v[b : b + 1] for v in whole.valid],
        )
        assert torch.equal(allocator.budgets(alone, 0.3, 16), both[:, b : b + 1])


@pytest.mark.parametrize("allocator", EXACT, ids=lambda a: type(a).__name__)
def test_allocate_never_asks_for_more_than_is_held(allocator):
    held = torch.tensor([[30, 137], [60, 20], [200, 40], [44, 50]])
    budgets = allocator.budgets(stats(available=held), 0.3, 16)
    assert bool((budgets <= held).all())
    assert budgets.sum(0).tolist() == [round(0.3 * 800), round(0.3 * 548)]
    assert torch.equal(allocator.budgets(stats(available=held), 0.9, 16), held)  # no room for more: everything
    assert torch.equal(allocator.budgets(stats(available=held), 1.0, 16), held)


def test_allocate_names_ratio_length_and_remedy():
    with pytest.raises(UserError) as error:
        UniformAllocator().budgets(stats((200, 60)), 0.2, 16)
    assert "ratio: 0.2" in str(error.value) and "60 tokens" in str(error.value)
    assert "smallest legal ratio is 0.2667" in str(error.value)
    for ratio in (0.0, 1.2, float("nan")):
        with pytest.raises(UserError, match="ratio"):
            UniformAllocator().budgets(stats(), ratio)


def test_entropy_allocator_gives_more_to_higher_entropy():
    given_stats = stats()
    order = given_stats.entropy[:, 0].argsort()
    budgets = EntropyAllocator().budgets(given_stats, 0.3)[:, 0]
    assert bool((budgets[order].diff() >= 0).all()) and int(budgets.max()) > int(budgets.min())
    capped = EntropyAllocator(cap=0.4).budgets(given_stats, 0.3)
    assert int(capped[:, 0].max()) <= 80 and int(capped[:, 0].sum()) == 240
    assert EntropyAllocator("self").entropy == "self" and UniformAllocator().entropy is None
    missing = LayerStats(n=given_stats.n, available=given_stats.available)
    for allocator in (EntropyAllocator(), OfficialAllocator()):
        with pytest.raises(RuntimeError, match="entropy of every layer"):
            allocator.budgets(missing, 0.3)
    with pytest.raises(RuntimeError, match="scores of every layer"):
        MassAllocator().budgets(missing, 0.3)


@pytest.mark.parity
def test_official_allocator_gives_nothing_back():
    given_stats = stats()
    budgets = OfficialAllocator().budgets(given_stats, 0.3)
    for b, n in enumerate((200, 137)):
        alphas = official_alphas(given_stats.entropy[:, b], 0.3)
        assert budgets[:, b].tolist() == [2 * int(n * float(a) / 2) for a in alphas]


def test_profile_and_manual():
    given_stats = stats()
    assert ProfileAllocator((1, 1, 1, 1)).budgets(given_stats, 0.3)[:, 0].tolist() == uniform(4, 0.3, 200).tolist()
    assert ManualAllocator((10, 20, 30, 999)).budgets(given_stats, 0.3).tolist() == [
        [10] * 2,
        [20] * 2,
        [30] * 2,
        [200, 137],
    ]
    assert ManualAllocator((0.5, 0.25, 1.0, 0.001)).budgets(given_stats, 1.0)[:, 0].tolist() == [100, 50, 200, 1]
    for allocator in (ProfileAllocator((1.0, 2.0)), ManualAllocator((5, 5))):
        with pytest.raises(UserError, match="give 4"):
            allocator.budgets(given_stats, 0.3)


def test_mass_allocator_keeps_the_most_attention():
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 4, 90, 8, generator=g)
    scores = [accumulated_scores(q * t, k) for t in (0.1, 1.0, 3.0)]
    given_stats = LayerStats(torch.tensor([90]), torch.full((3, 1), 90), scores=scores, valid=[None] * 3)
    budgets = MassAllocator().budgets(given_stats, 0.4, 4)[:, 0].tolist()
    curves = [mass_curve(s[0]) for s in scores]

    def mass(split):
        return sum(float(c[:b].sum()) for c, b in zip(curves, split))

    assert sum(budgets) == 108 and mass(budgets) > mass([36, 36, 36])
    edges = [float(c[b - 1]) for c, b in zip(curves, budgets)]  # the smallest kept score is the same everywhere
    steps = [float(c[b - 1] - c[b]) for c, b in zip(curves, budgets)]
    assert max(edges) - min(edges) <= max(steps) + 1e-12


def test_mass_curve():
    curve = mass_curve(
        torch.tensor([[4.0, 1.0, 5.0, 99.0], [0.0, 0.0, 0.0, 99.0]]), torch.tensor([True] * 3 + [False]).expand(2, -1)
    )
    torch.testing.assert_close(
        curve, torch.tensor([0.5 + 1 / 3, 0.4 + 1 / 3, 0.1 + 1 / 3, 0.0], dtype=torch.float64) / 2
    )
    norms = mass_curve(torch.tensor([[-3.0, -1.0, -2.0]]))
    torch.testing.assert_close(norms, torch.tensor([2 / 3, 1 / 3, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "make",
    [
        lambda: EntropyAllocator("x"),
        lambda: EntropyAllocator(temperature=0.0),
        lambda: EntropyAllocator(cap=0.0),
        lambda: OfficialAllocator("x"),
        lambda: PyramidAllocator(beta=0.0),
        lambda: ProfileAllocator(()),
        lambda: ProfileAllocator((1.0, -1.0)),
        lambda: ProfileAllocator((0.0, 0.0)),
        lambda: ManualAllocator(()),
        lambda: ManualAllocator((0, 3)),
        lambda: ManualAllocator((0.5, 3)),
        lambda: ManualAllocator((1.5,)),
        lambda: KeyMerger("none"),
        lambda: KeyMerger(gate="x"),
    ],
)
def test_settings_of_allocators_and_mergers_are_checked(make):
    with pytest.raises(UserError):
        make()


def test_mergers_are_the_core_functions():
    g = torch.Generator().manual_seed(2)
    k, v = torch.randn(2, 1, 2, 30, 4, generator=g)
    scores = torch.rand(1, 2, 30, generator=g)
    keep = select(scores, 9, 0.3)
    for how in ("average", "pivot", "weighted"):
        for got, wanted in zip(
            KeyMerger(how, "mean", False).merge(k, v, keep, None), merge(k, v, keep, how, "mean", False)
        ):
            assert torch.equal(got, wanted)
    for got, wanted in zip(ScoreMerger().merge(k, v, keep, None, scores), merge_by_score(k, v, keep, scores)):
        assert torch.equal(got, wanted)
    with pytest.raises(RuntimeError, match="needs the scores"):
        ScoreMerger().merge(k, v, keep, None)


def test_bases_say_what_to_define():
    with pytest.raises(NotImplementedError, match="row"):
        Allocator().budgets(stats(), 0.3)
    with pytest.raises(NotImplementedError, match="merge"):
        Merger().merge(torch.zeros(1), torch.zeros(1), torch.zeros(1), None)
