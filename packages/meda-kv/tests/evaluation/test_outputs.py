from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from meda_kv.data import Sample, Task, open_task
from meda_kv.evaluation import evaluate, load_results, merge_runs, write_outputs
from meda_kv.evaluation.outputs import arm_folder, describe_sample, restore_sample
from meda_kv.models import load_model


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tiny", device="cpu")


def test_a_probe_has_every_file_and_one_prediction_per_question(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    task = open_task("tinyworld:needle?n=3&images=3")
    results = evaluate(*tiny, task, "snapkv?window=4", 0.5, out=tmp_path, protocol="asked", batch_size=4, floor=4)
    (found, *_) = write_outputs(results, tmp_path, markdown_report=True)
    assert found.verdict == "too-few"
    for name in ("table.csv", "table.md", "recommendation.json", "report.html", "report.md", "samples.json"):
        assert (tmp_path / name).stat().st_size > 0
    folder = arm_folder(tmp_path, "snapkv?window=4@0.5") / "needle"
    assert "?" not in folder.parent.name
    entries = json.loads((folder / "pred.json").read_text())
    assert len(entries) == 9
    assert set(entries[0]) == {
        "sample_id",
        "image",
        "question",
        "gt_response",
        "gen_model_id",
        "pred_response",
        "gen_kwargs",
    }
    golds = {f"{s.id}#{j}": gold for s in task.samples for j, (_, gold) in enumerate(s.questions)}
    assert {e["sample_id"]: e["gt_response"] for e in entries} == golds
    right = sum(e["pred_response"] == e["gt_response"] for e in entries) / 9
    assert json.loads((folder / "eval.json").read_text())["Accuracy"] == pytest.approx(right)
    with (tmp_path / "table.csv").open() as file:
        cells = {(line["kind"], line["method"]): float(line["score"]) for line in csv.DictReader(file)}
    assert cells["all", "snapkv?window=4"] == pytest.approx(right)  # the same number of questions per sample


def test_generate_has_one_prediction_per_sample_and_seeds_their_own_folders(
    tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    task = open_task("tinyworld:list?n=2&images=3")
    for seed in (0, 1):
        out = tmp_path / str(seed)
        results = evaluate(*tiny, task, "random", 0.6, out=out, batch_size=2, floor=4, seed=seed)
        write_outputs(results, out)
    entries = json.loads((arm_folder(tmp_path / "0", "full@1") / "list" / "pred.json").read_text())
    assert sorted(e["sample_id"] for e in entries) == sorted(s.id for s in task.samples)
    merge_runs([tmp_path / "0", tmp_path / "1"], tmp_path / "both")
    write_outputs(load_results(tmp_path / "both"), tmp_path / "both")
    for seed in (0, 1):
        assert (arm_folder(tmp_path / "both", "random@0.6") / f"seed-{seed}" / "list" / "eval.json").exists()


def test_numbers_that_can_be_checked_by_hand(tmp_path: Path) -> None:
    """Two tasks of two samples each; the answers are given, the files follow."""
    samples = [
        Sample(id="1", images=(), prompt="?", answer="red", choices=("red", "blue"), metric="accuracy", task="a"),
        Sample(id="2", images=(), prompt="?", answer="blue", choices=("red", "blue"), metric="accuracy", task="a"),
        Sample(id="1", images=(), prompt="?", answer="a cat sat", metric="rouge-l", task="b", level="Many"),
    ]
    from meda_kv.evaluation.results import Results
    from meda_kv.metrics import score

    said = ["A", "the answer is A. red", "a cat ran"]
    records = [
        {
            "unit": f"{s.task}/{s.id}|full@1|0",
            "sample_id": s.id,
            "task": s.task,
            "group": "g",
            "level": s.level,
            "method": "full",
            "ratio": 1.0,
            "arm": "full@1",
            "seed": 0,
            "scores": {"all": score(s, answer)},
            "answers": [answer],
            "tokens": 3,
            "tokens_after": 2,
            "kv_bytes": 10.0,
            "kv_bytes_full": 10.0,
            "seconds": 0.1,
            "compress_seconds": 0.0,
        }
        for s, answer in zip(samples, said)
    ]
    (tmp_path / "samples.json").write_text(json.dumps({f"{s.task}/{s.id}": describe_sample(s) for s in samples}))
    write_outputs(Results(tuple(records), config={"protocol": "generate", "model": "m"}), tmp_path)
    folder = arm_folder(tmp_path, "full@1")
    assert json.loads((folder / "a" / "eval.json").read_text())["Accuracy"] == 0.5  # right, wrong
    rouge = json.loads((folder / "b" / "eval.json").read_text())
    assert rouge["Rouge-L f"] == pytest.approx(2 / 3)  # two of three words on both sides
    assert rouge["image_quantity_level-Result"]["Many"] == [pytest.approx(2 / 3), 1]
    assert [e["sample_id"] for e in json.loads((folder / "a" / "pred.json").read_text())] == [1, 2]
    with (tmp_path / "table.csv").open() as file:
        cells = {(line["division"], line["name"]): float(line["score"]) for line in csv.DictReader(file)}
    assert cells["group", "g"] == pytest.approx((0.5 + 2 / 3) / 2)


def test_a_sample_survives_the_folder() -> None:
    (sample,) = open_task("tinyworld:needle?n=1&images=2").samples
    again = restore_sample(json.loads(json.dumps(describe_sample(sample))))
    assert (again.id, again.questions, again.asked(1)) == (sample.id, sample.questions, sample.asked(1))
    assert len(again.images) == 2 and Task("t", (again,), again.metric).samples[0].level == sample.level


def test_nothing_answered_still_writes_a_report(tmp_path: Path) -> None:
    from meda_kv.evaluation.results import Results

    error = {"unit": "u", "task": "a", "sample_id": "1", "arm": "full@1", "error": "corrupt"}
    assert write_outputs(Results((), (error,), {"protocol": "generate"}), tmp_path) == []
    assert "corrupt" in (tmp_path / "report.html").read_text()
