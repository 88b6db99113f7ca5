"""One forward that starts autograd exactly at the layer: the activations A and vector-Jacobian products of the tail.

The trunk below the layer runs without autograd, the layer's output becomes a fresh leaf, and only the tail above it is
recorded. No parameter ever receives a gradient, which is why frozen models and callers inside ``no_grad`` or
``inference_mode`` work, and why the backward costs the tail instead of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from vfm_core.errors import UserError

from finecam.layers import Site, default_name, first_tensor, list_layers, logits_of, quiet
from finecam.layouts import TokenLayout, find_layout

Reshape = Callable[[Tensor], Tensor]


class NoGridError(UserError):
    """A layer whose output is no map of the image."""


class Capture:
    """Context in which a model runs once and its layers' activations and gradients can be read.

    Parameters
    ----------
    model
        Any classifier; in eval mode and frozen inside the context, as before afterwards.
    sites
        Layers to read.
    reshape
        ``"auto"``, or a callable from the layer's output to (B, K, h, w).
    gradient
        False runs everything without autograd.
    known
        Layouts found by earlier captures of the same model, to be filled and reused.

    Attributes
    ----------
    maps : list of Tensor
        After `forward`: activations A as (B, K, h, w), one per site.
    outputs : list of Tensor
        After `forward`: the same as the layers returned them, leaves of the tail's graph.
    layouts : list of TokenLayout or callable
        After `forward`: how the outputs map to the grid.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        reshape: str | Reshape = "auto",
        gradient: bool = True,
        known: dict[Any, TokenLayout] | None = None,
    ) -> None:
        self.model, self.sites, self.reshape, self.gradient = model, list(sites), reshape, gradient
        self._known = {} if known is None else known
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # Leaving inference mode lets the tail be recorded whatever mode the caller is in. With every parameter
            # frozen, grad mode records nothing below the layer.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad() if self.gradient else torch.no_grad())
            stack.enter_context(quiet(self.model))
            self._contexts = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.__exit__(*error)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def forward(self, x: Tensor) -> Tensor:
        """Run the model on (B, 3, H, W) and return its logits (B, C)."""
        self._calls = [0] * len(self.sites)
        self._outputs: list[Tensor | None] = [None] * len(self.sites)
        self._handles = [s.module.register_forward_hook(self._hook(i)) for i, s in enumerate(self.sites)]
        try:
            # Inference tensors cannot be saved for the backward, hence the copy.
            logits = logits_of(self.model(x.clone() if x.is_inference() else x.detach()))
        finally:
            self._remove_hooks()
        self.outputs = [self._checked(i, logits) for i in range(len(self.sites))]
        self.layouts = [self._layout(i, x) for i in range(len(self.sites))]
        self.maps = [self.to_map(i, a.detach()) for i, a in enumerate(self.outputs)]
        return logits

    def to_map(self, i: int, output: Tensor) -> Tensor:
        """Output, or gradient, of site i as (B, K, h, w)."""
        layout = self.layouts[i]
        return layout.to_map(output) if isinstance(layout, TokenLayout) else layout(output)

    def vjp(self, logits: Tensor, cotangents: Tensor, keep: bool = False) -> list[list[Tensor]]:
        """Gradients of ``(cotangents[n] * logits).sum()`` as maps (B, K, h, w), indexed [site][n].

        `cotangents` is (n, B, C). One cheap backward through the tail per cotangent: on the CPU this is faster than a
        vectorised one (``is_grads_batched``), needs no n-fold memory and works with every kernel. The graph is freed
        unless `keep`.
        """
        per_site: list[list[Tensor]] = [[] for _ in self.sites]
        for n, cotangent in enumerate(cotangents):
            grads: Sequence[Tensor | None] = [None] * len(self.sites)
            if logits.requires_grad:
                more = keep or n < len(cotangents) - 1
                grads = torch.autograd.grad(
                    logits, self.outputs, cotangent.to(logits.dtype), retain_graph=more, allow_unused=True
                )
            for i, grad in enumerate(grads):
                grad = torch.zeros_like(self.outputs[i]) if grad is None else grad
                per_site[i].append(self.to_map(i, grad))
        return per_site

    def _hook(self, i: int) -> Callable[..., Any]:
        site = self.sites[i]

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            call = self._calls[i]
            self._calls[i] += 1
            if site.call is not None and call != site.call:
                return None
            if call > 0 and site.call is None:
                raise UserError(
                    "layer runs more than once in one forward",
                    where=site.name,
                    remedy=f"say which call: layer='{site.name}#0', '{site.name}#1', ...",
                )
            tensor, put = first_tensor(output)
            if tensor is None:
                raise UserError("layer does not return a tensor", where=site.label, given=type(output).__name__)
            if not self.gradient:
                self._outputs[i] = tensor.clone()  # the layers above may work in place
                return None
            if tensor.is_inference():
                raise UserError(
                    "the model's forward turns inference mode on",
                    where=site.label,
                    remedy="use torch.no_grad there, or none: this call needs no gradient of any parameter",
                )
            torch.set_grad_enabled(True)  # a frozen trunk may sit inside the model's own no_grad
            # With several layers, a later one stays in the graph of an earlier one.
            leaf = tensor if tensor.requires_grad else tensor.detach().requires_grad_(True)
            self._outputs[i] = leaf
            return put(leaf.clone())  # a copy, so that in-place layers above can neither fail nor alter A

        return hook

    def _checked(self, i: int, logits: Tensor) -> Tensor:
        output, site = self._outputs[i], self.sites[i]
        if output is None:
            if self._calls[i]:
                raise UserError(f"layer runs {self._calls[i]} times in one forward", where=site.label)
            raise UserError(
                "layer did not run in the model's forward",
                where=site.label,
                remedy="choose another one (`finecam layers MODEL`); compiled models bypass their inner layers",
            )
        return output

    def _layout(self, i: int, x: Tensor) -> TokenLayout | Reshape:
        site, output = self.sites[i], self.outputs[i]
        if callable(self.reshape):
            shape = tuple(self.reshape(output.detach()).shape)
            if len(shape) != 4 or shape[0] != len(x):
                raise UserError("reshape must return (B, K, h, w)", where=site.label, given=shape)
            return self.reshape
        image_hw = (x.shape[-2], x.shape[-1])
        key = (site.label, output.shape, x.shape)
        layout = self._known.get(key)
        layout = layout or find_layout(self.model, site.name, site.module, output, image_hw, batch=len(x))
        if layout is None:
            fits = [f"{r.name} {r.map_shape}" for r in list_layers(self.model, x) if r.map_shape and r.calls == 1]
            default = [fit for fit in fits if fit.partition(" ")[0] == default_name(self.model)]
            raise NoGridError(
                f"no grid of an image of {image_hw[0]}x{image_hw[1]} fits the layer's output",
                where=site.label,
                given=tuple(output.shape),
                remedy=f"give reshape=callable, or another layer: {', '.join([*default, *fits[-4:]])}",
            )
        self._known[key] = layout
        return layout
