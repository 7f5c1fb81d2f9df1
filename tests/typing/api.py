"""The public types as a user's type checker meets them; checked, never run."""

from typing import assert_type

from aiockpt.config import EngineConfig
from aiockpt.errors import CheckpointError, PeerError, StorageError


def settings() -> EngineConfig:
    """A configuration is made by keyword, or from a mapping."""
    assert_type(EngineConfig.parse({"host_cache_size": 2}), EngineConfig)
    return EngineConfig(host_cache_size=0.5, parser_threads=2)


def remedy(error: CheckpointError) -> str:
    """An error tells by its class and attributes what to do about it."""
    match error:
        case PeerError():
            assert_type(error.rank, int | None)
            return f"look at rank {error.rank}"
        case StorageError():
            assert_type(error.errno, int | None)
            return f"repair {error.filename}"
        case _:
            return "save again"
