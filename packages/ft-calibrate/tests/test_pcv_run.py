"""PCV by retraining: the paper's definition, never a label of U, and folds that survive anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ft_calibrate.curve import seen_unseen_curve
from ft_calibrate.extraction import predict_table
from ft_calibrate.gap import average_logit_gap
from ft_calibrate.pcv_folds import plan_folds, settings_of
from ft_calibrate.pcv_run import pcv_by_retraining
from ft_calibrate.recipes import fine_tune
from ft_calibrate.target_data import TargetData, named, target_data
from torch import Tensor, nn
from vfm_core.errors import UserError

K, D, SEEN = 8, 6, [0, 1, 2, 3]
FAST: dict[str, Any] = {"epochs": 2, "lr": 0.1, "batch_size": 8}


def blobs(classes: list[int], n: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian classes in R^6."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(K, D, generator=torch.Generator().manual_seed(99)) * 2
    y = torch.tensor(classes).repeat_interleave(n)
    return centres[y] + torch.randn(len(y), D, generator=g), y


def net(seed: int = 0) -> nn.Module:
    """A two-layer classifier that knows all classes a little."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(D, 12), nn.ReLU(), nn.Linear(12, K))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


def seen_data() -> TargetData:
    return target_data(blobs(SEEN), [str(i) for i in range(K)])


# ---------------------------------------------------------------------------------------------------------------- plans
def test_a_fold_halves_the_seen_classes_and_sweeps_on_rows_its_model_never_saw() -> None:
    data = seen_data()
    for plan in plan_folds(data, ["0", "1", "2", "3"], 3, val_share=0.2, seed=0):
        assert len(plan.pseudo_seen) == len(plan.pseudo_absent) == 2
        assert {*plan.pseudo_seen, *plan.pseudo_absent} == {"0", "1", "2", "3"}
        train, val = data.columns[plan.train_rows], data.columns[plan.val_rows]
        assert {str(c) for c in train} == set(plan.pseudo_seen)
        assert not set(plan.train_rows) & set(plan.val_rows)
        for name in plan.pseudo_seen:
            assert (train == int(name)).sum() == 8 and (val == int(name)).sum() == 2
        for name in plan.pseudo_absent:  # all of them, not a held-out share
            assert (val == int(name)).sum() == 10


def test_a_fold_does_not_depend_on_how_many_there_are() -> None:
    few, many = (plan_folds(seen_data(), ["0", "1", "2", "3"], n, seed=3) for n in (2, 4))
    for a, b in zip(few, many, strict=False):
        assert a.pseudo_seen == b.pseudo_seen
        np.testing.assert_array_equal(a.train_rows, b.train_rows)


