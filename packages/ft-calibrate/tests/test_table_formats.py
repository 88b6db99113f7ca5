"""Every format of score files: round trips, streaming, options, and refusal of what is damaged or pickled."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from ft_calibrate.table_formats import TableOptions, open_source
from ft_calibrate.tables import LogitTable, iter_chunks, open_table, read_table, write_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vfm_core.errors import UserError

WRITTEN = ("npz", "csv", "tsv", "parquet", "feather", "pt", "safetensors")


class Payload:
    """Stands for the pickled objects of published evaluations."""


def table(n: int = 7) -> LogitTable:
    rng = np.random.default_rng(0)
    names = ["a", "b.c", 'd,"e"', "f"]
    labels = np.array([0, 1, -1, 3, 2, 0, 1])[:n]
    features = rng.normal(size=(n, 2)).astype(np.float32)
    return LogitTable(rng.normal(size=(n, 4)).astype(np.float32), names, labels, features, [f"i{i}" for i in range(n)])


def assert_same(read: LogitTable, t: LogitTable) -> None:
    assert read.classes == t.classes and read.ids == t.ids
    np.testing.assert_array_equal(read.logits, t.logits)
    np.testing.assert_array_equal(read.labels, t.labels)
    np.testing.assert_array_equal(read.features, t.features)


@pytest.mark.parametrize("suffix", WRITTEN)
def test_round_trip_whole_and_in_pieces(tmp_path, suffix):
    t = table()
    path = write_table(t, tmp_path / f"t.{suffix}")
    assert_same(read_table(path), t)
    parts = list(iter_chunks(path, 3))
    assert [len(p) for p in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([p.logits for p in parts]), t.logits)
    file = open_table(path)
    np.testing.assert_array_equal(file.labels(), t.labels)
    assert file.kind == "logit"
    bare = write_table(LogitTable(t.logits), tmp_path / f"bare.{suffix}")
    again = read_table(bare)
    assert again.labels is None and again.ids is None and again.classes == ["0", "1", "2", "3"]


names = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=6).filter(str.strip)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(classes=st.lists(names, min_size=2, max_size=5, unique=True), seed=st.integers(0, 99), double=st.booleans())
def test_any_class_names_and_any_floats_survive(tmp_path, classes, seed, double):
    rng = np.random.default_rng(seed)
    z = (rng.normal(size=(3, len(classes))) * 10.0 ** rng.integers(-20, 20)).astype("f8" if double else "f4")
    t = LogitTable(z, classes, rng.integers(0, len(classes), 3))
    for suffix in WRITTEN:
        read = read_table(write_table(t, tmp_path / f"t.{suffix}"))
        assert read.classes == t.classes, suffix
        np.testing.assert_array_equal(read.logits, t.logits)
        np.testing.assert_array_equal(read.labels, t.labels)


def test_uncompressed_members_are_mapped_and_compressed_ones_streamed(tmp_path):
    t = table()
    assert isinstance(read_table(write_table(t, tmp_path / "t.npz")).logits, np.memmap)
    path = tmp_path / "c.npz"
    np.savez_compressed(path, logits=t.logits, labels=t.labels, classes=np.array(t.classes), ids=np.array(t.ids))
    source = open_source(path)
    assert source.whole() is None
    read = read_table(path)
    np.testing.assert_array_equal(read.logits, t.logits)
    assert read.ids == t.ids and read.classes == t.classes
    column = np.asfortranarray(t.logits)
    np.savez_compressed(path, logits=column)
    np.testing.assert_array_equal(read_table(path).logits, t.logits)
    np.savez(path, logits=column)
    np.testing.assert_array_equal(read_table(path).logits, t.logits)


def test_npy_alone_folder_and_shards(tmp_path):
    t = table()
    np.save(tmp_path / "z.npy", t.logits)
    np.testing.assert_array_equal(read_table(tmp_path / "z.npy").logits, t.logits)
    folder = tmp_path / "arrays"
    folder.mkdir()
    for name, values in {"logits": t.logits, "labels": t.labels, "classes": t.classes, "ids": t.ids}.items():
        np.save(folder / f"{name}.npy", np.asarray(values))
    read = read_table(folder)
    assert isinstance(read.logits, np.memmap) and read.ids == t.ids
    np.testing.assert_array_equal(read.labels, t.labels)
    for suffix in ("npz", "parquet"):
        shards = tmp_path / suffix
        for i, part in enumerate(t.chunks(3)):
            write_table(part, shards / f"part-{i:05d}.{suffix}")
        (shards / "skipped.csv").write_text("path,reason\n")
        assert_same(read_table(shards), t)
    write_table(LogitTable(np.zeros((1, 2))), tmp_path / "npz" / "part-9.npz")
    with pytest.raises(UserError, match="shards of different classes"):
        read_table(tmp_path / "npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no score files"):
        read_table(tmp_path / "empty")


def test_list_columns_of_parquet_and_feather(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.feather as feather
    import pyarrow.parquet as pq

    t = table()
    rows = pa.table({"logits": t.logits.tolist(), "label": ["a", "f"] * 3 + ["a"]})
    meta = {"ft_calibrate.classes": '["a", "b", "c", "f"]'}
    pq.write_table(rows.replace_schema_metadata(meta), tmp_path / "l.parquet")
    read = read_table(tmp_path / "l.parquet")
    np.testing.assert_array_equal(read.logits.astype(np.float32), t.logits)
    assert read.classes == ["a", "b", "c", "f"] and read.labels.tolist() == [0, 3] * 3 + [0]
    feather.write_feather(rows.drop_columns("label"), tmp_path / "l.feather")
    assert read_table(tmp_path / "l.feather").classes == ["0", "1", "2", "3"]
    pq.write_table(pa.table({"logits": [[1.0, 2.0], [1.0, 2.0, 3.0]]}), tmp_path / "l.parquet")
    with pytest.raises(UserError, match="rows of different lengths"):
        read_table(tmp_path / "l.parquet")
    pq.write_table(pa.table({"logit_a": ["x"], "logit_b": ["y"]}), tmp_path / "l.parquet")
    with pytest.raises(UserError, match="a score column holds no numbers"):
        read_table(tmp_path / "l.parquet")


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    t = table()
    features = datasets.Features(
        {
            "logits": datasets.Sequence(datasets.Value("float32")),
            "label": datasets.ClassLabel(names=["p", "q", "r", "s"]),
            "id": datasets.Value("string"),
        }
    )
    columns = {"logits": t.logits.tolist(), "label": [0, 1, 2, 3, 3, 2, 1], "id": t.ids}
    data = datasets.Dataset.from_dict(columns, features=features)
    data.save_to_disk(tmp_path / "one")
    read = read_table(tmp_path / "one")
    np.testing.assert_array_equal(read.logits, t.logits)
    assert read.classes == ["p", "q", "r", "s"] and read.labels.tolist() == columns["label"] and read.ids == t.ids
    assert [len(p) for p in iter_chunks(tmp_path / "one", 4)] == [4, 3]
    datasets.DatasetDict({"train": data, "test": data.select([6, 0])}).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match=r"which split .*splits train, test; give --split"):
        read_table(tmp_path / "two")
    assert read_table(tmp_path / "two", options=TableOptions(split="test")).ids == ["i6", "i0"]


def test_names_of_columns_by_option(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("file,p_ant,p_bee,truth,other\nx.jpg,1,2,bee,0\ny.jpg,3,4,ant,0\n")
    with pytest.raises(UserError, match=r"no column logit_<class> .*columns are file, p_ant.*see --logit-prefix"):
        read_table(path)
    options = TableOptions(logit_prefix="p_", label_col="truth", id_col="file")
    read = read_table(path, options=options)
    assert read.classes == ["ant", "bee"] and read.labels.tolist() == [1, 0] and read.ids == ["x.jpg", "y.jpg"]
    explicit = read_table(path, options=TableOptions(logit_cols=("p_bee", "p_ant"), logit_prefix="p_"))
    assert (
        explicit.classes == ["bee", "ant"] and explicit.logits.tolist() == [[2, 1], [4, 3]] and explicit.labels is None
    )
    for wrong, option in (
        (TableOptions(logit_cols=("p_cat",)), "--logit-cols"),
        (TableOptions("p_", None, "y"), "label"),
    ):
        with pytest.raises(UserError, match=f"no column .*{option}"):
            read_table(path, options=wrong)
    npz = tmp_path / "t.npz"
    np.savez(npz, logits=2 * np.eye(2), truth=np.array([1, 0]))
    assert read_table(npz, options=TableOptions(label_col="truth")).labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="no array y"):
        read_table(npz, options=TableOptions(label_col="y"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("logit_a,logit_b\n", "no rows"),
        ("logit_a,logit_b\n1,2\n3\n", r"row of another length in .*line 3: 1 cells for 2 columns"),
        ("logit_a,logit_b\n1,2\n3,x\n", r"not a number in .*line 3, column logit_b: 'x'"),
        ("logit_a,logit_b\n1,2\n3,\n", r"NaN score in .*row 1, column b"),
        ("logit_a,logit_a\n1,2\n", "column names repeat"),
    ],
)
def test_faulty_text(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_table(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_are_refused_with_the_way_out(tmp_path):
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "ckpt_0").write_bytes(pickle.dumps({"logits": [1]}))
    (evaluation / "all.pkl").write_bytes(pickle.dumps([1], protocol=0))
    torch.save({"logits": torch.eye(2), "extra": Payload()}, evaluation / "e.pt")
    torch.save({"logits": torch.eye(2), "extra": Payload()}, evaluation / "epoch_3")
    (evaluation / "plain.pth").write_bytes(pickle.dumps(Payload()))
    for name in ("ckpt_0", "all.pkl", "e.pt", "epoch_3", "plain.pth"):
        with pytest.raises(UserError, match=r"pickled Python object.*extract the logits again"):
            read_table(evaluation / name)
    np.savez(tmp_path / "o.npz", logits=2 * np.eye(2), ids=np.array(["a", None], dtype=object))
    with pytest.raises(UserError, match=r"pickled Python object.*store names as strings"):
        read_table(tmp_path / "o.npz")
    np.save(tmp_path / "o.npy", np.array([[1, None]], dtype=object))
    with pytest.raises(UserError, match="pickled Python object"):
        read_table(tmp_path / "o.npy")


@pytest.mark.parametrize("suffix", ["npz", "parquet", "feather", "pt", "safetensors", "npy"])
def test_torn_and_foreign_files(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    if suffix == "npy":
        np.save(path, table().logits)
    else:
        write_table(table(), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"not such a file at all", b""):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_table(path)
        assert str(path) in str(caught.value)


def test_missing_and_unknown(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "t.npz")
    (tmp_path / "t.xlsx").write_bytes(b"PK..")
    with pytest.raises(UserError, match="unknown format of score file"):
        read_table(tmp_path / "t.xlsx")
    with pytest.raises(UserError, match="unknown format of score file"):
        write_table(table(), tmp_path / "t.xlsx")
    np.savez(tmp_path / "t.npz", scores=np.eye(2))
    with pytest.raises(UserError, match=r"no array logits in .*arrays are scores"):
        read_table(tmp_path / "t.npz")
    np.savez(tmp_path / "t.npz", logits=2 * np.eye(3), labels=np.array([0, 1]))
    with pytest.raises(UserError, match="labels of another length"):
        read_table(tmp_path / "t.npz")
    torch.save(torch.eye(2), tmp_path / "t.pt")
    with pytest.raises(UserError, match="not a dictionary of tensors"):
        read_table(tmp_path / "t.pt")


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    import sys

    path = write_table(table(), tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'need pyarrow.*pip install "ft-calibrate\[parquet\]"'):
        read_table(path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"ft-calibrate\[datasets\]"):
        read_table(tmp_path)


def test_shapes_that_are_no_table_are_refused(tmp_path):
    path = tmp_path / "t.npz"
    for arrays, message in (
        ({"logits": np.zeros(6)}, r"logits must be \(N, K\) .*shape \(6,\)"),
        ({"logits": np.zeros((2, 3, 1))}, r"logits must be \(N, K\)"),
        ({"logits": np.zeros((2, 3)), "labels": np.int64(1)}, r"labels must be \(N,\)"),
        ({"logits": np.zeros((2, 3)), "labels": np.zeros((2, 1), int)}, r"labels must be \(N,\)"),
        ({"logits": np.zeros((2, 3)), "features": np.zeros(2)}, r"features must be \(N, D\)"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=message):
            open_table(path)
    np.save(tmp_path / "z.npy", np.zeros(6))
    with pytest.raises(UserError, match=r"logits must be \(N, K\)"):
        open_table(tmp_path / "z.npy")


def test_arrays_that_nothing_reads_are_named(tmp_path, caplog):
    path = tmp_path / "t.npz"
    np.savez(path, logits=np.zeros((2, 3)), class_names=["a", "b", "c"], targets=[0, 1], label=[0, 1], zz=[1])
    with caplog.at_level("WARNING"):
        open_table(path)
    told = [record.message for record in caplog.records]
    assert [text.split()[1] for text in told] == ["class_names", "targets", "zz"]
    assert "(did you mean classes?)" in told[0] and "(did you mean labels?)" in told[1]
    assert told[2].endswith("is not read")
    caplog.clear()
    np.savez(path, logits=np.zeros((2, 3)), labels=[0, 1], pseudo_seen=[0, 1], train_logits=np.zeros((4, 3)))
    with caplog.at_level("WARNING"):
        open_table(path)
    assert not caplog.records
