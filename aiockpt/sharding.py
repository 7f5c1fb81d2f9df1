"""Weights in several files, and an index: the layout that Hugging Face's readers know.

model.safetensors                     all of them, where they fit into one file
model-00001-of-00003.safetensors ...  else so many files
model.safetensors.index.json          and the file of each name
"""

__all__ = ["INDEX_NAME", "MAX_SHARD_BYTES", "WeightsFile", "sharded"]

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

import torch

from aiockpt.errors import InvalidArgumentError
from aiockpt.formats import safetensors
from aiockpt.formats.plain import PlainBytes
from aiockpt.weights import FORMAT_METADATA, Weights, weights_of

MAX_SHARD_BYTES: Final = 5 * 10**9
"""Tensor bytes that a file holds unless told otherwise."""

INDEX_NAME: Final = "model.safetensors.index.json"


class WeightsFile(NamedTuple):
    """One file of the layout, as arguments of a save.

    Attributes:
        path: Where it goes, relative to the tag.
        state: What it holds.
        metadata: Text for its header.
    """

    path: str
    state: dict[str, torch.Tensor] | PlainBytes
    metadata: Mapping[str, str] | None


def sharded(
    state: torch.nn.Module | Weights | Mapping[str, torch.Tensor],
    *,
    directory: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[WeightsFile]:
    """The files that hold a module's weights, the index last.

    Tensors are dealt out in their order. A file takes the next one if its tensors then
    have at most `max_shard_bytes` bytes; a larger tensor gets a file of its own.

    Args:
        state: A module or its weights (see `weights_of`), or dense tensors by name.
        directory: Where in the tag the files go; empty for the tag itself.
        max_shard_bytes: Most tensor bytes of a file, its header not counted.

    Raises:
        InvalidArgumentError: safetensors cannot hold a tensor, or an argument is
            wrong.
    """
    _check_limit(max_shard_bytes)
    weights = _as_weights(state)
    # All at once: tensors of two files may not share memory either.
    safetensors.check(weights.tensors)
    prefix = f"{directory.rstrip('/')}/" if directory else ""
    shards = _shards(weights.tensors, max_shard_bytes)
    if len(shards) == 1:
        return [_file(f"{prefix}model.safetensors", weights, shards[0])]
    files = {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, 1)
    }
    return [
        *(_file(f"{prefix}{name}", weights, names) for name, names in files.items()),
        WeightsFile(f"{prefix}{INDEX_NAME}", _index(weights, files), None),
    ]


def _as_weights(state: object) -> Weights:
    if isinstance(state, Weights):
        return state
    if isinstance(state, torch.nn.Module):
        return weights_of(state)
    # Whether it is what it is taken for is told by the format.
    return Weights(cast("dict[str, torch.Tensor]", state), {})


def _check_limit(max_shard_bytes: Any) -> None:
    is_whole = isinstance(max_shard_bytes, int) and not isinstance(
        max_shard_bytes, bool
    )
    if not (is_whole and max_shard_bytes > 0):
        message = f"max_shard_bytes is a number of bytes, not {max_shard_bytes!r}"
        raise InvalidArgumentError(message)


def _shards(
    tensors: Mapping[str, torch.Tensor], max_shard_bytes: int
) -> list[list[str]]:
    """The names of each file, in order; at least one file."""
    whole: list[list[str]] = []
    current: list[str] = []
    nbytes = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > max_shard_bytes:
            # As `transformers` deals them out: the file begun before goes on.
            whole.append([name])
            continue
        if nbytes + tensor.nbytes > max_shard_bytes:
            whole.append(current)
            current, nbytes = [], 0
        current.append(name)
        nbytes += tensor.nbytes
    return [*whole, current] if current or not whole else whole


def _file(path: str, weights: Weights, names: list[str]) -> WeightsFile:
    tensors = {name: weights.tensors[name] for name in names}
    ties = {name: kept for name, kept in weights.ties.items() if kept in tensors}
    return WeightsFile(path, tensors, {**ties, **FORMAT_METADATA})


def _index(weights: Weights, files: Mapping[str, list[str]]) -> PlainBytes:
    total = sum(tensor.nbytes for tensor in weights.tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    return PlainBytes((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
