import io
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vfm_core.errors import UserError
from vfm_core.images import is_image_file, read_image, read_label_map, read_mask, to_rgb

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="real data folder ../shared/data is absent")


def pixel(image, at=(0, 0)):
    return tuple(int(v) for v in np.asarray(image)[at[1], at[0]])


def save(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_rgb_png_is_unchanged(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    image = read_image(save(tmp_path, Image.fromarray(values), "a.png"))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), values)


def test_bytes_and_open_files_read_like_paths(tmp_path):
    path = save(tmp_path, Image.new("RGB", (4, 3), (10, 20, 30)), "a.png")
    with path.open("rb") as handle:
        assert pixel(read_image(handle)) == pixel(read_image(path.read_bytes())) == pixel(read_image(str(path)))


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_becomes_rgb(tmp_path, name):
    image = read_image(save(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), name))
    assert image.mode == "RGB"
    r, g, b = pixel(image)
    assert r > 200 and g < 60 and b < 60


def test_alpha_is_laid_over_white(tmp_path):
    values = np.zeros((1, 3, 4), dtype=np.uint8)
    values[0, :, 0] = 200
    values[0, :, 3] = (0, 255, 128)
    image = read_image(save(tmp_path, Image.fromarray(values), "a.png"))
    assert pixel(image, (0, 0)) == (255, 255, 255)
    assert pixel(image, (1, 0)) == (200, 0, 0)
    assert pixel(image, (2, 0))[1] == pytest.approx(127, abs=1)


def test_grey_with_alpha_and_transparent_colour(tmp_path):
    both = read_image(save(tmp_path, Image.new("LA", (2, 2), (0, 0)), "la.png"))
    assert pixel(both) == (255, 255, 255)
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (9, 9, 9))
    image = read_image(save(tmp_path, keyed, "trns.png", transparency=(1, 2, 3)))
    assert pixel(image, (0, 0)) == (255, 255, 255)
    assert pixel(image, (1, 0)) == (9, 9, 9)


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([250, 0, 0, 0, 250, 0])
    image.putpixel((1, 0), 1)
    plain = read_image(save(tmp_path, image, "p.png"))
    assert pixel(plain, (0, 0)) == (250, 0, 0) and pixel(plain, (1, 0)) == (0, 250, 0)
    holed = read_image(save(tmp_path, image, "pt.png", transparency=0))
    assert pixel(holed, (0, 0)) == (255, 255, 255) and pixel(holed, (1, 0)) == (0, 250, 0)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_keeps_its_full_scale(tmp_path, name):
    values = np.array([[0, 257, 65535, 128 * 257]], dtype=np.uint16)
    image = read_image(save(tmp_path, Image.fromarray(values), name))
    assert [pixel(image, (i, 0))[0] for i in range(4)] == [0, 1, 255, 128]


def test_a_dark_sixteen_bit_picture_is_not_stretched(tmp_path):
    values = np.full((2, 2), 200, dtype=np.uint16)
    assert pixel(read_image(save(tmp_path, Image.fromarray(values), "a.png"))) == (1, 1, 1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[np.nan, 25700.0, 65535.0]], np.float32), [0, 100, 255]),
        (np.array([[-5, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 25700, 900000]], np.int32), [0, 100, 255]),
    ],
)
def test_wide_grey_tiffs(tmp_path, values, expected):
    image = read_image(save(tmp_path, Image.fromarray(values), "a.tif"))
    assert [pixel(image, (i, 0))[0] for i in range(3)] == expected


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_every_mode_converts(mode):
    image = Image.new(mode, (3, 2))
    assert to_rgb(image).mode == "RGB"
    assert to_rgb(image).size == (3, 2)
    assert image.mode == mode


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    values = np.zeros((2, 3, 3), dtype=np.uint8)
    values[1, 0] = 255  # bottom left goes to top left
    image = read_image(save(tmp_path, Image.fromarray(values), "a.png", exif=exif))
    assert image.size == (2, 3)
    assert pixel(image, (0, 0)) == (255, 255, 255)


def test_damaged_exif_does_not_cost_the_picture(tmp_path, caplog):
    path = save(tmp_path, Image.new("RGB", (4, 4), (5, 5, 5)), "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00")
    with caplog.at_level(logging.WARNING):
        assert read_image(path).size == (4, 4)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "empty"), (b"GIF89a", "cannot read image"), (b"not a picture at all", "cannot read image")],
)
def test_bad_content_names_the_file(tmp_path, content, says):
    path = tmp_path / "wing 7.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder_are_told_apart(tmp_path):
    with pytest.raises(UserError, match=r"no such image file: .*gone\.png"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="folder where an image file was expected"):
        read_image(tmp_path)


@needs_data
@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["birds/Baltimore_Oriole.jpg", "photos/both.png"])
def test_truncated_real_photos_are_refused(tmp_path, name, part):
    whole = (DATA / name).read_bytes()
    path = tmp_path / Path(name).name
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UserError, match="cannot read image") as caught:
        read_image(path)
    assert path.name in str(caught.value)


@needs_data
def test_real_photos_read():
    paths = [p for p in sorted(DATA.glob("birds/*")) + sorted(DATA.glob("photos/*")) if is_image_file(p)]
    assert len(paths) >= 10
    for path in paths:
        image = read_image(path)
        assert image.mode == "RGB" and min(image.size) > 100


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_bytes_give_a_picture_or_a_named_error(data):
    buffer = io.BytesIO()
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
    Image.fromarray(np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert read_image(bytes(content), name="moth.x").mode == "RGB"
    except UserError as error:
        assert "moth.x" in str(error)


def test_masks_are_boolean_and_checked(tmp_path):
    values = np.zeros((4, 6), dtype=np.uint8)
    values[1:3, 2:5] = 7
    path = save(tmp_path, Image.fromarray(values), "m.png")
    mask = read_mask(path, size=(6, 4))
    assert mask.dtype == bool and mask.sum() == 6
    with pytest.raises(UserError, match=r"6x4 against 4x6"):
        read_mask(path, size=(4, 6))
    with pytest.raises(UserError, match=r"gone\.png"):
        read_mask(tmp_path / "gone.png")


def test_label_maps_keep_palette_indices_and_sixteen_bits(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7])
    image.putpixel((1, 0), 2)
    assert read_label_map(save(tmp_path, image, "p.png")).tolist() == [[0, 2]]
    wide = Image.fromarray(np.array([[1, 300]], dtype=np.uint16))
    assert read_label_map(save(tmp_path, wide, "w.png")).tolist() == [[1, 300]]


@pytest.mark.parametrize(
    ("name", "counts"),
    [("a.JPG", True), ("a.tiff", True), (".a.jpg", False), ("._b.png", False), ("a.txt", False), ("jpg", False)],
)
def test_what_counts_as_an_image_file(name, counts):
    assert is_image_file(Path("folder") / name) is counts
