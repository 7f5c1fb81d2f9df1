"""How members find the hub: addresses, and the store that tells them."""

import asyncio
import threading

import pytest
import torch.distributed as dist

from aiockpt.errors import EngineStateError, PeerError
from aiockpt.ranks import addresses
from aiockpt.ranks.addresses import Address, address_of, hosts_to_try
from aiockpt.ranks.single import SingleRank
from aiockpt.ranks.store import StoreTalk
from aiockpt.ranks.torch_dist import TorchDistRanks, detect
from ranks.stars import joined, never, settled

ELSEWHERE = Address(("192.0.2.7", "127.0.0.1", "fe80::1", "::"), 1, "", "another")


@pytest.fixture
def group(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_on_the_same_machine_the_loopback_comes_first(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    address = address_of(1, "token", "127.0.0.1")
    assert hosts_to_try(address, None) == ["127.0.0.1", "::1", *address.hosts]


def test_elsewhere_the_loopback_is_another_machine(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    hosts = hosts_to_try(ELSEWHERE, "192.0.2.2")
    assert hosts == ["192.0.2.1", "192.0.2.2", "192.0.2.7"]
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert hosts_to_try(ELSEWHERE, None) == ["192.0.2.7"]
    monkeypatch.delenv("MASTER_ADDR")
    assert hosts_to_try(ELSEWHERE, "192.0.2.7") == ["192.0.2.7"]


def test_names_that_mean_nothing_here_are_passed_over(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    assert hosts_to_try(ELSEWHERE, "." * 300) == ["192.0.2.7"]


def test_rank_0_tells_where_others_can_reach_it(monkeypatch):
    ways = {"192.0.2.33": "10.0.0.1", "192.0.2.1": "10.0.0.2"}
    monkeypatch.setattr(
        addresses, "_way_to", lambda host: [ways[host]] if host in ways else []
    )
    monkeypatch.setattr(addresses.socket, "gethostname", lambda: "192.0.2.9")
    address = address_of(7, "token", "192.0.2.33")
    assert address.hosts == ("10.0.0.1", "10.0.0.2", "192.0.2.9")
    assert (address.port, address.token) == (7, "token")


def test_without_linux_a_machine_is_its_name(monkeypatch):
    monkeypatch.setattr(addresses.sys, "platform", "darwin")
    monkeypatch.setattr(addresses.socket, "gethostname", lambda: "192.0.2.9")
    assert address_of(7, "token", None).machine == "192.0.2.9"


def test_a_process_without_a_job_is_a_single_rank(group):
    assert isinstance(detect("test", 30), SingleRank)
    dist.destroy_process_group()
    assert isinstance(detect("test", 30), SingleRank)


def test_the_store_waits_for_a_key_that_comes_later(group):
    talk = StoreTalk()
    assert talk.host is None
    later = threading.Timer(0.05, talk.set, ["key", b"value"])
    later.start()
    assert talk.get("key", 30) == b"value"
    later.join()


def test_the_store_waits_no_longer_than_it_may(group):
    with pytest.raises(TimeoutError, match="in time"):
        StoreTalk().get("key", 0.02)
    talk = StoreTalk()
    talk.stop()
    with pytest.raises(TimeoutError, match="nobody waits"):
        talk.get("key", 30)


def test_a_store_that_breaks_is_told_as_an_os_error(group):
    class Broken:
        def check(self, keys):
            raise dist.DistStoreError("gone")

        def set(self, key, value):
            raise dist.DistStoreError("gone")

    talk = StoreTalk()
    talk._store = Broken()
    with pytest.raises(ConnectionError, match="gone"):
        talk.get("key", 30)
    with pytest.raises(ConnectionError, match="gone"):
        talk.set("key", b"")


async def test_ranks_of_a_group_that_was_destroyed_say_so(group):
    ranks = TorchDistRanks("test", timeout_s=30)
    dist.destroy_process_group()
    with pytest.raises(EngineStateError, match="has been shut down"):
        await ranks.consult("t", b"", never)
    await ranks.close()


@pytest.fixture
def rank_of_2(monkeypatch):
    """Makes ranks of a job of two, in one process."""

    def make(rank: int, name: str = "test", timeout_s: float = 30) -> TorchDistRanks:
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        return TorchDistRanks(name, timeout_s=timeout_s)

    return make


async def decided(a, b) -> list[bytes]:
    return await asyncio.gather(
        a.consult("t", b"0", joined), b.consult("t", b"1", never)
    )


async def test_each_use_of_a_name_has_a_hub_of_its_own(group, rank_of_2, monkeypatch):
    # One process stands for two, so each has its own count.
    for number in range(1, 4):
        a, b = rank_of_2(0, "own"), rank_of_2(1, "own")
        a._door._key = b._door._key = f"aiockpt/own/{number}"
        assert await decided(a, b) == [b"0|1"] * 2
        await a.close()
        await b.close()


async def test_only_ranks_that_connect_are_counted(group, rank_of_2):
    idle = rank_of_2(0, "counted")
    await idle.close()
    ranks = rank_of_2(0, "counted")
    call = asyncio.ensure_future(ranks.consult("t", b"", never))
    await settled(lambda: ranks._link)
    assert ranks._door._key == "aiockpt/counted/1"
    call.cancel()
    await asyncio.wait([call])
    await ranks.close()


async def test_closing_ends_the_wait_for_an_address(group, rank_of_2):
    ranks = rank_of_2(1, "wait")
    call = asyncio.ensure_future(ranks.consult("t", b"", never))
    await settled(lambda: ranks._door._key)
    await ranks.close()
    with pytest.raises(EngineStateError):
        await call


async def test_cancelling_ends_the_wait_and_another_try_is_the_same_use(
    group, rank_of_2
):
    a, b = rank_of_2(0, "again"), rank_of_2(1, "again")
    b._door._key = "aiockpt/again/1"
    call = asyncio.ensure_future(b.consult("t", b"1", never))
    await settled(lambda: b._patience)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await decided(a, b) == [b"0|1"] * 2
    await a.close()
    await b.close()


async def test_what_is_no_address_is_refused(group, rank_of_2):
    ranks = rank_of_2(1, "junk")
    ranks._door._key = "junk"
    StoreTalk().set("junk", b'{"hosts": 1}')
    with pytest.raises(PeerError, match="holds no address"):
        await ranks.consult("t", b"", never)
    await ranks.close()


async def test_addresses_are_tried_in_their_order_and_all_are_told(
    group, rank_of_2, monkeypatch
):
    hosts = ["127.0.0.2", "127.0.0.3"]
    monkeypatch.setattr("aiockpt.ranks.torch_dist.hosts_to_try", lambda *_: hosts)
    monkeypatch.setattr("aiockpt.ranks.torch_dist._DIAL_S", 0.2)
    ranks = rank_of_2(1, "order")
    ranks._door._key = "order"
    StoreTalk().set("order", b'{"hosts":[],"port":1,"token":"","machine":""}')
    with pytest.raises(PeerError, match=r"port 1 \(127.0.0.2: .*; 127.0.0.3: "):
        await ranks.consult("t", b"", never)
    await ranks.close()
