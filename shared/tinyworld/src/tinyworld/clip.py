"""``tiny:clip``: an image tower and a text tower with one embedding space, trained on captions of birds.

The tower names, ``encode_image``, ``encode_text`` and ``logit_scale`` are those of open_clip, so that code for the
large models reads on. The image embedding is the mean of the normalised patch tokens (no projection), the text
embedding a projection of a recurrent network over words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vfm_core.errors import UserError, closest

from tinyworld.bird_body import COLOURS, GENERA, SLOTS
from tinyworld.models import build, load_state, seeded

_FILLERS = ("a", "an", "the", "photo", "picture", "of", "this", "is", "bird", "with", "plain", "empty", "branch", "no")
WORDS = tuple(sorted({*_FILLERS, *GENERA, *COLOURS, *(word for slot in SLOTS for word in slot.split())}))
"""The vocabulary."""

WIDTH = 64


class Tokenizer:
    """Words to numbers: lower case, letters only; 0 is padding.

    Examples
    --------
    >>> Tokenizer()(["A bird.", "a blue bird"]).shape
    torch.Size([2, 3])
    """

    def __init__(self) -> None:
        self.ids = {word: i + 1 for i, word in enumerate(WORDS)}

    def __call__(self, texts: list[str]) -> Tensor:
        """Token ids (n, longest), padded with 0 at the end.

        Raises
        ------
        UserError
            An empty text, or a word that the model has never seen.
        """
        rows = [self._encode(text) for text in texts]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, words in enumerate(rows):
            ids[row, : len(words)] = torch.tensor(words)
        return ids

    def _encode(self, text: str) -> list[int]:
        words = re.findall(r"[a-z]+", text.lower())
        if not words:
            raise UserError("empty text", where="tiny:clip", given=repr(text))
        for word in words:
            if word not in self.ids:
                near = closest(word, WORDS)
                remedy = f"did you mean {', '.join(near)}?" if near else f"it knows: {', '.join(WORDS)}"
                raise UserError("word not in the vocabulary", where="tiny:clip", given=repr(word), remedy=remedy)
        return [self.ids[word] for word in words]


class TextNetwork(nn.Module):
    """Word embeddings, a GRU, the state after the last word, a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 1, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (n, length) to embeddings (n, 64), not normalised."""
        states, _ = self.gru(self.words(ids))
        last = (ids > 0).sum(1) - 1
        embedding: Tensor = self.project(states[torch.arange(len(ids)), last])
        return embedding


class TinyCLIP(nn.Module):
    """Both towers.

    Attributes
    ----------
    visual : timm VisionTransformer
        Images (B, 3, 64, 64) to embeddings (B, 64).
    textual : TextNetwork
        Token ids to embeddings (n, 64).
    logit_scale : Parameter
        Logarithm of the factor on cosines.
    logit_bias : Parameter
        Offset of the pairwise logits (as in SigLIP); the same for all texts.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.visual = build("clip", 0, seed=seed)
        with seeded(seed + 1):
            self.textual = TextNetwork()
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.logit_bias = nn.Parameter(torch.tensor(-4.0))
        self.tokenizer = Tokenizer()
        self.eval()

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Image embeddings (B, 64)."""
        embedding = self.visual(images)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        """Text embeddings (n, 64) of token ids."""
        embedding: Tensor = self.textual(ids)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Pairwise logits (B, n): scaled cosine plus bias; their sigmoid is the probability that the text is true."""
        cosine = self.encode_image(images, normalize=True) @ self.encode_text(ids, normalize=True).T
        return self.logit_scale.exp() * cosine + self.logit_bias


class ClipText:
    """Text tower for `vfm_core.backbones.Native.text`."""

    def __init__(self, model: TinyCLIP) -> None:
        self.model = model
        self.logit_scale = float(model.logit_scale.detach().exp())

    def encode(self, texts: list[str]) -> Tensor:
        """L2-normalised embeddings (n, 64) on the model's device.

        Raises
        ------
        UserError
            No texts, or a word outside the vocabulary.
        """
        if isinstance(texts, str) or not texts:
            raise UserError("expected a non-empty list of texts", given=repr(texts))
        ids = self.model.tokenizer(texts).to(self.model.logit_scale.device)
        with torch.no_grad():
            return self.model.encode_text(ids, normalize=True)


def clip_from(tensors: Mapping[str, Tensor]) -> TinyCLIP:
    """Both towers from the tensors of a weight file, in eval mode, float32, on the CPU."""
    model = TinyCLIP()
    load_state(model, tensors)
    return model
