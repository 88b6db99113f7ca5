"""The workspace's environment: exactly what the lock pins, every file's hash verified, the members editable.

Build backends are pinned too (the `build` group): uv builds a source distribution or an editable member with no other
version of them, and checks their hashes.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from runner import lock, uv
from runner.process import Failure, program, run, say
from runner.workspace import members

RECIPE = "1"
"""Goes up when this file installs something else from the same lock."""


@dataclass(frozen=True)
class Requirements:
    """Two requirement files exported from the lock, both with hashes: everything, and the build backends."""

    everything: Path
    build: Path


def export(root: Path, resolver: Path, folder: Path) -> Requirements:
    """Write the lock's requirement files into `folder`."""
    common = [resolver, "export", "--frozen", "--quiet", "--no-header", "--no-annotate", "--no-emit-workspace"]
    wanted = {
        "everything": ["--all-packages", "--all-extras", "--all-groups", "--no-group", "tools"],
        "build": ["--only-group", "build"],
    }
    for name, options in wanted.items():
        run([*common, *options, "--output-file", folder / f"{name}.txt"], cwd=root, stdout=subprocess.DEVNULL)
    return Requirements(everything=folder / "everything.txt", build=folder / "build.txt")


def location(root: Path) -> Path:
    """`.venv`, or where uv's own UV_PROJECT_ENVIRONMENT puts a project's environment."""
    return root / os.environ.get("UV_PROJECT_ENVIRONMENT", ".venv")


def python_version(environment: Path) -> str | None:
    """The version of an environment's Python; None where it does not run."""
    code = "import platform; print(platform.python_version())"
    try:
        done = subprocess.run([program(environment, "python"), "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def fingerprint(root: Path, environment: Path) -> str:
    """Digest of everything that decides about an environment's content."""
    whole = hashlib.sha256(f"{RECIPE} {root} {environment}".encode())
    for file in (root / "uv.lock", *lock.pyprojects(root).values(), environment / "pyvenv.cfg"):
        whole.update(file.read_bytes() if file.exists() else b"none")
    return whole.hexdigest()


def sync(root: Path, *, python: str | None = None, clear: bool = False) -> Path:
    """Bring the environment to what the lock says and return its folder; quick when nothing changed.

    Parameters
    ----------
    root
        The workspace.
    python
        Version or path of the Python for a new environment. Without it the environment's own where there is one,
        otherwise the Python that runs this.
    clear
        Make the environment anew.
    """
    lock.require_fresh(root)
    environment = location(root)
    stamp = environment / ".lock-fingerprint"
    untouched = not clear and python is None and stamp.exists() and program(environment, "python").exists()
    if untouched and stamp.read_text(encoding="utf-8") == fingerprint(root, environment):
        return environment
    resolver = uv.find(root)
    if clear or python or not _usable(environment):
        say(f"Making a fresh environment in {environment}")
        run([resolver, "venv", "--quiet", "--clear", "--python", python or sys.executable, environment], cwd=root)
    stamp.unlink(missing_ok=True)
    say("Installing the locked environment (torch is large: the first time takes a minute or more)")
    into = ["--python", program(environment, "python")]
    with tempfile.TemporaryDirectory(prefix="sync-") as folder:
        wanted = export(root, resolver, Path(folder))
        build = ["--build-constraints", wanted.build]
        run([resolver, "pip", "sync", *into, "--require-hashes", *build, wanted.everything], cwd=root)
        editable = [word for member in members(root) for word in ("--editable", member.path)]
        run([resolver, "pip", "install", "--quiet", *into, "--no-deps", *build, *editable], cwd=root)
    stamp.write_text(fingerprint(root, environment), encoding="utf-8")
    return environment


def _usable(environment: Path) -> bool:
    if not environment.exists():
        return False
    if not (environment / "pyvenv.cfg").exists():
        raise Failure(f"{environment} exists and is not a virtual environment; move it away")
    version = python_version(environment)
    return version is not None and tuple(map(int, version.split(".")[:2])) >= (3, 11)
