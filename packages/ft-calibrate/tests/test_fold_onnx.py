import numpy as np
import pytest
from ft_calibrate.fold_files import export_file
from ft_calibrate.fold_onnx import fold_onnx
from ft_calibrate.head_change import head_change, largest_difference
from ft_calibrate.record import Calibration
from vfm_core.errors import UserError

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

K, D, GAMMA = 5, 4, 3.5
NAMES = tuple("abcde")


def calibration(**changes):
    values = {"method": "alg", "gamma": GAMMA, "classes": NAMES, "seen": ("a", "c", "d"), "absent": ("b", "e")}
    return Calibration(**{**values, "n_train": 60, **changes})


SCALED = calibration(scale=(1.0, 2.0, 0.5, 1.0, 1.5), shift=(0.0, 1.0, 0.0, -2.0, 0.0))


def values(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def graph(nodes, constants, inputs=("x", ("N", D)), outputs=(("z", ("N", K)),), kind=TensorProto.FLOAT):
    shape_of = lambda name, shape: helper.make_tensor_value_info(name, kind, list(shape))  # noqa: E731
    made = helper.make_graph(
        nodes,
        "g",
        [shape_of(*inputs)],
        [shape_of(*o) for o in outputs],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def node(op, inputs, outputs, **attributes):
    return helper.make_node(
        op, inputs.split(), outputs.split(), name=f"{op.lower()}_{outputs.split()[0]}", **attributes
    )


W, B = values(D, K), values(K, seed=1)
IMAGE = ("x", ("N", D, 1, 1))
FLAT = node("Flatten", "c", "z")


def gemm(**attributes):
    return graph(
        [node("Gemm", "x w b", "z", **attributes)], {"w": W.T.copy() if attributes.get("transB") else W, "b": B}
    )


GRAPHS = {
    "gemm": (lambda: gemm(), {"b"}),
    "gemm transposed": (lambda: gemm(transB=1, alpha=0.5, beta=2.0), {"b"}),
    "gemm without use of C": (lambda: gemm(beta=0.0), None),
    "gemm without C": (lambda: graph([node("Gemm", "x w", "z")], {"w": W}), {"bias_calibrated"}),
    "gemm with row C": (lambda: graph([node("Gemm", "x w b", "z")], {"w": W, "b": B[None]}), {"b"}),
    "gemm with scalar C": (lambda: graph([node("Gemm", "x w b", "z")], {"w": W, "b": B[:1]}), {"b"}),
    "matmul add": (lambda: graph([node("MatMul", "x w", "m"), node("Add", "m b", "z")], {"w": W, "b": B}), {"b"}),
    "add matmul": (lambda: graph([node("MatMul", "x w", "m"), node("Add", "b m", "z")], {"w": W, "b": B}), {"b"}),
    "matmul": (lambda: graph([node("MatMul", "x w", "z")], {"w": W}), None),
    "conv": (
        lambda: graph([node("Conv", "x w b", "c"), FLAT], {"w": W.T.reshape(K, D, 1, 1).copy(), "b": B}, IMAGE),
        {"b"},
    ),
    "conv without bias": (
        lambda: graph([node("Conv", "x w", "c"), FLAT], {"w": W.T.reshape(K, D, 1, 1).copy()}, IMAGE),
        {"bias_calibrated"},
    ),
    "conv, then pooling": (
        lambda: graph(
            [node("Conv", "x w b", "c1"), node("GlobalAveragePool", "c1", "c"), FLAT],
            {"w": W.T.reshape(K, D, 1, 1).copy(), "b": B},
            ("x", ("N", D, 2, 2)),
        ),
        None,
    ),
    "constant nodes": (
        lambda: graph(
            [
                helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(B)),
                node("Identity", "k", "b"),
                node("Gemm", "x w b", "z"),
            ],
            {"w": W},
        ),
        {"b_calibrated"},
    ),
    "a scaled cosine": (
        lambda: graph([node("MatMul", "x w", "m"), node("Mul", "m s", "z")], {"w": W, "s": np.float32(20).reshape(1)}),
        None,
    ),
}


def write(model, path):
    onnx.save(model, str(path))
    return path


def run(path, dtype=np.float32):
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    shape = [d if isinstance(d, int) else 3 for d in session.get_inputs()[0].shape]
    return session.run(None, {session.get_inputs()[0].name: values(*shape, seed=7, dtype=dtype)})


@pytest.mark.parametrize("cal", [calibration(), SCALED], ids=["gamma", "factors"])
@pytest.mark.parametrize("name", GRAPHS)
def test_outputs_equal_logits_plus_gamma(tmp_path, name, cal):
    make, changed = GRAPHS[name]
    source = write(make(), tmp_path / "m.onnx")
    record = export_file(source, cal, tmp_path / "o.onnx")
    (z,), (got,) = run(source), run(tmp_path / "o.onnx")
    assert largest_difference(got, cal.apply(z.astype(np.float64))) <= 1e-5
    assert (got.argmax(1) == cal.apply(z).argmax(1)).all()
    onnx.checker.check_model(onnx.load(str(tmp_path / "o.onnx")))
    assert record.max_abs_diff is not None and record.max_abs_diff <= 1e-5
    if changed is not None and cal.scale is None:
        assert set(record.changed) == changed
        assert len(onnx.load(str(tmp_path / "o.onnx")).graph.node) == len(make().graph.node)  # no cost at inference


def test_a_constant_that_others_use_is_copied():
    nodes = [node("Gemm", "x w b", "z"), node("Gemm", "x w b", "other")]
    model = graph(nodes, {"w": W, "b": B}, outputs=(("z", ("N", K)), ("other", ("N", K))))
    record = fold_onnx(model, lambda k: head_change(SCALED, k), head="z")
    kept = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert np.array_equal(kept["b"], B) and np.array_equal(kept["w"], W)
    assert set(record.changed) == {"b_calibrated", "w_calibrated"}
    assert list(model.graph.node[1].input) == ["x", "w", "b"]


def test_a_node_of_several_outputs_and_names_is_chosen(tmp_path):
    nodes = [node("Gemm", "x w b", "z"), node("Gemm", "x v", "e")]
    model = graph(nodes, {"w": W, "b": B, "v": values(D, 3)}, outputs=(("e", ("N", 3)), ("z", ("N", K))))
    source = write(model, tmp_path / "m.onnx")
    assert export_file(source, calibration(), tmp_path / "a.onnx").head == "gemm_z"  # the output of K columns
    record = export_file(source, GAMMA, tmp_path / "b.onnx", absent=["1"], head="gemm_e")
    assert (record.num_classes, record.moved) == (3, 1)
    with pytest.raises(UserError, match="several outputs in the ONNX graph: e, z"):
        export_file(source, GAMMA, tmp_path / "c.onnx", absent=["1"])
    with pytest.raises(UserError, match="no such node or value"):
        export_file(source, calibration(), tmp_path / "c.onnx", head="nothing")


def test_the_change_goes_before_a_softmax(tmp_path):
    nodes = [node("Gemm", "x w b", "l"), node("Softmax", "l", "z", axis=-1)]
    source = write(graph(nodes, {"w": W, "b": B}), tmp_path / "m.onnx")
    record = export_file(source, calibration(), tmp_path / "o.onnx")
    (p,), (got,) = run(source), run(tmp_path / "o.onnx")
    z = np.log(p.astype(np.float64)) + calibration().bias()
    np.testing.assert_allclose(got, np.exp(z) / np.exp(z).sum(1, keepdims=True), atol=1e-6)
    assert "Softmax" in record.line() and "not tried out: the output is probabilities" in record.line()


def test_half_models_keep_their_dtype_and_say_when_gamma_rounds(tmp_path):
    half = {"w": W.astype(np.float16), "b": B.astype(np.float16)}
    source = write(graph([node("Gemm", "x w b", "z")], half, kind=TensorProto.FLOAT16), tmp_path / "m.onnx")
    record = export_file(source, calibration(gamma=3.14159), tmp_path / "o.onnx")
    (z,), (got,) = run(source, np.float16), run(tmp_path / "o.onnx", np.float16)
    assert got.dtype == np.float16 and record.dtype == "float16" and "rounds the new bias" in record.line()
    assert largest_difference(got, calibration(gamma=3.14159).apply(z.astype(np.float64))) < 0.02


def test_weights_in_a_file_of_their_own_stay_apart(tmp_path):
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "m.onnx"
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    onnx.save(gemm(), str(source), **options)
    export_file(source, calibration(), tmp_path / "o.onnx")
    (z,), (got,) = run(source), run(tmp_path / "o.onnx")
    assert largest_difference(got, calibration().apply(z)) <= 1e-5


def test_a_layer_that_does_not_make_the_logits_is_refused_and_nothing_written(tmp_path):
    nodes = [node("Gemm", "x w b", "l"), node("Mul", "l s", "z")]
    source = write(graph(nodes, {"w": W, "b": B, "s": np.float32(2).reshape(1)}), tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"cannot be folded into this node in gemm_l: outputs differ"):
        export_file(source, calibration(), tmp_path / "o.onnx", head="gemm_l")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_nothing_is_overwritten_folded_twice_or_guessed(tmp_path):
    source = write(gemm(), tmp_path / "m.onnx")
    export_file(source, calibration(), tmp_path / "o.onnx")
    with pytest.raises(UserError, match="output exists"):
        export_file(source, calibration(), tmp_path / "o.onnx")
    with pytest.raises(UserError, match="folded in already"):
        export_file(tmp_path / "o.onnx", calibration(), tmp_path / "p.onnx")
    with pytest.raises(UserError, match=r"end it in \.onnx"):
        export_file(source, calibration(), tmp_path / "o.pth")
    with pytest.raises(UserError, match="no such checkpoint file"):
        export_file(tmp_path / "absent.onnx", calibration(), tmp_path / "p.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot read the ONNX model"):
        export_file(tmp_path / "bad.onnx", calibration(), tmp_path / "p.onnx")
    with pytest.raises(UserError, match="6 calibrated classes, 5 logits"):
        export_file(source, calibration(classes=(*NAMES, "f"), absent=("b", "e", "f")), tmp_path / "p.onnx")


def test_excluded_classes_are_never_predicted(tmp_path):
    cal = calibration(absent=("b",), remaining=("e",), remaining_mode="exclude")
    export_file(write(gemm(), tmp_path / "m.onnx"), cal, tmp_path / "o.onnx")
    (got,) = run(tmp_path / "o.onnx")
    assert (got[:, 4] == -np.inf).all() and not np.isnan(got).any()


def test_an_exported_network_gives_what_the_folded_module_gives(tmp_path):
    import torch
    from ft_calibrate.fold import fold_into_head

    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(4, K),
        ).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=False, input_names=["x"], output_names=["logits"])
    export_file(tmp_path / "m.onnx", calibration(), tmp_path / "o.onnx")
    session = runtime.InferenceSession(str(tmp_path / "o.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, fold_into_head(model, calibration())(x).numpy(), atol=1e-5)
