"""Weight and bias of a linear head from a file, for repairs that look at the head's rows (``weight-align``, ours)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vfm_core.errors import UserError

__all__ = ["read_head"]


def read_head(
    path: str | Path, num_classes: int | None = None, layer: str | None = None
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Read the head's weight (K, D) and, where it has one, its bias (K,).

    Parameters
    ----------
    path
        ``.npy`` (the weight), ``.npz`` (arrays ``weight`` and, where wanted, ``bias``), or a checkpoint
        (``.safetensors``, ``.pt``, ``.pth``) whose head is found by name and shape.
    num_classes
        K, to find the head of a checkpoint.
    layer
        Dotted name of the head in a checkpoint, where it cannot be told.

    Raises
    ------
    UserError
        No such file, objects instead of arrays, no weight, or no head that can be told.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError("no such file", where="--head", given=path, remedy="check the path")
    if suffix in (".npy", ".npz"):
        try:
            stored = np.load(path, allow_pickle=False)
            arrays = {name: stored[name] for name in stored.files} if suffix == ".npz" else {"weight": stored}
        except (ValueError, OSError, EOFError) as e:
            raise UserError("no plain arrays", where=path, given=e, remedy="save the weight with numpy") from e
        if "weight" not in arrays:
            raise UserError("no array weight", where=path, given=f"arrays are {', '.join(arrays)}")
        return arrays["weight"], arrays.get("bias")
    from ft_calibrate.model_sources import read_state
    from ft_calibrate.state_heads import head_keys

    state = read_state(path)
    weight, bias = head_keys({name: tuple(t.shape) for name, t in state.items()}, num_classes, layer, path)
    kept = state[weight].double().flatten(1).numpy()
    return kept, None if bias is None else state[bias].double().numpy()
