"""Generation: answers with their summaries, and files of prompts that survive bad rows and interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from meda_kv.data.jsonl import read_jsonl
from meda_kv.generation import decode, evaluating, generate, generate_file, greedy, read_prompt
from meda_kv.models import load_model
from meda_kv.prompts import Prompt
from PIL import Image
from tinyworld.albums import make_albums
from transformers import DynamicCache
from vfm_core.errors import UserError


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tiny")


def prompts_of(count: int, images: int = 6) -> list[tuple[Prompt, str]]:
    albums = make_albums("needle", count, images=images)
    return [
        (
            Prompt("<image> " * images + album.questions[0][0], [Image.fromarray(x) for x in album.images]),
            album.questions[0][1],
        )
        for album in albums
    ]


def test_full_answers_are_those_of_the_ordinary_cache(tiny: tuple[Any, Any]) -> None:
    from meda_kv.prompts import build_inputs

    model, processor = tiny
    for (prompt, answer), got in zip(
        prompts_of(4), generate(model, processor, [p for p, _ in prompts_of(4)], "full", max_new_tokens=4), strict=True
    ):
        inputs = build_inputs(processor, [prompt])
        out = model.generate(**inputs, past_key_values=DynamicCache(), max_new_tokens=4, do_sample=False)
        stock = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert got.text == stock.strip()
        assert got.text == answer


def test_rows_of_a_batch_are_those_of_single_calls(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    prompts = [prompts_of(1)[0][0], prompts_of(3, images=8)[2][0], prompts_of(2)[1][0]]
    together = generate(model, processor, prompts, "snapkv", 0.4, max_new_tokens=5, batch_size=3)
    for prompt, batched in zip(prompts, together, strict=True):
        (alone,) = generate(model, processor, [prompt], "snapkv", 0.4, max_new_tokens=5)
        assert alone.text == batched.text
        assert alone.tokens == batched.tokens
        assert alone.summary["budgets"] == batched.summary["budgets"]


def test_the_budget_is_exact_and_settings_arrive(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    prompt = prompts_of(1)[0][0]
    options = {"merge": "none", "floor": 4, "entropy": "self"}
    (answer,) = generate(model, processor, [prompt], "meda", 0.3, max_new_tokens=4, cache_options=options)
    n = answer.summary["prompt_tokens"]
    assert sum(answer.summary["budgets"]) == round(0.3 * 4 * n)
    assert answer.summary["entropy_used"] == "self"
    assert answer.summary["visual_tokens"] == 6 * 16


def test_modes_come_back_and_bad_lengths_are_refused(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    model.train()
    model.model.vision_tower.eval()
    try:
        generate(model, processor, [prompts_of(1)[0][0]], "full", max_new_tokens=1)
        assert model.training
        assert not model.model.vision_tower.training
        with pytest.raises(ZeroDivisionError), evaluating(model):
            assert not model.training
            _ = 1 / 0
        assert model.training
    finally:
        model.eval()
    with pytest.raises(UserError, match="at least one new token"):
        generate(model, processor, [Prompt("Q red")], max_new_tokens=0)


def test_decoding_stops_at_the_end_token(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    ids = processor.tokenizer.convert_tokens_to_ids(["7", "3", "<eos>", "<pad>"])
    rows = decode(model, processor, torch.tensor([ids, [ids[0]] * 4]))
    assert rows == [("7 3", 3), ("7 7 7 7", 4)]
    assert greedy(model, processor)["pad_token_id"] == processor.tokenizer.pad_token_id


# --------------------------------------------------------------------------------------------------------------- files
@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Five prompts of which the third has a broken image and the fourth a missing one."""
    lines = []
    for i, (prompt, _) in enumerate(prompts_of(5, images=5)):
        names = []
        for j, image in enumerate(prompt.images):
            names.append(f"{i}-{j}.png")
            image.save(tmp_path / names[-1])
        lines.append({"id": f"s{i}", "images": names, "prompt": prompt.text.strip()})
    (tmp_path / "2-1.png").write_bytes(b"broken")
    (tmp_path / "3-4.png").unlink()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> Any:
    return read_jsonl(path, answers=False).samples


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bad_rows_are_listed_and_tried_again(tiny: tuple[Any, Any], rows: Path, tmp_path: Path) -> None:
    run = generate_file(*tiny, read(rows), tmp_path / "out", "h2o", 0.4, max_new_tokens=3, batch_size=2)
    assert [record["id"] for record in run.records] == ["s0", "s1", "s4"]
    assert [failure["id"] for failure in run.failed] == ["s2", "s3"]
    assert "2-1.png" in run.failed[0]["error"]
    assert "3-4.png" in run.failed[1]["error"]
    assert "s3" in run.failed[1]["error"]
    written = lines_of(run.path)
    assert [line["sample_id"] for line in written] == ["s0", "s1", "s4"]
    assert {"text", "tokens", "summary", "seconds"} <= set(run.records[0])
    assert run.records[0]["images"] == [f"0-{j}.png" for j in range(5)]
    for name in ("2-1.png", "3-4.png"):
        Image.new("RGB", (32, 32), "red").save(rows.parent / name)
    again = generate_file(*tiny, read(rows), tmp_path / "out", "h2o", 0.4, max_new_tokens=3, batch_size=2)
    assert [record["id"] for record in again.records] == ["s0", "s1", "s2", "s3", "s4"]
    assert again.failed == []
    assert [line["sample_id"] for line in lines_of(again.path)] == ["s0", "s1", "s2", "s3", "s4"]


