"""Which tokens are real and visual."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import zoo
from meda_kv.attention import token_facts, visual_token_ids
from torch import nn
from vfm_core.errors import UserError


class Holder(nn.Module):
    """A module with nothing but a configuration."""

    def __init__(self, **fields: object) -> None:
        super().__init__()
        self.config = SimpleNamespace(**fields)


IDS = torch.tensor([[0, 0, 5, 5, 9, 6], [7, 5, 5, 5, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"image_token_id": 5}, (5,)),
        ({"image_token_index": 5, "image_token_id": 5, "video_token_id": 6}, (5, 6)),
        ({"image_token_id": None, "video_token_index": 6}, (6,)),
        ({"image_token_id": -1}, ()),
        ({}, ()),
    ],
)
def test_visual_ids_come_from_the_configuration(fields: dict[str, int], ids: tuple[int, ...]) -> None:
    assert visual_token_ids(Holder(**fields)) == ids


def test_images_and_videos_are_visual_and_padding_is_not() -> None:
    model = Holder(image_token_id=5, video_token_id=6)
    facts = token_facts(model, {"input_ids": torch.where(MASK == 0, 5, IDS), "attention_mask": MASK})
    assert facts.visual.tolist() == [[False, False, True, True, False, True], [False, True, True, True, False, False]]
    assert facts.valid.equal(MASK.bool()) and (facts.q_len, facts.total) == (6, 6)


def test_continuation_takes_the_last_columns_of_the_mask() -> None:
    facts = token_facts(Holder(), {"input_ids": IDS[:, :2], "attention_mask": MASK}, past_length=4)
    assert facts.valid.equal(MASK[:, 4:].bool()) and (facts.q_len, facts.total) == (2, 6)


def test_without_a_mask_everything_is_real() -> None:
    facts = token_facts(Holder(), {"input_ids": IDS})
    assert facts.valid.all() and facts.total is None and not facts.visual.any()


@pytest.mark.parametrize("name", ["mm_token_type_ids", "token_type_ids"])
def test_token_kinds_stand_in_for_ids(name: str) -> None:
    kinds = torch.tensor([[0, 1, 2, 0]])
    model = Holder(image_token_id=5)
    facts = token_facts(model, {"inputs_embeds": torch.zeros(1, 3, 8), name: kinds}, past_length=1)
    assert facts.visual.tolist() == [[True, True, False]]


def test_embeddings_alone_need_a_visual_mask() -> None:
    model, embeds = Holder(image_token_id=5), torch.zeros(2, 4, 8)
    with pytest.raises(UserError, match=r"inputs_embeds: \(2, 4, 8\).*visual_mask="):
        token_facts(model, {"inputs_embeds": embeds})
    mask = torch.tensor([[True, False, False, False, True, True]])
    facts = token_facts(model, {"inputs_embeds": embeds}, past_length=3, visual_mask=mask)
    assert facts.visual.tolist() == [[False, True, True, False]] * 2  # text after the end of the mask
    assert not token_facts(model, {"inputs_embeds": embeds[:, :1]}, past_length=9).visual.any()
    assert not token_facts(Holder(), {"inputs_embeds": embeds}).visual.any()


def test_visual_mask_repeats_rows_for_beams() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    facts = token_facts(Holder(), {"input_ids": torch.ones(4, 2, dtype=torch.long)}, visual_mask=mask)
    assert facts.visual.tolist() == [[True, False], [True, False], [False, True], [False, True]]


@pytest.mark.parametrize(
    ("kwargs", "mask", "match"),
    [
        ({}, None, "neither input_ids nor inputs_embeds"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 6, 6)}, None, r"two-dimensional.*\(2, 1, 6, 6\)"),
        ({"input_ids": IDS, "attention_mask": {"full": MASK}}, None, "two-dimensional"),
        ({"input_ids": IDS, "attention_mask": MASK[:, :3]}, None, r"does not cover 2 rows of 6.*\(2, 3\)"),
        ({"input_ids": IDS, "attention_mask": MASK[:1]}, None, "does not cover"),
        ({"input_ids": IDS}, torch.ones(3, 6, dtype=torch.bool), r"visual_mask: \(3, 6\)"),
        ({"input_ids": IDS}, torch.ones(6, dtype=torch.bool), "two axes"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, mask: torch.Tensor | None, match: str) -> None:
    with pytest.raises(UserError, match=match):
        token_facts(Holder(), kwargs, visual_mask=mask)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_names_its_placeholders(family: str) -> None:
    model, inputs = zoo.tiny_vlm(family)
    given = inputs(images=2)
    facts = token_facts(model, given)
    assert facts.visual.equal(given["input_ids"] == zoo.IMAGE)
    assert bool(facts.visual.any()) is (family != "text")


@pytest.mark.parametrize(("wanted", "past", "drafts"), [(4, 0, 3), (1, 0, 0), (0, 0, 0), (None, 0, 0), (4, 6, 0)])
def test_proposed_tokens_are_told_by_the_logits_wanted(wanted: int | None, past: int, drafts: int) -> None:
    kwargs = {"input_ids": IDS} if wanted is None else {"input_ids": IDS, "logits_to_keep": wanted}
    assert token_facts(Holder(), kwargs, past_length=past).drafts == drafts
