"""The named arms, the presets and their options."""

from dataclasses import dataclass, replace

import pytest
import torch
from meda_kv.core import keep_mask, official_budgets, official_entropy, official_keep, select
from meda_kv.methods import (
    METHODS,
    AccumulatedScorer,
    EntropyAllocator,
    EntropyMeter,
    KeyMerger,
    LayerStats,
    ManualAllocator,
    Method,
    OfficialAllocator,
    ProfileAllocator,
    PyramidAllocator,
    ScoreMerger,
    Scorer,
    UniformAllocator,
    WindowScorer,
    profile_method,
    register_method,
    resolve_method,
)
from vfm_core.errors import UserError

WANTED = {"full", "streaming", "h2o", "roco", "snapkv", "pyramidkv", "look-m", "look-m-average", "look-m-weighted"}
WANTED |= {"meda", "meda-no-alloc", "meda-no-merge", "meda-no-both", "knorm", "random"}


def test_every_arm_is_there_and_described():
    assert set(METHODS) >= WANTED
    for name, method in METHODS.items():
        assert method.name == name and method.summary
        assert (method.scorer is None) == (name == "full")
        assert resolve_method(name, preset="official-code").name == name
        assert hash(method) == hash(replace(method))


def test_the_papers_settings():
    meda = resolve_method("meda")
    assert meda.scorer == AccumulatedScorer("all", "mean") and meda.allocator == EntropyAllocator("cross", 1.0)
    assert meda.merger == KeyMerger("average") and (meda.recent_share, meda.text_prior) == (0.75, "bias")
    assert resolve_method("meda-no-alloc").allocator == UniformAllocator() and resolve_method("meda-no-alloc").merger
    assert resolve_method("meda-no-merge").merger is None
    assert resolve_method("meda-no-merge").allocator == meda.allocator
    assert resolve_method("look-m").merger == KeyMerger("pivot")
    assert (METHODS["h2o"].recent_share, METHODS["h2o"].text_prior, METHODS["h2o"].merger) == (0.5, "off", None)
    streaming = METHODS["streaming"]
    assert (streaming.sink, streaming.recent_share, streaming.least) == (4, 1.0, 16)
    assert METHODS["pyramidkv"].allocator == PyramidAllocator(window=64)


def test_windows_are_kept_and_fit_short_prompts():
    assert METHODS["snapkv"].recent_count(4000) == 32
    assert METHODS["snapkv"].recent_count(139) == 9  # a sixteenth
    assert resolve_method("snapkv", "official-code").recent_count(139) == 32
    assert METHODS["snapkv-meda"].recent_count(500) == 50
    assert METHODS["h2o"].recent_count(4000) is None
    assert resolve_method("h2o", recent=0.1).recent_count(500) == 50
    assert resolve_method("snapkv", window=3, kernel=3).recent_count(139) == 3
    assert resolve_method("streaming", sink=30).least == 31


@pytest.mark.parity
def test_official_code_preset_equals_the_official_formulas():
    method = resolve_method("meda", preset="official-code")
    assert method.compress_at == "first-step" and method.merger == KeyMerger("average", gate="mean")
    g = torch.Generator().manual_seed(0)
    layers, n = 4, 300
    q, k = torch.randn(2, layers, 1, 3, n, 8, generator=g)
    q = q * torch.tensor([0.2, 1.0, 2.0, 3.0]).view(4, 1, 1, 1, 1)
    entropy = torch.stack([official_entropy(q[i], k[i]) for i in range(layers)])
    assert EntropyMeter(method.allocator.entropy).kind == "self"
    stats = LayerStats(torch.tensor([n]), torch.full((layers, 1), n), entropy=entropy)
    budgets = method.allocator.budgets(stats, 0.2, method.least)
    assert torch.equal(budgets[:, 0], official_budgets(entropy[:, 0], 0.2, n))
    visual = torch.rand(n, generator=g) < 0.8
    alphas = (entropy[:, 0].softmax(0) * layers * 0.2).clamp(0.01, 1.0)
    for layer in range(layers):
        scores = torch.rand(1, 3, n, generator=g)
        keep = select(scores, budgets[layer], method.recent_share, visual[None], method.text_prior, method.sink)
        assert torch.equal(keep_mask(keep, n)[0], official_keep(scores[0], visual, float(alphas[layer])))


