"""The names of recipes: ``ft``, ``wise:0.5``, ``lolsgd+distill:T=2,lambda=1`` and what they are made of.

A recipe is a list of parts joined by ``+``. At most one part says which parameters move (``ft`` when none does); all
others add to it: a course of training (`lolsgd`), changes of model or loss (`bn-frozen`, `cosine-head`, `seen-loss`),
penalties (`distill`, `rank` ...) and averages (`swa`, `wise` ...). Each part may carry options after a colon; the first
may be given without its name. The parts come from FTC (arXiv 2409.16223) and HT (arXiv 2311.01420), from common
baselines or from us, as `RECIPES` says; the grammar is ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vfm_core.errors import UserError, unknown_name

__all__ = ["RECIPES", "Option", "Part", "Recipe", "parse_recipe", "recipe_names", "recipe_rows"]


@dataclass(frozen=True)
class Option:
    """A setting of a part.

    Attributes
    ----------
    default : float, int, str or None
        None: follows from the training settings.
    low, high : float
        Range, both ends included.
    choices : tuple of str
        The allowed words; empty for numbers.
    whole : bool
        Whole numbers only.
    help : str
        One line.
    """

    default: float | int | str | None
    low: float = 0.0
    high: float = math.inf
    choices: tuple[str, ...] = ()
    whole: bool = False
    help: str = ""

    def read(self, value: Any, name: str, where: str) -> float | int | str:
        """Convert and check a value given as text or number."""
        if self.choices:
            if str(value) not in self.choices:
                raise unknown_name(name, str(value), self.choices, where=where)
            return str(value)
        try:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
            if not self.low <= number <= self.high or (self.whole and not number.is_integer()):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            kind = "a whole number" if self.whole else "a number"
            bounds = f"of at least {self.low:g}" if self.high == math.inf else f"from {self.low:g} to {self.high:g}"
            raise UserError(
                f"{name} out of range", where=where, given=repr(value), remedy=f"give {kind} {bounds}"
            ) from None
        return int(number) if self.whole else number


@dataclass(frozen=True)
class Part:
    """One word of a recipe.

    Attributes
    ----------
    kind : str
        ``scheme`` (which parameters move), ``course``, ``change``, ``loss``, ``iterates`` (average during training) or
        ``after`` (average with the source model).
    summary, origin : str
        One line; FTC, HT, "common baseline" or "ours".
    options : dict of str to Option
        By name; the first one may be written without it.
    """

    kind: str
    summary: str
    origin: str
    options: dict[str, Option] = field(default_factory=dict)


def _strength(default: float) -> Option:
    return Option(default, help="weight of the penalty")


_DISTILL = {"T": Option(2.0, low=1e-3, help="temperature"), "lambda": _strength(1.0)}

RECIPES: dict[str, Part] = {
    "ft": Part("scheme", "all parameters, cross-entropy over all K classes", "FTC, HT"),
    "lp": Part("scheme", "the head only, on cached features; backbone and BN statistics stay bit-identical", "FTC, HT"),
    "frozen-head": Part("scheme", "the backbone only; the head keeps the relations among classes", "FTC, HT"),
    "lp-ft": Part(
        "scheme",
        "first the head, then everything",
        "common baseline",
        {
            "lp_epochs": Option(None, low=1, whole=True, help="epochs of the first stage; default: as many again"),
            "lp_lr": Option(None, low=1e-12, help="learning rate of the first stage; default: the same"),
        },
    ),
    "bit-fit": Part("scheme", "biases and head biases only; BN statistics stay", "ours"),
    "lora": Part(
        "scheme",
        "low-rank updates of linear and convolution layers, and the head; merged at the end (needs peft)",
        "ours",
        {
            "r": Option(8, low=1, whole=True, help="rank"),
            "alpha": Option(16.0, low=1e-6, help="scale is alpha / r"),
            "dropout": Option(0.0, high=0.99, help="before the low-rank update"),
        },
    ),
    "oracle-ft": Part("scheme", "as ft, on target data of all classes: an upper bound, not deployable", "FTC, HT"),
    "lolsgd": Part(
        "course",
        "leave-out local SGD: average M short local runs, each without some of the seen classes",
        "HT",
        {
            "M": Option(4, low=1, whole=True, help="local runs per round"),
            "E": Option(None, low=1, whole=True, help="steps of a local run; default: those of an epoch"),
            "rho": Option(0.3, high=1.0, help="share of the seen classes that a local run leaves out"),
            "T": Option(None, low=1, whole=True, help="rounds; default: the epochs"),
        },
    ),
    "bn-frozen": Part(
        "change",
        "BN in eval mode, dropout before the head",
        "FTC (code option)",
        {"dropout": Option(0.1, high=0.99, help="probability")},
    ),
    "cosine-head": Part(
        "change",
        "head replaced by s * cos(w, f) with a learnable scale, started from the source head",
        "FTC",
        {"scale": Option(None, low=1e-6, help="start of s; default: mean norm of w times mean norm of f")},
    ),
    "seen-loss": Part("change", "cross-entropy over the seen columns only", "FTC (code option)"),
    "l2sp": Part("loss", "+ lambda ||theta - theta_source||^2", "common baseline", {"lambda": _strength(0.01)}),
    "distill": Part("loss", "+ lambda T^2 KL(source || model) over all classes", "HT (LwF)", _DISTILL),
    "distill-absent": Part("loss", "the same over the absent classes only: keeps their relations", "HT", _DISTILL),
    "rank": Part(
        "loss",
        "+ lambda ||corr(features)||_F^2 / D^2: keeps the effective rank of the features high",
        "HT (idea; formula of arXiv 2210.00226)",
        {"lambda": _strength(0.1)},
    ),
    "swa": Part(
        "iterates",
        "mean of the weights after each of the last epochs, BN statistics re-estimated",
        "HT",
        {"start": Option(0.5, high=1.0, help="share of the training before the first one")},
    ),
    "ema": Part(
        "iterates",
        "exponential moving average of the weights after each step, BN statistics re-estimated",
        "HT",
        {"decay": Option(0.99, high=0.999999, help="weight of the past")},
    ),
    "wise": Part(
        "after",
        "(1 - a) theta_source + a theta, all tensors including BN statistics",
        "HT (WiSE-FT)",
        {"a": Option(0.5, high=1.0, help="0 gives the source model, 1 the fine-tuned one")},
    ),
    "source-ensemble": Part(
        "after",
        "mean of the softmax (or of the logits) of source and fine-tuned model",
        "HT",
        {"mean": Option("softmax", choices=("softmax", "logit"), help="what is averaged")},
    ),
}
"""What a recipe may consist of."""


def recipe_names() -> list[str]:
    """Names of all parts, in the order of the table."""
    return list(RECIPES)


def recipe_rows() -> list[dict[str, str]]:
    """The table of parts for people: name, kind, summary, origin and options with their defaults."""
    return [
        {
            "recipe": name,
            "kind": part.kind,
            "what": part.summary,
            "from": part.origin,
            "options": ", ".join(f"{k}={'auto' if o.default is None else o.default}" for k, o in part.options.items()),
        }
        for name, part in RECIPES.items()
    ]


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe.

    Attributes
    ----------
    parts : dict of str to dict
        Part name -> all its options, defaults filled in; in the order written.
    """

    parts: dict[str, dict[str, Any]]

    @property
    def text(self) -> str:
        """Canonical form, which parses to the same recipe: only options that differ from their defaults."""
        words = []
        for name, values in self.parts.items():
            options = RECIPES[name].options
            given = [f"{k}={_written(v)}" for k, v in values.items()]
            differs = [g for g, (k, v) in zip(given, values.items(), strict=True) if v != options[k].default]
            words.append(name + (":" + ",".join(differs) if differs else ""))
        return "+".join(words)

    def __str__(self) -> str:
        return self.text

    def __contains__(self, name: object) -> bool:
        return name in self.parts

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.parts[name]

    def of_kind(self, kind: str) -> dict[str, dict[str, Any]]:
        """The parts of one kind, with their options."""
        return {name: values for name, values in self.parts.items() if RECIPES[name].kind == kind}

    @property
    def is_upper_bound(self) -> bool:
        """Whether it trains with labels of absent classes, so that nothing of it can be deployed."""
        return "oracle-ft" in self.parts

    @property
    def scheme(self) -> str:
        """Which parameters move: ``ft`` unless a part says otherwise."""
        return next(iter(self.of_kind("scheme")), "ft")


