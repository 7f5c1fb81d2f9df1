"""Pickles of few bytes that stand for many objects, many steps or much depth."""

import pickle

from hostile.case import (
    CORRUPT,
    EITHER,
    REFUSED,
    UNSAFE,
    Case,
    pickle_case,
)
from hostile.pickles import (
    HOOKS,
    call,
    dict_of,
    doubled,
    get,
    list_of,
    name,
    number,
    put,
    tensor,
    text,
    tuple_of,
    whole,
)

_MANY = 1_000_000
# Deep enough to exhaust the stack of whatever goes down by calls.
_DEEP = 300_000
_TOUCH = text("touch canary")


def _bombs() -> list[Case]:
    """Few bytes that stand for many objects, many steps or much depth."""
    tuples = pickle.EMPTY_TUPLE + pickle.TUPLE1 * _MANY
    lists = pickle.EMPTY_LIST * (_DEEP) + pickle.APPEND * (_DEEP - 1)
    dicts = b"}" + b"K\1}" * 100_000 + pickle.SETITEM * 100_000
    loop = pickle.EMPTY_LIST + put(0) + get(0) + pickle.APPEND
    key_of_itself = b"}" + put(0) + get(0) + number(1) + pickle.SETITEM
    sets = pickle.EMPTY_SET * 200_000
    return [
        pickle_case("2**100 paths to a tensor", whole(_lists(get(100))), None),
        pickle_case("2**100 equal tuples", whole(_tuples(get(100))), None),
        pickle_case("a million tuples deep", whole(tuples), None),
        pickle_case("300 000 lists deep", whole(lists), None),
        pickle_case("100 000 dictionaries deep", whole(dicts), None),
        pickle_case("a million marks", whole(pickle.MARK * _MANY)),
        pickle_case("200 000 sets", whole(sets), None, None),
        pickle_case("a list in itself", whole(loop), None, None),
        pickle_case("a dictionary as its own key", whole(key_of_itself)),
        pickle_case(
            "a key 300 000 tuples deep",
            whole(dict_of((pickle.EMPTY_TUPLE + pickle.TUPLE1 * _DEEP, b"N"))),
        ),
        *_hashed(),
        *_grown(),
        *_walked(),
    ]


def _tuples(then: bytes) -> bytes:
    return doubled(100, of=number(1), by=pickle.TUPLE2, then=then)


def _lists(then: bytes) -> bytes:
    return doubled(100, of=tensor(), by=pickle.EMPTY_LIST, then=then)


def _hashed() -> list[Case]:
    """What would be hashed, or written out for a message, part by part."""
    dense = get(100)
    in_dict = dict_of((dense, number(1)))
    in_ordered = HOOKS + dense + number(1) + pickle.SETITEM
    deep = pickle.EMPTY_TUPLE + pickle.TUPLE1 * _DEEP
    in_ordered_deep = HOOKS + deep + number(1) + pickle.SETITEM
    in_set = call(name("builtins", "set"), list_of(dense))
    in_counter = call(name("collections", "Counter"), list_of(dense))
    called, made = call(dense, _TOUCH), dense + tuple_of(_TOUCH) + pickle.NEWOBJ
    return [
        pickle_case("a key of 2**100 parts", whole(_tuples(in_dict))),
        pickle_case("an OrderedDict's key of 2**100 parts", whole(_tuples(in_ordered))),
        pickle_case("an OrderedDict's key 300 000 deep", whole(in_ordered_deep)),
        pickle_case(
            "a set's member of 2**100 parts", whole(_tuples(in_set)), CORRUPT, EITHER
        ),
        pickle_case(
            "a Counter's key of 2**100 parts",
            whole(_tuples(in_counter)),
            CORRUPT,
            EITHER,
        ),
        pickle_case("a call of 2**100 tuples", whole(_tuples(called)), REFUSED),
        pickle_case("a call of 2**100 lists", whole(_lists(called)), REFUSED),
        pickle_case("an object of 2**100 tuples", whole(_tuples(made)), REFUSED),
    ]


def _grown() -> list[Case]:
    """Allowed calls that make much of little."""
    grown, encode = name("builtins", "bytearray"), name("_codecs", "encode")
    hexed = call(encode, text("x" * 1024), text("utf-8"))
    for _ in range(40):
        hexed = call(encode, hexed, text("hex_codec"))
    size = call(name("torch", "Tensor"), number(1 << 40))
    return [
        pickle_case(
            "bytearray of 2**62", whole(call(grown, number(1 << 62))), CORRUPT, None
        ),
        pickle_case(
            "bytearray of 2**32", whole(call(grown, number(1 << 32))), CORRUPT, None
        ),
        pickle_case("40 times hexadecimal", whole(hexed), CORRUPT, None),
        pickle_case("a Tensor of 2**40", whole(size), CORRUPT, None),
    ]


def _walked() -> list[Case]:
    """Structures with many more paths, or longer ones, than the file has bytes."""
    wide = text("k" * _MANY) + put(0), tensor() + put(1)
    long_paths = dict_of((get(0), list_of(get(1) * 100_000)))
    long_key = dict_of((tuple_of(get(0) * 900), get(1)))
    unseen = call(name("collections", "Unseen"), list_of(pickle.NONE * 20_000))
    many = list_of(pickle.NONE * 20_000) + put(0)
    hooked = tensor(hooks=many) + put(1)
    inner = list_of(get(0) * 999) + put(1)
    outer = list_of(get(1) * 999)
    return [
        pickle_case(
            "a million bytes in 100 000 paths", whole(list_of(*wide, long_paths)), None
        ),
        pickle_case(
            "a key of 900 times a million bytes",
            whole(list_of(*wide, long_key)),
            EITHER,
        ),
        pickle_case(
            "an object of 20 000 parts 200 000 times",
            whole(list_of(unseen + put(0), get(0) * 200_000)),
            UNSAFE,
        ),
        pickle_case(
            "hooks of 20 000 parts 100 000 times",
            whole(list_of(hooked, get(1) * 100_000)),
            None,
            EITHER,
        ),
        pickle_case(
            "a million paths in ten kilobytes",
            whole(list_of(tensor() + put(0), inner, outer)),
            None,
        ),
    ]


CASES = _bombs()
