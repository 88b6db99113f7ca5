"""MileBench's prediction and score files: schemas, hand-computed numbers, files made elsewhere."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.data import Sample, open_task
from meda_kv.data.predictions import (
    prediction,
    read_predictions,
    score_file,
    score_predictions,
    write_evaluation,
    write_predictions,
)
from vfm_core.errors import UserError


def make_folder(root, task, kind, golds, choices=None, images=1):
    (root / task / "images").mkdir(parents=True)
    rows = [
        {
            "sample_id": i if i % 2 else str(i),
            "task_instruction_id": 0,
            "task_instance": {"context": "?", "images_path": ["x.png"] * images * (1 + 6 * (i == 0))}
            | ({"choice_list": choices} if choices else {}),
            "response": gold,
            "image_quantity_level": "Few",
        }
        for i, gold in enumerate(golds)
    ]
    content = {"meta_data": {"task_instruction": ["Do it."], "question_type": kind}, "data": rows}
    (root / task / f"{task}.json").write_text(json.dumps(content))
    return open_task(f"milebench:{task}", root)


def entries(*answers):
    return [{"sample_id": i, "pred_response": answer} for i, answer in enumerate(answers)]


def test_an_entry_has_the_official_keys(tmp_path):
    sample = make_folder(tmp_path, "IEdit", "open-ended", ["it is red"]).samples[0]
    entry = prediction(sample, "it is blue", model_id="tiny+meda@0.2", gen_kwargs={"max_new_tokens": 4})
    assert list(entry) == [
        "sample_id",
        "image",
        "question",
        "gt_response",
        "gen_model_id",
        "pred_response",
        "gen_kwargs",
    ]
    assert entry["sample_id"] == 0 and isinstance(entry["sample_id"], int)  # "0" in the file
    assert entry["image"] == [str(image) for image in sample.images]
    assert entry["question"] == sample.prompt
    assert (entry["gt_response"], entry["gen_kwargs"]) == ("it is red", {"max_new_tokens": 4})


def test_rouge_of_a_task_by_hand(tmp_path):
    task = make_folder(tmp_path, "IEdit", "open-ended", ["the cup is red", "no change", "a b c d"])
    result = score_predictions(entries("The cup is blue.", "no change", ""), task)
    # 3 of 4 words on both sides: 0.75; equal: 1; empty: 0. Sample 0 has 7 pictures (Medium), the others 1 (Few).
    assert result.scores == pytest.approx({"0": 0.75, "1": 1.0, "2": 0.0}, abs=1e-7)
    assert (result.metric, result.empty) == ("rouge-l", 1)
    expected = {
        "Rouge-L f": pytest.approx(1.75 / 3, abs=1e-7),
        "image_quantity_level-Accuracy": {"Few": pytest.approx(0.5), "Medium": pytest.approx(0.75), "Many": 0},
        "image_quantity_level-Result": {
            "Few": [pytest.approx(1), 2],
            "Medium": [pytest.approx(0.75), 1],
            "Many": [0, 0],
        },
    }
    assert result.to_dict() == expected
    write_evaluation(tmp_path / "out", result)
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == expected
    listed = json.loads((tmp_path / "out" / "eval_score.json").read_text())
    assert listed == [{"id": "0", "score": "0.75"}, {"id": "1", "score": "1.0"}, {"id": "2", "score": "0.0"}]


def test_accuracy_of_a_task_by_hand_and_as_the_official_scorer_gives_it(tmp_path):
    task = make_folder(tmp_path, "TQA", "multi-choice", ["red", "blue", "green", "green"], ["red", "blue", "green"])
    given_answers = entries("A. red", "the blue one", "B", "")
    result = score_predictions(given_answers, task)
    assert result.to_dict()["Accuracy"] == 0.75  # the empty answer counts as C there
    assert (result.official_score, result.mended_score) == (0.75, 0.5)
    assert (result.to_dict()["official_score"], result.to_dict()["mended_score"]) == (0.75, 0.5)
    mended = score_predictions(given_answers, task, official=False)
    assert (mended.score, mended.official_score, mended.mended_score) == (0.5, 0.75, 0.5)
    own = [replace(sample, official=False) for sample in task.samples]  # of no MileBench folder
    assert score_predictions(given_answers, own).score == 0.5
    official = score_predictions(given_answers, own, official=True)
    assert official.score == official.official_score == 0.75
    assert official.to_dict()["image_quantity_level-Result"] == {"Few": [2.0, 3], "Medium": [1.0, 1], "Many": [0, 0]}
    assert official.score_list()[0] == {"id": "0", "score": "1"}


@pytest.mark.parametrize("name", ["pred.json", "pred.jsonl"])
def test_a_file_made_elsewhere_is_scored(tmp_path, name):
    make_folder(tmp_path, "MMCoQA", "open-ended", ["Paris", "Rome"])
    rows = [{"sample_id": "1", "pred_response": "In Rome."}, {"sample_id": 0, "pred_response": "london", "extra": 1}]
    lines = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (tmp_path / name).write_text(lines)
    result = score_file(tmp_path / name, "milebench:MMCoQA", tmp_path)
    assert result.scores == {"1": 1.0, "0": 0.0}
    assert result.metric == "substring"


def test_numbered_ids_are_questions_of_a_sample(tmp_path):
    rows = [{"sample_id": "a#1", "pred_response": "red"}, {"sample_id": "a#0", "pred_response": "3"}]
    rows += [{"sample_id": "b", "pred_response": "no"}]
    (tmp_path / "pred.json").write_text(json.dumps(rows))
    pairs = [{"prompt": "how many?", "answer": "3"}, {"prompt": "which?", "answer": "blue"}]
    lines = [{"id": "a", "questions": pairs, "metric": "needle"}, {"id": "b", "prompt": "p", "answer": "yes"}]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(line | {"metric": "needle"}) for line in lines))
    result = score_file(tmp_path / "pred.json", f"jsonl:{tmp_path / 'x.jsonl'}")
    assert result.scores == {"a#1": 0.0, "a#0": 1.0, "b": 0.0}


def test_shares_of_words_are_listed_with_decimals(tmp_path):
    samples = [Sample(id="1", images=(), prompt="p", answer="7 3 0", metric="words", task="t")]
    result = score_predictions([{"sample_id": 1, "pred_response": "7 3 1"}], samples)
    assert result.score_list() == [{"id": "1", "score": "0.667"}]
    assert result.score == result.official_score == pytest.approx(2 / 3)


def test_needles_are_words(tmp_path):
    task = make_folder(tmp_path, "TextNeedleInAHaystack", "open-ended", ["7391", "red"])
    assert score_predictions(entries("It is 7391.", "infrared"), task).scores == {"0": 1.0, "1": 0.0}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (entries("x"), "samples without a prediction .*1 of 2, such as 1"),
        (entries("x", "y", "z"), "no such sample in task IEdit .*sample_id 2"),
        ([*entries("x", "y"), *entries("x")], "two predictions for one sample .*sample_id 0"),
        ([{**entries("x")[0], "gt_response": "other"}], "another gold answer .*sample_id 0"),
    ],
)
def test_predictions_that_do_not_fit_are_told(tmp_path, rows, said):
    task = make_folder(tmp_path, "IEdit", "open-ended", ["a", "b"])
    with pytest.raises(UserError, match=said):
        score_predictions(rows, task)


def test_a_part_is_scored_when_asked_for(tmp_path):
    task = make_folder(tmp_path, "IEdit", "open-ended", ["a", "b"])
    assert score_predictions(entries("a"), task, partial=True).scores == {"0": pytest.approx(1.0)}
    with pytest.raises(UserError, match="2 of 2"):
        score_predictions([], task, partial=True)


def test_tasks_are_scored_one_by_one(tmp_path):
    samples = [*make_folder(tmp_path, "IEdit", "open-ended", ["a"]).samples]
    samples += make_folder(tmp_path, "TQA", "open-ended", ["a"]).samples
    with pytest.raises(UserError, match="task by task"):
        score_predictions(entries("a"), samples)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("{}", "must be a list"),
        ('[{"sample_id": 1}]', "entry without pred_response in .*entry 0"),
        ('[{"pred_response": "x"}]', "entry without sample_id"),
        ("[3]", "entry without sample_id"),
        ('[{"sample_id": 1, "pred_response": null}]', "pred_response must be text in .*sample_id 1"),
    ],
)
def test_broken_prediction_files_are_told(tmp_path, text, said):
    (tmp_path / "pred.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_predictions(tmp_path / "pred.json")
    with pytest.raises(UserError, match="no such file"):
        read_predictions(tmp_path / "other.json")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=5))
def test_predictions_survive_the_file(tmp_path_factory, answers):
    path = tmp_path_factory.mktemp("predictions") / "pred.json"
    samples = [Sample(id=str(i), images=(), prompt="p", answer="a", task="t") for i in range(len(answers))]
    written = [prediction(sample, answer, model_id="m") for sample, answer in zip(samples, answers)]
    write_predictions(path, written)
    assert read_predictions(path) == written
