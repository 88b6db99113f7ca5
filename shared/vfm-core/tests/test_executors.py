"""Units run here, in processes, or on Ray: same outcomes, and a bad unit does not end the others."""

from __future__ import annotations

import importlib
import operator
from typing import Any

import pytest
from vfm_core.errors import UserError
from vfm_core.executors import Local, Outcome, make_executor


def half(context: int, unit: int) -> float:
    if unit == 0:
        raise UserError("cannot halve nothing", given=unit)
    return context / unit


def test_words() -> None:
    assert make_executor("local") == make_executor("local:1") == Local(1)
    assert make_executor("local:3") == Local(3)


@pytest.mark.parametrize("text", ["", "local:0", "local:x", "local:-1", "dask", "ray:2"])
def test_unknown_executors_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="unknown executor in --executor"):
        make_executor(text)


def test_ray_absent_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"Ray is not installed in --executor: ray; pip install \"ray>=2.40\""):
        make_executor("ray")


def test_a_user_error_ends_its_unit_only() -> None:
    outcomes = list(Local(1).run(half, 6, [3, 0, 2]))
    assert [o.value for o in outcomes] == [2, None, 3]
    assert str(outcomes[1].error) == "cannot halve nothing: 0"


def test_a_fault_ends_the_run() -> None:
    with pytest.raises(TypeError):
        list(Local(1).run(half, 6, [3, "x"]))


def test_processes_give_the_same_outcomes() -> None:
    outcomes = sorted(Local(2).run(operator.add, 10, [1, 2, 3]), key=lambda o: o.index)
    assert outcomes == [Outcome(0, 11), Outcome(1, 12), Outcome(2, 13)]
