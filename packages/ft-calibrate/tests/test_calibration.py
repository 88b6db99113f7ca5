"""`fit_calibration` by every method, the record it makes, and the JSON file."""

import dataclasses
import json
import logging
import tracemalloc

import numpy as np
import pytest
import torch
from ft_calibrate import repairs
from ft_calibrate.calibration import METHODS, Calibration, fit_calibration, read_calibration
from ft_calibrate.choices import val_gamma
from ft_calibrate.curve import seen_unseen_curve
from ft_calibrate.gap import average_logit_gap
from ft_calibrate.groups import class_groups
from ft_calibrate.pcv import Fold, pseudo_cross_validation, ratio_pcv
from scipy.special import log_softmax, softmax
from vfm_core.errors import UserError

K = 8
NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]
SEEN = [0, 1, 2, 3]
GROUPS = class_groups(NAMES, SEEN)


def problem(n=400, seed=0, bias=4.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, n)
    z = rng.normal(size=(n, K))
    z[np.arange(n), y] += 4
    z[:, 4:] -= bias
    return z, y


Z, Y = problem()
TRAIN = Z[Y < 4], Y[Y < 4]


def folds(n=3):
    found = []
    for seed in range(n):
        z, y = problem(300, seed + 1)
        own = np.isin(y, SEEN)
        z, y = z[own], y[own]
        pseudo = [seed % 4, (seed + 1) % 4]
        z[:, [c for c in SEEN if c not in pseudo]] -= 5
        train = np.isin(y, pseudo)
        found.append(Fold(z, y, pseudo, z[train], y[train]))
    return found


ARGUMENTS = {
    "alg": (*TRAIN, {}),
    "pcv": (None, None, {"folds": folds()}),
    "ratio-pcv": (*TRAIN, {"folds": folds()}),
    "oracle": (Z, Y, {}),
    "fixed": (None, None, {"gamma": 4.0}),
    "val": (Z, Y, {}),
    "rate": (Z, None, {"rate": 0.5}),
    "prior": (None, TRAIN[1], {}),
    "weight-align": (None, None, {"head_weight": np.random.default_rng(0).normal(size=(K, 4))}),
    "bic": (Z, Y, {}),
    "temperature-per-group": (Z, Y, {}),
}


def fit(method, **options):
    logits, labels, needed = ARGUMENTS[method]
    return fit_calibration(logits, labels, GROUPS, method, n_bootstrap=50, **{**needed, **options})


def test_every_method_is_tested():
    assert list(ARGUMENTS) == list(METHODS)
    assert {name for name, m in METHODS.items() if m.source == "paper"} == {"alg", "pcv", "oracle"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_record_that_survives_the_file(method, tmp_path):
    record = fit(method)
    again = read_calibration(record.write(tmp_path / "gamma.json"))
    assert again == record
    assert (again.predict(Z) == record.predict(Z)).all()
    assert record.chosen_on and record.created_with.startswith("ft-calibrate ") and record.classes == tuple(NAMES)
    known = {"oracle", "val", "bic", "temperature-per-group"}
    assert record.uses_absent_labels == (method in known)
    assert record.uses_test_labels == record.oracle == (method == "oracle")
    data = json.loads((tmp_path / "gamma.json").read_text())
    wanted = "version method gamma criterion seen absent n_train per_fold_gamma ci95 uses_absent_labels"
    assert data.keys() >= set(wanted.split()) | {"uses_test_labels", "created_with", "input_sha256"}


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"weight-align", "temperature-per-group"}))
def test_every_method_repairs_the_bias(method):
    assert (fit(method).predict(Z) == Y).mean() > (Z.argmax(1) == Y).mean() + 0.1


