"""Pickles that run code, are broken or declare lengths that are not there."""

import pickle
import struct

from hostile.case import (
    EITHER,
    REFUSED,
    UNSAFE,
    Case,
    Expected,
    pickle_case,
)
from hostile.pickles import (
    HOOKS,
    call,
    dict_of,
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

# In the working directory of whoever opens the file.
CANARY = "canary"
TOUCH = text(f"touch {CANARY}")
WRITE = text(f"open({CANARY!r}, 'w')")

_NOW = name("posix", "system")
_MANY = 1_000_000


def _runs(label: str, body: bytes, load: Expected = UNSAFE) -> Case:
    """A pickle that would run something; looking at it is always possible."""
    return pickle_case(label, whole(body), load, None)


def _calls() -> list[Case]:
    """Calls of what must not be called, by every opcode that could name it."""
    called = [
        ("os", "system", TOUCH),
        ("posix", "system", TOUCH),
        ("nt", "system", TOUCH),
        ("subprocess", "getoutput", TOUCH),
        ("subprocess", "Popen", list_of(text("touch"), text(CANARY))),
        ("pty", "spawn", list_of(text("touch"), text(CANARY))),
        ("builtins", "eval", WRITE),
        ("builtins", "exec", WRITE),
        ("__builtin__", "eval", WRITE),
        ("__builtin__", "apply", _NOW + tuple_of(TOUCH)),
        ("builtins", "open", text(CANARY) + text("w")),
        ("io", "open", text(CANARY) + text("w")),
        ("os", "mkdir", text(CANARY)),
        ("builtins", "__import__", text("antigravity")),
        ("builtins", "getattr", name("posix", "system") + text("__call__")),
        ("builtins", "map", _NOW + list_of(TOUCH)),
        ("importlib", "import_module", text("antigravity")),
        ("runpy", "run_path", text("/etc/hostname")),
        ("operator", "methodcaller", text("system") + TOUCH),
        ("functools", "partial", _NOW + TOUCH),
        ("timeit", "timeit", WRITE),
        ("cProfile", "run", WRITE),
        ("code", "InteractiveInterpreter", b""),
        ("pickle", "loads", pickle.SHORT_BINSTRING + b"\1."),
        ("types", "FunctionType", _NOW),
        ("shutil", "copy", text("/etc/hostname") + text(CANARY)),
        ("ctypes", "CDLL", text("libc.so.6")),
        ("socket", "create_connection", tuple_of(text("127.0.0.1"), number(9))),
        ("logging.config", "fileConfig", text("/etc/hostname")),
        ("torch", "load", text("/etc/hostname")),
        ("torch", "save", number(1) + text(CANARY)),
        ("torch.hub", "load_state_dict_from_url", text("file:///etc/hostname")),
        ("torch.jit", "load", text("/etc/hostname")),
        ("torch.storage", "_load_from_bytes", TOUCH),
        ("torch.serialization", "load", text("/etc/hostname")),
        ("torch._utils", "_import_dotted_name", text("antigravity")),
        ("torch.utils.collect_env", "run", TOUCH),
        ("numpy", "fromfile", text("/etc/hostname")),
    ]
    cases = [
        _runs(f"{module}.{qualname}", call(name(module, qualname), args))
        for module, qualname, args in called
    ]
    # A dotted name in an allowed module would be looked up attribute by attribute.
    for module, qualname in (
        ("torch._utils", "os.system"),
        ("torch.serialization", "os.system"),
        ("collections", "OrderedDict.__class__"),
        ("os\0", "system"),
        ("", "system"),
    ):
        label = f"by way of {module!r} {qualname!r}"
        cases.append(_runs(label, call(name(module, qualname), TOUCH)))
    return cases


def _opcodes() -> list[Case]:
    stack_global = text("posix") + text("system") + pickle.STACK_GLOBAL
    tagged = call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        _NOW + name("torch", "Tensor") + tuple_of(TOUCH) + pickle.NONE,
    )
    nested = call(name("collections", "OrderedDict"), call(_NOW, TOUCH))
    buried = dict_of((text("w"), tensor()), (text("x"), list_of(call(_NOW, TOUCH))))
    late = tensor(hooks=call(_NOW, TOUCH))
    state = dict_of((text("__class__"), _NOW))
    built = HOOKS + state + pickle.BUILD + tuple_of(TOUCH) + pickle.REDUCE
    call_by_name = text("posix.system") + tuple_of(TOUCH) + pickle.REDUCE
    text_opcodes = pickle.INT + b"1\n" + pickle.FLOAT + b"1\n" + pickle.STRING + b"'\n"
    inst = pickle.MARK + TOUCH + pickle.INST + b"posix\nsystem\n"
    obj = pickle.MARK + _NOW + TOUCH + pickle.OBJ
    return [
        _runs("STACK_GLOBAL", stack_global + tuple_of(TOUCH) + pickle.REDUCE),
        _runs("NEWOBJ", _NOW + tuple_of(TOUCH) + pickle.NEWOBJ),
        _runs("NEWOBJ_EX", _NOW + tuple_of(TOUCH) + b"}" + pickle.NEWOBJ_EX),
        _runs("a call in an allowed call", nested),
        _runs("a call behind a tensor", buried),
        _runs("a call in a tensor's hooks", late),
        _runs("a subclass that is a function", tagged),
        _runs("only named, not called", _NOW),
        pickle_case("INST", whole(inst), REFUSED),
        pickle_case("OBJ", whole(obj), REFUSED),
        pickle_case("EXT1", whole(pickle.EXT1 + b"\1)R"), REFUSED),
        pickle_case("EXT4", whole(pickle.EXT4 + b"\1\0\0\0)R"), REFUSED),
        pickle_case("NEXT_BUFFER", whole(pickle.NEXT_BUFFER), REFUSED),
        pickle_case("a call of a text", whole(call_by_name), REFUSED),
        pickle_case("a call of a result", whole(built), EITHER, None),
        pickle_case("PERSID", whole(pickle.PERSID + b"../../etc/passwd\n"), REFUSED),
        pickle_case("text opcodes of protocol 0", whole(text_opcodes), REFUSED),
        pickle_case("a byte that is no opcode", whole(b"\xff"), REFUSED),
    ]


