"""What no file of the repository may contain. Pure functions on text, so that each can be seen to fail."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from runner.process import Failure

LARGEST_FILE = 6 * 2**20
LONGEST_SOURCE = 440
"""About 400 lines: a file that grows beyond this holds two concepts."""

# Written in pieces, so that this file does not contain what it looks for.
_INDEX_HOST = re.compile(
    "|".join(
        [
            r"\bpypi" + r"\.org",
            r"\bpython" + r"hosted\.org",
            r"https?://[^\s\"')>]+/simple(?:/|\b)",
            r"https?://[^\s\"')>]+\.(?:whl|tar\.gz)\b",
            r"download\.py" + r"torch\.org",
        ]
    )
)
_HOME_FOLDER = re.compile(r"(?<![\w.~-])/(?:root|home/[a-z][\w-]*|Users/[A-Za-z][\w-]*|work|farm)/")
_LEFT_FOR_LATER = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|\bxf" + r"ail\b")


def files(root: Path) -> list[Path]:
    """Every file that is tracked, or would be after `git add`: what git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"git cannot list the files of {root}: {done.stderr.strip()}")
    paths = (root / name for name in sorted(set(done.stdout.split("\0"))) if name)
    return [path for path in paths if path.is_file()]


def text_of(path: Path) -> str | None:
    """A file's text; None for a binary file."""
    data = path.read_bytes()
    if b"\0" in data[:8192]:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def index_hosts(text: str) -> list[str]:
    """Names of package indexes and addresses of package files."""
    return [match[0] for match in _INDEX_HOST.finditer(text)]


def machine_paths(text: str, folders: Iterable[Path] = ()) -> list[str]:
    """Paths that exist on one machine: home folders, and the given folders."""
    found = [match[0] for match in _HOME_FOLDER.finditer(text)]
    return found + [str(folder) for folder in folders if len(folder.parts) > 2 and f"{folder}/" in text]


def left_for_later(text: str) -> list[str]:
    """Words that mark work as unfinished."""
    return [match[0] for match in _LEFT_FOR_LATER.finditer(text)]
