"""The verbs inspect and profile, through the program's own entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from meda_kv.cli import app
from meda_kv.profiles import load_profile
from PIL import Image
from vfm_core.cli import run_app


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        run_app(app, [str(argument) for argument in arguments])
    seen = capsys.readouterr()
    return int(left.value.code or 0), seen.out, seen.err


def test_inspect_writes_its_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(
        capsys,
        "inspect",
        "--data",
        "tinyworld:needle?images=3",
        "--method",
        "snapkv",
        "--ratio",
        "0.4",
        "--ratios",
        "0.6",
        "--layers",
        "2",
        "--max-new-tokens",
        3,
        "--set",
        "floor=4",
        "--out",
        tmp_path / "inspect",
    )
    assert (code, err) == (0, "")
    assert "report.html" in out
    content = json.loads((tmp_path / "inspect" / "layers.json").read_text())
    assert sum(content["budgets"]) == content["total_budget"]
    assert [row["ratio"] for row in content["answers"]] == [1.0, 0.6, 0.4]
    assert len(list((tmp_path / "inspect").glob("kept_*.png"))) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to look at"),
        (["--prompt", "x", "--method", "meda?merge"], "option without a value"),
        (["--prompt", "x", "--method", "medaa"], "meda-kv methods"),
        (["--prompt", "x", "--method", "snapkv?windw=3", "--model", "nowhere/to/be/found"], "windw"),
        (["--prompt", "x", "--set", "nonsense=1", "--model", "nowhere/to/be/found"], "nonsense"),
        (["--prompt", "x", "--data", "tinyworld:needle"], "a prompt or a sample?"),
        (["--data", "tinyworld:needle", "--image", "a.png"], "go with --prompt"),
        (["--data", "tinyworld:needle?n=2", "--index", "5"], "no such sample"),
        (["--data", "tinyworld:needles"], "needle"),
        (["--prompt", "x", "--layers", "one"], "not a number in --layers"),
        (["--prompt", "x", "--ratios", "a"], "not a number in --ratios"),
        (["--data", "tinyworld:needle?n=1", "--layers", "99"], "no such layer"),
        (["--data", "tinyworld:needle?n=1", "--max-new-tokens", "1"], "too few new tokens"),
    ],
)
def test_bad_requests_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    code, out, err = run(capsys, "inspect", "--out", tmp_path / "x", *arguments)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert words in err


def test_inspect_reads_options_files_and_profiles(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    row = {"id": "a", "images": ["red.png"] * 3, "prompt": "<image><image><image>Q red", "answer": "1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    profile = tmp_path / "profile.json"
    code, _, _ = run(capsys, "profile", "--data", tmp_path / "rows.jsonl", "-n", 1, "--out", profile)
    assert code == 0 and load_profile(profile).model["name"] == "tiny"
    words = ("--data", tmp_path / "rows.jsonl", "--method", "meda?merge=none&recent-share=0.5", "--floor", 4)
    more = ("--ratios", "", "--ratio", "0.5", "--max-new-tokens", 2, "--budgets", profile, "--json")
    code, out, err = run(capsys, "inspect", *words, *more, "--out", tmp_path / "o")
    assert (code, err) == (0, "")
    seen = json.loads(out)
    settings = {"floor": 4, "merge": "none", "recent_share": 0.5, "budgets": str(profile)}
    assert settings.items() <= seen["settings"].items()
    assert seen["total_budget"] == seen["asked_budget"] == sum(seen["budgets"])


def test_inspect_tells_why_nothing_was_dropped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "inspect", "--prompt", "Q red", "--max-new-tokens", 2, "--out", tmp_path)
    assert code == 0
    told = " ".join(out.split())
    assert "budgets sum to 12 of 12 tokens over all layers (2 asked for); not compressed: n <= budget" in told
    assert "KV in use" in told and "allocated" in told


def test_profile_of_samples_is_used_by_generate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    code, out, _ = run(capsys, "profile", "--data", "tinyworld:needle?images=4", "-n", 3, "--out", path, "--json")
    assert code == 0
    made = load_profile(path)
    assert made.samples == 3
    assert json.loads(out)["alphas"] == pytest.approx(list(made.alphas))
    assert sum(made.alphas) == pytest.approx(4.0)
    picture = tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    common = ("--image", picture, picture, picture, picture, "--prompt", "Q red", "--budgets", path, "--ratio", "0.5")
    code, out, _ = run(capsys, "generate", *common, "--max-new-tokens", 3, "--json")
    assert code == 0
    budgets = json.loads(out)["summary"]["budgets"]
    assert sum(budgets) == round(0.5 * 4 * json.loads(out)["summary"]["prompt_tokens"])
    code, _, err = run(capsys, "generate", *common, "--model", "tiny?random=1&seed=9")
    assert code == 2
    assert "the profile is of other weights" in err


def test_profile_of_a_folder_lists_bad_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    out_path = tmp_path / "profile.json"
    code, out, err = run(capsys, "profile", "--data", tmp_path, "--prompt", "Q red", "--out", out_path)
    assert code == 1
    assert "2 prompts" in out
    assert err.startswith("failed: broken.png")
    assert load_profile(out_path).samples == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "EMPTY"], "no image in the folder"),
        (["--data", "BAD"], "no sample could be read"),
        (["--data", "tinyworld:needle", "--entropy", "crossed"], "unknown entropy"),
        (["--data", "tinyworld:needle", "--out", "EMPTY"], "a folder, not a file"),
        (["--data", "tinyworld:needle", "--temperature", "0"], "temperature"),
    ],
)
def test_bad_profile_requests_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    places = {"EMPTY": "empty", "BAD": "bad"}
    written = [str(tmp_path / places[a]) if a in places else a for a in arguments]
    code, _, err = run(capsys, "profile", *written)
    assert code == 2
    assert words in err