def test_gammas_are_those_of_the_functions():
    assert fit("alg").gamma == average_logit_gap(*TRAIN, SEEN)
    assert fit("oracle").gamma == val_gamma(Z, Y, GROUPS, n_bootstrap=0).gamma
    options = {"classes": NAMES, "seen": NAMES[:4]}
    pcv = pseudo_cross_validation(folds(), **options)
    assert (fit("pcv").gamma, fit("pcv").per_fold_gamma, fit("pcv").ci95) == (pcv.gamma, pcv.per_fold, pcv.ci95)
    ratio = ratio_pcv(folds(), fit("alg").gamma, **options)
    record = fit("ratio-pcv")
    assert record.gamma == ratio.gamma and record.details["multipliers"] == list(ratio.multipliers)
    assert record.details["gamma_alg"] == fit("alg").gamma and record.criterion == "balanced"
    assert fit("prior").shift == pytest.approx(repairs.prior_shift(TRAIN[1], GROUPS))
    assert fit("val", criterion="balanced").criterion == "balanced"


@pytest.mark.parametrize("method", ["alg", "val", "rate"])
def test_the_interval_holds_gamma(method):
    record = fit(method)
    assert record.ci95[0] <= record.gamma <= record.ci95[1] and record.ci95[0] < record.ci95[1]


def test_the_normal_interval_of_many_rows_is_the_bootstrap_one(monkeypatch):
    bootstrap = fit_calibration(*TRAIN, GROUPS, n_bootstrap=4000).ci95
    monkeypatch.setattr("ft_calibrate.methods._BOOTSTRAP_ROWS", 10)
    assert fit_calibration(*TRAIN, GROUPS).ci95 == pytest.approx(bootstrap, abs=0.02)


def test_leak_guard(caplog):
    with pytest.raises(UserError, match=r"must not see labels .* in labels: elk, fox.*allow_absent_labels=True"):
        fit_calibration(Z, Y, GROUPS)
    with pytest.raises(UserError, match="must not see labels"):
        fit_calibration(Z, Y, GROUPS, "ratio-pcv", folds=folds())
    with pytest.raises(UserError, match="must not see labels"):
        fit_calibration(None, Y, GROUPS, "prior")
    record = fit_calibration(Z, Y, GROUPS, allow_absent_labels=True)
    assert record.gamma == average_logit_gap(Z, Y, SEEN)
    assert record.uses_absent_labels and record.uses_test_labels and "not seen" in record.chosen_on
    assert "they count as test labels" in " ".join(record.notes) and "no row of" not in caplog.text
    held_out = fit_calibration(Z, Y, GROUPS, allow_absent_labels=True, uses_test_labels=False)
    assert held_out.uses_absent_labels and not held_out.uses_test_labels
    partly = fit_calibration(Z, np.where(Y < 4, Y, -1), GROUPS)
    assert partly.gamma == fit("alg").gamma and not partly.uses_absent_labels
    fit_calibration(Z, np.where((Y < 4) & (Y != 1), Y, -1), GROUPS)
    assert f"no row of the seen classes {GROUPS.classes[1]}: are they absent?" in caplog.text


@pytest.mark.parametrize("method", ["alg", "ratio-pcv"])
def test_probabilities_are_refused_as_logits(method):
    with pytest.raises(UserError, match="input='prob', --input prob"):
        fit_calibration(softmax(TRAIN[0], axis=1), TRAIN[1], GROUPS, method, folds=folds())


def test_probabilities_are_logged_when_they_are_declared(caplog):
    p = softmax(TRAIN[0], axis=1)
    record = fit_calibration(p, TRAIN[1], GROUPS, input="prob")
    assert record.gamma == pytest.approx(fit("alg").gamma, abs=1e-6) and record.input_kind == "prob"
    assert (record.predict(softmax(Z, axis=1)) == fit("alg").predict(Z)).all()
    assert (record.predict(Z) == fit("alg").predict(Z)).all()  # logits are told apart
    q = p.copy()
    q[0, 7] = q[1, 7] = 0
    with caplog.at_level(logging.WARNING):
        zeroed = fit_calibration(q, TRAIN[1], GROUPS, input="prob")
    assert "2 probabilities are exactly 0" in caplog.text and "2 probabilities" in zeroed.notes[0]
    more = (np.log(p[:2, 7]) - np.log(1e-30)).sum() / 4 / len(p)
    assert zeroed.gamma == pytest.approx(record.gamma + more, abs=1e-9)
    with caplog.at_level(logging.WARNING):
        fit_calibration(softmax(Z, axis=1), None, GROUPS, "rate", rate=0.5)
    assert "look like probabilities" in caplog.text


