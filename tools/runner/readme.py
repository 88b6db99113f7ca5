"""Running the code blocks of a Markdown file, in order, in one place: a README that does not run is wrong.

`python` blocks share one namespace. Of a `console` block the lines after `$ ` (continued after `> `) run, the others
show output. `bash` and `sh` blocks run whole. All run in the current folder. A block that cannot run everywhere says
why, in a comment on the line above it: `<!-- no-run: needs your photos -->`. Other languages are not code to run.

As a program: `python readme.py FILE` runs the blocks of FILE in the current folder and stops at the first that fails.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = {"python": "python", "py": "python", "console": "console", "bash": "shell", "sh": "shell", "shell": "shell"}
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>.*)$")
_NO_RUN = re.compile(r"^\s*<!--\s*no-run\s*:?\s*(?P<reason>.*?)\s*-->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced code block: the line of its first code line (from 1), what to run, and why not, where it must not."""

    line: int
    language: str
    code: str
    skip: str | None = None


def blocks(text: str) -> list[Block]:
    """The blocks of a Markdown text that are code to run, also those that say why they do not.

    Raises
    ------
    ValueError
        For a block that is not closed, or a `no-run` comment without a reason or without a block below it.
    """
    found: list[Block] = []
    lines = text.splitlines()
    skip: str | None = None
    at = 0
    while at < len(lines):
        marker, fence = _NO_RUN.match(lines[at]), _FENCE.match(lines[at])
        if marker:
            if not marker["reason"]:
                raise ValueError(f"line {at + 1}: a no-run comment must give the reason")
            skip = marker["reason"]
        elif fence:
            end = _closing(lines, at, fence["fence"])
            indent = len(fence["indent"])
            body = [line[min(indent, len(line) - len(line.lstrip())) :] for line in lines[at + 1 : end]]
            word = re.match(r"\{?\.?(\w*)", fence["info"].strip())
            language = LANGUAGES.get(word[1].lower() if word else "")
            if language:
                found.append(Block(at + 2, language, _code(language, body), skip))
            skip, at = None, end
        elif lines[at].strip() and skip is not None:
            raise ValueError(f"line {at}: no code block below the no-run comment")
        at += 1
    if skip is not None:
        raise ValueError(f"line {len(lines)}: no code block below the no-run comment")
    return found


def _closing(lines: list[str], opened: int, fence: str) -> int:
    for at in range(opened + 1, len(lines)):
        stripped = lines[at].strip()
        if stripped.startswith(fence) and not stripped.strip(fence[0]):
            return at
    raise ValueError(f"line {opened + 1}: this code block is not closed")


def _code(language: str, body: list[str]) -> str:
    if language != "console":
        return "\n".join(body)
    commands: list[str] = []
    for line in body:
        if line.startswith("$ "):
            commands.append(line[2:])
        elif line.startswith("> ") and commands:
            commands[-1] += "\n" + line[2:]
    if body and not commands:
        raise ValueError("a console block has no line that starts with `$ `")
    return "\n".join(commands)


def run(file: Path) -> int:
    """Run all blocks of a file; returns 0, or 1 after saying on stderr which block failed."""
    namespace: dict[str, object] = {"__name__": "__main__", "__file__": str(file)}
    for block in blocks(file.read_text(encoding="utf-8")):
        if block.skip is not None:
            continue
        where = f"{file.name}, line {block.line}"
        try:
            if block.language == "python":
                # Padding makes tracebacks show the line in the README.
                code = compile("\n" * (block.line - 1) + block.code, str(file), "exec")
                exec(code, namespace)
            else:
                subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
        except (Exception, SystemExit) as error:
            import traceback

            traceback.print_exc()
            print(f"error: the {block.language} block at {where} failed: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]).resolve()))
