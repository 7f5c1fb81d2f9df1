"""What the time of a target's row is spent on; by the target's metric.

Written by hand from profiles (`py-spy`, `perf`, `strace -c`), kept beside the figures.
"""

__all__ = ["REMARKS"]

_GAP = (
    "the longest is that of a process's first save: the garbage collector's first full run "
    "after all the imports falls into it, in whichever thread allocates next, and holds "
    "the interpreter's lock (258 ms of a gap of 268, told by `gc.callbacks`, in a script "
    "that is not in the repository). The gaps of later saves, about 20 ms, were not taken "
    "apart: more threads are at work than there are cores."
)

REMARKS: dict[str, str] = {
    "durable throughput": (
        "the disk, where it is slow: everybody waits for it, and no ratio can be larger "
        "than what the others take beyond it. Where it is fast, three things that "
        "overlap for all chunks but the first and the last: copying 8 MiB (1.6 ms of a "
        "core), its CRC-32 (0.8 ms) and the disk (3.3 ms at 2.4 GiB/s). On two cores "
        "copy and CRC take most of one, beside the kernel's part of each write. What "
        "is left over is the beginning (plan, first copy) and the end (fsync of the "
        "file, then six small ones of the commit, one after the other), in the table "
        "below."
    ),
    "durable throughput, small tensors": (
        "Python, tensor by tensor, in threads that share one interpreter. Planning comes "
        "before the first byte: a fifth to a third of the time, although the pickle of "
        "the save before is used again. Then each tensor costs two calls of CRC-32, two "
        "combinations and a seal."
    ),
    "stall in `save`": (
        "walking the containers and marking each tensor, about a microsecond each. The "
        "worst is one save of all; a full run of the garbage collector takes as long (see "
        "the loop gap), but nobody saw that it was one."
    ),
    "planning in the worker": (
        "a first plan: a full run of the garbage collector (see the loop gap), pickling "
        "and, as much again, laying out the file and cutting it into chunks. A later one: asking each tensor what the pickle would say of it, "
        "and making and freeing Python's wrappers of the storages."
    ),
    "durable throughput under a GIL-bound trainer": (
        "two cores, and the interpreter's lock: a trainer that never waits gives it away "
        "only when asked to, and the threads that copy, sum and write want it for a "
        "moment between two calls. A thread with `torch.save` takes more. It was not "
        "taken apart further."
    ),
    "loop gap, caller's loop": _GAP,
    "loop gap, engine's loop": _GAP,
    "step inflation, trainer on 1 of 2 cores": (
        "one core is the trainer's. A save takes a good part of the other, for two "
        "seconds; a thread with `torch.save` takes less of it, for five. All that a save "
        "costs stands in the column *lost*."
    ),
    "checksum cost, save": (
        "the CRC-32 of every byte, on cores that copy and write as well; it varies with "
        "the disk, which lets it hide or not."
    ),
    "commit beyond the data": (
        "six fsyncs, whatever the number of files: the manifest, its directory, the "
        "tag's, the next `latest`, and the root's twice (for the tag, and for `latest`). "
        "Raw has two."
    ),
    "stall, ring ≥ state": (
        "waiting for the copy, and some wake-ups of threads. The first save also takes "
        "the ring's memory from the system, page by page; a machine that gets its own "
        "memory from a host waits for that as well. A step that is shorter than this "
        "waits for the rest in `staged`. What DCP takes is one copy of the state."
    ),
    "restore in place": (
        "the copy from the ring to the tensors: direct reads need aligned memory, which "
        "tensors have not. It overlaps the reads, and takes memory bandwidth from them."
    ),
    "restore to CPU, fresh": (
        "page faults of fresh memory, which the raw read does not have (its memory was "
        "touched before), nor a mapped file (its pages are the kernel's, and are not "
        "cleared before they are read into)."
    ),
    "checksum cost, load": (
        "the same two cores that take the page faults; it varies with how fast this "
        "machine gets its memory."
    ),
}
