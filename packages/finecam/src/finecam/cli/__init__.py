"""The command ``finecam``: parsing only. One file per group of verbs; each imports what it needs when it runs."""

from __future__ import annotations

from typing import NoReturn

from vfm_core.cli import make_app, run_app

app = make_app(
    "finecam",
    "Why species A and not B: contrastive class-activation maps (Finer-CAM) and class prompts that show traits "
    "(Prompt-CAM).",
    "finecam",
)


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 internal fault, 2 bad input or failed images, 130 Ctrl-C."""
    run_app(app)


from finecam.cli import explain, models, promptcam, study  # noqa: E402, F401 - each adds its verbs to `app`
