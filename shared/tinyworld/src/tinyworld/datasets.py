"""Data specs ``tinyworld:birds``, ``:digits`` and ``:glyphs`` (entry point of the group ``vfm_core.data``)."""

from __future__ import annotations

from collections.abc import Callable

from vfm_core.data import ImageDataset, pick_splits
from vfm_core.errors import UserError, unknown_name
from vfm_core.specs import Spec

from tinyworld.birds import SPLITS, Birds
from tinyworld.catalogue import DATA
from tinyworld.digits import Digits
from tinyworld.glyphs import Glyphs

_MAKERS: dict[str, Callable[..., ImageDataset]] = {"birds": Birds, "digits": Digits, "glyphs": Glyphs}


def open_tinyworld(spec: Spec, split: str | None = None) -> ImageDataset:
    """Open ``tinyworld:NAME[@SPLIT][?key=value&...]``.

    Parameters
    ----------
    spec : Spec
        Name "birds", "digits" or "glyphs"; the options are the arguments of `Birds`, `Digits` and `Glyphs`.
    split : str, optional
        "train" (default), "val" or "test"; the same as ``@SPLIT`` and ``?split=``.

    Returns
    -------
    ImageDataset

    Raises
    ------
    UserError
        Unknown name, option or split (with the closest known ones), a value out of range, two different splits.
    """
    if spec.name == "albums":
        remedy = "use tinyworld.make_albums(task, n)"
        raise UserError("albums are prompts, not labelled pictures", where=str(spec), remedy=remedy)
    if spec.name not in DATA:
        raise unknown_name("tinyworld data", spec.name, DATA, where=str(spec))
    options = spec.read(**DATA[spec.name])
    asked = {pick_splits(SPLITS, one, str(spec))[0] for one in (spec.source, options.pop("split", None), split) if one}
    if len(asked) > 1:
        raise UserError("two splits asked for", where=str(spec), given=" and ".join(sorted(asked)), remedy="drop one")
    if asked:
        options["split"] = asked.pop()
    return _MAKERS[spec.name](**options)
