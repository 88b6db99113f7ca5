from collections.abc import Callable
from pathlib import Path

import pytest

from runner.process import Failure, UsageError
from runner.workspace import closure, members, normal_name, select


def test_members_come_after_what_they_need(workspace: Path) -> None:
    assert [m.name for m in members(workspace)] == ["core", "world", "avid", "fine"]
    assert [m.kind for m in members(workspace)] == ["shared", "shared", "package", "package"]


def test_a_new_package_is_found_without_an_edit(workspace: Path, add_member: Callable[..., Path]) -> None:
    add_member("packages/t2i-unlearn", ("core",))
    new = members(workspace)[-1]
    assert (new.name, new.import_name, new.requires) == ("t2i-unlearn", "t2i_unlearn", frozenset({"core"}))
    assert new.source == workspace / "packages/t2i-unlearn/src/t2i_unlearn"


def test_a_folder_without_pyproject_is_no_member(workspace: Path) -> None:
    (workspace / "packages" / "notes").mkdir()
    assert len(members(workspace)) == 4


def test_a_need_by_an_extra_counts(workspace: Path) -> None:
    file = workspace / "shared/world/pyproject.toml"
    file.write_text(file.read_text().replace('test = ["pytest>=8"]', 'test = ["pytest>=8", "avid"]'))
    assert [m.name for m in members(workspace)] == ["core", "avid", "world", "fine"]


def test_a_circle_is_named(workspace: Path) -> None:
    file = workspace / "shared/core/pyproject.toml"
    file.write_text(file.read_text().replace('"rich>=13"', '"world"'))
    with pytest.raises(Failure, match="circle: core, world"):
        members(workspace)


def test_a_broken_pyproject_is_named(workspace: Path) -> None:
    (workspace / "shared/core/pyproject.toml").write_text("[project\n")
    with pytest.raises(Failure, match=r"cannot read .*core.pyproject\.toml"):
        members(workspace)


def test_a_missing_field_is_named(workspace: Path) -> None:
    (workspace / "shared/core/pyproject.toml").write_text('[project]\nname = "core"\nversion = "1"\n')
    with pytest.raises(Failure, match=r"no project\.description in .*core"):
        members(workspace)


def test_closure_is_what_a_package_stands_on(workspace: Path) -> None:
    everything = members(workspace)
    by_name = {m.name: m for m in everything}
    assert [m.name for m in closure(by_name["fine"], everything)] == ["core", "world", "fine"]
    assert [m.name for m in closure(by_name["avid"], everything)] == ["core", "avid"]
    assert [m.name for m in closure(by_name["core"], everything)] == ["core"]


def test_select(workspace: Path) -> None:
    everything = members(workspace)
    assert [m.name for m in select([], everything)] == ["core", "world", "avid", "fine"]
    assert [m.name for m in select(["fine", "Core"], everything)] == ["core", "fine"]
    with pytest.raises(UsageError, match="unknown package: 'fin'; choose from fine"):
        select(["fin"], everything)
    with pytest.raises(UsageError, match="choose from core, world, avid, fine"):
        select(["zzz"], everything)


@pytest.mark.parametrize(
    ("requirement", "name"),
    [("Vfm_Core[all]>=1", "vfm-core"), ("a.b @ file:///x", "a-b"), (" torch ; python_version<'3.12'", "torch")],
)
def test_normal_name(requirement: str, name: str) -> None:
    assert normal_name(requirement) == name


def test_no_name() -> None:
    with pytest.raises(Failure, match="not a requirement"):
        normal_name(">=1")
