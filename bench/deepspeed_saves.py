"""What checkpoints cost a DeepSpeed job (ZeRO-3), by checkpoint engine.

    python -m bench.deepspeed_saves [--mib 128] [--repeats 15] [--steps 8] [--ranks 2]
                                    [--dir DIR] [--only NAME ...] [--out FILE]

Each contender trains the same model in a job of its own. Told of each: the time inside
`save_checkpoint`, and the time that the steps after it take beyond as many plain ones
before it. Durability is equal: what an engine does not sync is synced here, in the
measured time, where it says that it is done; and it is told how many of the saves were
durable when the measured steps ended (give more steps where not all were). After each
save the files are loaded and compared, untimed. Appends JSON lines to FILE, by default
a new one in `bench/results/`.

DeepSpeed's Fast and Decoupled engines need libaio and, on CPU, some help (below). One
that does not run is listed with the reason.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bench.measuring import MIB, figure, machine, results_file
from bench.scratch import scratch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

WIDTH = 1024
# Per parameter: the weight in single precision, and two moments.
BYTES_PER_WEIGHT = 12
# Of one contender's job; at the default size it takes two or three minutes.
_TIMEOUT_S = 1200

_WRITER = {
    "io_buffer_size": 64 * MIB,
    "io_buffer_double": True,
    "show_statistics": False,
    "data_parallel": "replica",
}
CONTENDERS: dict[str, dict[str, Any]] = {
    "torch": {},
    "fast": {"checkpoint": {"writer": {**_WRITER, "type": "fast", "decoupled": False}}},
    "decoupled": {
        "checkpoint": {"writer": {**_WRITER, "type": "fast", "decoupled": True}}
    },
    "decoupled-python": {
        "checkpoint": {"writer": {**_WRITER, "type": "python", "decoupled": True}}
    },
    "aiockpt": {"aiockpt": {"host_cache_size": 1.0, "parser_threads": 2}},
}
# What the launcher of DeepSpeed sets, page-locked memory without a GPU, and a load that
# trusts its own files.
_HELP = {
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "DS_PIN_MEMORY_BACKEND": "native",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
}


def main() -> None:
    """Runs every contender in a job of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=128, help="optimizer state, in all")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8, help="before and after a save")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dir", type=Path, default=Path.cwd())
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--contender", choices=list(CONTENDERS))
    arguments = parser.parse_args()
    if arguments.contender is not None:
        train(arguments)
        return
    about = machine("deepspeed")
    out = arguments.out or results_file("deepspeed", about)
    tell(out, {"machine": about, "case": vars(arguments)})
    for name in arguments.only:
        with scratch(arguments.dir) as directory:
            for line in run(name, arguments, directory):
                tell(out, {"contender": name, **line})
                if name == "aiockpt" and "does_not_run" in line:
                    sys.exit("aiockpt does not run")


def tell(path: Path, line: dict[str, object]) -> None:
    """Prints a line, and keeps it."""
    text = json.dumps(line, default=str)
    print(text, flush=True)
    with path.open("a", encoding="utf-8") as out:
        out.write(f"{text}\n")


