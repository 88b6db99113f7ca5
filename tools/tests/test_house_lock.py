"""The lock is neutral, up to date, and agrees with what the pyproject.toml files ask for."""

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from runner import lock, uv
from runner.workspace import ROOT, Member, members, normal_name, read_toml

LOCKED: dict[str, list[str]] = {}
for _package in read_toml(ROOT / "uv.lock")["package"]:
    LOCKED.setdefault(_package["name"], []).extend([_package["version"]] if "version" in _package else [])


def asked_for() -> dict[str, list[str]]:
    """Every requirement of the workspace by the file that states it."""
    asked = {}
    for name, file in lock.pyprojects(ROOT).items():
        table = read_toml(file)
        project = table.get("project", {})
        extras = project.get("optional-dependencies", {}).values()
        groups = table.get("dependency-groups", {}).values()
        asked[name] = [*project.get("dependencies", []), *(r for some in (*extras, *groups) for r in some)]
        asked[name] += table.get("build-system", {}).get("requires", [])
    return asked


def test_the_lock_is_neutral_and_up_to_date() -> None:
    assert lock.problems(ROOT) == []


@pytest.mark.parametrize(("file", "requirements"), asked_for().items())
def test_every_requirement_is_locked_at_a_version_that_fits(file: str, requirements: list[str]) -> None:
    local = {member.name for member in members()}
    for text in requirements:
        requirement = Requirement(text)
        name = normal_name(requirement.name)
        if name in local or (requirement.marker and not requirement.marker.evaluate()):
            continue
        versions = LOCKED.get(name)
        assert versions, f"{file} asks for {text}, uv.lock does not have it"
        assert all(requirement.specifier.contains(v, prereleases=True) for v in versions), (text, versions)


@pytest.mark.parametrize("member", members(), ids=lambda member: member.name)
def test_declared_pythons_are_what_ci_runs(member: Member) -> None:
    wanted = SpecifierSet(read_toml(member.path / "pyproject.toml")["project"]["requires-python"])
    assert all(wanted.contains(python) for python in ("3.11.0", "3.12.0", "3.13.0"))
    assert not wanted.contains("3.10.14")


def test_one_oldest_uv_is_named() -> None:
    assert read_toml(ROOT / "pyproject.toml")["tool"]["uv"]["required-version"] == f">={'.'.join(map(str, uv.MINIMUM))}"