def test_rows_of_absent_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"rows outside the seen classes in training data: 6; drop those rows"):
        pcv_by_retraining(net(), blobs([*SEEN, 6]), SEEN, **FAST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_share": 1.0}, "share out of range in val_share: 1.0"),
        ({"folds": 0}, "no fold in folds: 0"),
        ({"fold": 3}, "no such fold in fold: 3; use 0..2"),
        ({"recipe": "oracle-ft"}, "recipe uses absent classes"),
        ({"recipe": "oracle-ft + swa"}, "recipe uses absent classes"),
        ({"merge": True}, "nothing to merge"),
        ({"merge": True, "overwrite": True, "out": "unused"}, "forget the folds or merge them"),
        ({"executor": "slurm"}, "unknown executor"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pcv_by_retraining(net(), blobs(SEEN), SEEN, **FAST, **options)


def test_one_sample_per_class_is_too_few() -> None:
    with pytest.raises(UserError, match="too few samples for a pseudo split"):
        pcv_by_retraining(net(), blobs(SEEN, n=1), SEEN, **FAST)


# ----------------------------------------------------------------------------------------------------------- definition
def test_gamma_is_the_mean_of_the_best_gammas_of_models_retrained_by_hand() -> None:
    data, source = seen_data(), named(net())
    gammas, ratios = [], []
    for plan in plan_folds(data, ["0", "1", "2", "3"], 2, seed=1):
        train, val = data.take(plan.train_rows), data.take(plan.val_rows)
        run = fine_tune(net(), train.rows, plan.pseudo_seen, "ft", seed=1, **FAST)
        z = predict_table(run.classifier, val.rows).logits
        columns: dict[str, Any] = {"classes": source.class_names, "remaining": "exclude"}
        groups: Any = (list(plan.pseudo_seen), list(plan.pseudo_absent))
        gammas.append(seen_unseen_curve(z, val.columns, *groups, **columns).best("balanced").gamma)
        own = predict_table(run.classifier, train.rows).logits
        ratios.append(gammas[-1] / average_logit_gap(own, train.columns, *groups, **columns))
    found = pcv_by_retraining(net(), blobs(SEEN), SEEN, folds=2, seed=1, gamma_alg=5.0, **FAST)
    assert found.pcv.per_fold == pytest.approx(gammas, abs=1e-5)
    assert found.pcv.gamma == pytest.approx(np.mean(gammas), abs=1e-5)
    assert found.ratio is not None and found.ratio.multipliers == pytest.approx(ratios, rel=1e-4)
    assert found.ratio.gamma == pytest.approx(5.0 * np.mean(ratios), rel=1e-4)


def test_without_gamma_alg_the_full_model_is_trained_for_it(tmp_path: Path) -> None:
    found = pcv_by_retraining(net(), blobs(SEEN), SEEN, folds=1, out=tmp_path, **FAST)
    run = fine_tune(net(), blobs(SEEN), SEEN, "ft", seed=0, **FAST)
    table = predict_table(run.classifier, blobs(SEEN))
    assert found.ratio is not None
    assert found.ratio.gamma_alg == pytest.approx(average_logit_gap(table.logits, table.labels, SEEN), rel=1e-5)


def test_the_global_random_state_and_the_model_stay() -> None:
    model, before = net(), torch.get_rng_state()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    pcv_by_retraining(model, blobs(SEEN), SEEN, folds=1, gamma_alg=1.0, **FAST)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_source_floor_is_what_the_source_model_reaches_on_the_pseudo_absent_classes(tmp_path: Path) -> None:
    model = net()
    found = pcv_by_retraining(
        model, blobs(SEEN), SEEN, folds=2, criterion="source-floor", gamma_alg=1.0, out=tmp_path, **FAST
    )
    data = seen_data()
    for fold, plan in zip(found.folds, plan_folds(data, ["0", "1", "2", "3"], 2), strict=True):
        val = data.take(plan.val_rows)
        z = predict_table(named(model), val.rows).logits[:, SEEN]  # among the columns of S, as the sweep
        absent = np.isin(val.columns, [int(name) for name in plan.pseudo_absent])
        assert fold.floor == pytest.approx((z.argmax(1) == val.columns)[absent].mean())
    # Another criterion reads the same folds: nothing is trained again, and the floor is forgotten.
    again = pcv_by_retraining(model, blobs(SEEN), SEEN, folds=2, gamma_alg=1.0, out=tmp_path, **FAST)
    assert again.folds[0].floor is None and again.pcv.criterion == "balanced"


def test_columns_all_lets_the_true_absent_classes_compete() -> None:
    kwargs: dict[str, Any] = {"folds": 1, "gamma_alg": 1.0, **FAST}
    model = net()
    with torch.no_grad():
        list(model.parameters())[-1][4:] += 8  # U outweighs the rest: the pseudo-absent classes need less
    pseudo, everything = (pcv_by_retraining(model, blobs(SEEN), SEEN, columns=c, **kwargs) for c in ("pseudo", "all"))
    np.testing.assert_array_equal(pseudo.folds[0].logits, everything.folds[0].logits)
    fold = everything.folds[0]
    rest = sorted({str(i) for i in range(K)} - set(fold.pseudo_seen))
    curve = seen_unseen_curve(fold.logits, fold.labels, list(fold.pseudo_seen), rest)
    assert everything.pcv.gamma == pytest.approx(curve.best("balanced").gamma)
    assert everything.pcv.gamma != pseudo.pcv.gamma
    assert everything.ratio is None  # U lies above S: no positive gap to scale; plain PCV does not care


def test_the_report_keeps_folds_apart_and_draws_steps() -> None:
    from ft_calibrate.groups import class_groups
    from ft_calibrate.pcv import GammaEstimate
    from ft_calibrate.pcv_job import _by_fold, _curves

    found = pcv_by_retraining(net(), blobs(SEEN), SEEN, folds=2, gamma_alg=5.0, **FAST)
    figure = _curves(found, class_groups(K, SEEN))
    drawn = [line.get_drawstyle() for line in figure.axes[0].lines if len(line.get_xdata()) > 2]  # type: ignore[arg-type]
    assert drawn == ["steps-mid"] * 4
    assert found.ratio is not None and found.ratio.gammas == tuple(5.0 * m for m in found.ratio.multipliers)
    assert found.pcv.gammas == found.pcv.per_fold
    one = GammaEstimate(6.0, "ratio-pcv", "balanced", (3.0,), 0.0, None, "pseudo", (2.0,), 3.0, ("0: no gap",))
    numbers = _by_fold([found.pcv, one], found.folds)
    assert numbers["0"] == {"gamma by pcv": found.pcv.per_fold[0]}
    assert numbers["1"] == {"gamma by pcv": found.pcv.per_fold[1], "gamma by ratio-pcv": 6.0, "gamma / ALG": 2.0}


# --------------------------------------------------------------------------------------------------------- interruption
def test_a_stopped_run_keeps_its_finished_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs: dict[str, Any] = {"folds": 3, "gamma_alg": 2.0, **FAST}
    whole = pcv_by_retraining(net(), blobs(SEEN), SEEN, **kwargs)
    import ft_calibrate.recipes

    real, calls = ft_calibrate.recipes.fine_tune, []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(Path(options["out"]).parent.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(ft_calibrate.recipes, "fine_tune", counted)
    with pytest.raises(KeyboardInterrupt):
        pcv_by_retraining(net(), blobs(SEEN), SEEN, out=tmp_path, **kwargs)
    resumed = pcv_by_retraining(net(), blobs(SEEN), SEEN, out=tmp_path, **kwargs)
    assert calls == ["fold-0", "fold-1", "fold-1", "fold-2"]
    assert resumed.pcv == whole.pcv and resumed.ratio == whole.ratio
    pcv_by_retraining(net(), blobs(SEEN), SEEN, out=tmp_path, **kwargs)
    assert len(calls) == 4
    pcv_by_retraining(net(), blobs(SEEN), SEEN, out=tmp_path, overwrite=True, **kwargs)
    assert len(calls) == 7


def test_folds_of_separate_jobs_merge_to_the_same(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"folds": 2, "gamma_alg": 2.0, **FAST}
    whole = pcv_by_retraining(net(), blobs(SEEN), SEEN, **kwargs)
    first = pcv_by_retraining(net(), blobs(SEEN), SEEN, out=tmp_path, fold=1, **kwargs)
    assert first.pcv.per_fold == whole.pcv.per_fold[1:]
    with pytest.raises(UserError, match=r"folds are missing in .*: 0; run them with --fold"):
        pcv_by_retraining(net(), blobs(SEEN), SEEN, out=tmp_path, merge=True, **kwargs)
    pcv_by_retraining(net(), blobs(SEEN), SEEN, out=tmp_path, fold=0, **kwargs)
    merged = pcv_by_retraining(net(), blobs(SEEN), SEEN, out=tmp_path, merge=True, **kwargs)
    assert merged.pcv == whole.pcv and merged.ratio == whole.ratio


def test_merging_trains_nothing_and_reads_a_full_model_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ft_calibrate.recipes

    kwargs: dict[str, Any] = {"folds": 2, "out": tmp_path, **FAST}
    for fold in range(2):
        pcv_by_retraining(net(), blobs(SEEN), SEEN, fold=fold, **kwargs)

    def no_training(*args: Any, **options: Any) -> Any:
        raise AssertionError("trained")

    with monkeypatch.context() as patched:
        patched.setattr(ft_calibrate.recipes, "fine_tune", no_training)
        merged = pcv_by_retraining(net(), blobs(SEEN), SEEN, merge=True, **kwargs)
    assert merged.ratio is None and not (tmp_path / "full").exists()
    whole = pcv_by_retraining(net(), blobs(SEEN), SEEN, **kwargs)
    monkeypatch.setattr(ft_calibrate.recipes, "fine_tune", no_training)
    again = pcv_by_retraining(net(), blobs(SEEN), SEEN, merge=True, **kwargs)
    assert again.ratio is not None and again.ratio == whole.ratio and again.pcv == merged.pcv


def test_a_single_fold_trains_no_full_model(tmp_path: Path) -> None:
    found = pcv_by_retraining(net(), blobs(SEEN), SEEN, folds=2, fold=0, out=tmp_path, **FAST)
    assert found.ratio is None and sorted(p.name for p in tmp_path.iterdir()) == ["fold-0"]


def test_a_folder_of_other_settings_is_refused_with_the_difference(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"folds": 1, "gamma_alg": 2.0, "out": tmp_path}
    pcv_by_retraining(net(), blobs(SEEN), SEEN, **kwargs, **FAST)
    with pytest.raises(UserError, match=r"changed configuration.*lr = 0.1 -> 0.2"):
        pcv_by_retraining(net(), blobs(SEEN), SEEN, **kwargs, **{**FAST, "lr": 0.2})


def test_settings_name_functions_and_describe_objects() -> None:
    from ft_calibrate.augment import Augmentation

    found = settings_of({"lr": 0.1, "device": "cuda", "augment": Augmentation(size=32), "transform": blobs})
    assert found["augment"]["size"] == 32 and found["transform"] == "blobs" and "device" not in found
    assert json.dumps(found)


GLYPHS = "tinyworld:glyphs?domain=target&split=train&n=8"


def test_killed_from_outside_and_resumed_gives_the_same(tmp_path: Path) -> None:
    """Kill -9 the command after its first fold; the same call finishes with the result of an unbroken run."""
    from ft_calibrate.classifier import load_classifier
    from ft_calibrate.pcv_job import pcv_of_run
    from vfm_core.data import open_dataset

    data = open_dataset(GLYPHS)
    rows = data.subset(np.flatnonzero(np.asarray(data.labels) < 6))
    model = load_classifier("tiny:glyph-cnn")
    fine_tune(model, rows, list(range(6)), "ft", epochs=4, lr=0.05, batch_size=16, out=tmp_path / "ft")
    command = [sys.executable, "-m", "ft_calibrate", "pcv", "--model", str(tmp_path / "ft"), "--data", GLYPHS]
    out = tmp_path / "pcv"
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # the last digits depend on it
    process = subprocess.Popen([*command, "--out", str(out), "--quiet"], start_new_session=True, env=env)
    try:
        deadline = time.monotonic() + 120
        while not (out / "fold-0" / "fold.npz").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = {p: p.stat().st_mtime_ns for p in out.glob("fold-*/fold.npz")}
    resumed = pcv_of_run(tmp_path / "ft", data, out=out)
    whole = pcv_of_run(tmp_path / "ft", data, out=tmp_path / "whole")
    assert resumed.result.pcv == whole.result.pcv and resumed.result.ratio == whole.result.ratio
    assert all(p.stat().st_mtime_ns == before for p, before in finished.items())
    files = [(path / "calibration.json").read_text() for path in (out, tmp_path / "whole")]
    assert files[0] == files[1] and json.loads(files[0])["uses_absent_labels"] is False
