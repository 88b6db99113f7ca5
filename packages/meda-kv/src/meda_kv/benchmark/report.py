"""Tables and pictures of a bench result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.report import Report, house_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["tables", "write_report"]

Row = dict[str, Any]

_MIB = 2**20


def tables(result: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    """``(title, rows)`` of everything measured, with numbers rounded for reading; empty parts are left out.

    The model is a column only where there are several.
    """
    rows = result["rows"]
    found = [
        ("promises against measurements", [_rounded(row) for row in result["promises"]]),
        ("decoding", [_decode(row) for row in rows if _timed(row)]),
        ("what the cache weighs", [_weight(row) for row in rows if row["kv_bytes"] is not None and "peer" not in row]),
        ("another implementation in another Python", [_peer(row) for row in rows if "peer" in row]),
        ("compression against reading the prompt", [_overhead(row) for row in rows if row.get("overhead")]),
        ("peak memory of reading the prompt", _memory(rows)),
        ("cost of a decode step: a + b * tokens", _lines(result["lines"])),
        ("how cost grows", [_slope(row) for row in result["slopes"]]),
        ("notes", [{"note": note} for note in result["notes"]]),
        ("left out", [{"reason": reason} for reason in result["skipped"]]),
    ]
    hidden = {"model"} if len(result["env"]["models"]) == 1 else set()
    return [
        (title, [{name: value for name, value in row.items() if name not in hidden} for row in table])
        for title, table in found
        if table
    ]


def _decode(row: Row) -> Row:
    shown: Row = {
        "model": row["model"],
        "method": row["method"],
        "ratio": row["ratio"],
        "context": row["context"],
        "ms/token": round(row["decode_ms_per_token"], 2),
    }
    for name, key in (("x stock", "speed_vs_stock"), ("x full", "speed_vs_full"), ("x trim", "speed_vs_trim")):
        shown[name] = round(row[key][0], 2) if row.get(key) else None
    shown["limit"] = round(row["limit"], 2) if row.get("limit") else None
    shown["of limit"] = round(row["limit_reached"], 2) if row.get("limit_reached") else None
    return shown | {"prompt": row.get("kv")}


def _weight(row: Row) -> Row:
    end = row.get("kv_bytes_end")
    return {
        "model": row["model"],
        "method": row["method"],
        "ratio": row["ratio"],
        "context": row["context"],
        "prompt kept": _percent(row.get("prompt_share")),
        "KV MiB": round(row["kv_bytes"] / _MIB, 2),
        "of stock": _percent(row["kv_bytes"] / row["kv_bytes_full"]),
        "after, MiB": None if end is None else round(end / _MIB, 2),
        "after, of stock": None if end is None else _percent(end / row["kv_bytes_full_end"]),
    }


def _timed(row: Row) -> bool:
    return row["decode_ms_per_token"] is not None and "peer" not in row


def _peer(row: Row) -> Row:
    return {
        "model": row["model"],
        "method": row["method"],
        "ratio": row["ratio"],
        "context": row["context"],
        "prefill s": round(row["prefill_s"], 3),
        "ms/token": round(row["decode_ms_per_token"], 2),
        "KV MiB": round(row["kv_bytes"] / _MIB, 2),
        "ours x this": round(row["ours_against_it"], 2) if "ours_against_it" in row else None,
        "versions": row["peer"],
    }


def _overhead(row: Row) -> Row:
    return {
        "model": row["model"],
        "method": row["method"],
        "ratio": row["ratio"],
        "context": row["context"],
        "prefill s": round(row["prefill_s"], 3),
        "watch s": round(row["watch_s"], 3),
        "compress s": round(row["compress_s"], 3),
        "overhead / prefill": [round(value, 3) for value in row["overhead"]],
    }


def _memory(rows: Sequence[Row]) -> list[Row]:
    found = []
    for row in rows:
        if row["peak_bytes"] is None:
            continue
        stock = next(
            other["peak_bytes"]
            for other in rows
            if (other["model"], other["context"], other["method"]) == (row["model"], row["context"], "stock")
        )
        found.append(
            {
                "model": row["model"],
                "method": row["method"],
                "ratio": row["ratio"],
                "context": row["context"],
                "peak MiB": round(row["peak_bytes"] / _MIB, 1),
                "of stock": _percent(row["peak_bytes"] / stock),
            }
        )
    return found


def _lines(lines: dict[str, dict[str, Any]]) -> list[Row]:
    return [
        {
            "model": model,
            "cache": method,
            "a, ms": round(1000 * line["a"], 3),
            "b, µs per token": round(1e6 * line["b"], 4),
            "worst misfit": _percent(line["error"]) or "-",
        }
        for model, by_method in lines.items()
        for method, line in by_method.items()
    ]


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _slope(row: Row) -> Row:
    """Two digits are all that times of a few lengths can tell, and with two lengths not even those."""
    count = len(row["contexts"].split(", "))
    shown = {name: round(value, 1) if isinstance(value, float) else value for name, value in row.items()}
    return shown | {"from": f"{count} lengths" if count > 2 else "2 lengths: a rough guess"}


def _rounded(row: Row) -> Row:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def write_report(path: Path, result: dict[str, Any]) -> Path:
    """Write ``report.html`` and its Markdown twin.

    Parameters
    ----------
    path : Path
        Of the HTML file.
    result : dict
        As `meda_kv.bench.run_bench` returns.
    """
    env = result["env"]
    report = Report("meda-kv bench", f"{env['device']}, {env['dtype']}, {env['threads']} threads, {env['clock']} time")
    report.text(_NOTES)
    pictures = {
        "decoding": (_decode_figure,),
        "what the cache weighs": (_bytes_figure,),
        "compression against reading the prompt": (_overhead_figure,),
    }
    for title, rows in tables(result):
        report.heading(title[0].upper() + title[1:])
        if title in _EXPLAINED:
            report.text(_EXPLAINED[title])
        report.table(rows)
        for model in env["models"]:
            for draw in pictures.get(title, ()):
                drawn = draw(result, model)
                if drawn is not None:
                    report.figure(drawn[0], drawn[1])
    return report.write(path, markdown=True)


_NOTES = """
All caches of one context decode in turns on the same model; every speed-up is the median over rounds of the ratio
inside a round. **stock** is the DynamicCache of transformers with everything kept, **full** ours with everything kept,
**trim** a DynamicCache cut down by hand, the rest are methods at their ratio; **any** stands for all of them where the
prompt was too long to be read and the caches were filled with random keys and values. **watch** is the time of scores
and entropies while the prompt is read, **compress** that of choosing, merging and storing after it, and **overhead**
both together; in `bench.json` they are `watch_s`, `compress_s` and `overhead_s`. The vision tower is not part of the
times.
"""
_EXPLAINED = {
    "decoding": """
