"""Resume, refusal, repair and locking of run folders, with real processes that are really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vfm_core.errors import UserError
from vfm_core.files import TEMPORARY, atomic_write, jsonable, write_json
from vfm_core.runs import RunDir, config_diff

CONFIG = {"model": "tiny:cnn", "gamma": 0.6, "data": {"name": "birds", "size": (64, 64)}}

WRITER = """
import sys, time
from vfm_core.runs import RunDir
with RunDir(sys.argv[1], {"a": 1}) as run:
    print("open", len(run.done), flush=True)
    for i in range(40):
        if str(i) not in run.done:
            run.append({"unit": str(i), "value": "x" * 2000})
            print(i, flush=True)
            time.sleep(0.01)
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == word or line.startswith(word):
            return
    raise AssertionError(f"the writer ended before {word!r}")


def test_layout_and_resume(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    with RunDir(out, CONFIG) as run:
        assert not run.resumed and run.done == set()
        run.append({"unit": "a", "score": np.float32(0.5), "vector": np.arange(3)})
        run.figure("sub/plot.svg").write_text("<svg/>")
        run.report_path.write_text("report")
    assert json.loads((out / "config.json").read_text())["data"] == {"name": "birds", "size": [64, 64]}
    with RunDir(out, CONFIG) as run:
        assert run.resumed and run.done == {"a"}
        run.append({"unit": "b", "score": float("nan")})
    assert run.records() == [
        {"unit": "a", "score": 0.5, "vector": [0, 1, 2]},
        {"unit": "b", "score": None},
    ]
    starts = json.loads((out / "environment.json").read_text())["starts"]
    assert len(starts) == 2 and {"python", "platform", "packages", "arguments", "started"} <= set(starts[0])
    assert "numpy" in starts[0]["packages"] and "torch" in starts[0]["packages"]
    assert (out / "figures" / "sub" / "plot.svg").exists()
    names = {path.name for path in out.iterdir()}
    assert names - {".lock"} == {"config.json", "environment.json", "results.jsonl", "figures", "report.html"}


def test_changed_config_is_refused_with_a_diff(tmp_path: Path) -> None:
    with RunDir(tmp_path, CONFIG) as run:
        run.append({"unit": "a"})
    changed = {"model": "tiny:cnn", "gamma": 1.0, "data": {"name": "birds"}, "layer": "x"}
    with pytest.raises(UserError) as caught, RunDir(tmp_path, changed):
        pass
    message = str(caught.value)
    assert "gamma = 0.6 -> 1.0" in message and "layer (new)" in message and "data.size (gone)" in message
    assert "model" not in message.replace(str(tmp_path), "")
    assert "--overwrite" in message and "--out" in message and "\n" not in message
    with RunDir(tmp_path, CONFIG) as run:
        assert run.done == {"a"}  # the refusal changed nothing and let the lock go


def test_overwrite_starts_afresh_and_keeps_foreign_files(tmp_path: Path) -> None:
    with RunDir(tmp_path, CONFIG) as run:
        run.append({"unit": "a"})
        run.append_error({"unit": "b", "reason": "bad"})
        run.figure("deep/er/a.png").write_bytes(b"x")
        run.report_path.write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    with RunDir(tmp_path, {"other": 1}, overwrite=True) as run:
        assert not run.resumed and run.done == set() and run.records() == [] and run.errors() == []
        assert list((tmp_path / "figures").rglob("*")) == [] and not run.report_path.exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with RunDir(tmp_path, {"other": 1}) as run:
        assert run.resumed


def test_config_diff_is_readable() -> None:
    assert config_diff({"a": {"b": 1, "c": [1]}, "d": 0}, {"a": {"b": 2, "c": [1]}, "e": None}) == [
        "a.b = 1 -> 2",
        "d (gone) = 0",
        "e (new) = null",
    ]
    assert config_diff({"a": True}, {"a": 1}) == ["a = true -> 1"]
    assert all(len(line) < 140 for line in config_diff({"a": "x" * 500}, {"a": "y" * 500}))


def test_many_changes_are_counted(tmp_path: Path) -> None:
    with RunDir(tmp_path, {f"k{i}": 0 for i in range(12)}):
        pass
    with pytest.raises(UserError, match="and 4 more"), RunDir(tmp_path, {f"k{i}": 1 for i in range(12)}):
        pass


@settings(max_examples=40, deadline=None)
@given(
    records=st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=8), max_size=3), max_size=5),
    cut=st.integers(min_value=0, max_value=400),
    garbage=st.sampled_from([b"", b"\x00" * 7, b'{"unit": "z", "a": 1', "ü".encode()[:1]]),
)
def test_a_file_cut_anywhere_keeps_its_whole_records(records: list[dict[str, Any]], cut: int, garbage: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with RunDir(folder, {}) as run:
            for i, record in enumerate(records):
                run.append(record | {"unit": str(i)})
        path = Path(folder) / "results.jsonl"
        whole = path.read_bytes() if path.exists() else b""
        kept = whole[: min(cut, len(whole))]
        path.write_bytes(kept + garbage)
        # A record counts as whole once its closing brace is there, with or without the newline, if nothing follows.
        ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
        expected = sum(end <= len(kept) or (end - 1 == len(kept) and not garbage) for end in ends)
        with RunDir(folder, {}) as run:
            assert run.done == {str(i) for i in range(expected)}
            run.append({"unit": "after"})
        assert [r["unit"] for r in run.records()] == [*(str(i) for i in range(expected)), "after"]
        assert path.read_bytes().startswith(whole[: ends[expected - 1] if expected else 0])


def test_damage_in_the_middle_is_an_error_with_the_line(tmp_path: Path) -> None:
    with RunDir(tmp_path, {}) as run:
        run.append({"unit": "a"})
    (tmp_path / "results.jsonl").write_text('{"unit": "a"}\n{"unit": \n{"unit": "c"}\n')
    with pytest.raises(UserError, match=r"results\.jsonl line 2"), RunDir(tmp_path, {}):
        pass


def test_record_without_its_key_is_an_error(tmp_path: Path) -> None:
    with RunDir(tmp_path, {}) as run:
        run.append({"unit": "a"})
        with pytest.raises(KeyError):
            run.append({"name": "b"})
    with pytest.raises(UserError, match="no field 'image'"), RunDir(tmp_path, {}, key="image"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\x00"])
def test_damaged_config_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="unreadable run configuration"), RunDir(tmp_path, {}):
        pass
    with RunDir(tmp_path, {}, overwrite=True) as run:
        run.append({"unit": "a"})


def test_results_without_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"unit": "a"}\n')
    with pytest.raises(UserError, match=r"without config\.json"), RunDir(tmp_path, {}):
        pass


