"""uv, the installer: the one on the path where it is new enough, otherwise the locked one in a private folder."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from runner.process import Failure, clean_environment, program, say

MINIMUM = (0, 9)
"""The oldest uv with which syncing, wheel building and isolated installs from the neutral lock were tried."""


def parse_version(text: str) -> tuple[int, ...]:
    """`uv 0.13.9 (...)` -> (0, 13, 9); () where there is no version."""
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in match.groups(default="0")) if match else ()


def pinned_requirement(lock: dict[str, Any], name: str) -> tuple[str, str]:
    """The locked version of a distribution, and its line with every wheel's hash for pip's `--require-hashes`."""
    for package in lock.get("package", []):
        if package["name"] == name and package.get("wheels"):
            hashes = [wheel["hash"] for wheel in package["wheels"]]
            pin = f"{name}=={package['version']}"
            return package["version"], " ".join([pin, *(f"--hash={value}" for value in hashes)])
    raise Failure(f"{name} is not in uv.lock")


def find(root: Path) -> Path:
    """A uv to run; installs the locked one under `.cache/` when there is none on the path."""
    on_path = shutil.which("uv")
    if on_path and _version(Path(on_path)) >= MINIMUM:
        return Path(on_path)
    with (root / "uv.lock").open("rb") as file:
        version, requirement = pinned_requirement(tomllib.load(file), "uv")
    private = root / ".cache" / f"uv-{version}"
    if not program(private, "uv").exists():
        _bootstrap(private, version, requirement)
    return program(private, "uv")


def _version(uv: Path) -> tuple[int, ...]:
    try:
        done = subprocess.run([uv, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ()  # e.g. a version manager's stand-in that has no uv behind it
    return parse_version(done.stdout)


def _bootstrap(private: Path, version: str, requirement: str) -> None:
    say(f"No uv on the path: installing uv {version} into {private} (hashes verified)")
    shutil.rmtree(private, ignore_errors=True)
    private.parent.mkdir(parents=True, exist_ok=True)
    wanted = private.parent / f"uv-{version}.txt"
    wanted.write_text(requirement + "\n", encoding="utf-8")
    pip = [str(program(private, "python")), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", str(private)],
        [*pip, "--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", str(wanted)],
    ]
    for step in steps:
        if subprocess.run(step, env=clean_environment(), stdout=sys.stderr, check=False).returncode:
            shutil.rmtree(private, ignore_errors=True)
            raise Failure(
                f"could not install uv with {sys.executable} -m venv and pip; install uv itself, or what is missing "
                "(on Debian and Ubuntu: apt-get install python3-venv)"
            )
    wanted.unlink()
