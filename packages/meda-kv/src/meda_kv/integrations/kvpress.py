"""A press for kvpress (NVIDIA): any method of this package inside ``with press(model):``.

For users who are on kvpress and therefore on transformers below 5.3; everybody else uses `meda_kv.MedaCache`, which
also handles batches, padding, several turns and ragged layers under every attention implementation. kvpress compresses
a layer in the layer's own forward hook, but a budget that is split over layers is known only when all layers have read
the prompt: `MedaPress` therefore only watches in the forward hook and compresses when the language model's forward
ends. Its limits are kvpress's: one prompt at a time, prefill in one forward, no quantised cache, and layers of unequal
length, which a following turn of more than one token survives under flash attention only.

kvpress is imported when `MedaPress` is first used.

Examples
--------
>>> from meda_kv.integrations.kvpress import MedaPress  # doctest: +SKIP
>>> with MedaPress(ratio=0.2, method="meda")(model):  # doctest: +SKIP
...     model(input_ids, past_key_values=cache)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vfm_core.errors import UserError

if TYPE_CHECKING:
    from meda_kv.methods import Method

_log = logging.getLogger(__name__)

__all__ = ["MedaPress", "PressLayer", "PromptReading", "rotated"]


@dataclass
class PressLayer:
    """One layer of a foreign cache, and what was watched of it.

    Attributes
    ----------
    target : object
        Layer of the cache, with tensors ``keys`` and ``values`` [1, Hkv, S, D].
    visual : Tensor
        Bool [1, Hkv, S].
    state : dict
        What the observers keep, by observer.
    """

    target: Any
    visual: Tensor
    state: dict[Any, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """S."""
        return int(self.target.keys.shape[2])


class PromptReading:
    """What is watched while one prompt is read, and the compression that follows.

    Parameters
    ----------
    method : Method
        Of `meda_kv.methods`, with a scorer.
    ratio : float
        Share of the prompt's slots to keep over all layers, in (0, 1].
    """

    def __init__(self, method: Method, ratio: float) -> None:
        from meda_kv.methods import EntropyMeter

        assert method.scorer is not None and method.allocator is not None
        self.method, self.ratio = method, ratio
        self.scorer, self.allocator = method.scorer, method.allocator
        kind = self.allocator.entropy
        # The second is read where the first is undefined: a prompt of one modality.
        rows = self.allocator.entropy_sample
        self.meters = [EntropyMeter(name, sample=rows) for name in dict.fromkeys((kind, "self"))] if kind else []
        self.layers: dict[int, PressLayer] = {}

    def observe(
        self, target: Any, index: int, query: Tensor, visual: Tensor, scale: float, softcap: float | None
    ) -> None:
        """Take in one layer's attention.

        Parameters
        ----------
        target : object
            Layer of the cache, filled with this prompt's ``keys`` and ``values`` [1, Hkv, n, D] and nothing else.
        index : int
            Of the layer in the model.
        query : Tensor
            [1, H, n, D], after RoPE.
        visual : Tensor
            Bool [1, n].
        scale, softcap
            Of the attention logits.
        """
        from meda_kv.methods import Look, observe_all

        slots = visual[:, None].expand(target.keys.shape[:3])
        layer = self.layers.setdefault(index, PressLayer(target, slots))
        valid = torch.ones_like(visual)
        observers = [self.scorer, *self.meters]
        states = [layer.state.setdefault(observer, {}) for observer in observers]
        look = Look(query, target.keys, target.values, None, None, slots, valid, visual, 0, scale, softcap, index)
        observe_all(observers, states, look)

    def compress(self) -> list[int]:
        """Compress every layer that was watched.

        Returns
        -------
        list of int
            Slots kept per layer; their sum is ``round(ratio * L * n)``.

        Raises
        ------
        RuntimeError
            NaN or infinity in the scores of a layer.
        UserError
            The ratio leaves less than the floors of the layers.
        """
        from meda_kv.methods import LayerStats

        layers = [self.layers[index] for index in sorted(self.layers)]
        n = torch.tensor([layers[0].slots])
        scores = [self._scores(layer, index) for index, layer in sorted(self.layers.items())]
        stats = LayerStats(
            n=n,
            available=n.expand(len(layers), 1),
            entropy=self._entropies(layers),
            scores=scores if self.allocator.wants_scores else None,
            valid=[None] * len(layers) if self.allocator.wants_scores else None,
        )
        budgets = self.allocator.budgets(stats, self.ratio, self.method.least)
        for layer, score, budget in zip(layers, scores, budgets.tolist()):
            if budget[0] < layer.slots:
                self._keep(layer, score, budget[0])
        return [layer.slots for layer in layers]

    def _scores(self, layer: PressLayer, index: int) -> Tensor:
        scores = self.scorer.scores(layer.state[self.scorer], layer.target.keys, layer.target.values, None)
        if not bool(torch.isfinite(scores).all()):
            remedy = "load the model in float32 or bfloat16"
            raise RuntimeError(f"NaN or infinity in the scores of layer {index}: nothing can be selected; {remedy}")
        return scores

    def _entropies(self, layers: Sequence[PressLayer]) -> Tensor | None:
        for meter in self.meters:
            values = torch.stack([meter.value(layer.state[meter]).float().cpu() for layer in layers])
            if bool(torch.isfinite(values).all()):
                if meter is not self.meters[0]:
                    _log.warning("a prompt of one modality: its %s entropy is used", meter.kind)
                return values
        if self.meters:
            raise RuntimeError("the attention entropies are not finite; load the model in float32 or bfloat16")
        return None

    def _keep(self, layer: PressLayer, scores: Tensor, budget: int) -> None:
        from meda_kv.core import select

        method, target = self.method, layer.target
        keep = select(
            scores,
            budget,
            recent_share=method.recent_share,
            visual=layer.visual,
            text_prior=method.text_prior,
            sink=method.sink,
            recent=method.recent_count(layer.slots),
            per_head=method.per_head,
        )
        if method.merger is not None:
            given = scores if method.merger.wants_scores else None
            target.keys, target.values = method.merger.merge(target.keys, target.values, keep, None, given)
        else:
            index = keep[..., None].expand(*keep.shape, target.keys.shape[3])
            target.keys, target.values = target.keys.gather(2, index), target.values.gather(2, index)


def rotated(query: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Queries [B, H, n, D] after rotary embedding with cos and sin [B, n, R]; only the first R <= D channels turn."""
    cos, sin = (part.unsqueeze(1) for part in position_embeddings)
    turned, rest = query[..., : cos.shape[-1]], query[..., cos.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-b, a], dim=-1) * sin, rest], dim=-1)


