"""The same study on photos of one's own: a folder of pictures as both domains.

The source domain is the pictures in grey at half resolution, the target domain the pictures as they are. A small
network learns all classes in the source domain and is then fine-tuned in the target domain on half of the classes
(FTC, arXiv 2409.16223). Nothing here is pretrained: it is a check of the method on real input, not of accuracy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vfm_core.data import open_dataset
from vfm_core.errors import UserError
from vfm_core.isolation import forked_rng
from vfm_core.train import TrainConfig, fit

from ft_calibrate.study import Setting, measured

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfm_core.data import ImageDataset

SIDE = 32
MOST_PHOTOS = 200_000


@dataclass(frozen=True)
class PhotoSize:
    """How much to train.

    Parameters
    ----------
    seeds : tuple of int
        Of the network, the order and the choice of seen classes.
    source_epochs, epochs : int
        In the source and in the target domain.
    width : int
        Channels of the first layer.
    source_lr, lr : float
        Peak learning rates; in the target domain the backbone learns at a tenth.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    source_epochs: int = 15
    epochs: int = 10
    width: int = 16
    source_lr: float = 0.1
    lr: float = 0.05

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class PhotoNet(nn.Module):
    """Three pairs of 3x3 convolutions with BatchNorm, average pooling and a linear head ``fc``.

    Images (B, 3, 32, 32) -> logits (B, num_classes).
    """

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 4 * width):
            for _ in range(2):
                layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.fc(self.layers(x))
        return logits


def load_photos(spec: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    """Training and test pictures (N, 3, 32, 32) in [-1, 1] with labels, and class names.

    Parameters
    ----------
    spec : str
        Data with the splits ``train`` and ``test``, such as ``folder:PATH``.

    Raises
    ------
    UserError
        Data without these splits, with fewer than four classes, with an unreadable photo, or with over 200,000 photos
        (they are held in memory).
    """
    train, test = open_dataset(spec, split="train"), open_dataset(spec, split="test")
    if len(train.classes) < 4 or train.classes != test.classes:
        remedy = "give class folders under train/ and the same ones under test/"
        raise UserError("need the same four or more classes in train and test", where=spec, remedy=remedy)
    if len(train) + len(test) > MOST_PHOTOS:
        given = f"{len(train) + len(test)} photos"
        raise UserError("too many photos to hold in memory", where=spec, given=given, remedy="give a sample of them")
    return _tensors(train), _tensors(test), train.classes


def _tensors(data: ImageDataset) -> tuple[Tensor, Tensor]:
    pixels = np.stack([np.asarray(sample.image.resize((SIDE, SIDE))) for sample in data])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(), torch.as_tensor(np.asarray(data.labels))


def degraded(x: Tensor) -> Tensor:
    """Source domain: grey, at half resolution."""
    grey = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return F.interpolate(F.avg_pool2d(grey, 2), scale_factor=2.0, mode="bilinear").contiguous()


def photo_seed(spec: str, seed: int, size: PhotoSize) -> dict[str, Any]:
    """One seed: numbers before and after fine-tuning on half of the classes.

    Returns
    -------
    dict
        ``seen`` (class names), ``arms`` with the numbers of `measured` for ``source`` and ``ft``.
    """
    from ft_calibrate.classifier import load_classifier
    from ft_calibrate.recipes import fine_tune

    train, test, names = load_photos(spec)
    with forked_rng(torch.device("cpu")):
        torch.default_generator.manual_seed(seed)
        model = PhotoNet(len(names), size.width)
    config = TrainConfig(
        epochs=size.source_epochs, lr=size.source_lr, optimizer="sgd", weight_decay=5e-4, nesterov=True, seed=seed
    )
    fit(model, _mirrored(degraded(train[0]), train[1], config.batch_size), F.cross_entropy, config)
    chosen = sorted(np.random.default_rng([seed, 1]).permutation(len(names))[: len(names) // 2].tolist())
    rows = np.isin(train[1].numpy(), chosen)
    classifier = load_classifier(model.eval())
    one = Setting(classifier, chosen, (train[0][rows], train[1][rows]), train, test)
    run = fine_tune(classifier, one.train, chosen, "ft", epochs=size.epochs, lr=size.lr, seed=seed)
    return {
        "seen": [names[c] for c in chosen],
        "arms": {"source": measured(one, classifier), "ft": measured(one, run)},
    }


def _mirrored(x: Tensor, y: Tensor, batch_size: int) -> Any:
    """Batches in a new order each epoch, every picture mirrored with probability 1/2."""
    from vfm_core.batches import Batches

    def source(epoch: int, generator: torch.Generator) -> Batches:
        order = torch.randperm(len(x), generator=generator)
        flip = torch.rand(len(x), generator=generator) < 0.5

        def make() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in order.split(batch_size):
                pictures = x[rows]
                yield torch.where(flip[rows].view(-1, 1, 1, 1), pictures.flip(-1), pictures), y[rows]

        return Batches(-(-len(x) // batch_size), make)

    return source
