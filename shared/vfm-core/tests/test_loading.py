import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from vfm_core.data import ImageDataset, loader, open_dataset
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

SMALL = Preprocess(size=(8, 8), resize="squash")


def picture(path, colour=(10, 20, 30), size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def birds(root):
    for name in ("002.Wren/b.png", "002.Wren/a.jpg", "010.Auk/c.PNG", "001.Yellow_Crow/deep/d.png"):
        picture(root / name)
    return root


def damaged(root):
    birds(root)
    (root / "002.Wren" / "b.png").write_bytes(b"\x89PNG broken")
    return open_dataset(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_passes_unreadable_files_on(tmp_path, workers):
    dataset = damaged(tmp_path)
    errors = []
    batches = list(loader(dataset, SMALL, 3, workers, on_error=lambda i, id, error: errors.append((i, id, str(error)))))
    assert [(i.tolist(), tuple(x.shape), len(s)) for i, x, s in batches] == [
        ([0, 1], (2, 3, 8, 8), 2),
        ([3], (1, 3, 8, 8), 1),
    ]
    assert [s.id for _, _, kept in batches for s in kept] == [dataset.ids[i] for i in (0, 1, 3)]
    assert [(i, id) for i, id, _ in errors] == [(2, "002.Wren/b.png")] and "b.png" in errors[0][2]
    with pytest.raises(UserError, match=r"b\.png"):
        list(loader(dataset, SMALL, 3, workers))


def test_loader_values_order_and_lean_mode(tmp_path):
    birds(tmp_path)
    picture(tmp_path / "002.Wren/b.png", (200, 0, 0))
    dataset = open_dataset(tmp_path)
    ((positions, x, kept),) = loader(dataset, SMALL, indices=[2, 0], samples=False)
    assert positions.tolist() == [2, 0] and kept == []
    for row, i in enumerate(positions):
        assert torch.equal(x[row], SMALL(dataset[int(i)].image))


def test_loader_groups_shapes(tmp_path):
    for name, size in (("a", (12, 9)), ("b", (9, 12)), ("c", (12, 9))):
        picture(tmp_path / f"{name}.png", size=size)
    keep = [(i.tolist(), x.shape[-2:]) for i, x, _ in loader(open_dataset(tmp_path), Keep(), 8)]
    assert keep == [([0, 2], (9, 12)), ([1], (12, 9))]


class Keep:
    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Counted(ImageDataset):
    reads = 0

    def read(self, i):
        self.reads += 1
        return Image.new("RGB", (4, 4))


def test_loader_streams():
    dataset = Counted("many", [str(i) for i in range(1000)], [-1] * 1000, [])
    stream = loader(dataset, SMALL, batch_size=10)
    for _ in itertools.islice(stream, 2):
        pass
    assert dataset.reads == 20


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_leaves_the_global_generator_alone(tmp_path, workers):
    dataset = open_dataset(birds(tmp_path))
    before = torch.get_rng_state()
    list(loader(dataset, SMALL, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_refuses_a_bad_batch_size(tmp_path):
    with pytest.raises(UserError, match="batch size must be positive"):
        next(loader(open_dataset(birds(tmp_path)), SMALL, batch_size=0))


def test_a_fault_in_a_transform_is_not_swallowed(tmp_path):
    def transform(image):
        raise RuntimeError("our own fault")

    with pytest.raises(RuntimeError, match="our own fault"):
        list(loader(open_dataset(birds(tmp_path)), transform, on_error=lambda *_: None))