*limit* is the best that dropping tokens can do, `(a + b n) / (a + b r n)` with the measured line of our full cache. It
is told only where three lengths or more lie within 10 % of that line. How fast a compressed cache is read depends on
how much it holds and not on what: only the methods of `--method` are decoded.
""",
    "what the cache weighs": """
*prompt kept* is the share of the prompt's keys and values, by the bytes of the tensors, that is still held. *KV MiB* is
everything allocated for it before decoding: with the growth buffer's room for the next tokens (256 in each layer, which
short prompts pay dearly), positions and flags. *of stock* compares it with a DynamicCache of the whole prompt. *after*
is the same after decoding, where that was done.
""",
}


@contextmanager
def _figure(width: float = 6.4, height: float = 3.6) -> Iterator[Figure]:
    from matplotlib.figure import Figure

    with house_style():
        yield Figure(figsize=(width, height), layout="constrained")


def _series(result: dict[str, Any], model: str, wanted: str) -> dict[tuple[str, float], list[tuple[int, Row]]]:
    series: dict[tuple[str, float], list[tuple[int, Row]]] = {}
    for row in result["rows"]:
        if row["model"] == model and row.get(wanted) is not None and "peer" not in row:
            method = row["method"] if row["method"] in ("stock", "full", "trim") else "ours"
            points = series.setdefault((method, row["ratio"]), [])
            if not points or points[-1][0] != row["context"]:  # methods of one ratio cost the same: the first stands
                points.append((row["context"], row))
    return series


def _name(method: str, ratio: float) -> str:
    return {"stock": "DynamicCache", "full": "ours, all kept"}.get(method, f"{method}, {100 * ratio:g} %")


def _context_axis(axis: Any, series: dict[tuple[str, float], list[tuple[int, Row]]]) -> None:
    contexts = sorted({n for points in series.values() for n, _ in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in contexts])
    axis.set_xlabel("tokens in the prompt")


def _decode_figure(result: dict[str, Any], model: str) -> tuple[Figure, str] | None:
    series = _series(result, model, "decode_ms_per_token")
    line = result["lines"].get(model, {}).get("full")
    if not any(len(points) > 1 for points in series.values()):
        return None
    with _figure() as figure:
        axis = figure.add_subplot()
        for (method, ratio), points in series.items():
            if method == "trim":
                continue
            x = [n for n, _ in points]
            drawn = axis.plot(
                x, [row["decode_ms_per_token"] for _, row in points], marker="o", label=_name(method, ratio)
            )
            if line is not None and method == "ours":
                floor = [1000 * (line["a"] + line["b"] * ratio * n) for n in x]
                axis.plot(x, floor, linestyle=":", color=drawn[0].get_color())
        _context_axis(axis, series)
        axis.set_yscale("log")
        axis.set_ylabel("ms per decoded token")
        axis.legend(fontsize="small")
        return figure, f"{model}: decode time against context; dotted: the floor a + b * kept tokens"


def _bytes_figure(result: dict[str, Any], model: str) -> tuple[Figure, str] | None:
    series = _series(result, model, "kv_bytes_end")
    if not any(len(points) > 1 for points in series.values()):
        return None
    with _figure() as figure:
        axis = figure.add_subplot()
        for (method, ratio), points in series.items():
            if method != "trim":
                sizes = [row["kv_bytes_end"] / _MIB for _, row in points]
                axis.plot([n for n, _ in points], sizes, marker="o", label=_name(method, ratio))
        _context_axis(axis, series)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylabel("KV cache, MiB")
        axis.legend(fontsize="small")
        return figure, f"{model}: bytes of the KV cache, spare room and generated tokens included"


def _overhead_figure(result: dict[str, Any], model: str) -> tuple[Figure, str] | None:
    rows = [row for row in result["rows"] if row["model"] == model and row.get("overhead")]
    if not rows:
        return None
    nearest = min(abs(row["ratio"] - 0.2) for row in rows)
    rows = [row for row in rows if abs(row["ratio"] - 0.2) == nearest]
    contexts = sorted({row["context"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    with _figure(7.6, 1.2 + 0.36 * len(methods)) as figure:
        axis = figure.add_subplot()
        step = 0.8 / len(contexts)
        for turn, context in enumerate(contexts):
            shares = {row["method"]: 100 * row["overhead"][0] for row in rows if row["context"] == context}
            here = [(place + turn * step, shares[method]) for place, method in enumerate(methods) if method in shares]
            axis.barh([y for y, _ in here], [x for _, x in here], height=0.9 * step, label=f"{context} tokens")
        axis.set_yticks([place + 0.4 - step / 2 for place in range(len(methods))], methods)
        axis.invert_yaxis()
        axis.axvline(10, color="#3c4043", linewidth=1, linestyle="--")
        axis.set_xlabel("% of the time of reading (dashed: 10)")
        axis.legend(fontsize="small")
        return figure, f"{model}: what each method adds to reading the prompt at ratio {rows[0]['ratio']:g}"
