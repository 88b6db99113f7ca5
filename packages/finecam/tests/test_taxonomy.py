"""Prompt sets along a tree: relabelling, training per level and per node, the walk from order to species."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finecam.promptcam import PromptCAM
from finecam.taxonomy import Regrouped, Taxonomy, TaxonomyKeys, train_taxonomy
from PIL import Image
from tinyworld.birds import Birds
from torch import Tensor
from vfm_core.backbones import Backbone, load_backbone
from vfm_core.errors import UserError

torch.set_num_threads(1)
# Two orders; green is an order of its own with a single family, genus and, where cut down, species.
ORDERS = {"blue": "Cool", "purple": "Cool", "orange": "Warm", "green": "Odd"}


@pytest.fixture(scope="module")
def birds() -> Birds:
    return Birds(n=32)


@pytest.fixture(scope="module")
def tree(birds: Birds) -> Taxonomy:
    rows = [{"species": name, "genus": genus_of(name), "order": ORDERS[genus_of(name)]} for name in birds.classes]
    return Taxonomy.from_rows(rows)


def genus_of(species: str) -> str:
    return species.split()[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def quick(cache: Path, **more: Any) -> dict[str, Any]:
    return {"prompt_layers": 1, "epochs": 2, "optimizer": "adamw", "lr": 0.02, "cache_dir": cache} | more


def pixels(net: Backbone, birds: Birds, indices: list[int]) -> Tensor:
    return torch.stack([net.preprocess(Image.fromarray(one)) for one in birds.images(indices)])


# ------------------------------------------------------------------------------------------------------------ the tree


def test_csv_in_any_column_order_with_other_columns(tmp_path: Path) -> None:
    file = tmp_path / "tree.csv"
    file.write_text("\ufeffspecies,note,genus,family,order\nwren, x ,Tro ,Trog,Pass\nrobin,,Eri,Musc,Pass\n", "utf-8")
    tree = Taxonomy.read(file)
    assert tree.levels == ("order", "family", "genus", "species")
    assert tree.lineage("wren") == ("Pass", "Trog", "Tro", "wren")
    with pytest.raises(UserError, match="did you mean robin"):
        tree.lineage("robbin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("genus,family\na,b\n", "needs a column species"),
        ("species,note\na,b\n", "at least one rank above"),
        ("species,genus\na,\n", "genus is empty in .*line 2"),
        ("species,genus\na,x\na,x\n", "species listed twice in .*line 3: a"),
        ("species,genus,family\na,x,f\nb,x,g\n", "genus x has two parents in taxonomy: f and g"),
        ("species,genus\n", "no rows"),
    ],
)
def test_bad_trees(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "tree.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        Taxonomy.read(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="taxonomy not found"):
        Taxonomy.read(tmp_path / "none.csv")


def test_units_per_level_and_per_node(birds: Birds, tree: Taxonomy) -> None:
    levels = tree.units(birds.classes)
    assert list(levels) == [("order",), ("genus",), ("species",)]
    assert levels["order",] == [ORDERS[genus_of(name)] for name in birds.classes]
    assert levels["species",] == birds.classes
    nodes = tree.units(birds.classes, "node")
    cool = ("Cool",)
    assert set(nodes) == {(), cool, *((ORDERS[genus], genus) for genus in ORDERS)}  # Warm and Odd have one genus each
    assert next(iter(nodes)) == ()
    assert [g for g in nodes[cool] if g is not None] == ["blue"] * 4 + ["purple"] * 4
    green = [name if genus_of(name) == "green" else None for name in birds.classes]
    assert nodes["Odd", "green"] == green


def test_regrouped_pictures(birds: Birds) -> None:
    groups = [None if genus_of(name) == "blue" else genus_of(name) for name in birds.classes]
    some = Regrouped(birds, groups)
    assert some.classes == ["green", "orange", "purple"]
    assert len(some) == 24
    for i in (0, 5, 23):
        original = int(some.indices[i])
        assert some[i].label == some.labels[i] == some.classes.index(genus_of(birds.classes[birds.labels[original]]))
        assert some[i].image.tobytes() == birds[original].image.tobytes()
        assert some.ids[i] == birds.ids[original]
    other = Regrouped(birds, [None if g is None else f"{g}!" for g in groups])
    assert some.fingerprint() == Regrouped(birds, groups).fingerprint() != other.fingerprint()


# --------------------------------------------------------------------------------------------------- training and walk


def test_levels(birds: Birds, tree: Taxonomy, cache: Path, tmp_path: Path) -> None:
    net, calls = load_backbone("tiny:vit"), []
    handle = net.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    keys = train_taxonomy(birds, net, tree, val=birds, out=tmp_path, **quick(cache))
    assert len(calls) == 1  # one pass of the frozen blocks serves training and validation of all three levels
    assert [len(model.class_names) for model in keys.models.values()] == [3, 4, 16]
    assert all(0 <= model.metrics["accuracy"] <= 1 for model in keys.models.values())
    x = pixels(net, birds, [0, 1, 2])
    calls.clear()
    views = keys.walk(x)
    assert len(calls) == 1
    handle.remove()
    assert [view.level for view in views] == ["order", "genus", "species"]
    for view, model in zip(views, keys.models.values()):
        logits = model(x)
        best = logits.argmax(1)
        assert view.groups == [model.class_names[i] for i in best.tolist()]
        torch.testing.assert_close(view.probability, logits.softmax(1).amax(1).detach())
        torch.testing.assert_close(view.maps, model.maps(x, best[:, None])[:, 0].mean(1))
        assert view.maps.shape == (3, 8, 8)

    again = TaxonomyKeys.load(tmp_path)
    assert (again.per, again.taxonomy.levels) == ("level", tree.levels)
    assert len({id(model.backbone) for model in again.models.values()}) == 1
    for one, two in zip(keys.walk(x), again.walk(x)):
        assert one.groups == two.groups
        assert torch.equal(one.maps, two.maps)
    with pytest.raises(UserError, match="no taxonomy keys here"):
        TaxonomyKeys.load(tmp_path / "nowhere")


def test_nodes(birds: Birds, tree: Taxonomy, cache: Path, tmp_path: Path) -> None:
    net = load_backbone("tiny:vit")
    keys = train_taxonomy(birds, net, tree, per="node", out=tmp_path, **quick(cache))
    assert len(keys.models) == 6
    assert keys.models["Cool",].class_names == ["blue", "purple"]
    x = pixels(net, birds, list(range(16)))
    for walk in (keys.walk(x), TaxonomyKeys.load(tmp_path).walk(x)):
        order, genus, species = walk
        for i in range(16):
            assert order.groups[i] in {"Cool", "Warm", "Odd"}
            assert ORDERS[genus.groups[i]] == order.groups[i]  # a key cannot leave the branch it took
            assert genus.groups[i] == tree.lineage(species.groups[i])[1]
            single = order.groups[i] != "Cool"
            assert bool(genus.maps[i].isnan().all()) == single
            assert (float(genus.probability[i]) == 1.0) == single
        assert not species.maps.isnan().any()


@pytest.mark.parametrize("per", ["level", "node"])
def test_true_lineage_can_be_shown_instead(birds: Birds, tree: Taxonomy, cache: Path, per: Any) -> None:
    net = load_backbone("tiny:vit")
    keys = train_taxonomy(birds, net, tree, per=per, **quick(cache))
    names = [birds.classes[int(c)] for c in birds.labels[:8]]
    views = keys.walk(pixels(net, birds, list(range(8))), names)
    for depth, view in enumerate(views):
        assert view.groups == [tree.lineage(name)[depth] for name in names]
    model: PromptCAM = keys.models[("species",) if per == "level" else ("Cool", "blue")]
    x = pixels(net, birds, [0])
    wanted = model.class_names.index(names[0])
    assert float(views[2].probability[0]) == pytest.approx(model(x).softmax(1)[0, wanted].item(), abs=1e-5)


def test_faults(birds: Birds, tree: Taxonomy, cache: Path) -> None:
    net = load_backbone("tiny:vit")
    part = Taxonomy(tree.levels, {k: v for k, v in tree.lineages.items() if v[1] != "blue"})
    with pytest.raises(UserError, match="unknown species in taxonomy: 'blue bird with red wing patch'"):
        train_taxonomy(birds, net, part, **quick(cache))
    with pytest.raises(UserError, match="unknown class of the validation data"):
        train_taxonomy(birds, net, tree, val=Birds(n=32, split="val", plain=True), **quick(cache))
    one = birds.subset(np.nonzero(birds.labels == 0)[0])
    one.classes, one.labels = [birds.classes[0]], np.zeros(len(one), np.int64)
    with pytest.raises(UserError, match="nothing to tell apart in taxonomy: 1 classes"):
        train_taxonomy(one, net, tree, **quick(cache))
