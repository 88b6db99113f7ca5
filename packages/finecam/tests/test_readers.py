import pickle
import subprocess
import sys

import numpy as np
import pytest
from finecam.readers import Discs, LabelRegions, around, checked_box, numbers, read_lines, register_readers
from hypothesis import given, settings
from hypothesis import strategies as st
from vfm_core.errors import UserError


@settings(deadline=None)
@given(x=st.floats(-5, 40), y=st.floats(-5, 40), radius=st.floats(0, 20))
def test_discs(x, y, radius):
    discs = Discs({"eye": (x, y)}, (30, 20), radius)
    mask = discs["eye"]
    assert mask.shape == (20, 30) and discs.radius >= 1
    rows, columns = np.nonzero(mask)
    assert np.all((columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= discs.radius**2 + 1e-9)
    if 0 <= x < 30 and 0 <= y < 20:
        assert mask[int(y), int(x)], "the point's own pixel is inside"
    assert np.array_equal(pickle.loads(pickle.dumps(discs))["eye"], mask)
    with pytest.raises(KeyError):
        discs["beak"]


def test_label_regions_are_lazy_and_small_to_send():
    regions = LabelRegions(np.zeros((500, 500), dtype=np.uint8), {0: "a", 1: "b"})
    assert dict(regions).keys() == {"a"} and "b" not in regions and regions["a"].all()
    assert len(pickle.dumps(Discs({str(i): (1, 2) for i in range(15)}, (500, 400), 3))) < 1000


def test_formats_are_imported_when_needed():
    code = (
        "import sys; from finecam.readers import register_readers; register_readers(); "
        "print([m for m in sys.modules if m.startswith(('finecam.readers.', 'scipy.io', 'webdataset', 'braceexpand'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registering_twice_does_nothing():
    register_readers()
    register_readers()


def test_lines_fields_and_numbers(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("1  a b \n\n2 c\n", encoding="utf-8")
    assert list(read_lines(path, 2, rest=True)) == [(1, ["1", "a b"]), (3, ["2", "c"])]
    assert list(read_lines(path, 2)) == [(1, ["1", "a"]), (3, ["2", "c"])]
    path.write_text("a b c\n\n2 c\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"expected 3 fields in .*lines\.txt, line 3: '2 c'"):
        list(read_lines(path, 3))
    with pytest.raises(UserError, match="is missing"):
        list(read_lines(tmp_path / "gone.txt", 1))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        list(read_lines(path, 1))
    assert numbers(float, ["1", "2.5"], path, 7) == [1.0, 2.5]
    for text in ("x", "inf", ""):
        with pytest.raises(UserError, match=r"not a number in .*line 7"):
            numbers(float, [text], path, 7)


def test_boxes():
    assert around([(1, 5, 3, 9), (0, 6, 2, 12)]) == (0, 5, 3, 12)
    assert checked_box(0, 0, 1, 1, "x") == (0.0, 0.0, 1.0, 1.0)
    with pytest.raises(UserError, match="empty box in x"):
        checked_box(0, 0, float("nan"), 1, "x")
