"""What generate knows and a forward does not: the whole conversation, and where its prompt ends.

Three methods of an installed model get one of ours in front, on the instance, each of which passes its arguments on.
With any other cache they do nothing else. With a compressed one they tell it

* ``_prefill``: how long the prompt is, and that it has been read. The tokens of a conversation that goes on are
  compared with those the cache has read, since a cache given another prompt would answer nonsense without a word.
* ``prepare_inputs_for_generation``: whether the next forward still reads the prompt. One token may be the last chunk of
  a prompt, and several may be proposals of assisted and prompt-lookup decoding.
* ``_prepare_position_ids_for_generation``: nothing, but models with multimodal rotary positions (Qwen-VL and its kin)
  keep the offset of a conversation in a place of their own, which is made that of the cache's conversation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

from torch import Tensor, nn

__all__ = ["Announced", "announced", "keep_deltas", "restore_deltas", "stand_in_front", "step_aside"]


@dataclass(frozen=True)
class Announced:
    """What generate says of the forward that it is about to run.

    Attributes
    ----------
    past : int
        Tokens that the cache had read when it was said; another number means that it is about another forward.
    reading : bool
        Whether the forward still reads the prompt, however few tokens it has.
    end : int or None
        Tokens in all when the prompt has been read; None where that is not known.
    proposals : bool
        Whether the prompt's last tokens may be proposals.
    """

    past: int
    reading: bool
    end: int | None = None
    proposals: bool = False


def announced(cache: Any, past: int) -> Announced | None:
    """Take what was said of the forward that begins.

    Parameters
    ----------
    cache : cache
    past : int
        Tokens that it has read.

    Returns
    -------
    Announced or None
        None for a forward that generate does not run.
    """
    said: Announced | None = getattr(cache, "announced", None)
    if said is None:
        return None
    cache.announced = None
    return said if said.past == past else None


class InFront:
    """One of our functions in front of a method of one model, among the attributes of the instance.

    It refers to its model weakly, so that a model is freed as before, and follows it into copies and pickles.

    Parameters
    ----------
    model : nn.Module
    name : str
        Of the method.
    former : callable, optional
        What stood among the attributes of the instance before.
    """

    def __init__(self, model: nn.Module, name: str, former: Callable[..., Any] | None = None) -> None:
        self._model = ref(model)
        self.name = name
        self.former = former

    @property
    def model(self) -> nn.Module:
        """The model."""
        model = self._model()
        assert model is not None
        return model

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method itself, for whoever asks for its signature."""
        if self.former is not None:
            return self.former
        method: Callable[..., Any] = getattr(type(self.model), self.name).__get__(self.model)
        return method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _FRONTS[self.name](self.model, self.__wrapped__, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> InFront:
        return InFront(memo.get(id(self.model), self.model), self.name, self.former)

    def __reduce__(self) -> tuple[Any, ...]:
        return InFront, (self.model, self.name, self.former)


def stand_in_front(model: nn.Module) -> None:
    """Put our functions in front of a model's methods; again is harmless.

    Parameters
    ----------
    model : nn.Module
        Methods that it lacks are left out.
    """
    for name in _FRONTS:
        former = vars(model).get(name)
        if hasattr(model, name) and not isinstance(former, InFront):
            setattr(model, name, InFront(model, name, former))


def step_aside(model: nn.Module) -> None:
    """Take :func:`stand_in_front` back.

    Parameters
    ----------
    model : nn.Module
    """
    for name in _FRONTS:
        mine = vars(model).get(name)
        if isinstance(mine, InFront):
            delattr(model, name)
            if mine.former is not None:
                setattr(model, name, mine.former)


def restore_deltas(model: nn.Module, cache: Any, past: int) -> None:
    """Give a model the rotary offset of the conversation that a cache holds.

    Parameters
    ----------
    model : nn.Module
    cache : cache
    past : int
        Tokens that it has read; the offset of a new conversation is the model's own business.
    """
    holder: Any = _holder(model)
    known = getattr(getattr(cache, "tokens", None), "rope_deltas", None)
    if past and holder is not None and known is not None:
        holder.rope_deltas = known


def keep_deltas(model: nn.Module, cache: Any) -> None:
    """Keep the rotary offset of the conversation that was just read.

    Parameters
    ----------
    model : nn.Module
    cache : cache
    """
    holder, table = _holder(model), getattr(cache, "tokens", None)
    if holder is not None and table is not None:
        table.rope_deltas = vars(holder)["rope_deltas"]


def _holder(model: nn.Module) -> Any:
    """The module that keeps ``rope_deltas``, None for models without."""
    if "rope_deltas" in vars(model):
        return model
    inner = model._modules.get("model")
    return inner if inner is not None and "rope_deltas" in vars(inner) else None


def _compressed(model_kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments when it is a compressed one, else None."""
    cache = model_kwargs.get("past_key_values")
    return cache if hasattr(cache, "begin_forward") and hasattr(cache, "check_prompt") else None


def _position_ids(model: nn.Module, inner: Callable[..., Any], inputs: Any, model_kwargs: dict[str, Any]) -> Any:
    cache = _compressed(model_kwargs)
    if cache is None:
        return inner(inputs, model_kwargs)
    past = cache.get_seq_length()
    restore_deltas(model, cache, past)
    found = inner(inputs, model_kwargs)
    if past:  # it may have added the pictures of this turn
        keep_deltas(model, cache)
    return found


def _prefill(
    model: nn.Module,
    inner: Callable[..., Any],
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    is_first_iteration: bool = True,
) -> Any:
    call = partial(inner, input_ids, generation_config, model_kwargs, is_first_iteration=is_first_iteration)
    cache = _compressed(model_kwargs)
    if cache is None or not is_first_iteration:
        return call()
    past, embeds = cache.get_seq_length(), model_kwargs.get("inputs_embeds")
    mask = model_kwargs.get("attention_mask")
    covered = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[-1]
    if embeds is not None:
        end = int(embeds.shape[1])
        cache.check_length(end)
    elif covered is None or covered == input_ids.shape[1]:  # the whole conversation
        end = int(input_ids.shape[1])
        cache.check_prompt(input_ids)
    else:  # its new tokens only
        end = past + int(input_ids.shape[1])
        cache.check_length(covered, end)
    size = getattr(generation_config, "prefill_chunk_size", None)
    cache.expect_prompt(end, chunked=size is not None and end - past > size)
    cache.prompt = (past, end)
    try:
        output = call()
    finally:
        cache.prompt = None
    cache.end_prompt()
    return output


def _prepare_inputs(model: nn.Module, inner: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    cache = _compressed(kwargs)
    if cache is None:
        return inner(input_ids, *args, **kwargs)
    past, first = cache.get_seq_length(), bool(kwargs.get("is_first_iteration", False))
    if not first:
        cache.announced = Announced(past, reading=False)
    elif cache.prompt is not None:
        start, end = cache.prompt
        cache.announced = Announced(past, reading=end - start > 1, end=end)
    else:  # decoding with proposals, which goes without `_prefill`
        if past and not args and kwargs.get("next_sequence_length") is None and kwargs.get("inputs_embeds") is None:
            cache.check_prompt(input_ids)
            kwargs["next_sequence_length"] = input_ids.shape[1] - past  # generate itself would read all of it again
        cache.announced = Announced(past, reading=True, proposals=True)
    return inner(input_ids, *args, **kwargs)


_FRONTS: dict[str, Callable[..., Any]] = {
    "_prefill": _prefill,
    "prepare_inputs_for_generation": _prepare_inputs,
    "_prepare_position_ids_for_generation": _position_ids,
}
