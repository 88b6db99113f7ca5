"""Every figure: drawn from its material, absent without it, the same colours, and never with global state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from ft_calibrate import figure_style, figures, figures_features
from ft_calibrate.analyses_features import DISTANCES, MOVEMENTS
from ft_calibrate.diagnosis import Diagnosis, diagnose
from ft_calibrate.diagnosis_report import FIGURES
from ft_calibrate.figure_style import COLOURS, errors, save_png, wilson_band
from ft_calibrate.tables import LogitTable
from ft_calibrate.toys import run_toy
from matplotlib.colors import to_hex
from PIL import Image

K = 8


def _table(seed: int, lowered: float) -> LogitTable:
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(K), 12)
    f = np.eye(K, 10)[y] + 0.35 * np.random.default_rng(5).normal(size=(len(y), 10)) + 0.1 * rng.normal(size=(96, 10))
    z = f[:, :K] * 8
    z[:, 4:] -= lowered
    return LogitTable(z, [f"c{i}" for i in range(K)], y, f, [str(i) for i in range(len(y))])


def epochs() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    names = [f"distance/{k}" for k in DISTANCES] + [f"movement/{k}" for k in MOVEMENTS]
    names += [f"head_norm/{g}" for g in "SU"] + [f"margin/test/{k}" for k in ("true", "largest_other", "margin")]
    names += [f"logit_scale/test/{k}" for k in ("non_gt_S", "non_gt_U", "max_S", "max_U", "softmax_S")]
    return [{"epoch": e} | {name: float(rng.random()) for name in names} for e in range(4)]


def make(**more: Any) -> Diagnosis:
    head = np.random.default_rng(0).normal(size=(K, 10))
    given: dict[str, Any] = {"before": _table(0, 0.0), "head_before": head, "head_after": head + 0.1 * head[::-1]}
    after = _table(1, 4.0)
    train = after.subset(np.flatnonzero(after.labels < 4))  # type: ignore[operator]
    return diagnose(after, ["c0", "c1", "c2", "c3"], n_bootstrap=50, **given | {"train": train} | more)


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return make()


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure_style, "DPI", 70)


def draw(name: str) -> Callable[[Diagnosis], Any]:
    if name == "tsne.png":
        return lambda d: figures_features.projection_figure(d, "pca")
    return FIGURES[name][0]


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_is_drawn_and_readable(name: str, diagnosis: Diagnosis, tmp_path: Path) -> None:
    figure = draw(name)(diagnosis)
    path = save_png(figure, tmp_path / name)
    with Image.open(path) as image:
        assert image.width > 250 and len(np.unique(np.asarray(image.convert("L")))) > 20
    for ax in figure.axes:
        assert ax.get_title(loc="left") or ax.get_label() == "<colorbar>"


def test_the_same_diagnosis_gives_the_same_bytes(diagnosis: Diagnosis, tmp_path: Path) -> None:
    paths = [save_png(draw("head_norms.png")(diagnosis), tmp_path / f"{i}.png") for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_figures_with_epochs_have_their_series() -> None:
    logged = make(epochs=epochs())
    for name, panels in (("logit_gap.png", 5), ("margin.png", 2), ("head_norms.png", 2), ("feature_movement.png", 6)):
        figure = draw(name)(logged)
        assert len(figure.axes) == panels
        assert any("epochs" in ax.get_xlabel() for ax in figure.axes)
    mass = next(ax for ax in draw("logit_gap.png")(logged).axes if "Softmax mass" in ax.get_title(loc="left"))
    assert list(mass.lines[0].get_ydata()) == [e["logit_scale/test/softmax_S"] for e in epochs()]
    lines = [line for ax in draw("feature_movement.png")(logged).axes[:4] for line in ax.lines]
    assert len(lines) == 16


def test_groups_have_one_colour_everywhere(diagnosis: Diagnosis) -> None:
    """Whatever a legend or label calls seen (absent) is drawn in the colour of S (U)."""
    found = 0
    for name in FIGURES:
        for ax in draw(name)(diagnosis).axes:
            handles, labels = ax.get_legend_handles_labels()
            for handle, label in zip(handles, labels):
                group = "S" if "(S)" in label or "seen samples" in label else "U" if "(U)" in label else None
                if group is None:
                    continue
                artist = handle[0] if isinstance(handle, tuple) else handle
                artist = artist[0] if hasattr(artist, "__len__") else artist
                colour = artist.get_facecolor() if hasattr(artist, "get_facecolor") else artist.get_color()
                colour = colour[0] if np.ndim(colour) == 2 else colour
                assert to_hex(colour) == COLOURS[group], (name, label)
                found += 1
    assert found >= 12


def test_figures_without_material_are_left_out() -> None:
    after = _table(1, 4.0)
    bare = LogitTable(after.logits, after.classes, after.labels)
    alone = diagnose(bare, ["c0", "c1", "c2", "c3"], n_bootstrap=50)
    drawn = {name for name in FIGURES if draw(name)(alone) is not None}
    assert drawn == {"curve.png", "absent_among_absent.png", "logit_gap.png", "margin.png"}
    only_seen = bare.subset(slice(0, 48))
    empty = diagnose(only_seen, ["c0", "c1", "c2", "c3"], n_bootstrap=50)
    assert {name for name in FIGURES if draw(name)(empty) is not None} == {"logit_gap.png"}


def test_drawing_touches_no_global_state(diagnosis: Diagnosis) -> None:
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    figures.curve_figure(diagnosis)
    figures_features.projection_figure(diagnosis, "pca")
    assert dict(matplotlib.rcParams) == before and plt.get_fignums() == []


def test_remaining_classes_have_their_own_block() -> None:
    kept = make(absent=["c4", "c5"], remaining="keep")
    figure = figures_features.cosine_figure(kept)
    assert figure is not None
    assert [t.get_text().split("\n")[0] for t in figure.axes[0].get_xticklabels()] == [
        "seen (S)", "absent (U)", "remaining (R)",
    ]  # fmt: skip


def test_toys_are_drawn(tmp_path: Path) -> None:
    figure = figures_features.toy_figure(run_toy(n=20, steps=20))
    assert len(figure.axes) == 3 and save_png(figure, tmp_path / "toy.png").stat().st_size > 10_000


def test_error_bars_and_bands() -> None:
    np.testing.assert_allclose(errors([(0.5, 0.4, 0.7), (np.nan, np.nan, np.nan)]), [[0.1, 0], [0.2, 0]])
    from vfm_core.metrics import wilson_interval

    low, high = wilson_band([0.3, 1.0], 40)
    for i, k in enumerate((12, 40)):
        expected = wilson_interval(k, 40)
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high), abs=1e-4)


@pytest.mark.filterwarnings("error")
def test_a_head_that_did_not_move_is_drawn_without_numbers() -> None:
    """Frozen heads have changes of length zero: no cosine, no bar, no warning."""
    head = np.eye(K, 10)
    frozen = make(head_before=head, head_after=head)
    figure = figures_features.cosine_figure(frozen)
    assert figure is not None and not figure.axes[1].texts
    assert frozen.relationship is not None and np.isnan(frozen.relationship.within_U)


def test_lines_of_the_curve_reach_both_ends_of_the_gamma_axis() -> None:
    after = _table(1, 30.0)  # margins far above 0, where the axis begins
    figure = figures.curve_figure(diagnose(after, ["c0", "c1", "c2", "c3"], n_bootstrap=50))
    assert figure is not None
    right = figure.axes[1]
    low, high = right.get_xlim()
    lines = [line for line in right.lines if len(line.get_xdata()) > 2]
    assert low < 0 and len(lines) == 3
    for line in lines:
        assert line.get_xdata()[0] == pytest.approx(low) and line.get_xdata()[-1] == pytest.approx(high)
        assert np.isfinite(line.get_ydata()).all()
