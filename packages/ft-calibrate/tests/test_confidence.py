"""One temperature after the bias: its optimum, the errors it reports, and what it cannot do."""

import logging

import numpy as np
import pytest
from ft_calibrate.confidence import TEMPERATURE_RANGE, ece, fit_temperature, temperature_report
from scipy.special import log_softmax, softmax
from vfm_core.errors import UserError


def sampled(n=1500, scale=3.0, seed=0):
    """Logits ``scale`` times too sharp for labels that are drawn from their softmax."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 5)) * 2
    y = np.array([rng.choice(5, p=p) for p in softmax(z, axis=1)])
    return z * scale, y


def nll(z, y, t):
    return -log_softmax(z / t, axis=1)[np.arange(len(y)), y].mean()


def test_finds_the_temperature_that_was_put_in():
    z, y = sampled(6000)
    assert fit_temperature(z, y) == pytest.approx(3.0, rel=0.07)


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_minimises_the_likelihood(scale):
    z, y = sampled(400, scale)
    t = fit_temperature(z, y)
    assert all(nll(z, y, t) <= nll(z, y, t * f) + 1e-9 for f in (0.97, 1.03))


def test_report_before_and_after():
    z, y = sampled()
    report = temperature_report(z, y)
    assert report.temperature == fit_temperature(z, y) and report.n == 1500
    assert report.ece_before == pytest.approx(ece(z, y)) and report.ece_before > 0.15
    assert report.ece_after < 0.06 and report.nll_after < report.nll_before
    # Cross-fitted: close to, and not below, the likelihood at the optimum of the same samples.
    assert nll(z, y, report.temperature) <= report.nll_after < nll(z, y, report.temperature) + 0.01
    assert temperature_report(z, y) == report and report.to_dict()["n"] == 1500


def test_ece_is_the_binned_gap():
    z, y = sampled(500)
    p = softmax(z, axis=1)
    confidence, right = p.max(1), p.argmax(1) == y
    bins = np.minimum((confidence * 15).astype(int), 14)
    by_hand = sum(abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert ece(z, y) == pytest.approx(by_hand, abs=1e-5)


def test_masked_columns_have_probability_zero():
    z, y = sampled(300)
    wider = np.concatenate([z, np.full((300, 1), -np.inf)], axis=1)
    assert fit_temperature(wider, y) == pytest.approx(fit_temperature(z, y), rel=1e-6)
    assert ece(wider, y) == pytest.approx(ece(z, y), abs=1e-6)
    with pytest.raises(UserError, match="a label is a masked class: column 5"):
        fit_temperature(wider, np.full(300, 5))


def test_separable_data_reach_the_end_of_the_range(caplog):
    with caplog.at_level(logging.WARNING):
        assert fit_temperature(np.eye(4) * 3, np.arange(4)) == pytest.approx(TEMPERATURE_RANGE[0])
    assert "end of its range" in caplog.text
    assert temperature_report(np.eye(3), [0, 1, 2]).n == 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0], "held-out logits with labels: 2 rows"), ([0, 5], "labels must be columns"), ([0, -1], "must be columns")],
)
def test_refuses(labels, message):
    with pytest.raises(UserError, match=message):
        fit_temperature(np.zeros((2, 3)), labels)
