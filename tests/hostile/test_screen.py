"""The screen stops what torch's restricted unpickler would choke on, and no more."""

import io
import pickle
import zipfile

import pytest
import torch

from aiockpt.errors import CorruptCheckpointError
from aiockpt.outline import leaves, outline, screen
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
from states import ALL_STATES, UNSAFE_STATES

DENSE = get(100)
DEEP = pickle.EMPTY_TUPLE + pickle.TUPLE1 * 200_000
ENCODE, BYTEARRAY = name("_codecs", "encode"), name("builtins", "bytearray")
LONG = text("x" * 100_000) + put(1)


def dense(then: bytes) -> bytes:
    return doubled(100, of=number(1), by=pickle.TUPLE2, then=then)


def saved_pickle(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


@pytest.mark.parametrize("state", sorted(ALL_STATES.keys() - UNSAFE_STATES))
@pytest.mark.filterwarnings("ignore")  # what torch says when it makes some of them
def test_every_safe_state_passes(state):
    screen(saved_pickle(ALL_STATES[state]()))


def test_values_of_every_size_pass():
    shared = ("lr", 0.1)
    screen(
        saved_pickle(
            {
                "bytes": b"\xff" * 100_000,
                "array": bytearray(100_000),
                "set": set(range(100_000)),
                "keys": {(index, "name"): shared for index in range(10_000)},
            }
        )
    )


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(dense(dict_of((DENSE, b"N"))), id="key of many parts"),
        pytest.param(
            dense(HOOKS + DENSE + b"N" + pickle.SETITEM), id="OrderedDict's key"
        ),
        pytest.param(
            dense(
                call(name("collections", "OrderedDict"), list_of(tuple_of(DENSE, b"N")))
            ),
            id="OrderedDict's pair",
        ),
        pytest.param(
            dense(call(name("builtins", "set"), list_of(DENSE))), id="set's member"
        ),
        pytest.param(
            dense(call(name("collections", "Counter"), list_of(DENSE))), id="counted"
        ),
        pytest.param(dict_of((DEEP, b"N")), id="deep key"),
        pytest.param(dense(call(DENSE)), id="call of many parts"),
        pytest.param(
            dense(DENSE + pickle.EMPTY_TUPLE + pickle.NEWOBJ), id="class of many parts"
        ),
        pytest.param(call(BYTEARRAY, number(1 << 40)), id="a number of zeros"),
        pytest.param(call(ENCODE, text("x"), text("hex")), id="another encoding"),
        pytest.param(
            call(ENCODE, call(ENCODE, text("x"), text("latin1")), text("latin1")),
            id="an encoding of an encoding",
        ),
        pytest.param(call(ENCODE, text("x")), id="an encoding not named"),
        pytest.param(call(name("torch", "Tensor"), number(1 << 40)), id="Tensor"),
        pytest.param(
            call(name("torch.sparse", "FloatTensor"), number(1 << 40)), id="sparse"
        ),
        pytest.param(
            list_of(LONG, call(BYTEARRAY, get(1), text("latin1")) * 100),
            id="one text copied many times",
        ),
        pytest.param(pickle.INST + b"posix\nsystem\n", id="an opcode nobody needs"),
    ],
)
def test_a_pickle_that_swells_is_stopped(body):
    with pytest.raises(CorruptCheckpointError):
        screen(whole(body))


def test_names_are_left_to_the_restricted_unpickler():
    screen(whole(call(name("posix", "system"), text("touch canary"))))


# --- the walk over what a pickle describes ----------------------------------------


def walked(body: bytes) -> int:
    return sum(1 for _ in leaves(outline(whole(body))))


def test_what_is_shared_a_few_times_is_walked_each_time():
    inner = list_of(tensor() * 20_000) + put(0)
    assert walked(list_of(inner, get(0) * 2)) == 60_000


def test_a_long_key_over_few_tensors_is_walked():
    assert walked(dict_of((text("k" * 10_000), list_of(tensor() * 300)))) == 300


def test_objects_of_many_parts_are_walked():
    parts = list_of(number(1000) * 500_000)
    assert walked(list_of(call(name("collections", "Unseen"), parts))) == 1


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            list_of(list_of(number(1) * 1000) + put(0), list_of(get(0) * 1000)),
            id="a thousand times a thousand",
        ),
        pytest.param(
            dict_of((text("k" * 100_000), list_of(number(1) * 1000))), id="long paths"
        ),
        pytest.param(
            list_of(
                call(name("collections", "Unseen"), list_of(pickle.NONE * 20_000))
                + put(0),
                get(0) * 20_000,
            ),
            id="an object of many parts",
        ),
        pytest.param(
            doubled(100, of=number(1), by=pickle.EMPTY_LIST), id="endless paths"
        ),
    ],
)
def test_more_paths_than_the_pickle_pays_for_are_refused(body):
    with pytest.raises(CorruptCheckpointError, match="beyond all measure"):
        walked(body)
