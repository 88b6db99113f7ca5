import csv
import json

import numpy as np
import pytest
import torch
from ft_calibrate.class_names import IMAGENET_NAMES, distinct_names, imagenet_classes
from ft_calibrate.classifier import Classifier, load_classifier
from ft_calibrate.extraction import columns_of, evaluating, extract, predict_table
from ft_calibrate.fold_marks import folded_in
from ft_calibrate.predict import channels_last
from ft_calibrate.tables import read_table
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn
from vfm_core.data import ImageDataset, open_dataset
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

CLASSES = ["ant", "bee", "cat"]


class Net(nn.Module):
    """Mean colours to logits; counts its forward passes and may fail at one."""

    def __init__(self, fail_at=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, len(CLASSES))
        self.calls, self.fail_at = 0, fail_at

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.head(self.norm(x.mean((2, 3))))


class Pictures(ImageDataset):
    """Plain pictures of one colour each; counts how often each is decoded."""

    def __init__(self, n=11, classes=("cat", "ant"), broken=(), labels=None):
        self.broken, self.reads = set(broken), np.zeros(n, dtype=int)
        labels = [i % len(classes) for i in range(n)] if labels is None else labels
        super().__init__("pictures", [f"p{i:02d}" for i in range(n)], labels, list(classes))

    def read(self, i):
        self.reads[i] += 1
        if i in self.broken:
            raise UserError("cannot read image (truncated)", given=self.ids[i])
        return Image.new("RGB", (5, 5), (20 * i, 255 - 20 * i, 7 * i))

    def identity(self):
        return super().identity() + repr(sorted(self.broken)).encode()


def classifier(net=None, names=CLASSES):
    return Classifier(net or Net(), "head", Preprocess((4, 4), "squash"), names and list(names), "test")


def assert_same(a, b):
    np.testing.assert_allclose(a.logits, b.logits, rtol=0, atol=1e-6)  # the last digit depends on the batch
    np.testing.assert_allclose(a.features, b.features, rtol=0, atol=1e-6)
    assert a.labels.tolist() == b.labels.tolist() and a.ids == b.ids and a.classes == b.classes


# ---------------------------------------------------------------------- class names
def test_classes_match_by_name_in_any_spelling():
    names = ["tench, Tinca tinca", "Alarm_Clock", "Bed"]
    assert columns_of(["bed", "alarm clock", "Tench"], names).tolist() == [2, 1, 0]
    assert columns_of(["Bed"], ["bed", "Bed"]).tolist() == [1]  # the exact spelling first


def test_wordnet_ids_find_imagenet_names():
    assert columns_of(["n01443537", "n01440764"], ["tench, Tinca tinca", "goldfish, Carassius auratus"]).tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize("spec", ["random:timm:test_resnet", "random:torchvision:shufflenet_v2_x0_5"])
def test_untrained_models_of_imagenet_size_have_its_names(spec):
    names = load_classifier(spec).class_names
    assert len(set(names)) == 1000
    for kind in IMAGENET_NAMES:
        assert columns_of(imagenet_classes(kind)[130:140], names).tolist() == list(range(130, 140))
    if "timm" in spec:
        assert names == list(imagenet_classes("description"))
        assert load_classifier(f"{spec}?num_classes=999").class_names is None


@pytest.mark.parametrize("kind", IMAGENET_NAMES)
def test_all_names_of_imagenet_find_a_models_columns(kind):
    info = ImageNetInfo()
    model = distinct_names([info.index_to_description(i) for i in range(1000)])
    assert columns_of(imagenet_classes(kind), model).tolist() == list(range(1000))
    assert columns_of([imagenet_classes(kind)[i] for i in (517, 134)], model).tolist() == [517, 134]


def test_classes_without_a_logit_are_named_with_the_closest():
    with pytest.raises(UserError, match=r"1 of 2, such as dgo \(close to 'dgo': 'dog'\)"):
        columns_of(["cat", "dgo"], ["cat", "dog"], "photos")
    with pytest.raises(UserError, match="two classes of the data have one logit: a b and A-B"):
        columns_of(["a b", "A-B"], ["a_b", "c"])


