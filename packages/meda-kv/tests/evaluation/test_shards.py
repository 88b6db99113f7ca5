from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.evaluation.results import load_results
from meda_kv.evaluation.shards import merge_runs, parse_shard, take_shard
from vfm_core.errors import UserError
from vfm_core.runs import RunDir


def named(ids: Any) -> Any:
    return [SimpleNamespace(task="t", id=str(i)) for i in ids]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**6), unique=True, max_size=60), st.integers(1, 9), st.randoms())
def test_shards_part_the_samples_evenly_and_by_id_alone(ids: Any, k: Any, random: Any) -> None:
    samples = named(ids)
    parts = [take_shard(samples, i, k) for i in range(1, k + 1)]
    assert sorted(s.id for part in parts for s in part) == sorted(s.id for s in samples)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    mixed = list(samples)
    random.shuffle(mixed)
    assert [{s.id for s in take_shard(mixed, i, k)} for i in range(1, k + 1)] == [{s.id for s in p} for p in parts]
    assert [s.id for s in parts[0]] == [s.id for s in samples if s in parts[0]]  # their own order


@pytest.mark.parametrize("bad", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4"])
def test_what_is_no_shard_is_refused(bad: Any) -> None:
    with pytest.raises(UserError, match="--shard"):
        parse_shard(bad)


def record_of(sample: Any, arm: Any = "full@1", score: Any = 1.0, seed: Any = 0) -> Any:
    return {
        "unit": f"t/{sample}|{arm}|{seed}",
        "sample_id": sample,
        "task": "t",
        "arm": arm,
        "seed": seed,
        "scores": {"all": score},
    }


def make_run(path: Any, records: Any, shard: Any = None, seed: Any = 0, errors: Any = (), **config: Any) -> Any:
    whole = {"kind": "meda-kv eval", "model": "m", "shard": shard, "seed": seed, **config}
    with RunDir(path, whole) as run:
        for record in records:
            run.append(record)
        for error in errors:
            run.append_error(error)
    (path / "samples.json").write_text(json.dumps({f"t/{r['sample_id']}": {"id": r["sample_id"]} for r in records}))
    return path


def test_merge_joins_shards_and_says_what_is_missing(tmp_path: Path) -> None:
    failed = {"unit": "t/d|full@1|0", "sample_id": "d", "task": "t", "arm": "full@1", "error": "corrupt"}
    one = make_run(tmp_path / "1", [record_of("a"), record_of("b")], "1/3")
    two = make_run(tmp_path / "2", [record_of("c")], "2/3", errors=[failed])
    count, missing = merge_runs([one, two], tmp_path / "all")
    assert (count, missing) == (3, ["3/3"])
    results = load_results(tmp_path / "all")
    assert [r["sample_id"] for r in results.records] == ["a", "b", "c"]
    assert [e["sample_id"] for e in results.errors] == ["d"]
    assert results.config["shard"] is None
    assert set(json.loads((tmp_path / "all" / "samples.json").read_text())) == {"t/a", "t/b", "t/c"}
    # again, with the missing one: what is there stays, nothing is doubled
    three = make_run(tmp_path / "3", [record_of("d")], "3/3")
    assert merge_runs([one, two, three], tmp_path / "all") == (4, [])
    assert load_results(tmp_path / "all").errors == ()


def test_merge_keeps_seeds_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(s), [record_of("a", seed=s)], seed=s) for s in (0, 1)]
    assert merge_runs(runs, tmp_path / "all") == (2, [])
    assert load_results(tmp_path / "all").config["seed"] == [0, 1]


def test_merge_names_the_key_that_differs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "1", [record_of("a")], "1/2")
    two = make_run(tmp_path / "2", [record_of("b")], "2/2", model="other")
    with pytest.raises(UserError, match="model"):
        merge_runs([one, two], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_merge_refuses_contradicting_results_strange_folders_and_itself(tmp_path: Path) -> None:
    one = make_run(tmp_path / "1", [record_of("a", score=1.0)])
    two = make_run(tmp_path / "2", [record_of("a", score=0.0)])
    with pytest.raises(UserError, match="two results"):
        merge_runs([one, two], tmp_path / "all")
    with pytest.raises(UserError, match="no run in the folder"):
        merge_runs([one, tmp_path / "nothing"], tmp_path / "b")
    with pytest.raises(UserError, match="replace a shard"):
        merge_runs([one], one)
    with pytest.raises(UserError, match="--merge"):
        merge_runs([], tmp_path / "c")
    with RunDir(tmp_path / "other", {"kind": "bench"}):
        pass
    with pytest.raises(UserError, match="not a run"):
        merge_runs([tmp_path / "other"], tmp_path / "d")
