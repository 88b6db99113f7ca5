"""LogitTable: shapes, order of classes, pieces, labels, kinds, masks; reading whole equals reading in pieces."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from ft_calibrate.tables import LogitTable, align, file_sha256, iter_chunks, open_table, read_table, write_table
from vfm_core.errors import UserError


def table(n: int = 9, classes: tuple[str, ...] = ("ant", "bee", "cat"), seed: int = 0) -> LogitTable:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, len(classes))).astype(np.float32)
    return LogitTable(logits, list(classes), rng.integers(-1, len(classes), n), ids=[f"s{i}" for i in range(n)])


def test_columns_follow_names_and_labels_follow_columns():
    one = table()
    other = one.reordered(["cat", "ant", "bee"])
    assert other.classes == ["cat", "ant", "bee"]
    np.testing.assert_array_equal(other.logits[:, 0], one.logits[:, 2])
    names = [one.classes[y] if y >= 0 else None for y in one.labels]
    assert [other.classes[y] if y >= 0 else None for y in other.labels] == names
    back = other.reordered(one.classes)
    np.testing.assert_array_equal(back.logits, one.logits)
    np.testing.assert_array_equal(back.labels, one.labels)


def test_align_by_name_and_refusals(caplog):
    a, b = table(), table(seed=1).reordered(["bee", "cat", "ant"])
    first, second = align([a, b])
    assert first.classes == second.classes == a.classes
    np.testing.assert_array_equal(second.logits, table(seed=1).logits)
    with pytest.raises(UserError, match=r"classes differ.*missing bee; unexpected bat"):
        align([a, table(classes=("ant", "bat", "cat"))])
    with pytest.raises(UserError, match="different numbers of classes, and no class names"):
        align([a, LogitTable(np.zeros((2, 4)))])
    with caplog.at_level(logging.WARNING):
        _, unnamed = align([a, LogitTable(np.zeros((2, 3)))])
    assert unnamed.classes == a.classes and "columns taken in order" in caplog.text
    unnamed, named = align([LogitTable(np.zeros((2, 3))), b])
    assert unnamed.classes == named.classes == b.classes


def test_subset_and_chunks():
    t = table()
    assert [len(part) for part in t.chunks(4)] == [4, 4, 1]
    mask = t.labels >= 0
    part = t.subset(mask)
    assert part.ids == [i for i, keep in zip(t.ids, mask) if keep]
    np.testing.assert_array_equal(part.logits, t.logits[mask])
    np.testing.assert_array_equal(t.subset(np.array([2, 0])).logits, t.logits[[2, 0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": np.zeros(3)}, r"scores must be \(N, K\)"),
        ({"logits": np.zeros((2, 3)), "classes": ["a", "b"]}, "class names do not fit"),
        ({"logits": np.zeros((2, 2)), "classes": ["a", "a"]}, "class names repeat: a"),
        ({"logits": np.zeros((2, 2)), "labels": np.array([0])}, "labels of another length"),
        ({"logits": np.zeros((2, 2)), "labels": np.array([0, 2])}, "labels that are no column"),
        ({"logits": np.zeros((2, 2)), "ids": ["a"]}, "ids of another length"),
        ({"logits": np.zeros((2, 2)), "kind": "odds"}, "unknown kind"),
    ],
)
def test_tables_that_contradict_themselves(arguments, message):
    with pytest.raises(UserError, match=message):
        LogitTable(**arguments)


def test_classes_named_by_numbers_are_names_not_positions(tmp_path):
    path = tmp_path / "r.npz"
    np.savez(path, logits=2 * np.eye(3), labels=np.array([245, 341, 613]), classes=np.array([341, 245, 613]))
    assert read_table(path).labels.tolist() == [1, 0, 2]
    np.savez(path, logits=2 * np.eye(3), labels=np.array([0, 1, 2]), classes=np.array([341, 245, 613]))
    with pytest.raises(UserError, match=r"not among the classes in labels of .*r\.npz: 0, 1, 2; the classes are named"):
        read_table(path)
    one = LogitTable(2 * np.eye(3, dtype=np.float32), ["7", "3", "5"], np.array([2, -1, 0]))
    for suffix in ("npz", "csv", "pt", "safetensors", "parquet"):
        assert read_table(write_table(one, tmp_path / f"n.{suffix}")).labels.tolist() == [2, -1, 0], suffix


def test_labels_by_name_number_and_none(tmp_path):
    path = tmp_path / "t.npz"
    np.savez(path, logits=2 * np.eye(3), labels=np.array(["cat", "", "ant"]), classes=np.array(["ant", "bee", "cat"]))
    assert read_table(path).labels.tolist() == [2, -1, 0]
    np.savez(path, logits=2 * np.eye(3), labels=np.array([0.0, np.nan, 2.0]))
    assert read_table(path).labels.tolist() == [0, -1, 2]
    for bad in (0.5, np.inf):
        np.savez(path, logits=2 * np.eye(3), labels=np.array([bad, 1, 2]))
        with pytest.raises(UserError, match=f"labels are no whole numbers .*: {bad}"):
            read_table(path)
    np.savez(
        path, logits=2 * np.eye(3), labels=np.array(["ant", "bea", "cat"]), classes=np.array(["ant", "bee", "cat"])
    )
    with pytest.raises(UserError, match=r"not among the classes in labels of .*t\.npz: bea; did you mean bee\?"):
        read_table(path)


def test_probabilities_become_logs_and_zeros_are_counted(tmp_path, caplog):
    z = np.array([[1.0, 0.0], [0.25, 0.75]], dtype=np.float32)
    path = tmp_path / "p.npz"
    np.savez(path, logits=z)
    with caplog.at_level(logging.WARNING):
        read = read_table(path, input="prob")
    np.testing.assert_allclose(read.logits, np.log(np.maximum(z.astype(float), 1e-30)))
    assert read.kind == "prob" and "1 probabilities" in caplog.text
    again = read_table(write_table(read, tmp_path / "q.npz"))  # the log has been taken: not taken twice
    np.testing.assert_array_equal(again.logits, read.logits)
    assert again.kind == "logprob"
    with pytest.raises(UserError, match=r"look like probabilities .*not logits in .*p\.npz; say --input prob"):
        read_table(path)
    caplog.clear()
    file = open_table(path, input="logit")
    with caplog.at_level(logging.WARNING):
        list(file.chunks())
    assert file.looks_like_probabilities and "look like probabilities" in caplog.text
    np.savez(path, logits=z - 1)
    with pytest.raises(UserError, match=r"not a probability .*: -1 at row 0, column 1; use --input logit"):
        read_table(path, input="prob")
    np.savez(path, logits=z)
    with pytest.raises(UserError, match=r"not a log-probability .*: 1 at row 0, column 0"):
        read_table(path, input="logprob")
    with pytest.raises(UserError, match="unknown kind of scores in --input"):
        open_table(path, input="odds")


def test_nan_is_an_error_or_dropped(tmp_path):
    z = np.ones((5, 3), dtype=np.float32)
    z[:, 1] = -np.inf  # a masked class
    z[2, 2], z[4, 0] = np.nan, -np.inf
    path = write_table(LogitTable(z, ["ant", "bee", "cat"], ids=list("abcde")), tmp_path / "n.npz")
    for rows in (None, 1, 2):
        with pytest.raises(UserError, match=rf"NaN score in {path}: id c \(row 2\), column cat; .*--nan drop"):
            list(iter_chunks(path, rows))
    with pytest.raises(UserError, match="NaN score"):
        read_table(path)
    for rows in (None, 1, 2):
        file = open_table(path, nan="drop")
        kept = [i for part in file.chunks(rows) for i in part.ids]
        assert kept == ["a", "b", "d"] and file.dropped == 2 and file.rows == 3
    with pytest.raises(UserError, match="unknown treatment of NaN in --nan"):
        open_table(path, nan="ignore")
    write_table(LogitTable(np.full((2, 2), np.nan)), path)
    with pytest.raises(UserError, match=r"no rows in .*: all 2 dropped"):
        read_table(path, nan="drop")


def test_opened_with_other_order_hands_out_that_order(tmp_path):
    t = table()
    path = write_table(t, tmp_path / "t.npz")
    want = ["cat", "bee", "ant"]
    read = read_table(path, classes=want)
    np.testing.assert_array_equal(read.logits, t.reordered(want).logits)
    np.testing.assert_array_equal(read.labels, t.reordered(want).labels)
    np.testing.assert_array_equal(open_table(path, classes=want).labels(), read.labels)
    with pytest.raises(UserError, match="classes differ"):
        open_table(path, classes=["ant", "bee", "dog"])


def test_half_precision_and_whole_numbers(tmp_path):
    path = tmp_path / "h.npz"
    np.savez(path, logits=np.full((2, 2), 3, dtype=np.float16))
    assert read_table(path).logits.dtype == np.float32
    np.savez(path, logits=np.full((2, 2), 3, dtype=np.int32))
    assert read_table(path).logits.dtype == np.float64
    np.savez(path, logits=np.array([["a", "b"]]))
    with pytest.raises(UserError, match="scores are no numbers"):
        read_table(path)


def test_hash_of_file_and_folder(tmp_path):
    a = write_table(table(), tmp_path / "d" / "a.npz")
    one = file_sha256(tmp_path / "d")
    assert len(file_sha256(a)) == 64 and one == file_sha256(tmp_path / "d")
    a.rename(a.with_name("b.npz"))
    assert file_sha256(tmp_path / "d") != one


def test_numbers_that_are_names_and_could_be_columns_are_told(tmp_path, caplog):
    path = tmp_path / "n.npz"
    np.savez(path, logits=np.zeros((2, 3)), labels=[1, 2], classes=["1", "2", "3"])
    with caplog.at_level(logging.WARNING):
        assert read_table(path).labels.tolist() == [0, 1]
    assert "1 is the class named '1', column 0" in caplog.text
    for labels in (["1", "2"], [3, 3]):  # texts are names; 3 is no column
        caplog.clear()
        np.savez(path, logits=np.zeros((2, 3)), labels=labels, classes=["1", "2", "3"])
        with caplog.at_level(logging.WARNING):
            read_table(path)
        assert not caplog.records
    np.savez(path, logits=np.zeros((2, 3)), labels=[0, 2], classes=["1", "2", "3"])
    with pytest.raises(UserError, match=r"0; the classes are named 1, 2, 3, and a number is such a name, not a column"):
        read_table(path)
