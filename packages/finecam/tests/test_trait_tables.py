"""Numbers of a traits run: the pruning curve over all images, annotated traits found, and what chance would find."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finecam.promptcam import PromptCAM
from finecam.trait_report import explain_traits
from finecam.trait_tables import annotated_hits, hits_table, pruning_figure, pruning_rows, survival_of
from finecam.traits import pruning_curve
from timm.models.vision_transformer import VisionTransformer
from tinyworld.birds import Birds
from vfm_core.backbones import load_backbone

torch.set_num_threads(1)


def untrained(birds: Birds) -> PromptCAM:
    return PromptCAM(load_backbone("tiny:vit"), 16, class_names=birds.classes, prompt_layers=1)


def test_rows_of_all_images_are_the_curve() -> None:
    birds = Birds(n=6, split="val")
    model = untrained(birds)
    x = torch.stack([model.preprocess(birds[i].image) for i in range(6)])
    best = model(x).argmax(1)
    traits = model.traits(x, torch.where(torch.arange(6) < 4, best, (best + 1) % 16))
    assert int(traits.correct.sum()) == 4
    records = [
        {
            "survival": survival_of(traits, i),
            "target": {"id": int(traits.target[i])},
            "prediction": {"id": int(traits.prediction[i])},
        }
        for i in range(6)
    ]
    rows, curve = pruning_rows(records), pruning_curve(traits)
    assert [row["heads kept"] for row in rows] == curve["heads_left"].tolist() == [4, 3, 2, 1, 0]
    assert [row["accuracy"] for row in rows] == pytest.approx(curve["accuracy"].tolist())
    assert [row["mean probability"] for row in rows] == pytest.approx(curve["probability"].tolist(), abs=1e-5)
    assert rows[0]["images"] == int(traits.correct.sum())
    own = traits.logits.gather(1, traits.target[:, None])[traits.correct]
    assert rows[0]["mean score"] == pytest.approx(float(own.mean()), abs=1e-4)
    assert rows[-1]["mean score"] == pytest.approx(float(traits.scores[traits.correct][:, -1].mean()), abs=1e-4)
    assert len(pruning_figure(rows).axes) == 2
    wrong = [record for record in records if record["target"] != record["prediction"]]
    assert pruning_rows(wrong) == [] == pruning_rows([{"image": "of an older run"}])


def test_hits_and_chance() -> None:
    maps = np.zeros((2, 3, 3))
    maps[0, 0, 0], maps[1, 2, 2] = 1, 1
    masks = {"wing": np.eye(3, dtype=bool), "tail": np.eye(3, dtype=bool)[::-1] & ~np.eye(3, dtype=bool)}
    hidden = np.zeros((3, 3), bool)
    found = annotated_hits(maps, {"part_masks": masks | {"eye": hidden}, "trait_mask": masks["wing"]}, (0, 0, 3, 3))
    assert found is not None and {name: hit for name, (hit, _) in found.items()} == {
        "wing": True,
        "tail": False,
        "trait": True,
    }
    pairs = list(combinations(range(9), 2))
    for name in ("wing", "tail"):
        inside = set(np.flatnonzero(masks[name]).tolist())
        assert found[name][1] == pytest.approx(sum(bool(inside & set(p)) for p in pairs) / len(pairs), abs=1e-5)
    assert annotated_hits(maps, {}, (0, 0, 3, 3)) is None
    rows = hits_table([{"hits": found}, {"hits": {"wing": [False, 0.5]}}, {"hits": None}, {}])
    table: dict[str, Any] = {row["trait or part"]: row for row in rows}
    assert list(table) == ["all", "tail", "trait", "wing"]
    assert (table["all"]["visible in images"], table["all"]["found by a head"][0]) == (4, 0.5)
    assert table["wing"]["found by a head"][0] == 0.5 and table["wing"]["by chance"] > 0.5
    assert hits_table([{"hits": None}]) == []


def test_a_run_reports_them_also_when_resumed(tmp_path: Path) -> None:
    birds = Birds(n=8, split="val")
    model = untrained(birds)
    for limit in (3, None):
        done = explain_traits(model, birds, tmp_path, top=2, target=None, limit=limit)
    assert (done.done, done.failed) == (8, 0)
    records = _records(tmp_path)
    assert pruning_rows(records)[0]["images"] == 8  # the prediction is the target
    first = model.traits(torch.stack([model.preprocess(birds[i].image) for i in range(8)]), top=2)
    assert [r["survival"] for r in records] == [
        {k: v if k == "correct" else pytest.approx(v, abs=1e-3) for k, v in survival_of(first, i).items()}
        for i in range(8)
    ]
    parts = {row["trait or part"] for row in hits_table(records)}
    assert parts >= {"all", "trait", "wing", "beak"}
    assert "heads kept" in done.index.with_name("report.html").read_text(encoding="utf-8")


def _records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_official_file_is_read_with_names_and_heads(tmp_path: Path) -> None:
    net = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=0)
    draw = torch.Generator().manual_seed(0)
    state = net.state_dict() | {
        "vpt.prompt_embeddings": torch.randn(2, 3, 64, generator=draw),
        "head.weight": torch.randn(1, 64, generator=draw),
        "head.bias": torch.zeros(1),
    }
    torch.save({"model_state_dict": state}, tmp_path / "model.pt")
    (tmp_path / "names.txt").write_text("wren\nrobin\ncrow\n", encoding="utf-8")
    birds = Birds(n=2, split="val")
    done = explain_traits(tmp_path / "model.pt", birds, tmp_path / "o", class_names=tmp_path / "names.txt", heads=2)
    assert done.failed == 0
    for record in _records(tmp_path / "o"):
        assert record["target"]["name"] in {"wren", "robin", "crow"} and sorted(record["heads"]) == [1, 2]
