"""The study's claims on albums that neither the demo nor the choice of `quota` has seen, three networks, 210 albums."""

from __future__ import annotations

from pathlib import Path

import pytest
from meda_kv import study
from meda_kv.evaluation import Results
from meda_kv.study_claims import CLAIMS, Check, check

pytestmark = [pytest.mark.finding, pytest.mark.slow]

EXPECTED = [claim for claim in CLAIMS if claim.expected]
METHODS = tuple(sorted({arm.split("@")[0] for claim in EXPECTED for arm in claim.arms} - {"full"}))
SIZE = study.StudySize(methods=METHODS, draw=3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    out = tmp_path_factory.mktemp("study")
    for unit in SIZE.units():
        study.run_unit((SIZE, out, False), unit)
    return {part: study.results_of(SIZE, out, part) for part in SIZE.parts}


@pytest.fixture(scope="module")
def checks(results: dict[str, Results]) -> dict[str, Check]:
    return {f"{one.claim.part}: {one.claim.name}": one for one in check(results, SIZE.seeds)}


@pytest.mark.parametrize("claim", EXPECTED, ids=[f"{claim.part}-{i}" for i, claim in enumerate(EXPECTED)])
def test_claim(claim: object, checks: dict[str, Check]) -> None:
    one = next(found for found in checks.values() if found.claim is claim)
    assert one.n == 210 and len(one.by_seed) == 3
    assert one.holds, one.to_dict()


def test_methods_hold_equal_bytes(results: dict[str, Results]) -> None:
    for one in results.values():
        rows = one.rows(by="all", kinds=["all"])
        for ratio in SIZE.ratios:
            shares = {round(row.bytes_ratio, 9) for row in rows if row.method != "full" and row.ratio == ratio}
            assert len(shares) == 1
            assert abs(shares.pop() - ratio) < 0.002


@pytest.mark.parametrize("seed", study.MODEL_SEEDS)
def test_layers_differ_in_entropy(seed: int) -> None:
    cross = study.entropy_spread(seed)["cross"]
    assert max(cross) - min(cross) > 0.2


def test_what_is_not_expected_says_why() -> None:
    assert all(claim.why for claim in CLAIMS if not claim.expected)
    assert not any(claim.why for claim in EXPECTED)


def test_folders_of_units_differ(tmp_path: Path) -> None:
    assert len({study.unit_folder(tmp_path, unit) for unit in SIZE.units()}) == len(SIZE.units())
