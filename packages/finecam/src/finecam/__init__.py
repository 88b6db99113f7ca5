"""finecam: why species A and not B.

Contrastive class-activation maps (Finer-CAM, arXiv 2501.11309) of any image classifier, and interpretable class prompts
(Prompt-CAM, arXiv 2501.09333) on any vision transformer. The public names below are loaded on first use (PEP 562), so
that ``import finecam`` and every ``--help`` stay fast.

>>> import finecam
>>> explain = finecam.Explainer(model)                                    # doctest: +SKIP
>>> result = explain(images, target="Blue Grosbeak", references=["Grandala"])  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finecam.audit_run import audit
    from finecam.classifiers import Classifier, load_classifier
    from finecam.demo import run_demo
    from finecam.evaluation import evaluate
    from finecam.explain import explain_dataset, explain_folder
    from finecam.explainer import Explainer
    from finecam.head import fit_head
    from finecam.promptcam import PromptCAM
    from finecam.promptcam_train import train_promptcam
    from finecam.result import CAMResult
    from finecam.text import TextClassifier

_HOME = {
    "CAMResult": ("result", "CAMResult"),
    "Classifier": ("classifiers", "Classifier"),
    "Explainer": ("explainer", "Explainer"),
    "PromptCAM": ("promptcam", "PromptCAM"),
    "TextClassifier": ("text", "TextClassifier"),
    "audit": ("audit_run", "audit"),
    "evaluate": ("evaluation", "evaluate"),
    "explain_dataset": ("explain", "explain_dataset"),
    "explain_folder": ("explain", "explain_folder"),
    "fit_head": ("head", "fit_head"),
    "load_classifier": ("classifiers", "load_classifier"),
    "run_demo": ("demo", "run_demo"),
    "train_promptcam": ("promptcam_train", "train_promptcam"),
}

__all__ = [
    "CAMResult",
    "Classifier",
    "Explainer",
    "PromptCAM",
    "TextClassifier",
    "audit",
    "evaluate",
    "explain_dataset",
    "explain_folder",
    "fit_head",
    "load_classifier",
    "run_demo",
    "train_promptcam",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("finecam")
    if name not in _HOME:
        raise AttributeError(f"module 'finecam' has no attribute {name!r}")
    module, attribute = _HOME[name]
    value = getattr(import_module(f"finecam.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
