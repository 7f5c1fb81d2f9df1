"""Pickles of recent saves, used again where a new one would be the same.

Saves of one run differ in the bytes of their tensors, rarely in anything else, and the
pickle holds everything else: keys, values, and for each tensor where it stands in which
storage. Whether all of that is as it was is found out by a digest, in a fraction of
the time that pickling takes. Numbers may be others (a step, a loss, a learning rate):
they are filled in.
"""

# ruff: noqa: SLF001 - a storage's identity has no other name
# pyright: reportPrivateUsage=false

__all__ = ["pickle_like_before"]

import copyreg
import hashlib
import marshal
import operator
import pickle
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final, NamedTuple, Protocol, cast

import torch
from torch import Tensor, TypedStorage, UntypedStorage
from torch.nn import Parameter
from typing_extensions import override

from aiockpt.pickle_templates import Number, PickleTemplate, is_number, number
from aiockpt.pickling import Pickled, Span, is_plain, pickle_state

# Values that are no tensors are looked at as far as that; it takes their hash a
# twentieth of a second. No more is kept, either.
_MAX_BYTES: Final = 64 << 20
# Each takes half a microsecond to be looked at, which is more than pickling it takes.
_MAX_NUMBERS: Final = 100_000
# One for each file of a tag.
_NUM_KEPT: Final = 8
# Of `marshal`, the last one whose output depends on values only.
_MARSHAL_VERSION: Final = 2

# The true pickle has these texts of its own. It refers to the first one that is the same
# object as another, and repeats what is only equal.
_OWN_TEXTS: Final = {text: text for text in ("storage", "cpu", "latin1")}

# Their objects are pickled alike under all protocols, so that the same numbers are met
# in the same order.
_STEADY_TYPES: Final = frozenset(
    {OrderedDict, defaultdict, torch.Size, torch.dtype, torch.device}
)


class _Digest(Protocol):
    def update(self, data: Any, /) -> None: ...
    def digest(self) -> bytes: ...


class _Likeness(NamedTuple):
    """What tells a state's pickle from that of others.

    Attributes:
        digest: The same for states whose pickles are the same but for `numbers`.
        numbers: Numbers in the order in which they are met; some may be in the digest
            instead.
        storages: Those behind the tensors, in the order in which they are met.
        tensors: The tensors, likewise.
        told: What is in the digest of the tensors.
    """

    digest: bytes
    numbers: list[Number]
    storages: list[UntypedStorage]
    tensors: Sequence[Tensor]
    told: list[object]

    def is_lasting(self) -> bool:
        """Whether the tensors are what they were: all else is the capture's own.

        Who trains may give one other memory, or another shape, at any moment.
        """
        storages: list[UntypedStorage] = []
        if not all(map(is_plain, self.tensors)):
            return False
        is_as_told = _told(self.tensors, storages) == self.told
        return is_as_told and _addresses(storages) == _addresses(self.storages)


class _Recent(NamedTuple):
    """A pickle, and which bytes belong to it.

    Attributes:
        template: See `Pickled.data`.
        spans: For each of its spans: the index of the storage, start and length.
    """

    template: PickleTemplate
    spans: "array[int]"

    def over(self, likeness: _Likeness) -> Pickled | None:
        """The same pickle with other numbers, over other storages.

        None where it is not known where to put the numbers.
        """
        data = self.template.filled(likeness.numbers)
        if data is None:
            return None
        storages = map(likeness.storages.__getitem__, self.spans[::3])
        spans = zip(storages, self.spans[1::3], self.spans[2::3], strict=True)
        # What `Span._make` does, without a call in Python for each.
        return Pickled(data, list(map(partial(tuple.__new__, Span), spans)))


# By digest, the latest last. Used by several threads: each step is one of `dict`'s.
_kept: dict[bytes, _Recent] = {}


def pickle_like_before(tree: object) -> Pickled:
    """As `pickle_state`, and its errors; it is called where no recent pickle serves."""
    likeness = _likeness_of(tree)
    if likeness is None:
        return pickle_state(tree)
    recent = _kept.pop(likeness.digest, None)
    pickled = None if recent is None else recent.over(likeness)
    if pickled is None:
        pickled = pickle_state(tree)
        # What was changed meanwhile may stand in the pickle, and not in the digest: this
        # save will be told of that, and no other is to have it.
        if likeness.is_lasting():
            recent = _recent_of(pickled, likeness, recent)
        else:
            recent = None
    if recent is not None:
        _kept[likeness.digest] = recent
        _drop_oldest()
    return pickled


def _drop_oldest() -> None:
    nbytes = 0
    for num_later, (digest, recent) in enumerate(reversed(list(_kept.items()))):
        nbytes += len(recent.template.data)
        if num_later >= _NUM_KEPT or nbytes > _MAX_BYTES:
            _kept.pop(digest, None)


def _recent_of(
    pickled: Pickled, likeness: _Likeness, last: _Recent | None
) -> _Recent | None:
    """None where it refers to storages of tensors that were made for it.

    `last` is of a pickle with other numbers.
    """
    indices = {each._cdata: index for index, each in enumerate(likeness.storages)}
    spans = array("q")
    for storage, start, nbytes in pickled.spans:
        index = indices.get(storage._cdata)
        if index is None:
            return None
        spans.extend((index, start, nbytes))
    if last is None:
        return _Recent(PickleTemplate(pickled.data, likeness.numbers), spans)
    return _Recent(last.template.learnt(pickled.data, likeness.numbers), spans)


