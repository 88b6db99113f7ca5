"""From measurements to the result: one row per model, context, method and ratio, cost lines, limits and slopes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from meda_kv.benchmark.cost import CostLine, fit_cost, growth_exponent

__all__ = ["FIELDS", "add_limits", "add_peer_ratios", "add_reading", "cost_lines", "join", "slopes"]

FIELDS = (
    "model",
    "method",
    "ratio",
    "context",
    "prefill_s",
    "watch_s",
    "compress_s",
    "overhead_s",
    "decode_ms_per_token",
    "kv_bytes",
    "kv_bytes_full",
    "peak_bytes",
)
"""What every row has; None where it was not measured.

``prefill_s``: reading the prompt. ``watch_s``: scores and entropies taken while reading. ``compress_s``: choosing,
merging and storing after it. ``overhead_s``: the last two together, from the same readings. ``kv_bytes`` and
``kv_bytes_full``: allocated bytes of this cache and of a stock one that holds the prompt and nothing generated, in
every row; with the generated tokens they are ``kv_bytes_end`` and ``kv_bytes_full_end``. ``peak_bytes``: most that
torch held while reading, on top of the weights.
"""

Row = dict[str, Any]


def join(measured: Iterable[Row]) -> list[Row]:
    """Join rows of the same model, context, method and ratio; what was measured first stays.

    Returns
    -------
    list of dict
        Sorted by model, context, ratio (falling) and order of appearance; every row has `FIELDS` first.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for row in measured:
        key = (row["model"], row["context"], row["method"], row["ratio"])
        known = found.setdefault(key, dict.fromkeys(FIELDS) | {})
        for name, value in row.items():
            if known.get(name) is None:
                known[name] = value
    order = list(dict.fromkeys(row["model"] for row in found.values()))
    return sorted(found.values(), key=lambda row: (order.index(row["model"]), row["context"], -row["ratio"]))


def add_reading(rows: Sequence[Row]) -> None:
    """Enter the time of reading a context where a row has none of its own: it does not depend on method and ratio.

    Caches that keep everything have neither watched nor compressed: zero seconds.
    """
    for row in rows:
        here = [r for r in rows if (r["model"], r["context"]) == (row["model"], row["context"]) and "peer" not in r]
        if row["prefill_s"] is None and "peer" not in row:
            row["prefill_s"] = next((r["prefill_s"] for r in here if r["prefill_s"] is not None), None)
        if row["method"] in ("stock", "full"):
            row |= {"watch_s": 0.0, "compress_s": 0.0, "overhead_s": 0.0}


def cost_lines(rows: Sequence[Row]) -> dict[str, dict[str, CostLine]]:
    """Fit ``a + b * len`` per model to our full cache and to the stock one.

    Returns
    -------
    dict
        ``{model: {"full": CostLine, "stock": CostLine}}``; without those measured at fewer than two contexts.
    """
    lines: dict[str, dict[str, CostLine]] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        for method in ("full", "stock"):
            points = [
                (row["slots"], row["decode_ms_per_token"] / 1000)
                for row in rows
                if row["model"] == model and row["method"] == method and row["decode_ms_per_token"] is not None
            ]
            if len({x for x, _ in points}) >= 2:
                lines.setdefault(model, {})[method] = fit_cost(*zip(*points))
    return lines


def add_limits(rows: Sequence[Row], lines: dict[str, dict[str, CostLine]]) -> dict[str, str]:
    """Enter the limit of every timed row, and what share of it was reached, over our own full cache.

    ``limit`` is ``(a + b n) / (a + b r n)`` at the requested ratio.

    Returns
    -------
    dict
        Per model without limits, why: a line that cannot be trusted gives none.
    """
    doubts = {}
    for model, by_method in lines.items():
        if "full" in by_method and by_method["full"].doubt is not None:
            doubts[model] = str(by_method["full"].doubt)
    for row in rows:
        line = lines.get(row["model"], {}).get("full")
        if (
            line is None
            or row["model"] in doubts
            or row.get("speed_vs_full") is None
            or row["method"] in ("stock", "full")
        ):
            continue
        row["limit"] = line.limit(row["context"], row["ratio"] * row["context"])
        row["limit_reached"] = row["speed_vs_full"][0] / row["limit"]
    return doubts


def add_peer_ratios(rows: Sequence[Row]) -> None:
    """Enter into every row of a peer how many times as fast ours decodes at the same context and ratio.

    The two were timed in different processes one after the other, so this ratio is not of paired runs.
    """
    for row in rows:
        if "peer" not in row:
            continue
        ours = [
            other["decode_ms_per_token"]
            for other in rows
            if all(other[name] == row[name] for name in ("model", "context", "ratio"))
            and other["decode_ms_per_token"] is not None
            and "peer" not in other
            and other["method"] not in ("stock", "trim")
        ]
        if ours:
            row["ours_against_it"] = row["decode_ms_per_token"] / ours[0]


def slopes(rows: Sequence[Row]) -> list[Row]:
    """How the cost of reading and of each method's overhead grows with the context, on log scales."""
    table: list[Row] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        timed = [row for row in rows if row["model"] == model and row.get("overhead")]
        nearest = min((abs(row["ratio"] - 0.2) for row in timed), default=0.0)
        timed = [row for row in timed if abs(row["ratio"] - 0.2) == nearest]
        for method in dict.fromkeys(row["method"] for row in timed):
            points = sorted((row["context"], row) for row in timed if row["method"] == method)
            sizes = [n for n, _ in points]
            costs = [row["overhead_s"] for _, row in points]
            exponent = growth_exponent(sizes, costs)
            if exponent is not None:
                entry = {"model": model, "method": method, "contexts": ", ".join(map(str, sizes))}
                entry["overhead grows as n to the"] = exponent
                entry["prefill grows as n to the"] = growth_exponent(sizes, [row["prefill_s"] for _, row in points])
                table.append(entry)
    return table
