"""One rank of a real job: does what it is told on standard input, a line each.

Started as `worker.py init_method rank world_size timeout_s`.
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


if __name__ == "__main__":
    dist.init_process_group(
        "gloo",
        init_method=sys.argv[1],
        rank=int(sys.argv[2]),
        world_size=int(sys.argv[3]),
    )
    asyncio.run(main(float(sys.argv[4])))
