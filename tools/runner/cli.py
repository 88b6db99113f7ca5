"""The command line of `tools/run.py`: parsing and the order of things; each job is a module of its own."""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from runner import benches, demo, environment, isolated, lock, release
from runner.process import Failure, UsageError, clean_environment, one_thread, program, run, say, scripts_dir, status
from runner.workspace import ROOT, Member, members, normal_name, select

HOUSE = "house"
"""What `test` calls the checks of the workspace itself, tools/tests."""

EPILOG = """examples:
  python3 tools/run.py demo                          every package's demo, and demo/index.html
  python3 tools/run.py test                          every test
  python3 tools/run.py test finecam -- -k render -x  one package's tests, with options for pytest
  python3 tools/run.py test house                    the checks that guard the workspace
  python3 tools/run.py test --isolated finecam       from its wheels alone, in a fresh environment
  python3 tools/run.py lock --check                  is the lock neutral and up to date?
"""


class Parser(argparse.ArgumentParser):
    """Errors as one line, like every command of this workspace."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python3 {self.prog} --help")


def parser() -> Parser:
    """The parser; kept apart so that tests can look at it."""
    top = Parser(prog="tools/run.py", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.description = "Install the locked environment where needed, and run. Words after -- go to what is run."
    verbs = top.add_subparsers(dest="verb", required=True, metavar="COMMAND", parser_class=Parser)

    one = verbs.add_parser("demo", help="run the packages' embedded studies and link their reports")
    one.add_argument("packages", nargs="*", metavar="PACKAGE", help="default: all")
    one.add_argument("--out", type=Path, default=ROOT / "demo", metavar="DIR", help="default: demo/ of the workspace")

    one = verbs.add_parser("test", help="run tests")
    one.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"package or '{HOUSE}'; default: everything")
    one.add_argument("--isolated", action="store_true", help="each package from its wheels alone")
    one.add_argument("--python", metavar="PYTHON", help="with --isolated: version or path of the Python to use")

    one = verbs.add_parser("bench", help="run the packages' benches and write their JSON")
    one.add_argument("packages", nargs="*", metavar="PACKAGE", help="default: all")
    one.add_argument("--out", type=Path, default=ROOT / "bench", metavar="DIR", help="default: bench/ of the workspace")

    one = verbs.add_parser("sync", help="install the locked environment into .venv")
    one.add_argument("--python", metavar="PYTHON", help="version or path; makes the environment anew")
    one.add_argument("--clear", action="store_true", help="make the environment anew")

    one = verbs.add_parser("lock", help="make uv.lock from the pyproject.toml files, index-neutral")
    one.add_argument("--check", action="store_true", help="only say whether it is neutral and up to date")
    one.add_argument("--upgrade", action="store_true", help="take the newest version of everything")
    one.add_argument("--upgrade-package", action="append", default=[], metavar="NAME", help="of this; repeatable")

    one = verbs.add_parser("release", help="is a package ready to be published? then tag it")
    one.add_argument("package", metavar="PACKAGE")
    one.add_argument("--check", action="store_true", help="only check, do not tag")
    one.add_argument("--tag", metavar="TAG", help="the tag that must fit this version")
    one.add_argument("--out", type=Path, metavar="DIR", help="keep the built sdist and wheel here")

    one = verbs.add_parser("list", help="print the names of the members, for scripts")
    one.add_argument("packages", nargs="*", metavar="PACKAGE", help="only these; default: all")
    one.add_argument("--kind", choices=["package", "shared"], help="only these")
    one.add_argument("--json", action="store_true", help="as a JSON list")
    return top


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Run one command; returns the exit code: 0 done, 1 it did not work, 2 bad usage, 130 Ctrl-C."""
    own, rest = list(arguments), []
    if "--" in own:
        rest = own[own.index("--") + 1 :]
        own = own[: own.index("--")]
    try:
        options = parser().parse_args(own)
        if rest and options.verb in {"sync", "lock", "release", "list"}:
            raise UsageError(f"{options.verb} takes no words after --")
        return globals()[f"_{options.verb}"](root, options, rest)
    except UsageError as error:
        say(f"error: {error}")
        return 2
    except Failure as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("\ninterrupted")
        return 130


