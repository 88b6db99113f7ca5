"""Who is timed: our explainer, and the two libraries that also offer Finer-CAM maps, each used as its manual says.

Every contender returns maps at the size of the input for the model's predicted classes against three similar ones.
Run as a module, this file measures one contender's peak memory in a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vfm_core.errors import UserError

from finecam.explainer import Explainer
from finecam.families import minmax, resize
from finecam.layers import find_layer
from finecam.layouts import find_layout

Run = Callable[[Tensor, float], Tensor]
Sweep = Callable[[Tensor, Sequence[float]], Any]

GRAD_CAM = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "hirescam": "HiResCAM",
    "gradcam_elementwise": "GradCAMElementWise",
    "layercam": "LayerCAM",
}
TORCHCAM = {"gradcam": "GradCAM", "layercam": "LayerCAM"}


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Attributes
    ----------
    name
        Shown in tables.
    run
        (x, gamma) -> maps (B, H, W).
    sweep
        (x, gammas) -> maps of every strength.
    weighting
        How it weighs the references; ours has to use the same to give the same map.
    """

    name: str
    run: Run
    sweep: Sweep
    weighting: str


def ours(model: nn.Module, layer: str, method: str, weighting: str = "mean", channels_last: bool = False) -> Contender:
    """Our explainer."""
    explain = Explainer(model, layer, method, batch_size=1024, channels_last=channels_last)
    return Contender(
        "finecam, channels last" if channels_last else "finecam",
        lambda x, gamma: explain(x, gamma=gamma, weighting=weighting).maps,
        lambda x, gammas: explain.sweep(x, gammas, weighting=weighting).maps,
        weighting,
    )


def grad_cam(model: nn.Module, layer: str, method: str, reshape: Callable[[Tensor], Tensor] | None) -> Contender:
    """FinerCAM of grad-cam: one call per strength; full backward."""
    import pytorch_grad_cam as library

    cam = library.FinerCAM(model, [model.get_submodule(layer)], reshape, getattr(library, GRAD_CAM[method]))

    def run(x: Tensor, gamma: float) -> Tensor:
        return torch.from_numpy(cam(x, None, alpha=gamma))

    return Contender("grad-cam", run, lambda x, gammas: [run(x, gamma) for gamma in gammas], "softmax")


def torchcam(model: nn.Module, layer: str, method: str, reshape: Callable[[Tensor], Tensor] | None) -> Contender:
    """FinerCAM of torchcam: backward down to the layer only; strengths share one forward whose graph is kept."""
    from torchcam import methods

    options: dict[str, Any] = {} if reshape is None else {"reshape_transform": reshape}
    cam = methods.FinerCAM(model, layer, base_method=getattr(methods, TORCHCAM[method]), num_references=3, **options)

    def maps(x: Tensor, scores: Tensor, gamma: float, keep: bool = False) -> Tensor:
        cam.gamma = gamma
        grid = cam(scores.argmax(1).tolist(), scores, retain_graph=keep)[0]
        return minmax(resize(grid, (x.shape[-2], x.shape[-1])))  # as the others finish theirs

    def sweep(x: Tensor, gammas: Sequence[float]) -> list[Tensor]:
        scores = model(x)
        return [maps(x, scores, gamma, keep=i < len(gammas) - 1) for i, gamma in enumerate(gammas)]

    return Contender("torchcam", lambda x, gamma: maps(x, model(x), gamma), sweep, "mean")


def release(model: nn.Module) -> None:
    """Take every hook off a model of ours: the libraries leave theirs in place."""
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


PEERS: dict[str, tuple[str, dict[str, str], Callable[..., Contender]]] = {
    "grad-cam": ("pytorch_grad_cam", GRAD_CAM, grad_cam),
    "torchcam": ("torchcam", TORCHCAM, torchcam),
}


def missing(peer: str, method: str) -> str | None:
    """Why a peer cannot be timed, or None."""
    package, known, _ = PEERS[peer]
    if find_spec(package) is None:
        return f"{peer} is not installed (pip install finecam[bench])"
    return None if method in known else f"{peer} has no FinerCAM on {method}"


def build_model(name: str, device: str = "cpu") -> tuple[nn.Module, str, tuple[int, int], Any]:
    """Random timm model in eval mode, its default layer, its input size, and the peers' ``reshape`` (None for CNNs)."""
    import timm

    if not timm.is_model(name):
        raise UserError("unknown timm model", where="models", given=name, remedy="see timm.list_models()")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False).eval().to(device)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == getattr(model, "num_classes", -1):
                module.weight.data.mul_(20)  # logits of ordinary spread, so that maps can be compared
    height, width = model.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
    x = torch.zeros(1, 3, height, width, device=device)
    site = find_layer(model, None, x)
    shapes: list[Tensor] = []
    handle = site.module.register_forward_hook(lambda module, args, output: shapes.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    layout = find_layout(model, site.name, site.module, shapes[0], (height, width), 1)
    if layout is None:
        raise UserError("no grid at the default layer", where=name, given=tuple(shapes[0].shape))
    return model, site.name, (height, width), None if layout.kind == "nchw" else layout.to_map


def contender(name: str, model: nn.Module, layer: str, method: str, reshape: Any) -> Contender:
    """Build a contender by name."""
    if name.startswith("finecam"):
        return ours(model, layer, method, channels_last=name != "finecam")
    return PEERS[name][2](model, layer, method, reshape)


# --- memory ----------------------------------------------------------------------------------


def peak_memory(name: str, model: str, method: str, batch: int, device: str = "cpu") -> float:
    """Megabytes that one call needs on top of the loaded model and its input.

    On the CPU, the growth of the peak resident size in a process that does nothing else; on a GPU, of the allocator's.
    """
    if device != "cpu":
        return _call_memory(name, model, method, batch, device)
    arguments = json.dumps([name, model, method, batch, device])
    command = [sys.executable, "-m", "finecam.bench_contenders", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory measurement of {name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def _call_memory(name: str, model_name: str, method: str, batch: int, device: str) -> float:
    model, layer, size, reshape = build_model(model_name, device)
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    side = contender(name, model, layer, method, reshape)
    before = _restart_peak(device)
    side.run(x, 0.6)
    return (_peak(device) - before) / 2**20


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _restart_peak(device: str) -> int:
    """Make peak memory count from now; returns what is in use, in bytes."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if _RESET.exists():
        _RESET.write_text("5")
    return _peak(device)


def _peak(device: str) -> int:
    """Highest memory use, in bytes."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():  # Linux; its ru_maxrss would also count the parent before the process was replaced
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_call_memory(*json.loads(sys.argv[1]))) + "\n")
