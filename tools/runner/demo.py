"""All demos, and one page that links their reports."""

import html
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.process import Failure, clean_environment, program, run, say, scripts_dir
from runner.workspace import Member


@dataclass(frozen=True)
class Outcome:
    """What a package's demo came to; `report` is relative to the index page, None where there is none."""

    name: str
    version: str
    description: str
    report: str | None
    seconds: float
    error: str | None = None


_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .25rem; }
ul { list-style: none; padding: 0; }
li { border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.2rem; margin: 1rem 0; }
h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
p { margin: .3rem 0; }
small, .version { opacity: .7; font-weight: normal; }
.failed { color: #c0392b; }
code { font-size: .9em; }
"""


def page(outcomes: Sequence[Outcome]) -> str:
    """The index page: self-contained, readable on a phone, light and dark."""
    items = []
    for one in outcomes:
        title = html.escape(one.name)
        if one.report:
            title = f'<a href="{html.escape(one.report, quote=True)}">{title}</a>'
        state = f"made in {one.seconds:.0f} s by <code>python3 tools/run.py demo {html.escape(one.name)}</code>"
        if one.error:
            state = f'<span class="failed">failed: {html.escape(one.error)}</span>'
        items.append(
            f'<li><h2>{title} <span class="version">{html.escape(one.version)}</span></h2>'
            f"<p>{html.escape(one.description)}</p><p><small>{state}</small></p></li>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Demos</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>Demos</h1>"
        "<p>Each package's embedded study, computed on this machine without a download.</p>\n"
        f"<ul>{''.join(items)}</ul></body></html>\n"
    )


def run_all(environment: Path, packages: Sequence[Member], out: Path, options: Sequence[str]) -> list[Outcome]:
    """Run the demos one after another into `out/<package>` and write `out/index.html`, also when one fails."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for package in packages:
        say(f"== {package.name} demo ==")
        begin = time.monotonic()
        error = None
        try:
            env = clean_environment(bin_dir=scripts_dir(environment))
            command = [program(environment, package.name), "demo", "--out", out / package.name, *options]
            run(command, cwd=out, env=env)
        except Failure as failure:
            error = str(failure)
        report = f"{package.name}/report.html"
        there = (out / report).exists()
        if error is None and not there:
            error = f"it wrote no {report}"
        seconds = time.monotonic() - begin
        shown = report if there else None
        outcomes.append(Outcome(package.name, package.version, package.description, shown, seconds, error))
    (out / "index.html").write_text(page(outcomes), encoding="utf-8")
    return outcomes
