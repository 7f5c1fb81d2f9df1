"""Words to write pickles with, opcode by opcode."""

import pickle
import struct

PROTO = b"\x80\x02"
STOP = pickle.STOP


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(data)]) + data


def name(module: str, qualname: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{qualname}\n".encode()


def put(index: int) -> bytes:
    return pickle.LONG_BINPUT + struct.pack("<I", index)


def get(index: int) -> bytes:
    return pickle.LONG_BINGET + struct.pack("<I", index)


def tuple_of(*parts: bytes) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def list_of(*parts: bytes) -> bytes:
    return pickle.EMPTY_LIST + pickle.MARK + b"".join(parts) + pickle.APPENDS


def dict_of(*pairs: tuple[bytes, bytes]) -> bytes:
    parts = b"".join(key + value for key, value in pairs)
    return pickle.EMPTY_DICT + pickle.MARK + parts + pickle.SETITEMS


def call(function: bytes, *args: bytes) -> bytes:
    return function + tuple_of(*args) + pickle.REDUCE


def whole(body: bytes) -> bytes:
    return PROTO + body + STOP


def storage(
    key: str = "0", numel: int = 8, kind: str = "FloatStorage", device: str = "cpu"
) -> bytes:
    parts = (name("torch", kind), text(key), text(device), number(numel))
    return tuple_of(text("storage"), *parts) + pickle.BINPERSID


HOOKS = name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE


def tensor(
    source: bytes | None = None,
    *,
    shape: tuple[int, ...] = (8,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    hooks: bytes = HOOKS,
) -> bytes:
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        storage() if source is None else source,
        number(offset),
        tuple_of(*map(number, shape)),
        tuple_of(*map(number, stride)),
        pickle.NEWFALSE,
        hooks,
    )


def doubled(levels: int, *, of: bytes, by: bytes, then: bytes | None = None) -> bytes:
    """A list of containers, each of which has the one before it twice.

    So 2**levels ways lead from the last one to the bottom. There is no `POP`, which
    torch's restricted unpickler does not know.

    Args:
        levels: How often.
        of: What stands at the bottom.
        by: `pickle.TUPLE2`, or `pickle.EMPTY_LIST`.
        then: What stands at the end of the list, instead of the last container once
            more; `get(levels)` is that container.
    """
    parts = [of + put(0)]
    for level in range(levels):
        both = get(level) * 2
        made = both + by if by == pickle.TUPLE2 else list_of(both)
        parts.append(made + put(level + 1))
    return list_of(*parts, get(levels) if then is None else then)


GOOD = whole(dict_of((text("w"), tensor())))
