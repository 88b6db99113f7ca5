"""Loading models: the tiny one, folders in the real format, and one clear line for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from meda_kv.models import (
    describe_model,
    describe_shape,
    fingerprint,
    installed_attentions,
    load_model,
    tokenizer_of,
)
from processor_zoo import tiny_processor, tiny_tokenizer
from tinyworld.vlm import save_vlm
from vfm_core.errors import UserError
from zoo import tiny_vlm


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("models") / "tiny")


def save_family(family: str, folder: Path) -> Path:
    model, _ = tiny_vlm(family)
    model.save_pretrained(folder)
    (tiny_tokenizer() if family == "text" else tiny_processor(family)).save_pretrained(folder)
    return folder


def test_the_tiny_model_and_its_checkpoint_are_one(checkpoint: Path) -> None:
    state = torch.random.get_rng_state()
    model, processor = load_model("tiny")
    again, other = load_model(str(checkpoint))
    assert torch.random.get_rng_state().equal(state)
    assert fingerprint(model) == fingerprint(again)
    assert type(processor) is type(other)
    assert describe_shape(model) == {
        "class": "LlavaForConditionalGeneration",
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
    }
    assert not again.training
    assert tokenizer_of(other).padding_side == "left"
    assert tokenizer_of(tokenizer_of(other)) is tokenizer_of(other)


def test_description_names_no_folder_of_this_machine(checkpoint: Path) -> None:
    model, _ = load_model(str(checkpoint))
    described = describe_model(model)
    assert described["name"] == "tiny"
    assert described["dtype"] == "float32"
    assert described["parameters"] == sum(p.numel() for p in model.parameters())


def test_random_weights_of_another_shape() -> None:
    model, _ = load_model("tiny?layers=2&hidden=32&seed=3")
    assert describe_model(model)["name"] == "tiny?layers=2&hidden=32&seed=3", "what the user wrote"
    again, _ = load_model("tiny?random=1&layers=2&hidden=32&seed=3")
    other, _ = load_model("tiny?layers=2&hidden=32&seed=4")
    assert describe_shape(model)["layers"] == 2
    assert fingerprint(model) == fingerprint(again) != fingerprint(other)


def test_a_fingerprint_survives_half_precision_and_sees_a_change() -> None:
    model, _ = load_model("tiny?layers=1&hidden=32")
    before = fingerprint(model)
    assert fingerprint(model.bfloat16()) == before
    with torch.no_grad():
        next(iter(model.parameters())).add_(1.0)
    assert fingerprint(model) != before


@pytest.mark.parametrize("family", ["qwen2_5_vl", "text"])
def test_folders_of_other_families_load(family: str, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path / family)
    model, processor = load_model(str(folder), attn="eager", dtype="bfloat16")
    assert describe_shape(model)["class"] == describe_shape(tiny_vlm(family)[0])["class"]
    assert model.dtype == torch.bfloat16
    assert model.config.get_text_config()._attn_implementation == "eager"
    assert (tokenizer_of(processor) is processor) == (family == "text")


def test_a_tokenizer_without_padding_gets_one(tmp_path: Path) -> None:
    model, _ = tiny_vlm("text")
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[1].pad_token == "<eos>"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tiny?seeds=1", "unknown option of the tiny model .*did you mean seed"),
        ("tiny?seed=one", "not a whole number"),
        ("tiny?seed=77", "no weights for this seed"),
        ("./absent/folder", "no such folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_wrong_specs(spec: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_model(spec)


@pytest.mark.parametrize("how", ["switched off", "no network"])
def test_an_unknown_id_offline(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    import socket
    import urllib.request

    from huggingface_hub import constants

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "switched off")
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(UserError) as caught:
        load_model("nobody-here/no-such-model")
    text = str(caught.value)
    assert "nobody-here/no-such-model" in text
    assert "--model PATH" in text
    assert "--model tiny" in text
    assert "\n" not in text


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file, not a checkpoint folder"):
        load_model(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="encoder-decoder"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="neither a vision-language nor a causal model"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "from-another-world"}')
    with pytest.raises(UserError, match="cannot load the checkpoint"):
        load_model(str(tmp_path))


def test_a_checkpoint_without_weights_or_processor(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load the checkpoint .*broken"):
        load_model(str(broken))
    (broken / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(UserError, match="cannot load the checkpoint"):
        load_model(str(broken))


def test_attention_implementations(checkpoint: Path) -> None:
    assert {"sdpa", "eager"} <= set(installed_attentions())
    with pytest.raises(UserError, match=r"unknown attention implementation .*flash_attention_2"):
        load_model("tiny", attn="flash_attention_4")
    if "flash_attention_2" not in installed_attentions():
        for spec in ("tiny", str(checkpoint)):
            with pytest.raises(UserError, match=r"cannot be used .*installed: sdpa, eager") as refused:
                load_model(spec, attn="flash_attention_2")
            assert "following error" not in str(refused.value), "the reason alone"


def test_progress_bars_are_as_before(checkpoint: Path) -> None:
    from transformers.utils import logging as hf_logging

    before = hf_logging.is_progress_bar_enabled()
    load_model(str(checkpoint))
    assert hf_logging.is_progress_bar_enabled() == before
