"""Frozen encoders' hidden states on disk: format, reading by id, building from raw items."""

from crossan_fast.cache.format import CacheError, CorruptCacheError, IncompleteCacheError
from crossan_fast.cache.hidden_state_cache import HiddenStateCache
from crossan_fast.cache.verify import verify_cache
from crossan_fast.cache.writer import write_cache

__all__ = [
    "CacheError",
    "CorruptCacheError",
    "HiddenStateCache",
    "IncompleteCacheError",
    "verify_cache",
    "write_cache",
]
