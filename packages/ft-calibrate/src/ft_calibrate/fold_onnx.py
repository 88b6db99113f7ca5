"""Fold a calibration into an ONNX classifier (ours, not from a paper).

From the logits output the graph is walked back, over nodes that only reshape, to the node that makes the logits: a
``Gemm`` (with or without C), a ``MatMul`` (with or without an ``Add``), a 1x1 ``Conv``. Its constant is replaced; one
that other nodes use is copied first. Whatever else makes the logits, an ``Add`` of K numbers behind it does the same.
"""

from __future__ import annotations

import importlib
import logging
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError
from vfm_core.files import TEMPORARY

from ft_calibrate.head_change import TOLERANCE, FoldRecord, HeadChange, largest_difference
from ft_calibrate.onnx_graph import Graph, attribute, last_dim, load_onnx

__all__ = ["export_onnx", "fold_onnx"]

log = logging.getLogger(__name__)

MARK = "ft_calibrate_fold"
_PASSED = ("Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Dropout")
_PROBABILITIES = ("Softmax", "LogSoftmax")


# ---------------------------------------------------------------------- folding
def fold_onnx(
    model: Any, change_for: Callable[[int], HeadChange], head: str | None = None, num_classes: int | None = None
) -> FoldRecord:
    """Change an ONNX model's head in place.

    Parameters
    ----------
    model : onnx.ModelProto
        With its weights loaded.
    change_for : callable
        K -> `HeadChange`.
    head : str, optional
        Name of the node that makes the logits, or of a value of the graph (an output, say).
    num_classes : int, optional
        K, where it is known: it tells the logits among several outputs.

    Returns
    -------
    FoldRecord

    Raises
    ------
    UserError
        No logits output, no such node, or a model with a calibration in it.
    """
    if any(entry.key == MARK for entry in model.metadata_props):
        given = next(entry.value for entry in model.metadata_props if entry.key == MARK)
        remedy = "fold into the original model"
        raise UserError("a calibration is folded in already", where="the ONNX file", given=given, remedy=remedy)
    graph = Graph(model)
    node, end, notes = _head_node(graph, head, num_classes)
    k = _rows(graph, node) or _known_width(graph, node, num_classes)
    change = change_for(k)
    changed, dtype, rounding, more = _change_node(graph, node, end, change)
    name = node.name or f"{node.op_type} of {node.output[0]}"
    facts = (change.gamma, k, len(change.columns), change.source, dtype, rounding)
    record = FoldRecord(name, tuple(changed), *facts, (*change.notes, *notes, *more), effect=change.effect)
    entry = model.metadata_props.add()
    entry.key, entry.value = MARK, record.line()
    return record


def _head_node(graph: Graph, head: str | None, num_classes: int | None) -> tuple[Any, Any, list[str]]:
    """The node that makes the logits, the last one they pass as logits, and notes on what follows."""
    value = _logits_value(graph, head, num_classes)
    notes: list[str] = []
    node = end = graph.maker.get(value)
    while node is not None and node.op_type in (*_PASSED, *_PROBABILITIES):
        if node.op_type in _PROBABILITIES:
            notes.append(f"the output passes {node.op_type} after the change")
            end = graph.maker.get(node.input[0])
        node = graph.maker.get(node.input[0])
    if node is None:
        raise UserError("no layer makes the logits", where="the ONNX graph", given=value, remedy="name it with --head")
    return node, end, notes


def _logits_value(graph: Graph, head: str | None, num_classes: int | None) -> str:
    outputs = [o.name for o in graph.graph.output]
    if head is not None:
        named = next((n for n in graph.graph.node if n.name == head), None)
        if named is not None:
            return str(named.output[0])
        if head in graph.maker:
            return head
        remedy = f"name a node or value, such as the output {', '.join(outputs)}"
        raise UserError("no such node or value in the ONNX graph", where="--head", given=head, remedy=remedy)
    if len(outputs) == 1:
        return outputs[0]
    widths = {o.name: last_dim(o) for o in graph.graph.output}
    fitting = [n for n in outputs if num_classes is not None and widths[n] == num_classes]
    fitting = fitting if len(fitting) == 1 else [n for n in outputs if n == "logits"]
    if len(fitting) != 1:
        raise UserError(
            "several outputs", where="the ONNX graph", given=", ".join(outputs), remedy="choose with --head"
        )
    return fitting[0]


