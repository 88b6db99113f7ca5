"""The scikit-learn estimators: the library's own checks, and gamma through them."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from ft_calibrate.calibration import fit_calibration
from ft_calibrate.estimators import AbsentClassBias, AbsentClassCalibrator, AbsentClassClassifier
from ft_calibrate.groups import class_groups
from ft_calibrate.pcv import Fold
from scipy.special import log_softmax, softmax
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from vfm_core.errors import UserError

_COLUMNS = "the check has 3 classes on 2 features, but the features of this estimator are the logits of the classes"
_ON_LOGITS = {
    "check_estimators_overwrite_params": _COLUMNS,
    "check_estimators_fit_returns_self": _COLUMNS,
    "check_readonly_memmap_input": _COLUMNS,
}
EXPECTED = {
    "AbsentClassCalibrator": {
        **_ON_LOGITS,
        "check_classifiers_classes": _COLUMNS,
        "check_classifiers_train": _COLUMNS,
    },
    "AbsentClassBias": _ON_LOGITS,
    "AbsentClassClassifier": {},
}


@parametrize_with_checks(
    [
        AbsentClassCalibrator(),
        AbsentClassBias(),
        AbsentClassClassifier(LogisticRegression()),
        AbsentClassClassifier(GaussianNB()),
    ],
    expected_failed_checks=lambda estimator: EXPECTED[type(estimator).__name__],
)
def test_scikit_learn_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


K = 8
SEEN = [0, 1, 2, 3]
NAMES = np.array(["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"])


def problem(n=400, seed=0, bias=4.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, n)
    z = rng.normal(size=(n, K))
    z[np.arange(n), y] += 4
    z[:, 4:] -= bias
    return z, y


Z, Y = problem()
OWN = Y < 4
GAMMA = fit_calibration(Z[OWN], Y[OWN], class_groups(K, SEEN)).gamma


@pytest.mark.parametrize("labels", ["integers", "strings", "float integers", "other integers"])
def test_labels_of_any_kind(labels):
    names = {"integers": np.arange(K), "strings": NAMES, "float integers": np.arange(K) * 1.0,
             "other integers": np.arange(K) * 10 + 7}[labels]  # fmt: skip
    classes = names if labels in ("strings", "other integers") else None
    model = AbsentClassCalibrator(classes=classes).fit(Z[OWN], names[Y[OWN]])
    assert model.gamma_ == GAMMA and model.n_features_in_ == K
    assert model.classes_.tolist() == names.tolist()
    assert (model.seen_.tolist(), model.absent_.tolist()) == (names[:4].tolist(), names[4:].tolist())
    calibrated = Z + GAMMA * (np.arange(K) >= 4)
    assert (model.predict(Z) == names[calibrated.argmax(1)]).all()
    assert model.score(Z, names[Y]) > (Z.argmax(1) == Y).mean() + 0.2
    assert model.decision_function(Z) == pytest.approx(calibrated)
    assert model.predict_proba(Z) == pytest.approx(softmax(calibrated, axis=1))


def test_classes_in_another_order_than_sorted():
    order = np.random.default_rng(1).permutation(K)
    model = AbsentClassCalibrator(classes=NAMES[order]).fit(Z[OWN][:, order], NAMES[Y[OWN]])
    sorted_model = AbsentClassCalibrator(classes=NAMES).fit(Z[OWN], NAMES[Y[OWN]])
    assert model.gamma_ == pytest.approx(GAMMA)
    assert (model.predict(Z[:, order]) == sorted_model.predict(Z)).all()


def test_all_classes_seen_is_gamma_zero():
    model = AbsentClassCalibrator().fit(Z, Y)
    assert model.gamma_ == 0 and len(model.absent_) == 0 and (model.predict(Z) == Z.argmax(1)).all()


def test_the_leak_guard_and_seen_classes():
    with pytest.raises(UserError, match="must not see labels"):
        AbsentClassCalibrator(seen_classes=SEEN).fit(Z, Y)
    model = AbsentClassCalibrator(seen_classes=SEEN, allow_absent_labels=True).fit(Z, Y)
    assert model.calibration_.uses_absent_labels
    assert AbsentClassCalibrator(seen_classes={0, 1, 2, 3}).fit(Z[OWN], Y[OWN]).gamma_ == GAMMA
    with pytest.raises(UserError, match="in seen_classes: 9"):
        AbsentClassCalibrator(seen_classes=[0, 9]).fit(Z[OWN], Y[OWN])
    with pytest.raises(UserError, match="in seen_classes: ant"):
        AbsentClassCalibrator(seen_classes=["ant"]).fit(Z[OWN], Y[OWN])


def test_absent_and_remaining_classes():
    model = AbsentClassBias(absent_classes=[4, 5], remaining="exclude").fit(Z[OWN], Y[OWN])
    assert model.absent_.tolist() == [4, 5] and np.isneginf(model.transform(Z)[:, 6:]).all()
    kept = AbsentClassBias(absent_classes=[4, 5], remaining="keep").fit(Z[OWN], Y[OWN])
    assert (kept.transform(Z)[:, 6:] == Z[:, 6:]).all() and kept.gamma_ == model.gamma_


def test_labels_that_do_not_tell_the_columns():
    with pytest.raises(UserError, match="pass classes="):
        AbsentClassCalibrator().fit(Z[OWN], NAMES[Y[OWN]])
    with pytest.raises(UserError, match="name every column once"):
        AbsentClassCalibrator(classes=NAMES[:5]).fit(Z[OWN], NAMES[Y[OWN]])
    with pytest.raises(UserError, match="no class of a column in y: owl"):
        AbsentClassCalibrator(classes=NAMES).fit(Z[:2], ["owl", "ant"])
    with pytest.raises(ValueError, match="NaN"):
        AbsentClassCalibrator().fit(np.full((2, 3), np.nan), [0, 1])


@pytest.mark.parametrize(
    ("options", "logits", "labels"),
    [
        ({"method": "fixed", "gamma": 3.0, "seen_classes": SEEN}, Z, None),
        ({"method": "rate", "rate": 0.5, "seen_classes": SEEN}, Z, None),
        ({"method": "val", "seen_classes": SEEN, "criterion": "balanced"}, Z, Y),
        ({"method": "oracle", "seen_classes": SEEN}, Z, Y),
        ({"method": "bic", "seen_classes": SEEN}, Z, Y),
        ({"method": "prior"}, Z[OWN], Y[OWN]),
        ({"method": "weight-align", "head_weight": np.ones((K, 2)), "seen_classes": SEEN}, Z, None),
        ({"method": "pcv", "folds": [Fold(Z[OWN], Y[OWN], [0, 1])], "seen_classes": SEEN}, Z, None),
    ],
    ids=lambda value: value.get("method") if isinstance(value, dict) else "",
)
def test_other_methods(options, logits, labels):
    model = AbsentClassCalibrator(**options).fit(logits, labels)
    names = {k: v for k, v in options.items() if k not in ("method", "seen_classes")}
    columns = None if labels is None else labels
    record = fit_calibration(logits, columns, class_groups(K, SEEN), options["method"], **names)
    assert model.calibration_ == record and (model.predict(Z) == record.predict(Z)).all()


def test_the_criterion_is_each_methods_own():
    folds = [Fold(Z[OWN], Y[OWN], [0, 1])]
    assert AbsentClassCalibrator(SEEN, "pcv", folds=folds).fit(Z).calibration_.criterion == "balanced"
    assert AbsentClassCalibrator(SEEN, "val").fit(Z, Y).calibration_.criterion == "overall"
    assert AbsentClassClassifier(LogisticRegression()).criterion is None


def test_methods_without_labels_need_the_seen_classes():
    with pytest.raises(UserError, match="seen classes must be given"):
        AbsentClassCalibrator(method="rate", rate=0.5).fit(Z)
    with pytest.raises(UserError, match="requires y to be passed, but the target y is None"):
        AbsentClassCalibrator(seen_classes=SEEN).fit(Z)


def test_probabilities_and_log_probabilities():
    p = softmax(Z, axis=1)
    with pytest.raises(UserError, match="probabilities"):
        AbsentClassCalibrator().fit(p[OWN], Y[OWN])
    logits = AbsentClassCalibrator().fit(Z[OWN], Y[OWN]).predict(Z)
    for kind, scores in (("prob", p), ("logprob", log_softmax(Z, axis=1))):
        model = AbsentClassCalibrator(input=kind).fit(scores[OWN], Y[OWN])
        assert model.gamma_ == pytest.approx(GAMMA, abs=1e-6) and (model.predict(scores) == logits).all()


def test_temperature_changes_probabilities_only():
    held = problem(200, seed=5)
    own = held[1] < 4
    plain = AbsentClassCalibrator(classes=NAMES).fit(Z[OWN], NAMES[Y[OWN]])
    options = {"temperature": True, "held_out": (held[0][own], NAMES[held[1][own]])}
    warm = AbsentClassCalibrator(classes=NAMES, **options).fit(Z[OWN], NAMES[Y[OWN]])
    assert warm.gamma_ == plain.gamma_ and (warm.predict(Z) == plain.predict(Z)).all()
    assert warm.calibration_.temperature != 1 and warm.calibration_.confidence["n"] == own.sum()
    assert not np.allclose(warm.predict_proba(Z), plain.predict_proba(Z))


def test_tensors_come_back_as_tensors():
    z, y = torch.from_numpy(Z).float(), torch.from_numpy(Y)
    model = AbsentClassCalibrator().fit(z[torch.from_numpy(OWN)], y[torch.from_numpy(OWN)])
    assert model.gamma_ == pytest.approx(GAMMA, abs=1e-5)
    for result in (model.predict(z), model.decision_function(z), model.predict_proba(z)):
        assert isinstance(result, torch.Tensor)
    assert model.decision_function(z).dtype == torch.float32
    assert (model.predict(z).numpy() == model.predict(Z.astype(np.float32))).all()
    assert isinstance(AbsentClassBias().fit(Z[OWN], Y[OWN]).transform(z.bfloat16()), torch.Tensor)
    named = AbsentClassCalibrator(classes=NAMES).fit(Z[OWN], NAMES[Y[OWN]])
    assert isinstance(named.predict(z), np.ndarray)


def test_two_classes_have_one_score():
    model = AbsentClassCalibrator(seen_classes=[0], method="fixed", gamma=2.0).fit(Z[:, :2], None)
    assert model.decision_function(Z[:, :2]) == pytest.approx(Z[:, 1] + 2 - Z[:, 0])
    assert (model.predict(Z[:, :2]) == (model.decision_function(Z[:, :2]) > 0)).all()


@pytest.mark.parametrize("model", [AbsentClassCalibrator(), AbsentClassBias()])
def test_clone_and_pickle(model):
    model = clone(model).set_params(method="fixed", gamma=1.5)
    copy = clone(model)
    assert copy.get_params() == model.get_params() and not hasattr(copy, "gamma_")
    fitted = pickle.loads(pickle.dumps(model.fit(Z[OWN], Y[OWN])))
    assert fitted.gamma_ == 1.5 and fitted.calibration_ == model.calibration_


def test_in_a_pipeline_and_a_grid_search():
    pipe = make_pipeline(
        FunctionTransformer(lambda z: z * 2), AbsentClassBias(), FunctionTransformer(np.argmax, kw_args={"axis": 1})
    )
    assert (pipe.fit(Z[OWN], Y[OWN]).transform(Z) == AbsentClassCalibrator().fit(Z[OWN], Y[OWN]).predict(Z)).all()
    assert AbsentClassBias(classes=NAMES).fit(Z[OWN], NAMES[Y[OWN]]).get_feature_names_out().tolist() == NAMES.tolist()
    grid = {"gamma": [0.0, 4.0, 12.0]}
    search = GridSearchCV(AbsentClassCalibrator(SEEN, "fixed"), grid, cv=3).fit(Z, Y)
    assert search.best_params_ == {"gamma": 4.0}
    final = make_pipeline(FunctionTransformer(), AbsentClassCalibrator(SEEN, "val"))
    assert final.fit(Z, Y).score(Z, Y) > 0.8


def raw_features(seed=0, n=600):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 6, n)
    centres = np.random.default_rng(99).normal(size=(6, 10)) * 1.5
    return centres[y] + rng.normal(size=(n, 10)), y


def test_a_classifier_that_was_updated_on_some_classes_is_repaired():
    """Fitted on all classes, then updated on three of them: the others collapse, and gamma brings them back."""
    x, y = raw_features()
    names = np.array(list("abcdef"))
    model = SGDClassifier(loss="log_loss", alpha=1e-3, random_state=0).fit(x, names[y])
    own = y < 3
    for _ in range(20):
        model.partial_fit(x[own], names[y[own]])
    test_x, test_y = raw_features(1)
    absent = test_y >= 3
    before = (model.predict(test_x) == names[test_y])[absent].mean()
    repaired = AbsentClassClassifier(FrozenEstimator(model)).fit(x[own], names[y[own]])
    after = (repaired.predict(test_x) == names[test_y])[absent].mean()
    assert repaired.gamma_ > 0 and after > before + 0.1
    assert repaired.absent_.tolist() == ["d", "e", "f"] and repaired.n_features_in_ == 10
    assert (repaired.predict_proba(test_x).argmax(1) == repaired.decision_function(test_x).argmax(1)).all()
    again = pickle.loads(pickle.dumps(repaired))
    assert (again.predict(test_x) == repaired.predict(test_x)).all()


@pytest.mark.parametrize("inner", [GaussianNB(), SVC(), LogisticRegression()])
def test_scores_of_any_classifier(inner):
    x, y = raw_features()
    fitted = clone(inner).fit(x, y)
    own = y < 3
    model = AbsentClassClassifier(FrozenEstimator(fitted), method="fixed", gamma=0.0).fit(x[own], y[own])
    expected = (
        fitted.predict_proba(x).argmax(1) if isinstance(inner, GaussianNB) else fitted.decision_function(x).argmax(1)
    )
    assert (model.predict(x) == expected).all()
    lifted = AbsentClassClassifier(FrozenEstimator(fitted), method="fixed", gamma=1e3).fit(x[own], y[own])
    assert (lifted.predict(x) >= 3).all()


def test_weight_align_takes_the_coefficients():
    x, y = raw_features()
    fitted = LogisticRegression().fit(x, y)
    own = y < 3
    model = AbsentClassClassifier(FrozenEstimator(fitted), method="weight-align").fit(x[own], y[own])
    norms = np.linalg.norm(fitted.coef_, axis=1)
    assert model.calibration_.scale[3] == pytest.approx(norms[:3].mean() / norms[3:].mean())


def test_one_score_per_pair_is_refused():
    x, y = raw_features()
    fitted = SVC(decision_function_shape="ovo").fit(x, y)
    with pytest.raises(UserError, match=r"one score per class: 15 for 6.*'ovr'"):
        AbsentClassClassifier(FrozenEstimator(fitted)).fit(x, y)
    with pytest.raises(UserError, match="must not see labels"):
        AbsentClassClassifier(FrozenEstimator(SVC().fit(x, y)), seen_classes=[0, 1]).fit(x, y)
