"""Files in pieces give what the whole scores give, for every method, and in bounded memory."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from ft_calibrate.applying import apply_file
from ft_calibrate.calibration import METHODS, fit_calibration
from ft_calibrate.condense import condensed_gaps, condensed_margins
from ft_calibrate.curve import margins, seen_unseen_curve
from ft_calibrate.decomposition import DecompositionAccumulator
from ft_calibrate.gamma_choices import choice_rows, choices_on, curve_picture
from ft_calibrate.gap import GapAccumulator
from ft_calibrate.groups import class_groups
from ft_calibrate.head_arrays import read_head
from ft_calibrate.metrics import accuracy_decomposition, group_intervals
from ft_calibrate.pcv import Fold
from ft_calibrate.prediction_files import SUFFIXES, read_predictions
from ft_calibrate.streaming import curve_file, fit_file, groups_of_file
from ft_calibrate.tables import LogitTable, open_table, write_table
from vfm_core.errors import UserError

K = 8
NAMES = [f"class {c}" for c in "abcdefgh"]
GROUPS = class_groups(NAMES, [0, 1, 2], [4, 5, 6, 7])  # class d (3) remains
MODES = ("absent", "keep", "exclude")
SEVEN = 7  # rows at once: no divisor of the numbers of rows


def table(n: int, labels: list[int], seed: int = 0) -> LogitTable:
    rng = np.random.default_rng(seed)
    y = rng.choice(labels, n)
    z = rng.normal(size=(n, K)).astype(np.float32)
    z[np.arange(n), np.maximum(y, 0)] += 2
    z[:, 3:] -= 2
    return LogitTable(z, NAMES, y, ids=[f"s{seed}.{i}" for i in range(n)])


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return write_table(table(60, [0, 1, 2]), tmp_path_factory.mktemp("a") / "train.npz")


@pytest.fixture(scope="module")
def test_file(tmp_path_factory):
    return write_table(table(90, [0, 1, 2, 3, 4, 5, 6, 7, -1], 1), tmp_path_factory.mktemp("b") / "test.parquet")


def folds() -> list[Fold]:
    found = []
    for r, pseudo in enumerate(([0, 1], [1, 2])):
        val, own = table(60, [0, 1, 2], 10 + r), table(40, pseudo, 20 + r)
        for part in (val, own):
            part.logits[:, [c for c in range(3) if c not in pseudo]] -= 1.5
        found.append(Fold(val.logits, val.labels, pseudo, own.logits, own.labels, [4, 5, 6, 7], 0.1, f"fold {r}"))
    return found


OPTIONS = {
    "alg": {},
    "pcv": {"folds": folds()},
    "ratio-pcv": {"folds": folds(), "criterion": "harmonic"},
    "oracle": {"criterion": "balanced", "n_bootstrap": 50},
    "fixed": {"gamma": 1.5},
    "val": {"n_bootstrap": 50},
    "rate": {"rate": 0.4},
    "prior": {},
    "weight-align": {"head_weight": np.random.default_rng(3).normal(size=(K, 4))},
    "bic": {},
    "temperature-per-group": {"criterion": "balanced"},
}


def test_every_method_is_compared():
    assert set(OPTIONS) == set(METHODS)


@pytest.mark.parametrize("remaining", MODES)
@pytest.mark.parametrize("method", OPTIONS)
def test_fit_on_pieces_is_fit_on_the_whole(method, remaining, train, test_file):
    path = test_file if method in ("oracle", "val", "rate", "bic", "temperature-per-group") else train
    whole = open_table(path).read()
    want = fit_calibration(whole.logits, whole.labels, GROUPS, method, remaining=remaining, **OPTIONS[method])
    for rows in (SEVEN, None):
        got = fit_file(open_table(path), GROUPS, method, remaining=remaining, rows=rows, **OPTIONS[method])
        for name in (f.name for f in dataclasses.fields(got)):
            if name == "chosen_on":
                assert getattr(got, name).startswith(want.chosen_on)
            elif name != "input_sha256":
                assert getattr(got, name) == getattr(want, name), name


def test_temperature_and_held_out_data(train, test_file):
    whole, held = open_table(train).read(), open_table(test_file).read()
    for extra in ({}, {"held_out": open_table(test_file)}):
        other = {"held_out": (held.logits, held.labels)} if extra else {}
        want = fit_calibration(whole.logits, whole.labels, GROUPS, "alg", temperature=True, **other)
        got = fit_file(open_table(train), GROUPS, "alg", temperature=True, **extra)
        assert (got.temperature, got.confidence, got.gamma) == (want.temperature, want.confidence, want.gamma)
    with pytest.raises(UserError, match="needs data in --temperature"):
        fit_file(open_table(train), GROUPS, "weight-align", temperature=True, **OPTIONS["weight-align"])


@pytest.mark.parametrize("remaining", MODES)
def test_condensed_problems_have_the_same_numbers(remaining, test_file):
    file, whole = open_table(test_file), open_table(test_file).read()
    z, y, small = condensed_margins(file.chunks(SEVEN), GROUPS, remaining)
    np.testing.assert_array_equal(margins(z, small, "exclude"), margins(whole.logits, GROUPS, remaining))
    one, other = seen_unseen_curve(z, y, small, remaining="exclude"), curve_file(file, GROUPS, remaining, SEVEN)
    for gamma in one.gamma.tolist():  # the other has breaks of remaining samples in between
        a, b = one.at(gamma), other.at(gamma)
        assert (a.seen, a.unseen) == (b.seen, b.unseen)
    z, y, small = condensed_gaps(file.chunks(SEVEN), GROUPS, remaining)
    real, tiny = GapAccumulator(GROUPS, remaining), GapAccumulator(small)
    real.add(whole.logits, whole.labels)
    tiny.add(z, y)
    np.testing.assert_array_equal(tiny.gaps, real.gaps)


def test_curve_and_accuracies_in_pieces(test_file):
    whole = open_table(test_file).read()
    for remaining in MODES:
        want = seen_unseen_curve(whole.logits, whole.labels, GROUPS, remaining=remaining)
        got = curve_file(open_table(test_file), GROUPS, remaining, SEVEN)
        assert got.ausuc == want.ausuc and (got.n_seen, got.n_unseen, got.n_rest) == (
            want.n_seen,
            want.n_unseen,
            want.n_rest,
        )
        for name in ("gamma", "seen", "unseen", "overall"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
        parts = DecompositionAccumulator(GROUPS, remaining)
        for piece in open_table(test_file).chunks(SEVEN):
            parts.add(piece.logits, piece.labels)
        for average in ("micro", "macro"):
            table = accuracy_decomposition(whole.logits, whole.labels, GROUPS, average=average, remaining=remaining)
            assert parts.result(average) == pytest.approx(table, rel=1e-15, nan_ok=True)
        intervals = group_intervals(whole.logits, whole.labels, GROUPS, remaining=remaining)
        got_intervals = parts.intervals()
        assert list(got_intervals) == list(intervals)
        np.testing.assert_allclose([tuple(v) for v in got_intervals.values()], [tuple(v) for v in intervals.values()])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("remaining", ["absent", "exclude"])
def test_apply_writes_what_the_python_api_predicts(tmp_path, train, test_file, suffix, remaining):
    record = fit_file(open_table(train), GROUPS, "alg", remaining=remaining)
    file = open_table(test_file, classes=record.classes)
    found = apply_file(file, record, tmp_path / f"pred{suffix}", rows=SEVEN)
    columns, facts = read_predictions(tmp_path / f"pred{suffix}")
    whole = open_table(test_file).read()
    best = record.predict(whole.logits, whole.classes)
    probabilities = record.probabilities(whole.logits.astype(float), whole.classes)
    assert columns["prediction"] == [NAMES[c] for c in best] and columns["id"] == whole.ids
    np.testing.assert_allclose(np.array(columns["confidence"], float), probabilities.max(1), rtol=1e-5)
    words = {"S": "seen", "U": "absent", "R": "remaining"}
    assert columns["group"] == [words[GROUPS.group_of[c]] for c in best]
    z = np.sort(record.apply(whole.logits.astype(float), whole.classes), axis=1)
    np.testing.assert_allclose(np.array(columns["margin"], float), z[:, -1] - z[:, -2], atol=1e-5)
    d = margins(whole.logits, GROUPS, remaining) - record.gamma
    np.testing.assert_allclose(np.array(columns["seen_minus_absent"], float), d, atol=1e-5)
    raw = whole.logits.copy()
    raw[:, GROUPS.excluded(remaining)] = -np.inf
    assert columns["uncalibrated"] == [NAMES[c] for c in raw.argmax(1)]
    assert facts["gamma"] == record.gamma and facts["method"] == "alg" and facts["uses_absent_labels"] is False
    assert found.rows == len(whole) and found.changed == int((raw.argmax(1) != best).sum()) > 0
    after = record.apply(whole.logits, whole.classes)
    assert found.after == pytest.approx(
        accuracy_decomposition(after, whole.labels, GROUPS, remaining=remaining), nan_ok=True
    )
    assert found.before == pytest.approx(
        accuracy_decomposition(raw, whole.labels, GROUPS, remaining=remaining), nan_ok=True
    )
    right = [None if y < 0 else bool(y == c) for y, c in zip(whole.labels, best)]
    texts = {None: "", True: "True", False: "False"}
    stored = columns["correct"] if suffix in (".parquet", ".feather") else [str(v) for v in columns["correct"]]
    assert stored == (right if suffix in (".parquet", ".feather") else [texts[v] for v in right])


def test_apply_without_labels_or_ids_and_failures_leave_no_file(tmp_path, train):
    record = fit_file(open_table(train), GROUPS, "fixed", gamma=2.0)
    path = write_table(LogitTable(table(5, [0]).logits, NAMES), tmp_path / "n.npz")
    found = apply_file(open_table(path), record, tmp_path / "p.csv")
    columns, _ = read_predictions(tmp_path / "p.csv")
    assert found.before is None and columns["id"] == ["0", "1", "2", "3", "4"] and "label" not in columns
    z = table(5, [0]).logits.copy()
    z[3, 0] = np.nan
    write_table(LogitTable(z, NAMES), path)
    with pytest.raises(UserError, match="NaN score"):
        apply_file(open_table(path), record, tmp_path / "q.parquet", rows=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n.npz", "p.csv", "p.csv.meta.json"]
    with pytest.raises(UserError, match="not those of the calibration"):
        apply_file(open_table(train, classes=NAMES[::-1]), record, tmp_path / "q.csv")


def test_nothing_absent_leak_and_missing_labels(tmp_path, train, test_file, caplog):
    everything = class_groups(NAMES, NAMES)
    for method in ("alg", "rate", "oracle"):
        record = fit_file(open_table(train), everything, method, rate=0.2 if method == "rate" else None)
        assert record.gamma == 0.0 and "no class is absent" in " ".join(record.notes)
    with pytest.raises(
        UserError, match=r"not seen, in data for method alg \(leak\).*class d \(\d+ rows\).*--allow-absent"
    ):
        fit_file(open_table(test_file), GROUPS, "alg")
    leaked = fit_file(open_table(test_file), GROUPS, "alg", allow_absent_labels=True)
    assert leaked.uses_absent_labels and leaked.uses_test_labels
    bare = write_table(LogitTable(table(5, [0]).logits, NAMES), tmp_path / "n.npz")
    for method in ("alg", "oracle", "val", "prior"):
        with pytest.raises(UserError, match="labels"):
            fit_file(open_table(bare), GROUPS, method)
    with pytest.raises(UserError, match="no labels to take the seen classes from"):
        groups_of_file(open_table(bare))
    assert groups_of_file(open_table(train)).names([0, 1, 2]) == NAMES[:3]
    with pytest.raises(UserError, match="unknown method"):
        fit_file(open_table(train), GROUPS, "algo")
    one = write_table(table(9, [1]), tmp_path / "one.npz")
    with pytest.raises(UserError, match=r"undefined with .*seen class.*--method rate or --method fixed"):
        fit_file(open_table(one), groups_of_file(open_table(one)), "alg")


def test_choices_on_a_curve(tmp_path, train, test_file):
    curve = curve_file(open_table(test_file), GROUPS)
    choices = choices_on(curve, "test", floor=0.2)
    rows = {row["gamma by"]: row for row in choice_rows(curve, choices)}
    assert list(rows) == ["none", "oracle", "oracle (balanced)", "oracle (harmonic)", "oracle (source-floor)"]
    assert all(
        r["note"] == "upper bound, not deployable" and r["absent labels"] == "used"
        for n, r in rows.items()
        if n != "none"
    )
    assert rows["oracle"]["gamma"] == curve.best("overall").gamma and rows["oracle"]["Y/Y"] == curve.overall.max()
    assert "oracle (source-floor)" not in [c.name for c in choices_on(curve, "test", floor=1.0)]
    picture = curve_picture(curve, choices, tmp_path / "c.png")
    assert picture is not None and picture.read_bytes()[:4] == b"\x89PNG"
    seen_only = curve_file(open_table(train), GROUPS)
    assert [c.name for c in choices_on(seen_only, "train")] == ["none"] and curve_picture(
        seen_only, [], tmp_path / "d.png"
    ) is None


@pytest.mark.parametrize("form", ["npz", "compressed", "parquet", "csv"])
def test_memory_is_bounded_by_the_piece(tmp_path, form, monkeypatch):
    monkeypatch.setattr("ft_calibrate.table_columns.CELLS", 5_000)
    n, k, rows = (8_000, 100, 250) if form != "csv" else (1_000, 100, 100)
    rng = np.random.default_rng(0)
    t = LogitTable(rng.normal(size=(n, k)).astype(np.float32), labels=rng.integers(0, 50, n))
    path = tmp_path / f"t.{'npz' if form == 'compressed' else form}"
    if form == "compressed":
        np.savez_compressed(path, logits=t.logits, labels=t.labels)
    else:
        write_table(t, path)
    size, groups = t.logits.nbytes, class_groups(k, np.arange(50))
    want = fit_calibration(t.logits, t.labels, groups, "alg").gamma
    del t
    tracemalloc.start()
    try:
        record = fit_file(open_table(path), groups, "alg", rows=rows, n_bootstrap=10)
        curve_file(open_table(path), groups, rows=rows)
        apply_file(open_table(path, classes=record.classes), record, tmp_path / "p.parquet", rows=rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert record.gamma == want
    assert peak < (0.75 * size if form != "csv" else 3 * size), f"{peak / size:.2f} of the scores"


def test_row_groups_are_let_go(tmp_path, monkeypatch):
    """Read ahead, pyarrow would keep the buffers of all row groups to the end."""
    pa = pytest.importorskip("pyarrow")
    monkeypatch.setattr("ft_calibrate.logit_table.CHUNK_NUMBERS", 50_000)
    t = LogitTable(np.random.default_rng(0).normal(size=(20_000, 50)).astype(np.float32))
    file = open_table(write_table(t, tmp_path / "t.parquet"))
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in file.chunks()]
    assert len(held) == 20 and max(held) < 0.25 * t.logits.nbytes


def test_progress_wraps_every_reading(train):
    file, told = open_table(train), []
    file.progress = lambda pieces, total: told.append(total) or pieces
    assert sum(len(piece) for piece in file.chunks(7)) == 60 and len(file.read()) == 60
    assert told == [9, 1]


def test_heads_from_files(tmp_path):
    import torch
    from safetensors.torch import save_file

    weight, bias = np.arange(6.0).reshape(3, 2), np.arange(3.0)
    np.save(tmp_path / "w.npy", weight)
    np.savez(tmp_path / "w.npz", weight=weight, bias=bias)
    state = {"conv.weight": torch.zeros(5, 2), "fc.weight": torch.tensor(weight), "fc.bias": torch.tensor(bias)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    for name in ("w.npy", "w.npz", "w.safetensors", "w.pt"):
        w, b = read_head(tmp_path / name, 3)
        np.testing.assert_array_equal(w, weight)
        assert b is None if name == "w.npy" else (b == bias).all()
    np.savez(tmp_path / "w.npz", kernel=weight)
    with pytest.raises(UserError, match="no array weight"):
        read_head(tmp_path / "w.npz")
    with pytest.raises(UserError, match="no such file in --head"):
        read_head(tmp_path / "x.npz")


def test_a_gap_of_one_half_is_no_probability(tmp_path):
    """Gaps of exactly 0.5: the condensed rows must not look like probabilities."""
    z = np.full((40, K), 2.0)
    z[:, 3:] = 1.5
    data = LogitTable(z, NAMES, np.arange(40) % 3)
    path = write_table(data, tmp_path / "half.npz")
    assert fit_file(open_table(path), GROUPS, "alg").gamma == fit_calibration(z, data.labels, GROUPS).gamma == 0.5


@pytest.mark.parametrize("method", ["alg", "ratio-pcv", "oracle"])
def test_masked_groups_are_refused_by_name(tmp_path, method):
    data = table(40, [0, 1, 2] if method != "oracle" else [0, 1, 2, 4, 5])
    data.logits[:, 3:] = -np.inf
    path = write_table(data, tmp_path / "masked.npz")
    with pytest.raises(UserError, match=r"all classes of a group are masked in .*masked\.npz"):
        fit_file(open_table(path), GROUPS, method, **OPTIONS.get(method, {}))


@pytest.mark.parametrize("remaining", MODES)
def test_the_oracle_of_a_file_is_the_best_gamma_of_its_curve(test_file, remaining):
    curve = curve_file(open_table(test_file), GROUPS, remaining)
    best = curve.best()
    found = fit_file(open_table(test_file), GROUPS, "oracle", remaining=remaining)
    assert found.details["value"] == best.value and found.gamma == pytest.approx(best.gamma, abs=1e-6)
    assert curve.at(found.gamma).overall == best.value
