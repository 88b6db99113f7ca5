"""The model for lmms-eval, against a small stand-in of its interface (version 0.7)."""

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from meda_kv.data import open_task
from vfm_core.errors import UserError


@dataclass
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class Result:
    text: str
    token_counts: Any = None


@dataclass
class Counts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class Request:
    arguments: tuple[Any, ...]
    hooked: list[Any] = field(default_factory=list)

    @property
    def args(self):
        return self.arguments


class Hook:
    def __init__(self):
        self.calls = []

    def add_partial(self, kind, key, answer):
        self.calls.append((kind, key, answer))


class Base:
    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook = Hook()
        self.task_dict = {}

    @classmethod
    def create_from_arg_string(cls, text, additional=None):
        pairs = dict(pair.split("=", 1) for pair in text.split(","))
        values = {k: int(v) if v.isdecimal() else float(v) if "." in v else v for k, v in pairs.items()}
        return cls(**values, **{k: v for k, v in (additional or {}).items() if v is not None})


class Registry:
    def __init__(self):
        self.manifests = {}

    def register_manifest(self, manifest, *, overwrite=False):
        assert overwrite or manifest.model_id not in self.manifests
        self.manifests[manifest.model_id] = manifest

    def get_model_class(self, name, chat=True):
        module, _, cls = (
            self.manifests[name].chat_class_path if chat else self.manifests[name].simple_class_path
        ).rpartition(".")
        found = getattr(sys.modules[module], cls)
        assert issubclass(found, Base) and found.is_simple is not chat
        return found


@pytest.fixture
def registry(monkeypatch):
    """A stand-in for lmms-eval, with meda_kv registered."""
    import meda_kv.integrations.lmms_eval as ours

    modules = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": Result, "TokenCounts": Counts},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models": {"MODEL_REGISTRY_V2": Registry()},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("MedaKVChat", "MedaKVSimple"):
        monkeypatch.setitem(vars(ours), name, None)
        monkeypatch.delitem(vars(ours), name)
    ours.register()
    ours.register()
    return modules["lmms_eval.models"]["MODEL_REGISTRY_V2"]


def documents(count, images=2):
    return open_task(f"tinyworld:needle?n={count}&images={images}&seed=3").samples