def _likeness_of(tree: object) -> _Likeness | None:
    """None where there is something in the state that tells nothing of its pickle."""
    # No secret depends on it, but a save does: two states must not be taken for one.
    digest = hashlib.blake2b(digest_size=32)
    pickler = _LikenessPickler(_Hashing(digest))
    storages: list[UntypedStorage] = []
    try:
        pickler.dump(tree)
        if not all(map(is_plain, pickler.tensors)):
            return None
        told_of_tensors = _told(pickler.tensors, storages)
    except Exception:  # noqa: BLE001 - pickling says what is wrong, if anything is
        return None
    told = [*told_of_tensors, *pickler.are_own]
    numbers = pickler.numbers
    if not pickler.is_steady:
        told += numbers
        numbers = []
    digest.update(marshal.dumps(told, _MARSHAL_VERSION))
    tensors = pickler.tensors
    return _Likeness(digest.digest(), numbers, storages, tensors, told_of_tensors)


def _told(tensors: Sequence[Tensor], storages: list[UntypedStorage]) -> list[object]:
    """All that the pickle holds of plain tensors; `storages` becomes those of them.

    And which storages are the same memory: pickling refuses some of these.

    Column by column: a loop in Python over ten thousands of tensors takes three times
    as long.
    """
    each = list(map(Tensor.untyped_storage, tensors))
    addresses = _addresses(each)
    by_address = dict(zip(addresses, each, strict=True))
    storages += by_address.values()
    dtypes = list(map(_dtype, tensors))
    return [
        *map(_numbered, (addresses, map(UntypedStorage.data_ptr, storages), dtypes)),
        list(map(str, dict.fromkeys(dtypes))),
        list(map(UntypedStorage.nbytes, storages)),
        list(map(Tensor.get_device, tensors)),
        list(map(Tensor.storage_offset, tensors)),
        list(map(_requires_grad, tensors)),
        list(map(Tensor.dim, tensors)),
        # No tuple is kept: so many would set the garbage collector going.
        list(chain.from_iterable(map(_shape, tensors))),
        list(chain.from_iterable(map(Tensor.stride, tensors))),
    ]


def _addresses(storages: Iterable[UntypedStorage]) -> list[int]:
    return list(map(_address, storages))


_address = operator.attrgetter("_cdata")
_dtype = operator.attrgetter("dtype")
_requires_grad = operator.attrgetter("requires_grad")
_shape = operator.attrgetter("shape")


def _numbered(values: Iterable[Hashable]) -> list[int]:
    """Each value as a number: how many other values were met before it."""
    values = list(values)
    first = dict.fromkeys(values)
    if len(first) == len(values):
        return list(range(len(values)))
    numbers = dict(zip(first, range(len(first)), strict=True))
    return list(map(numbers.__getitem__, values))


class _UnlikeError(Exception):
    """Nothing can be said of the state without pickling it."""


class _Hashing:
    """A file that keeps a digest of what is written to it, up to a limit."""

    def __init__(self, digest: _Digest) -> None:
        self._digest = digest
        self._num_left = _MAX_BYTES

    def write(self, data: Any) -> None:
        view = memoryview(data)
        self._num_left -= view.nbytes
        if self._num_left < 0:
            raise _UnlikeError
        self._digest.update(view)

    def take(self, buffer: pickle.PickleBuffer) -> None:
        """Takes the bytes of an array, which pickle would copy."""
        self.write(buffer.raw())


class _LikenessPickler(pickle.Pickler):
    """Writes tensors and numbers as what they are, and notes them.

    A tensor has the number by which it was met first. Of other numbers, only that they
    are there is written.

    Attributes:
        tensors: The plain tensors and parameters, each once.
        numbers: The numbers, each as often as it is met.
        are_own: For each text that is equal to one that pickling adds, whether it is
            that object.
    """

    def __init__(self, file: _Hashing) -> None:
        super().__init__(
            file, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=file.take
        )
        self.tensors: list[Any] = []
        self.numbers: list[Number] = []
        self.are_own: list[bool] = []
        self._indices: dict[int, int] = {}
        self.dispatch_table = self._reducers = _Reducers()

    @property
    def is_steady(self) -> bool:
        """Whether the true pickle has the same numbers in the same order."""
        return self._reducers.kinds <= _STEADY_TYPES

    @override
    def persistent_id(self, obj: Any) -> int | None:
        kind: type = type(obj)
        if kind is str:
            own = _OWN_TEXTS.get(obj)
            if own is not None:
                self.are_own.append(own is obj)
            return None
        if kind is Tensor or kind is Parameter:
            index = self._indices.setdefault(id(obj), len(self.tensors))
            if index == len(self.tensors):
                self.tensors.append(obj)
            return 2 * index + (kind is Parameter)
        if not is_number(obj, kind):
            return None
        if len(self.numbers) == _MAX_NUMBERS:
            raise _UnlikeError
        self.numbers.append(number(obj))
        return -1


class _Reducers(dict[type, Callable[[Any], Any]]):
    """As those of pickling, for what is left; but other storages are refused.

    Attributes:
        kinds: Classes of the objects that were met, and that pickle does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[type] = set()

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        self.kinds.add(kind)
        is_refused = issubclass(kind, Tensor | TypedStorage | UntypedStorage)
        if is_refused or not _is_told_whole(kind):
            raise _UnlikeError
        return copyreg.dispatch_table[kind]


def _is_told_whole(kind: type) -> bool:
    """Whether objects of a class say as much of themselves under any protocol."""
    return (
        kind in _STEADY_TYPES
        or cast("Any", kind).__reduce_ex__ is object.__reduce_ex__
        or kind.__module__ == "numpy"
    )
