"""One rank of a real job: does what it is told on standard input, a line each.

Started as `worker.py store rank world_size timeout_s`. The store is the path of a file,
or `port:descriptor`: the port of rank 0, and its socket that listens there already.
"""

import asyncio
import json
import sys
from collections.abc import Sequence

import torch.distributed as dist

from aiockpt.errors import CheckpointError
from aiockpt.ranks.base import Ranks
from aiockpt.ranks.torch_dist import detect


async def joined(words: Sequence[bytes]) -> bytes:
    return b"|".join(words)


async def answer(ranks: Ranks, do: str, topic: str, group: list[int] | None) -> object:
    if do == "consult":
        word = str(ranks.rank).encode()
        return (await ranks.consult(topic, word, joined, group=group)).decode()
    if do == "object":
        error = await ranks.object(topic, OSError("disk full"), "write", group=group)
        return str(error)
    if do == "collectives":
        group = dist.distributed_c10d._get_default_group()
        return group._get_sequence_number_for_group()
    if do == "destroy":
        return dist.destroy_process_group()
    await ranks.close()
    return "closed"


def tell(said: object) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


async def main(timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    ranks = detect("test", timeout_s)
    tell(type(ranks).__name__)
    async for line in orders:
        try:
            tell(await answer(ranks, *json.loads(line)))
        except CheckpointError as error:
            tell([type(error).__name__, str(error), *vars(error).values()])
    await ranks.close()


def open_store(place: str, rank: int, world_size: int) -> dist.Store:
    if "/" in place:
        return dist.FileStore(place, world_size)
    port, descriptor = map(int, place.split(":"))
    own = {"master_listen_fd": descriptor} if rank == 0 else {}
    return dist.TCPStore("127.0.0.1", port, world_size, rank == 0, **own)


if __name__ == "__main__":
    rank, world_size = int(sys.argv[2]), int(sys.argv[3])
    store = open_store(sys.argv[1], rank, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    asyncio.run(main(float(sys.argv[4])))
