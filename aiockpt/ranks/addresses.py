"""Where a hub can be reached, told by rank 0 and understood by the others.

Everything here may block: it asks the resolver.
"""

__all__ = ["Address", "address_of", "hosts_to_try"]

import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

_LOOPBACKS = ("127.0.0.1", "::1")
# Reserved for documentation: nobody is there, and nothing is sent. Asking for the way
# tells which of its own addresses this machine would use.
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
_ANY_PORT = 9


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A hub's place.

    Attributes:
        hosts: Numeric addresses, the likeliest first.
        port: On all of them.
        token: What a member shows.
        machine: Names the machine and the network that its processes see.
    """

    hosts: tuple[str, ...]
    port: int
    token: str
    machine: str


def address_of(port: int, token: str, store_host: str | None) -> Address:
    """The address of a hub that listens in this process.

    Args:
        port: Where it listens.
        token: What it wants to be shown.
        store_host: Where the job's store is; None where that is no machine.
    """
    hosts: list[str] = []
    store = _resolved([store_host] if store_host else [])
    for host in (*store, *_ELSEWHERE):
        hosts += _way_to(host)
    hosts += _resolved([socket.gethostname()])
    return Address(tuple(_for_others(hosts)), port, token, _machine())


def hosts_to_try(address: Address, store_host: str | None) -> list[str]:
    """Numeric addresses at which this process may find the hub, in this order.

    On the hub's own machine that is the loopback: it works whatever the interfaces
    and the firewall are like. Elsewhere first what this process was told of rank 0's
    machine; that is often the store's, though not always. Then what rank 0 says.
    """
    if address.machine == _machine():
        return [*_LOOPBACKS, *address.hosts]
    told = [os.environ.get("MASTER_ADDR"), store_host]
    return _for_others([*_resolved(host for host in told if host), *address.hosts])


def _machine() -> str:
    """The same text in processes that share a loopback interface, and only there."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
            network = Path("/proc/self/ns/net").readlink()
            return f"{boot.strip()} {network}"
    return socket.gethostname()


def _resolved(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        # A name that this machine cannot resolve is of no use to it.
        with contextlib.suppress(OSError, UnicodeError):
            for *_, place in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
                yield str(place[0])


def _way_to(host: str) -> Iterator[str]:
    """The address of this machine on its way to `host`, if there is one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((host, _ANY_PORT))  # which sends nothing
            yield str(sock.getsockname()[0])


def _for_others(hosts: Iterable[str]) -> list[str]:
    """Without repetition, and without what means another machine elsewhere."""
    known: dict[str, None] = {}
    for host in hosts:
        # A scope (`%eth0`) belongs to the machine that named it.
        place = ipaddress.ip_address(host.partition("%")[0])
        if not (place.is_loopback or place.is_link_local or place.is_unspecified):
            known[host] = None
    return list(known)
