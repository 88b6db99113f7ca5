"""Fixtures: a small workspace made of files, a uv that only writes down what it was asked, stand-ins for programs."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.process import scripts_dir
from sample_workspace import MEMBER_PYPROJECT, ROOT_PYPROJECT, FakeUv, executable, refresh_lock


@pytest.fixture
def add_member(tmp_path: Path) -> Callable[..., Path]:
    def add(folder: str, dependencies: tuple[str, ...] = (), version: str = "0.1.0") -> Path:
        name = folder.rpartition("/")[2]
        home = tmp_path / "workspace" / folder
        home.mkdir(parents=True)
        text = MEMBER_PYPROJECT.format(
            name=name, module=name.replace("-", "_"), version=version, dependencies=json.dumps(list(dependencies))
        )
        (home / "pyproject.toml").write_text(text, encoding="utf-8")
        return home

    return add


@pytest.fixture
def workspace(tmp_path: Path, add_member: Callable[..., Path]) -> Path:
    """core <- world <- fine, core <- avid; the lock is up to date."""
    root = tmp_path / "workspace"
    add_member("packages/fine", ("world", "rich>=14"))
    add_member("packages/avid", ("Core[all]>=0.1",))
    add_member("shared/world", ("core>=0.1",))
    add_member("shared/core", ("rich>=13",))
    (root / "pyproject.toml").write_text(ROOT_PYPROJECT, encoding="utf-8")
    refresh_lock(root)
    return root


@pytest.fixture
def fake_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeUv:
    fake = FakeUv(tmp_path)
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("UV_PROJECT_ENVIRONMENT", raising=False)
    return fake


@pytest.fixture
def command(tmp_path: Path) -> Callable[[str, str], Path]:
    """Put a Python program with this body into the environment `tmp_path/environment`; returns the environment."""

    def put(name: str, body: str) -> Path:
        home = tmp_path / "environment"
        executable(scripts_dir(home) / name, f"#!{sys.executable}\nimport pathlib, sys\n{body}\n")
        return home

    return put
