import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner import lock
from runner.process import Failure
from sample_workspace import NEUTRAL_LOCK, FakeUv

# In pieces: this file is checked for such addresses too.
HOST = "https://index.example" + "/simple"
FILES = "https://files.example"
FROM_UV = """version = 1
requires-python = ">=3.11"

[[package]]
name = "core"
version = "0.1.0"
source = { editable = "shared/core" }
dependencies = [
    { name = "numpy", version = "2.4.6", source = { registry = "HOST" }, marker = "python_full_version < '3.12'" },
    { name = "rich" },
]

[package.metadata]
requires-dist = [
    { name = "core", extras = ["all"], marker = "extra == 'test'", editable = "shared/core" },
    { name = "rich", specifier = ">=13" },
]
provides-extras = ["test"]

[[package]]
name = "numpy"
version = "2.4.6"
source = { registry = "HOST" }
sdist = { url = "FILES/packages/aa/numpy-2.4.6.tar.gz", hash = "sha256:01", size = 5 }
wheels = [
    { url = "FILES/packages/ab/numpy-2.4.6-cp311-x.whl", hash = "sha256:02", size = 6 },
    { url = "FILES/ab/numpy-2.4.6%2Bcpu-cp312-x.whl#sha256=02", hash = "sha256:03" },
]

[[package]]
name = "rich"
version = "15.0.0"
source = { registry = "../mirror/simple" }
wheels = [
    { path = "../mirror/files/rich-15.0.0-py3-none-any.whl", hash = "sha256:04" },
]

[[package]]
name = "tiny"
version = "0.1.0"
source = { editable = "shared/tiny" }

[package.metadata]
requires-dist = [{ name = "rich", specifier = ">=13" }]
""".replace("HOST", HOST).replace("FILES", FILES)


def test_neutral_lock_keeps_pins_and_hashes_and_names_nothing_else() -> None:
    neutral = lock.neutralise(FROM_UV)
    assert lock.neutrality_problems(FROM_UV) != []
    assert lock.neutrality_problems(neutral) == []
    by_name = {package["name"]: package for package in tomllib.loads(neutral)["package"]}
    assert by_name["numpy"] == {
        "name": "numpy",
        "version": "2.4.6",
        "source": {"registry": "registry"},
        "sdist": {"url": "numpy-2.4.6.tar.gz", "hash": "sha256:01", "size": 5},
        "wheels": [
            {"url": "numpy-2.4.6-cp311-x.whl", "hash": "sha256:02", "size": 6},
            {"url": "numpy-2.4.6%2Bcpu-cp312-x.whl", "hash": "sha256:03"},
        ],
    }
    assert by_name["rich"]["wheels"] == [{"url": "rich-15.0.0-py3-none-any.whl", "hash": "sha256:04"}]
    # A member's own version and requirements stand in its pyproject.toml only.
    assert by_name["core"]["metadata"] == {"provides-extras": ["test"]}
    assert "version" not in by_name["core"]
    assert by_name["tiny"] == {"name": "tiny", "source": {"editable": "shared/tiny"}, "metadata": {}}
    assert by_name["core"]["dependencies"][0]["source"] == {"registry": "registry"}


def test_neutralising_twice_changes_nothing() -> None:
    once = lock.neutralise(FROM_UV)
    assert lock.neutralise(once) == once
    assert lock.neutralise(lock.header({"pyproject.toml": "00"}) + once) == once


@given(st.from_regex(r"\A(?:https?|file)://[a-z0-9.:@/-]{1,30}\Z"))
def test_no_index_survives(index: str) -> None:
    text = FROM_UV.replace(HOST, index).replace(FILES, index)
    neutral = lock.neutralise(text)
    assert neutral == lock.neutralise(FROM_UV)
    assert "://" not in neutral


@pytest.mark.parametrize("source", ['git = "https://x/y?rev=1#2"', 'url = "FILES/y.whl"', 'path = "../y.whl"'])
def test_what_does_not_come_from_an_index_is_refused(source: str) -> None:
    with pytest.raises(Failure, match="only packages from an index can be locked"):
        lock.neutralise(
            FROM_UV.replace(f'source = {{ registry = "{HOST}" }}\nsdist', f"source = {{ {source} }}\nsdist")
        )


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"registry" }\nwheels', f'"{HOST}" }}\nwheels', "names the index"),
        ('url = "rich', f'url = "{FILES}/rich', "names a file host"),
        ('url = "rich', 'path = "/mirror/rich', "names a folder"),
        (', hash = "sha256:00aa"', "", "without a hash for rich"),
        ('hash = "sha256:00aa"', 'hash = "md5:00aa"', "without a hash for rich"),
        ('{ registry = "registry" }\nwheels', '{ git = "x" }\nwheels', "from elsewhere than an index"),
        ("version = 1\n", "version = 1\n# https://index.example\n", "contains an address"),
        ("version = 1\n", "version = \n", "not TOML"),
    ],
)
def test_each_way_of_not_being_neutral_is_seen(old: str, new: str, problem: str) -> None:
    assert lock.neutrality_problems(NEUTRAL_LOCK) == []
    assert old in NEUTRAL_LOCK
    assert any(problem in found for found in lock.neutrality_problems(NEUTRAL_LOCK.replace(old, new)))


