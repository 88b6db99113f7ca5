import json

import numpy as np
import pytest
import timm
import torch
from ft_calibrate.classifier import load_classifier
from ft_calibrate.fold_files import export_file
from ft_calibrate.head_change import largest_difference
from ft_calibrate.record import Calibration
from ft_calibrate.state_heads import head_keys
from ft_calibrate.text_head import TextHead, load_text_head, save_text_head
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from vfm_core.errors import UserError

K, GAMMA = 5, 3.5
NAMES = tuple("abcde")
BIAS = torch.tensor([0.0, GAMMA, 0.0, 0.0, GAMMA])


def calibration(**changes):
    values = {"method": "alg", "gamma": GAMMA, "classes": NAMES, "seen": ("a", "c", "d"), "absent": ("b", "e")}
    return Calibration(**{**values, "n_train": 60, **changes})


def random_state(layer="fc", rows=K, bias=True, prefix="", **others):
    g = torch.Generator().manual_seed(0)
    state = {"conv.weight": torch.randn(4, 3, 3, 3, generator=g), f"{layer}.weight": torch.randn(rows, 6, generator=g)}
    state |= {f"{layer}.bias": torch.randn(rows, generator=g)} if bias else {}
    return {prefix + k: v for k, v in {**state, **others}.items()}


def only_changed(before, after):
    assert set(before) <= set(after)
    return {k for k in after if k not in before or not torch.equal(after[k], before[k])}


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_logits_moved(before, after, cal, x):
    with torch.no_grad():
        z, got = before(x).double().numpy(), after(x).double().numpy()
    assert largest_difference(got, cal.apply(z)) <= 1e-5
    assert (got.argmax(1) == cal.apply(z).argmax(1)).all()


