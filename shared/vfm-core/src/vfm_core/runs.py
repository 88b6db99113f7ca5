"""Run folders: one directory per run that can be killed at any moment and resumed by the same command.

::

    runs/demo/
      config.json        what was asked for; a later start with other values is refused
      environment.json   one entry per start: python, platform, package versions, arguments
      results.jsonl      one record per finished unit, appended and fsynced
      errors.jsonl       units that failed, with the reason
      figures/           pictures
      report.html        written by the caller (``run.report_path``)

A unit is whatever the caller can redo alone: an image, a (method, seed) pair, a class. Units found in
``results.jsonl`` are in ``run.done`` and need no second computation.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vfm_core.errors import UserError
from vfm_core.files import TEMPORARY, jsonable, write_json

log = logging.getLogger(__name__)

_REMEDY = "use --overwrite to start afresh, or another --out"
# Workers forked by a killed holder keep its lock until they notice that it is gone (PyTorch's do within seconds).
_ORPHAN_WAIT_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Report a folder that refuses writing, or whose disk is full, as a `UserError` that names it.

    Raises
    ------
    UserError
        In place of the ``OSError``; every other exception passes.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in (*_FULL, *_REFUSED):
            raise
        remedy = "free space" if e.errno in _FULL else "make it writable"
        raise UserError(
            "cannot write to the folder", where=folder, given=e.strerror, remedy=f"{remedy}, or use another --out"
        ) from e


def writable_folder(path: str | Path) -> Path:
    """Make a folder if it is absent and try that files can be written into it, before long work and not after.

    Raises
    ------
    UserError
        It cannot be made, is a file, or refuses writing.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError("not a folder", where=path, remedy="give --out a folder")
    with writing(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as e:  # a parent is a file
            remedy = "use another --out"
            raise UserError("cannot make the folder", where=path, given=e.strerror, remedy=remedy) from e
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


def config_diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Readable differences of two nested configs, one entry per changed dotted key."""
    missing = object()
    flat_old, flat_new = _flatten(old), _flatten(new)
    lines = []
    for key in [*flat_old, *(k for k in flat_new if k not in flat_old)]:
        before, after = flat_old.get(key, missing), flat_new.get(key, missing)
        if before is missing:
            lines.append(f"{key} (new) = {_short(after)}")
        elif after is missing:
            lines.append(f"{key} (gone) = {_short(before)}")
        elif before != after or isinstance(before, bool) != isinstance(after, bool):
            lines.append(f"{key} = {_short(before)} -> {_short(after)}")
    return lines


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def environment() -> dict[str, Any]:
    """Describe the process: time, arguments, python, platform, versions of the imported distributions, GPU."""
    modules = {name.partition(".")[0] for name in list(sys.modules)} - set(sys.stdlib_module_names)
    aliases = {"PIL": "pillow", "sklearn": "scikit-learn", "open_clip": "open_clip_torch"}
    packages = {}
    for module in sorted(modules | {"torch", "timm", "numpy"}):
        if not module.startswith("_"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                name = aliases.get(module, module)
                packages[name] = metadata.version(name)
    entry: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": sys.argv[1:],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": packages,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        entry["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return entry


class RunDir:
    """A run folder with one writer, used as ``with RunDir(out, config) as run:``.

    Parameters
    ----------
    path
        The folder; made when absent.
    config
        Everything that decides the results (not worker counts or devices). Compared on resume.
    overwrite
        Forget the earlier run: its records, errors, figures and report are removed. Other files stay.
    key
        The field of a record that names its unit.

    Raises
    ------
    UserError
        On entering: the folder cannot be written, belongs to a run with another config, another process writes to it,
        or one of its files is damaged beyond a torn last line.

    Examples
    --------
    >>> import tempfile
    >>> out = tempfile.mkdtemp()
    >>> for _ in range(2):  # the second pass finds every unit done
    ...     with RunDir(out, {"gamma": 0.6}) as run:
    ...         for unit in ("a.jpg", "b.jpg"):
    ...             if unit not in run.done:
    ...                 run.append({"unit": unit, "score": 1.0})
    >>> [record["unit"] for record in run.records()]
    ['a.jpg', 'b.jpg']
    """

    def __init__(
        self, path: str | Path, config: Mapping[str, Any], *, overwrite: bool = False, key: str = "unit"
    ) -> None:
        self.path = Path(path)
        # The round trip makes tuples lists and keys strings, as they will be when read back.
        self.config: dict[str, Any] = json.loads(json.dumps(jsonable(config)))
        self.overwrite = overwrite
        self.key = key
        self.done: set[str] = set()
        self.resumed = False
        self._lock: Any = None
        self._append_lock = threading.Lock()

    @property
    def report_path(self) -> Path:
        """Where the run's report belongs."""
        return self.path / "report.html"

    def figure(self, name: str) -> Path:
        """Path ``figures/name``, its folder made; ``name`` may hold subfolders but must stay inside.

        Raises
        ------
        ValueError
            For an absolute name or one that climbs out with ``..``.
        """
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"figure name must be a relative path inside the run folder, got {name!r}")
        path = self.path / "figures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the record of a finished unit; on return it is on disk.

        Raises
        ------
        KeyError
            If the record does not name its unit.
        ValueError
            If the unit is recorded already.
        RuntimeError
            Outside ``with``.
        UserError
            The folder cannot be written or is full.
        """
        self.append_all([record])

    def append_all(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add the records of units that finished together, in one write; on return they are on disk.

        Raises
        ------
        KeyError, ValueError, RuntimeError, UserError
            As `append`; then none of the records is added.
        """
        units = [str(record[self.key]) for record in records]
        with self._append_lock:
            for unit in units:
                if unit in self.done or units.count(unit) > 1:
                    raise ValueError(f"unit {unit!r} is already recorded in {self.path / 'results.jsonl'}")
            self._append_lines("results.jsonl", records)
            self.done.update(units)

    def append_error(self, record: Mapping[str, Any]) -> None:
        """Add an error record. A unit that failed is not done: the next start tries it again."""
        with self._append_lock:
            self._append_lines("errors.jsonl", [record])

    def records(self) -> list[dict[str, Any]]:
        """All records, oldest first, as read from disk (so NaN reads ``None``)."""
        return _read_lines(self.path / "results.jsonl", repair=False)

    def errors(self) -> list[dict[str, Any]]:
        """The standing errors: the last one of each unit, without units that succeeded later."""
        standing: dict[Any, dict[str, Any]] = {}
        done = {str(record[self.key]) for record in self.records()}
        for i, record in enumerate(_read_lines(self.path / "errors.jsonl", repair=False)):
            unit = str(record[self.key]) if self.key in record else i
            standing.pop(unit, None)
            if unit not in done:
                standing[unit] = record
        return list(standing.values())

    def __enter__(self) -> Self:
        writable_folder(self.path)
        try:
            with writing(self.path):
                self._acquire()
                self._open()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _open(self) -> None:
        config_path = self.path / "config.json"
        if self.overwrite:
            self._wipe()
        self.resumed = config_path.exists()
        if self.resumed:
            self._check_config(config_path)
            for leftover in self.path.rglob(f"{TEMPORARY}*"):
                leftover.unlink(missing_ok=True)
        elif (self.path / "results.jsonl").exists():
            raise UserError("results.jsonl without config.json", where=self.path, remedy=_REMEDY)
        else:
            write_json(config_path, self.config)
        records = _read_lines(self.path / "results.jsonl", repair=True)
        _read_lines(self.path / "errors.jsonl", repair=True)
        for number, record in enumerate(records, 1):
            if self.key not in record:
                where = f"{self.path / 'results.jsonl'} line {number}"
                raise UserError(f"no field {self.key!r}", where=where, remedy=_REMEDY)
        self.done = {str(record[self.key]) for record in records}
        self._log_start()

    def _check_config(self, config_path: Path) -> None:
        try:
            old = json.loads(config_path.read_text(encoding="utf-8"))
            if not isinstance(old, dict):
                raise ValueError("not an object")
        except ValueError as e:
            raise UserError("unreadable run configuration", where=config_path, given=e, remedy=_REMEDY) from e
        diff = config_diff(old, self.config)
        if diff:
            shown = ", ".join(diff[:8]) + (f" and {len(diff) - 8} more" if len(diff) > 8 else "")
            raise UserError("changed configuration", where=config_path, given=shown, remedy=_REMEDY)

    def _wipe(self) -> None:
        """Remove what a run folder owns; the config goes last, so a kill in between leaves a run to wipe again."""
        for pattern in ("results.jsonl", "errors.jsonl", "report.html", "report.md"):
            (self.path / pattern).unlink(missing_ok=True)
        figures = self.path / "figures"
        for path in sorted(figures.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        for name in ("environment.json", "config.json"):
            (self.path / name).unlink(missing_ok=True)

    def _log_start(self) -> None:
        path = self.path / "environment.json"
        starts: list[Any] = []
        with contextlib.suppress(OSError, ValueError, KeyError):  # a lost log of starts must not stop a run
            starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        write_json(path, {"starts": [*starts, environment()]})

    def _append_lines(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        if self._lock is None:
            raise RuntimeError("RunDir is not open: use `with RunDir(...) as run:`")
        lines = [json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
        with writing(self.path), (self.path / name).open("ab", buffering=0) as file:
            size = file.tell()
            try:
                file.write("".join(lines).encode())
                os.fsync(file.fileno())
            except OSError:  # a full disk: a partial line must not end up in the middle of the file
                file.truncate(size)
                raise

    def _acquire(self) -> None:
        from filelock import FileLock, Timeout

        holder_path = self.path / ".lock.json"
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=_ORPHAN_WAIT_S if _is_dead(_read_holder(holder_path)) else 0)
        except Timeout:
            holder = _read_holder(holder_path)
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise UserError(
                "run folder in use", where=self.path, given=f"{who} writes to it", remedy="wait, or use another --out"
            ) from None
        self._lock = lock
        write_json(holder_path, {"pid": os.getpid(), "host": socket.gethostname()})

    def _release(self) -> None:
        if self._lock is not None:
            (self.path / ".lock.json").unlink(missing_ok=True)
            self._lock.release()
            self._lock = None


def _read_holder(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(holder, dict) and {"pid", "host"} <= set(holder):
            return holder
    return None


def _is_dead(holder: dict[str, Any] | None) -> bool:
    """Whether the recorded holder ran on this machine and is gone."""
    if holder is None or holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError):
        return False
    return False


def _read_lines(path: Path, *, repair: bool) -> list[dict[str, Any]]:
    """Parse a JSON-lines file. A torn last line is left out and, with ``repair``, cut off (or ended) on disk."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    records: list[dict[str, Any]] = []
    good = 0  # bytes up to the end of the last whole record
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as e:
            if number == len(lines):
                break
            raise UserError(
                "damaged record", where=f"{path} line {number}", given=e, remedy=f"remove the line, or {_REMEDY}"
            ) from e
        records.append(record)
        good += len(line)
    if repair and (good < len(data) or (data and not data.endswith(b"\n"))):
        log.warning("repaired the torn last line of %s", path)
        with path.open("rb+") as file:
            file.truncate(good)
            if good and data[good - 1 : good] != b"\n":
                file.seek(good)
                file.write(b"\n")
            os.fsync(file.fileno())
    return records
