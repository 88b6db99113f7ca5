"""The doctor: what it reports, and that it notices when something is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from meda_kv.attention import doctor
from meda_kv.cache import CompressedLayer


def test_doctor_is_content_here() -> None:
    before = torch.random.get_rng_state()
    report = doctor()
    assert report.ok, report.checks
    assert [check.name for check in report.checks] == [
        "sdpa, ratio 1",
        "sdpa, ratio 0.4",
        "eager, ratio 1",
        "eager, ratio 0.4",
    ]
    assert report.versions["torch"] and {"sdpa", "eager"} <= set(report.attention) and report.devices[0] == "cpu"
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    assert torch.random.get_rng_state().equal(before)


def test_doctor_tells_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompressedLayer, "mask_for", lambda self, query, given, base: None)
    report = doctor()
    failed = [check for check in report.checks if not check.ok]
    assert not report.ok and failed and all("difference" in check.detail or "Error" in check.detail for check in failed)


def test_doctor_survives_a_broken_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no cache today")

    monkeypatch.setattr(CompressedLayer, "update", broken)
    report = doctor()
    assert report.checks[0].detail == "OSError: no cache today"
