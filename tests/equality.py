"""Are two states the same, in everything that a round trip has to keep?"""

import collections
import enum
import functools
import itertools
import types

import numpy as np
import torch

_IMMUTABLE = (
    type(None), type(...), bool, int, float, complex, str, bytes, range, slice,
    type, types.FunctionType, types.BuiltinFunctionType, enum.Enum,
    torch.dtype, torch.device, np.generic, np.dtype,
)  # fmt: skip
# torch resets these on load, or makes them anew.
_NOT_KEPT = frozenset({"_backward_hooks", "_post_accumulate_grad_hooks"})


def assert_same_state(actual: object, expected: object) -> None:
    """Same values, classes, order, tensor geometry, and the same aliasing.

    Aliasing is that of objects (what is one object in one state is one in the other)
    and that of memory (tensors overlap in one as they do in the other).
    """
    comparison = _Comparison()
    comparison.compare(actual, expected, "state")
    overlaps = _overlaps(comparison.strided)
    assert overlaps == _overlaps(comparison.strided_expected)


class _Comparison:
    def __init__(self) -> None:
        self.strided: list[torch.Tensor] = []
        self.strided_expected: list[torch.Tensor] = []
        self._counterparts: dict[int, object] = {}
        self._alive: list[object] = []

    def compare(self, actual: object, expected: object, path: str) -> None:
        assert type(actual) is type(expected), path
        if isinstance(expected, _IMMUTABLE):
            assert actual == expected, path
            return
        if id(expected) in self._counterparts:
            assert self._counterparts[id(expected)] is actual, f"{path}: aliasing"
            return
        if type(actual) not in (tuple, frozenset) or actual:  # the empty exist once
            known = {id(value) for value in self._counterparts.values()}
            assert id(actual) not in known, f"{path}: aliasing"
            self._counterparts[id(expected)] = actual
            self._alive.append(expected)
        self._compare_kind(actual, expected, path)

    def _compare_kind(self, actual: object, expected: object, path: str) -> None:
        match expected:
            case torch.Tensor():
                self._compare_tensors(actual, expected, path)
            case dict() | list() | tuple() | collections.deque():
                self._compare_containers(actual, expected, path)
            case np.ndarray():
                assert actual.dtype == expected.dtype, path
                assert actual.flags.fnc == expected.flags.fnc, path  # Fortran's order
                self.compare(actual.tolist(), expected.tolist(), path)
            case torch.TypedStorage() | torch.UntypedStorage():
                actual, expected = (
                    getattr(storage, "_untyped_storage", storage)
                    for storage in (actual, expected)
                )
                assert bytes(actual) == bytes(expected), path
                return
            case torch.Generator():
                assert torch.equal(actual.get_state(), expected.get_state()), path
            case types.MethodType():
                self.compare(actual.__self__, expected.__self__, f"{path}.__self__")
            case functools.partial():
                for name in ("func", "args", "keywords"):
                    one, other = getattr(actual, name), getattr(expected, name)
                    self.compare(one, other, f"{path}.{name}")
            case _ if not hasattr(expected, "__dict__") and not _slots(expected):
                assert actual == expected, path
        self._compare_attributes(actual, expected, path)

    def _compare_containers(self, actual, expected, path: str) -> None:
        if isinstance(expected, dict):
            self._compare_items(list(actual), list(expected), path)
            for key, value in zip(actual.values(), expected.items(), strict=True):
                self.compare(key, value[1], f"{path}[{value[0]!r}]")
        else:
            self._compare_items(list(actual), list(expected), path)
        for name in ("maxlen", "default_factory"):
            assert getattr(actual, name, None) == getattr(expected, name, None), path

    def _compare_items(self, actual: list, expected: list, path: str) -> None:
        assert len(actual) == len(expected), path
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            self.compare(one, other, f"{path}[{index}]")

    def _compare_attributes(self, actual: object, expected: object, path: str) -> None:
        for name in _slots(expected):
            one, other = getattr(actual, name), getattr(expected, name)
            self.compare(one, other, f"{path}.{name}")
        if isinstance(expected, torch.Tensor) and _wrapped(expected):
            return
        attributes = getattr(expected, "__dict__", {})
        assert getattr(actual, "__dict__", {}).keys() == attributes.keys(), path
        for name, value in attributes.items():
            if name not in _NOT_KEPT:
                self.compare(getattr(actual, name), value, f"{path}.{name}")

    def _compare_tensors(
        self, actual: torch.Tensor, expected: torch.Tensor, path: str
    ) -> None:
        for name in ("dtype", "layout", "device", "requires_grad", "is_quantized"):
            assert getattr(actual, name) == getattr(expected, name), f"{path} {name}"
        if isinstance(expected, torch.nn.parameter.UninitializedTensorMixin):
            return
        if parts := _wrapped(expected):
            for name, part in parts.items():
                self.compare(getattr(actual, name), part, f"{path}.{name}")
            return
        if expected.is_nested:
            self._compare_items(list(actual.unbind()), list(expected.unbind()), path)
            return
        assert actual.shape == expected.shape, path
        if expected.layout is not torch.strided:
            _compare_sparse(actual.detach(), expected.detach(), path)
            return
        assert actual.stride() == expected.stride(), path
        assert actual.is_conj() == expected.is_conj(), path
        assert actual.is_neg() == expected.is_neg(), path
        if expected.is_quantized:
            assert torch.equal(actual.dequantize(), expected.dequantize()), path
            assert str(actual) == str(expected), path  # with the parameters
        elif not expected.is_meta:
            assert _bytes(actual) == _bytes(expected), path
            self.strided.append(actual.detach())
            self.strided_expected.append(expected.detach())


def _compare_sparse(actual: torch.Tensor, expected: torch.Tensor, path: str) -> None:
    if expected.layout is torch.sparse_coo:
        assert actual.is_coalesced() == expected.is_coalesced(), path
        assert torch.equal(actual._indices(), expected._indices()), path
        assert torch.equal(actual._values(), expected._values()), path
    else:
        assert torch.equal(actual.values(), expected.values()), path
        assert torch.equal(actual.to_dense(), expected.to_dense()), path


def _slots(obj: object) -> tuple[str, ...]:
    return tuple(vars(type(obj)).get("__slots__", ()))


def _wrapped(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return {}
    names, _ = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    return {k: part for k, part in parts.items() if isinstance(part, torch.Tensor)}


def _bytes(tensor: torch.Tensor) -> list[bytes]:
    """The bytes of every element, in order, whatever the dtype."""
    itemsize = tensor.dtype.itemsize
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
    data = raw.numpy().tobytes()
    spans = (range(length) for length in tensor.shape)
    starts = (
        tensor.storage_offset()
        + sum(i * step for i, step in zip(index, tensor.stride(), strict=True))
        for index in itertools.product(*spans)
    )
    return [data[at * itemsize : (at + 1) * itemsize] for at in starts]


def _overlaps(tensors: list[torch.Tensor]) -> list[tuple[int, int, int]]:
    """Pairs of tensors whose memory overlaps, and how far apart they start."""
    spans = []
    for number, tensor in enumerate(tensors):
        if tensor.numel():
            pairs = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((length - 1) * step for length, step in pairs)
            start = tensor.untyped_storage().data_ptr()
            start += tensor.storage_offset() * tensor.dtype.itemsize
            spans.append((number, start, start + (last + 1) * tensor.dtype.itemsize))
    return [
        (one[0], other[0], other[1] - one[1])
        for one, other in itertools.combinations(spans, 2)
        if one[1] < other[2] and other[1] < one[2]
    ]
