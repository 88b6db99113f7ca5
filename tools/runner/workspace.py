"""Which packages there are, read from the workspace's pyproject.toml files: a new one needs no edit here."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runner.process import Failure, UsageError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Member:
    """A distribution of the workspace.

    `requires` names the other members that it needs, by itself or by one of its extras.
    """

    name: str
    path: Path
    kind: Literal["shared", "package"]
    version: str
    description: str
    requires: frozenset[str]
    scripts: tuple[str, ...]
    extras: tuple[str, ...]

    @property
    def import_name(self) -> str:
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        return self.path / "src" / self.import_name

    @property
    def tests(self) -> Path:
        return self.path / "tests"


def normal_name(requirement: str) -> str:
    """The distribution a requirement names, in its normal form: `Vfm_Core[all]>=1` -> `vfm-core`."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement.strip())
    if match is None:
        raise Failure(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises
    ------
    Failure
        When it is missing or is not TOML; names the file.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Failure(f"cannot read {path}: {error}") from error


def members(root: Path = ROOT) -> list[Member]:
    """All members, each after the members that it needs, names in order where that leaves a choice."""
    patterns = read_toml(root / "pyproject.toml").get("tool", {}).get("uv", {}).get("workspace", {}).get("members", [])
    folders = sorted({path.parent for pattern in patterns for path in root.glob(f"{pattern}/pyproject.toml")})
    tables = {folder: read_toml(folder / "pyproject.toml").get("project", {}) for folder in folders}
    for folder, table in tables.items():
        missing = [key for key in ("name", "version", "description") if key not in table]
        if missing:
            raise Failure(f"no project.{missing[0]} in {folder / 'pyproject.toml'}")
    names = {normal_name(table["name"]) for table in tables.values()}
    found = [_member(root, folder, table, names) for folder, table in tables.items()]
    return _ordered(found)


def _member(root: Path, folder: Path, table: dict[str, Any], names: set[str]) -> Member:
    extras: dict[str, list[str]] = table.get("optional-dependencies", {})
    wanted = [*table.get("dependencies", []), *(item for extra in extras.values() for item in extra)]
    name = normal_name(table["name"])
    return Member(
        name=name,
        path=folder,
        kind="shared" if folder.relative_to(root).parts[0] == "shared" else "package",
        version=table["version"],
        description=table["description"],
        requires=frozenset({normal_name(item) for item in wanted} & names - {name}),
        scripts=tuple(table.get("scripts", {})),
        extras=tuple(extras),
    )


def _ordered(found: Sequence[Member]) -> list[Member]:
    left = sorted(found, key=lambda member: (member.kind != "shared", member.name))
    done: list[Member] = []
    while left:
        ready = next((m for m in left if m.requires <= {d.name for d in done}), None)
        if ready is None:
            raise Failure(f"these packages need each other in a circle: {', '.join(m.name for m in left)}")
        done.append(ready)
        left.remove(ready)
    return done


def closure(member: Member, everything: Sequence[Member]) -> list[Member]:
    """The members that `member` stands on, directly or not, and itself last."""
    needed = {member.name}
    for other in reversed(everything):
        if other.name in needed:
            needed |= other.requires
    return [other for other in everything if other.name in needed]


def select(names: Iterable[str], options: Sequence[Member]) -> list[Member]:
    """The members with these names in the order of `options`; all of them for no name.

    Raises
    ------
    UsageError
        For an unknown name; says which names are close.
    """
    wanted = list(names)
    known = [member.name for member in options]
    for name in wanted:
        if normal_name(name) not in known:
            close = difflib.get_close_matches(name, known, n=3) or known
            raise UsageError(f"unknown package: {name!r}; choose from {', '.join(close)}")
    chosen = {normal_name(name) for name in wanted} or set(known)
    return [member for member in options if member.name in chosen]
