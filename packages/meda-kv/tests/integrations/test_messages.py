"""Chat messages become prompts, task settings become arguments of ``generate``."""

import numpy as np
import pytest
from meda_kv.integrations.messages import as_prompt, generation_settings, stopped
from PIL import Image
from vfm_core.errors import UserError


def picture(value):
    return Image.fromarray(np.full((2, 2, 3), value, np.uint8))


def shades(prompt):
    return [image.getpixel((0, 0))[0] for image in prompt.images]


def text_part(text):
    return {"type": "text", "text": text}


def image_part(value):
    return {"type": "image", "url": picture(value)}


def test_pictures_stand_where_the_content_has_them():
    content = [text_part("first "), image_part(1), text_part(" then "), image_part(2), text_part("?")]
    prompt = as_prompt([{"role": "user", "content": content}])
    assert prompt.text == "first <image> then <image>?"
    assert shades(prompt) == [1, 2]
    assert prompt.system is None


def test_markers_in_the_text_win_when_there_is_one_per_picture():
    content = [image_part(1), image_part(2), text_part("a <image> b <image>")]
    prompt = as_prompt([{"role": "user", "content": content}])
    assert (prompt.text, shades(prompt)) == ("a <image> b <image>", [1, 2])


def test_markers_that_do_not_fit_are_dropped():
    prompt = as_prompt([{"role": "user", "content": [image_part(1), text_part("a <image> b <image>")]}])
    assert prompt.text == "<image>a  b "
    assert as_prompt([{"role": "user", "content": "no <image> here"}]).text == "no  here"


def test_turns_are_joined_and_the_chats_system_message_wins():
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [text_part("one")]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [text_part("three")]},
    ]
    prompt = as_prompt(chat, system="be long")
    assert (prompt.text, prompt.system) == ("one\ntwo\nthree", "be brief")
    assert as_prompt(chat[1:], system="be long").system == "be long"


@pytest.mark.parametrize("kind", ["video", "visual"])
def test_videos_become_evenly_spread_frames(tmp_path, kind):
    for i in range(8):
        picture(10 * i).save(tmp_path / f"{i}.png")
    prompt = as_prompt([{"role": "user", "content": [{"type": kind, "url": str(tmp_path)}, text_part("?")]}], frames=4)
    assert prompt.text == "<image><image><image><image>?"
    assert shades(prompt) == [10, 30, 50, 70]
    frames = [picture(i) for i in range(6)]
    listed = as_prompt([{"role": "user", "content": [{"type": "video", "url": frames}]}], frames=3)
    assert shades(listed) == [1, 3, 5]
    nested = as_prompt([{"role": "user", "content": [{"type": kind, "url": {"url": str(tmp_path)}}]}], frames=1)
    assert len(nested.images) == 1


def test_a_path_of_a_picture_is_a_picture(tmp_path):
    picture(7).save(tmp_path / "a.png")
    for kind in ("image", "visual"):
        part = {"type": kind, "url": str(tmp_path / "a.png")}
        assert shades(as_prompt([{"role": "user", "content": [part]}])) == [7]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "audio", "url": "a.wav"}, "unsupported content"),
        ({"type": "image"}, "unsupported content"),
        ({"type": "image", "url": "nowhere.png"}, "no such image file"),
        ({"type": "video", "url": "nowhere.mp4"}, "no such video"),
    ],
)
def test_what_cannot_be_read_is_told(part, said):
    with pytest.raises(UserError, match=said):
        as_prompt([{"role": "user", "content": [part]}])


def test_settings_are_greedy_unless_the_task_samples():
    greedy = generation_settings({"temperature": 0, "top_p": None, "until": "\n", "image_sizes": [(1, 1)]})
    assert greedy.arguments == {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    assert greedy.until == ("\n",)
    warm = generation_settings({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5, "num_beams": 2})
    assert warm.arguments == {
        "do_sample": True,
        "num_beams": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 5,
    }
    assert not generation_settings({"temperature": 0.7, "do_sample": False}).arguments["do_sample"]
    with pytest.raises(UserError, match="until must be"):
        generation_settings({"until": 3})


def test_answers_end_before_the_first_ending():
    assert stopped("a\nb;c", (";", "\n")) == "a"
    assert stopped("a b", (";",)) == "a b"
    assert stopped("a b", ()) == "a b"
