"""Diagnose a fine-tuned classifier: what was damaged, and can it be repaired without retraining?

Puts together the analyses of FTC (arXiv 2409.16223) on tables of logits (and features): accuracies by group, the
seen-unseen curve, nearest class means before and after (the feature read-out), A1 to A8, gamma_ALG and gamma*, and the
verdict (`ft_calibrate.verdict`, ours).

NCM with reference data of all classes, gamma* and everything about U's accuracy use labels of absent classes: they are
for diagnosis, not for choosing a gamma to deploy. Every output says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vfm_core.errors import UserError
from vfm_core.files import atomic_write, jsonable

from ft_calibrate import diagnose_tables as build
from ft_calibrate.analyses_head import ClassRelationship
from ft_calibrate.curve import CurveAccumulator, margins
from ft_calibrate.diagnose_inputs import Inputs, Right, prepare
from ft_calibrate.diagnose_tables import Floats, Gamma, Settings
from ft_calibrate.feature_probes import Probe, feature_probes
from ft_calibrate.verdict import Verdict, cannot_judge, judge

if TYPE_CHECKING:
    from ft_calibrate.curve import Curve
    from ft_calibrate.record import Calibration
    from ft_calibrate.tables import LogitTable

log = logging.getLogger(__name__)

Progress = Callable[[Iterable[Any], int], Iterable[Any]]

NOT_DEPLOYABLE = "upper bound, not deployable"
PARITY = "as in the published code, not deployable"


@dataclass
class Diagnosis:
    """The result of `diagnose`.

    Attributes
    ----------
    judgement : Verdict
        The verdict with its differences; `verdict`, `sentence` and `next_steps` are taken from it.
    tables : dict of str to list of dict
        Every table by name: accuracy, accuracy_all, curve, gammas, ncm, nn_vs_ncm (A1), absent_among_absent (A2),
        logit_scale (A3), class_relationship (A4), margin (A5), head_norms (A6), feature_movement and
        class_mean_movement (A7), separation (A8). Absent tables could not be made; `skipped` says why.
    gammas : dict of str to Gamma
        ``"alg"`` (from the fine-tuning data) or ``"alg-test"`` (parity form), ``"oracle"`` and others; each says what
        labels it used.
    curves : dict of str to Curve
        ``"after"`` and, if given, ``"before"``.
    notes, skipped
        What to know when reading, and what could not be computed and why.
    epochs
        Records of an `EpochLog` or a run's history.
    """

    judgement: Verdict
    tables: dict[str, list[dict[str, Any]]]
    gammas: dict[str, Gamma]
    curves: dict[str, Curve]
    inputs: Inputs
    settings: Settings
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    relationship: ClassRelationship | None = None
    margins: dict[str, Floats] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One of `ft_calibrate.verdict.OUTCOMES`."""
        return self.judgement.outcome

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        return self.judgement.sentence

    @property
    def next_steps(self) -> tuple[str, ...]:
        """What to do, one sentence each."""
        return self.judgement.next_steps

    def to_dict(self) -> dict[str, Any]:
        """Everything but pictures, as summary.json holds it (strict JSON: NaN and infinities are null)."""
        from vfm_core.runs import environment

        groups = self.inputs.groups
        versions = environment()
        gammas = {
            name: {
                "value": g.value,
                "from": g.name,
                "uses_absent_labels": g.uses_absent_labels,
                "uses_test_labels": g.uses_test_labels,
                "deployable": g.deployable,
                "remark": g.remark,
                "plateau": None if g.low is None else [g.low, g.high],
            }
            for name, g in self.gammas.items()
        }
        return jsonable(
            {
                "verdict": self.verdict,
                "sentence": self.sentence,
                "judgement": self.judgement.to_dict(),
                "gamma": gammas,
                "ausuc": {name: curve.ausuc for name, curve in self.curves.items()},
                "tables": self.tables,
                "diagnosis_only": "tables ncm and nn_vs_ncm, gamma* and every accuracy of absent classes use labels "
                "of absent classes",
                "notes": self.notes,
                "skipped": self.skipped,
                "classes": {
                    "all": groups.num_classes,
                    "seen": groups.names(groups.seen),
                    "absent": groups.names(groups.absent),
                    "remaining": groups.names(groups.remaining),
                    "remaining_mode": self.inputs.remaining,
                },
                "epochs": self.epochs,
                "seeds": {"bootstrap": self.settings.seed, "projection": self.settings.seed},
                "settings": {"n_bootstrap": self.settings.n_bootstrap, "max_points": self.settings.max_points},
                "inputs": self.inputs.hashes,
                "versions": {"python": versions["python"], **versions["packages"]},
            }
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """The same as JSON text; also written to ``path`` if given."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        if path is not None:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def to_html(self, folder: str | Path, *, projection: str = "tsne", progress: Progress | None = None) -> Path:
        """Write the report folder: summary.json, report.html, curve.csv and the figures as PNG.

        Parameters
        ----------
        folder
            Made when absent; files of an earlier report are replaced.
        projection
            Of tsne.png: ``"tsne"``, or ``"pca"``, which is quicker.
        progress
            Wraps the list of figures, such as in a progress bar: ``(iterable, total) -> iterable``.

        Returns
        -------
        Path
            Of report.html.
        """
        from ft_calibrate.diagnosis_report import write_report

        return write_report(self, folder, projection=projection, progress=progress)


def diagnose(
    after: LogitTable,
    seen: Any,
    before: LogitTable | None = None,
    reference: LogitTable | None = None,
    train: LogitTable | None = None,
    *,
    reference_before: LogitTable | None = None,
    absent: Any = None,
    head_before: Any = None,
    head_after: Any = None,
    epochs: Iterable[Mapping[str, Any]] | None = None,
    calibration: Calibration | None = None,
    remaining: str = "absent",
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Diagnosis:
    """Say what fine-tuning on the classes ``seen`` broke.

    Parameters
    ----------
    after
        Labelled test data of all classes, scored by the fine-tuned model; with features for the feature read-out.
    seen, absent
        Classes of the fine-tuning data, and the absent ones (default: all others), as in `class_groups`.
    before
        The same samples scored by the model before fine-tuning, matched by ids, else by equal labels. Without it
        damage cannot be judged.
    reference
        Target training data of all classes with features of the fine-tuned model, for class means; diagnosis only.
        Without it class means are leave-one-out means of the test data.
    train
        The fine-tuning data scored by the fine-tuned model, labels in S only: gives gamma_ALG. Without it the average
        logit gap of the test data stands in, marked ``uses_test_labels``.
    reference_before
        ``reference`` with features of the model before fine-tuning.
    head_before, head_after
        Head weights for A4 and A6, in any form that `head_weights` takes.
    epochs
        Records of an `EpochLog`, or the history of a run that it watched.
    calibration
        A fitted record for the same seen classes, shown beside gamma_ALG and gamma*.
    remaining
        What happens to classes in neither group: "absent", "keep" or "exclude".
    n_bootstrap
        Paired resamples of every standard error and interval.
    seed
        Of resampling and projection.

    Returns
    -------
    Diagnosis

    Raises
    ------
    UserError
        No labels, other samples before than after, classes that differ, fine-tuning data with labels outside S.
    """
    if n_bootstrap < 2:
        raise UserError("too few bootstrap resamples", given=n_bootstrap, remedy="use 2 or more; 1000 is usual")
    inputs = prepare(
        after, seen, before, reference, train, reference_before=reference_before, absent=absent,
        head_before=head_before, head_after=head_after, remaining=remaining,
    )  # fmt: skip
    settings = Settings(n_bootstrap, seed)
    notes, skipped = list(inputs.notes), dict[str, str]()
    models = {"before": inputs.before, "after": inputs.after}
    right = {name: inputs.right(t.logits) for name, t in models.items() if t is not None}
    margin = {name: margins(t.logits, inputs.groups, remaining) for name, t in models.items() if t is not None}
    curves = {
        name: CurveAccumulator(inputs.groups, remaining).add(t.logits, inputs.labels).curve()
        for name, t in models.items()
        if t is not None
    }
    gammas = {} if calibration is None else {"given": _given(calibration, inputs)}
    simple = calibration is not None and calibration.scale is None and calibration.shift is None
    known = simple and gammas["given"].deployable
    gammas |= _gammas(inputs, curves["after"], notes, skipped, known)
    probes = feature_probes(inputs, notes, skipped)
    shown = {name: (values, None) for name, values in right.items()} | {
        f"after + {g.name}": (inputs.right(inputs.shifted(g.value)), g)
        for key, g in gammas.items()
        if key in ("alg", "alg-test", "oracle")
    }
    if calibration is not None:
        given = gammas["given"] if simple else gammas.pop("given")  # a scale or shift is no point on the curve
        shown[f"after + {given.name}"] = (inputs.right(calibration.apply(inputs.after.logits, after.classes)), given)
    keys = [key for key in right["after"] if "@" not in key]
    tables = {
        "accuracy": build.accuracy_rows(shown, keys, settings),
        "accuracy_all": build.accuracy_all_rows(shown, inputs.labels, inputs.groups.num_classes),
        "curve": build.curve_rows(curves),
        "gammas": build.gamma_rows(gammas, curves["after"]),
        "ncm": build.ncm_rows(probes, settings),
        "absent_among_absent": build.absent_rows(inputs, right, margin, gammas, settings),
        "logit_scale": build.logit_scale_rows(inputs, settings),
        "margin": build.margin_rows(inputs, settings),
        "head_norms": build.norm_rows(inputs, settings),
        "separation": build.separation_rows(inputs, settings),
    }
    if "before" in right:
        pair = (right["before"], right["after"])
        tables["nn_vs_ncm"] = build.gain_rows(pair, probes[0] if probes else None, settings)
    tables["class_relationship"], relationship = build.relationship_rows(inputs)
    tables["feature_movement"], tables["class_mean_movement"] = build.movement_rows(inputs)
    _explain_gaps(inputs, skipped)
    return Diagnosis(
        _verdict(inputs, right, probes, gammas, curves, settings),
        {name: rows for name, rows in tables.items() if rows},
        gammas,
        curves,
        inputs,
        settings,
        notes,
        skipped,
        [dict(record) for record in epochs or ()],
        relationship,
        margin,
    )


def _given(record: Calibration, inputs: Inputs) -> Gamma:
    """The gamma of a fitted record, which must be for the same groups."""
    groups = inputs.groups
    mode = inputs.remaining if len(groups.remaining) else record.remaining_mode
    for what, ours, theirs in (
        ("other seen classes", set(groups.names(groups.seen)), set(record.seen)),
        ("other absent classes", set(groups.names(groups.absent)), set(record.absent)),
        ("another use of the remaining classes", mode, record.remaining_mode),
    ):
        if ours != theirs:
            raise UserError(f"the calibration is for {what}", where="--calibration", remedy="fit it for these groups")
    remark = NOT_DEPLOYABLE if record.oracle or record.uses_test_labels else "as given"
    name = f"calibration file ({record.method})"
    return Gamma(record.gamma, name, record.uses_absent_labels, record.uses_test_labels, remark)


def _gammas(inputs: Inputs, curve: Curve, notes: list[str], skipped: dict[str, str], known: bool) -> dict[str, Gamma]:
    from ft_calibrate.gap import GapAccumulator

    gammas: dict[str, Gamma] = {}
    if not len(inputs.groups.moved(inputs.remaining)):
        return gammas
    source = inputs.after if inputs.train is None else inputs.train
    try:
        accumulator = GapAccumulator(inputs.groups, inputs.remaining)
        accumulator.add(source.logits, source.labels)
        value = accumulator.gamma()
    except UserError as e:
        skipped["gamma_ALG"] = str(e)
    else:
        if inputs.train is not None:
            gammas["alg"] = Gamma(value, "gamma_ALG", remark="of the fine-tuning data")
        elif not known:  # no gamma that could be deployed
            absent = bool(accumulator.n_absent)
            gammas["alg-test"] = Gamma(value, "gap on test labels", absent, True, PARITY)
            notes.append(
                "No fine-tuning data were given (--train), so gamma_ALG is unknown; the average logit gap of the test "
                f"data stands in. It uses test labels{', also of absent classes,' if absent else ''} and must not be "
                "deployed."
            )
    for criterion in ("overall", "balanced", "harmonic"):
        try:
            best = curve.best(criterion)
        except UserError as e:
            skipped[f"gamma* ({criterion})"] = str(e)
            continue
        key = "oracle" if criterion == "overall" else f"oracle-{criterion}"
        gammas[key] = Gamma(best.gamma, f"gamma* ({criterion})", True, True, NOT_DEPLOYABLE, best.low, best.high)
    return gammas


def _verdict(
    inputs: Inputs, right: dict[str, Right], probes: list[Probe], gammas: dict[str, Gamma], curves: dict[str, Curve],
    settings: Settings,
) -> Verdict:  # fmt: skip
    if not len(inputs.groups.absent):
        return cannot_judge("no class is absent", steps=("Nothing to calibrate: every class is seen.",))
    order = ("alg", "given", "alg-test", "oracle")
    source = next((key for key in order if key in gammas and (key != "given" or gammas[key].deployable)), None)
    gamma = None if source is None else gammas[source].value
    has_ncm = bool(probes) and probes[0].before is not None
    if inputs.before is None:
        return cannot_judge(
            "the model before fine-tuning was not given (--before)",
            evidence="ncm" if probes else "head",
            ausuc=curves["after"].ausuc,
            acc_uu=float(np.nanmean(right["after"]["U/U"])) if not np.isnan(right["after"]["U/U"]).all() else None,
            gamma=gamma,
            gamma_source=source,
        )
    if gamma is None or source is None:
        return cannot_judge("no gamma can be computed on the curve")
    features = (probes[0].before, probes[0].after) if has_ncm else (right["before"], right["after"])
    assert features[0] is not None
    calibrated = inputs.right(inputs.shifted(gamma))
    competing = len(inputs.groups.columns(inputs.remaining))
    return judge(
        right["before"]["U/Y"],
        right["after"]["U/Y"],
        calibrated["U/Y"],
        features[0]["U/U"],
        features[1]["U/U"],
        evidence="ncm" if has_ncm else "head",
        gamma=gamma,
        gamma_source=source,
        order_before=right["before"]["U/U"] if has_ncm else None,
        order_after=right["after"]["U/U"] if has_ncm else None,
        chance=1 / competing,
        overall_after=right["after"]["Y/Y"],
        overall_calibrated=calibrated["Y/Y"],
        n_bootstrap=settings.n_bootstrap,
        seed=settings.seed,
    )


def _explain_gaps(inputs: Inputs, skipped: dict[str, str]) -> None:
    if inputs.before is None:
        skipped["nn_vs_ncm"] = "needs the model before fine-tuning (--before)"
    if inputs.head_after is None:
        skipped["head_norms"] = "needs head weights (--model-after, and --model-before to compare)"
    if inputs.head_before is None or inputs.head_after is None:
        skipped["class_relationship"] = "needs both heads (--model-before and --model-after)"