def test_pcv_logs_the_probabilities_of_its_folds():
    as_probs = [
        Fold(softmax(f.logits, axis=1), f.labels, f.pseudo_seen, softmax(f.train_logits, axis=1), f.train_labels)
        for f in folds()
    ]
    found = fit_calibration(softmax(TRAIN[0], axis=1), TRAIN[1], GROUPS, "ratio-pcv", folds=as_probs, input="prob")
    assert found.gamma == pytest.approx(fit("ratio-pcv").gamma, abs=1e-6)


def test_log_probabilities_give_the_same_gamma_and_predictions():
    record = fit_calibration(log_softmax(TRAIN[0], axis=1), TRAIN[1], GROUPS, input="logprob")
    assert record.gamma == pytest.approx(fit("alg").gamma, abs=1e-6) and record.input_kind == "logprob"
    assert (record.predict(log_softmax(Z, axis=1)) == fit("alg").predict(Z)).all()
    with pytest.raises(UserError, match="not log-probabilities"):
        fit_calibration(*TRAIN, GROUPS, input="logprob")
    with pytest.raises(UserError, match="not a probability"):
        fit_calibration(*TRAIN, GROUPS, input="prob")
    with pytest.raises(UserError, match="unknown kind of input"):
        fit_calibration(*TRAIN, GROUPS, input="odds")


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("algs", TRAIN, "did you mean alg"),
        ("alg", (None, TRAIN[1]), "method alg needs logits"),
        ("alg", (TRAIN[0], None), "method alg needs labels"),
        ("fixed", (None, None), "finite gamma"),
        ("rate", (Z, None), "needs a rate"),
        ("pcv", (None, None), "needs folds"),
        ("weight-align", (None, None), "needs the head"),
        ("alg", (TRAIN[0][:, :5], TRAIN[1]), "5 columns for 8 classes"),
        ("alg", (TRAIN[0], TRAIN[1][1:]), "differ in length"),
        ("val", TRAIN, "needs labelled samples of absent classes"),
    ],
)
def test_what_is_missing_is_named(method, arguments, message):
    with pytest.raises(UserError, match=message):
        fit_calibration(*arguments, GROUPS, method)


def test_one_seen_class_names_the_other_methods():
    one = class_groups(NAMES, [0])
    with pytest.raises(UserError, match="--method rate or --method fixed"):
        fit_calibration(Z[Y == 0], Y[Y == 0], one)
    assert fit_calibration(Z, None, one, "rate", rate=0.8).gamma > 0


@pytest.mark.parametrize("method", METHODS)
def test_nothing_absent_is_gamma_zero_with_a_note(method):
    logits, labels, needed = ARGUMENTS[method]
    record = fit_calibration(logits, labels, class_groups(NAMES, NAMES), method, **needed)
    assert record.gamma == 0 and "no class is absent" in " ".join(record.notes)
    assert (record.apply(Z) == Z).all()


def test_nothing_absent_is_told_once(caplog):
    names = ["ant", "bee", "cat", "dog"]
    y = np.arange(40) % 4
    z = np.eye(4)[y] * 3.0
    with caplog.at_level(logging.WARNING):
        record = fit_calibration(z, y, class_groups(names, names), temperature=True)
        assert len(record.groups.absent) == 0
    assert caplog.text.count("absent") == 1
    caplog.clear()
    rest = class_groups(names, names[:2], [])  # nobody else says it when classes remain
    with caplog.at_level(logging.WARNING):
        assert fit_calibration(z, np.where(y < 2, y, -1), rest, remaining="keep").gamma == 0
    assert caplog.text.count("no class is absent") == 1


