import errno
import logging
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import vfm_core.cache
from PIL import Image
from vfm_core.cache import cache_folder, cached_features, feature_key
from vfm_core.data import ImageDataset, open_dataset
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
VIEW = Preprocess(size=(8, 8), resize="squash")


class Backbone(torch.nn.Module):
    """Stands for a frozen model: counts its calls, and would be random in train mode."""

    def __init__(self, name="one"):
        super().__init__()
        self.name, self.calls, self.scale = name, 0, 1.0
        self.drop = torch.nn.Dropout(0.9)

    def fingerprint(self):
        return self.name

    def forward(self, x):
        self.calls += 1
        return self.drop(x.flatten(1)[:, :6].reshape(-1, 2, 3)) * self.scale


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 256, (5, 9, 12, 3), dtype=np.uint8)
    for i, v in enumerate(values):
        Image.fromarray(v).save(folder / f"{i}.png")
    return open_dataset(folder)


def get(backbone, dataset, tmp_path, **options):
    settings = {"transform": VIEW, "cache_dir": tmp_path / "cache", "batch_size": 2, "dtype": torch.float32} | options
    return cached_features(backbone, dataset, backbone, "six", **settings)


def files(tmp_path, pattern="*.safetensors"):
    return sorted((tmp_path / "cache").rglob(pattern))


def test_values_equal_a_plain_pass_and_come_from_disk_next_time(photos, tmp_path):
    backbone = Backbone()
    first = get(backbone, photos, tmp_path)
    expected = torch.stack([VIEW(s.image).flatten()[:6].reshape(2, 3) for s in photos])
    assert first.shape == (5, 2, 3) and first.dtype == torch.float32
    assert torch.equal(first, expected)
    assert backbone.calls == 3
    assert torch.equal(get(Backbone(), photos, tmp_path), expected)
    other = Backbone()
    get(other, photos, tmp_path)
    assert other.calls == 0 and len(files(tmp_path)) == 1 and not files(tmp_path, "*.tmp")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_round_trips(photos, tmp_path, dtype):
    exact = get(Backbone(), photos, tmp_path, dtype=torch.float64)
    for _ in range(2):
        features = get(Backbone(), photos, tmp_path, dtype=dtype)
        assert features.dtype == dtype and torch.equal(features, exact.to(torch.float32).to(dtype))
    with pytest.raises(UserError, match="floating point"):
        get(Backbone(), photos, tmp_path, dtype=torch.int8)


def test_each_part_of_the_key_counts(photos, tmp_path):
    def key(backbone="a", data=photos, view=VIEW, what="w", dtype=torch.float16):
        return feature_key(Backbone(backbone), data, view, what, dtype)

    keys = [
        key(),
        key(backbone="b"),
        key(data=photos.subset([0, 1])),
        key(view=VIEW.with_size(4, 4)),
        key(what="v"),
        key(dtype=torch.float32),
    ]
    assert len(set(keys)) == len(keys) and key() == keys[0]


def test_transform_without_a_stable_description_is_refused(photos, tmp_path):
    with pytest.raises(UserError, match="no stable description"):
        get(Backbone(), photos, tmp_path, transform=lambda image: VIEW(image))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files on this system")
def test_features_are_memory_mapped_and_writing_does_not_reach_the_file(tmp_path):
    rows, width = 4, 8 * 2**20  # 128 MiB of float32

    class Blank(ImageDataset):
        def read(self, i):
            return Image.new("RGB", (8, 8))

    class Wide(Backbone):
        def forward(self, x):
            self.calls += 1
            return torch.ones(len(x), width)

    data = Blank("blank", [str(i) for i in range(rows)], [-1] * rows, [])
    backbone = Wide()
    get(backbone, data, tmp_path, batch_size=1)
    (path,) = files(tmp_path)
    features = get(backbone, data, tmp_path)
    assert str(path) in Path("/proc/self/maps").read_text()
    features[0, 0] = 7
    assert get(backbone, data, tmp_path)[0, 0] == 1 and backbone.calls == rows


