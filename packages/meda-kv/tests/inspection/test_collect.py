"""Inspections: the numbers agree with direct computation, and the folder holds what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from meda_kv.inspection import Inspection, collect, entropies, write_inspection
from meda_kv.inspection.collect import KINDS, default_attention_layers
from meda_kv.inspection.sheets import _columns, kept_sheet, key_sheet, looked_sheet
from meda_kv.inspection.writing import answers_table, budget_sentence, size
from meda_kv.models import load_model
from meda_kv.prompts import Prompt, build_inputs
from PIL import Image
from processor_zoo import tiny_processor, tiny_tokenizer
from tinyworld.albums import make_albums
from vfm_core.errors import UserError
from zoo import tiny_vlm


def album(images: int = 5) -> Prompt:
    found = make_albums("needle", 1, images=images)[0]
    return Prompt("<image> " * images + found.questions[0][0], [Image.fromarray(x) for x in found.images])


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tiny")


@pytest.fixture(scope="module")
def found(tiny: tuple[Any, Any]) -> Inspection:
    return collect(*tiny, album(), ratio=0.3, max_new_tokens=4, cache_options={"floor": 8})


def test_budgets_and_kept_tokens_add_up(found: Inspection) -> None:
    assert sum(found.budgets) == found.total == round(0.3 * 4 * found.n)
    assert found.kept.shape == (4, 2, found.n)
    assert found.kept.sum(axis=2).tolist() == [[budget] * 2 for budget in found.budgets]
    assert found.visual_tokens == 5 * 16 == found.visual.sum()
    content = found.to_dict()
    assert sum(content["budgets"]) == content["total_budget"]
    assert [row["budget"] for row in content["layers"]] == content["budgets"]
    for row in content["layers"]:
        assert row["kept_text"] + row["kept_visual"] == pytest.approx(row["budget"])


def test_entropies_are_those_of_the_model(tiny: tuple[Any, Any], found: Inspection) -> None:
    model, processor = tiny
    inputs = build_inputs(processor, [album()])
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    expected = [float(torch.special.entr(a[0]).sum(-1).mean()) for a in attentions]
    assert found.entropy["self"] == pytest.approx(expected, abs=1e-4)
    assert set(found.entropy) == set(KINDS)
    again = entropies(model, processor, album())
    assert again["cross"] == pytest.approx(found.entropy["cross"], abs=1e-5)
    for layer, shown in found.maps.items():
        mean = attentions[layer][0].mean(0)
        assert np.abs(shown - mean.numpy()).max() < 1e-5  # as many bins as tokens
        text = torch.tensor(~found.visual)
        assert np.abs(found.looked[layer] - mean[text].mean(0).numpy()).max() < 1e-5


def test_attention_is_averaged_over_bins(tiny: tuple[Any, Any]) -> None:
    from meda_kv.inspection.collect import Recorder

    model, processor = tiny
    inputs = build_inputs(processor, [album()])
    fine, coarse = Recorder(model, [1]), Recorder(model, [1], side=10)
    for recorder in (fine, coarse):
        with torch.inference_mode():
            model.generate(**inputs, past_key_values=recorder, max_new_tokens=1)
    n = fine.maps[1].shape[0]
    bins = torch.arange(n) * 10 // n
    onto = torch.nn.functional.one_hot(bins).float()
    expected = (onto.T @ fine.maps[1] @ onto) / onto.sum(0)[:, None]
    assert coarse.maps[1].allclose(expected, atol=1e-6)
    assert coarse.maps[1].sum(1).allclose(torch.ones(10), atol=1e-5)


def test_answers_come_at_falling_ratios(found: Inspection) -> None:
    assert [row["method"] for row in found.texts] == ["full", "meda", "meda", "meda", "meda"]
    assert [row["ratio"] for row in found.texts] == [1.0, 0.6, 0.4, 0.3, 0.2]
    assert found.texts[0]["text"] == make_albums("needle", 1, images=5)[0].questions[0][1]
    assert [row["ratio_actual"] for row in found.texts] == pytest.approx([1.0, 0.6, 0.4, 0.3, 0.2], abs=0.01)


def test_full_cache_and_one_modality(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    whole = collect(model, processor, album(2), method="full", text_ratios=(), max_new_tokens=2)
    assert whole.budgets == [whole.n] * 4
    assert whole.total == 4 * whole.n
    assert whole.kept.all()
    with pytest.warns(UserWarning, match="one modality"):
        text = collect(model, processor, Prompt("the and then " * 20), ratio=0.5, text_ratios=(), max_new_tokens=2)
    assert text.visual_tokens == 0
    assert text.images == []
    assert np.isnan(text.entropy["cross"]).all()
    assert np.isfinite(text.entropy["self"]).all()
    assert sum(text.budgets) == text.total
    assert text.summary["entropy_used"] == "self"
    assert json.loads(json.dumps(text.to_dict(), allow_nan=True))["layers"][0]["entropy_self"] > 0


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llava_next"])
def test_other_families(family: str, tmp_path: Path) -> None:
    model, _ = tiny_vlm(family)
    images = [Image.new("RGB", (64, 32), "red"), Image.new("RGB", (40, 40), "blue")]
    prompt = Prompt("w1 <image> w2 <image> w3 " + "w4 " * 20, images)
    options = {"floor": 4}
    seen = collect(
        model,
        tiny_processor(family),
        prompt,
        method="snapkv",
        ratio=0.4,
        text_ratios=(),
        max_new_tokens=3,
        cache_options=options,
    )
    assert sum(seen.budgets) == seen.total == round(0.4 * len(seen.layers) * seen.n)
    assert all(image.mapped for image in seen.images)
    assert len(seen.images) == 2
    for index in range(2):
        assert kept_sheet(seen, index).width > 200
        assert looked_sheet(seen, index) is not None


@pytest.mark.filterwarnings("ignore:a prompt holds one modality only")
def test_text_only_models(tmp_path: Path) -> None:
    model, _ = tiny_vlm("text")
    seen = collect(
        model,
        tiny_tokenizer(),
        Prompt("w1 w2 w3 " * 10),
        ratio=0.5,
        text_ratios=(),
        max_new_tokens=2,
        cache_options={"floor": 4},
    )
    assert seen.visual_tokens == 0
    assert sum(seen.budgets) == seen.total


def test_bad_layers_and_lengths_are_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=r"no such layer in --layers: 9; .*0 to 3"):
        collect(*tiny, album(2), attention_layers=[0, 9])
    with pytest.raises(UserError, match="too few new tokens"):
        collect(*tiny, album(2), max_new_tokens=1)


def test_default_layers_are_those_of_the_paper() -> None:
    assert default_attention_layers(range(32)) == (0, 1, 24)
    assert default_attention_layers([3]) == (3,)
    assert default_attention_layers([1, 5]) == (1, 5)


# ------------------------------------------------------------------------------------------------------------- folders
def test_the_folder_holds_the_artefacts(found: Inspection, tmp_path: Path) -> None:
    (tmp_path / "kept_99.png").write_bytes(b"of an earlier run")
    paths = write_inspection(found, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "layers.json",
        "entropy.png",
        "budgets.png",
        "attention.png",
        "tokens.png",
        "report.html",
        "kept.npz",
    } <= names
    assert {f"kept_{i}.png" for i in range(1, 6)} <= names
    assert "kept_99.png" not in names
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 100
            low, high = image.convert("L").getextrema()
            assert high - low > 100, path  # not blank
    content = json.loads(paths["layers"].read_text())
    assert sum(content["budgets"]) == content["total_budget"]
    assert content["images"][0]["grid"] == [["image", 4, 4]]
    arrays = np.load(paths["kept"])
    assert (arrays["kept"] == found.kept).all()
    page = paths["report"].read_text()
    assert page.count("<img") == 4 + 2 * (1 + 5)  # plots, and two galleries of five pictures after their keys
    assert "**" not in page.partition("<main>")[2]
    assert page.count("one grid over the centre crop") == 1, "said once, not under every picture"
    assert "tiny: meda at ratio 0.3" in page and content["model"]["name"] == "tiny"
    assert 'src="http' not in page


def test_a_sheet_is_bright_where_tokens_were_kept(found: Inspection) -> None:
    index = int(np.argmax([found.kept[0][:, image.positions].sum() for image in found.images]))
    view = found.images[index].views[0]
    sheet = np.asarray(kept_sheet(found, index).convert("L"), dtype=float)
    gap, line = 14, 34
    width = (sheet.shape[1] - 4 * gap) // 3  # five panels, three to a row: the picture and four layers
    top = 2 * gap + line + line
    places = [(top + i // 3 * (width + line + gap), gap + i % 3 * (width + gap)) for i in range(5)]
    panels = [sheet[y : y + width, x : x + width] for y, x in places]
    share = found.share[:, view.tokens.numpy()]
    assert 0 < share.min(axis=0).mean() + share.max() < 2
    for layer in range(4):
        faded = 0.85 * (1 - np.kron(share[layer], np.ones((width // 4, width // 4))))
        side = faded.shape[0]
        wanted = panels[0][:side, :side] * (1 - faded) + faded * 239.6
        off = np.abs(panels[layer + 1][:side, :side] - wanted)
        inside = np.s_[6 : width // 4 - 6]  # away from the lines around kept tokens
        for row in range(4):
            for column in range(4):
                cell = off[row * (width // 4) :, column * (width // 4) :]
                assert cell[inside, inside].mean() < 4, (layer, row, column)


def test_untouched_prompts_are_said_to_be_untouched(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="one modality"):
        short = collect(*tiny, Prompt("Q red"), ratio=0.2, text_ratios=(), max_new_tokens=2)
    assert short.budgets == [short.n] * 4 and short.total == 4 * short.n
    assert short.asked == round(0.2 * 4 * short.n) < short.total
    told = f"budgets sum to {4 * short.n} of {4 * short.n} tokens over all layers ({short.asked} asked for)"
    assert budget_sentence(short) == f"{told}; not compressed: n <= budget"
    paths = write_inspection(short, tmp_path)
    content = json.loads(paths["layers"].read_text())
    assert content["total_budget"] == sum(content["budgets"]) and content["note"] == "not compressed: n <= budget"
    assert "not compressed: n &lt;= budget" in paths["report"].read_text()


def test_the_official_budgets_are_told_with_what_was_asked_for(tiny: tuple[Any, Any]) -> None:
    options: dict[str, Any] = {"text_ratios": (), "max_new_tokens": 3, "preset": "official-code"}
    official = collect(*tiny, album(), ratio=0.5, **options)
    assert official.total == sum(official.budgets)
    assert official.asked == round(0.5 * 4 * official.n)


def test_bytes_in_use_follow_the_ratio_and_allocated_bytes_do_not(found: Inspection) -> None:
    full, *_, least = found.texts
    assert least["bytes_in_use"] / full["bytes_in_use"] == pytest.approx(0.2, abs=0.03)
    assert least["bytes"] > 1.5 * least["bytes_in_use"]
    row = answers_table(found)[-1]
    assert row["KV in use"] == size(least["bytes_in_use"]) and row["allocated"] == size(least["bytes"])


def test_looked_sheets_tell_their_scale(found: Inspection) -> None:
    image = found.images[0]
    sheet = looked_sheet(found, 0)
    assert sheet is not None and sheet.width == 960
    # The brightest token of a panel has the map's last colour over the picture, whatever its share is.
    assert max(found.looked[layer][image.positions].max() for layer in found.looked) < 1
    for kind in ("kept", "looked"):
        key: np.ndarray = np.asarray(key_sheet(kind).convert("L"), dtype=float)
        assert abs(key[100, 30] - key[100, 560]) > 60, "the bar goes from one end to the other"


@pytest.mark.parametrize(("panels", "columns"), [(1, 1), (4, 4), (5, 3), (9, 3), (33, 4)])
def test_panels_are_wrapped(panels: int, columns: int) -> None:
    assert _columns(panels) == columns


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 999, 1500, 2_000_000, 3 * 10**12)] == ["0 B", "999 B", "1.5 kB", "2 MB", "3 TB"]


def test_comparison_ratios_that_are_too_small_are_left_out(tiny: tuple[Any, Any]) -> None:
    seen = collect(*tiny, album(2), ratio=0.5, max_new_tokens=2, text_ratios=(0.6, 0.1))
    assert [row["ratio"] for row in seen.texts] == [1.0, 0.6, 0.5]
    with pytest.raises(UserError, match="smallest legal ratio"):
        collect(*tiny, album(2), ratio=0.1, max_new_tokens=2)
