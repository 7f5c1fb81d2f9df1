"""One file being saved, as those see it who wait for it."""

__all__ = ["FileSave"]

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from aiockpt.capture import Capture
from aiockpt.capturing.marks import storage_ptrs
from aiockpt.errors import CheckpointError
from aiockpt.events import Progress
from aiockpt.manifest import FileEntry
from aiockpt.staging.device import DeviceStager


@dataclass(slots=True, eq=False)
class FileSave:
    """One file being saved: its state, and what callers may wait for.

    Attributes:
        tag: The tag that it belongs to.
        path: The file, relative to the tag.
        capture: The captured state; None once staged, so that nothing is kept alive.
        metadata: Extra text for a container that holds some.
        replicas: The ranks that save it together; empty where this one saves alone.
        progress: Bytes planned, staged and written.
        started_s: Clock reading when `save` was called.
        stager: What stages it, where some of it is on devices.
        begun: Set when every copy has been begun, or never will be: the caller may go
            on once it has called `follow`.
        staged: Set when every source has been copied, or never will be.
        written: Set when the file is complete and durable, or never will be.
        error: Why it failed, if it did.
        entry: What the manifest will say of it, once written.
        stepped_key: Key path of a source that an optimizer step came too early for.
        is_begun: Whether all copies have been begun, by devices that are at them.
        is_followed: Whether the caller's further work waits for them on the devices:
            what changes from then on, changes behind the copies.
        stall_s: Seconds that callers have been held for it.
        plan_s: Seconds of planning.
        sync_s: Seconds of syncing.
        planned_s: Clock reading when it was planned.
        staged_s: Clock reading when it was staged.
        written_s: Clock reading when its last byte was written.
    """

    tag: str
    path: str
    capture: Capture | None
    metadata: Mapping[str, str] | None = None
    replicas: Sequence[int] = ()
    progress: Progress = field(default_factory=Progress)
    started_s: float = field(default_factory=perf_counter)
    stager: DeviceStager | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    staged: asyncio.Event = field(default_factory=asyncio.Event)
    written: asyncio.Event = field(default_factory=asyncio.Event)
    error: CheckpointError | None = None
    entry: FileEntry | None = None
    stepped_key: str | None = None
    is_begun: bool = False
    is_followed: bool = False
    stall_s: float = 0.0
    plan_s: float = 0.0
    sync_s: float = 0.0
    planned_s: float = 0.0
    staged_s: float = 0.0
    written_s: float = 0.0

    def note_step(self, touched: set[int]) -> None:
        """An optimizer is about to change the storages at these data pointers."""
        capture = self.capture
        if self.is_followed or capture is None:
            return
        if touched & capture.storage_ptrs():
            self.stepped_key = _key_at(capture, touched)

    def hurry(self) -> None:
        """Somebody waits for `begun`. From any thread."""
        if self.stager is not None:
            self.stager.hurry()

    def follow(self) -> bool:
        """See `StagingGate`: further work of the calling thread waits on devices."""
        capture, stager = self.capture, self.stager
        if not self.is_begun or stager is None or capture is None:
            return False  # It has been staged, or will not be.
        if not self.is_followed:
            # What changes later is no fault any more; what has changed is one.
            self.stepped_key = self.stepped_key or capture.changed()
        if not stager.follow():
            return False
        self.is_followed = True
        return True

    def note_changes(self) -> None:
        """Looks whether a source was changed that should not have been."""
        assert self.capture is not None
        changed = self.capture.changed()
        # Asked second: who sets it does so before changing anything.
        if not self.is_followed:
            self.stepped_key = self.stepped_key or changed


def _key_at(capture: Capture, pointers: set[int]) -> str:
    for tensor in capture.tensors:
        if pointers & storage_ptrs([tensor]):
            return capture.key_of(tensor)
    return "a storage of state"