def _broken() -> list[Case]:
    cut = whole(dict_of((text("w"), tensor())))
    yet_open = b"\x80\x02" + pickle.MARK * 10
    items = pickle.MARK + number(1) + pickle.SETITEMS
    return [
        pickle_case("no bytes", b""),
        pickle_case("only STOP", pickle.STOP),
        pickle_case("cut off", cut[:-5]),
        pickle_case("no STOP", cut[:-1]),
        pickle_case("marks never taken up", yet_open + pickle.STOP),
        pickle_case("no mark to go back to", whole(pickle.APPENDS)),
        pickle_case("a memo never filled", whole(get(7))),
        pickle_case("nothing to put", b"\x80\x02" + put(1) + pickle.STOP),
        pickle_case("a key without a value", whole(b"}" + items)),
        pickle_case(
            "an item for a number", whole(number(1) + number(1) + b"a"), REFUSED
        ),
        pickle_case(
            "a state for a number", whole(number(1) + number(1) + b"b"), REFUSED
        ),
        pickle_case("an unhashable key", whole(dict_of((b"]", number(1))))),
        pickle_case("a name without an end", b"\x80\x02cposix", REFUSED),
        pickle_case("a name that is not UTF-8", whole(pickle.GLOBAL + b"\xff\n\xfe\n")),
        pickle_case(
            "text that is not UTF-8", whole(pickle.BINUNICODE + b"\1\0\0\0\xff")
        ),
        pickle_case(
            "a protocol of the future", b"\x80\xff" + number(1) + b".", None, None
        ),
    ]


def _lengths() -> list[Case]:
    """Lengths that are not there: nothing may be set aside for them."""
    long32, long64 = struct.pack("<I", 0xFFFF_FFFF), struct.pack("<Q", (1 << 63) - 1)
    declared = [
        ("BINUNICODE", pickle.BINUNICODE + long32, REFUSED),
        ("BINUNICODE8", pickle.BINUNICODE8 + long64, REFUSED),
        ("BINBYTES", pickle.BINBYTES + long32, REFUSED),
        ("BINBYTES8", pickle.BINBYTES8 + long64, REFUSED),
        ("BYTEARRAY8", pickle.BYTEARRAY8 + long64, REFUSED),
        ("BINSTRING", pickle.BINSTRING + long32, REFUSED),
        ("FRAME", pickle.FRAME + long64, REFUSED),
        ("LONG4", pickle.LONG4 + struct.pack("<i", (1 << 31) - 1), REFUSED),
        ("LONG4 below zero", pickle.LONG4 + struct.pack("<i", -1), REFUSED),
    ]
    cases = [
        pickle_case(f"{label} of a length that is not there", whole(body), load)
        for label, body, load in declared
    ]
    sparse_memo = pickle.NONE + put(0xFFFF_FFFF)
    digits = pickle.LONG4 + struct.pack("<I", _MANY) + b"\xfe" * _MANY
    short = (pickle.LONG1 + b"\xff" + b"\x7f" * 255) * 1000
    cases += [
        pickle_case("a memo index of 32 bits", whole(sparse_memo), None, None),
        pickle_case("a number of 8 million bits", whole(digits), UNSAFE, None),
        pickle_case("many numbers of 2000 bits", whole(list_of(short)), None, None),
    ]
    return cases


CASES = [*_calls(), *_opcodes(), *_broken(), *_lengths()]
