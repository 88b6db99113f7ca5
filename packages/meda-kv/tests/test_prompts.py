"""Prompts: where images go, chat templates, batches for every family, and clear errors for bad files."""

from __future__ import annotations

import builtins
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from meda_kv.prompts import (
    Prompt,
    build_inputs,
    load_frames,
    load_images,
    ordered_images,
    place_images,
    render,
    spread,
)
from PIL import Image
from processor_zoo import PROCESSOR_FAMILIES, tiny_processor, tiny_tokenizer
from vfm_core.errors import UserError
from zoo import IMAGE, PAD


def picture(width: int = 48, height: int = 32, colour: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


# ------------------------------------------------------------------------------------------------------------- placing
@pytest.mark.parametrize(
    ("text", "count", "parts"),
    [
        ("what?", 0, ["what?"]),
        ("what?", 2, [0, 1, "what?"]),
        ("a <image> b <image>", 2, ["a ", 0, " b ", 1]),
        ("{image#2} then {image#1}", 2, [1, " then ", 0]),
        ("{image#2} only", 2, [0, 1, " only"]),  # the unmarked one comes first
        ("{image#1}{image#1}", 1, [0, 0]),
        ("{image#2} and <image>", 2, [1, " and ", 0]),
    ],
)
def test_images_are_placed(text: str, count: int, parts: list) -> None:
    assert place_images(text, count) == parts


@pytest.mark.parametrize("text", ["<image> <image>", "{image#2}", "{image#0}"])
def test_a_marker_without_an_image_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"marker without an image .*1 image;"):
        place_images(text, 1)


def test_more_images_than_markers_is_refused_on_request() -> None:
    with pytest.raises(UserError, match=r"more images than markers .*3 images, 1 marked"):
        place_images("<image> what?", 3, unmarked="error")
    assert place_images("what?", 3, unmarked="error") == [0, 1, 2, "what?"]


@given(st.lists(st.sampled_from(["<image>", "word", " "]), max_size=12), st.integers(0, 3))
def test_placing_loses_nothing(pieces: list[str], extra: int) -> None:
    text, marked = "".join(pieces), pieces.count("<image>")
    parts = place_images(text, marked + extra)
    assert "".join(part for part in parts if isinstance(part, str)) == text.replace("<image>", "")
    assert sorted(part for part in parts if isinstance(part, int)) == list(range(marked + extra))


def test_images_come_in_reading_order() -> None:
    images = [picture(colour=name) for name in ("red", "green", "blue")]
    prompt = Prompt("w1 {image#3} w2 {image#1}", images)
    assert ordered_images(prompt) == [images[1], images[2], images[0]]


# ----------------------------------------------------------------------------------------------------------- rendering
def test_a_chat_template_keeps_the_order_of_text_and_images() -> None:
    processor = tiny_processor("llava", chat=True)
    text = render(processor, Prompt("w1 <image> w2 <image> w3", [picture(), picture()], system="w9"))
    assert text == "system w9 user w1 <image> w2 <image> w3 assistant "


def test_a_template_that_moves_images_to_the_front_gets_them_in_the_text() -> None:
    processor = tiny_processor("llava")
    processor.chat_template = (
        "{% for message in messages %}USER: "
        "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] }}{% endfor %} {% endfor %}ASSISTANT:"
    )
    both = [picture(), picture()]
    assert render(processor, Prompt("<image> w1 <image> w2", both)) == "USER: <image> w1 <image> w2 ASSISTANT:"
    assert render(processor, Prompt("w1 w2", both)) == "USER: <image>\n<image>\nw1 w2 ASSISTANT:"


def test_a_finished_prompt_and_chat_off_leave_the_template_out() -> None:
    processor = tiny_processor("llava", chat=True)
    assert render(processor, Prompt("<bos> w1 <image> w2", [picture()])) == "<bos> w1 <image> w2"
    assert render(processor, Prompt("w1", []), chat=False) == "w1"


def test_qwen_without_a_template_gets_the_tokens_around_its_images() -> None:
    text = render(tiny_processor("qwen2_5_vl"), Prompt("w1 <image>w2", [picture()]))
    assert text == "w1 <|vision_start|><|image_pad|><|vision_end|>\nw2"


def test_a_tokenizer_takes_text_and_refuses_images() -> None:
    tokenizer = tiny_tokenizer()
    assert render(tokenizer, Prompt("w1 w2")) == "w1 w2"
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    assert render(tokenizer, Prompt("w1", system="w2")) == "system w2 user w1 "
    with pytest.raises(UserError, match=r"no image token for the given images .*vision-language model"):
        render(tokenizer, Prompt("w1", [picture()]))