def test_a_package_without_files_is_seen() -> None:
    text = NEUTRAL_LOCK + '[[package]]\nname = "ghost"\nversion = "1"\nsource = { registry = "registry" }\n'
    assert lock.neutrality_problems(text) == ["uv.lock has no file for ghost"]


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_fresh_lock_has_no_problems(workspace: Path) -> None:
    assert lock.problems(workspace) == []
    lock.require_fresh(workspace)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("packages/fine/pyproject.toml", "rich>=14", "rich>=15"),
        ("packages/fine/pyproject.toml", 'test = ["pytest>=8"]', 'test = ["pytest>=8", "timm"]'),
        ("shared/core/pyproject.toml", 'requires-python = ">=3.11"', 'requires-python = ">=3.12"'),
        ("pyproject.toml", 'test = ["pytest>=8"]', 'test = ["pytest>=9"]'),
    ],
)
def test_a_changed_dependency_makes_the_lock_stale(workspace: Path, file: str, old: str, new: str) -> None:
    edit(workspace / file, old, new)
    assert lock.problems(workspace) == [f"{file} changed since uv.lock was made"]
    with pytest.raises(Failure, match=r"run `python3 tools/run\.py lock`"):
        lock.require_fresh(workspace)


def test_a_release_or_a_tool_setting_does_not(workspace: Path) -> None:
    edit(workspace / "packages/fine/pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"')
    edit(workspace / "pyproject.toml", "key = 1", "key = 2")
    assert lock.problems(workspace) == []


def test_a_new_and_a_gone_member_are_seen(workspace: Path, add_member: Callable[..., Path]) -> None:
    add_member("packages/new")
    (workspace / "packages/avid/pyproject.toml").unlink()
    assert lock.problems(workspace) == [
        "packages/new/pyproject.toml came since uv.lock was made",
        "uv.lock was made with a packages/avid/pyproject.toml that is gone",
    ]


def test_a_lock_that_uv_wrote_over_ours_is_seen(workspace: Path) -> None:
    (workspace / "uv.lock").write_text(FROM_UV)
    assert any("names the index" in problem for problem in lock.problems(workspace))
    assert any("pyproject.toml came" in problem for problem in lock.problems(workspace))


def test_no_lock(workspace: Path) -> None:
    (workspace / "uv.lock").unlink()
    assert lock.problems(workspace) == ["there is no uv.lock"]


def test_make_resolves_in_a_copy_and_writes_the_neutral_result(workspace: Path, fake_uv: FakeUv) -> None:
    edit(workspace / "packages/fine/pyproject.toml", "rich>=14", "rich>=15")
    fake_uv.resolved.write_text(FROM_UV)
    lock.make(workspace)
    assert lock.problems(workspace) == []
    assert (workspace / "uv.lock").read_text().endswith(lock.neutralise(FROM_UV))
    ((verb, option, folder),) = fake_uv.calls
    assert (verb, option) == ("lock", "--directory")
    assert not Path(folder).is_relative_to(workspace)
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("upgrade", "options"),
    [(True, ["--upgrade"]), (["rich", "numpy"], ["--upgrade-package", "rich", "--upgrade-package", "numpy"])],
)
def test_make_passes_upgrades_on(
    workspace: Path, fake_uv: FakeUv, upgrade: bool | list[str], options: list[str]
) -> None:
    fake_uv.resolved.write_text(FROM_UV)
    lock.make(workspace, upgrade)
    assert fake_uv.calls[0][3:] == options


def test_a_failed_resolution_leaves_the_lock_as_it_was(workspace: Path, fake_uv: FakeUv) -> None:
    before = (workspace / "uv.lock").read_text()
    with pytest.raises(Failure, match=r"exit code 3 from: .*uv lock"):
        lock.make(workspace)
    fake_uv.resolved.write_text(FROM_UV.replace("sha256:02", "md5:02"))
    with pytest.raises(Failure, match="without a hash for numpy"):
        lock.make(workspace)
    assert (workspace / "uv.lock").read_text() == before
