import json
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from ft_calibrate.classifier import Classifier, load_classifier, logits_of
from ft_calibrate.head import base_layer, find_head, head_classes, is_head
from ft_calibrate.model_sources import read_names, read_state, rename_official
from ft_calibrate.text_head import TextHead, encode_classes, load_text_head, save_text_head
from safetensors.torch import save_file
from torch import nn
from vfm_core.errors import UserError

K = 7


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(size=32, n=2):
    return torch.randn(n, 3, size, size, generator=seeded())


def hf_model(kind):
    transformers = pytest.importorskip("transformers")
    stages = {"hidden_sizes": [8, 8], "depths": [1, 1]}
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "vit": lambda: transformers.ViTConfig(**vit, intermediate_size=32, image_size=32, patch_size=16, num_labels=K),
        "resnet": lambda: transformers.ResNetConfig(embedding_size=8, **stages, layer_type="basic", num_labels=K),
        "convnext": lambda: transformers.ConvNextConfig(num_stages=2, **stages, num_labels=K),
        "swin": lambda: transformers.SwinConfig(
            image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, num_labels=K
        ),
        "dinov2": lambda: transformers.Dinov2Config(**vit, image_size=28, patch_size=14, mlp_ratio=2, num_labels=K),
    }[kind]()
    with torch.random.fork_rng(devices=[]):
        return transformers.AutoModelForImageClassification.from_config(config).eval()


def timm_model(name, **kwargs):
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name, num_classes=K, **kwargs).eval()


def torchvision_model(name):
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        return models.get_model(name, weights=None, num_classes=K).eval()


class Plain(nn.Module):
    """Two candidates of K rows; the later one makes the logits."""

    def __init__(self):
        super().__init__()
        self.body, self.decide = nn.Linear(12, K), nn.Linear(K, K)

    def forward(self, x):
        return {"logits": self.decide(self.body(x.flatten(1)[:, :12]).relu())}


# ---------------------------------------------------------------------- find_head
@pytest.mark.parametrize(
    ("make", "name", "size"),
    [
        (lambda: timm_model("test_resnet"), "fc", 32),
        (lambda: timm_model("test_vit", img_size=32), "head", 32),
        (lambda: timm_model("test_convnext"), "head.fc", 32),
        (lambda: timm_model("mobilenetv3_small_050"), "classifier", 32),
        (lambda: timm_model("resnetv2_50", layers=(1, 1, 1, 1)), "head.fc", 32),  # 1x1 convolution
        (lambda: torchvision_model("resnet18"), "fc", 32),
        (lambda: torchvision_model("mobilenet_v3_small"), "classifier.3", 32),
        (lambda: torchvision_model("shufflenet_v2_x0_5"), "fc", 32),
        (lambda: hf_model("vit"), "classifier", 32),
        (lambda: hf_model("resnet"), "classifier.1", 32),
        (lambda: hf_model("convnext"), "classifier", 32),
        (lambda: hf_model("swin"), "classifier", 32),
        (lambda: hf_model("dinov2"), "classifier", 28),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 5), nn.ReLU(), nn.Linear(5, K)), "3", 4),
        (Plain, "decide", 4),
    ],
)
def test_heads_of_all_families_are_found_and_one_pass_gives_exact_logits(make, name, size):
    model = make()
    found, head = find_head(model, K)
    assert (found, head_classes(head)) == (name, K)
    classifier, x = Classifier(model, found), pictures(size)
    with torch.no_grad():
        features, logits = classifier.features_and_logits(x)
        assert torch.equal(logits, logits_of(model(x)))
        again = head(features[:, :, None, None]).flatten(1) if isinstance(head, nn.Conv2d) else head(features)
    torch.testing.assert_close(again, logits)
    assert features.shape == (2, classifier.feature_dim) and classifier.num_classes == K
    assert not head._forward_pre_hooks


def test_torchvision_transformers_keep_their_head_under_heads():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(16, 8, 1, 1, 8, 16, num_classes=K)
    assert find_head(model)[0] == "heads.head"


def test_a_named_head_wins_and_a_container_stands_for_its_last_layer():
    model = Plain()
    assert find_head(model, name="body")[0] == "body"
    nested = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Dropout(), nn.Linear(4, K)))
    assert find_head(nested, name="1")[0] == "1.1"


