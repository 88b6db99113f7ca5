"""What the package promises about speed and memory, against what was measured here: met, not met, or not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meda_kv.benchmark.memory import BY_LAYER

__all__ = ["promises"]

Row = dict[str, Any]

_BASES = ("stock", "full", "trim")


def promises(rows: Sequence[Row], *, doubts: Mapping[str, str] | None = None, grouped: Sequence[str] = ()) -> list[Row]:
    """Hold every promise against the rows of each model.

    Where every query head has keys of its own, the growth buffer is >= 1.3 times as fast as the stock cache at 16k
    tokens; ratio 0.2 reaches >= 0.75 of its limit and allocates >= 72 % less from 4k tokens on; the bytes of the kept
    prompt are within 1 % of the request; compression costs < 10 % of reading 8k tokens, for the methods that are named;
    with a budget profile the peak of reading the longest prompt is below that of the stock cache.

    Parameters
    ----------
    rows : sequence of dict
        Joined, with limits entered.
    doubts : mapping, optional
        Per model, why no limit is told.
    grouped : sequence of str
        Models whose query heads share keys, for which the growth buffer promises nothing.

    Returns
    -------
    list of dict
        ``model``, ``promise``, ``needed``, ``measured``, ``met`` (``"met"``, ``"in part"``, ``"not met"`` or
        ``"not measured"``) and ``where``.
    """
    found: list[Row] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and "peer" not in row]
        entries = [] if model in grouped else [_buffer(mine)]
        entries += [_reach(mine, (doubts or {}).get(model)), _allocated(mine), _request(mine), _overhead(mine)]
        entries.append(_peak(mine))
        found += [{"model": model, **entry} for entry in entries]
    return found


def _entry(promise: str, needed: str, value: float | str | None, good: bool | None, where: str) -> Row:
    met = "not measured" if good is None else "met" if good else "not met"
    return {"promise": promise, "needed": needed, "measured": value, "met": met, "where": where}


def _buffer(rows: list[Row]) -> Row:
    promise, needed = "growth buffer against DynamicCache, nothing dropped", ">= 1.3 x"
    timed = [r for r in rows if r["method"] == "full" and r.get("speed_vs_stock") and r["context"] >= 16384]
    if not timed:
        return _entry(promise, needed, None, None, "needs 16k tokens")
    row = max(timed, key=lambda r: r["context"])
    value = row["speed_vs_stock"][0]
    return _entry(promise, needed, value, value >= 1.3, f"{row['context']} tokens")


def _reach(rows: list[Row], doubt: str | None) -> Row:
    promise, needed = "ratio 0.2: share of the possible speed-up", ">= 0.75"
    timed = [r for r in _ours(rows, 0.2) if r["decode_ms_per_token"] is not None and r["context"] >= 4096]
    if not timed:
        return _entry(promise, needed, None, None, "needs ratio 0.2 at 4k tokens")
    reached = [r for r in timed if r.get("limit_reached") is not None]
    if not reached:
        return _entry(promise, needed, None, None, f"no limit: {doubt or 'no cost line'}")
    longest = max(r["context"] for r in reached)
    row = min((r for r in reached if r["context"] == longest), key=lambda r: r["limit_reached"])
    where = f"{row['method']}, {longest} tokens: {row['speed_vs_full'][0]:.2f} of {row['limit']:.2f} x"
    return _entry(promise, needed, row["limit_reached"], row["limit_reached"] >= 0.75, where)


def _allocated(rows: list[Row]) -> Row:
    promise, needed = "ratio 0.2: less KV memory, allocated bytes, generated tokens included", ">= 72 %"
    weighed = [r for r in _ours(rows, 0.2) if r.get("kv_bytes_end") is not None and r["context"] >= 4096]
    if not weighed:
        return _entry(promise, needed, None, None, "needs ratio 0.2 decoded at 4k tokens")
    saved = {(r["context"], r["method"]): 1 - r["kv_bytes_end"] / r["kv_bytes_full_end"] for r in weighed}
    worst = min(saved, key=lambda key: saved[key])
    where = f"worst of {len(saved)}: {worst[1]}, {worst[0]} tokens"
    return _entry(promise, needed, f"{100 * saved[worst]:.1f} %", saved[worst] >= 0.72, where)


def _request(rows: list[Row]) -> Row:
    promise, needed = "bytes of the kept prompt against the request", "within 1 %"
    kept = [r for r in _ours(rows) if r["ratio"] < 1 and r.get("prompt_share") is not None]
    if not kept:
        return _entry(promise, needed, None, None, "needs a ratio below 1")
    off = {i: abs(r["prompt_share"] / r["ratio"] - 1) for i, r in enumerate(kept)}
    worst = max(off, key=lambda i: off[i])
    where = f"worst of {len(kept)}: {kept[worst]['method']}, {kept[worst]['context']} tokens, {kept[worst]['ratio']:g}"
    return _entry(promise, needed, f"{100 * off[worst]:.2f} %", off[worst] <= 0.01, where)


def _overhead(rows: list[Row]) -> Row:
    promise, needed = "watching and compressing against reading 8k tokens", "< 0.10"
    timed = [r for r in rows if r.get("overhead") and r["context"] >= 8192]
    if not timed:
        return _entry(promise, needed, None, None, "needs 8k tokens that are read")
    length = min(r["context"] for r in timed)
    shares: dict[str, float] = {}
    for row in sorted((r for r in timed if r["context"] == length), key=lambda r: abs(r["ratio"] - 0.2)):
        shares.setdefault(row["method"], row["overhead"][0])
    order = sorted(shares, key=lambda method: shares[method])
    low = [f"{method} {shares[method]:.3f}" for method in order if shares[method] < 0.1]
    high = [f"{method} {shares[method]:.2f}" for method in order if shares[method] >= 0.1]
    parts = [f"below: {', '.join(low)}"] * bool(low) + [f"above: {', '.join(high)}"] * bool(high)
    entry = _entry(promise, needed, f"{len(low)} of {len(shares)} methods", not high, "; ".join(parts))
    return entry | ({"met": "in part"} if low and high else {})


def _peak(rows: list[Row]) -> Row:
    promise, needed = "peak of reading with a budget profile against the stock cache", "< 100 %"
    within = [r for r in rows if r["method"].endswith(f", {BY_LAYER}") and r["peak_bytes"] is not None]
    stock = {r["context"]: r["peak_bytes"] for r in rows if r["method"] == "stock" and r["peak_bytes"] is not None}
    within = [r for r in within if r["context"] in stock]
    if not within:
        return _entry(promise, needed, None, None, "needs the memory section")
    longest = max(r["context"] for r in within)
    shares = {r["method"]: r["peak_bytes"] / stock[longest] for r in within if r["context"] == longest}
    where = f"{longest} tokens; " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    worst = max(shares.values())
    return _entry(promise, needed, f"{100 * worst:.0f} %", worst < 1, where)


def _ours(rows: list[Row], ratio: float | None = None) -> list[Row]:
    return [r for r in rows if r["method"] not in _BASES and ratio in (None, r["ratio"])]
