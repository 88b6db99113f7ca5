"""Formatting, lint, types and workflow files, over the whole house."""

import subprocess
import sys

import pytest

from runner.workspace import ROOT, members


def run(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]


def test_format() -> None:
    run("ruff", "format", "--check", "--quiet", "shared", "packages", "tools")


def test_lint() -> None:
    run("ruff", "check", "--quiet", "shared", "packages", "tools")


@pytest.mark.slow
def test_types() -> None:
    # The tests of different packages share file names, which one run of mypy cannot tell apart; the house's own go in.
    run("mypy", *(str(member.source.relative_to(ROOT)) for member in members()), "tools")


def test_workflows_are_valid() -> None:
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / ".github" / "workflows").glob("*.y*ml"))
    assert {".github/workflows/ci.yml", ".github/workflows/gpu.yml", ".github/workflows/release.yml"} <= set(files)
    run("check_jsonschema", "--builtin-schema", "vendor.github-workflows", *files)


def test_actions_are_pinned_to_commits() -> None:
    import re

    for file in (ROOT / ".github" / "workflows").glob("*.y*ml"):
        used = re.findall(r"uses:\s*(\S+)", file.read_text(encoding="utf-8"))
        assert [use for use in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", use)] == [], file.name
