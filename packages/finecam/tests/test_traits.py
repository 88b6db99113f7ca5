"""Greedy trait ranking equals brute force; the analyses built on it do what they say."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from finecam.prompt_attention import PreNormLayer
from finecam.prompt_opaque import OpaqueLayer
from finecam.promptcam import PromptCAM
from finecam.trait_bench import bench_greedy
from finecam.traits import every_class, manipulate, pruning_curve, rank_traits, shared_traits
from torch import Tensor, nn
from vfm_core.backbones import wrap
from vfm_core.errors import UserError

torch.set_num_threads(1)


def prompt_cam(heads: int = 6, classes: int = 4, vit: dict[str, Any] | None = None, **options: Any) -> PromptCAM:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_classes": 0, "num_heads": heads}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = VisionTransformer(**(sizes | (vit or {})))
        for parameter in net.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model = PromptCAM(wrap(net), classes, **options).double()
    with torch.no_grad():
        # Rival classes, so that blurring some heads changes the decision.
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(1 + classes, model.prompts.shape[1], generator=generator, dtype=torch.float64)
        model.prompts.copy_(draws[:1] + 0.02 * draws[1:])
    return model


def images(n: int = 3, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def blurred_forward(model: PromptCAM, x: Tensor, target: int, heads: list[int], uniform: str) -> Tensor:
    """One image through the whole network, written out, with some heads of the target's row made uniform."""
    net: Any = model.backbone.model
    c, prefix = model.num_classes, net.num_prefix_tokens
    e = net._pos_embed(net.patch_embed(x[None]))
    for i, block in enumerate(net.blocks):
        prompts = model.prompts if i == len(net.blocks) - 1 else model.agnostic[i]
        h = torch.cat([prompts[None], e], dim=1)
        b, t, d = h.shape
        r = block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(h)).view(b, t, 3, r, d // r).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (d // r) ** 0.5
        if i == len(net.blocks) - 1:
            if not model.prompt_self_attention:
                scores[..., :c] = float("-inf")
            alpha = scores.softmax(-1)
            first = c + prefix if uniform == "patches" else 0 if model.prompt_self_attention else c
            for head in heads:
                alpha[:, head, target] = 0.0
                alpha[:, head, target, first:] = 1.0 / (t - first)
        else:
            alpha = scores.softmax(-1)
        h = h + block.attn.proj((alpha @ v).transpose(1, 2).reshape(b, t, d))
        h = h + block.mlp(block.norm2(h))
        p, e = h[:, : len(prompts)], h[:, len(prompts) :]
    return model.head(net.norm(p))[0, :, 0]


def brute_force(model: PromptCAM, x: Tensor, target: int, uniform: str) -> tuple[list[int], list[float], int, int]:
    """Order of removal, scores, heads the paper's rule leaves, and the number of full forward passes."""
    left, forwards, sufficient = list(range(model.backbone.num_heads)), 0, None
    gone: list[int] = []
    scores: list[float] = []
    while left:
        trials = []
        for head in left:
            s = blurred_forward(model, x, target, [*gone, head], uniform)
            trials.append((float(s[target]), bool(s.argmax() == target)))
            forwards += 1
        best = max(range(len(left)), key=lambda i: trials[i][0])
        if not trials[best][1] and sufficient is None:
            sufficient = len(left)
        scores.append(trials[best][0])
        gone.append(left.pop(best))
    return gone, scores, 0 if sufficient is None else sufficient, forwards


@pytest.mark.parity
@pytest.mark.parametrize("uniform", ["tokens", "patches"])
@pytest.mark.parametrize("self_attention", [True, False])
@pytest.mark.parametrize("layer", [PreNormLayer, OpaqueLayer])
def test_ranking_equals_brute_force(uniform: Any, self_attention: bool, layer: type) -> None:
    model = prompt_cam(prompt_self_attention=self_attention)
    model.layer = layer(model.backbone)
    x = images()
    with torch.no_grad():
        traits = rank_traits(model, x, top=2, uniform=uniform)
        orders = set()
        for i in range(len(x)):
            order, scores, sufficient, forwards = brute_force(model, x[i], int(traits.target[i]), uniform)
            assert forwards == 6 * 7 // 2
            assert traits.order[i].tolist() == order
            np.testing.assert_allclose(traits.scores[i].numpy(), scores, rtol=1e-10)
            assert int(traits.sufficient[i]) == sufficient
            assert traits.heads[i].tolist() == order[::-1][:2]
            orders.add(tuple(order))
    assert len(orders) > 1
    assert traits.correct.all()


@pytest.mark.parity
def test_twelve_heads_take_78_trials() -> None:
    model = prompt_cam(heads=12, vit={"embed_dim": 48})
    x = images(1)
    with torch.no_grad():
        order, scores, _, forwards = brute_force(model, x[0], 1, "tokens")
        traits = rank_traits(model, x, target=1)
    assert forwards == 78
    assert traits.order[0].tolist() == order
    np.testing.assert_allclose(traits.scores[0].numpy(), scores, rtol=1e-10)


def test_ranking_runs_the_network_once() -> None:
    model, calls = prompt_cam(), []
    handle = model.backbone.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    rank_traits(model, images())
    handle.remove()
    assert len(calls) == 1


def test_maps_heads_and_peaks_belong_together() -> None:
    model = prompt_cam()
    x = images()
    traits = model.traits(x, target=[1, 0, 3], top=3)
    attention = model(x, return_attention=True)[1].detach().unflatten(-1, (4, 4))
    for i, target in enumerate([1, 0, 3]):
        torch.testing.assert_close(traits.attention[i], attention[i, :, target])
        for k, head in enumerate(traits.heads[i].tolist()):
            torch.testing.assert_close(traits.maps[i, k], attention[i, head, target])
            assert float(traits.peaks[i, k]) == float(attention[i, head, target].max())
    torch.testing.assert_close(traits.mean_map(), traits.maps.mean(1))
    assert sorted(traits.ranking[0].tolist()) == list(range(6))
    assert traits.maps.shape == (3, 3, 4, 4)
    assert model.traits(x, top=99).heads.shape == (3, 6)


def test_mean_map_by_the_paper_s_rule() -> None:
    traits = rank_traits(prompt_cam(), images(12))
    for i, mean in enumerate(traits.mean_map("misclassified")):
        kept = traits.ranking[i, : max(int(traits.sufficient[i]), 1)]
        torch.testing.assert_close(mean, traits.attention[i, kept].mean(0))
    assert len(set(traits.sufficient.tolist())) > 1


def test_misclassified_image_shows_both_classes() -> None:
    model = prompt_cam()
    x = images()
    prediction = model(x).argmax(1)
    wrong = (prediction + 1) % 4
    traits = rank_traits(model, x, wrong)
    assert not traits.correct.any()
    assert traits.sufficient.tolist() == [6, 6, 6]
    maps = model.maps(x, torch.stack([wrong, prediction], 1))
    torch.testing.assert_close(traits.attention, maps[:, 0])
    torch.testing.assert_close(traits.predicted_attention, maps[:, 1])


def test_drop_out_is_off_and_mode_restored() -> None:
    model = prompt_cam(dropout=0.5).train()
    first, second = rank_traits(model, images()), rank_traits(model, images())
    assert torch.equal(first.scores, second.scores)
    assert model.training


def test_pruning_curve_of_hand_made_scores() -> None:
    traits = rank_traits(prompt_cam(heads=2), images())
    logits = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    hand = type(traits)(
        target=torch.tensor([0, 1, 3]),
        prediction=torch.tensor([0, 1, 0]),
        logits=logits,
        order=traits.order,
        scores=torch.tensor([[2.0, 0.5], [1.5, 1.2], [9.0, 9.0]]),
        heads=traits.heads,
        sufficient=traits.sufficient,
        attention=traits.attention,
        predicted_attention=traits.predicted_attention,
    )
    curve = pruning_curve(hand)
    assert curve["heads_left"].tolist() == [2, 1, 0]
    assert curve["accuracy"].tolist() == [1.0, 1.0, 0.5]
    assert int(curve["n"]) == 2
    full = [np.exp(3) / (np.exp(3) + np.e + 2), np.exp(2) / (np.exp(2) + np.e + 2)]
    assert curve["probability"][0] == pytest.approx(np.mean(full))


def test_shared_traits() -> None:
    model = prompt_cam()
    with torch.no_grad():
        model.prompts[2] = model.prompts[1]
        model.prompts[0] *= -1
    x = images()
    same = shared_traits(model, x, 1, 2)
    torch.testing.assert_close(same.cosine, torch.ones(3, 6, dtype=torch.float64))
    assert torch.equal(same.iou, torch.ones(3, 6))
    other = shared_traits(model, x, 0, 1, strongest=0.25)
    maps = model.maps(x, [0, 1])
    a, b = maps[1, 0, 4].flatten(), maps[1, 1, 4].flatten()
    assert float(other.cosine[1, 4]) == pytest.approx(float(a @ b / (a.norm() * b.norm())))
    top = [set(m.topk(4).indices.tolist()) for m in (a, b)]
    assert float(other.iou[1, 4]) == pytest.approx(len(top[0] & top[1]) / len(top[0] | top[1]))
    assert other.cosine.min() < 0.99


def test_every_class_sees_the_same_image() -> None:
    model = prompt_cam()
    x = images()
    attention = model(x, return_attention=True)[1].mean(1).unflatten(-1, (4, 4))
    torch.testing.assert_close(every_class(model, x), attention)
    torch.testing.assert_close(every_class(model, x, [2]), attention[:, [2]])


def test_manipulation() -> None:
    model = prompt_cam()
    before = images()
    after = before.flip(0)
    found = manipulate(model, before, after)
    s, t = model(before), model(after)
    assert torch.equal(found.before, s.argmax(1))
    assert torch.equal(found.after, t.argmax(1))
    torch.testing.assert_close(found.score_change, t - s)
    assert found.flipped.tolist() == (s.argmax(1) != t.argmax(1)).tolist()
    torch.testing.assert_close(found.attention_after[0], model.maps(after, found.target[:1])[0, 0])
    torch.testing.assert_close(found.attention_before[2], model.maps(before, found.target[2:])[2, 0])
    same = manipulate(model, before, before, target="3")
    assert not same.flipped.any()
    assert same.target.tolist() == [3, 3, 3]


def test_bench_agrees_and_is_faster() -> None:
    model = prompt_cam(heads=12, vit={"embed_dim": 96, "depth": 6, "img_size": 64}).float()
    found = bench_greedy(model, images(1, 64).float(), repeats=1)
    assert found["trials"] == 78
    assert found["same_order"]
    assert found["ratio"] > 5  # 70 and more at the size of ViT-S; here calls outweigh arithmetic
    assert found["forwards_s"] > found["ours_s"] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: rank_traits(m, x, top=0), "number of traits must be positive"),
        (lambda m, x: rank_traits(m, x, uniform=cast(Any, "pixels")), "unknown uniform map"),
        (lambda m, x: rank_traits(m, x, target=[0, 1]), "give one class or 3"),
        (lambda m, x: rank_traits(m, x, target="wren"), "unknown class"),
        (lambda m, x: rank_traits(m, x * torch.nan), "logits are not finite in images .0, 1, 2."),
        (lambda m, x: shared_traits(m, x, 1, 1), "two different classes"),
        (lambda m, x: shared_traits(m, x, 0, 1, strongest=0), "use 0 < q <= 1"),
        (lambda m, x: manipulate(m, x, x[:1]), "differ in shape"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    model = prompt_cam().train()
    with pytest.raises(UserError, match=message):
        call(model, images())
    assert model.training


def test_gradient_free_and_nothing_left_behind() -> None:
    model = prompt_cam()
    rank_traits(model, images())
    assert all(p.grad is None for p in model.parameters())
    assert all(isinstance(m, nn.Module) and not m._forward_hooks for m in model.modules())