@pytest.mark.parametrize(
    ("name", "classes", "words"),
    [("bodi", None, "did you mean body"), ("decide", 4, "7 rows for 4 classes"), (None, 99, "99 rows")],
)
def test_a_head_that_is_not_there_is_refused_with_the_candidates(name, classes, words):
    with pytest.raises(UserError, match=words):
        find_head(Plain(), classes, name)


def test_models_without_a_head_or_with_two_are_refused():
    with pytest.raises(UserError, match="no classifier head"):
        find_head(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    with pytest.raises(UserError, match="averages two heads"):
        find_head(timm_model("deit_tiny_distilled_patch16_224", depth=1, img_size=32))


def test_adapter_layers_are_never_taken_for_the_head():
    peft = pytest.importorskip("peft")
    plain = OrderedDict(body=nn.Linear(6, 6), fc=nn.Linear(6, K))
    adapted = peft.get_peft_model(nn.Sequential(plain), peft.LoraConfig(target_modules=["body", "fc"], r=K))
    name, head = find_head(adapted, K)
    assert name == "base_model.model.fc" and base_layer(head).out_features == K
    whole = nn.Sequential(OrderedDict(body=nn.Linear(6, 6), fc=nn.Linear(6, K)))
    saved = peft.get_peft_model(whole, peft.LoraConfig(target_modules=["body"], modules_to_save=["fc"]))
    name, head = find_head(saved, K)
    assert name == "base_model.model.fc" and base_layer(head) is head.modules_to_save["default"]


def test_a_head_that_runs_twice_is_an_error_and_leaves_no_hook():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(self.fc(x))

    model = Twice()
    with pytest.raises(UserError, match="ran 2 times"):
        Classifier(model, "fc").features_and_logits(torch.ones(1, 3))
    assert not model.fc._forward_pre_hooks


def test_hooks_go_also_when_the_model_fails():
    model = Plain()
    with pytest.raises(RuntimeError):
        Classifier(model, "decide").features_and_logits(torch.ones(2, 3, 1, 1))
    assert not model.decide._forward_pre_hooks


def test_logits_must_be_a_matrix():
    assert logits_of((torch.ones(2, 3), None)).shape == (2, 3)
    with pytest.raises(UserError, match="must return logits"):
        logits_of(torch.ones(2, 3, 4))


def test_names_must_fit_and_the_fingerprint_follows_the_weights():
    model = Plain()
    with pytest.raises(UserError, match="2 names for 7 logits"):
        Classifier(model, "decide", None, ["a", "b"])
    before = Classifier(model, "decide").fingerprint()
    assert Classifier(model, "decide").fingerprint() == before
    model.decide.bias.data += 1
    assert Classifier(model, "decide").fingerprint() != before


# ---------------------------------------------------------------------- loading
def test_families_load_with_their_names_and_preprocessing():
    tiny = load_classifier("tiny:cnn")
    assert (tiny.head_name, tiny.num_classes, len(tiny.class_names)) == ("fc", 16, 16)
    assert not tiny.model.training and tiny.preprocess is not None
    small = load_classifier(f"random:timm:test_resnet?num_classes={K}", classes=list("abcdefg"))
    assert small.class_names == list("abcdefg") and small.logit_scale is None
    with pytest.raises(UserError, match="3 names for 7 logits"):
        load_classifier(f"random:timm:test_resnet?num_classes={K}", classes=["a", "b", "c"])
    shuffle = load_classifier("random:torchvision:shufflenet_v2_x0_5")
    assert shuffle.num_classes == 1000 and shuffle.preprocess.size == (224, 224)
    assert len(set(shuffle.class_names)) == 1000


def test_text_models_become_cosine_heads():
    found = load_classifier("tiny:clip", classes=["a blue bird", "a red bird"])
    x = torch.randn(2, 3, *found.preprocess.size, generator=seeded())
    with torch.no_grad():
        features, logits = found.features_and_logits(x)
    assert isinstance(found.head, TextHead) and logits.shape == (2, 2)
    assert found.logit_scale == pytest.approx(15.31, abs=0.01)
    cosine = nn.functional.normalize(features, dim=1) @ found.head.weight.T
    torch.testing.assert_close(found.logit_scale * cosine, logits)
    with pytest.raises(UserError, match="once in --template"):
        load_classifier("tiny:clip", template="a bird")


def test_an_open_clip_model_takes_its_classes_from_prompts():
    open_clip = pytest.importorskip("open_clip")
    from ft_calibrate.model_sources import from_native_text
    from vfm_core.backbones import Native
    from vfm_core.backbones.open_clip_family import OpenClipText
    from vfm_core.preprocess import Preprocess
    from vfm_core.specs import Spec

    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    with torch.random.fork_rng(devices=[]):
        model = open_clip.CLIP(16, vision, text).eval()
    tower = OpenClipText(model, "ViT-B-32", what="test", offline=True)
    native = Native(Spec("open_clip", "test"), "open_clip", model, Preprocess((32, 32)), None, tower)
    with pytest.raises(UserError, match="needs class names"):
        from_native_text(native, None, None)
    found = from_native_text(native, ["alarm_clock", "bed"], None)
    x = pictures()
    with torch.no_grad():
        image = model.encode_image(x, normalize=True)
        prompts = open_clip.get_tokenizer("ViT-B-32")(["a photo of a alarm clock.", "a photo of a bed."])
        expected = model.logit_scale.exp() * image @ model.encode_text(prompts, normalize=True).T
        torch.testing.assert_close(found(x), expected)
    assert found.class_names == ["alarm_clock", "bed"]


def official(tmp_path, k=K):
    """A checkpoint in the layout of FTC's code."""
    model = timm.create_model("resnet50", num_classes=k)
    state = {("head." + n[3:] if n.startswith("fc.") else f"backbone.{n}"): t for n, t in model.state_dict().items()}
    path = tmp_path / "source.pth"
    torch.save(state, path)
    return model.eval(), path


def test_official_checkpoints_become_timm_models(tmp_path):
    with torch.random.fork_rng(devices=[]):
        model, path = official(tmp_path)
    found = load_classifier("timm:resnet50", source_ckpt=path)
    assert found.head_name == "fc" and found.num_classes == K and "source.pth" in found.spec
    with torch.no_grad():
        assert torch.equal(found(pictures()), model(pictures()))
    with pytest.raises(UserError, match="does not fit timm:resnet18"):
        load_classifier("timm:resnet18", source_ckpt=path)


def test_renaming_leaves_other_checkpoints_alone():
    plain = {"conv.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert rename_official(plain) == plain
    assert set(rename_official({"backbone.conv1.weight": plain["conv.weight"], "head.bias": torch.ones(1)})) == {
        "conv1.weight",
        "fc.bias",
    }


def test_source_weights_also_go_into_a_model_of_ones_own(tmp_path):
    torch.save({"state_dict": {f"module.{k}": v for k, v in Plain().state_dict().items()}}, tmp_path / "w.pth")
    model = Plain()
    found = load_classifier(model, source_ckpt=tmp_path / "w.pth")
    assert found.model is model and torch.equal(model.body.weight, read_state(tmp_path / "w.pth")["body.weight"])
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"4 missing, first body\.bias; 2 unexpected"):
        load_classifier(model, source_ckpt=tmp_path / "other.pth")
    state = {**Plain().state_dict(), "decide.weight": torch.ones(3, K), "decide.bias": torch.ones(3)}
    torch.save(state, tmp_path / "three.pth")
    with pytest.raises(UserError, match="number of classes differs"):
        load_classifier(Plain(), source_ckpt=tmp_path / "three.pth")


class Stored:
    """Stands for the pickled results of an evaluation."""


def test_pickled_objects_damaged_and_missing_files_are_refused(tmp_path):
    torch.save({"logits": Stored()}, tmp_path / "evaluation.pth")
    with pytest.raises(UserError, match=r"refused to unpickle.*ft-calibrate extract"):
        read_state(tmp_path / "evaluation.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    for name in ("cut.safetensors", "cut.pth"):
        with pytest.raises(UserError, match="cannot read weights"):
            read_state(tmp_path / name)
    with pytest.raises(UserError, match="no such checkpoint file"):
        read_state(tmp_path / "absent.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="no tensors"):
        read_state(tmp_path / "empty.pth")


def test_missing_weights_name_the_id_the_cache_and_the_source_option(tmp_path):
    with pytest.raises(UserError) as caught:
        load_classifier("timm:resnet18.a1_in1k", offline=True, cache_dir=tmp_path)
    message = str(caught.value)
    assert "resnet18.a1_in1k" in message and str(tmp_path) in message and "--source-ckpt" in message


def test_transformers_folders_load_with_their_names(tmp_path):
    model = hf_model("vit")
    model.config.id2label = {i: f"bird {i}" for i in range(K)}
    model.save_pretrained(tmp_path / "vit")
    found = load_classifier(f"dir:{tmp_path / 'vit'}")
    assert found.class_names == [f"bird {i}" for i in range(K)] and found.head_name == "classifier"
    assert load_classifier(model).class_names == found.class_names
    with torch.no_grad():
        assert torch.equal(found(pictures()), model(pictures()).logits)


def test_class_names_come_from_lists_text_and_json(tmp_path):
    (tmp_path / "n.txt").write_text("cat\n\n dog \n")
    (tmp_path / "n.json").write_text('{"1": "dog", "0": "cat"}')
    (tmp_path / "l.json").write_text('["cat", "dog"]')
    for source in (["cat", "dog"], tmp_path / "n.txt", tmp_path / "n.json", tmp_path / "l.json"):
        assert read_names(source) == ["cat", "dog"]
    (tmp_path / "gap.json").write_text('{"0": "cat", "2": "dog"}')
    for bad, words in (
        (tmp_path / "gap.json", "cannot read"),
        (Path("absent.txt"), "cannot read"),
        (["a", "a"], "twice"),
    ):
        with pytest.raises(UserError, match=words):
            read_names(bad)


# ---------------------------------------------------------------------- text heads
def test_text_heads_round_trip_with_and_without_bias(tmp_path):
    weight = nn.functional.normalize(torch.randn(3, 5, generator=seeded()), dim=1)
    x = torch.randn(4, 5, generator=seeded(1))
    for bias in (None, torch.tensor([0.0, 1.0, -2.0])):
        head = TextHead(weight, 50.0, bias)
        save_text_head(head, tmp_path / "h.safetensors", ["a", "b", "c"])
        again, names = load_text_head(tmp_path / "h.safetensors")
        assert names == ["a", "b", "c"] and torch.equal(again(x), head(x))
        fresh = TextHead(torch.zeros(3, 5), 1.0)
        fresh.load_state_dict(head.state_dict())
        assert torch.equal(fresh(x), head(x))
    save_file({"weight": weight}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not a text head"):
        load_text_head(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"weight \(3, 5\), bias \(2,\)"):
        TextHead(weight, 1.0, torch.zeros(2))


def test_prompts_are_averaged_on_the_sphere():
    def encode(texts):
        return torch.tensor([[float(len(t)), 1.0] for t in texts])

    rows = encode_classes(encode, ["ab", "abcd"], ["{}", "x {}"])
    first = nn.functional.normalize(encode(["ab", "x ab"]), dim=1).mean(0)
    torch.testing.assert_close(rows[0], nn.functional.normalize(first, dim=0))
    assert torch.allclose(rows.norm(dim=1), torch.ones(2))


def test_only_layers_with_one_row_per_class_are_heads():
    assert is_head(nn.Linear(2, 3)) and is_head(nn.Conv2d(2, 3, 1)) and is_head(TextHead(torch.ones(2, 2), 1.0))
    assert not is_head(nn.Conv2d(2, 3, 3)) and not is_head(nn.Embedding(2, 3))


def hf_clip(path):
    """A small random CLIP with a tokenizer of single letters."""
    transformers = pytest.importorskip("transformers")
    path.mkdir()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["."]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=40)
    tokenizer.save_pretrained(path)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(vocabulary), "max_position_embeddings": 40, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.CLIPModel(config).eval()
    model.save_pretrained(path)
    return model, tokenizer


def test_transformers_clip_takes_its_classes_from_prompts(tmp_path):
    model, tokenizer = hf_clip(tmp_path / "clip")
    found = load_classifier(f"hf:{tmp_path / 'clip'}", classes=["cat", "dog"])
    tokens = tokenizer(["a photo of a cat.", "a photo of a dog."], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=pictures(), **tokens).logits_per_image
        torch.testing.assert_close(found(pictures()), expected)
    assert found.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    with pytest.raises(UserError, match="needs --classes"):
        load_classifier(f"hf:{tmp_path / 'clip'}")
