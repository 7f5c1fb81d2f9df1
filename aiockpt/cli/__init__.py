"""`aiockpt`, the command: look at checkpoints, check them, compare them, remove them.

Nothing here runs code that a checkpoint brings along.
"""

__all__ = ["app", "main"]

from aiockpt.cli.app import app, main