def test_a_subset_of_rows_can_be_indexed_by_labels(photos, tmp_path):
    features = get(Backbone(), photos, tmp_path)
    assert torch.equal(features[torch.tensor([3, 1])], torch.stack([features[3], features[1]]))


# ------------------------------------------------------------------------------------------------------ bad pictures
def test_unreadable_pictures_get_nan_rows_and_are_reported_each_time(photos, tmp_path):
    (tmp_path / "photos/1.png").write_bytes(b"\x89PNG no")
    data = open_dataset(tmp_path / "photos")
    backbone = Backbone()
    with pytest.raises(UserError, match=r"1\.png"):
        get(backbone, data, tmp_path)
    assert not files(tmp_path) and not files(tmp_path, "*.tmp")
    seen = []
    for _ in range(2):
        seen.clear()
        features = get(backbone, data, tmp_path, on_error=lambda i, name, e: seen.append((i, name, str(e))))
        assert [s[:2] for s in seen] == [(1, "1.png")] and "cannot read image" in seen[0][2]
        assert torch.isnan(features[1]).all() and torch.isfinite(features[[0, 2, 3, 4]]).all()
    with pytest.raises(UserError, match=r"1\.png"):
        get(backbone, data, tmp_path)


def test_no_readable_picture_at_all(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="no readable image"):
        get(Backbone(), open_dataset(tmp_path / "photos"), tmp_path, on_error=lambda *_: None)


def test_nan_and_overflow_name_the_picture(photos, tmp_path):
    backbone = Backbone()
    backbone.scale = 1e6
    with pytest.raises(UserError, match=r"do not fit torch.float16.*0\.png.*bfloat16"):
        get(backbone, photos, tmp_path, dtype=torch.float16)
    assert get(backbone, photos, tmp_path, dtype=torch.bfloat16).isfinite().all()
    backbone.scale = float("nan")
    with pytest.raises(UserError, match=r"not finite.*0\.png"):
        get(backbone, photos, tmp_path, dtype=torch.float16)
    assert not files(tmp_path, "*.tmp")


def test_wrong_row_count_is_refused(photos, tmp_path):
    with pytest.raises(UserError, match="1 rows for 2 images"):
        cached_features(Backbone(), photos, lambda x: x[:1], "x", transform=VIEW, cache_dir=tmp_path, batch_size=2)


def test_modes_are_restored_even_on_error(photos, tmp_path):
    backbone = Backbone().train()
    get(backbone, photos, tmp_path)
    assert backbone.training and backbone.drop.training
    backbone.eval()
    backbone.drop.train()

    def fails(x):
        assert not backbone.drop.training and torch.is_inference_mode_enabled()
        raise RuntimeError("fault")

    with pytest.raises(RuntimeError, match="fault"):
        cached_features(backbone, photos, fails, "x", transform=VIEW, cache_dir=tmp_path)
    assert not backbone.training and backbone.drop.training


