import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner import readme

SAMPLE = """# Title

```python
x = 2
```

Some words.

```console
$ echo one > one.txt
$ cat one.txt \\
>     | tr a-z A-Z > two.txt
ONE
```

<!-- no-run: needs your photos -->
```bash
finecam explain photos/
```

- in a list:

  ```python
  if x == 2:
      open("three.txt", "w").write(str(x + 1))
  ```

```text
not code
```

~~~sh
echo four > four.txt
~~~
"""


def test_blocks() -> None:
    assert readme.blocks(SAMPLE) == [
        readme.Block(4, "python", "x = 2"),
        readme.Block(10, "console", "echo one > one.txt\ncat one.txt \\\n    | tr a-z A-Z > two.txt"),
        readme.Block(18, "shell", "finecam explain photos/", "needs your photos"),
        readme.Block(24, "python", 'if x == 2:\n    open("three.txt", "w").write(str(x + 1))'),
        readme.Block(33, "shell", "echo four > four.txt"),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<!-- no-run -->\n```bash\nx\n```\n", "line 1: a no-run comment must give the reason"),
        ("<!-- no-run: -->\n```bash\nx\n```\n", "line 1: a no-run comment must give the reason"),
        ("<!-- no-run: why -->\n\nwords\n", "line 2: no code block below"),
        ("<!-- no-run: why -->\n", "no code block below"),
        ("```python\nx = 1\n", "line 1: this code block is not closed"),
        ("```console\nfinecam demo\n```\n", "no line that starts with"),
    ],
)
def test_mistakes_are_named(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        readme.blocks(text)


def run(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    file = folder / "README.md"
    file.write_text(text, encoding="utf-8")
    work = folder / "work"
    work.mkdir()
    command = [sys.executable, str(readme.__file__), str(file)]
    return subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.name == "nt", reason="shell blocks need bash")
def test_blocks_run_in_order_in_one_place(tmp_path: Path) -> None:
    done = run(tmp_path, SAMPLE)
    assert done.returncode == 0, done.stderr
    written = {path.name: path.read_text().strip() for path in (tmp_path / "work").iterdir()}
    assert written == {"one.txt": "one", "two.txt": "ONE", "three.txt": "3", "four.txt": "four"}


@pytest.mark.parametrize(
    ("block", "where"),
    [
        ("```python\nx = 1\nassert x == 2\n```\n", "the python block at README.md, line 2"),
        ("```python\nraise SystemExit(0)\n```\n", "the python block at README.md, line 2"),
        ("words\n\n```bash\nfalse\ntrue\n```\n", "the shell block at README.md, line 4"),
        ("```bash\nfalse | true\n```\n", "the shell block at README.md, line 2"),
        ("```console\n$ no-such-command-here\n```\n", "the console block at README.md, line 2"),
    ],
)
def test_a_block_that_fails_is_named(tmp_path: Path, block: str, where: str) -> None:
    done = run(tmp_path, block + "\n```python\nopen('after.txt', 'w')\n```\n")
    assert done.returncode == 1
    assert where in done.stderr
    assert list((tmp_path / "work").iterdir()) == []


def test_a_traceback_shows_the_line_of_the_file(tmp_path: Path) -> None:
    assert "line 5" in run(tmp_path, "# T\n\n```python\nx = 1\nx / 0\n```\n").stderr
