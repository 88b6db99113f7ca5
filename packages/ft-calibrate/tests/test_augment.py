import numpy as np
import pytest
import torch
from ft_calibrate.augment import Augmentation, Draw, apply_draw, squash
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tf
from vfm_core.errors import UserError


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parity
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (33, 33), (90, 4), (4, 90), (1, 1)])
def test_equals_torchvision_from_the_same_random_state(size):
    official = transforms.Compose(
        [
            transforms.RandomResizedCrop(24, scale=(0.7, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(0.1),
        ]
    )
    ours = Augmentation(24)
    for seed in range(12):
        image = noise(*size, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = official(image)
        got = ours(image, torch.Generator().manual_seed(seed))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


@pytest.mark.parity
def test_every_step_is_torchvisions():
    image = noise(30, 20)
    plain = Draw((0, 0, 20, 30), False, (), 1, 1, 1, 0, False)
    small = tf.resize(image, [16, 16])
    for changes, expected in (
        ({}, small),
        ({"crop": (2, 3, 10, 12)}, tf.resized_crop(image, 2, 3, 10, 12, [16, 16])),
        ({"flip": True}, tf.hflip(small)),
        ({"order": (0,), "brightness": 0.8}, tf.adjust_brightness(small, 0.8)),
        ({"order": (1,), "contrast": 1.2}, tf.adjust_contrast(small, 1.2)),
        ({"order": (2,), "saturation": 0.7}, tf.adjust_saturation(small, 0.7)),
        ({"order": (3,), "hue": -0.2}, tf.adjust_hue(small, -0.2)),
        ({"order": (3, 0), "hue": 0.2, "brightness": 1.3}, tf.adjust_brightness(tf.adjust_hue(small, 0.2), 1.3)),
        ({"grey": True}, tf.rgb_to_grayscale(small, 3)),
    ):
        got = apply_draw(image, Draw(**{**plain.__dict__, **changes}), 16)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


@pytest.mark.parity
def test_squash_is_torchvisions_resize_to_both_sides():
    for size in ((50, 20), (20, 50), (8, 8)):
        image = noise(*size)
        expected = transforms.Resize((24, 24))(image)
        np.testing.assert_array_equal(np.asarray(squash(image, 24)), np.asarray(expected))
    assert squash(image).size == (224, 224)


def test_only_the_given_generator_moves():
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    augment, image = Augmentation(16), noise(30, 20)
    first, second = augment(image, generator), augment(image, generator)
    assert (torch.get_rng_state() == before).all()
    assert np.asarray(first).tobytes() != np.asarray(second).tobytes()
    again = augment(image, torch.Generator().manual_seed(1))
    np.testing.assert_array_equal(np.asarray(again), np.asarray(first))
    assert first.mode == "RGB"
    assert image.size == (30, 20)


def test_draws_have_the_stated_ranges():
    augment, generator = Augmentation(), torch.Generator().manual_seed(0)
    draws = [augment.draw((200, 160), generator) for _ in range(400)]
    areas = [d.crop[2] * d.crop[3] / (200 * 160) for d in draws]
    assert 0.69 < min(areas) < 0.75
    assert max(areas) <= 1
    assert all(d.crop[0] + d.crop[2] <= 160 and d.crop[1] + d.crop[3] <= 200 for d in draws)
    for values, low, high in (
        ([d.brightness for d in draws], 0.7, 1.3),
        ([d.contrast for d in draws], 0.7, 1.3),
        ([d.saturation for d in draws], 0.7, 1.3),
        ([d.hue for d in draws], -0.3, 0.3),
    ):
        assert low <= min(values) < low + 0.05
        assert high - 0.05 < max(values) <= high
    assert 0.4 < np.mean([d.flip for d in draws]) < 0.6
    assert 0.05 < np.mean([d.grey for d in draws]) < 0.16
    assert len({d.order for d in draws}) == 24


def test_parts_can_be_turned_off():
    augment = Augmentation(20, scale=(1.0, 1.0), flip=0, jitter=0, grey=0)
    image = noise(20, 20)
    draws = [augment.draw((20, 20), torch.Generator().manual_seed(s)) for s in range(40)]
    whole = next(d for d in draws if d.crop == (0, 0, 20, 20))
    np.testing.assert_array_equal(np.asarray(apply_draw(image, whole, 20)), np.asarray(image))


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"scale": (0.0, 1.0)}, {"scale": (0.9, 0.8)}, {"flip": 1.1}, {"jitter": 0.6}, {"grey": -1}]
)
def test_parameters_out_of_range_are_named(options):
    with pytest.raises(UserError, match=f"out of range in augmentation, {next(iter(options))}"):
        Augmentation(**options)
