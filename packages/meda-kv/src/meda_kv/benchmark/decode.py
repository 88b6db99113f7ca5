"""How fast each cache decodes and what it weighs, at one context length.

All caches decode in turns on the same model. Four kinds take part: ``stock`` (transformers' DynamicCache, everything
kept), ``full`` (ours, everything kept, with its growth buffer), ``trim`` (a DynamicCache cut down by hand), and the
methods at each ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vfm_core.errors import UserError

from meda_kv.benchmark.caches import (
    Arm,
    copy_into,
    fill,
    kv_shapes,
    our_cache,
    prompt_share,
    stock_bytes,
    stock_cache,
    trimmed,
)
from meda_kv.benchmark.subjects import Prompt, Subject
from meda_kv.benchmark.timing import Clock, paired, paired_ratio

__all__ = ["measure_decode", "too_short"]

FULL = Arm("full", "full")


def measure_decode(
    subject: Subject,
    prompt: Prompt,
    arms: Sequence[Arm],
    ratios: Sequence[float],
    *,
    real: bool,
    clock: Clock,
    rounds: int = 5,
    steps: int = 8,
    buffer_step: int = 256,
    skipped: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Time decoding with every cache.

    Parameters
    ----------
    subject, prompt
        What is read.
    arms : sequence of Arm
        Methods, each at every ratio below 1.
    ratios : sequence of float
        Shares to keep; 1 is always measured.
    real : bool
        Read the prompt; else fill the caches with random keys and values. Then one row per ratio stands for all
        methods, which differ in what they keep but not in what it costs.
    clock : Clock
        How to time.
    rounds, steps : int
        Counted rounds, and tokens decoded per cache and round.
    buffer_step : int
        Of the growth buffer.
    skipped : list of str, optional
        Gets the reason for every method and ratio that this prompt is too short for.

    Returns
    -------
    list of dict
        One row per cache, with the speed-up over ``stock``, over ``full`` and over ``trim`` at the same ratio as
        ``[median, lower quartile, upper quartile]`` over rounds, and measured bytes: ``kv_bytes`` and ``kv_bytes_full``
        of the prompt alone, ``kv_bytes_end`` and ``kv_bytes_full_end`` with the ``generated`` tokens.
    """
    n = int(prompt.ids.shape[1])
    shares = [ratio for ratio in ratios if ratio < 1]
    stock, prefill_s = _stock(subject, prompt, n, real, clock)
    caches: dict[tuple[str, float], Any] = {("stock", 1.0): stock}
    full = our_cache(subject, FULL, 1.0, prompt, buffer_step=buffer_step)
    copy_into(subject, stock, full, n)
    caches["full", 1.0] = full
    for ratio in shares:
        caches["trim", ratio] = trimmed(stock, max(1, round(ratio * n)))
    caches |= _ours(subject, prompt, n, arms, shares, real, buffer_step, [] if skipped is None else skipped)
    before = {key: {"kv_bytes": _bytes(cache), "prompt_share": prompt_share(cache, n)} for key, cache in caches.items()}
    seconds = paired({_key(key): partial(subject.decode, cache, steps) for key, cache in caches.items()}, rounds, clock)
    generated = steps * (rounds + 1)
    weight, weight_end = before["stock", 1.0]["kv_bytes"], stock_bytes(stock)
    rows = []
    for key, cache in caches.items():
        method, ratio = key
        mine = seconds[_key(key)]
        row: dict[str, Any] = {
            "model": subject.name,
            "context": n,
            "method": method,
            "ratio": ratio,
            "kv": "read" if real else "filled",
            "decode_ms_per_token": 1000 * statistics.median(mine) / steps,
            "speed_vs_stock": paired_ratio(seconds[_key(("stock", 1.0))], mine).triple(),
            "speed_vs_full": paired_ratio(seconds[_key(("full", 1.0))], mine).triple(),
            **before[key],
            "kv_bytes_full": weight,
            "kv_share": before[key]["kv_bytes"] / weight,
            "kv_bytes_end": _bytes(cache),
            "kv_bytes_full_end": weight_end,
            "generated": generated,
            "slots": _slots(cache),
        }
        if method == "stock":
            row |= {"prefill_s": prefill_s}
        if ("trim", ratio) in caches and method != "trim":
            row["speed_vs_trim"] = paired_ratio(seconds[_key(("trim", ratio))], mine).triple()
        rows.append(row)
    return rows


def _key(key: tuple[str, float]) -> str:
    return f"{key[0]}@{key[1]:g}"


def _stock(subject: Subject, prompt: Prompt, n: int, real: bool, clock: Clock) -> tuple[Any, float | None]:
    cache = stock_cache(subject)
    if real:
        return cache, clock.seconds(partial(subject.read, prompt.ids, cache))
    fill(subject, cache, n, kv_shapes(subject))
    return cache, None


def _ours(
    subject: Subject,
    prompt: Prompt,
    n: int,
    arms: Sequence[Arm],
    shares: Sequence[float],
    real: bool,
    buffer_step: int,
    skipped: list[str],
) -> dict[tuple[str, float], Any]:
    found: dict[tuple[str, float], Any] = {}
    if not shares:
        return found
    if not real:
        shapes = kv_shapes(subject)
        for ratio in shares:
            cache = our_cache(subject, Arm("any", "streaming"), ratio, prompt, buffer_step=buffer_step)
            fill(subject, cache, n, shapes)
            with torch.inference_mode(), too_short(skipped):
                found["any", ratio] = cache.compress()
        return found
    from meda_kv.methods import resolve_method

    for arm in arms:  # one reading each: observers of several methods at once would need memory that none needs alone
        method = resolve_method(arm.method, **arm.options)
        read = our_cache(subject, FULL, 1.0, prompt, buffer_step=buffer_step, record=[method])
        subject.read(prompt.ids, read)
        for ratio in shares:
            with torch.inference_mode(), too_short(skipped):
                found[arm.label, ratio] = read.fork(method, ratio)
    return found


@contextmanager
def too_short(skipped: list[str]) -> Iterator[None]:
    """Note why a prompt is too short for a method and ratio, and go on."""
    from meda_kv.evaluation.arms import floor_option

    try:
        yield
    except UserError as error:
        skipped.append(str(floor_option(error)))


def _bytes(cache: Any) -> int:
    """Allocated bytes of a cache of either kind, with its room to spare."""
    return int(cache.nbytes()) if hasattr(cache, "begin_forward") else stock_bytes(cache)


def _slots(cache: Any) -> float:
    """How many slots the full-attention layers hold on average."""
    if hasattr(cache, "begin_forward"):
        held = [cache.layers[index].physical for index in cache.facts.full_layers]
    else:
        held = [layer.keys.shape[2] for layer in cache.layers if not getattr(layer, "is_sliding", False)]
    return sum(held) / len(held)
