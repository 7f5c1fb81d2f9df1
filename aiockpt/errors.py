"""What can go wrong, grouped by what the caller would do about it.

    CheckpointError
    ├── InvalidArgumentError (ValueError)      fix the call
    ├── EngineStateError                       call in another order, or on another engine
    ├── CheckpointNotFoundError (LookupError)  ask for something that exists
    ├── CorruptCheckpointError                 load another tag
    ├── UnsafePickleError                      allow the class it names, or trust the file
    ├── TornSnapshotError                      wait for `staged` before changing tensors
    ├── StorageError (OSError)                 free or repair the disk, then save again
    ├── StagingError                           repair the device, then save again
    ├── DeadlineError (TimeoutError)           load the tag before, or give more time
    └── PeerError                              look at the rank that it names

Every class is picklable, so that it crosses process boundaries whole.
"""

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "DeadlineError",
    "EngineStateError",
    "InvalidArgumentError",
    "PeerError",
    "StagingError",
    "StorageError",
    "TornSnapshotError",
    "UnsafePickleError",
]


class CheckpointError(Exception):
    """Root of everything that aiockpt raises on purpose."""


class InvalidArgumentError(CheckpointError, ValueError):
    """The call cannot be carried out as written; nothing was changed."""


class EngineStateError(CheckpointError):
    """The engine or the tag is not in a state that allows the call."""


class CheckpointNotFoundError(CheckpointError, LookupError):
    """The tag or the file does not exist; the message lists what does."""


class CorruptCheckpointError(CheckpointError):
    """Bytes on storage are not the bytes that were written.

    Attributes:
        path: The file at fault.
        key: Key path of the tensor at fault (`optimizer.state.0.exp_avg`), where it
            is known.
        offset: Byte offset in the file of the first wrong region, where known.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        key: str | None = None,
        offset: int | None = None,
    ) -> None:
        """Keep the place of the fault beside the message."""
        super().__init__(message)
        self.path = path
        self.key = key
        self.offset = offset


class UnsafePickleError(CheckpointError):
    """The file needs a class or function that `weights_only=True` does not allow.

    Attributes:
        name: Dotted name of the first one refused, where known.
    """

    def __init__(self, message: str, *, name: str | None = None) -> None:
        """Keep the name beside the message."""
        super().__init__(message)
        self.name = name


class TornSnapshotError(CheckpointError):
    """A tensor changed between `save` and `staged`: its copy may mix two steps.

    Attributes:
        key: Key path of the first tensor found changed, as `keys` of a load has it
            (`optimizer.state.0.exp_avg`); `state` if the state is that tensor.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        """Keep the key beside the message."""
        super().__init__(message)
        self.key = key


class StorageError(CheckpointError, OSError):
    """The file system refused an operation; `errno` and `filename` say which.

    Built as `StorageError(errno, message, filename)`, like any `OSError`.
    """


class StagingError(CheckpointError):
    """A tensor's bytes could not be copied to host memory."""


class DeadlineError(CheckpointError, TimeoutError):
    """A tag could not be published in time; nothing of it is left.

    Attributes:
        phase: What was being done when the time was over: `"create"`, `"plan"`,
            `"stage"`, `"write"`, or `"publish"`, with all files written.
        missing_bytes: Bytes that had not been written then.
    """

    def __init__(
        self, message: str, *, phase: str | None = None, missing_bytes: int = 0
    ) -> None:
        """Keep what was missing beside the message."""
        super().__init__(message)
        self.phase = phase
        self.missing_bytes = missing_bytes


class PeerError(CheckpointError):
    """Another rank failed, so nothing was published on any rank.

    Attributes:
        rank: The first rank known to have failed.
        phase: What that rank was doing (`"stage"`, `"write"`, `"commit"`, ...).
    """

    def __init__(
        self, message: str, *, rank: int | None = None, phase: str | None = None
    ) -> None:
        """Keep the peer and what it was doing beside the message."""
        super().__init__(message)
        self.rank = rank
        self.phase = phase
