"""Loading a checkpoint file: torch zip or safetensors, whoever wrote it.

Everything here blocks and is meant for a worker thread. Nothing is handed out that
was not checked against the file's own checksums, and no code from the file runs,
unless the caller said so.
"""

__all__ = [
    "FileInfo",
    "RecordInfo",
    "TensorInfo",
    "check_file",
    "inspect_file",
    "load_file",
    "verify_file",
]

from collections.abc import Sequence

from aiockpt.errors import CorruptCheckpointError, InvalidArgumentError
from aiockpt.loading.container import Container, container_of
from aiockpt.loading.inspecting import FileInfo, RecordInfo, TensorInfo, inspect_file
from aiockpt.loading.placing import MapLocation, Placement
from aiockpt.loading.reading import named
from aiockpt.loading.safetensors_loading import SafetensorsLoading
from aiockpt.loading.torch_file import TorchFile
from aiockpt.loading.torch_loading import TorchLoading
from aiockpt.loading.unpickling import Unpickling
from aiockpt.loading.verifying import verify_file
from aiockpt.storage.base import ReadFile


def check_file(file: ReadFile, file_crc32: int) -> None:
    """Returns if the file is whole and the one that a manifest describes.

    Raises:
        CorruptCheckpointError: It is not; names the tensor at fault where it can.
        StorageError: The file system refused.
    """
    found = verify_file(file)
    if found != file_crc32:
        message = (
            f"{file.path}: not the file that the manifest describes: its CRC-32 is "
            f"{found:08x} instead of {file_crc32:08x}"
        )
        raise CorruptCheckpointError(message, path=file.path)


def load_file(  # noqa: PLR0913 - the arguments of `torch.load`, and what it lacks
    file: ReadFile,
    *,
    map_location: MapLocation = None,
    weights_only: bool = True,
    verify: bool = True,
    mmap: bool = False,
    into: object = None,
    keys: Sequence[str] | None = None,
) -> object:
    """Returns what was saved in the file.

    The container is told by the first bytes. Of a safetensors file, the result is a
    dictionary of tensors.

    Args:
        file: The file, open for reading; stays open and the caller's.
        map_location: As for `torch.load`; for both containers.
        weights_only: Make only what torch counts as safe (its list, and what was
            added with `torch.serialization.add_safe_globals`). Otherwise the
            pickle runs whatever code it names.
        verify: Check every record that is read against its CRC-32 before anything
            of it is handed out. Not for files without checksums (safetensors;
            torch with `set_crc32_options(False)`).
        mmap: Map the file instead of reading it. Tensors are read, unchecked, when
            they are looked at; changing them does not change the file.
        into: Nested mappings, lists and tuples of tensors to fill in place. Each
            tensor of the file must have one of the same key path, dtype and shape,
            and the other way round. A target that is contiguous host memory is
            read into directly. If the file turns out to be corrupt on the way,
            the targets' content is undefined. Where the file has one tensor under
            two keys, the result has the first target under both.
        keys: Key paths of tensors, or globs over them (`model.layers.0.*`): only
            these are read (or filled), and the result is a dictionary of tensors
            by key path.

    Raises:
        CheckpointNotFoundError: A key names no tensor; the message lists near ones.
        CorruptCheckpointError: The file is cut off, malformed or has other bytes
            than were written; names the tensor where it can.
        InvalidArgumentError: The arguments contradict each other, `into` does not
            fit (all misfits are listed), there is no such device, or the file is
            of a kind that only another reader loads.
        StorageError: The file system refused.
        UnsafePickleError: The file needs a class that `weights_only` does not allow.
    """
    if mmap and into is not None:
        raise InvalidArgumentError("mmap maps the file, into reads it: choose one")
    placement = Placement(map_location)
    with named(file):
        if container_of(file) is Container.SAFETENSORS:
            return SafetensorsLoading(file, placement, is_mapped=mmap).load(into, keys)
        return TorchLoading(
            TorchFile(file, verify=verify),
            placement,
            Unpickling(file.path, weights_only=weights_only, map_location=map_location),
            is_mapped=mmap,
        ).load(into, keys)
