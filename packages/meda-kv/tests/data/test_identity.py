"""What a run remembers of its data: a change is seen, a copy of the same data is not a change."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from meda_kv.data import Sample
from meda_kv.data.identity import asked, check_unchanged, content, describe, file_digest, shown_names
from PIL import Image
from vfm_core.errors import UserError


@pytest.fixture
def sample(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "b.png")
    source = str(tmp_path / "x.jsonl")
    return Sample(id="1", images=(tmp_path / "a.png",), prompt="see", answer="red", task="t", source=source)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"prompt": "look"}, "prompts"),
        ({"answer": "blue"}, "prompts"),
        ({"questions": (("q", "a"),)}, "prompts"),
        ({"metric": "exact"}, "scoring"),
        ({"choices": ("red", "blue")}, "scoring"),
        ({"official": True}, "scoring"),
        ({"images": (Path("b.png"),)}, "images"),
        ({"video": Path("clip.mp4")}, "images"),
    ],
)
def test_every_part_of_a_sample_counts(sample, change, part):
    before, after = describe([sample]), describe([replace(sample, **change)])
    assert [key for key in before if before[key] != after[key]] == [part]
    assert before["count"] == 1


def test_names_are_relative_to_the_file_that_lists_them(sample, tmp_path):
    assert shown_names(sample) == ["a.png"]
    assert shown_names(replace(sample, images=(Path("/elsewhere/c.png"), Image.new("RGB", (1, 1))))) == [
        "/elsewhere/c.png",
        "picture 2",
    ]
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(tmp_path / "a.png", copy / "a.png")
    os.utime(copy / "a.png", (1, 1))
    other = replace(sample, images=(copy / "a.png",), source=str(copy / "x.jsonl"))
    assert (describe([other]), asked(other), content(other)) == (describe([sample]), asked(sample), content(sample))


def test_content_is_that_of_files_frames_and_pictures_in_memory(sample, tmp_path):
    before = content(sample)
    shutil.copy(tmp_path / "b.png", tmp_path / "a.png")
    assert content(sample) != before
    (tmp_path / "a.png").unlink()
    assert content(sample) not in ("", before) and file_digest(tmp_path / "a.png") == "absent"
    pictures = [replace(sample, images=(Image.new("RGB", (2, 2), colour),)) for colour in ("red", "red", "blue")]
    assert content(pictures[0]) == content(pictures[1]) != content(pictures[2])
    frames = tmp_path / "clip"
    frames.mkdir()
    shutil.copy(tmp_path / "b.png", frames / "0.png")
    clip = replace(sample, video=frames)
    one = content(clip)
    shutil.copy(tmp_path / "b.png", frames / "1.png")
    assert content(clip) != one


def test_long_files_are_told_apart_by_size_and_ends(tmp_path):
    path, found = tmp_path / "long", set()
    for data in (b"0" * 200_000, b"0" * 200_001, b"1" + b"0" * 199_999, b"0" * 199_999 + b"1"):
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        found.add(file_digest(path))
    assert len(found) == 4


def test_what_was_answered_may_not_change(sample):
    recorded = {"t/1": {"asked": asked(sample), "content": content(sample)}}

    def check(one):
        check_unchanged([one], recorded, lambda s: f"{s.task}/{s.id}")

    check(sample)
    check(replace(sample, id="2", prompt="another"))  # not answered yet
    with pytest.raises(UserError, match=r"the data changed.*sample_id 1: prompt or names.*--overwrite"):
        check(replace(sample, prompt="another"))
    Image.new("RGB", (4, 4), "green").save(sample.images[0])
    with pytest.raises(UserError, match=r"sample_id 1: pictures of 1 answered sample;"):
        check(sample)
