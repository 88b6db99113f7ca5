import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from runner import benches, demo
from runner.process import Failure
from runner.workspace import members

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins for the commands are scripts")

GOOD_DEMO = """
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "report.html").write_text("words: " + " ".join(sys.argv[1:]))
"""


class Links(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in {"href", "src"}]


def test_the_page_links_reports_and_shows_failures() -> None:
    text = demo.page(
        [
            demo.Outcome("fine", "0.1.0", "Why <b>A</b> & not B", "fine/report.html", 12.4),
            demo.Outcome("avid", "0.2.0", "Other", None, 1.0, "exit code 1 from: avid <demo>"),
        ]
    )
    assert Links(text).found == ["fine/report.html"]
    assert "Why &lt;b&gt;A&lt;/b&gt; &amp; not B" in text
    assert "failed: exit code 1 from: avid &lt;demo&gt;" in text
    assert "made in 12 s by <code>python3 tools/run.py demo fine</code>" in text
    assert "<script" not in text
    assert "://" not in text


def test_every_demo_runs_and_its_report_is_there(
    workspace: Path, tmp_path: Path, command: Callable[[str, str], Path]
) -> None:
    home = command("avid", GOOD_DEMO)
    command("fine", GOOD_DEMO)
    packages = [m for m in members(workspace) if m.kind == "package"]
    out = tmp_path / "demo"
    outcomes = demo.run_all(home, packages, out, ["--seed", "1"])
    assert [(one.name, one.error) for one in outcomes] == [("avid", None), ("fine", None)]
    assert (out / "fine/report.html").read_text() == f"words: demo --out {out / 'fine'} --seed 1"
    links = Links((out / "index.html").read_text()).found
    assert links == ["avid/report.html", "fine/report.html"]
    assert all((out / link).exists() for link in links)


def test_a_failing_demo_does_not_hide_the_others(
    workspace: Path, tmp_path: Path, command: Callable[[str, str], Path]
) -> None:
    home = command("avid", "sys.exit(3)")
    command("fine", GOOD_DEMO)
    packages = [m for m in members(workspace) if m.kind == "package"]
    avid, fine = demo.run_all(home, packages, tmp_path / "demo", [])
    assert avid.error is not None
    assert avid.error.startswith("exit code 3 from: ")
    assert fine.error is None
    assert Links((tmp_path / "demo/index.html").read_text()).found == ["fine/report.html"]


def test_a_demo_without_a_report_has_failed(
    workspace: Path, tmp_path: Path, command: Callable[[str, str], Path]
) -> None:
    home = command("fine", "")
    (fine,) = demo.run_all(home, [members(workspace)[-1]], tmp_path / "demo", [])
    assert fine.error == "it wrote no fine/report.html"


def test_benches_write_their_json(workspace: Path, tmp_path: Path, command: Callable[[str, str], Path]) -> None:
    home = command("fine", "print('{\"words\": ' + str(len(sys.argv)) + '}')")
    (file,) = benches.run_all(home, [members(workspace)[-1]], tmp_path / "bench", ["--quick"])
    assert file == tmp_path / "bench" / "fine.json"
    assert json.loads(file.read_text()) == {"words": 6}  # fine bench --out DIR --json --quick


def test_a_bench_that_prints_something_else_fails_after_the_others(
    workspace: Path, tmp_path: Path, command: Callable[[str, str], Path]
) -> None:
    home = command("avid", "print('fast!')")
    command("fine", "print('[]')")
    packages = [m for m in members(workspace) if m.kind == "package"]
    with pytest.raises(Failure, match="avid: Expecting value"):
        benches.run_all(home, packages, tmp_path / "bench", [])
    assert (tmp_path / "bench" / "fine.json").exists()
