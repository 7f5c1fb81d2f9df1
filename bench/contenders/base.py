"""What every contender is: four functions, and a word on what it promises."""

__all__ = [
    "NO_GPU",
    "Contender",
    "Options",
    "Saving",
    "State",
    "copied_into",
    "process_group",
    "sync_tree",
]

import asyncio
import os
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from typing_extensions import override

State = Mapping[str, Any]

NO_GPU = "needs a GPU"


@dataclass(frozen=True)
class Options:
    """What aiockpt is told; nobody else looks at it.

    Attributes:
        ring_gib: Size of the ring.
        threads: Worker threads.
    """

    ring_gib: float = 0.5
    threads: int = 4


class Saving(ABC):
    """A save that has been begun."""

    @abstractmethod
    def wait_staged(self) -> None:
        """Returns when the trainer may change its tensors."""

    @abstractmethod
    def wait_durable(self) -> dict[str, float]:
        """Returns when data and directories are on stable storage.

        The result is what the contender itself tells of the save.
        """


class Done(Saving):
    """There is nothing left to be waited for."""

    @override
    def wait_staged(self) -> None:
        pass

    @override
    def wait_durable(self) -> dict[str, float]:
        return {}


class Contender(ABC):
    """Saves to, and loads from, a directory of its own, in a process of its own.

    Attributes:
        name: What tables call it.
        durability: What there is when `wait_durable` has returned.
        package: What has to be installed.
        modules: What it imports before memory and time are counted.
        is_lazy: Whether what `load` returns is read by page faults, later.
        is_reference: Whether it is a limit of the machine, not a way to save.
        writer: Whose files it can load, where they are another's.
    """

    name: ClassVar[str]
    durability: ClassVar[str]
    package: ClassVar[str] = "torch"
    modules: ClassVar[tuple[str, ...]] = ()
    is_lazy: ClassVar[bool] = False
    is_reference: ClassVar[bool] = False
    writer: ClassVar[str | None] = None

    directory: Path

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot run here; None where it can."""
        if find_spec(cls.package) is None:
            return f"{cls.package} is not installed"
        return None

    @classmethod
    def reads(cls) -> str:
        """The name of the contender whose files it loads."""
        return cls.writer or cls.name

    def setup(self, directory: Path, options: Options) -> None:
        """Makes it ready, once a process."""
        self.directory = directory

    def begin_training(self, state: State) -> None:  # noqa: B027 - few have a use for it
        """What a program does before its first step; not part of a save's time."""

    def open_tag(self, tag: str) -> None:
        """Makes the place of a save; not part of the save's time."""
        (self.directory / tag).mkdir()

    @abstractmethod
    def save(self, state: State, tag: str) -> Saving:
        """Begins a save; returns as soon as the trainer is not held any more."""

    @abstractmethod
    def load(
        self,
        tag: str,
        like: Mapping[str, torch.Tensor],
        *,
        is_in_place: bool = False,
        keys: list[str] | None = None,
    ) -> Mapping[str, Any]:
        """The state of a save.

        Args:
            tag: Which one.
            like: The tensors that were saved, by name: whoever can only load into
                something looks at their shapes.
            is_in_place: Whether to fill the tensors of `like`, and return them.
            keys: Only these.
        """

    def delete(self, tag: str) -> None:
        """Removes a save."""
        shutil.rmtree(self.directory / tag)

    def teardown(self) -> None:  # noqa: B027 - some have nothing to end
        """Ends what `setup` has begun."""

    async def save_on_loop(self, state: State, tag: str) -> None:
        """A durable save, as an asyncio program makes it."""
        saving = self.save(state, tag)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, saving.wait_durable)


def copied_into(
    state: Mapping[str, Any], targets: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Fills `targets` as `load_state_dict` does, and returns them."""
    for name, target in targets.items():
        target.copy_(state[name])
    return targets


def sync_tree(path: Path) -> None:
    """Makes durable a file or a directory with all that is in it, and its name."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    # A directory last: what it names is there first.
    for each in [*reversed(paths), path.parent]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def process_group() -> Iterator[None]:
    """A group of one process, for those who do not work without."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
