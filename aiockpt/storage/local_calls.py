"""What calls to the file system have in common: errors that name the file."""

__all__ = ["close_unwritten", "errors_name"]

import contextlib
import os
from collections.abc import Generator

from aiockpt.errors import StorageError


@contextlib.contextmanager
def errors_name(full: str) -> Generator[None]:
    """Turns an `OSError` into a `StorageError` that names the file."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        text = error.strerror or str(error)
        raise StorageError(error.errno, text, full) from error


def close_unwritten(descriptor: int) -> None:
    """Closes what nothing was written through: a failure says nothing of use."""
    with contextlib.suppress(OSError):
        os.close(descriptor)
