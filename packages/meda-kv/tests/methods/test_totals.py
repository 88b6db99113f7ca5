"""Observers that are content with sums, and meters that look at a sample of the queries."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from meda_kv.core import attention_entropy
from meda_kv.methods import EntropyMeter, Observer, observe_all
from observed import looks, prompt, run


@pytest.mark.parametrize("kind", ["cross", "cross-causal", "self"])
@pytest.mark.parametrize("padded", [False, True])
def test_meter_of_a_sample(kind, padded):
    q, k, visual = prompt(20, n=160)
    real = torch.ones_like(visual)
    real[0, :31] = not padded
    meter = EntropyMeter(kind, sample=20)
    assert not meter.attention and meter != EntropyMeter(kind)
    state, _ = run(meter, looks(q, k, visual, real))
    wanted = attention_entropy(q, k, visual, kind, valid=real, scale=0.3, rows=20)
    torch.testing.assert_close(meter.value(state), wanted, rtol=0, atol=1e-5)
    exact = attention_entropy(q, k, visual, kind, valid=real, scale=0.3)
    assert 0 < float((meter.value(state) - exact).abs().max()) < 0.4
    cut, _ = run(meter, looks(q, k, visual, real, cuts=(80,)))  # a sample of each forward
    masked, _ = run(meter, looks(q, k, visual, real, cuts=(80,), causal_mask=True))
    torch.testing.assert_close(meter.value(cut), meter.value(masked), rtol=0, atol=1e-5)
    assert kind == "cross" or float((meter.value(cut) - exact).abs().max()) < 0.4
    all_rows, _ = run(EntropyMeter(kind, sample=160), looks(q, k, visual, real))
    torch.testing.assert_close(meter.value(all_rows), exact, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class Columns(Observer):
    """Content with sums; notes how it got them."""

    attention: ClassVar[bool] = True
    totals: ClassVar[tuple[str, ...]] = ("columns",)

    def rows(self, state, look, start, stop, probs):
        weights = look.query_valid[:, None, start:stop, None]
        sums = torch.nn.functional.pad((probs * weights).sum(2), (0, look.key.shape[2] - probs.shape[3]))
        state["blocks"] = state.get("blocks", 0) + sums

    def whole(self, state, look, totals):
        state["totals"] = totals.columns.clone()


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_observers_content_with_sums_get_them_the_short_way(side):
    q, k, visual = prompt(21, n=90)
    real = torch.ones_like(visual)
    if side:
        real[0, slice(0, 11) if side == "left" else slice(79, None)] = False
    observers = [Columns(), EntropyMeter("self")]
    (look,) = looks(q, k, visual, real)
    short, long, mixed = ([{}, {}] for _ in range(3))
    observe_all(observers, short, look)
    assert set(short[0]) == {"totals"}
    observe_all(observers, long, look, block=7)
    assert set(long[0]) == {"blocks"}
    torch.testing.assert_close(short[0]["totals"], long[0]["blocks"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(observers[1].value(short[1]), observers[1].value(long[1]), rtol=0, atol=1e-5)
    only, _ = run(observers[1], [look])
    torch.testing.assert_close(observers[1].value(only), observers[1].value(long[1]), rtol=0, atol=1e-5)
    plain = replace(look, softcap=1.0)  # not for tiles
    observe_all(observers, mixed, plain)
    assert set(mixed[0]) == {"blocks"}
    reader = type("Reader", (Columns,), {"totals": ()})()  # one that reads blocks makes all read them
    states = [{}, {}, {}]
    observe_all([*observers, reader], states, look)
    assert set(states[0]) == set(states[2]) == {"blocks"}
    torch.testing.assert_close(observers[1].value(states[1]), observers[1].value(long[1]), rtol=0, atol=1e-5)


def test_observer_that_names_totals_must_take_them():
    q, k, visual = prompt(22, n=90)
    careless = type("Careless", (Observer,), {"attention": True, "totals": ("columns",)})()
    with pytest.raises(NotImplementedError, match="Careless names totals"):
        run(careless, looks(q, k, visual))
