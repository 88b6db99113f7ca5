"""Similar classes, weights and cotangents, on logits made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from finecam.question import SimilarityTables
from finecam.references import (
    Contrast,
    class_directions,
    cosine_table,
    one_hot,
    read_classes,
    reference_weights,
    resolve_references,
    resolve_target,
    similar_classes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vfm_core.errors import UserError

NAMES = ["wren", "robin", "finch", "swift", "heron"]


def pick(rule, logits, target, count, table=None):
    y = torch.tensor([logits], dtype=torch.float)
    return similar_classes(rule, y, torch.tensor([target]), count, table)[0].tolist()


def test_logit_and_rank_agree_when_the_target_is_predicted():
    logits = [5.0, 4.0, 1.0, 3.0, 2.0]
    assert pick("logit", logits, 0, 3) == pick("rank", logits, 0, 3) == [1, 3, 4]


def test_logit_and_rank_differ_when_another_class_is_predicted():
    logits = [5.0, 3.2, 3.0, 0.0, 9.0]  # the label is class 2, the prediction class 4
    assert pick("logit", logits, 2, 3) == [1, 0, 3]
    assert pick("rank", logits, 2, 3) == [4, 0, 1]


def test_ties_go_to_the_smaller_id():
    assert pick("logit", [1.0, 2.0, 2.0, 3.0, 2.0], 1, 3) == [2, 4, 0]
    assert pick("rank", [1.0, 1.0, 1.0, 1.0, 1.0], 2, 4) == [0, 1, 3, 4]
    # the target is excluded by its id, not by its distance: others with the same logit stay
    assert pick("logit", [0.0, 0.0, 0.0], 2, 2) == [0, 1]


def test_count_is_cut_down_and_single_class_refused():
    assert pick("logit", [1.0, 2.0, 4.0], 2, 9) == [1, 0]
    with pytest.raises(UserError, match=r"a contrast needs two classes: 1; use references=None"):
        pick("logit", [1.0], 0, 3)
    with pytest.raises(UserError, match="did you mean rank"):
        pick("ranks", [1.0, 2.0], 0, 1)


def test_table_rules():
    weights = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1.0], [-1, 0.1]])
    table = cosine_table(weights)
    assert torch.allclose(table.diagonal(), torch.ones(4))
    assert pick("weight", [0.0, 9, 9, 9], 0, 3, table) == [1, 2, 3]
    confusion = torch.tensor([[90.0, 1, 7, 2], [0, 99, 1, 0], [5, 5, 80, 10], [0, 0, 0, 9]])
    assert pick("confusion", [0.0] * 4, 0, 2, confusion) == [2, 3]
    assert pick("confusion", [0.0] * 4, 3, 2, confusion) == [0, 1]
    with pytest.raises(UserError, match=r"must be \(C, C\): \(4, 4\); C=3"):
        pick("confusion", [0.0] * 3, 0, 1, confusion)
    with pytest.raises(UserError, match="needs a table"):
        pick("weight", [0.0] * 3, 0, 1)


def test_class_directions():
    head = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    assert class_directions(head, 4) is head[2].weight
    conv = nn.Sequential(nn.Conv2d(6, 4, 1))
    assert tuple(class_directions(conv, 4).shape) == (4, 6)
    with pytest.raises(UserError, match="no linear layer with one output per class"):
        class_directions(head, 3)

    class Text(nn.Module):
        def weights(self):
            return torch.eye(3)

    assert torch.equal(class_directions(Text(), 3), torch.eye(3))
    tables = SimilarityTables(head, class_weights=torch.eye(4))
    assert torch.equal(tables.get("weight", 4), torch.eye(4)) and tables.get("weight", 4) is tables.get("weight", 4)
    assert tables.get("logit", 4) is None
    with pytest.raises(UserError, match="needs a matrix"):
        tables.get("confusion", 4)


# --- what the user gives ---------------------------------------------------------------------


def test_read_classes():
    assert read_classes("finch", NAMES, "target").tolist() == 2
    assert read_classes(["swift", 1], NAMES, "target").tolist() == [3, 1]
    assert read_classes([["wren", "robin"], [4, np.int64(3)]], NAMES, "references").tolist() == [[0, 1], [4, 3]]
    assert read_classes(np.array([1, 2]), None, "target").tolist() == [1, 2]
    assert read_classes(torch.tensor([[1], [2]], dtype=torch.int32), None, "references").dtype == torch.long


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fnch", r"unknown class in target: 'fnch'; did you mean finch\?"),
        ([[1, 2], [3]], "cannot read classes"),
        (1.5, "must be integers"),
        (torch.tensor([1.0]), "must be integers"),
        ([True], "must be integers"),
        (object(), "cannot read classes"),
        ([None], "cannot read classes"),
    ],
)
def test_read_classes_refuses(given, message):
    with pytest.raises(UserError, match=message):
        read_classes(given, NAMES, "target")


def test_names_need_class_names_and_must_be_unique():
    with pytest.raises(UserError, match="class name without class names in target: 'wren'"):
        read_classes("wren", None, "target")
    with pytest.raises(UserError, match=r"not unique.*\[0, 2\]"):
        read_classes("a", ["a", "b", "a"], "target")


def test_resolve_target():
    y = torch.tensor([[0.0, 2, 1], [3, 0, 0]])
    assert resolve_target(None, y).tolist() == [1, 0]
    assert resolve_target(torch.tensor(2), y).tolist() == [2, 2]
    assert resolve_target(torch.tensor([2, 1]), y).tolist() == [2, 1]
    with pytest.raises(UserError, match=r"class id out of range in target: 3; the model has 3 classes"):
        resolve_target(torch.tensor([0, 3]), y)
    with pytest.raises(UserError, match="out of range in target: -1"):
        resolve_target(torch.tensor(-1), y)
    with pytest.raises(UserError, match="one class, or one per image"):
        resolve_target(torch.tensor([0, 1, 2]), y)


def test_resolve_references():
    target = torch.tensor([0, 1])
    assert resolve_references(torch.tensor([2, 3]), target, 5).tolist() == [[2, 3], [2, 3]]
    assert resolve_references(torch.tensor([[1, 4], [0, 2]]), target, 5).tolist() == [[1, 4], [0, 2]]
    assert resolve_references(torch.tensor(4), target, 5).tolist() == [[4], [4]]
    with pytest.raises(UserError, match=r"a reference equals the target in references: 'robin'"):
        resolve_references(torch.tensor([2, 1]), target, 5, NAMES)
    with pytest.raises(UserError, match=r"a reference is given twice in references: class 3"):
        resolve_references(torch.tensor([3, 4, 3]), target, 5)
    with pytest.raises(UserError, match="out of range in references: 5"):
        resolve_references(torch.tensor([5]), target, 5)
    with pytest.raises(UserError, match="one such list per image"):
        resolve_references(torch.tensor([[2], [3], [4]]), target, 5)


# --- weights and cotangents --------------------------------------------------------------------


def test_weights_by_hand():
    y = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    refs = torch.tensor([[1, 2]])
    assert reference_weights(y, refs, "mean").tolist() == [[0.5, 0.5]]
    q = torch.tensor([1.0, 3.0]).softmax(0)
    assert torch.allclose(reference_weights(y, refs, "softmax_detached")[0], q)
    bar = (q * torch.tensor([1.0, 3.0])).sum()
    assert torch.allclose(reference_weights(y, refs, "softmax")[0], q * (1 + torch.tensor([1.0, 3.0]) - bar))
    with pytest.raises(UserError, match="did you mean softmax"):
        reference_weights(y, refs, "softmx")


@settings(max_examples=80, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=9), count=st.integers(1, 4),
    gamma=st.floats(0, 2), data=st.data(),
)  # fmt: skip
def test_softmax_weights_are_the_gradient_of_the_official_objective(logits, count, gamma, data):
    """sum_t p_t (y^c - gamma y^{d_t}) / sum_t p_t, probabilities not detached."""
    y = torch.tensor([logits], dtype=torch.double, requires_grad=True)
    target = torch.tensor([data.draw(st.integers(0, len(logits) - 1))])
    refs = similar_classes("logit", y.detach(), target, count)
    p = y.softmax(1)[0, refs[0]]
    j = (p * (y[0, target] - gamma * y[0, refs[0]])).sum() / p.sum()
    (expected,) = torch.autograd.grad(j, y)
    contrast = Contrast(target, refs, reference_weights(y.detach(), refs, "softmax"))
    found = contrast.cotangent(gamma, len(logits)).double()
    assert torch.allclose(found, expected, atol=1e-4 * (1 + float(expected.detach().abs().max())))
    assert torch.allclose(contrast.objective(y.detach(), gamma, "softmax"), j.detach(), atol=1e-6)
    assert float(contrast.weights.sum()) == pytest.approx(1, abs=1e-5)


def test_cotangent_basis_and_objective():
    y = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 5.0, 1.0, 2.0]])
    target, refs = torch.tensor([0, 1]), torch.tensor([[2, 3], [3, 0]])
    contrast = Contrast(target, refs, reference_weights(y, refs, "mean"))
    v = contrast.cotangent(0.6, 4)
    assert torch.allclose(v, torch.tensor([[1, 0, -0.3, -0.3], [-0.3, 1, 0, -0.3]]))
    assert torch.allclose((v * y).sum(1), contrast.objective(y, 0.6, "mean"))
    mixed, single = contrast.basis(4, mixed=True), contrast.basis(4, mixed=False)
    assert mixed.shape == (2, 2, 4) and single.shape == (3, 2, 4)
    assert torch.allclose(mixed[0] - 0.6 * mixed[1], v)
    assert torch.allclose(single[0] - 0.3 * single[1] - 0.3 * single[2], v)
    assert torch.equal(contrast.cotangent(0.0, 4), one_hot(target, 4))
    plain = Contrast(target, refs[:, :0], refs[:, :0].float())
    assert torch.equal(plain.cotangent(0.6, 4), one_hot(target, 4)) and plain.basis(4, mixed=True).shape == (1, 2, 4)
    assert torch.equal(plain.objective(y, 0.6, "softmax"), y[[0, 1], target])
    assert torch.equal(contrast[1:].references, refs[1:])
