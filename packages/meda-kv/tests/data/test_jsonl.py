"""Our own JSON lines: round trips, and errors that name the line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.data import Sample, open_task
from meda_kv.data.jsonl import choice_text, letter, read_jsonl, write_jsonl
from PIL import Image
from vfm_core.errors import UserError


def write_rows(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_become_samples(tmp_path):
    write_rows(
        tmp_path / "mine.jsonl",
        {"id": 1, "images": ["a/1.png", "2.png"], "prompt": "{image#2} or {image#1}?", "answer": "the first"},
        "\n",
        {"id": "b", "prompt": "Which?", "choices": ["red", "blue"], "answer": "B", "task": "colours", "group": "G"},
        {"id": "c", "video": "clip.mp4", "prompt": "Describe.", "answer": 3, "metric": "needle"},
    )
    task = open_task(f"jsonl:{tmp_path / 'mine.jsonl'}")
    first, second, third = task.samples
    assert (task.name, task.metric) == ("mine", "mixed")
    assert first.prompt == "<image> or <image>?"
    assert first.images == (tmp_path / "2.png", tmp_path / "a" / "1.png")
    assert (first.id, first.metric, first.task, first.level) == ("1", "rouge-l", "mine", "Few")
    assert second.prompt == "Which?\nChoice list: \nA. red\nB. blue\nYour answer is: "
    assert (second.answer, second.metric, second.task, second.group) == ("blue", "accuracy", "colours", "G")
    assert (third.video, third.answer, third.metric) == (tmp_path / "clip.mp4", "3", "needle")


def test_paths_start_from_the_given_root_and_limit_counts_rows(tmp_path):
    write_rows(tmp_path / "x.jsonl", {"id": 1, "images": ["1.png"], "prompt": "p", "answer": "a"}, "not json\n")
    sample = open_task(str(tmp_path / "x.jsonl"), tmp_path / "pictures", limit=1).samples[0]
    assert sample.images == (tmp_path / "pictures" / "1.png",)


def test_prompts_to_generate_from_need_no_answer(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", {"id": 1, "prompt": "p"}, {"id": 2, "prompt": "q", "choices": ["a", "b"]})
    assert [sample.answer for sample in read_jsonl(path, answers=False).samples] == ["", ""]
    with pytest.raises(UserError, match="answer must be text"):
        read_jsonl(path)


QUESTIONS = [{"prompt": "How many?", "answer": 4}, {"prompt": "Which colour?", "answer": "green"}]


def test_questions_share_the_prompt(tmp_path):
    path = write_rows(
        tmp_path / "x.jsonl",
        {"id": 1, "images": ["1.png", "2.png"], "prompt": "{image#2} then {image#1}.", "questions": QUESTIONS},
        {"id": 2, "images": ["1.png"], "questions": QUESTIONS[:1], "metric": "needle"},
    )
    first, second = open_task(f"jsonl:{path}").samples
    assert first.questions == (("How many?", "4"), ("Which colour?", "green"))
    assert (first.answer, first.metric, first.prompt) == ("4", "rouge-l", "<image> then <image>.")
    assert first.images == (tmp_path / "2.png", tmp_path / "1.png")
    assert first.asked(1) == "<image> then <image>. Which colour?"
    assert (second.asked(), second.metric) == ("How many?", "needle")
    write_jsonl(tmp_path / "again.jsonl", [first, second])
    for before, after in zip((first, second), read_jsonl(tmp_path / "again.jsonl").samples, strict=True):
        assert all(getattr(after, k) == getattr(before, k) for k in ("questions", "prompt", "answer", "metric"))


def test_questions_to_generate_from_need_no_answer(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", {"id": 1, "prompt": "p", "questions": [{"prompt": "q"}]})
    assert read_jsonl(path, answers=False).samples[0].asked() == "p q"
    with pytest.raises(UserError, match=r"answer must be text.*line 1, sample_id 1, question 1"):
        read_jsonl(path)


GOOD = {"id": 7, "prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{\n", r"not JSON .*column"),
        ("[1]\n", "a row must be an object"),
        ({"prompt": "p", "answer": "a"}, "id must be text or an integer"),
        ({**GOOD, "id": True}, "id must be text or an integer"),
        ({**GOOD, "promt": "p"}, "did you mean prompt"),
        ({**GOOD, "prompt": "  "}, "prompt must be text that is not empty"),
        ({**GOOD, "answer": ""}, "answer must be text that is not empty"),
        ({**GOOD, "images": "1.png"}, "images must be a list of texts"),
        ({**GOOD, "images": ["1.png"], "video": "v"}, "both images and video"),
        ({**GOOD, "choices": ["x", "y"]}, "not among the choices"),
        ({**GOOD, "choices": ["x", "y"], "answer": "C"}, "not among the choices"),
        ({**GOOD, "metric": "blue"}, "unknown metric"),
        ({**GOOD, "metric": "accuracy"}, "accuracy needs choices"),
        ({**GOOD, "prompt": "{image#1}"}, "1 of 0 pictures"),
        ({**GOOD, "prompt": "{image#0}", "images": ["1.png"]}, "0 of 1 pictures"),
        ({**GOOD, "prompt": "<image><image>", "images": ["1.png"]}, "more markers than pictures"),
        ({**GOOD, "prompt": "<image>{image#1}", "images": ["1.png"]}, "use one kind"),
        ({**GOOD, "id": "1"}, "line 1 has it too"),
        ({**GOOD, "questions": QUESTIONS}, "both questions and answer"),
        ({"id": 7, "questions": QUESTIONS, "choices": ["x"]}, "both questions and choices"),
        ({"id": 7, "questions": []}, "questions must be a list"),
        ({"id": 7, "questions": "how?"}, "questions must be a list"),
        ({"id": 7, "questions": [*QUESTIONS, "how?"]}, "must be an object.*question 3"),
        ({"id": 7, "questions": [{"prompt": "p", "anwser": "a"}]}, "did you mean answer"),
        ({"id": 7, "questions": [{"answer": "a"}]}, "prompt must be text.*question 1"),
        ({"id": 7, "questions": [*QUESTIONS, {"prompt": "p", "answer": " "}]}, "answer must be text.*question 3"),
        ({"id": 7, "questions": [{"prompt": "<image>?", "answer": "a"}]}, "a marker in a question"),
        ({"id": 7, "questions": [{"prompt": "{image#1}?", "answer": "a"}]}, "a marker in a question"),
        ({"id": 7, "questions": QUESTIONS, "metric": "accuracy"}, "no choices for accuracy"),
    ],
)
def test_errors_name_file_and_line(tmp_path, bad, said):
    path = write_rows(tmp_path / "x.jsonl", {"id": 1, "prompt": "p", "answer": "a"}, "\n", bad)
    with pytest.raises(UserError, match=said) as caught:
        open_task(f"jsonl:{path}")
    assert f"{path}, line 3" in str(caught.value)


def test_unreadable_files_are_told(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": 1, "prompt": "caf\xe9", "answer": "a"}\n')
    for name, said in (("nowhere.jsonl", "no such file"), ("", "a folder"), ("latin.jsonl", "not UTF-8")):
        with pytest.raises(UserError, match=said):
            read_jsonl(tmp_path / name)
    with pytest.raises(UserError, match="no sample"):
        read_jsonl(write_rows(tmp_path / "empty.jsonl", "\n"))


def test_letters_go_on_after_z():
    assert [letter(i) for i in (0, 25, 26, 51, 52, 701, 702)] == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]
    assert choice_text([]) == ""


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{<"), min_size=1, max_size=20).filter(
    str.strip
)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(
        st.tuples(
            words,
            words,
            words,
            st.lists(words, max_size=3, unique=True),
            st.integers(0, 3),
            st.lists(st.tuples(words, words), max_size=2),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda row: row[0],
    )
)
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("jsonl")
    samples = [
        Sample(
            id=identity,
            images=tuple(folder / "pictures" / f"{i}.png" for i in range(count)),
            prompt=prompt + "<image>" * (count // 2) + choice_text(choices),
            answer=choices[-1] if choices else questions[0][1] if questions else answer,
            questions=() if choices else tuple(questions),
            choices=tuple(choices),
            metric="accuracy" if choices else "exact",
            task="t",
            group="g",
        )
        for identity, prompt, answer, choices, count, questions in rows
    ]
    write_jsonl(folder / "x.jsonl", samples)
    for before, after in zip(samples, read_jsonl(folder / "x.jsonl").samples, strict=True):
        for name in ("id", "images", "prompt", "answer", "choices", "questions", "metric", "task", "group", "level"):
            assert getattr(after, name) == getattr(before, name), name


def test_pictures_in_memory_cannot_be_written(tmp_path):
    sample = Sample(id="1", images=(Image.new("RGB", (2, 2)),), prompt="p", answer="a", task="t")
    with pytest.raises(UserError, match="t, sample_id 1"):
        write_jsonl(tmp_path / "x.jsonl", [sample])
    assert not (tmp_path / "x.jsonl").exists()


def test_a_video_is_written_as_a_video(tmp_path):
    write_jsonl(
        tmp_path / "x.jsonl", [Sample(id="1", images=(), prompt="p", answer="a", video=tmp_path / "v" / "c.gif")]
    )
    assert json.loads((tmp_path / "x.jsonl").read_text())["video"] == "v/c.gif"
    assert read_jsonl(tmp_path / "x.jsonl").samples[0].video == tmp_path / "v" / "c.gif"
