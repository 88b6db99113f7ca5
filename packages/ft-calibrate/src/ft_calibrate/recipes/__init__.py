"""Training recipes: FTC (arXiv 2409.16223) and HT (arXiv 2311.01420), common baselines, and ours.

``fine_tune`` trains by a recipe's name; ``recipe_names`` lists them. The names below are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_calibrate.recipes.averaging import SourceEnsemble, average_weights, interpolate
    from ft_calibrate.recipes.finetune import fine_tune
    from ft_calibrate.recipes.heads import CosineHead
    from ft_calibrate.recipes.run import Run, load_run
    from ft_calibrate.recipes.spec import RECIPES, Recipe, parse_recipe, recipe_names, recipe_rows

_WHERE = {
    "SourceEnsemble": "averaging",
    "average_weights": "averaging",
    "interpolate": "averaging",
    "fine_tune": "finetune",
    "CosineHead": "heads",
    "Run": "run",
    "load_run": "run",
    "RECIPES": "spec",
    "Recipe": "spec",
    "parse_recipe": "spec",
    "recipe_names": "spec",
    "recipe_rows": "spec",
}

__all__ = [
    "RECIPES",
    "CosineHead",
    "Recipe",
    "Run",
    "SourceEnsemble",
    "average_weights",
    "fine_tune",
    "interpolate",
    "load_run",
    "parse_recipe",
    "recipe_names",
    "recipe_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
