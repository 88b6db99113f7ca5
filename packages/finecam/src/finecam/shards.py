"""One run over several processes or machines: each takes every n-th image, `merge` makes one run of them.

Pictures and arrays go to their final places at once (every image belongs to exactly one shard); only the records are
kept apart, in ``shards/<i>-of-<n>/``, because a run folder has one writer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfm_core.errors import UserError
from vfm_core.files import TEMPORARY
from vfm_core.runs import RunDir, config_diff

SHARD = re.compile(r"(\d+)-of-(\d+)")


@dataclass(frozen=True)
class Merged:
    """What `merge` joined: shard folders, images with a result, images that failed, and the page."""

    shards: int
    done: int
    failed: int
    missing: tuple[str, ...]
    index: Path

    def line(self) -> str:
        """One line for a person."""
        text = f"{self.done} images of {self.shards} shards merged, {self.failed} failed"
        return text + (f"; shards not there yet: {', '.join(self.missing)}" if self.missing else "")


def parse_shard(text: str) -> tuple[int, int]:
    """``"3/8"`` to (3, 8).

    Raises
    ------
    UserError
        Another form, or not 1 <= i <= n.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(
            "not a shard", where="--shard", given=repr(text), remedy="write i/n with 1 <= i <= n, such as 1/4"
        )
    return int(match[1]), int(match[2])


def shard_folder(out: Path, i: int, n: int) -> Path:
    """Where shard `i` of `n` keeps its records."""
    return out / "shards" / f"{i}-of-{n}"


def launched_shard() -> tuple[int, int, int] | None:
    """(i, n, local rank) when ``accelerate launch`` or ``torchrun`` started this process as one of several."""
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return (rank + 1, world, int(os.environ.get("LOCAL_RANK", "0"))) if world > 1 else None


def wait_for_all() -> None:
    """Block until every launched process has come here (a shard may take days longer than another)."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=14))
    state.wait_for_everyone()


def forget(run_folder: Path, out: Path) -> None:
    """Remove the files that an earlier run's records name, before that run is overwritten; nothing else is touched."""
    with contextlib.suppress(FileNotFoundError), (run_folder / "results.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, AttributeError):  # a torn line names nothing
                record = json.loads(line)
                pictures = record.get("pictures") or {}
                files = [record.get("map"), record.get("overlay"), pictures.get("image"), *pictures.get("layers", ())]
                for name in files:
                    if isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts:
                        (out / name).unlink(missing_ok=True)


def merge(out: str | os.PathLike[str]) -> Merged:
    """Join the shards of a run into ``results.jsonl``, ``errors.jsonl``, the table and the gallery.

    May be called again when further shards have finished; images merged before are kept.

    Parameters
    ----------
    out
        The folder given to every shard as ``--out``.

    Raises
    ------
    UserError
        No shards, shards with different options, or a shard still being written.
    """
    from finecam.summary import write_index

    out = Path(out)
    folders = [p for p in out.glob("shards/*") if SHARD.fullmatch(p.name) and (p / "config.json").is_file()]
    if not folders:
        raise UserError("no shards", where=out, remedy="run finecam explain ... --shard i/n first, with this --out")
    folders.sort(key=lambda p: tuple(int(x) for x in p.name.split("-of-")))
    configs = [_config(p) for p in folders]
    for folder, config in zip(folders, configs):
        diff = config_diff(configs[0], config)
        if diff:
            raise UserError(
                "shards of different runs",
                where=folder,
                given=", ".join(diff[:6]),
                remedy="remove the stale shard folder",
            )
    with RunDir(out, configs[0], key="image") as run:
        errors: dict[str, dict[str, Any]] = {}
        for folder, config in zip(folders, configs):
            with RunDir(folder, config, key="image") as shard:  # holds the shard's lock: nobody writes meanwhile
                for record in shard.records():
                    if record["image"] not in run.done:
                        run.append(record)
                errors |= {str(e["image"]): e for e in shard.errors()}
        known = {str(e["image"]) for e in run.errors()}
        for image, error in errors.items():
            if image not in run.done and image not in known:
                run.append_error(error)
        for leftover in out.rglob(f"{TEMPORARY}*"):  # of shards that were killed
            leftover.unlink(missing_ok=True)
        records, standing = run.records(), run.errors()
        index = write_index(out, records, standing, run.config)
    return Merged(len(folders), len(records), len(standing), _missing(folders), index)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except ValueError as e:
        raise UserError("unreadable run configuration", where=folder, given=e, remedy="run this shard again") from e


def _missing(folders: list[Path]) -> tuple[str, ...]:
    """Names of the shards that a complete set would have besides these."""
    there = {f.name for f in folders}
    sizes = {int(name.split("-of-")[1]) for name in there}
    if len(sizes) != 1:
        return ()
    n = sizes.pop()
    return tuple(f"{i}/{n}" for i in range(1, n + 1) if f"{i}-of-{n}" not in there)
