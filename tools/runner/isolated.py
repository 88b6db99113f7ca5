"""A package from its wheels alone: does it install, and pass its own tests, with nothing but what it declares?

The wheels of the package and of the members it stands on are built; a fresh environment gets the package's wheel with
its `test` extra, and through it only declared dependencies, at the locked versions and with every hash verified; the
tests are copied out of the tree, so that nothing of the checkout can be imported by accident.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from runner import environment, uv
from runner.process import Failure, clean_environment, one_thread, program, run, say, scripts_dir, status
from runner.workspace import Member, closure, members


def build_wheels(root: Path, wanted: Sequence[Member], folder: Path, build_constraints: Path) -> dict[str, Path]:
    """Build one wheel per member, build backends pinned by the lock; the wheel's path by the member's name."""
    wheels = {}
    for member in wanted:
        out = folder / member.name
        command = [uv.find(root), "build", "--quiet", "--wheel", "--out-dir", out]
        run([*command, "--build-constraints", build_constraints, "--require-hashes", member.path], cwd=root)
        wheels[member.name] = next(out.glob("*.whl"))
    return wheels


def wheel_requirements(wheels: dict[str, Path], member: Member, extra: str | None) -> str:
    """A requirements file for local wheels, each with its hash; the member's own with an extra."""
    lines = []
    for name, wheel in wheels.items():
        extras = f"[{extra}]" if extra and name == member.name else ""
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines.append(f"{name}{extras} @ {wheel.resolve().as_uri()} --hash=sha256:{digest}\n")
    return "".join(lines)


def install(
    root: Path,
    member: Member,
    wheels: dict[str, Path],
    pins: environment.Requirements,
    folder: Path,
    extra: str | None = None,
    python: str = sys.executable,
) -> Path:
    """A fresh environment in `folder` with the wheels and what they declare, at the locked versions; returns it."""
    resolver = uv.find(root)
    target = folder / "environment"
    run([resolver, "venv", "--quiet", "--python", python, target], cwd=folder)
    wanted = folder / "wheels.txt"
    wanted.write_text(wheel_requirements(wheels, member, extra), encoding="utf-8")
    options = ["--constraints", pins.everything, "--build-constraints", pins.build, "--require-hashes"]
    into = ["--python", program(target, "python")]
    run([resolver, "pip", "install", "--quiet", *into, *options, "--requirements", wanted], cwd=folder)
    return target


def pytest_settings(root_pyproject: str) -> str:
    """The `[tool.pytest.ini_options]` table of the workspace, as text, for tests that run outside of it."""
    match = re.search(r"^\[tool\.pytest\.ini_options\]\n.*?(?=^\[|\Z)", root_pyproject, flags=re.MULTILINE | re.DOTALL)
    if match is None:
        raise Failure("no [tool.pytest.ini_options] in pyproject.toml")
    return re.sub(r"^(?:testpaths|pythonpath) = .*\n", "", match[0], flags=re.MULTILINE)


def test(root: Path, member: Member, folder: Path, pytest_options: Sequence[str], python: str | None = None) -> int:
    """Run a member's tests from its wheels alone; returns pytest's exit code."""
    if "test" not in member.extras:
        raise Failure(f"no `test` extra in {member.path / 'pyproject.toml'}: its tests cannot say what they need")
    say(f"{member.name}: building wheels and a fresh environment")
    stack = closure(member, members(root))
    pins = environment.export(root, uv.find(root), folder)
    wheels = build_wheels(root, stack, folder / "wheels", pins.build)
    fresh = install(root, member, wheels, pins, folder, "test", python or sys.executable)
    work = folder / "work"
    shutil.copytree(member.tests, work / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    settings = pytest_settings((root / "pyproject.toml").read_text(encoding="utf-8"))
    (work / "pyproject.toml").write_text(settings, encoding="utf-8")
    env = clean_environment(one_thread(), scripts_dir(fresh))
    for other in stack:
        _require_inside(fresh, other.import_name, work, env)
    say(f"{member.name}: running its tests")
    return status([program(fresh, "python"), "-m", "pytest", "tests", *pytest_options], cwd=work, env=env)


def _require_inside(fresh: Path, module: str, work: Path, env: dict[str, str]) -> None:
    code = f"import {module}; print({module}.__file__)"
    origin = run([program(fresh, "python"), "-c", code], cwd=work, env=env, stdout=subprocess.PIPE).strip()
    if not Path(origin).resolve().is_relative_to(fresh.resolve()):
        raise Failure(f"{module} was imported from {origin}, not from its wheel")
