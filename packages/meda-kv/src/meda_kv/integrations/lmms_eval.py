"""The model ``meda_kv`` for lmms-eval (EvolvingLMMs-Lab): any vision-language model with a compressed cache.

The video benchmarks of MEDA (Video-ChatGPT, DREAM-1K, WorldQA) are scored by external judges; lmms-eval has them, and
the paper used it. With both packages installed, ``meda_kv`` is found through the entry point ``lmms_eval.models``::

    lmms-eval --model meda_kv --tasks mme --batch_size 1 \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=meda,ratio=0.2

From Python, `register` adds it to a running lmms-eval. Both of lmms-eval's interfaces are served: ``chat`` (tasks that
make messages, the default) and ``simple`` (``--force_simple``).

lmms-eval is imported when `MedaKVChat` or `MedaKVSimple` is first used. Compression acts on the answer from its second
token on: a task that is answered with one letter compares nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfm_core.errors import UserError

from meda_kv.integrations.messages import Settings, as_prompt, generation_settings, stopped

if TYPE_CHECKING:
    from meda_kv.prompts import Prompt

__all__ = ["MODEL_ID", "MedaKVChat", "MedaKVSimple", "manifests", "register"]

_log = logging.getLogger(__name__)

MODEL_ID = "meda_kv"


def manifests() -> list[Any]:
    """What the entry point ``lmms_eval.models`` hands over: one manifest with a chat and a simple class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=MODEL_ID,
            simple_class_path=f"{__name__}.MedaKVSimple",
            chat_class_path=f"{__name__}.MedaKVChat",
            aliases=("meda-kv",),
        )
    ]


def register() -> None:
    """Add ``meda_kv`` to the registry of the running lmms-eval; again does no harm."""
    from lmms_eval.models import MODEL_REGISTRY_V2

    for manifest in manifests():
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)


