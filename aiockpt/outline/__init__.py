"""What a checkpoint's pickle says, read without importing or calling anything.

A pickle is a program for a small stack machine. `outline` runs it with every
dangerous instruction replaced: a global stays a name (`Global`), a call stays a
description of the call (`Call`), a persistent reference stays the reference
(`StorageOutline`), and a call of torch's own tensor rebuilders becomes a
`TensorOutline`, which says which bytes of which storage the tensor shows.
Containers and plain values are what they are. So the outline of a file from
anywhere can be looked at.

`leaves` names what is in an outline by key path, `emit` turns (a part of) an
outline back into a pickle. `screen` tells whether a pickle can be given to torch's
restricted unpickler without filling the memory. Everything here is pure.
"""

__all__ = [
    "STORAGE_DTYPES",
    "Call",
    "Global",
    "Leaf",
    "StorageOutline",
    "TensorOutline",
    "emit",
    "is_tensor",
    "leaves",
    "outline",
    "screen",
    "segment",
    "storage_keys",
    "tensors_in",
]

from aiockpt.outline.emit import emit
from aiockpt.outline.inert import Call, Global
from aiockpt.outline.screen import screen
from aiockpt.outline.tensors import (
    STORAGE_DTYPES,
    StorageOutline,
    TensorOutline,
    is_tensor,
    outline,
)
from aiockpt.outline.walk import Leaf, leaves, segment, storage_keys, tensors_in
