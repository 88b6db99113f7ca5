from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import meda_kv.bench as bench_module
import pytest
from meda_kv.bench import SECTIONS, run_bench
from meda_kv.benchmark.caches import parse_arm
from meda_kv.benchmark.memory import measure_memory
from meda_kv.benchmark.overhead import measure_overhead
from meda_kv.benchmark.rows import FIELDS
from meda_kv.benchmark.subjects import bench_prompt, load_subject
from meda_kv.benchmark.timing import Clock
from meda_kv.cli import app
from meda_kv.cli.bench import _tokens
from typer.testing import CliRunner
from vfm_core.errors import UserError

TINY = "tiny?random=1&hidden=32&layers=2&heads=4&kv_heads=2"
SMALL: dict[str, Any] = {
    "models": (TINY,),
    "contexts": (128, 256),
    "ratios": (1.0, 0.5, 0.2),
    "methods": ("meda",),
    "overhead_methods": ("meda?merge=none&score_queries=window:16",),
    "prefill_limit": 128,
    "rounds": 2,
    "steps": 2,
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench")
    return out, run_bench(out, **SMALL)


def test_every_row_has_the_fields_and_real_bytes(ran: tuple[Path, dict[str, Any]]) -> None:
    out, result = ran
    written = json.loads((out / "bench.json").read_text())
    assert {"env", "rows"} <= set(written) and len(written["rows"]) == len(result["rows"])
    assert all(set(FIELDS) <= set(row) for row in written["rows"])
    slot = 2 * 2 * 2 * 8 * 4
    rows = {(row["method"], row["ratio"], row["context"]): row for row in result["rows"]}
    stock, arm = rows["stock", 1.0, 128], rows["meda", 0.2, 128]
    assert stock["kv_bytes"] == stock["kv_bytes_full"] == 128 * slot
    assert stock["kv_bytes_end"] == stock["kv_bytes_full_end"] == (128 + 6) * slot
    assert {row["kv_bytes_full"] for row in result["rows"] if row["context"] == 128} == {128 * slot}, "one meaning"
    assert all(row["prefill_s"] for row in result["rows"] if row["context"] == 128)
    compressed = [row for row in result["rows"] if row["context"] == 128 and row["method"].startswith("meda")]
    assert {(row["method"], row["ratio"]) for row in compressed if row["overhead_s"] is not None} == {
        ("meda", 0.5),
        ("meda", 0.2),
        (SMALL["overhead_methods"][0], 0.2),
    }
    assert all(row["kv_bytes"] and row["prompt_share"] for row in compressed)
    assert all(row["peak_bytes"] for row in compressed if row["method"] == "meda")
    assert stock["prefill_s"] > 0 and stock["peak_bytes"] > 128 * slot
    # 26 of 128 tokens per layer on average, and what was generated; the rest of the bytes is spare room and positions.
    assert arm["slots"] == pytest.approx(round(0.2 * 2 * 128) / 2 + 6)
    assert arm["prompt_share"] == pytest.approx(0.2, rel=0.01)
    assert 26 * slot <= arm["kv_bytes"] and (26 + 6) * slot <= arm["kv_bytes_end"]
    assert rows["full", 1.0, 128]["decode_ms_per_token"] > 0
    assert rows["trim", 0.5, 256]["slots"] == 128 + 6


def test_read_and_filled_contexts_are_told_apart(ran: tuple[Path, dict[str, Any]]) -> None:
    _, result = ran
    timed = [row for row in result["rows"] if row["decode_ms_per_token"] is not None]
    assert {row["context"]: row["kv"] for row in timed} == {128: "read", 256: "filled", 1024: "filled"}
    assert {row["method"] for row in timed if row["context"] == 256} == {"stock", "full", "trim", "any"}
    assert {row["method"] for row in timed if row["context"] == 1024} == {"stock", "full"}, "for the cost line"
    assert any("1024 tokens were decoded as well" in note for note in result["notes"])
    told = [row["limit"] for row in timed if row.get("limit") is not None]
    assert all(limit >= 1 for limit in told) and (told or any("no limit is told" in note for note in result["notes"]))
    assert all(low <= middle <= high for row in timed for middle, low, high in [row["speed_vs_stock"]])


def test_report_and_reasons(ran: tuple[Path, dict[str, Any]]) -> None:
    out, result = ran
    assert "kvpress: no --peer-python was given" in result["skipped"]
    assert "of limit" in (out / "report.html").read_text(encoding="utf-8")


def test_the_same_command_again_measures_nothing(
    ran: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = ran

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("measured again")

    for name in ("measure_decode", "measure_overhead", "measure_memory"):
        monkeypatch.setattr(bench_module, name, refuse)
    again = run_bench(out, **SMALL)
    assert again["rows"] == json.loads(json.dumps(result["rows"]))
    with pytest.raises(UserError, match=r"rounds = 2 -> 3"):
        run_bench(out, **{**SMALL, "rounds": 3})


def test_an_interrupted_run_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def stand_in(subject: Any, prompt: Any, arms: Any, ratios: Any, **options: Any) -> list[dict[str, Any]]:
        n = int(prompt.ids.shape[1])
        if n == 256 and not seen.count(256):
            seen.append(n)
            raise KeyboardInterrupt
        seen.append(n)
        timed = {"decode_ms_per_token": 1.0 + n, "slots": n, "kv_bytes": n, "kv_bytes_full": n, "generated": 6}
        timed |= {"kv_bytes_end": n + 6, "kv_bytes_full_end": n + 6}
        return [{"model": TINY, "context": n, "method": "full", "ratio": 1.0, "kv": "read", **timed}]

    monkeypatch.setattr(bench_module, "measure_decode", stand_in)
    options = {**SMALL, "sections": ("decode",)}
    with pytest.raises(KeyboardInterrupt):
        run_bench(tmp_path, **options)
    result = run_bench(tmp_path, **options)
    assert seen == [128, 256, 256, 1024]
    assert [row["context"] for row in result["rows"]] == [128, 256, 1024]
    assert result["lines"][TINY]["full"]["b"] == pytest.approx(1e-3)


def test_a_prompt_too_short_for_a_ratio_is_left_out_with_the_reason(tmp_path: Path) -> None:
    options = {**SMALL, "contexts": (64,), "ratios": (1.0, 0.5, 0.05), "prefill_limit": 256}
    result = run_bench(tmp_path, **{**options, "sections": ("decode",)})
    assert {(row["method"], row["ratio"]) for row in result["rows"] if row["context"] == 64} == {
        ("stock", 1.0),
        ("full", 1.0),
        ("trim", 0.5),
        ("trim", 0.05),
        ("meda", 0.5),
    }
    assert any("0.05" in reason for reason in result["skipped"])
    assert any("--floor" in reason for reason in result["skipped"])
    assert {row["context"] for row in result["rows"]} == {64, 256, 1024}, "one context alone gets two more"
    assert TINY in result["lines"]


def test_the_peak_is_lower_when_layers_are_compressed_while_reading() -> None:
    subject = load_subject("tiny?random=1&hidden=32&layers=6&heads=4&kv_heads=4", device="cpu")
    arm = parse_arm("meda?merge=none&score_queries=window:16")
    rows = {row["method"]: row for row in measure_memory(subject, bench_prompt(subject, 1024), arm, 0.1)}
    stock, after = rows["stock"], rows[arm.label]
    within = rows[f"{arm.label}, by layer"]
    assert within["peak_bytes"] < 0.8 * stock["peak_bytes"]
    assert within["peak_bytes"] < after["peak_bytes"]
    assert after["kv_bytes"] < 0.5 * after["kv_bytes_full"] == 0.5 * stock["kv_bytes"]


def test_overhead_is_split_and_nothing_is_watched_without_need() -> None:
    subject = load_subject(TINY, device="cpu")
    prompt = bench_prompt(subject, 256)
    watched = measure_overhead(subject, prompt, parse_arm("h2o"), 0.2, clock=Clock("process"), rounds=2)
    blind = measure_overhead(subject, prompt, parse_arm("streaming"), 0.2, clock=Clock("process"), rounds=2)
    assert watched["watch_s"] + watched["compress_s"] == pytest.approx(watched["overhead_s"], rel=1e-6)
    assert watched["watch_s"] > 0 and blind["watch_s"] == 0
    assert watched["prompt_share"] == pytest.approx(0.2, rel=0.01) and watched["kv_bytes"] < watched["kv_bytes_full"]
    assert watched["overhead_rounds"] == 2 and watched["overhead"][0] > blind["overhead"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": ()}, "at least 64 tokens in --context: none"),
        ({"contexts": (32,)}, "at least 64 tokens in --context: 32"),
        ({"ratios": (1.2,)}, r"in \(0, 1\] in --ratio: 1.2"),
        ({"ratios": (float("nan"),)}, "in --ratio: nan"),
        ({"ratios": ()}, "in --ratio: none"),
        ({"sections": ("decod",)}, "did you mean decode"),
        ({"methods": ()}, "no method"),
        ({"methods": ("full",)}, "always measured"),
        ({"models": ("bench:mha",), "device_map": "auto"}, "nothing to spread"),
        ({"settings": {"nonsense": 1}}, "nonsense"),
        ({"preset": "papers"}, "paper"),
        ({"methods": ("medaa",)}, "meda"),
        ({"rounds": 0}, "at least 1"),
        ({"visual_share": 1.0}, "--visual-share"),
        ({"prefill_limit": 1}, "--prefill-limit"),
        ({"clock": "sundial"}, "unknown clock"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_bench(tmp_path / "out", **{**SMALL, **change})
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_token_counts_are_read() -> None:
    assert [_tokens(word, "--context") for word in ("4096", "4k", "4K", "0.5k")] == [4096, 4096, 4096, 512]
    for wrong in ("4x", "0", "-1k", "1.5", "infk", ""):
        with pytest.raises(UserError, match="in --context"):
            _tokens(wrong, "--context")


def test_the_command_line_prints_json(tmp_path: Path) -> None:
    words = [
        "bench",
        "--model",
        TINY,
        "--context",
        "64,96",
        "--ratio",
        "1,0.5",
        "--sections",
        "decode",
        "--rounds",
        "1",
    ]
    done = CliRunner().invoke(app, [*words, "--steps", "1", "--device", "cpu", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert {row["method"] for row in shown["rows"]} == {"stock", "full", "trim", "meda"}
    table = CliRunner().invoke(app, [*words, "--steps", "1", "--device", "cpu", "--out", str(tmp_path)])
    assert "what the cache weighs" in table.output and "report.html" in table.output


def test_options_of_methods_reach_the_caches(tmp_path: Path) -> None:
    options = {**SMALL, "contexts": (64,), "ratios": (1.0, 0.1), "sections": ("overhead",)}
    strict = run_bench(tmp_path / "a", **options)
    assert any("--floor" in reason for reason in strict["skipped"]) and not strict["rows"]
    shared: dict[str, Any] = {"floor": 4, "preset": "official-code", "settings": {"recent_share": 0.25}}
    loose = run_bench(tmp_path / "b", **{**options, "methods": ("h2o",), "overhead_methods": ("streaming",)}, **shared)
    assert {row["method"] for row in loose["rows"]} == {"h2o", "streaming"}
    with pytest.raises(UserError, match="preset"):
        run_bench(tmp_path / "b", **{**options, "methods": ("h2o",), "overhead_methods": ("streaming",)}, floor=4)


def test_the_default_list_has_the_methods_that_exist() -> None:
    from meda_kv.methods import METHODS

    wanted = {"snapkv", "h2o", "look-m", "pyramidkv", "streaming", "meda", "meda-no-merge", "quota"}
    listed = bench_module.known_methods()
    assert wanted <= set(listed)
    assert ("meda-fast" in listed) == ("meda-fast" in METHODS)


def test_help_lists_every_section() -> None:
    text = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "160"}).output
    assert all(section in text for section in SECTIONS) and "--peer-python" in text