def _rows(graph: Graph, node: Any) -> int | None:
    """K of the node's constant weight."""
    if node.op_type == "Add":
        inner = next((graph.maker[i] for i in node.input if i in graph.maker and graph.constant(i) is None), None)
        bias = next((c for i in node.input if (c := graph.constant(i)) is not None), None)
        found = None if inner is None or inner.op_type not in ("MatMul", "Gemm", "Conv") else _rows(graph, inner)
        return found or (bias.shape[-1] if bias is not None and bias.ndim and bias.shape[-1] > 1 else None)
    if node.op_type not in ("Gemm", "MatMul", "Conv"):
        return None
    weight = graph.constant(node.input[1])
    if weight is None:
        return None
    if node.op_type == "Gemm":
        return int(weight.shape[0 if attribute(node, "transB", 0) else 1])
    return int(weight.shape[0 if node.op_type == "Conv" else -1])


def _known_width(graph: Graph, node: Any, num_classes: int | None) -> int:
    width = next((w for o in graph.graph.output if (w := last_dim(o)) is not None), None) or num_classes
    if width is None:
        raise UserError("the number of logits is not known", where=node.op_type, remedy="give --classes")
    return width


def _change_node(graph: Graph, node: Any, end: Any, change: HeadChange) -> tuple[list[str], str, float, list[str]]:
    ways = {"Gemm": _change_gemm, "Add": _change_add, "Conv": _change_conv}
    done = ways[node.op_type](graph, node, change) if node.op_type in ways else None
    what = "an Add of K numbers was put behind the logits"
    return done or _behind(graph, end, change, f"{node.op_type} holds no bias: {what}")


Done = tuple[list[str], str, float, list[str]]


def _rounded(values: NDArray[np.float64], dtype: Any) -> tuple[NDArray[Any], float, list[str]]:
    kept = values.astype(dtype)
    finite = np.isfinite(values)
    error = float(np.abs(kept[finite].astype(np.float64) - values[finite]).max(initial=0.0))
    notes = [f"{np.dtype(dtype).name} rounds the new bias by up to {error:.2g}"] if error > TOLERANCE else []
    for note in notes:
        log.warning("%s", note)
    return kept, error, notes


def _is_float(value: NDArray[Any] | None) -> bool:
    return value is not None and value.dtype.kind == "f"


def _change_gemm(graph: Graph, node: Any, change: HeadChange) -> Done | None:
    """``alpha A B + beta C``: C becomes C s + b / beta, B is scaled per class."""
    weight = graph.constant(node.input[1])
    has_c = len(node.input) > 2 and node.input[2] != ""
    old = graph.constant(node.input[2]) if has_c else None
    beta = float(attribute(node, "beta", 1.0))
    if (
        not _is_float(weight)
        or (has_c and not _is_float(old))
        or (old is not None and old.ndim == 2 and old.shape[0] > 1)
    ):
        return None
    assert weight is not None
    if beta == 0:
        return None
    base = (
        np.zeros(len(change.bias)) if old is None else np.broadcast_to(old.astype(np.float64), (1, len(change.bias)))[0]
    )
    bias, error, notes = _rounded(base * change.scale + change.bias / beta, weight.dtype)
    changed = [graph.put(node, 2, bias, "bias")]
    if old is None:
        notes = [*notes, "the Gemm had no C: one was made"]
    if change.scales:
        axis = 0 if attribute(node, "transB", 0) else 1
        scale = change.scale[:, None] if axis == 0 else change.scale
        changed.append(graph.put(node, 1, (weight.astype(np.float64) * scale).astype(weight.dtype), "weight"))
    return changed, weight.dtype.name, error, notes


