"""Who is compared: one class each, all with the four functions of `base.Contender`."""

__all__ = ["CONTENDERS", "ELSEWHERE"]

from bench.contenders import (
    dcp,
    nvrx_files,
    ours,
    raw,
    safetensors_files,
    torch_checkpointing_files,
    torch_files,
    torchsnapshot_files,
)
from bench.contenders.base import Contender

CONTENDERS: dict[str, type[Contender]] = {
    each.name: each
    for each in (
        raw.Writing,
        raw.WritingAtOnce,
        raw.Fresh,
        raw.Copying,
        ours.OurEngine,
        ours.OurSyncEngine,
        ours.Prepared,
        ours.Unverified,
        ours.Unsummed,
        torch_files.Synced,
        torch_files.Plain,
        torch_files.Mmapped,
        torch_files.Unsummed,
        torch_files.InThread,
        torch_files.Awaited,
        torch_files.Lightning,
        safetensors_files.Synced,
        safetensors_files.Plain,
        dcp.Synchronous,
        dcp.InThread,
        dcp.InProcess,
        dcp.Staged,
        dcp.Pinned,
        torchsnapshot_files.Synchronous,
        torchsnapshot_files.InBackground,
        torch_checkpointing_files.Managed,
        nvrx_files.Queued,
    )
}

# Listed by the report with the reason; nothing here is measured on a CPU.
ELSEWHERE = {
    "DeepSpeed Fast and Decoupled engines": (
        "measured by `bench/deepspeed_saves.py`, in a DeepSpeed job (needs libaio)"
    ),
    "DataStates-LLM": "needs a GPU: its engine is CUDA only",
    "pinned copies, device to host": "needs a GPU",
}
