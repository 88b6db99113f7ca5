"""Explain a folder of images with any classifier: streaming, resumable, one record and one set of files per image.

Three things overlap: threads decode and preprocess, the model explains whole batches, threads draw and encode. Every
finished image is appended to ``results.jsonl`` after its files are in place, so a run can be killed at any moment and
the same command finishes the rest. An unreadable image, or one whose logits or gradients are not finite, becomes a line
in ``errors.jsonl`` and never a picture.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vfm_core.errors import UserError
from vfm_core.runs import RunDir
from vfm_core.specs import parse_spec

from finecam.classifiers import RANDOM, Classifier, load_classifier
from finecam.data import open_dataset
from finecam.examples import ExamplePictures
from finecam.options import CONTRAST, ExplainOptions, keep_apart, refuse_contrast
from finecam.products import forget_lost
from finecam.streaming import Failure, Worker, one_warning, patch_multiple, stream
from finecam.targets import TargetPlan, plan_targets, read_class_map, read_confusion
from finecam.text import TextClassifier

if TYPE_CHECKING:
    from vfm_core.data import ImageDataset

    from finecam.explainer import Explainer

log = logging.getLogger(__name__)
RUNS = "runs.json"  # counts, seconds, device and dtype of every finished start


@dataclass
class ExplainSummary:
    """What a run did.

    Parameters
    ----------
    out, index
        The output folder and its page; `index` is None for one shard of several.
    records_in
        Where ``results.jsonl`` and ``errors.jsonl`` are: `out`, or the shard's own folder below it.
    done
        Images with a result, those of earlier runs included.
    new
        Images explained by this run.
    failed
        Images whose record is an error.
    empty
        Results with a map that is zero everywhere, at any strength.
    seconds
        Wall time of this run.
    """

    out: Path
    index: Path | None
    records_in: Path
    done: int
    new: int
    failed: int
    empty: int
    seconds: float

    def line(self) -> str:
        """One line for a person."""
        rate = f", {self.new / self.seconds:.1f} images/s" if self.new and self.seconds else ""
        empty = f", {self.empty} with an empty map" if self.empty else ""
        return (
            f"{self.done} image{'s' * (self.done != 1)} explained ({self.new} now{rate}){empty}, {self.failed} failed"
        )


def explain_folder(
    data: str | os.PathLike[str],
    model: str | os.PathLike[str] | Classifier,
    out: str | os.PathLike[str],
    *,
    split: str | None = None,
    class_map: str | os.PathLike[str] | dict[str, str] | None = None,
    examples: str | None = None,
    confusion: str | os.PathLike[str] | None = None,
    loading: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    workers: int = 2,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    strict: bool = False,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
    **options: Any,
) -> ExplainSummary:
    """Explain every image of a data set and write a gallery.

    Parameters
    ----------
    data
        A folder, or any data spec (``folder:``, ``csv:``, ``tinyworld:``, ...).
    model
        A classifier spec (see `load_classifier`) or a `Classifier`.
    out
        The run folder; the same call again finishes what is missing.
    split
        Split of the data.
    class_map
        CSV file (or dict) of data class to model class, where names differ.
    examples
        Data spec of labelled pictures that show the reference classes; by default the data itself when labelled.
    confusion
        CSV file of the (C, C) confusion matrix, rows = true class, for ``similarity="confusion"``.
    loading
        Further arguments of `load_classifier`.
    device
        Where the model runs.
    batch_size, workers
        Images per forward pass, and threads each for decoding and for encoding.
    limit
        Explain at most so many images (of the shard).
    shard
        (i, n): only images i, i + n, i + 2n, ... (1 <= i <= n); `finecam.shards.merge` joins the shards.
    overwrite
        Start afresh.
    strict
        Stop at the first image that fails.
    progress
        Wraps the iterable of finished images; called with it and their number.
    **options
        Fields of `ExplainOptions`. Those of the contrast are refused with a method that depends on no class.

    Returns
    -------
    ExplainSummary

    Raises
    ------
    UserError
        Bad names, options or files; a run folder with other options; with `strict`, the first failed image.

    Examples
    --------
    >>> import tempfile
    >>> done = explain_folder("tinyworld:birds?split=val&n=16", "tiny:cnn", tempfile.mkdtemp(), limit=4)
    >>> done.done, done.failed
    (4, 0)
    """
    chosen = ExplainOptions(**options)
    given = [name for name in CONTRAST if options.get(name) not in (None, 0, (), (0,))]
    refuse_contrast(chosen.method, given + ["confusion"] * bool(confusion))
    dataset = open_dataset(data, split=split)
    keep_apart(dataset, Path(out))
    if not isinstance(model, Classifier):
        model = load_classifier(_any_size(model) if chosen.keep_aspect else model, **(loading or {}), device=device)
    return explain_dataset(
        dataset,
        model,
        out,
        chosen,
        source=_identity(data, split),
        class_map=read_class_map(class_map) if isinstance(class_map, str | os.PathLike) else class_map,
        examples=open_dataset(examples) if examples else None,
        confusion=read_confusion(confusion) if confusion else None,
        templates=(loading or {}).get("templates", ()),
        device=device,
        batch_size=batch_size,
        workers=workers,
        limit=limit,
        shard=shard,
        overwrite=overwrite,
        strict=strict,
        progress=progress,
    )


def _any_size(model: str | os.PathLike[str]) -> str:
    """The spec of a timm model, asked to take images of any size; other specs as they are."""
    text = os.fspath(model)
    if not text.removeprefix("random:").startswith("timm:"):
        return text
    spec = parse_spec(text)
    return str(replace(spec, options={"dynamic": "1", **spec.options}))


def _identity(data: str | os.PathLike[str], split: str | None) -> str:
    """The data spec as a run folder remembers it: a path means the same from every working directory."""
    text = os.fspath(data)
    if Path(text).expanduser().exists():
        text = str(Path(text).expanduser().resolve())
    return f"{text}@{split}" if split else text


def explain_dataset(
    dataset: ImageDataset,
    classifier: Classifier,
    out: str | os.PathLike[str],
    options: ExplainOptions | None = None,
    *,
    source: str | None = None,
    class_map: dict[str, str] | None = None,
    examples: ImageDataset | None = None,
    confusion: Any = None,
    templates: Sequence[str] = (),
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    workers: int = 2,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    strict: bool = False,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> ExplainSummary:
    """Explain an open data set with a loaded classifier; parameters as in `explain_folder`.

    Parameters
    ----------
    source
        What the run folder calls the data; its name by default.
    confusion
        (C, C) counts, rows = true class, for ``similarity="confusion"``.
    templates
        Prompts that an image-text model's classes were put into, for the record.
    """
    from finecam.shards import forget, shard_folder
    from finecam.summary import log_run, write_index

    options = options or ExplainOptions()
    out, started = Path(out), time.perf_counter()
    if not len(dataset):
        raise UserError("no images", where=source or dataset.name, remedy="check the path and the file suffixes")
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise UserError("shard out of range", where="--shard", given=f"{shard[0]}/{shard[1]}", remedy="use 1/n to n/n")
    plan = plan_targets(
        classifier,
        dataset.classes,
        target=options.target,
        references=options.references if options.asks else None,
        class_map=class_map,
        used=sorted({int(label) for label in dataset.labels if label >= 0}),
    )
    explainer = _explainer(classifier, options, batch_size, confusion)
    with one_warning():
        layer = _probe(explainer, classifier, plan, options, device)
    untrained = classifier.spec.startswith(RANDOM)
    if untrained:
        log.warning("%s has random weights: these maps show what the untrained network does", classifier.spec)
    run_folder = out if shard is None else shard_folder(out, *shard)
    config = {
        "data": source or dataset.name,
        "model": classifier.spec,
        "model_sha256": classifier.fingerprint,
        "preprocess": classifier.preprocess.to_dict(),
        "class_map": class_map or {},
        **options.config(),
        "layer": layer,
    } | _described(classifier, options, confusion, templates)
    if overwrite:
        forget(run_folder, out)
        (run_folder / RUNS).unlink(missing_ok=True)
    with one_warning(), RunDir(run_folder, config, overwrite=overwrite, key="image") as run:
        mine = range(len(dataset)) if shard is None else range(shard[0] - 1, len(dataset), shard[1])
        mine = mine if limit is None else mine[:limit]
        forget_lost(run, out, {dataset.ids[i] for i in mine})
        todo = [i for i in mine if dataset.ids[i] not in run.done]
        worker = Worker(dataset, classifier, explainer, plan, options, torch.device(device), batch_size)
        shown = ExamplePictures(examples or dataset, classifier, class_map or {}, out, options.style.side)
        meta = {
            "method": options.method,
            "layer": layer,
            "weighting": None if plan.references is None else options.weighting,
            "similarity": {int: options.similarity, tuple: "given"}.get(type(plan.references)),
        } | ({"random_weights": True} if untrained else {})
        new = 0
        finished: Iterable[Any] = stream(worker, todo, out, shown, meta, workers)
        for result in progress(finished, len(todo)) if progress else finished:
            if isinstance(result, Failure):
                run.append_error({"image": result.image, "error": result.reason})
                if strict:
                    raise UserError(result.reason, remedy="drop --strict to record it and go on")
            else:
                run.append(result)
                new += 1
        records, errors = run.records(), run.errors()
        index = None if shard is not None else write_index(out, records, errors, run.config)
        summary = ExplainSummary(
            out=out,
            index=index,
            records_in=run_folder,
            done=len(records),
            new=new,
            failed=len(errors),
            empty=sum(bool(r["empty"]) for r in records),
            seconds=time.perf_counter() - started,
        )
        first = next((p for p in classifier.model.parameters() if p.is_floating_point()), None)
        log_run(
            run_folder / RUNS,
            {name: getattr(summary, name) for name in ("done", "new", "failed", "empty")}
            | {"seconds": round(summary.seconds, 3), "device": str(device), "batch_size": batch_size}
            | {
                "workers": workers,
                "dtype": str(torch.float32 if first is None else first.dtype).removeprefix("torch."),
            },
        )
    if records and all(r["empty"] and len(r["empty"]) == max(1, len(r["gammas"])) for r in records):
        log.warning("every map is empty at %s: %s", layer, records[0]["warning"].removeprefix("empty_map: "))
    return summary


def _described(
    classifier: Classifier, options: ExplainOptions, confusion: Any, templates: Sequence[str]
) -> dict[str, Any]:
    """What else decides the maps: the confusion matrix by its content, and the words of an image-text model."""
    found: dict[str, Any] = {}
    if confusion is not None and options.asks and options.similarity == "confusion":
        table = np.ascontiguousarray(torch.as_tensor(confusion).cpu().numpy(), dtype=np.float64)
        content = repr(table.shape).encode() + table.tobytes()
        found["confusion_sha256"] = hashlib.sha256(content).hexdigest()
    if isinstance(classifier.model, TextClassifier):
        model = classifier.model
        found["text"] = {"texts": model.class_names, "templates": list(templates), "scale": model.scale}
    return found


def _explainer(classifier: Classifier, options: ExplainOptions, batch_size: int, confusion: Any) -> Explainer:
    from finecam.explainer import Explainer

    return Explainer(
        classifier.model,
        layer=options.layer or classifier.layer,
        method=options.method,
        reshape=classifier.reshape,
        class_names=classifier.class_names,
        batch_size=batch_size,
        class_weights=classifier.weights() if options.similarity == "weight" else None,
        confusion=confusion,
    )


def _probe(
    explainer: Explainer,
    classifier: Classifier,
    plan: TargetPlan,
    options: ExplainOptions,
    device: torch.device | str,
) -> str:
    """Explain one image of noise, so that a bad layer, method or head is an error before any image is touched.

    Returns the name of the layer that is explained.
    """
    generator = torch.Generator().manual_seed(0)
    h, w = classifier.preprocess.size
    if options.keep_aspect:  # a shape that only a model of any input size takes
        cell = patch_multiple(classifier.model)
        h, w = cell * -(-h // cell), cell * (-(-w // cell) + 1)
    x = torch.randn(1, 3, h, w, generator=generator).to(device)
    references: Any = plan.references
    target = plan.target if isinstance(plan.target, int) else 0
    if isinstance(references, tuple):
        target = next(c for c in range(len(references) + 1) if c not in references) if plan.target != target else target
        references = list(references)
    try:
        result = explainer(
            x,
            target=target,
            references=references,
            similarity=options.similarity,
            gamma=options.strengths[-1],
            weighting=options.weighting,
            aggregate=options.aggregate,
            normalize=None,
            size=None,
        )
    except (AssertionError, RuntimeError) as e:
        if not options.keep_aspect:
            raise
        remedy = "drop --keep-aspect, or use a convolutional or dynamic-size model"
        raise UserError("the model takes one input size only", where=classifier.spec, given=e, remedy=remedy) from e
    logits = result.logits.shape[-1]
    if classifier.class_names is not None and len(classifier.class_names) != logits:
        raise UserError(
            "class names do not fit the model",
            where=classifier.spec,
            given=f"{len(classifier.class_names)} names for {logits} logits",
            remedy="give one name per logit, in order",
        )
    return str(result.layer)
