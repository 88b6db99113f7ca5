import copy
import logging

import pytest
import torch
from ft_calibrate.classifier import Classifier, load_classifier
from ft_calibrate.recipes import RECIPES, SourceEnsemble, fine_tune, recipe_names
from ft_calibrate.recipes.heads import CosineHead, cosine_head_from
from ft_calibrate.recipes.peft_arms import lora_targets
from torch import nn
from vfm_core.errors import UserError

SEEN = [0, 1, 2]
COMBINED = [
    "frozen-head+distill+rank",
    "lolsgd+distill",
    "lolsgd+rank",
    "lolsgd+frozen-head+ema",
    "lp+distill-absent+ema",
    "lp-ft+swa+wise:0.5",
    "cosine-head+l2sp+source-ensemble:logit",
    "seen-loss+bn-frozen+distill-absent",
    "lora+distill",
    "oracle-ft+lolsgd",
]


def train(net, rows, recipe="ft", **options):
    return fine_tune(net, rows, SEEN, recipe, **{"epochs": 2, "batch_size": 16, "lr": 0.05, **options})


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b, keys=None):
    keys = a.keys() | b.keys() if keys is None else keys
    return all(torch.equal(a[k], b[k]) for k in keys)


def changed(a, b):
    return {k for k in a if not torch.equal(a[k], b[k])}


HEAD = {"fc.weight", "fc.bias"}
STATISTICS = {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}
BODY = {"body.0.weight", "body.1.weight", "body.1.bias"}


@pytest.mark.parametrize("recipe", [*recipe_names(), *COMBINED])
def test_every_recipe_trains_and_leaves_the_given_model_alone(recipe, net, rows, accuracy):
    before = state(net)
    random = torch.get_rng_state()
    net.body.train()
    run = train(net, rows, recipe, validate=accuracy)
    assert net.body.training and not net.fc.training and all(p.requires_grad for p in net.parameters())
    assert same(state(net), before) and not any(m._forward_pre_hooks for m in net.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m.training for m in run.model.modules())
    assert not any(m._forward_pre_hooks for m in run.model.modules())
    logits = run.model(rows[0])
    assert logits.shape == (44, 6) and bool(torch.isfinite(logits).all())
    first, *rest = run.history
    assert first["epoch"] == 0 and first["stage"] == "start" and 0 <= first["accuracy"] <= 1
    trained = [r for r in rest if "loss" in r]
    assert [r["epoch"] for r in trained] == list(range(1, len(trained) + 1)) and len(trained) in (2, 4)
    assert rest[-1]["accuracy"] == accuracy(run.model)["accuracy"], "the last record is of the model that is returned"
    features, same_logits = run.classifier.features_and_logits(rows[0])
    assert torch.allclose(logits, same_logits) and features.shape == (44, 24)


@pytest.mark.parametrize("recipe", [n for n in recipe_names() if n not in ("wise", "source-ensemble", "ema", "swa")])
def test_every_recipe_changes_exactly_what_it_may(recipe, net, rows):
    run = train(net, rows, recipe)
    before, after = state(net), state(run.model)
    if recipe == "cosine-head":
        assert isinstance(run.model.fc, CosineHead)
        before, after = ({k: v for k, v in s.items() if not k.startswith("fc.")} for s in (before, after))
        assert changed(before, after) == BODY | STATISTICS
        return
    expected = {
        "lp": HEAD,
        "frozen-head": BODY | STATISTICS,
        "bn-frozen": HEAD | BODY,
        "bit-fit": {"fc.bias", "body.1.bias"},
        "lora": HEAD | {"body.0.weight"},
    }.get(recipe, HEAD | BODY | STATISTICS)
    assert before.keys() == after.keys() and changed(before, after) == expected


@pytest.mark.parametrize("recipe", ["ft", "lp", "lolsgd", "frozen-head"])
def test_training_learns_the_seen_classes(recipe, net, rows, accuracy):
    run = train(net, rows, recipe, epochs=8, lr=0.1, backbone_lr_scale=1.0, validate=accuracy)
    assert run.history[-1]["accuracy"] > max(0.6, run.history[0]["accuracy"] + 0.2)


def test_seen_loss_leaves_absent_rows_of_the_head_to_the_weight_decay(net, rows):
    run = train(net, rows, "seen-loss", weight_decay=0.0)
    moved = (run.model.fc.weight - net.fc.weight).abs().sum(1)
    assert bool((moved[3:] == 0).all()) and bool((moved[:3] > 0).all())


