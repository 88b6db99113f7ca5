from __future__ import annotations

import json
from typing import Any

import pytest
from meda_kv.benchmark.promises import promises
from meda_kv.benchmark.report import tables, write_report
from meda_kv.benchmark.rows import FIELDS, add_limits, add_peer_ratios, add_reading, cost_lines, join, slopes
from vfm_core.files import jsonable

A, B = 4e-3, 2e-6  # the invented machine: seconds of an empty step, seconds per token
CONTEXTS = (1024, 4096, 8192, 16384)


def measured(reach: float = 0.9, buffer: float = 2.0, overhead: float = 0.05) -> list[dict[str, Any]]:
    """What an invented machine would measure; `reach` is the share of the limit that ours gets at ratio 0.2."""
    rows: list[dict[str, Any]] = []
    for n in CONTEXTS:
        full = A + B * n
        limit = full / (A + B * 0.2 * n)
        common = {"model": "toy", "context": n, "kv_bytes_full": 100 * n, "generated": 48, "kv": "read"}
        stock = {"method": "stock", "ratio": 1.0, "decode_ms_per_token": 1000 * buffer * full, "slots": n}
        ours = {"method": "full", "ratio": 1.0, "decode_ms_per_token": 1000 * full, "slots": n}
        small = {"method": "meda", "ratio": 0.2, "decode_ms_per_token": 1000 * full / (reach * limit)}
        small |= {"slots": 0.2 * n, "prompt_share": 0.2}
        for row, speed, weight in ((stock, 1 / buffer, 1.0), (ours, 1.0, 1.0), (small, reach * limit, 0.21)):
            row |= {"speed_vs_full": [speed] * 3, "speed_vs_stock": [buffer * speed] * 3}
            size = int(weight * 100 * n)
            sizes = {"kv_bytes": size, "kv_bytes_end": size + 48, "kv_bytes_full_end": 100 * n + 48}
            rows.append(common | row | sizes | {"kv_share": weight})
    for n in CONTEXTS[:3]:
        cost = {"model": "toy", "context": n, "method": "meda", "ratio": 0.2, "prefill_s": 1e-6 * n**2}
        spent = overhead * 1e-6 * n**2
        cost |= {"watch_s": 0.8 * spent, "compress_s": 0.2 * spent, "overhead_s": spent, "overhead": [overhead] * 3}
        rows.append(cost)
        for method, ratio, peak in (("stock", 1.0, 1000 * n), ("meda, by layer", 0.2, 400 * n)):
            rows.append({"model": "toy", "context": n, "method": method, "ratio": ratio, "peak_bytes": peak})
    return rows


def result(**options: Any) -> dict[str, Any]:
    rows = join(measured(**options))
    add_reading(rows)
    lines = cost_lines(rows)
    doubts = add_limits(rows, lines)
    env = {"models": ["toy"], "device": "cpu", "dtype": "float32", "threads": 1, "clock": "wall"}
    shown = {model: {name: jsonable(line) for name, line in by.items()} for model, by in lines.items()}
    return {
        "env": env,
        "rows": rows,
        "lines": shown,
        "slopes": slopes(rows),
        "promises": promises(rows, doubts=doubts),
        "notes": ["a note"],
        "skipped": ["kvpress"],
    }


def test_rows_of_one_arm_are_joined_and_complete() -> None:
    rows = join(measured())
    assert len(rows) == len(CONTEXTS) * 3 + 3
    assert all(list(row)[: len(FIELDS)] == list(FIELDS) for row in rows)
    (arm,) = [row for row in rows if row["method"] == "meda" and row["context"] == 4096]
    assert arm["prefill_s"] is not None and arm["decode_ms_per_token"] is not None and arm["kv_bytes"] is not None
    by_layer = [row for row in rows if row["method"] == "meda, by layer"]
    assert by_layer[0]["decode_ms_per_token"] is None and by_layer[0]["peak_bytes"] == 400 * 1024
    assert [row["context"] for row in rows] == sorted(row["context"] for row in rows)


