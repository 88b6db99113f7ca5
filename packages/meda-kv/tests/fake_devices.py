"""Several devices on a machine that has one: tensors carry the name of a device, and mixing names is an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_DEVICE_OF = Tensor.device.__get__


class FakeDevices(TorchFunctionMode):
    """Inside, ``xla:0`` and ``xla:1`` are names written on CPU tensors (a kind that nobody synchronises with).

    Every result carries the device of its arguments or the one asked for. A computation over tensors of two devices
    raises, as it would on real ones; only copies between devices and zero-dimensional CPU tensors are allowed.
    """

    copies = ("copy_", "__setitem__", "to", "cpu")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == _DEVICE_OF:
            return tag(args[0])
        wanted, args, kwargs = self._without_device(func, args, kwargs)
        found = {tag(one) for one in tensors((args, kwargs)) if one.ndim or tag(one) != CPU}
        name = getattr(func, "__name__", "")
        if len(found) > 1 and name not in self.copies:
            raise RuntimeError(f"{name}: expected all tensors on one device, found {sorted(map(str, found))}")
        result = func(*args, **kwargs)
        if wanted is None and found:
            first = next(tensors(args), None)
            wanted = tag(first) if len(found) > 1 and first is not None else next(iter(found))
        if wanted is not None:
            made = list(tensors(result))
            if any(one is given and tag(given) != wanted for one in made for given in tensors(args)):
                result = result.clone()  # a move that would return the tensor itself
                made = [result]
            for one in made:
                one.__dict__["_device"] = wanted
        return result

    def _without_device(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
        """Replace what names a device by the CPU; returns the name as well."""
        wanted = None
        if kwargs.get("device") is not None:
            wanted, kwargs["device"] = torch.device(kwargs["device"]), CPU
        elif getattr(func, "__name__", "") == "cpu":
            wanted = CPU
        elif getattr(func, "__name__", "") == "to" and len(args) > 1:
            target = args[1]
            if isinstance(target, Tensor):
                wanted, args = tag(target), (args[0], target.dtype, *args[2:])
            elif isinstance(target, (str, torch.device)):
                wanted, args = torch.device(target), (args[0], CPU, *args[2:])
        return wanted, args, kwargs


def tag(tensor: Tensor) -> torch.device:
    """The device whose name a tensor carries."""
    return tensor.__dict__.get("_device", CPU)


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for one in tree:
            yield from tensors(one)
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))


def _moved(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_moved(one, device) for one in tree)
    return tree


def place(module: nn.Module, device: str) -> None:
    """Put a module on a fake device; what it is called with is moved there first, as accelerate does."""
    target = torch.device(device)
    for one in (*module.parameters(), *module.buffers()):
        one.__dict__["_device"] = target

    def move(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return _moved(args, target), {name: _moved(value, target) for name, value in kwargs.items()}

    module.register_forward_pre_hook(move, with_kwargs=True)
