"""The embedded study through its entry point: claims over three seeds, files, resume."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ft_calibrate import study
from ft_calibrate.demo import DemoResult, run_demo
from ft_calibrate.demo_report import claim_rows
from ft_calibrate.study_claims import CLAIMS, Claim
from vfm_core.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "run"


@pytest.fixture(scope="module")
def result(folder: Path) -> DemoResult:
    """Seeds 2, 3 and 4: the README and a plain `demo` show 0, 1 and 2 as well."""
    return run_demo(folder, seed=2, seeds=3)


@pytest.mark.finding
@pytest.mark.slow
@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.expected], ids=lambda c: c.name)
def test_claim_holds_over_three_seeds(result: DemoResult, claim: Claim) -> None:
    (found,) = [one for one in result.checks if one.claim is claim]
    assert len(found.margins) == 3
    assert found.mean > 0, found.margins


@pytest.mark.finding
@pytest.mark.slow
def test_verdicts_tell_the_cases_apart(result: DemoResult, folder: Path) -> None:
    records = json.loads((folder / "summary.json").read_text())["records"]
    for record in records:
        assert record["repair"]["verdict"] == "logit scale"
        harm = record["settings"]["harm"]
        assert harm["own shift, harsh"]["verdict"] in ("features damaged", "both")
        assert harm["own shift"]["verdict"] in ("order damaged", "logit scale")
    assert "order damaged" in {r["settings"]["harm"]["own shift"]["verdict"] for r in records}
    assert "features damaged" in {r["settings"]["harm"]["own shift, harsh"]["verdict"] for r in records}


@pytest.mark.slow
def test_what_the_run_folder_holds(result: DemoResult, folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["study"]["seeds"] == [2, 3, 4] and len(summary["records"]) == 3
    assert {row["arm"] for row in result.rows} >= {"before fine-tuning", "fine-tuning", "lolsgd", "frozen-head"}
    page = (folder / "report.html").read_text()
    for words in ("Not claimed at this scale", "ratio-pcv", "upper bound", "uses absent labels"):
        assert words in page
    assert not re.findall(r"(?:src|href)=.https?://", page)
    for name in ("idea", "glyphs", "arms"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5_000
    table = np.load(study.folder_of(folder, 2) / "train.npz", allow_pickle=False)
    assert table["logits"].shape == (500, 20) and len(set(table["labels"].tolist())) == 10
    assert (folder / "diagnosis" / "report.html").exists()
    unexpected = [one for one in result.checks if not one.claim.expected]
    assert [row["claim"] for row in claim_rows(result.checks, False)] == [one.claim.name for one in unexpected]


@pytest.mark.slow
def test_a_second_call_computes_nothing_again(
    result: DemoResult, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a finished unit was computed again")

    monkeypatch.setattr(study, "run_unit", refuse)
    again = run_demo(folder, seed=2, seeds=3, executor="local:1")
    assert again.rows == result.rows and [c.margins for c in again.checks] == [c.margins for c in result.checks]


def test_seeds_that_are_not_there(tmp_path: Path) -> None:
    for options in ({"seed": 5}, {"seeds": 0}, {"seeds": 6}):
        with pytest.raises(UserError, match="no such seeds"):
            run_demo(tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_setting_keeps_test_and_training_apart() -> None:
    one = study.setting(1, study.StudySize(per_class=4))
    assert len(one.seen) == len(one.absent) == 10 and not set(one.seen) & set(one.absent)
    assert set(one.train[1].tolist()) == set(one.seen) and len(one.train[1]) == 40
    rows = {picture.numpy().tobytes() for picture in one.oracle[0]}
    assert not rows & {picture.numpy().tobytes() for picture in one.test[0]}
    harsh = study.setting(1, study.StudySize(per_class=4), own_shift=True, seen=3)
    assert harsh.seen == [0, 1, 2] and harsh.absent == list(range(10, 20))