def test_the_first_measurement_of_a_field_stands() -> None:
    key = {"model": "m", "context": 1, "method": "x", "ratio": 0.5}
    (row,) = join([key | {"kv_bytes": 5}, key | {"kv_bytes": 9, "peak_bytes": 7}])
    assert row["kv_bytes"] == 5 and row["peak_bytes"] == 7


def test_lines_and_limits_of_the_invented_machine() -> None:
    shown = result(reach=0.8)
    line = shown["lines"]["toy"]["full"]
    assert line["a"] == pytest.approx(A) and line["b"] == pytest.approx(B)
    for row in shown["rows"]:
        if row["method"] == "meda":
            n = row["context"]
            assert row["limit"] == pytest.approx((A + B * n) / (A + B * 0.2 * n))
            assert row["limit_reached"] == pytest.approx(0.8)
        else:
            assert "limit" not in row
    (slope,) = shown["slopes"]
    assert slope["overhead grows as n to the"] == pytest.approx(2)
    assert slope["prefill grows as n to the"] == pytest.approx(2)


def test_promises_are_met_and_missed() -> None:
    told = {entry["promise"]: entry for entry in result()["promises"]}
    assert len(told) == 6 and all(entry["met"] == "met" for entry in told.values())
    assert told["growth buffer against DynamicCache, nothing dropped"]["where"] == "16384 tokens"
    saved = told["ratio 0.2: less KV memory, allocated bytes, generated tokens included"]
    assert saved["measured"] == "79.0 %" and "4096 tokens" in saved["where"]
    assert told["watching and compressing against reading 8k tokens"]["where"] == "below: meda 0.050"
    peak = told["peak of reading with a budget profile against the stock cache"]
    assert peak["measured"] == "40 %" and peak["where"] == "8192 tokens; meda, by layer 40 %"
    missed = {entry["promise"]: entry["met"] for entry in result(reach=0.6, buffer=1.2, overhead=0.3)["promises"]}
    assert missed["growth buffer against DynamicCache, nothing dropped"] == "not met"
    assert missed["ratio 0.2: share of the possible speed-up"] == "not met"
    assert missed["watching and compressing against reading 8k tokens"] == "not met"
    assert missed["bytes of the kept prompt against the request"] == "met"


def test_promises_are_of_bytes_and_in_part_and_unmeasured() -> None:
    rows = join(measured())
    for row in rows:
        if row["method"] == "meda" and row["context"] == 4096:
            row |= {"prompt_share": 0.21, "kv_bytes_end": 40 * 4096}
    cost = next(row for row in rows if row.get("overhead") and row["context"] == 8192)
    rows.append(cost | {"method": "h2o", "overhead": [0.7] * 3, "kv_bytes_end": None})
    told = {entry["promise"]: entry for entry in promises(rows, grouped=["toy"], doubts={"toy": "too few lengths"})}
    assert "growth buffer against DynamicCache, nothing dropped" not in told, "heads that share keys promise nothing"
    assert told["bytes of the kept prompt against the request"]["measured"] == "5.00 %"
    assert told["bytes of the kept prompt against the request"]["met"] == "not met"
    assert told["ratio 0.2: less KV memory, allocated bytes, generated tokens included"]["met"] == "not met"
    some = told["watching and compressing against reading 8k tokens"]
    assert (some["met"], some["measured"]) == ("in part", "1 of 2 methods")
    assert some["where"] == "below: meda 0.050; above: h2o 0.70"
    reach = told["ratio 0.2: share of the possible speed-up"]
    assert (reach["met"], reach["measured"], reach["where"]) == ("not measured", None, "no limit: too few lengths")


def test_reading_is_entered_in_every_row_and_nothing_was_watched_by_full_caches() -> None:
    rows = join(measured())
    add_reading(rows)
    assert {row["context"]: row["prefill_s"] for row in rows if row["method"] == "stock"} == {
        n: None if n == 16384 else 1e-6 * n**2 for n in CONTEXTS
    }
    assert all(row["overhead_s"] == row["watch_s"] == 0 for row in rows if row["method"] in ("stock", "full"))


