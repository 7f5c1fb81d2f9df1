"""The plain container: bytes that are the file, with nothing around them.

For what stands beside weights: an index, a configuration, a tokenizer's vocabulary.
"""

__all__ = ["PlainBytes", "layout"]

from dataclasses import dataclass
from typing import Self

from aiockpt.errors import InvalidArgumentError
from aiockpt.image import Data, Layout


@dataclass(frozen=True, slots=True)
class PlainBytes:
    """State whose file, under whatever name, is exactly these bytes.

    Attributes:
        data: The whole file.
    """

    data: bytes

    @classmethod
    def of(cls, data: object) -> Self:
        """Text as UTF-8; a copy of bytes that may change.

        Raises:
            InvalidArgumentError: Neither text nor bytes, or text that UTF-8 has not.
        """
        if isinstance(data, str):
            try:
                return cls(data.encode())
            except UnicodeEncodeError as error:
                message = f"the text cannot be written as UTF-8: {error}"
                raise InvalidArgumentError(message) from error
        if isinstance(data, bytes | bytearray | memoryview):
            return cls(bytes(data))
        kind = type(data).__name__
        message = f"a plain file holds text or bytes, not a {kind}: `save` takes it"
        raise InvalidArgumentError(message)


def layout(nbytes: int) -> Layout:
    """Lays out a file that is its only record."""
    return Layout(nbytes, [Data(0, nbytes, 0)] if nbytes else [])
