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
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

import torch
from loaders import CASES, CONFIG, NUM_TENSORS, SEED, Files, small_numels
from measuring import (
    GIB,
    Clock,
    Raw,
    Rounds,
    can_drop_caches,
    figures,
    machine,
    results_file,
    table,
)

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