def test_out_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"), RunDir(tmp_path / "file", {}):
        pass


def test_a_unit_is_recorded_once(tmp_path: Path) -> None:
    with RunDir(tmp_path, {}) as run:
        run.append({"unit": 1})
        with pytest.raises(ValueError, match="already recorded"):
            run.append({"unit": "1"})
    with pytest.raises(RuntimeError, match="not open"):
        run.append({"unit": "2"})
    assert len(run.records()) == 1


def test_a_failed_append_leaves_no_partial_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDir(tmp_path, {}) as run:
        run.append({"unit": "a"})

        def full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match=r"cannot write to the folder in .*No space.*free space"):
                run.append({"unit": "b"})
        assert run.done == {"a"}
        run.append({"unit": "c"})
    assert [r["unit"] for r in run.records()] == ["a", "c"]


def test_an_unwritable_folder_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / ".lock"))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write anywhere: the refusal is played
    wanted = r"cannot write to the folder in .*Permission denied; make it writable.*--out"
    with pytest.raises(UserError, match=wanted), RunDir(tmp_path, {}):
        pass
    assert not list(tmp_path.iterdir())


def test_errors_are_retried_and_forgotten_on_success(tmp_path: Path) -> None:
    with RunDir(tmp_path, {}) as run:
        run.append_error({"unit": "a", "reason": "first"})
        run.append_error({"unit": "b", "reason": "stays"})
        run.append_error({"reason": "of no unit"})
    with RunDir(tmp_path, {}) as run:
        assert run.done == set()
        run.append_error({"unit": "b", "reason": "again"})
        run.append({"unit": "a"})
    assert run.errors() == [{"reason": "of no unit"}, {"unit": "b", "reason": "again"}]


