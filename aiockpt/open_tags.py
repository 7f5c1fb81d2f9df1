"""The tags that an engine has open: from `create` to their end, published or not."""

__all__ = ["OpenTags"]

from collections.abc import Sequence

from aiockpt.agreement import Agreement
from aiockpt.attempt import Attempt, Means
from aiockpt.errors import CheckpointError, EngineStateError
from aiockpt.file_save import FileSave
from aiockpt.manifest import check_tag
from aiockpt.opening import TagOptions, open_place
from aiockpt.threads import outlast


class OpenTags:
    """One attempt for each tag that can be saved into, the newest last.

    `get` and `add_stall` may be called from any thread; everything else belongs to the
    engine's loop.
    """

    def __init__(self, means: Means) -> None:
        """No tag is open.

        Args:
            means: What their attempts work with.
        """
        self._means = means
        self._attempts: dict[str, Attempt] = {}
        self._opening: set[str] = set()
        self._num_commits = 0

    # --- from any thread ------------------------------------------------------

    def get(self, tag: str | None) -> Attempt:
        """The attempt at a tag; by default, at the one that was opened last.

        Raises:
            EngineStateError: It is not open.
        """
        # A copy: the engine's thread may change it meanwhile.
        attempts = self._attempts.copy()
        if tag is None and attempts:
            return attempts[next(reversed(attempts))]
        attempt = attempts.get(tag) if tag is not None else None
        if attempt is None:
            known = ", ".join(map(repr, attempts)) or "none"
            what = "no tag is open" if tag is None else f"tag {tag!r} is not open"
            raise EngineStateError(f"{what} (open: {known}): call `create` first")
        return attempt

    def add_stall(self, tag: str | None, stall_s: float) -> None:
        """Counts time that a caller was held against the tags that it waited for."""
        for attempt in list(self._attempts.values()):
            if tag in (None, attempt.tag):
                attempt.stall_s += stall_s

    # --- opening and ending -----------------------------------------------------

    def __len__(self) -> int:
        """How many are open."""
        return len(self._attempts)

    async def create(self, tag: str, options: TagOptions) -> None:
        """Opens a tag for saving, on all ranks."""
        check_tag(tag)
        before = self._attempts.get(tag)
        if tag in self._opening or (before is not None and not before.is_reported):
            raise EngineStateError(f"tag {tag!r} is open already")
        self._opening.add(tag)
        try:
            # A caller that was told of a failure starts again.
            await self.abort_if_open(tag)
            means = self._means
            parts = means.ranks, means.catalog, means.clerks, tag
            place = await open_place(*parts, options)
            agreement = Agreement(*parts, place, options)
            self._attempts[tag] = Attempt(means, tag, agreement)
        finally:
            self._opening.remove(tag)

    async def commit(self, tag: str) -> Attempt:
        """Publishes a tag; its attempt, which then has a report."""
        attempt = self.get(tag)
        self._num_commits += 1
        await attempt.commit(self._num_commits)
        self._forget(attempt)
        attempt.raise_if_failed()
        return attempt

    async def abort(self, tag: str) -> None:
        """Drops a tag that has not been published, and its files."""
        attempt = self.get(tag)
        try:
            await outlast(attempt.abort())
        finally:
            self._forget(attempt)

    async def abort_if_open(self, tag: str) -> None:
        """As `abort`; nothing happens where a commit that failed has closed the tag."""
        if tag in self._attempts:
            await self.abort(tag)

    async def close(self) -> list[CheckpointError]:
        """Ends those that are open now; what went wrong and no caller was told of."""
        untold: list[CheckpointError] = []
        for attempt in list(self._attempts.values()):
            error = await attempt.close()
            self._forget(attempt)
            if error is not None:
                untold.append(error)
        return untold

    def _forget(self, attempt: Attempt) -> None:
        if self._attempts.get(attempt.tag) is attempt:
            del self._attempts[attempt.tag]

    # --- waiting for files ------------------------------------------------------

    async def staged(self, tag: str | None) -> Sequence[FileSave]:
        """Returns when everything saved so far (in `tag`) has been staged.

        Or is being so by devices: of those files, which it returns, `Runtime.follow`
        must be called on the thread that is to change their tensors.
        """
        attempts = list(self._attempts.values())
        if tag is not None:
            attempts = [self.get(tag)]
        saves = [save for attempt in attempts for save in attempt.saves]
        await _begun(saves)
        for attempt in attempts:
            attempt.raise_if_failed()
        return [save for save in saves if not save.staged.is_set()]

    async def save_staged(self, save: FileSave) -> Sequence[FileSave]:
        """Returns when one file has been staged, or is being so; as `staged`."""
        await _begun([save])
        self._raise_error_of(save)
        return [] if save.staged.is_set() else [save]

    async def fully_staged(self, saves: Sequence[FileSave]) -> None:
        """Returns when no device is at any of the files any more."""
        for save in saves:
            await save.staged.wait()
            self._raise_error_of(save)

    async def save_written(self, save: FileSave) -> None:
        """Returns when one file is complete and durable (not yet published)."""
        await save.written.wait()
        self._raise_error_of(save)

    def _raise_error_of(self, save: FileSave) -> None:
        if save.error is None:
            return
        attempt = self._attempts.get(save.tag)
        if attempt is not None and save in attempt.saves:
            attempt.raise_if_failed()
        raise save.error


async def _begun(saves: Sequence[FileSave]) -> None:
    for save in saves:
        save.hurry()
    for save in saves:
        await save.begun.wait()