# ---------------------------------------------------------------------- state dicts
@pytest.mark.parametrize(
    ("layer", "shape"),
    [("fc", (K, 6)), ("head", (K, 6)), ("classifier.3", (K, 6)), ("last", (K, 6)), ("head.fc", (K, 6, 1, 1))],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_only_the_bias_of_the_head_changes(tmp_path, layer, shape, suffix):
    state = random_state(layer)
    state[f"{layer}.weight"] = state[f"{layer}.weight"].reshape(shape)
    source, out = tmp_path / f"m{suffix}", tmp_path / f"out{suffix}"
    save_file(state, source, metadata={"format": "pt"}) if suffix == ".safetensors" else torch.save(state, source)
    record = export_file(source, calibration(), out)
    after = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert only_changed(state, after) == {f"{layer}.bias"} == set(record.changed)
    torch.testing.assert_close(after[f"{layer}.bias"], state[f"{layer}.bias"] + BIAS)
    assert "method alg, 60 rows" in record.line() and record.path == out


def test_official_checkpoints_keep_their_layout_and_load_as_before(tmp_path):
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("test_resnet", num_classes=K).state_dict()
    torch.save(
        {("head." + k[3:] if k.startswith("fc.") else f"backbone.{k}"): v for k, v in model.items()}, tmp_path / "s.pth"
    )
    record = export_file(tmp_path / "s.pth", calibration(), tmp_path / "out.pth")
    assert record.changed == ("head.bias",)
    spec = "timm:test_resnet"
    before, after = (load_classifier(spec, source_ckpt=tmp_path / n) for n in ("s.pth", "out.pth"))
    assert_logits_moved(before, after, calibration(), images())


def test_wrappers_prefixes_and_moving_averages_are_kept(tmp_path):
    stored = {
        "epoch": 3,
        "state_dict": random_state(prefix="module."),
        "state_dict_ema": random_state(prefix="module.", **{"other.weight": torch.ones(1)}),
    }
    torch.save(stored, tmp_path / "m.pth")
    record = export_file(tmp_path / "m.pth", calibration(), tmp_path / "out.pth")
    after = torch.load(tmp_path / "out.pth", weights_only=True)
    assert after["epoch"] == 3 and "all 2 state dicts" in record.line()
    for part in ("state_dict", "state_dict_ema"):
        assert only_changed(stored[part], after[part]) == {"module.fc.bias"}
    save_file(random_state(prefix="module."), tmp_path / "m.safetensors")
    export_file(tmp_path / "m.safetensors", calibration(), tmp_path / "out.safetensors")
    assert set(load_file(tmp_path / "out.safetensors")) == set(stored["state_dict"])


def test_factors_change_the_weight_too(tmp_path):
    cal = calibration(scale=(1.0, 2.0, 1.0, 1.0, 0.5), shift=(1.0, 0.0, 0.0, 0.0, 0.0))
    state = random_state()
    save_file(state, tmp_path / "m.safetensors")
    assert export_file(tmp_path / "m.safetensors", cal, tmp_path / "o.safetensors").changed == ("fc.bias", "fc.weight")
    after = load_file(tmp_path / "o.safetensors")
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    z = x @ state["fc.weight"].T + state["fc.bias"]
    np.testing.assert_allclose(x @ after["fc.weight"].T + after["fc.bias"], cal.apply(z.numpy()), atol=1e-5)


def test_half_heads_keep_their_dtype_with_a_note(tmp_path, caplog):
    save_file({k: v.half() for k, v in random_state().items()}, tmp_path / "m.safetensors")
    record = export_file(tmp_path / "m.safetensors", calibration(gamma=3.14159), tmp_path / "o.safetensors")
    assert load_file(tmp_path / "o.safetensors")["fc.bias"].dtype == torch.float16
    assert "float16 rounds the new bias" in record.line() and "rounds" in caplog.text


def test_a_head_without_bias_is_refused_with_the_way_out(tmp_path):
    save_file(random_state(bias=False), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"head has no bias.*ship calibration\.json.*ONNX"):
        export_file(tmp_path / "m.safetensors", calibration(), tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def test_nothing_is_overwritten_or_folded_twice(tmp_path):
    save_file(random_state(), tmp_path / "m.safetensors", metadata={"format": "pt", "note": "mine"})
    export_file(tmp_path / "m.safetensors", calibration(), tmp_path / "o.safetensors")
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        assert file.metadata()["note"] == "mine"
    before = (tmp_path / "o.safetensors").read_bytes()
    with pytest.raises(UserError, match="output exists"):
        export_file(tmp_path / "m.safetensors", calibration(gamma=1.0), tmp_path / "o.safetensors")
    assert (tmp_path / "o.safetensors").read_bytes() == before
    export_file(tmp_path / "m.safetensors", calibration(gamma=1.0), tmp_path / "o.safetensors", overwrite=True)
    assert (tmp_path / "o.safetensors").read_bytes() != before
    with pytest.raises(UserError, match="folded in already"):
        export_file(tmp_path / "o.safetensors", calibration(), tmp_path / "p.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "o.safetensors"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head": "foo"}, "no such layer in the checkpoint"),
        ({"head": "conv"}, "no such layer|number of classes differs"),
        ({"out": "o.pth"}, "another format"),
        ({"source": "absent.safetensors"}, "no such checkpoint file"),
        ({"calibration": calibration(classes=(*NAMES, "f"), absent=("b", "e", "f"))}, "cannot tell the head"),
        ({"classes": list("vwxyz")}, "does not know"),
        ({"calibration": 2.0}, "needs the classes"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, words):
    save_file(random_state(), tmp_path / "m.safetensors")
    source, out = tmp_path / changes.pop("source", "m.safetensors"), tmp_path / changes.pop("out", "o.safetensors")
    with pytest.raises(UserError, match=words):
        export_file(source, changes.pop("calibration", calibration()), out, **changes)
    assert not out.exists()


def test_names_and_numbers_choose_the_columns(tmp_path):
    save_file(random_state(), tmp_path / "m.safetensors")
    export_file(tmp_path / "m.safetensors", calibration(), tmp_path / "a.safetensors", classes=list("edcba"))
    bias = load_file(tmp_path / "a.safetensors")["fc.bias"] - random_state()["fc.bias"]
    torch.testing.assert_close(bias, BIAS.flip(0))
    export_file(tmp_path / "m.safetensors", GAMMA, tmp_path / "b.safetensors", absent=["1", "4"], head="fc")
    torch.testing.assert_close(load_file(tmp_path / "b.safetensors")["fc.bias"], random_state()["fc.bias"] + BIAS)


def test_heads_are_told_by_name_then_by_shape():
    two = {"attn.proj.weight": (5, 5), "attn.proj.bias": (5,), "head.weight": (5, 5), "head.bias": (5,)}
    assert head_keys(two, 5, None, "f") == ("head.weight", "head.bias")
    assert (
        head_keys({"deep.out.weight": (5, 9), "deep.out.bias": (5,), "e.weight": (5, 9)}, 5, None, "f")[0]
        == "deep.out.weight"
    )
    assert (
        head_keys({"classifier.1.weight": (5, 9), "classifier.6.weight": (5, 9)}, 5, None, "f")[0]
        == "classifier.6.weight"
    )
    assert head_keys({"model.fc.weight": (5, 9)}, 5, "fc", "f") == ("model.fc.weight", None)
    assert head_keys({"fc.1.weight": (5, 9)}, None, "fc", "f")[0] == "fc.1.weight"
    with pytest.raises(UserError, match=r"2 layers with 5 rows, such as a, b; name it with --head"):
        head_keys({"a.weight": (5, 9), "b.weight": (5, 9)}, 5, None, "f")
    with pytest.raises(UserError, match="averages two heads"):
        head_keys({"head.weight": (5, 9), "head_dist.weight": (5, 9)}, 5, None, "f")
    with pytest.raises(UserError, match="fc has 5 rows for 6 classes"):
        head_keys({"fc.weight": (5, 9)}, 6, "fc", "f")


# ---------------------------------------------------------------------- folders
def hf_folder(path, shard="1GB"):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16
    )
    config.num_labels, config.id2label = K, dict(enumerate(reversed(NAMES)))
    with torch.random.fork_rng(devices=[]):
        transformers.AutoModelForImageClassification.from_config(config).save_pretrained(path, max_shard_size=shard)
    return transformers


