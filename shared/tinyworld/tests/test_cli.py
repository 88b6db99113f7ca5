"""The command line through its real entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tinyworld.birds import Birds
from tinyworld.cli import app
from tinyworld.sheet import contact_sheet
from vfm_core.cli import run_app

ROOT = "from tinyworld.cli import main; main()"


def tinyworld(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ROOT, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300, check=False
    )


def test_list_names_everything() -> None:
    done = tinyworld("list", "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    specs = {f"tinyworld:{name}" for name in ("birds", "digits", "glyphs")}
    assert {row["data"] for row in content["data"]} == specs | {"tinyworld.make_albums"}
    assert {row["model"] for row in content["models"]} == {
        f"tiny:{name}" for name in ("cnn", "vit", "vit-fair", "vit-reg", "glyph-cnn", "clip", "vlm")
    }
    assert all(row["accuracy"] for row in content["models"])


def test_card_reads_as_text() -> None:
    done = tinyworld("card", "cnn-nested-0")
    assert done.returncode == 0, done.stderr
    for word in ("cross-entropy", "47872", "tinyworld train cnn --seed 0", "sha256", "accuracy, nested"):
        assert word in done.stdout
    assert json.loads(tinyworld("card", "vit", "--json").stdout)["model"] == "tiny:vit?seed=0"


def test_show_draws_a_sheet(tmp_path: Path) -> None:
    done = tinyworld(
        "show", "?layout=factorial&shared_marks=1", "--n", "5", "--columns", "3", "--out", "a/b.png", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a" / "b.png") as sheet:
        assert sheet.width > 3 * 2 * 64 * 3 and sheet.height > 2 * 64 * 3
        assert len(sheet.convert("RGB").getcolors(10**6) or ()) > 1000
    assert contact_sheet(Birds(n=1), masks=False).width < 2 * 64 * 3 < contact_sheet(Birds(n=1)).width


BAD = [
    (("card", "cnn-nested-9"), "cnn-nested"),
    (("train", "vitt"), "did you mean vit"),
    (("train", "vit-reg", "--layout", "factorial"), "nested"),
    (("show", "?layot=nested"), "layout"),
    (("show", "--out", "birds.txt"), ".png"),
    (("paint",), "paint"),
]


@pytest.mark.parametrize(("arguments", "hint"), BAD)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_app(app, arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1 and hint in error
    assert not list(tmp_path.iterdir())


def test_bad_input_through_the_entry_point(tmp_path: Path) -> None:
    done = tinyworld("show", "?layot=nested", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "did you mean layout?" in done.stderr


def test_import_and_help_stay_light() -> None:
    code = (
        "import sys, tinyworld, tinyworld.cli; "
        "tinyworld.read_card('vit-0'); "
        "heavy = {'torch', 'timm', 'numpy', 'sklearn', 'matplotlib'} & set(sys.modules); "
        "print(sorted(heavy)); print(tinyworld.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[0] == "[]", done.stderr
    assert tinyworld("--help").returncode == 0
    assert tinyworld("--version").stdout.startswith("tinyworld ")


def test_bench_reports_rates() -> None:
    done = tinyworld("bench", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["size"] for row in rows} == {48, 64, 96} and all(row["images per CPU second"] > 0 for row in rows)
