"""The hub's door: strangers, malformed frames, forks, descriptors."""

import asyncio
import contextlib
import logging
import os
import resource
import socket
from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.errors import PeerError
from aiockpt.ranks.forks import keep_from_children
from aiockpt.ranks.hub import Hub
from aiockpt.ranks.link import HubConnection, dial
from aiockpt.ranks.messages import (
    MAX_GREETING_BYTES,
    Goodbye,
    Hello,
    Join,
    Welcome,
    Withdrawal,
    Word,
    Words,
    framed,
)
from aiockpt.ranks.server import HubServer
from gates import turns
from ranks.stars import TOKEN, consult_all, never, settled, star

HELLO = Hello(TOKEN, 1, 3)


async def said_to(port: int, *data: bytes) -> bytes:
    """What the hub says to a stranger until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.writelines(data)
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.fixture
def shared_ports(monkeypatch) -> None:
    """Hubs listen on ports that `kept` can take as well."""
    create = partial(socket.create_server, reuse_port=True)
    monkeypatch.setattr(socket, "create_server", create)


@contextlib.contextmanager
def kept(port: int) -> Iterator[None]:
    """Nobody else gets the port when who listens there has ended."""
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        keeper.bind(("127.0.0.1", port))
        yield


def test_a_frame_is_its_length_and_the_message():
    frame = framed(Withdrawal(7))
    assert int.from_bytes(frame[:4]) == len(frame) - 4
    assert msgspec.msgpack.decode(frame[4:]) == {"type": "Withdrawal", "call": 7}


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\0",
        b"\0\0\0\x05junk!",
        (MAX_GREETING_BYTES + 1).to_bytes(4),
        framed(Join()),
        framed(Goodbye()),
        framed(Word(1, "t", b"", None)),
        framed(Welcome()),
        framed(Hello("not the job's", 1, 3)),
        framed(Hello("", 1, 3)),
        framed(Hello("öther", 1, 3)),
        framed(Hello(TOKEN, 1, 4)),
        framed(Hello(TOKEN, 3, 3)),
        framed(Hello(TOKEN, -1, 3)),
        framed(Hello(TOKEN, 2, 3)),
    ],
)
async def test_a_stranger_is_dropped_without_an_answer_and_the_job_goes_on(said):
    async with star(3) as job:
        # Rank 1 could still come.
        await consult_all(job.members[::2], "hello", [0, 2])
        assert await said_to(job.server.port, said) == b""
        assert await consult_all(job.members, "t") == [b"0|1|2"] * 3


@pytest.mark.parametrize(
    "said",
    [
        framed(HELLO),
        framed(Welcome()),
        b"\xff\xff\xff\xff",
        b"\0\0\0\x01\xc1",
        framed(Word(1, "t", b"", (0, 2))),
        framed(Word(1, "t", b"", None)) * 2,
    ],
)
async def test_a_member_that_says_nonsense_is_lost_and_the_others_go_on(said):
    async with star(3) as job:
        await consult_all(job.members[::2], "hello", [0, 2])
        hello = framed(HELLO) + framed(Join())
        assert await said_to(job.server.port, hello, said) == framed(Welcome())
        with pytest.raises(PeerError, match="rank 1 was lost"):
            await job.members[0].consult("u", b"", never)
        assert await consult_all(job.members[::2], "t", [0, 2]) == [b"0|2"] * 2


@given(st.lists(st.binary(max_size=64), max_size=4), st.booleans())
def test_no_bytes_break_the_hub(pieces, is_member):
    async def run() -> None:
        async with star(3) as job:
            begin = [framed(HELLO), framed(Join())] if is_member else []
            frames = [len(piece).to_bytes(4) + piece for piece in pieces]
            reader, writer = await asyncio.open_connection("127.0.0.1", job.server.port)
            writer.writelines([*begin, *pieces, *frames])
            writer.write_eof()
            await asyncio.wait([asyncio.ensure_future(reader.read())])
            writer.close()
            group = [0, 2]
            assert await consult_all(job.members[::2], "t", group) == [b"0|2"] * 2

    asyncio.run(run())


async def test_frames_may_come_in_any_pieces():
    async with star(3) as job:
        reader, writer = await asyncio.open_connection("127.0.0.1", job.server.port)
        said = framed(HELLO) + framed(Join()) + framed(Word(1, "t", b"one", (1,)))
        for i in range(len(said)):
            writer.write(said[i : i + 1])
            await asyncio.sleep(0)
        answer = await reader.readexactly(len(framed(Welcome())) + 4)
        assert answer.startswith(framed(Welcome()))
        writer.close()


async def test_a_connection_that_says_nothing_is_dropped(monkeypatch):
    monkeypatch.setattr("aiockpt.ranks.server._GREETING_S", 0.01)
    async with star(3) as job:
        assert await said_to(job.server.port) == b""
        assert await consult_all(job.members, "t") == [b"0|1|2"] * 3


async def test_a_member_may_take_its_time_once_it_has_said_who_it_is(monkeypatch):
    monkeypatch.setattr("aiockpt.ranks.server._GREETING_S", 0.01)
    async with star(3) as job:
        reader, writer = await asyncio.open_connection("127.0.0.1", job.server.port)
        writer.write(framed(HELLO))
        await reader.readexactly(len(framed(Welcome())))
        # One that came later has been dropped.
        assert await said_to(job.server.port) == b""
        writer.write(framed(Join()) + framed(Word(1, "t", b"one", (1,))))
        answer = await reader.readexactly(len(framed(Words(1, [b"one"]))))
        assert answer == framed(Words(1, [b"one"]))
        writer.close()


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-x\r\n", framed(Join()), framed(Goodbye()), b""]
)
async def test_what_is_not_the_hub_is_refused(said):
    async def answer(reader, writer):
        writer.write(said)
        writer.write_eof()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, reuse_port=True)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ConnectionRefusedError, match="not the hub"):
        await dial("127.0.0.1", port, lambda: HubConnection(HELLO, None))
    with kept(port):
        server.close()
        await server.wait_closed()
        with pytest.raises(ConnectionRefusedError, match="Connect"):
            await dial("127.0.0.1", port, lambda: HubConnection(HELLO, None))


async def test_members_come_over_ipv6_as_well():
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    async with star(3) as job:
        link = await dial(
            "::1", job.server.port, lambda: HubConnection(HELLO, job.members[1])
        )
        await link.close()


async def test_a_silent_machine_is_noticed_and_small_frames_are_not_held_back():
    async with star(2) as job:
        await job.all_connected()
        (guest,) = job.server._guests
        for end in (guest, job.doors[1].connection):
            sock = end._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30000
            assert not os.get_inheritable(sock.fileno())


@pytest.mark.usefixtures("shared_ports")
async def test_a_forked_child_keeps_no_rank_alive():
    async with star(2) as job:
        await job.all_connected()
        with forked(), kept(job.server.port):
            job.kill(1)
            with pytest.raises(PeerError, match="rank 1 was lost"):
                await job.members[0].consult("t", b"", never)
            await job.members[0].close()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", job.server.port)


@pytest.mark.parametrize("at", range(1, 6))
async def test_a_child_forked_during_the_greeting_keeps_no_rank_alive(at):
    async with star(2) as job:
        make = partial(HubConnection, Hello(TOKEN, 1, 2), job.members[1])
        dialling = asyncio.ensure_future(dial("127.0.0.1", job.server.port, make))
        # At first neither end has a transport.
        await turns(at)
        with forked():
            (await dialling).abort()
            with pytest.raises(PeerError, match="rank 1 was lost"):
                await job.members[0].consult("t", b"", never)


async def test_a_forked_child_does_not_disturb_its_parent():
    async with star(2) as job:
        await job.all_connected()
        with forked():
            pass
        assert await consult_all(job.members, "t") == [b"0|1"] * 2


async def test_a_forked_child_keeps_what_has_the_number_of_a_socket_that_was_closed():
    async with star(2) as job:
        await job.all_connected()
        read, write = os.pipe()
        sock = socket.socket()
        keep_from_children(sock)
        fd = sock.fileno()
        sock.close()
        os.dup2(write, fd)
        with forked(lambda: os.write(fd, b"!")):
            assert os.read(read, 1) == b"!"
        for each in (read, write, fd):
            os.close(each)


@contextlib.contextmanager
def forked(first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """A child that lives until the end of the block; it has done `first` before.

    Forked by the main thread. In a child of another one CPython destroys what the main
    thread has, before anything else, and torch's caches may have a gloo group in it,
    which would wait for ever for its threads.
    """
    wait, release = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(release)
            first()
            os.write(tell, b"x")
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(wait)
    os.close(tell)
    try:
        # Until it has let go it has the sockets as well.
        assert os.read(told, 1) == b"x"
        yield
    finally:
        os.close(told)
        os.close(release)
        os.waitpid(child, 0)


async def test_the_hub_makes_room_for_a_descriptor_a_member():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = HubServer(Hub(600, 30), 600, TOKEN)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        await server.start()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600 + 512, before[1])
    finally:
        await server.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_a_limit_that_is_too_low_is_told(monkeypatch, caplog):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    server = HubServer(Hub(600, 30), 600, TOKEN)
    with caplog.at_level(logging.WARNING, "aiockpt.ranks.server"):
        await server.start()
    await server.close()
    assert limits == [(1024, 1024)]
    assert "1112 are needed" in caplog.text


@pytest.mark.usefixtures("shared_ports")
async def test_a_hub_cancelled_while_it_starts_listens_to_nobody():
    server = HubServer(Hub(3, 30), 3, TOKEN)
    start = asyncio.ensure_future(server.start())
    await settled(lambda: server.port)
    with kept(server.port):
        assert start.cancel()
        await asyncio.wait([start])
        assert start.cancelled()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", server.port)


async def test_a_hub_closes_though_a_member_does_not(monkeypatch):
    monkeypatch.setattr("aiockpt.ranks.server._GOODBYE_S", 0.01)
    server = HubServer(Hub(3, 30), 3, TOKEN)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(framed(HELLO))
    await reader.readexactly(len(framed(Welcome())))
    await server.close()
    await server.close()
    assert not server._guests
    writer.close()


async def test_a_member_closes_though_the_hub_does_not(monkeypatch):
    monkeypatch.setattr("aiockpt.ranks.link._GOODBYE_S", 0.01)
    async with star(2) as job:
        await job.all_connected()
        (guest,) = job.server._guests
        guest._transport.pause_reading()
        await job.members[1].close()
        assert job.doors[1].connection.ended.done()
        guest._transport.resume_reading()
        await settled(guest.ended.done)