def test_absent_logits_fall_with_the_ordinary_loss(net, rows):
    run = train(net, rows, "ft", epochs=6)
    gap = [float((m(rows[0])[:, :3].mean() - m(rows[0])[:, 3:].mean()).detach()) for m in (net, run.model)]
    assert gap[1] > gap[0] + 0.2


def test_interpolation_is_exact_at_its_ends(net, rows):
    tuned = train(net, rows, "ft")
    assert same(state(train(net, rows, "wise:0").model), state(net))
    assert same(state(train(net, rows, "wise:1").model), state(tuned.model))
    half = state(train(net, rows, "wise:0.5").model)
    assert torch.allclose(half["fc.weight"], (net.fc.weight + tuned.model.fc.weight) / 2)


def test_ensemble_is_of_source_and_tuned(net, rows):
    x = rows[0]
    with torch.no_grad():
        a, b = net(x), train(net, rows, "ft").model(x)
        run = train(net, rows, "source-ensemble:logit")
        assert isinstance(run.model, SourceEnsemble) and run.head_name == "tuned.fc"
        assert torch.allclose(run.model(x), (a + b) / 2, atol=1e-5)


def test_penalties_pull(net, rows):
    """A strong penalty keeps what it is meant to keep."""

    def distance(run):
        return float(sum((p - q).square().sum() for p, q in zip(run.model.parameters(), net.parameters(), strict=True)))

    def divergence(run, columns):
        z, z0 = run.model(rows[0])[:, columns], net(rows[0])[:, columns]
        return float((z0.softmax(1) * (z0.log_softmax(1) - z.log_softmax(1))).sum(1).mean())

    plain = train(net, rows, "ft", epochs=4)
    assert distance(train(net, rows, "l2sp:lambda=1", epochs=4)) < 0.8 * distance(plain)
    assert divergence(train(net, rows, "distill:lambda=5", epochs=4), slice(0, 6)) < 0.5 * divergence(
        plain, slice(0, 6)
    )
    absent = slice(3, 6)
    assert divergence(train(net, rows, "distill-absent:lambda=5", epochs=4), absent) < 0.7 * divergence(plain, absent)


def test_lp_ft_is_lp_then_ft(net, rows):
    first = train(net, rows, "lp", epochs=3, lr=0.1)
    second = train(first.model, rows, "ft")
    both = train(net, rows, "lp-ft:lp_epochs=3,lp_lr=0.1")
    assert [(r["stage"], r["epoch"]) for r in both.history] == [
        ("start", 0), *(("lp", e) for e in (1, 2, 3)), *(("ft", e) for e in (4, 5)),
    ]  # fmt: skip
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(both.model.parameters(), second.model.parameters()))


def test_lp_sees_every_row_once(net, rows):
    calls = []
    handle = net.body.register_forward_hook(lambda m, i, o: calls.append(len(i[0])))  # copied with the model
    train(net, rows, "lp+distill", epochs=5)
    handle.remove()
    assert sum(calls) == 1 + 44  # one row is tried first


def test_distillation_computes_the_teacher_once(net, rows):
    class Counting(nn.Sequential):
        rows = 0

        def forward(self, x):
            if not torch.is_grad_enabled():
                Counting.rows += len(x)
            return super().forward(x)

    counting = Counting(net.body, net.flat, net.fc)
    train(counting, rows, "distill", epochs=4)
    assert Counting.rows == 1 + 44  # one row is tried first