def test_a_model_without_names_takes_the_order_of_as_many_classes(caplog):
    table = predict_table(classifier(names=None), Pictures(classes=["x", "y", "z"]))
    assert table.classes == ["x", "y", "z"] and "no class names" in caplog.text
    with pytest.raises(UserError, match="3 logits, 2 classes in pictures"):
        predict_table(classifier(names=None), Pictures())


# ---------------------------------------------------------------------- predict_table
def test_labels_become_columns_and_logits_are_the_models_own():
    net, data = Net().eval(), Pictures(labels=[0, 1, -1] + [0] * 8)
    table = predict_table(classifier(net), data, batch_size=4)
    assert table.labels.tolist() == [2, 0, -1] + [2] * 8 and table.ids == data.ids
    x = torch.stack([Preprocess((4, 4), "squash")(sample.image) for sample in Pictures()])
    with torch.no_grad():
        np.testing.assert_allclose(table.logits, net(x).numpy(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(table.features, net.norm(x.mean((2, 3))).numpy(), rtol=0, atol=1e-6)
    assert table.logits.dtype == np.float32
    assert predict_table(classifier(net), data, features=False).features is None


def test_tensors_are_scored_as_they_are():
    x, y = torch.rand(5, 3, 4, 4), torch.tensor([0, 2, 1, 1, 0])
    table = predict_table(classifier(), (x, y), batch_size=2)
    assert table.labels.tolist() == y.tolist() and table.ids is None
    assert predict_table(classifier(), (x, None)).labels is None


def test_one_forward_pass_and_one_decode_per_picture():
    net, data = Net(), Pictures()
    predict_table(classifier(net), data, batch_size=4)
    assert net.calls == 3 and (data.reads == 1).all()


def test_pictures_of_several_shapes_keep_their_rows():
    class Sizes(Pictures):
        def read(self, i):
            return super().read(i).resize((5 + i % 3, 5))

    data = Sizes()
    whole = Classifier(Net(), "head", Preprocess((4, 4), "none"), CLASSES)
    whole.preprocess = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    table = predict_table(whole, data, batch_size=6)
    single = [predict_table(whole, data.subset([i])).logits[0] for i in range(len(data))]
    np.testing.assert_allclose(table.logits, single, atol=1e-6)
    assert table.ids == data.ids


def test_modes_are_restored_also_on_error():
    net = Net(fail_at=1)
    net.norm.eval()
    with pytest.raises(KeyboardInterrupt):
        predict_table(classifier(net), Pictures())
    assert net.training and net.head.training and not net.norm.training
    with evaluating(net):
        assert not net.training
    assert net.training and not net.head._forward_pre_hooks


def test_unreadable_pictures_raise_or_are_left_out_without_shifting_labels():
    with pytest.raises(UserError, match="truncated"):
        predict_table(classifier(), Pictures(broken=[4]))
    lost = []
    table = predict_table(classifier(), Pictures(broken=[4]), on_error=lambda i, name, error: lost.append((i, name)))
    full = predict_table(classifier(), Pictures())
    assert lost == [(4, "p04")]
    assert_same(table, full.subset([i for i in range(11) if i != 4]))
    with pytest.raises(UserError, match="no readable picture"):
        predict_table(classifier(), Pictures(broken=range(11)), on_error=lambda *args: None)


def test_nan_logits_and_a_missing_preprocessing_are_refused():
    net = Net()
    net.head.weight.data[0] = float("nan")
    with pytest.raises(UserError, match=r"not finite in test: p00; check the checkpoint"):
        predict_table(classifier(net), Pictures())
    with pytest.raises(UserError, match="does not say how pictures are preprocessed"):
        predict_table(Classifier(Net(), "head", None, CLASSES), Pictures())


def test_autocast_gives_float32_near_the_full_precision():
    full = predict_table(classifier(), Pictures())
    half = predict_table(classifier(), Pictures(), autocast=torch.bfloat16)
    assert half.logits.dtype == half.features.dtype == np.float32
    np.testing.assert_allclose(half.logits, full.logits, atol=0.05)
    assert not np.array_equal(half.logits, full.logits)


def test_the_layout_of_a_model_comes_back():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4))
    before = {name: (t.stride(), t.clone()) for name, t in net.state_dict().items()}
    with pytest.raises(ZeroDivisionError), channels_last(net):
        assert net[0].weight.is_contiguous(memory_format=torch.channels_last) and not net[0].weight.is_contiguous()
        raise ZeroDivisionError
    after = net.state_dict()
    assert all(after[name].stride() == stride and torch.equal(after[name], t) for name, (stride, t) in before.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_scores_and_the_model_comes_back():
    net = Net()
    on_gpu = predict_table(classifier(net), Pictures(), device="cuda", batch_size=4)
    assert_same(on_gpu, predict_table(classifier(), Pictures()))
    assert all(p.device.type == "cpu" for p in net.parameters())


# ---------------------------------------------------------------------- extract
@pytest.mark.parametrize("name", ["out.npz", "out.parquet", "shards"])
def test_files_and_shards_hold_the_same_table(tmp_path, name):
    expected = predict_table(classifier(), Pictures())
    found = extract(classifier(), Pictures(), tmp_path / name, shard_rows=4, batch_size=3)
    assert_same(read_table(tmp_path / name), expected)
    assert (found.rows, found.shards, found.computed, found.skipped) == (11, 3, 3, [])
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_killed_run_resumes_without_recomputing_finished_shards(tmp_path):
    net = Net(fail_at=3)  # batches of 4 over shards of 4: two are done
    with pytest.raises(KeyboardInterrupt):
        extract(classifier(net), Pictures(), tmp_path / "out", shard_rows=4, batch_size=4)
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*")}
    assert sorted(done) == ["shard-00000.npz", "shard-00001.npz"]
    net, data = Net(), Pictures()
    found = extract(classifier(net), data, tmp_path / "out", shard_rows=4, batch_size=4)
    assert (found.computed, net.calls) == (1, 1) and data.reads.tolist() == [0] * 8 + [1] * 3
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == done
    assert_same(read_table(tmp_path / "out"), predict_table(classifier(), Pictures()))
    again = extract(classifier(), Pictures(), tmp_path / "out", shard_rows=4)
    assert (again.computed, again.rows) == (0, 11)


def test_a_lost_or_cut_shard_is_made_again(tmp_path):
    extract(classifier(), Pictures(), tmp_path, shard_rows=4)
    (tmp_path / "shard-00000.npz").unlink()
    cut = tmp_path / "shard-00002.npz"
    cut.write_bytes(cut.read_bytes()[:-10])
    assert extract(classifier(), Pictures(), tmp_path, shard_rows=4).computed == 2
    assert_same(read_table(tmp_path), predict_table(classifier(), Pictures()))


def test_unreadable_pictures_are_listed_and_never_shift_labels(tmp_path):
    broken = [3, 4, 5, 6, 7, 10]  # the last of a shard, a whole shard, the last of all
    found = extract(classifier(), Pictures(broken=broken), tmp_path, shard_rows=4, batch_size=3)
    kept = [i for i in range(11) if i not in broken]
    assert_same(read_table(tmp_path), predict_table(classifier(), Pictures()).subset(kept))
    rows = list(csv.reader((tmp_path / "skipped.csv").open()))
    assert rows[0] == ["id", "reason"] and [r[0] for r in rows[1:]] == [f"p{i:02d}" for i in broken]
    assert found.skipped[0] == ("p03", "cannot read image (truncated)") and found.rows == 5
    again = extract(classifier(), Pictures(broken=broken), tmp_path, shard_rows=4)
    assert again.skipped == found.skipped and again.computed == 0


def test_strict_stops_at_the_first_and_keeps_what_is_done(tmp_path):
    with pytest.raises(UserError, match="truncated"):
        extract(classifier(), Pictures(broken=[9]), tmp_path, shard_rows=4, batch_size=4, strict=True)
    assert sorted(p.name for p in tmp_path.glob("shard-*")) == ["shard-00000.npz", "shard-00001.npz"]
    with pytest.raises(UserError, match="no readable picture"):
        extract(classifier(), Pictures(broken=range(11)), tmp_path / "none")


def test_another_model_or_setting_does_not_mix_into_a_folder(tmp_path):
    extract(classifier(), Pictures(), tmp_path / "out")
    other = Net()
    other.head.bias.data += 1
    for change in ({"features": False}, {}):
        with pytest.raises(UserError, match="changed configuration"):
            extract(classifier(other if not change else None), Pictures(), tmp_path / "out", **change)
    extract(classifier(other), Pictures(), tmp_path / "out", overwrite=True)
    assert_same(read_table(tmp_path / "out"), predict_table(classifier(other), Pictures()))


def test_files_are_replaced_only_when_asked(tmp_path):
    extract(classifier(), Pictures(), tmp_path / "a.npz")
    with pytest.raises(UserError, match="file exists"):
        extract(classifier(), Pictures(), tmp_path / "a.npz")
    assert extract(classifier(), Pictures(n=2), tmp_path / "a.npz", overwrite=True).rows == 2
    for bad, words in (({"format": "hdf"}, "unknown format"), ({"shard_rows": 0}, "at least one row")):
        with pytest.raises(UserError, match=words):
            extract(classifier(), Pictures(), tmp_path / "b", **bad)


def test_progress_counts_every_picture_also_after_a_resume(tmp_path):
    seen, data = [], Pictures(broken=[0])
    extract(classifier(), data, tmp_path, shard_rows=4, batch_size=4, on_progress=lambda *a: seen.append(a))
    assert seen == [(4, 11), (8, 11), (11, 11)]
    (tmp_path / "shard-00001.npz").unlink()
    seen.clear()
    extract(classifier(), data, tmp_path, shard_rows=4, on_progress=lambda *a: seen.append(a))
    assert seen == [(11, 11)]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["classes"] == CLASSES and "batch_size" not in config


def test_folders_of_photos_are_matched_by_their_names(tmp_path):
    for name, colour in (("Cat", (200, 0, 0)), ("ant", (0, 200, 0))):
        (tmp_path / "d" / name).mkdir(parents=True)
        Image.new("RGB", (6, 6), colour).save(tmp_path / "d" / name / "1.png")
    (tmp_path / "d" / "ant" / "2.png").write_bytes(b"no picture")
    found = extract(classifier(), open_dataset(tmp_path / "d"), tmp_path / "t.npz", workers=1)
    table = read_table(tmp_path / "t.npz")
    assert dict(zip(table.ids, table.labels.tolist())) == {"Cat/1.png": 2, "ant/1.png": 0}
    assert [name for name, _ in found.skipped] == ["ant/2.png"]
    assert (tmp_path / "t.skipped.csv").read_text().splitlines()[1].startswith("ant/2.png,")


@pytest.mark.parametrize("name", ["logits.txt", "runs.csv"])
def test_a_suffix_of_another_format_makes_no_folder(tmp_path, name):
    with pytest.raises(UserError, match=r"unknown file format.*npz or \.parquet"):
        extract(classifier(), Pictures(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert extract(classifier(), Pictures(n=2), tmp_path / name, format="npz").rows == 2  # a folder is meant
    assert extract(classifier(), Pictures(n=2), tmp_path / name).computed == 0
    assert extract(classifier(), Pictures(n=2), tmp_path / "vit-0.5").rows == 2


@pytest.mark.parametrize("name", ["out.npz", "out"])
def test_logits_of_a_calibrated_model_are_marked(tmp_path, name):
    calibrated = classifier()
    calibrated.folded = "gamma = 2"
    assert extract(calibrated, Pictures(), tmp_path / name).folded == folded_in(tmp_path / name) == "gamma = 2"
    assert_same(read_table(tmp_path / name), predict_table(classifier(), Pictures()))
    config = tmp_path / name / "config.json"
    assert not config.exists() or json.loads(config.read_text())["folded_calibration"] == "gamma = 2"
    assert extract(classifier(), Pictures(), tmp_path / name, overwrite=True).folded is None
    assert folded_in(tmp_path / name) is None
