"""Shards explain disjoint images into one folder; merging them equals one run, at any time and more than once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finecam.classifiers import Classifier, load_classifier
from finecam.explain import ExplainSummary, explain_dataset
from finecam.options import ExplainOptions
from finecam.shards import forget, launched_shard, merge, parse_shard
from tinyworld.birds import Birds
from vfm_core.errors import UserError


@pytest.fixture(scope="module")
def model() -> Classifier:
    return load_classifier("tiny:cnn")


def explain(model: Classifier, out: Path, shard: tuple[int, int] | None = None, **options: Any) -> ExplainSummary:
    return explain_dataset(
        Birds(n=7, split="val"), model, out, ExplainOptions(target="label", **options), shard=shard, source="birds"
    )


def records(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {r["image"]: r for r in map(json.loads, lines)}


def test_shards_together_are_the_whole(model: Classifier, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    explain(model, whole)
    first = explain(model, parts, (1, 3))
    assert (first.done, first.index) == (3, None) and first.records_in == parts / "shards" / "1-of-3"
    assert not (parts / "index.html").exists()
    partial = merge(parts)
    assert partial.done == 3 and partial.missing == ("2/3", "3/3") and "2/3" in partial.line()
    for i in (2, 3):
        assert explain(model, parts, (i, 3)).done == 2
    merged = merge(parts)
    assert (merged.shards, merged.done, merged.failed, merged.missing) == (3, 7, 0, ())
    assert merged.index == parts / "index.html" and merged.index.is_file()
    one, many = records(whole), records(parts)
    assert one.keys() == many.keys()
    for image, r in many.items():  # the batch an image was in may show in the last digit
        assert r.keys() == one[image].keys()
        assert [d["id"] for d in r["references"]] == [d["id"] for d in one[image]["references"]]
        assert r["target"]["prob"] == pytest.approx(one[image]["target"]["prob"], abs=2e-5)
        assert (r["map"], r["label"], r["pictures"]) == (one[image]["map"], one[image]["label"], one[image]["pictures"])
    files = [sorted(str(p.relative_to(o)) for p in (o / "maps").rglob("*")) for o in (whole, parts)]
    assert files[0] == files[1] and len(files[0]) == 7
    assert (parts / "summary.csv").read_text().count("\n") == (whole / "summary.csv").read_text().count("\n")
    assert merge(parts).done == 7


def test_merge_refuses_shards_of_different_runs(model: Classifier, tmp_path: Path) -> None:
    explain(model, tmp_path, (1, 2))
    explain(model, tmp_path, (2, 2), gammas=(1.0,))
    with pytest.raises(UserError, match=r"different runs in .*2-of-2: .*gammas"):
        merge(tmp_path)


def test_merge_waits_for_a_running_shard(model: Classifier, tmp_path: Path) -> None:
    from filelock import FileLock

    explain(model, tmp_path, (1, 1))
    with FileLock(tmp_path / "shards" / "1-of-1" / ".lock"), pytest.raises(UserError, match=r"run folder in use"):
        merge(tmp_path)
    assert merge(tmp_path).done == 7


def test_errors_of_shards_are_merged_and_healed(model: Classifier, tmp_path: Path) -> None:
    explain(model, tmp_path, (1, 1))
    folder = tmp_path / "shards" / "1-of-1"
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[1:]), encoding="utf-8")
    lost = json.loads(lines[0])["image"]
    (folder / "errors.jsonl").write_text(json.dumps({"image": lost, "error": "why"}) + "\n", encoding="utf-8")
    broken = merge(tmp_path)
    assert (broken.done, broken.failed) == (6, 1)
    assert explain(model, tmp_path, (1, 1)).new == 1
    healed = merge(tmp_path)
    assert (healed.done, healed.failed) == (7, 0)


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no shards in"):
        merge(tmp_path)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_shard_texts_are_checked(text: str) -> None:
    with pytest.raises(UserError, match=r"not a shard in --shard"):
        parse_shard(text)


def test_shard_text() -> None:
    assert parse_shard(" 2/8 ") == (2, 8)


def test_launchers_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched_shard() is None
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched_shard() == (6, 8, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched_shard() is None


def test_forgetting_touches_only_what_the_records_name(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    for name in ("maps/a.npz", "maps/b.npz"):
        (tmp_path / name).write_bytes(b"")
    outside = tmp_path.parent / f"{tmp_path.name}-outside.txt"
    outside.write_text("keep")
    hostile = {"image": "x", "map": f"../{outside.name}", "overlay": str(outside), "pictures": {"image": "maps/a.npz"}}
    (tmp_path / "results.jsonl").write_text(json.dumps(hostile) + '\n{"torn', encoding="utf-8")
    forget(tmp_path, tmp_path)
    assert not (tmp_path / "maps" / "a.npz").exists() and (tmp_path / "maps" / "b.npz").exists()
    assert outside.exists()
    outside.unlink()
    forget(tmp_path / "nowhere", tmp_path)
