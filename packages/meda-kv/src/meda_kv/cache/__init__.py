"""The cache: layers that grow in place, compression, forks, and what was done in numbers."""

from __future__ import annotations

from meda_kv.cache.cache import CompressedCache
from meda_kv.cache.layer import CompressedLayer
from meda_kv.cache.meda import MedaCache, cache_for
from meda_kv.cache.tokens import TokenTable

__all__ = ["CompressedCache", "CompressedLayer", "MedaCache", "TokenTable", "cache_for"]
