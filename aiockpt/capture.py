"""What a save holds on to, taken on the caller's time.

`capture` returns a private structure: containers are copied, objects of other
classes are cloned, tensors are kept by reference and marked. From then on the
caller may change anything but the tensors' bytes, and `Capture.changed` tells
whether those stayed as they were.
"""

__all__ = ["Capture", "capture"]

from collections.abc import Iterator, Sequence
from typing import Final

import torch

from aiockpt.capturing.key_paths import ROOT, tensor_key
from aiockpt.capturing.marks import marks, storage_ptrs
from aiockpt.capturing.walk import RefusedError, Walk
from aiockpt.errors import InvalidArgumentError

# All marks of a batch are taken in one hold of the GIL: about half a millisecond.
_BATCH_TENSORS: Final = 4096


class Capture:
    """A state as it was when `capture` returned.

    Nothing in `tree` is shared with the caller but immutable objects, tensors and
    raw torch storages. Attributes that were set on a tensor object stay with it and
    are not frozen.

    Attributes:
        tree: The private structure; equal to the state that was captured.
        tensors: Every tensor met, each once, and the inner tensors of wrapper
            subclasses such as `DTensor`.
        storages: Raw torch storages that stand in it by themselves.
    """

    __slots__ = ("_marks", "storages", "tensors", "tree")

    def __init__(
        self,
        tree: object,
        tensors: Sequence[torch.Tensor],
        storages: Sequence[torch.UntypedStorage],
    ) -> None:
        """Marks `tensors`; use `capture` to make one."""
        self.tree = tree
        self.tensors = tensors
        self.storages = storages
        self._marks = list(map(marks, self._batches()))

    def changed(self) -> str | None:
        """Returns the key path of a tensor that is no longer as marked, if one is.

        Seen are in-place operations, also through views, `detach()` and the loop
        and `foreach` optimizers, and memory that was swapped (`tensor.data = ...`,
        `resize_`). Not seen: writes through `tensor.data`, fused optimizers, foreign
        kernels, raw storages, inference tensors, `foreach` optimizers on `DTensor`s.

        May be called from any thread; takes about 0.2 us per tensor.
        """
        for number, (before, batch) in enumerate(
            zip(self._marks, self._batches(), strict=True)
        ):
            index = before.first_difference(marks(batch))
            if index is not None:
                return self.key_of(self.tensors[number * _BATCH_TENSORS + index])
        return None

    def key_of(self, tensor: torch.Tensor) -> str:
        """Returns the key path of `tensor`, as in `model.weight`."""
        return tensor_key(self.tree, tensor) or f"a tensor of an object in {ROOT}"

    def storage_ptrs(self) -> set[int]:
        """Returns the data pointers of all storages that the state refers to.

        Takes about a third of a microsecond per tensor.
        """
        pointers = storage_ptrs(self.tensors)
        return pointers.union(storage.data_ptr() for storage in self.storages) - {0}

    def _batches(self) -> Iterator[Sequence[torch.Tensor]]:
        for at in range(0, len(self.tensors), _BATCH_TENSORS):
            yield self.tensors[at : at + _BATCH_TENSORS]


def capture(state: object) -> Capture:
    """Takes hold of `state`, so that the caller may change all but tensors' bytes.

    - Builtin containers (also `OrderedDict`, `defaultdict`, `deque`) are copied, with
      aliasing and cycles kept: what was one object is one object in the copy.
    - Tensors and raw torch storages stay the caller's, by reference.
    - numpy arrays are copied; objects of other classes are cloned as a pickle round
      trip would.

    Takes under a microsecond per tensor; a clone costs several per object.

    Raises:
        InvalidArgumentError: A value cannot be pickled; the message names its key
            path and the cause is chained.
    """
    walk = Walk()
    try:
        tree = walk.copy(state)
    except RefusedError as refused:
        message = f"{refused.path()} cannot be saved: {refused.cause}"
        raise InvalidArgumentError(message) from refused.cause
    except RecursionError as cause:
        message = f"{ROOT} is nested too deeply to be saved"
        raise InvalidArgumentError(message) from cause
    # Plain tensors first: their marks are taken fast where they are by themselves.
    tensors = [*walk.plain_tensors.values(), *walk.odd_tensors.values()]
    return Capture(tree, tensors, walk.storages)
