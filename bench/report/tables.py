"""Tables of results: a row for each contender, ratios repeat by repeat."""

__all__ = ["SECTIONS", "Column", "Section", "table"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.contenders import CONTENDERS
from bench.contenders.ours import OurEngine, OurSyncEngine
from bench.contenders.raw import Writing
from bench.report.results import CellResults, Spread
from bench.workloads import GIB, MIB

Figure = Callable[[CellResults, str], Spread | None]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        head: With the unit.
        figure: Of a cell and a contender.
        digits: After the point.
    """

    head: str
    figure: Figure
    digits: int = 2


@dataclass(frozen=True)
class Section:
    """How a case is shown.

    Attributes:
        case: Its name.
        title: A heading.
        text: What is measured, and how to read it.
        columns: Of its tables.
        plotted: The column that is drawn as bars; none where lines are, or nothing.
    """

    case: str
    title: str
    text: str
    columns: Sequence[Column]
    plotted: Column | None = None


def _own(key: str, scale: float = 1.0) -> Figure:
    return lambda cell, name: cell.spread(name, key, scale=scale)


def _speed(key: str) -> Figure:
    return lambda cell, name: cell.of(name, lambda row: cell.nbytes / GIB / row[key])


def _of_raw(key: str) -> Figure:
    return lambda cell, name: cell.ratio(cell.raw(key), name, key)


def _against_ours(key: str) -> Figure:
    def figure(cell: CellResults, name: str) -> Spread | None:
        has_engine = OurEngine.name in cell.measured
        ours = OurEngine.name if has_engine else OurSyncEngine.name
        return cell.ratio(name, ours, key)

    return figure


def _first(key: str, scale: float) -> Figure:
    def figure(cell: CellResults, name: str) -> Spread | None:
        first = cell.first(name, key)
        return None if first is None else Spread([scale * first])

    return figure


def table(cell: CellResults, columns: Sequence[Column]) -> str:
    """A table in Markdown; columns that nobody has a figure for are left out."""
    names = [name for name in CONTENDERS if name in cell.measured]
    shown = [column for column in columns if any(column.figure(cell, n) for n in names)]
    lines = [
        "| | " + " | ".join(column.head for column in shown) + " |",
        "|---|" + "---:|" * len(shown),
    ]
    for name in names:
        label = f"**{name}**" if name.startswith("aiockpt") else name
        cells = [
            spread.text(column.digits) if (spread := column.figure(cell, name)) else "–"
            for column in shown
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_DURABLE = Column("durable GiB/s", _speed("durable_s"))
_SAVED = [
    _DURABLE,
    Column("of raw", _of_raw("durable_s")),
    Column("time / aiockpt's", _against_ours("durable_s")),
    Column("inside the save call, ms", _own("save_s", 1e3), 1),
    Column("extra memory, MiB", _own("extra_rss_bytes", 1 / MIB), 0),
    Column("in helper processes, MiB", _own("children_rss_bytes", 1 / MIB), 0),
]
_LOAD_S = Column("seconds", _own("seconds"))
_LOADED = [
    _LOAD_S,
    Column("speed of raw", _of_raw("seconds")),
    Column("time / aiockpt's", _against_ours("seconds")),
    Column("read from the disk, MiB", _own("read_bytes", 1 / MIB), 1),
    Column("extra memory, MiB", _own("extra_rss_bytes", 1 / MIB), 0),
]
_STALL = Column("stall, ms", _own("stall_s", 1e3))
_STALLED = [
    _STALL,
    Column("of it in save, ms", _own("save_s", 1e3)),
    Column("first stall, ms", _first("stall_s", 1e3)),
    Column("first in save, ms", _first("save_s", 1e3)),
    Column("planning in a worker, ms", _own("plan_s", 1e3)),
    Column("first planning, ms", _first("plan_s", 1e3)),
    Column("making the tag before, ms", _own("create_s", 1e3)),
    Column("first making, ms", _first("create_s", 1e3)),
    Column("made ready before step 1, ms", _first("begin_s", 1e3), 1),
    Column("durable after, s", _own("durable_s")),
    Column("extra memory, MiB", _own("extra_rss_bytes", 1 / MIB), 0),
]
_P50 = Column("median step, ×", _own("p50"))
_CALLER = Column("caller's loop, longest, ms", _own("caller_max_s", 1e3), 1)
_COMMIT = Column("commit, ms", _own("commit_s", 1e3))

SECTIONS = [
    Section(
        "throughput",
        "Durable throughput",
        "From the call of save until data, metadata and directories are on stable "
        "storage. *Raw* writes as many bytes with `O_DIRECT` from 512 MiB of memory, one "
        "8 MiB write after the other or four at a time, and syncs: a yardstick, and no "
        "upper limit on every disk. Ratios are to whichever was faster in the cell. Who is not here "
        "is in *The field*: on a state of 4 GiB each would take minutes more.",
        _SAVED,
        _DURABLE,
    ),
    Section(
        "small",
        "Many small tensors",
        "The same, in small tensors. DCP is not here: with a tenth of the tensors it "
        "takes ten seconds and more (see *Growth*); so does a load of torchsnapshot; "
        "torch_checkpointing then has too many open files.",
        _SAVED,
        _DURABLE,
    ),
    Section(
        "field",
        "The field",
        "Everyone who runs on this machine, on a smaller state. Rows without *fsync* "
        "are not durable and stand here to be seen; *memcpy* is a copy in memory.",
        _SAVED,
        _DURABLE,
    ),
    Section(
        "stall",
        "Stall",
        "How long the trainer is held: inside the save call, and, after a step in "
        "between, waiting for its tensors to be free again. The step is a pause of a "
        "second in which the trainer uses no processor, as with a GPU; steps that do "
        "are further down. The state in nested dicts also has the number of its step, "
        "another one with each save (up to commit ca6f892 it had none). *First* is the "
        "first save of a process. DCP's stager copies "
        "into fresh memory before `async_save` returns, unless one is given that is "
        "kept and copies in a thread; torch_checkpointing's has been warmed up. With a "
        "ring smaller than the state, staging goes at the pace of the disk, and a step "
        "that is shorter than the write waits for the rest. *Making the tag* comes "
        "before the save and is no part of the stall: a directory for everyone, for "
        "aiockpt a lock as well, and the first time what a crash may have left. *Made "
        "ready* is what a program may do before its first step: aiockpt's `preflight`, "
        "which takes the ring's memory and plans the state, so that the first planning "
        "after it is a second one; torch_checkpointing's warm-up. The synchronous ones "
        "are in *The field*: their stall is the save. Only aiockpt has a ring: beside "
        "the small one stands DCP's default. torch_checkpointing is not in the cell of "
        "10 000 tensors: it has too many open files.",
        _STALLED,
        _STALL,
    ),
    Section(
        "steps",
        "Training steps during a save",
        "A small model under AdamW trains while its state and 1 GiB more is saved. "
        "Steps beside the save against steps without one. *Lost* is all that one save "
        "costs: the call and what steps take longer until it is durable. Who saves "
        "before the call returns has no step beside it; helpers in processes are only "
        "beside the trainer that leaves them a core.",
        [
            _P50,
            Column("95th percentile, ×", _own("p95")),
            Column("longest step, ms", _own("max_step_s", 1e3), 1),
            Column("plain step, ms", _own("plain_step_s", 1e3), 1),
            Column("inside the save call, ms", _own("save_s", 1e3), 1),
            Column("lost, s", _own("lost_s")),
            Column("durable after, s", _own("durable_s")),
        ],
        _P50,
    ),
    Section(
        "gil",
        "Beside pure Python",
        "The main thread runs pure Python without a pause, and so holds the "
        "interpreter's lock whenever it can. Raw is written in a process that does "
        "the same, but inside the call. Of those that save in a thread of the same "
        "interpreter one is here; *Training steps* has more.",
        [
            _DURABLE,
            Column("of raw", _of_raw("durable_s")),
            Column("trainer's speed, of undisturbed", _own("trainer_speed")),
        ],
        _DURABLE,
    ),
    Section(
        "gap",
        "Event loop",
        "The longest time between two beats of a 1 ms heartbeat. Calls that are not "
        "said to be in a thread are made on the loop. With `asyncio.to_thread` nothing "
        "is copied: the program must not train until it returns. The large cell has "
        "the target and one other; all are in the small one, to spare time.",
        [
            Column("idle, p99, ms", _own("idle_p99_s", 1e3)),
            Column("idle, longest, ms", _own("idle_max_s", 1e3)),
            Column("caller's loop, p99, ms", _own("caller_p99_s", 1e3)),
            _CALLER,
            Column("engine's loop, p99, ms", _own("engine_p99_s", 1e3)),
            Column("engine's loop, longest, ms", _own("engine_max_s", 1e3), 1),
        ],
        _CALLER,
    ),
    Section(
        "load",
        "Load",
        "From the call until every byte can be used, cold cache, a new process each "
        "time. Whoever maps the file is charged for touching every page. aiockpt "
        "verifies checksums; the others do not (files of `torch.save` have them). "
        "*Right after the save* the page cache is as the save has left it: aiockpt and "
        "raw write around it (up to commit a5bea56 files of this case had been read "
        "before, as now in the next). *From the page cache*, all have been read before. "
        "A mapped file's pages are shared with the cache: whoever writes to such a "
        "tensor pays for a copy then, which is not counted here. Before the caches are "
        "dropped everybody loads something tiny. torchsnapshot is in *Load in place, "
        "the field* only: it loads into tensors that exist.",
        _LOADED,
        _LOAD_S,
    ),
    Section(
        "into",
        "Load in place",
        "Into tensors that exist, whose bytes are all wrong before. Those that save to "
        "directories follow, on a smaller state.",
        _LOADED,
        _LOAD_S,
    ),
    Section(
        "into_all",
        "Load in place, the field",
        "Those that save to a directory of files, on a smaller state.",
        _LOADED,
        _LOAD_S,
    ),
    Section(
        "gpu_save",
        "Stall of a trainer on a GPU",
        "As under *Stall*: a step of a second, then the wait for the tensors. Extra "
        "memory on the device is what torch's allocator was asked for. Pinned memory "
        "may not count as resident.",
        [
            *_STALLED,
            Column("on the device, MiB", _own("extra_device_bytes", 1 / MIB), 0),
            Column("in helper processes, MiB", _own("children_rss_bytes", 1 / MIB), 0),
        ],
        _STALL,
    ),
    Section(
        "gpu_load",
        "Load to a GPU",
        "From the call until the device has all bytes; else as under *Load*. Raw reads "
        "to the host only.",
        _LOADED,
        _LOAD_S,
    ),
    Section(
        "gpu_into",
        "Load in place, on a GPU",
        "Into tensors that exist there. Raw reads to the host only.",
        _LOADED,
        _LOAD_S,
    ),
    Section(
        "partial",
        "Load one tensor",
        "Of a file of 300. torch_checkpointing is not here: it loads whole items.",
        _LOADED,
    ),
    Section(
        "checksum",
        "What checksums cost a save",
        "The engine has no switch for this; its checksum function is cut out. No other "
        "is asked: *torch.save without CRC-32* is in *The field*.",
        _SAVED[:3],
    ),
    Section(
        "commit",
        "What a commit costs",
        "Files of 4 KiB, from when all are written and synced to the published tag. Raw "
        "is one file written, synced and renamed, and its directory synced. "
        "`torch.save` and safetensors have no commit, only the whole: files are "
        "written, then synced, one by one. The others save directories, not files.",
        [
            _COMMIT,
            Column("of raw", lambda c, n: c.ratio(n, Writing.name, "commit_s")),
            Column("with the writes, ms", _own("total_s", 1000.0)),
        ],
    ),
]
