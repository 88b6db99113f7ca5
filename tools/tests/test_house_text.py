"""What no file of the repository contains: an index, a path of one machine, something large, something unfinished."""

from pathlib import Path

import pytest

from runner import checks
from runner.workspace import ROOT, Member, members

FILES = checks.files(ROOT)
TEXTS = {path.relative_to(ROOT).as_posix(): text for path in FILES if (text := checks.text_of(path)) is not None}


def test_there_is_something_to_look_at() -> None:
    assert {"pyproject.toml", "uv.lock", "tools/run.py"} <= TEXTS.keys()


def test_no_index_is_named() -> None:
    assert {name: found for name, text in TEXTS.items() if (found := checks.index_hosts(text))} == {}


def test_no_path_of_one_machine() -> None:
    here = [ROOT, Path.home()]
    # test_checks.py holds examples of such paths, in pieces.
    assert {name: found for name, text in TEXTS.items() if (found := checks.machine_paths(text, here))} == {}


def test_nothing_is_large() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in FILES}
    assert {name: size for name, size in sizes.items() if size > checks.LARGEST_FILE} == {}


def test_nothing_is_left_for_later() -> None:
    code = {name: text for name, text in TEXTS.items() if name.endswith(".py")}
    assert {name: found for name, text in code.items() if (found := checks.left_for_later(text))} == {}


@pytest.mark.parametrize("member", members(), ids=lambda member: member.name)
def test_source_files_hold_one_concept(member: Member) -> None:
    sources = [path for path in member.source.rglob("*.py") if path in FILES]
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert {name: lines for name, lines in lengths.items() if lines > checks.LONGEST_SOURCE} == {}
    assert "utils.py" not in lengths


def test_the_runner_is_short_too() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tools" / "runner").glob("*.py")}
    assert max(lengths.values()) <= checks.LONGEST_SOURCE
