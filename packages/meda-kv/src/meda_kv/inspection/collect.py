"""What a model's layers see and what a method keeps of it: one prompt, measured once, as plain arrays."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from vfm_core.errors import UserError

from meda_kv.attention import token_facts
from meda_kv.cache import CompressedCache
from meda_kv.core import attention_entropy, scan_attention, total_budget
from meda_kv.generation import Generation, decode, evaluating, greedy
from meda_kv.inspection.grids import ImageTokens, locate_images
from meda_kv.models import describe_model, tokenizer_of
from meda_kv.prompts import Prompt, Unmarked, ordered_images, process, to_model

log = logging.getLogger(__name__)

KINDS = ("cross", "cross-causal", "self")
PAPER_RATIOS = (0.6, 0.4, 0.2)
"""Shares of the cache that the paper's qualitative figure (Fig. 5) shows answers at."""

MAP_SIDE = 128


class Recorder(CompressedCache):
    """A full cache that measures the prompt as it is read.

    Parameters
    ----------
    model
        A transformers model.
    attention_layers : sequence of int
        Layers (indices in the model) whose attention maps are kept.
    side : int
        Maps are averaged down to at most this many rows and columns.

    Attributes
    ----------
    entropy : dict
        Per kind and layer, in nats; NaN where the kind is undefined.
    maps : dict
        Per layer float32 ``[side, side]``: attention mass from a bin of queries to a bin of keys, mean over heads.
    looked : dict
        Per layer float32 ``[n]``: attention that each token gets from text, mean over text queries and heads.
    """

    def __init__(self, model: Any, attention_layers: Sequence[int] = (), side: int = MAP_SIDE) -> None:
        self.attention_layers, self.side = frozenset(attention_layers), side
        self.entropy: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
        self.maps: dict[int, Tensor] = {}
        self.looked: dict[int, Tensor] = {}
        super().__init__(model, "full", 1.0)

    def wants(self, layer_idx: int, q_len: int) -> bool:
        """Every layer while the prompt is read."""
        return q_len > 1 or super().wants(layer_idx, q_len)

    def after_attention(self, layer_idx: int, look: Any) -> None:
        """Measure the entropies of one layer and, where asked, its attention."""
        super().after_attention(layer_idx, look)
        if look.offset:
            raise UserError(
                "the prompt must be read in one piece for an inspection",
                where="prefill_chunk_size",
                given=look.query.shape[2],
                remedy="set model.generation_config.prefill_chunk_size = None",
            )
        for kind in KINDS:
            value = attention_entropy(
                look.query, look.key, look.query_visual, kind=kind, valid=look.query_valid, scale=look.scale
            )
            self.entropy[kind][layer_idx] = float(value[0])
        if layer_idx in self.attention_layers:
            self.maps[layer_idx], self.looked[layer_idx] = attention_map(look, self.side)


def attention_map(look: Any, side: int) -> tuple[Tensor, Tensor]:
    """Attention of the first row of a look, averaged over heads and over bins of neighbouring tokens.

    Returns
    -------
    (Tensor, Tensor)
        float32 ``[m, m]``, ``m = min(n, side)``: mean over the queries of a bin of the mass on a bin of keys, so that
        rows sum to 1; and float32 ``[n]``: mean over text queries of the attention on each key.
    """
    n = look.key.shape[2]
    side = min(n, side)
    device = look.key.device
    bins = torch.arange(n, device=device) * side // n
    mass = torch.zeros(side, side, device=device)
    looked = torch.zeros(n, device=device)
    text = look.query_valid[0] & ~look.query_visual[0]
    blocks = scan_attention(
        look.query, look.key, visible=look.visible, valid=look.valid, scale=look.scale, offset=0, softcap=look.softcap
    )
    for start, stop, probs in blocks:
        rows = probs[0].mean(dim=0)
        keys = rows.shape[1]
        binned = torch.zeros(stop - start, side, device=device).index_add_(1, bins[:keys], rows)
        mass.index_add_(0, bins[start:stop], binned)
        looked[:keys] += rows[text[start:stop]].sum(dim=0)
    count = torch.bincount(bins, minlength=side).clamp(min=1)
    return (mass / count[:, None]).cpu(), (looked / text.sum().clamp(min=1)).cpu()


