"""What is trained: the model in a shell that reads its features, carries the source model and makes the losses.

The rules around it: FTC (arXiv 2409.16223) trains the backbone at a tenth of the head's learning rate with BN in train
mode, and uses dropout only when BN is frozen. A frozen part keeps its BN statistics: the published code lets them move
under a frozen backbone, which damages the features that it means to keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vfm_core.errors import UserError

from ft_calibrate.classifier import logits_of
from ft_calibrate.recipes.averaging import IterateAverage
from ft_calibrate.recipes.losses import correlation_penalty, cross_entropy, distillation, squared_distance
from ft_calibrate.recipes.spec import Recipe

__all__ = ["Loss", "Student", "choose_trainable", "freeze_statistics", "head_logits", "parameter_groups"]


def choose_trainable(model: nn.Module, head: nn.Module, scheme: str) -> None:
    """Set ``requires_grad`` for a scheme; low-rank layers must be in place before.

    Raises
    ------
    UserError
        Nothing is left to train.
    """
    in_head = {id(p) for p in head.parameters()}
    for name, p in model.named_parameters():
        inside = id(p) in in_head
        p.requires_grad_(
            {
                "lp": inside,
                "frozen-head": not inside,
                "bit-fit": name.rpartition(".")[2] == "bias",
                "lora": inside or "lora_" in name,
            }.get(scheme, True)
        )
    if not any(p.requires_grad for p in model.parameters()):
        remedy = "use ft" if scheme != "lp" else "use a model whose head has weights of its own"
        raise UserError("the recipe leaves nothing to train", given=scheme, remedy=remedy)


def freeze_statistics(model: nn.Module) -> None:
    """Put every BatchNorm in eval mode: it uses its running statistics, and they stay."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def parameter_groups(model: nn.Module, head: nn.Module, lr: float, backbone_scale: float) -> list[dict[str, Any]]:
    """Trainable parameters, the head's first, at ``lr``; the rest at ``lr * backbone_scale``."""
    in_head = {id(p) for p in head.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in in_head], "lr": lr},
        {"params": [p for p in trained if id(p) not in in_head], "lr": lr * backbone_scale},
    ]
    return [group for group in groups if group["params"]]


def head_logits(head: nn.Module, features: Tensor) -> Tensor:
    """Logits (N, K) of features (N, D) by a head alone, also where it is a 1x1 convolution."""
    if isinstance(head, nn.Conv2d):
        return head(features[:, :, None, None]).flatten(1)
    return head(features)


class Student(nn.Module):
    """A model (or its head alone, on cached features) with what its losses need.

    Parameters
    ----------
    model : nn.Module
        The model; with ``features_in`` only its head.
    head : nn.Module
        Its head, whose input is the features.
    recipe : Recipe
        For the parts that act on the forward pass.
    features_in : bool
        The inputs are features (N, D).
    teacher : nn.Module, optional
        The source model, frozen; without it the forward pass takes its logits as a second input.
    average : IterateAverage, optional
        Gets the weights after every step.
    origin : sequence of Tensor, optional
        theta_source of the parameters that are trained, for ``l2sp``.
    backbone_stays : bool
        Everything but the head stays in eval mode: also layers without parameters, such as BN without an affine part.

    Notes
    -----
    ``forward(x[, z_source])`` returns a dict with ``logits`` and, as far as the recipe needs them, ``teacher``,
    ``features`` and ``l2sp``. `attached` must surround its use: it hooks the head and always unhooks it.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        recipe: Recipe,
        *,
        features_in: bool = False,
        teacher: nn.Module | None = None,
        average: IterateAverage | None = None,
        origin: Sequence[Tensor] | None = None,
        backbone_stays: bool = False,
    ) -> None:
        super().__init__()
        self.backbone_stays = backbone_stays
        self.model = model
        self.features_in = features_in
        self.teacher = teacher.requires_grad_(False).eval() if teacher is not None else None
        self.average = average
        self.statistics_stay = bool({"bn-frozen", "bit-fit", "lora"} & set(recipe.parts))
        self.dropout = float(recipe["bn-frozen"]["dropout"]) if "bn-frozen" in recipe else 0.0
        self.wants_features = "rank" in recipe
        self.origin: nn.ParameterList | None = None
        if origin is not None:
            self.origin = nn.ParameterList(nn.Parameter(p, requires_grad=False) for p in origin)
        self._head = [head]  # in a list: a module attribute would register the head a second time
        self._features: Tensor | None = None

    @property
    def head(self) -> nn.Module:
        """The layer that makes the logits."""
        return self._head[0]

    @contextmanager
    def attached(self) -> Iterator[Student]:
        """Hook the head: its input is noted and, with dropout, thinned."""
        handle = self.head.register_forward_pre_hook(self._note)
        try:
            yield self
        finally:
            handle.remove()
            self._features = None

    def _note(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._features = args[0]
        if self.dropout and self.training:
            return (F.dropout(args[0], self.dropout), *args[1:])
        return None

    def train(self, mode: bool = True) -> Student:
        """As usual, but BN, or all but the head, stays in eval mode where the recipe says so."""
        super().train(mode)
        if self.backbone_stays:
            self.model.eval()
            self.head.train(mode)
        if self.statistics_stay:
            freeze_statistics(self.model)
        return self

    def forward(self, x: Tensor, z_source: Tensor | None = None) -> dict[str, Tensor]:
        """Compute what the losses need."""
        if self.average is not None and self.training:
            self.average.before_step(self.model)
        logits = head_logits(self.model, x) if self.features_in else logits_of(self.model(x))
        out = {"logits": logits}
        if self.wants_features:
            assert self._features is not None
            f = self._features
            out["features"] = f.flatten(2).mean(2) if f.ndim == 4 else f
        if self.teacher is not None:
            with torch.no_grad():
                out["teacher"] = logits_of(self.teacher(x))
        elif z_source is not None:
            out["teacher"] = z_source
        if self.origin is not None:
            moved = (p for p in self.model.parameters() if p.requires_grad)
            out["l2sp"] = squared_distance(moved, self.origin)
        return out


@dataclass(frozen=True, eq=False)
class Loss:
    """Cross-entropy and the recipe's penalties, of a `Student`'s outputs.

    Attributes
    ----------
    recipe : Recipe
    seen : Tensor of int64 or None
        Columns of the cross-entropy, for ``seen-loss``.
    absent : Tensor of int64
        Columns of ``distill-absent``.
    """

    recipe: Recipe
    seen: Tensor | None
    absent: Tensor

    def __call__(self, outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Scalar loss, mean over rows."""
        z = outputs["logits"].float()
        columns = self.seen.to(z.device) if self.seen is not None else None
        loss = cross_entropy(z, labels, columns)
        for name, o in self.recipe.of_kind("loss").items():
            if name in ("distill", "distill-absent"):
                among = self.absent.to(z.device) if name == "distill-absent" else None
                loss = loss + o["lambda"] * distillation(z, outputs["teacher"].float(), o["T"], among)
            elif name == "rank":
                loss = loss + o["lambda"] * correlation_penalty(outputs["features"])
            else:
                loss = loss + o["lambda"] * outputs["l2sp"]
        return loss
