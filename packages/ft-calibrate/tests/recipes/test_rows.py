import numpy as np
import pytest
import torch
from ft_calibrate.classifier import load_classifier
from ft_calibrate.recipes import fine_tune
from ft_calibrate.recipes import rows as module
from ft_calibrate.recipes.rows import ImageRows, TensorRows, epoch_steps, into_memory, passes
from PIL import Image
from tinyworld.glyphs import Glyphs
from vfm_core.data import ImageDataset
from vfm_core.errors import UserError

X, Y = torch.arange(10.0)[:, None], torch.arange(10)
SEEN = [f"g{i:02d}" for i in range(4)]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def to_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


class Counted(Glyphs):
    """Counts decoded pictures; one may be broken."""

    def __init__(self, *args, broken=None, **options):
        super().__init__(*args, **options)
        self.decoded, self.broken = [], broken

    def read(self, i):
        self.decoded.append(i)
        if i == self.broken:
            raise UserError("unreadable picture", where=self.ids[i])
        return super().read(i)


def glyphs(n=6, **options):
    data = Counted(n=n, domain="target", **options)
    return data, data.subset(np.flatnonzero(data.labels < 4))


def test_number_of_steps():
    assert [epoch_steps(n, 4) for n in (1, 4, 7, 8)] == [1, 1, 1, 2] and epoch_steps(3, 4, 9) == 9


@pytest.mark.parametrize(("n", "batch", "steps"), [(10, 4, 2), (10, 4, 7), (3, 8, 5), (8, 4, 4)])
def test_passes_take_every_row_once_before_any_again(n, batch, steps):
    orders = list(passes(n, batch, steps, gen()))
    size = min(n, batch)
    assert sum(len(o) for o in orders) == steps * size
    assert all(len(set(o.tolist())) == len(o) and len(o) % size == 0 for o in orders)
    if len(orders) > 1:
        assert orders[0].tolist() != orders[1].tolist()


def test_tensor_batches_keep_rows_together():
    batches = TensorRows(X, Y).source(4, 5, extra=X * 2, keep=torch.tensor([1, 3, 5, 7, 9]))(0, gen())
    taken = list(batches)
    assert len(batches) == len(taken) == 5
    for x, z, y in taken:
        assert torch.equal(x[:, 0].long(), y) and torch.equal(z, 2 * x) and bool((y % 2 == 1).all()) and len(y) == 4
    again = list(TensorRows(X, Y).source(4, 5, extra=X * 2, keep=torch.tensor([1, 3, 5, 7, 9]))(0, gen()))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(taken, again))
    with pytest.raises(UserError, match="no row to train on"):
        TensorRows(X, Y).source(4, keep=torch.tensor([], dtype=torch.int64))


def test_picture_batches_equal_tensor_batches():
    data, _ = glyphs(2)
    labels = torch.as_tensor(data.labels)
    x = torch.stack([to_tensor(s.image) for s in data])
    extra = torch.arange(len(data))
    for keep in (None, torch.arange(0, 40, 3)):
        one = list(TensorRows(x, labels).source(8, 7, extra=extra, keep=keep)(0, gen()))
        two = list(ImageRows(data, labels, to_tensor).source(8, 7, extra=extra, keep=keep)(0, gen()))
        assert len(one) == len(two) == 7
        assert all(torch.equal(s, t) for a, b in zip(one, two) for s, t in zip(a, b))


def test_augmentation_depends_on_seed_epoch_pass_and_picture():
    data, _ = glyphs(1)

    def shade(picture, generator):
        return Image.new("RGB", picture.size, (int(torch.randint(256, (), generator=generator)),) * 3)

    def shades(generator, workers=0):
        rows = ImageRows(data, torch.as_tensor(data.labels), to_tensor, shade, workers)
        return [(y.tolist(), x[:, 0, 0, 0].tolist()) for x, y in rows.source(10, 4)(0, generator)]

    first = shades(gen())
    assert first == shades(gen()) and first != shades(gen(1))
    by_pass = [dict(zip(y, s)) for y, s in ((a[0] + b[0], a[1] + b[1]) for a, b in (first[:2], first[2:]))]
    assert by_pass[0].keys() == by_pass[1].keys() and by_pass[0] != by_pass[1], "two passes, two augmentations"


def test_pictures_are_decoded_once_where_they_fit(monkeypatch):
    data, _ = glyphs(2)
    rows = ImageRows(data, torch.as_tensor(data.labels), to_tensor)
    held = into_memory(rows, 16)
    assert isinstance(held, TensorRows) and sorted(data.decoded) == list(range(40))
    assert torch.equal(held.x[7], to_tensor(Glyphs.read(data, 7))) and torch.equal(held.labels, rows.labels)
    monkeypatch.setattr(module, "MEMORY_LIMIT", 40 * 3 * 16 * 16 * 4 - 1)
    data.decoded.clear()
    assert into_memory(rows, 16) is rows and len(data.decoded) <= 16
    augmented = ImageRows(data, rows.labels, to_tensor, lambda p, g: p)
    assert into_memory(augmented) is augmented


def test_unreadable_pictures_are_left_out_with_their_labels():
    data, _ = glyphs(2, broken=5)
    labels = torch.as_tensor(data.labels)
    told = []
    held = into_memory(ImageRows(data, labels, to_tensor, on_error=lambda i, name, e: told.append(i)))
    assert told == [5] and len(held) == 39
    assert torch.equal(held.labels, torch.cat([labels[:5], labels[6:]]))
    with pytest.raises(UserError, match="unreadable picture"):
        into_memory(ImageRows(data, labels, to_tensor))


