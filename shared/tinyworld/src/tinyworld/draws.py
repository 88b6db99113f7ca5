"""Counter-based random numbers: value = hash(key, image index, name of the draw, position).

A generator object per image would tie each number to the order of the draws and, in NumPy, to the library's version.
Here every draw has a name, so a batch of images is drawn in one vectorised call, image *i* never depends on which
other images are in the batch, and adding a draw later leaves the older ones as they were. Only integer arithmetic
is used (SplitMix64, Steele et al. 2014), hence the same bits on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def key_of(*words: object) -> int:
    """A 64-bit key from any words (strings, integers); different words give unrelated keys."""
    text = "\x1f".join(f"{type(word).__name__}:{word}" for word in words)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64 finaliser, element-wise on uint64; works in place on a fresh array to save memory traffic."""
    z = z ^ (z >> np.uint64(30))
    z *= _MIX1
    z ^= z >> np.uint64(27)
    z *= _MIX2
    z ^= z >> np.uint64(31)
    return z


class Draws:
    """Named random draws for a batch of images.

    Parameters
    ----------
    key : int
        Seed of the world, from :func:`key_of`.
    indices : sequence of int, shape (n,)
        Image numbers; row *r* of every draw belongs to ``indices[r]`` and to nothing else.

    Examples
    --------
    >>> a = Draws(key_of("demo", 0), [3, 7]).uniform("angle")
    >>> b = Draws(key_of("demo", 0), [7]).uniform("angle")
    >>> bool(a[1] == b[0])
    True
    """

    def __init__(self, key: int, indices: Sequence[int] | np.ndarray) -> None:
        index = np.asarray(indices, dtype=np.int64).astype(np.uint64)
        self._row = _mix(_mix(index * _GOLDEN + _GOLDEN) ^ np.uint64(key))
        self.n = len(index)

    def bits(self, name: str, count: int) -> np.ndarray:
        """Raw 64-bit words, uint64 of shape (n, count)."""
        row = _mix(self._row ^ np.uint64(key_of(name)))
        steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        return _mix(row[:, None] + steps[None, :])

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Uniform on [low, high), float64 of shape (n,)."""
        return self.uniforms(name, 1, low, high)[:, 0]

    def uniforms(self, name: str, count: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Uniform on [low, high), float64 of shape (n, count)."""
        unit = (self.bits(name, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return low + (high - low) * unit

    def integers(self, name: str, high: int, count: int = 1) -> np.ndarray:
        """Integers in [0, high), int64 of shape (n, count)."""
        return np.minimum((self.uniforms(name, count) * high).astype(np.int64), high - 1)

    def coin(self, name: str, p: float = 0.5) -> np.ndarray:
        """True with probability p, bool of shape (n,)."""
        return self.uniform(name) < p

    def grain(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Triangular noise on [-1, 1] (standard deviation 0.408), float32 of shape (n, *shape)."""
        count = int(np.prod(shape))
        raw = self.bits(name, -(-count // 4)).astype("<u8").view(np.uint8).reshape(self.n, -1)[:, : 2 * count]
        total = raw[:, :count].astype(np.int16) + raw[:, count:]
        grain: np.ndarray = (total.astype(np.float32) - np.float32(255)) * np.float32(1 / 255)
        return grain.reshape(self.n, *shape)