@pytest.mark.parametrize("shard", ["1GB", "5KB"])
def test_transformers_folders_stay_loadable_and_are_matched_by_name(tmp_path, shard):
    transformers = hf_folder(tmp_path / "vit", shard)
    (tmp_path / "vit" / "optimizer.pt").write_bytes(b"state of training")
    record = export_file(tmp_path / "vit", calibration(), tmp_path / "out")
    before, after = (
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / n).eval() for n in ("vit", "out")
    )
    delta = after.classifier.bias - before.classifier.bias
    torch.testing.assert_close(delta.detach(), BIAS.flip(0))  # its classes stand in the other order
    assert record.max_abs_diff is not None and record.max_abs_diff <= 1e-5
    changed = only_changed(before.state_dict(), after.state_dict())
    assert changed == {"classifier.bias"} and not (tmp_path / "out" / "optimizer.pt").exists()
    with pytest.raises(UserError, match="folded in already"):
        export_file(tmp_path / "out", calibration(), tmp_path / "twice")
    with pytest.raises(UserError, match="not a checkpoint folder"):
        export_file(tmp_path / "vit", calibration(), tmp_path, overwrite=True)
    export_file(tmp_path / "vit", calibration(gamma=1.0), tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "vit"]


def test_timm_folders_stay_loadable(tmp_path):
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("test_resnet", num_classes=K)
    timm.models.save_for_hf(model, tmp_path / "net", model_config={"label_names": list(NAMES)})
    record = export_file(f"dir:{tmp_path / 'net'}", calibration(), tmp_path / "out")
    before, after = (load_classifier(f"dir:{tmp_path / n}") for n in ("net", "out"))
    assert_logits_moved(before, after, calibration(), images())
    assert record.max_abs_diff is not None and record.head == "fc"