def test_progress_counts_pictures(photos, tmp_path):
    seen = []
    get(Backbone(), photos, tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


# ----------------------------------------------------------------------------------------------------- damaged files
@pytest.mark.parametrize("damage", ["truncate", "empty", "flip header", "flip data", "garbage", "other rows"])
def test_damaged_files_are_rebuilt(photos, tmp_path, damage, caplog):
    expected = get(Backbone(), photos, tmp_path).clone()
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "flip header":
        content[20] ^= 255
    elif damage == "flip data":
        content[-40] ^= 1
    elif damage == "garbage":
        content = bytearray(b"not a tensor file")
    else:
        get(Backbone(), photos.subset([0, 1]), tmp_path)
        content = next(p for p in files(tmp_path) if p != path).read_bytes()
    path.unlink()
    path.write_bytes(content)
    backbone = Backbone()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(get(backbone, photos, tmp_path), expected)
    assert backbone.calls == 3 and "damaged" in caplog.text
    again = Backbone()
    get(again, photos, tmp_path)
    assert again.calls == 0


SCRIPT = textwrap.dedent("""
    import os, signal, sys
    import torch
    from vfm_core.cache import cached_features
    from vfm_core.data import open_dataset
    from vfm_core.preprocess import Preprocess

    class Backbone:
        def fingerprint(self):
            return "one"

    def compute(x):
        if sys.argv[3] == "die" and compute.calls == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        compute.calls += 1
        return x.flatten(1)[:, :6]

    compute.calls = 0
    data = open_dataset(sys.argv[1])
    features = cached_features(Backbone(), data, compute, "six", transform=Preprocess(size=(8, 8), resize="squash"),
                               cache_dir=sys.argv[2], batch_size=2)
    print(compute.calls, tuple(features.shape), bool(features.isfinite().all()))
""")


def run(tmp_path, mode):
    code = [sys.executable, "-c", SCRIPT, str(tmp_path / "photos"), str(tmp_path / "cache"), mode]
    return subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_in_the_middle_then_two_at_once(photos, tmp_path):
    killed = run(tmp_path, "die")
    killed.communicate(timeout=120)
    assert killed.returncode == -9
    assert not files(tmp_path) and len(files(tmp_path, "*.tmp")) == 1
    pair = [run(tmp_path, "live") for _ in range(2)]
    outputs = sorted(p.communicate(timeout=120)[0].strip() for p in pair)
    assert outputs == ["0 (5, 6) True", "3 (5, 6) True"], "one computes, the other waits and reads"
    assert len(files(tmp_path)) == 1 and not files(tmp_path, "*.tmp")


# ----------------------------------------------------------------------------------------------------------- storage
def test_full_disk_is_told_before_the_work(photos, tmp_path):
    backbone = Backbone()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))  # the kernel then refuses to grow a file beyond
    try:
        with pytest.raises(UserError, match=r"no space for cached features.*MiB needed.*VFM_CORE_CACHE"):
            cached_features(
                backbone,
                photos,
                lambda x: backbone(x).flatten(1).repeat(1, 100),
                "wide",
                transform=VIEW,
                cache_dir=tmp_path / "cache",
                batch_size=1,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert backbone.calls == 1, "found out after one batch, not after all"
    assert not files(tmp_path) and not files(tmp_path, "*.tmp")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up_at_the_end(photos, tmp_path, monkeypatch, code):
    def full(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(vfm_core.cache.os, "fsync", full)
    with pytest.raises(UserError, match="no space"):
        get(Backbone(), photos, tmp_path)
    assert not files(tmp_path) and not files(tmp_path, "*.tmp")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_read_only_folder(photos, tmp_path, monkeypatch, code):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    features = get(Backbone(), photos, tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(vfm_core.cache, "FileLock", refuse)
    assert torch.equal(get(Backbone(), photos, tmp_path), features), "reading needs no right to write"
    with pytest.raises(UserError, match=r"cannot write the cache folder.*VFM_CORE_CACHE"):
        get(Backbone("other"), photos, tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_write_permission(photos, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write the cache folder"):
        get(Backbone(), photos, tmp_path)


def test_cache_folder_that_is_a_file(photos, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot write the cache folder"):
        get(Backbone(), photos, tmp_path)


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("VFM_CORE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("VFM_CORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vfm-core" / "features"


@pytest.mark.skipif(not DATA.is_dir(), reason="real data folder ../shared/data is absent")
def test_real_photos_with_workers(tmp_path):
    data = open_dataset(DATA / "birds")
    features = get(Backbone(), data, tmp_path, workers=2)
    expected = torch.stack([VIEW(s.image).flatten()[:6].reshape(2, 3) for s in data])
    assert torch.equal(features, expected)