def _change_add(graph: Graph, node: Any, change: HeadChange) -> Done | None:
    """``MatMul + bias``, in either order of the two."""
    positions = [i for i, name in enumerate(node.input) if graph.constant(name) is not None]
    if len(positions) != 1:
        return None
    old = graph.constant(node.input[positions[0]])
    inner = graph.maker.get(node.input[1 - positions[0]])
    if old is None or not _is_float(old) or inner is None or inner.op_type != "MatMul":
        return None
    if old.size not in (1, len(change.bias)) or graph.users(node.input[1 - positions[0]]) != 1:
        return None
    weight = graph.constant(inner.input[1])
    if change.scales and not _is_float(weight):
        return None
    base = np.broadcast_to(old.astype(np.float64).reshape(-1), (len(change.bias),))
    bias, error, notes = _rounded(base * change.scale + change.bias, old.dtype)
    changed = [graph.put(node, positions[0], bias, "bias")]
    if change.scales:
        assert weight is not None
        changed.append(graph.put(inner, 1, (weight.astype(np.float64) * change.scale).astype(weight.dtype), "weight"))
    return changed, old.dtype.name, error, notes


def _change_conv(graph: Graph, node: Any, change: HeadChange) -> Done | None:
    weight = graph.constant(node.input[1])
    has_bias = len(node.input) > 2 and node.input[2] != ""
    old = graph.constant(node.input[2]) if has_bias else None
    if weight is None or not _is_float(weight) or (has_bias and not _is_float(old)) or set(weight.shape[2:]) != {1}:
        return None
    base = np.zeros(len(change.bias)) if old is None else old.astype(np.float64)
    bias, error, notes = _rounded(base * change.scale + change.bias, weight.dtype)
    changed = [graph.put(node, 2, bias, "bias")]
    if old is None:
        notes = [*notes, "the Conv had no bias: one was made"]
    if change.scales:
        scale = change.scale.reshape(-1, *[1] * (weight.ndim - 1))
        changed.append(graph.put(node, 1, (weight.astype(np.float64) * scale).astype(weight.dtype), "weight"))
    return changed, weight.dtype.name, error, notes


def _behind(graph: Graph, node: Any, change: HeadChange, note: str) -> Done:
    """An Add (and a Mul before it, for factors) behind the last node that the logits pass."""
    dtype = _float_type(graph, node)
    bias, error, notes = _rounded(change.bias, dtype)
    changed = []
    if change.scales:
        changed.append(graph.insert("Mul", node, change.scale.astype(dtype), "scale"))
        node = next(n for n in graph.graph.node if n.op_type == "Mul" and changed[0] in n.input)
    changed.append(graph.insert("Add", node, bias, "bias"))
    return changed, np.dtype(dtype).name, error, [*notes, note]


def _float_type(graph: Graph, node: Any) -> Any:
    """The float type of a node's output: of its own constants, else of the graph's output."""
    for name in node.input:
        value = graph.constant(name)
        if value is not None and _is_float(value):
            return value.dtype
    kind = graph.graph.output[0].type.tensor_type.elem_type
    found = graph.onnx.helper.tensor_dtype_to_np_dtype(kind) if kind else np.dtype(np.float32)
    return found if found.kind == "f" else np.dtype(np.float32)


