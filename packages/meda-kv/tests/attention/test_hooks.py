"""Installing and uninstalling: names, hooks, threads, failures, and the untouched model."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import zoo
from meda_kv.attention import hooks, install, installed, is_installed, running_cache, uninstall
from meda_kv.attention.interface import RUNNING
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class StandInLayer(DynamicLayer):
    """A layer that answers the wrapper and keeps everything."""

    valid = None
    log: list[tuple[str, Any]]

    @property
    def visual(self) -> torch.Tensor:
        return torch.zeros(self.keys.shape[:3], dtype=torch.bool)

    def mask_for(self, query: torch.Tensor, given: Any, base: str) -> Any:
        self.log.append(("mask", base))
        return given


class StandInCache(DynamicCache):
    """The least that hooks and wrappers ask of a compressed cache; writes down what they ask."""

    def __init__(self, model: nn.Module, watch: bool = True) -> None:
        super().__init__(config=model.config.get_text_config(decoder=True))
        self.model = model
        self.watch = watch
        self.log: list[tuple[str, Any]] = []
        self.looks: list[Any] = []
        self.layers = [StandInLayer() if type(one) is DynamicLayer else one for one in self.layers]
        for layer in self.layers:
            layer.log = self.log

    def begin_forward(self, tokens: Any) -> None:
        self.log.append(("begin", tokens))

    def wants(self, layer_idx: int, q_len: int) -> bool:
        return self.watch

    def after_attention(self, layer_idx: int, look: Any) -> None:
        assert running_cache() is self
        self.looks.append(look)

    def end_forward(self, error: bool) -> None:
        self.log.append(("end", error))


def test_hooks_bracket_the_forward_and_show_what_the_attention_saw() -> None:
    model, inputs = zoo.tiny_vlm("llava")
    given = inputs(batch=2, padded=True)
    cache = StandInCache(model)
    install(model)
    with torch.no_grad():
        model(**given, past_key_values=cache)
    n = given["input_ids"].shape[1]
    assert [name for name, _ in cache.log] == ["begin", "mask", "mask", "mask", "end"]
    assert cache.log[0][1].valid.equal(given["attention_mask"].bool())
    assert cache.log[0][1].visual.equal(given["input_ids"] == zoo.IMAGE)
    assert cache.log[-1] == ("end", False) and running_cache() is None
    look = cache.looks[1]
    assert look.query.shape == (2, 4, n, 8) and look.key.shape == look.value.shape == (2, 2, n, 8)
    assert (look.layer, look.offset, look.softcap) == (1, 0, None) and look.scale == pytest.approx(8**-0.5)
    causal = torch.ones(n, n, dtype=torch.bool).tril() & given["attention_mask"].bool()[:, None, None, :]
    real = given["attention_mask"].bool()[:, None, :, None]
    assert (look.visible & real).equal(causal & real)


def test_look_reproduces_the_output_of_the_layer() -> None:
    model, inputs = zoo.tiny_vlm("text")
    install(model)
    cache = StandInCache(model)
    outputs = []
    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        model(**inputs(text=9), past_key_values=cache)
    handle.remove()
    look = cache.looks[0]
    scores = look.query @ look.key.repeat_interleave(2, 1).transpose(2, 3) * look.scale
    weights = scores.masked_fill(~torch.ones(10, 10, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    mixed = (weights @ look.value.repeat_interleave(2, 1)).transpose(1, 2).reshape(1, 10, -1)
    torch.testing.assert_close(mixed, outputs[0])


def test_install_twice_is_once_and_uninstall_restores() -> None:
    model, inputs = zoo.tiny_vlm("qwen2_5_vl", attn="eager")
    text, vision = model.config.text_config, model.config.vision_config
    assert install(model) is True and install(model) is False
    assert text._attn_implementation == "meda_eager" and vision._attn_implementation == "eager"
    cache = StandInCache(model)
    with torch.no_grad():
        model(**inputs(), past_key_values=cache)
    assert [name for name, _ in cache.log].count("begin") == 1
    assert uninstall(model) is True and uninstall(model) is False
    assert text._attn_implementation == "eager" and not is_installed(model)
    for module in model.modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called)
        assert not any(hooks) and not module._forward_pre_hooks_with_kwargs and not module._forward_hooks_with_kwargs


def test_uninstall_leaves_hooks_of_others() -> None:
    model, inputs = zoo.tiny_vlm("text")
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    install(model)
    uninstall(model)
    model(**inputs())
    assert calls == [1]


def test_installed_takes_back_only_what_it_did() -> None:
    model, _ = zoo.tiny_vlm("text")
    with installed(model):
        assert is_installed(model)
    assert not is_installed(model) and model.config._attn_implementation == "sdpa"
    install(model)
    with pytest.raises(KeyError), installed(model):
        raise KeyError
    assert is_installed(model)


def test_a_copy_works_and_a_change_of_implementation_is_followed() -> None:
    model, inputs = zoo.tiny_vlm("text")
    install(model)
    twin = copy.deepcopy(model)
    assert install(twin) is False
    cache = StandInCache(twin)
    with torch.no_grad():
        twin(**inputs(), past_key_values=cache)
    assert [name for name, _ in cache.log].count("begin") == 1
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        twin(**inputs(), past_key_values=(again := StandInCache(twin)))
    assert ("mask", "eager") in again.log and twin.config._attn_implementation == "meda_eager"
    uninstall(twin)
    assert is_installed(model) and model.config._attn_implementation == "meda_sdpa"


def test_modules_are_walked_once_a_prompt_and_a_change_between_tokens_is_still_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = zoo.tiny_vlm("llava")
    given = inputs()
    install(model)
    walks = []
    walk = hooks.text_configs

    def counted(model: nn.Module) -> list[Any]:
        walks.append(1)
        return walk(model)

    monkeypatch.setattr(hooks, "text_configs", counted)
    cache = StandInCache(model)
    token = given["input_ids"][:, -1:]

    def step() -> None:
        mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
        model(input_ids=token, attention_mask=mask, past_key_values=cache)

    with torch.no_grad():
        model(**given, past_key_values=cache)
        for _ in range(5):
            step()
        assert walks == [1]
        model.set_attn_implementation("eager")
        cache.log.clear()
        step()
    assert walks == [1] and model.config.text_config._attn_implementation == "meda_eager"
    assert [said for name, said in cache.log if name == "mask"] == ["eager"] * 3


def test_a_layer_with_a_configuration_of_its_own_is_found_at_the_next_prompt() -> None:
    model, inputs = zoo.tiny_vlm("text")
    install(model)
    with torch.no_grad():
        model(**inputs(), past_key_values=StandInCache(model))
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation_internal = "eager"
    cache = StandInCache(model)
    with torch.no_grad():
        model(**inputs(), past_key_values=cache)
    assert [said for name, said in cache.log if name == "mask"] == ["sdpa", "eager", "sdpa"]


def test_two_models_with_one_configuration() -> None:
    from transformers import LlamaForCausalLM

    first, inputs = zoo.tiny_vlm("text")
    second = LlamaForCausalLM(first.config).eval()
    install(first), install(second)
    uninstall(first)
    cache = StandInCache(second)
    with torch.no_grad():
        second(**inputs(), past_key_values=cache)
    assert ("mask", "sdpa") in cache.log


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_another_cache_gives_bitwise_identical_logits(family: str, attn: str) -> None:
    model, inputs = zoo.tiny_vlm(family, attn=attn)
    given = inputs(batch=2, padded=True)
    before = zoo.generate(model, given, zoo.plain_cache(model))
    none_before = model(**given, use_cache=False).logits
    install(model)
    after = zoo.generate(model, given, zoo.plain_cache(model))
    assert before[0].equal(after[0]) and before[1].equal(after[1])
    assert none_before.equal(model(**given, use_cache=False).logits)
    uninstall(model)
    assert zoo.generate(model, given, zoo.plain_cache(model))[0].equal(before[0])


def test_gradients_and_mode_are_untouched() -> None:
    model, inputs = zoo.tiny_vlm("text")
    model.train()
    install(model)
    loss = model(**inputs(), labels=inputs()["input_ids"]).loss
    loss.backward()
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_failing_forward_closes_the_cache_and_the_next_one_works() -> None:
    model, inputs = zoo.tiny_vlm("llava")
    install(model)
    cache = StandInCache(model)

    def broken(*_: Any) -> None:
        raise ArithmeticError("broken layer")

    handle = model.model.language_model.layers[1].register_forward_pre_hook(broken)
    with pytest.raises(ArithmeticError), torch.no_grad():
        model(**inputs(), past_key_values=cache)
    assert cache.log[-1] == ("end", True) and RUNNING.get() is None
    handle.remove()
    with torch.no_grad():
        model(**inputs(), past_key_values=(fresh := StandInCache(model)))
    assert fresh.log[-1] == ("end", False)


def test_interrupt_is_closed_by_the_next_forward() -> None:
    model, inputs = zoo.tiny_vlm("text")
    install(model)
    cache = StandInCache(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(**inputs(), past_key_values=cache)
    handle.remove()
    with torch.no_grad():
        model(**inputs())
    assert cache.log[-1] == ("end", True) and running_cache() is None


def test_two_threads_with_two_models_do_not_meet() -> None:
    made = [zoo.tiny_vlm("llava", seed=seed) for seed in (0, 1)]
    caches = [StandInCache(model) for model, _ in made]
    alone = [model(**inputs(seed=5)).logits for model, inputs in made]
    barrier = threading.Barrier(2)
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def meet(*_: Any) -> None:
        barrier.wait(timeout=20)

    for model, _ in made:
        install(model)
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(meet)

    def work(index: int) -> None:
        model, inputs = made[index]
        with torch.no_grad():
            results[index].append(model(**inputs(seed=5), past_key_values=caches[index]).logits)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert [name for name, _ in caches[index].log] == ["begin", "mask", "mask", "mask", "end"]
        assert results[index][0].equal(alone[index])


def test_positional_arguments_are_understood() -> None:
    model, inputs = zoo.tiny_vlm("text")
    install(model)
    cache, given = StandInCache(model), inputs()
    with torch.no_grad():
        model(given["input_ids"], given["attention_mask"], None, cache)
    assert cache.log[0][0] == "begin"


def test_inner_model_called_by_itself_is_refused() -> None:
    model, inputs = zoo.tiny_vlm("text")
    install(model)
    with pytest.raises(RuntimeError, match="LlamaModel was called by itself"):
        model.model(**inputs(), past_key_values=StandInCache(model))


def test_cache_of_another_model_is_refused() -> None:
    model, inputs = zoo.tiny_vlm("text")
    other, _ = zoo.tiny_vlm("text", seed=1)
    install(model), install(other)
    with pytest.raises(RuntimeError, match="made for another model"):
        model(**inputs(), past_key_values=StandInCache(other))
    assert running_cache() is None
