"""Profiles: mean shares with their spread, and refusal of anything they were not measured on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meda_kv.generation import generate
from meda_kv.inspection import entropies
from meda_kv.models import load_model
from meda_kv.profiles import FORMAT, Profile, load_profile, make_profile, shares
from meda_kv.prompts import Prompt
from PIL import Image
from vfm_core.errors import UserError
from zoo import tiny_vlm


@pytest.fixture(scope="module")
def tiny() -> tuple:
    return load_model("tiny")


@pytest.fixture
def profile(tiny: tuple) -> Profile:
    return make_profile(tiny[0], [[6.0, 6.5, 5.0, 5.5], [6.2, 6.0, 5.1, 5.9]])


@given(st.lists(st.floats(0, 12), min_size=1, max_size=40), st.floats(0.1, 5))
def test_shares_have_mean_one_and_follow_the_entropy(values: list[float], temperature: float) -> None:
    got = shares(values, temperature)
    assert sum(got) / len(got) == pytest.approx(1.0)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert all(got[a] <= got[b] + 1e-12 for a, b in itertools.pairwise(order))


def test_shares_are_equation_7() -> None:
    entropy = torch.tensor([6.0, 6.5, 5.0])
    alpha = torch.softmax(entropy, 0) * 3 * 0.2  # softmax(E) * L * rho
    assert torch.tensor(shares(entropy.tolist())).mul(0.2).allclose(alpha)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.floats(1, 9), min_size=4, max_size=4), min_size=1, max_size=6))
def test_a_profile_averages_shares(tiny: tuple, rows: list[list[float]]) -> None:
    made = make_profile(tiny[0], rows)
    table = torch.tensor([shares(row) for row in rows], dtype=torch.float64)
    assert torch.tensor(made.alphas, dtype=torch.float64).allclose(table.mean(0), atol=1e-9)
    assert made.samples == len(rows)
    assert made.layers == (0, 1, 2, 3)
    expected = table.std(0) if len(rows) > 1 else torch.zeros(4, dtype=torch.float64)
    assert torch.tensor(made.spread, dtype=torch.float64).allclose(expected)


def test_the_file_is_read_back(profile: Profile, tiny: tuple, tmp_path: Path) -> None:
    path = profile.save(tmp_path / "profile.json")
    assert json.loads(path.read_text())["format"] == FORMAT
    assert load_profile(path, tiny[0]) == load_profile(profile.to_dict(), tiny[0]) == profile


def test_undefined_entropies_and_no_samples_are_refused(tiny: tuple) -> None:
    with pytest.raises(UserError, match=r"no cross entropy in sample 1.*--entropy self"):
        make_profile(tiny[0], [[1.0] * 4, [float("nan")] * 4])
    with pytest.raises(UserError, match="no sample"):
        make_profile(tiny[0], [])


def test_other_models_are_refused(profile: Profile) -> None:
    with pytest.raises(UserError, match=r"other layers.*4 layers in the profile, 2 compressed layers"):
        profile.check(load_model("tiny?layers=2&hidden=32")[0])
    with pytest.raises(UserError, match=r"another model.*heads 4 in the profile, 2 in the model"):
        profile.check(load_model("tiny?heads=2&kv_heads=2")[0])
    with pytest.raises(UserError, match=r"other weights.*fingerprint"):
        profile.check(load_model("tiny?random=1&seed=5")[0])
    hybrid = tiny_vlm("gemma3")[0]
    with pytest.raises(UserError, match=r"other layers.*2 compressed layers"):
        profile.check(hybrid)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "something"}, "not a profile of this version"),
        ({"alphas": None}, "missing or malformed"),
        ({"alphas": [1.0, 1.0]}, "must be of one length"),
        ({"alphas": [1.0, 1.0, 2.0, -0.1]}, "positive number .*alpha -0.1 of layer 3"),
        ({"alphas": [1.0, 1.0, 2.0, float("nan")]}, "positive number"),
    ],
)
def test_damaged_profiles_are_refused(profile: Profile, change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_profile({**profile.to_dict(), **change})


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such profile"):
        load_profile(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"not readable as JSON in .*bad\.json"):
        load_profile(tmp_path / "bad.json")


def test_a_measured_profile_compresses_layer_by_layer(tiny: tuple, tmp_path: Path) -> None:
    model, processor = tiny
    prompts = [
        Prompt(" ".join(["<image>"] * 6) + " Q red", [Image.new("RGB", (32, 32), name)] * 6) for name in ("red", "blue")
    ]
    rows = [entropies(model, processor, prompt)["cross"] for prompt in prompts]
    path = make_profile(model, rows).save(tmp_path / "profile.json")
    (answer,) = generate(model, processor, prompts[:1], ratio=0.4, budgets=path, max_new_tokens=3)
    n = answer.summary["prompt_tokens"]
    assert sum(answer.summary["budgets"]) == round(0.4 * 4 * n)
    alphas = torch.tensor(load_profile(path).alphas)
    assert torch.tensor(answer.summary["budgets"]).float().allclose(alphas * 0.4 * n, atol=1.5)
