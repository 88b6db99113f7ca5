"""What a calibration record says of itself: its effect on logits and where its method comes from."""

from __future__ import annotations

import json

import pytest
from ft_calibrate.calibration import fit_calibration
from ft_calibrate.gamma_choices import from_calibration
from ft_calibrate.groups import class_groups
from ft_calibrate.record import Calibration, read_calibration
from vfm_core.errors import UserError

CLASSES = ("ant", "bee", "cat", "dog")


def record(**fields) -> Calibration:
    start = {"method": "fixed", "gamma": 0.0, "seen": ("ant", "bee"), "absent": ("cat", "dog"), "classes": CLASSES}
    return Calibration(**{**start, **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"gamma": 2.5}, "gamma = 2.5"),
        ({}, "gamma = 0"),
        ({"shift": (0.0, -0.5, 1.25, 0.0)}, "shift -0.5 to 1.25 per class"),
        ({"scale": (1.0, 1.0, 0.5, 0.5)}, "factor 0.5 on 2 of 4 classes"),
        ({"scale": (1.0, 1.0, 0.5, 2.0), "shift": (0.0, 0.0, 0.5, 2.0)},
         "factor 0.5 to 2 on 2 of 4 classes, shift 0 to 2 per class"),
        ({"scale": (1.0, 1.0, 0.5, 0.5), "gamma": -1.0}, "gamma = -1, factor 0.5 on 2 of 4 classes"),
        ({"scale": (1.0, 1.0, 0.5, 0.5), "details": {"temperature_absent": 2.0}},
         "logits divided by T = 2 on 2 of 4 classes"),
        ({"scale": (1.0,) * 4, "shift": (0.0,) * 4}, "gamma = 0"),
        ({"gamma": 1.0, "absent": ("cat",), "remaining": ("dog",), "remaining_mode": "exclude"},
         "gamma = 1, 1 class masked (-inf)"),
        ({"gamma": 1.0, "absent": ("cat",), "remaining": ("dog",)}, "gamma = 1"),
    ],
)  # fmt: skip
def test_the_effect_names_all_that_is_done(fields, words):
    assert record(**fields).effect() == words


@pytest.mark.parametrize("method", ["prior", "weight-align", "bic", "temperature-per-group"])
def test_no_repair_by_other_means_reads_as_gamma_zero(method):
    logits = [[3.0, 0.2, -1.0, -2.0], [0.1, 2.0, -1.5, -1.0], [1.0, 0.5, 0.7, -1.0], [0.5, 1.0, -1.0, 0.8]]
    labels = [0, 1] if method == "prior" else [0, 1, 2, 3]
    weight = [[2.0, 0.0], [0.0, 2.0], [0.5, 0.0], [0.0, 0.5]]
    found = fit_calibration(logits[: len(labels)], labels, class_groups(CLASSES, [0, 1]), method, head_weight=weight)
    assert "gamma = 0" not in found.effect() and found.effect() in from_calibration(found).note


def test_origin_tells_the_published_code_from_the_paper():
    assert record(method="alg").origin() == record(method="oracle", uses_absent_labels=True).origin() == "the paper's"
    leaked = record(method="alg", uses_absent_labels=True)
    assert leaked.origin() == from_calibration(leaked).note == "as the published code computes it, not the paper"
    assert record(method="val", uses_absent_labels=True).origin() == "not from the paper"


@pytest.mark.parametrize("method", ["algo", ["alg"], None])
def test_a_file_with_an_unknown_method_is_refused(tmp_path, method):
    path = tmp_path / "gamma.json"
    path.write_text(json.dumps({**record().to_dict(), "method": method}))
    with pytest.raises(UserError, match="unknown method") as error:
        read_calibration(path)
    assert str(path) in str(error.value)
