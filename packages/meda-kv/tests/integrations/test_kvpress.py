"""The press, inside a stand-in of kvpress's BasePress (version 0.5): the same tokens as our own cache keeps."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from tinyworld.vlm import build_vlm
from transformers import DynamicCache
from vfm_core.errors import UserError

IMAGE = 4  # id of <image> in tinyworld's vocabulary


@dataclass
class StandIn:
    """Hooks on every attention layer of the language model, as kvpress sets them."""

    def forward_hook(self, module, input, kwargs, output):
        raise NotImplementedError

    @contextmanager
    def __call__(self, model):
        language = getattr(model.model, "language_model", model.model)
        hooks = [
            layer.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True) for layer in language.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def queries_before_rope(module, hidden):
    rows, tokens, _ = hidden.shape
    return module.q_proj(hidden).view(rows, tokens, -1, module.head_dim).transpose(1, 2)


@pytest.fixture
def press_class(monkeypatch):
    import meda_kv.integrations.kvpress as ours

    package, helpers = ModuleType("kvpress"), ModuleType("kvpress.utils")
    package.BasePress, helpers.get_prerope_query_states = StandIn, queries_before_rope
    monkeypatch.setitem(sys.modules, "kvpress", package)
    monkeypatch.setitem(sys.modules, "kvpress.utils", helpers)
    monkeypatch.setitem(vars(ours), "MedaPress", None)
    monkeypatch.delitem(vars(ours), "MedaPress")
    return ours.MedaPress


@pytest.fixture(scope="module")
def model():
    return build_vlm(3)


def prompt(images=2, words=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(9, 30, (1, words), generator=generator)
    ids = torch.cat([torch.tensor([[1] + [5, *[IMAGE] * 16] * images]), text], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, 32, 32, generator=generator)
    return inputs


def read(model, inputs, press):
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        output = model(**inputs, past_key_values=cache)
    return cache, output.logits


@pytest.mark.filterwarnings("ignore:a prompt holds one modality")
@pytest.mark.parametrize(("method", "images"), [("meda", 2), ("snapkv", 2), ("pyramidkv", 2), ("meda", 0), ("h2o", 0)])
def test_the_press_keeps_what_our_cache_keeps(press_class, model, method, images):
    from meda_kv.attention import uninstall
    from meda_kv.cache import CompressedCache

    inputs = prompt(images, words=12 if images else 60)
    options = {"floor": 4} | ({"window": 4} if method in ("snapkv", "pyramidkv") else {})
    press = press_class(ratio=0.5, method=method, options=options)
    cache, _ = read(model, inputs, press)
    ours = CompressedCache(model, method, 0.5, **options)
    with torch.no_grad():
        model(**inputs, past_key_values=ours)
        ours.compress()
    uninstall(model)
    assert press.kept == ours.summary()["budgets"]
    for mine, theirs in zip(ours.layers, cache.layers):
        torch.testing.assert_close(theirs.keys, mine.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.values, mine.values, atol=1e-5, rtol=1e-5)


def test_the_total_is_exact_and_the_first_logits_are_untouched(press_class, model):
    inputs = prompt()
    n = inputs["input_ids"].shape[1]
    cache, logits = read(model, inputs, press := press_class(ratio=0.6, options={"floor": 4}))
    with torch.no_grad():
        plain = model(**inputs).logits
    assert torch.equal(logits, plain)
    assert sum(press.kept) == round(0.6 * 4 * n)
    assert [layer.keys.shape[2] for layer in cache.layers] == press.kept


def test_generation_inside_the_block_is_left_alone_and_every_prompt_starts_anew(press_class, model):
    press = press_class(ratio=0.5, method="h2o", options={"floor": 4})
    with torch.no_grad(), press(model):
        for seed in (0, 1):
            inputs, cache = prompt(seed=seed), DynamicCache()
            model(**inputs, past_key_values=cache)
            kept = list(press.kept)
            n = inputs["input_ids"].shape[1]
            model(torch.tensor([[9]]), past_key_values=cache, position_ids=torch.tensor([[n]]))
            assert press.kept == kept
            assert [layer.keys.shape[2] for layer in cache.layers] == [k + 1 for k in kept]


def test_hooks_are_gone_after_the_block_and_after_an_error(press_class, model):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    with pytest.raises(RuntimeError, match="from inside"), press_class()(model):
        assert hooks() > before
        raise RuntimeError("from inside")
    assert hooks() == before


def test_ratio_one_and_the_full_method_keep_everything(press_class, model):
    inputs = prompt()
    for press in (press_class(ratio=1.0), press_class(method="full")):
        cache, _ = read(model, inputs, press)
        assert {layer.keys.shape[2] for layer in cache.layers} == {inputs["input_ids"].shape[1]}


def test_kvpress_counts_what_is_dropped(press_class):
    press = press_class(ratio=0.2)
    assert press.compression_ratio == pytest.approx(0.8)
    press.compression_ratio = 0.4
    assert press.ratio == pytest.approx(0.6)
    for wrong in (1.0, -0.5):
        with pytest.raises(UserError, match="ratio"):
            press.compression_ratio = wrong


def test_wrong_settings_are_told(press_class):
    with pytest.raises(UserError, match="did you mean"):
        press_class(method="snapkvv")
    with pytest.raises(UserError, match="ratio"):
        press_class(ratio=0.0)
    with pytest.raises(UserError, match="re-rotate"):
        press_class(method="streaming", options={"rerotate": True})


def test_one_prompt_at_a_time(press_class, model):
    inputs = prompt()
    two = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    with pytest.raises(UserError, match="one prompt without padding"):
        read(model, two, press_class(options={"floor": 4}))


def test_a_quantised_cache_is_refused(press_class, model):
    inputs, cache = prompt(), DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    for layer in cache.layers:
        layer._quantized_keys = None
    with pytest.raises(TypeError, match="quantised"), torch.no_grad(), press_class()(model):
        model(torch.tensor([[9, 9]]), past_key_values=cache)


def test_without_kvpress_the_error_names_the_way_out(monkeypatch):
    import meda_kv.integrations.kvpress as ours

    vars(ours).pop("MedaPress", None)
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ImportError, match=r"meda_kv\.MedaCache"):
        getattr(ours, "Meda" + "Press")
    with pytest.raises(AttributeError):
        getattr(ours, "Other" + "Press")


def test_partial_rotation_turns_the_first_channels_only():
    from meda_kv.integrations.kvpress import rotated

    query = torch.randn(1, 2, 3, 6, generator=torch.Generator().manual_seed(0))
    angle = torch.rand(1, 3, 2, generator=torch.Generator().manual_seed(1)).repeat(1, 1, 2)
    turned = rotated(query, (angle.cos(), angle.sin()))
    assert torch.equal(turned[..., 4:], query[..., 4:])
    first = query[..., 0] * angle[:, None, :, 0].cos() - query[..., 2] * angle[:, None, :, 0].sin()
    torch.testing.assert_close(turned[..., 0], first)
