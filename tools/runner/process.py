"""Running other programs, and the two ways in which this tool fails."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


class UsageError(Exception):
    """Bad input or usage: one line on stderr, exit 2."""


class Failure(Exception):
    """Something that was asked for did not work: one line on stderr, exit 1."""


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout stays free for results."""
    print(text, file=sys.stderr, flush=True)


def clean_environment(extra: Mapping[str, str] | None = None, bin_dir: Path | None = None) -> dict[str, str]:
    """The caller's environment without another Python's settings; `bin_dir` comes first on the path.

    Bytecode is written: without it every process that a test starts would compile torch anew, for ten seconds.
    """
    foreign = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE"}
    env = {k: v for k, v in os.environ.items() if k not in foreign}
    if bin_dir is not None:
        env["PATH"] = f"{bin_dir}{os.pathsep}{env.get('PATH', '')}"
    return env | dict(extra or {})


def one_thread() -> dict[str, str]:
    """Settings for test workers that share the cores: one thread each, unless the caller decided otherwise."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: os.environ.get(name, "1") for name in names}


def run(
    command: Sequence[object], *, cwd: Path, env: Mapping[str, str] | None = None, stdout: int | None = None
) -> str:
    """Run a program to its end and return what it printed where `stdout=subprocess.PIPE`; every word becomes a str.

    Raises
    ------
    Failure
        When it cannot be started or ends with another exit code than 0; names the command.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=cwd, env=env or clean_environment(), stdout=stdout, text=True, check=False)
    except OSError as error:
        raise Failure(f"cannot run {words[0]}: {error}") from error
    if done.returncode:
        raise Failure(f"exit code {done.returncode} from: {shlex.join(words)[:400]}")
    return done.stdout or ""


def status(command: Sequence[object], *, cwd: Path, env: Mapping[str, str]) -> int:
    """Run a program whose exit code is the answer (pytest), output straight to the terminal."""
    return subprocess.run([str(word) for word in command], cwd=cwd, env=env, check=False).returncode


def scripts_dir(environment: Path) -> Path:
    """Where a virtual environment keeps its programs."""
    return environment / ("Scripts" if os.name == "nt" else "bin")


def program(environment: Path, name: str) -> Path:
    """A program of a virtual environment."""
    return scripts_dir(environment) / (f"{name}.exe" if os.name == "nt" else name)
