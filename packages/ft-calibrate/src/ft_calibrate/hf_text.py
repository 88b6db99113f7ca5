"""Image-text models of transformers (CLIP, SigLIP) as an image tower and a text encoder, for class prompts.

FTC's VTAB setting (arXiv 2409.16223) starts from CLIP with a zero-shot head; ``hf:openai/clip-vit-base-patch32`` is
that model under its transformers name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vfm_core.backbones import Native, load_native
from vfm_core.backbones.local import local_path
from vfm_core.backbones.weights import is_offline, reaching
from vfm_core.errors import UserError
from vfm_core.specs import parse_spec

__all__ = ["HFText", "HFVisual", "load_hf_text"]


class HFVisual(nn.Module):
    """The image side of a two-tower transformers model: images (N, 3, h, w) to embeddings (N, D).

    Parameters
    ----------
    model : torch.nn.Module
        With ``vision_model`` and, of CLIP, ``visual_projection``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model: nn.Module = model.vision_model
        projection = getattr(model, "visual_projection", None)
        self.visual_projection: nn.Module = projection if isinstance(projection, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Image embeddings, not normalised."""
        pooled = self.vision_model(pixel_values=x).pooler_output
        embedding: Tensor = self.visual_projection(pooled)
        return embedding


class HFText:
    """The text side: tokenizer, text tower, temperature.

    Parameters
    ----------
    model : torch.nn.Module
        With ``get_text_features`` and ``logit_scale``.
    tokenizer : callable
        A transformers tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.logit_scale = float(model.logit_scale.detach().exp())

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """(n, D) L2-normalised embeddings of the texts as they are."""
        # SigLIP was trained on texts padded to full length.
        padding: Any = "max_length" if "siglip" in self.model.config.model_type else True
        parts = []
        for i in range(0, len(texts), 256):
            tokens = self.tokenizer(texts[i : i + 256], padding=padding, truncation=True, return_tensors="pt")
            found = self.model.get_text_features(**tokens)
            parts.append(
                found if isinstance(found, Tensor) else found.pooler_output
            )  # an object from transformers 5 on
        return F.normalize(torch.cat(parts), dim=-1)


def load_hf_text(text: str, how: dict[str, Any]) -> Native:
    """Load an image-text model of transformers.

    Parameters
    ----------
    text : str
        ``hf:ORG/NAME``, ``hf:PATH`` or ``dir:PATH``.
    how : dict
        ``offline`` and ``cache_dir`` of ``vfm_core.load_native``.

    Returns
    -------
    Native
        Its model is an object with ``visual``; its text side a `HFText`.

    Raises
    ------
    UserError
        Weights or tokenizer that cannot be reached, or a model without a text tower.
    """
    import transformers

    features = load_native(text, task="features", **how)  # the preprocessing, and readable errors
    spec = parse_spec(text)
    spec = parse_spec(f"hf:{spec.name}") if spec.family == "dir" else spec
    spec, local = local_path(spec)
    offline, cache = is_offline(how.get("offline")), how.get("cache_dir")
    where: dict[str, Any] = {
        "revision": spec.options.get("revision") or spec.source or "main",
        "cache_dir": str(cache) if cache else None,
    }
    with reaching(text, offline=offline, local=local, cache_dir=None if cache is None else Path(cache)) as quiet:
        model = transformers.AutoModel.from_pretrained(spec.name, local_files_only=quiet, dtype=torch.float32, **where)
        if not hasattr(model, "get_text_features") or not hasattr(model, "logit_scale"):
            remedy = "use an image-text model, or a fine-tuned classifier"
            raise UserError("the model has no text tower", where=text, given=type(model).__name__, remedy=remedy)
        tokenizer = transformers.AutoTokenizer.from_pretrained(spec.name, local_files_only=quiet, **where)
    model.eval()
    holder = nn.Module()
    holder.visual = HFVisual(model)
    return Native(features.spec, "hf", holder.eval(), features.preprocess, None, HFText(model, tokenizer))
