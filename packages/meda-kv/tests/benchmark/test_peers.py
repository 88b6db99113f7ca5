from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from meda_kv.benchmark import kvpress_peer
from meda_kv.benchmark.peers import SCRIPT, kvpress_rows
from meda_kv.benchmark.subjects import Subject

SHAPE = {"hidden": 16, "intermediate": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8}
TASK = {
    "shape": SHAPE,
    "context": 40,
    "ratios": [1.0, 0.5],
    "rounds": 1,
    "steps": 2,
    "dtype": "float32",
    "device": "cpu",
    "seed": 0,
}


class CutPress:
    """Stands for kvpress.SnapKVPress: a context manager that cuts the cache when the prompt has been read."""

    def __init__(self, compression_ratio: float) -> None:
        self.keep = 1 - compression_ratio

    @contextmanager
    def __call__(self, model: Any) -> Any:
        def cut(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            for layer in kwargs["past_key_values"].layers:
                count = round(self.keep * layer.keys.shape[2])
                layer.keys, layer.values = layer.keys[:, :, :count].clone(), layer.values[:, :, :count].clone()

        handle = model.register_forward_hook(cut, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def stub_subject(recipe: dict[str, int] | None = SHAPE) -> Subject:
    model = torch.nn.Linear(2, 2)
    model.dtype = torch.float32  # type: ignore[assignment]
    return Subject("bench:toy", model, torch.device("cpu"), recipe, torch.arange(4))


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_the_script_measures_what_the_press_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("kvpress")
    module.SnapKVPress = CutPress  # type: ignore[attr-defined]
    module.__version__ = "0.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvpress", module)
    with torch.random.fork_rng():
        answer = kvpress_peer.measure(TASK)
    assert answer["versions"]["kvpress"] == "0.0"
    full, half = answer["rows"]
    slot = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, size, bytes
    assert full["kv_bytes"] == full["kv_bytes_full"] == half["kv_bytes_full"] == 40 * slot
    assert half["kv_bytes"] == 20 * slot
    assert full["kv_bytes_end"] == 44 * slot and half["kv_bytes_end"] == 24 * slot
    assert (full["method"], half["method"], half["ratio"]) == ("kvpress none", "kvpress snapkv", 0.5)
    assert min(full["decode_ms_per_token"], full["prefill_s"], half["prefill_s"]) > 0


def test_the_script_says_when_kvpress_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    assert "kvpress is not installed" in kvpress_peer.measure(TASK)["skipped"]


def test_the_script_imports_nothing_of_ours() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert "import meda_kv" not in text and "from meda_kv" not in text and "vfm_core" not in text


def test_rows_come_from_the_other_python(tmp_path: Path) -> None:
    answer = {"rows": [{"method": "kvpress snapkv", "ratio": 0.2, "context": 64}], "versions": {"kvpress": "9"}}
    copy = tmp_path / "task.json"
    python = executable(
        tmp_path / "python",
        f"import sys\nopen({str(copy)!r}, 'w').write(sys.stdin.read())\n"
        f"print('noise')\nprint({json.dumps(answer)!r})\n",
    )
    rows, reason = kvpress_rows(python, stub_subject(), 64, [0.2, 1.0])
    assert reason is None
    assert rows == [
        {"method": "kvpress snapkv", "ratio": 0.2, "context": 64, "model": "bench:toy", "peer": "kvpress 9"}
    ]
    task = json.loads(copy.read_text())
    assert task["ratios"] == [1.0, 0.2] and task["shape"] == SHAPE and task["dtype"] == "float32"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import sys; sys.stderr.write('boom\\n'); sys.exit(3)", "boom"),
        ("print('not json')", "gave no result"),
        ('print(\'{"skipped": "kvpress is not installed"}\')', "kvpress is not installed"),
    ],
)
def test_a_peer_that_fails_is_skipped_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    rows, why = kvpress_rows(executable(tmp_path / "python", text), stub_subject(), 64, [0.2])
    assert rows == [] and why is not None and reason in why


def test_no_python_and_no_recipe(tmp_path: Path) -> None:
    assert "no Python at" in str(kvpress_rows(tmp_path / "absent", stub_subject(), 64, [0.2])[1])
    assert "built-in models only" in str(kvpress_rows(sys.executable, stub_subject(None), 64, [0.2])[1])
