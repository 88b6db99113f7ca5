"""The reading and its copies against ``generate`` itself: what an arm answers is what the user would get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from meda_kv.cache import CompressedCache
from meda_kv.data import open_task
from meda_kv.evaluation.arms import grid
from meda_kv.evaluation.protocols import collate, make_exam
from meda_kv.evaluation.reading import answer_on, ask_on, compressed_copy, end_tokens, proceed, read_prompts, trim
from meda_kv.models import load_model
from zoo import VLM_FAMILIES, tiny_vlm


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def listed(tiny: tuple[Any, Any]) -> Any:
    """Two album-list exams (answers of four tokens) and their inputs."""
    samples = open_task("tinyworld:list?n=2&images=4").samples
    exams = [make_exam(tiny[1], sample, "generate") for sample in samples]
    return exams, collate(tiny[1], exams)


@pytest.mark.parametrize("method", ["full", "meda", "snapkv", "h2o", "pyramidkv"])
def test_a_copy_answers_as_generate_does_on_a_cache_of_its_own(tiny: tuple[Any, Any], listed: Any, method: Any) -> None:
    model, inputs = tiny[0], listed[1]
    arm = grid(method, 0.3, floor=4)[-1]
    reading = read_prompts(model, inputs, [arm])
    answers = answer_on(model, reading, compressed_copy(model, reading, arm), 5)
    cache = CompressedCache(model, arm.method or "full", arm.ratio)
    with torch.inference_mode():
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
    ends = end_tokens(model)
    expected = out[:, inputs["input_ids"].shape[1] :]
    assert [trim(row, ends) for row in answers] == [trim(row, ends) for row in expected]


def test_one_reading_serves_all_arms_and_stays_full(tiny: tuple[Any, Any], listed: Any) -> None:
    model, inputs = tiny[0], listed[1]
    arms = grid("meda,snapkv", "0.5,0.2", floor=4)
    reading = read_prompts(model, inputs, arms)
    n = inputs["input_ids"].shape[1]
    alone = {}
    for arm in arms:
        single = read_prompts(model, inputs, [arm])
        alone[arm.key] = answer_on(model, single, compressed_copy(model, single, arm), 4).tolist()
    for arm in [*arms, *reversed(arms)]:  # in any order
        copy = compressed_copy(model, reading, arm)
        assert answer_on(model, reading, copy, 4).tolist() == alone[arm.key]
        assert not reading.cache.compressed and reading.cache.get_seq_length() == n


def test_bytes_are_those_of_the_ratio(tiny: tuple[Any, Any], listed: Any) -> None:
    model, inputs = tiny[0], listed[1]
    arms = grid("meda", "0.5,0.25", floor=4)
    reading = read_prompts(model, inputs, arms)
    full, half, quarter = (compressed_copy(model, reading, arm).facts(0) for arm in arms)
    assert full["kv_bytes"] == full["kv_bytes_full"] == half["kv_bytes_full"] > 0
    assert half["kv_bytes"] / full["kv_bytes"] == pytest.approx(0.5, abs=0.01)
    assert quarter["kv_bytes"] / full["kv_bytes"] == pytest.approx(0.25, abs=0.01)
    # the same after an answer was added: only the prompt's bytes count
    copy = compressed_copy(model, reading, arms[1])
    copy.measured = []
    answer_on(model, reading, copy, 4)
    assert copy.facts(0)["kv_bytes"] == pytest.approx(half["kv_bytes"])


@pytest.mark.parametrize("compress_at", ["decode", "layer", "prefill", "first-step"])
def test_what_is_asked_on_a_copy_is_neither_watched_nor_compressed(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, compress_at: str
) -> None:
    model, processor = tiny
    arm = grid(f"h2o?compress_at={compress_at}", 0.5, floor=4)[-1]
    exams = [make_exam(processor, one, "asked") for one in open_task("tinyworld:needle?n=2&images=4").samples]
    reading = read_prompts(model, collate(processor, exams), [arm])
    copy = compressed_copy(model, reading, arm, now=True)
    held = copy.cache.layers[0].physical
    seen: list[int] = []
    monkeypatch.setattr(CompressedCache, "after_attention", lambda self, layer, look: seen.append(layer))
    answers = [ask_on(model, reading, copy, [exam.feeds[0] for exam in exams], 0, 2).tolist() for _ in range(2)]
    assert not seen and copy.cache.layers[0].physical == held and answers[0] == answers[1]


def test_questions_leave_no_trace_on_the_copy(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    samples = open_task("tinyworld:needle?n=2&images=4").samples
    exams = [make_exam(processor, sample, "asked") for sample in samples]
    arm = grid("snapkv", 0.4, floor=4)[-1]
    reading = read_prompts(model, collate(processor, exams), [arm])
    copy = compressed_copy(model, reading, arm)
    rounds = [[exam.feeds[j] for exam in exams] for j in range(4)]
    forth = [ask_on(model, reading, copy, one, 0, 2).tolist() for one in rounds]
    back = [ask_on(model, reading, copy, one, 0, 2).tolist() for one in reversed(rounds)]
    assert forth == back[::-1]
    assert copy.cache.get_seq_length() == copy.length


def test_questions_of_unequal_length_are_answered_as_alone(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    samples = open_task("tinyworld:needle?n=2&images=4&words=1").samples
    exams = [make_exam(processor, sample, "asked") for sample in samples]
    arm = grid("h2o", 0.5, floor=4)[-1]
    reading = read_prompts(model, collate(processor, exams), [arm])
    short = [exam.feeds[0] for exam in exams]
    long = [(*exam.feeds[1], *exam.feeds[0]) for exam in exams]
    copy = compressed_copy(model, reading, arm)
    both = ask_on(model, reading, copy, [short[0], long[1]], 0, 1)
    assert both[0].tolist() == ask_on(model, reading, copy, short, 0, 1)[0].tolist()
    assert both[1].tolist() == ask_on(model, reading, copy, long, 0, 1)[1].tolist()


def test_the_full_copy_answers_questions_as_a_fresh_prompt_would(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    (sample,) = open_task("tinyworld:needle?n=1&images=4").samples
    exam = make_exam(processor, sample, "agnostic")
    arm = grid("full", 0.5)[0]
    reading = read_prompts(model, collate(processor, [exam]), [arm])
    copy = compressed_copy(model, reading, arm)
    for j in range(4):
        from meda_kv.prompts import Prompt, build_inputs

        whole = build_inputs(processor, [Prompt(sample.asked(j), sample.load_images())])
        assert torch.equal(torch.cat([reading.ids[0], torch.tensor(exam.feeds[j])]), whole["input_ids"][0])
        with torch.inference_mode():
            fresh = model.generate(**whole, max_new_tokens=1, do_sample=False)[:, -1:]
        assert ask_on(model, reading, copy, [exam.feeds[j]], 0, 1).tolist() == fresh.tolist()


def test_an_official_arm_that_waits_for_its_first_step_is_compressed_at_once_for_a_probe(
    tiny: tuple[Any, Any], listed: Any
) -> None:
    model, inputs = tiny[0], listed[1]
    arm = grid("meda", 0.3, preset="official-code", floor=4)[-1]
    assert arm.method is not None and arm.method.compress_at == "first-step"
    reading = read_prompts(model, inputs, [arm])
    waiting = compressed_copy(model, reading, arm)
    assert waiting.pending and not waiting.cache.compressed
    new = reading.first[:, None]
    proceed(model, reading, waiting, new, max_new_tokens=2)
    assert waiting.cache.compressed
    assert waiting.facts(0)["kv_bytes"] < waiting.facts(0)["kv_bytes_full"]
    now = compressed_copy(model, reading, arm, now=True)
    assert now.cache.compressed and not now.pending


def test_trim_stops_before_the_first_end() -> None:
    assert trim(torch.tensor([5, 2, 7, 2]), {2}) == [5]
    assert trim(torch.tensor([5, 7]), set()) == [5, 7]
    assert trim(torch.tensor([2]), {2}) == []


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_every_family_goes_on_from_a_shared_reading_as_from_its_own(family: Any) -> None:
    """Positions (M-RoPE too), token types and sliding layers survive the hand-over of the whole sequence."""
    model, inputs_of = tiny_vlm(family)
    inputs = inputs_of(batch=2, images=1, padded=True)
    arms = grid("full,snapkv?window=4", 0.5, floor=2)
    reading = read_prompts(model, inputs, arms)
    for arm in arms:
        answers = answer_on(model, reading, compressed_copy(model, reading, arm), 5)
        cache = CompressedCache(model, arm.method or "full", arm.ratio)
        with torch.inference_mode():
            out = model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert answers.tolist() == out[:, inputs["input_ids"].shape[1] :].tolist()
    copy = compressed_copy(model, reading, arms[1])
    questions = [[20, 21, 22], [23, 24]]
    first = ask_on(model, reading, copy, questions, 0, 3).tolist()
    ask_on(model, reading, copy, [[30], [31, 32]], 0, 2)
    assert ask_on(model, reading, copy, questions, 0, 3).tolist() == first
