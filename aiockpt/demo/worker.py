"""One training run as a process of its own: `python -m aiockpt.demo.worker JSON`.

The argument is a `Settings`; each event is one line of JSON on standard output.
"""

__all__ = ["main", "print_json"]

import asyncio
import sys

import msgspec

from aiockpt.demo.trainer import Event, Settings, train


def main(settings: str) -> None:
    """Runs the trainer.

    Raises:
        CheckpointError: A checkpoint could not be made or loaded.
    """
    run = msgspec.json.decode(settings, type=Settings)
    asyncio.run(train(run, print_json))


def print_json(event: Event) -> None:
    """Writes the event as a line, at once: the process may be killed any time."""
    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
