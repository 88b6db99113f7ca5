"""Image-text models as classifiers: class prompts become a head (FTC's VTAB setting, arXiv 2409.16223).

``z_c = s * cos(f(x), t_c) [+ b_c]``: f(x) the image embedding, t_c the mean of the class's prompt embeddings, s the
model's own factor (about 100 for CLIP), in whose units gamma is then measured. The optional bias b_c is ours: it is
where `fold_into_head` puts gamma.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vfm_core.errors import UserError

__all__ = ["ImageTextClassifier", "TextHead", "encode_classes", "is_text_head", "load_text_head", "save_text_head"]

_FORMAT = "ft-calibrate text head 1"


class TextHead(nn.Module):
    """Cosine head whose rows are text embeddings.

    Parameters
    ----------
    weight : Tensor
        (K, D) rows, normally of length 1. A parameter, so that it can be fine-tuned.
    logit_scale : float
        Factor on the cosines.
    bias : Tensor, optional
        (K,), added to the logits; kept as a buffer.

    Attributes
    ----------
    logit_scale : Tensor
        Scalar buffer.

    Examples
    --------
    >>> head = TextHead(torch.eye(3), logit_scale=10.0)
    >>> head(torch.tensor([[0.0, 2.0, 0.0]])).tolist()
    [[0.0, 10.0, 0.0]]
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, logit_scale: float, bias: Tensor | None = None) -> None:
        super().__init__()
        if weight.ndim != 2 or (bias is not None and tuple(bias.shape) != (len(weight),)):
            shapes = f"weight {tuple(weight.shape)}, bias {None if bias is None else tuple(bias.shape)}"
            raise UserError("a text head needs weight (K, D) and bias (K,)", given=shapes)
        self.weight = nn.Parameter(weight.detach().clone())
        self.logit_scale: Tensor
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale)))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take a bias from a state dict that has one, which a calibrated head does."""
        found = state_dict.get(f"{prefix}bias")
        if self.bias is None and isinstance(found, Tensor):
            self.bias = torch.zeros_like(found, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def out_features(self) -> int:
        """K."""
        return len(self.weight)

    @property
    def in_features(self) -> int:
        """D."""
        return int(self.weight.shape[1])

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, K) of image embeddings (N, D), which need not be normalised."""
        cosine = F.normalize(features, dim=-1) @ self.weight.to(features.dtype).T
        logits = self.logit_scale.to(features.dtype) * cosine
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ImageTextClassifier(nn.Module):
    """Image tower and text head.

    Parameters
    ----------
    visual : torch.nn.Module
        Images (N, 3, h, w) to embeddings (N, D).
    head : TextHead
        The classes.
    """

    def __init__(self, visual: nn.Module, head: TextHead) -> None:
        super().__init__()
        self.visual, self.head = visual, head

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of preprocessed images (N, 3, h, w)."""
        features = self.visual(x)
        logits: Tensor = self.head(features[0] if isinstance(features, tuple) else features)
        return logits


def encode_classes(
    encode: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str] = ("{}",)
) -> Tensor:
    """Text embeddings of classes, averaged over prompts.

    Parameters
    ----------
    encode : callable
        Texts -> (n, D) embeddings.
    names : sequence of str
        K class names.
    templates : sequence of str
        Prompts with one ``{}`` each.

    Returns
    -------
    Tensor
        (K, D) float32, rows of length 1.

    Raises
    ------
    UserError
        No names, or a template without exactly one ``{}``.
    """
    if not names or not templates:
        raise UserError("a text head needs class names and a prompt template", given=f"{len(names)} names")
    for template in templates:
        if template.count("{}") != 1:
            raise UserError("a prompt template must hold {} once", where="--template", given=repr(template))
    prompts = [template.replace("{}", name.replace("_", " ")) for name in names for template in templates]
    rows = F.normalize(encode(prompts).float(), dim=-1)
    return F.normalize(rows.view(len(names), len(templates), -1).mean(1), dim=-1)


def save_text_head(head: TextHead, path: str | Path, class_names: Sequence[str] | None = None, **notes: Any) -> Path:
    """Write a text head as one safetensors file: ``weight``, ``logit_scale``, ``bias`` where there is one.

    Parameters
    ----------
    head : TextHead
        What to write.
    path : path
        The file; replaced atomically.
    class_names : sequence of str, optional
        Stored with it.
    **notes
        Further strings or JSON-able facts for the file's metadata.

    Returns
    -------
    Path
        `path`.
    """
    from safetensors.torch import save_file
    from vfm_core.files import atomic_write, jsonable

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    metadata = {"format": _FORMAT, "class_names": json.dumps(list(class_names) if class_names is not None else None)}
    metadata |= {key: json.dumps(jsonable(value)) for key, value in notes.items()}
    with atomic_write(path) as draft:
        save_file(tensors, draft, metadata=metadata)
    return Path(path)


def is_text_head(path: str | Path) -> bool:
    """Whether a file is a text head."""
    from safetensors import SafetensorError, safe_open

    if Path(path).suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("format") == _FORMAT)
    except (SafetensorError, OSError):
        return False


def load_text_head(path: str | Path) -> tuple[TextHead, list[str] | None]:
    """Read what `save_text_head` or ``ft-calibrate export`` wrote.

    Use it on image embeddings of the same image-text model: ``logits = head(model.encode_image(x))``.

    Parameters
    ----------
    path : path
        The safetensors file.

    Returns
    -------
    head : TextHead
        On the CPU, in eval mode.
    class_names : list of str or None
        Names of its rows.

    Raises
    ------
    UserError
        No such file, a damaged one, or one that holds no text head.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError("no such text head", given=str(path), remedy="check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError("cannot read weights", where=path, given=error, remedy="copy the file again") from error
    if metadata.get("format") != _FORMAT or not {"weight", "logit_scale"} <= set(tensors):
        remedy = "write one with: ft-calibrate export --model open_clip:NAME@TAG --classes names.txt"
        raise UserError("not a text head", given=str(path), remedy=remedy)
    head = TextHead(tensors["weight"], float(tensors["logit_scale"]), tensors.get("bias"))
    return head.eval(), json.loads(metadata.get("class_names", "null"))