def test_the_limit_of_the_window_is_told():
    for name in ("snapkv", "pyramidkv"):
        assert "at most a sixteenth" in METHODS[name].summary
        assert METHODS[name].scorer.most == 1 / 16 and resolve_method(name, "official-code").scorer.most == 1.0


def test_options_reach_their_part():
    method = resolve_method(
        "meda", score_queries="text", group="max", entropy="self", temperature=2.0, merge="pivot", gate="mean",
        merge_keys=False, recent_share=0.5, text_prior="off", floor=4, compress_at="prefill", sink=2,
    )  # fmt: skip
    assert method.scorer == AccumulatedScorer("text", "max") and method.allocator == EntropyAllocator("self", 2.0)
    assert method.merger == KeyMerger("pivot", "mean", False)
    assert (method.recent_share, method.text_prior, method.floor, method.sink) == (0.5, "off", 4, 2)
    assert resolve_method("meda", merge="none", gate="mean").merger is None
    assert resolve_method("h2o", merge="weighted-by-score").merger == ScoreMerger()
    assert resolve_method("h2o", merge="average").merger == KeyMerger("average")
    assert resolve_method("h2o", budgets="entropy", entropy="self").allocator == EntropyAllocator("self")
    assert resolve_method("meda", budgets="entropy", temperature=3.0).allocator == EntropyAllocator("cross", 3.0)
    assert resolve_method("meda", budgets=[5, 6, 7]).allocator == ManualAllocator((5, 6, 7))
    assert resolve_method("snapkv", budgets="pyramid", window=16).allocator == PyramidAllocator(window=16)
    pyramid = resolve_method("pyramidkv", window=16, beta=5.0, most=0.5)
    assert pyramid.scorer == WindowScorer(16, most=0.5) and pyramid.allocator == PyramidAllocator(16, 5.0, 0.5)
    assert resolve_method("random", seed=7).scorer.seed == 7
    assert resolve_method("meda", merge=None, ratio=None) == METHODS["meda"]
    assert resolve_method("meda", "official-code", entropy="cross").allocator == OfficialAllocator("cross")
    fixed = profile_method(METHODS["meda"], [1.0, 2.0])
    assert fixed.allocator == ProfileAllocator((1.0, 2.0)) and fixed.compress_at == "layer"


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("snapvk", {}, "snapkv"),
        ("meda", {"preset": "offical-code"}, "official-code"),
        ("meda", {"temprature": 2.0}, "temperature"),
        ("h2o", {"temperature": 2.0}, "UniformAllocator"),
        ("h2o", {"entropy": "self"}, "budgets=entropy"),
        ("meda", {"merge": "avrage"}, "average"),
        ("meda", {"budgets": "entropie"}, "entropy"),
        ("meda", {"budgets": 3}, "budgets"),
        ("meda", {"text_prior": "some"}, "keep-all"),
        ("meda", {"compress_at": "never"}, "first-step"),
        ("meda", {"recent_share": 1.2}, "recent_share"),
        ("meda", {"recent": -1}, "recent"),
        ("meda", {"recent": 1.5}, "recent"),
        ("meda", {"sink": -1}, "sink"),
        ("meda", {"floor": 0}, "floor"),
        ("meda", {"window": 32}, "AccumulatedScorer"),
        ("h2o", {"gate": "mean"}, "merger none"),
        ("full", {"sink": 4}, "full cache"),
        (3, {}, "name or a Method"),
    ],
)
def test_mistakes_are_told_in_one_line(name, options, told):
    with pytest.raises(UserError) as error:
        resolve_method(name, **options)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_ones_own_method_in_a_few_lines(monkeypatch):
    monkeypatch.setattr("meda_kv.methods.registry.METHODS", dict(METHODS))

    @dataclass(frozen=True)
    class ValueNorm(Scorer):
        power: float = 1.0

        def scores(self, state, key, value, valid):
            return value.float().norm(dim=-1) ** self.power

    mine = register_method(Method("value-norm", "large values", "", ValueNorm(), UniformAllocator()))
    assert resolve_method("value-norm", floor=4).floor == 4
    assert resolve_method(mine, merge="average").merger == KeyMerger("average")
    assert mine.scorer.attention is False and mine.scorer.slots == ()
    for bad in ("", "a,b", "a?b", "full"):
        with pytest.raises(UserError):
            register_method(replace(mine, name=bad))
    with pytest.raises(UserError, match="or neither"):
        Method("half", scorer=ValueNorm())
