from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from meda_kv.cli import app
from PIL import Image
from vfm_core.cli import run_app

SMALL = ("--methods", "snapkv?window=4,h2o", "--ratio", "0.5", "--floor", "4", "--device", "cpu", "--quiet")


@pytest.fixture
def meda(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: Any) -> Any:
        with pytest.raises(SystemExit) as end:
            run_app(app, [str(a) for a in arguments])
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return call


def environment(**more: Any) -> Any:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def process(*arguments: Any, **more: Any) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "meda_kv", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**more),
    )


def test_eval_prints_tables_and_json_and_resumes(meda: Any, tmp_path: Path) -> None:
    line = ("eval", "--task", "tinyworld:needle?n=5&images=3", "--probe", *SMALL, "--out", tmp_path)
    code, out, err = meda(*line)
    assert code == 0, err
    assert "needle, asked question" in out and "snapkv?window=4" in out and str(tmp_path / "report.html") in out
    assert "no recommendation from 5 samples" in out
    before = (tmp_path / "results.jsonl").read_bytes()
    code, out, _ = meda(*line, "--json")
    found = json.loads(out)
    assert code == 0 and (tmp_path / "results.jsonl").read_bytes() == before
    assert {row["method"] for row in found["rows"]} == {"full", "snapkv?window=4", "h2o"}
    assert found["config"]["protocol"] == "asked" and found["failed"] == []


def test_a_changed_option_is_refused_and_overwrite_starts_afresh(meda: Any, tmp_path: Path) -> None:
    line = ("eval", "--task", "tinyworld:gist?n=2&images=3", "--protocol", "agnostic", *SMALL, "--out", tmp_path)
    assert meda(*line)[0] == 0
    code, _, err = meda(*line, "--seed", "1")
    assert code == 2 and "seed = 0 -> 1" in err and "--overwrite" in err and err.count("\n") == 1
    assert meda(*line, "--seed", "1", "--overwrite")[0] == 0
    assert {json.loads(x)["seed"] for x in (tmp_path / "results.jsonl").read_text().splitlines()} == {1}


