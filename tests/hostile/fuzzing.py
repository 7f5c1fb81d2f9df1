"""What is fuzzed: functions of any bytes, from which only `CheckpointError` is let out.

`test_fuzz.py` calls them with changed good files, `run_atheris.py` with whatever leads
to code that was not reached before.
"""

import contextlib
import io
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from aiockpt.errors import CheckpointError, CorruptCheckpointError
from aiockpt.formats.safetensors import parse_header
from aiockpt.formats.zip_directory import data_offset, parse_directory
from aiockpt.formats.zip_end import TAIL_BYTES, find_directory
from aiockpt.manifest import FileEntry, Manifest, decode, encode
from aiockpt.outline import emit, leaves, outline, screen, storage_keys, tensors_in
from aiockpt.sync import load
from hostile import pickles, safetensors_cases
from hostile.opening import inspect, verify
from hostile.zip_files import torch_file, zip_file


@dataclass(frozen=True)
class Target:
    """A function to be fuzzed, and good inputs to begin with."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def fuzz_directory(data: bytes) -> None:
    """The end of a file and its directory, and then every local header."""
    with contextlib.suppress(CorruptCheckpointError):
        span = find_directory(data[-TAIL_BYTES:], len(data))
        if span is None:
            raise AssertionError("the longest tail is too short")
        part = data[span.offset : span.offset + span.nbytes]
        for entry in parse_directory(part, span).entries.values():
            header = data[entry.header_offset :][: entry.header_nbytes]
            offset = data_offset(entry, header)
            assert 0 <= offset <= offset + entry.nbytes <= entry.limit <= len(data)


def fuzz_local_header(data: bytes) -> None:
    """The local header of a storage, by a directory that is sound."""
    good = zip_file()
    span = find_directory(good, len(good))
    assert span is not None
    part = good[span.offset : span.offset + span.nbytes]
    entry = parse_directory(part, span).entries["data/0"]
    with contextlib.suppress(CorruptCheckpointError):
        offset = data_offset(entry, data)
        assert offset + entry.nbytes <= entry.limit


def fuzz_outline(data: bytes) -> None:
    """A pickle, looked at in every way."""
    with contextlib.suppress(CorruptCheckpointError):
        screen(data)
    with contextlib.suppress(CorruptCheckpointError):
        root = outline(data)
        for leaf in leaves(root):
            storage_keys(leaf.node)
            tensors_in(leaf.node)
        again = emit(root, like=data)
        assert emit(outline(again), like=again)


def fuzz_safetensors_header(data: bytes) -> None:
    """A safetensors file, its header only."""
    with contextlib.suppress(CorruptCheckpointError):
        header = parse_header(data, len(data))
        end = header.data_start
        for entry in header.entries.values():
            assert entry.start == end
            end += entry.nbytes
        assert end == len(data)


def fuzz_pickle(data: bytes) -> None:
    """A pickle in a sound file, loaded as everybody loads it, and in part."""
    with _file_of(torch_file(data)) as path:
        for use in (load, lambda path: load(path, keys=["*"]), inspect):
            with contextlib.suppress(CheckpointError):
                use(path)


def fuzz_file(data: bytes) -> None:
    """A whole file, loaded, looked at and verified."""
    with _file_of(data) as path:
        for use in (load, inspect, verify):
            with contextlib.suppress(CheckpointError):
                use(path)


def fuzz_manifest(data: bytes) -> None:
    """A manifest; once more with its checksum made right, where it can be."""
    with contextlib.suppress(CorruptCheckpointError):
        decode(data, "manifest")
    try:
        sound = encode(msgspec.json.decode(data, type=Manifest))
    except (ValueError, RecursionError):
        return
    with contextlib.suppress(CorruptCheckpointError):
        assert encode(decode(sound, "manifest")) == sound


def _manifest() -> bytes:
    manifest = Manifest(
        tag="step-1",
        attempt="a" * 32,
        published_ns=1,
        world_size=2,
        files=(FileEntry(path="sub/model.pt", nbytes=7, crc32=8, rank=1),),
        hosts={0: "host"},
        versions={"torch": "2.13.0"},
    )
    return encode(manifest)


@contextlib.contextmanager
def _file_of(data: bytes) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "file")
        path.write_bytes(data)
        yield str(path)


def _saved() -> tuple[bytes, ...]:
    """Files of torch's own, with several kinds of tensor and of value."""
    states: list[object] = [
        {"w": torch.ones(2, 3), "step": 7, "name": "gpt", "lr": 0.1, "flags": {1, 2}},
        [
            torch.nn.Parameter(torch.ones(2)),
            torch.ones(4)[1:],
            torch.eye(2).to_sparse(),
        ],
        {
            "none": None,
            "key": {(1, "a"): b"bytes"},
            "meta": torch.ones(2, device="meta"),
        },
    ]
    buffers = [io.BytesIO() for _ in states]
    for state, buffer in zip(states, buffers, strict=True):
        torch.save(state, buffer)
    return tuple(buffer.getvalue() for buffer in buffers)


def _pickle_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read("archive/data.pkl")


_SAVED = _saved()
_PICKLES = (pickles.GOOD, *map(_pickle_of, _SAVED))

TARGETS = {
    "directory": Target(fuzz_directory, (zip_file(), zip_file()[-22:], *_SAVED)),
    "local_header": Target(fuzz_local_header, (zip_file()[:60],)),
    "outline": Target(fuzz_outline, _PICKLES),
    "safetensors_header": Target(fuzz_safetensors_header, (safetensors_cases.GOOD,)),
    "pickle": Target(fuzz_pickle, _PICKLES),
    "manifest": Target(fuzz_manifest, (_manifest(),)),
    "file": Target(fuzz_file, (zip_file(), safetensors_cases.GOOD, *_SAVED)),
}
