"""Pseudo cross-validation from logits: the definition, its options, and the leaks it refuses."""

import logging

import numpy as np
import pytest
from ft_calibrate.curve import seen_unseen_curve
from ft_calibrate.gap import average_logit_gap
from ft_calibrate.pcv import Fold, pseudo_cross_validation, ratio_pcv
from vfm_core.errors import UserError

K = 12
SEEN = list(range(8))  # 8..11 are absent


def make_fold(seed=0, bias=4.0, n=300, **options):
    """Logits of a pseudo model: every class it was not trained on is too low by ``bias``."""
    rng = np.random.default_rng(seed)
    pseudo = np.sort(rng.permutation(SEEN)[:4])
    y = rng.choice(SEEN, n)

    def logits(labels):
        z = rng.normal(size=(len(labels), K)) * 0.5
        z[np.arange(len(labels)), labels] += 5
        z[:, np.setdiff1d(np.arange(K), pseudo)] -= bias
        return z

    train = rng.choice(pseudo, 80)
    return Fold(logits(y), y, pseudo, train_logits=logits(train), train_labels=train, **options)


@pytest.mark.parametrize("criterion", ["balanced", "overall", "harmonic"])
@pytest.mark.parametrize("columns", ["pseudo", "all"])
def test_is_the_mean_of_the_best_gammas(criterion, columns):
    folds = [make_fold(seed, bias) for seed, bias in enumerate((3.0, 4.0, 6.0))]
    found = pseudo_cross_validation(folds, criterion, columns, seen=SEEN)
    expected = []
    for fold in folds:
        absent = [c for c in SEEN if c not in fold.pseudo_seen] + ([8, 9, 10, 11] if columns == "all" else [])
        curve = seen_unseen_curve(fold.logits, fold.labels, fold.pseudo_seen, absent, remaining="exclude")
        expected.append(curve.best(criterion).gamma)
    assert found.per_fold == tuple(expected)
    assert found.gamma == pytest.approx(np.mean(expected)) and found.std == pytest.approx(np.std(expected, ddof=1))
    assert found.ci95[0] < found.gamma < found.ci95[1]
    assert (found.method, found.criterion, found.columns, found.skipped) == ("pcv", criterion, columns, ())
    assert [g == pytest.approx(b, abs=1.5) for g, b in zip(found.per_fold, (3, 4, 6))] == [True] * 3


def test_columns_pseudo_ignores_the_absent_columns_and_columns_all_does_not():
    fold = make_fold()
    loud = fold.logits.copy()
    loud[:, 8:] += 30
    pseudo = [pseudo_cross_validation([Fold(z, fold.labels, fold.pseudo_seen)], seen=SEEN) for z in (fold.logits, loud)]
    assert pseudo[0].gamma == pseudo[1].gamma
    both = pseudo_cross_validation([Fold(loud, fold.labels, fold.pseudo_seen)], columns="all", seen=SEEN)
    assert both.gamma < pseudo[0].gamma - 5


def test_the_real_groups_come_from_seen_or_from_the_fold():
    fold = make_fold()
    by_seen = pseudo_cross_validation([fold], seen=SEEN)
    with_absent = Fold(fold.logits, fold.labels, fold.pseudo_seen, absent=[8, 9, 10, 11])
    assert pseudo_cross_validation([with_absent]).gamma == by_seen.gamma
    only_seen_columns = Fold(fold.logits[:, :8], fold.labels, fold.pseudo_seen)
    assert pseudo_cross_validation([only_seen_columns]).gamma == by_seen.gamma
    names = [f"c{i:02d}" for i in range(K)]
    named = Fold(fold.logits, [names[c] for c in fold.labels], [names[c] for c in fold.pseudo_seen])
    assert pseudo_cross_validation([named], classes=names, seen=names[:8]).gamma == by_seen.gamma