def test_failed_samples_are_listed_with_exit_code_one(meda: Any, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    rows = [
        {"id": name, "images": [f"{name}.png"], "prompt": "<image> G", "answer": "red", "metric": "exact"}
        for name in ("good", "bad", "folder", "absent")
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = ("eval", "--task", f"jsonl:{tmp_path / 'mine.jsonl'}", *SMALL, "--ratio", "0.9", "--max-new-tokens", "2")
    code, out, err = meda(*line, "--out", tmp_path / "run")
    assert code == 1 and "3 samples failed" in err and "report.html" in out
    for name in ("bad", "folder", "absent"):
        assert any(name in text and f"{name}.png" in text for text in err.splitlines())
    records = [json.loads(x) for x in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {r["sample_id"] for r in records} == {"good"} and len(records) == 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--task", "tinyworld:needle"], "--out"),
        (["--out", "x"], "--task"),
        (["--task", "tinyworld:nedle", "--out", "x"], "needle"),
        (["--task", "tinyworld:needle", "--out", "x", "--methods", "snpkv"], "snapkv"),
        (["--task", "tinyworld:needle", "--out", "x", "--ratio", "1.5"], "--ratio"),
        (["--task", "tinyworld:needle", "--out", "x", "--ratio", "nan"], "--ratio"),
        (["--task", "tinyworld:needle", "--out", "x", "--shard", "3/2"], "--shard"),
        (["--task", "tinyworld:needle", "--out", "x", "--tolerance", "7"], "--tolerance"),
        (["--task", "tinyworld:needle", "--out", "x", "--preset", "best"], "preset"),
        (["--task", "tinyworld:needle", "--out", "x", "--protocol", "best"], "protocol"),
        (["--task", "tinyworld:needle", "--out", "x", "--probe", "--protocol", "agnostic"], "--probe"),
        (["--task", "tinyworld:needle", "--out", "x", "--merge"], "--task"),
        (["--merge", "--out", "x"], "--merge"),
        (["some/folder", "--out", "x"], "--merge"),
        (["--task", "milebench:ALFRED", "--out", "x"], "--root"),
        (["--task", "milebench:ALFRED", "--data", "nowhere", "--out", "x"], "nowhere"),
        (["--task", "milebench:ALFRED", "--data", "nowhere", "--root", "y", "--out", "x"], "two folders"),
        (["--data", "tinyworld:nedle", "--out", "x"], "needle"),
        (["--task", "tinyworld:needle", "--out", "x", "--floor", "4", "--set", "floor=5"], "two floors"),
        (["--task", "tinyworld:needle", "--out", "x", "--methods", "medal"], "`meda-kv methods` lists all"),
        (["--task", "tinyworld:needle", "--out", "x", "--budgets", "absent.json"], "no such profile"),
        (["--task", "tinyworld:needle", "--out", "x", "--set", "windw=3"], "window"),
        (["--model", "./no-such-folder", "--task", "tinyworld:needle", "--out", "x"], "no-such-folder"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_two(
    meda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, word: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = meda("eval", *arguments)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and word in err and err.count("\n") == 1
    assert not (tmp_path / "x" / "results.jsonl").exists()


def test_shards_are_merged_by_the_command(meda: Any, tmp_path: Path) -> None:
    line = ("eval", "--task", "tinyworld:gist?n=5&images=3", "--probe", *SMALL)
    for i in (1, 2):
        assert meda(*line, "--shard", f"{i}/2", "--out", tmp_path / str(i))[0] == 0
    code, out, err = meda("eval", "--merge", tmp_path / "1", "--out", tmp_path / "half")
    assert code == 0 and "shards not there yet: 2/2" in err
    code, out, err = meda("eval", "--merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "all", "--json")
    assert code == 0 and err == "" and {row["n"] for row in json.loads(out)["rows"]} == {5}
    assert (tmp_path / "all" / "report.html").is_file()
    assert (tmp_path / "all" / "arms" / "full@1" / "gist" / "pred.json").is_file()


def test_a_long_prompt_is_cut(meda: Any, tmp_path: Path) -> None:
    line = ("eval", "--task", "tinyworld:gist?n=2&images=6", *SMALL, "--methods", "h2o", "--out", tmp_path)
    assert meda(*line, "--max-context", "60")[0] == 0
    records = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert records and all(r["prompt_tokens"] <= 60 for r in records)


def milebench(root: Any, task: Any, kind: Any, samples: Any) -> Any:
    folder = root / task
    (folder / "images").mkdir(parents=True)
    data = []
    for number, (gold, choices) in enumerate(samples):
        Image.new("RGB", (32, 32), "red").save(folder / "images" / f"{number}.png")
        instance = {"context": "{image#1} see", "images_path": [f"{number}.png"]}
        data.append(
            {
                "sample_id": number,
                "task_instruction_id": 0,
                "task_instance": {**instance, **({"choice_list": choices} if choices else {})},
                "response": gold,
                "image_quantity_level": "Few",
            }
        )
    meta = {"task_instruction": ["see"], "question_type": kind}
    (folder / f"{task}.json").write_text(json.dumps({"meta_data": meta, "data": data}))


def test_a_milebench_folder_gives_the_numbers_counted_by_hand(
    meda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from meda_kv.evaluation import protocols
    from tinyworld.vlm import build_processor

    said = build_processor().tokenizer("red then blue", add_special_tokens=False, return_tensors="pt")["input_ids"]
    monkeypatch.setattr(protocols, "answer_on", lambda model, reading, *_: said.repeat(len(reading.ids), 1))
    options = ["red then blue", "green"]
    milebench(tmp_path, "StateChange", "multi-choice", [("red then blue", options), ("green", options)])
    milebench(tmp_path, "CLEVR-Change", "open-ended", [("red then green", None), ("red then blue", None)])
    line = ("eval", "--task", "milebench:all", "--data", tmp_path, *SMALL, "--ratio", "0.9", "--out", tmp_path / "run")
    code, out, err = meda(*line, "--json")
    assert code == 0, err
    scores = {(row["name"], row["method"]): row["score"] for row in json.loads(out)["rows"]}
    assert scores["StateChange", "h2o"] == 0.5  # right, wrong
    assert scores["CLEVR-Change", "h2o"] == pytest.approx((2 / 3 + 1) / 2)  # two of three words, all words
    arm = tmp_path / "run" / "arms" / "full@1"
    assert json.loads((arm / "StateChange" / "eval.json").read_text())["Accuracy"] == 0.5
    entries = json.loads((arm / "CLEVR-Change" / "pred.json").read_text())
    assert [e["sample_id"] for e in entries] == [0, 1] and entries[0]["pred_response"] == "red then blue"


def test_milebench_is_scored_by_its_own_scorer_with_the_mended_score_beside(
    meda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from meda_kv.evaluation import protocols
    from tinyworld.vlm import build_processor

    end = build_processor().tokenizer.convert_tokens_to_ids("<eos>")  # nothing but the end: an empty answer
    monkeypatch.setattr(
        protocols, "answer_on", lambda _, reading, *__: reading.ids.new_full((len(reading.ids), 1), end)
    )
    options = ["red", "blue", "green"]
    milebench(tmp_path, "TQA", "multi-choice", [("green", options), ("blue", options)])
    line = ("eval", "--task", "milebench:TQA", "--root", tmp_path, *SMALL, "--ratio", "0.9", "--out", tmp_path / "run")
    code, out, err = meda(*line)
    assert code == 0, err
    assert "with its slips mended" in out
    records = [json.loads(x) for x in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [r["scores"]["all"] for r in records if r["arm"] == "h2o@0.9"] == [1.0, 0.0]  # an empty answer is C there
    assert {r["mended_scores"]["all"] for r in records} == {0.0}
    with (tmp_path / "run" / "table.csv").open() as file:
        cells = [(row["score"], row["mended_score"]) for row in csv.DictReader(file)]
    assert set(cells) == {("0.5", "0.0")}
    facts = json.loads((tmp_path / "run" / "arms" / "h2o@0.9" / "TQA" / "eval.json").read_text())
    assert (facts["Accuracy"], facts["official_score"], facts["mended_score"]) == (0.5, 0.5, 0.0)
    assert "MileBench's scorer and the mended one" in (tmp_path / "run" / "table.md").read_text()


def test_the_remedy_for_untested_answers_works_on_milebench(meda: Any, tmp_path: Path) -> None:
    folder = tmp_path / "StateChange"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(folder / "images" / "0.png")
    instance = {"context": "{image#1} see {image#1} Q red", "images_path": ["0.png"], "choice_list": ["1", "2"]}
    row = {"sample_id": 1, "task_instruction_id": 0, "task_instance": instance, "response": "1"}
    meta = {"task_instruction": ["see"], "question_type": "multi-choice"}
    (folder / "StateChange.json").write_text(json.dumps({"meta_data": meta, "data": [row]}))
    line = ("eval", "--task", "milebench:StateChange", "--data", tmp_path, *SMALL, "--max-new-tokens", "1")
    code, out, err = meda(*line, "--out", tmp_path / "plain")
    assert code == 0 and "0 answer tokens" in out
    assert "ask on the compressed cache with --protocol asked or agnostic" in out
    for protocol in ("asked", "agnostic"):
        code, out, err = meda(*line, "--protocol", protocol, "--out", tmp_path / protocol)
        assert code == 0, err
        assert "0 answer tokens" not in out
        records = [json.loads(x) for x in (tmp_path / protocol / "results.jsonl").read_text().splitlines()]
        assert records and all(r["tokens_after"] == r["tokens"] == 1 for r in records)


def test_other_data_are_refused_and_mended_pictures_are_not(meda: Any, tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    row = {"id": 1, "images": ["a.png"], "prompt": "<image> Q red", "answer": "1", "metric": "exact"}
    bad = {**row, "id": 2, "images": ["broken.png"]}
    (tmp_path / "broken.png").write_bytes(b"")
    path = tmp_path / "mine.jsonl"

    def call(*rows: Any, **more: Any) -> Any:
        path.write_text("\n".join(map(json.dumps, rows)))
        return meda("eval", "--task", f"jsonl:{path}", *SMALL, "--max-new-tokens", "2", "--out", tmp_path / "run")

    assert call(row, bad)[0] == 1
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    for changed, key in (({"images": ["b.png"]}, "samples.images"), ({"metric": "substring"}, "samples.scoring")):
        code, _, err = call({**row, **changed}, bad)
        assert code == 2 and key in err and "--overwrite" in err and err.count("\n") == 1
    Image.new("RGB", (32, 32), "green").save(tmp_path / "broken.png")
    assert call(row, bad)[0] == 0  # it had no answer yet
    Image.new("RGB", (32, 32), "green").save(tmp_path / "a.png")  # another picture under the same name
    code, _, err = call(row, bad)
    assert code == 2 and "the data changed" in err and "sample_id 1" in err
    assert (tmp_path / "run" / "results.jsonl").read_bytes().startswith(before)


def test_the_folder_of_the_data_is_part_of_the_run(meda: Any, tmp_path: Path) -> None:
    for name in ("mb", "mb2"):
        milebench(tmp_path / name, "TQA", "multi-choice", [("red", ["red", "blue"])])
    line = ("eval", "--task", "milebench:TQA", *SMALL, "--max-new-tokens", "2", "--out", tmp_path / "run")
    assert meda(*line, "--root", tmp_path / "mb")[0] == 0
    assert meda(*line, "--data", tmp_path / "mb")[0] == 0
    code, _, err = meda(*line, "--root", tmp_path / "mb2")
    assert code == 2 and "data = " in err


def test_settings_and_profiles_reach_every_method(meda: Any, tmp_path: Path) -> None:
    from meda_kv.models import load_model
    from meda_kv.profiles import make_profile

    model, _ = load_model("tiny", device="cpu")
    make_profile(model, [[2.0, 1.0, 1.0, 1.0]]).save(tmp_path / "p.json")
    line = ("eval", "--data", "tinyworld:gist?n=2&images=4", "--probe", "--ratio", "0.5", "--quiet", "--device", "cpu")
    base = (*line, "--methods", "meda,h2o", "--set", "merge=none", "--floor", "4")
    code, _, err = meda(*base, "--budgets", tmp_path / "p.json", "--out", tmp_path / "run")
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["set"] == {"merge": "none"} and config["floor"] == 4 and config["budgets"]
    assert len(config["weights"]) == 16
    records = [json.loads(x) for x in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {r["arm"] for r in records} == {"full@1", "meda@0.5", "h2o@0.5"}
    assert all(r["entropy_used"] is None for r in records)  # the profile stands for it
    make_profile(model, [[1.0, 1.0, 1.0, 2.0]]).save(tmp_path / "p.json")  # the same file, another profile
    code, _, err = meda(*base, "--budgets", tmp_path / "p.json", "--out", tmp_path / "run")
    assert code == 2 and "budgets" in err


def test_a_ratio_below_the_floor_names_the_option(meda: Any, tmp_path: Path) -> None:
    line = ("eval", "--task", "tinyworld:gist?n=1&images=2", "--methods", "h2o", "--ratio", "0.1", "--device", "cpu")
    code, _, err = meda(*line, "--out", tmp_path)
    assert code == 1 and "lower the floor with --floor" in err


def test_questions_of_ones_own_are_asked_on_the_compressed_cache(meda: Any, tmp_path: Path) -> None:
    colours = ("red", "green", "blue", "yellow")
    for colour in colours:
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
    asked = [{"prompt": f"Q {colour}", "answer": "7"} for colour in colours]
    rows = [
        {"id": 1, "images": [f"{c}.png" for c in colours], "prompt": "<image>" * 4, "questions": asked},
        {"id": 2, "images": [f"{c}.png" for c in colours], "questions": asked[:2]},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(row | {"metric": "needle"}) for row in rows))
    task = f"jsonl:{tmp_path / 'mine.jsonl'}"
    for protocol in ("asked", "agnostic"):
        out = tmp_path / protocol
        code, _, err = meda("eval", "--task", task, *SMALL, "--protocol", protocol, "--max-new-tokens", 1, "--out", out)
        assert code == 0, err
        records = [json.loads(x) for x in (out / "results.jsonl").read_text().splitlines()]
        assert {(r["sample_id"], len(r["answers"])) for r in records} == {("1", 4), ("2", 2)}
        assert all(r["tokens_after"] == r["tokens"] for r in records)
        assert all(("other" in r["scores"]) == (protocol == "asked") for r in records)
    # what the run wrote can be scored again, and gives what the run found
    code, out, err = meda("score", tmp_path / "asked/arms/h2o@0.5/mine/pred.json", "--task", task, "--json")
    (found,) = json.loads(out)
    assert code == 0 and found["n"] == 6 and found["metric"] == "needle"


def test_predictions_made_elsewhere_are_scored_with_the_official_number_beside(meda: Any, tmp_path: Path) -> None:
    options = ["red", "blue", "green"]
    milebench(tmp_path, "TQA", "multi-choice", [("red", options), ("blue", options), ("green", options)])
    said = ["A. red", "red", ""]
    pred = tmp_path / "pred.json"
    pred.write_text(json.dumps([{"sample_id": i, "pred_response": text} for i, text in enumerate(said)]))
    line = ("score", pred, "--task", "milebench:TQA", "--data", tmp_path)
    code, out, err = meda(*line, "--out", tmp_path / "scores")
    assert code == 0, err
    assert "MileBench's scorer" in out and "0.333" in out and "0.667" in out  # the empty answer counts as C there
    written = json.loads((tmp_path / "scores" / "eval.json").read_text())
    assert written["Accuracy"] == written["official_score"] == pytest.approx(2 / 3)
    assert written["mended_score"] == pytest.approx(1 / 3)
    code, out, _ = meda(*line, "--json")
    (found,) = json.loads(out)
    assert (found["n"], found["empty"], found["task"]) == (3, 1, "TQA")
    assert (found["score"], found["official_score"], found["mended_score"]) == pytest.approx((2 / 3, 2 / 3, 1 / 3))
    pred.write_text(json.dumps([{"sample_id": 0, "pred_response": "A"}]))
    code, out, err = meda(*line)
    assert code == 2 and out == "" and "samples without a prediction" in err and err.count("\n") == 1
    code, out, _ = meda(*line, "--partial")
    assert code == 0 and "MileBench's scorer" not in out  # they agree
    code, _, err = meda("score", pred, pred, *line[2:], "--out", tmp_path / "both")
    assert code == 2 and "--out" in err and not (tmp_path / "both").exists()
    code, _, err = meda("score", tmp_path / "nowhere.json", *line[2:])
    assert code == 2 and "nowhere.json" in err


def test_the_command_line_is_a_module_too() -> None:
    line = [sys.executable, "-m", "meda_kv.cli", "eval", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0 and "--task" in done.stdout


@pytest.mark.slow
def test_a_killed_run_is_completed_by_the_same_command(meda: Any, tmp_path: Path) -> None:
    line = ("eval", "--task", "tinyworld:needle?n=12&images=3", "--probe", *SMALL, "--batch-size", "1")
    assert meda(*line, "--out", tmp_path / "whole")[0] == 0
    out = tmp_path / "killed"
    running = process(*line, "--out", out)
    try:
        while not ((out / "results.jsonl").exists() and (out / "results.jsonl").stat().st_size):
            assert running.poll() is None, running.communicate()
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
    finally:
        running.kill()
        running.communicate()
    assert len((out / "results.jsonl").read_text().splitlines()) < 36
    assert meda(*line, "--out", out)[0] == 0

    def answers(folder: Any) -> Any:
        records = [json.loads(x) for x in (folder / "results.jsonl").read_text().splitlines()]
        return {r["unit"]: (r["answers"], r["scores"], r["kv_bytes"]) for r in records}

    assert answers(out) == answers(tmp_path / "whole") and len(answers(out)) == 36


@pytest.mark.slow
def test_launched_processes_take_a_shard_each_and_the_first_merges(tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    line = ("eval", "--task", "tinyworld:needle?n=5&images=3", "--probe", *SMALL, "--out", tmp_path)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [process(*line, **world, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    try:
        ends = [one.communicate(timeout=200) for one in running]
    finally:
        for one in running:
            one.kill()
            one.wait()
    assert [one.returncode for one in running] == [0, 0], ends
    assert "report.html" in ends[0][0] and ends[1][0] == ""
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 15
    assert (tmp_path / "report.html").is_file() and (tmp_path / "shards" / "2-of-2" / "results.jsonl").is_file()
