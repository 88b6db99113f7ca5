"""Tables, pictures and words of the demo's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.report import Report

from meda_kv import study
from meda_kv.evaluation.report import score_figure
from meda_kv.evaluation.tables import grid_rows

if TYPE_CHECKING:
    from vfm_core.runs import RunDir

    from meda_kv.evaluation import Results
    from meda_kv.study_claims import Check

PICTURED = ("snapkv", "meda", "quota")
PICTURED_RATIO = 0.2
_KINDS = {"all": "", "asked": ", the question that was read", "other": ", the seven others"}


def result_rows(part: str, results: Results) -> list[dict[str, Any]]:
    """One row per kind of question and arm, for summary.json and the terminal."""
    return [
        {
            "part": part,
            "questions": row.kind,
            "method": row.method,
            "ratio": row.ratio,
            "score": list(row.score),
            "albums": row.n,
            "bytes": row.kv_bytes,
            "bytes_full": row.kv_bytes_full,
        }
        for row in results.rows(by="all")
    ]


def short_rows(rows: Sequence[Mapping[str, Any]], ratio: float = 0.2) -> list[dict[str, Any]]:
    """Mean scores at one ratio, a method per line and a part per column, for a terminal."""
    shown = [row for row in rows if row["method"] == "full" or row["ratio"] == ratio]
    lines: dict[str, dict[str, Any]] = {}
    for row in shown:
        if row["part"] == "needle, asked":
            if row["questions"] == "all":
                continue
            column = f"needle, {row['questions']}"
        else:
            column = row["part"]
        lines.setdefault(row["method"], {"method": row["method"]})[column] = row["score"][0]
    return list(lines.values())


def entropy_rows(entropies: Mapping[int, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """One row per network and kind of entropy, a column per layer, and the spread."""
    return [
        {
            "network": seed,
            "entropy": kind,
            **{f"layer {layer}": value for layer, value in enumerate(values)},
            "spread (nats)": max(values) - min(values),
        }
        for seed, kinds in entropies.items()
        for kind, values in kinds.items()
    ]


def check_rows(checks: Sequence[Check], *, expected: bool) -> list[dict[str, Any]]:
    """Claims with the left side minus the right side, less the margin."""
    return [
        {
            "claim": one.claim.name,
            "where": one.claim.part,
            **({"source": one.claim.source} if expected else {}),
            "holds": "yes" if one.holds else "NO" if expected else "no",
            "difference": one.difference,
            "per network": ", ".join(f"{value:+.2f}" for value in one.by_seed),
            **({} if expected else {"why": one.claim.why}),
        }
        for one in checks
        if one.claim.expected is expected
    ]


def write_report(
    run: RunDir,
    size: study.StudySize,
    results: Mapping[str, Results],
    checks: Sequence[Check],
    said: Sequence[str],
    entropies: list[dict[str, Any]],
    seconds: float,
) -> Path:
    """Write ``report.html``; returns its path."""
    report = Report(
        "KV-cache compression on three small networks",
        f"{len(size.seeds)} networks, {size.albums} albums of {size.images} pictures each per part; "
        f"{seconds:.0f} s; every method keeps exactly the same number of tokens",
    )
    report.heading("What to use, as measured")
    report.text("\n".join(f"- {sentence}" for sentence in said))
    report.text(
        "These sentences hold for these networks and tasks. `meda-kv eval` makes them for your model and your data."
    )
    report.heading("What was kept")
    report.text(
        f"One album, the first network, ratio {PICTURED_RATIO:g}, asked for the first colour. Bright patches were kept "
        "by more heads and layers. A method that looks with the question keeps the asked picture and forgets the "
        "others; dealing the budget out in turns leaves every picture some tokens."
    )
    report.gallery(_kept_pictures(size.seeds[0]))
    for part, one in results.items():
        report.heading(part)
        report.text(_words(part))
        for kind in one.kinds:
            if part != "needle, asked" and kind != "all":
                continue
            rows = one.rows(by="all", kinds=[kind])
            title = part + _KINDS[kind]
            if kind == "all" or part == "needle, asked":
                figure = score_figure(rows, title)
                report.figure(figure, caption=f"{title}: mean score and 95 % interval over {rows[0].n} albums")
            grid = grid_rows(rows)
            report.table(
                grid, caption=f"{title}: score [95 % interval]", highlight=[c for c in grid[0] if c != "method"]
            )
    report.heading("Claims")
    report.text(
        "Left side minus right side, less the margin, on the same albums; the claim holds when the whole 95 % interval "
        "is above zero. The value of every network stands beside it."
    )
    report.table(check_rows(checks, expected=True), caption="Expected to hold, and asserted by the tests")
    report.table(check_rows(checks, expected=False), caption="Not expected here: reported, never asserted")
    report.heading("Entropy per layer")
    report.text(
        "Mean over eight prompts, in nats. Layers differ, which is what entropy budgets live on; the paper's fall with "
        "depth is not assumed."
    )
    report.table(entropies)
    run.report_path.parent.mkdir(parents=True, exist_ok=True)
    return report.write(run.report_path)


def _words(part: str) -> str:
    return {
        "needle, asked": "The pictures and the first question are read, the cache is compressed, then all eight "
        "questions are asked on what is left. Methods that look from the last queries know the first question.",
        "needle, agnostic": "Only the pictures are read before compression: nobody knows what will be asked.",
        "gist, agnostic": "The commonest colour: many tokens say the same, so that averages of dropped tokens help.",
        "list, generate": "All digits in order by plain `generate`; the score is the share of words right in their "
        "place. The first word comes from the full cache.",
    }[part]


def _kept_pictures(seed: int) -> list[tuple[Any, str]]:
    """Album with the share of (layer, head) pairs that kept each token, one picture per method."""
    import numpy as np
    from PIL import Image

    from meda_kv.cache import cache_for
    from meda_kv.data import open_task
    from meda_kv.models import load_model
    from meda_kv.prompts import Prompt, build_inputs

    model, processor = load_model(f"tiny?seed={seed}", device="cpu")
    sample = open_task(f"tinyworld:needle?n=1&seed={seed}").samples[0]
    question, answer = sample.questions[0]
    inputs = build_inputs(processor, [Prompt(f"{sample.prompt} {question}", sample.load_images())])
    visual = (inputs["input_ids"][0] == model.config.image_token_id).numpy()
    pictures = [np.asarray(image) for image in sample.load_images()]
    side = int((visual.sum() // len(pictures)) ** 0.5)
    shown = [(_strip(pictures, None), f"the album; {question} ({answer})")]
    for name in PICTURED:
        cache = cache_for(model, method=study.study_method(name), ratio=PICTURED_RATIO)
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=3)
        share = np.zeros(len(visual))
        layers = range(len(cache.layers))
        for layer in layers:
            kept = cache.kept(layer).numpy()
            for head in kept:
                share[head[(head >= 0) & (head < len(visual))]] += 1 / (len(layers) * len(kept))
        grids = share[visual].reshape(len(pictures), side, side)
        said = processor.batch_decode(out[:, len(visual) :], skip_special_tokens=True)[0].strip()
        shown.append((_strip(pictures, grids), f"{name}: answers {said}; every picture's share {_shares(grids)}"))
    return [(Image.fromarray(picture), caption) for picture, caption in shown]


def _shares(grids: Any) -> str:
    return " ".join(f"{grid.mean():.2f}" for grid in grids)


def _strip(pictures: Sequence[Any], grids: Any, zoom: int = 3, gap: int = 6) -> Any:
    """Pictures side by side, darkened where no head kept the patch."""
    import numpy as np

    tiles = []
    for i, picture in enumerate(pictures):
        tile = picture.astype(float)
        if grids is not None:
            scale = picture.shape[0] // grids[i].shape[0]
            light = np.sqrt(grids[i]).repeat(scale, 0).repeat(scale, 1)[..., None]
            tile = tile * (0.12 + 0.88 * light)
        tiles += [tile.repeat(zoom, 0).repeat(zoom, 1), np.full((picture.shape[0] * zoom, gap, 3), 255.0)]
    return np.concatenate(tiles[:-1], axis=1).round().clip(0, 255).astype(np.uint8)
