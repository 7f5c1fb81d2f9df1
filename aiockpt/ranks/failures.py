"""Errors as text on the wire, and back."""

__all__ = ["decision_failure", "lost", "made", "not_there", "objection"]

from collections.abc import Iterable
from itertools import pairwise

from aiockpt.errors import (
    CheckpointError,
    EngineStateError,
    InvalidArgumentError,
    PeerError,
)
from aiockpt.ranks.messages import Failure

# Enough for any message; an error that quotes a tensor's values is cut.
_MAX_TEXT = 8192


def objection(rank: int, phase: str, error: BaseException) -> Failure:
    """What `rank` says of an error of its own, or of one that it was told of."""
    if isinstance(error, PeerError) and error.rank is not None:
        return Failure(str(error)[:_MAX_TEXT], rank=error.rank, phase=error.phase)
    text = f"rank {rank} failed in {phase}: {type(error).__name__}: {error}"
    return Failure(text[:_MAX_TEXT], rank=rank, phase=phase)


def decision_failure(chair: int, error: BaseException) -> Failure:
    """What the chair says of an error of its `decide`."""
    text = str(error)[:_MAX_TEXT]
    if isinstance(error, InvalidArgumentError):
        return Failure(text, "argument")
    if isinstance(error, EngineStateError):
        return Failure(text, "state")
    return objection(chair, "commit", error)


def lost(rank: int, phase: str) -> Failure:
    """What is said of a rank whose connection has ended: it was lost, or closed."""
    told = "was lost" if phase == "lost" else "has closed"
    return Failure(f"rank {rank} {told}", rank=rank, phase=phase)


def not_there(missing: Iterable[int]) -> str:
    """Ranks as text, runs drawn together: "ranks 3, 5-7"."""
    ranks = sorted(missing)
    starts = [ranks[0]] + [b for a, b in pairwise(ranks) if b != a + 1]
    stops = [a for a, b in pairwise(ranks) if b != a + 1] + [ranks[-1]]
    runs = [
        f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True)
    ]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(runs)}"


def made(failure: Failure) -> CheckpointError:
    """A new error that says what the failure says."""
    match failure.kind:
        case "peer":
            return PeerError(failure.text, rank=failure.rank, phase=failure.phase)
        case "argument":
            return InvalidArgumentError(failure.text)
        case "state":
            return EngineStateError(failure.text)
