import email
import email.message
import hashlib
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from runner import isolated, release
from runner.process import Failure
from runner.workspace import Member, members

METADATA = (
    """Metadata-Version: 2.4
Name: fine
Version: 0.1.0
Summary: What fine does
License-Expression: Apache-2.0
License-File: LICENSE
Requires-Python: >=3.11
Requires-Dist: core>=0.1
Requires-Dist: rich>=13
Requires-Dist: core[all]>=0.1; extra == 'all'
Requires-Dist: fine[all]; extra == 'test'
Description-Content-Type: text/markdown

"""
    + "A long description. " * 40
)

NAMES = [
    "fine/__init__.py",
    "fine/py.typed",
    "fine/templates/report.html.j2",
    "fine/testing_data.py",
    "fine-0.1.0.dist-info/METADATA",
    "fine-0.1.0.dist-info/entry_points.txt",
    "fine-0.1.0.dist-info/licenses/LICENSE",
]


@pytest.fixture
def fine(workspace: Path) -> Member:
    return members(workspace)[-1]


def parsed(text: str) -> email.message.Message:
    return email.message_from_string(text)


@pytest.mark.parametrize(
    ("heading", "version"),
    [
        ("## 0.1.0", "0.1.0"),
        ("## [0.2.0] - 2025-01-31", "0.2.0"),
        ("## 1.0.0rc1 (2025-01-31)", "1.0.0rc1"),
    ],
)
def test_changelog_version(heading: str, version: str) -> None:
    assert release.changelog_version(f"# Changelog\n\n{heading}\n\n- First\n\n## 0.0.1\n") == version
    assert release.changelog_version("# Changelog\n") is None


def test_version_changelog_and_tag_must_agree(fine: Member) -> None:
    good = "# Changelog\n\n## 0.1.0\n"
    assert release.tag_of(fine) == "fine-v0.1.0"
    assert release.version_problems(fine, good, None, False) == []
    assert release.version_problems(fine, good, "fine-v0.1.0", False) == []
    (problem,) = release.version_problems(fine, good, "fine-v0.2.0", False)
    assert problem == "the tag is fine-v0.2.0, this version's is fine-v0.1.0"
    (problem,) = release.version_problems(fine, "# Changelog\n\n## 0.0.9\n", None, False)
    assert problem == "CHANGELOG.md is at 0.0.9, pyproject.toml at 0.1.0: add a section for this version"
    (problem,) = release.version_problems(fine, good, None, True)
    assert "already a tag of another commit" in problem
    odd = replace(fine, version="0.1")
    (problem,) = release.version_problems(odd, "## 0.1\n", None, False)
    assert "not of the form" in problem


def test_good_metadata_has_no_problems(fine: Member) -> None:
    assert release.metadata_problems(fine, parsed(METADATA), ">=3.11", {"core", "fine"}) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("Version: 0.1.0", "Version: 0.1.1", "metadata Version is '0.1.1', expected '0.1.0'"),
        ("Requires-Python: >=3.11\n", "", "metadata Requires-Python is None"),
        ("License-Expression: Apache-2.0", "License-Expression: MIT", "License-Expression is 'MIT'"),
        ("License-File: LICENSE\n", "", "no LICENSE file"),
        ("text/markdown", "text/plain", "Description-Content-Type"),
        ("Name: fine", "Name: core", "metadata Name is 'core'"),
        ("Summary: What fine does\n", "", "no Summary"),
        ("A long description. " * 40, "Short.", "README.md says next to nothing"),
        ("core>=0.1\n", "core\n", "no lower bound for core: core"),
        ("rich>=13", "rich @ https://x.example/rich", "depends on an address"),
    ],
)
def test_each_fault_of_the_metadata_is_seen(fine: Member, old: str, new: str, problem: str) -> None:
    assert old in METADATA
    found = release.metadata_problems(fine, parsed(METADATA.replace(old, new, 1)), ">=3.11", {"core", "fine"})
    assert len(found) == 1
    assert problem in found[0]


def test_content_of_a_wheel(fine: Member) -> None:
    assert release.content_problems(fine, NAMES) == []
    for name in ("tests/test_x.py", "fine/tests/data.txt", "fine/test_x.py", "fine/conftest.py"):
        assert any("a test" in problem for problem in release.content_problems(fine, [*NAMES, name])), name
    assert release.content_problems(fine, [*NAMES, "other/x.py"]) == ["the wheel contains other/x.py"]
    assert release.content_problems(fine, NAMES[:1] + NAMES[2:]) == ["the wheel lacks fine/py.typed"]
    assert release.content_problems(replace(fine, scripts=()), [n for n in NAMES if "entry" not in n]) == []


def test_a_tag_of_another_commit_is_seen(workspace: Path, fine: Member) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=workspace, check=True, capture_output=True)

    assert not release._tagged_elsewhere(workspace, fine)
    git("init")
    git("add", "--all")
    git("commit", "-m", "one")
    assert not release._tagged_elsewhere(workspace, fine)
    git("tag", "--annotate", "fine-v0.1.0", "-m", "fine 0.1.0")
    assert not release._tagged_elsewhere(workspace, fine)
    git("commit", "--allow-empty", "-m", "two")
    assert release._tagged_elsewhere(workspace, fine)


def test_local_wheels_are_required_with_their_hashes(tmp_path: Path, fine: Member) -> None:
    wheels = {}
    for name in ("core", "fine"):
        wheels[name] = tmp_path / f"{name}-0.1.0-py3-none-any.whl"
        wheels[name].write_bytes(name.encode())
    core, own = isolated.wheel_requirements(wheels, fine, "test").splitlines()
    assert core == f"core @ {wheels['core'].as_uri()} --hash=sha256:{hashlib.sha256(b'core').hexdigest()}"
    assert own.startswith(f"fine[test] @ {wheels['fine'].as_uri()} --hash=sha256:")
    assert "[" not in isolated.wheel_requirements(wheels, fine, None)


def test_pytest_settings_are_the_workspaces_without_its_paths(workspace: Path) -> None:
    settings = isolated.pytest_settings((workspace / "pyproject.toml").read_text())
    assert settings.strip().splitlines() == [
        "[tool.pytest.ini_options]",
        'addopts = "-ra"',
        "markers = [",
        '    "slow: takes long",',
        "]",
    ]
    with pytest.raises(Failure, match="ini_options"):
        isolated.pytest_settings("[project]\n")