def test_figure_names_stay_inside(tmp_path: Path) -> None:
    run = RunDir(tmp_path, {})
    for name in ("../x.png", "/x.png", "a/../../x.png"):
        with pytest.raises(ValueError, match="inside the run folder"):
            run.figure(name)


def test_second_writer_is_refused_and_told_who(tmp_path: Path) -> None:
    writer = start_writer(tmp_path)
    try:
        read_until(writer, "0")
        with pytest.raises(UserError, match=rf"process {writer.pid} on .* writes to it"), RunDir(tmp_path, {"a": 1}):
            pass
    finally:
        writer.kill()
        writer.wait()


def test_second_writer_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with RunDir(tmp_path, {}) as run:
        with pytest.raises(UserError, match=f"process {os.getpid()}"), RunDir(tmp_path, {}):
            pass
        run.append({"unit": "a"})  # the refused one did not take the lock along


def test_lock_is_free_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunDir(tmp_path, {}):
        raise ZeroDivisionError
    with RunDir(tmp_path, {}):
        pass


def test_kill_9_and_resume_do_every_unit_exactly_once(tmp_path: Path) -> None:
    for last in ("3", "11", "20"):
        writer = start_writer(tmp_path)
        read_until(writer, last)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b'{"unit": "39", "val')  # what a kill inside write() leaves
    (tmp_path / f"{TEMPORARY}12-map.npz").write_bytes(b"half")
    writer = start_writer(tmp_path)
    output, _ = writer.communicate(timeout=60)
    assert writer.returncode == 0 and int(output.split()[1]) >= 21
    units = [json.loads(line)["unit"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert units == [str(i) for i in range(40)]
    assert list(tmp_path.rglob(f"{TEMPORARY}*")) == []


def test_stale_holder_file_does_not_block(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    import socket

    holder = {"pid": int(process.stdout), "host": socket.gethostname()}
    (tmp_path / ".lock.json").write_text(json.dumps(holder))
    started = time.monotonic()
    with RunDir(tmp_path, {}):
        pass
    assert time.monotonic() - started < 5


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.txt"
    write_json(path, {"v": 1})
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        assert temporary.suffix == ".txt" and temporary.parent == path.parent
        raise RuntimeError
    assert json.loads(path.read_text()) == {"v": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_jsonable() -> None:
    import torch

    @dataclass
    class Point:
        x: float
        where: Path

    assert jsonable({1: Point(float("inf"), Path("a"))}) == {"1": {"x": None, "where": "a"}}
    assert jsonable([{3, 1}, (True, None), np.float64("nan"), np.bool_(True), torch.tensor([1.5])]) == [
        [1, 3],
        [True, None],
        None,
        True,
        [1.5],
    ]
    with pytest.raises(TypeError, match="no JSON form for object"):
        jsonable(object())


def test_records_that_finish_together_are_added_together(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run", {"a": 1}) as run:
        run.append_all([{"unit": "a", "x": 1}, {"unit": "b", "x": 2}])
        run.append_all([])
        for bad in ([{"unit": "c"}, {"unit": "a"}], [{"unit": "c"}, {"unit": "c"}]):
            with pytest.raises(ValueError, match="already recorded"):
                run.append_all(bad)
        with pytest.raises(KeyError):
            run.append_all([{"unit": "c"}, {"x": 1}])
        assert [record["unit"] for record in run.records()] == ["a", "b"]
        assert run.done == {"a", "b"}
