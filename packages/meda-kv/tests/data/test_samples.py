"""Samples, tasks and the spec that opens them."""

from pathlib import Path

import numpy as np
import pytest
from meda_kv.data import METRICS, Sample, open_task
from meda_kv.data.samples import level_of, make_task
from meda_kv.metrics import score
from PIL import Image
from vfm_core.errors import UserError


def test_levels_are_milebenchs_bins():
    assert [level_of(k) for k in (0, 5, 6, 31, 32, 109)] == ["Few", "Few", "Medium", "Medium", "Many", "Many"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tinywrld:needle", "did you mean tinyworld"),
        ("needle", "unknown task family"),
        ("", "unknown task family"),
        ("tinyworld:needel", "did you mean needle"),
        ("tinyworld:needle?imges=3", "did you mean images"),
        ("tinyworld:needle?images=x", "cannot be read"),
        ("tinyworld:needle?images=65", "images out of range"),
        ("tinyworld:gist?needles=2", "no meaning"),
        ("tinyworld:list?metric=accuracy", "unknown metric"),
        ("milebench:IEdit", "MileBench needs its folder"),
        ("milebench:IEdit?n=3", "unknown option"),
        ("jsonl:nowhere.jsonl", "no such file"),
    ],
)
def test_a_wrong_spec_is_told_in_one_line(spec, said):
    with pytest.raises(UserError, match=said) as caught:
        open_task(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_must_be_positive(limit):
    with pytest.raises(UserError, match="limit must be positive"):
        open_task("tinyworld:needle", limit=limit)


def test_needle_albums_are_probes_with_context_and_questions_apart():
    task = open_task("tinyworld:needle?n=3&images=4&seed=5")
    assert (task.name, task.metric, len(task)) == ("needle", "needle", 3)
    sample = task.samples[0]
    assert sample.prompt == "<image> <image> <image> <image>"
    assert [picture.size for picture in sample.load_images()] == [(32, 32)] * 4
    assert len(sample.questions) == 4
    assert sample.asked(2) == f"{sample.prompt} {sample.questions[2][0]}"
    assert sample.answer == sample.questions[0][1]
    digits = sample.raw["digits"]
    for j, (question, answer) in enumerate(sample.questions):
        assert answer == str(digits[sample.raw["colours"].index(question.split()[1])])
        assert score(sample, answer, j) == 1.0
        assert score(sample, str((int(answer) + 1) % 10), j) == 0.0


def test_lists_are_scored_word_by_word_and_gists_by_their_word():
    listing = open_task("tinyworld:list?n=1&images=3").samples[0]
    assert listing.metric == "words"
    words = listing.answer.split()
    assert score(listing, f" {listing.answer} ") == 1.0
    assert score(listing, " ".join([*words[:2], "x"])) == pytest.approx(2 / 3)
    strict = open_task("tinyworld:list?n=1&images=3&metric=exact").samples[0]
    assert strict.metric == "exact" and score(strict, " ".join([*words[:2], "x"])) == 0.0
    gist = open_task("tinyworld:gist?n=1").samples[0]
    assert score(gist, f"it is {gist.answer}.") == 1.0


def test_words_stay_in_the_prompt_and_structure_does_not():
    prompt = open_task("tinyworld:needle?n=1&images=2&words=2").samples[0].prompt.split()
    assert len(prompt) == 6
    assert not {"<bos>", "<sep>"} & set(prompt)


def test_the_same_spec_gives_the_same_albums_and_limit_takes_the_first():
    whole, part = open_task("tinyworld:gist?n=5&seed=3"), open_task("tinyworld:gist?n=5&seed=3", limit=2)
    assert [s.id for s in part.samples] == [s.id for s in whole.samples[:2]]
    assert np.array_equal(np.asarray(whole.samples[1].images[0]), np.asarray(part.samples[1].images[0]))
    assert open_task("tinyworld:gist?n=5&seed=4").samples[0].id != whole.samples[0].id


def make_sample(identity="7", **changes):
    settings = {"images": (), "prompt": "what?", "answer": "a dog", "task": "t", "group": "g", "source": "file.json"}
    return Sample(id=identity, **(settings | changes))


@pytest.mark.parametrize("fault", ["missing", "empty", "corrupt", "folder"])
def test_a_bad_picture_is_told_with_file_and_sample_id(tmp_path, fault):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (4, 4)).save(good)
    if fault == "empty":
        bad.touch()
    elif fault == "corrupt":
        bad.write_bytes(good.read_bytes()[:40])
    elif fault == "folder":
        bad.mkdir()
    sample = make_sample(images=(good, bad))
    with pytest.raises(UserError) as caught:
        sample.load_images()
    assert "bad.png" in str(caught.value)
    assert "file.json, sample_id 7" in str(caught.value)


def test_pictures_in_memory_become_rgb():
    assert make_sample(images=(Image.new("L", (3, 2)),)).load_images()[0].mode == "RGB"


def test_a_task_needs_samples_with_different_ids():
    with pytest.raises(UserError, match="no sample"):
        make_task("t", [], "here", key=lambda s: s.id)
    with pytest.raises(UserError, match="sample_id occurs 2 times in here: 7"):
        make_task("t", [make_sample(), make_sample()], "here", key=lambda s: s.id)
    mixed = make_task("t", [make_sample(), make_sample("8", metric="exact")], "here", key=lambda s: s.id)
    assert mixed.metric == "mixed"


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_rewards_the_gold_answer(metric):
    sample = make_sample(metric=metric, choices=("a dog", "a cat") if metric == "accuracy" else ())
    assert score(sample, "A dog.") == pytest.approx(1.0, abs=1e-6)
    assert score(sample, "") == 0.0


def test_a_prompt_is_parted_after_its_last_picture():
    def parted(prompt, images=1, **more):
        pictures = tuple(Image.new("RGB", (1, 1)) for _ in range(images))
        sample = Sample(id="1", images=pictures, prompt=prompt, answer="a", **more)
        assert "".join(sample.own_question()) == prompt
        return sample.own_question()[1], sample.probes()

    both = ("asked", "agnostic")
    assert parted("Look. <image> <image> What?", 2) == (" What?", both)
    assert parted("What?", 2) == ("What?", both)  # pictures without markers come first
    assert parted("Do it.\n<image> What?\nChoice list: \nA. x", instruction="Do it.")[0].startswith(" What?\nCh")
    assert parted("<image>\nDo it.\nWhat?", instruction="<image>\nDo it.") == ("\nWhat?", both)
    assert parted("What is on <image>") == ("", ("asked",))
    assert parted("<image>") == ("", ())
    assert parted("What?", 0) == ("", ())
    assert parted("What?", 0, video=Path("clip")) == ("What?", both)
    assert Sample(id="1", images=(), prompt="", answer="a", questions=(("q", "a"),)).probes() == both
