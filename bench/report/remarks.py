"""What the time of a target's row is spent on; by the target's metric.

Written by hand from profiles (`py-spy`, `perf`, `strace -c`), kept beside the figures.
"""

__all__ = ["REMARKS"]

REMARKS: dict[str, str] = {
    "durable throughput": (
        "three things that overlap for all chunks but the first and the last: copying "
        "8 MiB (1.6 ms of a core), its CRC-32 (0.8 ms) and the disk (3.3 ms at "
        "2.4 GiB/s). On two cores copy and CRC take most of one, beside the kernel's "
        "part of each write. What is left over is the beginning (plan, first copy) and "
        "the end (fsync of the file, then six small ones of the commit), in the table "
        "below."
    ),
    "durable throughput, small tensors": (
        "Python, tensor by tensor, in threads that share one interpreter. Planning comes "
        "before the first byte: half of it is pickling (torch's arguments of each "
        "tensor), the rest laying out records and cutting them into chunks, which is "
        "kept where the sizes are those of the save before. Then each tensor costs two "
        "calls of CRC-32, two combinations and a seal."
    ),
    "planning in the worker": (
        "pickling (torch's arguments of each tensor, one by one), more than half of it "
        "for the first save and nearly all later, when layout and chunks are kept."
    ),
    "commit beyond the data": (
        "six fsyncs, whatever the number of files: the manifest, its directory, the "
        "tag's, the next `latest`, and the root's twice (for the tag, and for `latest`). "
        "Raw has two."
    ),
    "stall, ring ≥ state": (
        "waiting for the copy. The first save also takes the ring's memory from the "
        "system, page by page; a machine that gets its own memory from a host waits for "
        "that as well. A step that is shorter than this waits for the rest in `staged`."
    ),
    "restore in place": (
        "the copy from the ring to the tensors: direct reads need aligned memory, which "
        "tensors have not. It overlaps the reads, and takes memory bandwidth from them."
    ),
    "restore to CPU, fresh": (
        "page faults of fresh memory, which the raw read does not have: its memory was "
        "touched before."
    ),
}
