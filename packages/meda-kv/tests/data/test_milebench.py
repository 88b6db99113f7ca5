"""MileBench folders in the real format, made by hand: prompts, metrics, variants, truncation, faults."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.data import open_task
from meda_kv.data.milebench import GROUPS, TASKS, group_of, metric_of, split_variant, truncate
from PIL import Image
from vfm_core.errors import UserError


def row(identity, context, images=0, response="gold", choices=None, **more):
    instance = {"context": context, "images_path": [f"{i}.png" for i in range(images)], **more}
    if choices is not None:
        instance["choice_list"] = choices
    return {
        "sample_id": identity,
        "task_instruction_id": 0,
        "task_instance": instance,
        "response": response,
        "image_quantity_level": "Few",
    }


def write_task(root, task, rows, kind="open-ended", variant="", instructions=("Do it.",)):
    folder = root / task
    (folder / "images").mkdir(parents=True, exist_ok=True)
    content = {"meta_data": {"task_instruction": list(instructions), "question_type": kind}, "data": rows}
    path = folder / f"{task}{variant}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def only(root, name):
    samples = open_task(f"milebench:{name}", root).samples
    assert len(samples) == 1
    return samples[0]


class Characters:
    """A tokenizer whose tokens are characters, so that lengths can be counted by hand."""

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})()

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_there_are_29_tasks_in_11_groups():
    assert len(TASKS) == len(set(TASKS)) == 29
    assert tuple(GROUPS) == ("T-1", "T-2", "T-3", "T-4", "S-1", "S-2", "S-3", "S-4", "S-5", "NH", "IR")
    assert group_of("MMCoQA") == "S-4"
    assert group_of("MyOwn") == "MyOwn"


def test_metrics_follow_the_task_and_the_question_type():
    assert metric_of("TextNeedleInAHaystack", "open-ended") == "needle"
    assert metric_of("MMCoQA", "open-ended") == "substring"
    assert metric_of("IEdit", "open-ended") == "rouge-l"
    assert metric_of("TQA", "multi-choice") == "accuracy"


def test_variants_are_split_off():
    assert split_variant("OCR-VQA") == ("OCR-VQA", "")
    assert split_variant("OCR-VQA-adv") == ("OCR-VQA", "-adv")
    assert split_variant("Spot-the-Diff_combined_1") == ("Spot-the-Diff", "_combined_1")


def test_an_open_question(tmp_path):
    write_task(tmp_path, "IEdit", [row(3, "From {image#1} to {image#2}: what changed?", 2, "It is red")])
    sample = only(tmp_path, "IEdit")
    assert sample.prompt == "Do it.\nFrom <image> to <image>: what changed?"
    assert sample.images == tuple(tmp_path / "IEdit" / "images" / f"{i}.png" for i in range(2))
    assert (sample.id, sample.answer, sample.metric, sample.group) == ("3", "It is red", "rouge-l", "S-3")
    assert sample.where == f"{tmp_path / 'IEdit' / 'IEdit.json'}, sample_id 3"


def test_options_are_lettered_except_for_gpr1200(tmp_path):
    write_task(tmp_path, "TQA", [row(1, "Which?", choices=["red", "blue"], response="blue")], "multi-choice")
    write_task(tmp_path, "GPR1200", [row(1, "Which?", choices=["red", "blue"], response="blue")], "multi-choice")
    assert only(tmp_path, "TQA").prompt == "Do it.\nWhich?\nChoice list: \nA. red\nB. blue\nYour answer is: "
    assert only(tmp_path, "GPR1200").prompt == "Do it.\nWhich?\nChoice list: \nred\nblue\nYour answer is: "
    assert only(tmp_path, "TQA").choices == ("red", "blue")


def test_adjacent_pictures_get_line_breaks(tmp_path):
    write_task(tmp_path, "CLEVR-Change", [row(1, "{image#1}{image#2}What?", 2)])
    assert only(tmp_path, "CLEVR-Change").prompt == "Do it.\n<image>\n<image>\nWhat?"


def test_markers_are_resolved_by_number(tmp_path):
    write_task(tmp_path, "IEdit", [row(1, "{image#2} then {image#1} then {image#2}", 3)])
    sample = only(tmp_path, "IEdit")
    assert [image.name for image in sample.images] == ["2.png", "1.png", "0.png", "1.png"]
    assert sample.prompt == "Do it.\n<image><image> then <image> then <image>".replace(
        "<image><image>", "<image>\n<image>\n"
    )


def test_pictures_and_tables_that_are_numbered_apart_are_taken_in_order(tmp_path):
    write_task(tmp_path, "MultiModalQA", [row(1, "{image#1} {table#1} {image#2}", 3)])
    assert [image.name for image in only(tmp_path, "MultiModalQA").images] == ["0.png", "1.png", "2.png"]


def test_tables_are_pictures(tmp_path):
    write_task(tmp_path, "MultiModalQA", [row(1, "{table#1} and {image#2}", 2)])
    assert only(tmp_path, "MultiModalQA").prompt == "Do it.\n<image> and <image>"


@pytest.mark.parametrize("in_variant_file", [True, False])
def test_the_combined_variant_has_one_picture_and_captions(tmp_path, in_variant_file):
    rows = [row(4, "{image#1}, {table#2}?", 2, combined_1_images=["4-0.jpg"])]
    write_task(tmp_path, "IEdit", rows, variant="_combined_1" if in_variant_file else "")
    sample = only(tmp_path, "IEdit_combined_1")
    assert sample.prompt == "<image>\nDo it.\n<Image 1> , <Image 2> ?"
    assert sample.images == (tmp_path / "IEdit" / "combined_1_images" / "4-0.jpg",)
    assert (sample.task, sample.group, sample.level) == ("IEdit_combined_1", "S-3", "Few")


def test_the_adversarial_variant_is_another_file(tmp_path):
    write_task(tmp_path, "TQA", [row(1, "plain")])
    write_task(tmp_path, "TQA", [row(1, "hard")], variant="-adv")
    assert only(tmp_path, "TQA").prompt.endswith("plain")
    assert only(tmp_path, "TQA-adv").prompt.endswith("hard")


def test_levels_count_the_pictures_of_the_annotation(tmp_path):
    write_task(tmp_path, "IEdit", [row(k, "", k) for k in (5, 6, 31, 32)])
    assert [s.level for s in open_task("milebench:IEdit", tmp_path).samples] == ["Few", "Medium", "Medium", "Many"]


def test_groups_and_all_read_what_is_there(tmp_path, caplog):
    write_task(tmp_path, "IEdit", [row(1, "a"), row(2, "b")])
    write_task(tmp_path, "MMCoQA", [row(1, "c")])
    group = open_task("milebench:S-3", tmp_path)
    assert [s.task for s in group.samples] == ["IEdit", "IEdit"]
    assert "absent: Spot-the-Diff, CLEVR-Change" in caplog.text
    everything = open_task("milebench:all", tmp_path, limit=1)
    assert [(s.task, s.id) for s in everything.samples] == [("IEdit", "1"), ("MMCoQA", "1")]
    assert everything.metric == "mixed" and all(s.official for s in everything.samples)
    assert " and 24 more" in caplog.text  # of 27 absent ones
    with pytest.raises(UserError, match="no task of T-1"):
        open_task("milebench:T-1", tmp_path)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row(9, "x", response=""), "gold answer .* is empty"),
        (row(9, "x", response=" ?! "), "gold answer .* is empty"),
        (row(9, "x", choices=["red"], response="blue"), "not in choice_list"),
        (row(9, "{image#1}{image#3}", 1), "markers do not fit the pictures"),
        (row(9, "x") | {"task_instruction_id": 1}, "names no instruction"),
        (row(9, "x") | {"task_instance": {}}, "without context"),
        (row(9, "x") | {"task_instance": {"context": "x"}}, "images_path must be a list"),
        (row(1, "x"), "sample_id occurs twice"),
        (row("1", "x"), "sample_id occurs twice"),
    ],
)
def test_a_fault_is_told_with_file_and_sample_id(tmp_path, bad, said):
    first = row(1, "x", choices=["gold"])
    path = write_task(tmp_path, "TQA", [first, bad], "multi-choice" if "choice_list" in str(said) else "open-ended")
    with pytest.raises(UserError, match=said) as caught:
        open_task("milebench:TQA", tmp_path)
    assert str(path) in str(caught.value)
    assert str(bad["sample_id"]) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not a MileBench file"),
        ('{"meta_data": {"task_instruction": ["a"], "question_type": "essay"}, "data": []}', "unknown question_type"),
        ('{"meta_data": {"task_instruction": "a", "question_type": "open-ended"}, "data": []}', "list of texts"),
        ('{"meta_data": {"task_instruction": ["a"], "question_type": "open-ended"}, "data": []}', "no sample"),
        (
            '{"meta_data": {"task_instruction": ["a"], "question_type": "open-ended"}, "data": [{}]}',
            "without sample_id",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, said):
    (tmp_path / "TQA").mkdir()
    path = tmp_path / "TQA" / "TQA.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        open_task("milebench:TQA", tmp_path)
    assert str(path) in str(caught.value)


def test_unknown_names_are_told_with_what_is_close(tmp_path):
    write_task(tmp_path, "MyTask", [row(1, "x")])
    assert only(tmp_path, "MyTask").group == "MyTask"
    with pytest.raises(UserError, match="did you mean MyTask"):
        open_task("milebench:MyTsk", tmp_path)
    with pytest.raises(UserError, match="no such file"):
        open_task("milebench:MyTask-adv", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        open_task("milebench:MyTask", tmp_path / "nowhere")


def test_pictures_are_loaded_from_the_folder(tmp_path):
    write_task(tmp_path, "IEdit", [row(1, "{image#1}", 1), row(2, "{image#1}{image#2}", 2)])
    Image.new("RGB", (5, 3)).save(tmp_path / "IEdit" / "images" / "0.png")
    good, bad = open_task("milebench:IEdit", tmp_path).samples
    assert good.load_images()[0].size == (5, 3)
    with pytest.raises(UserError, match=r"IEdit.json, sample_id 2: .*1.png"):
        bad.load_images()


def test_truncation_by_hand(tmp_path):
    write_task(tmp_path, "IEdit", [row(1, "aaaa{image#1}bbb{image#2}cc{image#3}d", 3)])
    sample = only(tmp_path, "IEdit")  # instruction 6 characters, text 4 + 3 + 2 + 1, pictures 5 each: 31 in all

    def cut(length):
        shorter = truncate(sample, Characters(), length, 5)
        return shorter.prompt.removeprefix("Do it.\n"), [int(image.stem) for image in shorter.images]

    assert truncate(sample, Characters(), 31, 5) is sample
    assert cut(30) == ("<image>bbb<image>cc<image>d", [0, 1, 2])
    assert cut(27) == ("<image>bbb<image>cc<image>d", [0, 1, 2])
    assert cut(26) == ("bbb<image>cc<image>d", [1, 2])
    assert cut(21) == ("<image>cc<image>d", [1, 2])
    assert cut(18) == ("cc<image>d", [2])
    assert cut(13) == ("<image>d", [2])
    assert cut(7) == ("d", [])
    shorter = truncate(sample, Characters(), 18, 5)
    assert (shorter.raw["truncated"], shorter.raw["images_dropped"], shorter.level) == (True, 2, "Few")


def test_truncation_keeps_the_end_of_a_last_piece_that_is_too_long(tmp_path):
    write_task(tmp_path, "IEdit", [row(1, "{image#1}abcdefgh", 1), row(2, "abcdefgh")])
    for sample in open_task("milebench:IEdit", tmp_path).samples:
        shorter = truncate(sample, Characters(), 9, 5)
        assert (shorter.prompt, shorter.images) == ("Do it.\nfgh", ())


def test_truncation_never_drops_the_combined_picture(tmp_path):
    write_task(tmp_path, "IEdit", [row(1, "abcdefgh", 2, combined_1_images=["1-0.jpg"])])
    shorter = truncate(only(tmp_path, "IEdit_combined_1"), Characters(), 7 + 5 + 3, 5)
    assert shorter.prompt == "<image>\nDo it.\nfgh"
    assert len(shorter.images) == 1


def test_truncation_limits_are_checked(tmp_path):
    write_task(tmp_path, "IEdit", [row(1, "x")])
    sample = only(tmp_path, "IEdit")
    for arguments, said in (((0, 1), "max_context_len"), ((9, -1), "tokens_per_image"), ((6, 1), "leaves no room")):
        with pytest.raises(UserError, match=said):
            truncate(sample, Characters(), *arguments)


@settings(deadline=None, max_examples=60)
@given(
    pieces=st.lists(st.text("ab \n", max_size=6), min_size=1, max_size=6),
    room=st.integers(7, 70),
    each=st.integers(1, 9),
)
def test_a_truncated_prompt_fits_and_is_an_end_of_the_whole(tmp_path_factory, pieces, room, each):
    root = tmp_path_factory.mktemp("milebench")
    context = "".join(f"{{image#{i}}}{piece}" if i else piece for i, piece in enumerate(pieces))
    write_task(root, "IEdit", [row(1, context, len(pieces) - 1)])
    sample = only(root, "IEdit")
    task = open_task("milebench:IEdit", root).truncated(Characters(), room, each)
    shorter = task.samples[0]
    assert shorter.prompt.count("<image>") == len(shorter.images)
    assert shorter.images == sample.images[len(sample.images) - len(shorter.images) :]
    whole, end = (
        s.prompt.removeprefix("Do it.\n").replace("<image>", "|").replace("\n", "") for s in (sample, shorter)
    )
    assert whole.endswith(end)
    text = (
        sum(map(len, pieces[len(pieces) - 1 - len(shorter.images) :]))
        if shorter is sample
        else len(end) - end.count("|")
    )
    assert 6 + text + each * len(shorter.images) <= room or shorter is sample
