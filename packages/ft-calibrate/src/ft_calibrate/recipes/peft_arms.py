"""Parameter-efficient arms: low-rank updates through ``peft``.

Ours; FTC (arXiv 2409.16223) names PEFT as future work. Linear and ordinary convolution layers outside the head get a
low-rank update, the head is trained as a whole. At the end the updates are merged, so that the result has the
architecture of the source model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vfm_core.errors import UserError

__all__ = ["add_lora", "lora_targets", "merge_lora"]


def lora_targets(model: nn.Module, head: nn.Module) -> list[str]:
    """Dotted names of the layers that get an update: linear, and convolutions without groups; never the head.

    Layers inside ``nn.MultiheadAttention`` are left out: it reads their weights without calling them.
    """
    inside_attention = {
        id(m) for a in model.modules() if isinstance(a, nn.MultiheadAttention) for m in a.modules() if m is not a
    }
    return [
        name
        for name, m in model.named_modules()
        if m is not head
        and id(m) not in inside_attention
        and (isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1))
    ]


def add_lora(model: nn.Module, head: nn.Module, options: dict[str, Any], seed: int) -> Any:
    """Put low-rank updates into a model, in place; they start at zero, so its output stays.

    Parameters
    ----------
    model, head : nn.Module
        The model is changed.
    options : dict
        ``r`` rank, ``alpha`` (the update is scaled by alpha / r), ``dropout``.
    seed : int
        Of the random factor; the global random state stays.

    Returns
    -------
    peft.LoraModel
        For `merge_lora`.

    Raises
    ------
    UserError
        peft is not installed, or no layer to update.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        remedy = 'pip install "ft-calibrate[peft]"'
        raise UserError("the recipe lora needs peft", given="not installed", remedy=remedy) from error
    names = lora_targets(model, head)
    if not names:
        raise UserError("no layer for low-rank updates", given=type(model).__name__, remedy="use ft or lp")
    config = LoraConfig(
        r=options["r"], lora_alpha=options["alpha"], lora_dropout=options["dropout"], target_modules=names
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LoraModel(model, config, "default")


def merge_lora(wrapped: Any) -> nn.Module:
    """Fold the updates into the weights and return the plain model."""
    return wrapped.merge_and_unload()
