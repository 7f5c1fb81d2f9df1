"""What the time of a target's row is spent on, what was tried, and what remains.

Written by hand, by the target's metric. Figures that stand in no result file come from
profiles of single runs (`py-spy`, `perf`, `strace -c`, `gc.callbacks`) whose scripts are
not kept; the design notes say of which commit.
"""

__all__ = ["REMARKS", "Remark"]

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Remark:
    """What is known of a row.

    Attributes:
        spent: Where the time or memory goes.
        tried: What was changed, or tried and left.
        remains: What could still be done; or that nothing is known.
    """

    spent: str
    tried: str
    remains: str


_GAP = Remark(
    spent=(
        "in a process's first save: the garbage collector's first full run after all the "
        "imports, in whichever thread allocates next, with the interpreter's lock held. In "
        "later saves: waiting for that lock (it changes hands every 5 ms) and for a core; "
        "more threads are at work than there are cores."
    ),
    tried=(
        "workers run at a lower priority (at equal priority the 99th percentile was twice "
        "as long); copies of less than 128 KiB keep the lock, which costs less "
        "than asking for it back; planning leaves few objects for the collector; "
        "`preflight` collects garbage once, before step 1."
    ),
    remains=(
        "without a preflight the collector's first run: not ours to forbid. In some "
        "runs later saves have gaps of 15 to 32 ms (those of cb21a32, and of "
        "2026-11-28), in others of 5 at most."
    ),
)
_STEPS = Remark(
    spent=(
        "the processor time of a save: copies, checksums, the kernel's part of each "
        "write. All that a save costs a trainer stands in the column *lost*."
    ),
    tried="direct writes, which cost the kernel a tenth of buffered ones; lower priority.",
    remains=(
        "the faster a save is, the denser: here 1 GiB takes a third of a second, in which "
        "both cores are taken, and the others' take one to three; all in all a save of "
        "theirs costs the trainer as much or more (*lost*). Nothing slows a save down for "
        "a trainer that needs all the cores."
    ),
)

