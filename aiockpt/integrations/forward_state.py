"""Private copies of what may change before an optimizer steps.

The engine's guard holds an optimizer's `step` until all has been staged. The forward
pass before it is not held, and changes running statistics and counters in place; those
of batch norms even without a trace in the tensor's version. They are small: they are
copied while the trainer calls.
"""

__all__ = ["changed_by_forward", "with_copies"]

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch

# Statistics of a layer are as wide as the layer; weights are larger.
_MAX_COPIED_BYTES = 64 * 1024


def changed_by_forward(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What a module's forward pass may change in place.

    Its buffers; and weights of embeddings with a `max_norm`, whose rows are scaled down
    as they are looked up.
    """
    yield from module.buffers()
    for part in module.modules():
        match part:
            case torch.nn.Embedding() | torch.nn.EmbeddingBag() if part.max_norm:
                yield part.weight
            case _:
                pass


def with_copies(state: Any, changing: Iterable[torch.Tensor] = ()) -> Any:
    """`state` with its small tensors copied, and those that share memory with `changing`.

    Plain containers (dict, `OrderedDict`, list, tuple) are copied on the way; all else
    stays the caller's. Tensors that shared memory share it still.

    Args:
        state: What is about to be saved.
        changing: Tensors that a forward pass may change, whatever their size.
    """
    pointers = {tensor.untyped_storage().data_ptr() for tensor in changing}
    return _Copies(pointers - {0}).of(state)


class _Copies:
    def __init__(self, pointers: set[int]) -> None:
        self._pointers = pointers
        # With the original, so that no other object can get its `id` meanwhile.
        self._done: dict[int, tuple[Any, Any]] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        kind = type(value)
        if kind is tuple:
            return tuple(self.of(item) for item in value)
        if kind not in (dict, OrderedDict, list):
            return value
        if id(value) not in self._done:
            copied = copy.copy(value)
            self._done[id(value)] = value, copied
            for key in range(len(value)) if kind is list else value:
                copied[key] = self.of(value[key])
        return self._done[id(value)][1]

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if not _is_plain(tensor):
            return tensor
        storage = tensor.untyped_storage()
        is_changing = storage.data_ptr() in self._pointers
        if storage.nbytes() > _MAX_COPIED_BYTES and not is_changing:
            return tensor
        # Not by its address: two storages may begin at one, and differ in length.
        key = storage._cdata  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        if key not in self._storages:
            self._storages[key] = storage.clone()  # type: ignore[no-untyped-call]
        copied = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        offset, shape = tensor.storage_offset(), tensor.shape
        return copied.set_(self._storages[key], offset, shape, tensor.stride())


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a view of a copied storage would be saved as `tensor` is."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and not tensor.requires_grad
        and not (tensor.is_meta or tensor.is_quantized)
        and not (tensor.is_conj() or tensor.is_neg())
        and not vars(tensor)
        and tensor.untyped_storage().data_ptr() != 0
    )
