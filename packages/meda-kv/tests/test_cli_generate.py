"""The verbs generate, methods and doctor, through the program's own entry."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from meda_kv.cli import app
from meda_kv.cli.generate import gathered, settings
from meda_kv.methods import METHODS, resolve_method
from PIL import Image
from tinyworld.albums import make_albums
from vfm_core.cli import run_app
from vfm_core.errors import UserError


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        run_app(app, [str(argument) for argument in arguments])
    seen = capsys.readouterr()
    return int(left.value.code or 0), seen.out, seen.err


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str, str]:
    """Files of one album, its first question and the answer."""
    folder = tmp_path_factory.mktemp("album")
    found = make_albums("needle", 1, images=6)[0]
    files = []
    for i, pixels in enumerate(found.images):
        files.append(folder / f"{i}.png")
        Image.fromarray(pixels).save(files[-1])
    return files, *found.questions[0]


def test_one_prompt(capsys: pytest.CaptureFixture[str], album: Any) -> None:
    files, question, answer = album
    code, out, err = run(
        capsys,
        "generate",
        "--model",
        "tiny",
        "--image",
        *files,
        "--prompt",
        question,
        "--method",
        "snapkv",
        "--ratio",
        "0.3",
        "--max-new-tokens",
        4,
        "--quiet",
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == answer
    assert "of 105" in out  # prompt tokens: begin, (separator + 16) x 6, two words


def test_json_and_settings(capsys: pytest.CaptureFixture[str], album: Any) -> None:
    files, question, answer = album
    code, out, _ = run(
        capsys,
        "generate",
        *files,
        "--prompt",
        question,
        "--ratio",
        "0.5",
        "--set",
        "merge=none",
        "--set",
        "floor=8",
        "--max-new-tokens",
        3,
        "--json",
    )
    found = json.loads(out)
    assert code == 0
    assert found["text"] == answer
    assert sum(found["summary"]["budgets"]) == round(0.5 * 4 * found["summary"]["prompt_tokens"])


def test_a_file_of_prompts_with_a_bad_one(capsys: pytest.CaptureFixture[str], album: Any, tmp_path: Path) -> None:
    files, question, answer = album
    rows = [
        {"id": "good", "images": [str(file) for file in files], "prompt": question},
        {"id": "bad", "images": ["absent.png"], "prompt": question},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("generate", "--data", data, "--out", tmp_path / "out", "--ratio", "0.5", "--set", "floor=4")
    code, out, err = run(capsys, *command, "--method", "snapkv")
    assert code == 1
    assert "1 of 2 answered" in out
    assert err.startswith("failed: bad: ")
    assert "absent.png" in err
    (line,) = (tmp_path / "out" / "pred.jsonl").read_text().splitlines()
    assert json.loads(line)["pred_response"] == answer
    assert "absent.png" in err and f"{data}, sample_id bad" in err  # the form of `meda-kv eval`
    Image.new("RGB", (32, 32), "red").save(tmp_path / "absent.png")
    code, out, err = run(capsys, *command, "--method", "snapkv", "--json")
    assert (code, err) == (0, "")
    assert [row["id"] for row in json.loads(out)["answers"]] == ["good", "bad"]
    code, _, err = run(capsys, *command, "--method", "h2o")
    assert code == 2
    assert "changed configuration" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "x", "--data", "y"], "one prompt or a file of them?"),
        ([], "nothing to answer; give --prompt TEXT or --data FILE"),
        (["--prompt", "x", "--root", "y"], "--root goes with --data"),
        (["--prompt", "x", "--method", "meda?merge"], "option without a value"),
        (["--prompt", "x", "--method", "meda?merg=none"], "unknown option"),
        (["--prompt", "x", "--method", "medal"], "unknown method in --method: 'medal'; did you mean meda"),
        (["--prompt", "x", "--floor", "4", "--set", "floor=5"], "two floors"),
        (["--prompt", "x " * 20, "--ratio", "0.1", "--max-new-tokens", "4"], "lower the floor with --floor"),
        (["--data", "absent.jsonl"], "no folder for the answers"),
        (["--data", "absent.jsonl", "--out", "OUT"], "no such file"),
        (["--data", "absent.jsonl", "--out", "OUT", "--system", "s"], "go with --prompt"),
        (["--prompt", "x", "--image", "absent.png"], "no such image file"),
        (["--prompt", "x", "--image", "FOLDER"], "a folder, not an image"),
        (["--prompt", "x", "--image", "EMPTY"], "an empty file"),
        (["--prompt", "x", "--image", "GOOD", "--video", "v"], "images or a video?"),
        (["--prompt", "<image> <image>", "--image", "GOOD"], "marker without an image"),
        (["--prompt", "<image>", "--image", "GOOD", "GOOD"], "more images than markers"),
        (["--prompt", "x", "--method", "medal"], "unknown method"),
        (["--prompt", "x", "--preset", "papers"], "preset"),
        (["--prompt", "x", "--ratio", "0"], "(0, 1]"),
        (["--prompt", "x", "--ratio", "nan"], "(0, 1]"),
        (["--prompt", "x", "--set", "merge"], "write KEY=VALUE"),
        (["--prompt", "x", "--model", "./nowhere"], "no such folder"),
        (["--prompt", "x", "--budgets", "absent.json"], "no such profile"),
        (["--prompt", "x", "--attn", "fast"], "unknown attention implementation"),
        (["--prompt", "x", "--device", "tpu"], "unknown device"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    places = {"OUT": "out", "FOLDER": ".", "EMPTY": "empty.png", "GOOD": "good.png"}
    written = [str(tmp_path / places[a]) if a in places else a for a in arguments]
    code, out, err = run(capsys, "generate", *written)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert words in err


def test_the_very_first_try_works_with_a_floor(capsys: pytest.CaptureFixture[str], album: Any) -> None:
    line = ("generate", "--image", album[0][0], "--prompt", album[1], "--ratio", "0.5", "--max-new-tokens", 4)
    code, out, err = run(capsys, *line, "--method", "meda?merge=none", "--floor", 4, "--json")
    assert code == 0, err
    assert json.loads(out)["summary"]["ratio_actual"] <= 1.0
    code, out, err = run(capsys, "generate", "--prompt", "Q red", "--max-new-tokens", 1)
    assert code == 0
    assert out.splitlines()[-1] == "note: not compressed: the answer ended before the first decode step"


@pytest.mark.parametrize("prefix", ["jsonl:", ""])
def test_data_is_a_file_or_a_spec(capsys: pytest.CaptureFixture[str], album: Any, tmp_path: Path, prefix: str) -> None:
    files, question, answer = album
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"id": 1, "images": [file.name for file in files], "prompt": question})
    )
    line = ("--data", f"{prefix}{tmp_path / 'rows.jsonl'}", "--root", files[0].parent, "--out", tmp_path / "out")
    code, out, err = run(capsys, "generate", *line, "--ratio", "0.5", "--floor", 4, "--json")
    assert code == 0, err
    assert json.loads(out)["answers"][0]["text"] == answer


def test_data_may_be_a_task(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = ("generate", "--data", "tinyworld:list?n=2&images=4", "--out", tmp_path / "out", "--floor", 4)
    code, out, err = run(capsys, *line, "--max-new-tokens", 4, "--json")
    assert code == 0, err
    assert len(json.loads(out)["answers"]) == 2


def test_an_unsupported_model_is_bad_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, album: Any
) -> None:
    import meda_kv.models

    model, processor = meda_kv.models.load_model("tiny")
    model.generation_config.cache_implementation = "static"
    monkeypatch.setattr(meda_kv.models, "load_model", lambda *args, **kwargs: (model, processor))
    code, _, err = run(capsys, "generate", "--image", album[0][0], "--prompt", "Q red")
    assert code == 2
    assert err.startswith("error: unsupported cache 'static'")


def test_a_prompt_of_one_modality_warns_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "generate", "--prompt", "the and " * 40, "--ratio", "0.5", "--max-new-tokens", 3)
    assert code == 0
    assert err.startswith("warning: ")
    assert len(err.splitlines()) == 1


def test_settings_are_read_by_kind() -> None:
    assert settings(["merge=none", "floor=8", "recent-share=0.5", "per_head=false", "gate=mean"]) == {
        "merge": "none",
        "floor": 8,
        "recent_share": 0.5,
        "per_head": False,
        "gate": "mean",
    }
    assert settings(None) == {}


def test_images_of_one_option_and_of_several() -> None:
    a, b, c = Path("a"), Path("b"), Path("c")
    assert gathered([a], [b, c]) == [a, b, c]
    assert gathered([a, b], None) == [a, b]
    assert gathered(None, [a]) == [a]
    assert gathered(None, None) == []
    with pytest.raises(UserError, match="order of the images"):
        gathered([a, b], [c])


def test_methods_lists_every_arm(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "methods", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["method"] for row in rows] == list(METHODS)
    meda = next(row for row in rows if row["method"] == "meda")
    assert (meda["recent_share"], meda["merge"], meda["text_prior"]) == (0.75, "average", "bias")
    assert (meda["budgets"], meda["scores"]) == ("entropy", "accumulated")
    by_name = {row["method"]: row for row in rows}
    assert (by_name["look-m"]["merge"], by_name["h2o"]["merge"]) == ("pivot", "none")
    for row in rows:  # what is printed can be typed
        written = {"merge": row["merge"].split(" ")[0], "budgets": row["budgets"].split(" ")[0]}
        if row["method"] != "full":
            resolve_method(row["method"], **written, text_prior=row["text_prior"], compress_at=row["compress_at"])
    assert meda["settings"]["text_prior"] == "bias"
    _, official, _ = run(capsys, "methods", "--preset", "official-code", "--json")
    other = next(row for row in json.loads(official) if row["method"] == "meda")
    assert other["recent_share"] == 0.5
    assert other["settings"]["text_prior"] != "bias"
    _, table, _ = run(capsys, "methods")
    assert all(name in table for name in METHODS)
    code, _, err = run(capsys, "methods", "--preset", "nobody")
    assert code == 2
    assert "preset" in err


def test_doctor_checks_out(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--device", "cpu", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert {"sdpa", "eager"} <= set(report["attention"])
    assert report["versions"]["transformers"]
    code, out, _ = run(capsys, "doctor", "--device", "cpu")
    assert code == 0
    assert "FAILED" not in out
    assert out.count("ok") >= 4


def test_doctor_reports_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import meda_kv.attention
    from meda_kv.attention import Check, DoctorReport

    broken = DoctorReport({"torch": None}, ("sdpa",), ("cpu",), (Check("sdpa, ratio 1", False, "off by 3"),))
    monkeypatch.setattr(meda_kv.attention, "doctor", lambda device: broken)
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "FAILED" in out
    assert "absent" in out


def test_help_answers_at_once() -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from meda_kv.cli import app; assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 20
