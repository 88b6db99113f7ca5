"""The index-neutral lock file: every version and every hash pinned, no package index named.

uv writes into its lock file the index that answered. Someone behind another mirror can then not use the file, and the
repository carries a host name that is nobody's business. So `make` lets uv resolve in a scratch copy and `neutralise`
cuts out what names an index. uv still exports hash-pinned requirements from what is left (`uv export --frozen`), and a
plain `uv sync` resolves again, from whatever index its user has, to the same versions.

uv's own freshness check needs what was cut out. In its place the file carries, for every pyproject.toml, a digest of
the tables that decide about the resolution; `problems` compares them without a network.
"""

import hashlib
import json
import re
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from runner import uv
from runner.process import Failure, run, say
from runner.workspace import members, read_toml

COMMAND = "python3 tools/run.py lock"
TITLE = (
    f"# Index-neutral, made by `{COMMAND}` (CONTRIBUTING.md says why); a plain `uv lock` would write an index into it."
)
REGISTRY = "registry"
_ARTEFACT = re.compile(r'\b(?:url|path) = "(?:[^"]*/)?([^"/#?]+\.(?:whl|zip|tar\.[a-z0-9]+))(?:[?#][^"]*)?"')
_PINNED_SOURCE = re.compile(r'source = \{ (git|url|path|directory) = "([^"]*)"')


def pyprojects(root: Path) -> dict[str, Path]:
    """Every pyproject.toml of the workspace by its path from the root, the root's own first."""
    files = [root / "pyproject.toml", *sorted(member.path / "pyproject.toml" for member in members(root))]
    return {file.relative_to(root).as_posix(): file for file in files}


def digest(pyproject: dict[str, Any]) -> str:
    """A digest of what decides about the resolution; versions, descriptions and tool settings do not change it."""
    project = pyproject.get("project", {})
    decisive = {
        "name": project.get("name"),
        "requires-python": project.get("requires-python"),
        "dependencies": sorted(project.get("dependencies", [])),
        "optional-dependencies": {k: sorted(v) for k, v in project.get("optional-dependencies", {}).items()},
        "dependency-groups": {k: sorted(map(str, v)) for k, v in pyproject.get("dependency-groups", {}).items()},
        "uv": {k: v for k, v in pyproject.get("tool", {}).get("uv", {}).items() if k != "required-version"},
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]


def header(digests: dict[str, str]) -> str:
    """The comment lines at the top of the lock."""
    return "".join([f"{TITLE}\n", *(f"# inputs: {name} {value}\n" for name, value in digests.items()), "\n"])


def recorded_digests(text: str) -> dict[str, str]:
    """The digests that a lock carries in its comment lines."""
    return dict(re.findall(r"^# inputs: (\S+) ([0-9a-f]+)$", text, flags=re.MULTILINE))


def neutralise(text: str) -> str:
    """uv's lock without an index, a host or a path, and without what a member's pyproject.toml says anyway.

    Raises
    ------
    Failure
        When a dependency comes from a repository, an address or a folder instead of an index.
    """
    pinned = _PINNED_SOURCE.search(text)
    if pinned:
        raise Failure(f"a dependency comes from {pinned[1]} = {pinned[2]!r}: only packages from an index can be locked")
    text = re.sub(r"\A(?:#.*\n|\n)+", "", text)
    text = re.sub(r'\bregistry = "[^"]*"', f'registry = "{REGISTRY}"', text)
    text = _ARTEFACT.sub(r'url = "\1"', text)
    text = re.sub(r"^requires-dist = \[(?:.*\]|\n(?:.+\n)*?\])\n", "", text, flags=re.MULTILINE)
    # A release of one package must not touch the lock: its members' own versions are in their pyproject.toml files.
    members_version = r'^version = "[^"]*"\n(?=source = \{ (?:editable|virtual) = )'
    return re.sub(members_version, "", text, flags=re.MULTILINE)


def neutrality_problems(text: str) -> list[str]:
    """What in a lock still names an index, or pins less than a hash."""
    try:
        lock = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return [f"uv.lock is not TOML: {error}"]
    found = []
    for package in lock.get("package", []):
        source = package.get("source", {})
        if "registry" in source and source["registry"] != REGISTRY:
            found.append(f"uv.lock names the index {source['registry']} for {package['name']}")
        elif not source.keys() & {"registry", "editable", "virtual"}:
            found.append(f"uv.lock takes {package['name']} from elsewhere than an index: {source}")
        artefacts = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        found += [f"uv.lock names a file host: {a['url']}" for a in artefacts if "/" in a.get("url", "")]
        found += [f"uv.lock names a folder: {a['path']}" for a in artefacts if "path" in a]
        if "registry" in source and not artefacts:
            found.append(f"uv.lock has no file for {package['name']}")
        if not all(a.get("hash", "").startswith("sha256:") for a in artefacts):
            found.append(f"uv.lock has a file without a hash for {package['name']}")
    if "://" in text:
        found.append("uv.lock contains an address")
    return found


def problems(root: Path) -> list[str]:
    """Everything that keeps the lock from being neutral and up to date; needs no network."""
    file = root / "uv.lock"
    if not file.exists():
        return ["there is no uv.lock"]
    text = file.read_text(encoding="utf-8")
    recorded = recorded_digests(text)
    current = {name: digest(read_toml(path)) for name, path in pyprojects(root).items()}
    found = neutrality_problems(text)
    for name, value in current.items():
        if recorded.get(name) != value:
            found.append(f"{name} {'changed' if name in recorded else 'came'} since uv.lock was made")
    found += [f"uv.lock was made with a {name} that is gone" for name in recorded if name not in current]
    return found


def require_fresh(root: Path) -> None:
    """Raise `Failure` with the first problem of the lock and the remedy."""
    found = problems(root)
    if found:
        raise Failure(f"{found[0]}; run `{COMMAND}` and commit the result")


def make(root: Path, upgrade: bool | list[str] = False) -> None:
    """Resolve in a scratch copy, keep the pinned versions that still fit, write the neutral result.

    Parameters
    ----------
    root
        The workspace.
    upgrade
        True: take the newest version of everything; a list: of these distributions.
    """
    resolver = uv.find(root)
    with tempfile.TemporaryDirectory(prefix="lock-") as folder:
        scratch = Path(folder)
        for name, file in pyprojects(root).items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, scratch / name)
        if (root / "uv.lock").exists():
            shutil.copyfile(root / "uv.lock", scratch / "uv.lock")
        options = (
            ["--upgrade"] if upgrade is True else [w for name in upgrade or [] for w in ("--upgrade-package", name)]
        )
        run([resolver, "lock", "--directory", scratch, *options], cwd=scratch)
        text = neutralise((scratch / "uv.lock").read_text(encoding="utf-8"))
    digests = {name: digest(read_toml(path)) for name, path in pyprojects(root).items()}
    remaining = neutrality_problems(text)
    if remaining:
        raise Failure(f"{remaining[0]}; uv writes something that tools/runner/lock.py does not know")
    partial = root / "uv.lock.partial"
    partial.write_text(header(digests) + text, encoding="utf-8")
    partial.replace(root / "uv.lock")
    say("uv.lock is made: index-neutral and up to date")
