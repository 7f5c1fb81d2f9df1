"""What members and the hub say to each other, and how it looks on the wire.

A frame is four bytes of length, big-endian, and that many bytes of MessagePack: one of
the records below, told apart by its tag.
"""

__all__ = [
    "MAX_FRAME_BYTES",
    "MAX_GREETING_BYTES",
    "MAX_WORD_BYTES",
    "Decision",
    "Failed",
    "Failure",
    "Farewell",
    "FromHub",
    "FromMember",
    "Goodbye",
    "Hello",
    "Join",
    "Objection",
    "Verdict",
    "Veto",
    "Welcome",
    "Withdrawal",
    "Withdrawn",
    "Word",
    "Words",
    "framed",
]

from typing import Literal, TypeAlias

import msgspec

_LENGTH_BYTES = 4

# Before the greeting the other end can be anybody.
MAX_GREETING_BYTES = 1024
# A word lists the files of a rank, a verdict those of all ranks.
MAX_WORD_BYTES = 64 << 20
# The words of all ranks, on their way to a chair that is not in the hub's process.
MAX_FRAME_BYTES = 1 << 30

_encoder = msgspec.msgpack.Encoder()


class _Message(msgspec.Struct, forbid_unknown_fields=True, gc=False, tag=True):
    """A record of one frame."""


class Failure(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """Why there is no verdict.

    Attributes:
        text: The error's message.
        kind: The error's class: `PeerError`, or what `decide` or `close` made of it.
        rank: The first rank known to have failed.
        phase: What it was doing.
    """

    text: str
    kind: Literal["peer", "argument", "state"] = "peer"
    rank: int | None = None
    phase: str | None = None


class Hello(_Message):
    """A member's first frame; the token says that it belongs to the job."""

    token: str
    rank: int
    world_size: int


class Welcome(_Message):
    """The hub's answer to `Hello`."""


class Join(_Message):
    """From here on the connection is the member: its end is the member's loss."""


class Word(_Message):
    """A call of `consult`. Calls are numbered by the member, upwards."""

    call: int
    topic: str
    word: bytes
    group: tuple[int, ...] | None


class Objection(_Message):
    """A call of `object` that stands for a call of `consult`."""

    call: int
    topic: str
    failure: Failure
    group: tuple[int, ...] | None
    scope: str = ""


class Veto(_Message):
    """A call of `object` while the member's own `call` of `consult` waits."""

    call: int
    failure: Failure
    scope: str = ""


class Withdrawal(_Message):
    """The call was cancelled; answered by `Withdrawn`, or by what it came to."""

    call: int


class Decision(_Message):
    """What the chair's `decide` came to: one of the two."""

    call: int
    verdict: bytes | None = None
    failure: Failure | None = None


class Insistence(_Message):
    """The chair cannot take its verdict back from here on: no deadline ends the call."""

    call: int


class Goodbye(_Message):
    """The member leaves; the hub then closes the connection."""


class Words(_Message):
    """To the chair: the words of all, in the order of the group."""

    call: int
    words: list[bytes]


class Verdict(_Message):
    """The outcome of a call."""

    call: int
    verdict: bytes


class Failed(_Message):
    """The outcome of a call; `is_own` where it was this rank that made it fail."""

    call: int
    failure: Failure
    is_own: bool = False


class Withdrawn(_Message):
    """The call is as if it had not been made."""

    call: int


class Farewell(_Message):
    """The hub closes; the member then closes the connection."""


FromMember: TypeAlias = (
    Hello
    | Join
    | Word
    | Objection
    | Veto
    | Withdrawal
    | Insistence
    | Decision
    | Goodbye
)
FromHub: TypeAlias = Welcome | Words | Verdict | Failed | Withdrawn | Farewell


def framed(message: FromMember | FromHub) -> bytes:
    """The message as a frame."""
    frame = bytearray(_LENGTH_BYTES)
    _encoder.encode_into(message, frame, _LENGTH_BYTES)
    frame[:_LENGTH_BYTES] = (len(frame) - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES)
    return bytes(frame)
