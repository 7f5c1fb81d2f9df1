"""What loading costs, next to the raw disk and to other loaders, in one run.

    python bench/loading.py fresh|into|partial|checksum [--gib 4] [--repeats 5]
    python bench/loading.py small [--tensors 10000 100000] [--max-kib 64]

Every load has a process of its own, as on a restart: memory that it has freed makes
no later load cheaper. The time goes from the call to every byte being usable; the
start of Python, imports and, for `into`, the making of the targets are not in it.
Contenders take turns, the first round warms up and compares what was loaded with
what was saved. Caches are dropped before each load, for which one has to be root;
otherwise, and with `--warm`, files are read from the page cache, and rows say so.

Run it on a machine that does nothing else: torch copies with all cores, and waits
for each of them tensor by tensor, so that a busy core costs `into` a factor of ten.

Files are deleted afterwards. One JSON line for each load and figure is appended to
`--out`. Times are comparable within a run only.
"""

import argparse
import asyncio
import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TextIO

import torch
from measuring import (
    GIB,
    Clock,
    Raw,
    Rounds,
    can_drop_caches,
    figures,
    machine,
    read_raw,
    results_file,
    table,
    touch_mapping,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import aiockpt

SEED = 20
NUM_TENSORS = 300
TAG = "step-1"
CONFIG = {"host_cache_size": 0.5, "parser_threads": 4}

# ---------------------------------------------------------------- what is loaded


@dataclass(frozen=True)
class Files:
    """One state in a directory: as a published tag, and as a safetensors file.

    Attributes:
        directory: Where the files are, absolute and without links.
        numels: Elements of each tensor, all float32.
    """

    directory: Path
    numels: list[int]

    @classmethod
    def in_directory(cls, directory: Path) -> Self:
        """What another process has described there."""
        return cls(directory, json.loads((directory / "numels.json").read_text()))

    def describe(self) -> None:
        """Writes down for other processes what the state is."""
        (self.directory / "numels.json").write_text(json.dumps(self.numels))

    @property
    def torch_zip(self) -> Path:
        """The file of the published tag; `torch.save` writes the same bytes."""
        return self.directory / TAG / "model.pt"

    @property
    def safetensors(self) -> Path:
        """The same tensors as safetensors writes them."""
        return self.directory / "model.safetensors"

    @property
    def names(self) -> list[str]:
        """The tensors' keys."""
        return [f"layers.{index}.weight" for index in range(len(self.numels))]

    @property
    def middle(self) -> str:
        """The key that is loaded where only one is."""
        return self.names[len(self.numels) // 2]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it was saved; the same in every process."""
        index = int(name.split(".")[1])
        generator = torch.Generator().manual_seed(SEED + index)
        return torch.rand(self.numels[index], generator=generator)

    def targets(self) -> dict[str, torch.Tensor]:
        """A state dict to fill, in memory that was touched."""
        shapes = zip(self.names, self.numels, strict=True)
        return {name: torch.ones(numel) for name, numel in shapes}

    async def save(self) -> None:
        """Writes and syncs the files."""
        state = {name: self.tensor(name) for name in self.names}
        async with aiockpt.CheckpointEngine(self.directory, CONFIG) as engine:
            await engine.create(TAG)
            await engine.save(state, "model.pt")
            await engine.commit(TAG)
        save_file(state, self.safetensors)
        os.sync()


def small_numels(num_tensors: int, max_kib: int) -> list[int]:
    """Tensors of 1 to `max_kib` KiB, as many between 1 and 2 as between 2 and 4."""
    rng = random.Random(SEED)  # noqa: S311 - the same sizes every time
    return [int(256 * max_kib ** rng.random()) for _ in range(num_tensors)]


# ----------------------------------------------------------------- the contenders

Load = Callable[[Files, Clock], Any]
"""Loads, under the clock, and returns what was loaded: tensors by name, or `Raw`."""


def raw(files: Files, clock: Clock, *, is_touched: bool = True) -> Raw:
    """The whole file from the disk."""
    return read_raw(files.torch_zip, clock, is_touched=is_touched)


def raw_tensor(files: Files, clock: Clock) -> Raw:
    """As many bytes as the middle tensor has, from the middle of the file."""
    pages = files.torch_zip.stat().st_size // 2 // mmap.PAGESIZE
    nbytes = files.tensor(files.middle).nbytes
    return read_raw(files.torch_zip, clock, offset=pages * mmap.PAGESIZE, nbytes=nbytes)


def engine_load(files: Files, clock: Clock, **options: Any) -> Any:
    """The engine's `load` of the published tag."""

    async def load() -> Any:
        async with aiockpt.CheckpointEngine(files.directory, CONFIG) as engine:
            with clock.reading(files.torch_zip):
                return await engine.load("model.pt", **options)

    return asyncio.run(load())


def file_load(files: Files, clock: Clock, **options: Any) -> Any:
    """The load of one file, which knows no manifest."""

    async def load() -> Any:
        with clock.reading(files.torch_zip):
            return await aiockpt.load(files.torch_zip, **options)

    return asyncio.run(load())


@dataclass(frozen=True)
class Reader:
    """Another loader.

    Attributes:
        load: Takes a path, returns tensors by name.
        is_lazy: Whether it maps the file and leaves the reading to page faults.
        is_safetensors: Of which container it is.
    """

    load: Callable[[Path], Any]
    is_lazy: bool
    is_safetensors: bool = False

    def path_in(self, files: Files) -> Path:
        """The file that it loads."""
        return files.safetensors if self.is_safetensors else files.torch_zip


def theirs(files: Files, clock: Clock, reader: Reader) -> Any:
    """Another loader's load, then a look at every page where it maps the file."""
    path = reader.path_in(files)
    with clock.reading(path):
        state = reader.load(path)
        if reader.is_lazy:
            touch_mapping(path)
    return state


def ours_into(files: Files, clock: Clock, load: Callable[..., Any]) -> Any:
    """Either of our loads, into targets."""
    targets = files.targets()
    load(files, clock, into=targets)
    return targets


def theirs_into(files: Files, clock: Clock, reader: Reader) -> Any:
    """Another loader's load, then a copy as `load_state_dict` makes it."""
    path, targets = reader.path_in(files), files.targets()
    with clock.reading(path):
        state = reader.load(path)
        for name, target in targets.items():
            target.copy_(state[name])
    return targets


def our_tensor(files: Files, clock: Clock, load: Callable[..., Any]) -> Any:
    """Either of our loads, of one key."""
    return load(files, clock, keys=[files.middle])


def torch_tensor(files: Files, clock: Clock) -> Any:
    """A copy of one tensor of a mapped file."""
    name = files.middle
    with clock.reading(files.torch_zip):
        return {name: torch.load(files.torch_zip, mmap=True)[name].clone()}


def safetensors_tensor(files: Files, clock: Clock) -> Any:
    """A copy of one tensor, which `get_tensor` maps."""
    name = files.middle
    with clock.reading(files.safetensors):
        with safe_open(files.safetensors, framework="pt") as file:
            return {name: file.get_tensor(name).clone()}


TORCH = Reader(torch.load, is_lazy=False)
TORCH_MMAP = Reader(partial(torch.load, mmap=True), is_lazy=True)
SAFETENSORS = Reader(load_file, is_lazy=True, is_safetensors=True)

# In each case the raw disk comes first; the first of ours is what others compare to.
CASES: dict[str, dict[str, Load]] = {
    "fresh": {
        "raw, touched memory": raw,
        "raw, fresh memory": partial(raw, is_touched=False),
        "aiockpt engine": engine_load,
        "aiockpt file": file_load,
        "aiockpt file, unverified": partial(file_load, verify=False),
        "torch.load": partial(theirs, reader=TORCH),
        "torch.load mmap, touched": partial(theirs, reader=TORCH_MMAP),
        "safetensors, touched": partial(theirs, reader=SAFETENSORS),
    },
    "into": {
        "raw, touched memory": raw,
        "aiockpt engine": partial(ours_into, load=engine_load),
        "aiockpt file": partial(ours_into, load=file_load),
        "torch.load, copied": partial(theirs_into, reader=TORCH),
        "torch.load mmap, copied": partial(theirs_into, reader=TORCH_MMAP),
        "safetensors, copied": partial(theirs_into, reader=SAFETENSORS),
    },
    "partial": {
        "raw, touched memory": raw_tensor,
        "aiockpt engine": partial(our_tensor, load=engine_load),
        "aiockpt file": partial(our_tensor, load=file_load),
        "torch.load mmap, cloned": torch_tensor,
        "safetensors, cloned": safetensors_tensor,
    },
    "small": {
        "raw, touched memory": raw,
        "aiockpt engine": engine_load,
        "aiockpt file": file_load,
        "torch.load": partial(theirs, reader=TORCH),
        "safetensors, touched": partial(theirs, reader=SAFETENSORS),
    },
    "checksum": {
        "raw, touched memory": raw,
        "aiockpt engine": engine_load,
        "aiockpt engine, unverified": partial(engine_load, verify=False),
        "aiockpt file": file_load,
        "aiockpt file, unverified": partial(file_load, verify=False),
    },
}

# ------------------------------------------------------------------ in a process


def load_once(arguments: argparse.Namespace) -> None:
    """The child: loads once, prints as JSON what it has cost."""
    files = Files.in_directory(arguments.directory)
    clock = Clock(is_cold=arguments.cache == "cold")
    loaded = CASES[arguments.case][arguments.contender](files, clock)
    if arguments.is_compared:
        names = [files.middle] if arguments.case == "partial" else files.names
        compare(loaded, files, names)
    print(json.dumps(clock.costs()))


def compare(loaded: Any, files: Files, names: list[str]) -> None:
    """Returns if what was loaded are the tensors `names`, as they were saved."""
    if isinstance(loaded, Raw):
        is_same = loaded.is_as_in_file()
    else:
        is_same = loaded.keys() == set(names) and all(
            torch.equal(loaded[name], files.tensor(name)) for name in names
        )
    if not is_same:
        raise ValueError("what was loaded is not what was saved")


def spawn(*words: object) -> str:
    """Runs this program in a process of its own; what it has printed."""
    command = [sys.executable, __file__, *(str(word) for word in words)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


# ------------------------------------------------------------------ the comparison


def run(arguments: argparse.Namespace) -> None:
    """Runs a case; appends JSON lines to a file and prints a table."""
    cache = "warm" if arguments.is_warm or not can_drop_caches() else "cold"
    if cache == "warm" and not arguments.is_warm:
        print("caches cannot be dropped (not root?): all rows are warm")
    about = machine("aiockpt", "safetensors")
    with (arguments.out or results_file("loading", about)).open(
        "a", encoding="utf-8"
    ) as lines:
        for numels in sizes(arguments):
            case = {
                "name": arguments.case,
                "cache": cache,
                "num_tensors": len(numels),
                "nbytes": 4 * sum(numels),
                "repeats": arguments.repeats,
                "seed": SEED,
                "config": CONFIG,
            }
            print(json.dumps({"machine": about, "case": case}), file=lines)
            rounds = take_turns(arguments, cache, numels, lines)
            title = f"{arguments.case}, {cache}, {len(numels)} tensors"
            for row in figures(title, rounds):
                print(json.dumps(row), file=lines, flush=True)
            print(f"{title}, {4 * sum(numels) / GIB:.2f} GiB, n={arguments.repeats}")
            print(table(rounds), flush=True)


def sizes(arguments: argparse.Namespace) -> list[list[int]]:
    """Elements of the tensors of each state that a case is run with."""
    if arguments.case == "small":
        return [small_numels(n, arguments.max_kib) for n in arguments.tensors]
    return [[int(arguments.gib * GIB) // NUM_TENSORS // 4] * NUM_TENSORS]


def take_turns(
    arguments: argparse.Namespace, cache: str, numels: list[int], lines: TextIO
) -> Rounds:
    """Loads with each contender in turn, `repeats` times after a warm-up."""
    names = list(CASES[arguments.case])
    rounds: Rounds = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.dir) as directory:
        files = Files(Path(directory).resolve(), numels)
        files.describe()
        spawn("save", files.directory)
        for number in range(arguments.repeats + 1):
            # Shuffled, so that nobody always follows the same neighbour.
            for name in random.Random(SEED + number).sample(names, len(names)):  # noqa: S311
                words = ["child", arguments.case, name, files.directory, cache]
                if number == 0:
                    spawn(*words, "--compare")
                    continue
                costs = json.loads(spawn(*words))
                rounds[name].append(costs)
                row = {"load": name, "cache": cache, "round": number, **costs}
                print(json.dumps(row), file=lines, flush=True)
    return rounds


def save(arguments: argparse.Namespace) -> None:
    """The child that makes the files, so that its memory is not ours."""
    asyncio.run(Files.in_directory(arguments.directory).save())


def main() -> None:
    """Runs one case, or is one of the processes that a case spawns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="case", required=True)
    for name in CASES:
        case = commands.add_parser(name)
        if name == "small":
            case.add_argument("--tensors", type=int, nargs="+", default=[10**4, 10**5])
            case.add_argument("--max-kib", type=int, default=64)
        else:
            case.add_argument("--gib", type=float, default=4.0)
        case.add_argument("--repeats", type=int, default=5)
        case.add_argument("--warm", dest="is_warm", action="store_true")
        case.add_argument("--dir", type=Path, default=Path.cwd())
        case.add_argument("--out", type=Path, default=None)
        case.set_defaults(run=run)
    saving = commands.add_parser("save", help="internal")
    saving.add_argument("directory", type=Path)
    saving.set_defaults(run=save)
    loading = commands.add_parser("child", help="internal")
    loading.add_argument("case")
    loading.add_argument("contender")
    loading.add_argument("directory", type=Path)
    loading.add_argument("cache", choices=["cold", "warm"])
    loading.add_argument("--compare", dest="is_compared", action="store_true")
    loading.set_defaults(run=load_once)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
