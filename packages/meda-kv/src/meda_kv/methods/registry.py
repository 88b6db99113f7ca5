"""The arms by name, the two presets, and how options change them.

``resolve_method("meda", recent_share=0.5, merge="none")`` takes an arm and replaces parts of it. ``preset="paper"`` is
what the papers write; ``preset="official-code"`` is what the official repositories compute where they differ. One thing
in ``"paper"`` is ours: windows of SnapKV and PyramidKV are at most a sixteenth of the prompt (``most=1`` undoes that).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from vfm_core.errors import UserError, closest, unknown_name

from meda_kv.core.merging import HOW
from meda_kv.methods.allocators import (
    EntropyAllocator,
    ManualAllocator,
    MassAllocator,
    OfficialAllocator,
    ProfileAllocator,
    PyramidAllocator,
    UniformAllocator,
)
from meda_kv.methods.base import Allocator, Merger, Method, Scorer
from meda_kv.methods.mergers import KeyMerger, ScoreMerger
from meda_kv.methods.scorers import (
    AccumulatedScorer,
    KeyNormScorer,
    MixedScorer,
    RandomScorer,
    RecencyScorer,
    WindowScorer,
)

_MEDA = "MEDA, arXiv 2502.17599"
_LOOKM = "LOOK-M, arXiv 2406.18139"

_meda = Method(
    "meda",
    "accumulated attention with text first, budgets by cross-modal entropy, dropped tokens averaged into kept ones",
    _MEDA,
    AccumulatedScorer(),
    EntropyAllocator("cross"),
    KeyMerger("average"),
    recent_share=0.75,
    text_prior="bias",
)
_lookm = Method(
    "look-m",
    "accumulated attention with text first, equal budgets, pivot merge",
    _LOOKM,
    AccumulatedScorer(),
    UniformAllocator(),
    KeyMerger("pivot"),
    recent_share=0.5,
    text_prior="bias",
)
_h2o = Method(
    "h2o",
    "half recent tokens, half those of highest accumulated attention",
    "H2O, arXiv 2306.14048",
    AccumulatedScorer(),
    UniformAllocator(),
    recent_share=0.5,
)
_snapkv = Method(
    "snapkv",
    "tokens that the prompt's last 32 queries (at most a sixteenth of it) attend to, pooled over neighbours",
    "SnapKV, arXiv 2404.14469",
    WindowScorer(),
    UniformAllocator(),
)

#: Every arm by name; see :func:`register_method`.
METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Make an arm known by its name, so that the command line, the bench and the evaluation take it.

    Parameters
    ----------
    method : Method
        A name in use is replaced; ``full`` is refused.

    Returns
    -------
    Method
        The same.
    """
    if not method.name or any(c in method.name for c in ",?&= "):
        raise UserError("a method's name has no comma, blank, ?, & or =", where="method", given=repr(method.name))
    if method.name == "full" and "full" in METHODS:
        raise UserError(
            "the name stands for the uncompressed cache", where="method", given="full", remedy="use another"
        )
    METHODS[method.name] = method
    return method


