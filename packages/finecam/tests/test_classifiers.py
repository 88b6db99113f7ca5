"""Classifiers by spec: every family, class names, head files, and errors that say what to do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from finecam.classifiers import Classifier, KeyedLogits, load_classifier, read_class_names
from finecam.explainer import Explainer
from finecam.head_model import HeadModel, load_head
from PIL import Image
from torch import nn
from vfm_core.backbones import load_backbone
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

RANDOM_VIT = "random:timm:vit_tiny_patch16_224?img_size=32"


def logits_shape(found: Classifier) -> tuple[int, ...]:
    with torch.inference_mode():
        return tuple(found.model(torch.zeros(2, 3, *found.preprocess.size)).shape)


def test_timm_by_name_with_names_and_its_own_statistics() -> None:
    found = load_classifier("timm:resnet18.a1_in1k", random_weights=True)
    assert logits_shape(found) == (2, 1000)
    assert found.preprocess.mean == (0.485, 0.456, 0.406)
    assert not found.model.training
    weights = found.weights()
    assert weights is not None and weights.shape == (1000, 512)


def test_torchvision_has_names_and_the_published_geometry() -> None:
    found = load_classifier("torchvision:resnet18", random_weights=True)
    assert logits_shape(found) == (2, 1000)
    assert found.name(0) == "tench" and found.num_classes == 1000
    image = Image.new("RGB", (500, 375))
    from torchvision.models import ResNet18_Weights

    expected = ResNet18_Weights.DEFAULT.transforms()(image)
    assert found.preprocess(image).shape == expected.shape
    torch.testing.assert_close(found.preprocess(image), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("resize, crop", [(256, 224), (232, 224), (342, 299), (224, 224), (236, 224), (520, 480)])
def test_torchvision_sizes_survive_the_ratio(resize: int, crop: int) -> None:
    from finecam.classifiers import _torchvision_preprocess
    from torchvision.transforms._presets import ImageClassification

    found = _torchvision_preprocess(ImageClassification(crop_size=crop, resize_size=resize))
    picture = (1000, 700)
    x0, y0, x1, y1 = found.box(picture)
    assert (y1 - y0) == pytest.approx(700 * crop / resize)
    assert (x1 - x0) == pytest.approx((y1 - y0), rel=0.01)


def test_random_weights_are_the_same_every_time_and_leave_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    one = load_classifier("torchvision:squeezenet1_1", random_weights=True)
    two = load_classifier("random:torchvision:squeezenet1_1")
    assert one.fingerprint == two.fingerprint and len(one.fingerprint) == 32
    assert torch.equal(state, torch.random.get_rng_state())


def test_missing_weights_offline_name_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"torchvision:resnet18.*cache.*dir:PATH.*tiny:"):
        load_classifier("torchvision:resnet18", offline=True)


@pytest.mark.parametrize(
    "spec, said",
    [
        ("torchvision:resnet19", "did you mean resnet18"),
        ("torchvision:resnet18@IMAGENET", "IMAGENET1K_V1"),
        ("timm:resnet19", "resnet18"),
        ("timmm:resnet18", "timm"),
        ("no/such/folder", "no such file or folder"),
    ],
)
def test_unknown_names_suggest_known_ones(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_classifier(spec, random_weights=True)


def test_class_names_from_text_json_list_and_dict(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n\n y \nz\n", encoding="utf-8")
    (tmp_path / "b.json").write_text('["x", "y", "z"]', encoding="utf-8")
    (tmp_path / "c.json").write_text('{"2": "z", "0": "x", "1": "y"}', encoding="utf-8")
    for source in (tmp_path / "a.txt", tmp_path / "b.json", tmp_path / "c.json", ["x", "y", "z"]):
        assert read_class_names(source) == ["x", "y", "z"]
    (tmp_path / "d.json").write_text('{"1": "x"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"ids must be"):
        read_class_names(tmp_path / "d.json")
    with pytest.raises(UserError, match=r"cannot read class names in .*nowhere"):
        read_class_names(tmp_path / "nowhere.txt")


def test_wrong_number_of_class_names() -> None:
    with pytest.raises(UserError, match=r"2 names for 1000 classes"):
        load_classifier("timm:resnet18", random_weights=True, classes=["a", "b"])


def test_names_are_exact_and_ids_are_checked() -> None:
    found = load_classifier("torchvision:squeezenet1_1", random_weights=True)
    assert found.index("tench") == 0 and found.index("7") == 7 and found.index(7) == 7
    with pytest.raises(UserError, match=r"did you mean tench"):
        found.index("tenc")
    with pytest.raises(UserError, match=r"use 0 to 999"):
        found.index(1000)
    nameless = Classifier(nn.Linear(2, 3), None, Preprocess(), spec="mine")
    assert nameless.name(2) == "class 2" and nameless.num_classes == 3
    with pytest.raises(UserError, match=r"no class names in mine"):
        nameless.index("tench")
    double = Classifier(nn.Linear(2, 3), ["a", "b", "a"], Preprocess())
    with pytest.raises(UserError, match=r"not unique.*\[0, 2\]"):
        double.index("a")


class Wrapped(nn.Module):
    """A classifier that answers in one of several forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.head(self.conv(x).mean((2, 3)))
        outputs: dict[str, Any] = {
            "tensor": y,
            "tuple": (y, None),
            "list": [y],
            "dict": {"logits": y},
            "object": type("Output", (), {"logits": y})(),
            "key": {"species": y},
        }
        return outputs[self.form]


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict", "object"])
def test_outputs_of_every_form_are_explained_alike(form: str) -> None:
    models = []
    for name in ("tensor", form):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            models.append(Wrapped(name).eval())
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    expected, found = (Explainer(m, layer="conv")(x, references=1).maps for m in models)
    torch.testing.assert_close(found, expected)