def test_one_bad_prompt_does_not_take_its_batch_along(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    words = " ".join(["the"] * 80)
    path.write_text(json.dumps({"id": 1, "prompt": words}) + "\n" + json.dumps({"id": 2, "prompt": "the " * 30}) + "\n")
    run = generate_file(*tiny, read(path), tmp_path / "out", "h2o", 0.3, max_new_tokens=3, batch_size=2)
    assert [record["id"] for record in run.records] == ["1"]
    assert "smallest legal ratio" in run.failed[0]["error"]


def test_an_interrupted_file_goes_on(
    tiny: tuple[Any, Any], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import meda_kv.generation as module

    samples = [sample for sample in read(rows) if sample.id in ("s0", "s1", "s4")]
    whole = generate_file(*tiny, samples, tmp_path / "whole", "h2o", 0.4, max_new_tokens=3)
    calls, real = [], module.generate

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "generate", failing)
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        generate_file(*tiny, samples, out, "h2o", 0.4, max_new_tokens=3)
    assert [line["sample_id"] for line in lines_of(out / "pred.jsonl")] == ["s0", "s1"]
    with (out / "results.jsonl").open("a") as file:
        file.write('{"id": "s4", "te')  # a write that a kill cut short
    resumed = generate_file(*tiny, samples, out, "h2o", 0.4, max_new_tokens=3)
    assert len(calls) == 4  # two answered, the interrupted one, and that one again
    assert [r["text"] for r in resumed.records] == [r["text"] for r in whole.records]


def test_other_settings_and_wrong_names_are_refused(tiny: tuple[Any, Any], rows: Path, tmp_path: Path) -> None:
    samples = read(rows)[:1]
    generate_file(*tiny, samples, tmp_path / "out", "h2o", 0.4, max_new_tokens=2)
    with pytest.raises(UserError, match=r"changed configuration.*ratio = 0.4 -> 0.5"):
        generate_file(*tiny, samples, tmp_path / "out", "h2o", 0.5, max_new_tokens=2)
    with pytest.raises(UserError, match=r"unknown method.*did you mean"):
        generate_file(*tiny, samples, tmp_path / "new", "h20", 0.5)
    run = generate_file(*tiny, samples, tmp_path / "out", "h2o", 0.5, max_new_tokens=2, overwrite=True)
    assert len(run.records) == 1


def test_other_data_under_the_same_name_are_refused(tiny: tuple[Any, Any], rows: Path, tmp_path: Path) -> None:
    def run(path: Path = rows) -> Any:
        return generate_file(*tiny, read(path)[:1], tmp_path / "out", "h2o", 0.4, max_new_tokens=2)

    run()
    before = rows.read_text()
    rows.write_text(before.replace("0-1.png", "1-1.png"))
    with pytest.raises(UserError, match=r"the data changed.*sample_id s0.*names of pictures of 1 answered sample;"):
        run()
    rows.write_text(before)
    kept = (tmp_path / "0-1.png").read_bytes()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "0-1.png")
    with pytest.raises(UserError, match=r"the data changed.*pictures of 1"):
        run()
    (tmp_path / "0-1.png").write_bytes(kept)
    assert len(run().records) == 1
    other = tmp_path / "other.jsonl"
    other.write_text(before)
    with pytest.raises(UserError, match="data = "):
        run(other)