class Answerer:
    """Answers prompts with a compressed cache; what lmms-eval's classes are made of, without lmms-eval.

    Parameters
    ----------
    pretrained : str
        As `meda_kv.models.load_model` takes it: an id, a folder, ``tiny``.
    method, ratio, preset
        See `meda_kv.cache_for`; ``method=full`` compresses nothing.
    device, dtype, attn_implementation, device_map
        See `meda_kv.models.load_model`.
    max_frames_num : int
        Frames read from a video, evenly spread.
    max_new_tokens : int
        Where a task does not say.
    system_prompt : str, optional
        Text, or a file that holds it.
    **options
        Further keywords of the cache, such as ``merge=none`` or ``budgets=profile.json``.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        method: str = "meda",
        ratio: float = 0.2,
        preset: str = "paper",
        device: str = "auto",
        dtype: str | None = None,
        attn_implementation: str | None = None,
        device_map: str | None = None,
        max_frames_num: int = 32,
        max_new_tokens: int = 1024,
        system_prompt: str | None = None,
        **options: Any,
    ) -> None:
        from meda_kv.models import load_model

        wanted = None if dtype in (None, "", "auto") else dtype
        self.model, self.processor = load_model(
            pretrained, device=device, dtype=wanted, attn=attn_implementation or None, device_map=device_map or None
        )
        self.cache_options = {"method": method, "ratio": float(ratio), "preset": preset, **options}
        self.frames, self.max_new_tokens = int(max_frames_num), int(max_new_tokens)
        self.system = system_prompt
        if system_prompt and "\n" not in system_prompt and Path(system_prompt).is_file():
            self.system = Path(system_prompt).read_text(encoding="utf-8").strip()
        self.new_cache()  # an unknown method, a ratio out of range or an unsupported model is told before any data

    def new_cache(self) -> Any:
        """A fresh cache with the settings of this model."""
        from meda_kv.cache import cache_for

        return cache_for(self.model, **self.cache_options)

    def prompt(self, messages: Sequence[Any]) -> Prompt:
        """The prompt of a chat; see `meda_kv.integrations.messages.as_prompt`."""
        return as_prompt(messages, frames=self.frames, system=self.system)

    def answer(self, prompts: Sequence[Prompt], settings: Settings) -> list[tuple[str, int]]:
        """Answers to a batch, with the numbers of tokens generated."""
        import torch

        from meda_kv.prompts import build_inputs, to_model

        inputs = to_model(build_inputs(self.processor, prompts), self.model)
        arguments = {"max_new_tokens": self.max_new_tokens, **settings.arguments}
        with torch.inference_mode():
            output = self.model.generate(**inputs, past_key_values=self.new_cache(), **arguments)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        pad = tokenizer.pad_token_id
        answers = []
        for row in output[:, inputs["input_ids"].shape[1] :]:
            text = tokenizer.decode(row, skip_special_tokens=True).strip()
            answers.append((stopped(text, settings.until), int((row != pad).sum())))
        return answers

    def loss(self, prompt: Prompt, continuation: str) -> tuple[float, bool]:
        """Mean negative log-likelihood of a continuation in nats, and whether greedy generation would give it.

        The continuation is forced token by token through ``generate``, so that all but its first token are predicted
        from the compressed cache, for every family of models.
        """
        import torch

        from meda_kv.prompts import build_inputs, to_model

        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        tokens = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if not tokens:
            return 0.0, True
        inputs = to_model(build_inputs(self.processor, [prompt]), self.model)
        n = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                past_key_values=self.new_cache(),
                do_sample=False,
                num_beams=1,
                max_new_tokens=len(tokens),
                min_new_tokens=len(tokens),
                eos_token_id=-1,
                prefix_allowed_tokens_fn=lambda _, ids: [tokens[min(len(ids) - n, len(tokens) - 1)]],
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = torch.stack(output.logits, dim=1)[0].float()
        target = torch.tensor(tokens, device=logits.device)
        chosen = logits.log_softmax(-1).gather(1, target[:, None])
        return -float(chosen.mean()), bool((logits.argmax(-1) == target).all())


def in_batches(settings: Sequence[Settings], size: int) -> Iterator[tuple[list[int], Settings]]:
    """Indices of requests that may share a batch: of equal settings, at most `size` together."""
    groups: dict[str, list[int]] = {}
    for index, wanted in enumerate(settings):
        groups.setdefault(repr(wanted), []).append(index)
    for indices in groups.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size], settings[indices[start]]


def _build() -> dict[str, type]:
    """The two classes, made when lmms-eval is there to derive them from."""
    try:
        from lmms_eval.api.instance import GenerationResult, TokenCounts
        from lmms_eval.api.model import lmms
    except ImportError as error:
        raise ImportError(f"the model {MODEL_ID!r} needs lmms-eval: {error}; pip install lmms-eval") from error

    class _MedaKV(lmms):
        """What both interfaces share."""

        def __init__(
            self, pretrained: str = "tiny", batch_size: int | str = 1, max_batch_size: Any = None, **options: Any
        ) -> None:
            super().__init__()
            self.batch_size_per_gpu = int(batch_size) if str(batch_size).isdecimal() else 1
            self._distribute(options)
            self.answerer = Answerer(pretrained, **options)

        def _distribute(self, options: dict[str, Any]) -> None:
            """Under ``accelerate launch`` every process takes a device and its share of the requests."""
            import os

            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                from accelerate import Accelerator

                self.accelerator = Accelerator()
                self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
                if not options.get("device_map"):
                    options["device"] = str(self.accelerator.device)

        @property
        def model(self) -> Any:
            return self.answerer.model

        @property
        def device(self) -> Any:
            return self.answerer.model.device

        @property
        def batch_size(self) -> int:
            return self.batch_size_per_gpu

        def _messages(self, request: Any) -> Any:
            raise NotImplementedError("the chat and the simple interface read requests differently")

        def _settings(self, request: Any) -> dict[str, Any]:
            raise NotImplementedError("the chat and the simple interface read requests differently")

        def _document(self, task: str, split: str, index: Any) -> Any:
            return self.task_dict[task][split][index]

        def generate_until(self, requests: list[Any]) -> list[Any]:
            """Answer requests, in their order; one that fails is logged and answered with nothing."""
            answers: list[tuple[str, int]] = [("", 0)] * len(requests)
            settings = [generation_settings(self._settings(request)) for request in requests]
            for indices, wanted in in_batches(settings, self.batch_size):
                for index, answer in self._answers(requests, indices, wanted):
                    answers[index] = answer
                    hook_key = (requests[index].args[0], self._settings(requests[index]))
                    self.cache_hook.add_partial("generate_until", hook_key, answer[0])
            return [GenerationResult(text=t, token_counts=TokenCounts(output_tokens=count)) for t, count in answers]

        def _answers(
            self, requests: list[Any], indices: list[int], settings: Settings
        ) -> list[tuple[int, tuple[str, int]]]:
            """Index and answer of a batch; what fails together is tried one by one."""
            try:
                prompts = [self.answerer.prompt(self._messages(requests[index])) for index in indices]
                return list(zip(indices, self.answerer.answer(prompts, settings)))
            except (UserError, RuntimeError, ValueError) as error:
                if len(indices) > 1:
                    return [pair for index in indices for pair in self._answers(requests, [index], settings)]
                document = requests[indices[0]].args[-3:]
                _log.error(
                    "no answer to document %s of %s, %s: %s", *document, error, exc_info=_log.level == logging.DEBUG
                )
                return []

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """Mean loss (as lmms-eval's models return it: less is likelier) and whether it is the greedy answer."""
            results = []
            for request in requests:
                context, target, to_visual, index, task, split = request.args
                document = self._document(task, split, index)
                continuation = target if isinstance(target, str) else target(document)
                prompt = self.answerer.prompt(_turn(to_visual(document), context))
                results.append(self.answerer.loss(prompt, continuation))
            return results

        def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
            """Ask the task for the messages of every round until it ends; each round is read anew."""
            return [self._rounds(request) for request in requests]

        def _rounds(self, request: Any) -> list[str]:
            messages, settings = self._messages(request), generation_settings(self._settings(request))
            said: list[str] = []
            info = None
            while messages is not None:
                said.append(self.answerer.answer([self.answerer.prompt(messages)], settings)[0][0])
                messages, info = self._next_round(request, len(said), list(said), info)
            return said

        def _next_round(self, request: Any, number: int, said: list[str], info: Any) -> tuple[Any, Any]:
            raise NotImplementedError("the chat and the simple interface go on differently")

    class MedaKVChat(_MedaKV):
        """lmms-eval's chat interface: tasks make messages."""

        is_simple = False

        def _messages(self, request: Any) -> Any:
            _, to_messages, _, index, task, split = request.args
            return to_messages(self._document(task, split, index))

        def _settings(self, request: Any) -> dict[str, Any]:
            return dict(request.args[2])

        def _next_round(self, request: Any, number: int, said: list[str], info: Any) -> tuple[Any, Any]:
            _, to_messages, _, index, task, split = request.args
            payload = to_messages(
                self._document(task, split, index), round_idx=number, previous_output=said, previous_round_info=info
            )
            if not (isinstance(payload, tuple) and len(payload) == 4) or payload[1]:
                return None, info
            return payload[0], payload[3]

    class MedaKVSimple(_MedaKV):
        """lmms-eval's simple interface: a text and a list of pictures or videos."""

        is_simple = True

        def _messages(self, request: Any) -> Any:
            context, _, to_visual, *rest = request.args
            index, task, split = rest[-3:]  # with several rounds, a function for the next text stands before them
            return _turn(to_visual(self._document(task, split, index)), context)

        def _settings(self, request: Any) -> dict[str, Any]:
            return dict(request.args[1])

        def _next_round(self, request: Any, number: int, said: list[str], info: Any) -> tuple[Any, Any]:
            _, _, _, *rest = request.args
            if len(rest) < 4:
                return None, info
            to_text, index, task, split = rest
            document = self._document(task, split, index)
            payload = to_text(document, previous_output=said, round_idx=number, previous_round_info=info)
            if not (isinstance(payload, tuple) and len(payload) == 5) or payload[2]:
                return None, info
            return _turn(payload[0], payload[1]), payload[4]

    classes: dict[str, type] = {"MedaKVChat": MedaKVChat, "MedaKVSimple": MedaKVSimple}
    for name, cls in classes.items():
        cls.__module__, cls.__qualname__ = __name__, name
    return classes


def _turn(visuals: Any, text: str) -> list[dict[str, Any]]:
    """One user message: pictures and videos, then the text."""
    content: list[dict[str, Any]] = [{"type": "visual", "url": visual} for visual in visuals or []]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


if TYPE_CHECKING:
    MedaKVChat: Any
    MedaKVSimple: Any
else:

    def __getattr__(name: str) -> Any:
        if name not in ("MedaKVChat", "MedaKVSimple"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals().update(_build())
        return globals()[name]
