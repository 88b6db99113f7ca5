"""The benchmark compares equal maps, says what it left out, and leaves nothing behind."""

from __future__ import annotations

import json

import pytest
import torch
from finecam import bench, bench_contenders
from finecam.bench import run_bench, tables
from finecam.bench_contenders import PEERS, build_model, missing, peak_memory
from vfm_core.errors import UserError

INSTALLED = [peer for peer in PEERS if missing(peer, "gradcam") is None]


def test_speed_compares_equal_maps(tmp_path):
    result = run_bench(tmp_path, models=["test_resnet", "test_vit"], methods=["layercam"], batch_sizes=[2], repeats=1,
                       sections=["speed", "strengths"])  # fmt: skip
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    names = {row["contender"] for row in result["speed"]}
    assert names == {"forward", "finecam", "finecam, channels last", *INSTALLED}
    for row in result["speed"]:
        assert row["ms"] > 0 and row["batch"] == 2 and row["layer"] in ("layer4.0", "blocks.5.norm1")
        if row["contender"] in INSTALLED:
            assert row["max_difference"] < 1e-3, "a faster wrong map is no result"
    assert {row["strengths"] for row in result["strengths"]} == {6}
    assert [title for title, _ in tables(result)][:2] == [
        "one map per image: milliseconds per batch, ratio = theirs / ours",
        "6 strengths of the same image",
    ]


@pytest.mark.skipif("grad-cam" not in INSTALLED, reason="grad-cam is not installed (extra: finecam[bench])")
def test_six_strengths_are_far_faster_than_six_calls():
    """A floor far below what is measured, so that a busy machine does not fail it."""
    rows = run_bench(models=["test_vit"], methods=["gradcam"], batch_sizes=[1], repeats=5, sections=["strengths"])
    ratios = {row["contender"]: row["ratio"] for row in rows["strengths"]}
    assert ratios["grad-cam"] > 3


def test_absent_peers_are_left_out_with_a_message(monkeypatch):
    monkeypatch.setattr(bench_contenders, "find_spec", lambda name: None)
    result = run_bench(models=["test_resnet"], methods=["gradcam"], batch_sizes=[1], repeats=1, sections=["speed"])
    assert {row["contender"] for row in result["speed"]} == {"forward", "finecam", "finecam, channels last"}
    assert result["skipped"] == [f"{peer} is not installed (pip install finecam[bench])" for peer in sorted(PEERS)]
    assert tables(result)[-1][0] == "left out"
    monkeypatch.undo()
    if "torchcam" in INSTALLED:
        assert missing("torchcam", "scorecam") == "torchcam has no FinerCAM on scorecam"


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    small, large = (peak_memory("finecam", "test_resnet", "gradcam", batch) for batch in (1, 64))
    assert 0 <= small < large < 2000
    with pytest.raises(RuntimeError, match="memory measurement of finecam failed"):
        peak_memory("finecam", "no_such_model", "gradcam", 1)


def test_growth_has_a_slope():
    rows = run_bench(models=["test_vit"], methods=["gradcam"], batch_sizes=[4], repeats=1, sections=["growth"])[
        "growth"
    ]
    assert [row["over"] for row in rows] == ["images", "strengths"]
    assert set(rows[0]["ms"]) == {1, 2, 4} and set(rows[1]["ms"]) == {1, 2, 6, 21}
    assert tables({"growth": rows, "skipped": []})[0][1][0]["ms"].startswith("1: ")
    assert rows[1]["ms"][21] < 21 * rows[1]["ms"][1], "a sweep is not paid per strength"


def test_folder_profiles_its_stages():
    from finecam import products, streaming

    before = streaming.Worker.decode, streaming.store, products.store_maps
    (row,) = bench._folder("tiny:cnn", 5, "cpu")
    assert row["images"] == 5 and row["images_per_s"] > 0
    assert all(row[f"{stage}_ms"] > 0 for stage in ("decode", "explain", "draw", "write"))
    assert before == (streaming.Worker.decode, streaming.store, products.store_maps)


@pytest.mark.slow
def test_traits_are_ranked_faster_than_by_forward_passes():
    (row,) = bench._traits("cpu")
    assert row["trials"] == 78 and row["same_order"] and row["ratio"] > 10


def test_models_are_seeded_and_global_randomness_is_untouched():
    before = torch.random.get_rng_state()
    one, two = (build_model("test_resnet")[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["no_such_model"], "sections": ["speed"]}, "unknown timm model"),
        ({"sections": ["sped"]}, "unknown section"),
        ({"repeats": 0}, "nothing to time"),
        ({"batch_sizes": [0]}, "nothing to time"),
        ({"models": []}, "nothing to time"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        run_bench(**options)