def _written(value: Any) -> str:
    """A number that reads back as itself, short where that is possible."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def parse_recipe(text: str | Recipe, options: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Parameters
    ----------
    text : str or Recipe
        Parts joined by ``+``: ``name``, ``name:value`` or ``name:key=value,key=value``.
    options : mapping, optional
        Further options by name, for the part that has them. A name that several parts have is written
        ``part__name`` (with ``_`` for ``-``); ``lambda_`` means ``lambda``.

    Returns
    -------
    Recipe

    Raises
    ------
    UserError
        Unknown part or option, a value out of range, a part given twice, or parts that exclude each other.

    Examples
    --------
    >>> parse_recipe("lolsgd:M=2+distill").parts["distill"]
    {'T': 2.0, 'lambda': 1.0}
    >>> str(parse_recipe("wise:0.3"))
    'wise:a=0.3'
    """
    text = str(text).strip()
    parts: dict[str, dict[str, Any]] = {}
    for word in _words(text):
        name, values = _part(word, text)
        if name in parts:
            raise UserError("recipe names a part twice", where=repr(text), given=name, remedy="keep one of them")
        parts[name] = values
    for key, value in (options or {}).items():
        name, option = _owner(key, parts, text)
        parts[name][option] = RECIPES[name].options[option].read(value, option, f"recipe {text!r}")
    recipe = Recipe(parts)
    _check(recipe, text)
    return recipe


