"""How fast, how small and at what price: our cache beside transformers' own, on one model, in one run.

Every measurement is a ratio of paired runs on the same model and prompt: ours compressed against the stock
``DynamicCache``, against our own full cache with its growth buffer, and against a cache trimmed by hand; compression
against reading the prompt, per method; bytes that are really allocated; peak memory of reading with and without a
budget profile; how all of it grows with the context, and the line ``a + b * tokens`` that no compression can beat.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vfm_core.errors import UserError, unknown_name
from vfm_core.files import write_json
from vfm_core.runs import RunDir

from meda_kv.benchmark.caches import Arm, parse_arm
from meda_kv.benchmark.decode import measure_decode
from meda_kv.benchmark.memory import measure_memory
from meda_kv.benchmark.overhead import measure_overhead
from meda_kv.benchmark.peers import kvpress_rows
from meda_kv.benchmark.promises import promises
from meda_kv.benchmark.report import write_report
from meda_kv.benchmark.rows import add_limits, add_peer_ratios, add_reading, cost_lines, join, slopes
from meda_kv.benchmark.subjects import Subject, bench_prompt, load_subject
from meda_kv.benchmark.timing import Clock, make_clock
from meda_kv.evaluation.arms import floor_option
from meda_kv.models import describe_shape

__all__ = ["OVERHEAD_METHODS", "SECTIONS", "run_bench"]

log = logging.getLogger(__name__)

SECTIONS = ("decode", "overhead", "memory", "peer")
OVERHEAD_METHODS = (
    "streaming",
    "snapkv",
    "pyramidkv",
    "quota",
    "h2o",
    "look-m",
    "meda",
    "meda-no-merge",
    "meda-fast",
    "meda-no-merge?score_queries=sample:256",
    "meda-no-merge?score_queries=window:32",
)
"""Methods whose cost is compared; those that are not among the known methods are left out of the default list."""
_ANCHORS = (256, 1024, 4096)
"""Contexts that are decoded as well, everything kept, until there are three: a line through two fits always."""

_LIGHT = "snapkv"
"""Of the methods compared by cost: one whose peak is measured beside that of the first method."""

_Rows = list[dict[str, Any]]
_Unit = tuple[str, Callable[[list[str]], _Rows]]


def run_bench(
    out: str | os.PathLike[str],
    *,
    models: Sequence[str] = ("bench:mha",),
    contexts: Sequence[int] = (1024, 4096, 8192, 16384),
    ratios: Sequence[float] = (1.0, 0.5, 0.2, 0.05),
    methods: Sequence[str] = ("meda",),
    overhead_methods: Sequence[str] | None = None,
    preset: str = "paper",
    settings: Mapping[str, Any] | None = None,
    floor: int | None = None,
    sections: Iterable[str] = SECTIONS,
    prefill_limit: int = 8192,
    rounds: int = 5,
    steps: int = 8,
    visual_share: float = 0.94,
    clock: str = "auto",
    device: str = "cpu",
    dtype: str | None = None,
    attn: str | None = None,
    device_map: str | None = None,
    peer_python: str | os.PathLike[str] | None = None,
    patience_s: float = 10.0,
    seed: int = 0,
    overwrite: bool = False,
    show: Callable[[list[_Unit]], Iterable[_Unit]] | None = None,
) -> dict[str, Any]:
    """Run the benchmark, or what is left of it.

    Parameters
    ----------
    out : path
        Run folder: ``bench.json``, ``report.html`` and, per finished measurement, a line of ``results.jsonl``.
    models : sequence of str
        ``bench:mha``, ``bench:gqa``, ``bench:wide`` (random weights), ``tiny``, a checkpoint folder or a hub id.
    contexts : sequence of int
        Tokens of the prompt, >= 64.
    ratios : sequence of float
        Shares to keep, in (0, 1].
    methods, overhead_methods : sequence of str
        Methods to decode with, and to compare by cost; options as in ``meda?merge=none&score_queries=window:32``. By
        default those of `OVERHEAD_METHODS` that exist are compared.
    preset, floor
        Of all methods; see `meda_kv.methods.resolve_method`.
    settings : mapping, optional
        Further options of ``methods``; what is written with a name comes first.
    sections : iterable of str
        Of `SECTIONS`.
    prefill_limit : int
        Longest prompt that is really read; longer ones are only decoded from, over random keys and values.
    rounds, steps : int
        Paired rounds, and tokens decoded per cache and round.
    visual_share : float
        Share of the prompt that is declared visual, in [0, 1). A sample of MileBench has 422 words beside 15.2 images
        on average; at 576 tokens each, 94 % are visual. Cross-modal entropies cost in proportion to the text.
    clock : str
        ``auto``, ``wall`` or ``process`` (steadier on a machine with other work); on CUDA always its events.
    device, dtype, attn, device_map : str
        As for `meda_kv.models.load_model`. Built-in models default to float32 on the CPU and bfloat16 on CUDA.
    peer_python : path, optional
        Python with kvpress; without it that comparison is left out.
    patience_s : float
        Seconds after which the cost of one method is not measured again.
    seed : int
        Of weights and words.
    overwrite : bool
        Start afresh.
    show : callable, optional
        Wraps the list of measurements, for a progress bar.

    Returns
    -------
    dict
        JSON-ready: ``env``, ``rows`` (fields of `meda_kv.benchmark.rows.FIELDS` and more), ``promises``, ``lines``,
        ``slopes``, ``notes`` (what to know of the figures), ``skipped``.

    Raises
    ------
    UserError
        A value out of range, an unknown model, method, section or clock, or a run folder of other settings.
    """
    wanted = list(sections)
    _check(contexts, ratios, wanted, methods, rounds, steps, visual_share, prefill_limit)
    compared = known_methods() if overhead_methods is None else list(overhead_methods)
    arms = [parse_arm(text, preset, **{"floor": floor, **(settings or {})}) for text in methods]
    mine = {arm.label: arm for arm in arms}
    costed = [mine.get(text) or parse_arm(text, preset, floor=floor) for text in compared]
    if any(arm.method == "full" for arm in arms):
        raise UserError("the full cache is always measured", where="--method", given="full", remedy="leave it out")
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "attn": attn, "device_map": device_map, "seed": seed}
    subjects = [load_subject(spec, **loading) for spec in models]
    timer = make_clock(clock, subjects[0].device)
    env = _environment(subjects, timer)
    config: dict[str, Any] = {
        "models": list(models),
        "ratios": list(ratios),
        "methods": list(methods),
        "overhead_methods": compared,
        "preset": preset,
        "settings": {"floor": floor, **(settings or {})},
        "rounds": rounds,
        "steps": steps,
        "visual_share": visual_share,
        "prefill_limit": prefill_limit,
        "seed": seed,
        **{key: env[key] for key in ("device", "dtype", "attn", "threads", "clock")},
    }
    skipped: list[str] = []
    anchors = _anchors(contexts) if "decode" in wanted else []
    if "peer" in wanted and peer_python is None:
        skipped.append("kvpress: no --peer-python was given")
    with RunDir(Path(out), config, overwrite=overwrite) as run:
        units = []
        for subject in subjects:
            shared = (subject, arms, costed, ratios, timer, rounds, steps, visual_share, seed)
            units += list(_units(*shared, contexts, anchors, prefill_limit, wanted, peer_python, patience_s))
        left = [unit for unit in units if unit[0] not in run.done]
        for name, measure in show(left) if show is not None else left:
            log.info("measuring %s", name)
            reasons: list[str] = []
            try:
                rows = measure(reasons)
            except UserError as error:  # such as a prompt too short for the method's floors
                rows, reasons = [], [f"{name}: {floor_option(error)}"]
            if rows:  # what gave nothing is tried again by the next start: a peer may be installed by then
                run.append({"unit": name, "rows": rows, "skipped": reasons})
            else:
                skipped += reasons
            gc.collect()
        # In the order of the plan, whatever the order of measuring was: where two know a value, the first counts.
        kept = {record["unit"]: record for record in run.records()}
        records = [kept[name] for name, _ in units if name in kept]
        skipped += [reason for record in records for reason in record["skipped"]]
        measured = [row for record in records for row in record["rows"]]
        result = _result(env, measured, skipped, anchors)
        write_json(Path(out) / "bench.json", result)
        write_report(run.report_path, result)
    return result


def known_methods() -> list[str]:
    """Those of `OVERHEAD_METHODS` that exist."""
    from meda_kv.methods import METHODS

    return [text for text in OVERHEAD_METHODS if text.partition("?")[0] in METHODS]


def _anchors(contexts: Sequence[int]) -> list[int]:
    free = [n for n in _ANCHORS if n not in contexts]
    return free[: max(0, 3 - len(set(contexts)))]


def _check(
    contexts: Sequence[int],
    ratios: Sequence[float],
    sections: Sequence[str],
    methods: Sequence[str],
    rounds: int,
    steps: int,
    visual_share: float,
    prefill_limit: int,
) -> None:
    for section in sections:
        if section not in SECTIONS:
            raise unknown_name("section", section, SECTIONS, where="--sections")
    if not contexts or min(contexts) < 64:
        given = ", ".join(map(str, contexts)) or "none"
        raise UserError("a context has at least 64 tokens", where="--context", given=given, remedy="write 1k,4k,16k")
    wrong = [ratio for ratio in ratios if not 0 < ratio <= 1]
    if wrong or not ratios:
        given = str(wrong[0]) if wrong else "none"
        raise UserError("a ratio lies in (0, 1]", where="--ratio", given=given, remedy="write 1,0.5,0.2,0.05")
    if not methods:
        raise UserError("no method", where="--method", remedy="name at least one, such as meda")
    if rounds < 1 or steps < 1:
        raise UserError("rounds and steps are at least 1", where="--rounds, --steps", given=f"{rounds}, {steps}")
    if not 0 <= visual_share < 1:
        raise UserError("the visual share lies in [0, 1)", where="--visual-share", given=visual_share)
    if prefill_limit < 64:
        raise UserError("the prefill limit is at least 64", where="--prefill-limit", given=prefill_limit)


def _units(
    subject: Subject,
    arms: Sequence[Arm],
    costed: Sequence[Arm],
    ratios: Sequence[float],
    clock: Clock,
    rounds: int,
    steps: int,
    visual_share: float,
    seed: int,
    contexts: Sequence[int],
    anchors: Sequence[int],
    prefill_limit: int,
    sections: Sequence[str],
    peer_python: str | os.PathLike[str] | None,
    patience_s: float,
) -> Iterator[_Unit]:
    """Name and work of every measurement, independent of each other."""
    read = sorted({n for n in contexts if n <= prefill_limit})
    known = {arm.label: arm for arm in (*costed, *arms)}
    below = [share for share in ratios if share < 1]
    ratio = min(below, key=lambda r: abs(r - 0.2), default=0.2)
    pairs = [(arm.label, ratio) for arm in costed] + [(arm.label, share) for arm in arms for share in below]

    def timed(n: int, skipped: list[str]) -> _Rows:
        prompt = bench_prompt(subject, n, visual_share, seed)
        options: dict[str, Any] = {"clock": clock, "rounds": rounds, "steps": steps, "skipped": skipped}
        if n in anchors:  # for the cost line only
            return measure_decode(subject, prompt, (), (1.0,), real=False, **options)
        return measure_decode(subject, prompt, arms, ratios, real=n <= prefill_limit, **options)

    def cost(n: int, arm: Arm, share: float, skipped: list[str]) -> _Rows:
        prompt = bench_prompt(subject, n, visual_share, seed)
        measure_overhead(subject, bench_prompt(subject, 256, visual_share), arm, 0.5, clock=clock, rounds=1)  # warm-up
        return [measure_overhead(subject, prompt, arm, share, clock=clock, rounds=rounds, patience_s=patience_s)]

    def peak(n: int, arm: Arm, skipped: list[str]) -> _Rows:
        others = [other for other in costed if other.label == _LIGHT and other.label != arm.label]
        more: dict[str, Any] = {
            "after": [share for share in below if share != ratio],
            "others": others,
            "skipped": skipped,
        }
        return measure_memory(subject, bench_prompt(subject, n, visual_share, seed), arm, ratio, **more)

    def peer(n: int, skipped: list[str]) -> _Rows:
        assert peer_python is not None
        rows, reason = kvpress_rows(peer_python, subject, n, ratios, rounds=rounds, steps=steps, seed=seed)
        skipped += [] if reason is None else [reason]
        return rows

    if "decode" in sections:
        for n in sorted({*contexts, *anchors}):
            yield f"decode {subject.name} {n}", partial(timed, n)
    if "overhead" in sections:
        for n in read:
            for label, share in dict.fromkeys(pairs):
                yield f"overhead {subject.name} {n} {label} {share:g}", partial(cost, n, known[label], share)
    if "memory" in sections:
        for n in read:
            yield f"memory {subject.name} {n} {arms[0].label}", partial(peak, n, arms[0])
    if "peer" in sections and peer_python is not None:
        for n in read:
            yield f"peer {subject.name} {n}", partial(peer, n)


def _environment(subjects: Sequence[Subject], clock: Clock) -> dict[str, Any]:
    import transformers

    first = subjects[0]
    on_gpu = first.device.type == "cuda"
    config = first.model.config.get_text_config(decoder=True)
    return {
        "models": [subject.name for subject in subjects],
        "shapes": {subject.name: describe_shape(subject.model) for subject in subjects},
        "device": torch.cuda.get_device_name(first.device) if on_gpu else "cpu",
        "dtype": str(first.dtype).removeprefix("torch."),
        "attn": str(config._attn_implementation).removeprefix("meda_"),
        "clock": clock.kind,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _result(
    env: dict[str, Any], measured: list[dict[str, Any]], skipped: Sequence[str], anchors: Sequence[int]
) -> dict[str, Any]:
    rows = join(measured)
    add_reading(rows)
    lines = cost_lines(rows)
    doubts = add_limits(rows, lines)
    add_peer_ratios(rows)
    notes = [f"{model}: no limit is told, {doubt}." for model, doubt in doubts.items()]
    if anchors:
        told = " and ".join(map(str, anchors))
        notes.append(f"{told} tokens were decoded as well, everything kept, so that the cost line has three lengths.")
    grouped = [name for name, shape in env["shapes"].items() if shape["heads"] != shape["kv_heads"]]
    return {
        "env": env,
        "rows": rows,
        "lines": {model: {name: asdict(line) for name, line in by.items()} for model, by in lines.items()},
        "slopes": slopes(rows),
        "promises": promises(rows, doubts=doubts, grouped=grouped),
        "notes": notes,
        "skipped": sorted(set(skipped)),
    }