def test_a_head_that_is_not_the_end_is_trained_through_the_frozen_backbone(net, rows, caplog):
    class Scaled(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.body, self.fc = nn.Sequential(net.body, net.flat), net.fc

        def forward(self, x):
            return 3 * self.fc(self.body(x))

    model = Scaled(net)
    with caplog.at_level(logging.WARNING, "ft_calibrate"):
        run = train(model, rows, "lp")
    assert "frozen backbone at every step" in caplog.text
    assert changed(state(model), state(run.model)) == HEAD


@pytest.mark.parametrize("recipe", ["lp", "lolsgd+lp"])
def test_lp_keeps_statistics_of_layers_without_parameters(recipe, net, rows):
    class Scaled(nn.Module):  # the head is not the end: the backbone runs at every step
        def __init__(self, net):
            super().__init__()
            self.body, self.norm, self.flat = net.body, nn.BatchNorm2d(6, affine=False), net.flat
            self.fc = net.fc

        def forward(self, x):
            return 3 * self.fc(self.flat(self.norm(self.body(x))))

    model = Scaled(net).eval()
    run = train(model, rows, recipe)
    assert changed(state(model), state(run.model)) == HEAD
    moving = train(model, rows, "ft")
    assert "norm.running_mean" in changed(state(model), state(moving.model))


@pytest.mark.parametrize("recipe", ["wise", "swa", "lp-ft+source-ensemble", "lolsgd+ema", "lp"])
def test_validate_is_told_the_place_of_its_record(recipe, net, rows, tmp_path):
    told = []

    def place(model, epoch, stage):
        told.append((epoch, stage))
        return {"told": epoch}

    def stop(model, record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    whole = train(net, rows, recipe, epochs=3, validate=place)
    assert told == [(r["epoch"], r["stage"]) for r in whole.history]
    assert all(r["told"] == r["epoch"] for r in whole.history)
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        train(net, rows, recipe, epochs=3, validate=place, callbacks=[stop], out=tmp_path)
    resumed = train(net, rows, recipe, epochs=3, validate=place, out=tmp_path)
    assert told == [(r["epoch"], r["stage"]) for r in resumed.history] and len(resumed.history) == len(whole.history)


def test_dropout_only_with_frozen_statistics(net, rows):
    thinned = train(net, rows, "bn-frozen:dropout=0.9")
    full = train(net, rows, "bn-frozen:dropout=0")
    assert not same(state(thinned.model), state(full.model))
    assert thinned.history[1]["loss"] > full.history[1]["loss"]


def test_the_head_learns_faster(net, rows):
    run = train(net, rows, backbone_lr_scale=0.0, weight_decay=0.0)
    assert changed(state(net), state(run.model)) == HEAD | STATISTICS
    assert run.settings["backbone_lr_scale"] == 0 and run.settings["nesterov"] is True


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adabelief", "adadelta", "adagrad", "rmsprop"])
def test_optimizers_of_the_figure(optimizer, net, rows):
    run = train(net, rows, optimizer=optimizer, lr=0.01)
    assert changed(state(net), state(run.model)) == HEAD | BODY | STATISTICS


def test_seed_decides(net, rows):
    a, b, c = (train(net, rows, "lolsgd", seed=s) for s in (0, 0, 1))
    assert same(state(a.model), state(b.model)) and not same(state(a.model), state(c.model))


def test_few_rows_make_one_smaller_batch_and_steps_may_exceed_a_pass(net, rows):
    few = (rows[0][:5], rows[1][:5])
    assert len(train(net, few, batch_size=64).history) == 3
    assert [r["loss"] for r in train(net, few, steps_per_epoch=4).history[1:]]


def test_callbacks_see_every_epoch_and_may_stop(net, rows):
    told = []
    run = train(net, rows, epochs=5, callbacks=[lambda model, record: told.append(record["epoch"]) or len(told) == 3])
    assert told == [0, 1, 2] and [r["epoch"] for r in run.history] == [0, 1, 2]


def test_oracle_takes_rows_of_all_classes(net, rows, everything):
    with pytest.raises(UserError, match=r"not among the seen classes.*3, 4, 5.*oracle-ft"):
        train(net, everything)
    run = train(net, rows, "oracle-ft", all_data=everything, epochs=6, backbone_lr_scale=1.0, lr=0.2)
    assert run.settings["rows"] == 44 and run.seen == ["0", "1", "2"]
    assert float((run.model(everything[0]).argmax(1) == everything[1]).float().mean()) > 0.5


def test_a_classifier_brings_its_names(net, rows):
    names = ["ant", "bee", "cow", "dog", "eel", "fox"]
    start = Classifier(net, "fc", None, names, "mine")
    run = fine_tune(start, rows, ["bee", "ant", "cow"], epochs=1)
    assert run.seen == ["ant", "bee", "cow"] and run.classes == names and run.classifier.class_names == names
    with pytest.raises(UserError, match="did you mean bee"):
        fine_tune(start, rows, ["beee"], epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr out of range"),
        ({"epochs": 0}, "epochs out of range"),
        ({"optimizer": "sgdd"}, "unknown optimizer"),
        ({"backbone_lr_scale": -1.0}, "backbone_lr_scale out of range"),
        ({"steps_per_epoch": 0}, "steps_per_epoch out of range"),
        ({"augment": lambda p, g: p}, "augmentation needs pictures"),
        ({"local": 0}, "a local run that there is not"),
        ({"M": 2}, "unknown option"),
        ({"mixed_precision": "fp16"}, "fp16 training needs a GPU"),
    ],
)
def test_settings_that_cannot_be(options, message, net, rows):
    with pytest.raises(UserError, match=message):
        train(net, rows, **options)


def test_rows_that_cannot_be(net, rows):
    x, y = rows
    with pytest.raises(UserError, match="no row to train on"):
        train(net, (x[:0], y[:0]))
    with pytest.raises(UserError, match="rows without"):
        train(net, (x, torch.where(y == 0, -1, y)))
    with pytest.raises(UserError, match="two absent classes"):
        fine_tune(net, rows, [0, 1, 2, 3, 4], "distill-absent", epochs=1)
    with pytest.raises(UserError, match=r"unknown executor.*local:0"):
        train(net, rows, "lolsgd", executor="local:0")


def test_local_runs_stay_on_one_machine(net, rows, monkeypatch):
    monkeypatch.setattr("ft_calibrate.recipes.training.make_executor", lambda text: object())
    with pytest.raises(UserError, match=r"one machine here in --executor: ray; use local:N, or one job"):
        train(net, rows, "lolsgd", executor="ray")


@pytest.mark.parametrize("recipe", ["ft", "lolsgd"])
def test_a_loss_that_explodes_names_the_remedy(recipe, net, rows):
    with pytest.raises(UserError, match=r"(loss is|weights are) not finite in .*lower the learning rate"):
        train(net, rows, recipe, lr=1e37, epochs=4)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_cosine_head_starts_from_the_source_head(net):
    head = cosine_head_from(net.fc, 7.0)
    f = torch.randn(5, 24)
    cosines = torch.nn.functional.cosine_similarity(f[:, None], net.fc.weight[None], dim=2)
    assert torch.allclose(head(f), 7 * cosines, atol=1e-5)
    assert torch.allclose(head.weight.norm(dim=1), torch.ones(6), atol=1e-6) and head.bias is None
    assert CosineHead(4, 3, bias=True)(torch.ones(1, 4)).shape == (1, 3) and "bias=True" in repr(
        CosineHead(4, 3, bias=True)
    )
    with pytest.raises(UserError, match="linear head"):
        cosine_head_from(nn.ReLU(), 1.0)
    with pytest.raises(UserError, match="its own head"):
        fine_tune(nn.Linear(4, 3), (torch.randn(6, 4), torch.tensor([0, 1] * 3)), [0, 1], "cosine-head", epochs=1)


def test_low_rank_updates_spare_head_attention_and_groups(net, rows):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.grouped = nn.Conv2d(4, 4, 3, groups=4)
            self.inner, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    odd = Odd()
    assert lora_targets(odd, odd.fc) == ["inner"]
    with pytest.raises(UserError, match="no layer for low-rank updates"):
        fine_tune(nn.Sequential(nn.Flatten(), nn.Linear(36, 6)), rows, SEEN, "lora", epochs=1)
    run = train(net, rows, "lora:r=2", epochs=3)
    update = (run.model.body[0].weight - net.body[0].weight).flatten(1)
    assert int(torch.linalg.matrix_rank(update, atol=1e-6)) <= 2


def test_real_families_train():
    for spec in ("random:timm:resnet10t?num_classes=6", "random:timm:vit_tiny_patch16_224?num_classes=6&img_size=32"):
        start = load_classifier(spec)
        x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        run = fine_tune(start, (x, torch.arange(8) % 3), SEEN, "frozen-head+rank", epochs=1, batch_size=8)
        head = start.head_name
        assert same(state(start.head), state(run.model.get_submodule(head))) and run.head_name == head
        assert changed(state(start.model), state(run.model))
        lp = fine_tune(start, (x, torch.arange(8) % 3), SEEN, "lp", epochs=1, batch_size=8)
        assert {k.rpartition(".")[0] for k in changed(state(start.model), state(lp.model))} == {head}


def test_recipe_table_and_package_names_agree():
    import ft_calibrate.recipes as package

    assert set(package.__all__) <= {*dir(package), *package._WHERE} and set(RECIPES) == set(recipe_names())
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError):
        package.nothing  # noqa: B018
    assert copy.deepcopy(RECIPES["ft"]) == RECIPES["ft"]
