import subprocess
from pathlib import Path

import pytest

from runner import checks
from runner.process import Failure

# Written in pieces: this file is checked too.
PY = "pypi"


@pytest.mark.parametrize(
    "text",
    [
        f"pip install --index-url {PY}.org finecam",
        f"https://{PY}.org/project/finecam",
        "https://files.python" + "hosted.org/packages/x",
        "index-url = https://mirror.example" + "/simple",
        "https://mirror.example" + "/simple/torch",
        "https://files.example/a/b/x-1-py3-none-any" + ".whl",
        "see https://files.example/x-1" + ".tar.gz",
    ],
)
def test_an_index_is_seen(text: str) -> None:
    assert checks.index_hosts(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://arxiv.org/abs/2501.11309",
        "a simple/easy way, torch-2.0.tar.gz",
        "https://github.com/org/repo.git",
        "it is simpler: https://docs.example/simpler",
        "gh-action-pypi-publish",
    ],
)
def test_other_addresses_are_fine(text: str) -> None:
    assert checks.index_hosts(text) == []


@pytest.mark.parametrize("path", ["/ro" + "ot/x", "/ho" + "me/anna/data", "(/wo" + "rk/main)", "/Us" + "ers/anna/x"])
def test_a_machine_path_is_seen(path: str) -> None:
    assert checks.machine_paths(f"data in {path}")


def test_the_checkouts_own_folder_is_seen() -> None:
    assert checks.machine_paths("see /data/checkout/file", [Path("/data/checkout")]) == ["/data/checkout"]
    assert checks.machine_paths("see /file", [Path("/")]) == []


@pytest.mark.parametrize("text", ["frame/work/x", "~/home/x/", "../ro" + "ot/x", "https://x.org/home/page", "/data/x"])
def test_other_paths_are_fine(text: str) -> None:
    assert checks.machine_paths(text) == []


@pytest.mark.parametrize("word", ["TO" + "DO", "FIX" + "ME", "@pytest.mark.xf" + "ail"])
def test_unfinished_work_is_seen(word: str) -> None:
    assert checks.left_for_later(f"x = 1  # {word}: later")
    assert checks.left_for_later("a todo list, xfails") == []


def test_files_are_what_git_does_not_ignore(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="git cannot list the files"):
        checks.files(tmp_path)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("ignored/\n")
    (tmp_path / "new ünï.txt").write_text("x")
    (tmp_path / "ignored").mkdir()
    (tmp_path / "ignored" / "x.txt").write_text("x")
    assert [path.name for path in checks.files(tmp_path)] == [".gitignore", "new ünï.txt"]


def test_binary_files_have_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x00\x01")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "c.txt").write_text("é")
    assert [checks.text_of(tmp_path / name) for name in ("a.bin", "b.bin", "c.txt")] == [None, None, "é"]