def test_runs_without_a_spec_are_folded_by_their_file(tmp_path):
    run = {"classes": list(NAMES), "head": "fc", "structure": {"ensemble": None}, "source": {}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ft_calibrate.json").write_text(json.dumps(run))
    save_file(random_state(), tmp_path / "run" / "model.safetensors")
    record = export_file(tmp_path / "run", calibration(), tmp_path / "out")
    torch.testing.assert_close(
        load_file(tmp_path / "out" / "model.safetensors")["fc.bias"], random_state()["fc.bias"] + BIAS
    )
    assert json.loads((tmp_path / "out" / "folded_calibration.json").read_text())["gamma"] == GAMMA
    assert record.max_abs_diff is None
    run["structure"]["ensemble"] = "logit"
    (tmp_path / "run" / "ft_calibrate.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="source ensemble"):
        export_file(tmp_path / "run", calibration(), tmp_path / "other")


def test_a_real_run_folder_stays_a_run(tmp_path):
    from ft_calibrate.recipes import fine_tune
    from vfm_core.data import open_dataset

    source, data = load_classifier("tiny:glyph-cnn"), open_dataset("tinyworld:glyphs?domain=target&n=2")
    seen, absent = source.class_names[:10], source.class_names[10:]
    run = fine_tune(
        source, data.subset(np.flatnonzero(data.labels < 10)), seen, recipe="ft", epochs=1, lr=0.05, out=tmp_path / "ft"
    )
    cal = Calibration("fixed", GAMMA, tuple(source.class_names), tuple(seen), tuple(absent))
    record = export_file(tmp_path / "ft", cal, tmp_path / "out")
    assert_logits_moved(run.classifier, load_classifier(tmp_path / "out"), cal, images(16))
    assert record.changed == ("fc.bias",) and record.max_abs_diff <= 1e-5


def test_a_cosine_head_run_takes_a_bias(tmp_path):
    from ft_calibrate.recipes import fine_tune, load_run
    from vfm_core.data import open_dataset

    source, data = load_classifier("tiny:glyph-cnn"), open_dataset("tinyworld:glyphs?domain=target&n=2")
    seen, absent = source.class_names[:10], source.class_names[10:]
    rows = data.subset(np.flatnonzero(data.labels < 10))
    run = fine_tune(source, rows, seen, recipe="cosine-head", epochs=1, lr=0.05, out=tmp_path / "run")
    cal = Calibration("fixed", GAMMA, tuple(source.class_names), tuple(seen), tuple(absent))
    record = export_file(tmp_path / "run", cal, tmp_path / "out")
    after = load_run(tmp_path / "out")
    assert_logits_moved(run.classifier, after.classifier, cal, images(16))
    assert record.max_abs_diff <= 1e-5 and "the head had no bias: one was made" in record.line()
    assert load_run(tmp_path / "run").classifier.head.bias is None
    state = {"head.weight": torch.eye(K), "head.scale": torch.ones(K)}  # a factor per class is no cosine head of ours
    save_file(state, tmp_path / "scaled.safetensors")
    with pytest.raises(UserError, match="no bias"):
        export_file(tmp_path / "scaled.safetensors", calibration(), tmp_path / "s.safetensors")


# ---------------------------------------------------------------------- specs and text heads
def test_image_text_models_become_text_heads_with_a_bias(tmp_path):
    birds = ["a blue bird", "a red bird", "a plain bird"]
    cal = calibration(classes=tuple(birds), seen=(birds[0],), absent=tuple(birds[1:]))
    record = export_file("tiny:clip", cal, tmp_path / "head.safetensors", classes=birds)
    head, names = load_text_head(tmp_path / "head.safetensors")
    assert names == birds and "buffer" in record.line() and "logit_scale 15.31" in record.line()
    found = load_classifier("tiny:clip", classes=birds)
    x = torch.randn(2, 3, *found.preprocess.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, z = found.features_and_logits(x)
        assert largest_difference(head(features).double().numpy(), cal.apply(z.double().numpy())) <= 1e-5
    with pytest.raises(UserError, match="folded in already"):
        export_file(tmp_path / "head.safetensors", cal, tmp_path / "again.safetensors")
    save_text_head(TextHead(torch.eye(3), 10.0), tmp_path / "plain.safetensors", birds)
    export_file(tmp_path / "plain.safetensors", cal, tmp_path / "plain_cal.safetensors")
    assert load_text_head(tmp_path / "plain_cal.safetensors")[0].bias.tolist() == [0.0, GAMMA, GAMMA]


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth"])
def test_specs_are_written_as_state_dicts(tmp_path, name):
    spec = f"random:timm:test_resnet?num_classes={K}"
    record = export_file(spec, calibration(), tmp_path / name)
    after = load_classifier(spec, source_ckpt=tmp_path / name)
    assert_logits_moved(load_classifier(spec), after, calibration(), images())
    assert record.max_abs_diff is not None and record.max_abs_diff <= 1e-5
    with pytest.raises(UserError, match="cannot tell the format"):
        export_file(spec, calibration(), tmp_path / "out")


def test_a_spec_whose_head_has_no_bias_is_refused(tmp_path, monkeypatch):
    from ft_calibrate import fold_files

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, K, bias=False))
    monkeypatch.setattr(fold_files, "load_classifier", lambda *args, **kwargs: load_classifier(model))
    with pytest.raises(UserError, match=r"head has no bias.*fold_into_head"):
        export_file("random:timm:some", calibration(), tmp_path / "o.safetensors")
