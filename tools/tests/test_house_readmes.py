"""The code blocks of every README run (tools/runner/readme.py says which, and how one is left out)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner import readme
from runner.process import clean_environment, one_thread
from runner.workspace import ROOT, Member, members

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(member.path / "README.md" for member in members())]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="shell blocks need bash")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    env = clean_environment(one_thread(), Path(sys.executable).parent)
    command = [sys.executable, str(readme.__file__), str(page)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.parametrize("member", [m for m in members() if m.kind == "package"], ids=lambda member: member.name)
def test_a_package_shows_both_of_its_faces(member: Member) -> None:
    found = readme.blocks((member.path / "README.md").read_text(encoding="utf-8"))
    running = {block.language for block in found if block.skip is None}
    assert "python" in running, "no Python example that runs"
    assert running & {"console", "shell"}, "no command line example that runs"