@dataclass(frozen=True, eq=False)
class Inspection:
    """Everything that the pictures and ``layers.json`` show.

    Attributes
    ----------
    model : dict
        As `meda_kv.models.describe_model` gives it.
    settings : dict
        Method, ratio, preset and options.
    layers : tuple of int
        Indices of the compressed layers, L of them.
    n, visual_tokens : int
        Prompt tokens, and how many of them are visual.
    entropy : dict of str to list
        Per kind ``[L]`` in nats; NaN where undefined.
    budgets : list of int
        Tokens that each layer was to keep, per KV head.
    total : int
        Tokens that the budgets grant over all layers; all of them when nothing was compressed.
    asked : int
        ``round(ratio * L * n)``: what an exact allocator grants, unless the prompt is too short to be compressed.
    kept : ndarray of bool, shape (L, Hkv, n)
        Which prompt tokens each head kept.
    visual : ndarray of bool, shape (n,)
    images : list of ImageTokens
        Where the visual tokens lie.
    pictures : list of PIL.Image.Image
        In reading order.
    maps, looked : dict of int to ndarray
        See `Recorder`.
    texts : list of dict
        ``method``, ``ratio``, ``text``, ``tokens``, ``ratio_actual``, ``bytes_in_use``, ``bytes``, ``bytes_full``,
        ``note``.
    summary : dict
        Of the compressed cache.
    tokens : list of str
        The prompt's tokens.
    """

    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    layers: tuple[int, ...]
    n: int
    visual_tokens: int
    entropy: Mapping[str, list[float]]
    budgets: list[int]
    total: int
    asked: int
    kept: np.ndarray
    visual: np.ndarray
    images: list[ImageTokens]
    pictures: list[Image.Image]
    maps: Mapping[int, np.ndarray]
    looked: Mapping[int, np.ndarray]
    texts: list[dict[str, Any]] = field(default_factory=list)
    summary: Mapping[str, Any] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)

    @property
    def share(self) -> np.ndarray:
        """Share of the KV heads that kept each token, float ``(L, n)``."""
        return self.kept.mean(axis=1)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``layers.json``: per layer its index, entropies, budget, and what each head kept."""
        kept = self.kept.sum(axis=2)
        text = (self.kept & ~self.visual).sum(axis=2)
        rows = [
            {
                "layer": index,
                **{f"entropy_{kind.replace('-', '_')}": self.entropy[kind][i] for kind in KINDS},
                "budget": self.budgets[i],
                "kept_per_head": kept[i].tolist(),
                "kept_text_per_head": text[i].tolist(),
                "kept_text": float(text[i].mean()),
                "kept_visual": float((kept[i] - text[i]).mean()),
            }
            for i, index in enumerate(self.layers)
        ]
        return {
            "model": dict(self.model),
            "settings": dict(self.settings),
            "prompt_tokens": self.n,
            "visual_tokens": self.visual_tokens,
            "total_budget": self.total,
            "asked_budget": self.asked,
            "note": self.summary.get("note"),
            "budgets": self.budgets,
            "entropy_used": self.summary.get("entropy_used"),
            "layers": rows,
            "images": [
                {
                    "tokens": len(image.positions),
                    "first": int(image.positions[0]),
                    "last": int(image.positions[-1]),
                    "grid": [[view.name, *view.tokens.shape] for view in image.views],
                    "note": image.note,
                }
                for image in self.images
            ],
            "answers": self.texts,
            "summary": dict(self.summary),
        }


def default_attention_layers(layers: Sequence[int]) -> tuple[int, ...]:
    """The first two layers and the one at three quarters: 0, 1 and 24 of 32, as in the paper's Fig. 2."""
    picked = {layers[0], layers[min(1, len(layers) - 1)], layers[math.floor(len(layers) * 0.75)]}
    return tuple(sorted(picked))


