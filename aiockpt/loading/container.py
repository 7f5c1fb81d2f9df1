"""Which container a file is, told by its first bytes."""

__all__ = ["Container", "container_of"]

from enum import StrEnum

from aiockpt.errors import CorruptCheckpointError, InvalidArgumentError
from aiockpt.loading.reading import Region, read_bytes
from aiockpt.storage.base import ReadFile

_ZIP_MAGIC = b"PK\x03\x04"
# A pickle of torch's legacy magic number, 0x1950A86A20F9469CFC6C.
_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_TAR_MAGIC = b"ustar"
_TAR_MAGIC_AT = 257
_PREFIX_BYTES = 512


class Container(StrEnum):
    """The containers that can be read."""

    TORCH = "torch"
    SAFETENSORS = "safetensors"


def container_of(file: ReadFile) -> Container:
    """Returns which container the file is.

    Raises:
        CorruptCheckpointError: It is none that is known.
        InvalidArgumentError: It is one that only `torch.load` reads.
        StorageError: The file system refused.
    """
    nbytes = min(_PREFIX_BYTES, file.nbytes)
    prefix = read_bytes(file, Region("the first bytes", 0, nbytes, None))
    if prefix.startswith(_ZIP_MAGIC):
        return Container.TORCH
    if prefix[8:9] == b"{":
        return Container.SAFETENSORS
    if _LEGACY_MAGIC in prefix[:16] or prefix.startswith(_TAR_MAGIC, _TAR_MAGIC_AT):
        text = (
            f"{file.path}: torch's format from before version 1.6, which is not "
            "supported; torch.load reads it, then save it again"
        )
        raise InvalidArgumentError(text)
    text = f"{file.path}: neither a torch zip file nor a safetensors file"
    raise CorruptCheckpointError(text, path=file.path, offset=0)
