import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vfm_core.data import open_dataset
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess
from vfm_core.train import image_batches, tensor_batches

SEED = torch.Generator().manual_seed(0)
X = torch.randn(48, 6, generator=SEED)
Y = (X @ torch.randn(6, 3, generator=SEED)).argmax(1)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 40), size=st.integers(1, 12), drop=st.booleans(), shuffle=st.booleans(), seed=st.integers(0, 99)
)
def test_every_row_comes_once(n, size, drop, shuffle, seed):
    x = torch.arange(n, dtype=torch.float16)
    if drop and n < size:
        with pytest.raises(UserError, match="no batch to train on"):
            tensor_batches(x, x, batch_size=size, drop_last=True)
        return
    source = tensor_batches(x, torch.arange(n), batch_size=size, drop_last=drop, shuffle=shuffle)
    batches = source(0, torch.Generator().manual_seed(seed))
    listed = list(batches)
    assert len(listed) == len(batches) == (n // size if drop else math.ceil(n / size))
    flat = torch.cat([y for _, y in listed]).tolist()
    assert len(set(flat)) == len(flat) == (n // size * size if drop else n)
    assert shuffle or flat == sorted(flat)
    assert all(a.dtype == torch.float32 and torch.equal(a.long(), y) for a, y in listed)
    again = source(0, torch.Generator().manual_seed(seed))
    assert torch.cat([y for _, y in again]).tolist() == flat


def test_tensor_batches_refuses_bad_input():
    with pytest.raises(UserError, match=r"differ in length: \[48, 47\]"):
        tensor_batches(X, Y[1:], batch_size=4)
    with pytest.raises(UserError, match="batch size must be positive"):
        tensor_batches(X, Y, batch_size=0)


def test_image_batches_are_the_same_with_any_number_of_workers(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)
    for i, v in enumerate(values):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(v).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    data = open_dataset(tmp_path)
    view = Preprocess(size=(6, 6))

    def flip(image, generator):
        left = torch.rand((), generator=generator) < 0.5
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if left else image

    def epoch(workers, number=0, augment=flip):
        source = image_batches(data, view, 3, workers=workers, augment=augment)
        batches = source(number, torch.Generator().manual_seed(number))
        listed = list(batches)
        assert len(listed) == len(batches) == 3
        return torch.cat([x for x, _ in listed]), torch.cat([y for _, y in listed])

    x, y = epoch(0)
    assert y.dtype == torch.int64 and sorted(y.tolist()) == sorted(data.labels.tolist())
    for got, expected in zip(epoch(2), (x, y)):
        assert torch.equal(got, expected)
    plain = epoch(0, augment=None)[0]
    flipped = [not any(torch.equal(a, b) for b in plain) for a in x]
    assert 0 < sum(flipped) < 7, "some pictures are flipped, some are not"
    assert not torch.equal(epoch(0, number=1)[0], x)


def test_image_batches_need_labels(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"training needs labelled images.*a\.png"):
        image_batches(open_dataset(tmp_path), Preprocess(), 2)
