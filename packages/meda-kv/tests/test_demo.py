"""The demo through its command: a small study, its report, resume, and a refused change."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from meda_kv import study
from meda_kv.demo import run_demo
from PIL import Image
from vfm_core.errors import UserError


def meda(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "meda_kv", *words], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_demo_by_its_command(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    words = ("demo", "--out", str(out), "--seeds", "1", "--albums", "3", "--executor", "local")
    first = meda(*words, "--json")
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert {row["method"] for row in told["rows"]} == {"full", *study.StudySize().methods}
    assert len(told["recommendations"]) == 6
    page = (out / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/[a-z]+;base64,([^"]+)"', page)
    assert len(pictures) >= 4
    for picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture))).verify()

    again = meda(*words, "--quiet")
    assert again.returncode == 0, again.stderr
    assert "report:" in again.stdout
    assert json.loads((out / "summary.json").read_text())["rows"] == told["rows"]

    other = meda(*words[:-4], "--albums", "4")
    assert other.returncode == 2
    assert "albums" in other.stderr and other.stderr.count("\n") == 1


@pytest.mark.parametrize(("seed", "seeds"), [(3, 1), (0, 4), (2, 2), (0, 0)])
def test_networks_that_are_not_shipped(tmp_path: Path, seed: int, seeds: int) -> None:
    with pytest.raises(UserError, match="no network for the seed"):
        run_demo(tmp_path, seed=seed, seeds=seeds)
