"""Staging at the last possible moment: when an update is about to happen."""

import contextlib

from aiockpt.integrations.deepspeed.roots import Roots
from integrations import late_staging as general


def late_staging() -> contextlib.AbstractContextManager[None]:
    """Within the block nothing is copied before somebody waits for it.

    So forward and backward passes come between a save and its staging, always.
    """
    return general.late_staging((Roots, "run"))
