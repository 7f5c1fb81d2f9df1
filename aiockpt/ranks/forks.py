"""Sockets that a forked child does not keep open.

A connection ends, for the other side, when the last process that holds its socket is
gone: the workers of a data loader would keep a killed rank alive. So a child that
`os.fork` makes lets go of these sockets at once. (One that is made in other ways, by
foreign code that forks without exec, keeps them as long as it lives.)
"""

__all__ = ["keep_from_children", "let_go"]

import contextlib
import os
import socket

_fds: set[int] = set()


def keep_from_children(sock: socket.socket) -> int:
    """Returns the descriptor, which no child forked from here on has open."""
    fd = sock.fileno()
    _fds.add(fd)
    return fd


def let_go(fd: int) -> None:
    """Forgets a descriptor that is about to be closed."""
    _fds.discard(fd)


def _release() -> None:
    """Puts an empty socket in the place of each.

    Closing them is not enough: the child's copies of the objects would later close
    the same numbers, which by then belong to other files.
    """
    with contextlib.suppress(OSError):  # a child out of descriptors keeps them
        with socket.socket() as empty:
            for fd in _fds:
                os.dup2(empty.fileno(), fd, inheritable=False)
    _fds.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release)
