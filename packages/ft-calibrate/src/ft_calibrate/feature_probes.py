"""What the features know, before and after: nearest class mean, nearest neighbours, linear probe.

The read-out of FTC (arXiv 2409.16223): when class means of the fine-tuned features still classify the absent classes,
the features are intact and the head's scale is to blame. Means come from target data of all classes, so this uses
labels of absent classes: a diagnosis, never a classifier to deploy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ft_calibrate.diagnose_inputs import Inputs, Right
from ft_calibrate.ncm import knn_scores, linear_probe_scores, ncm_scores
from ft_calibrate.tables import LogitTable

Scores = Callable[[Any, Any, Any], Any]  # features, reference features and their labels -> (N, K)

DIAGNOSIS_ONLY = "uses labels of absent classes: for diagnosis only"
NEIGHBOURS = 10


@dataclass
class Probe:
    """Rightness per test sample of one feature classifier.

    Attributes
    ----------
    name
        ``"NCM"``, ``"10-NN"`` or ``"linear probe"``.
    after, before
        By key, as `ft_calibrate.metrics.correct_per_sample` gives them; ``before`` None when unknown.
    detail
        Which data its means or neighbours are from.
    """

    name: str
    after: Right
    before: Right | None = None
    detail: str = ""


def feature_probes(inputs: Inputs, notes: list[str], skipped: dict[str, str]) -> list[Probe]:
    """Feature classifiers of the test samples, NCM first; none without features.

    Both models get their means from the same kind of data: reference data of each, or the test data with leave-one-out.

    Parameters
    ----------
    inputs
        Tables with features.
    notes, skipped
        What was done otherwise than asked, and what could not be done, is added here.
    """
    after, before = inputs.after, inputs.before
    if after.features is None:
        skipped["features"] = "the test data hold no features: extract them with --features"
        return []
    if before is not None and before.features is None:
        notes.append("The data before fine-tuning hold no features: features can be shown, not compared.")
        before = None
    references = (inputs.reference_before, inputs.reference)
    given = inputs.reference is not None and (before is None or inputs.reference_before is not None)
    if inputs.reference is not None and not given:
        notes.append(
            "Reference data were given for the model after fine-tuning only (--reference-before is missing), so both "
            "models use leave-one-out class means of the test data."
        )
    if not given:
        references = (before, after)
    detail = f"{'reference' if given else 'test, leave-one-out'}: {DIAGNOSIS_ONLY}"
    classes, labels = inputs.groups.num_classes, inputs.labels

    def of(scores_of: Scores, table: LogitTable | None, reference: LogitTable | None) -> Right | None:
        if table is None or reference is None:
            return None
        return inputs.right(scores_of(table.features, reference.features, reference.labels if given else labels))

    def probe(name: str, scores_of: Scores) -> Probe:
        found = of(scores_of, after, references[1])
        assert found is not None
        return Probe(name, found, of(scores_of, before, references[0]), detail)

    own = not given
    probes = [
        probe("NCM", lambda f, r, y: ncm_scores(f, (r, y), classes, leave_one_out=own)),
        probe(f"{NEIGHBOURS}-NN", lambda f, r, y: knn_scores(f, r, y, classes, k=NEIGHBOURS, leave_one_out=own)),
    ]
    if given:
        probes.append(probe("linear probe", lambda f, r, y: linear_probe_scores(f, r, y, classes)))
    else:
        skipped["linear probe"] = "it must be trained on other samples than the test data: give --reference"
    return probes
