"""The embedded tasks: tinyworld's picture albums as samples.

The prompt of a sample is the album's context without the begin and separator tokens, which the chat template of the
tiny model writes itself, so that any other model can be asked the same.
"""

from __future__ import annotations

from PIL import Image
from vfm_core.errors import unknown_name
from vfm_core.specs import Spec

from meda_kv.data.samples import METRICS, Sample, Task, level_of, make_task

TASKS = ("needle", "gist", "list")
_METRICS = {"needle": "needle", "gist": "needle", "list": "words"}
_STRUCTURE = ("<bos>", "<sep>")


def read_albums(spec: Spec, limit: int | None = None) -> Task:
    """Samples of ``tinyworld:needle|gist|list``.

    Parameters
    ----------
    spec : Spec
        Options: ``n`` albums (64), ``images`` per album (8), ``seed`` (0), ``split`` (test), ``words`` without meaning
        before every picture (0), ``needles`` with a digit, ``depth`` of the first question's picture, ``metric`` in
        place of the task's own.
    limit : int, optional
        At most so many.

    Returns
    -------
    Task
        One sample per album, with all its questions; metric ``"needle"`` (the word is in the answer), for ``list``
        ``"words"`` (the share of digits right in their place; with ``metric=exact`` all or nothing).

    Raises
    ------
    UserError
        Unknown task or option, or a value out of range.
    """
    from tinyworld.albums import make_albums

    if spec.name not in TASKS:
        raise unknown_name("embedded task", spec.name, TASKS, where=str(spec))
    options = spec.read(n=int, images=int, seed=int, split=str, words=int, needles=int, depth=int, metric=str)
    count = options.pop("n", 64)
    metric = options.pop("metric", _METRICS[spec.name])
    if metric not in METRICS or metric == "accuracy":
        raise unknown_name("metric", metric, [name for name in METRICS if name != "accuracy"], where=str(spec))
    albums = make_albums(spec.name, count if limit is None else min(count, limit), **options)
    samples = [
        Sample(
            id=album.id,
            images=tuple(Image.fromarray(picture) for picture in album.images),
            prompt=" ".join(word for word in album.context.split() if word not in _STRUCTURE),
            answer=album.questions[0][1],
            questions=album.questions,
            metric=metric,
            task=spec.name,
            group="tinyworld",
            level=level_of(len(album.images)),
            raw={"colours": album.colours, "digits": album.digits.tolist(), "patches": album.patches.tolist()},
            source=f"tinyworld:{spec.name}",
        )
        for album in albums
    ]
    return make_task(spec.name, samples, str(spec), key=lambda sample: sample.id)