# ---------------------------------------------------------------------- files
def export_onnx(
    path: Path,
    change_for: Callable[[int], HeadChange],
    out: Path,
    *,
    head: str | None = None,
    num_classes: int | None = None,
) -> FoldRecord:
    """Write an ONNX file with a calibration in its head; with onnxruntime installed, the two are compared first.

    Parameters
    ----------
    path, out : Path
        The model, and where to write. Weights in a file of their own stay apart, in ``<out>.data``.
    change_for, head, num_classes
        As for `fold_onnx`.

    Returns
    -------
    FoldRecord

    Raises
    ------
    UserError
        An unreadable model; as `fold_onnx`; logits that do not move by the change.
    """
    onnx = load_onnx()
    if out.suffix != ".onnx":
        raise UserError("another format than the source's", where="-o", given=str(out), remedy="end it in .onnx")
    if not path.is_file():
        raise UserError("no such checkpoint file", given=str(path), remedy="check the path")
    try:
        bare = onnx.load(str(path), load_external_data=False)
        external = onnx.external_data_helper
        apart = any(external.uses_external_data(t) for t in bare.graph.initializer)
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's DecodeError, a missing data file, ...
        given = f"{type(error).__name__}: {error}"
        raise UserError("cannot read the ONNX model", where=path, given=given, remedy="export it again") from error
    applied: list[HeadChange] = []

    def change_of(k: int) -> HeadChange:
        applied.append(change_for(k))
        return applied[0]

    record = fold_onnx(model, change_of, head, num_classes)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{out.stem}")
    folder.mkdir()
    try:
        draft, data = folder / out.name, f"{out.name}.data"
        big = apart or model.ByteSize() > 2**31 - 2**20
        onnx.save(model, str(draft), **({"save_as_external_data": True, "location": data} if big else {}))
        record = _try_out(path, draft, applied[0], record)
        if (folder / data).exists():
            (folder / data).replace(out.with_name(data))
        draft.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return replace(record, path=out)


def _try_out(before: Path, after: Path, change: HeadChange, record: FoldRecord) -> FoldRecord:
    """Compare the two models on random inputs, where onnxruntime is there and the inputs can be made up."""
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return replace(record, notes=(*record.notes, "not tried out: onnxruntime is not installed"))
    softmax = any("Softmax" in note for note in record.notes)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        first = runtime.InferenceSession(str(before), options, providers=["CPUExecutionProvider"])
        feeds = {i.name: _random_input(i) for i in first.get_inputs()}
        old = {o.name: v for o, v in zip(first.get_outputs(), first.run(None, feeds))}
    except Exception as error:  # a model that cannot run on made-up inputs is no fault of the change
        reason = " ".join(str(error).split())[:120]
        return replace(record, notes=(*record.notes, f"not tried out on random inputs ({reason})"))
    second = runtime.InferenceSession(str(after), options, providers=["CPUExecutionProvider"])
    new = {o.name: v for o, v in zip(second.get_outputs(), second.run(None, feeds))}
    k = len(change.bias)
    moved = [n for n in old if old[n].shape[-1:] == (k,) and not np.array_equal(old[n], new[n])]
    if not moved and not ((change.bias == 0).all() and not change.scales):
        remedy = "choose the logits with --head"
        raise UserError("no output moves with the change", where=record.head, given=", ".join(old), remedy=remedy)
    if softmax:
        note = "not tried out: the output is probabilities, from which logits + gamma cannot be read off"
        return replace(record, notes=(*record.notes, note))
    if not moved:
        return record
    worst = min(largest_difference(new[n], change.apply(old[n])) for n in moved)
    if worst > max(10 * TOLERANCE, 4 * record.rounding, 2e-2 * (record.dtype == "float16")):
        given = f"outputs differ by {worst:.3g} from logits + gamma"
        remedy = "name the node that makes the logits with --head"
        raise UserError(
            "the calibration cannot be folded into this node", where=record.head, given=given, remedy=remedy
        )
    return replace(record, max_abs_diff=worst)


def _random_input(value: Any) -> NDArray[Any]:
    """Two rows of random numbers; an unknown height or width is taken as 224."""
    dims = [
        d if isinstance(d, int) and d > 0 else (2 if i == 0 else 3 if i == 1 else 224)
        for i, d in enumerate(value.shape)
    ]
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    if value.type not in kinds:
        raise ValueError(f"input {value.name} is {value.type}")
    return np.random.default_rng(0).standard_normal(dims).astype(kinds[value.type])