for _arm in (
    Method("full", "the whole cache, nothing dropped"),
    _meda,
    replace(_meda, name="meda-no-alloc", summary="meda with equal budgets (ablation)", allocator=UniformAllocator()),
    replace(_meda, name="meda-no-merge", summary="meda without merging (ablation)", merger=None),
    replace(
        _meda,
        name="meda-no-both",
        summary="meda with equal budgets and without merging (ablation)",
        allocator=UniformAllocator(),
        merger=None,
    ),
    replace(
        _meda,
        name="meda-fast",
        summary="meda without merging, entropy from 64 queries of each modality, scores from 128",
        source="ours, after MEDA",
        scorer=AccumulatedScorer(queries="sample:128"),
        allocator=EntropyAllocator("cross", sample=64),
        merger=None,
    ),
    _lookm,
    replace(_lookm, name="look-m-average", summary="look-m with the average merge", merger=KeyMerger("average")),
    replace(_lookm, name="look-m-weighted", summary="look-m with the weighted merge", merger=KeyMerger("weighted")),
    replace(_lookm, name="look-m-no-merge", summary="look-m without merging", merger=None),
    _h2o,
    replace(
        _h2o,
        name="roco",
        summary="as h2o, with the mean instead of the sum of the attention",
        source="RoCo, arXiv 2402.06262",
        scorer=AccumulatedScorer(reduction="mean"),
    ),
    _snapkv,
    replace(
        _snapkv,
        name="snapkv-meda",
        summary="snapkv as in MEDA's experiments: the window is a tenth of the prompt",
        source=_MEDA + " (its SnapKV arm)",
        scorer=WindowScorer(window=0.1, most=1.0),
    ),
    replace(
        _snapkv,
        name="pyramidkv",
        summary="snapkv scores of the last 64 queries (at most a sixteenth of the prompt), lower layers keep more",
        source="PyramidKV, arXiv 2406.02069",
        scorer=WindowScorer(window=64),
        allocator=PyramidAllocator(window=64),
    ),
    Method(
        "streaming",
        "the first 4 tokens and the most recent ones",
        "StreamingLLM, arXiv 2309.17453",
        RecencyScorer(),
        UniformAllocator(),
        recent_share=1.0,
        sink=4,
    ),
    Method("knorm", "keys of smallest norm (sanity baseline)", "", KeyNormScorer(), UniformAllocator()),
    Method("random", "tokens at random (sanity baseline)", "", RandomScorer(), UniformAllocator()),
    Method(
        "quota",
        "nine tenths dealt out in turns over the pictures, by attention of the last and of all queries",
        "ours, not from a paper",
        MixedScorer(),
        UniformAllocator(),
        quota=0.9,
    ),
    replace(
        _snapkv,
        name="snapkv-quota",
        summary="snapkv, nine tenths of the budget dealt out in turns over the pictures",
        source="ours, not from a paper",
        quota=0.9,
    ),
    replace(
        _snapkv,
        name="snapkv-entropy",
        summary="snapkv scores, budgets by cross-modal entropy, no merge",
        source="ours, not from a paper",
        allocator=EntropyAllocator("cross"),
    ),
    replace(
        _h2o,
        name="h2o-mass",
        summary="h2o with one threshold over all layers' normalised scores",
        source="ours, not from a paper",
        allocator=MassAllocator(),
    ),
    replace(
        _h2o,
        name="h2o-sample",
        summary="h2o from a stratified sample of 512 queries",
        source="ours, not from a paper",
        scorer=AccumulatedScorer(queries="sample:512"),
    ),
    replace(
        _snapkv,
        name="snapkv-values",
        summary="snapkv, dropped values averaged into kept ones by score, keys untouched",
        source="ours, not from a paper",
        merger=ScoreMerger(),
    ),
):
    register_method(_arm)

_OFFICIAL_MEDA: dict[str, Any] = {
    "recent_share": 0.5,
    "text_prior": "official",
    "compress_at": "first-step",
}
_OFFICIAL_MERGE = KeyMerger("average", gate="mean")
# LOOK-M's classes keep all text but neither widen the window nor wait for the first generated token.
_OFFICIAL_LOOKM: dict[str, Any] = {"text_prior": "keep-all"}

#: Per preset what each arm changes; arms that are not listed are the same in both.
PRESETS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {},
    "official-code": {
        "meda": {**_OFFICIAL_MEDA, "allocator": OfficialAllocator(), "merger": _OFFICIAL_MERGE},
        "meda-no-alloc": {**_OFFICIAL_MEDA, "merger": _OFFICIAL_MERGE},
        "meda-no-merge": {**_OFFICIAL_MEDA, "allocator": OfficialAllocator()},
        "meda-no-both": _OFFICIAL_MEDA,
        "look-m": _OFFICIAL_LOOKM,
        "look-m-average": {**_OFFICIAL_LOOKM, "merger": _OFFICIAL_MERGE},
        "look-m-weighted": {**_OFFICIAL_LOOKM, "merger": KeyMerger("weighted", gate="mean")},
        "look-m-no-merge": _OFFICIAL_LOOKM,
        "roco": {"scorer": AccumulatedScorer(reduction="mean-all")},
        "snapkv": {"scorer": WindowScorer(most=1.0)},
        "pyramidkv": {"scorer": WindowScorer(window=64, most=1.0), "allocator": PyramidAllocator(window=64, most=1.0)},
    },
}

