"""A tag that is published by a deadline, or of which nothing is left."""

__all__ = ["TimedSave"]

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import torch

from aiockpt.errors import DeadlineError, InvalidArgumentError
from aiockpt.events import CommitReport
from aiockpt.file_save import FileSave
from aiockpt.threads import outlast


class TimedSave:
    """The files of one tag, and the time until which they may be saved.

    Made on any thread, when the clock starts; `run` belongs to the engine's loop.

    Attributes:
        tag: The tag.
        saves: Its files, captured; those who make this put them here.
    """

    def __init__(self, tag: str, deadline_s: Any) -> None:
        """Starts the clock.

        Raises:
            InvalidArgumentError: `deadline_s` is no positive number of seconds.
        """
        is_number = isinstance(deadline_s, int | float) and not math.isnan(deadline_s)
        if isinstance(deadline_s, bool) or not is_number or deadline_s <= 0:
            message = f"a deadline is so many seconds from now, not {deadline_s!r}"
            raise InvalidArgumentError(message)
        self.tag = tag
        self.saves: list[FileSave] = []
        self._deadline_s = deadline_s
        # The clock of asyncio's loops.
        self._end_s = time.monotonic() + deadline_s
        self._is_created = False
        self._is_added = False

    async def run(
        self,
        create: Callable[[], Awaitable[None]],
        add: Callable[[FileSave], None],
        commit: Callable[[], Awaitable[CommitReport]],
        abort: Callable[[], Awaitable[None]],
    ) -> CommitReport:
        """Does these one after the other; the last where the others do not get through.

        Raises:
            DeadlineError: The time was over before publishing began.
            CheckpointError: What failed; nothing of the tag is left either.

        If cancelled: it is undone, or, where that is too late, finished first.
        """
        limit = asyncio.timeout_at(self._end_s)
        try:
            async with limit:
                await create()
                self._is_created = True
                if limit.expired():
                    # A tag that is being opened is opened first, and drops this.
                    raise TimeoutError  # noqa: TRY301 - undone as any other
                for save in self.saves:
                    add(save)
                self._is_added = True
                return await commit()
        except BaseException as error:
            is_late = limit.expired() and isinstance(error, TimeoutError)
            # What was missing when the time was over, not when all was undone.
            missed = self._missed() if is_late else None
            if self._is_created:
                await outlast(abort())
            if missed is not None:
                raise missed from error  # noqa: ASYNC104 - a timeout is no cancellation
            raise

    def _missed(self) -> DeadlineError:
        phase, missing_bytes = self._phase(), sum(map(_missing_bytes, self.saves))
        message = (
            f"tag {self.tag!r} was not published within {self._deadline_s} s: it was in "
            f"the phase {phase!r}, with {missing_bytes} bytes still to be written; "
            "nothing of it is left, and the tags before it are as they were"
        )
        return DeadlineError(message, phase=phase, missing_bytes=missing_bytes)

    def _phase(self) -> str:
        """The earliest phase that a file is in."""
        if not self._is_added:
            return "create"
        if not all(save.progress.planned_bytes for save in self.saves):
            return "plan"
        if not all(save.staged.is_set() for save in self.saves):
            return "stage"
        return "write" if any(save.entry is None for save in self.saves) else "publish"


def _missing_bytes(save: FileSave) -> int:
    planned = save.progress.planned_bytes
    if not planned and save.capture is not None:
        planned = sum(map(_nbytes, save.capture.tensors))
    return planned - save.progress.written_bytes


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes if tensor.layout is torch.strided else 0
