"""ft-calibrate: fine-tuned on some of the classes and lost the rest? Diagnose, repair, prevent.

"Fine-Tuning is Fine, if Calibrated" (arXiv 2409.16223) and "Holistic Transfer" (arXiv 2311.01420). The public names
below are loaded on first use (PEP 562), so that ``import ft_calibrate`` and every ``--help`` stay fast.

>>> from ft_calibrate import AbsentClassCalibrator
>>> cal = AbsentClassCalibrator(seen_classes=S, method="alg").fit(Z_train, y_train)  # doctest: +SKIP
>>> y = cal.predict(Z_new)                                                          # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_calibrate.calibration import fit_calibration
    from ft_calibrate.classifier import Classifier, load_classifier
    from ft_calibrate.comparison import compare
    from ft_calibrate.curve import CurveAccumulator, ausuc, seen_unseen_curve
    from ft_calibrate.curve_points import Curve
    from ft_calibrate.demo import run_demo
    from ft_calibrate.diagnosis import Diagnosis, diagnose
    from ft_calibrate.estimators import AbsentClassBias, AbsentClassCalibrator, AbsentClassClassifier
    from ft_calibrate.extraction import extract
    from ft_calibrate.fold import fold_into_head
    from ft_calibrate.fold_files import export_file
    from ft_calibrate.gap import average_logit_gap
    from ft_calibrate.groups import ClassGroups, class_groups
    from ft_calibrate.metrics import accuracy_decomposition
    from ft_calibrate.ncm import ncm_scores
    from ft_calibrate.pcv import Fold, GammaEstimate, pseudo_cross_validation, ratio_pcv
    from ft_calibrate.pcv_run import pcv_by_retraining
    from ft_calibrate.predict import predict_table
    from ft_calibrate.recipes import fine_tune, interpolate, recipe_names
    from ft_calibrate.record import Calibration, read_calibration
    from ft_calibrate.reproduction import reproduce
    from ft_calibrate.splits import make_split
    from ft_calibrate.tables import LogitTable, read_table, write_table
    from ft_calibrate.text_head import load_text_head

_HOME = {
    "AbsentClassBias": "estimators",
    "AbsentClassCalibrator": "estimators",
    "AbsentClassClassifier": "estimators",
    "Calibration": "record",
    "ClassGroups": "groups",
    "Classifier": "classifier",
    "Curve": "curve_points",
    "CurveAccumulator": "curve",
    "Diagnosis": "diagnosis",
    "Fold": "pcv",
    "GammaEstimate": "pcv",
    "LogitTable": "tables",
    "accuracy_decomposition": "metrics",
    "ausuc": "curve",
    "average_logit_gap": "gap",
    "class_groups": "groups",
    "compare": "comparison",
    "diagnose": "diagnosis",
    "export_file": "fold_files",
    "extract": "extraction",
    "fine_tune": "recipes",
    "fit_calibration": "calibration",
    "fold_into_head": "fold",
    "interpolate": "recipes",
    "load_classifier": "classifier",
    "load_text_head": "text_head",
    "make_split": "splits",
    "ncm_scores": "ncm",
    "pcv_by_retraining": "pcv_run",
    "predict_table": "predict",
    "pseudo_cross_validation": "pcv",
    "ratio_pcv": "pcv",
    "read_calibration": "record",
    "read_table": "tables",
    "recipe_names": "recipes",
    "reproduce": "reproduction",
    "run_demo": "demo",
    "seen_unseen_curve": "curve",
    "write_table": "tables",
}

__all__ = [
    "AbsentClassBias",
    "AbsentClassCalibrator",
    "AbsentClassClassifier",
    "Calibration",
    "ClassGroups",
    "Classifier",
    "Curve",
    "CurveAccumulator",
    "Diagnosis",
    "Fold",
    "GammaEstimate",
    "LogitTable",
    "accuracy_decomposition",
    "ausuc",
    "average_logit_gap",
    "class_groups",
    "compare",
    "diagnose",
    "export_file",
    "extract",
    "fine_tune",
    "fit_calibration",
    "fold_into_head",
    "interpolate",
    "load_classifier",
    "load_text_head",
    "make_split",
    "ncm_scores",
    "pcv_by_retraining",
    "predict_table",
    "pseudo_cross_validation",
    "ratio_pcv",
    "read_calibration",
    "read_table",
    "recipe_names",
    "reproduce",
    "run_demo",
    "seen_unseen_curve",
    "write_table",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("ft-calibrate")
    if name not in _HOME:
        raise AttributeError(f"module 'ft_calibrate' has no attribute {name!r}")
    value = getattr(import_module(f"ft_calibrate.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