def test_training_on_pictures_equals_training_on_tensors(tmp_path):
    start = load_classifier("tiny:glyph-cnn")
    _, part = glyphs()
    x = torch.stack([start.preprocess(s.image) for s in part])
    y = torch.as_tensor(part.labels)
    options = {"epochs": 2, "batch_size": 8, "lr": 0.05, "cache_dir": tmp_path}
    for recipe in ("ft+distill", "lp"):
        one = fine_tune(start, (x, y), SEEN, recipe, **options)
        two = fine_tune(start, part, SEEN, recipe, **options)
        for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values()):
            assert torch.allclose(a, b, atol=1e-5), recipe


def test_no_picture_is_decoded_twice(tmp_path, caplog):
    start = load_classifier("tiny:glyph-cnn")
    data, part = glyphs()
    options = {"epochs": 3, "batch_size": 8, "cache_dir": tmp_path}
    fine_tune(start, part, SEEN, "lp+distill", **options)
    assert len(data.decoded) == len(set(data.decoded)) == 24
    data.decoded.clear()
    fine_tune(start, part, SEEN, "lp", augment=lambda p, g: p, **options)
    assert not data.decoded, "the features come from the cache"
    assert "augmentation is not used" in caplog.text
    fine_tune(start, part, SEEN, "distill", **options)
    assert len(data.decoded) == 24


def test_lp_ft_says_that_its_first_stage_is_not_augmented(tmp_path, caplog):
    start = load_classifier("tiny:glyph-cnn")
    _, part = glyphs()
    seen = []

    def note(picture, generator):
        seen.append(picture)
        return picture

    options = {"epochs": 1, "batch_size": 8, "cache_dir": tmp_path}
    fine_tune(start, part, SEEN, "lp-ft", augment=note, **options)
    assert caplog.text.count("first stage on cached features") == 1 and len(seen) == 24
    caplog.clear()
    fine_tune(start, part, SEEN, "lp-ft", **options)
    assert "cached features" not in caplog.text


def test_a_teacher_sees_the_augmented_pictures(tmp_path):
    start = load_classifier("tiny:glyph-cnn")
    _, part = glyphs()

    def flip(picture, generator):
        turn = int(torch.randint(2, (), generator=generator))
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if turn else picture

    options = {"epochs": 1, "batch_size": 8, "augment": flip, "cache_dir": tmp_path, "lr": 0.05}
    plain = fine_tune(start, part, SEEN, "ft", **options)
    runs = [fine_tune(start, part, SEEN, "distill", **options) for _ in range(2)]
    assert runs[0].history[1]["loss"] == runs[1].history[1]["loss"] > plain.history[1]["loss"]
    assert runs[0].settings["augment"].endswith("flip")


def test_an_unreadable_picture_while_features_are_cached(tmp_path):
    start = load_classifier("tiny:glyph-cnn")
    _, part = glyphs(broken=2)
    told = []
    run = fine_tune(
        start, part, SEEN, "lp-ft", epochs=1, batch_size=8, cache_dir=tmp_path, on_error=lambda i, n, e: told.append(n)
    )
    assert set(told) == {part.ids[2]} and len(run.history) == 3
    with pytest.raises(UserError, match="unreadable picture"):
        fine_tune(start, part, SEEN, "lp", epochs=1, cache_dir=tmp_path)


def test_pictures_need_a_transform_and_known_classes():
    _, part = glyphs()
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 20))
    with pytest.raises(UserError, match=r"how to prepare pictures.*transform="):
        fine_tune(net, part, SEEN, epochs=1)
    run = fine_tune(net, part, SEEN, epochs=1, transform=to_tensor)
    assert run.classes == part.classes
    other = ImageDataset("birds", ["a"], [0], ["robin"], files=[__file__])
    with pytest.raises(UserError, match="no logit for classes of the data"):
        fine_tune(load_classifier("tiny:glyph-cnn"), other, SEEN, epochs=1)


def test_inputs_are_checked_before_training(net, rows, caplog):
    x, y = rows
    broken = x.clone()
    broken[3] = float("nan")
    cases = [
        ((broken, y), r"inputs that are not finite.*1 of 44 rows, first row 3; leave"),
        ((x.flatten(1), y), r"does not take these inputs.*rows of shape \(36,\)"),
        ((x.repeat(1, 3, 1, 1), y), "does not take these inputs"),
        (torch.utils.data.TensorDataset(x, y), r"no pair of inputs and labels.*TensorDataset; give dataset.tensors"),
        (5, "no pair of inputs and labels"),
    ]
    for data, message in cases:
        with pytest.raises(UserError, match=message):
            fine_tune(net, data, [0, 1, 2], epochs=1)
    single, double = (fine_tune(net, (z, y), [0, 1, 2], epochs=1).model for z in (x, x.double()))
    assert all(torch.equal(a, b) for a, b in zip(single.parameters(), double.parameters(), strict=True))
    assert "no row of" not in caplog.text
    fine_tune(net, rows, [0, 1, 2, 4], epochs=1)
    assert "no row of the seen classes 4: are they absent?" in caplog.text
