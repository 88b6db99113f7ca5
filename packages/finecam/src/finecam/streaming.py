"""From a list of images to explanations: threads decode ahead, the model explains whole batches, threads store.

A batch holds images of one input shape. When it fails it is taken apart, so that one picture that is not finite, or
too large for the GPU, costs only its own result.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

from finecam.examples import ExamplePictures
from finecam.layers import logits_of
from finecam.products import Explained, store
from finecam.render import fit_within
from finecam.targets import without_prediction

if TYPE_CHECKING:
    from PIL.Image import Image
    from vfm_core.data import ImageDataset

    from finecam.classifiers import Classifier
    from finecam.explainer import Explainer
    from finecam.options import ExplainOptions
    from finecam.targets import TargetPlan

log = logging.getLogger(__name__)


@dataclass
class Job:
    """One image on its way: decoded, preprocessed, not yet explained."""

    image: str
    x: Tensor
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    picture: Image
    label: int | None
    target: int | None
    references: int | tuple[int, ...] | None


@dataclass
class Failure:
    """An image that cannot be explained, and why."""

    image: str
    reason: str


def aspect_preserving(preprocess: Preprocess, size: tuple[int, int], multiple: int, max_side: int) -> Preprocess:
    """Preprocessing that keeps a picture's aspect ratio, up to the rounding to whole patches.

    Parameters
    ----------
    preprocess
        The model's own, for its statistics.
    size
        The picture's (width, height).
    multiple
        Patch size, or total stride, in pixels; both sides are rounded up to it.
    max_side
        Longest side before rounding.
    """
    width, height = fit_within(size, max_side)
    h, w = -(-height // multiple) * multiple, -(-width // multiple) * multiple
    return replace(preprocess, size=(h, w), resize="squash", crop_pct=1.0)


def patch_multiple(model: torch.nn.Module) -> int:
    """Side, in pixels, that input sizes must be a multiple of: the patch size, or 32 for convolutional models."""
    for module in model.modules():
        size = getattr(module, "patch_size", None)
        if isinstance(size, int):
            return size
        if isinstance(size, tuple) and size and isinstance(size[0], int):
            return size[0]
    return 32


class Worker:
    """Decoding and explaining for one run."""

    def __init__(
        self,
        dataset: ImageDataset,
        classifier: Classifier,
        explainer: Explainer,
        plan: TargetPlan,
        options: ExplainOptions,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self.dataset, self.classifier, self.explainer = dataset, classifier, explainer
        self.plan, self.options, self.device, self.batch_size = plan, options, device, batch_size
        self.multiple = patch_multiple(classifier.model) if options.keep_aspect else 1

    def decode(self, i: int) -> Job | Failure:
        """Read and preprocess image `i` (runs in a thread)."""
        image = self.dataset.ids[i]
        try:
            sample = self.dataset[i]
            preprocess, size = self.classifier.preprocess, sample.image.size
            if self.options.keep_aspect:
                preprocess = aspect_preserving(preprocess, size, self.multiple, self.options.max_side)
            picture = sample.image.resize(fit_within(size, self.options.style.side), reducing_gap=2.0)
            return Job(
                image=image,
                x=preprocess(sample.image),
                size=size,
                box=preprocess.box(size),
                picture=picture,
                label=sample.label,
                target=self.plan.target_of(image, sample.label),
                references=self.plan.references_of(image, sample.meta, self.classifier),
            )
        except (UserError, OSError, MemoryError) as e:
            return Failure(image, str(e) or type(e).__name__)

    def explain(self, jobs: Sequence[Job]) -> list[tuple[Job, Explained] | Failure]:
        """Explain a batch of one shape; a batch that fails is taken apart until only the guilty images fail."""
        try:
            return list(zip(jobs, self._explain(jobs)))
        except torch.OutOfMemoryError as e:  # the explainer halves its batches first; this is what does not fit at all
            reason: str = "out of memory on the GPU; use --device cpu, or a smaller --max-side with --keep-aspect"
            error: Exception = e
        except (ValueError, ArithmeticError) as e:  # UserError is a ValueError
            reason, error = str(e), e
        if len(jobs) == 1:
            image = jobs[0].image
            log.debug("explaining %s failed", image, exc_info=error)
            return [Failure(image, reason.replace("image 0 of the batch", image))]
        half = len(jobs) // 2
        return self.explain(jobs[:half]) + self.explain(jobs[half:])

    def _explain(self, jobs: Sequence[Job]) -> list[Explained]:
        x = torch.stack([job.x for job in jobs]).to(self.device, non_blocking=True)
        if jobs[0].target is not None or not isinstance(jobs[0].references, tuple):
            return self._explain_alike(jobs, x)
        # Given references and the predicted class: known only now whether an image is predicted as a reference.
        jobs, notes = self._predicted(jobs, x)
        groups: dict[int, list[int]] = {}
        for i, job in enumerate(jobs):
            groups.setdefault(len(job.references) if isinstance(job.references, tuple) else 0, []).append(i)
        explained: dict[int, Explained] = {}
        for group in groups.values():
            explained |= zip(group, self._explain_alike([jobs[i] for i in group], x[group]))
        return [replace(explained[i], note=note) for i, note in enumerate(notes)]

    def _predicted(self, jobs: Sequence[Job], x: Tensor) -> tuple[list[Job], list[str | None]]:
        """The jobs with the predicted class as target and without it among the references, and a note for each."""
        first = next((p for p in self.classifier.model.parameters() if p.is_floating_point()), x)
        with torch.no_grad():
            found = logits_of(self.classifier.model(x.to(first.dtype))).argmax(1).tolist()
        settled: list[Job] = []
        notes: list[str | None] = []
        for job, prediction in zip(jobs, found):
            given = job.references if isinstance(job.references, tuple) else ()
            left, note = without_prediction(given, prediction, self.classifier)
            settled.append(replace(job, target=prediction, references=left))
            notes.append(note)
        return settled, notes

    def _explain_alike(self, jobs: Sequence[Job], x: Tensor) -> list[Explained]:
        options = self.options
        targets = None if jobs[0].target is None else torch.tensor([job.target for job in jobs], device=self.device)
        references: Any = jobs[0].references
        if isinstance(references, tuple):
            references = torch.tensor([job.references for job in jobs], device=self.device)
        result = self.explainer.sweep(
            x,
            options.strengths,
            target=targets,
            references=references,
            similarity=options.similarity,
            weighting=options.weighting,
            aggregate=options.aggregate,
            normalize=None,
            size=None,
        )
        logits = result.logits.detach().float().cpu()
        maps = result.maps.detach().float().cpu().numpy()
        chosen, empty = result.target.cpu(), result.empty.cpu()
        drops = self._metrics(x, result) if options.metrics else [{} for _ in jobs]
        explained = []
        for i, job in enumerate(jobs):
            against, weights = tuple(result.references[i].tolist()), tuple(result.weights[i].tolist())
            target, label = int(chosen[i]), self.plan.label(job.label)
            explained.append(
                Explained(
                    image=job.image,
                    size=job.size,
                    box=job.box,
                    picture=job.picture,
                    maps=maps[i],
                    gammas=options.strengths,
                    target=target,
                    prediction=int(logits[i].argmax()),
                    references=against,
                    weights=weights,
                    probabilities=logits[i].softmax(-1).numpy(),
                    gaps=tuple(float(logits[i, target] - logits[i, d]) for d in against),
                    empty=tuple(empty[i].tolist()),
                    label=self.classifier.name(label) if label is not None else self._data_label(job.label),
                    metrics=drops[i],
                )
            )
        return explained

    def _data_label(self, label: int | None) -> str | None:
        return None if label is None or not self.dataset.classes else self.dataset.classes[label]

    def _metrics(self, x: Tensor, result: Any) -> list[dict[str, float]]:
        """Relative drop (arXiv 2501.11309, eq. 10) of the plain and the finer map, against the same nearest class."""
        from finecam.metrics import relative_drop

        first = next((p for p in self.classifier.model.parameters() if p.is_floating_point()), x)
        x = x.to(first.dtype)
        nearest = result.references[:, 0] if result.references.shape[1] else None
        rows: list[dict[str, float]] = [{} for _ in range(len(x))]
        fractions = (0.05, 0.1)
        for name, k in (("plain", 0), ("finer", 1))[: len(self.options.strengths)]:
            drops = relative_drop(self.classifier.model, x, result.maps[:, k], result.target, nearest, fractions)
            for row, values in zip(rows, drops.tolist()):
                row |= {f"relative_drop@{q:g}, {name}": value for q, value in zip(fractions, values)}
        return rows


@contextmanager
def one_warning() -> Iterator[None]:
    """Hold back the explainer's warning of each batch without gradient: records and the end of the run tell it."""

    def wanted(message: logging.LogRecord) -> bool:
        return not str(message.msg).startswith("all-zero gradient")

    explainer = logging.getLogger("finecam.explainer")
    explainer.addFilter(wanted)
    try:
        yield
    finally:
        explainer.removeFilter(wanted)


