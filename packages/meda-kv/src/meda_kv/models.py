"""Models and processors behind one spec: the embedded tiny model, a checkpoint folder, or an id of the hub."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vfm_core.cli import resolve_device, resolve_dtype
from vfm_core.errors import UserError, unknown_name

log = logging.getLogger(__name__)

ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention implementations that `load_model` accepts; what is installed here is listed by `meda-kv doctor`."""

_TINY_KEYS = ("seed", "random", "hidden", "layers", "heads", "kv_heads")
_REMEDY = "download it first and give --model PATH, or try --model tiny"


def load_model(
    spec: str = "tiny",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    attn: str | None = None,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    """Load a vision-language model (or a text-only causal one) and its processor.

    Parameters
    ----------
    spec : str
        ``tiny`` or ``tiny?seed=1`` for the embedded model, ``tiny?random=1&hidden=128&layers=8`` for random weights of
        another shape, a checkpoint folder, or an id such as ``Qwen/Qwen2.5-VL-3B-Instruct``.
    device : str or torch.device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
    dtype : str or torch.dtype, optional
        By default that of the checkpoint, float32 on the CPU.
    attn : str, optional
        One of `ATTENTIONS`; by default what transformers chooses, which is ``sdpa`` for nearly all models.
    device_map : str, optional
        ``"auto"`` spreads the layers over the devices with accelerate; `device` is then ignored.

    Returns
    -------
    model : transformers.PreTrainedModel
        In eval mode.
    processor : transformers.ProcessorMixin or transformers.PreTrainedTokenizerBase
        Pads on the left; a tokenizer for text-only models.

    Raises
    ------
    UserError
        No such folder or id, not a checkpoint, a model class or attention implementation that cannot be used here.
    """
    if attn is not None and attn not in ATTENTIONS:
        raise unknown_name("attention implementation", attn, ATTENTIONS, where="--attn")
    target = resolve_device(device) if isinstance(device, str) else device
    wanted = resolve_dtype(dtype) if isinstance(dtype, str) else dtype
    name, _, query = spec.partition("?")
    if name == "tiny":
        model, processor = _load_tiny(spec, query)
        with _attention_errors(attn):
            if attn is not None:
                model.set_attn_implementation(attn)
        model.name_or_path = spec  # what reports and profiles call it; nothing is read from there
        return model.to(device=target, dtype=wanted or torch.float32), processor
    return _load_checkpoint(spec, target, wanted, attn, device_map)


def _load_tiny(spec: str, query: str) -> tuple[Any, Any]:
    from tinyworld.vlm import build_processor, build_vlm, load_vlm

    options: dict[str, int] = {}
    for pair in filter(None, query.split("&")):
        key, _, value = pair.partition("=")
        if key not in _TINY_KEYS:
            raise unknown_name("option of the tiny model", key, _TINY_KEYS, where=f"--model {spec}")
        if not value.isdecimal():
            remedy = f"write {key}=NUMBER"
            raise UserError("not a whole number", where=f"--model {spec}", given=repr(value), remedy=remedy)
        options[key] = int(value)
    seed, shape = options.pop("seed", 0), options
    if shape.pop("random", 0) or shape:
        return build_vlm(seed, **shape), build_processor()
    return load_vlm(seed)


def _load_checkpoint(
    spec: str, device: torch.device, dtype: torch.dtype | None, attn: str | None, device_map: str | None
) -> tuple[Any, Any]:
    import transformers

    path = Path(spec).expanduser()
    if path.is_file():
        raise UserError("a file, not a checkpoint folder", where="--model", given=spec, remedy="give its folder")
    if path.is_dir():
        spec = str(path)
        if not (path / "config.json").is_file():
            remedy = "give a folder that save_pretrained of transformers wrote"
            raise UserError("no config.json", where=f"--model {spec}", remedy=remedy)
    elif spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UserError("no such folder", where="--model", given=spec, remedy="check the path, or try --model tiny")
    # Asked once here: the hub's own client would try for half a minute, with a warning each time.
    local = path.is_dir() or not _hub_answers()
    with _checkpoint_errors(spec), _attention_errors(attn), _no_bars():
        config = transformers.AutoConfig.from_pretrained(spec, local_files_only=local)
        auto, with_images = _auto_class(config, spec)
        options: dict[str, Any] = {"local_files_only": local}
        options["dtype"] = dtype or (torch.float32 if device.type == "cpu" else "auto")
        if attn is not None:
            options["attn_implementation"] = attn
        if device_map is not None:
            options["device_map"] = device_map
        model = auto.from_pretrained(spec, **options)
        loader = transformers.AutoProcessor if with_images else transformers.AutoTokenizer
        processor = loader.from_pretrained(spec, local_files_only=local)
    if device_map is None:
        model = model.to(device)
    return model.eval(), _ready(processor)


def _hub_answers(seconds: float = 5.0) -> bool:
    """Whether the hub can be reached; behind a proxy, which only the client can use, yes is assumed."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=seconds).close()
    except OSError:
        return False
    return True


def _auto_class(config: Any, spec: str) -> tuple[Any, bool]:
    """The auto class for a configuration, and whether it reads images."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        remedy = "use a decoder-only model, such as --model tiny"
        raise UserError("encoder-decoder models are not supported", where=f"--model {spec}", given=kind, remedy=remedy)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText, True
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM, False
    remedy = "use LLaVA, LLaVA-NeXT(-Video), LLaVA-OneVision, Qwen-VL, InternVL, Idefics3, SmolVLM, Gemma 3 or the like"
    raise UserError("neither a vision-language nor a causal model", where=f"--model {spec}", given=kind, remedy=remedy)


def _ready(processor: Any) -> Any:
    tokenizer = tokenizer_of(processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


@contextlib.contextmanager
def _checkpoint_errors(spec: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        if Path(spec).is_dir():
            what, given = "cannot load the checkpoint", _short(text)
            remedy = "check that weights, configuration and processor files are whole"
        elif "trust_remote_code" in text or "custom code" in text:
            what, given = "the model needs code of its own", repr(spec)
            remedy = "use a class of transformers: LLaVA-NeXT-Video, LLaVA-OneVision or Qwen-VL read video"
        else:
            what, given, remedy = "no such folder, and the hub does not answer or lacks it", repr(spec), _REMEDY
        raise UserError(what, where="--model", given=given, remedy=remedy) from error


@contextlib.contextmanager
def _attention_errors(attn: str | None) -> Iterator[None]:
    """Say which implementations are installed when the wanted one is not."""
    try:
        yield
    except ImportError as error:
        if attn is None:
            raise UserError("a package is missing", where="--model", given=_short(str(error))) from error
        raise _not_usable(attn, error) from error
    except ValueError as error:
        if attn is None or isinstance(error, UserError) or "attention" not in str(error).lower():
            raise
        raise _not_usable(attn, error) from error


def _not_usable(attn: str, error: Exception) -> UserError:
    remedy = f"installed: {', '.join(installed_attentions())}"
    # transformers says it twice over; the reason stands after its last introduction.
    reason = " ".join(str(error).split()).rpartition("due to the following error: ")[2].rstrip(".")
    given = f"{attn}, {_short(reason)}"
    return UserError("attention implementation cannot be used", where="--attn", given=given, remedy=remedy)


def installed_attentions() -> tuple[str, ...]:
    """Names among `ATTENTIONS` whose packages are installed; whether a GPU carries them is not tried."""
    import importlib.util

    from transformers.utils import import_utils

    found = ["sdpa", "eager"]
    for name, module in (("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")):
        if importlib.util.find_spec(module) is not None:
            found.append(name)
    check = getattr(import_utils, "is_torch_flex_attn_available", None)
    if check is not None and check():
        found.append("flex_attention")
    return tuple(found)


def _short(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of transformers on stderr while loading; the setting is put back."""
    from transformers.utils import logging as hf_logging

    before = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            hf_logging.enable_progress_bar()


def text_config(model: Any) -> Any:
    """The configuration of the language model inside ``model``."""
    return model.config.get_text_config(decoder=True)


def describe_shape(model: Any) -> dict[str, Any]:
    """``class``, ``layers``, ``heads``, ``kv_heads`` and ``head_dim`` of a model's language part."""
    text = text_config(model)
    heads = int(text.num_attention_heads)
    return {
        "class": type(model).__name__,
        "layers": int(text.num_hidden_layers),
        "heads": heads,
        "kv_heads": int(getattr(text, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(text, "head_dim", None) or text.hidden_size // heads),
    }


def describe_model(model: Any) -> dict[str, Any]:
    """What a run folder or a profile records of a model.

    Returns
    -------
    dict
        What `describe_shape` says, ``name`` (``tiny`` with its options, the hub's id, or the checkpoint's folder),
        ``dtype``, ``parameters`` (count), ``fingerprint``.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    return {
        **describe_shape(model),
        "name": Path(name).name if Path(name).is_absolute() else name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fingerprint": fingerprint(model),
    }


def fingerprint(model: nn.Module, values: int = 16) -> str:
    """Identify weights without reading all of them.

    Names and shapes of all parameters and ``values`` evenly spread entries of each are hashed. The entries are rounded
    to bfloat16 first, so that a checkpoint has one fingerprint whether loaded in float32 or in its own precision.

    Parameters
    ----------
    model : nn.Module
        Parameters on the meta device (offloaded ones) count by name and shape.
    values : int
        Entries per parameter, at least 1.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta" and parameter.numel():
            steps = torch.linspace(0, parameter.numel() - 1, values, dtype=torch.float64).long()
            entries = parameter.detach().flatten()[steps.to(parameter.device)]
            digest.update(entries.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
