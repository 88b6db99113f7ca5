"""Diagnoses of synthetic classifiers whose damage is known, the pairing of samples, and the record."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
from ft_calibrate.diagnosis import Diagnosis, diagnose
from ft_calibrate.gap import average_logit_gap
from ft_calibrate.metrics import accuracy_decomposition
from ft_calibrate.ncm import ncm_scores
from ft_calibrate.tables import LogitTable
from vfm_core.errors import UserError

K, D, PER_CLASS = 10, 16, 40
SEEN = [f"c{i}" for i in range(5)]
CLASSES = [f"c{i}" for i in range(K)]


def world(*damage: str, seed: int = 0, rows: Any = slice(None)) -> tuple[LogitTable, LogitTable]:
    """``(after, before)``: features around class means, logits by their own head.

    Damage: "scale" lowers the absent logits of the model after; "features" gives most absent samples the features of
    another one; "weak" lowers the absent logits before, so that there is something for calibration to restore.
    """
    rng = np.random.default_rng(seed)
    means = np.linalg.qr(rng.normal(size=(D, D)))[0][:K]
    y = np.repeat(np.arange(K), PER_CLASS)
    noise = rng.normal(size=(len(y), D)) * 0.3
    before = means[y] + noise
    after = means[y] + noise * (0.7 if "better" in damage else 1.0)
    if "features" in damage:
        hit = np.flatnonzero(y >= 5)
        hit = hit[rng.random(len(hit)) < (0.25 if "weak" in damage else 0.6)]
        after[hit] = after[rng.permutation(hit)]
    z_before, z_after = before @ means.T * 10, after @ means.T * 10
    if "scale" in damage:
        z_after[:, 5:] -= 8
    if "weak" in damage:
        z_before[:, 5:] -= 4
    ids = [f"image{i}" for i in range(len(y))]
    tables = [
        LogitTable(z.astype(np.float32), CLASSES, y, f.astype(np.float32), ids)
        for z, f in ((z_after, after), (z_before, before))
    ]
    return tables[0].subset(rows), tables[1].subset(rows)


def seen_rows(table: LogitTable) -> LogitTable:
    assert table.labels is not None
    return table.subset(np.flatnonzero(table.labels < 5))


def without(table: LogitTable, *fields: str) -> LogitTable:
    kept = {name: getattr(table, name) for name in ("labels", "features", "ids") if name not in fields}
    return LogitTable(table.logits, table.classes, **kept)


@pytest.mark.parametrize(
    ("damage", "verdict"),
    [
        ((), "nothing wrong"),
        (("better",), "nothing wrong"),
        (("scale",), "logit scale"),
        (("features",), "features damaged"),
        (("scale", "features"), "features damaged"),
        (("scale", "features", "weak"), "both"),
    ],
)
def test_known_damage_gets_its_verdict(damage: tuple[str, ...], verdict: str) -> None:
    after, before = world(*damage)
    reference = world(*damage)
    more: dict[str, Any] = {
        "train": seen_rows(reference[0]),
        "reference": reference[0],
        "reference_before": reference[1],
    }
    none: dict[str, Any] = {}
    for given in (none, more):
        found = diagnose(after, SEEN, before, **given)
        assert found.verdict == verdict, found.sentence
        assert found.judgement.evidence == "ncm"


def test_features_improved_and_head_only_evidence() -> None:
    after, before = world("scale", "better", "weak")
    found = diagnose(after, SEEN, before)
    assert found.verdict == "logit scale" and found.judgement.features_improved and "improved" in found.sentence
    head = diagnose(without(after, "features"), SEEN, without(before, "features"))
    assert head.verdict == "logit scale" and head.judgement.evidence == "head"
    assert "head-only evidence" in head.sentence and "ncm" not in head.tables and "features" in head.skipped
    one_sided = diagnose(after, SEEN, without(before, "features"))
    assert one_sided.judgement.evidence == "head" and any("not compared" in note for note in one_sided.notes)


def test_without_before_nothing_is_judged_but_the_numbers_are_there() -> None:
    after, _ = world("scale")
    found = diagnose(after, SEEN, train=seen_rows(after))
    assert found.verdict == "cannot be judged" and "gamma_ALG" in found.sentence and "AUSUC" in found.sentence
    assert "nn_vs_ncm" in found.skipped and "nn_vs_ncm" not in found.tables
    assert {row["model"] for row in found.tables["ncm"]} == {"after"}


def test_the_tables_hold_the_numbers_of_the_functions() -> None:
    after, before = world("scale", "features")
    found = diagnose(after, SEEN, before, train=seen_rows(after))
    expected = accuracy_decomposition(after.logits, after.labels, SEEN, classes=CLASSES)
    row = next(r for r in found.tables["accuracy"] if r["model"] == "after")
    for key in ("Y/Y", "S/Y", "U/Y", "S/S", "U/U"):
        assert row[key][0] == pytest.approx(expected[key]) and row[key][1] <= row[key][0] <= row[key][2]
    assert row["H"] == pytest.approx(expected["H"])
    macro = accuracy_decomposition(after.logits, after.labels, SEEN, classes=CLASSES, average="macro")
    top5 = next(r for r in found.tables["accuracy_all"]
                if (r["model"], r["average"], r["top-k"]) == ("after", "macro", 5))  # fmt: skip
    assert top5["U/Y"] == pytest.approx(macro["U/Y@5"])
    scores = ncm_scores(after.features, (after.features, after.labels), K, leave_one_out=True)
    ncm = accuracy_decomposition(scores, after.labels, SEEN, classes=CLASSES)
    shown = next(r for r in found.tables["ncm"] if (r["classifier"], r["model"]) == ("NCM", "after"))
    assert shown["U/U"][0] == pytest.approx(ncm["U/U"]) and "leave-one-out" in shown["means or neighbours from"]
    gamma = found.gammas["alg"].value
    assert gamma == pytest.approx(average_logit_gap(seen_rows(after).logits, seen_rows(after).labels, range(5)))
    shifted = np.array(after.logits)
    shifted[:, 5:] += gamma
    at = accuracy_decomposition(shifted, after.labels, SEEN, classes=CLASSES)
    assert next(r for r in found.tables["gammas"] if r["gamma from"] == "gamma_ALG")["U/Y"] == pytest.approx(at["U/Y"])
    assert found.judgement.shortfall is not None and found.judgement.collapse is not None
    lost = accuracy_decomposition(before.logits, before.labels, SEEN, classes=CLASSES)["U/Y"] - at["U/Y"]
    assert found.judgement.shortfall.change == pytest.approx(lost)


def test_every_gamma_says_what_it_used() -> None:
    after, before = world("scale")
    with_train = diagnose(after, SEEN, before, train=seen_rows(after)).gammas
    assert with_train["alg"].deployable and "alg-test" not in with_train
    found = diagnose(after, SEEN, before)
    parity = found.gammas["alg-test"]
    assert "alg" not in found.gammas and parity.uses_test_labels and not parity.deployable
    assert parity.value == pytest.approx(average_logit_gap(after.logits, after.labels, range(5)))
    assert any("must not be deployed" in note for note in found.notes)
    for key in ("oracle", "oracle-balanced", "oracle-harmonic"):
        assert found.gammas[key].remark == "upper bound, not deployable" and found.gammas[key].uses_absent_labels


def test_reference_for_one_model_only_is_not_compared_with_another_kind() -> None:
    after, before = world("scale")
    found = diagnose(after, SEEN, before, reference=world("scale")[0])
    assert any("--reference-before is missing" in note for note in found.notes)
    assert all("leave-one-out" in row["means or neighbours from"] for row in found.tables["ncm"])
    both = diagnose(after, SEEN, before, reference=world("scale")[0], reference_before=world("scale")[1])
    assert {row["classifier"] for row in both.tables["ncm"]} == {"NCM", "10-NN", "linear probe"}
    assert all("labels of absent classes" in row["means or neighbours from"] for row in both.tables["ncm"])
    assert len(both.tables["feature_movement"]) == 16 and len(both.tables["class_mean_movement"]) == 6


def test_one_seen_class_has_no_average_logit_gap() -> None:
    after, before = world("scale")
    after.logits[:, 1:5] -= 8  # all but c0 were absent, and all fell
    found = diagnose(after, ["c0"], before)
    assert "gamma_ALG" in found.skipped and found.judgement.gamma_source == "oracle"
    assert found.verdict == "logit scale" and "upper bound" in found.sentence


def test_nothing_absent_and_no_absent_sample() -> None:
    after, before = world("scale")
    everything = diagnose(after, CLASSES, before)
    assert everything.next_steps == ("Nothing to calibrate: every class is seen.",)
    assert everything.verdict == "cannot be judged" and "no class is absent" in everything.sentence
    rows = slice(0, 5 * PER_CLASS)
    found = diagnose(after.subset(rows), SEEN, before.subset(rows))
    assert found.verdict == "cannot be judged" and any("absent classes" in note for note in found.notes)
    assert "also of absent classes" not in " ".join(found.notes)  # there are none
    assert not found.gammas["alg-test"].uses_absent_labels and found.gammas["alg-test"].uses_test_labels


def test_tiny_groups_are_told(caplog: pytest.LogCaptureFixture) -> None:
    after, before = world("scale", rows=np.r_[0:200, 200:220])
    with caplog.at_level(logging.WARNING):
        found = diagnose(after, SEEN, before)
    assert "Only 20 test samples of the absent classes" in caplog.text
    assert any("Only 20 test samples" in note for note in found.notes)


def test_an_untrained_source_cannot_be_judged() -> None:
    after, before = world("scale")
    noise = np.random.default_rng(3).normal(size=before.logits.shape)
    found = diagnose(after, SEEN, LogitTable(noise, CLASSES, before.labels, before.features, before.ids))
    assert found.verdict == "cannot be judged" and "not above chance (10.0 %)" in found.sentence


def test_the_same_table_before_and_after_is_refused(tmp_path: Any) -> None:
    from ft_calibrate.tables import read_table, write_table

    after, _ = world("scale")
    write_table(after, tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    for a, b in ((after, after), (read_table(tmp_path / "a.npz"), read_table(tmp_path / "b.npz"))):
        with pytest.raises(UserError, match="the same data before and after"):
            diagnose(a, SEEN, b)


def test_a_calibration_stands_beside_the_others() -> None:
    from ft_calibrate.calibration import fit_calibration
    from ft_calibrate.groups import class_groups

    after, before = world("scale")
    groups, train = class_groups(CLASSES, SEEN), seen_rows(after)
    record = fit_calibration(None, None, groups, "fixed", gamma=8.0)
    found = diagnose(after, SEEN, before, calibration=record)
    row = next(r for r in found.tables["accuracy"] if r["model"] == "after + calibration file (fixed)")
    assert row["U/Y"] == found.settings.mean(found.inputs.right(found.inputs.shifted(8.0))["U/Y"])
    assert found.judgement.gamma_source == "given" and "alg-test" not in found.gammas
    assert diagnose(after, SEEN, before, train=train, calibration=record).judgement.gamma_source == "alg"
    oracle = fit_calibration(after.logits, after.labels, groups, "oracle")
    shown = diagnose(after, SEEN, before, calibration=oracle)
    assert shown.judgement.gamma_source == "alg-test" and not shown.gammas["given"].deployable
    scaled = fit_calibration(None, None, groups, "weight-align", head_weight=np.eye(K) * np.r_[[1.0] * 5, [0.5] * 5])
    scale = diagnose(after, SEEN, before, calibration=scaled)
    assert "given" not in scale.gammas and "after + calibration file (weight-align)" in {
        r["model"] for r in scale.tables["accuracy"]
    }
    with pytest.raises(UserError, match="other seen classes"):
        diagnose(after, SEEN[:4], before, calibration=record)


def test_remaining_classes() -> None:
    after, before = world("scale")
    absent = [f"c{i}" for i in range(5, 8)]
    kept = diagnose(after, SEEN, before, absent=absent, remaining="keep")
    assert "R/Y" in kept.tables["accuracy"][0] and kept.to_dict()["classes"]["remaining"] == ["c8", "c9"]
    moved = diagnose(after, SEEN, before, absent=absent)
    assert moved.gammas["alg-test"].value != kept.gammas["alg-test"].value
    with pytest.raises(UserError, match="remaining"):
        diagnose(after, SEEN, before, absent=absent, remaining="drop")


# ---------------------------------------------------------------------------------------------------- pairing


def test_rows_and_columns_are_matched_by_id_and_name() -> None:
    after, before = world("scale", "features")
    plain = diagnose(after, SEEN, before)
    order = np.random.default_rng(0).permutation(len(before))
    mixed = before.subset(order).reordered(CLASSES[::-1])
    found = diagnose(after, SEEN, mixed)
    assert found.judgement == plain.judgement
    assert json.dumps(found.to_dict()["tables"]) == json.dumps(plain.to_dict()["tables"])


def test_without_ids_equal_labels_stand_for_equal_order() -> None:
    after, before = world("scale")
    found = diagnose(without(after, "ids"), SEEN, without(before, "ids"))
    assert found.judgement == diagnose(after, SEEN, before).judgement
    assert diagnose(after, SEEN, without(before, "labels")).verdict == "logit scale"  # ids alone are enough


def test_samples_that_are_not_the_same_are_refused() -> None:
    after, before = world("scale")
    shuffled = without(before.subset(np.random.default_rng(0).permutation(len(before))), "ids")
    cases = [
        (after, shuffled, "labels before and after fine-tuning differ"),
        (after, before.subset(slice(0, 399)), "1 of 400 ids are missing, such as image399"),
        (without(after, "ids"), without(before.subset(slice(0, 399)), "ids"), "399 rows, 400 after"),
        (without(after, "ids"), without(before, "ids", "labels"), "neither ids nor labels"),
    ]
    repeated = LogitTable(before.logits, CLASSES, before.labels, None, ["a"] * 400)
    cases.append((after, repeated, "ids repeat"))
    wrong = LogitTable(before.logits, CLASSES, np.roll(np.asarray(before.labels), 50), None, before.ids)
    cases.append((after, wrong, "first row 0: c8 and c0"))
    for a, b, message in cases:
        with pytest.raises(UserError, match=message):
            diagnose(a, SEEN, b)


def test_unlabelled_rows_are_left_out_of_both() -> None:
    after, before = world("scale")
    labels = after.labels.copy()  # type: ignore[union-attr]
    labels[::4] = -1
    found = diagnose(LogitTable(after.logits, CLASSES, labels, after.features, after.ids), SEEN, before)
    kept = labels >= 0
    expected = diagnose(after.subset(kept), SEEN, before.subset(kept))
    assert found.judgement == expected.judgement and any("100 test samples" in note for note in found.notes)


def test_bad_inputs_are_named() -> None:
    after, before = world("scale")
    broken = LogitTable(np.where(np.arange(400)[:, None] == 7, np.nan, after.logits), CLASSES, after.labels)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"after": without(after, "labels")}, "needs labels"),
        ({"after": broken}, "row 7"),
        ({"train": after}, "labels that are not seen classes"),
        ({"train": without(after, "labels")}, "needs labels"),
        ({"reference": without(after, "features")}, "need features"),
        ({"reference": without(after, "labels")}, "need labels"),
        ({"seen": ["c0", "cat"]}, "cat"),
        ({"n_bootstrap": 1}, "bootstrap"),
        ({"head_after": np.zeros((3, 4))}, "do not fit"),
    ]
    small = LogitTable(after.logits, CLASSES, after.labels, after.features[:, :5])  # type: ignore[index]
    cases.append(({"reference": small}, "features of different sizes"))
    for how, message in cases:
        given: dict[str, Any] = {"after": after, "seen": SEEN, "before": before} | how
        with pytest.raises(UserError, match=message):
            diagnose(**given)


def test_a_leak_is_told() -> None:
    after, before = world("scale")
    found = diagnose(after, SEEN, before, train=seen_rows(after))
    assert "200 samples are both in the train and the test data (leak)." in found.notes


# ---------------------------------------------------------------------------------------------------- the record


def full(seed: int = 0) -> Diagnosis:
    after, before = world("scale")
    rng = np.random.default_rng(0)
    head = rng.normal(size=(K, D))
    return diagnose(
        after, SEEN, before, world("scale")[0], seen_rows(world("scale", seed=2)[0]),
        reference_before=world("scale")[1], head_before=head, head_after=head * 1.1 + rng.normal(size=(K, D)) * 0.1,
        seed=seed,
    )  # fmt: skip


def test_the_record_is_strict_json_with_everything(tmp_path: Any) -> None:
    found = full()
    text = found.to_json(tmp_path / "summary.json")
    assert (tmp_path / "summary.json").read_text() == text

    def refuse(word: str) -> None:
        raise AssertionError(f"not strict JSON: {word}")

    record = json.loads(text, parse_constant=refuse)
    assert record["verdict"] == "logit scale" and record["sentence"] == found.sentence
    assert record["gamma"]["alg"]["uses_absent_labels"] is False
    assert record["gamma"]["oracle"]["remark"] == "upper bound, not deployable"
    assert set(record["tables"]) == {
        "accuracy", "accuracy_all", "curve", "gammas", "ncm", "nn_vs_ncm", "absent_among_absent", "logit_scale",
        "class_relationship", "margin", "head_norms", "feature_movement", "class_mean_movement", "separation",
    }  # fmt: skip
    assert set(record["inputs"]) == {"after", "before", "reference", "reference-before", "train"}
    assert all(len(entry["sha256"]) == 64 for entry in record["inputs"].values())
    assert record["inputs"]["after"]["sha256"] != record["inputs"]["before"]["sha256"]
    assert record["seeds"]["bootstrap"] == 0 and "numpy" in record["versions"] and "labels" in record["diagnosis_only"]
    assert record["classes"]["seen"] == SEEN and not found.skipped


def test_same_seed_same_record() -> None:
    first, again, other = full(), full(), full(seed=1)
    assert first.to_dict()["tables"] == again.to_dict()["tables"]
    assert first.to_dict()["tables"] != other.to_dict()["tables"] and first.verdict == other.verdict
