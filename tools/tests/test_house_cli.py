"""Every command and subcommand explains itself in under two seconds, without loading torch."""

import importlib
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from runner.workspace import Member, members

SECONDS = 2.0
COMMANDS = [member for member in members() if member.scripts]
every_command = pytest.mark.parametrize("member", COMMANDS, ids=lambda member: member.name)


def subcommands(member: Member) -> list[list[str]]:
    """The words of every command below a member's program, read from its Typer app."""
    app = importlib.import_module(f"{member.import_name}.cli").app
    assert isinstance(app, typer.Typer)

    def walk(command: object, words: list[str]) -> list[list[str]]:
        below = getattr(command, "commands", {})
        return [words, *(found for name, one in below.items() for found in walk(one, [*words, name]))]

    return walk(typer.main.get_command(app), [])


def seconds_of_help(member: Member, words: list[str]) -> float:
    """How long `--help` takes: the wall clock, or on a busy machine, where that measures the others, its own work."""
    program = Path(sys.executable).parent / member.name
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([program, *words, "--help"], capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    work = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return work * 2 if wall < 10 and work * 2 < wall else wall


@every_command
def test_help_of_everything_answers_at_once(member: Member) -> None:
    found = subcommands(member)
    assert len(found) > 1, "a program without subcommands"
    slow = {}
    for words in found:
        best = seconds_of_help(member, words)
        if best > SECONDS:  # the first may have waited for the disk
            best = min(best, seconds_of_help(member, words))
        if best > SECONDS:
            slow[" ".join(words)] = best
    assert slow == {}


@every_command
def test_the_verbs_that_every_package_has(member: Member) -> None:
    verbs = {words[0] for words in subcommands(member) if len(words) == 1}
    if member.kind == "package":
        assert {"demo", "bench"} <= verbs


@every_command
def test_version_and_bad_usage(member: Member) -> None:
    program = Path(sys.executable).parent / member.name
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"{member.name} {member.version}"
    wrong = subprocess.run([program, "no-such-verb"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1
