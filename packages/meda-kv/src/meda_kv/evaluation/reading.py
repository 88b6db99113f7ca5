"""One prompt reading for many arms: read a batch of prompts once, then continue on a compressed copy per arm.

The reading goes through ``model.generate`` and so knows every family's positions and vision inputs; a continuation
hands ``generate`` the whole sequence again, of which it feeds only what the cache has not seen (as in a chat of
several turns). The first answer token therefore comes from the full cache, whatever the arm: only tokens after it
test a compression.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meda_kv.evaluation.arms import FULL, Arm

if TYPE_CHECKING:
    from meda_kv.cache import CompressedCache

_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


@dataclass
class Reading:
    """A batch of prompts that was read into a full cache.

    Attributes
    ----------
    ids, mask
        The prompts, [B, n], padded on the left.
    types
        Token types of the prompts, where the model has them, [B, n] each.
    cache
        The full cache; stays full, `CompressedCache.fork` makes the copies.
    first
        First answer token of every row, [B], from the full cache.
    seconds
        Wall time of the reading, observers of all arms included.
    """

    ids: Tensor
    mask: Tensor
    types: dict[str, Tensor]
    cache: CompressedCache
    first: Tensor
    seconds: float


@dataclass
class Copy:
    """A compressed copy of a reading's cache, with what making it took.

    Attributes
    ----------
    cache
        Belongs to this copy alone.
    length
        Prompt tokens, padding included.
    seconds
        Wall time of copying and compressing.
    pending
        The method compresses only after its first one-token step (official MEDA code): one answer token more comes
        from the full cache.
    measured
        `CompressedCache.summary` of every row right after compression; empty while that is pending.
    """

    cache: CompressedCache
    length: int
    seconds: float
    pending: bool
    measured: list[dict[str, Any]]

    def facts(self, row: int) -> dict[str, Any]:
        """What the prompt of a row became: its summary, with the bytes of the prompt's keys and values alone.

        Returns
        -------
        dict
            The summary, ``kv_bytes`` (held, at real slots), ``kv_bytes_full`` (the same prompt uncompressed) and
            ``kv_bytes_allocated`` (a row's share of all storages, flags and room to spare).
        """
        found = self.measured[row] if self.measured else self.cache.summary(row)
        held, full = found["row_bytes_in_use"], found["row_bytes_full"]
        read = found["prompt_tokens"] + found["generated_tokens"]
        later = full / read * found["generated_tokens"] if read else 0.0  # answer tokens are held in full
        return {
            **found,
            "kv_bytes": held - later,
            "kv_bytes_full": full - later,
            "kv_bytes_allocated": found["bytes"] / found["rows"],
        }


def read_prompts(model: Any, inputs: dict[str, Tensor], arms: Iterable[Arm], *, seed: int = 0) -> Reading:
    """Read a batch of prompts once, observed by every method among `arms`.

    Parameters
    ----------
    model
        A vision-language (or text-only) model of transformers.
    inputs
        What its processor made of the prompts, without `past_key_values`; moved to the model's device.
    arms
        Whose copies will be asked for.
    seed
        Of methods that draw at random.

    Raises
    ------
    TypeError
        The model's attention or cache cannot be compressed.
    RuntimeError
        A model that computes NaN.
    """
    from meda_kv.cache import CompressedCache

    methods = list(dict.fromkeys(arm.method for arm in arms if arm.method is not None))
    inputs = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in inputs.items()}
    start = _now(model)
    cache = CompressedCache(model, FULL, 1.0, record=methods, seed=seed)
    with torch.inference_mode():
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=1, **_greedy(model))
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    return Reading(
        ids,
        torch.ones_like(ids) if mask is None else mask,
        {name: inputs[name] for name in _TOKEN_TYPES if name in inputs},
        cache,
        out[:, -1],
        _now(model) - start,
    )


def compressed_copy(model: Any, reading: Reading, arm: Arm, *, now: bool = False) -> Copy:
    """The cache of `reading` as `arm` leaves it.

    Parameters
    ----------
    now
        Compress at once also where the method would wait for its first one-token step, which a probe may never take.

    Raises
    ------
    UserError
        The ratio leaves less than the floor of every layer.
    RuntimeError
        NaN in keys or scores; the layer and head are named.
    """
    from meda_kv.cache.observation import Watch

    start = _now(model)
    with torch.inference_mode():
        cache = reading.cache.fork(method=arm.method or FULL, ratio=arm.ratio)
        pending = arm.method is not None and arm.method.compress_at == "first-step" and arm.ratio < 1
        if pending and now:
            cache.compress()
            pending = False
    seconds = _now(model) - start
    if not pending:  # what is asked on it is neither watched nor compressed, or it could not be taken back
        cache.watch, cache.compress_at = Watch(()), "decode"
    rows = [] if pending else [cache.summary(row) for row in range(len(reading.ids))]
    return Copy(cache, reading.ids.shape[1], seconds, pending, rows)


def proceed(
    model: Any, reading: Reading, copy: Copy, new: Tensor, new_mask: Tensor | None = None, *, max_new_tokens: int
) -> Tensor:
    """Feed tokens after the prompt and answer greedily; the copy grows by both.

    Parameters
    ----------
    new
        Tokens after the prompt, [B, q], padded on the left.
    new_mask
        1 where `new` is real, [B, q]; default everywhere.
    max_new_tokens
        Greatest length of the answer.

    Returns
    -------
    Tensor
        Answers, [B, m], m <= `max_new_tokens`; what follows an end token in a row means nothing.
    """
    new_mask = torch.ones_like(new) if new_mask is None else new_mask
    ids = torch.cat([reading.ids, new], dim=1)
    mask = torch.cat([reading.mask, new_mask.to(reading.mask.dtype)], dim=1)
    types = {name: torch.cat([t, torch.zeros_like(new, dtype=t.dtype)], 1) for name, t in reading.types.items()}
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **types,
            past_key_values=copy.cache,
            max_new_tokens=max_new_tokens,
            **_greedy(model),
        )
    return out[:, ids.shape[1] :]


def answer_on(model: Any, reading: Reading, copy: Copy, max_new_tokens: int) -> Tensor:
    """Answers [B, m] of the prompts as ``generate`` gives them: the first token is the reading's, the rest `copy`'s."""
    first = reading.first[:, None]
    ends = torch.tensor(sorted(end_tokens(model)), device=first.device)
    if max_new_tokens == 1 or bool(torch.isin(first, ends).all()):
        return first
    return torch.cat([first, proceed(model, reading, copy, first, max_new_tokens=max_new_tokens - 1)], dim=1)


def ask_on(
    model: Any, reading: Reading, copy: Copy, questions: Sequence[Sequence[int]], pad: int, max_new_tokens: int
) -> Tensor:
    """Answers [B, m] to one question per row, asked on the compressed copy, which is then cropped back.

    Every answer token, the first too, is computed on what the compression left.
    """
    device, width = reading.ids.device, max(map(len, questions))
    padding = [width - len(tokens) for tokens in questions]
    rows = [[pad] * less + list(tokens) for less, tokens in zip(padding, questions, strict=True)]
    new = torch.tensor(rows, dtype=reading.ids.dtype, device=device)
    mask = (torch.arange(width)[None] >= torch.tensor(padding)[:, None]).long().to(device)
    with _undoing(copy):
        return proceed(model, reading, copy, new, mask, max_new_tokens=max_new_tokens)


@contextlib.contextmanager
def _undoing(copy: Copy) -> Iterator[None]:
    """Crop the copy back to the prompt afterwards; sliding-window and linear layers, which forget, are put back."""
    from meda_kv.cache import CompressedLayer

    layers = copy.cache.layers
    others = {i: deepcopy(layer) for i, layer in enumerate(layers) if not isinstance(layer, CompressedLayer)}
    for i in others:
        if hasattr(layers[i], "activate_past_recording"):
            layers[i].activate_past_recording()
    yield  # a copy whose question failed is not used again
    with torch.inference_mode():
        copy.cache.crop(copy.length - copy.cache.get_seq_length())
    for i, layer in others.items():
        layers[i] = layer


def end_tokens(model: Any) -> set[int]:
    """Ids that end an answer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return set() if ends is None else {int(end) for end in (ends if isinstance(ends, list | tuple) else [ends])}


def trim(tokens: Tensor, ends: set[int]) -> list[int]:
    """Tokens of one row before its first end token."""
    row = tokens.tolist()
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def _greedy(model: Any) -> dict[str, Any]:
    """Arguments of ``generate`` for a greedy answer, without warnings about sampling settings that do not matter."""
    config = model.generation_config
    ends = config.eos_token_id
    pad = config.pad_token_id
    if pad is None:
        pad = (ends[0] if isinstance(ends, list | tuple) else ends) or 0
    return {
        "do_sample": False,
        "num_beams": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "min_new_tokens": None,
        "pad_token_id": pad,
        "return_dict_in_generate": False,
    }


def _now(model: Any) -> float:
    if getattr(model.device, "type", "cpu") == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
