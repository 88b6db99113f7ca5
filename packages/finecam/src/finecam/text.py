"""Image-text models as classifiers: texts are the classes (Finer-CAM, arXiv 2501.11309, multimodal extension, Fig. 2).

The logit of a text is ``scale * cos(image embedding, text embedding)``. With target "red epaulets" and reference
"bird", the contrast asks for what the attribute adds to the generic word, which is where the attribute is; the plain
map of the attribute alone mostly shows the bird.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vfm_core.errors import UserError


class TextClassifier(nn.Module):
    """Classifier whose classes are texts.

    Parameters
    ----------
    native
        An image-text model from `vfm_core.load_native`, or an object with its ``model`` and ``text`` attributes: the
        towers, and an encoder with ``encode(texts) -> (n, D)`` and ``logit_scale``.
    texts
        One text per class.
    templates
        Prompts with ``{}`` for the text, such as ``"a photo of a {}"``; the normalised embeddings of all prompts are
        averaged and normalised again. Empty: the texts as they are.
    scale
        Factor on the cosines; None takes the model's own temperature. Maps do not change with it when references are
        weighted by ``mean``; ``similarity="logit"`` with ``scale=1`` compares cosines.

    Attributes
    ----------
    class_names : list of str
        The texts.
    embeddings : Tensor
        (C, D) float32, rows of length 1.
    scale : float
        The factor in use.

    Raises
    ------
    UserError
        No text tower, no texts, equal texts, a template without ``{}``, or a scale that is not positive.

    Examples
    --------
    >>> from vfm_core import load_native  # doctest: +SKIP
    >>> from finecam import Explainer  # doctest: +SKIP
    >>> clip = TextClassifier(load_native("tiny:clip"), ["a red wing patch", "a bird"])  # doctest: +SKIP
    >>> result = Explainer(clip)(x, target="a red wing patch", references=["a bird"])  # doctest: +SKIP
    """

    embeddings: Tensor

    def __init__(
        self, native: Any, texts: Sequence[str], templates: Sequence[str] = (), scale: float | None = None
    ) -> None:
        super().__init__()
        tower = getattr(native, "text", None)
        if tower is None:
            raise UserError(
                "the model has no text tower",
                given=getattr(native, "spec", type(native).__name__),
                remedy="use an image-text model, such as open_clip:ViT-B-16@openai",
            )
        self.class_names = _checked_texts(texts)
        self.model: nn.Module = native.model
        image_encoder(self.model)
        with torch.no_grad():
            embeddings = encode_texts(tower.encode, self.class_names, templates)
        self.register_buffer("embeddings", embeddings)
        self.scale = float(tower.logit_scale if scale is None else scale)
        if not 0 < self.scale < float("inf"):
            raise UserError("scale must be positive and finite", where="scale", given=self.scale)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of preprocessed images (B, 3, H, W); cosines are float32 whatever the towers' dtype."""
        image = F.normalize(image_encoder(self.model)(x).float(), dim=-1)
        return self.scale * image @ self.embeddings.T

    def weights(self) -> Tensor:
        """Text embeddings (C, D): their cosine says how alike two classes are."""
        return self.embeddings

    def extra_repr(self) -> str:
        """Texts and scale, for ``print``."""
        return f"texts={self.class_names}, scale={self.scale:g}"


def _checked_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError("texts must be a list of non-empty strings", where="texts", given=repr(texts))
    twice = [text for i, text in enumerate(texts) if text in texts[:i]]
    if twice:
        raise UserError("text is given twice", where="texts", given=repr(twice[0]))
    return list(texts)


def encode_texts(encode: Callable[[list[str]], Tensor], texts: Sequence[str], templates: Sequence[str] = ()) -> Tensor:
    """Embeddings (C, D) of length 1, averaged over prompt templates.

    Parameters
    ----------
    encode
        Texts -> (n, D) embeddings.
    texts
        C texts.
    templates
        Prompts with ``{}``; empty for the texts alone.

    Raises
    ------
    UserError
        A template without exactly one ``{}``.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise UserError("template must hold {} once", where="template", given=repr(template))
    prompts = [template.replace("{}", text) for text in texts for template in (templates or ("{}",))]
    rows = F.normalize(encode(prompts).float(), dim=-1)
    return F.normalize(rows.view(len(texts), -1, rows.shape[-1]).mean(1), dim=-1)


def image_encoder(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The image side of a two-tower model: open_clip's ``encode_image``, transformers' ``get_image_features``.

    Raises
    ------
    UserError
        Neither exists.
    """
    for name in ("encode_image", "get_image_features"):
        method = getattr(model, name, None)
        if callable(method):

            def encode(x: Tensor, method: Callable[[Tensor], Any] = method) -> Tensor:
                found = method(x)
                if isinstance(found, Tensor):
                    return found
                pooled = getattr(found, "pooler_output", None)  # transformers 5
                if not isinstance(pooled, Tensor):
                    raise UserError("no image embedding in the model's output", given=type(found).__name__)
                return pooled

            return encode
    raise UserError(
        "the model cannot encode images", given=type(model).__name__, remedy="it needs encode_image(x) -> (B, D)"
    )
