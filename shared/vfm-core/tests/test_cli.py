"""Exit codes, one-line errors, versions, devices, tables and progress, through real processes where it matters."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vfm_core.cli import examples, print_json, print_table, progress, resolve_device, resolve_dtype
from vfm_core.errors import UserError

PROGRAM = '''
import logging, sys, time
from pathlib import Path
import typer
from vfm_core.cli import *
from vfm_core.cli import DebugOpt, OutOpt, DeviceOpt, BackboneOpt, DataOpt, BatchSizeOpt, JsonOpt, QuietOpt, SeedOpt
from vfm_core.errors import UserError

app = make_app("toy-tool", "A toy.", "vfm-core")

@app.command(epilog=examples("toy-tool work photos/ --out runs/a", "toy-tool work csv:a.csv[x]"))
def work(
    kind: str,
    out: OutOpt = Path("runs"),
    device: DeviceOpt = "auto",
    backbone: BackboneOpt = "tiny:cnn",
    data: DataOpt = "tinyworld:birds",
    batch_size: BatchSizeOpt = 16,
    seed: SeedOpt = 0,
    json_: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Work.\n\n    More words."""
    logging.getLogger("vfm_core.toy").debug("a detail")
    if kind == "user":
        raise UserError("unknown method", where="--method", given="'x'", remedy="did you mean y?")
    if kind == "fault":
        raise RuntimeError("two\\nlines")
    if kind == "refused":
        raise PermissionError(13, "Permission denied", "/somewhere/.lock")
    if kind == "count":
        raise typer.Exit(3)
    if kind == "abort":
        raise typer.Abort
    if kind == "wait":
        print("ready", flush=True)
        time.sleep(60)

@app.command()
def other() -> None:
    """Other."""

try:
    run_app(app)
finally:
    heavy = {"torch", "timm", "transformers", "matplotlib", "numpy"} & set(sys.modules)
    Path(__file__).with_name("imports.txt").write_text(" ".join(sorted(heavy)))
'''


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "toy.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path)]


def call(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_success_and_package_exit_codes(program: list[str]) -> None:
    assert call(program, "work", "fine").returncode == 0
    assert call(program, "work", "count").returncode == 3


def test_user_error_is_one_line_and_exit_2(program: list[str]) -> None:
    result = call(program, "work", "user")
    assert result.returncode == 2
    assert result.stderr == "error: unknown method in --method: 'x'; did you mean y?\n"
    assert result.stdout == ""


def test_internal_fault_is_one_line_and_exit_1(program: list[str]) -> None:
    result = call(program, "work", "fault")
    assert result.returncode == 1
    assert result.stderr.startswith("error: RuntimeError: two lines; ") and result.stderr.count("\n") == 1
    assert "--debug" in result.stderr


def test_a_refused_file_is_one_line_and_exit_2(program: list[str]) -> None:
    result = call(program, "work", "refused")
    assert result.returncode == 2
    assert result.stderr == "error: Permission denied in /somewhere/.lock; check the path and its permissions\n"


def test_debug_shows_the_traceback_and_the_log(program: list[str]) -> None:
    result = call(program, "work", "fault", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "a detail" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: RuntimeError")
    assert "a detail" not in call(program, "work", "fault").stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("wrok", "fine"), "work"),
        (("work",), "'kind'"),
        (("work", "fine", "--batch-size", "0"), "--batch-size"),
        (("work", "fine", "--batch-size", "many"), "--batch-size"),
        (("work", "fine", "--colour"), "--colour"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(program: list[str], arguments: tuple[str, ...], expected: str) -> None:
    result = call(program, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert expected in result.stderr and "--help" in result.stderr


def test_help_is_fast_and_imports_nothing_heavy(program: list[str], tmp_path: Path) -> None:
    result = call(program, "work", "--help")
    assert result.returncode == 0
    assert "toy-tool work csv:a.csv[x]" in result.stdout and "open_clip:NAME[@TAG]" in result.stdout
    assert (tmp_path / "imports.txt").read_text() == ""


def test_bare_call_shows_the_commands(program: list[str]) -> None:
    result = call(program)
    assert "work" in result.stdout and "other" in result.stdout
    assert "error" not in result.stderr
    assert call(program, "-h").stdout.strip() == result.stdout.strip()


def test_version(program: list[str]) -> None:
    result = call(program, "--version")
    assert result.returncode == 0
    assert re.fullmatch(r"toy-tool \d+\.\d+\.\d+\S*\n", result.stdout)


def test_completion_script(program: list[str]) -> None:
    # Detection asks which shell the parent is; under a job runner there is none.
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [*program, "--show-completion", "bash"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 0 and "_TOY_TOOL_COMPLETE" in result.stdout


def test_abort_says_how_to_resume(program: list[str]) -> None:
    result = call(program, "work", "abort", "--out", "my runs")
    assert result.returncode == 130
    assert "interrupted; resume with: toy-tool work abort --out 'my runs'" in result.stderr


def test_ctrl_c_exits_130_and_says_how_to_resume(program: list[str]) -> None:
    process = subprocess.Popen(
        [*program, "work", "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job starts with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "resume with: toy-tool work wait" in errors and "Traceback" not in errors


def test_resolve_device() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda")
    for bad in ("gpu", "cuda:x", "cpu:1", "cuda:99", ""):
        with pytest.raises(UserError, match="--device"):
            resolve_device(bad)


def test_resolve_dtype() -> None:
    import torch

    assert resolve_dtype("bf16") is torch.bfloat16 and resolve_dtype("float32") is torch.float32
    with pytest.raises(UserError, match="'float8'; use float32"):
        resolve_dtype("float8")


def test_progress_yields_everything_once_and_is_silent_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(progress(iter([1, 2, 3]), "counting")) == [1, 2, 3]
    assert list(progress([1, 2], "counting", quiet=True)) == [1, 2]
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal_shows_count_and_eta(tmp_path: Path) -> None:
    code = "from vfm_core.cli import progress\nassert sum(progress([1, 2, 3], 'maps [x]')) == 6\n"
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stderr=follower, env=os.environ | {"TERM": "xterm"})
    os.close(follower)
    output = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            chunk = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        output += chunk
    assert process.wait(timeout=30) == 0
    assert b"3/3" in output and b"ETA" in output and b"maps [x]" in output


def test_print_table_is_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"method": "grad[cam]", "energy": 0.06512, "note": "x" * 150},
        {"method": "finer", "energy": float("nan"), "n": 1234567},
    ]
    print_table(rows, title="Numbers")
    output = capsys.readouterr().out
    assert "Numbers" in output and "grad[cam]" in output and "0.065" in output and "x" * 150 in output
    assert "1,234,567" in output and "–" in output
    assert [line.split()[0] for line in output.splitlines() if "grad" in line or "finer" in line] == [
        "grad[cam]",
        "finer",
    ]


def test_print_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    print_json({"a": float("nan"), "path": Path("x/y"), "array": np.arange(2), "name": "é"})
    output = capsys.readouterr().out
    assert json.loads(output) == {"a": None, "path": "x/y", "array": [0, 1], "name": "é"}


def test_examples_escape_markup() -> None:
    assert examples("a [b]").endswith("a \\[b]")
