"""Who saves on the disks whose power is cut: aiockpt, aiockpt broken, and its peers.

Each peer is used as its own documentation does it, and says "saved" when its call has
returned. None of them is made to sync: that is what is compared.
"""

import functools
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from aiockpt.errors import CheckpointNotFoundError
from aiockpt.storage import local_write
from faults import mutants
from workloads import SMALL, Engine

State = Mapping[str, torch.Tensor]

MODEL, OPTIMIZER = "model.pt", "sub/optimizer.safetensors"


@functools.lru_cache(maxsize=64)
def state(seed: int) -> State:
    """What is saved under a seed: 0.4 MB, and each fourth time of several chunks."""
    generator = torch.Generator().manual_seed(seed)
    length = 50_000 if seed % 4 else 350_000
    return {
        "w": torch.randint(1 << 40, (length,), generator=generator),
        "b": torch.randn(1000, generator=generator),
        "seed": torch.tensor([seed]),
    }


def is_state(loaded: Mapping[str, Any], seed: int) -> bool:
    """Whether this is what was saved under the seed, to the last bit."""
    wanted = state(seed)
    return loaded.keys() == wanted.keys() and all(
        torch.equal(loaded[key], wanted[key]) for key in wanted
    )


class Contender(Protocol):
    """Saves under names, and loads. `close` is never called before a power cut.

    Attributes:
        root: The directory of the names.
    """

    root: Path

    def save(self, name: str, seed: int) -> None:
        """Saves `state(seed)`, in place of what has the name; then it is saved."""
        ...

    def load(self, name: str) -> Mapping[str, Any] | None:
        """What has the name; None if nothing has. Raises if it is not sound."""
        ...

    def path(self, name: str) -> Path:
        """The file, or the directory, of a name."""
        ...

    def files(self, name: str) -> list[Path]:
        """All files of a name."""
        ...

    def remove(self, name: str) -> None:
        """Removes what has the name."""
        ...

    def close(self) -> None:
        """Lets go of what it holds."""
        ...


class Aiockpt:
    """aiockpt, with a file of either format in each tag."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._engine = Engine(root, SMALL)
        self._engine.sweep()

    def save(self, name: str, seed: int) -> None:
        self._engine.create(name, overwrite=True)
        self._engine.save(state(seed), MODEL)
        self._engine.save({"b": state(seed)["b"]}, OPTIMIZER)
        self._engine.commit(name)

    def remove(self, name: str) -> None:
        self._engine.delete(name)

    def tags(self) -> list[str]:
        """The published tags, oldest first."""
        return [info.tag for info in self._engine.tags()]

    def load(self, name: str) -> Mapping[str, Any] | None:
        try:
            model = self._engine.load(MODEL, tag=name)
        except CheckpointNotFoundError:
            return None
        loaded = self._engine.load(OPTIMIZER, tag=name)
        assert torch.equal(loaded["b"], model["b"]), "two files of one tag differ"
        return model

    def path(self, name: str) -> Path:
        return self.root / name

    def files(self, name: str) -> list[Path]:
        return [path for path in self.path(name).rglob("*") if path.is_file()]

    def close(self) -> None:
        self._engine.close()


class _Plain:
    """One file for each name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    def path(self, name: str) -> Path:
        return self.root / name

    def load(self, name: str) -> Mapping[str, Any] | None:
        if not self.path(name).exists():
            return None
        return self._load(self.path(name))

    def _load(self, path: Path) -> Mapping[str, Any]:
        return torch.load(path)

    def files(self, name: str) -> list[Path]:
        return [self.path(name)]

    def remove(self, name: str) -> None:
        self.path(name).unlink()

    def close(self) -> None:
        pass


class TorchSave(_Plain):
    """`torch.save` to the final name."""

    def save(self, name: str, seed: int) -> None:
        torch.save(state(seed), self.path(name))


class TorchSaveReplace(_Plain):
    """`torch.save` to another name, then `os.replace`."""

    def save(self, name: str, seed: int) -> None:
        aside = self.path(f"{name}.tmp")
        torch.save(state(seed), aside)
        os.replace(aside, self.path(name))


class Safetensors(_Plain):
    """`safetensors.torch.save_file` to the final name."""

    def save(self, name: str, seed: int) -> None:
        safetensors.torch.save_file(dict(state(seed)), self.path(name))

    def _load(self, path: Path) -> Mapping[str, Any]:
        return safetensors.torch.load_file(path)


class Dcp(_Plain):
    """`torch.distributed.checkpoint.save`, in one process, a directory for each."""

    def save(self, name: str, seed: int) -> None:
        # It warns that there is one process, and that it overwrites.
        warnings.simplefilter("ignore")
        dcp.save(dict(state(seed)), checkpoint_id=self.path(name), no_dist=True)

    def _load(self, path: Path) -> Mapping[str, Any]:
        warnings.simplefilter("ignore")
        # It loads into what has the right shapes: the metadata says which.
        found = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        into = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in found.items()
        }
        dcp.load(into, checkpoint_id=path, no_dist=True)
        return into

    def files(self, name: str) -> list[Path]:
        return sorted(self.path(name).iterdir())

    def remove(self, name: str) -> None:
        shutil.rmtree(self.path(name))


PEERS = {
    "torch.save": TorchSave,
    "torch.save, os.replace": TorchSaveReplace,
    "safetensors save_file": Safetensors,
    "torch DCP save": Dcp,
}


def _nothing_written_early(patch: pytest.MonkeyPatch) -> None:
    """Neither a sync nor anything else makes the kernel write what it caches.

    Without the sync alone little is lost here: direct writes, and buffered ones whose
    write-back was started, are on the disk by the time the manifest is synced.
    """
    mutants.no_file_sync(patch)
    patch.setattr(local_write._libc, "sync_file_range", lambda *_: 0)


# What a power cut must show, or the harness would be worth nothing.
BUFFERED = ", buffered"
BROKEN = {
    f"no file sync{BUFFERED}": _nothing_written_early,
    "no directory sync": mutants.no_directory_sync,
    "sync before flush": mutants.manifest_synced_before_it_is_written,
}


def contender(name: str, root: Path) -> Contender:
    """The one of that name, at work in a root; what it changes it changes for good."""
    if name in PEERS:
        return PEERS[name](root)
    if name in BROKEN:
        BROKEN[name](pytest.MonkeyPatch())
    else:
        assert name.removesuffix(BUFFERED) == "aiockpt"
    if name.endswith(BUFFERED):
        local_write._O_DIRECT = 0
    return Aiockpt(root)
