"""The command ``meda-kv``: parsing only. One file per group of verbs; each imports what it needs when it runs."""

from __future__ import annotations

from typing import NoReturn

from vfm_core.cli import make_app, run_app

app = make_app(
    "meda-kv",
    "Shrink the KV cache of a vision-language model right after the prompt was read: a budget of its own for every "
    "layer, exact totals, honest bytes, behind plain model.generate.",
    "meda-kv",
)


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 internal fault or failed samples, 2 bad input, 130 Ctrl-C."""
    run_app(app)


from meda_kv.cli import bench, demo, evaluate, generate, inspection  # noqa: E402, F401 - each adds verbs