BUDGETS: dict[str, Allocator] = {
    "entropy": EntropyAllocator(),
    "uniform": UniformAllocator(),
    "pyramid": PyramidAllocator(),
    "mass": MassAllocator(),
    "official": OfficialAllocator(),
}
MERGES: tuple[str, ...] = (*HOW, "weighted-by-score")
# Options by the part that takes them: as written by the user, and the field it sets.
_SCORER = {"score_queries": "queries", "queries": "queries", "group": "group", "reduction": "reduction"}
_SCORER |= {"window": "window", "kernel": "kernel", "pool": "pool", "most": "most", "seed": "seed"}
_ALLOCATOR = {"temperature": "temperature", "cap": "cap", "beta": "beta", "window": "window", "most": "most"}
_ALLOCATOR |= {"entropy_sample": "sample"}
_MERGER = {"gate": "gate", "merge_keys": "merge_keys", "merge_block": "block"}
_OWN = {f.name for f in fields(Method)} - {"name", "tags"}
OPTIONS: tuple[str, ...] = tuple(sorted(_OWN | {"entropy", "budgets", "merge"} | {*_SCORER, *_ALLOCATOR, *_MERGER}))


def resolve_method(method: str | Method, preset: str = "paper", **overrides: Any) -> Method:
    """Return an arm with the preset and the options applied.

    Parameters
    ----------
    method : str or Method
        A name of :data:`METHODS`, or a method of one's own (no preset applies to that).
    preset : {"paper", "official-code"}
        Which column where papers and official code disagree.
    **overrides
        Fields of :class:`Method` (``recent_share``, ``text_prior``, ``sink``, ``floor``, ``compress_at`` ...) and:
        ``budgets`` (``"entropy"``, ``"uniform"``, ``"pyramid"``, ``"mass"``, ``"official"``, a sequence of counts or
        shares, or an Allocator), ``entropy`` (kind), ``temperature``, ``cap``, ``entropy_sample``, ``beta``,
        ``score_queries`` or ``queries``, ``group``, ``reduction``, ``window``, ``kernel``, ``pool``, ``most``,
        ``seed``, ``merge`` (``"none"``, ``"average"``, ``"pivot"``, ``"weighted"``, ``"weighted-by-score"``),
        ``gate``, ``merge_keys``, ``merge_block``. None leaves an option as it is.

    Returns
    -------
    Method

    Raises
    ------
    UserError
        For unknown names (with the closest known ones), options that no part of the arm takes, or values out of range.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise unknown_name("preset", str(preset), PRESETS, "preset")
    if isinstance(method, str):
        if method not in METHODS:
            raise unknown_name("method", method, METHODS, "method")
        chosen = replace(METHODS[method], **PRESETS[preset].get(method, {}))
    elif isinstance(method, Method):
        chosen = method
    else:
        raise UserError(
            "a method is a name or a Method", where="method", given=repr(method), remedy=f"known: {', '.join(METHODS)}"
        )
    options = {name: value for name, value in overrides.items() if value is not None}
    for name in options:
        if name not in OPTIONS:
            near = closest(name, OPTIONS)
            remedy = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(OPTIONS)}"
            raise UserError("unknown option", where=f"method {chosen.name}", given=name, remedy=remedy)
    if not options:
        return chosen
    if chosen.scorer is None:
        raise UserError(
            "the full cache takes no options", where="method full", given=", ".join(options), remedy="leave them out"
        )
    taken: set[str] = set()
    own = {name: value for name, value in options.items() if name in _OWN}
    # What must fit together is checked at the end, when every part is what was asked for.
    rerotate = own.get("rerotate", chosen.rerotate)
    chosen, taken = replace(chosen, **{**own, "rerotate": False}), taken | set(own)
    allocator, merger = _allocator(chosen, options, taken), _merger(chosen, options, taken)
    scorer = _with(chosen.scorer, _SCORER, options, taken)
    left = [name for name in options if name not in taken]
    if left:
        raise UserError(
            "no part of this method takes the option",
            where=f"method {chosen.name}",
            given=", ".join(left),
            remedy=f"its scorer is {type(scorer).__name__}, its allocator {type(allocator).__name__}, "
            f"its merger {type(merger).__name__ if merger else 'none'}",
        )
    return replace(chosen, scorer=scorer, allocator=allocator, merger=merger, rerotate=rerotate)


def _with(part: Any, names: Mapping[str, str], options: Mapping[str, Any], taken: set[str]) -> Any:
    """Replace the fields of a scorer, allocator or merger that options name; note which options were used."""
    known = {f.name for f in fields(part)}
    mine = {name: names[name] for name in options if name in names and names[name] in known}
    taken.update(mine)
    return replace(part, **{field: options[name] for name, field in mine.items()}) if mine else part


def _allocator(chosen: Method, options: Mapping[str, Any], taken: set[str]) -> Allocator:
    allocator = chosen.allocator
    assert allocator is not None
    if "budgets" in options:
        taken.add("budgets")
        allocator = _budgets(options["budgets"], chosen)
    if "entropy" in options:
        # An entropy is only measured for budgets that come from it.
        if not isinstance(allocator, (EntropyAllocator, OfficialAllocator)):
            raise UserError(
                "budgets of this method do not come from an entropy",
                where=f"method {chosen.name}",
                given=f"entropy={options['entropy']}",
                remedy="add budgets=entropy",
            )
        taken.add("entropy")
        allocator = replace(allocator, kind=options["entropy"])
    return _with(allocator, _ALLOCATOR, options, taken)


def _budgets(budgets: Any, chosen: Method) -> Allocator:
    if isinstance(budgets, Allocator):
        return budgets
    if isinstance(budgets, str):
        if budgets not in BUDGETS:
            raise unknown_name("way to give budgets", budgets, BUDGETS, "budgets")
        current, wanted = chosen.allocator, BUDGETS[budgets]
        if budgets == "pyramid" and isinstance(chosen.scorer, WindowScorer):
            wanted = PyramidAllocator(window=chosen.scorer.window, most=chosen.scorer.most)
        return current if current is not None and type(current) is type(wanted) else wanted
    if isinstance(budgets, Sequence):
        return ManualAllocator(tuple(budgets))
    raise UserError(
        "budgets are a name, a list of counts or shares, or an Allocator",
        where="budgets",
        given=repr(budgets),
        remedy=f"use {', '.join(BUDGETS)}",
    )


def profile_method(method: Method, alphas: Sequence[float]) -> Method:
    """Return the method with fixed shares per layer, compressed inside each layer while the prompt is read."""
    return replace(method, allocator=ProfileAllocator(tuple(alphas)), compress_at="layer")


def _merger(chosen: Method, options: Mapping[str, Any], taken: set[str]) -> Merger | None:
    merger = chosen.merger
    if "merge" in options:
        taken.add("merge")
        how = options["merge"]
        if not isinstance(how, str) or how not in MERGES:
            raise unknown_name("way to merge", str(how), MERGES, "merge")
        if how == "none":
            # Options of merging say nothing then; they are not an error, since presets of commands pass them along.
            taken.update(name for name in options if name in _MERGER)
            return None
        if how == "weighted-by-score":
            merger = ScoreMerger()
        else:
            merger = replace(merger, how=how) if isinstance(merger, KeyMerger) else KeyMerger(how)
    return _with(merger, _MERGER, options, taken) if merger is not None else None


def parts(method: Method) -> dict[str, Scorer | Allocator | Merger | None]:
    """Return the three parts of a method by name, for tables."""
    return {"scorer": method.scorer, "allocator": method.allocator, "merger": method.merger}
