"""Pictures of the embedded study: why one bird and not its sibling, and what a class prompt's heads look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tinyworld.birds import Birds

from finecam import render
from finecam.classifiers import load_classifier
from finecam.explainer import Explainer
from finecam.families import minmax
from finecam.promptcam import PromptCAM
from finecam.study import unseen_birds
from finecam.traits import rank_traits

__all__ = ["difference_panels", "trait_panels"]

Pictures = list[tuple[str, Image.Image]]

SCALE = 4  # a 64-pixel bird is shown at 256 pixels


def difference_panels(seed: int = 0, count: int = 6) -> Pictures:
    """Bird, the same bird as its nearest sibling, the pixels that differ, plain and Finer Grad-CAM.

    Returns
    -------
    list of (str, Image)
        File stem and panel, one per bird, of different genera and marks.
    """
    birds = unseen_birds("nested", seed, 64)
    model = load_classifier(f"tiny:cnn?seed={seed}")
    rows = _varied(birds, model.model, model.preprocess, count)
    x = torch.stack([model.preprocess(birds[i].image) for i in rows])
    target = torch.from_numpy(birds.labels[rows])
    references = [birds.siblings(int(c)) for c in target]
    explain = Explainer(model.model, class_names=model.class_names)
    maps = explain.sweep(x, (0.0, 1.0), target=target, references=references).maps.numpy()
    found = []
    for row, c, refs, (plain, finer) in zip(rows, target.tolist(), references, maps):
        image = birds[row].image
        sibling = Image.fromarray(birds.images([row], [refs[0]])[0])
        tiles = [
            (_large(image), birds.classes[c]),
            (_large(sibling), f"as {birds.classes[refs[0]]}"),
            (_truth(image, birds.presence_mask(row, refs[0])), "what differs"),
            (render.overlay(_large(image), plain), "Grad-CAM"),
            (render.overlay(_large(image), finer), "Finer-CAM, gamma 1"),
        ]
        heading = f"Why {birds.classes[c]}, and not another {birds.species[c].genus} bird?"
        found.append((f"why-{birds.classes[c].replace(' ', '-')}", render.panel(tiles, heading)))
    return found


def trait_panels(folder: Path, seed: int = 0, count: int = 4) -> Pictures:
    """A bird and its class prompt's attention, head by head, in the order of greedy blurring.

    Parameters
    ----------
    folder
        Trained prompts.
    """
    model = PromptCAM.load(folder)
    birds = unseen_birds("nested", seed, 64)
    rows = _varied(birds, model, model.preprocess, count)
    x = torch.stack([model.preprocess(birds[i].image) for i in rows])
    target = torch.from_numpy(birds.labels[rows])
    traits = rank_traits(model, x, target, top=4)
    found = []
    for k, (row, c) in enumerate(zip(rows, target.tolist())):
        image = _large(birds[row].image)
        tiles = [(image, birds.classes[c]), (render.overlay(image, _scaled(traits.maps[k].mean(0))), "mean of heads")]
        for head, attention, top in zip(traits.heads[k].tolist(), traits.maps[k], traits.peaks[k].tolist()):
            tiles.append((render.overlay(image, _scaled(attention)), f"head {head}, peak {top:.2f}"))
        name = birds.classes[c]
        found.append((f"traits-{name.replace(' ', '-')}", render.panel(tiles, f"Traits of {name}, the decisive first")))
    return found


def _varied(birds: Birds, model: torch.nn.Module, preprocess: object, count: int) -> list[int]:
    """Correctly classified birds, first of every genus in turn, each class at most once."""
    x = torch.stack([preprocess(birds[i].image) for i in range(len(birds))])  # type: ignore[operator]
    with torch.inference_mode():
        right = model(x).argmax(1).numpy() == birds.labels
    step = len(birds.classes) // 4  # classes of one genus
    order = sorted(range(len(birds)), key=lambda i: (birds.labels[i] % step, birds.labels[i] // step, i))
    chosen: dict[int, int] = {}
    for i in order:
        if right[i]:
            chosen.setdefault(int(birds.labels[i]), i)
    # A different mark of every genus: the diagonal of genus and mark first.
    classes = sorted(chosen, key=lambda c: ((c % step - c // step) % step, c))
    return [chosen[c] for c in classes[:count]]


def _large(image: Image.Image) -> Image.Image:
    return image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.LANCZOS)


def _truth(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The grey picture with the mask in red."""
    grey = np.asarray(image.convert("L").convert("RGB"), np.float32) * 0.6 + 90
    grey[mask] = (220, 40, 30)
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).resize(
        (image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST
    )


def _scaled(attention: torch.Tensor) -> np.ndarray:
    return minmax(attention[None].float())[0].numpy()
