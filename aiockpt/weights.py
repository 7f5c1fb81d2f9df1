"""What a module's weights are: its tensors, each once, by the names that readers know.

A module that is saved into a `.safetensors` file stands for these. Of tied weights one
name is written; which one is told by `weights_of`.
"""

__all__ = ["FORMAT_METADATA", "Weights", "memory_of", "or_weights", "weights_of"]

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import torch

from aiockpt.errors import InvalidArgumentError

FORMAT_METADATA: Final[Mapping[str, str]] = {"format": "pt"}
"""What `transformers` wants to read in the header of a safetensors file."""

# Device, address, dtype, shape, stride, and whether it is read as conjugate or negative.
Memory: TypeAlias = tuple[
    torch.device, int, torch.dtype, tuple[int, ...], tuple[int, ...], bool, bool
]


class Weights(NamedTuple):
    """The tensors of a module that are written, and what was left out.

    Attributes:
        tensors: By name, in the order of the state dict; contiguous.
        ties: The name under which each of the other names' tensor is written.
    """

    tensors: dict[str, torch.Tensor]
    ties: dict[str, str]

    @property
    def metadata(self) -> dict[str, str]:
        """The header's text: the ties, as `safetensors.torch.save_model` notes them."""
        return {**self.ties, **FORMAT_METADATA}


def weights_of(module: torch.nn.Module) -> Weights:
    """The entries of a module's state dict, one for each of its tensors.

    Parameters and persistent buffers are in it, as are the effects of its state dict
    hooks; other buffers are not. Of names that are tied (their tensors are the same
    memory, seen alike) the one that is written is

    - one that no `_tied_weights_keys` in the module names, as `transformers` has it;
    - of these the first in the order of the alphabet, as in `safetensors.torch`;
    - the last one where all are named.

    What `_keys_to_ignore_on_save` names is left out. A tensor that is not contiguous
    is copied.

    Raises:
        InvalidArgumentError: An entry is no tensor.
    """
    ignored = getattr(module, "_keys_to_ignore_on_save", None) or ()
    entries: dict[str, Any] = {
        name: value
        for name, value in module.state_dict().items()
        if name not in ignored
    }
    for name, value in entries.items():
        if not isinstance(value, torch.Tensor):
            message = f"{name!r} is a {type(value).__name__}: weights are tensors only"
            raise InvalidArgumentError(message)
    ties = _ties(entries, list(_declared(module)))
    tensors = {
        name: value.contiguous() if value.layout is torch.strided else value
        for name, value in entries.items()
        if name not in ties
    }
    return Weights(tensors, ties)


def _declared(module: torch.nn.Module) -> Iterator[str]:
    """Patterns of the names that a model's own loading makes from others."""
    for prefix, part in module.named_modules():
        # A mapping to their sources since transformers 5, a list before.
        for pattern in getattr(part, "_tied_weights_keys", None) or ():
            yield f"{re.escape(prefix)}.{pattern}" if prefix else pattern


def _ties(entries: Mapping[str, torch.Tensor], declared: list[str]) -> dict[str, str]:
    names_by_memory: dict[Memory, list[str]] = {}
    for name in sorted(entries):
        memory = memory_of(entries[name])
        if memory is not None:
            names_by_memory.setdefault(memory, []).append(name)
    ties: dict[str, str] = {}
    for names in names_by_memory.values():
        own = (n for n in names if not any(re.search(p, n) for p in declared))
        kept = next(own, names[-1])
        ties.update((name, kept) for name in names if name != kept)
    return ties


def memory_of(tensor: torch.Tensor) -> Memory | None:
    """What two names of one tensor have in common; None where it has no memory."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return None
    if hasattr(tensor, "__tensor_flatten__") or not tensor.nbytes:
        return None
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def or_weights(
    state: object, path: str, metadata: Mapping[str, str] | None
) -> tuple[object, Mapping[str, str] | None]:
    """State and metadata of a file: of a module, for safetensors, its weights.

    Raises:
        InvalidArgumentError: As `weights_of`.
    """
    if not (isinstance(state, torch.nn.Module) and path.endswith(".safetensors")):
        return state, metadata
    weights = weights_of(state)
    return weights.tensors, {**weights.metadata, **(metadata or {})}