@pytest.mark.parametrize("method", ["oracle", "val"])
def test_absent_samples_are_asked_for_by_the_name_of_the_method(method):
    with pytest.raises(UserError, match=f"method {method} needs labelled samples of absent classes"):
        fit_calibration(*TRAIN, GROUPS, method)


@pytest.mark.parametrize("remaining", ["absent", "keep", "exclude"])
@pytest.mark.parametrize("criterion", ["overall", "balanced"])
def test_the_oracle_is_the_best_gamma_of_the_curve_with_remaining_samples(remaining, criterion):
    groups = class_groups(NAMES, SEEN, ["elk", "fox"])  # gnu and hen remain, and have samples
    z = Z.copy()
    z[:, 6:] -= 2  # they would pull gamma up
    curve = seen_unseen_curve(z, Y, groups, remaining=remaining)
    assert curve.n_rest == (0 if remaining == "exclude" else int((Y > 5).sum()))
    found = fit_calibration(z, Y, groups, "oracle", criterion=criterion, remaining=remaining, n_bootstrap=0)
    best = curve.best(criterion)
    assert found.gamma == pytest.approx(best.gamma, abs=1e-9) and found.details["value"] == best.value


def test_fitting_a_large_matrix_takes_little_more_than_the_matrix():
    rng = np.random.default_rng(0)
    z, y = rng.standard_normal((20_000, 200), dtype=np.float32), rng.integers(0, 100, 20_000)
    groups = class_groups(200, rng.permutation(200)[:100].tolist())
    y = groups.seen[y]
    expected = fit_calibration(z[:50], y[:50], groups).gamma  # imports and warms up
    assert np.isfinite(expected)
    tracemalloc.start()
    try:
        fit_calibration(z, y, groups, n_bootstrap=0)
        fitted = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        average_logit_gap(z, y, groups.seen)
        gap = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert fitted < 0.8 * z.nbytes and gap < 0.8 * z.nbytes


def test_a_few_rows_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        fit_calibration(TRAIN[0][:20], TRAIN[1][:20], GROUPS)
    assert "only 20 labelled rows" in caplog.text


def test_apply_is_scale_shift_and_gamma_by_name():
    scale, shift = tuple(np.linspace(0.5, 2, K)), tuple(np.linspace(-1, 1, K))
    record = Calibration("fixed", 3.0, tuple(NAMES), ("ant", "bee"), ("cat", "dog"), tuple(NAMES[4:]),
                         scale=scale, shift=shift)  # fmt: skip
    moved = np.arange(K) >= 2
    expected = Z * scale + shift + 3 * moved
    assert record.apply(Z) == pytest.approx(expected)
    order = np.random.default_rng(0).permutation(K)
    names = [NAMES[i] for i in order]
    assert record.apply(Z[:, order], names) == pytest.approx(expected[:, order])
    assert [names[c] for c in record.predict(Z[:, order], names)] == [NAMES[c] for c in expected.argmax(1)]
    assert record.apply(Z[:, :3], NAMES[:3]) == pytest.approx(expected[:, :3])
    keep = dataclasses.replace(record, remaining_mode="keep")
    assert keep.bias().tolist() == (np.array(shift) + 3 * np.isin(np.arange(K), [2, 3])).tolist()
    out = dataclasses.replace(record, remaining_mode="exclude").apply(Z)
    assert np.isneginf(out[:, 4:]).all() and np.isfinite(out[:, :4]).all()
    with pytest.raises(UserError, match="classes that the calibration does not know in classes: owl"):
        record.apply(Z, [*NAMES[:7], "owl"])
    with pytest.raises(UserError, match=r"5 columns for 8 classes.*class names"):
        record.apply(Z[:, :5])
    with pytest.raises(UserError, match="repeat"):
        record.apply(Z, ["ant"] * K)