def test_predictions_are_milebenchs_and_can_be_scored(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    from meda_kv.data.predictions import score_file

    lines = []
    for i, (prompt, answer) in enumerate(prompts_of(3)):
        for j, image in enumerate(prompt.images):
            image.save(tmp_path / f"{i}-{j}.png")
        names = [f"{i}-{j}.png" for j in range(6)]
        lines.append({"id": i, "images": names, "prompt": prompt.text, "answer": answer, "metric": "needle"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = generate_file(*tiny, read(path), tmp_path / "out", "h2o?floor=8", 0.5, max_new_tokens=2)
    entry = lines_of(run.path)[0]
    assert list(entry) == [
        *("sample_id", "image", "question", "gt_response", "gen_model_id", "pred_response", "gen_kwargs")
    ]
    assert entry["gt_response"] == lines[0]["answer"] and entry["image"][0].endswith("0-0.png")
    assert entry["gen_kwargs"]["method"] == "h2o?floor=8" and entry["gen_kwargs"]["max_new_tokens"] == 2
    assert score_file(run.path, f"jsonl:{path}").score == 1.0
    bare = [{key: value for key, value in line.items() if key not in ("answer", "metric")} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in bare))
    run = generate_file(*tiny, read(path), tmp_path / "bare", "h2o", 0.5, max_new_tokens=2)
    assert lines_of(run.path)[0]["gt_response"] == ""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert score_file(run.path, f"jsonl:{path}").score == 1.0  # no gold of its own is no contradiction


def test_options_with_the_name_are_those_of_the_settings(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    prompt = prompts_of(1)[0][0]
    found = [
        generate(*tiny, [prompt], method, 0.2, max_new_tokens=4, cache_options=options)[0]
        for method, options in (("meda?merge=none&floor=4", {}), ("meda", {"merge": "none", "floor": 4}))
    ]
    assert found[0].summary["budgets"] == found[1].summary["budgets"] and found[0].text == found[1].text
    first = generate(*tiny, [prompt], "meda?floor=4", 0.2, max_new_tokens=4, cache_options={"floor": 18})[0]
    assert min(first.summary["budgets"]) < 18
    with pytest.raises(UserError, match="unknown option"):
        generate_file(*tiny, [], tmp_path / "out", "meda?flor=4")


def test_an_answer_that_ended_before_compression_says_so(tiny: tuple[Any, Any]) -> None:
    (answer,) = generate(*tiny, [prompts_of(1)[0][0]], "h2o", 0.4, max_new_tokens=1)
    assert answer.summary["note"] == "not compressed: the answer ended before the first decode step"
    (answer,) = generate(*tiny, [prompts_of(1)[0][0]], "full", max_new_tokens=1)
    assert not answer.summary["note"]
    (answer,) = generate(*tiny, [prompts_of(1)[0][0]], "h2o", 0.4, max_new_tokens=3)
    assert answer.summary["ratio_actual"] < 0.5 and not answer.summary["note"]


def test_videos_are_read_as_frames(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(folder / f"{i}.png")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": 1, "video": "clip", "prompt": "what happens?"}) + "\n")
    prompt = read_prompt(read(path)[0], frames=3)
    assert [image.getpixel((0, 0))[0] for image in prompt.images] == [40, 120, 200]
