"""What a file of the catalogue is, and what must come of opening it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from aiockpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    InvalidArgumentError,
    UnsafePickleError,
)
from hostile.zip_files import torch_file

# What is expected of one door: a kind of error, None where the file must open, or
# EITHER where refusing and opening are both right.
Expected = type[CheckpointError] | tuple[()] | None
EITHER: tuple[()] = ()
REFUSED = CheckpointError
CORRUPT = CorruptCheckpointError
UNSAFE = UnsafePickleError
INVALID = InvalidArgumentError


@dataclass(frozen=True)
class Case:
    """One file that somebody might be given.

    Attributes:
        name: What is wrong with it.
        build: Makes its bytes.
        load: What comes of loading; None if it loads as `torch.load` loads it.
        inspect: What comes of `inspect_file`.
        verify: What comes of `verify_file`.
    """

    name: str
    build: Callable[[], bytes]
    load: Expected = CORRUPT
    inspect: Expected = CORRUPT
    verify: Expected = CORRUPT


def harmless(name: str, build: Callable[[], bytes]) -> Case:
    """A file that is odd, and means just one thing."""
    return Case(name, build, None, None, None)


def pickle_case(
    name: str, data: bytes, load: Expected = CORRUPT, inspect: Expected = CORRUPT
) -> Case:
    """A pickle in a sound file: `verify_file` has nothing to say against it."""
    return Case(f"pickle: {name}", partial(torch_file, data), load, inspect, None)
