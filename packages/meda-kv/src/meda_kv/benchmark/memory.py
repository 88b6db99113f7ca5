"""Peak memory of reading a prompt: everything kept, compressed afterwards, and compressed layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from meda_kv.benchmark.caches import Arm, our_cache, prompt_share, stock_bytes, stock_cache
from meda_kv.benchmark.decode import FULL, too_short
from meda_kv.benchmark.subjects import Prompt, Subject
from meda_kv.benchmark.timing import peak_memory

__all__ = ["BY_LAYER", "measure_memory"]

BY_LAYER = "by layer"
"""What is added to a method's label when its budgets are known before the prompt is read."""


def measure_memory(
    subject: Subject,
    prompt: Prompt,
    arm: Arm,
    ratio: float,
    *,
    after: Sequence[float] = (),
    others: Sequence[Arm] = (),
    skipped: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure what torch holds at most while a prompt is read, on top of the weights.

    Parameters
    ----------
    subject, prompt
        What is read.
    arm, ratio
        Compressed after reading, and again layer by layer while reading with the shares of the first run as a budget
        profile.
    after : sequence of float
        Further ratios of that arm, compressed after reading only.
    others : sequence of Arm
        Measured as `arm` is.
    skipped : list of str, optional
        Gets the reason for every ratio that this prompt is too short for.

    Returns
    -------
    list of dict
        Rows for ``stock``, ``full``, each arm, and each arm by layer.
    """
    n = int(prompt.ids.shape[1])
    reasons: list[str] = [] if skipped is None else skipped
    rows: list[dict[str, Any]] = []
    stock = stock_cache(subject)
    peak = peak_memory(partial(subject.read, prompt.ids, stock), subject.device)
    weight, whole = stock_bytes(stock), prompt_share(stock, n)
    del stock

    def add(method: str, share: float, peak: int, kv_bytes: int, held: float) -> None:
        row = {"model": subject.name, "context": n, "method": method, "ratio": share, "peak_bytes": peak}
        sizes = {"kv_bytes": kv_bytes, "kv_bytes_full": weight, "kv_share": kv_bytes / weight, "prompt_share": held}
        rows.append(row | sizes)

    add("stock", 1.0, peak, weight, whole)
    full = our_cache(subject, FULL, 1.0, prompt)
    peak = peak_memory(partial(subject.read, prompt.ids, full), subject.device)
    add("full", 1.0, peak, full.nbytes(), prompt_share(full, n))
    del full

    def compressed(one: Arm, share: float) -> list[float]:
        cache = our_cache(subject, one, share, prompt)
        peak = peak_memory(partial(_read_and_compress, subject, prompt, cache), subject.device)
        add(one.label, share, peak, cache.nbytes(), prompt_share(cache, n))
        return [] if cache.budgets is None else [float(budget) / n for budget in cache.budgets[:, 0]]

    for one in (arm, *others):
        for share in (ratio, *(after if one is arm else ())):
            with too_short(reasons):
                shares = compressed(one, share)
                if share != ratio or not shares or not all(0 < part <= 1 for part in shares):
                    continue
                within = our_cache(subject, one, share, prompt, budgets=shares, compress_at="layer")
                peak = peak_memory(partial(subject.read, prompt.ids, within), subject.device)
                add(f"{one.label}, {BY_LAYER}", share, peak, within.nbytes(), prompt_share(within, n))
                del within
    return rows


def _read_and_compress(subject: Subject, prompt: Prompt, cache: Any) -> None:
    subject.read(prompt.ids, cache)
    with torch.inference_mode():
        cache.compress()