REMARKS: dict[str, Remark] = {
    "durable throughput": Remark(
        spent=(
            "the disk: 4 GiB take 0.65 s of processor time, where both cores together have "
            "more than two. How fast this disk is depends on the memory it is written from: "
            "the raw loop, in turns over six pieces of memory in one process, took 1.0 to "
            "1.8 s, each piece always its own (so raw writes from 512 MiB here). Where a "
            "disk is slow, everybody waits for it, and no ratio can be larger than what the "
            "others take beyond it."
        ),
        tried=(
            "direct writes from several threads; room reserved beforehand; opening the file "
            "beside the first copies; one fsync a file, by its worker; chunks of 16 MiB, "
            "since 1ef6e38 (0.66 → 0.58 s of processor time, in the same time); summing "
            "what has just been copied, in one thread and in two (no gain)."
        ),
        remains=(
            "copies, sums and the disk share the memory's bandwidth. The beginning (plan, "
            "first copy) and the end (fsync of the file, then six small ones of the commit) "
            "are milliseconds, in the table below."
        ),
    ),
    "durable throughput, small tensors": Remark(
        spent=(
            "Python, tensor by tensor, in threads that share one interpreter. Planning "
            "comes before the first byte: a fifth to a third of the time. Then each tensor "
            "costs a copy, a call of CRC-32 and a seal: 8 to 9 ms for the 767 in a chunk."
        ),
        tried=(
            "pickling without a call of `persistent_id` for each object (later plans 580 → "
            "217 ms for 10 000 tensors on a busy machine); using a recent save's pickle "
            "again (244 → 125 ms), also where numbers in the state are others; looking at "
            "tensors column by column (100 000 tensors: 1 134 → 898 ms, likewise); summing "
            "a chunk of small pieces whole instead of combining their sums. A loop without "
            "calls for the copies, and another for the seals, changed nothing: the time is "
            "the memory's. Sums of less than 128 KiB keep the interpreter's lock (20 000 "
            "tensors of 53 KiB: 0.48 → 0.42 s)."
        ),
        remains=(
            "writing while the plan is still being made; summing many small tensors in "
            "one call of native code."
        ),
    ),
    "stall in `save`": Remark(
        spent="walking the containers, and marking each tensor with its version and place.",
        tried=(
            "containers are copied by their kind, tensors are only referred to; a tensor in "
            "a dict is noted without a call."
        ),
        remains=(
            "the worst is a process's first, which a full run of the garbage collector "
            "can fall into; after a preflight it does not."
        ),
    ),
    "planning in the worker": Remark(
        spent=(
            "a first plan: the collector's full run, pickling and, as much again, laying "
            "out the file and cutting it into chunks. A later one: asking each tensor what "
            "the pickle would say of it, and Python's wrappers of the storages."
        ),
        tried=(
            "as for small tensors. The first plan takes a fifth longer since then, and "
            "so does the second, which finds where the numbers are that change. "
            "It looks at all tensors once more in the end, so "
            "that what changed meanwhile stands in no later save: 11 ms, timed alone."
        ),
        remains="five objects a record of a first plan are still counted by the collector.",
    ),
    "durable throughput under a GIL-bound trainer": Remark(
        spent=(
            "the interpreter's lock: a trainer that never waits gives it away only when "
            "asked to, after up to 5 ms, and the threads that copy, sum and write want it "
            "for a moment between two calls: some seven times a chunk, so that a fast disk "
            "waits for the threads."
        ),
        tried=(
            "chunks of 16 MiB, since 1ef6e38, so that there are fewer such moments (2 GiB in "
            "300 tensors, four rounds in turns: 3.8 → 2.9 s; with 32 MiB 2.5 s, but small "
            "states then take longer); lower priority; copies and "
            "sums of less than 128 KiB that keep the lock (20 000 tensors of 53 KiB, 1 "
            "GiB, beside a thread of pure Python, three rounds in turns: a save 13.1 → "
            "3.3 s, a fresh load 8.6 → 5.6 s)."
        ),
        remains=(
            "two waits a tensor, for its copy and its sum: they need a call that does many "
            "without the lock, which no library here has, or a process of its own."
        ),
    ),
    "peak host memory": Remark(
        spent="the ring, and a few MiB of plan.",
        tried="chunks are leased, never copied again; a plan is dropped when all is staged.",
        remains="nothing.",
    ),
    "loop gap, caller's loop": _GAP,
    "loop gap, engine's loop": _GAP,
    "step inflation, trainer on 1 of 2 cores": _STEPS,
    "step inflation, trainer on 2 of 2 cores": _STEPS,
    "checksum cost, save": Remark(
        spent="the CRC-32 of every byte, on cores that copy and write as well.",
        tried=(
            "ISA-L's CRC-32; record sums combined to that of the file, so that no byte is "
            "summed twice."
        ),
        remains=(
            "it varies with the disk, which lets it hide or not: compare on a fast one. "
            "Summing right behind the copy, from the cache, gained nothing in the whole."
        ),
    ),
    "commit beyond the data": Remark(
        spent=(
            "six fsyncs, whatever the number of files: the manifest, its directory, the "
            "tag's, the next `latest`, and the root's twice (for the tag, and for "
            "`latest`). Raw has two."
        ),
        tried="files are synced by their workers before the commit.",
        remains="three of the six could go side by side.",
    ),
    "stall, ring ≥ state": Remark(
        spent=(
            "waiting for the copy, and some wake-ups of threads. The first save also takes "
            "the ring's memory from the system, page by page. A step that is shorter than "
            "this waits for the rest in `staged`."
        ),
        tried=(
            "`preflight` takes the ring's memory, for as much as the state needs, before "
            "step 1; opening the file does not hold up the copies."
        ),
        remains="without a preflight the first save pays for the memory; nothing hides that.",
    ),
    "restore in place": Remark(
        spent=(
            "memory bandwidth. Direct reads need aligned memory, which tensors have not; "
            "so bytes are read to the ring, summed, and copied to the tensors, while "
            "others are read. With blocks of 8 MiB, 4 GiB, medians of four, raw in turns: "
            "0.82 × raw, without sums 0.85, without copies 0.89, without both 0.96."
        ),
        tried=(
            "blocks of 2 MiB, four in a worker's turn, which stay in the processor's cache "
            "(4 GiB, in turns with one of 8 MiB, medians of eight: 1.59 → 1.36 s, and in "
            "another run 1.49 → 1.39); one such block a turn (no gain: handing it over "
            "takes as long); summing and copying piece by piece (slower); four to twelve "
            "readers (no difference)."
        ),
        remains=(
            "reading straight into tensors. The disk here wants addresses that are "
            "multiples of 512; one that takes any (as NVMe disks do) could be read so."
        ),
    ),
    "restore to CPU, fresh": Remark(
        spent=(
            "page faults of fresh memory, which the raw read does not have (its memory was "
            "touched before: *raw, fresh memory* has them), nor a mapped file (its pages "
            "are the kernel's, and are not cleared before they are read into)."
        ),
        tried=(
            "huge pages (2 GiB in turns, medians of ten: 1.01 s, with small ones 1.36 s; "
            "scattered pages also make this disk two to three times slower); memory shared "
            "by small tensors; twice as many readers (3.28 → 2.62 s for 2 GiB, from round "
            "to round 1.9 to 4.2 s); blocks of 2 MiB (no gain). Memory that begins with a "
            "huge page was faster (0.83 → 0.73 s, medians of forty), and was not kept: "
            "each tensor is then a mapping of its own, of which Linux allows 65 530."
        ),
        remains=(
            "this machine gets its memory from a host, at 0.5 to 2 GiB/s. With many small "
            "tensors, Python: 100 000 take 6 s, of which the garbage collector has 1.5 to "
            "2."
        ),
    ),
    "partial load": Remark(
        spent="the directory and the pickle of the file, then the tensor.",
        tried="read-ahead is off for small reads (it was 8 MiB here).",
        remains="nothing.",
    ),
    "checksum cost, load": Remark(
        spent="the same cores that take the page faults.",
        tried="one pass for records, headers and the whole file.",
        remains="it varies with how fast this machine gets its memory.",
    ),
}
