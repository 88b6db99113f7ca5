"""The toy worlds: deterministic, quick, and what they show over three seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ft_calibrate.toys import SHIFT, WORLDS, run_toy, run_toys, toy_points
from vfm_core.errors import UserError


def test_the_shift_is_shared_by_all_classes() -> None:
    for world in WORLDS:
        source, target, y = toy_points(world, n=2000)
        moved = [target[y == c].mean(0) - source[y == c].mean(0) for c in range(4)]
        np.testing.assert_allclose(moved, np.tile(SHIFT, (4, 1)), atol=0.05)


def test_same_seed_same_world_and_no_global_state() -> None:
    state = torch.get_rng_state()
    first, again = run_toy(n=20, steps=20), run_toy(n=20, steps=20)
    np.testing.assert_array_equal(first.features_after, again.features_after)
    assert first.rows == again.rows
    assert not np.array_equal(first.features_after, run_toy(n=20, steps=20, seed=1).features_after)
    torch.testing.assert_close(state, torch.get_rng_state())
    with pytest.raises(UserError, match="unknown toy world"):
        run_toy("triangle")


@pytest.mark.finding
def test_absent_features_gain_while_absent_accuracy_falls() -> None:
    seeds = [run_toys(seed) for seed in range(3)]
    for w, world in enumerate(WORLDS):
        assert all(results[w].world == world for results in seeds)
        before, after = ([results[w].rows[i] for results in seeds] for i in (0, 1))

        def mean(rows: list[dict], key: str) -> float:
            return float(np.mean([row[key] for row in rows]))

        assert mean(after, "S/Y") > mean(before, "S/Y") + 0.1
        assert mean(after, "U/Y") < mean(before, "U/Y") - 0.1
        assert mean(after, "U/U") > mean(before, "U/U") + 0.05  # the order among the absent classes gets better
        assert mean(after, "NCM U/U") >= mean(before, "NCM U/U") - 0.01
