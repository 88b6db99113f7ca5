"""The embedded study as a run: pictures, tables, report, and going on after an interruption."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from finecam import study, study_prompts
from finecam.demo import DemoResult, run_demo
from finecam.demo_report import finer_rows, verdict
from finecam.study import Size
from vfm_core.errors import UserError

TINY = Size(seeds=(0, 1), images=16, prompt_seeds=(0,), prompt_train=64, curve_steps=2, ablations=True)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path]:
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "FULL", TINY)
        patch.setitem(study_prompts.PROMPT_TRAINING, "epochs", 2)
        return run_demo(out, full=True), out


def test_report_has_every_section_and_picture(ran: tuple[DemoResult, Path]) -> None:
    result, out = ran
    assert result.report == out / "report.html"
    page = result.report.read_text()
    headings = (
        "Why A and not B?",
        "Does the contrast find the mark?",
        "Strength of the contrast",
        "Which references",
        "When look-alikes share the mark",
        "Score-CAM",
        "Does a map give a shortcut away?",
        "Prompt-CAM: traits of a class",
        "Finding a described mark",
    )
    for heading in headings:
        assert heading in page
    assert len(list((out / "figures").glob("why-*.webp"))) == 6
    assert not re.search(r"(src|href)=\"https?:", page)


def test_rows_are_differences_to_plain(ran: tuple[DemoResult, Path]) -> None:
    result, _ = ran
    assert [(row["method"], row["seed"]) for row in result.finer] == [
        ("gradcam", 0), ("gradcam", 1), ("layercam", 0), ("layercam", 1),
    ]  # fmt: skip
    for row in result.finer:
        difference, low, high = row["energy in trait"]
        assert low <= difference <= high
    assert {"Prompt-CAM (mean of heads)", "gradcam, cls probe", "cls_attention", "random map"} <= {
        r["maps"] for r in result.prompt
    }


def test_again_does_nothing_twice(ran: tuple[DemoResult, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    result, out = ran
    monkeypatch.setattr(study, "FULL", TINY)
    monkeypatch.setitem(study_prompts.PROMPT_TRAINING, "epochs", 2)
    for name in ("finer_unit", "score_unit", "prompt_unit", "shortcut_unit", "text_unit"):
        monkeypatch.setattr(study, name, lambda *a, **k: pytest.fail("work done twice"))
    assert run_demo(out, full=True).finer == result.finer


def test_other_settings_are_refused(ran: tuple[DemoResult, Path]) -> None:
    with pytest.raises(UserError, match="overwrite"):
        run_demo(ran[1], seeds=1)


def test_verdict_counts_whole_intervals() -> None:
    assert verdict([{"m": (1, 0.1, 2)}, {"m": (1, -0.1, 2)}], "m") == "1 of 2 runs"
    assert finer_rows({}) == []