def test_two_lengths_give_no_limit_and_no_misfit() -> None:
    rows = [row for row in join(measured()) if row["context"] < 8192]
    lines = cost_lines(rows)
    doubts = add_limits(rows, lines)
    assert "two lengths" in doubts["toy"] and not any("limit" in row for row in rows)
    shown = result() | {
        "rows": rows,
        "lines": {"toy": {"full": jsonable(lines["toy"]["full"])}},
        "slopes": slopes(rows),
    }
    parts = dict(tables(shown))
    assert parts["cost of a decode step: a + b * tokens"][0]["worst misfit"] == "-"
    assert parts["how cost grows"][0]["from"] == "2 lengths: a rough guess"


def test_tables_name_what_the_json_names() -> None:
    shown = result()
    row = next(r for r in shown["rows"] if r.get("overhead") and r["context"] == 4096)
    (told,) = [r for r in dict(tables(shown))["compression against reading the prompt"] if r["context"] == 4096]
    for column, key in (("prefill s", "prefill_s"), ("watch s", "watch_s"), ("compress s", "compress_s")):
        assert told[column] == pytest.approx(row[key], abs=5e-4)
    assert "model" not in told, "one model needs no column"
    shown["env"] = shown["env"] | {"models": ["toy", "other"]}
    assert all("model" in r for r in dict(tables(shown))["decoding"])


def test_tables_and_report_hold_every_part(tmp_path: Any) -> None:
    shown = result()
    titles = [title for title, _ in tables(shown)]
    assert titles == [
        "promises against measurements",
        "decoding",
        "what the cache weighs",
        "compression against reading the prompt",
        "peak memory of reading the prompt",
        "cost of a decode step: a + b * tokens",
        "how cost grows",
        "notes",
        "left out",
    ]
    memory = dict(tables(shown))["peak memory of reading the prompt"]
    assert {row["of stock"] for row in memory if row["method"] == "meda, by layer"} == {"40.0 %"}
    page = write_report(tmp_path / "report.html", shown).read_text(encoding="utf-8")
    assert page.count("<svg") + page.count("data:image") >= 3
    assert "toy: decode time against context" in page and "toy: what each method adds" in page
    assert (tmp_path / "report.md").is_file()
    json.dumps(jsonable(shown), allow_nan=False)


def test_a_report_of_nothing_but_skips(tmp_path: Any) -> None:
    empty = {
        "env": result()["env"],
        "rows": [],
        "lines": {},
        "slopes": [],
        "promises": [],
        "skipped": ["no peer"],
        "notes": [],
    }
    assert [title for title, _ in tables(empty)] == ["left out"]
    assert "no peer" in write_report(tmp_path / "report.html", empty).read_text(encoding="utf-8")


def test_a_peer_is_compared_with_ours_at_the_same_ratio() -> None:
    peer = {"model": "toy", "context": 4096, "prefill_s": 1.0, "kv_bytes": 1, "peer": "kvpress 9"}
    rows = join(
        [
            *measured(),
            peer | {"method": "kvpress snapkv", "ratio": 0.2, "decode_ms_per_token": 100.0},
            peer | {"method": "kvpress none", "ratio": 1.0, "decode_ms_per_token": 50.0},
            peer | {"method": "kvpress snapkv", "ratio": 0.3, "decode_ms_per_token": 50.0},
        ]
    )
    add_peer_ratios(rows)
    of = {(row["method"], row["ratio"], row["context"]): row for row in rows}
    ours, full = of["meda", 0.2, 4096], of["full", 1.0, 4096]
    assert of["kvpress snapkv", 0.2, 4096]["ours_against_it"] == pytest.approx(100 / ours["decode_ms_per_token"])
    assert of["kvpress none", 1.0, 4096]["ours_against_it"] == pytest.approx(50 / full["decode_ms_per_token"])
    assert "ours_against_it" not in of["kvpress snapkv", 0.3, 4096]
    shown = dict(tables(result() | {"rows": rows}))
    assert len(shown["another implementation in another Python"]) == 3
    assert not any(row["method"].startswith("kvpress") for row in shown["decoding"])