def to_messages(sample, **rounds):
    content = [{"type": "image", "url": picture} for picture in sample.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": sample.questions[0][0]}]}]


def make(registry, chat=True, **settings):
    text = ",".join(f"{k}={v}" for k, v in {"pretrained": "tiny", "method": "full", "ratio": 0.5, **settings}.items())
    model = registry.get_model_class("meda_kv", chat).create_from_arg_string(text, {"batch_size": 2, "device": "cpu"})
    model.task_dict = {"albums": {"test": documents(3)}}
    return model


def chat_requests(model, settings=None):
    count = len(model.task_dict["albums"]["test"])
    kwargs = settings or {"max_new_tokens": 2}
    return [Request(("context", to_messages, dict(kwargs), i, "albums", "test")) for i in range(count)]


def test_without_lmms_eval_the_error_says_what_to_install(monkeypatch):
    import meda_kv.integrations.lmms_eval as ours

    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    vars(ours).pop("MedaKVChat", None)
    with pytest.raises(ImportError, match="pip install lmms-eval"):
        getattr(ours, "MedaKV" + "Chat")
    with pytest.raises(AttributeError):
        getattr(ours, "MedaKV" + "Other")


def test_the_full_cache_answers_as_plain_generate_does(registry):
    from meda_kv.prompts import build_inputs

    model = make(registry)
    results = model.generate_until(chat_requests(model))
    plain = []
    for sample in model.task_dict["albums"]["test"]:
        inputs = build_inputs(model.answerer.processor, [model.answerer.prompt(to_messages(sample))])
        ids = model.model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        plain.append(model.answerer.processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert [result.text for result in results] == plain
    assert all(1 <= result.token_counts.output_tokens <= 2 for result in results)
    calls = model.cache_hook.calls
    assert [(kind, answer) for kind, _, answer in calls] == [("generate_until", text) for text in plain]
    assert (model.rank if hasattr(model, "rank") else model._rank, model.batch_size) == (0, 2)


def test_the_arguments_reach_the_cache(registry):
    model = make(registry, method="snapkv", ratio=0.5, floor=4, window=3)
    cache = model.answerer.new_cache()
    assert (cache.summary()["method"], cache.summary()["ratio"]) == ("snapkv", 0.5)
    assert len(model.generate_until(chat_requests(model))) == 3


def test_simple_and_chat_give_the_same_answers(registry):
    chat, simple = make(registry), make(registry, chat=False)
    asked = [
        Request((s.questions[0][0], {"max_new_tokens": 2}, lambda s: list(s.images), i, "albums", "test"))
        for i, s in enumerate(simple.task_dict["albums"]["test"])
    ]
    assert [r.text for r in simple.generate_until(asked)] == [r.text for r in chat.generate_until(chat_requests(chat))]


def test_a_request_that_fails_is_told_and_the_others_are_answered(registry, caplog):
    model = make(registry)
    requests = chat_requests(model)
    good = [result.text for result in model.generate_until(requests)]

    def broken(sample, **rounds):
        return [{"role": "user", "content": [{"type": "image", "url": "nowhere.png"}]}]

    requests[1] = Request(("context", broken, {"max_new_tokens": 2}, 1, "albums", "test"))
    results = model.generate_until(requests)
    assert [result.text for result in results] == [good[0], "", good[2]]
    assert "no answer to document 1 of albums, test: no such image file" in caplog.text


def test_settings_of_their_own_do_not_share_a_batch(registry):
    from meda_kv.integrations.lmms_eval import in_batches
    from meda_kv.integrations.messages import generation_settings

    wanted = [generation_settings({"max_new_tokens": k}) for k in (1, 2, 1, 1)]
    assert [(indices, s.arguments["max_new_tokens"]) for indices, s in in_batches(wanted, 2)] == [
        ([0, 2], 1),
        ([3], 1),
        ([1], 2),
    ]


def test_the_loss_of_a_continuation_is_that_of_the_plain_model(registry):
    from meda_kv.prompts import build_inputs

    model = make(registry, chat=False)
    sample = model.task_dict["albums"]["test"][0]
    arguments = (sample.questions[0][0], "7 3 0", lambda s: list(s.images), 0, "albums", "test")
    (loss, greedy), (best, is_best) = model.loglikelihood(
        [Request(arguments), Request((*arguments[:1], lambda s: s.answer, *arguments[2:]))]
    )
    tokenizer = model.answerer.processor.tokenizer
    prompt = model.answerer.prompt(to_messages(sample))
    inputs = build_inputs(model.answerer.processor, [prompt])
    tokens = torch.tensor([tokenizer("7 3 0", add_special_tokens=False)["input_ids"]])
    ids = torch.cat([inputs["input_ids"], tokens], dim=1)
    with torch.no_grad():
        logits = model.model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0]
    step = logits[inputs["input_ids"].shape[1] - 1 : -1].log_softmax(-1)
    assert loss == pytest.approx(-float(step.gather(1, tokens[0][:, None]).mean()), abs=1e-4)
    assert greedy == bool((step.argmax(-1) == tokens[0]).all())
    assert best < loss or is_best is greedy


def test_rounds_go_on_until_the_task_ends_them(registry):
    model = make(registry)
    seen = []

    def rounds(sample, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return to_messages(sample)
        seen.append((round_idx, list(previous_output), previous_round_info))
        return to_messages(sample), round_idx == 2, previous_output, round_idx

    request = Request(("context", rounds, {"max_new_tokens": 2}, 0, "albums", "test"))
    answers = model.generate_until_multi_round([request])
    assert len(answers[0]) == 2
    assert answers[0][0] == answers[0][1]
    assert seen == [(1, answers[0][:1], None), (2, answers[0], 1)]


def test_simple_rounds_go_on_until_the_task_ends_them(registry):
    model = make(registry, chat=False)
    sample = model.task_dict["albums"]["test"][0]

    def to_text(document, previous_output=None, round_idx=None, previous_round_info=None):
        return list(document.images), document.questions[0][0], round_idx == 2, previous_output, None

    arguments = (sample.questions[0][0], {"max_new_tokens": 2}, lambda s: list(s.images), to_text, 0, "albums", "test")
    assert len(model.generate_until_multi_round([Request(arguments)])[0]) == 2


@pytest.mark.parametrize(("settings", "said"), [({"method": "mda"}, "meda"), ({"ratio": 2.0}, "ratio")])
def test_wrong_arguments_are_told_before_any_request(registry, settings, said):
    with pytest.raises(UserError, match=said):
        make(registry, **settings)


def test_under_accelerate_every_process_takes_its_device_and_rank(registry, monkeypatch):
    import accelerate

    class Launched:
        process_index, num_processes, device = 1, 2, torch.device("cpu")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "Accelerator", Launched)
    model = make(registry)
    assert (model._rank, model._world_size) == (1, 2)
    assert isinstance(model.accelerator, Launched)
    assert model.device == torch.device("cpu")
