"""Pickles whose references and tensors do not fit the file, or anything."""

import pickle

from hostile.case import (
    CORRUPT,
    EITHER,
    INVALID,
    UNSAFE,
    Case,
    pickle_case,
)
from hostile.pickles import (
    HOOKS,
    call,
    list_of,
    name,
    number,
    storage,
    tensor,
    text,
    tuple_of,
    whole,
)


def _references() -> list[Case]:
    kind = name("torch", "FloatStorage")
    shapes = {
        "a number": number(1),
        "a text": text("0"),
        "nothing": pickle.NONE,
        "no parts": pickle.EMPTY_TUPLE,
        "another word": tuple_of(
            text("module"), kind, text("0"), text("cpu"), b"K\x08"
        ),
        "four parts": tuple_of(text("storage"), kind, text("0"), text("cpu")),
        "six parts": tuple_of(
            text("storage"), kind, text("0"), text("cpu"), b"K\x08", pickle.NONE
        ),
        "a key that is a number": tuple_of(
            text("storage"), kind, b"K\0", text("cpu"), b"K\x08"
        ),
        "a length that is text": tuple_of(
            text("storage"), kind, text("0"), text("cpu"), text("8")
        ),
        "a kind that is text": tuple_of(
            text("storage"), text("FloatStorage"), text("0"), text("cpu"), b"K\x08"
        ),
        "a place that is a number": tuple_of(
            text("storage"), kind, text("0"), b"K\0", b"K\x08"
        ),
    }
    refused = {"a text": UNSAFE, "nothing": UNSAFE, "another word": UNSAFE}
    cases = [
        pickle_case(
            f"a reference of {label}",
            whole(tensor(pid + pickle.BINPERSID)),
            refused.get(label, CORRUPT),
        )
        for label, pid in shapes.items()
    ]
    keys = [
        "1",
        "",
        "../version",
        "/etc/hostname",
        "0\0",
        "\ud800",
        "0/../0",
        "00",
        "\u0660",
    ]
    cases += [
        pickle_case(f"a storage {key!r}", whole(tensor(storage(key)))) for key in keys
    ]
    lengths = [0, 7, 9, -1, -8, 1 << 31, 1 << 61, (1 << 63) - 1, 1 << 64]
    cases += [
        pickle_case(
            f"a storage of {numel} elements", whole(tensor(storage(numel=numel)))
        )
        for numel in lengths
    ]
    cases += [
        pickle_case(
            "a storage of another kind", whole(tensor(storage(kind="DoubleStorage")))
        ),
        pickle_case(
            "a storage of a kind there is not",
            whole(tensor(storage(kind="NoStorage"))),
            UNSAFE,
        ),
        pickle_case(
            "a storage twice, with two lengths",
            whole(list_of(tensor(), tensor(storage(numel=4)))),
        ),
    ]
    devices = ["cuda:0", "cuda:-1", "cuda:x", "mps", "hpu", "xpu:0", "xla:0"]
    devices += ["privateuseone", "mtia", "nowhere", "", "cuda:" + "9" * 40, "cpu:7"]
    cases += [
        pickle_case(
            f"a storage on {device!r}",
            whole(tensor(storage(device=device))),
            INVALID,
            None,
        )
        for device in devices
    ]
    return cases


def _tensors() -> list[Case]:
    shapes: list[tuple[str, dict[str, object]]] = [
        ("a shape beyond the storage", {"shape": (9,)}),
        ("a shape of 2**40", {"shape": (1 << 40,)}),
        ("a shape of 2**62", {"shape": (1 << 62,)}),
        ("a stride beyond the storage", {"shape": (2,), "stride": (8,)}),
        ("a stride of 2**62", {"shape": (2,), "stride": (1 << 62,)}),
        ("an offset beyond the storage", {"shape": (1,), "offset": 8}),
        ("an offset of 2**62", {"shape": (1,), "offset": 1 << 62}),
        (
            "strides that overflow",
            {"shape": (3, 3), "stride": (1 << 62, 1 << 62)},
        ),
    ]
    cases = [pickle_case(label, whole(tensor(**given))) for label, given in shapes]
    unspoken: list[tuple[str, dict[str, object]]] = [
        ("a negative shape", {"shape": (-1,)}),
        ("a shape of 2**63", {"shape": (1 << 63,)}),
        ("a shape of 2**64", {"shape": (1 << 64,)}),
        ("a negative stride", {"stride": (-1,)}),
        ("a stride of 2**63", {"stride": (1 << 63,)}),
        ("a negative offset", {"offset": -1}),
        ("an offset of 2**63", {"offset": 1 << 63}),
        ("more strides than dimensions", {"stride": (1, 1)}),
        (
            "2**124 elements of stride 0",
            {"shape": (1 << 62, 1 << 62), "stride": (0, 0)},
        ),
    ]
    cases += [
        pickle_case(label, whole(tensor(**given)), CORRUPT, EITHER)
        for label, given in unspoken
    ]
    short, long = tensor(stride=()), tensor(shape=(1,) * 1000, stride=(1,) * 1000)
    huge = tensor(shape=(1 << 40,), stride=(0,))
    empty = tensor(shape=(0, 1 << 40), stride=(1, 1))
    of_itself = tensor(number(1))
    rebuilt = call(name("torch._utils", "_rebuild_tensor_v2"))
    sparse = call(
        name("torch._utils", "_rebuild_sparse_tensor"), number(1), tuple_of(number(2))
    )
    parameter = call(
        name("torch._utils", "_rebuild_parameter"), number(1), b"\x88", HOOKS
    )
    outgrown = tensor() + tuple_of(
        storage(), number(0), tuple_of(number(1 << 20)), tuple_of(number(1))
    )
    cases += [
        pickle_case("fewer strides than dimensions", whole(short), None, None),
        pickle_case("a thousand dimensions", whole(long), None, None),
        pickle_case("2**40 elements of stride 0", whole(huge), None, None),
        pickle_case("no elements, 2**40 wide", whole(empty), None, None),
        pickle_case("a tensor of a number", whole(of_itself), CORRUPT, None),
        pickle_case("a tensor of nothing", whole(rebuilt), CORRUPT, None),
        pickle_case("a sparse tensor of numbers", whole(sparse), INVALID, None),
        pickle_case("a parameter of a number", whole(parameter), CORRUPT, None),
        pickle_case(
            "a tensor set beyond its storage",
            whole(outgrown + pickle.BUILD),
            CORRUPT,
            EITHER,
        ),
    ]
    return cases


CASES = [*_references(), *_tensors()]
