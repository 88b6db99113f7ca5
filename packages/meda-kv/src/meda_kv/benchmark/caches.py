"""The caches that are compared: transformers' own, that one trimmed by hand, and ours.

Up to a limit the prompt is really read. Beyond it the caches are filled with random keys and values through the calls
that a forward makes, so that decoding over 32,000 tokens can be measured without the quadratic cost of reading them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meda_kv.benchmark.subjects import Prompt, Subject

__all__ = [
    "Arm",
    "copy_into",
    "fill",
    "kv_shapes",
    "our_cache",
    "parse_arm",
    "prompt_share",
    "stock_bytes",
    "stock_cache",
    "trimmed",
]


@dataclass(frozen=True)
class Arm:
    """A method with options.

    Attributes
    ----------
    label : str
        As written: ``meda?score_queries=window:32&merge=none``.
    method : str
        Its name.
    options : dict
        Preset and overrides of the method's settings.
    """

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)


def parse_arm(text: str, preset: str = "paper", **settings: Any) -> Arm:
    """Read ``method`` or ``method?option=value&option=value``.

    Values are numbers where they look like numbers, ``true``, ``false``, or words.

    Parameters
    ----------
    text : str
        What the user wrote; it is the arm's label.
    preset : str
        ``"paper"`` or ``"official-code"``.
    **settings
        Further options; what is written with the name comes first. None leaves an option as it is.

    Raises
    ------
    UserError
        An option without a value, or a method or option that is not known.
    """
    from meda_kv.evaluation.arms import check_method, split_method

    name, written = split_method(text)
    options = {**{option: value for option, value in settings.items() if value is not None}, **written}
    check_method(name, preset, **options)
    return Arm(text, name, options if preset == "paper" else {**options, "preset": preset})


def stock_cache(subject: Subject) -> Any:
    """Return an empty cache as `generate` makes it."""
    from transformers import DynamicCache

    return DynamicCache(config=subject.model.config.get_text_config(decoder=True))


def our_cache(subject: Subject, arm: Arm, ratio: float, prompt: Prompt | None, **options: Any) -> Any:
    """Return an empty compressed cache.

    Parameters
    ----------
    subject : Subject
        The model.
    arm : Arm
        Method and its options.
    ratio : float
        Share to keep.
    prompt : Prompt or None
        Whose visual tokens are declared; None declares none.
    **options
        Further arguments of `meda_kv.cache.CompressedCache`.
    """
    from meda_kv.cache import CompressedCache

    visual = None if prompt is None else prompt.visual
    return CompressedCache(subject.model, arm.method, ratio, visual_mask=visual, **{**arm.options, **options})


def kv_shapes(subject: Subject) -> list[tuple[int, int]]:
    """Return KV heads and head size of every layer, found by reading four tokens."""
    cache = stock_cache(subject)
    subject.read(subject.words[torch.arange(4) % len(subject.words)][None].to(subject.device), cache)
    return [(int(layer.keys.shape[1]), int(layer.keys.shape[3])) for layer in cache.layers]


def fill(subject: Subject, cache: Any, n: int, shapes: Sequence[tuple[int, int]], seed: int = 0) -> None:
    """Fill a cache with ``n`` tokens of random keys and values instead of reading a prompt.

    Parameters
    ----------
    subject : Subject
        For device and dtype.
    cache : Cache
        Empty; a compressed one must have a method that does not look at attention.
    n : int
        Tokens.
    shapes : sequence of (int, int)
        As `kv_shapes` returns.
    seed : int
        Of the numbers. They are the same for every cache with the same seed.
    """
    generator = torch.Generator(subject.device).manual_seed(seed)

    def draw(heads: int, dim: int) -> Tensor:
        # One head's worth is drawn and shared by all: only the amount of memory matters here, not what it holds.
        one = torch.randn(1, 1, n, dim, generator=generator, device=subject.device, dtype=torch.float32)
        return one.to(subject.dtype).expand(1, heads, n, dim).contiguous()

    _write(subject, cache, n, [(draw(heads, dim), draw(heads, dim)) for heads, dim in shapes])


def copy_into(subject: Subject, source: Any, cache: Any, n: int) -> None:
    """Fill ``cache`` with a copy of what a stock cache holds."""
    _write(subject, cache, n, [(layer.keys.clone(), layer.values.clone()) for layer in source.layers])


def _write(subject: Subject, cache: Any, n: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
    from meda_kv.attention import TokenFacts

    ours = hasattr(cache, "begin_forward")
    with torch.inference_mode():
        if ours:
            flags = torch.ones(1, n, dtype=torch.bool, device=subject.device)
            cache.begin_forward(TokenFacts(valid=flags, visual=torch.zeros_like(flags), q_len=n, total=None))
        for index in range(len(pairs)):
            key, value = pairs[index]
            pairs[index] = (key[:0], value[:0])  # let go of each pair as soon as it is stored
            cache.update(key, value, index)
        if ours:
            cache.end_forward(False)


def trimmed(source: Any, keep: int) -> Any:
    """Return a copy of a stock cache trimmed by hand to its last ``keep`` tokens, in place: the obvious way.

    Layers with a sliding window are left alone. The positions that follow are wrong, as they are in such code; only
    the cost is of interest.
    """
    cache = copy.deepcopy(source)
    for layer in cache.layers:
        if not getattr(layer, "is_sliding", False):
            layer.keys = layer.keys[:, :, -keep:].contiguous()
            layer.values = layer.values[:, :, -keep:].contiguous()
    return cache


def prompt_share(cache: Any, n: int) -> float:
    """Share of an ``n``-token prompt's keys and values that a cache of either kind holds, by the bytes of its tensors.

    Full-attention layers only, without room to spare; measured before anything is decoded.
    """
    if hasattr(cache, "begin_forward"):
        summary = cache.summary()
        return float(summary["row_bytes_in_use"] / summary["row_bytes_full"])
    held = full = 0.0
    for layer in cache.layers:
        if not getattr(layer, "is_sliding", False):
            for tensor in (layer.keys, layer.values):
                size = tensor.numel() * tensor.element_size()
                held, full = held + size, full + size / tensor.shape[2] * n
    return held / full


def stock_bytes(cache: Any) -> int:
    """Bytes of storage that a stock cache keeps alive."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
        if tensor is not None
    }
    return sum(storages.values())