def _words(text: str) -> list[str]:
    words = [word.strip() for word in re.split(r"(?<![0-9][eE])\+", text)]  # but 1e+2 is a number
    if not all(words):
        raise UserError("empty part of a recipe", given=repr(text), remedy="write names joined by '+', such as ft")
    return words


def _part(word: str, text: str) -> tuple[str, dict[str, Any]]:
    name, colon, tail = word.partition(":")
    name = name.strip()
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES, where=repr(text) if name != text else None)
    options = RECIPES[name].options
    values = {key: option.default for key, option in options.items()}
    seen = set()
    for position, pair in enumerate(tail.split(",") if colon else ()):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            key, value = (next(iter(options), "") if position == 0 else ""), key
        if key not in options:
            if not options:
                raise UserError("a part without options", where=f"recipe {text!r}", given=word, remedy=f"write {name}")
            raise unknown_name(f"option of {name}", key or value, options, where=f"recipe {text!r}")
        if key in seen:
            raise UserError("option given twice", where=f"recipe {text!r}", given=key, remedy="keep one of them")
        seen.add(key)
        values[key] = options[key].read(value, key, f"recipe {text!r}")
    return name, values


def _owner(key: str, parts: Mapping[str, dict[str, Any]], text: str) -> tuple[str, str]:
    """Find the part that an option belongs to."""
    part, mark, option = key.partition("__")
    option = (option if mark else key).removesuffix("_")
    owners = [name for name in parts if option in RECIPES[name].options]
    if mark:
        owners = [name for name in owners if name.replace("-", "_") == part]
    if not owners:
        known = sorted({option for name in parts for option in RECIPES[name].options})
        raise unknown_name("option", key, known, where=f"recipe {text!r}")
    if len(owners) > 1:
        remedy = f"write {owners[0].replace('-', '_')}__{option}, or put it into the recipe"
        raise UserError("option of several parts", where=f"recipe {text!r}", given=key, remedy=remedy)
    return owners[0], option


def _check(recipe: Recipe, text: str) -> None:
    def refuse(what: str, names: Any, remedy: str) -> None:
        raise UserError(what, where=f"recipe {text!r}", given=" + ".join(names), remedy=remedy)

    schemes, averages = recipe.of_kind("scheme"), recipe.of_kind("iterates")
    if len(schemes) > 1:
        refuse("parts that exclude each other", schemes, "name one of them")
    if len(averages) > 1:
        refuse("two averages of the iterates", averages, "use one of them")
    if recipe.scheme == "lp" and "rank" in recipe:
        refuse("a penalty on features that do not move", ["lp", "rank"], "drop rank, or use another scheme than lp")
    if recipe.scheme == "frozen-head" and "cosine-head" in recipe:
        refuse("a new head that is not trained", ["frozen-head", "cosine-head"], "drop one of them")
    if recipe.scheme == "lora" and "l2sp" in recipe:
        refuse("a penalty on weights that stay", ["lora", "l2sp"], "drop l2sp: the low-rank update is the limit")
