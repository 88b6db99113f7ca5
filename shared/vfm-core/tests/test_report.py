"""Reports: content, escaping, self-containedness, the Markdown twin, and a real headless browser where there is one."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vfm_core.errors import UserError
from vfm_core.pictures import encode_picture
from vfm_core.report import Report, house_style
from vfm_core.tables import format_cell, format_column

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="60" height="40"><rect width="60" height="40" fill="teal"/></svg>'


def plot(points: int = 20) -> Any:
    from matplotlib.figure import Figure

    with house_style():
        figure = Figure(figsize=(4, 2.5))
        axes = figure.subplots()
        axes.plot(np.linspace(0, 1, points), np.random.default_rng(0).random(points), ".")
        axes.set_xlabel("pixels removed")
    return figure


def sample(tmp_path: Path) -> Report:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (200, 300, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.jpg")
    rows = [
        {"method": "gradcam", "energy": 0.066, "interval": (0.066, 0.06, 0.07), "n": 9, "note": "img10"},
        {"method": "<b>finer</b>", "energy": 0.081, "interval": (0.081, 0.075, 0.09), "n": 100, "note": "img9"},
        {"method": "random | map", "energy": float("nan"), "interval": None, "n": 12, "note": None},
    ]
    report = Report("A <title> & more", "sub <i>title</i>")
    report.heading("Numbers").text("Some **bold** words, <script>alert(1)</script>, ![x](http://example.org/x.png).")
    report.table(rows, caption="Means <95%>.", highlight={"energy": "max", "n": "min"})
    report.heading("Plots").figure(plot(), caption="Deletion.").figure(SVG, alt="teal box")
    report.heading("Photos").figure(tmp_path / "photo.jpg", caption="From a file.")
    report.heading("Photos").heading("Detail", level=3)
    report.gallery([(rng.random((32, 32, 3)), f"bird {i}") for i in range(5)], caption="Birds.")
    report.gallery([(photo, 'a "panel"'), (rng.random((40, 200)) > 0.5, "mask")])
    return report


class Document(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_html_is_self_contained_and_escaped(tmp_path: Path) -> None:
    path = sample(tmp_path).write(tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    document = Document(text)
    sources = [a.get("src") or "" for tag, a in document.tags if tag in ("img", "script", "link", "iframe")]
    images = [s for s in sources if s]
    assert len(images) == 10 and all(s.startswith("data:image/") for s in images)
    assert not [a for _, a in document.tags if "href" in a and not (a["href"] or "").startswith("#")]
    assert [tag for tag, _ in document.tags].count("script") == 1
    assert "<b>finer" not in text and "<script>alert" not in text and "example.org" not in text
    assert "url(" not in text and "@import" not in text
    assert all("alt" in a for tag, a in document.tags if tag == "img")
    assert any("default-src 'none'" in (a.get("content") or "") for tag, a in document.tags if tag == "meta")
    assert list(tmp_path.glob(".vfm-tmp-*")) == []


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    assert sample(tmp_path).html() == sample(tmp_path).html()


def test_headings_get_distinct_anchors(tmp_path: Path) -> None:
    document = Document(sample(tmp_path).html())
    anchors = [a["id"] for tag, a in document.tags if tag in ("h2", "h3")]
    assert anchors == ["numbers", "plots", "photos", "photos-2", "detail"]
    links = [a["href"] for tag, a in document.tags if tag == "a"]
    assert links == ["#numbers", "#plots", "#photos", "#photos-2"]
    with pytest.raises(ValueError, match="level"):
        Report("x").heading("y", level=1)
    assert 'id="section"' in Report("x").heading("???").html()


def test_highlight_marks_the_best_and_skips_nan(tmp_path: Path) -> None:
    text = sample(tmp_path).html()
    best = re.findall(r'<td class="[^"]*best"[^>]*>([^<]*)</td>', text)
    assert best == ["9", "0.081"]
    both = Report("x").table([{"a": 1.0}, {"a": 1.0}, {"a": 0.5}], highlight=["a"]).html()
    assert len(re.findall(r'class="n best"', both)) == 2
    with pytest.raises(ValueError, match="'b'"):
        Report("x").table([{"a": 1}], highlight="b")


def test_rows_without_dicts_need_matching_columns() -> None:
    assert "<td>u</td>" in Report("x").table([("u", 1)], columns=["a", "b"]).html()
    with pytest.raises(ValueError, match="need columns"):
        Report("x").table([("u", 1)])
    with pytest.raises(ValueError, match="3 values for 2 columns"):
        Report("x").table([("u", 1, 2)], columns=["a", "b"])
    assert "<tbody>" in Report("x").table([], columns=["a"]).html()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (True, "yes"),
        (np.bool_(False), "no"),
        (12, "12"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (-0.0, "0"),
        (1e-9, "1e-09"),
        (1234.56, "1234.6"),
        (np.float32(0.5), "0.5"),
        (torch.tensor(2), "2"),
        ((0.5, 0.25, 0.75), "0.5 [0.25, 0.75]"),
        (["a", "b"], "a, b"),
        (Path("a/b"), "a/b"),
        (float("inf"), "inf"),
    ],
)
def test_format_cell(value: Any, text: str) -> None:
    assert format_cell(value) == text


def test_columns_share_their_decimals() -> None:
    assert format_column([0, 0.6, 1.0, None]) == ["0.0", "0.6", "1.0", "–"]
    assert format_column([0.06512, 0.5, float("nan")]) == ["0.065", "0.500", "–"]
    assert format_column([12.3456, 7.0]) == ["12.35", "7.00"]
    assert format_column([(0.5, 0.25, 1.0), 0.1]) == ["0.50 [0.25, 1.00]", "0.10"]
    assert format_column([1e-5, 0.5]) == ["1e-05", "0.5"]
    assert format_column([1, 20, "x"]) == ["1", "20", "x"]
    assert format_column([-0.0001 * 0, 0.5, float("inf")]) == ["0.0", "0.5", "inf"]
    assert format_column([]) == []


def test_pictures_of_every_kind_decode(tmp_path: Path) -> None:
    Image.new("P", (20, 10)).save(tmp_path / "a.bmp")
    objects: list[Any] = [
        Image.new("CMYK", (300, 10)),
        Image.new("LA", (10, 300)),
        Image.new("I;16", (10, 10)),
        np.zeros((5, 6), dtype=np.uint8),
        np.full((5, 6, 4), 0.5),
        np.array([[np.nan, 2.0], [-1.0, 0.5]]),
        torch.zeros(4, 4, 1, requires_grad=True),
        tmp_path / "a.bmp",
        str(tmp_path / "a.bmp"),
    ]
    for obj in objects:
        picture = encode_picture(obj)
        with Image.open(io.BytesIO(picture.data)) as image:
            image.load()
            assert Image.MIME[image.format or ""] == picture.mime
            assert picture.size == image.size


def test_array_values_survive() -> None:
    array = np.array([[0.0, 0.5], [1.0, np.nan]])
    with Image.open(io.BytesIO(encode_picture(array).data)) as image:
        assert np.asarray(image.convert("L")).tolist() == [[0, 128], [255, 0]]


def test_heavy_plot_becomes_pixels() -> None:
    assert encode_picture(plot()).mime == "image/svg+xml"
    assert encode_picture(plot(30_000)).mime == "image/png"


def test_bad_pictures(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"x\.png"):
        encode_picture(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"gone\.svg"):
        encode_picture(tmp_path / "gone.svg")
    with pytest.raises(TypeError, match=r"\(3, 8, 8\)"):
        encode_picture(np.zeros((3, 8, 8)))
    with pytest.raises(TypeError, match="cannot show dict"):
        encode_picture({})


def test_markdown_twin(tmp_path: Path) -> None:
    sample(tmp_path).write(tmp_path / "my report.html", markdown=True)
    text = (tmp_path / "my report.md").read_text(encoding="utf-8")
    assert text.startswith("# A <title> & more\n") and "## Numbers" in text and "### Detail" in text
    assert "| method | energy | interval | n | note |\n| --- | ---: | ---: | ---: | --- |" in text
    assert "| &lt;b&gt;finer&lt;/b&gt; | **0.081** |" in text and "random \\| map" in text
    files = re.findall(r"!\[.*?\]\((my%20report_files/\d{3}\.\w+)\)", text)
    assert len(files) == len(set(files)) == 10
    for name in files:
        assert (tmp_path / name.replace("%20", " ")).stat().st_size > 0


PROBE_HEAD = """<script>
window.problems = [];
addEventListener("error", e => problems.push("error: " + (e.message || e.target.tagName)), true);
addEventListener("unhandledrejection", e => problems.push("rejection: " + e.reason));
addEventListener("securitypolicyviolation", e => problems.push("policy: " + e.blockedURI));
console.error = (...words) => problems.push("console: " + words.join(" "));
</script>"""

# Everything happens within the load event, which waits for the images and which the browser waits for.
PROBE_TAIL = """<script>
addEventListener("load", () => {
  const decodes = image => {  // drawing forces the pixels out, not only the header
    if (!image.naturalWidth) return false;
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 8;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0, 8, 8);
    return context.getImageData(0, 0, 8, 8).data.some((value, i) => i % 4 === 3 && value > 0);
  };
  const images = [...document.images];
  const heads = [...document.querySelectorAll("th button")];
  const column = k => [...document.querySelectorAll("tbody tr")].map(row => row.cells[k].textContent);
  const click = k => { heads[k].click(); return column(k); };
  const result = {
    images: images.length, decoded: images.filter(decodes).length,
    energy_down: click(1), energy_up: click(1), interval: click(2), n: click(3), note: click(4), note_down: click(4),
    sorted: document.querySelectorAll("th[aria-sort]").length, arrow: heads[4].parentElement.getAttribute("aria-sort"),
    overflow: document.documentElement.scrollWidth - innerWidth,
  };
  document.querySelector("button.open").click();
  result.zoom = document.querySelector("dialog[open] p").textContent;
  document.querySelector("dialog").click();
  result.closed = document.querySelector("dialog[open]") === null;
  result.problems = problems;
  const output = document.createElement("pre");
  output.id = "probe";
  output.textContent = JSON.stringify(result);
  document.body.append(output);
});
</script>"""


def browse(path: Path, profile: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """Open a page headless and return what the probe found and the browser's own log."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync --enable-logging=stderr"
    command = [chromium, *quiet.split(), f"--user-data-dir={profile}", *flags, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert found, f"the page did not finish: {done.stderr[-2000:]}"
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), done.stderr