def _packages(root: Path, names: Sequence[str]) -> list[Member]:
    return select(names, [member for member in members(root) if member.kind == "package"])


def _demo(root: Path, options: argparse.Namespace, rest: list[str]) -> int:
    packages = _packages(root, options.packages)
    home = environment.sync(root)
    out = options.out.resolve()
    outcomes = demo.run_all(home, packages, out, rest)
    for one in outcomes:
        print(f"{one.name:16} {one.error or f'{one.seconds:.0f} s'}")
    print(f"open {out / 'index.html'}")
    return 1 if any(one.error for one in outcomes) else 0


def _test(root: Path, options: argparse.Namespace, rest: list[str]) -> int:
    everything = members(root)
    if options.python and not options.isolated:
        raise UsageError("--python goes with --isolated")
    if options.isolated:
        return max(
            _test_isolated(root, member, options.python, rest) for member in select(options.packages, everything)
        )
    names = [name for name in options.packages if normal_name(name) != HOUSE]
    with_house = len(names) < len(options.packages) or not options.packages
    chosen = select(names, everything) if names or not options.packages else []
    paths = [root / "tools" / "tests"] * with_house + [member.tests for member in chosen]
    home = environment.sync(root)
    env = clean_environment(one_thread(), scripts_dir(home))
    command = [program(home, "python"), "-m", "pytest", *_pytest_options(), *paths, *rest]
    return status(command, cwd=root, env=env)


def _pytest_options(workers: int | None = None) -> list[str]:
    """Quiet, the slowest tests named, one worker per core: a file stays with one worker, for its shared fixtures."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, 4)  # each worker holds torch and transformers
    parallel = ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
    return ["-p", "no:cacheprovider", "-q", "--durations=15", *parallel]


def _test_isolated(root: Path, member: Member, python: str | None, rest: list[str]) -> int:
    lock.require_fresh(root)
    with tempfile.TemporaryDirectory(prefix=f"{member.name}-isolated-") as folder:
        return isolated.test(root, member, Path(folder), [*_pytest_options(), *rest], python)


def _bench(root: Path, options: argparse.Namespace, rest: list[str]) -> int:
    packages = _packages(root, options.packages)
    for file in benches.run_all(environment.sync(root), packages, options.out.resolve(), rest):
        print(file)
    return 0


def _sync(root: Path, options: argparse.Namespace, rest: list[str]) -> int:
    home = environment.sync(root, python=options.python, clear=options.clear)
    print(f"{home} is what uv.lock says")
    return 0


def _lock(root: Path, options: argparse.Namespace, rest: list[str]) -> int:
    if options.check:
        if options.upgrade or options.upgrade_package:
            raise UsageError("--check changes nothing: leave out the upgrade options")
        found = lock.problems(root)
        for problem in found:
            say(f"error: {problem}")
        say(f"run `{lock.COMMAND}` and commit the result" if found else "uv.lock is index-neutral and up to date")
        return 1 if found else 0
    lock.make(root, True if options.upgrade else options.upgrade_package)
    return 0


def _release(root: Path, options: argparse.Namespace, rest: list[str]) -> int:
    (member,) = select([options.package], members(root))
    lock.require_fresh(root)
    tag = release.tag_of(member)
    if not options.check:
        changes = run(["git", "status", "--porcelain"], cwd=root, stdout=subprocess.PIPE)
        if changes:
            raise Failure("there are uncommitted changes: a release is tagged from a clean checkout")
    with tempfile.TemporaryDirectory(prefix="release-") as folder:
        out = options.out.resolve() if options.out else Path(folder) / "dist"
        built = release.check(root, member, Path(folder), out, options.tag)
        for file in built:
            print(file.name if options.out is None else file)
    print(f"{member.name} {member.version} is ready")
    if not options.check:
        run(["git", "tag", "--annotate", tag, "--message", f"{member.name} {member.version}"], cwd=root)
        print(f"tagged; publish with: git push origin {tag}")
    return 0


def _list(root: Path, options: argparse.Namespace, rest: list[str]) -> int:
    options_of_kind = [member for member in members(root) if options.kind in {None, member.kind}]
    names = [member.name for member in select(options.packages, options_of_kind)]
    print(json.dumps(names) if options.json else "\n".join(names))
    return 0
