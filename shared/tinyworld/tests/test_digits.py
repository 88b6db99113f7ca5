"""The handwritten digits as a dataset."""

from __future__ import annotations

import numpy as np
import pytest
from tinyworld.digits import Digits
from vfm_core.data import open_dataset
from vfm_core.errors import UserError


def test_splits_partition_the_collection() -> None:
    parts = [Digits(split) for split in ("train", "val", "test")]
    ids = [one for part in parts for one in part.ids]
    assert len(ids) == len(set(ids)) == 1797
    assert [len(part) for part in parts] == [1079, 359, 359]
    for part in parts:
        assert np.bincount(part.labels, minlength=10).min() > 20


def test_sample_is_the_enlarged_digit() -> None:
    from sklearn.datasets import load_digits

    digits = Digits("val", size=32)
    sample = digits[0]
    assert sample.image.mode == "RGB" and sample.image.size == (32, 32)
    assert sample.id == "digit-0003" and sample.label == load_digits().target[3]
    shrunk = np.asarray(sample.image.convert("L").resize((8, 8)), dtype=float)
    assert np.corrcoef(shrunk.ravel(), load_digits().images[3].ravel())[0, 1] > 0.98


def test_spec_and_fingerprint() -> None:
    digits = open_dataset("tinyworld:digits@test?n=20&size=48")
    assert len(digits) == 20 and digits[0].image.size == (48, 48) and digits.classes == [str(k) for k in range(10)]
    prints = {Digits(n=20).fingerprint(), Digits(n=20, size=48).fingerprint(), digits.fingerprint()}
    assert len(prints) == 3


def test_bad_options() -> None:
    for options in ({"split": "dev"}, {"size": 4}, {"n": 0}, {"n": 5000}):
        with pytest.raises(UserError):
            Digits(**options)
