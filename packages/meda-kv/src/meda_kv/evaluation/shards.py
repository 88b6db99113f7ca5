"""One evaluation over several processes or machines: a deterministic split by sample id, and its joining.

Shard i of k takes every k-th sample in the order of a digest of the ids, so that the split depends on nothing but the
set of ids, is even, and does not follow any pattern in them. Every shard has a run folder of its own, since a run
folder has one writer; `merge` makes one run of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from vfm_core.errors import UserError
from vfm_core.files import write_json
from vfm_core.runs import RunDir, config_diff

from meda_kv.evaluation.results import SAMPLES_FILE, read_samples

S = TypeVar("S")

_MAY_DIFFER = ("shard", "seed", "data")  # shards may see the same data under other paths


def parse_shard(text: str) -> tuple[int, int]:
    """``"3/8"`` to (3, 8).

    Raises
    ------
    UserError
        Another form, or not 1 <= i <= k.
    """
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        remedy = "write i/k with 1 <= i <= k, such as 1/4"
        raise UserError("not a shard", where="--shard", given=repr(text), remedy=remedy)
    return int(match[1]), int(match[2])


def take_shard(samples: Sequence[S], i: int, k: int) -> list[S]:
    """The samples of shard `i` (1 to `k`), in their given order.

    Parameters
    ----------
    samples
        Objects with ``task`` and ``id``.
    i, k
        Shard and number of shards.

    Returns
    -------
    list
        The shards are disjoint, together everything, and differ in size by at most one.
    """
    names = [sample_key(sample) for sample in samples]
    order = sorted(range(len(samples)), key=lambda j: hashlib.sha256(names[j].encode()).digest())
    return [samples[j] for j in sorted(order[i - 1 :: k])]


def sample_key(sample: Any) -> str:
    """``task/id``: names a sample among those of all tasks."""
    return f"{sample.task}/{sample.id}"


def launched_shard() -> tuple[int, int, int] | None:
    """(i, k, local rank) when ``accelerate launch`` or ``torchrun`` started this process as one of several."""
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return (rank + 1, world, int(os.environ.get("LOCAL_RANK", "0"))) if world > 1 else None


def shard_folder(out: Path, i: int, k: int) -> Path:
    """Where shard `i` of `k` of a launched evaluation keeps its run."""
    return out / "shards" / f"{i}-of-{k}"


def wait_for_all() -> None:
    """Block until every launched process has come here; a shard may take days longer than another."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=14))
    state.wait_for_everyone()


def merge_runs(folders: Sequence[str | Path], out: str | Path, *, overwrite: bool = False) -> tuple[int, list[str]]:
    """Join the run folders of shards (or of several seeds) into one run folder.

    Parameters
    ----------
    folders
        Run folders of `evaluate`; their configurations may differ in the shard, the seed and the data's place only.
    out
        Folder of the joined run, other than those. A merge that was interrupted, or one with more shards than before,
        goes on from what is there.
    overwrite
        Start `out` afresh.

    Returns
    -------
    count : int
        Records in `out`.
    missing : list of str
        Shards that no folder holds, such as ``"2/4"``.

    Raises
    ------
    UserError
        A folder without a run, configurations that differ (the key is named), two folders with another result for
        the same unit, or `out` among the folders.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise UserError("no run folder", where="--merge", remedy="name the folders of the shards")
    configs = [_config(path) for path in paths]
    for path, config in zip(paths[1:], configs[1:]):
        diff = config_diff(_common(configs[0]), _common(config))
        if diff:
            given = f"{', '.join(diff[:4])} against {paths[0]}"
            raise UserError("another configuration", where=path, given=given, remedy="merge the shards of one run")
    if any(path.resolve() == Path(out).resolve() for path in paths):
        raise UserError("the merged run would replace a shard", where="--out", given=out, remedy="name another folder")
    seeds = sorted({config.get("seed", 0) for config in configs})
    joined = {**configs[0], "shard": None, "seed": seeds[0] if len(seeds) == 1 else seeds}
    with RunDir(out, joined, overwrite=overwrite) as run:
        known = {record["unit"]: record for record in run.records()}
        standing = {record["unit"]: record for record in run.errors()}
        for path, config in zip(paths, configs):
            source = RunDir(path, config)
            for record in source.records():
                unit = record["unit"]
                if unit not in known:
                    known[unit] = record
                    run.append(record)
                elif known[unit]["scores"] != record["scores"]:
                    remedy = "merge runs that share no sample, or remove one of them"
                    raise UserError("two results for one unit", where=path, given=unit, remedy=remedy)
            for error in source.errors():
                if standing.get(error["unit"]) != error:
                    run.append_error(error)
        write_json(
            run.path / SAMPLES_FILE, {k: v for path in [*paths, run.path] for k, v in read_samples(path).items()}
        )
    return len(known), _missing(configs)


def _missing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Shards of the greatest split that are not there, over all seeds."""
    found: dict[tuple[int, Any], set[int]] = {}
    for config in configs:
        if config.get("shard"):
            i, k = parse_shard(str(config["shard"]))
            found.setdefault((k, config.get("seed", 0)), set()).add(i)
    lacking = {f"{i}/{k}": i for (k, _), there in found.items() for i in range(1, k + 1) if i not in there}
    return sorted(lacking, key=lambda name: lacking[name])


def _common(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _MAY_DIFFER}


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
        if config.get("kind") != "meda-kv eval":
            raise ValueError("not a run of `meda-kv eval`")
    except FileNotFoundError as e:
        raise UserError("no run in the folder", where=path, remedy="name folders written by `meda-kv eval`") from e
    except ValueError as e:
        raise UserError("unreadable run configuration", where=path / "config.json", given=e) from e
    return config
