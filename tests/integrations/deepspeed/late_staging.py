"""Staging at the last possible moment: when an update is about to happen."""

import contextlib
import threading

from aiockpt.guard import StagingGate
from aiockpt.integrations.deepspeed.lazy import LazyCheckpointEngine
from aiockpt.integrations.deepspeed.roots import Roots
from aiockpt.staging import host


@contextlib.contextmanager
def late_staging():
    """Within the block nothing is copied before somebody waits for it.

    So forward and backward passes come between a save and its staging, always.
    """
    may_stage = threading.Event()
    fill, save = host._fill, LazyCheckpointEngine.save
    wait, run = StagingGate.wait, Roots.run

    def late_fill(*args):
        may_stage.wait()
        fill(*args)

    def holding_save(self, *args, **kwargs):
        may_stage.clear()
        save(self, *args, **kwargs)

    def releasing(method):
        def release(*args):
            may_stage.set()
            return method(*args)

        return release

    host._fill, LazyCheckpointEngine.save = late_fill, holding_save
    StagingGate.wait, Roots.run = releasing(wait), releasing(run)
    try:
        yield
    finally:
        host._fill, LazyCheckpointEngine.save = fill, save
        StagingGate.wait, Roots.run = wait, run
        may_stage.set()
