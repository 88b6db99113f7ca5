"""Which classes are fine-tuned on and which are absent: random, similarity-based, from a file, or the reference splits.

The reference orders (``data/splits.json``) are those of the published code of FTC, "Fine-Tuning is Fine, if Calibrated"
(arXiv 2409.16223); random and similarity-based splits are its two split types, the second in our own construction.
The halving of S for pseudo cross-validation is of the same paper, the split of the samples of every class 7:3 is
that of HT, "Holistic Transfer" (arXiv 2311.01420).

S are the seen classes, U the absent ones, R the remaining ones (neither).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from vfm_core.errors import UserError, unknown_name

from ft_calibrate.class_names import imagenet_classes
from ft_calibrate.pseudo_splits import per_class_split, pseudo_splits
from ft_calibrate.split_record import Split, read_split, write_split

__all__ = [
    "KINDS",
    "OFFICIAL",
    "Split",
    "is_official",
    "make_split",
    "office_home_classes",
    "official_split",
    "per_class_split",
    "pseudo_splits",
    "read_split",
    "seen_sweep",
    "write_split",
]

KINDS = ("random", "similarity", "file", "official")
OFFICIAL = ("office-home:Ar", "office-home:Rw", "imagenet-r", "imagenet-sketch")

_SHORT = {
    "ar": "office-home:Ar",
    "rw": "office-home:Rw",
    "office-home-ar": "office-home:Ar",
    "office-home-rw": "office-home:Rw",
    "imagenet-r": "imagenet-r",
    "in-r": "imagenet-r",
    "imagenet-sketch": "imagenet-sketch",
    "imagenet-s": "imagenet-sketch",
    "in-s": "imagenet-sketch",
}


# ------------------------------------------------------------------------------------------------------------- official
def official_split(name: str, n_seen: int | None = None) -> Split:
    """Return a reference split of FTC.

    Parameters
    ----------
    name : str
        ``"office-home:Ar"`` or ``"office-home:Rw"`` (the *source* domain: the same 30 classes serve its three targets),
        ``"imagenet-r"``, ``"imagenet-sketch"``; or short with the number of seen classes, ``"ar-30"``, ``"rw-30"``,
        ``"imagenet-r-100"``. Case does not matter.
    n_seen : int, optional
        Another number of seen classes: the first of the reference order, the rest of which is absent.

    Returns
    -------
    Split
        Office-Home: 65 classes, 30 seen, 35 absent. ImageNet: 1000 classes named by WordNet id in ILSVRC order; of
        ImageNet-R 100 seen, 100 absent and 800 remaining, of ImageNet-Sketch 500 seen and 500 absent.

    Raises
    ------
    UserError
        Unknown name; a number of seen classes that leaves none absent.

    Examples
    --------
    >>> split = official_split("ar-30")
    >>> len(split.seen), len(split.absent), split.seen[:2]
    (30, 35, ('Bottle', 'Fork'))
    """
    key, count = _official_key(name)
    if count is not None and n_seen is not None and count != n_seen:
        raise UserError("two numbers of seen classes", where="split name", given=f"{name} and {n_seen}")
    n_seen = n_seen if count is None else count
    entry = _reference()["orders"][key]
    order = entry["order"]
    n_seen = entry["n_seen"] if n_seen is None else n_seen
    if not 1 <= n_seen < len(order):
        remedy = f"choose 1 to {len(order) - 1}"
        raise UserError("number of seen classes out of range", where=f"split {name}", given=n_seen, remedy=remedy)
    classes = office_home_classes() if key.startswith("office-home") else imagenet_classes()
    label = key if n_seen == entry["n_seen"] else f"{key} ({n_seen} seen)"
    names = [classes[i] for i in order]
    return Split(classes, tuple(names[:n_seen]), tuple(names[n_seen:]), label, "official")


def office_home_classes() -> tuple[str, ...]:
    """The 65 classes of Office-Home in the order of the label ids of its image lists (not the alphabet's)."""
    return tuple(_reference()["office_home_classes"])


def is_official(name: str) -> bool:
    """Whether `official_split` knows a name, such as ``"ar-30"``."""
    try:
        _official_key(name)
    except UserError:
        return False
    return True


def _official_key(name: str) -> tuple[str, int | None]:
    text = name.strip().lower().replace("_", "-")
    text = text.replace(":", "-")
    if text in _SHORT:
        return _SHORT[text], None
    head, _, tail = text.rpartition("-")
    if head in _SHORT and tail.isdecimal():
        return _SHORT[head], int(tail)
    raise unknown_name("reference split", name, [*OFFICIAL, "ar-30", "rw-30"], where="split name")


@cache
def _reference() -> dict[str, Any]:
    return json.loads(files("ft_calibrate").joinpath("data/splits.json").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------- make
def make_split(
    classes: int | Sequence[str],
    n_seen: int | None = None,
    share: float | None = None,
    kind: str = "random",
    seed: int = 0,
    features: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    *,
    path: str | Path | None = None,
    clustering: str = "agglomerative",
    clusters: int | None = None,
    name: str | None = None,
) -> Split:
    """Divide a class list into seen and absent classes.

    Parameters
    ----------
    classes : int or sequence of str
        The class list, or its length K (the names are then ``"0"`` to ``"K-1"``).
    n_seen : int, optional
        Number of seen classes, 1 to K - 1. By default half of them, rounded up.
    share : float, optional
        The same as a share of K, in (0, 1); rounded to the nearest number.
    kind : str
        ``"random"``; ``"similarity"``: S and U lie far apart in feature space, see `similarity_order`; ``"file"``:
        read from ``path``; or the name of a reference split (see `official_split`).
    seed : int
        Of the random choice, and of k-means.
    features : array-like, (N, D) or (K, D)
        For ``"similarity"``: features of samples, with ``labels``; or one row per class without labels.
    labels : array-like of int, (N,)
        Column numbers; negative ones do not count.
    path : path, optional
        For ``"file"``: see `read_split`.
    clustering : {"agglomerative", "kmeans"}
        For ``"similarity"``.
    clusters : int, optional
        For ``"similarity"``: number of clusters, 2 to K; by default the square root of K, rounded up.
    name : str, optional
        Of the split.

    Returns
    -------
    Split
        Seen and absent classes in column order.

    Raises
    ------
    UserError
        A number out of range, an unknown kind, or features that are missing or do not fit.
    """
    names = tuple(str(i) for i in range(classes)) if isinstance(classes, int) else tuple(str(c) for c in classes)
    if kind == "file":
        if path is None:
            raise UserError("no file of classes", where="split kind file", remedy="give path=, a .txt or .json file")
        return read_split(path, names)
    if kind not in ("random", "similarity"):
        if not is_official(kind):
            raise unknown_name("kind of split", kind, ["random", "similarity", "file", *OFFICIAL, "ar-30", "rw-30"])
        return official_split(kind, n_seen).for_classes(names)
    count = _number_seen(len(names), n_seen, share)
    rng = np.random.default_rng(seed)
    if kind == "random":
        chosen = rng.permutation(len(names))[:count]
    else:
        from ft_calibrate.similarity import class_centres, similar_classes

        centres = class_centres(features, labels, names)
        chosen = similar_classes(centres, count, clustering=clustering, clusters=clusters, seed=seed)
    taken = set(chosen.tolist())
    return Split(
        names,
        tuple(c for i, c in enumerate(names) if i in taken),
        tuple(c for i, c in enumerate(names) if i not in taken),
        name or f"{kind} {count} of {len(names)}, seed {seed}",
        kind,
        seed,
    )


def _number_seen(k: int, n_seen: int | None, share: float | None) -> int:
    if n_seen is not None and share is not None:
        raise UserError("number and share of seen classes both given", given=f"{n_seen}, {share}", remedy="drop one")
    if share is not None and not 0 < share < 1:
        raise UserError("share of seen classes out of range", given=share, remedy="choose a number between 0 and 1")
    if k < 2:
        raise UserError("too few classes to split", given=k, remedy="give at least 2")
    if n_seen is None:
        n_seen = k - k // 2 if share is None else min(max(math.floor(share * k + 0.5), 1), k - 1)
    if not 1 <= n_seen < k:
        raise UserError("number of seen classes out of range", given=n_seen, remedy=f"choose 1 to {k - 1}")
    return n_seen


def seen_sweep(split: Split, shares: Iterable[float], dropped: str = "absent", seed: int | None = None) -> list[Split]:
    """Shrink S step by step, for the study of the number of fine-tuning classes.

    Parameters
    ----------
    split : Split
        The largest S.
    shares : iterable of float
        Shares of S to keep, in (0, 1]. The choices are nested: a smaller S is part of every larger one.
    dropped : {"absent", "remaining"}
        What becomes of the classes that leave S: absent (U = Y without S), or remaining, so that U is the same in every
        step and its accuracies compare.
    seed : int, optional
        Order in which classes are kept; by default the order of ``split.seen``, which for reference splits is that of
        the paper.

    Returns
    -------
    list of Split
        One per share, with at least one seen class.

    Raises
    ------
    UserError
        A share out of range.
    """
    if dropped not in ("absent", "remaining"):
        raise unknown_name("treatment of dropped classes", dropped, ["absent", "remaining"])
    order = list(split.seen)
    if seed is not None:
        order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    steps = []
    for share in shares:
        if not 0 < share <= 1:
            raise UserError("share of seen classes out of range", given=share, remedy="choose from (0, 1]")
        count = max(1, math.floor(share * len(order) + 0.5))
        absent = split.absent + (tuple(order[count:]) if dropped == "absent" else ())
        steps.append(replace(split, seen=tuple(order[:count]), absent=absent, name=f"{split.name}, {share:g} of S"))
    return steps
