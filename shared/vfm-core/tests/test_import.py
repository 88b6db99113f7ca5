"""The package's public face: every name resolves, and nothing heavy is imported before it is used."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import vfm_core


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["vfm_core", "vfm_core.cli", "vfm_core.runs", "vfm_core.report"])
def test_import_is_light(module: str) -> None:
    imported = set(run(f"import sys, {module}\nprint(*sys.modules)").split())
    assert not imported & {"torch", "timm", "transformers", "matplotlib", "numpy", "jinja2", "sklearn"}


@pytest.mark.parametrize("name", vfm_core.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(vfm_core, name).__name__ == name


def test_dir_and_unknown_names() -> None:
    assert set(vfm_core.__all__) <= set(dir(vfm_core))
    assert vfm_core.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vfm_core.nothing


def test_submodules_import_from_the_package() -> None:
    assert run("from vfm_core import metrics; print(metrics.__name__)") == "vfm_core.metrics"


def test_package_is_typed() -> None:
    spec = find_spec("vfm_core")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).with_name("py.typed").exists()