def test_apply_keeps_the_kind_and_precision_of_the_scores(caplog):
    record = fit("fixed")
    assert record.apply(Z.astype(np.float32)).dtype == np.float32 and record.apply(Z.tolist()).dtype == np.float64
    t = record.apply(torch.from_numpy(Z).float().requires_grad_())
    assert isinstance(t, torch.Tensor) and t.dtype == torch.float32 and not t.requires_grad
    assert record.apply(torch.from_numpy(Z).bfloat16()).dtype == torch.bfloat16
    assert (record.predict(torch.from_numpy(Z)).numpy() == record.predict(Z)).all()
    p = record.probabilities(torch.from_numpy(Z))
    assert isinstance(p, torch.Tensor) and p.sum(1).numpy() == pytest.approx(1)
    with caplog.at_level(logging.WARNING):
        record.apply(softmax(Z, axis=1))
    assert "look like probabilities" in caplog.text


def test_apply_keeps_masked_columns_masked():
    z = Z.copy()
    z[:, 5] = -np.inf
    assert np.isneginf(fit("bic").apply(z)[:, 5]).all()


@pytest.mark.parametrize("method", ["alg", "val", "prior", "fixed", "pcv"])
def test_a_temperature_changes_confidence_and_never_predictions(method):
    held = problem(200, seed=9)
    record = fit(method, temperature=True, held_out=held)
    plain = fit(method)
    assert record.gamma == plain.gamma and (record.predict(Z) == plain.predict(Z)).all()
    assert record.temperature != 1 and record.confidence["n"] == int((held[1] < 4).sum())
    assert "held-out" in record.confidence["data"]
    assert record.probabilities(Z) == pytest.approx(softmax(record.apply(Z) / record.temperature, axis=1))
    assert record.confidence["ece_after"] < record.confidence["ece_before"]


def test_a_temperature_without_held_out_data_sets_rows_aside():
    record = fit("alg", temperature=True)
    assert record.gamma == fit("alg").gamma and record.confidence["n"] == int(np.ceil(len(TRAIN[1]) / 5))
    assert "set aside" in record.confidence["data"]
    with pytest.raises(UserError, match="held_out"):
        fit("rate", temperature=True)
    with pytest.raises(UserError, match="too few seen rows"):
        fit_calibration(TRAIN[0][:4], TRAIN[1][:4], GROUPS, temperature=True)


def test_the_hash_is_that_of_the_input():
    assert fit("alg").input_sha256 == fit("alg").input_sha256 != fit("val").input_sha256
    assert fit("alg", input_sha256="ab").input_sha256 == "ab" and fit("fixed").input_sha256 is None
    assert fit("alg", input_kind="prob").input_kind == "prob"


def test_group_temperature_can_be_given():
    record = fit_calibration(None, None, GROUPS, "temperature-per-group", group_temperature=0.5)
    assert record.scale == (1, 1, 1, 1, 2, 2, 2, 2) and not record.uses_absent_labels
    with pytest.raises(UserError, match="temperature must be positive"):
        fit_calibration(None, None, GROUPS, "temperature-per-group", group_temperature=-1.0)


def test_bic_on_seen_shifts_the_seen_logits():
    record = fit("bic", bic_on="seen")
    assert record.gamma == 0 and all(b < 0 for b in record.shift[:4]) and record.shift[4:] == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "update it"),
        ({"gamma": None}, "wrong type"),
        ({"gamma": float("inf")}, "gamma must be finite"),
        ({"seen": ["ant", "owl"]}, "seen classes that are not among the classes"),
        ({"remaining": ["hen"]}, "do not cover|both"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"scale": [1, 2]}, "one finite number per class"),
        ({"scale": [-1] * K}, "scale must be positive"),
        ({"input_kind": "odds"}, "unknown kind of input"),
        ({"remaining_mode": "drop"}, "unknown treatment"),
        ({"method": ...}, "it needs version, method"),
    ],
)
def test_bad_files_are_named(change, message, tmp_path):
    path = tmp_path / "gamma.json"
    data = {**fit("fixed").to_dict(), **change}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))
    with pytest.raises(UserError, match=message) as error:
        read_calibration(path)
    assert str(path) in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="no such calibration file"):
        read_calibration(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="unreadable"):
        read_calibration(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="no calibration file"):
        read_calibration(tmp_path / "list.json")
