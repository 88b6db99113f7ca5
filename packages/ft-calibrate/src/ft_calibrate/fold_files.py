"""Fold a calibration into a checkpoint file or folder, leaving everything else in it bit for bit as it was (ours).

What goes in comes out in its own format: a state dict (``.safetensors``, ``.pth``, ``.bin``) of timm, torchvision or
the layout of FTC's code; a folder of timm or transformers, loadable as before; a run folder of ``ft-calibrate train``;
a text head; an ONNX file (`ft_calibrate.fold_onnx`). A spec such as ``open_clip:ViT-B-32@openai`` is loaded and written
as a text head or a state dict.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vfm_core.errors import UserError
from vfm_core.files import TEMPORARY, atomic_write, write_json

from ft_calibrate.classifier import RUN_FILE, Classifier, load_as_it_is, load_classifier
from ft_calibrate.fold import fold, random_inputs
from ft_calibrate.fold_marks import MARK, RECORD_FILE, mark, refuse_folded
from ft_calibrate.head_change import SHIP, TOLERANCE, FoldRecord, HeadChange, head_change, largest_difference
from ft_calibrate.model_sources import read_names, read_raw, read_state
from ft_calibrate.record import Calibration, read_calibration
from ft_calibrate.state_heads import head_keys, state_dicts
from ft_calibrate.text_head import TextHead, is_text_head, load_text_head, save_text_head

__all__ = ["MARK", "export_file"]

log = logging.getLogger(__name__)

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_LEFT_BEHIND = ("optimizer", "scheduler", "rng_state", "scaler", "events.out", ".lock", TEMPORARY, "results.jsonl")
Cal = float | Calibration


@dataclass(frozen=True)
class _Request:
    calibration: Cal
    absent: Any
    head: str | None
    classes: list[str] | None
    overwrite: bool

    @property
    def num_classes(self) -> int | None:
        """K, where the calibration or the names say it."""
        if isinstance(self.calibration, Calibration):
            return len(self.calibration.classes)
        return len(self.classes) if self.classes is not None else None

    def change(self, num_classes: int, names: Sequence[str] | None) -> HeadChange:
        return head_change(self.calibration, num_classes, self.classes or names, self.absent)


def export_file(
    source: str | os.PathLike[str],
    calibration: Cal | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    absent: Any = None,
    head: str | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    overwrite: bool = False,
    template: str | Sequence[str] | None = None,
    source_ckpt: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
) -> FoldRecord:
    """Write a copy of a checkpoint with a calibration in its head.

    Parameters
    ----------
    source : path or spec
        A file, a folder, or a model spec.
    calibration : float, Calibration or path
        Gamma (needs `absent`), or a record.
    out : path
        A file of the source's format, or a folder where the source is one.
    absent : optional
        With a number: which classes receive it (names, columns or a mask).
    head : str, optional
        Dotted name of the head (``fc``), or of the ONNX node or output; found by name and shape otherwise.
    classes : path or sequence of str, optional
        Names of the head's classes in order, where the checkpoint has none: a record is then matched by name. Without
        names it is matched by position.
    overwrite : bool
        Replace `out`.
    template, source_ckpt, offline
        As in `load_classifier`, for specs.

    Returns
    -------
    FoldRecord
        What was done, with the largest deviation from logits + gamma where the model could be run.

    Raises
    ------
    UserError
        An existing `out`; a checkpoint with a calibration in it; a head that is not found, or whose change cannot be
        represented in that format (a head without bias whose architecture is rebuilt without one).
    """
    if isinstance(calibration, str | os.PathLike):
        calibration = read_calibration(Path(calibration))
    names = read_names(classes) if classes is not None else None
    request = _Request(calibration, absent, head, names, overwrite)
    text, target = os.fspath(source), Path(out)
    path = Path(text.removeprefix("dir:")).expanduser()
    if target.exists() and not overwrite:
        raise UserError("output exists", given=str(target), remedy="use --overwrite, or another -o")
    if path.suffix == ".onnx":
        from ft_calibrate.fold_onnx import export_onnx

        return export_onnx(path, lambda k: request.change(k, None), target, head=head, num_classes=request.num_classes)
    if source_ckpt is None:
        refuse_folded(path)
    if path.is_file() and source_ckpt is None:
        return _export_text_head(path, request, target) if is_text_head(path) else _export_state(path, request, target)
    if path.is_dir() and not (path / "open_clip_config.json").is_file():
        return _export_folder(path, request, target)
    if path.suffix in _SUFFIXES and not path.exists():
        raise UserError("no such checkpoint file", given=str(path), remedy="check the path")
    found = load_classifier(text, source_ckpt=source_ckpt, head=head, classes=names, template=template, offline=offline)
    return _export_spec(found, request, target)


# ---------------------------------------------------------------------- state dicts
def _changed_tensors(
    state: Mapping[str, Tensor], request: _Request, where: Path, names: Sequence[str] | None, head: str | None
) -> tuple[dict[str, Tensor], FoldRecord]:
    """The tensors of a state dict that change, and the record."""
    weight_key, bias_key = head_keys({k: tuple(v.shape) for k, v in state.items()}, request.num_classes, head, where)
    weight = state[weight_key]
    change = request.change(len(weight), names)
    layer = weight_key.removesuffix(".weight")
    cosine = any(f"{layer}.{name}" in state and state[f"{layer}.{name}"].ndim == 0 for name in ("logit_scale", "scale"))
    if bias_key is None and not cosine:  # text and cosine heads take a bias when they are loaded
        remedy = f"the architecture is built without one: {SHIP}, or export the model to ONNX and fold there"
        raise UserError("the head has no bias", where=where, given=weight_key, remedy=remedy)
    if change.scales and (not weight.dtype.is_floating_point or f"{layer}.scale" in state):
        raise UserError("this head cannot be scaled per class", where=where, given=weight_key, remedy=SHIP)
    bias, rounding = change.new_bias(state[bias_key] if bias_key is not None else None, weight)
    changed = {bias_key or f"{layer}.bias": bias}
    if change.scales:
        changed[weight_key] = change.new_weight(weight)
    notes = list(change.notes)
    if bias_key is None:
        notes.append("the head had no bias: one was made")
    dtype = str(bias.dtype).removeprefix("torch.")
    if rounding > TOLERANCE:
        notes.append(f"{dtype} rounds the new bias by up to {rounding:.2g}")
        log.warning("%s: %s", where, notes[-1])
    facts = (change.gamma, len(change.bias), len(change.columns), change.source, dtype, rounding, tuple(notes))
    return changed, FoldRecord(layer, tuple(changed), *facts, effect=change.effect)


def _export_state(path: Path, request: _Request, out: Path) -> FoldRecord:
    if path.suffix not in _SUFFIXES:
        remedy = f"give {', '.join(_SUFFIXES)} or .onnx"
        raise UserError("not a checkpoint file", given=str(path), remedy=remedy)
    if (out.suffix == ".safetensors") != (path.suffix == ".safetensors"):
        raise UserError(
            "another format than the source's", where="-o", given=str(out), remedy=f"end it in {path.suffix}"
        )
    record = _rewrite(path, request, out, None, request.head)
    return replace(record, path=out)


def _rewrite(path: Path, request: _Request, out: Path, names: Sequence[str] | None, head: str | None) -> FoldRecord:
    """Write one weights file with the head changed, and read it back."""
    stored = read_raw(path)
    if path.suffix == ".safetensors":
        metadata = _metadata(path)
        changed, record = _changed_tensors(stored, request, path, names, head)
        from safetensors.torch import save_file

        with atomic_write(out) as draft:
            save_file({**stored, **changed}, draft, metadata={**metadata, MARK: record.line()})
        _check_rest(read_raw(out), stored, record)
        return record
    read_state(path)  # refuses what holds no state dict
    records = []
    for part in state_dicts(stored):
        changed, record = _changed_tensors(part, request, path, names, head)
        part.update(changed)
        records.append(record)
    with atomic_write(out) as draft:
        torch.save(stored, draft)
        mark(out, records[0].line(), draft)  # before the file: a mark of other bytes counts for nothing
    for after, before in zip(state_dicts(read_raw(out)), state_dicts(stored), strict=True):
        _check_rest(after, before, records[0])
    record = records[0]
    if len(records) > 1:
        record = replace(record, notes=(*record.notes, f"done in all {len(records)} state dicts of the file"))
    return record


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _check_rest(after: Mapping[str, Any], before: Mapping[str, Any], record: FoldRecord) -> None:
    """What was written must read back: all but the head bit for bit as it was."""
    tensors = {k: v for k, v in before.items() if isinstance(v, Tensor) and k not in record.changed}
    if not all(k in after and _same(after[k], v) for k, v in tensors.items()) or not set(record.changed) <= set(after):
        raise RuntimeError("the written checkpoint does not read back as it was meant")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a != a)).all())


# ---------------------------------------------------------------------- folders
def _export_folder(path: Path, request: _Request, out: Path) -> FoldRecord:
    """A folder of timm, transformers or ``ft-calibrate train``: the same files, one tensor changed, tried out."""
    if out.exists() and not any((out / name).is_file() for name in ("config.json", RUN_FILE, RECORD_FILE)):
        raise UserError("not a checkpoint folder, so not replaced", given=str(out), remedy="use another -o")
    before, names, head = _folder_model(path, request)
    files = [f for f in sorted(path.iterdir()) if f.is_file() and not f.name.startswith(_LEFT_BEHIND)]
    holding = [f for f in files if f.suffix in _SUFFIXES and _holds(f, request, head)]
    if not holding:
        raise UserError("no weights file holds the head", where=path, given=head, remedy="name it with --head")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{out.name}")
    try:
        draft.mkdir()
        for file in files:
            if file not in holding:
                shutil.copy2(file, draft / file.name)
        records = [_rewrite(file, request, draft / file.name, names, head) for file in holding]
        record = records[0]
        if before is not None:
            record = replace(record, max_abs_diff=_try_out(before, draft, request, record))
        write_json(draft / RECORD_FILE, replace(record, path=None))
        _replace_folder(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return replace(record, path=out)


def _folder_model(path: Path, request: _Request) -> tuple[Classifier | None, list[str] | None, str | None]:
    """The model of a folder, its class names and its head; without model for runs whose source has no spec."""
    run: dict[str, Any] = {}
    if (path / RUN_FILE).is_file():
        try:
            run = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError("not valid JSON", where=path / RUN_FILE, given=error, remedy="train again") from error
        if (run.get("structure") or {}).get("ensemble"):
            remedy = f"fold before averaging, or {SHIP}"
            raise UserError("a source ensemble averages two models", where=path, remedy=remedy)
        if not (run.get("source") or {}).get("spec"):
            return None, run.get("classes"), request.head or run.get("head")
    found = load_classifier(f"dir:{path}", head=request.head, classes=request.classes)
    return found, found.class_names, found.head_name


def _holds(file: Path, request: _Request, head: str | None) -> bool:
    try:
        state = read_state(file)
        key, _ = head_keys({k: tuple(v.shape) for k, v in state.items()}, request.num_classes, head, file)
    except UserError:  # another shard, or a file of something else
        return False
    return key in state


def _try_out(before: Classifier, draft: Path, request: _Request, record: FoldRecord) -> float | None:
    """Load the changed folder as users will, and compare its logits on random pictures."""
    probe = random_inputs(before)
    if probe is None:
        return None
    after = load_as_it_is(f"dir:{draft}", head=request.head, classes=request.classes)
    change = request.change(before.num_classes, before.class_names)
    with torch.inference_mode():
        z, got = before(probe), after(probe)
    worst = largest_difference(got.double(), change.apply(z.double()))
    if worst > max(10 * TOLERANCE, 4 * record.rounding):
        given = f"logits differ by {worst:.3g} from logits + gamma"
        remedy = f"name the last layer with --head, or {SHIP}"
        raise UserError(
            "the calibration cannot be folded into this layer", where=record.head, given=given, remedy=remedy
        )
    return worst


def _replace_folder(draft: Path, out: Path) -> None:
    if not out.exists():
        draft.rename(out)
        return
    old = out.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{out.name}")
    out.rename(old)
    try:
        draft.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


# ---------------------------------------------------------------------- text heads and specs
def _export_text_head(path: Path, request: _Request, out: Path) -> FoldRecord:
    if out.suffix != ".safetensors":
        raise UserError("text heads are safetensors files", where="-o", given=str(out), remedy="end it in .safetensors")
    head, names = load_text_head(path)
    return _write_text_head(Classifier(head, "", None, request.classes or names, str(path)), request, out)


def _write_text_head(found: Classifier, request: _Request, out: Path) -> FoldRecord:
    change = request.change(found.num_classes, found.class_names)
    model, record = fold(found, change, random_inputs(found))
    layer = model.get_submodule(found.head_name)
    assert isinstance(layer, TextHead)
    save_text_head(layer, out, found.class_names, model=found.spec, **{MARK: record.line()})
    scale = f"logit_scale {float(layer.logit_scale):.4g} is stored with it"
    return replace(record, path=out, notes=(*record.notes, scale))


def _export_spec(found: Classifier, request: _Request, out: Path) -> FoldRecord:
    if isinstance(found.head, TextHead):
        if out.suffix != ".safetensors":
            remedy = "end it in .safetensors"
            raise UserError("a text head is written as safetensors", where="-o", given=str(out), remedy=remedy)
        return _write_text_head(found, request, out)
    model, record = fold(found, request.change(found.num_classes, found.class_names), random_inputs(found))
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if set(state) - set(found.model.state_dict()):
        remedy = f"the architecture is built without one: {SHIP}, or call fold_into_head(model, ...) in Python"
        raise UserError("the head has no bias", where=found.spec, given=found.head_name, remedy=remedy)
    save = getattr(model, "save_pretrained", None)
    if not out.suffix and callable(save):
        draft = out.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{out.name}")
        try:
            save(draft)
            write_json(draft / RECORD_FILE, record)
            _replace_folder(draft, out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return replace(record, path=out)
    if out.suffix not in _SUFFIXES:
        remedy = f"end it in {', '.join(_SUFFIXES)}"
        raise UserError("cannot tell the format", where="-o", given=str(out), remedy=remedy)
    with atomic_write(out) as draft_file:
        if out.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(
                {k: v.clone() for k, v in state.items()}, draft_file, metadata={"format": "pt", MARK: record.line()}
            )
        else:
            torch.save(state, draft_file)
            mark(out, record.line(), draft_file)
    return replace(record, path=out)
