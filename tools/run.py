#!/usr/bin/env python3
"""One command each: demo | test | bench | sync | lock | release. Needs Python >= 3.11 and nothing else.

The work is done in the `runner` package beside this file, standard library only. This file stays readable for older
Pythons, so that they can say what is wrong instead of failing on a syntax they do not know.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the one place where an older Python is expected
    sys.stderr.write(
        "error: Python {}.{} is too old for this workspace; run this file with Python 3.11 or newer, "
        "e.g. python3.12 tools/run.py\n".format(*sys.version_info[:2])
    )
    sys.exit(2)

from runner.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
