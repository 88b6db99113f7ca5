"""The trait quiz is blind and self-contained; its answers become rates; the stand-in counts hits."""

from __future__ import annotations

import base64
import csv
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from finecam.quiz import KEY, PAGE, QuizItem, export_quiz, score_quiz, trait_hits
from PIL import Image
from vfm_core.errors import UserError

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def items(n: int = 6) -> list[QuizItem]:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    return [
        QuizItem(image, rng.random((4, 4)), f"red <patch> {i}", ("promptcam", "gradcam")[i % 2], f"bird-{i}.jpg")
        for i in range(n)
    ]


def key_of(folder: Path) -> list[dict[str, str]]:
    with (folder / KEY).open(newline="") as file:
        return list(csv.DictReader(file))


def answer(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("participant", "question", "answer"), *rows])
    return path


def test_page_is_blind_and_self_contained(tmp_path: Path) -> None:
    page = export_quiz(items(), tmp_path, seed=3, title="Birds & traits")
    text = page.read_text()
    assert page == tmp_path / PAGE
    for word in ("promptcam", "gradcam", "bird-", "http:", "https:", "<patch>"):
        assert word not in text
    assert "red &lt;patch&gt; 4" in text
    assert "Birds &amp; traits" in text
    assert len(re.findall(r'<img src="data:image/[a-z]+;base64,', text)) == 12
    codes = re.findall(r'data-question="(\w+)"', text)
    key = key_of(tmp_path)
    assert codes == [row["question"] for row in key]
    assert len(set(codes)) == 6
    assert sorted(row["method"] for row in key) == ["gradcam"] * 3 + ["promptcam"] * 3
    assert [row["trait"] for row in key] != [item.trait for item in items()]  # shuffled
    assert re.findall(r"\d+\. red &lt;patch&gt; (\d)", text) == [row["trait"][-1] for row in key]
    for row in key:
        assert row["image"] == f"bird-{row['trait'][-1]}.jpg"


def test_same_seed_same_quiz(tmp_path: Path) -> None:
    pages = [export_quiz(items(), tmp_path / str(i), seed=seed).read_bytes() for i, seed in enumerate((1, 1, 2))]
    assert pages[0] == pages[1]
    assert pages[0] != pages[2]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium installed")
def test_browser_saves_what_was_answered(tmp_path: Path) -> None:
    page = export_quiz(items(3), tmp_path)
    probe = """<script>
      window.onerror = (m) => { document.body.dataset.error = m; };
      URL.createObjectURL = (b) => { b.text().then((t) => { document.body.dataset.csv = btoa(t); }); return "#"; };
      form.elements.participant.value = 'Ann "A", B';
      document.querySelectorAll("fieldset")[0].querySelector("[value=yes]").click();
      document.querySelectorAll("fieldset")[2].querySelector("[value=no]").click();
      document.body.dataset.pictures = [...document.images].every((i) => i.naturalWidth > 0);
      form.requestSubmit();
    </script></body>"""
    shown = tmp_path / "probe.html"
    shown.write_text(page.read_text().replace("</body>", probe))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    dom = subprocess.run([*command, profile, shown.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert "data-error" not in dom
    assert 'data-pictures="true"' in dom
    assert '<span id="count">2</span> of 3 answered' in dom
    saved = re.search(r'data-csv="([^"]+)"', dom)
    assert saved is not None
    answers = tmp_path / "answers.csv"
    answers.write_bytes(base64.b64decode(saved[1]))
    with answers.open(newline="") as file:
        rows = list(csv.reader(file))
    codes = [row["question"] for row in key_of(tmp_path)]
    assert rows[1:] == [['Ann "A", B', code, chosen] for code, chosen in zip(codes, ("yes", "", "no"))]
    assert sum(row["n"] for row in score_quiz(answers, tmp_path / KEY)) == 2


def test_scores_and_wilson_interval(tmp_path: Path) -> None:
    export_quiz(items(), tmp_path)
    key = key_of(tmp_path)
    rows = []
    for who in ("ann", "bo"):
        for row in key:
            hit = row["method"] == "promptcam" and not (who == "bo" and row["image"] == "bird-0.jpg")
            rows.append((who, row["question"], "Yes" if hit else "no"))
    files = [answer(tmp_path / "a.csv", rows[:6]), answer(tmp_path / "b.csv", rows[6:])]
    table = score_quiz(files, tmp_path / KEY)
    assert [row["method"] for row in table] == ["promptcam", "gradcam"]
    assert [(row["recognised"], row["n"]) for row in table] == [(5, 6), (0, 6)]
    n, p, z = 6, 5 / 6, 1.959964
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert table[0]["rate"] == pytest.approx(p)
    assert (table[0]["low"], table[0]["high"]) == (pytest.approx(middle - half), pytest.approx(middle + half))


def test_skipped_questions_do_not_count(tmp_path: Path) -> None:
    export_quiz(items(2), tmp_path)
    first, second = (row["question"] for row in key_of(tmp_path))
    path = answer(tmp_path / "a.csv", [("ann", first, ""), ("ann", second, "no")])
    assert [row["n"] for row in score_quiz(path, tmp_path / KEY)] == [1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("ann", "nowhere", "yes")], "line 2: nowhere; give this quiz's key.csv"),
        ([("ann", "?", "maybe")], "answer must be yes or no"),
        ([("ann", "?", "yes"), ("ann", "?", "yes")], "line 3: ann"),
    ],
)
def test_bad_answers(tmp_path: Path, rows: list[tuple[str, str, str]], message: str) -> None:
    export_quiz(items(2), tmp_path)
    code = key_of(tmp_path)[0]["question"]
    path = answer(tmp_path / "a.csv", [(who, code if q == "?" else q, a) for who, q, a in rows])
    with pytest.raises(UserError, match=message):
        score_quiz(path, tmp_path / KEY)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one question"):
        export_quiz([], tmp_path)
    bad = QuizItem(items(1)[0].image, np.full((2, 2), np.nan), "x", "m")
    with pytest.raises(UserError, match="2-D and finite"):
        export_quiz([bad], tmp_path)
    with pytest.raises(UserError, match="file not found"):
        score_quiz(tmp_path / "none.csv", tmp_path / "none.csv")
    (tmp_path / "a.csv").write_text("who,what\n1,2\n")
    with pytest.raises(UserError, match=r"columns are missing in .*: question, method"):
        score_quiz(tmp_path / "a.csv", tmp_path / "a.csv")


def test_trait_hits_follow_the_crop() -> None:
    maps = np.zeros((2, 4, 4))
    maps[0, 0, 0], maps[1, 2, 3] = 1, 0.2
    mask = np.zeros((40, 80), bool)
    mask[24, 69] = True
    # The maps cover columns 20..80: the mask's column 69 lies in cell (69.5 - 20) / 60 * 4 = 3.3, row 24.5 / 10 = 2.4.
    assert trait_hits(maps, {"mark": mask}, box=(20, 0, 80, 40)) == {"mark": True}
    assert trait_hits(maps[:1], {"mark": mask}, box=(20, 0, 80, 40)) == {"mark": False}
    assert trait_hits(maps, {"mark": mask}, box=(0, 0, 60, 40)) == {"mark": False}  # cropped away
    assert trait_hits(maps, {"mark": mask}) == {"mark": True}
    assert trait_hits(maps, {"hidden": np.zeros_like(mask)}) == {}
    with pytest.raises(UserError, match="maps must be"):
        trait_hits(maps[0], {"mark": mask})