@pytest.mark.slow
def test_report_in_a_real_browser(tmp_path: Path) -> None:
    text = sample(tmp_path).html()
    page = tmp_path / "probed.html"
    page.write_text(text.replace("<style>", PROBE_HEAD + "<style>", 1).replace("</body>", PROBE_TAIL + "</body>"))
    result, log = browse(page, tmp_path / "profile", "--window-size=500,900")
    assert result["problems"] == [] and "CONSOLE" not in log
    assert result["images"] == result["decoded"] == 10
    assert result["energy_down"] == ["0.081", "0.066", "–"]
    assert result["energy_up"] == ["0.066", "0.081", "–"]  # what is absent stays last
    assert result["interval"][0].startswith("0.081")
    assert result["n"] == ["100", "12", "9"]  # as numbers, not as words
    assert result["note"] == ["img9", "img10", "–"] and result["note_down"] == ["img10", "img9", "–"]
    assert result["sorted"] == 1 and result["arrow"] == "descending"
    assert result["zoom"] == "bird 0" and result["closed"]
    assert result["overflow"] <= 0  # nothing but the tables' own boxes scrolls sideways on a narrow screen


@pytest.mark.slow
def test_probe_notices_a_broken_page(tmp_path: Path) -> None:
    """The check above can fail: a broken image, a thrown error and a request are all seen."""
    text = sample(tmp_path).html()
    text = text.replace(
        "<h1>", '<img src="data:image/png;base64,AAAA" alt=""><img src="http://127.0.0.1:9/x.png" alt=""><h1>'
    )
    text = text.replace("</main>", "</main><script>nothing.here</script>")
    page = tmp_path / "probed.html"
    page.write_text(text.replace("<style>", PROBE_HEAD + "<style>", 1).replace("</body>", PROBE_TAIL + "</body>"))
    result, _ = browse(page, tmp_path / "profile")
    assert result["images"] - result["decoded"] == 2
    assert any(p.startswith("policy") for p in result["problems"])
    assert any("nothing is not defined" in p for p in result["problems"])
