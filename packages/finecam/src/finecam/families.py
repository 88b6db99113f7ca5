"""The class-activation map family: small pure functions from activations A and gradients G to a signed map.

Every function takes A and G = dJ/dA as (B, K, h, w) float tensors and returns the map (B, h, w) before the final ReLU.
Finer-CAM (arXiv 2501.11309) wraps all of them alike, because it only changes J. Sums over ij run over the h*w cells.

G may be a broadcast view (one value per channel, when the head is linear on the pooled map): nothing here writes to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Map = Callable[[Tensor, Tensor], Tensor]


def _weighted(weights: Tensor, a: Tensor) -> Tensor:
    """``sum_k w_k A_k`` for weights (B, K)."""
    return torch.einsum("bk,bkhw->bhw", weights, a)


def gradcam(a: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM (arXiv 1610.02391): ``sum_k (1/Z sum_ij G_k) A_k``."""
    return _weighted(g.mean((2, 3)), a)


def gradcam_plusplus(a: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM++ (arXiv 1710.11063, eq. 19): ``alpha = G^2 / (2 G^2 + (sum_ab A_k) G^3 + 1e-6)``, 0 where G = 0."""
    g2 = g * g
    alpha = g2 / (2 * g2 + a.sum((2, 3), keepdim=True) * (g2 * g) + 1e-6)
    alpha = torch.where(g != 0, alpha, 0)
    return _weighted((g.relu() * alpha).sum((2, 3)), a)


def xgradcam(a: Tensor, g: Tensor) -> Tensor:
    """XGrad-CAM (arXiv 2008.02312): ``w_k = sum_ij G_k A_k / (sum_ij A_k + 1e-7)``."""
    return _weighted((g * a).sum((2, 3)) / (a.sum((2, 3)) + 1e-7), a)


def layercam(a: Tensor, g: Tensor) -> Tensor:
    """Layer-CAM (TIP 2021): ``sum_k relu(G_k) A_k``."""
    return torch.einsum("bkhw,bkhw->bhw", g.relu(), a)


def hirescam(a: Tensor, g: Tensor) -> Tensor:
    """HiResCAM (arXiv 2011.08891): ``sum_k G_k A_k``."""
    return torch.einsum("bkhw,bkhw->bhw", g, a)


def gradcam_elementwise(a: Tensor, g: Tensor) -> Tensor:
    """``sum_k relu(G_k A_k)``."""
    return (g * a).relu().sum(1)


def cam(a: Tensor, g: Tensor) -> Tensor:
    """The original CAM (arXiv 1512.04150), ``sum_k W[c,k] A_k``; behind a pooled linear head, W[c,k] = sum_ij G_k."""
    return _weighted(g.sum((2, 3)), a)


def eigengradcam(a: Tensor, g: Tensor) -> Tensor:
    """First principal projection of ``G * A``."""
    return principal_map(g * a)


def eigencam(a: Tensor, g: Tensor) -> Tensor:
    """Eigen-CAM (arXiv 2008.00299): first principal projection of A. No class enters."""
    return principal_map(a)


def principal_map(values: Tensor) -> Tensor:
    """Project (B, K, h, w), column-centred as (Z, K), on its first right-singular vector; largest magnitude positive.

    The projection ``M v_1`` equals ``u_1 s_1``, so the smaller of the (Z, Z) and (K, K) Gram matrices is decomposed.
    """
    batch, channels, h, w = values.shape
    m = values.flatten(2).transpose(1, 2).double()
    m = m - m.mean(1, keepdim=True)
    if h * w <= channels:
        squared, u = torch.linalg.eigh(m @ m.transpose(1, 2))  # ascending
        projection = u[..., -1] * squared[..., -1:].clamp(min=0).sqrt()
    else:
        _, v = torch.linalg.eigh(m.transpose(1, 2) @ m)
        projection = (m @ v[..., -1:]).squeeze(-1)
    flip = projection.amin(1, keepdim=True).abs() > projection.amax(1, keepdim=True).abs()
    return torch.where(flip, -projection, projection).view(batch, h, w).to(values.dtype)


def channel_weighted(weights: Tensor, a: Tensor) -> Tensor:
    """``sum_k w_k A_k`` for weights (B, K) that do not come from a gradient map (Score-CAM, Ablation-CAM, ...)."""
    return _weighted(weights, a)


@dataclass(frozen=True)
class Family:
    """One member of the family.

    Attributes
    ----------
    name
        What ``method=`` takes.
    kind
        ``"gradient"`` (map of A and G), ``"score"`` (forward passes), ``"second"`` (second derivatives),
        ``"classless"`` (no target enters) or ``"attention"`` (classless, read from attention weights).
    map
        The function, for the kinds that need A or A and G only.
    linear
        The map is linear in G, so that maps can be combined instead of gradients.
    """

    name: str
    kind: str
    map: Map | None = None
    linear: bool = False

    @property
    def asks(self) -> bool:
        """Whether the map depends on the class, and so on references."""
        return self.kind not in ("classless", "attention")


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("gradcam", "gradient", gradcam, linear=True),
        Family("gradcam++", "gradient", gradcam_plusplus),
        Family("xgradcam", "gradient", xgradcam, linear=True),
        Family("layercam", "gradient", layercam),
        Family("hirescam", "gradient", hirescam, linear=True),
        Family("gradcam_elementwise", "gradient", gradcam_elementwise),
        Family("eigengradcam", "gradient", eigengradcam),
        Family("cam", "gradient", cam, linear=True),
        Family("scorecam", "score"),
        Family("ablationcam", "score"),
        Family("shapleycam", "second"),
        Family("eigencam", "classless", eigencam),
        Family("randomcam", "classless"),
        Family("rollout", "attention"),
        Family("cls_attention", "attention"),
    )
}


def minmax(maps: Tensor) -> Tensor:
    """Scale each (..., h, w) map to [0, 1]: ``(m - min) / (max - min + 1e-7)``; a constant map becomes zero."""
    low = maps.amin((-2, -1), keepdim=True)
    return (maps - low) / (maps.amax((-2, -1), keepdim=True) - low + 1e-7)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (..., h, w) maps."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return torch.nn.functional.interpolate(flat, size, mode="bilinear", align_corners=False).view(
        *maps.shape[:-2], *size
    )