def test_median_and_single_folds_have_no_interval():
    folds = [make_fold(seed, bias) for seed, bias in enumerate((3.0, 4.0, 9.0))]
    middle = pseudo_cross_validation(folds, reduce="median", seen=SEEN)
    assert middle.gamma == sorted(middle.per_fold)[1] and middle.ci95 is None and middle.std > 0
    one = pseudo_cross_validation(folds[:1], seen=SEEN)
    assert one.ci95 is None and np.isnan(one.std)


def test_ratio_pcv_multiplies_the_gap_of_the_real_model():
    folds = [make_fold(seed, bias) for seed, bias in enumerate((3.0, 4.0, 6.0))]
    gammas = pseudo_cross_validation(folds, seen=SEEN).per_fold
    ratios = []
    for fold, gamma in zip(folds, gammas):
        absent = [c for c in SEEN if c not in fold.pseudo_seen]
        options = {"absent": absent, "remaining": "exclude"}
        ratios.append(gamma / average_logit_gap(fold.train_logits, fold.train_labels, fold.pseudo_seen, **options))
    found = ratio_pcv(folds, 5.0, seen=SEEN)
    assert found.multipliers == pytest.approx(ratios) and found.per_fold == gammas
    assert found.gamma == pytest.approx(5 * np.mean(ratios)) and found.gamma_alg == 5.0
    assert found.std == pytest.approx(5 * np.std(ratios, ddof=1)) and found.ci95[0] < found.gamma < found.ci95[1]
    assert found.to_dict()["method"] == "ratio-pcv"


def test_a_fold_whose_gap_is_not_positive_has_no_ratio(caplog):
    good, odd = make_fold(0), make_fold(1, bias=-3.0, name="odd")
    with caplog.at_level(logging.WARNING):
        found = ratio_pcv([good, odd], 5.0, seen=SEEN)
    assert len(found.multipliers) == 1 and "odd" in found.skipped[0] and "not positive" in caplog.text


def test_a_fold_with_one_pseudo_seen_class_has_no_ratio_and_does_not_stop_the_others(caplog):
    good, one = make_fold(0), make_fold(1)
    lone = one.pseudo_seen[:1]
    rows = one.train_labels == lone[0]
    one = Fold(one.logits, one.labels, lone, one.train_logits[rows], one.train_labels[rows], name="lonely")
    with caplog.at_level(logging.WARNING):
        found = ratio_pcv([good, one], 2.0, seen=SEEN)
    assert found.gamma == ratio_pcv([good], 2.0, seen=SEEN).gamma and len(found.multipliers) == 1
    assert "lonely" in caplog.text and "fewer than two seen classes" in found.skipped[0]
    with pytest.raises(UserError, match="no fold can be used in folds: lonely"):
        ratio_pcv([one], 2.0, seen=SEEN)
    bad = np.full_like(good.train_logits, np.nan)
    with pytest.raises(UserError, match="fold sick, train_logits"):
        ratio_pcv(
            [Fold(good.logits, good.labels, good.pseudo_seen, bad, good.train_labels, name="sick")], 2.0, seen=SEEN
        )


def test_source_floor_skips_and_reports_folds_that_cannot_meet_it():
    folds = [make_fold(0, floor=0.3), make_fold(1, floor=1.0, name="high"), make_fold(2, floor=-1, name="out")]
    noisy = Fold(folds[1].logits + np.random.default_rng(0).normal(size=(300, K)) * 4, folds[1].labels,
                 folds[1].pseudo_seen, floor=1.0, name="high")  # fmt: skip
    found = pseudo_cross_validation([folds[0], noisy, folds[2]], "source-floor", seen=SEEN)
    assert len(found.per_fold) == 1
    assert found.skipped[0].startswith("high: no gamma reaches") and found.skipped[1].startswith("out: marked")
    with pytest.raises(UserError, match=r"no fold can be used.*high.*out"):
        pseudo_cross_validation([noisy, folds[2]], "source-floor", seen=SEEN)
    with pytest.raises(UserError, match=r"source-floor needs .*Fold.floor"):
        pseudo_cross_validation([make_fold()], "source-floor", seen=SEEN)


