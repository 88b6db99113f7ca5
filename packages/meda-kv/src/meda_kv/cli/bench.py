"""The verb that measures speed, bytes and overhead."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from vfm_core.cli import (
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    OutOpt,
    OverwriteOpt,
    QuietOpt,
    SeedOpt,
    examples,
    print_json,
    print_table,
)
from vfm_core.errors import UserError

from meda_kv.cli import app
from meda_kv.cli.options import AttnOpt, DeviceMapOpt, FloorOpt, PresetOpt, SetOpt, settings


@app.command(
    epilog=examples(
        "meda-kv bench --model bench:mha --context 1k,4k,8k,16k --out bench/",
        "meda-kv bench --model PATH --context 2k,8k,32k --ratio 1,0.5,0.2,0.05 --device cuda --out bench/",
        "meda-kv bench --sections overhead --overhead-method 'meda,meda?score_queries=window:32' --context 8k",
        "meda-kv bench --sections peer --peer-python peer/bin/python",
    )
)
def bench(
    out: OutOpt = Path("bench"),
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="LIST", help="bench:mha, bench:gqa, bench:wide (random), tiny, a folder or an id."
        ),
    ] = "bench:mha",
    context: Annotated[
        str, typer.Option("--context", metavar="LIST", help="Prompt lengths in tokens.")
    ] = "1k,4k,8k,16k",
    ratio: Annotated[str, typer.Option("--ratio", metavar="LIST", help="Shares of the cache to keep.")] = (
        "1,0.5,0.2,0.05"
    ),
    method: Annotated[
        str, typer.Option("--method", metavar="LIST", help="Methods to decode with, options as in meda?merge=none.")
    ] = "meda",
    overhead_method: Annotated[
        str | None, typer.Option("--overhead-method", metavar="LIST", help="Methods whose cost is compared.")
    ] = None,
    sections: Annotated[
        str, typer.Option("--sections", metavar="LIST", help="Of decode, overhead, memory, peer.")
    ] = "decode,overhead,memory,peer",
    prefill_limit: Annotated[
        str, typer.Option("--prefill-limit", metavar="N", help="Longest prompt that is read; longer ones are filled.")
    ] = "8k",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Paired rounds; the median counts.")] = 5,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Tokens decoded per cache and round.")] = 8,
    visual_share: Annotated[float, typer.Option("--visual-share", help="Share of the prompt declared visual.")] = 0.94,
    clock: Annotated[
        str, typer.Option("--clock", help="auto, wall or process (steadier beside other work); CUDA has its events.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads of torch.")] = None,
    patience: Annotated[
        float, typer.Option("--patience", min=0.0, help="Seconds after which one cost is not measured again.")
    ] = 10.0,
    peer_python: Annotated[
        str | None, typer.Option("--peer-python", metavar="PATH", help="Python of an environment with kvpress.")
    ] = None,
    preset: PresetOpt = "paper",
    override: SetOpt = None,
    floor: FloorOpt = None,
    attn: AttnOpt = None,
    device: DeviceOpt = "auto",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Built-in models: float32 on the CPU, bfloat16 on CUDA.")
    ] = None,
    device_map: DeviceMapOpt = None,
    seed: SeedOpt = 0,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Measure speed, bytes and overhead against transformers' own cache, in one run."""
    import torch
    from vfm_core.cli import progress, resolve_device

    from meda_kv.bench import run_bench
    from meda_kv.benchmark.report import tables

    lengths = [_tokens(word, "--context") for word in _words(context)]
    limit = _tokens(prefill_limit, "--prefill-limit")
    shares = [_share(word) for word in _words(ratio)]
    where = str(resolve_device(device))
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        result = run_bench(
            out,
            models=_words(model),
            contexts=lengths,
            ratios=shares,
            methods=_words(method),
            overhead_methods=_words(overhead_method) if overhead_method is not None else None,
            preset=preset,
            settings=settings(override),
            floor=floor,
            sections=_words(sections),
            prefill_limit=limit,
            rounds=rounds,
            steps=steps,
            visual_share=visual_share,
            clock=clock,
            device=where,
            dtype=dtype,
            attn=attn,
            device_map=device_map,
            peer_python=peer_python,
            patience_s=patience,
            seed=seed,
            overwrite=overwrite,
            show=lambda units: progress(units, "bench", total=len(units), quiet=quiet or as_json),
        )
    finally:
        torch.set_num_threads(before)
    if as_json:
        print_json(result)
        return
    for title, rows in tables(result):
        print_table(rows, title)
    typer.echo(f"{out / 'bench.json'}, {out / 'report.html'}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _tokens(word: str, option: str) -> int:
    """Read ``4096``, ``4k`` or ``0.5k``; k is 1,024."""
    try:
        value = float(word[:-1]) * 1024 if word.lower().endswith("k") else float(word)
        if value != int(value) or value < 1:
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError("not a number of tokens", where=option, given=word, remedy="write 4096 or 4k") from None
    return int(value)


def _share(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UserError("not a number", where="--ratio", given=word, remedy="write 1,0.5,0.2,0.05") from None
