"""Every package has the same rooms, so that a newcomer who knows one knows all."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from runner.workspace import ROOT, Member, members, normal_name, read_toml

MEMBERS = members()
PACKAGES = [member for member in MEMBERS if member.kind == "package"]
SHARED = [member for member in MEMBERS if member.kind == "shared"]
every_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
every_package = pytest.mark.parametrize("member", PACKAGES, ids=lambda member: member.name)


def test_the_house_has_its_rooms() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "LICENSE", ".pre-commit-config.yaml", ".ci/run", "uv.lock"):
        assert (ROOT / name).is_file(), name
    assert (ROOT / ".ci/run").stat().st_mode & stat.S_IXUSR
    assert [path.parent.name for path in ROOT.glob("shared/*/pyproject.toml")]
    folders = [path for top in ("shared", "packages") for path in (ROOT / top).iterdir() if path.is_dir()]
    assert {path for path in folders if any(path.rglob("*.py"))} == {member.path for member in MEMBERS}


@every_member
def test_rooms_of_a_member(member: Member) -> None:
    wanted = ["README.md", "CHANGELOG.md", "LICENSE", f"src/{member.import_name}/__init__.py"]
    wanted += [f"src/{member.import_name}/py.typed"]
    assert [name for name in wanted if not (member.path / name).is_file()] == []
    assert list(member.tests.glob("**/test_*.py"))
    assert {path.name for path in (member.path / "src").iterdir()} - {"__pycache__"} == {member.import_name}
    assert member.path.name == member.name
    assert (member.path / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "test" in member.extras


@every_package
def test_rooms_of_a_package(member: Member) -> None:
    assert [name for name in ("demo.py", "bench.py") if not (member.source / name).is_file()] == []
    assert any((member.source / name).is_file() for name in ("cli.py", "cli/__init__.py"))
    assert member.name in member.scripts
    assert "vfm-core" in member.requires
    assert member.requires <= {other.name for other in SHARED}


@every_member
def test_every_member_can_run_its_tests_and_be_built_from_the_lock(member: Member) -> None:
    table = read_toml(member.path / "pyproject.toml")
    asked = {normal_name(item) for item in table["project"]["optional-dependencies"]["test"]}
    assert {"pytest", "pytest-timeout", "pytest-xdist"} <= asked
    pinned = {normal_name(item) for item in read_toml(ROOT / "pyproject.toml")["dependency-groups"]["build"]}
    assert {normal_name(item) for item in table["build-system"]["requires"]} <= pinned


@every_member
def test_importing_a_member_is_cheap(member: Member) -> None:
    heavy = ("torch", "timm", "transformers", "open_clip", "matplotlib", "sklearn", "scipy", "datasets")
    code = f"import sys, {member.import_name}; print(*(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def layers() -> list[str]:
    """Import-linter's layers: all packages side by side and apart from each other, above the shared ones in order."""
    below = [member.import_name for member in reversed(SHARED)]
    return [" | ".join(member.import_name for member in PACKAGES), *below]


def lint_imports(folder: Path, roots: list[str], above_to_below: list[str]) -> subprocess.CompletedProcess[str]:
    """Check one contract, written into `folder`, from which packages can be imported too."""
    config = folder / "importlinter.ini"
    lines = ["[importlinter]", "root_packages =", *(f"    {name}" for name in roots)]
    lines += ["[importlinter:contract:house]", "name = packages stand on tinyworld, tinyworld on vfm_core"]
    lines += ["type = layers", "layers =", *(f"    {layer}" for layer in above_to_below)]
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [str(Path(sys.executable).parent / "lint-imports"), "--config", str(config), "--no-cache"]
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, check=False)


def test_imports_go_one_way(tmp_path: Path) -> None:
    done = lint_imports(tmp_path, [member.import_name for member in MEMBERS], layers())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("importer", "imported", "kept"),
    [("alpha", "base", True), ("alpha", "beta", False), ("base", "alpha", False), ("base", "ground", True)],
)
def test_a_wrong_import_is_seen(tmp_path: Path, importer: str, imported: str, kept: bool) -> None:
    for name in ("alpha", "beta", "base", "ground"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / importer / "inner.py").write_text(f"def f() -> None:\n    from {imported} import x\n")
    done = lint_imports(tmp_path, ["alpha", "beta", "base", "ground"], ["alpha | beta", "base", "ground"])
    assert ("1 kept, 0 broken" if kept else "0 kept, 1 broken") in done.stdout
    assert (done.returncode == 0) is kept


def test_layers_name_every_member() -> None:
    named = {name for layer in layers() for name in layer.split(" | ")}
    assert named == {member.import_name for member in MEMBERS}
