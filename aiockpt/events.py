"""What happens to a save, as facts handed to observers.

The engine never formats a log line: it emits these, and logging is an observer.
"""

__all__ = [
    "CommitReport",
    "Event",
    "Failed",
    "Observer",
    "Planned",
    "Progress",
    "Published",
    "Staged",
    "Synced",
    "Written",
]

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Planned:
    """A file's image is known.

    Attributes:
        tag: The tag that it belongs to.
        path: The file, relative to the tag.
        nbytes: Its exact length.
        num_records: Records in it (tensor storages, and the pickle).
        elapsed_s: Seconds the plan took in its worker.
    """

    tag: str
    path: str
    nbytes: int
    num_records: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Staged:
    """Every tensor of a file has been copied: its sources may change again.

    Attributes:
        tag: The tag that it belongs to.
        path: The file, relative to the tag.
        nbytes: Bytes staged.
        elapsed_s: Seconds from the plan to the last copy.
    """

    tag: str
    path: str
    nbytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Written:
    """Every byte of a file has been handed to the file system (not yet synced).

    Attributes:
        tag: The tag that it belongs to.
        path: The file, relative to the tag.
        nbytes: Bytes written.
        crc32: CRC-32 of the whole file.
        is_direct: Whether it bypassed the page cache (O_DIRECT).
        elapsed_s: Seconds from the plan to the last write.
    """

    tag: str
    path: str
    nbytes: int
    crc32: int
    is_direct: bool
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Synced:
    """All files of a tag are on stable storage; nothing is published yet.

    Attributes:
        tag: The tag.
        num_files: Files synced.
        nbytes: Their bytes.
        elapsed_s: Seconds the syncing took.
    """

    tag: str
    num_files: int
    nbytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What a commit made durable, and what it cost.

    Attributes:
        tag: The published tag.
        nbytes: Bytes of all files.
        num_files: Number of files.
        plan_s: Seconds spent planning, summed over files.
        stage_s: Seconds from the first `save` to the last tensor staged.
        write_s: Seconds from the first `save` to the last byte written.
        sync_s: Seconds spent making files durable.
        publish_s: Seconds for manifest, rename and `latest`.
        total_s: Seconds from the first `save` to the tag being durable.
        stall_s: Seconds the callers of `save`, `staged` and the guard were held.
        peak_ring_bytes: Most ring memory that the engine has had leased at once.
    """

    tag: str
    nbytes: int
    num_files: int
    plan_s: float
    stage_s: float
    write_s: float
    sync_s: float
    publish_s: float
    total_s: float
    stall_s: float
    peak_ring_bytes: int

    @property
    def throughput_bytes_per_s(self) -> float:
        """Durable throughput: bytes over the time from first `save` to commit."""
        return self.nbytes / self.total_s if self.total_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Published:
    """A tag is on stable storage under its name."""

    report: CommitReport


@dataclass(frozen=True, slots=True)
class Failed:
    """Something of a tag failed; the tag cannot be committed.

    Attributes:
        tag: The tag.
        path: The file at fault, or None for the tag as a whole.
        error: What happened; `commit` raises it.
    """

    tag: str
    path: str | None
    error: BaseException


Event = Planned | Staged | Written | Synced | Published | Failed

# Called on the engine's own thread: it must return at once. What it raises is
# logged and does not reach the save.
Observer = Callable[[Event], None]


@dataclass(slots=True)
class Progress:
    """How far one save is, in bytes of its file; every field only grows.

    Attributes:
        planned_bytes: Length of the file; 0 until it has been planned.
        staged_bytes: Of these, what is in the ring or has been.
        written_bytes: Of these, what the file system has been handed.
    """

    planned_bytes: int = 0
    staged_bytes: int = 0
    written_bytes: int = 0
