"""Who watches the attention while a cache is filled, and the entropies of it (MEDA, arXiv 2502.17599, Eq. 4-6)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.cache.layer import CompressedLayer
from meda_kv.methods.base import Method, Observer, State
from meda_kv.methods.entropy import EntropyMeter

__all__ = ["Entropies", "Watch", "measure", "writable"]

T = TypeVar("T")


@dataclass(frozen=True)
class Entropies:
    """Entropies of the first reading.

    Attributes
    ----------
    values : Tensor
        float32 ``[L, B]`` in nats, on the CPU.
    used : tuple of str
        Per row the kind that was measured: the wanted one, or ``"self"`` where only one modality is present.
    """

    values: Tensor
    used: tuple[str, ...]

    def take_rows(self, rows: Tensor) -> Entropies:
        """Return the entropies of row ``rows[b]`` for row ``b``."""
        index = rows.cpu()
        return Entropies(self.values.index_select(1, index), tuple(self.used[int(b)] for b in index))


class Watch:
    """The observers that some methods need, each once.

    Parameters
    ----------
    methods : iterable of Method
        The cache's own method first, then those it records for.
    keep_queries : bool
        Whether cross-modal meters keep the queries, which makes them exact for prompts read in chunks.

    Attributes
    ----------
    scorers, meters : tuple
        What they are made of, without repetition.
    """

    def __init__(self, methods: Iterable[Method], keep_queries: bool = False) -> None:
        self.keep_queries = keep_queries
        chosen = list(methods)
        self.scorers = _once(method.scorer for method in chosen)
        self.meters = _once(self.meter(method) for method in chosen)
        self.fallback = EntropyMeter("self") if any(meter.kind != "self" for meter in self.meters) else None

    def meter(self, method: Method) -> EntropyMeter | None:
        """Return the meter that a method's allocator needs, None when none."""
        if method.allocator is None or method.allocator.entropy is None:
            return None
        kind = method.allocator.entropy
        return EntropyMeter(kind, self.keep_queries and kind != "self", method.allocator.entropy_sample)

    def observers(self, meters: bool, fallback: bool) -> list[Observer]:
        """Return who watches a forward.

        Parameters
        ----------
        meters : bool
            Whether entropies are still being measured.
        fallback : bool
            Whether some row has shown one modality only so far.
        """
        found: list[Observer] = [*self.scorers]
        if meters:
            found += self.meters
            if fallback and self.fallback is not None and self.fallback not in found:
                found.append(self.fallback)
        return [one for one in found if one.attention or type(one).observe is not Observer.observe]

    def covers(self, other: Watch) -> bool:
        """Whether everything that another watch needs is watched here."""
        return set(other.scorers) <= set(self.scorers) and set(other.meters) <= set(self.meters)

    def known(self) -> set[Observer]:
        """Return every observer that may have state."""
        found: set[Observer] = {*self.scorers, *self.meters}
        return found if self.fallback is None else {*found, self.fallback}


def measure(
    meter: EntropyMeter, fallback: EntropyMeter | None, layers: Sequence[CompressedLayer], needed: bool = True
) -> Entropies | None:
    """Read off the entropies of all layers.

    Parameters
    ----------
    meter : EntropyMeter
        The kind wanted.
    fallback : EntropyMeter or None
        Read instead in rows where the kind is undefined (one modality only).
    layers : sequence of CompressedLayer
        Whose state holds what was observed.
    needed : bool
        Whether budgets follow from it; otherwise nothing is warned of or raised.

    Returns
    -------
    Entropies or None
        None only where the entropies are not `needed` and cannot be told.

    Raises
    ------
    RuntimeError
        An entropy is not a number although both modalities are there, or nothing was observed; names the layer.
    UserError
        A row of the batch holds padding only.
    """
    real = layers[0].valid
    empty = [] if real is None else (~real.flatten(1).any(dim=1)).nonzero()[:, 0].tolist()
    if not needed and (empty or not all(layer.state.get(meter) for layer in layers)):
        return None
    if empty:
        raise UserError(
            "a row of the batch has no real token, so it has no attention to measure",
            where="attention_mask",
            given=f"row {empty[0]}: all 0",
            remedy="leave the row out",
        )
    values = torch.stack([_value(meter, layer, index) for index, layer in enumerate(layers)])
    rows = values.shape[1]
    by_chunks = any(bool(layer.state[meter].get("chunked", torch.tensor(False)).any()) for layer in layers)
    used = [meter.kind + (" (by chunks)" if by_chunks else "")] * rows
    missing = torch.isnan(values).all(dim=0)
    if bool(missing.any()) and fallback is not None and fallback in layers[0].state:
        if needed:
            warnings.warn(
                f"a prompt holds one modality only, so its {meter.kind} entropy is undefined; the self-attention "
                "entropy is used for it",
                stacklevel=2,
            )
        other = torch.stack([_value(fallback, layer, index) for index, layer in enumerate(layers)])
        values = torch.where(missing[None], other, values)
        used = ["self" if gone else kind for gone, kind in zip(missing.tolist(), used, strict=True)]
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad) and not needed:
        return None
    if len(bad):
        raise RuntimeError(
            f"the attention entropy of layer {int(bad[0, 0])} is not finite in row {int(bad[0, 1])}: its queries or "
            "keys hold NaN or infinity; load the model in float32 or bfloat16"
        )
    return Entropies(values, tuple(used))


def _value(meter: EntropyMeter, layer: CompressedLayer, index: int) -> Tensor:
    state = layer.state.get(meter)
    if not state:
        raise RuntimeError(f"layer {index} has measured no entropy: the prompt was not read through this cache")
    return meter.value(state).detach().float().cpu()


def _once(items: Iterable[T | None]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(item for item in items if item is not None))


def writable(state: State) -> State:
    """Replace tensors made under inference_mode, which may not be written in place outside of it."""
    if not torch.is_inference_mode_enabled():
        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and tensor.is_inference():
                state[name] = tensor.clone()
    return state
