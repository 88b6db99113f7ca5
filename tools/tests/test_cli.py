import ast
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner import cli, process
from runner.workspace import ROOT
from sample_workspace import FakeUv, executable

RUN = ROOT / "tools" / "run.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(RUN), *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["tset"], "invalid choice: 'tset'"),
        (["demo", "no-such-package"], "unknown package: 'no-such-package'; choose from"),
        (["test", "no-such-package"], "unknown package: 'no-such-package'; choose from"),
        (["test", "--python", "3.12"], "--python goes with --isolated"),
        (["test", "--isolated", "house"], "unknown package: 'house'"),
        (["demo", "vfm-core"], "unknown package: 'vfm-core'; choose from"),
        (["bench", "--ou"], "--out"),
        (["release"], "the following arguments are required: PACKAGE"),
        (["lock", "--check", "--upgrade"], "--check changes nothing"),
        (["sync", "--", "-k", "x"], "sync takes no words after --"),
        (["list", "--kind", "other"], "invalid choice: 'other'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(words: list[str], message: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_failure_is_one_line_and_exit_1(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = workspace / "packages/fine/pyproject.toml"
    file.write_text(file.read_text().replace("rich>=14", "rich>=15"))
    for words in (["sync"], ["demo"], ["test"], ["bench"], ["test", "--isolated"], ["release", "fine", "--check"]):
        assert cli.main(words, workspace) == 1, words
        err = capsys.readouterr().err
        assert err.startswith("error: packages/fine/pyproject.toml changed since uv.lock was made"), words
        assert err.count("\n") == 1


def test_help_answers_at_once_and_names_every_verb() -> None:
    begin = time.perf_counter()
    done = run("--help")
    assert time.perf_counter() - begin < 2
    assert done.returncode == 0
    for verb in ("demo", "test", "bench", "sync", "lock", "release", "list"):
        assert f"  {verb} " in done.stdout
        assert run(verb, "--help").returncode == 0


def test_ctrl_c(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(root: Path) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.lock, "problems", stop)
    assert cli.main(["lock", "--check"], workspace) == 130


def test_an_old_python_is_told_so() -> None:
    code = f"import sys, runpy; sys.version_info = (3, 10, 2); runpy.run_path({str(RUN)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Python 3.10 is too old for this workspace; run this file with Python 3.11")
    ast.parse(RUN.read_text(), feature_version=(3, 6))  # so that it comes to say this


def test_the_runner_needs_nothing_but_python(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(RUN.parent)!r}); import runner.cli; print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    roots = {name.partition(".")[0] for name in done.stdout.split()}
    assert roots - set(sys.stdlib_module_names) <= {"runner", "__main__"}


def test_list(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"], workspace) == 0
    assert capsys.readouterr().out.split() == ["core", "world", "avid", "fine"]
    assert cli.main(["list", "--kind", "package", "--json"], workspace) == 0
    assert json.loads(capsys.readouterr().out) == ["avid", "fine"]
    assert cli.main(["list", "--kind", "package", "--json", "fine"], workspace) == 0
    assert json.loads(capsys.readouterr().out) == ["fine"]
    assert cli.main(["list", "--kind", "package", "core"], workspace) == 2


def test_lock_check(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lock", "--check"], workspace) == 0
    (workspace / "uv.lock").unlink()
    assert cli.main(["lock", "--check"], workspace) == 1
    assert capsys.readouterr().err.endswith(
        "error: there is no uv.lock\nrun `python3 tools/run.py lock` and commit the result\n"
    )


class Asked:
    """Catches the command that `test` would run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.words: list[str] = []
        self.env: dict[str, str] = {}
        monkeypatch.setattr(cli, "status", self)

    def __call__(self, command: list[object], *, cwd: Path, env: dict[str, str]) -> int:
        self.words, self.env = [str(word) for word in command], env
        return 5

    def paths(self, workspace: Path) -> list[str]:
        words = [Path(word) for word in self.words[3:]]
        return [w.relative_to(workspace).as_posix() for w in words if w.is_relative_to(workspace)]


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        ([], ["tools/tests", "shared/core/tests", "shared/world/tests", "packages/avid/tests", "packages/fine/tests"]),
        (["fine"], ["packages/fine/tests"]),
        (["house"], ["tools/tests"]),
        (["house", "core"], ["tools/tests", "shared/core/tests"]),
    ],
)
def test_what_is_tested(
    workspace: Path, fake_uv: FakeUv, monkeypatch: pytest.MonkeyPatch, words: list[str], paths: list[str]
) -> None:
    asked = Asked(monkeypatch)
    assert cli.main(["test", *words, "--", "-k", "render"], workspace) == 5
    assert asked.paths(workspace) == paths
    assert asked.words[:3] == [str(workspace / ".venv/bin/python"), "-m", "pytest"]
    assert asked.words[-2:] == ["-k", "render"]
    assert asked.env["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")
    assert asked.env["PATH"].startswith(str(workspace / ".venv/bin"))


def test_workers() -> None:
    assert "-n" not in cli._pytest_options(1)
    assert cli._pytest_options(2)[-4:] == ["-n", "2", "--dist", "loadfile"]


def test_a_failed_demo_fails_the_command(
    workspace: Path, fake_uv: FakeUv, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Callable[..., Path]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["demo", "fine", "--out", str(out)], workspace) == 1
    assert "cannot run" in capsys.readouterr().out
    assert (out / "index.html").exists()


@pytest.mark.skipif(os.name == "nt", reason=".ci/run is a bash script")
@pytest.mark.parametrize("new_enough", [[], ["python3"], ["python3.12"], ["python3.12", "python3.11"]])
def test_ci_finds_a_python_that_is_new_enough(tmp_path: Path, new_enough: list[str]) -> None:
    for name in ("bash", "dirname", "env"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    for name in ("python3", "python3.12", "python3.11"):
        # Asked for its version with -c, otherwise it says how it was called.
        answer = 0 if name in new_enough else 1
        executable(
            tmp_path / name, f'#!/bin/sh\nif [ "$1" = -c ]; then exit {answer}; fi\necho {name} "$@" in "$PWD"\n'
        )
    done = subprocess.run(
        [ROOT / ".ci" / "run", "house"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if new_enough:
        assert done.stdout == f"{new_enough[0]} tools/run.py test house in {ROOT}\n"
    else:
        assert (done.returncode, done.stderr) == (2, "error: no Python >= 3.11 on the path\n")


def test_programs_get_a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    env = process.clean_environment(process.one_thread(), Path("bin"))
    assert not {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE"} & env.keys()
    assert env["PATH"] == f"bin{os.pathsep}{os.environ['PATH']}"
    assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"]) == ("7", "1")