def collect(
    model: Any,
    processor: Any,
    prompt: Prompt,
    *,
    method: Any = "meda",
    ratio: float = 0.2,
    preset: str = "paper",
    text_ratios: Sequence[float] = PAPER_RATIOS,
    max_new_tokens: int = 64,
    attention_layers: Sequence[int] | None = None,
    chat: bool | None = None,
    unmarked: Unmarked = "first",
    seed: int = 0,
    cache_options: Mapping[str, Any] | None = None,
) -> Inspection:
    """Read a prompt once to measure it, and answer it on the full and on compressed caches.

    Parameters
    ----------
    model, processor
        Of `meda_kv.models.load_model`, or any of transformers.
    prompt : Prompt
        With its images.
    method : str or Method
        Arm whose budgets and kept tokens are shown.
    ratio : float
        Share to keep, in (0, 1].
    preset, seed, cache_options
        As for `meda_kv.generation.generate`.
    text_ratios : sequence of float
        Shares at which answers are collected, besides the full cache's and the one at `ratio`.
    max_new_tokens : int
        Length of the answers, at least 2: the first token comes from the full cache.
    attention_layers : sequence of int, optional
        Whose attention maps to keep; by default `default_attention_layers`.
    chat, unmarked
        See `meda_kv.prompts.render`.

    Returns
    -------
    Inspection

    Raises
    ------
    UserError
        Bad prompt, method, ratio, or a layer that does not exist.
    TypeError
        A model whose cache cannot be compressed.
    """
    if max_new_tokens < 2:
        remedy = "use 2 or more: the first token comes from the full cache"
        raise UserError("too few new tokens", where="max_new_tokens", given=max_new_tokens, remedy=remedy)
    with evaluating(model), torch.inference_mode():
        features = process(processor, [prompt], chat=chat, unmarked=unmarked, return_text_replacement_offsets=True)
        inputs = to_model({k: v for k, v in features.items() if isinstance(v, Tensor)}, model)
        recorder = _read(model, processor, inputs, attention_layers)
        layers = tuple(recorder.facts.full_layers)
        visual = token_facts(model, inputs).visual[0].cpu()
        n = int(inputs["input_ids"].shape[1])
        options = {"preset": preset, "seed": seed, **(cache_options or {})}
        cache, answer = _run(model, processor, inputs, method, ratio, max_new_tokens, options)
        texts = [_row(*_run(model, processor, inputs, "full", 1.0, max_new_tokens, {}))]
        others = [share for share in text_ratios if share != ratio]
        for share in others:
            try:
                texts.append(_row(*_run(model, processor, inputs, method, share, max_new_tokens, options)))
            except UserError as error:  # a ratio that nobody asked for, too small for this prompt
                log.warning("ratio %g is left out: %s", share, error)
    texts.append(_row(cache, answer))
    texts[1:] = sorted(texts[1:], key=lambda row: -row["ratio"])
    pictures = ordered_images(prompt, unmarked=unmarked)
    summary = answer.summary
    whole = cache.method.scorer is None
    untouched = whole or summary["budgets"] is None or (summary.get("note") or "").startswith("not compressed")
    budgets = [n] * len(layers) if untouched else [int(budget) for budget in summary["budgets"]]
    return Inspection(
        model=describe_model(model),
        settings={"method": cache.method.name, "ratio": ratio, "preset": preset, **(cache_options or {})},
        layers=layers,
        n=n,
        visual_tokens=int(visual.sum()),
        entropy={kind: [recorder.entropy[kind][index] for index in layers] for kind in KINDS},
        budgets=budgets,
        total=sum(budgets),
        asked=len(layers) * n if whole else total_budget(ratio, len(layers), n),
        kept=_kept(cache, layers, n),
        visual=visual.numpy(),
        images=locate_images(processor, features, visual, [picture.size for picture in pictures]),
        pictures=pictures,
        maps={index: value.float().numpy() for index, value in recorder.maps.items()},
        looked={index: value.float().numpy() for index, value in recorder.looked.items()},
        texts=texts,
        summary=summary,
        tokens=tokenizer_of(processor).convert_ids_to_tokens(inputs["input_ids"][0].tolist()),
    )


def entropies(
    model: Any, processor: Any, prompt: Prompt, *, chat: bool | None = None, unmarked: Unmarked = "first"
) -> dict[str, list[float]]:
    """Entropy of every compressed layer on one prompt, per kind ``[L]`` in nats; NaN where undefined."""
    with evaluating(model), torch.inference_mode():
        features = process(processor, [prompt], chat=chat, unmarked=unmarked)
        inputs = to_model({k: v for k, v in features.items() if isinstance(v, Tensor)}, model)
        recorder = _read(model, processor, inputs, ())
    return {kind: [recorder.entropy[kind][index] for index in recorder.facts.full_layers] for kind in KINDS}


def _read(model: Any, processor: Any, inputs: dict[str, Tensor], attention_layers: Sequence[int] | None) -> Recorder:
    recorder = Recorder(model)
    known = recorder.facts.full_layers
    wanted = default_attention_layers(known) if attention_layers is None else tuple(attention_layers)
    for index in wanted:
        if index not in known:
            remedy = f"layers of full attention are {known[0]} to {known[-1]}"
            raise UserError("no such layer", where="--layers", given=index, remedy=remedy)
    recorder.attention_layers = frozenset(wanted)
    model.generate(**inputs, past_key_values=recorder, max_new_tokens=1, **greedy(model, processor))
    return recorder


def _run(
    model: Any,
    processor: Any,
    inputs: dict[str, Tensor],
    method: Any,
    ratio: float,
    max_new_tokens: int,
    options: Mapping[str, Any],
) -> tuple[CompressedCache, Generation]:
    cache = CompressedCache(model, method, ratio, **options)
    out = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        **greedy(model, processor),
    )
    text, count = decode(model, processor, out[:, inputs["input_ids"].shape[1] :])[0]
    if count == 1:  # it is the second token that triggers a compression
        cache.compress()
    return cache, Generation(text, count, cache.summary())


def _row(cache: CompressedCache, answer: Generation) -> dict[str, Any]:
    summary = answer.summary
    return {
        "method": summary["method"],
        "ratio": cache.ratio,
        "text": answer.text,
        "tokens": answer.tokens,
        "ratio_actual": summary["ratio_actual"],
        "bytes_in_use": summary["bytes_in_use"],
        "bytes": summary["bytes"],
        "bytes_full": summary["bytes_full"],
        "note": summary.get("note"),
    }


def _kept(cache: CompressedCache, layers: Sequence[int], n: int) -> np.ndarray:
    """Prompt tokens that each head holds, bool ``(L, Hkv, n)``."""
    rows = []
    for index in layers:
        positions = cache.kept(index).cpu()
        held = torch.zeros(positions.shape[0], n + 1, dtype=torch.bool)
        held.scatter_(1, torch.where((positions < 0) | (positions > n), n, positions), True)
        rows.append(held[:, :n].numpy())
    return np.stack(rows)
