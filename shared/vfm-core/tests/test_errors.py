"""The error type: one line, all parts, and useful suggestions."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from vfm_core.errors import UserError, closest, unknown_name


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({}, "what"),
        ({"where": "--x"}, "what in --x"),
        ({"given": 0}, "what: 0"),
        ({"remedy": "do"}, "what; do"),
        ({"where": Path("a/b"), "given": False, "remedy": "do"}, "what in a/b: False; do"),
    ],
)
def test_parts_that_are_absent_are_left_out(kwargs: dict, text: str) -> None:
    error = UserError("what", **kwargs)
    assert str(error) == text and isinstance(error, ValueError)
    assert (error.what, error.where, error.given) == ("what", kwargs.get("where"), kwargs.get("given"))


def test_always_one_line() -> None:
    assert str(UserError("a\nb", given="c\n\n  d", remedy="e\tf")) == "a b: c d; e f"


def test_survives_a_worker_process() -> None:
    class Mine(UserError):
        pass

    error = pickle.loads(pickle.dumps(UserError("what", where=Path("f"), given=(1, 2), remedy="do")))
    assert str(error) == "what in f: (1, 2); do" and error.given == (1, 2) and type(error) is UserError
    assert Mine("x").__reduce__()[1][0] is Mine


def test_closest() -> None:
    options = ["gradcam", "gradcam++", "layercam", "scorecam", "XGradCAM"]
    assert closest("gradcan", options)[0] == "gradcam"
    assert closest("GRADCAM", options)[0] == "gradcam"
    assert closest("xgradcam", options)[0] == "XGradCAM"
    assert closest("zzzz", options) == []
    assert len(closest("cam", options)) <= 3
    assert closest("resnet50", ["vit", "a.long.name.of.resnet50.a1_in1k", "resnet50.a1_in1k"], n=1) == [
        "resnet50.a1_in1k"
    ]
    assert closest("", options) == []


def test_unknown_name() -> None:
    error = unknown_name("method", "gradcan", {"gradcam": 1, "layercam": 2}, where="--method")
    assert str(error).startswith("unknown method in --method: 'gradcan'; did you mean gradcam")
    assert str(unknown_name("method", "zzz", ["b", "a"])) == "unknown method: 'zzz'; known: a, b"
    assert str(unknown_name("method", "zzz", [])) == "unknown method: 'zzz'; none is available"
    many = str(unknown_name("class", "zzz", [f"{i:03}" for i in range(50)]))
    assert many.endswith("018, 019, ...") and "020" not in many
