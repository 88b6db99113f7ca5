"""Budget profiles: each layer's share of the cache, measured once on some prompts and reused on any.

MEDA (arXiv 2502.17599, Eq. 7) computes a layer's budget from the entropies of *all* layers, so nothing can be dropped
before the whole prompt was read. With a profile the shares are known beforehand: a layer is compressed right after its
own attention, and the memory's peak is bounded too. Averaging shares over prompts is ours, not from the paper.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vfm_core.errors import UserError
from vfm_core.files import jsonable, write_json

from meda_kv.models import describe_model, describe_shape, fingerprint

log = logging.getLogger(__name__)

FORMAT = "meda-kv profile 1"
_IDENTITY = ("class", "layers", "heads", "kv_heads", "head_dim")


@dataclass(frozen=True)
class Profile:
    """Shares of the cache per compressed layer.

    Attributes
    ----------
    alphas : tuple of float
        One per compressed layer, mean 1: at ratio r and n prompt tokens a layer is to keep ``alpha * r * n`` (before
        the exact rounding and clamping of the allocator).
    spread : tuple of float
        Standard deviation over the samples, same order.
    layers : tuple of int
        Index in the model of each compressed layer.
    entropy : str
        Kind that the shares come from: ``"cross"``, ``"cross-causal"`` or ``"self"``.
    samples : int
        How many prompts were averaged.
    model : dict
        As `meda_kv.models.describe_model` gives it.
    settings : dict
        What else decided the numbers (temperature, method, ratio, preset, data).
    """

    alphas: tuple[float, ...]
    spread: tuple[float, ...]
    layers: tuple[int, ...]
    entropy: str
    samples: int
    model: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The file's content."""
        return {"format": FORMAT, **{name: jsonable(getattr(self, name)) for name in self.__dataclass_fields__}}

    def save(self, path: str | Path) -> Path:
        """Write ``profile.json``, atomically."""
        write_json(path, self.to_dict())
        return Path(path)

    def check(self, model: Any, *, where: str | Path = "profile") -> None:
        """Refuse a model that the profile was not measured on.

        Raises
        ------
        UserError
            Another class or shape of model, other layers, or other weights.
        """
        compressed = full_layers(model)
        if compressed != self.layers:
            given = f"{len(self.layers)} layers in the profile, {len(compressed)} compressed layers in the model"
            if len(compressed) == len(self.layers):
                given = f"layers {list(self.layers)} in the profile, {list(compressed)} in the model"
            raise UserError("the profile is of other layers", where=where, given=given, remedy=_REMEDY)
        mine = describe_shape(model)
        for key in _IDENTITY:
            if key in self.model and self.model[key] != mine[key]:
                given = f"{key} {self.model[key]} in the profile, {mine[key]} in the model"
                raise UserError("the profile is of another model", where=where, given=given, remedy=_REMEDY)
        recorded = self.model.get("fingerprint")
        if recorded is not None and recorded != (present := fingerprint(model)):
            given = f"fingerprint {recorded} in the profile, {present} of the model"
            raise UserError("the profile is of other weights", where=where, given=given, remedy=_REMEDY)


_REMEDY = "measure one with `meda-kv profile --model ...` on this model"


def full_layers(model: Any) -> tuple[int, ...]:
    """Indices of the layers of full attention, which are those that get compressed."""
    from meda_kv.attention import check_model

    return check_model(model).full_layers


def load_profile(source: str | Path | Mapping[str, Any], model: Any | None = None) -> Profile:
    """Read a profile and check it against the model that it is to be used with.

    Parameters
    ----------
    source : path or dict
        ``profile.json`` or its content.
    model : optional
        Checked by `Profile.check` when given.

    Returns
    -------
    Profile

    Raises
    ------
    UserError
        No such file, not a profile, shares that are not positive numbers, or another model.
    """
    where: str | Path = "profile"
    content: Any = source
    if not isinstance(source, Mapping):
        where = path = Path(source).expanduser()
        if not path.is_file():
            raise UserError("no such profile", where="budgets", given=str(path), remedy=_REMEDY)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError("not readable as JSON", where=where, given=error, remedy=_REMEDY) from error
    profile = _parsed(content, where)
    if model is not None:
        profile.check(model, where=where)
    return profile


def _parsed(content: Any, where: str | Path) -> Profile:
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        given = content.get("format") if isinstance(content, Mapping) else type(content).__name__
        raise UserError("not a profile of this version", where=where, given=given, remedy=_REMEDY)
    try:
        profile = Profile(
            alphas=tuple(float(value) for value in content["alphas"]),
            spread=tuple(float(value) for value in content["spread"]),
            layers=tuple(int(value) for value in content["layers"]),
            entropy=str(content["entropy"]),
            samples=int(content["samples"]),
            model=dict(content["model"]),
            settings=dict(content.get("settings") or {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        given = f"{type(error).__name__} {error}"
        raise UserError("a field is missing or malformed", where=where, given=given, remedy=_REMEDY) from error
    count = len(profile.layers)
    if not count or len(profile.alphas) != count or len(profile.spread) != count:
        given = f"{len(profile.alphas)} alphas, {len(profile.spread)} spreads, {count} layers"
        raise UserError("alphas, spread and layers must be of one length", where=where, given=given, remedy=_REMEDY)
    for i, alpha in enumerate(profile.alphas):
        if not 0.0 < alpha < float("inf"):
            given = f"alpha {alpha} of layer {profile.layers[i]}"
            raise UserError("a share must be a positive number", where=where, given=given, remedy=_REMEDY)
    return profile


def shares(entropies: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Each layer's share from its entropy, mean 1: ``softmax(E / temperature) * L`` (MEDA Eq. 7 at ratio 1).

    Parameters
    ----------
    entropies : sequence of float
        In nats, one per layer.
    temperature : float
        Greater than 0; 1 is the paper's.
    """
    values = torch.tensor(list(entropies), dtype=torch.float64) / temperature
    return [float(value) for value in values.softmax(0) * len(values)]


def make_profile(
    model: Any,
    entropies: Sequence[Sequence[float]],
    *,
    entropy: str = "cross",
    temperature: float = 1.0,
    settings: Mapping[str, Any] | None = None,
) -> Profile:
    """Average the shares of several prompts.

    Parameters
    ----------
    model
        What they were measured on.
    entropies : sequence of sequences of float
        ``[samples][L]`` in nats.
    entropy, temperature, settings
        Recorded; the temperature decides the shares.

    Returns
    -------
    Profile
        The mean of the shares has mean 1 again.

    Raises
    ------
    UserError
        No sample, or an entropy that is not a number (a prompt of one modality under ``"cross"``).
    """
    if not len(entropies):
        raise UserError("no sample to measure a profile on", where="profile", remedy="give at least one prompt")
    table = torch.tensor([shares(row, temperature) for row in entropies], dtype=torch.float64)
    if not bool(torch.isfinite(table).all()):
        row = int((~torch.isfinite(table)).any(dim=1).nonzero()[0, 0])
        remedy = "leave prompts without images out, or use --entropy self"
        raise UserError(f"no {entropy} entropy", where=f"sample {row}", given="NaN", remedy=remedy)
    mean = table.mean(dim=0)
    return Profile(
        alphas=tuple(float(value) for value in mean / mean.mean()),
        spread=tuple(float(value) for value in table.std(dim=0, correction=min(1, len(table) - 1))),
        layers=full_layers(model),
        entropy=entropy,
        samples=len(table),
        model=describe_model(model),
        settings={"temperature": temperature, **(settings or {})},
    )
