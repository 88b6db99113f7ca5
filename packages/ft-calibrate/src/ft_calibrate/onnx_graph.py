"""An ONNX graph as `ft_calibrate.fold_onnx` sees it: makers, users and constants of values, and how to change one."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

__all__ = ["Graph", "attribute", "last_dim", "load_onnx"]


def load_onnx() -> Any:
    """The module ``onnx``, or a `UserError` that says how to install it."""
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise UserError("a package is missing", given="onnx", remedy='pip install "ft-calibrate[onnx]"') from error


class Graph:
    """What is asked of an ONNX graph: who makes and who uses a value, and constants by name."""

    def __init__(self, model: Any) -> None:
        self.onnx, self.model, self.graph = load_onnx(), model, model.graph
        self.maker = {name: node for node in self.graph.node for name in node.output}
        self.initializers = {t.name: t for t in self.graph.initializer}

    def users(self, name: str) -> int:
        """How many inputs, of subgraphs too, and outputs a value goes to."""
        return _uses(self.graph, name)

    def constant(self, name: str) -> NDArray[Any] | None:
        """Value of an initializer or a Constant node, also behind Identity; None for anything computed."""
        if name in self.initializers:
            return self.onnx.numpy_helper.to_array(self.initializers[name])
        node = self.maker.get(name)
        if node is None or node.op_type not in ("Constant", "Identity"):
            return None
        if node.op_type == "Identity":
            return self.constant(node.input[0])
        value = next((a for a in node.attribute if a.name == "value"), None)
        return None if value is None else self.onnx.numpy_helper.to_array(value.t)

    def new_name(self, stem: str) -> str:
        """A name that nothing in the graph has."""
        taken = {*self.maker, *self.initializers, *(i.name for i in self.graph.input)}
        name, number = f"{stem}_calibrated", 0
        while name in taken:
            number += 1
            name = f"{stem}_calibrated_{number}"
        return name

    def put(self, node: Any, position: int, value: NDArray[Any], stem: str) -> str:
        """Give a node another constant: in place where it is the only user, else as a copy. Returns its name."""
        old = node.input[position] if position < len(node.input) else ""
        tensor = self.onnx.numpy_helper.from_array(np.ascontiguousarray(value), old)
        if old in self.initializers and self.users(old) == 1:
            self.initializers[old].CopyFrom(tensor)
            return str(old)
        name = self.new_name(old or stem)
        tensor.name = name
        self.graph.initializer.append(tensor)
        self.initializers[name] = self.graph.initializer[-1]
        while len(node.input) <= position:
            node.input.append("")
        node.input[position] = name
        return name

    def insert(self, op: str, node: Any, value: NDArray[Any], stem: str) -> str:
        """Put ``op(output, value)`` behind a node, keeping the name of what leaves; returns the constant's name."""
        helper = self.onnx.helper
        out = node.output[0]
        inner, name = self.new_name(f"{out}_before_{op.lower()}"), self.new_name(stem)
        tensor = self.onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
        self.graph.initializer.append(tensor)
        self.initializers[name] = self.graph.initializer[-1]
        node.output[0] = inner
        new = helper.make_node(op, [inner, name], [out], name=self.new_name(f"{node.name or node.op_type}_{op}"))
        place = next(i for i, n in enumerate(self.graph.node) if n is node or n.output[:1] == [inner])
        self.graph.node.insert(place + 1, new)
        self.maker = {o: n for n in self.graph.node for o in n.output}
        return name


def _uses(graph: Any, name: str) -> int:
    count = sum(o.name == name for o in graph.output)
    for node in graph.node:
        count += sum(i == name for i in node.input)
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                count += _uses(inner, name)
    return count


def last_dim(value: Any) -> int | None:
    """Last dimension of a graph output, None where it is not fixed."""
    dims = value.type.tensor_type.shape.dim
    return int(dims[-1].dim_value) or None if len(dims) else None


def attribute(node: Any, name: str, default: Any) -> Any:
    """A node's number or list of numbers."""
    found = next((a for a in node.attribute if a.name == name), None)
    if found is None:
        return default
    return found.f if found.type == 1 else list(found.ints) if found.type == 7 else found.i
