"""What an engine can be told, and how mappings become it."""

__all__ = ["GIB", "MIB", "EngineConfig"]

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

from aiockpt.errors import InvalidArgumentError
from aiockpt.retention import RetentionPolicy

MIB = 1 << 20
GIB = 1 << 30

# Blocks of a DeepSpeed configuration that may hold ours.
_BLOCKS = ("aiockpt", "datastates_ckpt")
_MIN_RING_BYTES = 8 * MIB
_MAX_RING_GIB = 1 << 20
_MAX_THREADS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        host_cache_size: Host memory for the ring, in GiB (at least 8 MiB). It is
            taken from the system as it is first needed.
        parser_threads: Worker threads that checksum and write; twice as many load.
        guard: Whether torch optimizers wait in `step()` until what is being staged
            has been staged. Without it a step that comes too early fails the tag.
        peer_timeout_s: Seconds for which ranks wait for one another. A rank that dies
            is noticed at once; this is for one that hangs, or does not come.
        retention: Policies asked after each commit; a tag that none of them keeps
            is deleted. Empty keeps everything.
    """

    host_cache_size: float = 2.0
    parser_threads: int = 4
    guard: bool = True
    peer_timeout_s: float = 1800.0
    retention: Sequence[RetentionPolicy] = ()

    def __post_init__(self) -> None:
        _check_number("host_cache_size", self.host_cache_size)
        if not _MIN_RING_BYTES / GIB <= self.host_cache_size <= _MAX_RING_GIB:
            raise InvalidArgumentError(
                f"host_cache_size is in GiB and at least {_MIN_RING_BYTES / GIB} "
                f"(8 MiB), not {self.host_cache_size!r}"
            )
        _check_threads(self.parser_threads)
        _check_switch("guard", self.guard)
        _check_seconds("peer_timeout_s", self.peer_timeout_s)
        _check_policies(self.retention)
        # A copy: the caller's list may change, the engine's settings may not.
        object.__setattr__(self, "retention", tuple(self.retention))

    @property
    def ring_bytes(self) -> int:
        """The ring's size in bytes, a whole number of MiB."""
        return int(self.host_cache_size * GIB) // MIB * MIB

    @classmethod
    def parse(cls, config: Self | Mapping[str, object] | None) -> Self:
        """An `EngineConfig` from itself, a mapping of its fields, or None.

        A mapping with an `"aiockpt"` or `"datastates_ckpt"` entry (a DeepSpeed
        configuration) is read from that entry, the rest of it ignored.

        Raises:
            InvalidArgumentError: An unknown key (the nearest known one is named),
                or a value out of range.
        """
        if config is None:
            return cls()
        if isinstance(config, cls):
            return config
        if not isinstance(config, Mapping):
            message = f"config is an EngineConfig or a mapping, not {type(config)}"
            raise InvalidArgumentError(message)
        block = next((config[name] for name in _BLOCKS if name in config), config)
        if not isinstance(block, Mapping):
            message = f"the configuration block is a mapping, not {block!r}"
            raise InvalidArgumentError(message)
        known = [field.name for field in dataclasses.fields(cls)]
        for key in block:
            if key not in known:
                raise InvalidArgumentError(_unknown_key(key, known))
        # The values are checked when the instance is made.
        return cls(**cast("Mapping[str, Any]", block))


def _check_number(name: str, value: Any) -> None:
    if not _is_number(value):
        raise InvalidArgumentError(f"{name} is a number of GiB, not {value!r}")


def _check_seconds(name: str, value: Any) -> None:
    # Not with `math.isfinite`, which a huge whole number would break.
    if not (_is_number(value) and 0 < value < float("inf")):
        raise InvalidArgumentError(f"{name} is a positive number, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_threads(value: Any) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and 1 <= value <= _MAX_THREADS:
        return
    raise InvalidArgumentError(
        f"parser_threads is a whole number from 1 to {_MAX_THREADS}, not {value!r}"
    )


def _check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{name} is True or False, not {value!r}")


def _check_policies(value: Any) -> None:
    are_policies = isinstance(value, Sequence) and all(
        isinstance(policy, RetentionPolicy) and not isinstance(policy, type)
        for policy in value
    )
    if not are_policies:
        message = f"retention is a sequence of policies, not {value!r}"
        raise InvalidArgumentError(message)


def _unknown_key(key: object, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)
    return f"unknown config key {key!r}; did you mean {nearest[0]!r}?"
