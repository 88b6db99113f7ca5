from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from meda_kv.data import Sample, Task, open_task
from meda_kv.evaluation import engine
from meda_kv.evaluation.engine import evaluate, untested
from meda_kv.evaluation.shards import merge_runs
from meda_kv.models import load_model
from PIL import Image
from vfm_core.errors import UserError

GRID: dict[str, Any] = {"methods": "meda,random", "ratios": "0.5,0.3", "floor": 4, "batch_size": 8}


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def task() -> Any:
    return open_task("tinyworld:needle?n=6&images=4")


@pytest.fixture(scope="module")
def whole(tiny: tuple[Any, Any], task: Any, tmp_path_factory: Any) -> Any:
    out = tmp_path_factory.mktemp("whole")
    return evaluate(*tiny, task, out=out, protocol="asked", **GRID), out


def answers_of(results: Any) -> Any:
    return {r["unit"]: (r["answers"], r["scores"], r["kv_bytes"]) for r in results.records}


def test_one_record_per_sample_and_arm_with_measured_facts(whole: tuple[Any, Any]) -> None:
    results, out = whole
    assert len(results.records) == 6 * 5 and results.errors == ()
    assert results.arms == ["full@1", "meda@0.5", "meda@0.3", "random@0.5", "random@0.3"]
    for record in results.records:
        assert set(record["scores"]) == {"all", "asked", "other"}
        assert record["kv_bytes"] / record["kv_bytes_full"] == pytest.approx(record["ratio"], abs=0.01)
        assert record["tokens_after"] > 0 and record["seconds"] > 0 and record["prompt_tokens"] == 71
    full = [r["scores"]["all"] for r in results.records if r["arm"] == "full@1"]
    assert sum(full) / len(full) >= 0.9
    samples = json.loads((out / "samples.json").read_text())
    assert len(samples) == 6 and next(iter(samples.values()))["questions"]


def test_resume_skips_what_is_done_and_redoes_what_is_not(
    tiny: tuple[Any, Any], task: Any, whole: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (whole[1] / "results.jsonl").read_text().splitlines(keepends=True)
    for name in ("config.json", "samples.json"):
        (tmp_path / name).write_text((whole[1] / name).read_text())
    kept = [line for i, line in enumerate(lines) if i % 3]
    (tmp_path / "results.jsonl").write_text("".join(kept) + lines[0][:40])  # killed in the middle of a line
    results = evaluate(*tiny, task, out=tmp_path, protocol="asked", **GRID)
    assert answers_of(results) == answers_of(whole[0])
    monkeypatch.setattr(engine, "_run", lambda *_: pytest.fail("nothing is left to do"))
    assert len(evaluate(*tiny, task, out=tmp_path, protocol="asked", **GRID).records) == 30


def test_an_interrupted_run_keeps_what_it_has(
    tiny: tuple[Any, Any], task: Any, whole: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = engine._run_arm, []

    def interrupted(job: Any, exams: Any, reading: Any, arm: Any) -> Any:
        calls.append(arm.key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(job, exams, reading, arm)

    monkeypatch.setattr(engine, "_run_arm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*tiny, task, out=tmp_path, protocol="asked", **GRID)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 12
    monkeypatch.setattr(engine, "_run_arm", real)
    assert answers_of(evaluate(*tiny, task, out=tmp_path, protocol="asked", **GRID)) == answers_of(whole[0])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"ratios": "0.5"}, "ratios"),
        ({"seed": 1}, "seed"),
        ({"protocol": "agnostic"}, "protocol"),
        ({"floor": 5}, "floor"),
    ],
)
def test_another_configuration_is_refused_by_its_key(
    tiny: tuple[Any, Any], task: Any, whole: tuple[Any, Any], change: Any, key: Any
) -> None:
    before = (whole[1] / "results.jsonl").read_bytes()
    with pytest.raises(UserError, match=key):
        evaluate(*tiny, task, out=whole[1], **{**GRID, "protocol": "asked", **change})
    assert (whole[1] / "results.jsonl").read_bytes() == before


