"""The page works from disk: relative links that resolve, names that need escaping, views per strength, in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from finecam.gallery import GalleryPage, contrast_views, write_gallery
from PIL import Image

NASTY = 'sub dir/100% #1?"<b>ü.jpg'


def record(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "image": name,
        "size": [40, 30],
        "label": "Grandala",
        "target": {"id": 0, "name": "Blue Grosbeak", "prob": 0.8},
        "prediction": {"id": 0, "name": "Blue Grosbeak", "prob": 0.8},
        "references": [{"id": 1, "name": "Grandala", "prob": 0.1}],
        "pictures": {
            "image": f"gallery/{name}.webp",
            "layers": [f"gallery/{name}.{k}.webp" for k in ("0", "0.6", "difference")],
            "example": None,
        },
        "overlay": f"overlays/{name}.webp",
        "map": f"maps/{name}.npz",
        "peak": [3.0, 4.0],
        "empty": False,
    } | changes


def page_data(out: Path) -> dict[str, Any]:
    text = (out / "gallery" / "data.js").read_text(encoding="utf-8")
    assert text.startswith("window.FINECAM = ") and text.endswith(";\n")
    return json.loads(text[len("window.FINECAM = ") : -2])


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    records = [record("a.jpg"), record(NASTY, label="Blue Grosbeak"), record("c.jpg", label=None, empty=True)]
    for r in records:
        for name in (r["pictures"]["image"], *r["pictures"]["layers"], r["overlay"], r["map"]):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".webp":
                Image.new("RGBA", (8, 6), (200, 30, 30, 90)).save(path)
            else:
                path.write_bytes(b"")
    errors = [{"image": "bad.jpg", "error": "image file is empty: bad.jpg </script>"}]
    write_gallery(
        tmp_path,
        records,
        errors,
        GalleryPage("run <1>", views=contrast_views((0, 0.6)), links=[("table", "summary.csv")]),
    )
    return tmp_path


def test_every_link_is_relative_and_resolves(gallery: Path) -> None:
    data = page_data(gallery)
    assert [r["path"] for r in data["records"]] == ["a.jpg", "bad.jpg", "c.jpg", NASTY]
    links = [
        link
        for r in data["records"]
        if "error" not in r
        for link in (r["image"], r["panel"], r["map"], *filter(None, r["layers"]))
    ]
    assert len(links) == 3 * 6
    for link in links:
        assert not link.startswith(("/", "http", "file:")) and "#" not in link and "?" not in link
        assert (gallery / unquote(link)).is_file(), link


def test_views_follow_the_strengths() -> None:
    assert contrast_views((0.0,)) == ["image", "plain"]
    assert contrast_views((0.0, 0.6, 2.0)) == ["image", "plain", "finer γ 0.6", "finer γ 2", "difference"]


def test_right_wrong_and_unlabelled(gallery: Path) -> None:
    by_path = {r["path"]: r for r in page_data(gallery)["records"]}
    assert by_path["a.jpg"]["correct"] is False
    assert by_path[NASTY]["correct"] is True
    assert by_path["c.jpg"]["correct"] is None and by_path["c.jpg"]["empty"] is True


def test_the_page_needs_no_network_and_escapes_its_texts(gallery: Path) -> None:
    html = (gallery / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
    assert "run &lt;1&gt;" in html and "<1>" not in html
    assert html.count("<script src=") == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_the_page_runs_in_a_browser(gallery: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000"
    run = subprocess.run(
        [
            "chromium",
            *flags.split(),
            f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
            "--dump-dom",
            (gallery / "index.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    assert run.stdout.count("<article") == 4
    assert "4 of 4 images" in run.stdout
    assert "predicted Blue Grosbeak 80%, labelled Grandala" in run.stdout
    assert "bad.jpg &lt;/script&gt;" in run.stdout  # the message is text, never markup
