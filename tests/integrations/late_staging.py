"""Staging at the last possible moment: when somebody waits for it."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from aiockpt.guard import StagingGate
from aiockpt.staging import host
from integrations.processes import LIMIT_S

Method = tuple[type, str]


@contextlib.contextmanager
def late_staging(*waits: Method) -> Iterator[None]:
    """Within the block nothing is copied before somebody waits for it.

    So whatever comes between a save and the next wait comes before its staging, always.

    Args:
        waits: What waits for saves, apart from `StagingGate.wait`.
    """
    may_stage = threading.Event()

    def late(original: Any) -> Any:
        def fill(*args: Any) -> None:
            assert may_stage.wait(LIMIT_S)
            original(*args)

        return fill

    def clearing(original: Any) -> Any:
        def enter(*args: Any) -> None:
            may_stage.clear()
            original(*args)

        return enter

    def setting(original: Any) -> Any:
        @functools.wraps(original)
        def wait(*args: Any, **kwargs: Any) -> Any:
            may_stage.set()
            return original(*args, **kwargs)

        return wait

    with contextlib.ExitStack() as stack:
        stack.callback(may_stage.set)
        # Not where a framework's save begins: that may wait for the one before.
        changes = [(host, "_fill", late), (StagingGate, "enter", clearing)]
        changes += [(*each, setting) for each in [(StagingGate, "wait"), *waits]]
        for owner, name, change in changes:
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, change(original))
        yield
