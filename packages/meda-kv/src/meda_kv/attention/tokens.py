"""Which tokens of a forward are real and which are visual, read from what the processor returned.

Visual are the placeholders of images and video frames only. Row and column markers, ``<|vision_start|>``,
``<fake_token_around_image>`` and the separators between thumbnails are text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vfm_core.errors import UserError

from meda_kv.attention.generating import Announced

__all__ = ["TokenFacts", "token_facts", "visual_token_ids"]

_ID_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class TokenFacts:
    """The tokens of one forward.

    Attributes
    ----------
    valid : Tensor
        Bool [B, q]; False at padding.
    visual : Tensor
        Bool [B, q]; True at image and video placeholders, never at padding.
    q_len : int
        q, the number of tokens read in this forward.
    total : int or None
        Length of the attention mask, past included; None without one.
    drafts : int
        How many of the prompt's last tokens are only proposed. Assisted and prompt-lookup decoding read the first
        proposals together with the prompt and take back those that the model would not have chosen.
    ids : Tensor or None
        Integer [B, q]: the tokens; None when they come as embeddings.
    reading : bool or None
        Whether generate still reads the prompt; None when the forward is not generate's.
    end : int or None
        Tokens in all when the prompt has been read; None where nobody knows.
    """

    valid: Tensor
    visual: Tensor
    q_len: int
    total: int | None
    drafts: int = 0
    ids: Tensor | None = None
    reading: bool | None = None
    end: int | None = None


def visual_token_ids(model: nn.Module) -> tuple[int, ...]:
    """Ids of the image and video placeholders of a model.

    Parameters
    ----------
    model : nn.Module
        With a transformers ``config``.

    Returns
    -------
    tuple of int
        Sorted, without doubles; empty for a model that reads text only.
    """
    config = getattr(model, "config", None)
    found = {getattr(config, name, None) for name in _ID_NAMES}
    return tuple(sorted(value for value in found if isinstance(value, int) and value >= 0))


def token_facts(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    past_length: int = 0,
    visual_mask: Tensor | None = None,
    said: Announced | None = None,
) -> TokenFacts:
    """Read the arguments of a model's forward.

    Parameters
    ----------
    model : nn.Module
        The model whose forward is called.
    kwargs : mapping
        Its arguments by name: ``input_ids`` or ``inputs_embeds``, ``attention_mask``, ``mm_token_type_ids``,
        ``token_type_ids``.
    past_length : int
        Tokens already in the cache; where `visual_mask` goes on.
    visual_mask : Tensor, optional
        Bool [B, n] over the prompt from its first token. Overrides what the ids say; tokens after its end are text.
    said : Announced, optional
        What generate said of this forward.

    Returns
    -------
    TokenFacts

    Raises
    ------
    UserError
        A model with images got embeddings without ids and without `visual_mask`; shapes that do not fit; an attention
        mask that is not two-dimensional.
    """
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    source = ids if ids is not None else embeds
    if source is None:
        raise UserError("the forward has neither input_ids nor inputs_embeds", remedy="pass one of them")
    batch, q_len = int(source.shape[0]), int(source.shape[1])
    valid, total = _valid(kwargs.get("attention_mask"), batch, q_len, source.device)
    visual = _visual(model, kwargs, batch, q_len, past_length, visual_mask, source.device)
    drafts = 0
    if past_length == 0 if said is None else said.proposals:
        # Nothing but the number of wanted logits tells proposals from prompt: one for each, and one more.
        wanted = kwargs.get("logits_to_keep")
        drafts = min(wanted, q_len) - 1 if isinstance(wanted, int) and wanted > 1 else 0
    return TokenFacts(
        valid=valid,
        visual=visual & valid,
        q_len=q_len,
        total=total,
        drafts=drafts,
        ids=ids,
        reading=None if said is None else said.reading,
        end=None if said is None else said.end,
    )


def _valid(mask: Any, batch: int, q_len: int, device: torch.device) -> tuple[Tensor, int | None]:
    if mask is None:
        return torch.ones(batch, q_len, dtype=torch.bool, device=device), None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(
            "a compressed cache needs the two-dimensional attention mask [batch, tokens]",
            where="attention_mask",
            given=shape,
            remedy="pass 1 for tokens and 0 for padding",
        )
    if mask.shape[0] != batch or mask.shape[1] < q_len:
        raise UserError(
            f"the attention mask does not cover {batch} rows of {q_len} tokens",
            where="attention_mask",
            given=tuple(mask.shape),
            remedy="give it one column for every token, past ones included",
        )
    return mask[:, mask.shape[1] - q_len :].to(device=device, dtype=torch.bool), int(mask.shape[1])


def _visual(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    batch: int,
    q_len: int,
    past: int,
    given: Tensor | None,
    device: torch.device,
) -> Tensor:
    if given is not None:
        return _from_mask(given, batch, q_len, past, device)
    wanted = visual_token_ids(model)
    none = torch.zeros(batch, q_len, dtype=torch.bool, device=device)
    if not wanted:
        return none
    ids = kwargs.get("input_ids")
    if ids is not None:
        return torch.isin(ids, torch.tensor(wanted, device=ids.device, dtype=ids.dtype))
    for name in ("mm_token_type_ids", "token_type_ids"):  # 0 text, 1 image, 2 video
        kinds = kwargs.get(name)
        if kinds is not None and kinds.shape[0] == batch and kinds.shape[1] >= q_len:
            return (kinds[:, kinds.shape[1] - q_len :] > 0).to(device)
    if q_len == 1 and past > 0:  # a generated token
        return none
    raise UserError(
        "only embeddings were passed, so nothing tells where the image tokens are",
        where="inputs_embeds",
        given=tuple(kwargs["inputs_embeds"].shape),
        remedy="pass input_ids, or give the cache visual_mask= (bool [batch, tokens])",
    )


def _from_mask(given: Tensor, batch: int, q_len: int, past: int, device: torch.device) -> Tensor:
    if given.ndim != 2 or given.shape[0] == 0 or batch % given.shape[0]:
        raise UserError(
            f"the mask must have two axes and {batch} rows, or a divisor of that many",
            where="visual_mask",
            given=tuple(given.shape),
            remedy="pass bool [batch, tokens]",
        )
    part = given[:, past : past + q_len].to(device=device, dtype=torch.bool)
    part = nn.functional.pad(part, (0, q_len - part.shape[1]))
    return part.repeat_interleave(batch // given.shape[0], dim=0)  # beams and samples repeat rows in place
