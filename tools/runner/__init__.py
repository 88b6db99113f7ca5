"""What `tools/run.py` does, standard library only: it must work before anything is installed.

workspace.py    which packages there are and how they depend on each other
process.py      running other programs, and the two errors this tool ends with
uv.py           finding uv, or installing the locked one into a private folder
lock.py         the index-neutral lock: making, checking
environment.py  installing the locked environment
isolated.py     a package from its wheels alone
release.py      is this package ready to be published?
demo.py         all demos and the page that links their reports
benches.py      all benches, their JSON side by side
readme.py       running the code blocks of a README
checks.py       what no tracked file may contain
cli.py          the command line
"""