def test_a_floor_binds():
    fold = make_fold(3, bias=4.0, n=600)
    fold = Fold(
        fold.logits + np.random.default_rng(5).normal(size=fold.logits.shape) * 2, fold.labels, fold.pseudo_seen
    )
    absent = [c for c in SEEN if c not in fold.pseudo_seen]
    curve = seen_unseen_curve(fold.logits, fold.labels, fold.pseudo_seen, absent, remaining="exclude")
    free = curve.best("overall")
    floor = (free.point.unseen + curve.unseen[-1]) / 2
    floored = Fold(fold.logits, fold.labels, fold.pseudo_seen, floor=floor)
    found = pseudo_cross_validation([floored], "source-floor", seen=SEEN)
    assert found.gamma > free.gamma and curve.at(found.gamma).unseen >= floor


def test_labels_of_absent_classes_are_a_leak():
    fold = make_fold()
    y = fold.labels.copy()
    y[0] = 9
    with pytest.raises(UserError, match="labels of absent classes in a pseudo-validation fold in fold 0: 9"):
        pseudo_cross_validation([Fold(fold.logits, y, fold.pseudo_seen)], seen=SEEN)
    with pytest.raises(UserError, match=r"pseudo-seen classes that are not seen.*: 9"):
        pseudo_cross_validation([Fold(fold.logits, fold.labels, [0, 1, 9])], seen=SEEN)


def test_a_grid_search_on_seen_labels_is_refused():
    fold = make_fold()
    own = np.isin(fold.labels, fold.pseudo_seen)
    with pytest.raises(UserError, match="on seen labels alone no gamma above 0 can ever win"):
        pseudo_cross_validation([Fold(fold.logits[own], fold.labels[own], fold.pseudo_seen)], seen=SEEN)
    with pytest.raises(UserError, match="no sample of a pseudo-seen class"):
        pseudo_cross_validation([Fold(fold.logits[~own], fold.labels[~own], fold.pseudo_seen)], seen=SEEN)
    with pytest.raises(UserError, match="no pseudo-absent class is left"):
        pseudo_cross_validation([Fold(fold.logits, fold.labels, SEEN)], seen=SEEN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "best"}, "unknown criterion: 'best'"),
        ({"columns": "some"}, "unknown columns: 'some'"),
        ({"reduce": "max"}, "unknown reduce: 'max'"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(UserError, match=message):
        pseudo_cross_validation([make_fold()], seen=SEEN, **options)


def test_no_folds_and_bad_ratio_folds():
    with pytest.raises(UserError, match="no fold can be used"):
        pseudo_cross_validation([], seen=SEEN)
    fold = make_fold()
    bare = Fold(fold.logits, fold.labels, fold.pseudo_seen)
    with pytest.raises(UserError, match="train_logits"):
        ratio_pcv([bare], 3.0, seen=SEEN)
    wrong = Fold(fold.logits, fold.labels, fold.pseudo_seen, train_logits=fold.logits, train_labels=fold.labels)
    with pytest.raises(UserError, match="training labels that are not pseudo-seen"):
        ratio_pcv([wrong], 3.0, seen=SEEN)
    e = np.exp(fold.train_logits)
    probs = Fold(fold.logits, fold.labels, fold.pseudo_seen, e / e.sum(1, keepdims=True), fold.train_labels)
    with pytest.raises(UserError, match="probabilities"):
        ratio_pcv([probs], 3.0, seen=SEEN)
    with pytest.raises(UserError, match="finite"):
        ratio_pcv([fold], float("nan"), seen=SEEN)
    with pytest.raises(UserError, match="300 rows, 299 labels"):
        pseudo_cross_validation([Fold(fold.logits, fold.labels[1:], fold.pseudo_seen)], seen=SEEN)