def stream(
    worker: Worker, todo: Sequence[int], out: Path, shown: ExamplePictures, meta: dict[str, Any], workers: int
) -> Iterator[dict[str, Any] | Failure]:
    """Decode, explain and store, each overlapping the others; yields records and failures as they come."""
    threads = max(1, workers)
    decoders, encoders = ThreadPoolExecutor(threads, "decode"), ThreadPoolExecutor(threads, "encode")
    names, style = worker.classifier.class_names, worker.options.style
    storing: deque[tuple[str, Future[dict[str, Any]]]] = deque()

    def finish(job_done: Explained) -> dict[str, Any]:
        job_done.example = shown.of(job_done.references[0], job_done.image) if job_done.references else None
        return store(out, job_done, names, style, meta)

    def drain(allowed: int) -> Iterator[dict[str, Any] | Failure]:
        while len(storing) > allowed:
            image, future = storing.popleft()
            try:
                yield future.result()
            except (OSError, ValueError) as e:
                yield Failure(image, f"cannot store the result ({e})")

    try:
        for batch in _batches(decoders, worker, todo, threads):
            if isinstance(batch, Failure):
                yield from drain(0)  # results before it first: a strict run stops here and keeps them
                yield batch
                continue
            for result in worker.explain(batch):
                if isinstance(result, Failure):
                    yield result
                else:
                    storing.append((result[0].image, encoders.submit(finish, result[1])))
            yield from drain(2 * worker.batch_size)
        yield from drain(0)
    finally:  # also when the caller stops early: no thread goes on writing behind its back
        decoders.shutdown(wait=True, cancel_futures=True)
        encoders.shutdown(wait=True, cancel_futures=True)


def _batches(
    decoders: ThreadPoolExecutor, worker: Worker, todo: Sequence[int], threads: int
) -> Iterator[list[Job] | Failure]:
    """Batches of one input shape and one number of references, from a window of images decoded ahead."""
    pending: deque[Future[Job | Failure]] = deque()
    waiting: dict[Any, list[Job]] = {}
    queue = iter(todo)
    exhausted = False
    while not exhausted or pending:
        while not exhausted and len(pending) < worker.batch_size + threads:
            i = next(queue, None)
            if i is None:
                exhausted = True
            else:
                pending.append(decoders.submit(worker.decode, i))
        if not pending:
            break
        job = pending.popleft().result()
        if isinstance(job, Failure):
            yield job
            continue
        count = len(job.references) if isinstance(job.references, tuple) else job.references
        key = (tuple(job.x.shape), isinstance(job.references, tuple), count)
        waiting.setdefault(key, []).append(job)
        if len(waiting[key]) >= worker.batch_size:
            yield waiting.pop(key)
        elif sum(map(len, waiting.values())) >= 4 * worker.batch_size:  # many shapes: do not hold them all
            yield waiting.pop(max(waiting, key=lambda k: len(waiting[k])))
    yield from waiting.values()
