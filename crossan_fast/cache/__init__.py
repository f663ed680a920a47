"""Frozen encoders' hidden states on disk: format, reading by id, writing; `build/`: from raw items."""

from crossan_fast.cache.build import (
    BrokenItemError,
    BuildReport,
    ImportReport,
    ModalitySpec,
    build_cache,
    import_features,
)
from crossan_fast.cache.centring import Centring
from crossan_fast.cache.convert import convert_cache
from crossan_fast.cache.format import CacheError, CorruptCacheError, IncompleteCacheError
from crossan_fast.cache.frame import Frame
from crossan_fast.cache.hidden_state_cache import HiddenStateCache
from crossan_fast.cache.levels import evenly
from crossan_fast.cache.verify import verify_cache
from crossan_fast.cache.writer import write_cache

__all__ = [
    "BrokenItemError",
    "BuildReport",
    "CacheError",
    "Centring",
    "CorruptCacheError",
    "Frame",
    "HiddenStateCache",
    "ImportReport",
    "IncompleteCacheError",
    "ModalitySpec",
    "build_cache",
    "convert_cache",
    "evenly",
    "import_features",
    "verify_cache",
    "write_cache",
]
