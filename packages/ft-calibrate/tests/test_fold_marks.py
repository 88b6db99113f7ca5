import json
import logging

import pytest
import torch
from ft_calibrate.classifier import load_classifier
from ft_calibrate.fold import fold_into_head
from ft_calibrate.fold_files import export_file
from ft_calibrate.fold_marks import RECORD_FILE, folded_in, folded_in_spec, mark, unmark
from ft_calibrate.record import Calibration
from vfm_core.errors import UserError

K = 5
CALIBRATION = Calibration("alg", 3.5, tuple("abcde"), ("a", "c", "d"), ("b", "e"), n_train=60)
SPEC = f"random:timm:test_resnet?num_classes={K}"
TWICE = "folded in already"


def state_file(path):
    torch.save(load_classifier(SPEC).model.state_dict(), path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_a_torch_file_is_not_folded_twice(tmp_path, suffix):
    source, out = state_file(tmp_path / f"m{suffix}"), tmp_path / f"cal{suffix}"
    export_file(source, CALIBRATION, out)
    assert "gamma = 3.5" in folded_in(out) and folded_in(source) is None
    before = out.read_bytes()
    for target in (tmp_path / f"again{suffix}", out):  # elsewhere, and in its own place
        with pytest.raises(UserError, match=TWICE):
            export_file(out, CALIBRATION, target, overwrite=True)
    with pytest.raises(UserError, match=TWICE):
        export_file("timm:test_resnet", CALIBRATION, tmp_path / f"x{suffix}", source_ckpt=out)
    assert out.read_bytes() == before and not (tmp_path / f"again{suffix}").exists()


def test_in_place_export_is_done_once(tmp_path):
    source = state_file(tmp_path / "m.pth")
    before = torch.load(source, weights_only=True)["fc.bias"]
    export_file(source, CALIBRATION, source, overwrite=True)
    with pytest.raises(UserError, match=TWICE):
        export_file(source, CALIBRATION, source, overwrite=True)
    after = torch.load(source, weights_only=True)["fc.bias"]
    torch.testing.assert_close(after - before, torch.tensor([0, 3.5, 0, 0, 3.5]))


def test_a_file_written_anew_under_the_name_is_not_taken_for_calibrated(tmp_path):
    source, out = state_file(tmp_path / "m.pth"), tmp_path / "cal.pth"
    export_file(source, CALIBRATION, out)
    state_file(out)
    assert folded_in(out) is None
    export_file(out, CALIBRATION, tmp_path / "second.pth")
    assert folded_in(tmp_path / "second.pth") is not None


@pytest.mark.parametrize("name", ["cal.pth", "cal.safetensors"])
def test_a_spec_is_written_with_a_mark_and_loaded_with_a_warning(tmp_path, name, caplog):
    with caplog.at_level(logging.WARNING):
        export_file(SPEC, CALIBRATION, tmp_path / name)
        assert TWICE not in caplog.text
        found = load_classifier(SPEC, source_ckpt=tmp_path / name)
    assert TWICE in caplog.text and "gamma = 3.5" in found.folded
    with pytest.raises(UserError, match=TWICE):
        fold_into_head(found, CALIBRATION)
    assert load_classifier(SPEC).folded is None


def test_folders_are_loaded_with_a_warning_and_not_folded_twice(tmp_path, caplog):
    import timm

    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("test_resnet", num_classes=K)
    timm.models.save_for_hf(model, tmp_path / "net", model_config={"label_names": list("abcde")})
    with caplog.at_level(logging.WARNING):
        export_file(f"dir:{tmp_path / 'net'}", CALIBRATION, tmp_path / "out")
        assert TWICE not in caplog.text  # trying the result out is no reason to warn
        found = load_classifier(f"dir:{tmp_path / 'out'}")
    assert TWICE in caplog.text and "gamma = 3.5" in found.folded
    with pytest.raises(UserError, match=TWICE):
        fold_into_head(f"dir:{tmp_path / 'out'}", CALIBRATION)
    (tmp_path / "out" / RECORD_FILE).unlink()  # the weights say it too
    with pytest.raises(UserError, match=TWICE):
        export_file(tmp_path / "out", CALIBRATION, tmp_path / "again")
    assert folded_in_spec(f"dir:{tmp_path / 'net'}") is None


def test_run_folders_are_loaded_with_a_warning(tmp_path, caplog):
    from ft_calibrate.recipes import fine_tune
    from vfm_core.data import open_dataset

    source, data = load_classifier("tiny:glyph-cnn"), open_dataset("tinyworld:glyphs?domain=target&n=1")
    seen, absent = source.class_names[:10], source.class_names[10:]
    fine_tune(source, data.subset(range(10)), data.classes[:10], epochs=1, out=tmp_path / "ft")
    cal = Calibration("fixed", 2.0, tuple(source.class_names), tuple(seen), tuple(absent))
    export_file(tmp_path / "ft", cal, tmp_path / "out")
    assert load_classifier(tmp_path / "ft").folded is None
    with caplog.at_level(logging.WARNING):
        assert "gamma = 2" in load_classifier(tmp_path / "out").folded
    assert TWICE in caplog.text


def test_marks_come_and_go_and_a_damaged_one_still_counts(tmp_path):
    file = tmp_path / "t.npz"
    file.write_bytes(b"logits")
    mark(file, "gamma = 1")
    beside = tmp_path / f"t.npz.{RECORD_FILE}"
    assert folded_in(file) == "gamma = 1" and set(json.loads(beside.read_text())) == {"calibration", "sha256"}
    beside.write_text("{")
    assert folded_in(file) == beside.name
    mark(tmp_path, "gamma = 2")
    assert folded_in(tmp_path) == "gamma = 2" and folded_in_spec(str(tmp_path)) == "gamma = 2"
    unmark(file)
    unmark(tmp_path)
    assert folded_in(file) is folded_in(tmp_path) is folded_in(tmp_path / "nothing") is None
    assert not beside.exists()
