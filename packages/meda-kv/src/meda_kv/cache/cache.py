"""The cache that goes into ``model.generate``: reads a prompt in full, then keeps a share of it.

    cache = CompressedCache(model, "snapkv", ratio=0.2)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=256)

Every full-attention layer is a :class:`CompressedLayer`; sliding-window and linear layers keep the kind of cache that
transformers gives them. The hooks that are installed on the model tell the cache what is read and when.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from meda_kv.cache.compression import compress_cache, compress_layer
from meda_kv.cache.facts import CacheFacts
from meda_kv.cache.fork import copy_of, fork_of
from meda_kv.cache.forward import begin, check_length, check_prompt, end, end_prompt
from meda_kv.cache.layer import CompressedLayer
from meda_kv.cache.observation import Entropies, Watch, writable
from meda_kv.cache.options import Options, check_visual_mask, read_options
from meda_kv.cache.rerotate import PlainRope, plain_rope
from meda_kv.cache.tokens import TokenTable
from meda_kv.methods.base import Look, Method, check_ratio, observe_all

__all__ = ["CompressedCache"]

SHORT = 4096
"""Tokens of a prompt whose queries are kept without being asked for, when it is read in chunks."""


class CompressedCache(CacheFacts):
    """A KV cache that keeps a share of the prompt, by any method.

    Parameters
    ----------
    model : nn.Module
        A transformers model; the hooks are installed on it and stay (they do nothing with other caches).
    method : str or Method
        An arm of ``METHODS`` or one of your own.
    ratio : float
        Share of the prompt's slots to keep over all full-attention layers, in (0, 1].
    preset : str
        ``"paper"`` or ``"official-code"``: which column of defaults the MEDA arms take.
    compress_at : str, optional
        ``"decode"`` (before the first decoded token is read), ``"prefill"`` (as soon as the prompt has been read),
        ``"layer"`` (inside each layer, needs budgets that are known before; every forward that reads the prompt is
        brought down to its share of what was read so far, and later turns are appended) or ``"first-step"`` (after the
        first decoded token, whose attention enters the scores: official MEDA code). The method's own by default,
        ``"layer"`` with a budget profile. What is prompt and what is decoded is known from ``generate``, assisted and
        prompt-lookup decoding included. Forwards of your own are taken for prompt when they have several tokens and
        for decoding when they have one, so chunks of yours must not end in one of one token; ``"prefill"`` then
        means the end of the first forward.
    budgets : str, Path, dict or sequence, optional
        Instead of the method's allocator: ``"entropy"``, ``"uniform"``, ``"pyramid"``, a profile (file or its contents)
        or one share or count of slots per layer (then the ratio is not used).
    decode_budget : int, optional
        Slots per layer, on average over layers, to which the cache is compressed again while decoding, as soon as it
        holds `decode_slack` more. Scores go on adding up over decoded tokens. None: what is generated stays.
    decode_slack : int
        >= 1.
    visual_mask : Tensor, optional
        bool ``[B, n]``: visual tokens, for prompts that come as embeddings. It overrides what the ids say and is that
        of one prompt: :meth:`reset` forgets it, and ``cache.visual_mask`` takes that of the next prompt.
    buffer_step : int
        Slots of room in a new buffer.
    record : sequence of str or Method
        Further arms to observe for, so that :meth:`fork` can serve them from this reading of the prompt.
    keep_queries : bool
        Keep the prompt's queries until the compression, which makes cross-modal entropies exact for chunked prompts.
        Done in any case for prompts of up to 4096 tokens that ``generate`` reads in chunks (``prefill_chunk_size=``).
    block : int, optional
        Most query rows of attention to score at a time, for memory that runs out; chosen from the shapes by default.
        Merging has ``merge_block=`` for the same.
    seed : int
        Of methods that draw random numbers.
    **overrides
        Fields of the method to change, such as ``merge="none"`` or ``recent_share=0.5``.

    Attributes
    ----------
    model, method, ratio
        As given.
    compress_seconds : float
        Time spent in compression so far, in seconds.
    note : str or None
        Why nothing was compressed, None when something was (or nothing has been tried yet).

    Raises
    ------
    UserError
        A value out of range or an unknown name.
    TypeError
        The model cannot be served.

    Notes
    -----
    ``generate`` takes one cache: transformers refuses ``cache_implementation=`` beside this one ("Passing both"), so
    leave that out. A second turn may bring new pictures where the model itself can read them with a filled cache of any
    kind; the Qwen-VL classes of transformers cannot, when given the grids of the new pictures alone (StopIteration).
    ``copy.deepcopy`` copies what was read and shares the model.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Method = "meda",
        ratio: float = 0.2,
        *,
        preset: str = "paper",
        compress_at: str | None = None,
        budgets: str | Path | dict[str, Any] | Sequence[float] | None = None,
        decode_budget: int | None = None,
        decode_slack: int = 32,
        visual_mask: Tensor | None = None,
        buffer_step: int = 256,
        record: Sequence[str | Method] = (),
        keep_queries: bool = False,
        block: int | None = None,
        seed: int = 0,
        **overrides: Any,
    ) -> None:
        from meda_kv.attention import check_model, install

        facts = check_model(model)
        check_visual_mask(visual_mask)
        options = read_options(
            model,
            facts.L,
            method=method,
            ratio=ratio,
            preset=preset,
            compress_at=compress_at,
            budgets=budgets,
            decode_budget=decode_budget,
            decode_slack=decode_slack,
            buffer_step=buffer_step,
            record=record,
            keep_queries=keep_queries,
            block=block,
            seed=seed,
            overrides=overrides,
        )
        install(model)
        self._setup(model, facts, options, visual_mask)

    def _setup(self, model: nn.Module, facts: Any, options: Options, visual_mask: Tensor | None) -> None:
        self.model, self.facts, self.visual_mask = model, facts, visual_mask
        self.options, self.block = options, options.block
        self.method, self.ratio, self.compress_at = options.method, options.ratio, options.compress_at
        self._keep_queries = options.keep_queries
        self.tokens = TokenTable()
        self.watch = Watch((options.method, *options.record), options.keep_queries)
        kinds, arguments = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))  # type: ignore[union-attr, operator]
        layers = [
            CompressedLayer(options.buffer_step, self.tokens)
            if index in facts.full_layers
            else DYNAMIC_LAYER_TYPE_MAPPING[kind](**extra)
            for index, (kind, extra) in enumerate(zip(kinds, arguments, strict=True))
        ]
        self._rope: PlainRope | None = None
        if self.method.rerotate:
            from meda_kv.attention.support import attention_modules

            module = attention_modules(facts.decoder)[facts.full_layers[0]]
            self._rope = plain_rope(facts.decoder, module, facts.class_name)
        super().__init__(layers=layers)
        self._forget()

    def _forget(self) -> None:
        self.compress_seconds = 0.0
        self.note: str | None = None
        self._settled = False  # the automatic compression has been done, or found unnecessary
        self._entropies: dict[str, Entropies] = {}
        self._first: Tensor | None = None  # budgets of the first compression, long [L, B]
        self._budgets: Tensor | None = None  # of the last one
        self._prompt: tuple[Tensor, Tensor] | None = None  # real and visual tokens read at the last one, long [B]
        self._prompt_length: int | None = None  # the same with padding
        self._targets: Tensor | None = None  # of the forward in progress, when layers compress themselves
        self._observers: list[Any] = []
        self._before: int | None = None  # tokens read when the forward in progress began
        self._broken = False  # a failure left layers of different states
        self._due = False  # the automatic compression waits for the next forward to begin
        self._decoding = False  # of the forward in progress or the last one, as the next two
        self._drafts = 0  # how many of its tokens were proposals that came with the prompt
        self._announced_end: int | None = None  # tokens in all when generate's prompt has been read
        self._croppable = False  # generate may yet take some of its tokens back
        self.announced: Any = None  # what generate says of the forward that it is about to run
        self.prompt: tuple[int, int] | None = None  # tokens read before and after the prompt that generate is reading

    # -- what hooks and wrappers call ---------------------------------------------------------------------------------

    def begin_forward(self, tokens: Any) -> None:
        """Take note of the tokens that a forward is about to read, and compress first when it is time.

        Parameters
        ----------
        tokens : TokenFacts
            Which are real and which are visual, and how long the attention mask is.

        Raises
        ------
        RuntimeError
            The cache belongs to another batch or another prompt.
        """
        begin(self, tokens)

    def check_prompt(self, ids: Tensor) -> None:
        """Raise RuntimeError unless a conversation, ids ``[B, n]``, begins with the tokens read and goes on."""
        check_prompt(self, ids)

    def check_length(self, tokens: int, end: int | None = None) -> None:
        """Raise RuntimeError unless a conversation of so many tokens can go on from what was read."""
        check_length(self, tokens, end)

    def expect_prompt(self, tokens: int, chunked: bool) -> None:
        """Prepare for a prompt of so many tokens that generate is about to read, in several forwards or in one."""
        keep = self._keep_queries or (chunked and tokens <= SHORT)
        if not self.tokens.length and keep != self.options.keep_queries:
            self.options = replace(self.options, keep_queries=keep)
            self.watch = Watch((self.options.method, *self.options.record), keep)

    def end_prompt(self) -> None:
        """Take note that generate has read its prompt."""
        end_prompt(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values to a layer; called by the model's attention in the course of a forward.

        Raises
        ------
        RuntimeError
            No hook announced this forward, so its tokens would be unknown and its masks wrong.
        """
        if self._before is None:
            raise RuntimeError(
                f"this cache was made for a {type(self.model).__name__} with hooks, and none of them announced this "
                "forward; run the model that it was made for, and call meda_kv.install(model) if it was uninstalled"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def wants(self, layer_idx: int, q_len: int) -> bool:
        """Whether :meth:`after_attention` should be called for this layer and forward."""
        return bool(self._observers) or self._targets is not None

    def after_attention(self, layer_idx: int, look: Look) -> None:
        """Show queries, keys and values of one layer to the observers; compress the layer when it is its turn.

        Parameters
        ----------
        layer_idx : int
            Index in the model.
        look : Look
            What the layer's attention saw.
        """
        layer = self.layers[layer_idx]
        if self._observers:
            states = [writable(layer.state.setdefault(observer, {})) for observer in self._observers]
            observe_all(self._observers, states, look)
        if self._targets is not None:
            start = time.perf_counter()
            budget = self._targets[self.facts.full_layers.index(layer_idx)]
            compress_layer(self.method, layer, layer_idx, budget, self._counts()[0], self._places(), self._rope)
            self.compress_seconds += time.perf_counter() - start

    def end_forward(self, error: bool) -> None:
        """Close a forward: compress when it is time, or take back what a failed one left half-done."""
        end(self, error)

    # -- compression --------------------------------------------------------------------------------------------------

    def compress(self, ratio: float | None = None) -> CompressedCache:
        """Compress now, to a share of all tokens read so far.

        Layers keep ``round(ratio * L * n)`` slots together, or everything they still hold where that is less. The
        split over layers follows the entropies of the first reading; the scores follow whatever queries came since.
        What was dropped before stays dropped. :attr:`ratio` is this ratio afterwards, unless nothing had to be dropped.

        Parameters
        ----------
        ratio : float, optional
            The cache's own by default.

        Returns
        -------
        CompressedCache
            Itself.

        Raises
        ------
        RuntimeError
            Nothing has been read, or a forward is in progress.
        UserError
            The ratio is out of range, or too small for the floors.
        """
        share = self.ratio if ratio is None else check_ratio(ratio)
        if not self.tokens.length or self._before is not None:
            what = "nothing has been read yet" if not self.tokens.length else "a forward is in progress"
            raise RuntimeError(f"cannot compress: {what}; run the model on the prompt with this cache first")
        compress_cache(self, share)
        return self

    def fork(self, method: str | Method | None = None, ratio: float | None = None) -> CompressedCache:
        """Return a compressed copy; this cache stays as it is, so one reading of a prompt serves many arms.

        Parameters
        ----------
        method : str or Method, optional
            This cache's own by default; others must have been named in ``record``.
        ratio : float, optional
            This cache's own by default.

        Returns
        -------
        CompressedCache
            Compressed already, except for methods of ``compress_at="first-step"``, which wait for their step. What it
            does not compress it shares with this cache until one of them is written to.

        Raises
        ------
        RuntimeError
            This cache is compressed already, or empty.
        UserError
            The method was not recorded for.
        """
        return fork_of(self, method, ratio)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        """Return a copy with tensors of its own, for the same model."""
        return copy_of(self, memo)

    # -- rows and tokens ----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything, the visual mask included, ready for another prompt."""
        super().reset()
        self.visual_mask = None
        self.tokens = TokenTable()
        for layer in self._full():
            layer.tokens = self.tokens
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, ``-k`` of them, in all layers.

        Raises
        ------
        RuntimeError
            The crop reaches into the compressed prompt.
        """
        for layer in self._full():
            layer.check_crop(min(tokens_to_remove, 0))
        # Sliding layers may refuse; nothing must have been cropped by then.
        for layer in sorted(self.layers, key=lambda one: isinstance(one, CompressedLayer)):
            layer.crop(tokens_to_remove)
        self.tokens.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take row ``beam_idx[b]`` for row ``b``, with everything that belongs to it (beam search)."""
        super().reorder_cache(beam_idx)
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, neighbours together."""
        rows = torch.arange(self.tokens.rows).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._take_rows(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows (indices, or one bool per row)."""
        rows = torch.arange(self.tokens.rows, device=indices.device)[indices]
        super().batch_select_indices(indices)
        self._take_rows(rows)

    def _take_rows(self, rows: Tensor) -> None:
        self.tokens.take_rows(rows)
        index = rows.cpu()
        self._entropies = {kind: found.take_rows(index) for kind, found in self._entropies.items()}
        if self._first is not None:
            self._first = self._first.index_select(1, index)
        if self._budgets is not None:
            self._budgets = self._budgets.index_select(1, index)
        if self._prompt is not None:
            self._prompt = (self._prompt[0][index], self._prompt[1][index])