def _visual(model: nn.Module, kwargs: Mapping[str, Any], given: Tensor | None) -> Tensor:
    from meda_kv.attention.tokens import token_facts

    facts = token_facts(model, kwargs, 0, given)
    if facts.valid.shape[0] != 1 or not bool(facts.valid.all()):
        shown = f"{facts.valid.shape[0]} rows, {int((~facts.valid).sum())} padding tokens"
        remedy = "give one prompt at a time, or use meda_kv.MedaCache"
        raise UserError("a press compresses one prompt without padding", where="MedaPress", given=shown, remedy=remedy)
    return facts.visual


def _build() -> type:
    """The class `MedaPress`, made when kvpress is there to derive it from."""
    try:
        from kvpress import BasePress
        from kvpress.utils import get_prerope_query_states
    except ImportError as error:
        remedy = "install kvpress (it needs transformers below 5.3), or use meda_kv.MedaCache, which needs neither"
        raise ImportError(f"MedaPress needs kvpress: {error}; {remedy}") from error

    @dataclass
    class MedaPress(BasePress):
        """Compress a prompt with a budget of its own for every layer (MEDA, arXiv 2502.17599).

        Parameters
        ----------
        ratio : float
            Share of the cache to *keep*, in (0, 1]; kvpress's ``compression_ratio`` is one minus that.
        method : str or Method
            Any method of `meda_kv.methods`.
        preset : {"paper", "official-code"}
            See `meda_kv.methods.resolve_method`.
        visual_mask : Tensor, optional
            Bool [1, n]; by default the image placeholders among the input ids.
        options : dict
            Further settings of the method, such as ``{"merge": "none"}``.

        Attributes
        ----------
        kept : list of int
            Slots per layer after the last prompt.

        Raises
        ------
        UserError
            A ratio out of range, an unknown method, or one that re-rotates its keys; more than one prompt at once.
        TypeError
            A quantised cache.
        """

        ratio: float = 0.2
        method: Any = "meda"
        preset: str = "paper"
        visual_mask: Tensor | None = None
        options: dict[str, Any] = field(default_factory=dict)
        kept: list[int] = field(default_factory=list, init=False, repr=False)

        def __post_init__(self) -> None:
            from meda_kv.methods import check_ratio, resolve_method

            check_ratio(self.ratio)
            self._method = resolve_method(self.method, preset=self.preset, **self.options)
            if self._method.rerotate:
                remedy = "use meda_kv.CompressedCache for it"
                raise UserError("a press cannot re-rotate keys", where="MedaPress", given=self.method, remedy=remedy)
            self._reading: PromptReading | None = None
            self._model: nn.Module | None = None
            self._seen: Tensor | None = None

        @property
        def compression_ratio(self) -> float:
            """Share of the cache that is dropped, as kvpress counts."""
            return 1.0 - self.ratio

        @compression_ratio.setter
        def compression_ratio(self, value: float) -> None:
            from meda_kv.methods import check_ratio

            self.ratio = check_ratio(1.0 - value)

        def forward_hook(self, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
            """Watch one attention layer while the prompt is read; nothing is changed here."""
            cache = kwargs.get("past_key_values")
            if cache is None or self._model is None or self._method.scorer is None:
                return output
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else input[0]
            target = cache.layers[module.layer_idx]
            if hasattr(target, "_quantized_keys"):
                raise TypeError("unsupported: a quantised cache; give MedaPress a DynamicCache")
            if target.keys.shape[2] != hidden.shape[1]:  # an answer is being generated
                return output
            if self._reading is None:
                self._reading = PromptReading(self._method, self.ratio)
            if self._seen is None:
                self._seen = _visual(self._model, {"inputs_embeds": hidden}, self.visual_mask)
            query = rotated(get_prerope_query_states(module, hidden), kwargs["position_embeddings"])
            scale = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
            softcap = getattr(module, "attn_logit_softcapping", None)
            visual = self._seen.to(hidden.device)
            self._reading.observe(target, module.layer_idx, query, visual, scale, softcap)
            return output

        def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if self._model is not None and self._seen is None and isinstance(ids, Tensor) and ids.shape[1] > 1:
                self._seen = _visual(self._model, {**kwargs, "input_ids": ids}, self.visual_mask)

        def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            reading, self._reading, self._seen = self._reading, None, None
            if reading is not None and reading.layers:
                self.kept = reading.compress()

        @contextmanager
        def __call__(self, model: nn.Module) -> Iterator[None]:
            """Watch and compress every prompt that the model reads inside the block."""
            inner: Any = model.model
            language = getattr(inner, "language_model", inner)
            self._model, self._reading, self._seen = model, None, None
            hooks: list[Any] = []
            try:
                with super().__call__(model):
                    outer = {id(m): m for m in (model, inner, language)}.values()
                    hooks += [m.register_forward_pre_hook(self._before, with_kwargs=True) for m in outer]
                    hooks.append(language.register_forward_hook(self._after, with_kwargs=True))
                    yield
            finally:
                for hook in hooks:
                    hook.remove()
                self._model = self._reading = self._seen = None

    MedaPress.__module__, MedaPress.__qualname__ = __name__, "MedaPress"
    return MedaPress


if TYPE_CHECKING:
    MedaPress: Any
else:

    def __getattr__(name: str) -> Any:
        if name != "MedaPress":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()["MedaPress"] = _build()
        return globals()["MedaPress"]