def test_logits_under_a_key_of_their_own() -> None:
    model = KeyedLogits(Wrapped("key"), "species")
    assert tuple(model(torch.zeros(2, 3, 8, 8)).shape) == (2, 3)
    with pytest.raises(UserError, match=r"no such entry in the model's output in genus: \['species'\]"):
        KeyedLogits(Wrapped("key"), "genus")(torch.zeros(1, 3, 8, 8))


def test_an_image_text_model_needs_texts_and_others_refuse_them() -> None:
    with pytest.raises(UserError, match=r"texts need an image-text model"):
        load_classifier("timm:resnet18", random_weights=True, texts=["a", "b"])
    pytest.importorskip("open_clip")
    spec = "open_clip:RN50"
    with pytest.raises(UserError, match=r"needs classes.*--classes"):
        load_classifier(spec, random_weights=True)


@pytest.mark.slow
def test_open_clip_texts_become_classes() -> None:
    pytest.importorskip("open_clip")
    found = load_classifier("open_clip:ViT-S-32-alt", random_weights=True, texts=["red epaulets", "bird"])
    assert found.class_names == ["red epaulets", "bird"] and logits_shape(found) == (2, 2)
    weights = found.weights()
    assert weights is not None and torch.allclose(weights.norm(dim=1), torch.ones(2), atol=1e-5)


def test_transformers_folder_with_id2label(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        id2label={0: "wren", 1: "robin", 2: "crow"}, label2id={"wren": 0, "robin": 1, "crow": 2},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    found = load_classifier(str(tmp_path / "vit"))
    assert found.class_names == ["wren", "robin", "crow"]
    result = Explainer(found.model, found.layer, class_names=found.class_names)(
        torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), target="crow", references=["wren"]
    )
    assert result.maps.shape == (1, 32, 32) and result.logits.shape == (1, 3)


# --- heads ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head in the official layout, with its class names beside it."""
    folder = tmp_path_factory.mktemp("official")
    generator = torch.Generator().manual_seed(0)
    state = {"weight": torch.randn(4, 192, generator=generator), "bias": torch.randn(4, generator=generator)}
    torch.save(state, folder / "best_classifier.pth")
    (folder / "class_names.json").write_text(json.dumps(["a", "b", "c", "d"]), encoding="utf-8")
    return folder / "best_classifier.pth"


def test_official_head_file_is_linear_on_the_mean_of_normalised_patch_tokens(official: Path) -> None:
    found = load_classifier(official, backbone=RANDOM_VIT)
    assert found.class_names == ["a", "b", "c", "d"]
    backbone = load_backbone(RANDOM_VIT)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    state = torch.load(official, weights_only=True)
    with torch.inference_mode():
        tokens = backbone(x).patch_tokens.mean(1)
        torch.testing.assert_close(found.model(x), tokens @ state["weight"].T + state["bias"])
    weights = found.weights()
    assert weights is not None and torch.equal(weights, state["weight"])


def test_heads_are_explained_at_the_last_blocks_first_norm(official: Path) -> None:
    found = load_classifier(official, backbone=RANDOM_VIT)
    assert found.layer == "backbone.model.blocks.11.norm1"
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    result = Explainer(found.model, found.layer)(x, normalize=None, size=None)
    assert result.maps.shape == (1, 2, 2) and not result.empty.any()


def test_a_head_that_does_not_fit(official: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(4, 768), "bias": torch.zeros(4)}, tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"head expects D=768, backbone gives 192 in .*wide\.pth"):
        load_classifier(tmp_path / "wide.pth", backbone=RANDOM_VIT)
    with pytest.raises(UserError, match=r"3 names for 4 rows"):
        load_classifier(official, backbone=RANDOM_VIT, classes=["a", "b", "c"])


def test_a_head_alone_asks_for_its_backbone(official: Path) -> None:
    with pytest.raises(UserError, match=r"--backbone SPEC"):
        load_classifier(official)
    with pytest.raises(UserError, match=r"--backbone is for head files"):
        load_classifier("timm:resnet18", backbone=RANDOM_VIT)


class Surprise:
    """What an unsafe pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("owned"),))


def test_unsafe_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": Surprise()}))
    torch.save({"weight": Surprise()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(UserError, match=r"refused to unpickle|cannot read weights"):
            load_head(tmp_path / name, backbone=RANDOM_VIT)
    assert not (tmp_path / "owned").exists()


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match=r"cannot read weights in .*cut"):
        load_head(tmp_path / "cut.safetensors", backbone=RANDOM_VIT)
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"not a linear head .*fc\.weight"):
        load_head(tmp_path / "model.pth", backbone=RANDOM_VIT)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"not a state dict"):
        load_head(tmp_path / "list.pth", backbone=RANDOM_VIT)


def test_a_cnn_takes_a_head_on_its_own_pooled_features(tmp_path: Path) -> None:
    torch.save({"weight": torch.randn(3, 512), "bias": torch.zeros(3)}, tmp_path / "head.pth")
    found = load_classifier(tmp_path / "head.pth", backbone="random:timm:resnet18")
    assert isinstance(found.model, HeadModel) and found.model.pool == "native"
    assert logits_shape(found) == (2, 3) and found.layer is None
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert Explainer(found.model)(x, size=None).maps.shape == (1, 2, 2)
