"""Saves: how soon they are durable, how long the trainer is held, what they take."""

__all__ = ["CASES", "measure"]

from collections.abc import Sequence
from time import perf_counter, sleep

from bench.cases.base import Case, Cell
from bench.contenders.base import Options
from bench.measuring import DeviceMemory, children_bytes
from bench.sessions import Bench
from bench.workloads import GIB, MIB, Scale, Workload

RAW = "raw O_DIRECT"
RAW_AT_ONCE = "raw O_DIRECT, 4 threads"
OURS = "aiockpt"
PREPARED = "aiockpt, after preflight"
TORCH = "torch.save + fsync"
SAFETENSORS = "safetensors + fsync"
DCP_THREAD = "DCP async_save, thread"
DCP_PROCESS = "DCP async_save, process"
DCP_STAGED = "DCP async_save, staged in a thread"
META = "torch_checkpointing + fsync"
LIGHTNING = "Lightning AsyncCheckpointIO + fsync"
SNAPSHOT = "torchsnapshot async_take + fsync"
MANY = "1 GiB in 20 000 tensors"


def measure(bench: Bench, tag: str) -> dict[str, float]:
    """One durable save, with a step of the trainer in between; then a look at it."""
    contender = bench.contender
    step_s = bench.settings.get("step_s", 0.0)
    bench.alter()
    start = perf_counter()
    contender.begin_training(bench.next_state())
    begin_s = perf_counter() - start
    state = bench.next_state()
    start = perf_counter()
    contender.open_tag(tag)
    create_s = perf_counter() - start
    bench.memory.mark()
    device_memory = DeviceMemory() if bench.workload.is_on_gpu else None
    begun = perf_counter()
    saving = contender.save(state, tag)
    saved = perf_counter()
    if step_s:
        sleep(step_s)
        stepped = perf_counter()
        saving.wait_staged()
        staged_s = perf_counter() - stepped
    else:
        staged_s = 0.0
    told = saving.wait_durable()
    durable_s = perf_counter() - begun
    extra_bytes, beside_bytes = bench.memory.extra_bytes(), children_bytes()
    if device_memory is not None:
        told["extra_device_bytes"] = device_memory.extra_bytes()
    bench.check(contender.load(tag, state))
    contender.delete(tag)
    return {
        "save_s": saved - begun,
        "staged_s": staged_s,
        "stall_s": saved - begun + staged_s,
        "durable_s": durable_s,
        "create_s": create_s,
        "begin_s": begin_s,
        "extra_rss_bytes": extra_bytes,
        "children_rss_bytes": beside_bytes,
        **told,
    }


def _throughput(scale: Scale) -> Sequence[Cell]:
    return [
        Cell(
            "4 GiB",
            Workload(scale.size(4 * GIB), scale.number(300)),
            (
                *(RAW, RAW_AT_ONCE, OURS),
                *(TORCH, SAFETENSORS, DCP_THREAD),
            ),
            scale.repeats(5),
        )
    ]


def _many_small(scale: Scale) -> Sequence[Cell]:
    num_tensors = scale.number(100_000)
    return [
        Cell(
            "1 GiB in tensors of 1 to 64 KiB",
            Workload(scale.size(1 * GIB), num_tensors, spread=64),
            (RAW, RAW_AT_ONCE, OURS, TORCH, SAFETENSORS),
            scale.repeats(5),
        )
    ]


def _field(scale: Scale) -> Sequence[Cell]:
    contenders = (
        "memcpy",
        RAW,
        RAW_AT_ONCE,
        OURS,
        "aiockpt.sync",
        TORCH,
        "torch.save",
        "torch.save without CRC-32 + fsync",
        "torch.save + fsync in a thread",
        SAFETENSORS,
        "safetensors",
        "DCP save",
        DCP_THREAD,
        DCP_PROCESS,
        DCP_STAGED,
        "torchsnapshot take + fsync",
        SNAPSHOT,
        META,
        LIGHTNING,
    )
    workload = Workload(scale.size(GIB // 2), scale.number(300))
    return [Cell("0.5 GiB", workload, contenders, scale.repeats(5))]


def _stall(scale: Scale) -> Sequence[Cell]:
    step = {"step_s": scale.seconds(1.0)}
    size = Workload(scale.size(2 * GIB), scale.number(300))
    # The others' stall is in the field's table: they copy before they return. With one
    # more process that keeps a copy, a machine of 24 GiB is out of memory.
    peers = (DCP_THREAD, DCP_STAGED, META)
    return [
        Cell(
            "2 GiB, ring larger than the state",
            size,
            (OURS, PREPARED, *peers),
            scale.repeats(5),
            options=Options(ring_gib=size.nbytes / GIB + 0.25),
            settings=step,
        ),
        Cell(
            "2 GiB, ring an eighth of the state",
            size,
            (OURS, DCP_THREAD),
            scale.repeats(5),
            options=Options(ring_gib=max(size.nbytes / GIB / 8, 8 / 1024)),
            settings=step,
        ),
        Cell(
            "10 000 tensors in nested dicts",
            Workload(scale.size(40 * MIB), scale.number(10_000), is_nested=True),
            (OURS, PREPARED, DCP_THREAD, DCP_STAGED, "torch.save + fsync in a thread"),
            scale.repeats(5),
            settings=step,
        ),
    ]


def _checksum(scale: Scale) -> Sequence[Cell]:
    contenders = (RAW, OURS, "aiockpt, checksums cut out")
    workload = Workload(scale.size(1 * GIB), scale.number(300))
    return [Cell("1 GiB", workload, contenders, scale.repeats(9))]


def _growth(scale: Scale) -> Sequence[Cell]:
    # 4 GiB is in the throughput case.
    sizes = (GIB // 4, 1 * GIB, 8 * GIB)
    counts = (10, 100, 1_000, 10_000, 100_000)
    return [
        *(
            Cell(
                f"size: {nbytes / GIB:g} GiB",
                Workload(scale.size(nbytes), scale.number(300)),
                # The others' way of growing shows below, in less time.
                (RAW, RAW_AT_ONCE, OURS)
                + ((TORCH, SAFETENSORS) if nbytes <= GIB else ()),
                scale.repeats(5),
                num_warm_ups=0 if nbytes > GIB else 1,
            )
            for nbytes in sizes
        ),
        *(
            Cell(
                f"tensors: {number}",
                Workload(scale.size(256 * MIB), scale.number(number)),
                (RAW, RAW_AT_ONCE, OURS, TORCH, SAFETENSORS)
                # A minute and more for each save with more tensors.
                + ((DCP_THREAD,) if number <= 10_000 else ()),  # noqa: PLR2004
                scale.repeats(5),
            )
            for number in counts
        ),
    ]


CASES = [
    Case("throughput", "How soon is a state durable?", _throughput, measure),
    Case("small", "How soon, in many small tensors?", _many_small, measure),
    Case("field", "How do all the others compare, small?", _field, measure),
    Case("stall", "How long is the trainer held?", _stall, measure),
    Case("checksum", "What do checksums cost a save?", _checksum, measure),
    Case("growth", "How does it grow with size and tensors?", _growth, measure),
]
