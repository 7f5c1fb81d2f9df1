"""What the time of a target's row is spent on; by the target's metric.

Written by hand from profiles (`py-spy`, `perf`, `strace -c`), kept beside the figures.
"""

__all__ = ["REMARKS"]

REMARKS: dict[str, str] = {}