def run(
    name: str, arguments: argparse.Namespace, directory: Path
) -> list[dict[str, object]]:
    """What the job of one contender tells."""
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={arguments.ranks}", __file__, "--contender", name]
    launcher += ["--mib", str(arguments.mib), "--repeats", str(arguments.repeats)]
    launcher += ["--steps", str(arguments.steps)]
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    job = subprocess.Popen(
        [sys.executable, *launcher, "--dir", f"{directory}"],
        env={"OMP_NUM_THREADS": "1", **os.environ, **_HELP, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = job.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        # The launcher ends its ranks when it is told to end; killed, it could not.
        job.terminate()
        job.communicate()
        return [{"does_not_run": f"not done after {_TIMEOUT_S} s"}]
    told = [line[5:] for line in output.splitlines() if line.startswith("told ")]
    if job.returncode == 0 and told:
        return [json.loads(line) for line in told]
    named = [line for line in errors.splitlines() if "Error" in line]
    return [{"does_not_run": named[0][-300:] if named else errors[-300:]}]


class _Bytes:
    """The extension that casts tensors to bytes, which there is for GPUs only."""

    def load(self) -> "_Bytes":
        return self

    def cast_to_byte_tensor(self, tensors: Any) -> Any:
        if isinstance(tensors, torch.Tensor):
            return tensors.reshape(-1).view(torch.uint8)
        return [each.reshape(-1).view(torch.uint8) for each in tensors]


def help_fast_writer() -> None:
    """Also in the process that a decoupled engine starts, which imports this file."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        from deepspeed.io import fast_file_writer

        fast_file_writer.UtilsBuilder = _Bytes


class Job:
    """One rank: a model, its engine, and a clock."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import deepspeed

        from aiockpt.integrations.deepspeed import install

        install()
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
        self.name = arguments.contender
        self.root = f"{arguments.dir}/saves"
        self.rank = torch.distributed.get_rank()
        num_layers = max(1, arguments.mib * MIB // (BYTES_PER_WEIGHT * WIDTH * WIDTH))
        layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)]
        model = torch.nn.Sequential(*layers)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "zero_optimization": {"stage": 3},
            "steps_per_print": 1 << 30,
            **CONTENDERS[self.name],
        }
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )
        self.saved: list[str] = []
        if self.name != "aiockpt":
            self._note_paths()

    def _note_paths(self) -> None:
        save = self.engine.checkpoint_engine.save

        def noting_save(state_dict: object, path: str) -> object:
            self.saved.append(path)
            return save(state_dict, path)

        self.engine.checkpoint_engine.save = noting_save

    def step(self) -> float:
        """Seconds of one step; all ranks begin together."""
        data = torch.ones(2, WIDTH, device=self.engine.device)
        torch.distributed.barrier()
        start = perf_counter()
        self.engine.backward(self.engine(data).square().mean())
        self.engine.step()
        if not self.engine.checkpoint_engine.is_decoupled():
            return perf_counter() - start
        self._sync()
        return perf_counter() - start

    def save(self, tag: str) -> float:
        """Seconds inside `save_checkpoint`, with what makes its files durable."""
        torch.distributed.barrier()
        start = perf_counter()
        self.engine.save_checkpoint(self.root, tag=tag)
        if not self.engine.checkpoint_engine.is_decoupled():
            self._sync()
        return perf_counter() - start

    def _sync(self) -> None:
        """Makes durable what DeepSpeed's engines leave to the page cache.

        A decoupled one has written it when the first step has committed it.
        """
        for path in self.saved:
            for name in (path, os.path.dirname(path)):  # noqa: PTH120
                descriptor = os.open(name, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        self.saved.clear()

    def is_durable(self, tag: str) -> bool:
        """Whether nothing is left to be done for a save."""
        if self.name != "aiockpt":
            return not self.saved
        return Path(self.root, tag, ".aiockpt", "manifest.json").exists()

    def drain(self) -> None:
        """Everything is durable."""
        if self.name == "aiockpt":
            self.engine.checkpoint_engine.drain()
        self._sync()

    def state(self) -> list[torch.Tensor]:
        """A copy of this rank's weights in single precision."""
        return [
            each.detach().clone()
            for each in self.engine.optimizer.fp32_partitioned_groups_flat
        ]

    def check(self, tag: str, expected: list[torch.Tensor]) -> None:
        """The file of this rank holds what the weights were."""
        name = f"zero_pp_rank_{self.rank}_mp_rank_00_optim_states.pt"
        found = torch.load(f"{self.root}/{tag}/{name}", weights_only=False)
        flat = torch.cat(found["optimizer_state_dict"]["fp32_flat_groups"])
        assert torch.equal(flat, torch.cat(expected)), f"{tag} is not what was saved"


def train(arguments: argparse.Namespace) -> None:
    """The job of one contender; rank 0 tells the figures."""
    job = Job(arguments)
    for _ in range(2):
        job.step()
    figures: dict[str, list[float]] = {"save": [], "steps after": [], "is durable": []}
    all_plain_s: list[float] = []
    for number in range(arguments.repeats + 1):
        tag = f"save-{number}"
        # Measured each time: the machine is not always the same.
        plain_s = [job.step() for _ in range(arguments.steps)]
        expected = job.state()
        save_s = job.save(tag)
        steps_s = [job.step() for _ in range(arguments.steps)]
        is_durable = job.is_durable(tag)
        job.drain()
        job.check(tag, expected)
        torch.distributed.barrier()
        if job.rank == 0:
            shutil.rmtree(f"{job.root}/{tag}")
        # The first warms the engine up.
        if number > 0:
            all_plain_s += plain_s
            figures["save"].append(save_s)
            figures["steps after"].append(sum(steps_s) - sum(plain_s))
            figures["is durable"].append(is_durable)
    if job.rank == 0:
        figures["plain step"] = all_plain_s
        pairs = zip(figures["save"], figures["steps after"], strict=True)
        figures["save and steps after"] = [save + after for save, after in pairs]
        for name, values in figures.items():
            unit = "yes or no" if name == "is durable" else "s"
            print(f"told {json.dumps(figure(name, values, unit))}", flush=True)
    job.engine.destroy()
    torch.distributed.destroy_process_group()


if __name__ in {"__main__", "__mp_main__"} and "LOCAL_RANK" in os.environ:
    help_fast_writer()

if __name__ == "__main__":
    main()
