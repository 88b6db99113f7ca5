"""A small workspace made of files, and a uv that only writes down what it was asked."""

import json
import stat
import sys
from pathlib import Path

from runner import lock

ROOT_PYPROJECT = """
[project]
name = "demo-workspace"
version = "0"
requires-python = ">=3.11"

[tool.uv.workspace]
members = ["shared/*", "packages/*"]

[dependency-groups]
test = ["pytest>=8"]

[tool.pytest.ini_options]
addopts = "-ra"
pythonpath = ["tools"]
testpaths = ["packages"]
markers = [
    "slow: takes long",
]

[tool.other]
key = 1
"""

MEMBER_PYPROJECT = """
[project]
name = "{name}"
version = "{version}"
description = "What {name} does"
requires-python = ">=3.11"
dependencies = {dependencies}

[project.optional-dependencies]
test = ["pytest>=8"]

[project.scripts]
{name} = "{module}.cli:main"
"""

NEUTRAL_LOCK = """version = 1
revision = 5
requires-python = ">=3.11"

[[package]]
name = "rich"
version = "15.0.0"
source = { registry = "registry" }
wheels = [
    { url = "rich-15.0.0-py3-none-any.whl", hash = "sha256:00aa", size = 1 },
]

[[package]]
name = "uv"
version = "0.13.9"
source = { registry = "registry" }
sdist = { url = "uv-0.13.9.tar.gz", hash = "sha256:0000", size = 1 }
wheels = [
    { url = "uv-0.13.9-py3-none-manylinux.whl", hash = "sha256:0001", size = 1 },
    { url = "uv-0.13.9-py3-none-macosx.whl", hash = "sha256:0002", size = 1 },
]
"""

# Writes its arguments to a log, makes what the real one would make, and resolves to the file it was given.
FAKE_UV = """#!{python}
import json, os, pathlib, shutil, sys
words = sys.argv[1:]
if words == ["--version"]:
    print("uv {version} (test)")
    sys.exit()
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + "\\n")
if words[0] == "venv":
    home = pathlib.Path(words[-1])
    (home / "bin").mkdir(parents=True, exist_ok=True)
    (home / "pyvenv.cfg").write_text("home = x\\n")
    link = home / "bin" / "python"
    link.unlink(missing_ok=True)
    link.symlink_to({python!r})
if words[0] == "export":
    pathlib.Path(words[words.index("--output-file") + 1]).write_text("rich==15.0.0\\n")
if words[0] == "lock":
    resolved = pathlib.Path({resolved!r})
    if not resolved.exists():
        sys.exit(3)
    shutil.copyfile(resolved, pathlib.Path(words[words.index("--directory") + 1]) / "uv.lock")
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def refresh_lock(root: Path) -> None:
    digests = {name: lock.digest(lock.read_toml(path)) for name, path in lock.pyprojects(root).items()}
    (root / "uv.lock").write_text(lock.header(digests) + NEUTRAL_LOCK, encoding="utf-8")


class FakeUv:
    """Stands on the path as `uv`; `calls` is what it was asked to do, `resolved` what its `lock` comes to."""

    def __init__(self, folder: Path, version: str = "0.13.9") -> None:
        self.log = folder / "uv-calls.jsonl"
        self.resolved = folder / "resolved.lock"
        self.bin = folder / "fake-bin"
        text = FAKE_UV.format(python=sys.executable, version=version, log=str(self.log), resolved=str(self.resolved))
        executable(self.bin / "uv", text)

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