def test_a_system_message_and_chat_need_a_template() -> None:
    with pytest.raises(UserError, match="system message needs a chat template"):
        render(tiny_processor("llava"), Prompt("w1", system="w2"))
    with pytest.raises(UserError, match="no chat template"):
        render(tiny_processor("llava"), Prompt("w1"), chat=True)


# ------------------------------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("family", PROCESSOR_FAMILIES)
def test_a_mixed_batch_equals_its_rows(family: str) -> None:
    processor = tiny_processor(family)
    images = [picture(64, 32), picture(32, 64, "green"), picture(40, 40, "blue")]
    prompts = [Prompt("w1 {image#2} w3 {image#1} w2", images[:2]), Prompt("w5"), Prompt("<image> w2 w4", images[2:])]
    batch = build_inputs(processor, prompts)
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    for row, prompt in enumerate(prompts):
        alone = build_inputs(processor, [prompt])["input_ids"][0]
        start = batch["input_ids"].shape[1] - len(alone)
        assert batch["input_ids"][row, start:].equal(alone)
        assert (batch["input_ids"][row, :start] == PAD).all()
        assert batch["attention_mask"][row].sum() == len(alone)
        assert bool((alone == IMAGE).any()) == bool(prompt.images)


def test_no_prompt_and_mixed_beginnings_are_refused() -> None:
    processor = tiny_processor("llava")
    with pytest.raises(UserError, match="no prompt"):
        build_inputs(processor, [])
    with pytest.raises(UserError, match="some prompts of the batch begin"):
        build_inputs(processor, [Prompt("<bos> w1"), Prompt("w1")])


def test_the_begin_token_is_not_doubled() -> None:
    from tokenizers.processors import TemplateProcessing

    processor = tiny_processor("llava")
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    assert build_inputs(processor, [Prompt("w1")])["input_ids"][0].tolist() == [1, 12]
    assert build_inputs(processor, [Prompt("<bos> w1")])["input_ids"][0].tolist() == [1, 12]


# --------------------------------------------------------------------------------------------------------------- files
@pytest.fixture
def files(tmp_path: Path) -> Path:
    picture().save(tmp_path / "good.png")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder").mkdir()
    return tmp_path


def test_good_images_load_as_rgb(files: Path) -> None:
    grey = Image.new("L", (4, 4))
    loaded = load_images([files / "good.png", str(files / "good.png"), grey])
    assert [image.mode for image in loaded] == ["RGB"] * 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.png", "no such image file"),
        ("empty.jpg", "an empty file"),
        ("text.png", "not an? |unreadable|cannot"),
        ("cut.png", "truncated|unreadable|corrupt"),
        ("folder", "a folder, not an image"),
    ],
)
def test_a_bad_image_is_named(files: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=f"(?i){words}") as caught:
        load_images([files / "good.png", files / name], "row 7")
    assert name in str(caught.value)
    assert "row 7" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(UserError, match="without pixels"):
        load_images([Image.new("RGB", (0, 4))])


def test_frames_of_a_folder_and_of_an_animation(tmp_path: Path) -> None:
    colours = [(i * 20, 0, 0) for i in range(10)]
    frames = [Image.new("RGB", (8, 8), colour) for colour in colours]
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i:02d}.png")
    assert [image.getpixel((0, 0)) for image in load_frames(tmp_path, 5)] == [colours[i] for i in (1, 3, 5, 7, 9)]
    assert len(load_frames(tmp_path, 99)) == 10
    moving = tmp_path / "moving.webp"
    frames[0].save(moving, save_all=True, append_images=frames[1:], lossless=True)
    assert [image.getpixel((0, 0)) for image in load_frames(moving, 2)] == [colours[2], colours[7]]


def test_videos_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such video"):
        load_frames(tmp_path / "absent.mp4")
    with pytest.raises(UserError, match="no frame in the folder"):
        load_frames(tmp_path)
    with pytest.raises(UserError, match="at least one frame"):
        load_frames(tmp_path, 0)
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    real = builtins.__import__

    def without_av(name: str, *args: object, **kwargs: object) -> object:
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(UserError, match=r"needs the package av .*folder of frames"):
        load_frames(tmp_path / "a.mp4")


@given(st.integers(1, 200), st.integers(1, 50))
def test_spread_is_even_and_inside(length: int, count: int) -> None:
    chosen = spread(length, count)
    assert len(chosen) == min(length, count) == len(set(chosen))
    assert chosen == sorted(chosen)
    assert chosen[0] >= 0
    assert chosen[-1] < length
    gaps = {b - a for a, b in itertools.pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1
