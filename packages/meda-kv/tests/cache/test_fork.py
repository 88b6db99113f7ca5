"""Many arms from one reading of a prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from meda_kv.cache import CompressedCache
from vfm_core.errors import UserError
from zoo import generate, tiny_vlm

ARMS = ["snapkv", "h2o", "meda", "h2o-mass", "streaming"]


@pytest.fixture(scope="module")
def reading():
    model, inputs = tiny_vlm("gemma3")
    x = inputs(batch=2, padded=True)
    cache = CompressedCache(model, "full", 1.0, record=ARMS)
    _, tokens = generate(model, x, cache, 1)
    y = {
        "input_ids": torch.cat([x["input_ids"], tokens], 1),
        "attention_mask": torch.cat([x["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1),
    }
    return model, x, y, cache


@pytest.mark.parametrize("ratio", [0.5, 1.0])
@pytest.mark.parametrize("arm", [*ARMS, "full"])
def test_fork_equals_a_cache_of_its_own(reading, arm, ratio):
    model, x, y, source = reading
    own = CompressedCache(model, arm, ratio, **({} if arm == "full" else {"floor": 4}))
    wanted, _ = generate(model, x, own, 5)
    method = own.method
    fork = source.fork(method, ratio)
    found, _ = generate(model, y, fork, 4)
    assert torch.equal(found, wanted[1:])
    assert fork.summary(1)["kept"] == own.summary(1)["kept"]
    assert fork.method.name == arm
    assert not source.compressed and source.get_seq_length() == x["input_ids"].shape[1]


def test_forks_do_not_disturb_each_other_or_the_source(reading):
    model, _, y, source = reading
    before = [layer.keys.clone() for layer in source._full()]
    forks = [source.fork("full"), source.fork("h2o", 1.0), source.fork("h2o", 0.7)]
    answers = [generate(model, y, fork, 4)[0] for fork in forks]
    assert torch.equal(answers[0], answers[1])
    assert all(torch.equal(old, layer.keys) for old, layer in zip(before, source._full(), strict=True))
    forks[0].layers[1].crop(-6)  # (sliding layers cannot go back)
    forks[0].layers[1].update(*(torch.zeros(2, 2, 3, layer.shape[-1]) for layer in (before[0], before[0])))
    assert all(torch.equal(old, layer.keys) for old, layer in zip(before, source._full(), strict=True))


def test_fork_of_a_first_step_method_waits_for_its_step(reading):
    model, x, y, source = reading
    own = CompressedCache(model, "h2o", 0.7, compress_at="first-step")
    wanted, _ = generate(model, x, own, 5)
    fork = source.fork(own.options.method, 0.7)
    assert fork.compressed  # the moment belongs to the method, which says "decode"
    late = source.fork(replace(own.options.method, compress_at="first-step"), 0.7)
    assert not late.compressed
    assert torch.equal(generate(model, y, late, 4)[0], wanted[1:])


def test_fork_shares_storage_until_written(reading):
    _, _, _, source = reading
    fork = source.fork("full")
    assert fork.layers[1].keys.data_ptr() == source.layers[1].keys.data_ptr()
    small = source.fork("h2o", 0.7)
    assert small.layers[1].keys.data_ptr() != source.layers[1].keys.data_ptr()
    assert small.layers[1].keys.untyped_storage().nbytes() < source.layers[1].keys.untyped_storage().nbytes() * 1.5


def test_fork_refuses_what_it_cannot_do(reading):
    _, _, _, source = reading
    with pytest.raises(UserError, match="not observed for this method"):
        source.fork("snapkv-meda")
    with pytest.raises(UserError, match="ratio"):
        source.fork("h2o", 1.5)
    with pytest.raises(RuntimeError, match="compressed already"):
        source.fork("h2o", 0.7).fork("h2o")
    with pytest.raises(RuntimeError, match="empty"):
        CompressedCache(source.model, "h2o").fork()


@pytest.mark.parametrize("compressed", [False, True])
def test_deepcopy_is_another_cache_of_the_same_model(compressed):
    import copy

    model, inputs = tiny_vlm("llava")
    x = inputs(batch=2, padded=True)
    cache = CompressedCache(model, "meda", 0.4, floor=4, merge="none", record=["h2o"])
    with torch.no_grad():
        model(**x, past_key_values=cache)
    if compressed:
        cache.compress()
    twin = copy.deepcopy(cache)
    assert type(twin) is CompressedCache and twin.model is model and twin.get_seq_length() == cache.get_seq_length()
    assert twin.nbytes() == cache.nbytes() and twin.summary(1) == cache.summary(1)
    mine, theirs = (
        {t.untyped_storage().data_ptr() for layer in c.layers for t in layer.tensors()} for c in (cache, twin)
    )
    assert not mine & theirs
    answers, length = [], cache.get_seq_length()
    for one in (twin, copy.deepcopy(cache), cache):  # what one reads, the others do not see
        assert one.get_seq_length() == length
        y = {"input_ids": torch.tensor([[20], [21]]), "past_key_values": one}
        before = one.get_seq_length()
        mask = torch.cat([x["attention_mask"], torch.ones(2, before + 1 - x["attention_mask"].shape[1])], 1).long()
        with torch.no_grad():
            answers.append(model(**y, attention_mask=mask).logits)
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert torch.equal(twin.kept(1, 1), cache.kept(1, 1)) and torch.equal(twin.budgets, cache.budgets)
    if not compressed:
        assert set(twin.layers[0].state) <= twin.watch.known()  # observers are shared, their tensors are not


def test_deepcopy_of_a_fork_lets_go_of_the_shared_storage(reading):
    import copy

    _, _, _, source = reading
    fork = source.fork("full")
    twin = copy.deepcopy(fork)
    assert twin.layers[1].keys.data_ptr() != fork.layers[1].keys.data_ptr() == source.layers[1].keys.data_ptr()
    assert torch.equal(twin.layers[1].keys, fork.layers[1].keys)
