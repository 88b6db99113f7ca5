"""Closing the gaps that an eviction leaves in the rotary positions (StreamingLLM's position shift).

StreamingLLM numbers tokens by their place *in the cache*. Only differences of positions matter to a rotary embedding,
so instead of moving every later query back, the kept keys are moved forward: the most recent one stays where it is and
the others follow without gaps. That needs one rotation per kept key at compression time and nothing afterwards.
Doing it this way round is ours; the official code rotates all keys anew in every step.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meda_kv.cache.layer import CompressedLayer

__all__ = ["PlainRope", "close_gaps", "plain_rope"]

_STATIC = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class PlainRope:
    """A rotary embedding whose angle is position times frequency, in the two-halves layout.

    Attributes
    ----------
    frequencies : Tensor
        float32 ``[D / 2]``, radians per position.
    """

    frequencies: Tensor

    def turn(self, keys: Tensor, by: Tensor) -> Tensor:
        """Rotate keys ``[B, Hkv, S, D]`` forward by ``by [B, Hkv, S]`` positions."""
        angles = by[..., None].float() * self.frequencies.to(keys.device)
        cos, sin = angles.cos(), angles.sin()
        first, second = keys.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(keys.dtype)


def plain_rope(decoder: nn.Module, attention: nn.Module, name: str) -> PlainRope:
    """Return the rotary embedding of a language model, when it is plain.

    Parameters
    ----------
    decoder : nn.Module
        The language model, with ``rotary_emb``.
    attention : nn.Module
        One of its attention modules, whose file defines ``apply_rotary_pos_emb``.
    name : str
        Class of the whole model, for messages.

    Returns
    -------
    PlainRope

    Raises
    ------
    TypeError
        M-RoPE (several position axes), part of the head rotated, length-dependent frequencies, another layout, or no
        rotary embedding at all.
    """
    rotary: Any = getattr(decoder, "rotary_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    if not isinstance(frequencies, Tensor):
        raise _refuse(name, "has no single rotary embedding")
    config = decoder.config
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "mrope_section" in parameters or getattr(rotary, "mrope_section", None) is not None:
        raise _refuse(name, "has multimodal rotary positions (M-RoPE)")
    kind = str(parameters.get("rope_type", getattr(rotary, "rope_type", "default")))
    if kind not in _STATIC:
        raise _refuse(name, f"has rotary frequencies of type {kind!r}, which depend on the length")
    dim = int(getattr(attention, "head_dim", 2 * len(frequencies)))
    if 2 * len(frequencies) != dim:
        raise _refuse(name, f"rotates {2 * len(frequencies)} of {dim} dimensions of a head")
    rope = PlainRope(frequencies.detach().float())
    if not _same_layout(rope, sys.modules[type(attention).__module__], dim):
        raise _refuse(name, "lays out its rotary dimensions in another way than two halves")
    return rope


def _same_layout(rope: PlainRope, module: Any, dim: int) -> bool:
    """Whether the model's own function agrees with ours on a probe."""
    apply = getattr(module, "apply_rotary_pos_emb", None)
    if apply is None:
        return False
    device = rope.frequencies.device
    probe = torch.linspace(-1.0, 1.0, 3 * dim, device=device).reshape(1, 1, 3, dim)
    angles = torch.arange(3.0, device=device)[:, None] * rope.frequencies
    angles = torch.cat([angles, angles], dim=-1)[None]
    try:
        _, theirs = apply(probe, probe, angles.cos(), angles.sin())
    except (TypeError, RuntimeError, ValueError):
        return False
    return bool(torch.allclose(theirs, rope.turn(probe, torch.arange(3, device=device)[None, None]), atol=1e-5))


def _refuse(name: str, reason: str) -> TypeError:
    return TypeError(
        f"unsupported: rerotate=True with {name}, which {reason}; leave rerotate off, positions stay original"
    )


def close_gaps(rope: PlainRope, layer: CompressedLayer, keep: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kept keys without gaps in their positions, and the kept values.

    Parameters
    ----------
    rope : PlainRope
        The model's.
    layer : CompressedLayer
        Before it is settled; remembers that it has been closed.
    keep : Tensor
        long ``[B, Hkv, S']``, -1 for padding on the right.
    places : Tensor
        long ``[B, tokens]``: rotary position of every token read.

    Returns
    -------
    (Tensor, Tensor)
        ``[B, Hkv, S', D]`` each.
    """
    assert layer.keys is not None and layer.values is not None
    device = layer.keys.device
    valid = layer.valid
    real = torch.ones(layer.keys.shape[:3], dtype=torch.bool, device=device) if valid is None else valid
    index, kept = keep.clamp(min=0), keep >= 0
    places = places.to(device)
    last = places.amax(dim=1)[:, None, None]
    if layer.closed:  # every slot stands right before the next real one
        behind = real.flip(2).cumsum(2).flip(2)
        now = last - (behind - 1)
    else:
        now = places[:, None].expand(-1, layer.keys.shape[1], -1).gather(2, layer.positions.clamp(min=0))
    then = last - (kept.flip(2).cumsum(2).flip(2) - 1)
    by = (then - now.gather(2, index)).masked_fill(~kept, 0)
    rows = torch.arange(keep.shape[0], device=device)[:, None, None]
    heads = torch.arange(keep.shape[1], device=device)[None, :, None]
    layer.closed = True
    return rope.turn(layer.keys[rows, heads, index], by), layer.values[rows, heads, index]
