"""Measures: `python -m bench [CASE ...] [--scale full|medium|tiny]`.

Every contender has a process of its own; they take turns within each repeat. What was
saved is compared with what was to be saved after every measurement. One JSON line for
each measurement goes to a file in `bench/results/` (full scale) or to `--out`. Loads
are cold where the page cache can be dropped, for which one has to be root.

Run it on a machine that does nothing else. Times are comparable within a run only.
Cases of GPUs are asked for by name (but at the tiny scale, where they run without one).
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter

import torch

from bench.cases import CASES
from bench.contenders import CONTENDERS
from bench.measuring import file_system, machine, results_file
from bench.running import Run
from bench.scratch import swept
from bench.workloads import Scale

# No contenders: only aiockpt's ranks agree in this way.
_RANKS = "ranks"
_PACKAGES = (
    "aiockpt",
    "safetensors",
    "lightning",
    "deepspeed",
    "torchsnapshot-nightly",
    "torch_checkpointing",
    "nvidia-resiliency-ext",
    "isal",
    "aiofiles",
)


def main() -> int:
    """Runs the cases that are named, or all of them."""
    parser = argparse.ArgumentParser(
        prog="bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = [*CASES, _RANKS]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(known))
    parser.add_argument("--scale", type=Scale, choices=list(Scale), default=Scale.FULL)
    parser.add_argument(
        "--contenders", nargs="*", default=[], help=", ".join(CONTENDERS)
    )
    parser.add_argument("--dir", type=Path, default=Path.cwd())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="of a tree that came without its repository")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(known):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    is_tiny = arguments.scale is Scale.TINY
    on_gpu = {name for name, case in CASES.items() if case.needs_gpu}
    names = arguments.cases or [name for name in known if is_tiny or name not in on_gpu]
    if not (is_tiny or torch.cuda.is_available()) and on_gpu.intersection(names):
        parser.error(f"on a GPU, or tiny: {', '.join(on_gpu.intersection(names))}")
    for path in swept(arguments.dir):
        print(f"left by another run, removed: {path}", file=sys.stderr)
    about = machine(*_PACKAGES, commit=arguments.commit)
    about["file_system"] = file_system(arguments.dir)
    out = arguments.out
    if out is None and arguments.scale is Scale.FULL:
        # Apart: they are of other machines.
        out = results_file("gpupeers" if on_gpu.issuperset(names) else "suite", about)
    with nullcontext(sys.stdout) if out is None else out.open("a") as lines:
        run = Run(arguments.scale, arguments.dir, lines, arguments.contenders)
        run.tell(machine=about, scale=arguments.scale, cases=names)
        for name in names:
            start = perf_counter()
            if name == _RANKS:
                run.ranks()
            else:
                run.case(CASES[name])
            print(f"{name}: {perf_counter() - start:.0f} s", file=sys.stderr)
    for failure in run.failures:
        print(f"not measured: {failure}", file=sys.stderr)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