def test_a_second_writer_is_refused(tiny: tuple[Any, Any], task: Any, whole: tuple[Any, Any]) -> None:
    with FileLock(whole[1] / ".lock"), pytest.raises(UserError, match="in use"):
        evaluate(*tiny, task, out=whole[1], protocol="asked", **GRID)


def test_shards_merge_into_the_whole(tiny: tuple[Any, Any], task: Any, whole: tuple[Any, Any], tmp_path: Path) -> None:
    for i in (1, 2):
        evaluate(*tiny, task, out=tmp_path / str(i), protocol="asked", shard=f"{i}/2", **GRID)
    count, missing = merge_runs([tmp_path / "1", tmp_path / "2"], tmp_path / "all")
    from meda_kv.evaluation import load_results

    assert (count, missing) == (30, [])
    merged = load_results(tmp_path / "all")
    # A draw depends on its row in the batch; everything else on the sample alone.
    same = {unit: value for unit, value in answers_of(merged).items() if "random" not in unit}
    assert same == {unit: value for unit, value in answers_of(whole[0]).items() if "random" not in unit}


def test_batches_of_one_and_padded_batches_answer_alike(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    tasks = [open_task(f"tinyworld:needle?n=3&images=4&words={words}") for words in (0, 2)]
    ways: list[dict[str, Any]] = [{"batch_size": 1}, {"batch_size": 6}, {"batch_size": 6, "pad": True}]
    found = [
        answers_of(evaluate(*tiny, tasks, "snapkv", 0.5, out=tmp_path / str(i), protocol="asked", floor=4, **options))
        for i, options in enumerate(ways)
    ]
    assert len(found[0]) == 12 and found[0] == found[1] == found[2]


def test_a_bad_sample_fails_alone_and_is_tried_again(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    good = open_task("tinyworld:gist?n=2&images=3").samples
    path = tmp_path / "broken.png"
    path.write_bytes(b"not a picture")
    bad = dataclasses.replace(good[0], id="bad", images=(path, *good[0].images[1:]))
    task = Task("gist", (*good, bad), "needle")
    options: dict[str, Any] = {"protocol": "agnostic", "batch_size": 4, "floor": 4}
    results = evaluate(*tiny, task, "snapkv", 0.5, out=tmp_path / "run", **options)
    assert {r["sample_id"] for r in results.records} == {s.id for s in good}
    assert {e["sample_id"] for e in results.errors} == {"bad"} and len(results.errors) == 2
    assert "broken.png" in results.errors[0]["error"] and "bad" in results.errors[0]["error"]
    Image.new("RGB", (32, 32), "red").save(path)
    mended = evaluate(*tiny, task, "snapkv", 0.5, out=tmp_path / "run", **options)
    assert mended.errors == () and len(mended.records) == 6


def test_a_ratio_below_the_floor_fails_that_arm_and_names_the_smallest(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    task = open_task("tinyworld:gist?n=2&images=2")
    results = evaluate(*tiny, task, "h2o", "0.9,0.1", out=tmp_path, protocol="agnostic", batch_size=2)
    assert {r["arm"] for r in results.records} == {"full@1", "h2o@0.9"}
    assert {e["arm"] for e in results.errors} == {"h2o@0.1"} and len(results.errors) == 2
    assert "0.1" in results.errors[0]["error"]


def test_what_fails_in_a_batch_is_tried_sample_by_sample(
    tiny: tuple[Any, Any], task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine._run_arm

    def picky(job: Any, exams: Any, reading: Any, arm: Any) -> Any:
        if arm.key == "h2o@0.5" and (len(exams) > 1 or exams[0].sample is task.samples[0]):
            raise RuntimeError("scores of layer 1, head 0 are NaN")
        return real(job, exams, reading, arm)

    monkeypatch.setattr(engine, "_run_arm", picky)
    results = evaluate(*tiny, task, "h2o", 0.5, out=tmp_path, batch_size=8, floor=4)
    assert len(results.records) == 11
    (error,) = results.errors
    assert error["sample_id"] == task.samples[0].id and "layer 1, head 0" in error["error"]


def test_answers_of_one_token_are_called_untested(
    tiny: tuple[Any, Any], task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        results = evaluate(*tiny, task, "h2o", 0.3, out=tmp_path, batch_size=8, floor=4)
    assert untested(results) == ["needle"]
    assert "0 answer tokens were generated after compression" in caplog.text
    assert "--protocol asked or agnostic" in caplog.text  # which these samples can be
    assert {r["tokens_after"] for r in results.records} == {0}
    scores = {r["arm"]: r["answers"] for r in results.records if r["sample_id"] == task.samples[0].id}
    assert scores["full@1"] == scores["h2o@0.3"]  # what the warning is about


def test_longer_answers_are_tested(tiny: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = open_task("tinyworld:list?n=2&images=4")
    with caplog.at_level(logging.WARNING):
        results = evaluate(*tiny, task, "h2o", 0.5, out=tmp_path, batch_size=2, floor=4)
    assert untested(results) == [] and "0 answer tokens" not in caplog.text
    assert all(r["tokens_after"] == r["tokens"] - 1 > 0 for r in results.records if r["arm"] == "full@1")


def test_probes_need_questions_and_tasks_need_distinct_samples(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    plain = Task("plain", (Sample(id="1", images=(), prompt="see", answer="red", source="a.jsonl"),), "rouge-l")
    with pytest.raises(UserError, match=r"no text that can be told as the question.*--protocol generate"):
        evaluate(*tiny, plain, "h2o", 0.5, out=tmp_path / "a", protocol="asked")
    with pytest.raises(UserError, match="protocol"):
        evaluate(*tiny, plain, "h2o", 0.5, out=tmp_path / "b", protocol="telepathy")
    with pytest.raises(UserError, match="twice"):
        evaluate(*tiny, [plain, plain], "h2o", 0.5, out=tmp_path / "c")
    assert not any(tmp_path.iterdir())


def test_other_weights_under_the_same_name_are_refused(tiny: tuple[Any, Any], task: Any, tmp_path: Path) -> None:
    model, processor = tiny
    options: dict[str, Any] = {"protocol": "asked", "floor": 4, "batch_size": 8, "model_name": "mine"}
    evaluate(model, processor, task, "h2o", 0.5, out=tmp_path, **options)
    weight = next(model.parameters()).data
    before = weight.clone()
    weight += 1.0
    try:
        with pytest.raises(UserError, match="weights = "):
            evaluate(model, processor, task, "h2o", 0.5, out=tmp_path, **options)
    finally:
        weight.copy_(before)


def test_only_what_is_possible_is_named_as_a_remedy(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    words = " ".join(["the"] * 40)
    text = Task("text", (Sample(id="1", images=(), prompt=words, answer="red", task="text", source="a"),), "rouge-l")
    results = evaluate(*tiny, text, "h2o", 0.5, out=tmp_path, max_new_tokens=1, floor=4)
    from meda_kv.evaluation import recommend

    (found,) = recommend(results)
    assert found.verdict == "untested" and "--protocol" not in found.sentence()
    assert "several tokens" in found.sentence() and "questions of their own" in found.sentence()


def test_mode_and_global_randomness_are_left_alone(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny
    model.train()
    state = torch.get_rng_state()
    try:
        evaluate(model, processor, open_task("tinyworld:gist?n=1&images=2"), "random", 0.9, out=tmp_path, floor=4)
        assert model.training and torch.equal(torch.get_rng_state(), state)
    finally:
        model.eval()


def test_random_draws_differ_between_seeds(tiny: tuple[Any, Any], task: Any, tmp_path: Path) -> None:
    found = [
        evaluate(
            *tiny, task, "random", 0.15, out=tmp_path / str(seed), protocol="asked", seed=seed, floor=2, batch_size=8
        )
        for seed in (0, 1, 2)
    ]
    drawn = [tuple(r["answers"] != f["answers"] for r, f in zip(x.records, found[0].records)) for x in found[1:]]
    assert any(any(row) for row in drawn)
    assert all(r["unit"].endswith("|2") for r in found[2].records)
