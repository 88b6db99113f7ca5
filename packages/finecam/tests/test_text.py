"""Texts as classes: logits, templates, the increment of an attribute over a generic word."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from finecam.explainer import Explainer
from finecam.text import TextClassifier, encode_texts, image_encoder
from torch import nn
from torch.nn import functional as F
from vfm_core.errors import UserError


class Words:
    """A text tower that sums fixed vectors of words."""

    def __init__(self, dim: int, scale: float = 20.0) -> None:
        self.dim, self.logit_scale = dim, scale

    def encode(self, texts):
        rows = []
        for text in texts:
            seeds = [sum(map(ord, word)) for word in text.split()]
            rows.append(sum(torch.randn(self.dim, generator=torch.Generator().manual_seed(s)) for s in seeds))
        return F.normalize(torch.stack(rows), dim=-1)


@pytest.fixture
def native(make):
    pytest.importorskip("open_clip")
    return SimpleNamespace(model=make["clip"]("vit"), text=Words(16), spec="open_clip:random")


def test_logits_are_scaled_cosines(native, images):
    x = images(2, 64, 64)
    clip = TextClassifier(native, ["red epaulets", "bird"])
    image = F.normalize(native.model.encode_image(x), dim=-1)
    assert torch.allclose(clip(x), 20 * image @ native.text.encode(["red epaulets", "bird"]).T, atol=1e-5)
    assert torch.equal(clip.weights(), clip.embeddings) and clip.scale == 20
    assert torch.allclose(TextClassifier(native, ["red epaulets", "bird"], scale=1)(x) * 20, clip(x), atol=1e-5)


def test_attribute_against_a_generic_word(native, images):
    x = images(2, 64, 64)
    explain = Explainer(TextClassifier(native, ["red epaulets", "bird", "blue bill"]))
    result = explain(x, target="red epaulets", references=["bird"])
    assert result.layer == "model.visual.transformer.resblocks.1.ln_1"
    assert result.target.tolist() == [0, 0] and result.references.tolist() == [[1], [1]]
    assert not torch.equal(result.maps, explain(x, target="red epaulets", references=None).maps)
    with pytest.raises(UserError, match="did you mean red epaulets"):
        explain(x, target="red epaulet")
    # similar classes by the angle between texts
    cosine = explain.model.weights() @ explain.model.weights().T
    nearest = explain(x, target=0, references=1, similarity="weight").references[0, 0]
    assert cosine[0, 1:].argmax() + 1 == nearest


def test_maps_do_not_depend_on_the_scale_but_softmax_weights_do(native, images):
    x = images(2, 64, 64)
    texts = ["red epaulets", "bird", "blue bill"]
    one, twenty = (Explainer(TextClassifier(native, texts, scale=s)) for s in (1, 20))
    options = {"target": 0, "references": [1, 2]}
    assert torch.allclose(one(x, **options).maps, twenty(x, **options).maps, atol=1e-4)
    soft = {**options, "weighting": "softmax"}
    assert not torch.allclose(one(x, **soft).maps, twenty(x, **soft).maps, atol=1e-3)


def test_templates_average_and_renormalise():
    encode = Words(8).encode
    rows = encode_texts(encode, ["wren", "finch"], ["a photo of a {}", "a {}"])
    by_hand = [
        F.normalize((encode([f"a photo of a {t}"]) + encode([f"a {t}"]))[0] / 2, dim=0) for t in ("wren", "finch")
    ]
    assert torch.allclose(rows, torch.stack(by_hand), atol=1e-6)
    assert torch.allclose(encode_texts(encode, ["wren"]), encode(["wren"]), atol=1e-6)
    for bad in ("a photo", "{} or {}"):
        with pytest.raises(UserError, match=r"template must hold \{\} once"):
            encode_texts(encode, ["wren"], [bad])


def test_half_precision_towers_give_float32_cosines(native, images):
    native.model.bfloat16()
    clip = TextClassifier(native, ["red epaulets", "bird"])
    assert clip(images(1, 64, 64).bfloat16()).dtype == torch.float32


def test_transformers_towers(images):
    tf = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = tf.CLIPConfig(
        text_config={**small, "vocab_size": 50, "max_position_embeddings": 8},
        vision_config={**small, "image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    model = tf.CLIPModel(config).eval()
    clip = TextClassifier(SimpleNamespace(model=model, text=Words(16)), ["wren", "finch"])
    result = Explainer(clip)(images(2, 64, 64), references=1, size=None)
    assert result.layer == "model.vision_model.encoder.layers.1.layer_norm1"
    assert result.maps.shape == (2, 4, 4) and result.maps.any()


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "list of non-empty strings"),
        ("bird", {}, "list of non-empty strings"),
        (["bird", " "], {}, "list of non-empty strings"),
        (["bird", "wren", "bird"], {}, "text is given twice in texts: 'bird'"),
        (["bird"], {"scale": 0}, "scale must be positive"),
        (["bird"], {"scale": float("nan")}, "scale must be positive"),
    ],
)
def test_bad_texts(native, texts, options, message):
    with pytest.raises(UserError, match=message):
        TextClassifier(native, texts, **options)


def test_models_that_cannot():
    with pytest.raises(UserError, match="the model has no text tower: timm:resnet18"):
        TextClassifier(SimpleNamespace(model=nn.Identity(), text=None, spec="timm:resnet18"), ["bird"])
    with pytest.raises(UserError, match="cannot encode images: Identity"):
        image_encoder(nn.Identity())

    class Odd(nn.Module):
        def encode_image(self, x):
            return {"a": x}

    with pytest.raises(UserError, match="no image embedding"):
        image_encoder(Odd())(torch.zeros(1))
