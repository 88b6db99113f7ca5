"""Bad arguments, bad numbers and bad luck: one clear line each, and never a NaN map."""

from __future__ import annotations

import logging

import pytest
import torch
from finecam.explainer import Explainer
from torch import nn
from vfm_core.errors import UserError

NAMES = ["wren", "robin", "finch", "swift", "heron", "crane", "eagle"]


def test_zero_gradient_is_reported_with_advice(make, images, caplog):
    model = make["vit"]()
    with caplog.at_level(logging.WARNING):
        result = Explainer(model, "blocks[-1]")(images(2, 64, 64))
    assert result.empty.tolist() == [True, True] and not result.maps.any() and result.maps.isfinite().all()
    assert "first norm layer" in result.advice and "all-zero gradient at blocks.2" in caplog.text
    fine = Explainer(model)(images(2, 64, 64))
    assert fine.advice is None and not fine.empty.any()


def test_negative_evidence_is_empty_but_not_without_gradient(make, images):
    model = make["cnn"]()
    with torch.no_grad():
        model.fc.weight[2] = -1
    result = Explainer(model)(images(1), target=2, references=None)
    assert result.empty.tolist() == [True] and result.advice is None


def test_not_a_number_names_image_and_layer(make, images):
    model, x = make["cnn"](), images(4)
    explain = Explainer(model, batch_size=2)
    bad = x.clone()
    bad[3, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"NaN or Inf in logits in image 3 of the batch; run in float32"):
        explain(bad)

    class Blows(nn.Module):
        def __init__(self, where):
            super().__init__()
            self.conv, self.fc, self.where = nn.Conv2d(3, 4, 3, 4, 1), nn.Linear(4, 3), where

        def forward(self, x):
            a = self.conv(x)
            if self.where == "gradient":
                a = (a - a.detach()).sqrt() + a.detach()
            return self.fc(a.mean((2, 3)))

    with pytest.raises(UserError, match=r"NaN or Inf in gradient at conv in images 0, 1 of the batch"):
        Explainer(Blows("gradient"), "conv")(x[:2])
    overflow = Blows("activation")
    overflow.conv.register_forward_hook(lambda m, i, o: torch.where(o == o.amax(), float("inf"), o))
    overflow.forward = lambda x: overflow.fc(overflow.conv(x).clamp(-5, 5).mean((2, 3)))
    with pytest.raises(UserError, match="NaN or Inf in activations of conv"):
        Explainer(overflow, "conv", "hirescam")(x[:1])


def test_out_of_memory_halves_the_batch(make, images, caplog):
    model, x = make["cnn"](), images(7)
    expected = Explainer(model)(x).maps
    explain = Explainer(model, batch_size=7)

    def small(module, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(small)
    with caplog.at_level(logging.WARNING):
        result = explain(x)
    handle.remove()
    assert torch.allclose(result.maps, expected, atol=1e-5) and explain.batch_size == 1
    assert "batch size halved to 3" in caplog.text
    model.register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
    with pytest.raises(torch.OutOfMemoryError):
        explain(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -0.1}, r"gamma must be finite and not negative in gamma: -0.1"),
        ({"gamma": float("nan")}, "gamma must be finite"),
        ({"gamma": float("inf")}, "gamma must be finite"),
        ({"gamma": "0.6"}, "gamma must be finite"),
        ({"references": -1}, "must not be negative"),
        ({"references": True}, "must not be negative"),
        ({"references": [2], "target": 2}, r"a reference equals the target in references: 'finch'"),
        ({"references": [4, 4], "target": 2}, r"a reference is given twice in references: 'heron'"),
        ({"references": ["hron"]}, r"unknown class in references: 'hron'; did you mean heron"),
        ({"references": [[1], [2], [3]]}, "one list, or one per image"),
        ({"references": [9]}, "class id out of range in references: 9"),
        ({"target": [1, 2, 3]}, "one class, or one per image"),
        ({"target": 7}, "class id out of range in target: 7; the model has 7 classes"),
        ({"similarity": "logits"}, "unknown similarity.*did you mean logit"),
        ({"weighting": "avg"}, "unknown weighting"),
        ({"aggregate": "max"}, "unknown aggregate"),
        ({"aggregate": "map_subtraction"}, "noisy counter-example"),
        ({"aggregate": "after_relu_mean", "weighting": "softmax"}, "weighs references alike"),
        ({"similarity": "confusion"}, "needs a matrix"),
    ],
)
def test_bad_arguments(make, images, options, message):
    with pytest.raises(UserError, match=message):
        Explainer(make["cnn"](), class_names=NAMES)(images(2), **options)


def test_bad_inputs_and_settings(make, images):
    model = make["cnn"]()
    explain = Explainer(model)
    with pytest.raises(UserError, match=r"must be \(B, 3, H, W\), B > 0: \(3, 64, 96\); add a batch axis"):
        explain(images(1)[0])
    with pytest.raises(UserError, match="B > 0"):
        explain(images(1)[:0])
    with pytest.raises(UserError, match="preprocessed floats"):
        explain((images(1) * 9).byte())
    with pytest.raises(UserError, match="no strength given"):
        explain.sweep(images(1), [])
    with pytest.raises(UserError, match=r"unknown method.*did you mean gradcam"):
        Explainer(model, method="gradcm")
    with pytest.raises(UserError, match="model must be a torch module"):
        Explainer(lambda x: x)
    with pytest.raises(UserError, match="batch size must be positive"):
        Explainer(model, batch_size=0)
    with pytest.raises(UserError, match="max_channels must be positive"):
        Explainer(model, method="scorecam", max_channels=0)
    with pytest.raises(UserError, match=r"class names do not fit the model: 6 names for 7 logits"):
        Explainer(model, class_names=NAMES[:6])(images(1))
    with pytest.raises(UserError, match="'auto' or a callable"):
        Explainer(model, reshape="vit")
    with pytest.raises(UserError, match="aggregates before the ReLU only"):
        Explainer(model, method="scorecam")(images(1), aggregate="before_relu_max")
