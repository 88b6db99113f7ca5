"""The command line: every verb parses, says what it did, answers in JSON, and stays fast until it must work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from finecam.cli import app, main
from finecam.cli.options import numbers
from finecam.taxonomy import TaxonomyKeys
from PIL import Image
from tinyworld.birds import Birds

VERBS = [
    ["demo"],
    ["explain"],
    ["fit-head"],
    ["promptcam"],
    ["promptcam", "train"],
    ["promptcam", "traits"],
    ["promptcam", "compare"],
    ["promptcam", "taxonomy"],
    ["evaluate"],
    ["bench"],
    ["audit"],
    ["layers"],
    ["quiz"],
    ["quiz", "export"],
    ["quiz", "score"],
    ["merge"],
]
BIRDS = "tinyworld:birds?split=val&n=4"


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Answer]


@pytest.fixture
def finecam(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command in this process: its exit code and what it printed."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["finecam", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Answer(int(end.value.code or 0), out, err)

    return call


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb_has_an_example(finecam: Call, verb: list[str]) -> None:
    answer = finecam(*verb, "--help")
    assert answer.code == 0 and not answer.err
    if verb not in (["promptcam"], ["quiz"]):
        assert "Examples" in answer.out and f"finecam {' '.join(verb)}" in answer.out


def test_the_list_of_verbs_is_complete(finecam: Call) -> None:
    listed = finecam("--help").out
    assert all(verb[0] in listed for verb in VERBS)
    registered = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    registered |= {g.name for g in app.registered_groups if g.name}
    assert registered == {verb[0] for verb in VERBS}


def test_help_and_import_load_nothing_heavy() -> None:
    code = (
        "import sys, finecam, vfm_core\n"
        "from finecam.cli import main\n"
        "sys.argv = ['finecam', 'explain', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'timm', 'transformers', 'matplotlib', 'open_clip', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_version(finecam: Call) -> None:
    from importlib.metadata import version

    assert finecam("--version").out.strip() == f"finecam {version('finecam')}"


def test_public_names_are_what_they_say() -> None:
    code = (
        "import finecam, inspect\n"
        "for name in finecam.__all__:\n"
        "    value = getattr(finecam, name)\n"
        "    assert callable(value) and not inspect.ismodule(value), name\n"
        "assert set(finecam.__all__) <= set(dir(finecam)) and finecam.__version__\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_numbers() -> None:
    assert numbers("0, .6,1", "x") == (0, 0.6, 1)
    for bad in ("", "a", "0;1", "1,,b"):
        with pytest.raises(ValueError, match=r"list"):
            numbers(bad, "--gammas")


# --- explain --------------------------------------------------------------------------------


def test_explain_prints_one_line_and_the_page(finecam: Call, tmp_path: Path) -> None:
    answer = finecam("explain", BIRDS, "--model", "tiny:cnn", "--out", tmp_path / "o", "--target", "label")
    assert answer.code == 0, answer.err
    line, page = answer.out.strip().splitlines()
    assert line.startswith("4 images explained (4 now") and line.endswith("0 failed")
    assert Path(page) == tmp_path / "o" / "index.html" and Path(page).is_file()
    again = finecam("explain", BIRDS, "--model", "tiny:cnn", "--out", tmp_path / "o", "--target", "label", "--json")
    found = json.loads(again.out)
    assert (found["done"], found["new"], found["failed"]) == (4, 0, 0) and found["index"] == page


def test_explain_options_reach_the_maps(finecam: Call, tmp_path: Path) -> None:
    answer = finecam(
        "explain", BIRDS, "--model", "tiny:cnn", "--out", tmp_path / "o", "--limit", 1, "--method", "layercam",
        "--target", "blue bird with red wing patch", "--reference", "orange bird with blue collar", "--reference", "3",
        "--gammas", "0.3,2", "--weighting", "softmax", "--layer", "layer3.2", "--map-size", "32",
        "--colormap", "viridis", "--metrics", "--no-panels",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    (record,) = (json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines())
    assert next(d["name"] for d in record["references"]) == "orange bird with blue collar"
    assert record["references"][1]["id"] == 3 and record["gammas"] == [0, 0.3, 2]
    assert (record["method"], record["layer"], record["weighting"]) == ("layercam", "layer3.2", "softmax")
    assert record["overlay"] is None and record["metrics"]
    with np.load(tmp_path / "o" / record["map"]) as arrays:
        assert arrays["sweep"].shape == (3, 32, 32)


def test_explain_text_against_text(finecam: Call, tmp_path: Path) -> None:
    answer = finecam(
        "explain", BIRDS, "--model", "random:tiny:clip", "--text", "red wing patch", "--against", "bird", "--limit", 2,
        "--template", "a {}", "--out", tmp_path / "o",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["target"]["name"] == "red wing patch"
        assert [d["name"] for d in record["references"]] == ["bird"]
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config["text"]["texts"] == ["red wing patch", "bird"] and config["text"]["templates"] == ["a {}"]
    assert config["text"]["scale"] > 0
    answer = finecam(
        "explain", BIRDS, "--model", "random:tiny:clip", "--text", "red wing patch", "--against", "bird", "--limit", 2,
        "--template", "a {}", "--scale", 1, "--out", tmp_path / "o",
    )  # fmt: skip
    assert answer.code == 2 and "text.scale" in answer.err


def test_classless_methods_take_no_contrast(finecam: Call, tmp_path: Path) -> None:
    call = ["explain", BIRDS, "--model", "tiny:cnn", "--method", "eigencam", "--out", tmp_path / "o", "--limit", 1]
    for more in (["--gamma", 0.6], ["--references", 3], ["--reference", 3], ["--similarity", "logit"]):
        answer = finecam(*call, *more)
        assert answer.code == 2 and "eigencam depends on no class" in answer.err and answer.err.count("\n") == 1
    assert not (tmp_path / "o").exists()
    assert finecam(*call, "--references", 0).code == 0  # nothing is what there is to subtract


def test_shard_help_says_where_counting_starts(finecam: Call) -> None:
    assert "1/4, 2/4, 3/4, 4/4" in " ".join(finecam("explain", "--help").out.replace("│", " ").split())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--gammas", "a"], "not a list of numbers in --gammas"),
        (["--gammas", "-1"], "gamma must be finite and not negative"),
        (["--against", "bird"], "--against needs --text"),
        (["--text", "x", "--target", "y"], "two ways to name the target"),
        (["--colormap", "rainbow"], "unknown colormap"),
        (["--map-size", "tiny"], "not a map size"),
        (["--shard", "3/2"], "not a shard"),
        (["--device", "tpu"], "unknown device"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--class-map", "nowhere.csv"], "cannot read class map"),
        (["--limit", "0"], "--limit"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(finecam: Call, tmp_path: Path, arguments: list[str], said: str) -> None:
    answer = finecam("explain", BIRDS, "--model", "tiny:cnn", "--out", tmp_path / "o", *arguments)
    assert answer.code == 2 and said in answer.err and answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1 and not answer.out
    assert not (tmp_path / "o").exists()


def test_shards_and_merge(finecam: Call, tmp_path: Path) -> None:
    for i in (1, 2):
        answer = finecam("explain", BIRDS, "--model", "tiny:cnn", "--out", tmp_path, "--shard", f"{i}/2")
        assert answer.code == 0 and "finecam merge" in answer.out
    merged = finecam("merge", tmp_path)
    assert merged.code == 0 and "4 images of 2 shards merged, 0 failed" in merged.out


def test_layers_marks_the_default(finecam: Call) -> None:
    answer = finecam("layers", "tiny:cnn", "--json")
    rows = {row["layer"]: row for row in json.loads(answer.out)}
    assert [name for name, row in rows.items() if row["default"]] == ["layer4.2"]
    assert rows["layer4.2"]["map (channels, rows, columns)"] == "64x16x16"
    every = {row["layer"] for row in json.loads(finecam("layers", "tiny:cnn", "--all", "--json").out)}
    assert set(rows) < every
    assert "layer4.2" in finecam("layers", "tiny:cnn").out


# --- the other verbs ------------------------------------------------------------------------


def test_fit_head_then_explain(finecam: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFM_CORE_CACHE", str(tmp_path / "cache"))
    data = "tinyworld:birds?split=train&n=48"
    answer = finecam(
        "fit-head",
        data,
        "--backbone",
        "tiny:vit",
        "--recipe",
        "exact",
        "--out",
        tmp_path / "h",
        "--val",
        BIRDS,
        "--json",
    )
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["classes"] == 16
    again = ["fit-head", data, "--backbone", "tiny:vit", "--recipe", "exact", "--out", tmp_path / "h", "--val", BIRDS]
    written = (tmp_path / "h" / "head.safetensors").stat().st_mtime_ns
    answer = finecam(*again)
    assert answer.code == 0 and answer.out.startswith("there already: 16 classes, 48 images, validation accuracy")
    assert (tmp_path / "h" / "head.safetensors").stat().st_mtime_ns == written
    answer = finecam(*again, "--strength", 2)
    assert answer.code == 2 and "recipe.C = 1.0 -> 2.0; use --overwrite" in answer.err
    answer = finecam("explain", BIRDS, "--model", tmp_path / "h", "--out", tmp_path / "o", "--similarity", "weight")
    assert answer.code == 0, answer.err
    record = json.loads((tmp_path / "o" / "results.jsonl").read_text().splitlines()[0])
    assert record["layer"].endswith("norm1") and record["similarity"] == "weight"


def test_promptcam_train_traits_compare(finecam: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFM_CORE_CACHE", str(tmp_path / "cache"))
    data = "tinyworld:birds?split=train&n=32"
    answer = finecam(
        "promptcam", "train", data, "--backbone", "tiny:vit", "--prompt-layers", 1, "--epochs", 2,
        "--out", tmp_path / "pc", "--optimizer", "adamw", "--lr", "0.02", "--quiet",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "16 classes, epoch 2" in answer.out and not answer.err
    answer = finecam(
        "promptcam", "traits", tmp_path / "pc", BIRDS, "--out", tmp_path / "t", "--top", 2, "--target", "label"
    )
    assert answer.code == 0, answer.err
    records = [json.loads(line) for line in (tmp_path / "t" / "results.jsonl").read_text().splitlines()]
    assert len(records) == 4
    for r in records:
        assert len(r["heads"]) == 2 and len(r["pictures"]["layers"]) == 3 and r["target"]["name"] == r["label"]
        with np.load(tmp_path / "t" / r["map"]) as arrays:
            assert arrays["traits"].shape == (2, 8, 8) and arrays["mean"].shape == (8, 8)
            np.testing.assert_allclose(arrays["traits"].mean(0, dtype=np.float32), arrays["mean"], atol=1e-2)
        with Image.open(tmp_path / "t" / r["overlay"]) as panel:
            panel.load()
    assert (tmp_path / "t" / "index.html").is_file() and (tmp_path / "t" / "report.html").is_file()
    pair = ["blue bird with red wing patch", "blue bird with yellow crown"]
    answer = finecam("promptcam", "compare", tmp_path / "pc", BIRDS, *pair, "--out", tmp_path / "c")
    assert answer.code == 0 and "4 images, 0 failed" in answer.out
    answer = finecam("promptcam", "compare", tmp_path / "pc", BIRDS, pair[0], pair[0], "--out", tmp_path / "d")
    assert answer.code == 2 and "need two different classes" in answer.err and not (tmp_path / "d").exists()
    answer = finecam("promptcam", "traits", tmp_path / "pc", BIRDS, "--out", tmp_path / "t9", "--top", 9)
    assert answer.code == 0 and "the model has 4 heads: all are shown, not 9" in answer.out
    record = json.loads((tmp_path / "t9" / "results.jsonl").read_text().splitlines()[0])
    views = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "t9").rglob("*.js"))
    assert len(record["pictures"]["layers"]) == 5 and "head no. 4" in views and "head no. 5" not in views
    answer = finecam("promptcam", "traits", tmp_path / "pc", BIRDS, "--out", tmp_path / "t2", "--target", "blue brd")
    assert answer.code == 2 and "blue bird" in answer.err
    for verb in (["traits"], ["compare"]):
        more = pair if verb == ["compare"] else []
        answer = finecam("promptcam", *verb, tmp_path / "pc", BIRDS, *more, "--heads", 2, "--out", tmp_path / "t3")
        assert answer.code == 2 and "for official files" in answer.err
    page = (tmp_path / "t" / "report.html").read_text(encoding="utf-8")
    assert "Blurring one head after the other" in page and "Annotated traits and parts" in page and "by chance" in page


def test_promptcam_train_again_resumes_or_refuses(
    finecam: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finecam import promptcam_train

    monkeypatch.setenv("VFM_CORE_CACHE", str(tmp_path / "cache"))
    call = [
        "promptcam", "train", "tinyworld:birds?split=train&n=32", "--backbone", "tiny:vit", "--prompt-layers", 1,
        "--epochs", 3, "--out", tmp_path / "pc",
    ]  # fmt: skip

    fit = promptcam_train.fit

    def cut(*arguments: Any, **options: Any) -> Any:
        def stop(record: dict[str, float]) -> None:
            raise KeyboardInterrupt

        return fit(*arguments, **options | {"on_epoch": stop})

    with monkeypatch.context() as patch:
        patch.setattr(promptcam_train, "fit", cut)
        assert finecam(*call).code == 130
    answer = finecam(*call)
    assert answer.code == 0 and [line[:7] for line in answer.err.splitlines()] == ["epoch 2", "epoch 3"]
    for more in ([], ["--resume"]):
        answer = finecam(*call, *more)
        assert answer.code == 0 and answer.out.startswith("finished already: 16 classes") and not answer.err
    answer = finecam(*call, "--lr", 0.1)
    assert answer.code == 2 and "settings.lr = 0.005 -> 0.1; use --overwrite" in answer.err
    answer = finecam(*call, "--lr", 0.1, "--overwrite")
    assert answer.code == 0 and answer.err.count("epoch") == 3
    assert finecam(*call, "--overwrite", "--resume").code == 2


def test_promptcam_train_options_reach_the_training(
    finecam: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finecam import promptcam_train

    class Reached(Exception):
        pass

    seen: dict[str, Any] = {}

    def spy(*_: Any, **options: Any) -> None:
        seen.clear()
        seen.update(options)
        raise Reached("far enough")

    monkeypatch.setattr(promptcam_train, "train_promptcam", spy)
    call = ["promptcam", "train", "tinyworld:birds?n=32", "--backbone", "tiny:vit", "--out", tmp_path / "pc"]
    finecam(*call, "--dropout", 0.3, "--weight-decay", 0.01, "--warmup", 2, "--agnostic-prompts", 3, "--checkpointing")
    wanted = {"dropout": 0.3, "weight_decay": 0.01, "warmup": 2, "agnostic_prompts": 3, "checkpointing": True}
    assert seen.items() >= (wanted | {"epochs": 100, "lr": 5e-3, "keep_best": False}).items()
    finecam(*call, "--recipe", "dinov2/cub", "--epochs", 100, "--val", BIRDS, "--keep-best")
    wanted = {"epochs": 100, "lr": 0.001, "dropout": 0.0, "augment": "paper", "keep_best": True}
    assert seen.items() >= wanted.items()  # 100 was given, though it is the default: the recipe says 130
    seen.clear()
    for more, said in (
        (["--recipe", "dino/cup"], "unknown recipe in --recipe: 'dino/cup'; did you mean dino/cub"),
        (["--keep-best"], "--keep-best needs --val"),
        (["--augment", "papers"], "unknown view in --augment"),
    ):
        answer = finecam(*call, *more)
        assert answer.code == 2 and said in answer.err and not seen


def test_promptcam_taxonomy(finecam: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFM_CORE_CACHE", str(tmp_path / "cache"))
    levels = "".join(f"{name},{name.split()[0]}\n" for name in Birds(n=16).classes)
    (tmp_path / "l.csv").write_text("species,genus\n" + levels, encoding="utf-8")
    call = [
        "promptcam", "taxonomy", "tinyworld:birds?split=train&n=32", "--val", BIRDS, "--levels", tmp_path / "l.csv",
        "--backbone", "tiny:vit", "--epochs", 2, "--out", tmp_path / "k", "--quiet",
    ]  # fmt: skip
    answer = finecam(*call, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert [(row["prompts of"], row["groups"]) for row in found["units"]] == [("genus", 4), ("species", 16)]
    page = (tmp_path / "k" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 4 and "genus &gt; species" in page
    assert TaxonomyKeys.load(tmp_path / "k").taxonomy.levels == ("genus", "species")
    answer = finecam(*call)
    assert answer.code == 2 and "keys are there already" in answer.err
    answer = finecam(*call, "--overwrite", "--per", "leaf")
    assert answer.code == 2 and "unknown unit in --per" in answer.err


def test_evaluate_prints_a_table_and_resumes(finecam: Call, tmp_path: Path) -> None:
    call = [
        "evaluate", BIRDS, "--model", "tiny:cnn", "--methods", "gradcam,layercam", "--gammas", "0.6",
        "--curve-steps", 0, "--all-images", "--out", tmp_path / "e",
    ]  # fmt: skip
    answer = finecam(*call)
    assert answer.code == 0, answer.err
    assert "4 images, accuracy" in answer.out and str(tmp_path / "e" / "report.html") in answer.out
    found = json.loads(finecam(*call, "--json").out)
    arms = [row["arm"] for row in found["table"]]
    assert len(arms) == len(set(arms)) >= 6  # two plain, two finer, two baselines
    assert {row["metric"] for row in found["differences"]} >= {"energy in difference"}
    assert len((tmp_path / "e" / "results.jsonl").read_text().splitlines()) == 2
    assert found["radius"] == 2 and "references: " in answer.out
    assert sum(found["used"]["gradcam + Finer 0.6"].values()) == 3 * len(found["ids"])


def test_evaluate_takes_named_sets_and_further_metrics(finecam: Call, tmp_path: Path) -> None:
    call = ["evaluate", BIRDS, "--model", "tiny:cnn", "--methods", "gradcam", "--curve-steps", 0, "--all-images"]
    more = ["--metrics", "curve_area,iou", "--sanity", 1, "--json"]
    found = json.loads(finecam(*call, "--ablation", "references", *more, "--out", tmp_path / "e").out)
    arms = [row["arm"] for row in found["table"]]
    assert arms[0] == "gradcam" and "gradcam + Finer 0.6 (only look-alike 2, by rank)" in arms and len(arms) == 7
    assert {"curve area", "IoU@5% of trait"} <= set(found["table"][0]) and len(found["curves"]["gradcam"]["target"]) > 2
    assert set(found["sanity"][0]) == {"destroyed down to", "gradcam", "gradcam + Finer 0.6 (by rank)"}
    report = (tmp_path / "e" / "report.html").read_text(encoding="utf-8")
    assert "Deletion curves" in report and "What the references are to the true class" in report
    own = ["--similarity", "weight", "--references", 1, "--weighting", "softmax", "--gammas", "1"]
    answer = finecam(*call, *own, "--out", tmp_path / "w")
    assert answer.code == 0 and "gradcam + Finer 1 (T=1, by weight, softmax weights)" in " ".join(answer.out.split())
    for given, said in (
        (["--ablation", "references", *own], "leave those options out"),
        (["--ablation", "reference"], "did you mean references"),
        (["--metrics", "iuo"], "did you mean iou"),
        (["--similarity", "logits"], "did you mean logit"),
    ):
        answer = finecam(*call, *given, "--out", tmp_path / "x")
        assert answer.code == 2 and said in answer.err


def test_quiz_export_and_score(finecam: Call, tmp_path: Path) -> None:
    for method in ("gradcam", "layercam"):
        finecam("explain", BIRDS, "--model", "tiny:cnn", "--method", method, "--out", tmp_path / method, "--limit", 2)
    images = [json.loads(line)["image"] for line in (tmp_path / "gradcam" / "results.jsonl").read_text().splitlines()]
    (tmp_path / "t.csv").write_text(
        "image,trait\n" + "".join(f"{i},red wing patch\n" for i in images), encoding="utf-8"
    )
    runs = [tmp_path / "gradcam", tmp_path / "layercam"]
    answer = finecam("quiz", "export", *runs, "--traits", tmp_path / "t.csv", "--out", tmp_path / "q")
    assert answer.code == 0 and "4 questions" in answer.out, answer.err
    key = [line.split(",") for line in (tmp_path / "q" / "key.csv").read_text().splitlines()[1:]]
    answers = ["participant,question,answer"]
    answers += [f"p1,{question},{'yes' if method == 'layercam' else 'no'}" for question, method, *_ in key]
    (tmp_path / "a.csv").write_text("\n".join(answers) + "\n", encoding="utf-8")
    scored = json.loads(finecam("quiz", "score", tmp_path / "a.csv", "--key", tmp_path / "q" / "key.csv", "--json").out)
    assert [(row["method"], row["rate"], row["n"]) for row in scored] == [("layercam", 1.0, 2), ("gradcam", 0.0, 2)]
    (tmp_path / "t.csv").write_text("image,trait\nnowhere,x\n", encoding="utf-8")
    answer = finecam("quiz", "export", *runs, "--traits", tmp_path / "t.csv", "--out", tmp_path / "q2")
    assert answer.code == 2 and "no result for an image" in answer.err


def test_audit_verb(finecam: Call, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("class,attribute\nblue bird with red wing patch,red wing patch\n", encoding="utf-8")
    answer = finecam(
        "audit", BIRDS, "--model", "tiny:cnn", "--clip", "random:tiny:clip", "--attributes", tmp_path / "a.csv",
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "1 images compared, 3 of classes without attributes" in answer.out and "red wing patch" in answer.out


def test_confusion_without_a_matrix_names_the_option(finecam: Call, tmp_path: Path) -> None:
    answer = finecam("explain", BIRDS, "--model", "tiny:cnn", "--similarity", "confusion", "--out", tmp_path / "o")
    assert answer.code == 2 and "give --confusion CSV" in answer.err and not (tmp_path / "o").exists()


def test_failed_images_exit_2_and_say_where(finecam: Call, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    Image.new("RGB", (70, 64), (90, 40, 20)).save(tmp_path / "d" / "good.png")
    (tmp_path / "d" / "bad.png").write_bytes(b"x")
    answer = finecam("explain", tmp_path / "d", "--model", "tiny:cnn", "--out", tmp_path / "o")
    assert answer.code == 2
    assert "1 image explained" in answer.out and "index.html" in answer.out
    assert answer.err.startswith("error: 1 image failed in ") and "errors.jsonl" in answer.err


def test_random_state_is_the_callers(finecam: Call, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    finecam("explain", BIRDS, "--model", "random:torchvision:squeezenet1_1", "--out", tmp_path / "o", "--limit", 1)
    assert torch.equal(before, torch.random.get_rng_state())
