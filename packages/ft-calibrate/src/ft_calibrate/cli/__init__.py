"""The command ``ft-calibrate``: parsing only. One file per group of verbs; each imports what it needs when it runs."""

from __future__ import annotations

from typing import NoReturn

from vfm_core.cli import make_app, run_app

app = make_app(
    "ft-calibrate",
    "Fine-tuned on some of the classes and lost the rest? Find out what broke, repair the logits without retraining, "
    "fold the repair into the checkpoint, or train with less harm.",
    "ft-calibrate",
)


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 internal fault, 2 bad input, 130 Ctrl-C."""
    run_app(app)


from ft_calibrate.cli import compare, data, logits, models, report, study, train  # noqa: E402, F401 - each adds verbs
