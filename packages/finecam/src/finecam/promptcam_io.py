"""Prompt-CAM checkpoints: our small folder, and the official ``model.pt`` (arXiv 2501.09333).

A folder holds ``promptcam.safetensors`` (prompts and scoring vector, all that was learned) and ``config.json``
(backbone, preprocessing, class names, variant, metrics). The frozen backbone is named, not copied; its fingerprint is
checked on loading, because prompts mean nothing on other weights.

The official file is a pickled ``{"model_state_dict": ...}`` of a whole timm-named ViT plus ``vpt.prompt_embeddings``
(N, C, D) and ``head.weight``/``head.bias``. It holds neither the number of heads nor class names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vfm_core.errors import UserError
from vfm_core.files import atomic_write, write_json
from vfm_core.preprocess import Preprocess

from finecam.promptcam import PromptCAM
from finecam.promptcam_recipe import paper_preprocess

if TYPE_CHECKING:
    from vfm_core.backbones import Backbone

__all__ = ["CONFIG", "WEIGHTS", "load", "load_official", "save"]

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "config.json", "promptcam.safetensors"
FORMAT = "finecam.promptcam/1"
_VARIANT = ("entry_layer", "prompt_layers", "agnostic_prompts", "prompt_self_attention", "dropout")


def save(model: PromptCAM, directory: str | Path) -> Path:
    """Write a Prompt-CAM folder; each file is whole or absent, also after a crash.

    Parameters
    ----------
    model : PromptCAM
        Its ``metrics`` (JSON values) are kept in the configuration.
    directory : str or Path
        Made when absent.

    Returns
    -------
    Path
        The folder.
    """
    from safetensors.torch import save as to_bytes

    directory = Path(directory)
    blob = to_bytes({name: p.detach().cpu().contiguous() for name, p in model.learned()})
    with atomic_write(directory / WEIGHTS) as temporary:
        temporary.write_bytes(blob)
    config = {
        "format": FORMAT,
        "backbone": str(model.backbone.spec),
        "fingerprint": model.backbone.fingerprint(),
        "preprocess": model.preprocess.to_dict(),
        "classes": model.class_names,
        **{name: getattr(model, name) for name in _VARIANT},
        "weights_sha256": hashlib.sha256(blob).hexdigest(),
        "metrics": model.metrics,
    }
    write_json(directory / CONFIG, config)
    return directory


def load(
    path: str | Path,
    *,
    backbone: Backbone | None = None,
    class_names: Sequence[str] | str | Path | None = None,
    heads: int | None = None,
    device: str | torch.device | None = None,
) -> PromptCAM:
    """Read a Prompt-CAM folder, or an official ``.pt``/``.pth`` file.

    Parameters
    ----------
    path : str or Path
        Folder of :func:`save`, or the official file.
    backbone : Backbone, optional
        The backbone to put the prompts on, where its spec cannot be loaded again (a user's own module).
    class_names, heads
        For official files only, see :func:`load_official`.
    device : str or torch.device, optional
        Where the model goes; the CPU by default.

    Returns
    -------
    PromptCAM
        In evaluation mode.

    Raises
    ------
    UserError
        Files that are missing, damaged, of another format, or made for other backbone weights; names or heads for a
        folder, which has its own.
    """
    path = Path(path)
    if path.is_file() and path.suffix in (".pt", ".pth"):
        return load_official(path, class_names=class_names, heads=heads, device=device)
    if class_names is not None or heads is not None:
        raise UserError(
            "class names and heads are for official files",
            where=path,
            remedy="leave them out: a Prompt-CAM folder knows its own",
        )
    config = _read_config(path)
    if backbone is None:
        from vfm_core.backbones import load_backbone

        backbone = load_backbone(config["backbone"], device=device)
    elif device is not None:
        backbone = backbone.to(device)
    if backbone.fingerprint() != config["fingerprint"]:
        raise UserError(
            "the backbone's weights differ from those the prompts were trained on",
            where=path / CONFIG,
            given=str(backbone.spec),
            remedy=f"give the backbone with fingerprint {config['fingerprint'][:16]}..., or train again",
        )
    tensors = _read_tensors(path / WEIGHTS, config["weights_sha256"])
    variant = {name: config[name] for name in _VARIANT}
    model = PromptCAM(backbone, len(config["classes"]), class_names=config["classes"], **variant)
    _fill(model, tensors, path / WEIGHTS)
    model.preprocess = Preprocess.from_dict(config["preprocess"])
    model.metrics = dict(config.get("metrics") or {})
    return model.eval()


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    if not file.is_file():
        raise UserError("no Prompt-CAM here", where=directory, given=f"{CONFIG} is missing", remedy="train one first")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError("damaged configuration", where=file, given=error, remedy="save the model again") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise UserError(
            "not a Prompt-CAM configuration", where=file, given=f"format {found!r}", remedy=f"need {FORMAT}"
        )
    needed = {"backbone", "fingerprint", "preprocess", "classes", "weights_sha256", *_VARIANT}
    if missing := sorted(needed - set(config)):
        raise UserError("incomplete configuration", where=file, given=f"without {', '.join(missing)}")
    return config


def _read_tensors(file: Path, sha256: str) -> dict[str, Tensor]:
    from safetensors.torch import load as from_bytes

    from finecam.head_model import check_finite

    if not file.is_file():
        raise UserError("weights are missing", where=file.parent, given=file.name, remedy="copy the whole folder")
    blob = file.read_bytes()
    if hashlib.sha256(blob).hexdigest() != sha256:
        raise UserError(
            "weights do not belong to this configuration", where=file, remedy="copy or save the whole folder again"
        )
    tensors = from_bytes(blob)
    check_finite(tensors, file)
    return tensors


def _fill(model: PromptCAM, tensors: dict[str, Tensor], where: Path) -> None:
    learned = dict(model.learned())
    for name, parameter in learned.items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            given = tuple(tensors[name].shape) if name in tensors else "absent"
            raise UserError(
                f"{name} must have shape {tuple(parameter.shape)}",
                where=where,
                given=given,
                remedy="use the backbone the prompts were trained on",
            )
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.data = tensors[name].to(parameter.device)


# ---------------------------------------------------------------------------------------------------------------------
# Official checkpoints


def load_official(
    path: str | Path,
    *,
    class_names: Sequence[str] | str | Path | None = None,
    heads: int | None = None,
    device: str | torch.device | None = None,
) -> PromptCAM:
    """Read an official ``model.pt``.

    Parameters
    ----------
    path : str or Path
        Pickle of tensors; anything else in it is refused.
    class_names : sequence of str, str or Path, optional
        Names in class order, a file of them (see :func:`finecam.classifiers.read_class_names`), or the folder of
        class folders that the model was trained on (sorted; ``NNN.`` prefixes are stripped). Numbers by default.
    heads : int, optional
        Attention heads, which the file does not tell; default D / 64.
    device : str or torch.device, optional

    Returns
    -------
    PromptCAM
        The deep variant on its own ViT, with the official preprocessing (squash to the input size, mean and standard
        deviation 0.5).

    Raises
    ------
    UserError
        For a file of another layout, shapes that do not fit, or class names that do not.
    """
    from timm.models.vision_transformer import VisionTransformer
    from vfm_core.backbones import Native, wrap
    from vfm_core.specs import parse_spec

    path = Path(path)
    state = _read_official(path)
    prompts = state.pop("vpt.prompt_embeddings")
    head = state.pop("head.weight"), state.pop("head.bias")
    args = _vit_arguments(state, prompts, path, heads)
    vit = VisionTransformer(**args)
    missing, unexpected = vit.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UserError(
            "weights do not fit a plain ViT",
            where=path,
            given=f"missing {missing[:3]}, unexpected {unexpected[:3]}",
            remedy="only official Prompt-CAM files of timm-named ViTs are supported",
        )
    depth, classes, _ = prompts.shape
    size = (args["img_size"], args["img_size"])
    preprocess = paper_preprocess(size)
    spec = parse_spec(f"dir:{path}")
    native = Native(
        spec=spec, family="timm", model=vit.eval(), preprocess=preprocess, class_names=None, text=None, head=False
    )
    backbone = wrap(native)
    if device is not None:
        backbone = backbone.to(device)
    names = None if class_names is None else _names(class_names, classes)
    model = PromptCAM(backbone, classes, class_names=names)
    learned = {
        "agnostic": prompts[: depth - 1],
        "prompts": prompts[depth - 1],
        "head.weight": head[0],
        "head.bias": head[1],
    }
    _fill(model, {name: tensor.float() for name, tensor in learned.items()}, path)
    return model.eval()


def _read_official(path: Path) -> dict[str, Tensor]:
    from finecam.head_model import check_finite, read_state

    loaded = read_state(path)
    state = loaded.get("model_state_dict", loaded)
    state = state if isinstance(state, Mapping) else {}
    state = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    needed = ("vpt.prompt_embeddings", "head.weight", "head.bias", "pos_embed", "patch_embed.proj.weight")
    if missing := [name for name in needed if name not in state]:
        raise UserError("not an official Prompt-CAM checkpoint", where=path, given=f"without {', '.join(missing)}")
    check_finite(state, path)
    return state


def _vit_arguments(state: dict[str, Tensor], prompts: Tensor, path: Path, heads: int | None) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer, read off the tensors' names and shapes."""
    dim, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k)))
    if prompts.ndim != 3 or prompts.shape[0] != depth or prompts.shape[2] != dim:
        raise UserError(
            f"prompts must have shape ({depth}, C, {dim}), one set per layer",
            where=path,
            given=tuple(prompts.shape),
            remedy="only the deep variant exists in the official code",
        )
    if heads is None and dim % 64:
        raise UserError("cannot guess the number of heads", where=path, given=f"D = {dim}", remedy="give heads=...")
    heads = dim // 64 if heads is None else heads
    if heads < 1 or dim % heads:
        raise UserError(f"heads must divide the width {dim}", where="heads", given=heads)
    class_token = "cls_token" in state
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    length, prefix = state["pos_embed"].shape[1], int(class_token) + registers
    no_embed_class = not _is_square(length - prefix)  # else prefix tokens have positions as well
    patches = length if no_embed_class else length - prefix
    if not _is_square(patches):
        raise UserError("position embeddings are not of a square grid", where=path, given=f"{length} positions")
    grid = math.isqrt(patches)
    return {
        "img_size": grid * patch,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "pre_norm": "norm_pre.weight" in state,
        "class_token": class_token,
        "global_pool": "token" if class_token else "avg",
        "fc_norm": False,
        "reg_tokens": registers,
        "no_embed_class": no_embed_class,
        "num_classes": 0,
    }


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def _names(given: Sequence[str] | str | Path, classes: int) -> list[str]:
    from vfm_core.data_sources import display_names

    from finecam.classifiers import read_class_names

    if isinstance(given, str | Path) and Path(given).is_dir():
        folders = sorted(child.name for child in Path(given).iterdir() if child.is_dir())
        names = display_names(folders, given)  # refuses two that look alike; the official label map merges them
    else:
        names = read_class_names(given)
    if len(names) != classes:
        raise UserError(
            f"the checkpoint has {classes} classes",
            where="class_names",
            given=f"{len(names)} names",
            remedy="give the folder it was trained on, or a list in class order",
        )
    return names
