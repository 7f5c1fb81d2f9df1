"""Small states for hypothesis: everything that a checkpoint must keep, at little cost.

Needs hypothesis. Compare tensors by `torch.equal` of their bytes
(`tensor.view(torch.uint8)`): floats may be NaN.
"""

__all__ = ["DTYPES", "state_dicts", "tensors"]

import math
from typing import Final

import torch
from hypothesis import strategies as st

# Every element size, each kind of number; complex and quantised ones are rare.
DTYPES: Final = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)

_KEYS = st.text(min_size=1, max_size=8)
_SHAPES = st.lists(st.integers(0, 4), max_size=3)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    _KEYS,
)


@st.composite
def _storages(draw: st.DrawFn, num_elements: int) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    if dtype is torch.bool:
        # Only 0 and 1 are bytes of a bool.
        values = st.lists(st.booleans(), min_size=num_elements, max_size=num_elements)
        return torch.tensor(draw(values), dtype=torch.bool)
    nbytes = num_elements * dtype.itemsize
    data = draw(st.binary(min_size=nbytes, max_size=nbytes))
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A CPU tensor of any common dtype, 0 to 3 dimensions, of at most 64 elements.

    It may be empty, transposed, or a part of a larger storage.
    """
    shape = draw(_SHAPES)
    num_elements = math.prod(shape)
    before, after = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    storage = draw(_storages(before + num_elements + after))
    tensor = storage[before : before + num_elements].view(shape)
    is_transposed = draw(st.booleans())
    return tensor.transpose(0, -1) if shape and is_transposed else tensor


@st.composite
def state_dicts(draw: st.DrawFn, *, max_tensors: int = 6) -> dict[str, object]:
    """A state as programs save it: tensors and scalars in nested containers.

    Tensors may be tied (one object under two keys) and may share a storage.

    Args:
        draw: Hypothesis gives this.
        max_tensors: How many different tensors there are at most.
    """
    pool = draw(st.lists(tensors(), min_size=1, max_size=max_tensors))
    views = [tensor.flatten()[: tensor.numel() // 2] for tensor in pool]
    leaves = st.one_of(st.sampled_from([*pool, *views]), _SCALARS)
    values = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.one_of(_KEYS, st.integers(0, 9)), inner, max_size=3),
        ),
        max_leaves=10,
    )
    return draw(st.dictionaries(_KEYS, values, max_size=5))
